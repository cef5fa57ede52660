"""Active acquisition: entropies against quadrature, and choices against closed-form predictive variances."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch

import invdiff
from invdiff import likelihoods, operators, priors, reference, samplers
from invdiff.acquiring import condition, mixture_entropy, predictive_entropy, restrict
from invdiff.errors import InvdiffError
from invdiff.operators.basic import Matrix
from invdiff.spaces import Space

N, SIGMA = 12, 0.1
SPACE = Space((1, N, N), torch.float64)
#: Nearly exact on a Gaussian prior, and quick.
SAMPLER = samplers.TMPD(steps=25, tol=1e-3)


def distances(z):
    return (z[:, None] - z) ** 2


def mixtures():
    rng = np.random.default_rng(0)
    for count in (2, 5, 16, 64):
        for spread in (0.0, 0.1, 0.5, 1.0, 3.0, 30.0):
            for gap in (0.0, 5.0):
                yield rng.standard_normal(count) * spread + gap * spread * (rng.random(count) > 0.5)


def quadrature(z, sigma):
    grid = np.linspace(z.min() - 9 * sigma, z.max() + 9 * sigma, 20001)
    p = np.exp(-(((grid[:, None] - z) / sigma) ** 2) / 2).mean(1) / (sigma * math.sqrt(2 * math.pi))
    return -(p * np.log(np.maximum(p, 1e-300))).sum() * (grid[1] - grid[0])


@pytest.mark.parametrize("sigma", [1.0, 0.2])
def test_entropy_of_one_dimensional_mixtures_against_quadrature(sigma):
    for z in mixtures():
        ours = float(mixture_entropy(torch.from_numpy(distances(sigma * z)), 1, sigma**2))
        exact = quadrature(sigma * z, sigma)
        assert -0.01 < ours - exact < 0.14
        near = np.abs(np.diff(np.sort(z))).max() < 0.05 or (len(z) == 2 and np.ptp(z) > 15)
        assert not near or abs(ours - exact) < 0.005


def test_entropy_grows_with_distance_and_never_overflows():
    z = torch.randn(8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    d2 = (z[:, None] - z).square().sum(-1)
    values = [float(mixture_entropy(c * d2, 3.0)) for c in (0.0, 1e-6, 0.01, 0.1, 1.0, 10.0, 1e3)]
    assert values == sorted(values) and values[0] == pytest.approx(1.5 * math.log(2 * math.pi * math.e))
    for huge in (1e8, 1e300):
        top = float(mixture_entropy(huge * d2.clamp_min(1e-3).fill_diagonal_(0), 3.0))
        assert top == pytest.approx(values[0] + math.log(8)), "8 predictions that never meet"


def test_predictive_entropy_grows_with_the_spread_of_wide_predictions_too():
    """A few draws of a wide law are all far apart; the bandwidth still tells wider from wide."""
    z = torch.randn(16, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    groups = torch.tensor([0, 0, 1, 1, 2, 2])
    entropies = torch.stack([predictive_entropy(c * z, groups, 3) for c in (0.01, 0.1, 1.0, 10.0, 1e3, 1e5)])
    assert bool((entropies.diff(dim=0) > 0).all())
    wide = entropies[-1] - entropies[-2]
    torch.testing.assert_close(wide, torch.full((3,), 2 * math.log(100.0), dtype=torch.float64), rtol=0.01, atol=0)


def test_predictive_entropy_is_near_that_of_a_gaussian():
    generator = torch.Generator().manual_seed(2)
    std = torch.tensor([0.3, 1.0, 5.0, 40.0], dtype=torch.float64)
    z = std * torch.randn(64, 4, generator=generator, dtype=torch.float64)
    ours = predictive_entropy(z, torch.arange(4), 4)
    exact = 0.5 * (2 * math.pi * math.e * (1 + std**2)).log()
    assert float((ours - exact).abs().max()) < 0.3


def test_conditioning_is_that_of_a_gaussian():
    """As many draws as it takes to span the law: then the update is exact, means untouched."""
    generator = torch.Generator().manual_seed(3)
    root = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    z = torch.randn(300, 5, generator=generator, dtype=torch.float64) @ root.T
    known = torch.tensor([True, False, True, False, False])
    after = condition(z, known)
    c = torch.cov(z.T)
    s = c[known][:, known] + torch.eye(2)
    expected = c - c[:, known] @ torch.linalg.solve(s, c[known])
    torch.testing.assert_close(torch.cov(after.T), expected)
    torch.testing.assert_close(after.mean(0), z.mean(0))


# ---- the loop ----


@functools.lru_cache
def field():
    """A smooth field with full data; pixels and k-space lines are told apart by the operator."""
    prior = priors.StationaryGaussian((N, N), correlation_length=2.0)
    return prior, prior.denoiser.sample(1, 3)


def pixels():
    prior, x = field()
    return invdiff.Problem.simulate(operators.Mask(torch.ones(N, N), SPACE), likelihoods.Gaussian(SIGMA), x), prior


def kspace():
    prior, x = field()
    operator = operators.SubsampledFourier(torch.ones(N, N), SPACE)
    return invdiff.Problem.simulate(operator, likelihoods.Gaussian(SIGMA), x), prior


def exact_width(problem, prior):
    return float(reference.posterior(problem, prior).std().square().mean().sqrt())


def test_the_best_next_pixel_is_one_of_largest_predictive_variance():
    problem, prior = pixels()
    start = [0, 5, 40, 66, 77, 90, 130]
    made = invdiff.acquire(problem, prior, SAMPLER, budget=8, start=start, draws=128, seed=0)
    mask = torch.zeros(N * N)
    mask[start] = 1
    variance = reference.posterior(restrict(problem, mask.reshape(1, N, N)), prior).std()[0].flatten() ** 2
    entropy = made.history[0].entropy
    left = mask == 0
    assert bool(entropy[start].isnan().all()) and bool(entropy[left].isfinite().all())
    chosen = made.history[0].candidate
    assert made.order == (*start, chosen) and bool(left[chosen])
    assert variance[chosen] > 0.8 * variance[left].max()
    exact = 0.5 * (2 * math.pi * math.e * (1 + variance / SIGMA**2)).log()
    assert np.corrcoef(entropy[left], exact[left])[0, 1] > 0.9
    assert float((entropy - exact)[left].abs().mean()) < 0.25


def test_the_best_next_line_is_the_one_of_largest_predictive_variance():
    problem, prior = kspace()
    made = invdiff.acquire(problem, prior, SAMPLER, budget=2, axis="ky", draws=32, seed=0)
    middle = N // 2
    mask = torch.zeros(1, N, N)
    mask[:, middle] = 1
    exact = reference.posterior(restrict(problem, mask), prior)
    root = torch.linalg.cholesky(exact.covariance()[0] + 1e-9 * torch.eye(N * N))
    power = problem.operator(root.T.reshape(-1, 1, N, N)).abs().square().sum((0, 1, 3))  # tr of line covariances
    power[middle] = 0
    assert made.order[0] == middle
    assert made.order[1] in torch.argsort(power, descending=True)[:2], "of a pair k, -k either is best"


def test_chosen_pixels_are_worth_more_than_random_ones():
    problem, prior = pixels()
    made = invdiff.acquire(problem, prior, samplers.DDS(steps=12), budget=13, per_round=3, draws=24, seed=0)
    assert len(made.order) == len(set(made.order)) == 13
    assert made.order[1:] == tuple(c.candidate for c in made.history)
    chosen = exact_width(made.problem, prior)
    for seed in range(3):
        mask = torch.zeros(N * N)
        mask[torch.randperm(N * N, generator=torch.Generator().manual_seed(seed))[:13]] = 1
        assert chosen < 0.97 * exact_width(restrict(problem, mask.reshape(1, N, N)), prior)


def test_the_result_says_what_was_measured(tmp_path):
    problem, prior = kspace()
    made = invdiff.acquire(
        problem, prior, samplers.DDS(steps=5), budget=3, axis="kx", start=[2, 6], draws=4, seed=0, progress=False
    )
    assert set(made.order[:2]) == {2, 6}
    lines = np.zeros(N)
    lines[list(made.order)] = 1
    made.posterior.save(tmp_path / "acquired.nc")
    with invdiff.open_posterior(tmp_path / "acquired.nc") as stored:
        mask = np.asarray(stored.tree["observed_data"]["mask"])
        assert np.array_equal(np.broadcast_to(mask, (1, N, N))[0], np.broadcast_to(lines, (N, N)))
        meta = stored.provenance["problem"]["meta"]
        assert meta["acquired"] == list(made.order) and meta["acquired_along"] == "kx"
    again = invdiff.sample(made.problem, prior, samplers.DDS(steps=5), draws=4, seed=0)
    assert np.array_equal(np.asarray(again.draws), np.asarray(made.posterior.draws))
    repeated = invdiff.acquire(
        problem, prior, samplers.DDS(steps=5), budget=3, axis="kx", start=[2, 6], draws=4, seed=0, progress=False
    )
    assert repeated.order == made.order and torch.equal(repeated.mask, made.mask)


def test_only_what_was_chosen_is_measured():
    """With an instrument in place of data, and data that are not there until they are asked for."""
    problem, prior = kspace()
    blank = invdiff.Problem(problem.operator, problem.likelihood, torch.zeros_like(problem.y))
    asked = []

    def measure(mask):
        asked.append(mask)
        return problem.y[0] * mask

    options = {"budget": 4, "axis": "ky", "draws": 4, "seed": 0}
    live = invdiff.acquire(blank, prior, samplers.DDS(steps=5), measure=measure, **options)
    retrospective = invdiff.acquire(problem, prior, samplers.DDS(steps=5), **options)
    assert live.order == retrospective.order
    assert np.array_equal(np.asarray(live.posterior.draws), np.asarray(retrospective.posterior.draws))
    assert [int(m[0, :, 0].sum()) for m in asked] == [1, 2, 3, 4]


def test_a_mask_of_the_operator_limits_the_offer():
    problem, prior = kspace()
    lines = torch.zeros(N, N)
    lines[::2] = 1
    made = invdiff.acquire(
        restrict(problem, lines[None]), prior, samplers.DDS(steps=4), budget=5, axis="ky", draws=4
    )
    assert all(line % 2 == 0 for line in made.order)
    assert bool(made.history[0].entropy[1::2].isnan().all())


@pytest.mark.parametrize("kind", ["mri", "composition"])
def test_other_operators(kind):
    generator = torch.Generator().manual_seed(0)
    if kind == "mri":
        maps = torch.randn(2, N, N, dtype=torch.complex128, generator=generator)
        operator = operators.MultiCoilMRI(torch.ones(N, N), maps)
        image = operator.domain
        prior = invdiff.Prior(
            priors.StationaryGaussian((2, N, N)).denoiser, codec=invdiff.codec.ComplexChannels(image)
        )
    else:
        operator, image = Matrix(torch.randn(20, N * N, generator=generator).double(), SPACE), SPACE
        prior = field()[0]
    problem = invdiff.Problem.simulate(operator, likelihoods.Gaussian(SIGMA), image.randn(1))
    axis = "ky" if kind == "mri" else None
    made = invdiff.acquire(problem, prior, samplers.DDS(steps=4), budget=4, axis=axis, draws=4, seed=0)
    y = made.problem.y[0]
    taken = y[0].abs().sum(-1) > 0 if kind == "mri" else y.abs() > 0
    assert sorted(made.order) == taken.nonzero()[:, 0].tolist()
    mask = made.posterior.tree["observed_data"]["mask"]
    assert float(mask.max()) == 1 and float(mask.min()) == 0
    full = restrict(problem, torch.ones(operator.range.shape if kind != "mri" else (1, N, N)))
    x = image.randn(1, 5)
    torch.testing.assert_close(full.operator(x), operator(x))


def test_what_does_not_fit_is_refused_in_one_sentence():
    problem, prior = kspace()

    def attempt(problem=problem, sampler="dds", **options):
        return invdiff.acquire(problem, prior, sampler, **{"budget": 3, "axis": "ky", "draws": 4, **options})

    for words, change in (
        ("budget", {"budget": 0}),
        ("budget", {"budget": N + 1}),
        ("per_round", {"per_round": 0}),
        ("no dimension 'z'", {"axis": "z"}),
        ("among the 12 candidates", {"start": [N]}),
        ("among the 12 candidates", {"start": []}),
        ("at least 2 draws", {"draws": 1}),
        ("at least 2 draws", {"sampler": "reddiff"}),
        ("one case at a time", {"problem": problem.rows(torch.tensor([0, 0]))}),
        ("noise level", {"problem": invdiff.Problem(problem.operator, likelihoods.Gaussian(0.0), problem.y)}),
    ):
        with pytest.raises(InvdiffError, match=words) as caught:
            attempt(**change)
        assert "\n" not in str(caught.value)
