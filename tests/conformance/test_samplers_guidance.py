"""PnP-DM, LGD, events, LanPaint and SITCOM against exact posteriors, with controls that must fail."""

import functools
import math

import numpy as np
import pytest
import torch
from scipy.stats import norm as normal
from scipy.stats import truncnorm

import invdiff
from invdiff import anchors, likelihoods, operators, priors, reference, samplers
from invdiff.errors import CapabilityError, InvdiffError
from invdiff.likelihoods import Event, event_probability
from invdiff.operator import Operator
from invdiff.spaces import Space
from tests.conformance import test_likelihoods as suite
from tests.conformance.toys import SPACE, Square, normal_prior, scaled_prior, toy_problem

DRAWS = 128
FLOOR = 1 / math.sqrt(DRAWS)


@functools.lru_cache
def field(operator):
    problem, prior = anchors.gaussian_field(16, operator, 0)
    return problem, prior, reference.posterior(problem, prior)


def grade(operator, sampler, problem=None):
    own, prior, exact = field(operator)
    made = invdiff.sample(problem or own, prior, sampler, draws=DRAWS, seed=0, max_batch=DRAWS)
    return anchors.grade(torch.from_numpy(np.asarray(made.draws)), exact)


def hidden(problem):
    """The same problem, its operator with no structure but a derivative."""

    class Hidden(Operator):
        def __init__(self, base):
            self.base, self.domain, self.range = base, base.domain, base.range

        def _forward(self, x):
            return self.base(x)

    return invdiff.Problem(Hidden(problem.operator), problem.likelihood, problem.y)


# Mean error at most (floors of 128 draws: 0.088), std ratio and std ratio on measured directions between.
BOUNDS = [
    ("pnpdm", {}, "mask", 1.4 * FLOOR, (0.96, 1.02), (0.96, 1.02)),
    ("pnpdm", {"steps": 60}, "fourier", 1.4 * FLOOR, (0.95, 1.02), (0.96, 1.03)),
    ("pnpdm", {"steps": 60}, "blur", 1.4 * FLOOR, (0.95, 1.02), (0.96, 1.03)),
    ("lgd", {}, "mask", 0.40, (0.92, 1.10), (0.88, 1.04)),
    ("lgd", {"average": "softmax"}, "mask", 0.45, (1.0, 1.25), (0.95, 1.18)),
    (
        "lgd",
        {"preset": "inversebench", "zeta": 0.3, "steps": 300, "points": 1},
        "mask",
        0.8,
        (0.7, 1.1),
        (0.2, 0.4),
    ),
    ("lanpaint", {}, "mask", 1.4 * FLOOR, (0.96, 1.04), (0.93, 1.01)),
    ("lanpaint", {"preset": "published"}, "mask", 0.30, (0.8, 1.0), (0.65, 0.85)),
    ("sitcom", {}, "mask", 0.40, (0.45, 0.70), (0.55, 0.80)),
    ("sitcom", {"preset": "published"}, "blur", 0.60, (0.4, 0.75), (0.3, 0.6)),
]


@pytest.mark.parametrize(("name", "fields", "operator", "error", "width", "measured"), BOUNDS)
def test_samplers_stay_where_they_are(name, fields, operator, error, width, measured):
    figures = grade(operator, samplers.get(name, **fields))
    assert figures["mean_error"] < error
    assert width[0] < figures["std_ratio"] < width[1]
    assert measured[0] < figures["std_ratio_measured"] < measured[1]


def test_without_the_noise_split_gibbs_is_too_wide():
    """The noise in all is ``sigma^2 + rho^2``: with ``rho = sigma`` the control of the bounds above."""
    figures = grade("mask", samplers.PnPDM(split=False, rho_min=0.05, steps=60, inner=8))
    assert figures["std_ratio_measured"] > 1.12


def test_a_first_order_reverse_sde_is_too_narrow():
    assert grade("mask", samplers.PnPDM(order=1, steps=60))["std_ratio"] < 0.93


def test_langevin_agrees_with_the_exact_draw_of_the_likelihood():
    common = {"steps": 25, "split": False, "rho_min": 0.1, "inner": 6}
    exact = grade("mask", samplers.PnPDM(**common))
    chain = grade("mask", samplers.PnPDM(moves=50, **common), hidden(field("mask")[0]))
    for key in ("mean_error", "std_ratio", "std_ratio_measured"):
        assert abs(chain[key] - exact[key]) < 0.12


