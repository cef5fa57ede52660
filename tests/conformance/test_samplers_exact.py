"""Samplers against exact posteriors: bounds that follow from what each declares, and controls that must fail."""

import functools

import numpy as np
import pytest
import torch

import invdiff
from invdiff import anchors, likelihoods, priors, reference, samplers

DRAWS = 256
FLOOR = 1 / np.sqrt(DRAWS)


@functools.lru_cache
def field(operator, size=16):
    problem, prior = anchors.gaussian_field(size, operator, 0)
    return problem, prior, reference.posterior(problem, prior)


def grade(operator, sampler, size=16, seed=0):
    problem, prior, exact = field(operator, size)
    made = invdiff.sample(problem, prior, sampler, draws=DRAWS, seed=seed, max_batch=DRAWS)
    array = made.estimate if made.kind == "point" else made.draws
    draws = torch.from_numpy(np.asarray(array)).reshape(DRAWS, *problem.operator.domain.shape)
    return anchors.grade(draws, exact)


@pytest.mark.parametrize("operator", ["mask", "fourier", "blur"])
def test_exact_draws_reach_the_floor(operator):
    exact = field(operator)[2]
    figures = anchors.grade(exact.sample(DRAWS, 5)[0], exact)
    assert figures["mean_error"] < 1.5 * FLOOR
    assert 0.98 < figures["std_ratio"] < 1.02 and 0.88 < figures["coverage"] < 0.92


@pytest.mark.parametrize("operator", ["mask", "fourier", "blur"])
def test_tweedie_covariance_is_exact_on_a_gaussian_prior(operator):
    """The yardstick of driver and schedule: a wrong factor anywhere shows here."""
    figures = grade(operator, samplers.TMPD())
    assert figures["mean_error"] < 1.5 * FLOOR
    assert 0.97 < figures["std_ratio"] < 1.03 and 0.97 < figures["std_ratio_measured"] < 1.03
    assert 0.885 < figures["coverage"] < 0.915


def test_a_first_order_chain_is_too_narrow():
    """The control of the test above: it must be able to fail."""
    figures = grade("mask", samplers.TMPD(order=1))
    assert figures["std_ratio"] < 0.965


def test_a_wrong_noise_level_is_seen():
    problem, prior, exact = field("mask")
    wrong = invdiff.Problem(problem.operator, invdiff.likelihoods.Gaussian(0.15), problem.y)
    made = invdiff.sample(wrong, prior, samplers.TMPD(steps=50), draws=DRAWS, seed=0, max_batch=DRAWS)
    figures = anchors.grade(torch.from_numpy(np.asarray(made.draws)), exact)
    assert figures["std_ratio_measured"] > 1.3


@pytest.mark.slow
@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("operator", ["mask", "fourier", "blur"])
def test_tweedie_covariance_at_full_size(operator, size):
    figures = grade(operator, samplers.TMPD(), size)
    assert figures["mean_error"] <= 0.08
    assert 0.98 <= figures["std_ratio"] <= 1.02 and 0.89 <= figures["coverage"] <= 0.91


# Heuristic samplers: regression bounds a little wider than what they reach, so that a change for the worse is
# seen. DPS really is twenty times too narrow on measured directions of this field; a change must be seen too.
# Columns: mean error at most, std ratio between, on measured directions between.
HEURISTIC = [
    ("dds", "tuned", "mask", 0.30, (0.90, 1.25), (0.80, 1.15)),
    ("dds", "tuned", "blur", 0.30, (0.85, 1.25), (0.80, 1.20)),
    ("diffpir", "tuned", "mask", 0.40, (0.90, 1.30), (0.80, 1.20)),
    ("pigdm", None, "mask", 0.25, (0.88, 1.05), (0.85, 1.05)),
    ("pigdm", None, "fourier", 0.20, (0.90, 1.05), (0.85, 1.05)),
    ("pigdm", None, "blur", 0.25, (0.90, 1.05), (0.85, 1.05)),
    ("pigdm", "published", "mask", 0.45, (0.6, 1.1), (0.6, 1.1)),
    ("dps", "tuned", "mask", 0.60, (0.55, 0.70), (0.03, 0.08)),
    ("daps", "tuned", "mask", 0.40, (0.9, 1.7), (0.8, 1.4)),
]


