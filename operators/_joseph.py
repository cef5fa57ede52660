"""Ray transforms by numba, without a table: the rays are walked again in every call.

The weights are those of :mod:`invdiff.operators._rays`. A batch lies innermost in memory, as vectors of up to 64
bytes: one walk serves all of it, and a step costs two aligned loads per corner whatever the number of rows. Images
have a border of zeros, so that no corner asks whether it is inside. Threads never share what they write: forward
each takes its own rays, backward its own slab of the image, so the results repeat to the last bit. Plain threads
instead of numba's parallel loops, because those would change the number of threads that torch uses.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numba import njit
from torch import Tensor

from invdiff.operators._compiled import thread_count
from invdiff.operators._lanes import fma, load, store, zeros
from invdiff.operators._rays import Grid, TraceViews, blocks, bounds, others

Array: TypeAlias = np.ndarray
#: First datum; low, high, length, p and q of a `Part`; steps along the axis; sizes of the others; strides of both.
Walk: TypeAlias = tuple[int, Array, Array, Array, Array, Array, int, Array, int, Array]

#: Rays that are traced at once.
_RAYS = 1 << 18
#: Bytes of a vector: a cache line, and the widest register there is.
_LINE = 64


@dataclass(frozen=True)
class Part:
    """Rays stepped along one axis.

    Args:
        first: Place of the first ray of the numbers below in the data.
        which: Which of them are stepped along this axis and meet the image, ``(K,)``.
        low: First step that meets the image, ``(R,)``.
        high: One past the last.
        length: Length of one step, ``(R,)``.
        p: Index on the other axes at step 0, ``(R, d - 1)``.
        q: Change of that index per step, ``(R, d - 1)``.
        axis: The axis.
    """

    first: int
    which: Array
    low: Array
    high: Array
    length: Array
    p: Array
    q: Array
    axis: int


class HostRays:
    """All rays of a scan, and both directions on the CPU.

    Args:
        grid: The image.
        data: Number of rays.
        parts: The rays; a list where they are kept, an iterator where they serve one call.
    """

    def __init__(self, grid: Grid, data: int, parts: Iterable[Part]) -> None:
        self.grid, self.data, self.parts = grid, data, parts

    @property
    def nbytes(self) -> int:
        """Bytes of the rays."""
        arrays = [(r.which, r.low, r.high, r.length, r.p, r.q) for r in self.parts]
        return sum({id(a): a.nbytes for a in itertools.chain(*arrays)}.values())

    def project(self, x: Tensor) -> Tensor:
        """Sum images along rays, ``(B, pixels) -> (B, data)``."""
        lanes = _lanes(x)
        forward, _ = _kernels(lanes, len(self.grid.sizes))
        sources = [self._bordered(x[i : i + lanes], lanes) for i in range(0, len(x), lanes)]
        sums = x.new_zeros(len(sources), self.data, lanes)
        with self._threads(len(sources)) as threads:
            for part in self.parts:
                pieces = np.array_split(part.which, threads.count)
                walk = self._walk(part, sums)
                for source, out in zip(sources, sums):
                    threads.run(forward, [(_flat(source), _flat(out), piece, walk) for piece in pieces])
        return sums.mT.reshape(-1, self.data)[: len(x)]

    def back_project(self, y: Tensor) -> Tensor:
        """Return the transpose of ``project``, ``(B, data) -> (B, pixels)``."""
        lanes = _lanes(y)
        _, backward = _kernels(lanes, len(self.grid.sizes))
        chunks = range(0, len(y), lanes)
        sources = y.new_zeros(len(chunks), self.data, lanes)
        images = [self._bordered(y.new_zeros(0, math.prod(self.grid.sizes)), lanes) for _ in chunks]
        for i, source in zip(chunks, sources):
            source[:, : len(y[i : i + lanes])] = y[i : i + lanes].mT
        with self._threads(len(sources)) as threads:
            for part in self.parts:
                slabs = np.linspace(0, int(part.high.max()), threads.count + 1).astype(np.int64)
                walk = self._walk(part, sources)
                for source, image in zip(sources, images):
                    work = (_flat(source), _flat(image), part.which, walk)
                    threads.run(backward, [(*work, *slab) for slab in itertools.pairwise(slabs)])
        inner = (*(slice(1, n + 1) for n in self.grid.sizes),)
        return torch.cat([image[inner].reshape(-1, lanes).mT for image in images])[: len(y)]

    def _threads(self, chunks: int) -> _Threads:
        return _Threads(thread_count(chunks * self.data * max(self.grid.sizes)))

    def _bordered(self, x: Tensor, lanes: int) -> Tensor:
        """Return images with zeros around them and the batch innermost, ``(*sizes + 2, lanes)``."""
        sizes = self.grid.sizes
        out = x.new_zeros(*(n + 2 for n in sizes[:-1]), self._row(lanes, x.element_size()), lanes)
        inner = (*(slice(1, n + 1) for n in sizes), slice(len(x)))
        out[inner] = x.reshape(len(x), *sizes).movedim(0, -1)
        return out

    def _row(self, lanes: int, itemsize: int) -> int:
        """Pixels from one row to the next; no multiple of 4 KiB, which would crowd a column into one cache set."""
        row = self.grid.sizes[-1] + 2
        return row + (row * lanes * itemsize % 4096 == 0)

    def _walk(self, part: Part, columns: Tensor) -> Walk:
        """Return a part as the kernels take it, in the precision of the data ``(..., lanes)``."""
        sizes = self.grid.sizes
        row = self._row(columns.shape[-1], columns.element_size())
        strides = np.cumprod([1, row, *(n + 2 for n in sizes[-2:0:-1])])[: len(sizes)][::-1]
        rest = list(others(part.axis, len(sizes)))
        length, walls = part.length.astype(columns.numpy().dtype), np.asarray([sizes[a] for a in rest])
        along, across = int(strides[part.axis]), np.ascontiguousarray(strides[rest])
        return part.first, part.low, part.high, length, part.p, part.q, sizes[part.axis], walls, along, across


def ray_bytes(dims: int) -> int:
    """Bytes that a ray takes in memory."""
    return 8 * (4 + 2 * (dims - 1))


def trace_parts(grid: Grid, rays_of: TraceViews, views: int, bins: int) -> Iterator[Part]:
    """Yield the rays of all views, those stepped along one axis at a time."""
    for start, stop in blocks(views, bins, 1, _RAYS):
        rays = rays_of(start, stop)
        low, high = bounds(rays, grid)
        for axis in range(len(grid.sizes)):
            which = np.flatnonzero((rays.axis == axis) & (low < high))
            if len(which):
                yield Part(start * bins, which, low, high, rays.length, rays.p, rays.q, axis)


def _lanes(x: Tensor) -> int:
    """Return how many rows go together: the batch up to a power of two, at most a line of the cache."""
    return min(1 << max(len(x) - 1, 0).bit_length(), _LINE // x.element_size())


def _flat(x: Tensor) -> Array:
    return x.reshape(-1).numpy()


@njit(nogil=True, cache=True)
def _steps(
    k: int,
    low: int,
    high: int,
    p: Array,
    q: Array,
    walls: Array,
    step: int,
    strides: Array,
    where: Array,
    weights: Array,
) -> int:
    """Fill in the nearer corner of each step and the weights of both sides per axis; return how many steps."""
    for a in range(walls.size):
        start, slope, n = p[k, a] + 1.0, q[k, a], walls[a] + 1.0
        while low < high and not 0 < start + slope * low < n:
            low += 1
        while low < high and not 0 < start + slope * (high - 1) < n:
            high -= 1
    for i in range(high - low):
        where[i] = (low + i + 1) * step
    for a in range(walls.size):
        start, slope, stride = p[k, a] + 1.0, q[k, a], strides[a]
        for i in range(high - low):
            t = start + slope * (low + i)
            j = np.int32(t)
            weights[2 * a, i] = 1.0 - (t - j)
            weights[2 * a + 1, i] = t - j
            where[i] += j * stride
    return max(high - low, 0)


@functools.cache
def _kernels(lanes: int, dims: int) -> tuple[Callable[..., None], Callable[..., None]]:
    """Return the forward and the backward kernel for vectors of so many lanes."""
    return _kernels_2d(lanes) if dims == 2 else _kernels_3d(lanes)


def _kernels_2d(lanes: int) -> tuple[Callable[..., None], Callable[..., None]]:
    @njit(nogil=True, cache=True)
    def forward(x: Array, out: Array, which: Array, walk: Walk) -> None:
        first, low, high, length, p, q, reach, walls, step, strides = walk
        where, w = np.empty(reach, np.int64), np.empty((2, reach), x.dtype)
        stride = strides[0] * lanes
        for i in range(which.size):
            k = which[i]
            count = _steps(k, low[k], high[k], p, q, walls, step, strides, where, w)
            a, b, c, d = zeros(x, lanes), zeros(x, lanes), zeros(x, lanes), zeros(x, lanes)
            even = count // 2 * 2
            for r in range(0, even, 2):  # four sums at once, because each waits for its own last addition
                here, then = where[r] * lanes, where[r + 1] * lanes
                a = fma(a, w[0, r], load(x, here, lanes))
                b = fma(b, w[1, r], load(x, here + stride, lanes))
                c = fma(c, w[0, r + 1], load(x, then, lanes))
                d = fma(d, w[1, r + 1], load(x, then + stride, lanes))
            if even < count:
                here = where[even] * lanes
                a = fma(a, w[0, even], load(x, here, lanes))
                b = fma(b, w[1, even], load(x, here + stride, lanes))
            total = zeros(x, lanes)
            for part in (a, b, c, d):
                total = fma(total, length[k], part)
            store(out, (first + k) * lanes, total)

    @njit(nogil=True, cache=True)
    def backward(y: Array, out: Array, which: Array, walk: Walk, begin: int, end: int) -> None:
        first, low, high, length, p, q, reach, walls, step, strides = walk
        where, w = np.empty(reach, np.int64), np.empty((2, reach), y.dtype)
        stride = strides[0] * lanes
        for i in range(which.size):
            k = which[i]
            count = _steps(k, max(low[k], begin), min(high[k], end), p, q, walls, step, strides, where, w)
            value = fma(zeros(y, lanes), length[k], load(y, (first + k) * lanes, lanes))
            for r in range(count):
                here = where[r] * lanes
                store(out, here, fma(load(out, here, lanes), w[0, r], value))
                here += stride
                store(out, here, fma(load(out, here, lanes), w[1, r], value))

    return forward, backward


def _kernels_3d(lanes: int) -> tuple[Callable[..., None], Callable[..., None]]:
    @njit(nogil=True, cache=True)
    def forward(x: Array, out: Array, which: Array, walk: Walk) -> None:
        first, low, high, length, p, q, reach, walls, step, strides = walk
        where, w = np.empty(reach, np.int64), np.empty((4, reach), x.dtype)
        stride, pitch = strides[0] * lanes, strides[1] * lanes
        for i in range(which.size):
            k = which[i]
            count = _steps(k, low[k], high[k], p, q, walls, step, strides, where, w)
            a, b, c, d = zeros(x, lanes), zeros(x, lanes), zeros(x, lanes), zeros(x, lanes)
            for r in range(count):
                here = where[r] * lanes
                a = fma(a, w[0, r] * w[2, r], load(x, here, lanes))
                b = fma(b, w[1, r] * w[2, r], load(x, here + stride, lanes))
                c = fma(c, w[0, r] * w[3, r], load(x, here + pitch, lanes))
                d = fma(d, w[1, r] * w[3, r], load(x, here + stride + pitch, lanes))
            total = zeros(x, lanes)
            for part in (a, b, c, d):
                total = fma(total, length[k], part)
            store(out, (first + k) * lanes, total)

    @njit(nogil=True, cache=True)
    def backward(y: Array, out: Array, which: Array, walk: Walk, begin: int, end: int) -> None:
        first, low, high, length, p, q, reach, walls, step, strides = walk
        where, w = np.empty(reach, np.int64), np.empty((4, reach), y.dtype)
        stride, pitch = strides[0] * lanes, strides[1] * lanes
        for i in range(which.size):
            k = which[i]
            count = _steps(k, max(low[k], begin), min(high[k], end), p, q, walls, step, strides, where, w)
            value = fma(zeros(y, lanes), length[k], load(y, (first + k) * lanes, lanes))
            for r in range(count):
                for far in range(2):
                    here = where[r] * lanes + far * pitch
                    store(out, here, fma(load(out, here, lanes), w[0, r] * w[2 + far, r], value))
                    here += stride
                    store(out, here, fma(load(out, here, lanes), w[1, r] * w[2 + far, r], value))

    return forward, backward


class _Threads:
    """Some threads; with one, everything runs in the caller's."""

    def __init__(self, count: int) -> None:
        self.count = count

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
