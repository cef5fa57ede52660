"""The identity and dense matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from invdiff.errors import InvdiffError
from invdiff.operator import SVD
from invdiff.operators._parameters import as_parameter, as_space
from invdiff.operators._spectral import SpectralOperator, cut_small, unchanged
from invdiff.spaces import Space


class Identity(SpectralOperator):
    """``A x = x``: denoising.

    Args:
        shape: Shape of one image, or its whole :class:`~invdiff.spaces.Space`.
        dtype: Precision, and real or complex; that of the Space, or float32.
        units: Units of the image.
        spacing: Distance between neighbours, per named dimension.
    """

    def __init__(
        self,
        shape: Space | Sequence[int],
        *,
        dtype: torch.dtype | None = None,
        units: str | None = None,
        spacing: Mapping[str, float] | None = None,
    ) -> None:
        self.domain = self.range = as_space(shape, dtype, units, spacing)
        # The only tensor here; it tells the decomposition which device the operator was moved to.
        self.one = torch.ones((1,) * (1 + len(self.domain.shape)), dtype=self.domain.real_dtype)
        super().__init__()

    def _forward(self, x: Tensor) -> Tensor:
        return x.to(self.domain.dtype)

    def _adjoint(self, y: Tensor) -> Tensor:
        return y.to(self.domain.dtype)

    def normal(self, x: Tensor) -> Tensor:
        """Return ``x``."""
        return self(x)

    def svd(self) -> SVD:
        """Return ``U = V = I`` with unit singular values on the shape of the domain."""
        s = self.one.expand(1, *self.domain.shape)
        return SVD(s, unchanged, unchanged, unchanged, unchanged)


class Matrix(SpectralOperator):
    """``y = M x`` on flattened elements, with one dense matrix or one per case.

    A complex matrix on a real domain maps to complex data, and its adjoint ends in a real part. The
    decomposition is computed in double precision on first use.

    Args:
        matrix: ``(m, n)``, or ``(N, m, n)`` with one matrix per case; ``n`` and ``m`` are the sizes of
            domain and range. float32 unless it is given in 64 bit.
        domain: Space or shape of ``n`` elements; ``(n,)`` and as complex as the matrix by default.
        range: Space or shape of ``m`` elements; ``(m,)`` by default.
        units: Units of the domain.
        spacing: Distance between neighbours in the domain, per named dimension.

    Raises:
        InvdiffError: If the matrix is not of rank 2 or 3, holds NaN or infinity, or does not fit the spaces.
    """

    _per_case = ("matrix",)

    def __init__(
        self,
        matrix: Any,
        domain: Space | Sequence[int] | None = None,
        range: Space | Sequence[int] | None = None,
        *,
        units: str | None = None,
        spacing: Mapping[str, float] | None = None,
    ) -> None:
        m = as_parameter(matrix, "The matrix")
        if m.ndim not in (2, 3) or 0 in m.shape:
            raise InvdiffError(f"The matrix has shape {tuple(m.shape)}, expected (m, n) or (cases, m, n).")
        m = m if m.ndim == 3 else m[None]
        dtype = None if isinstance(domain, Space) else m.dtype
        self.domain = as_space((m.shape[2],) if domain is None else domain, dtype, units, spacing)
        if self.domain.is_complex and not m.is_complex():
            m = m.to(m.dtype.to_complex())
        precision = self.domain.dtype
        self.matrix = m.to(precision.to_complex() if m.is_complex() else precision)
        dtype = None if isinstance(range, Space) else self.matrix.dtype
        self.range = as_space((m.shape[1],) if range is None else range, dtype)
        self._check_spaces()
        super().__init__()

    def _check_spaces(self) -> None:
        _, m, n = self.matrix.shape
        for what, space, size in (("domain", self.domain, n), ("range", self.range, m)):
            if space.size != size:
                raise InvdiffError(
                    f"The {what} {space} has {space.size} elements, and the matrix ({m}, {n}) needs {size}."
                )
        if self.range.dtype != self.matrix.dtype:
            raise InvdiffError(
                f"The range is {self.range.dtype}, and the matrix maps {self.domain.dtype} to {self.matrix.dtype}."
            )

    def _forward(self, x: Tensor) -> Tensor:
        flat = self._enter(x, self.domain).flatten(1).to(self.matrix.dtype)
        return _multiply(self.matrix, flat).reshape(-1, *self.range.shape)

    def _adjoint(self, y: Tensor) -> Tensor:
        out = _multiply(self.matrix.mH, self._enter(y, self.range).flatten(1))
        return (out if self.domain.is_complex else out.real).reshape(-1, *self.domain.shape)

    def svd(self) -> SVD:
        """Return the decomposition in ``n`` coordinates, real where the domain is real."""
        u, s, vh = self._derived(_decompose)
        mixed = self.range.is_complex and not self.domain.is_complex

        def to_range(c: Tensor) -> Tensor:
            y = _multiply(u, c)
            y = torch.complex(*(part.contiguous() for part in y.chunk(2, 1))) if mixed else y
            return y.reshape(-1, *self.range.shape)

        def from_range(y: Tensor) -> Tensor:
            y = y.flatten(1)
            return _multiply(u.mH, torch.cat([y.real, y.imag], 1) if mixed else y)

        return SVD(
            s=s,
            vh=lambda x: _multiply(vh, x.flatten(1)),
            v=lambda c: _multiply(vh.mH, c).reshape(-1, *self.domain.shape),
            uh=from_range,
            u=to_range,
        )


def _multiply(matrix: Tensor, x: Tensor) -> Tensor:
    """Return ``M x`` for ``M`` ``(1 or B, m, n)`` and ``x`` ``(B, n)``."""
    if matrix.shape[0] == 1:
        return x @ matrix[0].mT
    return torch.bmm(matrix, x[..., None])[..., 0]


def _decompose(operator: Matrix) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``U`` ``(N, m, n)``, ``s`` ``(N, n)`` and ``V^H`` ``(N, n, n)``, zero beyond the rank.

    Complex data of a real domain are decomposed as ``[Re M; Im M]``, which keeps the coordinates real.
    """
    m = operator.matrix
    if m.is_complex() and not operator.domain.is_complex:
        m = torch.cat([m.real, m.imag], dim=1)
    rank, n = min(m.shape[1:]), m.shape[2]
    u, s, vh = torch.linalg.svd(m.to(torch.complex128 if m.is_complex() else torch.float64), full_matrices=True)
    s = cut_small(s.to(operator.domain.real_dtype), max(m.shape[1:]))
    u = u[..., :rank].to(m.dtype) * (s[:, None] > 0)
    pad = (0, n - rank)
    return torch.nn.functional.pad(u, pad), torch.nn.functional.pad(s, pad), vh.to(m.dtype)
