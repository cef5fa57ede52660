"""Samplers that pull, project or replace without a network gradient (and MCG), against exact posteriors."""

import functools
import math

import numpy as np
import pytest
import torch

import invdiff
from invdiff import anchors, likelihoods, operators, reference, samplers
from invdiff.callbacks import Callback
from invdiff.errors import CapabilityError, InvdiffError
from invdiff.primitives import ddim
from invdiff.spaces import Space
from tests.conformance.toys import SPACE, Keep, Square, normal_prior

DRAWS = 128
FLOOR = 1 / math.sqrt(DRAWS)


@functools.lru_cache
def field(operator, size=16):
    problem, prior = anchors.gaussian_field(size, operator, 0)
    return problem, prior, reference.posterior(problem, prior)


@functools.lru_cache
def grade(operator, sampler):
    problem, prior, exact = field(operator)
    made = invdiff.sample(problem, prior, sampler, draws=DRAWS, seed=0, max_batch=DRAWS)
    return anchors.grade(torch.from_numpy(np.asarray(made.draws)), exact)


# Regression bounds a little wider than what they reach. Columns: mean error between, std ratio between, the same
# on measured directions. Published settings are there with the widths that are wrong in them.
TABLE = [
    ("ddrm", "tuned", "mask", (0.40, 0.62), (0.90, 1.05), (1.10, 1.30)),
    ("ddrm", "tuned", "fourier", (0.38, 0.58), (0.90, 1.05), (1.08, 1.28)),
    ("ddrm", "published-100", "fourier", (0.00, 0.12), (0.65, 0.76), (0.55, 0.70)),
    ("ddnm", "tuned", "mask", (0.25, 0.48), (1.08, 1.27), (1.03, 1.22)),
    ("ddnm", "tuned", "fourier", (0.00, 0.14), (0.88, 0.99), (0.90, 1.02)),
    ("ddnm", "tuned", "blur", (0.35, 0.56), (0.82, 0.93), (0.81, 0.93)),
    ("ddnm", "published", "mask", (0.25, 0.45), (0.74, 0.89), (0.33, 0.46)),
    ("ddnm", "published-noiseless", "fourier", (0.36, 0.52), (0.53, 0.65), (-1e-9, 1e-3)),
    ("dmps", None, "fourier", (0.00, 0.18), (0.89, 0.98), (0.77, 0.88)),
    ("dmps", None, "blur", (0.08, 0.24), (0.86, 0.96), (0.90, 1.00)),
    ("dmps", "tuned", "mask", (1.00, 1.60), (2.30, 3.00), (1.40, 1.75)),
    ("nrlg", None, "fourier", (0.00, 0.17), (0.92, 1.02), (0.87, 0.97)),
    ("nrlg", None, "blur", (0.18, 0.34), (0.92, 1.02), (0.92, 1.01)),
    ("nrlg", "tuned", "mask", (0.50, 0.85), (1.40, 1.70), (0.86, 1.03)),
    ("mcg", "tuned", "fourier", (0.36, 0.54), (0.88, 1.02), (0.43, 0.58)),
    ("ilvr", "tuned", "fourier", (0.00, 0.17), (0.92, 1.03), (0.91, 1.03)),
    ("ilvr", "tuned", "blur", (0.33, 0.60), (0.82, 0.93), (0.88, 0.99)),
    ("ilvr", "published", "fourier", (0.36, 0.52), (0.53, 0.65), (-1e-9, 1e-3)),
]


@pytest.mark.parametrize(("name", "preset", "operator", "error", "width", "measured"), TABLE)
def test_heuristic_samplers_stay_where_they_are(name, preset, operator, error, width, measured):
    figures = grade(operator, samplers.get(name, preset=preset))
    assert error[0] < figures["mean_error"] < error[1]
    assert width[0] < figures["std_ratio"] < width[1]
    assert measured[0] < figures["std_ratio_measured"] < measured[1]


@pytest.mark.parametrize("operator", ["mask", "fourier", "blur"])
def test_annealed_langevin_draws_from_the_posterior(operator):
    """Right to a few percent everywhere, without a network gradient."""
    figures = grade(operator, samplers.ScoreALD())
    assert figures["mean_error"] < 1.5 * FLOOR
    assert 0.96 < figures["std_ratio"] < 1.04 and 0.94 < figures["std_ratio_measured"] < 1.04
    assert 0.88 < figures["coverage"] < 0.92


