"""Compiled loops over rays, for ray transforms too large for a table. Imported only where numba is there.

Weights are computed on the fly, in the same way in both directions, so that the adjoint is exact. Forward, rays
are spread over threads. Backward, all rays of one stepping axis are spread over slabs of that axis: every thread
writes to its own part of the image, and each element sums its rays in the same order for any number of threads.

The loops let go of Python's lock and run in plain threads: numba's own parallel loops would change the number of
threads that torch uses.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias

import numpy as np
import torch
from numba import njit
from torch import Tensor

from invdiff.operators._rays import Grid, Rays, TraceViews, blocks, bounds, others

Array: TypeAlias = np.ndarray

#: Rays whose steps are held at once.
_RAYS = 1 << 18


@njit(nogil=True, cache=True)
def _forward_2d(
    x: Array,
    out: Array,
    offset: int,
    which: Array,
    low: Array,
    high: Array,
    length: Array,
    p: Array,
    q: Array,
    n: int,
    step: int,
    stride: int,
) -> None:
    for i in range(which.size):
        k = which[i]
        p0, q0 = p[k, 0], q[k, 0]
        for b in range(x.shape[0]):
            total = 0.0
            for r in range(low[k], high[k]):
                t = p0 + q0 * r
                j = math.floor(t)
                f = t - j
                here = r * step + j * stride
                if 0 <= j < n:
                    total += (1 - f) * x[b, here]
                if -1 <= j < n - 1:
                    total += f * x[b, here + stride]
            out[b, offset + k] = total * length[k]


@njit(nogil=True, cache=True)
def _backward_2d(
    y: Array,
    out: Array,
    offset: int,
    which: Array,
    low: Array,
    high: Array,
    length: Array,
    p: Array,
    q: Array,
    n: int,
    step: int,
    stride: int,
    first: int,
    last: int,
) -> None:
    for b in range(y.shape[0]):
        for i in range(which.size):
            k = which[i]
            p0, q0, value = p[k, 0], q[k, 0], y[b, offset + k] * length[k]
            for r in range(max(low[k], first), min(high[k], last)):
                t = p0 + q0 * r
                j = math.floor(t)
                f = t - j
                here = r * step + j * stride
                if 0 <= j < n:
                    out[b, here] += (1 - f) * value
                if -1 <= j < n - 1:
                    out[b, here + stride] += f * value


@njit(nogil=True, cache=True)
def _forward_3d(
    x: Array,
    out: Array,
    offset: int,
    which: Array,
    low: Array,
    high: Array,
    length: Array,
    p: Array,
    q: Array,
    n: int,
    m: int,
    step: int,
    stride: int,
    pitch: int,
) -> None:
    for i in range(which.size):
        k = which[i]
        p0, q0, p1, q1 = p[k, 0], q[k, 0], p[k, 1], q[k, 1]
        for b in range(x.shape[0]):
            total = 0.0
            for r in range(low[k], high[k]):
                t, u = p0 + q0 * r, p1 + q1 * r
                j, l = math.floor(t), math.floor(u)
                f, g = t - j, u - l
                here = r * step + j * stride + l * pitch
                near, far = 0 <= l < m, -1 <= l < m - 1
                if 0 <= j < n:
                    if near:
                        total += (1 - f) * (1 - g) * x[b, here]
                    if far:
                        total += (1 - f) * g * x[b, here + pitch]
                if -1 <= j < n - 1:
                    if near:
                        total += f * (1 - g) * x[b, here + stride]
                    if far:
                        total += f * g * x[b, here + stride + pitch]
            out[b, offset + k] = total * length[k]


@njit(nogil=True, cache=True)
def _backward_3d(
    y: Array,
    out: Array,
    offset: int,
    which: Array,
    low: Array,
    high: Array,
    length: Array,
    p: Array,
    q: Array,
    n: int,
    m: int,
    step: int,
    stride: int,
    pitch: int,
    first: int,
    last: int,
) -> None:
    for b in range(y.shape[0]):
        for i in range(which.size):
            k = which[i]
            p0, q0, p1, q1 = p[k, 0], q[k, 0], p[k, 1], q[k, 1]
            value = y[b, offset + k] * length[k]
            for r in range(max(low[k], first), min(high[k], last)):
                t, u = p0 + q0 * r, p1 + q1 * r
                j, l = math.floor(t), math.floor(u)
                f, g = t - j, u - l
                here = r * step + j * stride + l * pitch
                near, far = 0 <= l < m, -1 <= l < m - 1
                if 0 <= j < n:
                    if near:
                        out[b, here] += (1 - f) * (1 - g) * value
                    if far:
                        out[b, here + pitch] += (1 - f) * g * value
                if -1 <= j < n - 1:
                    if near:
                        out[b, here + stride] += f * (1 - g) * value
                    if far:
                        out[b, here + stride + pitch] += f * g * value


def project(x: Tensor, grid: Grid, rays_of: TraceViews, views: int, bins: int) -> Tensor:
    """Sum images along rays, ``(B, pixels) -> (B, views * bins)``, on the CPU."""
    source = x.detach().contiguous().numpy()
    out = np.zeros((len(source), views * bins), source.dtype)
    kernel: Any = _forward_2d if len(grid.sizes) == 2 else _forward_3d
    with _Threads() as threads:
        for start, rays, part, low, high, geometry in _groups(grid, rays_of, views, bins):
            numbers = (low, high, rays.length, rays.p, rays.q, *geometry)
            pieces = np.array_split(part, threads.count)
            threads.run(kernel, [(source, out, start * bins, piece, *numbers) for piece in pieces])
    return torch.from_numpy(out)


def back_project(y: Tensor, grid: Grid, rays_of: TraceViews, views: int, bins: int) -> Tensor:
    """Return the transpose of :func:`project`, ``(B, views * bins) -> (B, pixels)``, on the CPU."""
    source = y.detach().contiguous().numpy()
    out = np.zeros((len(source), math.prod(grid.sizes)), source.dtype)
    kernel: Any = _backward_2d if len(grid.sizes) == 2 else _backward_3d
    with _Threads() as threads:
        for start, rays, part, low, high, geometry in _groups(grid, rays_of, views, bins):
            numbers = (start * bins, part, low, high, rays.length, rays.p, rays.q, *geometry)
            slabs = np.linspace(0, int(high.max()), threads.count + 1).astype(np.int64)
            threads.run(kernel, [(source, out, *numbers, *slab) for slab in itertools.pairwise(slabs)])
    return torch.from_numpy(out)


def _groups(
    grid: Grid, rays_of: TraceViews, views: int, bins: int
) -> Iterator[tuple[int, Rays, np.ndarray, np.ndarray, np.ndarray, tuple[int, ...]]]:
    """Yield first view, rays, those stepped along one axis, their first and last steps, sizes and strides."""
    dims, strides = len(grid.sizes), grid.strides
    for start, stop in blocks(views, bins, 1, _RAYS):
        rays = rays_of(start, stop)
        low, high = bounds(rays, grid)
        for axis in range(dims):
            part = np.flatnonzero((rays.axis == axis) & (low < high))
            if len(part):
                rest = others(axis, dims)
                sizes = tuple(grid.sizes[a] for a in rest)
                yield start, rays, part, low, high, (*sizes, strides[axis], *(strides[a] for a in rest))


class _Threads:
    """As many threads as torch uses; with one, everything runs in the caller's."""

    def __init__(self) -> None:
        self.count = torch.get_num_threads()

    def __enter__(self) -> _Threads:
        self._pool = ThreadPoolExecutor(self.count) if self.count > 1 else None
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown()

    def run(self, work: Callable[..., None], pieces: list[tuple[Any, ...]]) -> None:
        """Call ``work`` with every tuple of arguments, and raise what any call raised."""
        if self._pool is None:
            for piece in pieces:
                work(*piece)
        else:
            list(self._pool.map(lambda piece: work(*piece), pieces))
