"""Effective sample size, R-hat and Monte Carlo errors of chains, and the effective size of weights.

They are for draws that depend on one another: Metropolis and Gibbs chains. The draws of most diffusion samplers
are independent, their effective number is their number, and R-hat says nothing about them.

Source: Vehtari, Gelman, Simpson, Carpenter, Buerkner, "Rank-normalization, folding, and localization: an improved
R-hat for assessing convergence of MCMC", Bayesian Analysis 16 (2021).
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np

from invdiff.errors import InvdiffError
from invdiff.uq.draws import effective_size, to_numpy

What = Literal["mean", "std", "quantile"]


def r_hat(chains: Any) -> np.ndarray:
    """Return the rank-normalised split R-hat, the larger of bulk and tail, ``(...)``; mixed chains reach 1.01.

    Chains are cut into halves and values replaced by normal scores of their ranks; then
    ``sqrt(((n - 1) / n W + B / n) / W)`` with ``W`` the mean variance within chains and ``B / n`` the variance of
    their means; for the tails the same of the distances from the median.

    Args:
        chains: ``(chain, draw, ...)``, real.
    """
    x = _halves(_chains(chains))
    folded = np.abs(x - np.median(x, axis=(0, 1)))
    return np.maximum(_plain_r_hat(_normal_scores(x)), _plain_r_hat(_normal_scores(folded)))


def ess(
    chains: Any, kind: Literal["bulk", "tail", "mean", "std", "quantile"] = "bulk", prob: float = 0.5
) -> np.ndarray:
    """Return the effective sample size ``M n / tau``, ``(...)``.

    ``tau = 1 + 2 sum rho_t`` with autocorrelations combined over split chains and cut by Geyer's initial monotone
    sequence.

    Args:
        chains: ``(chain, draw, ...)``, real.
        kind: ``bulk``: of normal scores of ranks; ``tail``: the smaller of the indicators of the 5 % and 95 %
            quantiles; ``mean`` and ``std``: of values and of squared deviations; ``quantile``: of the indicator
            of ``prob``.
        prob: Probability of the quantile.
    """
    x = _chains(chains)
    if kind == "tail":
        return np.minimum(ess(x, "quantile", 0.05), ess(x, "quantile", 0.95))
    if kind == "bulk":
        return _ess(_normal_scores(_halves(x)))
    if kind == "mean":
        return _ess(_halves(x))
    if kind == "std":
        return _ess(_halves((x - x.mean(axis=(0, 1))) ** 2))
    if kind == "quantile":
        edge = np.quantile(x, prob, axis=(0, 1))
        return _ess(_halves((x <= edge).astype(float)))
    raise InvdiffError(f"The effective size is that of bulk, tail, mean, std or quantile, not {kind!r}.")


def mcse(draws: Any, what: What = "mean", prob: float = 0.5, size: Any = None) -> np.ndarray:
    """Return the Monte Carlo standard error of a summary, ``(...)``.

    ``mean``: ``s / sqrt(ess)``. ``std``: ``sqrt((m4 - s^4) / ess) / (2 s)`` with ``m4`` the fourth central moment.
    ``quantile``: half the distance between the sample quantiles at the ends of a central 68 % interval of
    ``Beta(ess p + 1, ess (1 - p) + 1)``.

    Args:
        draws: ``(chain, draw, ...)``, real; independent draws are one chain.
        what: Mean, standard deviation or quantile.
        prob: Probability of the quantile.
        size: Effective number of draws: give their number where they are independent, or `ess_of_weights`; by
            default it is estimated from the chains.
    """
    from scipy.stats import beta

    x = _chains(draws)
    flat = x.reshape(-1, *x.shape[2:])
    if what not in ("mean", "std", "quantile"):
        raise InvdiffError(f"There are Monte Carlo errors of mean, std and quantile, not {what!r}.")
    n = np.asarray(ess(x, what, prob) if size is None else size, dtype=float)
    if not (n > 0).all():
        raise InvdiffError("The effective number of draws must be positive.")
    if what == "mean":
        return np.asarray(flat.std(0, ddof=1) / np.sqrt(n))
    if what == "std":
        square = (flat - flat.mean(0)) ** 2
        var = square.mean(0)
        return np.asarray(np.sqrt(((square**2).mean(0) - var**2) / n / np.where(var > 0, var, 1)) / 2)
    tail = 0.5 * math.erfc(1 / math.sqrt(2))
    ends = [np.asarray(beta.ppf(q, n * prob + 1, n * (1 - prob) + 1)) for q in (tail, 1 - tail)]
    values, count = np.sort(flat, axis=0), len(flat)
    at = [
        np.floor(ends[0] * count).clip(1, count).astype(int) - 1,
        np.ceil(ends[1] * count).clip(1, count).astype(int) - 1,
    ]
    low, high = (np.take_along_axis(values, np.broadcast_to(k, values.shape[1:])[None], axis=0)[0] for k in at)
    return np.asarray((high - low) / 2)


def ess_of_weights(weights: Any) -> np.ndarray:
    """Return Kish's effective number of weighted draws, ``(sum w)^2 / sum w^2``, over the last axis."""
    w = to_numpy(weights).astype(float)
    if not np.isfinite(w).all() or (w < 0).any() or not (w.sum(-1) > 0).all():
        raise InvdiffError("Weights must be finite, not negative, and not all 0; exponentiate log weights.")
    return np.apply_along_axis(effective_size, -1, w)


