"""Scores, intervals, diversity, regions, components, streaming summaries: against closed forms and brute force."""

import numpy as np
import pytest
import torch

from invdiff import metrics
from invdiff.errors import InvdiffError
from invdiff.posterior import Posterior
from invdiff.uq import components, intervals, regions, scores, summaries
from invdiff.uq.draws import read_draws
from tests.unit.runs import COMPLEX, REAL, make_run

RNG_SEED = 3


def normal(*shape, seed=RNG_SEED):
    return np.random.default_rng(seed).standard_normal(shape)


def test_crps_of_cases_is_that_of_each_case_and_takes_tensors_and_weights():
    x, y, w = normal(4, 9, 3, 5), normal(4, 3, 5, seed=4), np.random.default_rng(5).random((4, 9))
    found = scores.crps(torch.from_numpy(x), torch.from_numpy(y), w)
    np.testing.assert_allclose(found, [metrics.crps(a, b, c) for a, b, c in zip(x, y, w)], rtol=1e-12)
    z = normal(2, 9, 3) + 1j * normal(2, 9, 3, seed=8)
    np.testing.assert_allclose(scores.crps(z, z[:, 0]), scores.crps(abs(z), abs(z[:, 0])), rtol=1e-12)


def test_energy_score_is_the_double_sum_and_the_crps_in_one_dimension():
    x, y, w = normal(2, 7, 3, 2), normal(2, 3, 2, seed=4), np.random.default_rng(5).random((2, 7))
    for case, found in enumerate(scores.energy_score(x, y, w)):
        p = w[case] / w[case].sum()
        far = np.array([np.linalg.norm(a - y[case]) for a in x[case]])
        pairs = np.array([[np.linalg.norm(a - b) for a in x[case]] for b in x[case]])
        assert found == pytest.approx(p @ far - p @ pairs @ p / (1 - (p**2).sum()) / 2, rel=1e-12)
    line = x.reshape(2, 7, 6)[..., :1]
    np.testing.assert_allclose(
        scores.energy_score(line, line[:, 0]), scores.crps(line, line[:, 0])[:, 0], rtol=1e-12
    )


def test_energy_score_is_fair_and_lowest_for_the_right_law():
    """Few and many draws of one law have the same score on average; other widths have a larger one."""
    y = normal(8_000, 2)
    few, many = (scores.energy_score(normal(8_000, n, 2, seed=n), y).mean() for n in (2, 12))
    assert abs(few - many) < 0.02
    for factor in (0.6, 1.6):
        assert scores.energy_score(factor * normal(8_000, 12, 2, seed=1), y).mean() > many + 0.01


def test_intervals_are_those_of_the_posterior_and_of_brute_force():
    run = make_run(REAL, cases=2, draws=23, bad=[(1, 4)])
    posterior = Posterior.from_run(run)
    lower, upper = intervals.interval(posterior, 0.8)
    np.testing.assert_allclose(lower, posterior.interval(0.8)["lower"], rtol=1e-10)
    np.testing.assert_allclose(upper, posterior.interval(0.8)["upper"], rtol=1e-10)
    np.testing.assert_allclose(
        intervals.coverage(posterior, run.x_true, 0.8), posterior.coverage(0.8).values, rtol=1e-12
    )
    x = np.random.default_rng(0).gamma(2.0, size=(1, 39, 4))
    low, high = intervals.interval(x, 0.5, "highest-density")
    ordered = np.sort(x[0], axis=0)
    lengths = ordered[20:] - ordered[:-20]  # 20 of 40 gaps: half of the probability
    first = lengths.argmin(0)
    np.testing.assert_array_equal(low[0], ordered[first, range(4)])
    np.testing.assert_array_equal(high[0], ordered[first + 20, range(4)])
    low, high = intervals.interval(x[:, :9], 0.75, "highest-density")  # 8 of 10 gaps: all 9 draws
    np.testing.assert_array_equal(np.stack([low[0], high[0]]), [x[0, :9].min(0), x[0, :9].max(0)])


@pytest.mark.parametrize("kind", ["equal-tailed", "highest-density"])
def test_intervals_cover_as_they_say(kind):
    """1,000 draws of a skewed law; choosing the shortest interval costs up to 0.02 of the coverage."""
    rng = np.random.default_rng(1)
    x, y = rng.gamma(2.0, size=(1, 1000, 4000)), rng.gamma(2.0, size=(1, 4000))
    assert intervals.coverage(x, y, 0.9, kind)[0] == pytest.approx(0.9, abs=0.03)
    assert intervals.coverage(x, y, 0.5, kind)[0] == pytest.approx(0.5, abs=0.04)
    widths = [intervals.width(x, 0.9, k)[0] for k in ("equal-tailed", "highest-density")]
    assert widths[1] < 0.95 * widths[0]