def test_pnpdm_says_what_it_needs_of_noiseless_data():
    problem = toy_problem(sigma=0.0)
    with pytest.raises(InvdiffError, match="sigma is 0"):
        invdiff.sample(problem, normal_prior(), samplers.PnPDM(steps=2), draws=2, seed=0)
    made = invdiff.sample(
        problem, normal_prior(), samplers.PnPDM(steps=6, split=False, rho_min=0.01), draws=2, seed=0
    )
    assert float(np.asarray(made.stats["residual_norm"]).max()) < 0.3


def test_lgd_is_exact_for_one_measurement_of_a_gaussian():
    prior = priors.Gaussian(torch.tensor([0.5, -0.3]).double(), torch.tensor([[1.0, 0.6], [0.6, 2.0]]).double())
    a = operators.Matrix(torch.tensor([[1.0, 2.0]]).double())
    problem = invdiff.Problem(a, likelihoods.Gaussian(0.1), torch.tensor([[2.0]]).double())
    exact = reference.posterior(problem, prior)
    made = invdiff.sample(problem, prior, samplers.LGD(spread=1e-6, points=1), draws=1000, seed=0, max_batch=1000)
    figures = anchors.grade(torch.from_numpy(np.asarray(made.draws)), exact)
    assert figures["mean_error"] < 0.08
    assert 0.95 < figures["std_ratio"] < 1.05 and 0.94 < figures["std_ratio_measured"] < 1.06


def test_the_guidance_of_lanpaint_beyond_the_data_is_what_reaches_the_unknown():
    with_it, without = (
        grade("mask", samplers.LanPaint(inner=5)),
        grade("mask", samplers.LanPaint(inner=5, lam=0.0)),
    )
    assert without["mean_error"] > 1.2 * with_it["mean_error"]


def test_lanpaint_keeps_noiseless_data_and_takes_masks_in_fourier_space():
    image = Space((1, 8, 8), torch.complex128)
    mask = torch.zeros(8, 8).double()
    mask[::2] = 1
    for a in (operators.SubsampledFourier(mask, image), operators.Mask(mask[None], image)):
        problem = invdiff.Problem.simulate(a, likelihoods.Gaussian(0.0), image.randn(1, 0), seed=0)
        made = invdiff.sample(
            problem, scaled_prior(image, 1.0), samplers.LanPaint(steps=20, inner=2), draws=2, seed=0
        )
        assert float(np.asarray(made.stats["residual_norm"]).max()) < 1e-8


def test_lanpaint_refuses_what_is_no_mask_and_steps_that_diverge():
    problem, prior, _ = field("blur")
    with pytest.raises(CapabilityError, match="no mask"):
        invdiff.sample(problem, prior, "lanpaint", draws=1, seed=0)
    per_pixel = invdiff.Problem(
        field("mask")[0].operator, likelihoods.Gaussian(torch.full((1, 1, 16, 16), 0.1)), problem.y
    )
    with pytest.raises(CapabilityError, match="one noise level"):
        invdiff.sample(per_pixel, prior, "lanpaint", draws=1, seed=0)
    with pytest.raises(InvdiffError, match="below 2"):
        samplers.LanPaint(lam=10.0)


def test_sitcom_does_not_fit_the_noise():
    problem, prior, _ = field("mask")
    made = invdiff.sample(problem, prior, samplers.SITCOM(iterations=40), draws=16, seed=0, max_batch=16)
    expected = 0.05 * math.sqrt(float(problem.operator.mask.sum()))
    ratio = np.asarray(made.stats["residual_norm"]) / expected
    assert ratio.min() > 0.85 and ratio.max() < 1.03


# Events ------------------------------------------------------------------------------------------------------

