"""Fourier sums at arbitrary frequencies, and their exact adjoints.

``y_j = sum_n x[n] exp(-2 pi i sum_a k_ja (n_a - c_a) / N_a)`` with ``c = N // 2`` and ``k`` in cycles per field of
view, for one, two or three axes. Three methods:

* ``reference``: the sum itself. Exact, and only for small problems.
* ``gridding``: FFT on a grid finer by ``sigma``, then ``J`` neighbours per axis with Kaiser-Bessel weights
  (Fessler and Sutton 2003; Beatty et al. 2005). The weights stand in one sparse matrix and its transpose, so the
  adjoint is exact to rounding. The image is put at the middle of the grid, which turns the centring into signs
  that the matrix absorbs.
* ``finufft``: the package finufft (Barnett et al. 2019), on the CPU.

Tables are kept per content, least recently used out first, within `TABLE_BYTES` in all.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from invdiff.errors import InvdiffError

METHODS = ("auto", "gridding", "finufft", "reference")
#: Bytes that all gridding tables and plans together may keep.
TABLE_BYTES = 1 << 30
#: Matrix elements of the exact sum that are formed at a time.
_CHUNK = 1 << 22
#: Grid points that one FFT on a CPU takes at a time.
_CACHED = 1 << 17
#: Error of Kaiser-Bessel gridding per axis: ``_FACTOR[sigma] * exp(-pi J sqrt(1 - 1 / sigma))``, measured.
_FACTOR = {1.25: 1.35, 1.5: 2.6, 2.0: 5.5}
#: Measured costs on a CPU per image: one grid point of the FFT against one entry of the sparse product.
_POINT, _ENTRY = 8.0, 0.22
#: Rounding of single precision.
_EPS = 6e-8
_REAL = {torch.complex64: torch.float32, torch.complex128: torch.float64}
T = TypeVar("T")


class _Cache:
    """Values by key with a bound on their bytes; the least recently used go first."""

    def __init__(self) -> None:
        self._lock, self._bytes = threading.Lock(), 0
        self._held: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], tuple[T, int]]) -> T:
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
                value: T = self._held[key][0]
                return value
        value, size = make()
        with self._lock:
            if key not in self._held and size <= TABLE_BYTES:
                self._held[key] = (value, size)
                self._bytes += size
            while self._bytes > TABLE_BYTES:
                self._bytes -= self._held.popitem(last=False)[1][1]
        return value

    def clear(self) -> None:
        with self._lock:
            self._held.clear()
            self._bytes = 0

    def __len__(self) -> int:
        return len(self._held)


TABLES = _Cache()


@dataclass(frozen=True)
class Grid:
    """An oversampled grid and the width ``J`` of the interpolation kernel on it, in grid points."""

    shape: tuple[int, ...]
    width: int

    def beta(self, axis: int, n: int) -> float:
        """Shape parameter of the Kaiser-Bessel kernel along one axis of ``n`` pixels."""
        return math.pi * self.width * (1 - n / (2 * self.shape[axis])) * (1 - 0.18 / self.width)


@lru_cache(maxsize=256)
def choose_grid(shape: tuple[int, ...], samples: int, accuracy: float) -> Grid:
    """Return the cheapest grid and kernel that reach a relative error of ``accuracy``.

    It is typical, a root mean square over images; tests hold it to twice that.
    """
    best: tuple[float, Grid] | None = None
    for sigma, factor in _FACTOR.items():
        decay = math.pi * math.sqrt(1 - 1 / sigma)
        width = max(2, math.ceil(math.log(factor * math.sqrt(len(shape)) / accuracy) / decay))
        grid = Grid(tuple(fast_even(sigma * n) for n in shape), width)
        if accuracy >= 1e-7 and sigma < 2 and _EPS * _amplification(sigma, width) > accuracy:
            continue
        cost = _POINT * math.prod(grid.shape) + _ENTRY * samples * width ** len(shape)
        if best is None or cost < best[0]:
            best = cost, grid
    assert best is not None
    return best[1]


def _amplification(sigma: float, width: int) -> float:
    """Return by how much dividing by the kernel's transform enlarges rounding at the edge of the image."""
    beta = math.pi * width * (1 - 1 / (2 * sigma)) * (1 - 0.18 / width)
    return math.exp(beta - math.sqrt(max(beta**2 - (math.pi * width / (2 * sigma)) ** 2, 0.0)))