def test_weighted_intervals_agree_with_repeated_draws():
    """Integer weights are draws that come several times, up to the finer positions of order statistics."""
    x, times = normal(1, 400, 3), np.random.default_rng(2).integers(0, 4, 400)
    repeated = np.repeat(x, times, axis=1)
    for kind in ("equal-tailed", "highest-density"):
        a, b = intervals.interval(x, 0.8, kind, times[None]), intervals.interval(repeated, 0.8, kind)
        np.testing.assert_allclose(a, b, atol=0.06)


def test_interval_score_is_the_formula_and_prefers_the_right_width():
    x, y = normal(1, 39, 5), normal(1, 5, seed=9) * 3
    low, high = intervals.interval(x, 0.9)
    below, above = y < low, y > high
    wanted = high - low + 20 * (low - y) * below + 20 * (y - high) * above
    assert below.any() or above.any()
    np.testing.assert_allclose(intervals.interval_score(x, y, 0.9), wanted, rtol=1e-12)
    x, y = normal(1, 99, 20_000), normal(1, 20_000, seed=2)
    right = intervals.interval_score(x, y).mean()
    assert all(intervals.interval_score(f * x, y).mean() > right + 0.05 for f in (0.6, 1.6))


def test_pit_is_uniform_for_exact_draws_whatever_ties_there_are():
    """Kolmogorov distance below 1.63 / sqrt(n), the 1 % point; counts are full of ties."""
    rng = np.random.default_rng(0)
    for x, y in (
        (rng.standard_normal((1, 7, 20_000)), rng.standard_normal((1, 20_000))),
        (rng.poisson(1.5, (1, 7, 20_000)), rng.poisson(1.5, (1, 20_000))),
    ):
        u = np.sort(intervals.pit(x, y).ravel())
        assert np.abs(u - (np.arange(u.size) + 0.5) / u.size).max() < 1.63 / np.sqrt(u.size)
    narrow = intervals.pit(0.5 * normal(1, 7, 20_000), normal(1, 20_000, seed=1))
    assert (np.abs(narrow - 0.5) > 0.4).mean() > 0.3


def test_pit_of_weighted_draws_is_uniform():
    """Draws from a wider law with importance weights."""
    rng = np.random.default_rng(0)
    x, y = 1.5 * rng.standard_normal((2000, 200, 1)), rng.standard_normal((2000, 1))
    w = np.exp(-0.5 * x**2 + 0.5 * (x / 1.5) ** 2)[..., 0]
    u = np.sort(intervals.pit(x, y, w).ravel())
    assert np.abs(u - (np.arange(u.size) + 0.5) / u.size).max() < 1.63 / np.sqrt(u.size)


def test_spread_skill_is_one_for_exact_draws_of_any_number():
    for n in (2, 5, 30):
        x, y = normal(400, n, 50), normal(400, 50, seed=1)
        found = scores.spread_skill(x, y)
        assert found.ratio == pytest.approx(1, abs=0.02)
        assert found.error.mean() == pytest.approx(np.sqrt(1 + 1 / n), abs=0.02)
    level = np.linspace(0.5, 2, 50)
    found = scores.spread_skill(level * normal(400, 300, 50), level * normal(400, 50, seed=1))
    np.testing.assert_allclose(found.bin_spread, found.bin_error, rtol=0.07)
    assert scores.spread_skill(0.6 * normal(400, 30, 50), normal(400, 50, seed=1)).ratio == pytest.approx(
        0.6, abs=0.02
    )


def test_diversity_counts_repeats_and_sees_near_ones():
    x = normal(3, 8, 20)
    x[0, 3] = x[0, 1]
    x[1, 5] = x[1, 2] + 1e-4
    found = scores.diversity(x)
    assert found.duplicates.tolist() == [1, 0, 0]
    assert found.nearest[0] == 0 and 0 < found.nearest[1] < 1e-3 and found.nearest[2] > 0.3
    pairs = [np.sqrt(np.mean((x[2, i] - x[2, j]) ** 2)) for i in range(8) for j in range(i)]
    assert found.distance[2] == pytest.approx(np.median(pairs), rel=1e-12)


