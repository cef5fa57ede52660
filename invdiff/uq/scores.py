"""Scores of draws against the truth: CRPS, energy score, spread against error, diversity.

Scores compare; only `spread_skill` and the functions of `invdiff.uq.intervals` have a value that is right as such.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from invdiff import metrics
from invdiff.errors import InvdiffError
from invdiff.uq.draws import ordered, read_draws, read_truth, vectors


def crps(draws: Any, truth: Any, weights: Any = None) -> np.ndarray:
    """Return the fair continuous ranked probability score, ``(case, *image)``, in image units; smaller is better.

    ``E|X - y| - E|X - X'| / 2`` with ``X``, ``X'`` two different draws (see `invdiff.metrics.crps`); of
    magnitudes, for complex images.

    Args:
        draws: ``(case, draw, ...)`` or a `Posterior`; see `read_draws`.
        truth: ``(case, ...)``.
        weights: ``(case, draw)``, where draws are weighted.
    """
    found = read_draws(draws, weights)
    target = ordered(read_truth(truth, found))
    return np.stack([metrics.crps(ordered(x), y, w) for (x, w), y in zip(found, target)])


def energy_score(draws: Any, truth: Any, weights: Any = None) -> np.ndarray:
    """Return the fair energy score ``E||X - y|| - E||X - X'|| / 2``, ``(case,)``; smaller is better.

    The CRPS of whole images: it sees how pixels vary together. ``X`` and ``X'`` are two different draws.

    Args:
        draws: ``(case, draw, ...)`` or a `Posterior`; complex numbers count as two.
        truth: ``(case, ...)``.
        weights: ``(case, draw)``, where draws are weighted.

    Reference: Gneiting and Raftery, "Strictly proper scoring rules, prediction, and estimation", JASA 102 (2007).
    """
    found = read_draws(draws, weights)
    target = read_truth(truth, found)
    out = []
    for (x, w), y in zip(found, target):
        v, u = _same_kind(x, y)
        to_truth = np.linalg.norm(v - u, axis=1)
        different = 1 - (w**2).sum()
        out.append(w @ to_truth - 0.5 * w @ distances(v) @ w / different)
    return np.array(out)


@dataclass(frozen=True)
class SpreadSkill:
    """Spread of the draws against the error of their mean.

    Attributes:
        spread: Root mean square of the standard deviation over pixels, ``(case,)``.
        error: Root mean square of truth minus mean, ``(case,)``.
        ratio: Spread over error over all cases, corrected for the error of a mean of few draws; 1 for exact draws,
            below 1 for overconfident ones.
        bins: Edges of classes of the pixels' standard deviation, ``(b + 1,)``.
        bin_spread: Root mean square standard deviation within each class, ``(b,)``.
        bin_error: Root mean square error within each class, corrected in the same way. Exact draws lie near the
            diagonal; of few draws the outer classes hold pixels whose spread was estimated too low or high.
    """

    spread: np.ndarray
    error: np.ndarray
    ratio: float
    bins: np.ndarray
    bin_spread: np.ndarray
    bin_error: np.ndarray


def spread_skill(draws: Any, truth: Any, weights: Any = None, bins: int = 10) -> SpreadSkill:
    """Compare the spread of the draws with the error of their mean, overall and by classes of the spread.

    For exact draws ``E (y - mean)^2 = (1 + 1 / n) var``, and ``1 + sum w^2`` in place of ``1 + 1 / n`` for weights
    that sum to 1.

    Args:
        draws: ``(case, draw, ...)`` or a `Posterior`; complex numbers count as two.
        truth: ``(case, ...)``.
        weights: ``(case, draw)``, where draws are weighted.
        bins: Number of classes, equally full.
    """
    found = read_draws(draws, weights)
    target = read_truth(truth, found)
    var, square = [], []
    for (x, w), y in zip(found, target):
        v, u = _same_kind(x, y)
        mean, few = w @ v, (w**2).sum()
        var.append(w @ (v - mean) ** 2 / (1 - few))
        square.append((u[0] - mean) ** 2 / (1 + few))
    variance, error = np.stack(var), np.stack(square)
    edges = np.quantile(np.sqrt(variance), np.linspace(0, 1, bins + 1))
    which = np.clip(np.searchsorted(edges, np.sqrt(variance).ravel(), side="right") - 1, 0, bins - 1)
    count = np.maximum(np.bincount(which, minlength=bins), 1)
    in_bins = [np.sqrt(np.bincount(which, v.ravel(), minlength=bins) / count) for v in (variance, error)]
    # The columns keep the plain error; the ratio and the classes carry the correction.
    plain = np.sqrt((error * np.array([1 + (w**2).sum() for _, w in found])[:, None]).mean(1))
    ratio = float(np.sqrt(variance.mean() / error.mean())) if error.any() else float("inf")
    return SpreadSkill(np.sqrt(variance.mean(1)), plain, ratio, edges, *in_bins)


@dataclass(frozen=True)
class Diversity:
    """How different draws are, per case.

    Attributes:
        duplicates: Draws that repeat an earlier one, ``(case,)``.
        distance: Median distance between two draws, as root mean square per real number, ``(case,)``.
        nearest: Smallest distance between two draws over the median one, ``(case,)``: near 0 where draws are
            nearly repeated.
    """

    duplicates: np.ndarray
    distance: np.ndarray
    nearest: np.ndarray


def diversity(draws: Any, rtol: float = 1e-6) -> Diversity:
    """Count repeated draws and measure distances.

    Args:
        draws: ``(case, draw, ...)`` or a `Posterior`; complex numbers count as two.
        rtol: Two draws nearer than this times the median distance are the same.
    """
    repeated, median, nearest = [], [], []
    for x, _ in read_draws(draws):
        v = vectors(x)
        d = distances(v)
        pairs = d[np.triu_indices(len(d), 1)]
        middle = float(np.median(pairs)) or float(pairs.max())
        same = np.tril(d <= rtol * middle, -1)
        repeated.append(int(same.any(1).sum()))
        median.append(np.median(pairs) / np.sqrt(v.shape[1]))
        nearest.append(pairs.min() / middle)
    return Diversity(np.array(repeated), np.array(median), np.array(nearest))


def distances(v: np.ndarray) -> np.ndarray:
    """Return Euclidean distances between rows, ``(n, n)``; exactly 0 between equal ones."""
    from scipy.spatial.distance import pdist, squareform

    return np.asarray(squareform(pdist(v)))


def _same_kind(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return draws ``(n, D)`` and truth ``(1, D)`` as real vectors."""
    if np.iscomplexobj(y) and not np.iscomplexobj(x):
        raise InvdiffError("The truth is complex and the draws are real; compare like with like.")
    return vectors(x), vectors(y[None].astype(x.dtype))
