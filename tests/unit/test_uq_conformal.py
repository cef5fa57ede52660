"""Conformal intervals cover what they promise, for good and bad samplers, and refuse what they are not for."""

import json

import numpy as np
import pytest
from scipy.stats import binom

import invdiff
from invdiff import anchors, samplers
from invdiff.errors import InvdiffError
from invdiff.posterior import Posterior
from invdiff.uq import bounds, calibrate, control_risk, controls, fingerprint, fingerprint_of
from invdiff.uq.conformal import Conformal
from tests.unit.runs import REAL, make_run

HOW = {"population": "simulated cases", "fingerprint": "f" * 64}
BAD = {
    "good": lambda c: c.draws,
    "narrow": lambda c: controls.too_narrow(c, 0),
    "shifted": lambda c: controls.shifted(c, 0),
}


def inside(ends, truth):
    low, high = ends
    return ((truth >= low) & (truth <= high)).mean(1)


@pytest.mark.parametrize("score", ["scaled", "quantile"])
@pytest.mark.parametrize("sampler", BAD)
def test_pixels_of_a_thousand_cases_are_covered_whatever_the_sampler(sampler, score):
    """90 % within 2 %: calibration on 500 cases makes the coverage of 12 pixels scatter by less than 1 %."""
    known, new = controls.gaussian(500, 24, seed=1), controls.gaussian(1000, 24, seed=2)
    found = calibrate(BAD[sampler](known), known.truth, 0.9, score, **HOW)
    covered = inside(found.apply(BAD[sampler](new), HOW["fingerprint"]), new.truth).mean()
    assert covered == pytest.approx(0.9, abs=0.02)


@pytest.mark.parametrize("sampler", BAD)
def test_regions_of_a_thousand_cases_are_covered(sampler):
    labels = np.repeat([1, 0, 2], 4)
    known, new = controls.gaussian(1000, 24, seed=1), controls.gaussian(1000, 24, seed=2)
    found = calibrate(BAD[sampler](known), known.truth, 0.9, labels=labels, **HOW)
    truth = np.stack([new.truth[:, labels == k].mean(1) for k in (1, 2)], axis=1)
    low, high = found.apply(BAD[sampler](new), HOW["fingerprint"])
    np.testing.assert_allclose(((truth >= low) & (truth <= high)).mean(0), 0.9, atol=0.03)
    assert "region" in found.guarantee and "not for every case" in found.guarantee


def test_few_calibration_cases_still_cover_on_average():
    """The guarantee is exact for any number: 19 cases, 300 calibrations, mean within 1.5 % of 18 / 20."""
    control = controls.gaussian(300 * 20, 8, seed=3)
    hits = []
    for i in range(300):
        own = slice(20 * i, 20 * i + 19)
        found = calibrate(0.3 * control.draws[own], control.truth[own], 0.9, **HOW)
        last = slice(20 * i + 19, 20 * i + 20)
        hits.append(inside(found.apply(0.3 * control.draws[last], HOW["fingerprint"]), control.truth[last]))
    assert np.mean(hits) == pytest.approx(0.9, abs=0.015)


@pytest.mark.parametrize(("bound", "groups"), [("wsr", 1), ("hb", 1), ("wsr", 3)])
def test_risk_control_keeps_its_confidence(bound, groups):
    """In at most 10 % of 40 calibrations is the true risk above 10 %, up to the 1 % point of the binomial."""
    new = controls.gaussian(4000, 16, seed=2)
    scale = np.linspace(0.3, 1.2, 12)  # a sampler whose errors differ between pixels
    bad = 0
    for i in range(40):
        known = controls.gaussian(200, 16, seed=100 + i)
        found = control_risk(spoil(known, scale), known.truth, 0.9, 0.9, groups, bound, **HOW)
        covered = inside(found.apply(spoil(new, scale)[:1000], HOW["fingerprint"]), new.truth[:1000]).mean()
        bad += covered < 0.9
        assert covered < 0.97
    assert bad <= binom.ppf(0.99, 40, 0.1)


@pytest.mark.parametrize("bound", ["wsr", "hb"])
def test_the_factor_is_the_last_that_passes_the_test_of_the_risk(bound):
    known = controls.gaussian(150, 16, seed=5)
    found = control_risk(known.draws, known.truth, 0.85, 0.8, bound=bound, **HOW)
    score = np.abs(known.truth - known.draws.mean(1)) / known.draws.std(1, ddof=1)

    def p_value(factor):
        losses = (score > factor).mean(1)
        if bound == "hb":
            return bounds.hoeffding_bentkus(losses, 0.15)
        return bounds.waudby_smith_ramdas(losses, 0.15, 0.2)

    assert p_value(float(found.factor)) <= 0.2 < p_value(float(found.factor) - 0.01)
    assert found.confidence == 0.8 and "confidence 80%" in found.guarantee