def test_momentum_saves_moves():
    """Langevin moves reach the same law with a smaller step and more evaluations, and not with as many."""
    few = grade("mask", samplers.ScoreALD(momentum=0.0, step_size=0.3))
    more = grade("mask", samplers.ScoreALD.preset("langevin"))
    assert few["std_ratio"] > 1.06 > more["std_ratio"] > 0.98


def test_time_travel_brings_unmeasured_and_measured_together():
    without = grade("mask", samplers.DDNM(travel_repeat=1))
    assert without["mean_error"] > 1.4 * grade("mask", samplers.DDNM())["mean_error"]


def test_more_levels_make_ddnm_narrower_as_its_page_says():
    widths = [
        grade("fourier", samplers.DDNM(steps=n, travel_repeat=1, order=1))["std_ratio_measured"] for n in (20, 80)
    ]
    assert widths[1] < 0.7 * widths[0]


@pytest.mark.parametrize("name", ["ddrm", "ddnm", "nrlg", "mcg", "ilvr", "deqir"])
def test_data_without_noise_are_met(name):
    operator = Keep(weight=2.0)
    problem = invdiff.Problem.simulate(operator, likelihoods.Gaussian(0.0), SPACE.randn(1, 3), seed=3)
    sampler = samplers.get(name, steps=12)
    made = invdiff.sample(problem, normal_prior(), sampler, draws=64, seed=0)
    draws = torch.from_numpy(np.asarray(made.draws)).reshape(64, *SPACE.shape)
    assert (operator(draws) - problem.y).abs().max() < 1e-9
    free = draws.std(0)[operator.mask == 0].mean()
    assert 0.55 < free < 1.8, "what is not measured keeps about the prior's width"


class _At(Callback):
    """Keep the states after some steps."""

    def __init__(self):
        self.states = []

    def on_step(self, info):
        self.states.append(info.state["x"].clone())


def test_dmps_is_the_published_update():
    """``ancestral + lam (s^2 - t^2) A^T (s^2 A A^T + sigma^2)^-1 (y - A x)`` with a dense matrix."""
    rng = np.random.default_rng(0)
    m = torch.from_numpy(rng.standard_normal((3, 5)))
    space = Space((5,), torch.float64)
    problem = invdiff.Problem(
        operators.Matrix(m), likelihoods.Gaussian(0.3), torch.from_numpy(rng.standard_normal(3))
    )
    prior, watch = normal_prior(space), _At()
    sampler = samplers.DMPS(steps=4, lam=1.75, order=1, eta=0.0)
    invdiff.sample(problem, prior, sampler, draws=1, seed=0, callbacks=[watch])
    levels = sampler.sigmas(prior).tolist()
    for x, new, s, t in zip(watch.states, watch.states[1:], levels[1:], levels[2:]):
        gram = s**2 * m @ m.T + 0.09 * torch.eye(3, dtype=torch.float64)
        g = (m.T @ torch.linalg.solve(gram, (problem.y - x @ m.T).mT)).mT
        plain = ddim(x, x / (1 + s**2), s, t, 0.0, None)
        torch.testing.assert_close(new, plain + 1.75 * (s**2 - s * t) * g, rtol=1e-6, atol=1e-9)


def test_ddrm_moves_every_coordinate_by_its_case():
    """Averages of the next state over the noise, for a mask with weights: the three published cases."""
    space = Space((3,), torch.float64)
    m = torch.diag(torch.tensor([2.0, 0.05, 0.0], dtype=torch.float64))
    problem = invdiff.Problem(
        operators.Matrix(m), likelihoods.Gaussian(0.1), torch.tensor([2.0, 0.1, 0.0]).double()
    )
    sampler = samplers.DDRM(steps=2, eta=0.6, eta_a=0.8, eta_b=0.9, sigma_max=10.0, sigma_min=1.0)
    prior, watch = normal_prior(space), _At()
    n = 20000
    starts = _At()
    made = invdiff.sample(problem, prior, sampler, draws=n, seed=0, max_batch=n, callbacks=[watch, starts])
    assert np.isfinite(np.asarray(made.draws)).all()
    x = watch.states[0]
    s, t = 10.0, 1.0
    # coordinate 0: level 0.05, below t; coordinate 1: level 2, above t and below the start; coordinate 2: no data.
    # The start has mean ybar (1, 2, 0) and D = x / (1 + s^2).
    d = torch.tensor([1.0, 2.0, 0.0]) / (1 + s**2)
    mean = torch.stack([0.1 * d[0] + 0.9, d[1] + 0.6 * t * (2 - d[1]) / 2, torch.zeros(())])
    assert (x.mean(0) - mean).abs().max() < 4 / math.sqrt(n)
    var_d = (torch.tensor([s**2 - 0.05**2, s**2 - 4, s**2]) / (1 + s**2) ** 2).double()
    step = 0.1**2 * var_d[0] + t**2 - (0.9 * 0.05) ** 2
    below = (1 - 0.3) ** 2 * var_d[1] + 0.64 * t**2
    free = var_d[2] * (1 + 0.8 * t * s) ** 2 + 0.36 * t**2  # eps = s x / (1 + s^2)
    assert (x.var(0) / torch.stack([step, below, free]) - 1).abs().max() < 0.05


