"""Sizes and intensities of labelled regions, computed for every draw and so with their posterior."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from invdiff.errors import InvdiffError
from invdiff.summaries import quantile
from invdiff.uq.draws import ordered, read_draws, to_numpy

if TYPE_CHECKING:
    import xarray as xr

#: What is measured of a region.
QUANTITIES = ("volume", "mean", "diameter")


@dataclass(frozen=True)
class Regions:
    """Posteriors of region statistics.

    Attributes:
        values: By quantity (``volume``, ``mean``, ``diameter``), ``(case, draw, region)``; NaN for excluded draws.
        weights: ``(case, draw)``, 0 for excluded draws; they sum to 1.
        labels: Label of every region.
        names: What it is called.
    """

    values: Mapping[str, np.ndarray]
    weights: np.ndarray
    labels: tuple[int, ...]
    names: tuple[str, ...]

    def mean(self, quantity: str) -> np.ndarray:
        """Return the posterior mean, ``(case, region)``."""
        return np.stack([w @ x for x, w in self._cases(quantity)])

    def std(self, quantity: str) -> np.ndarray:
        """Return the posterior standard deviation, ``(case, region)``."""
        out = [np.sqrt(w @ (x - w @ x) ** 2 / (1 - (w**2).sum())) for x, w in self._cases(quantity)]
        return np.stack(out)

    def interval(self, quantity: str, level: float = 0.9) -> tuple[np.ndarray, np.ndarray]:
        """Return the ends of the equal-tailed interval, ``(case, region)`` each."""
        if not 0 < level < 1:
            raise InvdiffError(f"An interval needs a level between 0 and 1, got {level!r}.")
        probs = [(1 - level) / 2, (1 + level) / 2]
        lower, upper = np.stack([quantile(x, probs, w) for x, w in self._cases(quantity)], axis=1)
        return lower, upper

    def to_xarray(self) -> xr.Dataset:
        """Return all values with labels."""
        import xarray as xr

        dims = ("case", "draw", "region")
        data = {k: (dims, v) for k, v in self.values.items()}
        coords = {"region": list(self.names), "label": ("region", list(self.labels))}
        return xr.Dataset({**data, "weight": (dims[:2], self.weights)}, coords=coords)

    def __repr__(self) -> str:
        from invdiff import tables

        rows = []
        for q in self.values:
            mean, (low, high) = self.mean(q), self.interval(q)
            for c in range(len(mean)):
                for r, name in enumerate(self.names):
                    cells = (f"{v:.4g}" for v in (mean[c, r], low[c, r], high[c, r]))
                    rows.append([q, name, str(c), *cells])
        return tables.text(["quantity", "region", "case", "mean", "5 %", "95 %"], rows)

    def _cases(self, quantity: str) -> list[tuple[np.ndarray, np.ndarray]]:
        if quantity not in self.values:
            raise InvdiffError(f"Regions have {', '.join(self.values)}, not {quantity!r}.")
        return [(x[w > 0], w[w > 0]) for x, w in zip(self.values[quantity], self.weights)]


def region_statistics(
    draws: Any,
    labels: Any,
    above: float | None = None,
    spacing: Sequence[float] | None = None,
    names: Mapping[int, str] | None = None,
    weights: Any = None,
) -> Regions:
    """Measure labelled regions on every draw; intervals of the numbers are then those of the posterior.

    ``mean``: mean intensity. ``volume``: number of pixels above the threshold (of all, without one) times the
    volume of a pixel. ``diameter``: of the disc, ball or interval of that volume, ``2 sqrt(V / pi)`` in two
    dimensions and ``(6 V / pi)^(1/3)`` in three. Complex images are measured by their magnitude.

    Args:
        draws: ``(case, draw, ..., *pixels)`` or a `Posterior`; see `read_draws`.
        labels: Integers ``(*pixels)`` over the last axes of the images, 0 for what belongs to no region; leading
            axes of an image (channels) are averaged.
        above: Threshold, in image units; needed for volume and diameter.
        spacing: Size of a pixel along each axis of ``labels``; 1 where left out.
        names: What labels are called.
        weights: ``(case, draw)``, where draws are weighted.
    """
    found = read_draws(draws, weights)
    where = to_numpy(labels)
    present, members = _membership(where, found.shape)
    if spacing is not None and (len(spacing) != where.ndim or not all(s > 0 for s in spacing)):
        raise InvdiffError(f"The spacing needs {where.ndim} positive numbers, one per axis of the labels.")
    voxel = math.prod(spacing) if spacing is not None else 1.0
    cases: list[dict[str, np.ndarray]] = []
    for x, _ in found:
        one = {"mean": region_means(ordered(x), where)}
        if above is not None:
            inside = ordered(x).reshape(len(x), -1, where.size).mean(1) > above
            volume = voxel * (inside @ members)
            one = {"volume": volume, **one, "diameter": _diameter(volume, where.ndim)}
        cases.append(one)
    most = max(len(w) for _, w in found)
    values = {k: np.stack([_pad(c[k], most, np.nan) for c in cases]) for k in cases[0]}
    padded = np.stack([_pad(w, most, 0.0) for _, w in found])
    known = names or {}
    return Regions(values, padded, present, tuple(known.get(k, str(k)) for k in present))


def region_means(x: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the mean over every labelled region, ``(n, *image) -> (n, region)``, in the order of the labels."""
    _, members = _membership(labels, x.shape[1:])
    return np.asarray(x.reshape(len(x), -1, labels.size).mean(1) @ members / members.sum(0))


def _membership(where: np.ndarray, shape: tuple[int, ...]) -> tuple[tuple[int, ...], np.ndarray]:
    """Return the labels that occur, and which pixels have which, ``(pixel, region)``."""
    if where.dtype.kind not in "iub" or not where.ndim or where.shape != shape[-where.ndim :]:
        raise InvdiffError(
            f"Labels are whole numbers over the pixels of the images {shape}, got {where.dtype} of shape "
            f"{where.shape}."
        )
    present = tuple(int(k) for k in np.unique(where) if k != 0)
    if not present:
        raise InvdiffError("The label map is 0 everywhere, so there is no region to measure.")
    return present, np.stack([where.ravel() == k for k in present], axis=1).astype(float)


def _diameter(volume: np.ndarray, axes: int) -> np.ndarray:
    unit_ball = math.pi ** (axes / 2) / math.gamma(axes / 2 + 1)
    return np.asarray(2 * (volume / unit_ball) ** (1 / axes))


def _pad(values: np.ndarray, length: int, fill: float) -> np.ndarray:
    out = np.full((length, *values.shape[1:]), fill)
    out[: len(values)] = values
    return out