def test_streamed_summaries_are_those_of_all_draws():
    x, w = normal(40, 3, 6), np.random.default_rng(0).random(40)
    x[7, 0, 0] = np.nan
    w[9] = 0
    keep = np.delete(np.arange(40), [7, 9])
    found = summaries.stream(iter(x), w, above=[0.0, 1.0])
    p = w[keep] / w[keep].sum()
    mean = np.tensordot(p, x[keep], 1)
    np.testing.assert_allclose(found.mean, mean, rtol=1e-10)
    var = np.tensordot(p, (x[keep] - mean) ** 2, 1) / (1 - (p**2).sum())
    np.testing.assert_allclose(found.std, np.sqrt(var), rtol=1e-10)
    np.testing.assert_allclose(found.exceedance[1], np.tensordot(p, x[keep] > 1.0, 1), rtol=1e-10)
    assert (found.count, found.n_excluded) == (38, 2)
    z = x[:7] + 1j * x[10:17]
    found = summaries.stream(z, above=[1.0])
    np.testing.assert_allclose(found.mean, z.mean(0), rtol=1e-10)
    np.testing.assert_allclose(found.std, z.std(0, ddof=1), rtol=1e-10)
    np.testing.assert_allclose(found.exceedance[0], (abs(z) > 1).mean(0), rtol=1e-10)


def test_quantiles_of_a_stored_file_are_read_by_blocks(tmp_path, monkeypatch):
    import h5py

    from invdiff import summaries as core

    monkeypatch.setattr(core, "_BLOCK_BYTES", 16 * 30 * 6)  # one image row of all draws
    x = normal(30, 2, 5, 6)
    x[4, 0, 0, 0] = np.inf
    with h5py.File(tmp_path / "draws.h5", "w") as file:
        file["x"] = x
        found = summaries.quantiles(file["x"], [0.1, 0.5])
    good = np.delete(x, 4, axis=0)
    np.testing.assert_allclose(found, np.quantile(good, [0.1, 0.5], axis=0, method="weibull"), rtol=1e-10)
    line = normal(30, 7)
    np.testing.assert_allclose(
        summaries.quantiles(line, [0.3])[0], np.quantile(line, 0.3, axis=0, method="weibull"), rtol=1e-10
    )


def test_regions_have_posteriors_of_size_mean_and_diameter():
    rng = np.random.default_rng(0)
    labels = np.zeros((8, 9), int)
    labels[1:4, 2:6], labels[5:8, 1:8] = 1, 4
    x = rng.standard_normal((2, 15, 1, 8, 9))
    found = regions.region_statistics(x, labels, above=0.5, spacing=(2.0, 0.5), names={4: "lesion"})
    inside = x[:, :, 0][..., labels == 4]
    np.testing.assert_allclose(found.values["mean"][..., 1], inside.mean(-1), rtol=1e-12)
    area = (inside > 0.5).sum(-1) * 1.0
    np.testing.assert_allclose(found.values["volume"][..., 1], area, rtol=1e-12)
    np.testing.assert_allclose(found.values["diameter"][..., 1], 2 * np.sqrt(area / np.pi), rtol=1e-12)
    np.testing.assert_allclose(found.mean("volume")[:, 1], area.mean(1), rtol=1e-12)
    np.testing.assert_allclose(found.std("mean")[:, 1], inside.mean(-1).std(1, ddof=1), rtol=1e-12)
    low, _ = found.interval("mean", 0.5)
    np.testing.assert_allclose(low[:, 1], np.quantile(inside.mean(-1), 0.25, axis=1, method="weibull"), rtol=1e-12)
    assert found.names == ("1", "lesion") and "lesion" in repr(found)
    assert found.to_xarray()["volume"].sel(region="lesion").shape == (2, 15)
    ball = regions.region_statistics(x[:, :, :1], np.ones((1, 8, 9), int), above=-99.0)
    np.testing.assert_allclose(ball.values["diameter"], (6 * 72 / np.pi) ** (1 / 3), rtol=1e-12)
    x[0, 3] = np.nan
    assert regions.region_statistics(x, labels).weights[0].tolist() == [1 / 14] * 14 + [0]


