"""Are numbers uniform? The empirical distribution function against simultaneous bands, with exact probabilities.

At points ``z_k = k / K`` the count ``C_k`` of ``n`` independent uniform numbers up to ``z_k`` is binomial. The
statistic is the smallest two-sided binomial tail, ``g = 2 min_k min(P(C <= C_k), P(C >= C_k))``; the band of a
level holds all paths whose statistic exceeds one number, so it is as narrow at the ends as in the middle. Its
probability comes from a recursion over ``k`` (a uniform sample is a Poisson process given its total), not from
simulation, so p-values far below the reach of simulation are right too.

Sources: Saeilynoja, Buerkner, Vehtari, "Graphical test for discrete uniformity and its applications in
goodness-of-fit evaluation and multiple sample comparison", Statistics and Computing 32 (2022), for statistic and
band; Moscovich and Nadler, "Fast calculation of boundary crossing probabilities for Poisson processes",
Statistics and Probability Letters 123 (2017), for the recursion.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from invdiff.errors import InvdiffError

#: Largest number of points at which the distribution function is compared.
POINTS = 200


@dataclass(frozen=True)
class Band:
    """Simultaneous band for the empirical distribution function of uniform numbers.

    Attributes:
        z: Points, ``(K - 1,)``.
        lower: Lower end at each.
        upper: Upper end at each.
    """

    z: np.ndarray
    lower: np.ndarray
    upper: np.ndarray


def ecdf(u: Any, points: np.ndarray) -> np.ndarray:
    """Return the share of ``u`` up to each point."""
    values = _check(u)
    return np.searchsorted(np.sort(values), points, side="right") / len(values)


@lru_cache(maxsize=64)
def band(n: int, level: float = 0.99) -> Band:
    """Return the band that holds the whole function of ``n`` uniform numbers with that probability or more."""
    if n < 2 or not 0 < level < 1:
        raise InvdiffError(f"A band needs at least 2 numbers and a level between 0 and 1, got {n} and {level:g}.")
    low, high = -30.0, 0.0  # of log g
    for _ in range(40):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if _probability_within(n, np.exp(middle)) >= level else (low, middle)
    ends = _allowed(n, np.exp(low))
    return Band(_points(n), ends[0] / n, ends[1] / n)


def uniform_p_value(u: Any) -> float:
    """Return the exact probability that ``n`` independent uniform numbers look at least as uneven as ``u``.

    Args:
        u: ``(n,)`` in [0, 1], at least two; randomise ranks before (see `invdiff.uq.ranks`).
    """
    values = _check(u)
    n = len(values)
    counts = np.rint(ecdf(values, _points(n)) * n).astype(int)
    g = _tails(n)[np.arange(len(counts)), counts].min()
    # A little above g, because the event is "g or less" and paths with equal tails must count.
    return float(np.clip(1 - _probability_within(n, g * (1 + 1e-9)), 1e-12, 1.0))


def holm(p_values: Any) -> np.ndarray:
    """Return p-values adjusted by Holm's method: rejecting those up to ``a`` errs with probability ``a`` at most.

    The bound holds for any dependence between the tests.
    """
    p = np.asarray(p_values, float)
    order = np.argsort(p)
    steps = np.maximum.accumulate(p[order] * (len(p) - np.arange(len(p))))
    out = np.empty_like(p)
    out[order] = np.minimum(steps, 1)
    return out


def _check(u: Any) -> np.ndarray:
    values = np.asarray(u, dtype=float)
    if values.ndim != 1 or len(values) < 2 or not ((values >= 0) & (values <= 1)).all():
        raise InvdiffError("Uniformity is tested on at least two numbers between 0 and 1, in one row.")
    return values


def _points(n: int) -> np.ndarray:
    k = min(n, POINTS)
    return np.arange(1, k) / k


@lru_cache(maxsize=64)
def _tails(n: int) -> np.ndarray:
    """Two-sided tails of every count at every point, ``(K - 1, n + 1)``."""
    from scipy.stats import binom

    counts, z = np.arange(n + 1), _points(n)[:, None]
    return np.asarray(2 * np.minimum(binom.cdf(counts, n, z), binom.sf(counts - 1, n, z)))


def _allowed(n: int, g: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the smallest and largest count at every point whose tail is at least ``g``."""
    fine = _tails(n) >= g
    return fine.argmax(1), n - fine[:, ::-1].argmax(1)


def _probability_within(n: int, g: float) -> float:
    """Probability that ``n`` uniform numbers have all tails at least ``g``."""
    from scipy.stats import poisson

    if not (_tails(n) >= g).any(1).all():
        return 0.0
    lower, upper = _allowed(n, g)
    step = poisson.pmf(np.arange(n + 1), n / (len(lower) + 1))
    mass, first = np.ones(1), 0  # of the counts first, first + 1, ...
    for low, high in zip(lower, upper):
        spread = np.convolve(mass, step[: high - first + 1])
        low = max(int(low), first)
        mass, first = spread[low - first : int(high) - first + 1], low
    rest = n - first - np.arange(len(mass))
    return float(mass @ step[rest] / poisson.pmf(n, n))
