"""Effective sizes, R-hat and Monte Carlo errors: known autocorrelations, repeated experiments, and ArviZ."""

import warnings

import numpy as np
import pytest

from invdiff.errors import InvdiffError
from invdiff.uq import chains


def autoregressive(rho, m=4, n=2000, k=1, seed=0):
    """Chains with autocorrelation ``rho^t`` and unit variance, ``(m, n, k)``."""
    e = np.random.default_rng(seed).standard_normal((m, n, k))
    x = np.empty_like(e)
    x[:, 0] = e[:, 0]
    for t in range(1, n):
        x[:, t] = rho * x[:, t - 1] + np.sqrt(1 - rho**2) * e[:, t]
    return x


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9, -0.5])
def test_effective_size_is_that_of_a_known_autocorrelation(rho):
    """``n (1 - rho) / (1 + rho)``; over 20 runs the estimate scatters by 10 % at most for rho 0.9."""
    x = autoregressive(rho, k=20)
    wanted = 8000 * (1 - rho) / (1 + rho)
    assert chains.ess(x, "mean").mean() == pytest.approx(wanted, rel=0.08)
    assert chains.ess(x, "bulk").mean() == pytest.approx(wanted, rel=0.1)


@pytest.mark.parametrize(("what", "prob"), [("mean", 0.5), ("std", 0.5), ("quantile", 0.9)])
def test_monte_carlo_errors_are_the_scatter_of_repeated_chains(what, prob):
    x = autoregressive(0.5, m=2, n=1000, k=300)
    flat = x.reshape(-1, 300)
    summary = {"mean": flat.mean(0), "std": flat.std(0), "quantile": np.quantile(flat, prob, axis=0)}[what]
    assert chains.mcse(x, what, prob).mean() == pytest.approx(summary.std(), rel=0.15)
    independent = np.random.default_rng(1).standard_normal((1, 500, 300))
    values = {"mean": independent[0].mean(0), "std": independent[0].std(0)}.get(
        what, np.quantile(independent[0], prob, axis=0)
    )
    assert chains.mcse(independent, what, prob, size=500).mean() == pytest.approx(values.std(), rel=0.15)


def test_r_hat_sees_chains_that_differ_in_place_width_or_half():
    x = np.random.default_rng(0).standard_normal((4, 500, 3))
    assert (chains.r_hat(x) < 1.01).all()
    moved, wide, drift = x.copy(), x.copy(), x.copy()
    moved[0] += 1
    wide[0] *= 3
    drift[:, 250:] += 1
    for bad in (moved, wide, drift):
        assert (chains.r_hat(bad) > 1.03).all()
    assert np.isinf(chains.r_hat(np.arange(4.0)[:, None].repeat(10, 1))).all()
    assert chains.r_hat(np.ones((4, 10))) == 1


def test_effective_size_of_weights():
    assert chains.ess_of_weights(np.ones(7)) == pytest.approx(7)
    assert chains.ess_of_weights([[1.0, 0, 0], [1, 1, 2]]).tolist() == pytest.approx([1, 16 / 6])


def test_figures_are_those_of_arviz():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        az = pytest.importorskip("arviz")
    if az.utils.Numba.numba_flag:  # compiled, its error of std asks numpy 2.4 for a scalar of a row
        az.utils.Numba.disable_numba()
    rng = np.random.default_rng(5)
    for x in (
        autoregressive(0.8, m=4, n=500)[..., 0],
        autoregressive(-0.3, m=3, n=301, seed=2)[..., 0],
        np.exp(rng.standard_normal((2, 200))),
        np.cumsum(rng.standard_normal((4, 100)), axis=1),
        rng.poisson(2.0, (4, 150)).astype(float),
    ):
        assert float(chains.r_hat(x)) == pytest.approx(float(az.rhat(x)), rel=1e-10)
        for kind in ("bulk", "tail", "mean"):
            assert float(chains.ess(x, kind)) == pytest.approx(float(az.ess(x, method=kind)), rel=1e-10)
        assert float(chains.mcse(x, "mean")) == pytest.approx(float(az.mcse(x, method="mean")), rel=1e-10)
        assert float(chains.mcse(x, "std")) == pytest.approx(float(az.mcse(x, method="sd")), rel=1e-10)
        ours = float(chains.mcse(x, "quantile", 0.2))
        assert ours == pytest.approx(float(az.mcse(x, method="quantile", prob=0.2)), rel=1e-10)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: chains.ess(np.zeros((2, 3))), "at least 4 draws"),
        (lambda: chains.ess(np.zeros((2, 9)) + 1j), "Chains are real numbers"),
        (lambda: chains.ess(np.full((2, 9), np.nan)), "NaN or infinite"),
        (lambda: chains.ess(np.zeros((2, 9)), "middle"), "not 'middle'"),
        (lambda: chains.mcse(np.zeros((2, 9)), "mode"), "not 'mode'"),
        (lambda: chains.mcse(np.zeros((2, 9)), size=0), "must be positive"),
        (lambda: chains.ess_of_weights([0.0, 0.0]), "not all 0"),
    ],
)
def test_bad_input_gets_one_sentence(call, message):
    with pytest.raises(InvdiffError, match=message):
        call()
