"""Positron emission tomography: closed-form counts of discs, noise, maximum likelihood, a posterior, refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import ndimage

import invdiff
from invdiff import likelihoods, operators, pet, priors, reference
from invdiff.errors import InvdiffError
from invdiff.spaces import Space
from invdiff.testing import dense_matrix

HALF_TURN = np.linspace(0, np.pi, 24, endpoint=False)
SPACE = Space((1, 64, 64), torch.float64, units="Bq/mL", spacing={"y": 3.0, "x": 3.0})
WATER = 0.0096  # 1/mm at 511 keV


def disc(radius: float, n: int = 64, spacing: float = 3.0, at: tuple[float, float] = (0.0, 0.0)) -> torch.Tensor:
    """Share of every pixel that a disc covers, from 8 x 8 points, ``(1, 1, n, n)``."""
    points = (np.arange(8 * n) - (8 * n - 1) / 2) * spacing / 8
    inside = np.hypot(points[:, None] - at[0], points - at[1]) < radius
    return torch.from_numpy(inside.reshape(n, 8, n, 8).mean((1, 3)))[None, None]


def chords(s: np.ndarray, radius: float) -> np.ndarray:
    return 2 * np.sqrt(np.clip(radius**2 - s**2, 0, None))


def relative(found: torch.Tensor, exact: np.ndarray) -> float:
    return float(np.linalg.norm(found.numpy() - exact) / np.linalg.norm(exact))


def test_dense_matrix_against_its_factors():
    """Weights, line integrals and scipy's Gaussian, multiplied."""
    shape, angles, mu = (1, 9, 12), HALF_TURN[::4], 0.1 * disc(3.0, 12, 1.0)[0, :, 3:]
    n = np.linspace(0.5, 2, 6)[:, None]
    given = {"bins": 14, "spacing": {"y": 1.0, "x": 0.8}, "dtype": torch.float64}
    op = operators.PET(
        shape, angles, sensitivity=n, duration=7.0, attenuation_map=mu, resolution=1.3, bin_width=1.1, **given
    )
    rays = operators.ParallelBeamCT(
        shape, angles, detectors=14, detector_spacing=1.1, spacing=given["spacing"], dtype=torch.float64
    )
    std = 1.3 / math.sqrt(8 * math.log(2))
    eye = np.eye(108).reshape(108, 9, 12)
    reach = (math.ceil(6 * std), math.ceil(6 * std / 0.8))
    blur = [ndimage.gaussian_filter(e, (std, std / 0.8), mode="constant", radius=reach).ravel() for e in eye]
    weights = 7.0 * n * np.exp(-rays(mu[None])[0, 0].numpy())
    expected = weights.reshape(-1, 1) * (dense_matrix(rays).numpy() @ np.stack(blur, 1))
    np.testing.assert_allclose(dense_matrix(op), expected, atol=1e-12)


@pytest.mark.parametrize("ring", [None, 150.0])
def test_counts_of_a_disc_in_an_attenuating_disc(ring):
    """``T n 2 c sqrt(r^2 - s^2) exp(-2 mu sqrt(R^2 - s^2))`` to 1 % (0.5 here), straight or on a ring."""
    mu = WATER * disc(80.0)
    op = operators.PET(
        SPACE, HALF_TURN, sensitivity=2e-5, duration=600.0, attenuation_map=mu, ring_radius=ring, bin_width=2.5
    )
    assert op.range.units == "counts" and op.range.dims == ("channel", "view", "bin")
    s = op.positions
    along = (np.arange(len(s)) - (len(s) - 1) / 2) * 2.5
    np.testing.assert_allclose(s, along if ring is None else ring * np.sin(along / ring), atol=1e-12)
    exact = 600 * 2e-5 * 4000 * chords(s, 50.0) * np.exp(-WATER * chords(s, 80.0))
    inner = np.abs(s) < 47  # pixels blur the edge
    found = op(4000 * disc(50.0))[0, 0]
    assert relative(found[:, inner], np.broadcast_to(exact[inner], (24, inner.sum()))) < 0.01
    assert float(found.sum(1).mean() / exact.sum()) == pytest.approx(1, rel=1e-2)
    assert exact.max() == pytest.approx(600 * 2e-5 * 4000 * 100 * math.exp(-160 * WATER), rel=1e-2)


