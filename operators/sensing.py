"""Compressed sensing: a few random or Hadamard projections of the whole image."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from invdiff.errors import InvdiffError
from invdiff.operator import SVD
from invdiff.operators._parameters import as_space
from invdiff.operators._spectral import SpectralOperator, cut_small, unchanged
from invdiff.spaces import Space

_ROWS = ("low", "random")
#: A Hadamard matrix of 2^6 is applied at a time: large enough for matrix products, small enough to be few.
_CHUNK = 6


class RandomSensing(SpectralOperator):
    """``y = M x`` with ``m`` rows of independent Gaussian numbers of variance ``1 / m``, or orthonormal ones.

    The matrix follows from the seed, ``m`` and the size of the image; it is drawn in double precision.

    Args:
        measurements: Number ``m`` of projections, at most the number of unknowns.
        shape: Shape of one image, or its whole Space.
        orthonormal: Whether the rows are made orthonormal, which spans the same space and gives ``A A^H = I``.
        seed: Seed of the rows.
        dtype: Precision, and real or complex (then the rows are complex too); that of the Space, or float32.
        units: Units of the image.
        spacing: Distance between neighbours, per named dimension.

    Raises:
        InvdiffError: If the number of projections is not between 1 and that of the unknowns.
    """

    def __init__(
        self,
        measurements: int,
        shape: Space | Sequence[int],
        *,
        orthonormal: bool = False,
        seed: int = 0,
        dtype: torch.dtype | None = None,
        units: str | None = None,
        spacing: Mapping[str, float] | None = None,
    ) -> None:
        self.domain = as_space(shape, dtype, units, spacing)
        m = _count(measurements, self.domain.size)
        rows = Space((m, self.domain.size), torch.float64)
        rows = rows.replace(dtype=torch.complex128) if self.domain.is_complex else rows
        matrix = rows.randn(1, seed)[0] / (m * (2 if self.domain.is_complex else 1)) ** 0.5
        if orthonormal:
            matrix = torch.linalg.qr(matrix.mH).Q.mH
        self.orthonormal = bool(orthonormal)
        self.matrix = matrix.to(self.domain.dtype).contiguous()
        self.range = self.domain.replace(shape=(m,), dims=("projection",), spacing={})
        super().__init__()

    def _forward(self, x: Tensor) -> Tensor:
        return self._enter(x, self.domain).flatten(1) @ self.matrix.mT

    def _adjoint(self, y: Tensor) -> Tensor:
        return (self._enter(y, self.range) @ self.matrix.conj()).reshape(-1, *self.domain.shape)

    def svd(self) -> SVD:
        """Return the decomposition in ``m`` coordinates; with orthonormal rows it is the operator itself."""
        if self.orthonormal:
            s = torch.ones(1, *self.range.shape, dtype=self.domain.real_dtype, device=self.matrix.device)
            return SVD(s, vh=self._forward, v=self._adjoint, uh=unchanged, u=unchanged)
        u, s, vh = self._derived(_decompose)
        return SVD(
            s=s,
            vh=lambda x: x.flatten(1) @ vh.mT,
            v=lambda c: (c @ vh.conj()).reshape(-1, *self.domain.shape),
            uh=lambda y: (y @ u.conj()) * (s > 0),
            u=lambda c: (c * (s > 0)) @ u.mT,
        )


class Hadamard(SpectralOperator):
    """``y = (H P x)_rows / sqrt(n)``: a single-pixel camera with patterns of +1 and -1.

    ``H`` is the Hadamard matrix of ``n`` pixels in Sylvester's order, ``H[i, j] = (-1)^(number of common bits)``,
    and ``P`` permutes the pixels at random, or not at all; every channel is measured alike, in ``n log n``
    operations.

    Args:
        shape: Shape ``(channel, y, x)`` (or ``(y, x)``) of one image, or its whole Space; ``y x`` is a power of 2.
        measurements: Number of patterns; all ``n`` by default.
        rows: "low": the patterns with fewest changes of sign along y and x together; "random": the constant
            pattern and others drawn without replacement.
        scramble: Whether pixels are permuted, which makes natural images incoherent with the patterns.
        seed: Seed of rows and permutation.
        dtype: Precision, and real or complex; that of the Space, or float32.
        units: Units of the image.
        spacing: Distance between neighbours, per named dimension.

    Raises:
        InvdiffError: If the number of pixels is no power of 2, or the number of patterns is out of range.
    """

    def __init__(
        self,
        shape: Space | Sequence[int],
        measurements: int | None = None,
        *,
        rows: str = "low",
        scramble: bool = False,
        seed: int = 0,
        dtype: torch.dtype | None = None,
        units: str | None = None,
        spacing: Mapping[str, float] | None = None,
    ) -> None:
        self.domain = as_space(shape, dtype, units, spacing)
        if len(self.domain.shape) < 2:
            raise InvdiffError(f"Hadamard patterns need images of two axes (y, x), got shape {self.domain.shape}.")
        ny, nx = self.domain.shape[-2:]
        if (ny * nx) & (ny * nx - 1):
            raise InvdiffError(
                f"Hadamard patterns need a number of pixels that is a power of 2, got {ny} x {nx}; crop or pad."
            )
        if rows not in _ROWS:
            raise InvdiffError(f"The Hadamard rows are 'low' or 'random', got {rows!r:.60}.")
        m = ny * nx if measurements is None else _count(measurements, ny * nx)
        generator = torch.Generator().manual_seed(seed)
        if rows == "low":
            order = (_changes(ny)[:, None] + _changes(nx)).flatten().argsort(stable=True)
        else:
            order = torch.cat([torch.zeros(1).long(), 1 + torch.randperm(ny * nx - 1, generator=generator)])
        self.picked = order[:m].sort().values
        self.pixels = torch.randperm(ny * nx, generator=generator) if scramble else None
        lead = self.domain.shape[:-2]
        dims = (*self.domain.dims[:-2], "pattern")
        kept = {d: v for d, v in self.domain.spacing.items() if d in dims}
        self.range = self.domain.replace(shape=(*lead, m), dims=dims, spacing=kept)
        super().__init__()

    def _forward(self, x: Tensor) -> Tensor:
        return self._spectrum(self._enter(x, self.domain))[..., self.picked]

    def _adjoint(self, y: Tensor) -> Tensor:
        return self._image(self._scatter(self._enter(y, self.range)))

    def _spectrum(self, x: Tensor) -> Tensor:
        x = x.flatten(-2)
        return hadamard_transform(x if self.pixels is None else x[..., self.pixels])

    def _image(self, c: Tensor) -> Tensor:
        x = hadamard_transform(c)
        if self.pixels is not None:
            x = torch.empty_like(x).index_copy(-1, self.pixels, x)
        return x.reshape(-1, *self.domain.shape)

    def _scatter(self, y: Tensor) -> Tensor:
        out = y.new_zeros(*y.shape[:-1], self._n)
        return out.index_copy(-1, self.picked, y)

    @property
    def _n(self) -> int:
        return self.domain.shape[-2] * self.domain.shape[-1]

    def svd(self) -> SVD:
        """Return ``V^H = H P / sqrt(n)`` over all patterns, with ones where they are measured."""
        s = torch.zeros(self._n, dtype=self.domain.real_dtype, device=self.picked.device)
        s[self.picked] = 1
        return SVD(
            s=s.expand(1, *self.domain.shape[:-2], self._n),
            vh=self._spectrum,
            v=self._image,
            uh=self._scatter,
            u=lambda c: c[..., self.picked],
        )


def hadamard_transform(x: Tensor) -> Tensor:
    """Return ``H x / sqrt(n)`` along the last axis of length ``n = 2^k``, its own inverse."""
    n, shape = x.shape[-1], x.shape
    bits, done = n.bit_length() - 1, 0
    while done < bits:
        step = min(_CHUNK, bits - done)
        x = x.reshape(*shape[:-1], n >> (done + step), 1 << step, 1 << done)
        x = _sylvester(step, x) @ x if done else (x[..., 0] @ _sylvester(step, x))[..., None]
        done += step
    return x.reshape(shape)


def _sylvester(bits: int, like: Tensor) -> Tensor:
    """Return the orthonormal Hadamard matrix of ``2^bits``."""
    return _orthonormal(bits).to(device=like.device, dtype=like.dtype)


@functools.lru_cache
def _orthonormal(bits: int) -> Tensor:
    h = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(bits):
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h / h.shape[0] ** 0.5


def _changes(n: int) -> Tensor:
    """Return how often each row of the Hadamard matrix changes sign: bits reversed, then from Gray code."""
    bits = n.bit_length() - 1
    rows, gray = torch.arange(n), torch.zeros(n, dtype=torch.long)
    for b in range(bits):
        gray |= ((rows >> b) & 1) << (bits - 1 - b)
    shift = gray >> 1
    while bool(shift.any()):
        gray, shift = gray ^ shift, shift >> 1
    return gray


def _count(measurements: Any, most: int) -> int:
    if isinstance(measurements, bool) or int(measurements) != measurements or not 1 <= measurements <= most:
        raise InvdiffError(f"The measurements must be a whole number from 1 to {most}, got {measurements!r:.60}.")
    return int(measurements)


def _decompose(operator: RandomSensing) -> tuple[Tensor, Tensor, Tensor]:
    m = operator.matrix
    u, s, vh = torch.linalg.svd(m.to(torch.complex128 if m.is_complex() else torch.float64), full_matrices=False)
    s = cut_small(s[None].to(operator.domain.real_dtype), max(m.shape))
    return u.to(m.dtype), s, vh.to(m.dtype)
