"""Sparse tables of ray transforms: all weights in CSR with 32-bit positions, and the explicit transpose."""

from __future__ import annotations

import math
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from invdiff.operators._rays import Grid, TraceViews, blocks, bounds, entries

#: Bytes of tables that are kept for the next operator of the same geometry when nobody uses them any more.
CACHE_BYTES = 2 << 30
_ENTRIES = 1 << 21


class Table:
    """A sparse matrix and its transpose.

    Rays that run across the rows of an image in memory would jump from line to line. The forward matrix therefore
    acts on copies of the image, one per axis, in each of which that axis is innermost; every ray reads the copy
    of the axis that it is stepped along.

    Args:
        forward: ``(data, axes * pixels)`` in CSR.
        transpose: ``(pixels, data)`` in CSR.
        sizes: Lengths of the axes of the image.
    """

    def __init__(self, forward: Tensor, transpose: Tensor, sizes: tuple[int, ...]) -> None:
        self.forward, self.transpose, self.sizes = forward, transpose, sizes

    @property
    def nbytes(self) -> int:
        """Bytes of both matrices."""
        parts = [
            t for m in (self.forward, self.transpose) for t in (m.crow_indices(), m.col_indices(), m.values())
        ]
        return sum(t.numel() * t.element_size() for t in parts)

    def project(self, x: Tensor) -> Tensor:
        """Return ``A x``, ``(B, pixels) -> (B, data)``."""
        return multiply(self.forward, self._copies(x)).mT.contiguous()

    def back_project(self, y: Tensor) -> Tensor:
        """Return ``A^T y``, ``(B, data) -> (B, pixels)``."""
        return multiply(self.transpose, y.mT.contiguous()).mT.contiguous()

    def normal(self, x: Tensor) -> Tensor:
        """Return ``A^T A x``, ``(B, pixels)``, without reordering the data in between."""
        return multiply(self.transpose, multiply(self.forward, self._copies(x))).mT.contiguous()

    def _copies(self, x: Tensor) -> Tensor:
        """Return the copies of the images as columns, ``(axes * pixels, B)``: one pass then serves all rows."""
        batch, dims = len(x), len(self.sizes)
        out = x.new_empty(dims, math.prod(self.sizes), batch)
        out[-1].copy_(x.mT)
        images = out[-1].view(*self.sizes, batch)
        for a in range(dims - 1):
            order = images.movedim(a, -2)
            out[a].view(order.shape).copy_(order)
        return out.reshape(-1, batch)


def multiply(matrix: Tensor, columns: Tensor) -> Tensor:
    if columns.shape[1] == 1:
        return (matrix @ columns[:, 0])[:, None]
    return matrix @ columns


def _in_copies(where: Tensor, axis: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Return positions in the copies of :class:`Table` for positions in the image and the axes of their rays."""
    out = torch.empty_like(where)
    pixels = math.prod(sizes)
    for a, length in enumerate(sizes):
        mine = axis == a
        inner = math.prod(sizes[a + 1 :])
        # (before, a, after) becomes (before, after, a)
        before, rest = where[mine] // (length * inner), where[mine] % (length * inner)
        out[mine] = a * pixels + (before * inner + rest % inner) * length + rest // inner
    return out


class Sized(Protocol):
    """What takes a known number of bytes."""

    @property
    def nbytes(self) -> int:
        """Bytes held."""


_T = TypeVar("_T", bound=Sized)


class TableCache:
    """Tables by content: shared while in use, and the latest kept up to a number of bytes afterwards."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._used: weakref.WeakValueDictionary[tuple[str, ...], Any] = weakref.WeakValueDictionary()
        self._kept: OrderedDict[tuple[str, ...], Sized] = OrderedDict()

    def get(self, key: tuple[str, ...], build: Callable[[], _T]) -> _T:
        """Return the table of a key, built where it is not known."""
        with self._lock:
            table: _T | None = self._used.get(key)
            if table is None:
                table = self._used[key] = build()
            self._kept[key] = table
            self._kept.move_to_end(key)
            while self._kept and sum(t.nbytes for t in self._kept.values()) > CACHE_BYTES:
                self._kept.popitem(last=False)
            return table

    def clear(self) -> None:
        """Forget all tables that no operator uses."""
        with self._lock:
            self._kept.clear()


#: Tables of this process, by digest of the geometry, dtype and device.
TABLES = TableCache()


class TableHolder:
    """An operator's hold on its table, which is built on first use.

    It is no part of the operator's state: digests do not look inside, copies and pickles start empty.
    """

    def __init__(self) -> None:
        self._key: tuple[str, ...] = ()
        self._table: Any = None

    def __reduce__(self) -> tuple[type[TableHolder], tuple[()]]:
        return TableHolder, ()

    def get(self, key: tuple[str, ...], build: Callable[[], _T]) -> _T:
        """Return the table, from here, from another operator of the same key, or built now."""
        if self._table is None or self._key != key:
            self._key, self._table = key, TABLES.get(key, build)
        table: _T = self._table
        return table


def table_bytes(grid: Grid, rays_of: TraceViews, views: int, bins: int, itemsize: int, limit: int) -> int:
    """Return how many bytes a table and its transpose take at most, or some number above ``limit``."""
    corners = 1 << (len(grid.sizes) - 1)
    total = 8 * (views * bins + math.prod(grid.sizes))
    for start, stop in blocks(views, bins, 1, _ENTRIES):
        low, high = bounds(rays_of(start, stop), grid)
        total += 2 * corners * int((high - low).sum()) * (itemsize + 4)
        if total > limit:
            break
    # positions are 32-bit numbers
    return total if total < 2 * (itemsize + 4) * (1 << 31) else max(total, limit + 1)


def build_table(
    grid: Grid, rays_of: TraceViews, views: int, bins: int, dtype: torch.dtype, device: torch.device
) -> Table:
    """Compute the weights of all rays; the arithmetic of positions is in double precision."""
    from scipy import sparse

    columns, copies, values, counts = [], [], [], []
    for start, stop in blocks(views, bins, max(grid.sizes) << (len(grid.sizes) - 1), _ENTRIES):
        rays = rays_of(start, stop)
        where, weights = entries(rays, grid, dtype, torch.device("cpu"))
        keep = weights != 0
        number, found = keep.sum((1, 2)), where[keep]
        columns.append(found.int().numpy())
        axis = torch.from_numpy(rays.axis).repeat_interleave(number)
        copies.append(_in_copies(found, axis, grid.sizes).int().numpy())
        values.append(weights[keep].numpy())
        counts.append(number.numpy())
    ends = np.concatenate([[0], np.cumsum(np.concatenate(counts))]).astype(np.int32)
    size, data = math.prod(grid.sizes), _joined(values)
    transpose = sparse.csr_matrix((data, _joined(columns), ends), (views * bins, size)).T.tocsr()
    forward = sparse.csr_matrix((data, _joined(copies), ends), (views * bins, len(grid.sizes) * size))
    forward.sort_indices()  # which torch's format asks for
    return Table(as_csr(forward, device), as_csr(transpose, device), grid.sizes)


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    """Return the parts as one array, and let go of them."""
    out = np.concatenate(parts)
    parts.clear()
    return out


def as_csr(matrix: Any, device: torch.device) -> Tensor:
    start, columns, values = (
        torch.from_numpy(np.ascontiguousarray(v)) for v in (matrix.indptr, matrix.indices, matrix.data)
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(start, columns, values, matrix.shape, check_invariants=False).to(device)