@pytest.mark.parametrize("weighted", [False, True])
def test_principal_components_are_those_of_the_covariance(weighted):
    x, w = normal(2, 12, 3, 4), np.random.default_rng(1).random((2, 12))
    found = components.principal_components(x, 3, case=1, weights=w if weighted else None)
    v = x[1].reshape(12, 12)
    covariance = np.cov(v.T, aweights=w[1] if weighted else None)
    values, u = np.linalg.eigh(covariance)
    np.testing.assert_allclose(found.std**2, values[::-1][:3], rtol=1e-10)
    np.testing.assert_allclose(found.share, values[::-1][:3] / values.sum(), rtol=1e-10)
    cosine = np.abs((found.images.reshape(3, 12) * u[:, ::-1][:, :3].T).sum(1))
    np.testing.assert_allclose(cosine, 1, rtol=1e-10)
    np.testing.assert_allclose(
        found.coordinates, (v - found.mean.ravel()) @ found.images.reshape(3, 12).T, rtol=1e-9
    )
    z = components.principal_components(normal(1, 6, 4) + 1j * normal(1, 6, 4, seed=8))
    assert z.images.shape == (5, 4) and np.iscomplexobj(z.images)
    gram = np.real(z.images.conj() @ z.images.T)
    np.testing.assert_allclose(gram, np.eye(5), atol=1e-10)


def test_draws_that_are_not_finite_are_excluded_and_counted():
    x = normal(2, 9, 4)
    x[0, 2, 1], x[1, 8, 0] = np.nan, np.inf
    found = read_draws(x)
    assert found.n_excluded == 2
    np.testing.assert_array_equal(found.case(0)[0], np.delete(x[0], 2, axis=0))
    np.testing.assert_allclose(scores.crps(x, x[:, 0])[1], metrics.crps(x[1, :8], x[1, 0]), rtol=1e-12)
    posterior = Posterior.from_run(make_run(COMPLEX, draws=6, bad=[(0, 1)], missing=[(0, 5)]))
    assert read_draws(posterior).n_excluded == 2 and len(read_draws(posterior).case(0)[0]) == 4


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, y: scores.crps(x[:, :1], y), "1 usable draw, .* one draw has no spread"),
        (lambda x, y: scores.crps(x * np.where(np.arange(5) < 4, np.nan, 1)[:, None], y), "8 over all cases"),
        (lambda x, y: scores.crps(x[:, :1].repeat(5, 1), y), "All 5 usable draws of case 0 are the same"),
        (lambda x, y: scores.crps(x, y, np.zeros((2, 5))), "weights of case 0 sum to 0"),
        (lambda x, y: scores.crps(x, y, -np.ones((2, 5))), "not negative"),
        (lambda x, y: scores.crps(x, y, np.ones((5, 2))), r"expected \(2, 5\)"),
        (lambda x, y: scores.crps(x, y[:, :2]), r"The truth has shape \(2, 2\), expected \(2, 3\)"),
        (lambda x, y: scores.crps(x, y * np.nan), "The truth holds NaN"),
        (lambda x, y: scores.crps(x[0], y), r"\(case, draw, ...\)"),
        (lambda x, y: scores.crps(x.astype(str), y), "Images hold numbers"),
        (lambda x, y: scores.crps(Posterior.from_run(make_run(kind="point", draws=1)), y), "point estimates"),
        (lambda x, y: scores.crps(Posterior.from_run(make_run()), y, np.ones(12)), "brings the weights"),
        (lambda x, y: scores.energy_score(x, y + 1j), "truth is complex and the draws are real"),
        (lambda x, y: intervals.interval(x, 1.0), "level between 0 and 1"),
        (lambda x, y: intervals.interval(x, 0.9, "central"), "'equal-tailed' or 'highest-density'"),
        (lambda x, y: components.principal_components(x, case=2), "case 2 is not among them"),
        (lambda x, y: summaries.stream(x[0, :1]), "at least 2 usable draws, and 1 came"),
        (lambda x, y: summaries.stream(x[0], [1.0]), "fewer weights than draws"),
        (lambda x, y: summaries.stream([x[0, 0], x[0, :, 0]]), "draws of one image"),
        (lambda x, y: summaries.quantiles(x[0], [1.5]), "probabilities between 0 and 1"),
        (lambda x, y: summaries.quantiles(x[0], [0.5], np.ones(4)), "expected 5 finite ones"),
        (lambda x, y: summaries.quantiles(x[0] * np.nan, [0.5]), "there are 0"),
        (lambda x, y: regions.region_statistics(x, np.zeros(3, int)), "0 everywhere"),
        (lambda x, y: regions.region_statistics(x, np.ones(4, int)), "Labels are whole numbers"),
        (lambda x, y: regions.region_statistics(x, np.ones(3, int), spacing=(1.0, 2.0)), "1 positive numbers"),
        (lambda x, y: regions.region_statistics(x, np.ones(3, int)).mean("volume"), "Regions have mean"),
    ],
)
def test_bad_input_gets_one_sentence(call, message):
    with pytest.raises(InvdiffError, match=message) as error:
        call(normal(2, 5, 3), normal(2, 3, seed=7))
    assert "\n" not in str(error.value)