def test_what_needs_bins_at_even_distances_stays_away_from_a_ring():
    """GPU kernels that find bins from positions, and filtered back-projection."""
    even, ring = (operators.PET(SPACE, HALF_TURN, ring_radius=r, method="matrix-free").rays for r in (None, 150.0))
    gpu = torch.device("cuda")
    assert ring._implementation(gpu) == "reference"
    assert ring._implementation(torch.device("cpu")) == even._implementation(torch.device("cpu"))
    with pytest.raises(InvdiffError, match="correct the data for the arc"):
        ring.fbp(ring.range.zeros(1))


def test_attenuation_factors_are_those_of_the_map():
    mu = WATER * disc(80.0)
    by_map = operators.PET(SPACE, HALF_TURN, attenuation_map=mu[0])
    factors = torch.exp(-operators.ParallelBeamCT(SPACE, HALF_TURN)(mu))
    given = operators.PET(SPACE, HALF_TURN, attenuation=factors)
    assert torch.equal(by_map.weights, given.weights)


def test_resolution_is_the_width_of_a_point():
    """The profile of a point, seen along the columns, has the second moment ``(FWHM / 2.355)^2``."""
    op = operators.PET(SPACE, [0.0], resolution=9.0, bins=65, bin_width=3.0)
    x = SPACE.zeros(1)
    x[0, 0, 20, 32] = 1.0
    profile, s = op(x)[0, 0, 0].numpy(), op.positions
    mean = (profile * s).sum() / profile.sum()
    std = math.sqrt((profile * (s - mean) ** 2).sum() / profile.sum() - 3.0**2 / 4)  # bins lie between columns
    assert std == pytest.approx(9.0 / 2.3548, rel=1e-3)
    assert profile.sum() * 3.0 == pytest.approx(9.0)  # the integral over a pixel of 3 x 3


def test_counts_grow_with_duration_and_cases_have_their_own():
    x = 1000 * disc(50.0)
    short, long = (operators.PET(SPACE, HALF_TURN, sensitivity=1e-3, duration=t) for t in (10.0, 1000.0))
    torch.testing.assert_close(long(x), 100 * short(x))
    spread = []
    for op in (short, long):
        y = invdiff.Problem.simulate(op, pet.noise(op), x, seed=0).y
        seen = op(x) > 10
        relative_error = (y / op(x) - 1)[seen]
        spread.append(float((relative_error * op(x)[seen].sqrt()).std()))
        assert torch.equal(y, y.round())
    assert spread == pytest.approx([1.0, 1.0], abs=0.12)
    both = operators.PET(SPACE, HALF_TURN, sensitivity=torch.tensor([0.01, 1.0]).reshape(2, 1, 1, 1))
    assert both.n_cases == 2
    torch.testing.assert_close(both(x.expand(2, -1, -1, -1)), torch.cat([short(x), long(x)]))


def test_missing_detectors_hold_no_data():
    n = torch.ones(24, 64, dtype=torch.float64)
    n[:, 20:24] = 0
    op = operators.PET(SPACE, HALF_TURN, sensitivity=n, bins=64)
    problem = invdiff.Problem.simulate(op, pet.noise(op, randoms=5.0), disc(50.0), seed=0)
    assert (problem.y[..., 20:24] == 0).all() and (problem.y[..., :20].mean() > 4).all()
    image = pet.mlem(problem, 30)
    assert float(image[disc(40.0) == 1].mean()) == pytest.approx(1.0, abs=0.1)


def scan(background: float = 0.0, duration: float = 1.0) -> invdiff.Problem:
    space = SPACE.replace(shape=(1, 32, 32), spacing={"y": 6.0, "x": 6.0})
    mu = WATER * disc(80.0, 32, 6.0)
    op = operators.PET(space, HALF_TURN, attenuation_map=mu, duration=duration, resolution=6.0)
    x = disc(70.0, 32, 6.0) + 2 * disc(20.0, 32, 6.0, (20.0, -25.0))
    return invdiff.Problem.simulate(op, pet.noise(op, scatter=background, randoms=background), x, seed=1)


@pytest.mark.parametrize("background", [0.0, 4.0])
def test_mlem_never_lowers_the_likelihood(background):
    problem = scan(background)
    x, values = pet.mlem(problem, 1), []
    for _ in range(30):
        values.append(float(problem.log_likelihood(x)))
        x = pet.mlem(problem, 1, x)
    rises = np.diff(values)
    assert (rises > -1e-9 * abs(values[0])).all() and values[-1] > values[0] + 100
    torch.testing.assert_close(x, pet.mlem(problem, 31))
    assert (x >= 0).all()