def spoil(control, scale):
    return control.mean[:, None] + scale * (control.draws - control.mean[:, None])


def test_groups_of_pixels_make_intervals_shorter():
    known, scale = controls.gaussian(600, 16, seed=1), np.repeat([0.15, 1.0], 6)
    widths = []
    for groups in (1, 3):
        found = control_risk(spoil(known, scale), known.truth, 0.9, 0.9, groups, **HOW)
        low, high = found.apply(spoil(known, scale), HOW["fingerprint"])
        widths.append((high - low).mean())
    assert widths[1] < 0.9 * widths[0]


def test_bounds_are_valid_and_the_betting_one_is_sharper():
    """Losses with a mean of exactly alpha are called small with probability delta at most."""
    rng = np.random.default_rng(0)
    for draw in (lambda: rng.random(100) * 0.2, lambda: (rng.random(100) < 0.1) * 1.0):
        for test in (bounds.hoeffding_bentkus, bounds.waudby_smith_ramdas):
            wrong = np.mean([test(draw(), 0.1) <= 0.1 for _ in range(1000)])
            assert wrong <= 0.1 + 3 * np.sqrt(0.09 / 1000)
    small = 0.05 + 0.02 * rng.random(100)
    assert bounds.waudby_smith_ramdas(small, 0.1) < bounds.hoeffding_bentkus(small, 0.1) < 1
    n, mean, alpha = 100, 0.05, 0.1
    losses = np.full(n, mean)
    h = mean * np.log(mean / alpha) + (1 - mean) * np.log((1 - mean) / (1 - alpha))
    wanted = min(np.exp(-n * h), np.e * binom.cdf(5, n, alpha))
    assert bounds.hoeffding_bentkus(losses, alpha) == pytest.approx(wanted, rel=1e-12)


def test_bets_know_earlier_losses_only():
    """The capital of the gambler, loss by loss."""
    losses, alpha, delta = np.random.default_rng(3).random(30) * 0.3, 0.2, 0.1
    capital, largest, variance, seen, square = 1.0, 0.0, 0.25, 0.5, 0.25
    for i, loss in enumerate(losses, start=1):
        bet = min(1, np.sqrt(2 * np.log(1 / delta) / (len(losses) * variance)))
        capital *= 1 - bet * (loss - alpha)
        largest = max(largest, capital)
        seen += loss
        square += (loss - seen / (1 + i)) ** 2
        variance = square / (1 + i)
    assert bounds.waudby_smith_ramdas(losses, alpha, delta) == pytest.approx(1 / largest, rel=1e-10)


def test_a_calibration_is_a_file_that_comes_back(tmp_path):
    known = controls.gaussian(60, 8)
    for found in (
        calibrate(known.draws, known.truth, 0.8, labels=np.repeat([1, 2], 6), **HOW),
        control_risk(known.draws, known.truth, 0.8, 0.8, **HOW),
    ):
        again = Conformal.load(found.save(tmp_path / "calibration.json"))
        assert (again.factor >= found.factor).all()
        np.testing.assert_allclose(again.factor, found.factor, rtol=1e-6)
        assert (again.guarantee, again.fingerprint) == (found.guarantee, found.fingerprint)
        ends = [c.apply(known.draws, HOW["fingerprint"]) for c in (found, again)]
        np.testing.assert_allclose(ends[0], ends[1], atol=1e-6)
    assert "simulated cases" in json.loads((tmp_path / "calibration.json").read_text())["guarantee"]


def test_damaged_files_are_refused(tmp_path):
    known = controls.gaussian(60, 8)
    path = calibrate(known.draws, known.truth, **HOW).save(tmp_path / "c.json")
    good = json.loads(path.read_text())
    for change in (
        {"schema": "other"},
        {"score": "best"},
        {"level": "high"},
        {"factor": {"shape": [3], "data": good["factor"]["data"]}},
        {"factor": {"shape": [12], "data": "not base64"}},
        {"factor": None},
    ):
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(InvdiffError, match=r"no calibration of schema|not 'best'|is damaged"):
            Conformal.load(path)
    path.write_text("{")
    with pytest.raises(InvdiffError, match="is damaged"):
        Conformal.load(path)
    with pytest.raises(InvdiffError, match="cannot be read"):
        Conformal.load(tmp_path / "none.json")


