"""Certified draws against exact posteriors, and the diagnostics against chains that have not converged."""

import functools

import numpy as np
import pytest
import torch

import invdiff
from invdiff import anchors, reference, samplers
from invdiff.certifying import certify, choose_reference, judge
from invdiff.errors import InvdiffError

DRAWS = 128


@functools.lru_cache
def field(operator="mask"):
    problem, prior = anchors.gaussian_field(16, operator, 0)
    return problem, prior, reference.posterior(problem, prior)


@functools.lru_cache
def draws(operator="mask", steps=20, sweeps=40):
    problem, prior, _ = field(operator)
    sampler = samplers.Certified(steps=steps, sweeps=sweeps)
    return invdiff.sample(problem, prior, sampler, draws=DRAWS, seed=0, max_batch=DRAWS)


def test_certified_draws_follow_the_exact_posterior_and_say_so():
    figures = anchors.grade(torch.from_numpy(np.asarray(draws().draws)), field()[2])
    assert figures["mean_error"] < 1.4 / np.sqrt(DRAWS)
    for key in ("std_ratio", "std_ratio_measured", "std_ratio_null"):
        assert 0.965 < figures[key] < 1.035
    assert 0.885 < figures["coverage"] < 0.915
    verdict = judge(draws())
    assert verdict.certified and verdict.figures["drift"] < verdict.figures["drift_bound"]


def test_the_chain_repairs_a_bad_start_and_reports_it():
    bad = draws(steps=5)
    trail = np.asarray(bad.tree["sample_stats"]["trail"])[0]
    assert trail[:, 0, 0].mean() < 0.8 * trail[:, 2, 0].mean()  # five steps fit the noise
    figures = anchors.grade(torch.from_numpy(np.asarray(bad.draws)), field()[2])
    assert 0.96 < figures["std_ratio"] < 1.04 and 0.96 < figures["std_ratio_measured"] < 1.04
    verdict = judge(bad)
    assert verdict.certified and any("start was off" in r for r in verdict.reasons)


def test_a_chain_that_has_not_converged_is_not_certified():
    """Too few sweeps: the draws drift, or they drift too slowly to be seen but remember where they began."""
    for sweeps in (1, 2, 4):
        verdict = judge(draws(steps=5, sweeps=sweeps))
        assert not verdict.certified, sweeps
        assert "drifts" in verdict.reasons[0] or "remember" in verdict.reasons[0]


def test_draws_without_a_diagnostic_are_not_certified():
    problem, prior, _ = field()
    plain = invdiff.sample(problem, prior, samplers.PiGDM(steps=10), draws=16, seed=0)
    verdict = judge(plain)
    assert not verdict.certified and "no diagnostic" in verdict.reasons[0]


def test_comparison_on_ones_own_problem_sees_bias_and_width():
    problem, prior, exact = field()
    dps = certify(problem, prior, samplers.DPS(steps=300), DRAWS, reference=draws(), max_batch=DRAWS)
    assert dps.width_measured < 0.6 and dps.bias > 2 * dps.floor and dps.verdict.certified
    good = certify(problem, prior, samplers.TMPD(steps=40), DRAWS, reference=draws(), max_batch=DRAWS)
    assert abs(good.width - 1) < 0.05 and abs(good.width_measured - 1) < 0.05
    assert good.bias < 1.6 * good.floor and abs(good.coverage - good.coverage_level) < 0.02
    # What the comparison says agrees with what the exact posterior says.
    truth = anchors.grade(torch.from_numpy(np.asarray(dps.posterior.draws)), exact)
    assert abs(dps.width - truth["std_ratio"]) < 0.05
    text = repr(dps)
    assert "dps against reference draws" in text and "certified as far as can be seen" in text


def test_the_reference_fits_the_problem():
    assert choose_reference(field()[0]).name == "certified"
    assert choose_reference(anchors.mcgdiff_mixture(8, 1, 0)[0]).name == "tds"


def test_refusals():
    problem, prior, _ = field()
    with pytest.raises(InvdiffError, match="point estimate"):
        certify(problem, prior, "reddiff")
    with pytest.raises(InvdiffError, match="at least 8 draws"):
        certify(problem, prior, "dds", draws=2)
    noiseless = invdiff.Problem(problem.operator, invdiff.likelihoods.Gaussian(0.0), problem.y)
    with pytest.raises(InvdiffError, match="needs a noise level above 0"):
        invdiff.sample(noiseless, prior, samplers.Certified(steps=2, sweeps=1), draws=2, seed=0)
