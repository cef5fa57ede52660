"""Sparse tables of ray transforms: all weights in CSR with 32-bit positions, and the explicit transpose."""

from __future__ import annotations

import math
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from invdiff.operators._rays import Grid, TraceViews, blocks, bounds, entries

#: Bytes of tables that are kept for the next operator of the same geometry when nobody uses them any more.
CACHE_BYTES = 2 << 30
_ENTRIES = 1 << 22


class Table:
    """A sparse matrix and its transpose.

    Args:
        forward: ``(rays, pixels)`` in CSR.
        transpose: ``(pixels, rays)`` in CSR.
    """

    def __init__(self, forward: Tensor, transpose: Tensor) -> None:
        self.forward, self.transpose = forward, transpose

    @property
    def nbytes(self) -> int:
        """Bytes of both matrices."""
        parts = [
            t for m in (self.forward, self.transpose) for t in (m.crow_indices(), m.col_indices(), m.values())
        ]
        return sum(t.numel() * t.element_size() for t in parts)


class TableCache:
    """Tables by content: shared while in use, and the latest kept up to a number of bytes afterwards."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._used: weakref.WeakValueDictionary[tuple[str, ...], Table] = weakref.WeakValueDictionary()
        self._kept: OrderedDict[tuple[str, ...], Table] = OrderedDict()

    def get(self, key: tuple[str, ...], build: Callable[[], Table]) -> Table:
        """Return the table of a key, built where it is not known."""
        with self._lock:
            table = self._used.get(key)
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
        self._table: Table | None = None

    def __reduce__(self) -> tuple[type[TableHolder], tuple[()]]:
        return TableHolder, ()

    def get(self, key: tuple[str, ...], build: Callable[[], Table]) -> Table:
        """Return the table, from here, from another operator of the same key, or built now."""
        if self._table is None:
            self._table = TABLES.get(key, build)
        return self._table


def table_bytes(grid: Grid, rays_of: TraceViews, views: int, bins: int, itemsize: int, limit: int) -> int:
    """Return how many bytes a table and its transpose take at most, or some number above ``limit``."""
    corners = 1 << (len(grid.sizes) - 1)
    total = 4 * (views * bins + math.prod(grid.sizes))
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

    columns, values, counts = [], [], []
    for start, stop in blocks(views, bins, max(grid.sizes) << (len(grid.sizes) - 1), _ENTRIES):
        where, weights = entries(rays_of(start, stop), grid, dtype, torch.device("cpu"))
        keep = weights != 0
        columns.append(where[keep].int().numpy())
        values.append(weights[keep].numpy())
        counts.append(keep.sum((1, 2)).numpy())
    rows = np.concatenate([[0], np.cumsum(np.concatenate(counts))]).astype(np.int32)
    shape = (views * bins, math.prod(grid.sizes))
    unsorted = sparse.csr_matrix((np.concatenate(values), np.concatenate(columns), rows), shape)
    # Transposing twice sorts the columns of every row, which torch's format asks for.
    transpose = unsorted.T.tocsr()
    return Table(_as_csr(transpose.T.tocsr(), device), _as_csr(transpose, device))


def _as_csr(matrix: Any, device: torch.device) -> Tensor:
    start, columns, values = (
        torch.from_numpy(np.ascontiguousarray(v)) for v in (matrix.indptr, matrix.indices, matrix.data)
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(start, columns, values, matrix.shape, check_invariants=False).to(device)


def multiply(matrix: Tensor, columns: Tensor) -> Tensor:
    """Return ``M X`` for ``X`` ``(n, B)``, one pass over the matrix for all columns."""
    if columns.shape[1] == 1:
        return (matrix @ columns[:, 0])[:, None]
    return matrix @ columns