def test_a_level_that_equals_the_noise_is_no_square_root_of_less_than_nothing():
    problem = invdiff.Problem.simulate(Keep(), likelihoods.Gaussian(0.1), SPACE.randn(1, 3), seed=3)
    sampler = samplers.DDRM(steps=4, sigma_max=100 * 0.1, sigma_min=0.1, eta_b=1.0)
    made = invdiff.sample(problem, normal_prior(), sampler, draws=2, seed=0)
    assert np.isfinite(np.asarray(made.draws)).all()


def test_deqir_gives_what_the_sequential_chain_gives():
    problem, prior, _ = field("mask")
    common = {"steps": 20, "sigma_max": 20.0, "sigma_min": 0.01, "eta": 0.0, "order": 1}

    def draw(cls, **options):
        made = invdiff.sample(problem, prior, cls(**common, **options), draws=4, seed=0, max_batch=4)
        return np.asarray(made.draws), int(made.stats["nfe"].max())

    dds, _ = draw(samplers.DDS, schedule="geometric")
    nrlg, _ = draw(samplers.NRLG)
    plain, most = draw(samplers.DeqIR, eps="denoised", memory=1, tol=1e-14)
    mixed, _ = draw(samplers.DeqIR, eps="denoised", tol=1e-14)
    fast, fewer = draw(samplers.DeqIR, eps="denoised")
    refined, _ = draw(samplers.DeqIR, tol=1e-7)
    assert np.abs(plain - dds).max() < 1e-9 and np.abs(mixed - dds).max() < 1e-9
    assert np.abs(fast - dds).max() < 0.01 and np.abs(refined - nrlg).max() < 1e-4
    assert most > 1.5 * fewer and most % 20 == fewer % 20 == 0, "every level of every iteration is counted"


def test_deqir_is_exact_after_as_many_iterations_as_levels_even_where_mixing_has_not_converged():
    problem = invdiff.Problem.simulate(Keep(), likelihoods.Gaussian(0.1), SPACE.randn(1, 3), seed=3)
    draws = [
        np.asarray(
            invdiff.sample(problem, normal_prior(), samplers.DeqIR(steps=9, memory=m), draws=8, seed=0).draws
        )
        for m in (1, 5)
    ]
    assert np.abs(draws[0] - draws[1]).max() < 1e-2


def test_deqir_draws_as_wide_as_a_sequential_sampler():
    figures = grade("fourier", samplers.DeqIR(steps=25))
    assert figures["mean_error"] < 0.18
    assert 0.91 < figures["std_ratio"] < 1.0 and 0.84 < figures["std_ratio_measured"] < 0.97


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(InvdiffError, match="take a step_size below"):
        samplers.ScoreALD(step_size=1.0)
    with pytest.raises(InvdiffError, match="unstable"):
        samplers.ScoreALD(step_size=0.6, momentum=0.0)
    with pytest.raises(InvdiffError, match="eta must be in"):
        samplers.DDNM(eta=0.0)
    with pytest.raises(InvdiffError, match="between 0 and 1"):
        samplers.DDRM(eta=1.2)
    varying = likelihoods.Gaussian(torch.full((1, *SPACE.shape), 0.1).double() * (1 + torch.arange(5)))
    problem = invdiff.Problem.simulate(Keep(), varying, SPACE.randn(1, 3), seed=3)
    for name in ("ddrm", "ddnm"):
        with pytest.raises(InvdiffError, match="one noise level per case"):
            invdiff.sample(problem, normal_prior(), samplers.get(name, steps=3), draws=1, seed=0)
    for name in ("dmps", "nrlg", "mcg", "ilvr", "scoreald", "deqir"):
        made = invdiff.sample(problem, normal_prior(), samplers.get(name, steps=4), draws=1, seed=0)
        assert np.isfinite(np.asarray(made.draws)).all()
    nonlinear = invdiff.Problem(Square(), likelihoods.Gaussian(0.1), SPACE.randn(1))
    with pytest.raises(CapabilityError, match="singular value decomposition"):
        invdiff.sample(nonlinear, normal_prior(), "ddrm", draws=1, seed=0)
