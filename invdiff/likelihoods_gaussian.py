"""Gaussian noise, independent and correlated."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from invdiff.errors import InvdiffError
from invdiff.likelihood import Likelihood, positive, quadratic, real_count
from invdiff.operator import LinearOperator
from invdiff.rng import Streams
from invdiff.spaces import Space
from invdiff.tensors import take_rows


class Gaussian(Likelihood):
    """Independent Gaussian noise, ``y = z + sigma * eps`` with ``sigma`` per real component.

    ``log p = -||y - z||^2 / (2 sigma^2) - (m / 2) log(2 pi sigma^2)`` with ``m`` real components.

    Args:
        sigma: Noise level in units of ``y``: a number, or an array ``(1 or N, ...)`` over ``(N, *range)``.
    """

    shift_invariant = True

    def __init__(self, sigma: float | Tensor) -> None:
        self.sigma = positive(sigma, "The Gaussian noise level sigma")

    def _sigma(self, z: Tensor) -> Tensor:
        return self.sigma.to(z.device, z.real.dtype if z.is_complex() else z.dtype)

    def sample(self, z: Tensor, rng: Streams) -> Tensor:
        """Return ``z + sigma * eps``."""
        return z + self._sigma(z) * rng.normal(z)

    def log_prob(self, z: Tensor, y: Tensor) -> Tensor:
        """Return the normalised log-density, ``(B,)``."""
        sigma = self._sigma(z)
        m = real_count(z)
        per_element = 2 if z.is_complex() else 1
        if sigma.ndim == 0:
            log_norm = m * (torch.log(sigma) + 0.5 * math.log(2 * math.pi))
        else:
            log_norm = per_element * sigma.log().expand(z.shape).flatten(1).sum(1)
            log_norm = log_norm + 0.5 * m * math.log(2 * math.pi)
        return -0.5 * quadratic((y - z) / sigma) - log_norm

    def score(self, z: Tensor, y: Tensor) -> Tensor:
        """Return ``(y - z) / sigma^2``."""
        return (y - z) / self._sigma(z) ** 2

    def gaussian_sigma(self, z: Tensor) -> Tensor | None:
        """Return ``sigma`` itself: the surrogate is exact."""
        return self._sigma(z)


class CorrelatedGaussian(Likelihood):
    """Correlated Gaussian noise, ``y = z + L eps`` with ``C = L L^H`` per real component.

    ``log p = -||L^-1 (y - z)||^2 / 2 - sum log diag L - (m / 2) log 2 pi`` over the ``m`` real components.
    Complex noise is circular: ``eps`` has unit variance per real component, so that ``E n n^H = 2 C``, and
    ``C = sigma^2 I`` is `Gaussian` with ``sigma``. From a noise scan with samples ``n``, ``C = mean(n n^H) / 2``.

    Args:
        covariance: ``C``, Hermitian and positive definite: ``(k, k)``, or ``(1 or N, k, k)`` per case, with
            ``k`` the size of ``axis`` or, without one, of the flattened data.
        space: Range of the operator.
        axis: Name or number (without the row axis) of the axis of ``space`` that the noise is correlated
            across, e.g. ``"coil"``; noise is independent along the others. None correlates all data.

    Raises:
        InvdiffError: If the axis is unknown, or the matrix has the wrong size or is no covariance.
    """

    shift_invariant = True

    def __init__(self, covariance: Tensor, space: Space, axis: int | str | None = None) -> None:
        self.space, self.axis = space, _axis_number(space, axis)
        k = space.size if self.axis is None else space.shape[self.axis]
        c = torch.as_tensor(covariance)
        c = c[None] if c.ndim == 2 else c
        if c.ndim != 3 or tuple(c.shape[1:]) != (k, k):
            raise InvdiffError(
                f"The noise covariance has shape {tuple(c.shape)}, expected ({k}, {k}) for {space}."
            )
        if c.is_complex() and not space.is_complex:
            raise InvdiffError("The noise covariance is complex and the data are real; take its real part.")
        c = c.to(torch.complex128 if c.is_complex() else torch.float64)
        if not bool(torch.isfinite(c).all()) or float((c - c.mH).abs().max()) > 1e-5 * float(c.abs().max()):
            raise InvdiffError("The noise covariance must be finite and Hermitian.")
        factor, info = torch.linalg.cholesky_ex(0.5 * (c + c.mH))
        if bool(info.any()):
            raise InvdiffError("The noise covariance must be positive definite; drop dead channels first.")
        eye = torch.eye(k, dtype=c.dtype).expand_as(c)
        self.factor = factor
        self.inverse = torch.linalg.solve_triangular(factor, eye, upper=False)

    def sample(self, z: Tensor, rng: Streams) -> Tensor:
        """Return ``z + L eps``."""
        return z + _across(self.factor, rng.normal(z), self.axis)

    def _whitened(self, z: Tensor, y: Tensor) -> Tensor:
        return _across(self.inverse, y - z, self.axis)

    def log_prob(self, z: Tensor, y: Tensor) -> Tensor:
        """Return the normalised log-density, ``(B,)``."""
        m = real_count(z)
        log_diagonal = self.factor.diagonal(dim1=1, dim2=2).abs().log().sum(1)
        log_norm = (
            m / self.factor.shape[-1] * log_diagonal.to(z.device, z.real.dtype if z.is_complex() else z.dtype)
        )
        return -0.5 * quadratic(self._whitened(z, y)) - log_norm - 0.5 * m * math.log(2 * math.pi)

    def score(self, z: Tensor, y: Tensor) -> Tensor:
        """Return ``C^-1 (y - z)``."""
        return _across(self.inverse.mH, self._whitened(z, y), self.axis)

    def whiten(self) -> LinearOperator | None:
        """Return ``L^-1`` on the data."""
        return Whitening(self.inverse, self.space, self.axis)


class Whitening(LinearOperator):
    """``W = L^-1`` across one axis of the data, or all of them flattened; noise has unit level after it.

    Args:
        matrix: ``L^-1``, ``(1 or N, k, k)``.
        space: Range of the forward operator.
        axis: Number of the axis, or None for flattened data.
    """

    def __init__(self, matrix: Tensor, space: Space, axis: int | None) -> None:
        self.matrix, self.axis = matrix, axis
        self.domain = self.range = space

    @property
    def n_cases(self) -> int | None:
        """Cases that the matrix is given for."""
        return self.matrix.shape[0] if self.matrix.shape[0] > 1 else None

    def rows(self, index: Tensor) -> LinearOperator:
        """Pick the matrices of the given cases."""
        return Whitening(take_rows(self.matrix, index), self.range, self.axis)

    def _forward(self, x: Tensor) -> Tensor:
        return _across(self.matrix, x, self.axis)

    def _adjoint(self, y: Tensor) -> Tensor:
        return _across(self.matrix.mH, y, self.axis)


def _axis_number(space: Space, axis: int | str | None) -> int | None:
    if isinstance(axis, str):
        if axis not in space.dims:
            raise InvdiffError(f"The data have no axis {axis!r}; there are {space.dims}.")
        return space.dims.index(axis)
    if axis is not None and not -len(space.shape) <= axis < len(space.shape):
        raise InvdiffError(f"The data have {len(space.shape)} axes, and axis {axis} is not among them.")
    return None if axis is None else axis % len(space.shape)


def _across(matrix: Tensor, x: Tensor, axis: int | None) -> Tensor:
    """Multiply along one axis of ``(B, ...)``, or along everything but rows; ``matrix`` is ``(1 or B, k, k)``."""
    real = x.real.dtype if x.is_complex() else x.dtype
    m = matrix.to(x.device, x.dtype if matrix.is_complex() or x.is_complex() else real)
    if axis is None:
        return (m @ x.flatten(1)[..., None])[..., 0].reshape(x.shape)
    moved = x.movedim(axis + 1, 1)
    return (m @ moved.flatten(2)).reshape(moved.shape).movedim(1, axis + 1)
