"""Summaries of draws that do not fit into memory: one pass for moments and exceedance, blocks for quantiles."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from invdiff.errors import InvdiffError
from invdiff.summaries import Moments
from invdiff.summaries import quantiles as _quantiles
from invdiff.uq.draws import to_numpy


@dataclass(frozen=True)
class Streamed:
    """What one pass over draws leaves.

    Attributes:
        mean: ``(*image)``; complex for complex images.
        std: Standard deviation (divisor n - 1 for equal weights), ``(*image)``; ``sqrt(var(re) + var(im))`` for
            complex images.
        exceedance: Probability that a pixel (its magnitude, where complex) exceeds each threshold, ``(t,
            *image)``.
        count: Draws that were used.
        n_excluded: Draws left out, because they are not finite or have no weight.
    """

    mean: np.ndarray
    std: np.ndarray
    exceedance: np.ndarray
    count: int
    n_excluded: int


def stream(images: Iterable[Any], weights: Iterable[float] | None = None, above: Sequence[float] = ()) -> Streamed:
    """Summarise draws that come one at a time, in memory of a few images (Welford's recursion, float64).

    Args:
        images: Draws ``(*image)``, e.g. a generator that reads a file.
        weights: One per draw, where draws are weighted.
        above: Thresholds, in image units.

    Raises:
        InvdiffError: If fewer than two draws are usable, shapes differ, or the weights sum to 0.
    """
    moments: Moments | None = None
    over = np.zeros(0)
    shape: tuple[int, ...] = ()
    levels: np.ndarray = np.zeros(0)
    excluded, given = 0, None if weights is None else iter(weights)
    for image in images:
        x, w = to_numpy(image), 1.0 if given is None else _next(given)
        if moments is None:
            moments, shape = Moments(x.shape, np.iscomplexobj(x)), x.shape
            over = np.zeros((len(above), *shape))
            levels = np.asarray(above, float).reshape(-1, *[1] * x.ndim)
        if x.shape != shape:
            raise InvdiffError(f"A draw has shape {x.shape} and the first one {shape}; give draws of one image.")
        if not w > 0 or not np.isfinite(x).all():
            excluded += 1
            continue
        moments.add(x, w)
        over += w * ((np.abs(x) if moments.is_complex else x) > levels)
    if moments is None or moments.count < 2:
        count = 0 if moments is None else moments.count
        raise InvdiffError(
            f"A spread needs at least 2 usable draws, and {count} came ({excluded} not finite or without weight)."
        )
    found = moments.result()
    if moments.is_complex:
        mean, std = found["mean_re"] + 1j * found["mean_im"], found["std_complex"]
    else:
        mean, std = found["mean"], found["std"]
    return Streamed(mean, std, over / moments.total, moments.count, excluded)


def _next(weights: Any) -> float:
    w = next(weights, None)
    if w is None:
        raise InvdiffError("There are fewer weights than draws; give one for each.")
    if not np.isfinite(w) or w < 0:
        raise InvdiffError(f"The weights of draws must be finite and not negative, got {w}.")
    return float(w)


def quantiles(stored: Any, probs: Sequence[float], weights: Any = None) -> np.ndarray:
    """Return pixelwise quantiles, reading a block of image rows of all draws at a time.

    Order statistic ``k`` of ``n`` stands at probability ``k / (n + 1)``; of magnitudes, for complex images.

    Args:
        stored: ``(draw, *image)``, anything that is sliced like an array: a numpy memory map, an HDF5 or Zarr
            dataset, a labelled array of an open file.
        probs: Between 0 and 1.
        weights: ``(draw,)``, where draws are weighted.

    Returns:
        ``(len(probs), *image)``, float64. Draws that are not finite are left out.
    """
    if any(not 0 <= p <= 1 for p in probs):
        raise InvdiffError(f"Quantiles need probabilities between 0 and 1, got {list(probs)}.")
    source = _Stored(stored)
    w = np.ones(source.n_draws) if weights is None else to_numpy(weights).astype(float)
    if w.shape != (source.n_draws,) or (w < 0).any() or not np.isfinite(w).all():
        raise InvdiffError(
            f"The weights have shape {w.shape}, expected {source.n_draws} finite ones of at least 0."
        )
    w = np.where([np.isfinite(source.get(0, s)).all() for s in range(source.n_draws)], w, 0.0)
    if (w > 0).sum() < 2:
        raise InvdiffError(f"Quantiles need at least 2 usable draws, and there are {int((w > 0).sum())}.")
    return _quantiles(source, 0, source.shape, w, probs)


class _Stored:
    """An array-like ``(draw, *image)`` as the source of one case."""

    def __init__(self, stored: Any) -> None:
        self.stored, self.n_cases, self.n_draws = stored, 1, int(stored.shape[0])
        self.shape = tuple(int(n) for n in stored.shape[1:])
        if not self.shape:
            raise InvdiffError(f"Stored draws have shape (draw, *image), got {tuple(stored.shape)}.")

    def get(self, case: int, draw: int) -> np.ndarray:
        return to_numpy(self.stored[draw])

    def block(self, case: int, start: int, stop: int) -> np.ndarray:
        rows: tuple[Any, ...] = (..., slice(start, stop), slice(None)) if len(self.shape) > 1 else (...,)
        return to_numpy(self.stored[rows])
