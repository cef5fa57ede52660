"""Covariances known by their eigenvalues in an orthonormal basis: one interface for every exact prior.

``C = Q diag(lam) Q^T``; a function of the covariance, ``f(C) v = Q f(lam) Q^T v``, is then a filter with the
weights ``f(lam)``, which may differ from row to row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from invdiff.errors import InvdiffError
from invdiff.tensors import Movable

#: Above this many unknowns no dense matrix is made.
DENSE_LIMIT = 8192


class Covariance(Movable, ABC):
    """``Q diag(lam) Q^T`` on tensors of shape ``shape``; coefficients have the same shape.

    Attributes:
        shape: Shape of one element.
        eigenvalues: ``lam``, shape ``shape``, not negative.
    """

    shape: tuple[int, ...]
    eigenvalues: Tensor

    @abstractmethod
    def to_basis(self, v: Tensor) -> Tensor:
        """Return ``Q^T v``, ``(B, *shape) -> (B, *shape)``."""

    @abstractmethod
    def from_basis(self, c: Tensor) -> Tensor:
        """Return ``Q c``, ``(B, *shape) -> (B, *shape)``."""

    def filter(self, v: Tensor, weights: Tensor) -> Tensor:
        """Return ``Q diag(weights) Q^T v`` for ``weights`` broadcasting over ``(B, *shape)``."""
        return self.from_basis(weights * self.to_basis(v))

    def root(self, v: Tensor) -> Tensor:
        """Return ``C^(1/2) v`` with the symmetric root."""
        return self.filter(v, self.eigenvalues.sqrt())

    def product(self, v: Tensor) -> Tensor:
        """Return ``C v``."""
        return self.filter(v, self.eigenvalues)

    @abstractmethod
    def variances(self) -> Tensor:
        """Return the diagonal of ``C``, shape ``shape``."""

    def matrix(self) -> Tensor:
        """Return ``C`` as a dense ``(n, n)`` matrix over flattened elements.

        Raises:
            InvdiffError: If there are more than 8,192 unknowns.
        """
        n = self.eigenvalues.numel()
        if n > DENSE_LIMIT:
            raise InvdiffError(
                f"A dense covariance of {n} unknowns is too large (at most {DENSE_LIMIT}); "
                "use its products with vectors instead."
            )
        eye = torch.eye(n, dtype=self.eigenvalues.dtype, device=self.eigenvalues.device)
        return self.product(eye.reshape(n, *self.shape)).reshape(n, n)


class Diagonal(Covariance):
    """Independent components with the given variances, ``Q = I``.

    Args:
        variances: ``(*shape)``, not negative.
    """

    def __init__(self, variances: Tensor) -> None:
        check_variances(variances, "The variances")
        self.eigenvalues, self.shape = variances, tuple(variances.shape)

    def to_basis(self, v: Tensor) -> Tensor:
        """Return ``v``."""
        return v

    def from_basis(self, c: Tensor) -> Tensor:
        """Return ``c``."""
        return c

    def variances(self) -> Tensor:
        """Return the eigenvalues."""
        return self.eigenvalues


class Dense(Covariance):
    """Any covariance matrix over the flattened elements; decomposed once.

    Args:
        matrix: Symmetric positive semi-definite ``(n, n)``.
        shape: Shape of one element, with ``n`` elements.

    Raises:
        InvdiffError: If the matrix is not square, symmetric or positive semi-definite.
    """

    def __init__(self, matrix: Tensor, shape: tuple[int, ...]) -> None:
        n = torch.Size(shape).numel()
        if tuple(matrix.shape) != (n, n):
            raise InvdiffError(
                f"The covariance has shape {tuple(matrix.shape)}, expected ({n}, {n}) for a mean of {n} elements."
            )
        top = float(matrix.abs().max())
        if not bool(torch.isfinite(matrix).all()) or float((matrix - matrix.T).abs().max()) > 1e-6 * top:
            raise InvdiffError("The covariance must be a finite symmetric matrix; symmetrise it first.")
        values, self.basis = torch.linalg.eigh(0.5 * (matrix + matrix.T))
        if float(values[0]) < -1e-6 * float(values[-1].abs()):
            raise InvdiffError(
                f"The covariance has a negative eigenvalue ({float(values[0]):.3g}); "
                "it must be positive semi-definite."
            )
        self.shape = shape
        self.eigenvalues = values.clamp_min(0).reshape(shape)

    def to_basis(self, v: Tensor) -> Tensor:
        """Return ``Q^T v``."""
        return (v.flatten(1) @ self.basis).reshape(v.shape)

    def from_basis(self, c: Tensor) -> Tensor:
        """Return ``Q c``."""
        return (c.flatten(1) @ self.basis.T).reshape(c.shape)

    def variances(self) -> Tensor:
        """Return ``sum_i lam_i Q_ji^2``."""
        return ((self.basis**2) @ self.eigenvalues.flatten()).reshape(self.shape)


class Circulant(Covariance):
    """Stationary covariance on a periodic grid, equal and independent from channel to channel.

    The eigenvectors are the Fourier modes; the real orthonormal form of them is the Hartley basis
    ``cas(2 pi k.x) / sqrt(n)``, ``cas = cos + sin``.

    Args:
        spectrum: Eigenvalues on the FFT grid (order of ``torch.fft.fftn``), shape ``shape[1:]``, even in ``k``.
        shape: ``(channel, *grid)``.

    Raises:
        InvdiffError: If the spectrum is negative, not even, or of another shape than the grid.
    """

    def __init__(self, spectrum: Tensor, shape: tuple[int, ...]) -> None:
        if tuple(spectrum.shape) != tuple(shape[1:]):
            raise InvdiffError(f"The spectrum has shape {tuple(spectrum.shape)}, expected the grid {shape[1:]}.")
        check_variances(spectrum, "The spectrum")
        axes = tuple(range(spectrum.ndim))
        mirrored = torch.roll(torch.flip(spectrum, axes), [1] * len(axes), axes)
        if float((spectrum - mirrored).abs().max()) > 1e-6 * float(spectrum.max()):
            raise InvdiffError(
                "The spectrum must be even, S(k) = S(-k) on the FFT grid, for the field to be real; symmetrise it."
            )
        self.shape = tuple(shape)
        self.eigenvalues = (0.5 * (spectrum + mirrored)).expand(self.shape)
        self._axes = tuple(range(-spectrum.ndim, 0))

    @property
    def spectrum(self) -> Tensor:
        """Eigenvalues of one channel, on the FFT grid."""
        return self.eigenvalues[0]

    def to_basis(self, v: Tensor) -> Tensor:
        """Return the Hartley coefficients."""
        if not v.numel():  # some builds of torch refuse to transform no rows
            return v
        f = torch.fft.fftn(v, dim=self._axes, norm="ortho")
        return f.real - f.imag

    def from_basis(self, c: Tensor) -> Tensor:
        """Return the field: the Hartley transform is its own inverse."""
        return self.to_basis(c)

    def variances(self) -> Tensor:
        """Return the mean of the spectrum, everywhere."""
        return self.spectrum.mean().expand(self.shape)

    def filter(self, v: Tensor, weights: Tensor) -> Tensor:
        """Return the field with every mode weighted, by one real FFT and back."""
        if not v.numel():
            return v
        half = weights[..., : self.shape[-1] // 2 + 1]
        f = torch.fft.rfftn(v, dim=self._axes, norm="ortho")
        return torch.fft.irfftn(half * f, s=self.shape[1:], dim=self._axes, norm="ortho")


def check_variances(values: Tensor, what: str) -> None:
    """Raise one sentence unless all values are finite and not negative."""
    if not bool(torch.isfinite(values).all()) or bool((values < 0).any()):
        raise InvdiffError(
            f"{what} must be finite and not negative, got a smallest value {float(values.min()):.3g}."
        )


def floating(values: Any) -> Tensor:
    """Return a floating tensor; plain numbers, lists and integers become float64."""
    out = values if isinstance(values, Tensor) else torch.as_tensor(np.asarray(values))
    return out if out.is_floating_point() else out.to(torch.float64)
