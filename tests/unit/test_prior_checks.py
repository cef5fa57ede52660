"""The self-test of denoisers passes what is right and rejects impostors."""

import pytest
import torch

import invdiff
from invdiff import InvdiffError, priors
from invdiff.prior import FunctionDenoiser, Prior
from invdiff.priors import VE, VP, check_denoiser, from_network
from tests.unit.test_parametrisation import column

SPACE = invdiff.Space((1, 8, 8), torch.float64)
MIDDLE, FRAME = 0.5, VP.from_betas()


@pytest.fixture(scope="module")
def field():
    """Images around 0.5 with a standard deviation of 0.5: those of a network for [-1, 1] that meets [0, 2]."""
    stationary = priors.StationaryGaussian((8, 8), correlation_length=1.5, mean=0.0)
    return stationary.denoiser, stationary.denoiser.sample(200, seed=1)


def epsilon(field, frame=FRAME):
    """Exact epsilon network of the field; asks its own table for the level of a step."""
    abar = frame.time  # the inverse of time(sigma) by bisection on a fine grid
    grid = torch.logspace(-2, 2.19, 20001, dtype=torch.float64).clamp(frame.sigma_min, frame.sigma_max)
    steps = abar(grid)

    def network(z, t):
        sigma = grid[torch.searchsorted(steps, t.contiguous()).clamp(max=len(grid) - 1)]
        x = z * column((1 + sigma**2).sqrt())
        return (x - field[0](x, sigma)) / column(sigma)

    return network


def test_exact_denoisers_pass(field):
    report = check_denoiser(field[0], field[1])
    assert report.ok, report
    report = check_denoiser(from_network(epsilon(field), "epsilon", FRAME, SPACE), field[1])
    assert report.ok, report


def failed(prior, samples):
    return set(check_denoiser(prior, samples).failed)


@pytest.mark.parametrize("declared", ["v", "x0", "score"])
def test_wrong_parametrisation_is_rejected(field, declared):
    names = failed(from_network(epsilon(field), declared, FRAME, SPACE), field[1])
    assert any(n.startswith("error at") for n in names) and any(n.startswith("step at") for n in names)


@pytest.mark.parametrize(
    "other",
    [VP.from_betas("scaled_linear", 1000, 0.00085, 0.012), VP.from_betas("cosine")],
    ids=["scaled_linear", "cosine"],
)
def test_wrong_table_is_rejected(field, other):
    assert any(
        n.startswith("step at")
        for n in failed(from_network(epsilon(field, other), "epsilon", FRAME, SPACE), field[1])
    )


class Misjudged(VP):
    def time(self, sigma):
        return super().time(1.5 * sigma)


def test_levels_that_are_half_too_large_are_rejected(field):
    wrong = failed(from_network(epsilon(field), "epsilon", Misjudged.from_betas(), SPACE), field[1])
    assert any(n.startswith("step at") for n in wrong)


def test_wrong_range_is_rejected(field):
    """Images in [-1, 1], declared to be [0, 1]."""
    network = epsilon(field)
    right = from_network(network, "epsilon", FRAME, SPACE, network_range=(-1, 1), image_range=(0, 1))
    images = (field[1] + 1) / 2
    assert check_denoiser(right, images).ok
    wrong = failed(from_network(network, "epsilon", FRAME, SPACE), images)
    assert any(n.startswith("mean at sigma") for n in wrong)


def test_mixed_rows_chance_and_nan_are_rejected(field):
    exact, samples = field

    def denoiser(change):
        return FunctionDenoiser(lambda x, s: change(exact(x, s), s), SPACE, exact.sigma_min, exact.sigma_max)

    assert failed(denoiser(lambda d, s: d), samples) == set()
    mixed = failed(denoiser(lambda d, s: d + 1e-6 * (d.mean(0) - d)), samples)
    assert mixed == {"rows are independent"}
    generator = torch.Generator().manual_seed(0)

    def shaken(d, s):
        return d + 1e-7 * torch.randn(d.shape, generator=generator, dtype=torch.float64).to(d)

    assert "repeatable" in failed(denoiser(shaken), samples)
    assert "finite in float32 at both ends" in failed(
        denoiser(lambda d, s: d / 0 if s.dtype == torch.float32 else d), samples
    )
    assert failed(denoiser(lambda d, s: d * torch.nan), samples)


def test_needs_samples(field):
    with pytest.raises(InvdiffError, match="at least two clean samples"):
        check_denoiser(Prior(field[0]), field[1][:1])


def test_a_function_that_does_nothing_is_rejected(field):
    identity = from_network(lambda z, t: z, "x0", VE(0.01, 20.0), SPACE)
    assert "error at sigma 20" in failed(identity, field[1])
