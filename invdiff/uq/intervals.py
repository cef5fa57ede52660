"""Intervals of draws and where the truth falls: equal-tailed and highest-density, coverage, width, PIT."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from invdiff.errors import InvdiffError
from invdiff.summaries import quantile
from invdiff.uq.draws import effective_size, ordered, read_draws, read_truth

Kind = Literal["equal-tailed", "highest-density"]


def interval(
    draws: Any, level: float = 0.9, kind: Kind = "equal-tailed", weights: Any = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the ends of pixelwise intervals, ``(case, *image)`` each; of magnitudes, for complex images.

    Order statistic ``k`` of ``n`` stands at probability ``k / (n + 1)``. The equal-tailed interval goes from
    ``(1 - level) / 2`` to ``(1 + level) / 2``; the highest-density one is the shortest between two order
    statistics ``level`` apart. With ``n`` draws a level above ``(n - 1) / (n + 1)`` gives the extreme draws.
    Choosing the shortest of noisy intervals costs coverage: 0.89 instead of 0.90 for 100 normal draws;
    equal-tailed ones keep it.

    Args:
        draws: ``(case, draw, ...)`` or a `Posterior`; see `read_draws`.
        level: Between 0 and 1.
        kind: Which interval.
        weights: ``(case, draw)``, where draws are weighted.
    """
    _check_level(level)
    if kind not in ("equal-tailed", "highest-density"):
        raise InvdiffError(f"Intervals are 'equal-tailed' or 'highest-density', not {kind!r}.")
    ends = []
    for x, w in read_draws(draws, weights):
        values = ordered(x)
        if kind == "equal-tailed":
            ends.append(quantile(values, [(1 - level) / 2, (1 + level) / 2], w))
        else:
            ends.append(_shortest(values, w, level))
    lower, upper = np.stack(ends, axis=1)
    return lower, upper


def _shortest(values: np.ndarray, w: np.ndarray, level: float) -> np.ndarray:
    """Return the ends ``(2, ...)`` of the shortest interval between order statistics ``level`` apart."""
    n, m = len(values), effective_size(w)
    flat = values.reshape(n, -1)
    order = np.argsort(flat, axis=0)
    flat, own = np.take_along_axis(flat, order, axis=0), w[order]
    position = (np.cumsum(own, axis=0) - own / 2) * m / (m + 1)
    # One search serves all pixels, because every pixel's positions lie in a unit interval of its own.
    shift = 2.0 * np.arange(flat.shape[1])
    where = np.searchsorted((position + shift).T.ravel(), (position + shift + level - 1e-9).T.ravel())
    stop = where.reshape(flat.shape[1], n).T - n * np.arange(flat.shape[1])
    length = np.where(stop < n, np.take_along_axis(flat, np.minimum(stop, n - 1), axis=0) - flat, np.inf)
    first = length.argmin(axis=0)[None]
    reached = np.isfinite(np.take_along_axis(length, first, axis=0)[0])
    last = np.take_along_axis(stop, first, axis=0).clip(max=n - 1)
    lower = np.where(reached, np.take_along_axis(flat, first, axis=0)[0], flat[0])
    upper = np.where(reached, np.take_along_axis(flat, last, axis=0)[0], flat[-1])
    return np.stack([lower, upper]).reshape(2, *values.shape[1:])


def coverage(
    draws: Any, truth: Any, level: float = 0.9, kind: Kind = "equal-tailed", weights: Any = None
) -> np.ndarray:
    """Return the fraction of pixels whose interval holds the truth, ``(case,)``."""
    found = read_draws(draws, weights)
    target = ordered(read_truth(truth, found))
    lower, upper = interval(draws, level, kind, weights)
    inside = (target >= lower) & (target <= upper)
    return inside.reshape(len(inside), -1).mean(1)


def width(draws: Any, level: float = 0.9, kind: Kind = "equal-tailed", weights: Any = None) -> np.ndarray:
    """Return the mean width of the intervals over pixels, ``(case,)``, in image units."""
    lower, upper = interval(draws, level, kind, weights)
    return (upper - lower).reshape(len(lower), -1).mean(1)


def interval_score(draws: Any, truth: Any, level: float = 0.9, weights: Any = None) -> np.ndarray:
    """Return ``(u - l) + (2 / a) (l - y)_+ + (2 / a) (y - u)_+`` with ``a = 1 - level``; smaller is better.

    A proper score of the equal-tailed interval: width, plus a penalty for a truth outside.

    Args:
        draws: ``(case, draw, ...)`` or a `Posterior`.
        truth: ``(case, ...)``.
        level: Between 0 and 1.
        weights: ``(case, draw)``, where draws are weighted.

    Returns:
        ``(case, *image)``, in image units.

    Reference: Gneiting and Raftery, "Strictly proper scoring rules, prediction, and estimation", JASA 102 (2007).
    """
    target = ordered(read_truth(truth, read_draws(draws, weights)))
    lower, upper = interval(draws, level, weights=weights)
    outside = np.maximum(lower - target, 0) + np.maximum(target - upper, 0)
    return upper - lower + 2 / (1 - level) * outside


def pit(draws: Any, truth: Any, weights: Any = None, seed: int = 0) -> np.ndarray:
    """Return the randomised probability integral transform of the truth, ``(case, *image)``, in (0, 1).

    ``(n W(x < y) + U (n W(x = y) + 1)) / (n + 1)`` with ``U`` uniform, ``W`` the weight of the draws below the
    truth and equal to it, and ``n`` the effective number of draws. For draws of equal weight that are exact it is
    exactly uniform, ties and discrete values included.

    Args:
        draws: ``(case, draw, ...)`` or a `Posterior`.
        truth: ``(case, ...)``.
        weights: ``(case, draw)``, where draws are weighted; then uniform for many effective draws.
        seed: Of the randomisation.
    """
    found = read_draws(draws, weights)
    target = ordered(read_truth(truth, found))
    out = []
    for i, (x, w) in enumerate(found):
        n, values = effective_size(w), ordered(x)
        below, equal = (np.tensordot(w, at, axes=1) for at in (values < target[i], values == target[i]))
        u = np.random.default_rng([seed, i, 0x917]).random(target[i].shape)
        out.append((n * below + u * (n * equal + 1)) / (n + 1))
    return np.stack(out)


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise InvdiffError(f"An interval needs a level between 0 and 1, got {level!r}.")