def test_mlem_conserves_counts():
    problem = scan()
    for iterations in (1, 5):
        image = pet.mlem(problem, iterations)
        assert float(problem.operator(image).sum()) == pytest.approx(float(problem.y.sum()), rel=1e-12)
    a, y = problem.operator, problem.y
    one = torch.ones_like(image)
    start = one * y.sum() / a(one).sum()
    expected = start / a.adjoint(torch.ones_like(y)) * a.adjoint(y / a(start))
    torch.testing.assert_close(pet.mlem(problem, 1), expected)


def test_mlem_finds_the_activity_and_units_of_the_data_do_not_matter():
    problem = scan(2.0, duration=200.0)
    image = pet.mlem(problem, 100)
    assert float((image - problem.x_true).abs().mean()) < 0.15
    assert float(image[disc(50.0, 32, 6.0) == 1].mean() / problem.x_true[disc(50.0, 32, 6.0) == 1].mean()) == (
        pytest.approx(1.0, abs=0.02)
    )
    scaled = invdiff.Problem(3 * problem.operator, likelihoods.Poisson(3.0, 3 * 4.0), 3 * problem.y)
    torch.testing.assert_close(pet.mlem(scaled, 5), pet.mlem(problem, 5))


def test_posterior_of_counts_against_the_laplace_approximation():
    """By DAPS, and exactly with Gaussian noise of the counts expected by an image.

    At hundreds of counts per bin the posterior is Gaussian around its mode; draws have its mean and width.
    """
    space = Space((1, 6, 6), torch.float64)
    op = operators.PET(space, HALF_TURN[::3], sensitivity=4.0, attenuation_map=torch.full((6, 6), 0.05))
    centres = torch.stack(torch.meshgrid(*[torch.arange(6.0).double()] * 2, indexing="ij"), -1).reshape(36, 2)
    covariance = 9.0 * torch.exp(-0.5 * torch.cdist(centres, centres) ** 2 / 1.5**2) + 0.1 * torch.eye(36).double()
    prior = priors.Gaussian(torch.full((36,), 20.0).double(), covariance, space)
    law = pet.noise(op, scatter=20.0, randoms=10.0)
    problem = invdiff.Problem.simulate(op, law, prior.denoiser.sample(1, seed=3), seed=4)
    assert "linear" in problem.capabilities and "quadratic" not in problem.capabilities

    a, y, x = dense_matrix(op), problem.y.flatten(), torch.full((36,), 20.0).double()
    precision = torch.linalg.inv(covariance)
    for _ in range(20):  # Newton's method
        rate = a @ x + 30.0
        hessian = a.mT @ (y / rate**2)[:, None].mul(a) + precision
        x = x + torch.linalg.solve(hessian, a.mT @ (y / rate - 1) - precision @ (x - 20.0))
    std = torch.linalg.inv(hessian).diagonal().sqrt()

    near = reference.posterior(pet.gaussian(problem, pet.mlem(problem, 20)), prior)
    assert float(((near.mean()[0].flatten() - x) / std).square().mean().sqrt()) < 0.1
    assert float((near.std()[0].flatten() / std).mean()) == pytest.approx(1, abs=0.02)

    posterior = invdiff.sample(problem, prior, "daps", draws=48, seed=0)
    mean, width = (torch.from_numpy(v.values).flatten() for v in (posterior.mean(), posterior.std()))
    assert float(((mean - x) / std).square().mean().sqrt()) < 0.25  # 0.14 is the error of 48 draws
    assert float((width / std).mean()) == pytest.approx(1, abs=0.12)  # 1.02 here
    assert float(((torch.full((36,), 20.0) - x) / std).square().mean().sqrt()) > 1.2  # the prior's mean is far


def test_gaussian_noise_is_that_of_the_expected_counts():
    n = torch.ones(24, 64, dtype=torch.float64)
    n[:, 20:24] = 0
    op = operators.PET(SPACE, HALF_TURN, sensitivity=n, bins=64)
    x = disc(50.0)
    problem = invdiff.Problem.simulate(5 * op, likelihoods.Poisson(5.0, 5 * 4.0), x, seed=0)
    found = pet.gaussian(problem, x)
    live = n[0] > 0
    assert "quadratic" in found.capabilities and found.x_true is problem.x_true
    torch.testing.assert_close(found.likelihood.sigma[..., live], (25 * (op(x) + 4)).sqrt()[..., live])
    whitened = (found.residual(x) / found.likelihood.sigma)[..., live]
    assert float(whitened.std()) == pytest.approx(1.0, abs=0.07) and abs(float(whitened.mean())) < 0.1
    plain = pet.gaussian(invdiff.Problem(op, pet.noise(op, 4.0), problem.y), x)
    assert (plain.y[..., ~live] == 0).all()


