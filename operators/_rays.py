"""Straight rays through a regular grid by Joseph's method, and their plain torch implementation.

A ray is stepped along the axis on which its direction is largest, counted in grid cells. At step ``r`` it passes
the other axes at the index ``p + q r``, where the image is interpolated linearly (bilinearly in volumes); the sum
over steps is multiplied by the length of one step. Outside the grid the image is zero.

Reference: Joseph, "An improved algorithm for reprojecting rays through pixel images", IEEE TMI 1(3), 1982.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

#: Weights that the torch implementation holds at once.
_ENTRIES = 1 << 22


@dataclass(frozen=True)
class Grid:
    """A regular grid whose centre is the origin of coordinates.

    Args:
        sizes: Number of cells per axis, in the order of the array: ``(y, x)`` or ``(z, y, x)``.
        spacing: Distance between neighbours per axis.
    """

    sizes: tuple[int, ...]
    spacing: tuple[float, ...]

    @property
    def strides(self) -> tuple[int, ...]:
        """Distance in memory between neighbours per axis, in elements."""
        return tuple(math.prod(self.sizes[a + 1 :]) for a in range(len(self.sizes)))

    @property
    def extent(self) -> tuple[float, ...]:
        """Length of the grid per axis."""
        return tuple(n * h for n, h in zip(self.sizes, self.spacing))

    def coordinates(self, axis: int) -> np.ndarray:
        """Return the centres of the cells along one axis."""
        return (np.arange(self.sizes[axis]) - (self.sizes[axis] - 1) / 2) * self.spacing[axis]


@dataclass(frozen=True)
class Rays:
    """``R`` rays in steps of a grid of ``d`` axes.

    Args:
        axis: Axis that each ray is stepped along, ``(R,)``.
        length: Length of one step, ``(R,)``.
        p: Index on the other axes, in their order, at step 0, ``(R, d - 1)``.
        q: Change of that index per step, at most 1 in magnitude, ``(R, d - 1)``.
    """

    axis: np.ndarray
    length: np.ndarray
    p: np.ndarray
    q: np.ndarray

    def __len__(self) -> int:
        return len(self.axis)


@dataclass(frozen=True)
class Cameras:
    """Where a point falls on the detector, in each of ``V`` views.

    A row ``c`` of coefficients stands for ``c(i) = c[0] i[0] + ... + c[d - 1] i[d - 1] + c[d]``; ``i`` is the
    index of the point, with a fraction. The point falls on the detector ``centre[1] + across(i) / depth(i)``, or
    ``centre[1] + per_radian atan(across(i) / depth(i))`` on an arc, of the row ``centre[0] + rise(i) / depth(i)``.
    Where the depth is not positive, nothing is said.

    Args:
        across: Coefficients ``(V, d + 1)``, as all that follow.
        depth: Distance from the source along the central ray, or 1 for parallel rays.
        rise: Of a panel; None for a single row.
        columns: Detectors per row.
        centre: Row and column that the central ray falls on.
        per_radian: Detectors per radian on an arc, 0 on a line or a panel.
    """

    across: np.ndarray
    depth: np.ndarray
    rise: np.ndarray | None
    columns: int
    centre: tuple[float, float]
    per_radian: float = 0.0


def affine(grid: Grid, slopes: list[np.ndarray | float], constant: np.ndarray | float) -> np.ndarray:
    """Return the coefficients of ``sum_a slopes[a] X_a + constant`` for coordinates ``X``, ``(V, d + 1)``."""
    columns = [np.asarray(slope, dtype=float) * h for slope, h in zip(slopes, grid.spacing)]
    offset = sum(column * (n - 1) / 2 for column, n in zip(columns, grid.sizes))
    return np.stack(np.broadcast_arrays(*columns, constant - offset), -1)


#: Gives the rays of the views from ``start`` to ``stop``, in the order of the data.
TraceViews = Callable[[int, int], Rays]


def others(axis: int, dims: int) -> tuple[int, ...]:
    """Return the axes that rays stepped along ``axis`` are interpolated on."""
    return tuple(a for a in range(dims) if a != axis)


def trace(grid: Grid, points: np.ndarray, directions: np.ndarray) -> Rays:
    """Return the rays through ``points`` ``(R, d)`` along ``directions`` ``(R, d)``, in the order of the axes."""
    dims = len(grid.sizes)
    h = np.asarray(grid.spacing)
    half = (np.asarray(grid.sizes) - 1) / 2
    axis = np.argmax(np.abs(directions) / h, axis=1)
    length = np.empty(len(axis))
    p, q = np.empty((len(axis), dims - 1)), np.empty((len(axis), dims - 1))
    for a in range(dims):
        mine = axis == a
        d, point, rest = directions[mine], points[mine], list(others(a, dims))
        slope = d[:, rest] / d[:, a, None]
        length[mine] = h[a] * np.linalg.norm(d, axis=1) / np.abs(d[:, a])
        q[mine] = slope * h[a] / h[rest]
        p[mine] = (point[:, rest] - slope * (point[:, a, None] + half[a] * h[a])) / h[rest] + half[rest]
    return Rays(axis, length, p, q)


def bounds(rays: Rays, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Return the first step of each ray that meets the grid, and one past the last, ``(R,)`` each."""
    dims = len(grid.sizes)
    sizes = np.asarray(grid.sizes)
    low, high = np.zeros(len(rays)), sizes[rays.axis].astype(float)
    transverse = np.asarray([others(a, dims) for a in range(dims)])
    for k in range(dims - 1):
        p, q, n = rays.p[:, k], rays.q[:, k], sizes[transverse[rays.axis, k]]
        with np.errstate(divide="ignore", invalid="ignore"):
            ends = np.sort(np.stack([(-1 - p) / q, (n - p) / q]), axis=0)
        flat, inside = np.abs(q) < 1e-14, (p > -1) & (p < n)
        first = np.where(flat, np.where(inside, -np.inf, np.inf), np.floor(ends[0]))
        last = np.where(flat, np.where(inside, np.inf, -np.inf), np.ceil(ends[1]) + 1)
        low, high = np.maximum(low, first), np.minimum(high, last)
    empty = ~(low < high)
    return np.where(empty, 0, low).astype(np.int64), np.where(empty, 0, high).astype(np.int64)