EVENTS = {
    "above": Event(0.5, sigma=0.7),
    "below": Event(-math.inf, 0.5, sigma=0.7),
    "between": Event(0.0, 1.0, sigma=0.7),
    "per-element": Event(suite.per_element(), sigma=suite.per_element()),
}
CHECKS = [
    suite.test_score_is_the_gradient,
    suite.test_score_along_a_direction_by_finite_differences,
    suite.test_rows_do_not_meet,
    suite.test_precision_and_device_follow,
    suite.test_describe_and_repr,
]


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("check", CHECKS, ids=lambda f: f.__name__)
def test_events_are_likelihoods(check, event, monkeypatch):
    monkeypatch.setitem(suite.CASES, "event", (EVENTS[event], suite.REAL))
    check("event")


@pytest.mark.parametrize("event", EVENTS)
def test_probabilities_sum_to_one_and_the_score_has_mean_zero(event):
    likelihood, z = EVENTS[event], suite.REAL.randn(1, 0) * 3
    p, score = [], []
    for label in (0, 1):
        y = torch.full_like(z, label)
        p.append(likelihood._log(*likelihood._ends(z), y == 1).exp())
        score.append(likelihood.score(z, y))
    torch.testing.assert_close(p[0] + p[1], torch.ones_like(z))
    torch.testing.assert_close(p[0] * score[0] + p[1] * score[1], torch.zeros_like(z), rtol=0, atol=1e-9)