BAD = {
    "attenuation-negative": ({"attenuation": -0.1}, "attenuation must be real and not negative"),
    "attenuation-correction": ({"attenuation": 1.7}, "give their reciprocals"),
    "attenuation-shape": ({"attenuation": torch.ones(3, 4)}, "fits neither"),
    "attenuation-nan": ({"attenuation": float("nan")}, "NaN"),
    "attenuation-twice": ({"attenuation": 0.5, "attenuation_map": 0.1}, "not both"),
    "map-negative": ({"attenuation_map": -torch.ones(8, 8)}, "as low as -1"),
    "map-shape": ({"attenuation_map": torch.ones(7, 8)}, "attenuation map has shape"),
    "sensitivity-negative": ({"sensitivity": -1.0}, "not negative"),
    "sensitivity-zero": ({"sensitivity": torch.zeros(24, 1)}, "zero in all bins"),
    "sensitivity-zero-in-a-case": ({"sensitivity": torch.arange(2.0).reshape(2, 1, 1, 1)}, "zero in all bins"),
    "sensitivity-shape": ({"sensitivity": torch.ones(23, 1)}, "fits neither"),
    "cases": (
        {"sensitivity": torch.ones(2, 1, 1, 1), "attenuation": 0.5 * torch.ones(3, 1, 1, 1)},
        "sensitivity for 2 and attenuation for 3",
    ),
    "duration": ({"duration": 0.0}, "duration of the scan"),
    "resolution": ({"resolution": -1.0}, "resolution of the scanner"),
    "bins": ({"bins": 0}, "number of detectors"),
    "width": ({"bin_width": 0.0}, "width of the bins"),
    "ring-small": ({"ring_radius": 3.0}, "outside the ring"),
    "ring-bins": ({"ring_radius": 9.0, "bins": 40}, "a quarter of it"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name):
    options, message = BAD[name]
    with pytest.raises(InvdiffError, match=message):
        operators.PET((1, 8, 8), HALF_TURN, **options)


def test_a_map_in_other_units_and_narrow_bins_draw_a_warning():
    with pytest.warns(UserWarning, match=r"water has 0.0096/mm"):
        operators.PET(SPACE, HALF_TURN, attenuation_map=10 * WATER * disc(80.0))
    for ring in (None, 150.0):
        with pytest.warns(UserWarning, match="truncated=True"):
            operators.PET(SPACE, HALF_TURN, bins=50, ring_radius=ring)
        operators.PET(SPACE, HALF_TURN, bins=50, ring_radius=ring, truncated=True)


def test_bad_backgrounds_and_problems_are_refused():
    op = operators.PET((1, 8, 8), HALF_TURN[:3], bins=12)
    with pytest.raises(InvdiffError, match="scatter must be real and not negative"):
        pet.noise(op, scatter=-1.0)
    with pytest.raises(InvdiffError, match="randoms has shape"):
        pet.noise(op, randoms=torch.ones(12, 3))
    with pytest.raises(InvdiffError, match="for 2 cases and randoms for 3"):
        pet.noise(op, torch.ones(2, 1, 1, 1), torch.ones(3, 1, 1, 1))
    y = torch.ones(1, *op.range.shape)
    for reconstruct in (pet.mlem, lambda p: pet.gaussian(p, op.domain.zeros(1))):
        with pytest.raises(InvdiffError, match="for Poisson counts of a real linear operator"):
            reconstruct(invdiff.Problem(op, likelihoods.Gaussian(1.0), y))
    with pytest.raises(InvdiffError, match="no negative data"):
        pet.mlem(invdiff.Problem(op, pet.noise(op), -y))
    with pytest.raises(InvdiffError, match="at least 1 iteration"):
        pet.mlem(invdiff.Problem(op, pet.noise(op), y), 0)
    with pytest.raises(InvdiffError, match="negative weights"):
        pet.mlem(invdiff.Problem(-op, pet.noise(op), y))
    with pytest.raises(InvdiffError, match="stays at 0"):
        pet.mlem(invdiff.Problem(op, pet.noise(op), y), start=-op.domain.randn(1).abs())
