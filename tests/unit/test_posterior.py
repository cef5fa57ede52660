import numpy as np
import pytest
import torch

from invdiff.errors import InvdiffError, StoreError
from invdiff.posterior import Posterior, open_posterior
from invdiff.spaces import Space
from invdiff.summaries import quantile
from tests.unit.runs import COMPLEX, LINE, REAL, make_run


def test_summaries_of_real_images_match_numpy():
    run = make_run(REAL, draws=25)
    p, x = Posterior.from_run(run), run.draws.array[0]
    np.testing.assert_allclose(p.mean(), x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(p.std(), x.std(0, ddof=1), rtol=1e-12)
    np.testing.assert_allclose(p.median(), np.median(x, 0), rtol=1e-12)
    for q in (0.05, 0.1, 0.25, 0.33, 0.95):
        np.testing.assert_allclose(p.quantile(q), np.quantile(x, q, axis=0, method="weibull"), rtol=1e-12)
    assert p.mean().dims == ("channel", "y", "x")
    assert p.draws.dims == ("draw", "channel", "y", "x")
    np.testing.assert_array_equal(p.draws, x)


def test_complex_images_have_a_complex_mean_and_magnitude_quantiles():
    run = make_run(COMPLEX, draws=30)
    p, x = Posterior.from_run(run), run.draws.array[0].astype(complex)
    assert p.is_complex and p.mean().dtype == np.complex64
    np.testing.assert_allclose(p.mean(), x.mean(0), atol=1e-6)
    np.testing.assert_allclose(p.mean(magnitude=True), np.abs(x).mean(0), rtol=1e-5)
    np.testing.assert_allclose(p.std(), np.sqrt(x.real.var(0, ddof=1) + x.imag.var(0, ddof=1)), rtol=1e-5)
    np.testing.assert_allclose(p.std(magnitude=True), np.abs(x).std(0, ddof=1), rtol=1e-5)
    np.testing.assert_allclose(p.median(), np.median(np.abs(x), 0), rtol=1e-5)
    interval = p.interval(0.8)
    assert interval.attrs["quantity"] == "magnitude"
    np.testing.assert_allclose(interval["upper"], np.quantile(np.abs(x), 0.9, axis=0, method="weibull"), rtol=1e-5)
    np.testing.assert_array_equal(p.draws, run.draws.array[0])
    assert p.draws.dtype == np.complex64 and "complex_pair" not in p.draws.attrs


def test_signals_with_one_axis():
    run = make_run(LINE, draws=21)
    p, x = Posterior.from_run(run), run.draws.array[0]
    np.testing.assert_allclose(p.quantile(0.3), np.quantile(x, 0.3, axis=0, method="weibull"), rtol=1e-5)
    assert p.interval(0.9)["lower"].dims == ("index",)


def test_interval_covers_a_further_exact_draw_with_its_level():
    rng = np.random.default_rng(0)
    for n, tolerance in ((19, 0.006), (30, 0.014), (39, 0.006)):
        draws, truth = rng.standard_normal((n, 40_000)), rng.standard_normal(40_000)
        low, high = quantile(draws, [0.05, 0.95])
        assert abs(np.mean((truth > low) & (truth < high)) - 0.9) < tolerance


def test_interval_says_what_few_draws_support():
    p = Posterior.from_run(make_run(draws=16))
    assert p.interval(0.9).attrs["supported_level"] == pytest.approx(15 / 17)
    assert Posterior.from_run(make_run(draws=39)).interval(0.9).attrs["supported_level"] == 0.9


def test_failed_draws_are_left_out_and_counted():
    run = make_run(REAL, draws=10, bad=[(0, 3)], missing=[(0, 9)])
    run.stats["status"][0, 3] = "ok"  # a driver that did not notice
    p = Posterior.from_run(run)
    good = np.delete(run.draws.array[0], [3, 9], axis=0)
    np.testing.assert_allclose(p.mean(), good.mean(0), rtol=1e-12)
    np.testing.assert_allclose(p.std(), good.std(0, ddof=1), rtol=1e-12)
    np.testing.assert_allclose(p.quantile(0.4), np.quantile(good, 0.4, axis=0, method="weibull"), rtol=1e-12)
    assert p.n_failed == 2 and p.n_draws == 10
    assert list(p.stats["status"].values[[2, 3, 9]]) == ["ok", "nan", "missing"]
    assert int(p.tree["diagnostics"]["draws_nan"]) == 1
    assert "2 failed or missing" in repr(p)


def test_one_usable_draw_refuses_spread_in_a_sentence():
    p = Posterior.from_run(make_run(draws=1))
    np.testing.assert_allclose(p.mean(), p.draws[0])
    for call in (p.std, lambda: p.quantile(0.5), p.interval, lambda: p.std(magnitude=True)):
        with pytest.raises(InvdiffError, match="at least 2 usable draws, and there is 1"):
            call()
    assert "std" not in p.tree["summary"]


def test_all_draws_failed_is_a_sentence():
    p = Posterior.from_run(make_run(draws=2, bad=[(0, 0), (0, 1)]))
    with pytest.raises(InvdiffError, match=r"0 \(2 failed or missing\)"):
        p.mean()
    assert "<table>" in p._repr_html_()


def test_point_estimate_is_never_uncertainty():
    run = make_run(kind="point", draws=1)
    p = Posterior.from_run(run)
    assert "posterior" not in p.tree.children and "summary" not in p.tree.children
    np.testing.assert_array_equal(p.estimate, run.draws.array[0, 0])
    calls = [p.mean, p.median, p.std, p.interval, p.coverage, lambda: p.quantile(0.1), lambda: p.draws]
    for call in calls:
        with pytest.raises(InvdiffError, match="point estimate"):
            call()
    assert "no uncertainty" in repr(p)
    with pytest.raises(InvdiffError, match="not a point estimate"):
        _ = Posterior.from_run(make_run()).estimate


def test_restarts_of_a_point_estimate_are_not_draws():
    p = Posterior.from_run(make_run(kind="point", draws=3))
    assert p.estimate.dims == ("restart", "channel", "y", "x")


def test_several_cases():
    run = make_run(REAL, cases=3, draws=8, bad=[(1, i) for i in range(7)])
    p = Posterior.from_run(run)
    assert p.n_cases == 3 and p.draws.dims[0] == "case" and p.std().dims == ("case", "channel", "y", "x")
    np.testing.assert_allclose(p.std()[2], run.draws.array[2].std(0, ddof=1), rtol=1e-12)
    assert np.isnan(p.std()[1]).all() and np.isfinite(p.mean()[1]).all()
    for q in (0.05, 0.2):
        assert np.isnan(p.quantile(q)[1]).all() and np.isfinite(p.quantile(q)[0]).all()
    assert p.coverage().shape == (3,) and np.isnan(p.coverage()[1])
    assert p.stats["nfe"].dims == ("case", "draw")


def test_coordinates_carry_spacing_and_units():
    p = Posterior.from_run(make_run())
    mean = p.mean()
    np.testing.assert_allclose(mean["y"], np.arange(9) * 1.5)
    np.testing.assert_allclose(mean["x"], np.arange(7) * 0.5)
    assert mean["y"].attrs["units"] == "mm" and mean.attrs["units"] == "mT"
    assert mean.attrs["long_name"] == "posterior mean"
    pixel = Posterior.from_run(make_run(REAL)).mean()
    assert pixel["y"].attrs["units"] == "1" and pixel["channel"].size == 2


def test_coverage_against_numpy():
    run = make_run(REAL, draws=40)
    p, x, t = Posterior.from_run(run), run.draws.array[0], run.x_true[0]
    low, high = np.quantile(x, [0.25, 0.75], axis=0, method="weibull")
    assert float(p.coverage(0.5)) == pytest.approx(np.mean((t >= low) & (t <= high)))
    with pytest.raises(InvdiffError, match="true image"):
        Posterior.from_run(make_run(truth=False)).coverage()


def test_weighted_draws():
    log_weight = np.zeros((1, 30))
    log_weight[0, 15:] = -800.0
    run = make_run(REAL, draws=30, stats={"log_weight": log_weight})
    p, x = Posterior.from_run(run), run.draws.array[0, :15]
    np.testing.assert_allclose(p.mean(), x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(p.std(), x.std(0, ddof=1), rtol=1e-12)
    assert p.tree["summary"].attrs["weights"] == "exp(log_weight)"
    v = np.random.default_rng(0).standard_normal((9, 4))
    nearly = np.ones(9) + 1e-9 * np.arange(9)
    np.testing.assert_allclose(quantile(v, [0.01, 0.37, 0.9], nearly), quantile(v, [0.01, 0.37, 0.9]), atol=1e-6)


def test_observed_data_come_back_complex_and_labelled():
    run = make_run(cases=2)
    observed = Posterior.from_run(run).observed
    np.testing.assert_array_equal(observed["y"], run.observed["y"])
    assert observed["y"].dims == ("case", "coil", "data_y", "data_x")
    assert observed["mask"].dims == ("data_y", "data_x") and observed["sigma"].ndim == 0


def test_bad_arguments():
    p = Posterior.from_run(make_run())
    with pytest.raises(InvdiffError, match="between 0 and 1"):
        p.quantile(1.2)
    with pytest.raises(InvdiffError, match="between 0 and 1"):
        p.interval(90)
    with pytest.raises(StoreError, match=r"\.nc"):
        p.to_netcdf("x.zarr")
    with pytest.raises(StoreError, match=r"\.nc .* or \.zarr"):
        p.save("x.txt")
    with pytest.raises(InvdiffError, match="kind of a run"):
        make_run(kind="guess")
    with pytest.raises(InvdiffError, match="Statistic nfe"):
        make_run(draws=4, stats={"nfe": np.zeros((1, 3))})


def test_posterior_is_frozen_and_reprs_escape(tmp_path):
    p = Posterior.from_run(make_run(title="<script>alert(1)</script>", draws=4))
    with pytest.raises(AttributeError):
        p.tree = None
    assert "<script>" not in p._repr_html_() and "data:image/png" in p._repr_html_()
    assert "dds" in repr(p) and "brain-mri" in repr(p) and "seed" in repr(p)
    p.save(tmp_path / "a.nc")
    with open_posterior(tmp_path / "a.nc") as q:
        assert repr(q) == repr(p)
        q.save(tmp_path / "a.nc")  # over the file it reads from
    with open_posterior(tmp_path / "a.nc") as q:
        np.testing.assert_array_equal(q.draws, p.draws)


def test_exotic_dims():
    space = Space((3, 4, 5, 6), torch.float32, dims=("time", "z", "y", "x"))
    run = make_run(space, draws=6)
    p = Posterior.from_run(run)
    want = np.quantile(run.draws.array[0], 0.4, axis=0, method="weibull")
    np.testing.assert_allclose(p.quantile(0.4), want, rtol=1e-5, atol=1e-6)
    assert p.draws.dims == ("draw", "time", "z", "y", "x")