def test_a_posterior_knows_how_it_was_made():
    problem, prior = anchors.gaussian_field(8, "mask")
    sampler = samplers.TMPD(steps=4)
    posterior = invdiff.sample(problem, prior, sampler, draws=4, seed=0, progress=False)
    assert fingerprint_of(posterior) == fingerprint(problem, prior, sampler)
    assert fingerprint_of(posterior) != fingerprint(problem, prior, samplers.TMPD(steps=5))
    assert fingerprint_of(posterior) != fingerprint(anchors.gaussian_field(8, "blur")[0], prior, sampler)
    assert fingerprint_of(posterior) != fingerprint("knees, 4-fold", prior, sampler)


def test_posteriors_are_calibrated_and_mismatches_refused(tmp_path):
    run = make_run(REAL, cases=30, draws=10)
    posterior = Posterior.from_run(run)
    found = calibrate(posterior, run.x_true, 0.8, population="made-up images")
    low, high = found.apply(posterior)
    assert low.shape == (30, *REAL.shape) and (high > low).all()
    assert ((run.x_true >= low) & (run.x_true <= high)).mean() >= 0.8
    kept = found.attach(posterior).save(tmp_path / "calibrated.nc")
    with Posterior.open(kept) as again:
        summary = again.tree["summary"]
        np.testing.assert_allclose(summary["conformal_lo"], low, rtol=1e-10)
        np.testing.assert_allclose(summary["conformal_hi"], high, rtol=1e-10)
        assert "made-up images" in summary["conformal_hi"].attrs["guarantee"]
        np.testing.assert_array_equal(again.mean(), posterior.mean())
    assert "conformal_lo" not in posterior.tree["summary"]
    regions = calibrate(posterior, run.x_true, 0.8, labels=np.ones((6, 5), int), population="made-up images")
    with pytest.raises(InvdiffError, match="no intervals of pixels"):
        regions.attach(posterior)
    other = make_run(REAL, draws=10, provenance={"sampler": {"name": "dps"}})
    with pytest.raises(InvdiffError, match="another problem, prior or sampler"):
        found.apply(Posterior.from_run(other))


def test_pixels_without_spread_keep_their_value_or_say_that_nothing_helps():
    known = controls.gaussian(60, 8)
    draws, truth = known.draws.copy(), known.truth.copy()
    draws[..., 0], truth[..., 0], draws[..., 1] = 2.0, 2.0, 0.0
    found = calibrate(draws, truth, **HOW)
    low, high = found.apply(draws, HOW["fingerprint"])
    assert (low[:, 0] == 2).all() and (high[:, 0] == 2).all() and np.isinf(found.factor[1])
    assert np.isfinite(low).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: calibrate(c.draws, c.truth, 0.99, **HOW), r"30 cases calibrate levels above 0 up to 0.968"),
        (lambda c: calibrate(c.draws, c.truth, score="best", **HOW), "not 'best'"),
        (lambda c: calibrate(c.draws, c.truth, population=" ", fingerprint="f"), "Say in words"),
        (lambda c: calibrate(c.draws, c.truth, population="p"), "Give a fingerprint"),
        (lambda c: calibrate(c.draws, c.truth, labels=np.zeros(12, int), **HOW), "0 everywhere"),
        (lambda c: calibrate(c.draws[:, :1], c.truth, **HOW), "one draw has no spread"),
        (lambda c: control_risk(c.draws[:9], c.truth[:9], **HOW), "do not show that any factor"),
        (lambda c: control_risk(c.draws, c.truth, bound="best", **HOW), "'wsr' or 'hb'"),
        (lambda c: calibrate(c.draws, c.truth, **HOW).apply(c.draws), "Give the fingerprint"),
        (lambda c: calibrate(c.draws, c.truth, **HOW).apply(c.draws, "g"), "calibrate anew"),
        (lambda c: calibrate(c.draws, c.truth, **HOW).apply(c.draws[..., :5], "f" * 64), "for images"),
        (lambda c: bounds.hoeffding_bentkus(np.array([2.0]), 0.1), "losses between 0 and 1"),
        (lambda c: bounds.hoeffding_bentkus(np.array([0.0]), 1.0), "bound of a risk"),
    ],
)
def test_bad_input_gets_one_sentence(call, message):
    with pytest.raises(InvdiffError, match=message):
        call(controls.gaussian(30, 8))