@pytest.mark.parametrize(("name", "preset", "operator", "error", "width", "measured"), HEURISTIC)
def test_heuristic_samplers_stay_where_they_are(name, preset, operator, error, width, measured):
    sampler = samplers.get(name, preset=preset)
    figures = grade(operator, sampler)
    assert figures["mean_error"] < error
    assert width[0] < figures["std_ratio"] < width[1]
    assert measured[0] < figures["std_ratio_measured"] < measured[1]


@pytest.mark.parametrize("inner", ["langevin", "hmc"])
def test_inner_chains_agree_with_the_exact_gaussian_draw(inner):
    common = {"steps": 25, "sigma_min": 0.05, "spread_rule": "tau", "ode_steps": 1}
    exact = grade("mask", samplers.DAPS(inner="exact", **common))
    chain = grade("mask", samplers.DAPS(inner=inner, moves=150, momentum=0.8, **common))
    assert abs(chain["std_ratio"] - exact["std_ratio"]) < 0.12
    assert abs(chain["std_ratio_measured"] - exact["std_ratio_measured"]) < 0.12
    assert abs(chain["mean_error"] - exact["mean_error"]) < 0.12


@pytest.mark.parametrize(
    "sampler",
    [
        samplers.Heun(steps=40),
        samplers.Heun(steps=60, churn=20.0),
        samplers.DDIM(steps=200),
        samplers.DPMpp(steps=100, schedule="geometric", sigma_min=0.01),
        samplers.DPMpp(steps=60, eta=0.0, schedule="geometric", sigma_min=0.01),
    ],
    ids=lambda s: f"{s.name}-{getattr(s, 'eta', getattr(s, 'churn', 0))}",
)
def test_unconditional_samplers_draw_from_a_gaussian_prior(sampler):
    prior = priors.StationaryGaussian((1, 16, 16), priors.power_law_spectrum((16, 16), 3.0))
    made = invdiff.sample(None, prior, sampler, draws=400, seed=0, max_batch=400)
    draws = np.asarray(made.draws).reshape(400, -1)
    # One figure per pixel is noisy for a correlated field; the mean over pixels and draws is not.
    power = np.abs(np.fft.fft2(draws.reshape(400, 16, 16), norm="ortho")) ** 2
    expected = priors.power_law_spectrum((16, 16), 3.0).numpy()
    ratio = power.mean(0) / expected
    weights = np.sqrt(expected) / np.sqrt(expected).sum()
    assert abs((weights * ratio).sum() - 1) < 0.06
    assert np.abs(ratio - 1).max() < 0.45


def test_unconditional_draws_have_the_right_mode_weights():
    weights = torch.tensor([0.7, 0.3], dtype=torch.float64)
    means = torch.tensor([[-3.0, 0.0], [3.0, 1.0]], dtype=torch.float64)
    prior = priors.GaussianMixture(weights, means, torch.full((2,), 0.25, dtype=torch.float64))
    made = invdiff.sample(None, prior, samplers.DPMpp(steps=80), draws=2000, seed=0, max_batch=2000)
    draws = np.asarray(made.draws).reshape(2000, 2)
    left = draws[:, 0] < 0
    assert abs(left.mean() - 0.7) < 0.035
    assert np.abs(draws[left].mean(0) - [-3, 0]).max() < 0.06
    assert np.abs(draws[~left].std(0) / 0.5 - 1).max() < 0.07


def test_a_point_estimate_is_near_the_posterior_mean():
    figures = grade("mask", samplers.get("reddiff", preset="tuned"))
    assert figures["mean_error"] < 0.6


def test_pigdm_takes_data_without_noise():
    simulated, prior = anchors.gaussian_field(8, "mask")
    operator, truth = simulated.operator, simulated.x_true
    problem = invdiff.Problem(operator, likelihoods.Gaussian(0.0), operator(truth))
    made = invdiff.sample(problem, prior, samplers.PiGDM(steps=30), draws=4, progress=False)
    draws = torch.from_numpy(np.asarray(made.draws)).reshape(4, *operator.domain.shape)
    assert torch.isfinite(draws).all() and (problem.y - operator(draws)).abs().max() < 0.05