@pytest.mark.parametrize("event", ["above", "below", "between"])
@pytest.mark.parametrize("label", [0, 1])
def test_widening_is_a_convolution_and_gives_the_moments(event, label):
    likelihood, m, v = EVENTS[event], 0.3, 0.8
    z = torch.linspace(-12, 12, 20001, dtype=torch.float64)[:, None]
    y = torch.full_like(z, label)
    p = likelihood.log_prob(z, y).exp() * torch.exp(-0.5 * (z[:, 0] - m) ** 2 / v) / math.sqrt(2 * math.pi * v)
    p = p * (z[1] - z[0])
    wide, at = likelihood.widened(torch.full((1, 1), v).double()), torch.full((1, 1), m).double()
    assert float(wide.log_prob(at, y[:1]).exp()) == pytest.approx(float(p.sum()), rel=1e-6)
    slope, bend = (float(u) for u in wide.slope_and_bend(at, y[:1]))
    mean = float((p * z[:, 0]).sum() / p.sum())
    assert m + v * slope == pytest.approx(mean, rel=1e-5)
    assert v - v * v * bend == pytest.approx(float((p * (z[:, 0] - mean) ** 2).sum() / p.sum()), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_far_from_an_event_the_score_is_that_of_the_nearest_bound(dtype):
    z = torch.tensor([[-300.0], [300.0]], dtype=dtype)
    score = Event(0.0, 1.0, sigma=0.5).score(z, torch.ones_like(z))
    expected = torch.tensor([[1200.0], [-1196.0]], dtype=dtype)
    torch.testing.assert_close(score, expected, rtol=1e-4, atol=0)
    assert float(Event().log_prob(z, torch.ones_like(z))[0]) == -math.inf
    assert float(Event().score(z, torch.ones_like(z)).abs().max()) == 0


def test_several_events_against_monte_carlo():
    mean = torch.tensor([[0.0, 0.2, -0.1]]).double()
    root = torch.tensor([[1.0, 0, 0], [0.8, 0.6, 0], [0.3, -0.4, 0.9]]).double()
    cov = (root @ root.T)[None]
    event = Event(torch.tensor([[0.5, -9.0, 0.0]]), torch.tensor([[9.0, 0.4, 9.0]]))
    y = torch.ones(1, 3).double()
    generator = torch.Generator().manual_seed(0)
    z = mean + torch.randn(400_000, 3, dtype=torch.float64, generator=generator) @ root.T
    inside = event.log_prob(z, y.expand(len(z), 3)) == 0
    got = mean + (cov @ event.weigh(mean, cov, y)[..., None])[..., 0]
    assert float((got - z[inside].mean(0)).abs().max()) < 0.09
    alone = torch.stack([event.widened(cov[0].diagonal()[None]).score(mean, y)[0]])
    assert float((mean + (cov @ alone[..., None])[..., 0] - z[inside].mean(0)).abs().max()) > 0.15


def gaussian_event(c):
    mean, cov = torch.tensor([0.5, -0.3]).double(), torch.tensor([[1.0, 0.6], [0.6, 2.0]]).double()
    a = torch.tensor([[1.0, 2.0]]).double()
    m, sd = float(a[0] @ mean), math.sqrt(float(a[0] @ cov @ a[0]))
    problem = invdiff.Problem(operators.Matrix(a), Event(c), torch.ones(1, 1).double())
    return problem, priors.Gaussian(mean, cov), m, sd


@pytest.mark.parametrize("c", [0.0, 9.0])
def test_draws_given_an_event_follow_the_truncated_gaussian(c):
    problem, prior, m, sd = gaussian_event(c)
    made = invdiff.sample(problem, prior, "eventguided", draws=2000, seed=0, max_batch=2000)
    z = np.asarray(made.draws).reshape(-1, 2) @ [1.0, 2.0]
    law = truncnorm((c - m) / sd, np.inf, m, sd)
    assert (z > c).all() and abs(z.mean() - law.mean()) < 0.1 * law.std()
    assert abs(z.std() / law.std() - 1) < 0.07
    assert np.abs(np.quantile(z, [0.1, 0.5, 0.9]) - law.ppf([0.1, 0.5, 0.9])).max() < 0.15 * law.std()


@pytest.mark.parametrize("c", [3.0, 14.0])
def test_probability_of_a_rare_event(c):
    problem, prior, m, sd = gaussian_event(c)
    truth = normal.sf((c - m) / sd)  # 0.18 and 1.5e-5
    got = event_probability(problem, prior, draws=1000, seed=0)
    assert got.ess > 500 and abs(got.value / truth - 1) < 4 * got.error / truth + 0.02 and got.error < 0.03 * truth
    plain = event_probability(problem, prior, draws=1000, seed=0, method="prior")
    if c == 3:
        assert abs(plain.value - truth) < 4 * plain.error
    else:
        assert plain.value == 0, "a thousand draws of the prior cannot see this event"


def test_first_order_steps_get_tail_probabilities_wrong():
    problem, prior, m, sd = gaussian_event(9.0)
    got = event_probability(problem, prior, draws=1000, seed=0, order=1, steps=100)
    assert got.value < 0.8 * normal.sf((9.0 - m) / sd)


def mixture():
    weights, means = torch.tensor([0.6, 0.3, 0.1]).double(), torch.tensor([[0.0, 0], [4, 1], [-3, 5]]).double()
    prior = priors.GaussianMixture(weights, means, torch.tensor([1.0, 0.5, 0.25]).double())
    return prior, prior.denoiser.sample(200_000, 5)


class SquaredNorm(Operator):
    domain, range = Space((2,), torch.float64), Space((1,), torch.float64)

    def _forward(self, x):
        return (x * x).sum(1, keepdim=True)


@pytest.mark.parametrize("what", ["sum", "norm"])
def test_weighted_draws_have_the_right_modes(what):
    """The guided draws alone do not: p(x0 | x) is no Gaussian between modes."""
    prior, many = mixture()
    c = operators.Matrix(torch.ones(1, 2).double()) if what == "sum" else SquaredNorm()
    problem = invdiff.Problem(c, Event(4.0 if what == "sum" else 16.0), torch.ones(1, 1).double())
    inside = many[problem.likelihood.log_prob(c(many), torch.ones(len(many), 1).double()) == 0]
    made = invdiff.sample(problem, prior, samplers.EventGuided(weights=True), draws=1000, seed=0, max_batch=1000)
    weights = np.exp(np.asarray(made.stats["log_weight"], dtype=float).reshape(-1))
    x = np.asarray(made.draws).reshape(-1, 2)
    share = weights.sum() ** 2 / (weights**2).sum()
    assert share > (500 if what == "sum" else 80)
    weighted, plain, truth = (weights @ x) / weights.sum(), x.mean(0), inside.mean(0).numpy()
    assert np.abs(weighted - truth).max() < 5 * inside.std(0).max() / math.sqrt(share)
    assert np.abs(plain - truth).max() > np.abs(weighted - truth).max()
    assert weights.mean() == pytest.approx(len(inside) / len(many), rel=4 / math.sqrt(share))


def test_a_nonlinear_constraint_with_noise():
    """``|x|^2 + noise = 4`` under a correlated Gaussian, against quadrature on a grid."""
    cov = torch.tensor([[0.4, 0.2], [0.2, 0.4]]).double()
    problem = invdiff.Problem(SquaredNorm(), likelihoods.Gaussian(0.5), torch.full((1, 1), 4.0).double())
    prior = priors.Gaussian(torch.tensor([1.0, 1.5]).double(), cov)
    made = invdiff.sample(problem, prior, "eventguided", draws=1000, seed=0, max_batch=1000)
    g = torch.linspace(-5, 5, 401).double()
    grid = torch.cartesian_prod(g, g)
    log_p = prior.denoiser.log_prob(grid) + problem.rows(torch.zeros(len(grid)).long()).log_likelihood(grid)
    p = torch.softmax(log_p, 0)
    mean = (p[:, None] * grid).sum(0)
    std = (p[:, None] * (grid - mean) ** 2).sum(0).sqrt()
    x = torch.from_numpy(np.asarray(made.draws)).reshape(-1, 2)
    assert float(((x.mean(0) - mean) / std).abs().max()) < 0.35
    assert float((x.std(0) / std - 1).abs().max()) < 0.25
    radius = (x * x).sum(1)
    assert abs(float(radius.mean()) - float((p * (grid**2).sum(1)).sum())) < 0.15


def test_events_refuse_what_they_cannot_be():
    with pytest.raises(InvdiffError, match="low < high"):
        Event(1.0, 0.0)
    with pytest.raises(InvdiffError, match="low < high"):
        Event(-math.inf)
    z = torch.zeros(1, 1).double()
    with pytest.raises(InvdiffError, match="it happened"):
        Event().log_prob(z, z + 0.5)
    with pytest.raises(InvdiffError, match="complex"):
        Event().sample(z + 0j, None)
    with pytest.raises(CapabilityError, match="at most 64"):
        big = Space((1, 9, 9), torch.float64)
        problem = invdiff.Problem(Square(big), Event(), torch.ones(1, 1, 9, 9).double())
        invdiff.sample(problem, normal_prior(big), "eventguided", draws=1, seed=0)
    with pytest.raises(InvdiffError, match="eta above 0"):
        invdiff.sample(toy_problem(), normal_prior(), samplers.EventGuided(weights=True, eta=0.0), draws=1, seed=0)
    with pytest.raises(InvdiffError, match="2 cases"):
        event_probability(toy_problem(cases=2), normal_prior())
    background = invdiff.Problem(Square(), likelihoods.Poisson(1.0, 1.0), SPACE.zeros(1))
    with pytest.raises(CapabilityError, match="Poisson"):
        invdiff.sample(background, normal_prior(), "eventguided", draws=1, seed=0)


def test_weights_make_up_for_wrong_modes_of_the_mixture():
    problem, prior = anchors.mcgdiff_mixture(8, 1, 0)
    exact = reference.posterior(problem, prior)
    made = invdiff.sample(problem, prior, samplers.EventGuided(weights=True), draws=1000, seed=0, max_batch=1000)
    x = torch.from_numpy(np.asarray(made.draws)).reshape(-1, 8)
    log_weight = np.asarray(made.stats["log_weight"], dtype=float).reshape(-1)
    weights = np.exp(log_weight - log_weight.max())
    picked = x[np.random.default_rng(0).choice(len(x), len(x), p=weights / weights.sum())]
    assert anchors.grade(picked, exact)["mode_tv"] < 0.12 < anchors.grade(x, exact)["mode_tv"]


@pytest.mark.parametrize("name", ["dps", "mcg"])
def test_units_of_the_data_do_not_matter_to_guidance_by_the_misfit(name):
    """Operators of norm 10 and 1000, with data and noise scaled alike, are one problem, and no step diverges."""
    problem, prior, _ = field("blur")
    made = {}
    for c in (10.0, 1000.0):
        scaled = invdiff.Problem(
            c * problem.operator, likelihoods.Gaussian(c * problem.likelihood.sigma), c * problem.y
        )
        made[c] = invdiff.sample(scaled, prior, samplers.get(name, steps=60), draws=2, seed=0).draws.values
    np.testing.assert_allclose(made[10.0], made[1000.0], rtol=1e-6, atol=1e-6)
    assert np.abs(made[10.0]).max() < 10