def table_bytes(samples: int, grid: Grid, dtype: torch.dtype) -> int:
    """Return the size of the interpolation matrix and its transpose."""
    entries = samples * grid.width ** len(grid.shape)
    return 2 * entries * (4 + _REAL[dtype].itemsize) + 4 * (samples + math.prod(grid.shape) + 2)


class Nufft:
    """Fourier sums of images ``(R, *shape)`` at ``points`` ``(M, axes)``; immutable.

    ``forward(x)`` and ``adjoint(y)`` are exact adjoints of each other in every method. What callers fold into
    their own weights: ``forward(x) = to_samples(x * correction)`` and ``adjoint(y) = to_images(y) * correction``.

    Args:
        points: Frequencies in cycles per field of view, one column per axis of the image.
        shape: Shape of the image.
        accuracy: Relative error against the exact sum (root mean square over random images).
        method: One of `METHODS`; ``auto`` is gridding where its table fits into `TABLE_BYTES`, else finufft.

    Raises:
        InvdiffError: If the method is unknown or cannot be had, or the accuracy is out of reach.
    """

    def __init__(self, points: Tensor, shape: Sequence[int], accuracy: float = 1e-3, method: str = "auto") -> None:
        self.points = points.detach().to("cpu", torch.float64).contiguous()
        self.shape = tuple(int(n) for n in shape)
        if self.points.ndim != 2 or self.points.shape[1] != len(self.shape) or not len(self.points):
            raise InvdiffError(
                f"The frequencies have shape {tuple(points.shape)}, expected (samples, {len(self.shape)}) for "
                f"images of shape {self.shape}."
            )
        if not 1e-13 <= accuracy < 1:
            raise InvdiffError(f"The accuracy must be between 1e-13 and 1, got {accuracy:g}.")
        self.accuracy = float(accuracy)
        self.method = self._choose(method)
        self.digest = hashlib.sha256(self.points.numpy().tobytes()).hexdigest()

    def _choose(self, method: str) -> str:
        if method not in METHODS:
            raise InvdiffError(f"There is no NUFFT method {method!r}; choose one of {', '.join(METHODS)}.")
        there = find_spec("finufft") is not None
        if method == "finufft" and not there:
            raise InvdiffError("The method finufft needs the package: pip install 'invdiff[nufft]'.")
        if method not in ("auto", "gridding"):
            return method
        size = table_bytes(len(self.points), self.grid, torch.complex64)
        if size <= TABLE_BYTES:
            return "gridding"
        if method == "auto" and there:
            return "finufft"
        raise InvdiffError(
            f"The gridding table of {len(self.points)} samples would take {size / 2**30:.1f} GiB, more than "
            f"{TABLE_BYTES / 2**30:g}; ask for less accuracy than {self.accuracy:g} or for method='finufft'."
        )

    @property
    def grid(self) -> Grid:
        """Oversampled grid and kernel width of the gridding method."""
        return choose_grid(self.shape, len(self.points), self.accuracy)

    def correction(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
        """Return what divides the kernel's transform out of the image, real ``shape``; ones without gridding."""
        out = torch.ones(self.shape, dtype=torch.float64)
        if self.method == "gridding":
            for axis, n in enumerate(self.shape):
                beta, g = self.grid.beta(axis, n), self.grid.shape[axis]
                position = (torch.arange(n, dtype=torch.float64) - n // 2) / g
                z = (beta**2 - (math.pi * self.grid.width * position) ** 2).clamp_min(1e-12).sqrt()
                line = math.exp(-beta) * self.grid.width * torch.sinh(z) / z
                out = out / line.reshape(-1, *[1] * (len(self.shape) - 1 - axis))
        return out.to(device, _REAL[dtype])

    def forward(self, images: Tensor) -> Tensor:
        """Return the sums, ``(R, *shape) -> (R, M)`` complex."""
        return self.to_samples(images * self.correction(images.dtype, images.device))

    def adjoint(self, samples: Tensor) -> Tensor:
        """Return ``x[n] = sum_j y_j exp(+2 pi i ...)``, ``(R, M) -> (R, *shape)`` complex."""
        return self.to_images(samples) * self.correction(samples.dtype, samples.device)

    def to_samples(self, images: Tensor) -> Tensor:
        """Return ``forward(images / correction)``."""
        if not len(images):
            return images.new_zeros(0, len(self.points))
        if self.method == "gridding":
            return _grid_forward(images, self._table(images)[0], self.grid)
        if self.method == "finufft":
            return self._finufft(images, 2)
        return torch.cat([images.flatten(1) @ rows.mT for rows in self._rows(images)], 1)

    def to_images(self, samples: Tensor) -> Tensor:
        """Return ``adjoint(samples) / correction``."""
        if not len(samples):
            return samples.new_zeros(0, *self.shape)
        if self.method == "gridding":
            return _grid_adjoint(samples, self._table(samples)[1], self.grid, self.shape)
        if self.method == "finufft":
            return self._finufft(samples, 1)
        out = samples.new_zeros(len(samples), math.prod(self.shape))
        start = 0
        for rows in self._rows(samples):
            out += samples[:, start : start + len(rows)] @ rows.conj()
            start += len(rows)
        return out.reshape(-1, *self.shape)

    def _rows(self, like: Tensor) -> Any:
        """Yield blocks of the matrix ``exp(-2 pi i k (n - c) / N)``, ``(samples, pixels)``."""
        step = max(1, _CHUNK // math.prod(self.shape))
        for start in range(0, len(self.points), step):
            points = self.points[start : start + step]
            rows = torch.ones(len(points), 1, dtype=torch.complex128)
            for axis, n in enumerate(self.shape):
                turns = points[:, axis, None] * ((torch.arange(n, dtype=torch.float64) - n // 2) / n)
                line = torch.polar(torch.ones_like(turns), -2 * math.pi * turns)
                rows = (rows[:, :, None] * line[:, None]).flatten(1)
            yield rows.to(like.device, like.dtype)

    def _table(self, like: Tensor) -> tuple[Tensor, Tensor]:
        key = ("table", self.digest, self.shape, self.grid, like.dtype, str(like.device))

        def make() -> tuple[tuple[Tensor, Tensor], int]:
            tables = interpolation(self.points, self.shape, self.grid, like.dtype)
            size = table_bytes(len(self.points), self.grid, like.dtype)
            return (tables[0].to(like.device), tables[1].to(like.device)), size

        return TABLES.get(key, make)

    def _finufft(self, values: Tensor, kind: int) -> Tensor:
        array = np.ascontiguousarray(values.detach().cpu().resolve_conj().numpy())
        threads = torch.get_num_threads()
        key = ("finufft", self.digest, self.shape, self.accuracy, kind, len(array), array.dtype, threads)
        plan, lock, _ = TABLES.get(key, lambda: self._plan(kind, len(array), array.dtype, threads))
        with lock:  # a plan works in buffers of its own
            out = plan.execute(array if len(array) > 1 else array[0])
        return torch.from_numpy(out.reshape(len(array), *(self.shape if kind == 1 else (-1,)))).to(values.device)

    def _plan(self, kind: int, many: int, dtype: np.dtype[Any], threads: int) -> tuple[Any, int]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import finufft

        # Below these the package warns that it cannot do it, and does what it can.
        eps = max(self.accuracy, 1e-6 if dtype == np.complex64 else 1e-14)
        # One grid for both directions: what the package would choose for each may differ, and then they are no
        # adjoints of each other.
        fine = 1e-4 if dtype == np.complex64 else 1e-8
        options = {"nthreads": threads, "upsampfac": 1.25 if eps >= fine else 2.0}
        plan = finufft.Plan(kind, self.shape, many, eps, 1 if kind == 1 else -1, dtype=str(dtype), **options)
        real = np.float32 if dtype == np.complex64 else np.float64
        scaled = self.points * (2 * math.pi / torch.tensor(self.shape, dtype=torch.float64))
        points = [np.ascontiguousarray(p, dtype=real) for p in scaled.T.numpy()]
        plan.setpts(*points)
        size = 8 * math.prod(self.shape) * 4 * many * dtype.itemsize // 8 + 16 * self.points.numel()
        return (plan, threading.Lock(), points), size


def interpolation(points: Tensor, shape: Sequence[int], grid: Grid, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the interpolation matrix ``(samples, grid points)`` and its transpose, real, sparse by rows (int32).

    Entry ``(j, g)`` is ``prod_a (-1)^g_a exp(-beta) I0(beta sqrt(1 - (2 (u_ja - g_a) / J)^2))`` with
    ``u = k G / N``; the signs move the image from the middle of the grid to its corner.
    """
    from scipy import sparse, special

    samples, entries = len(points), grid.width ** len(shape)
    if samples * entries >= 2**31 or math.prod(grid.shape) >= 2**31:
        raise InvdiffError(f"{samples} samples with {entries} neighbours each are too many; use method='finufft'.")
    steps = np.arange(grid.width)
    columns = np.zeros((samples, 1), dtype=np.int64)
    weights = np.ones((samples, 1))
    for axis, n in enumerate(shape):
        g, beta = grid.shape[axis], grid.beta(axis, n)
        u = points[:, axis].numpy() * g / n
        near = np.ceil(u - grid.width / 2).astype(np.int64)[:, None] + steps
        inside = np.clip(1 - (2 * (u[:, None] - near) / grid.width) ** 2, 0, 1)
        root = beta * np.sqrt(inside)
        line = special.i0e(root) * np.exp(root - beta) * (1 - 2 * (near % 2))
        columns = (columns[:, :, None] * g + (near % g)[:, None]).reshape(samples, -1)
        weights = (weights[:, :, None] * line[:, None]).reshape(samples, -1)
    starts = np.arange(samples + 1, dtype=np.int32) * entries
    values = weights.reshape(-1).astype(np.float32 if dtype == torch.complex64 else np.float64)
    size = (samples, math.prod(grid.shape))
    matrix = sparse.csr_matrix((values, columns.reshape(-1).astype(np.int32), starts), shape=size)
    return _csr(matrix), _csr(matrix.T.tocsr())


def _csr(matrix: Any) -> Tensor:
    matrix.sum_duplicates()  # a kernel wider than the grid meets a point twice
    rows, columns = (torch.from_numpy(p.astype(np.int32, copy=False)) for p in (matrix.indptr, matrix.indices))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls sparse rows a beta feature, once
        return torch.sparse_csr_tensor(rows, columns, torch.from_numpy(matrix.data), size=matrix.shape)


def _grid_forward(images: Tensor, table: Tensor, grid: Grid) -> Tensor:
    points, axes = math.prod(grid.shape), tuple(range(1, images.ndim))
    columns = images.new_empty(points, len(images))
    middle = (slice(None), *_middle(grid.shape, images.shape[1:]))
    for some in _passes(images, points):
        part = images[some]
        padded = part.new_zeros(len(part), *grid.shape)
        padded[middle] = part
        columns[:, some] = torch.fft.fftn(padded, dim=axes).flatten(1).mT
    out = table @ torch.view_as_real(columns).flatten(1)
    return torch.view_as_complex(out.reshape(len(out), len(images), 2)).mT.contiguous()


def _grid_adjoint(samples: Tensor, transpose: Tensor, grid: Grid, shape: Sequence[int]) -> Tensor:
    points, axes = math.prod(grid.shape), tuple(range(1, len(shape) + 1))
    out = transpose @ torch.view_as_real(samples.mT.resolve_conj().contiguous()).flatten(1)
    columns = torch.view_as_complex(out.reshape(points, len(samples), 2))
    images = samples.new_empty(len(samples), *shape)
    middle = (slice(None), *_middle(grid.shape, shape))
    for some in _passes(samples, points):
        k = columns[:, some].mT.reshape(-1, *grid.shape)
        images[some] = torch.fft.ifftn(k, dim=axes, norm="forward")[middle]
    return images


def _passes(rows: Tensor, points: int) -> list[slice]:
    """Split rows so that the grids of one pass stay in the caches of a CPU (measured: 1.5 times faster)."""
    step = len(rows) if rows.is_cuda else max(1, _CACHED // points)
    return [slice(i, i + step) for i in range(0, len(rows), step)]


def _middle(grid: Sequence[int], shape: Sequence[int]) -> tuple[slice, ...]:
    """Where the image stands in the grid: its centre ``N // 2`` on the grid's ``G / 2``."""
    return tuple(slice(g // 2 - n // 2, g // 2 - n // 2 + n) for g, n in zip(grid, shape))


def fast_even(size: float) -> int:
    """Return the smallest even ``2^a 3^b 5^c`` of at least ``size``."""
    need = max(2, math.ceil(size))
    powers = [2 ** (a + 1) * 3**b * 5**c for a, b, c in itertools.product(range(24), range(4), range(3))]
    return min(p for p in powers if p >= need)