def _chains(values: Any) -> np.ndarray:
    x = to_numpy(values)
    if np.iscomplexobj(x) or x.ndim < 2 or x.shape[1] < 4:
        raise InvdiffError(
            f"Chains are real numbers (chain, draw, ...) with at least 4 draws, got {x.dtype} {x.shape}; take "
            "magnitudes, or real and imaginary parts, of complex ones."
        )
    if not np.isfinite(x).all():
        raise InvdiffError("The chains hold NaN or infinite values; leave those chains out.")
    return x.astype(np.float64)


def _halves(x: np.ndarray) -> np.ndarray:
    """Cut every chain into two halves; of an odd number the middle draw is dropped."""
    half = x.shape[1] // 2
    return np.concatenate([x[:, :half], x[:, -half:]])


def _normal_scores(x: np.ndarray) -> np.ndarray:
    """Replace values by ``Phi^-1((rank - 3/8) / (S + 1/4))``, ranks over all chains, ties averaged."""
    from scipy.special import ndtri
    from scipy.stats import rankdata

    size = x.shape[0] * x.shape[1]
    ranks = rankdata(x.reshape(size, -1), axis=0).reshape(x.shape)
    return np.asarray(ndtri((ranks - 0.375) / (size + 0.25)))


def _plain_r_hat(x: np.ndarray) -> np.ndarray:
    n = x.shape[1]
    within = x.var(axis=1, ddof=1).mean(0)
    between = x.mean(1).var(axis=0, ddof=1)
    safe = np.where(within > 0, within, 1)
    # Constant chains: 1 where all agree, infinite where they are stuck at different values.
    stuck = np.where(between > 0, np.inf, 1.0)
    return np.asarray(np.where(within > 0, np.sqrt((n - 1) / n + between / safe), stuck))


def _ess(x: np.ndarray) -> np.ndarray:
    """Effective size of chains ``(m, n, ...)`` already split."""
    m, n = x.shape[:2]
    flat = x.reshape(m, n, -1)
    centred = flat - flat.mean(1, keepdims=True)
    size = 1 << (2 * n - 1).bit_length()
    spectrum = np.fft.rfft(centred, size, axis=1)
    covariance = np.fft.irfft(np.abs(spectrum) ** 2, size, axis=1)[:, :n].mean(0) / n
    within = covariance[0] * n / (n - 1)
    total = covariance[0] + (flat.mean(1).var(axis=0, ddof=1) if m > 1 else 0.0)
    rho = 1 - (within - covariance) / np.where(total > 0, total, 1)
    rho[0] = 1
    out = np.array([_from_correlations(rho[:, k], m * n) if total[k] > 0 else m * n for k in range(rho.shape[1])])
    return out.reshape(x.shape[2:])


def _from_correlations(rho: np.ndarray, total: int) -> float:
    """``total / tau`` by Geyer's initial monotone sequence of sums of neighbours."""
    n = len(rho)
    pairs = rho[: n - n % 2].reshape(-1, 2).sum(1)[: max(1, (n - 1) // 2)]
    negative = np.flatnonzero(pairs < 0)
    # Of the pair where the sum stops, the even term still counts where it is positive.
    stop = int(negative[0]) if len(negative) else len(pairs) - 1
    kept = np.minimum.accumulate(pairs[:stop]) if stop else np.zeros(0)
    tau = -1 + 2 * float(kept.sum()) + max(rho[2 * stop], 0.0)
    return total / max(tau, 1 / math.log10(total))