def entries(rays: Rays, grid: Grid, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return which elements of the image each ray meets, and with what weight.

    Returns:
        Positions in the flattened image and weights, both ``(R, steps, 2^(d - 1))``; entries outside the grid
        have weight 0 and position 0.
    """
    dims = len(grid.sizes)
    sizes, strides = np.asarray(grid.sizes), np.asarray(grid.strides)
    transverse = np.asarray([others(a, dims) for a in range(dims)])[rays.axis]

    def column(values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(device)[:, None]

    low, high = bounds(rays, grid)
    first = int(low.min(initial=int(sizes.max())))
    steps = torch.arange(first, max(int(high.max(initial=0)), first + 1), device=device)[None]
    inside = (steps >= column(low)) & (steps < column(high))
    base = steps * column(strides[rays.axis])
    corners = []
    for k in range(dims - 1):
        t = column(rays.p[:, k]) + column(rays.q[:, k]) * steps
        j = t.floor()
        f, j = t - j, j.long()
        n, stride = column(sizes[transverse[:, k]]), column(strides[transverse[:, k]])
        near = (j * stride, 1 - f, (j >= 0) & (j < n))
        corners.append((near, ((j + 1) * stride, f, (j >= -1) & (j < n - 1))))
    positions, weights = [], []
    for corner in itertools.product(*corners):
        where, weight, hit = base, column(rays.length), inside
        for shift, factor, ok in corner:
            where, weight, hit = where + shift, weight * factor, hit & ok
        positions.append(torch.where(hit, where, 0))
        weights.append(torch.where(hit, weight, 0))
    return torch.stack(positions, -1), torch.stack(weights, -1).to(dtype)


def blocks(views: int, bins: int, per_ray: int, limit: int) -> Iterator[tuple[int, int]]:
    """Yield ranges of views whose rays, at ``per_ray`` numbers each, stay below ``limit`` where possible."""
    step = max(1, limit // max(1, bins * per_ray))
    for start in range(0, views, step):
        yield start, min(views, start + step)


def _reference_blocks(grid: Grid, views: int, bins: int) -> Iterator[tuple[int, int]]:
    return blocks(views, bins, max(grid.sizes) << (len(grid.sizes) - 1), _ENTRIES)


def project(x: Tensor, grid: Grid, rays_of: TraceViews, views: int, bins: int) -> Tensor:
    """Sum images along rays: ``(B, pixels) -> (B, views * bins)``, the definition that faster paths must equal."""
    out = x.new_zeros(len(x), views * bins)
    for start, stop in _reference_blocks(grid, views, bins):
        where, weights = entries(rays_of(start, stop), grid, x.dtype, x.device)
        for row, image in zip(out, x):
            row[start * bins : stop * bins] = (image[where] * weights).sum((1, 2))
    return out


def back_project(y: Tensor, grid: Grid, rays_of: TraceViews, views: int, bins: int) -> Tensor:
    """Return the transpose of :func:`project`: ``(B, views * bins) -> (B, pixels)``."""
    out = y.new_zeros(len(y), math.prod(grid.sizes))
    for start, stop in _reference_blocks(grid, views, bins):
        where, weights = entries(rays_of(start, stop), grid, y.dtype, y.device)
        for image, row in zip(out, y):
            smeared = weights * row[start * bins : stop * bins, None, None]
            image.index_add_(0, where.flatten(), smeared.flatten())
    return out
