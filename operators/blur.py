"""Circular blur: multiplication in the Fourier domain."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from invdiff.errors import InvdiffError
from invdiff.operator import SVD, apply_linear
from invdiff.operators._fft import AXES, centred_fft, centred_ifft, hartley
from invdiff.operators._parameters import as_parameter, as_space
from invdiff.operators._spectral import SpectralOperator, cut_small
from invdiff.spaces import Space


class Blur(SpectralOperator):
    """``(A x)[n] = sum_j k[j] x[n - j]`` with a real kernel and periodic boundary, channel by channel.

    The kernel's origin is its element ``size // 2``; it is used as given, not normalised. With the transfer
    function ``h = |h| exp(i phi)``, ``A = U |h| V^H`` where ``V^H`` is the Fourier transform (Hartley for real
    images, which keeps the coordinates real) and ``U`` is ``V`` followed by the all-pass filter
    ``exp(i phi)``. Frequencies with ``|h|`` below rounding count as lost.

    Args:
        kernel: ``(ky, kx)``, or ``(N, ky, kx)`` for one kernel per case; at most as large as the image.
        shape: Shape ``(channel, y, x)`` (or ``(y, x)``) of one image, or its whole Space.
        dtype: Precision, and real or complex; that of the Space, or float32.
        units: Units of the image.
        spacing: Distance between neighbours, per named dimension.

    Raises:
        InvdiffError: If the kernel is complex, not finite, all zero, of another rank, or larger than the image.
    """

    _per_case = ("kernel",)

    def __init__(
        self,
        kernel: Any,
        shape: Space | Sequence[int],
        *,
        dtype: torch.dtype | None = None,
        units: str | None = None,
        spacing: Mapping[str, float] | None = None,
    ) -> None:
        self.domain = self.range = as_space(shape, dtype, units, spacing)
        if len(self.domain.shape) < 2:
            raise InvdiffError(f"A blur needs images of at least two axes (y, x), got shape {self.domain.shape}.")
        values = as_parameter(kernel, "The blur kernel")
        if values.is_complex() or values.ndim not in (2, 3) or not values.numel():
            raise InvdiffError(
                f"The blur kernel has shape {tuple(values.shape)} and dtype {values.dtype}, "
                "expected real (ky, kx) or (cases, ky, kx)."
            )
        if any(k > n for k, n in zip(values.shape[-2:], self.domain.shape[-2:])):
            raise InvdiffError(
                f"The blur kernel {tuple(values.shape[-2:])} is larger than the image {self.domain.shape[-2:]}."
            )
        values = values if values.ndim == 3 else values[None]
        if bool((values == 0).flatten(1).all(1).any()):
            raise InvdiffError("The blur kernel is zero everywhere; give one with a non-zero value.")
        self.kernel = values.to(self.domain.real_dtype)
        super().__init__()

    def _forward(self, x: Tensor) -> Tensor:
        return self._filter(x, _transfer(self))

    def _adjoint(self, y: Tensor) -> Tensor:
        return self._filter(y, _transfer(self).conj())

    def normal(self, x: Tensor) -> Tensor:
        """Return ``F^H |h|^2 F x``: one pair of FFTs."""
        self.domain.check(x, f"Input of the normal operator of {self.name}")
        return apply_linear(x, self._normal, self._normal)

    def _normal(self, x: Tensor) -> Tensor:
        return self._filter(x, _transfer(self).abs().square())

    def _filter(self, x: Tensor, h: Tensor) -> Tensor:
        """Multiply the spectrum by ``h``, which is half a spectrum for real images."""
        x = self._enter(x, self.domain)
        if not x.numel():  # some builds of torch refuse to transform no rows
            return x
        h = h.reshape(h.shape[0], *([1] * (x.ndim - 3)), *h.shape[-2:])
        if self.domain.is_complex:
            return torch.fft.ifft2(torch.fft.fft2(x) * h)
        return torch.fft.irfft2(torch.fft.rfft2(x) * h, s=self.domain.shape[-2:])

    def svd(self) -> SVD:
        """Return the decomposition in centred frequencies of the shape of the domain."""
        s, phase = self._derived(_polar)
        s = s.reshape(s.shape[0], *([1] * (len(self.domain.shape) - 2)), *s.shape[-2:])
        seen = s > 0
        forward, back = (centred_fft, centred_ifft) if self.domain.is_complex else (hartley, hartley)
        return SVD(
            s=s.expand(s.shape[0], *self.domain.shape),
            vh=forward,
            v=back,
            uh=lambda y: forward(self._filter(y, phase.conj())) * seen,
            u=lambda c: self._filter(back(c * seen), phase),
        )


class GaussianBlur(Blur):
    """Circular blur by a Gaussian of unit sum, summed over the periods of the image.

    Args:
        std: Standard deviation in pixels, one number or ``(std_y, std_x)``.
        shape: Shape ``(channel, y, x)`` (or ``(y, x)``) of one image, or its whole Space.
        dtype: Precision, and real or complex; that of the Space, or float32.
        units: Units of the image.
        spacing: Distance between neighbours, per named dimension.

    Raises:
        InvdiffError: If a standard deviation is not positive and finite.
    """

    def __init__(
        self,
        std: float | Sequence[float],
        shape: Space | Sequence[int],
        *,
        dtype: torch.dtype | None = None,
        units: str | None = None,
        spacing: Mapping[str, float] | None = None,
    ) -> None:
        space = as_space(shape, dtype, units, spacing)
        stds = as_parameter(std, "The blur's standard deviation").flatten().tolist()
        stds = stds * 2 if len(stds) == 1 else stds
        if len(stds) != 2 or not all(math.isfinite(v) and v > 0 for v in stds):
            raise InvdiffError(
                f"The blur's standard deviation must be one or two positive numbers, got {std!r:.60}."
            )
        if len(space.shape) < 2:
            raise InvdiffError(f"A blur needs images of at least two axes (y, x), got shape {space.shape}.")
        ky, kx = (_periodic_gaussian(v, n) for v, n in zip(stds, space.shape[-2:]))
        super().__init__(ky[:, None] * kx, space)


def _periodic_gaussian(std: float, n: int) -> Tensor:
    """Return a Gaussian on ``n`` pixels, origin at ``n // 2``, summed over its periods, of unit sum."""
    periods = torch.arange(-math.ceil(9 * std / n) - 1, math.ceil(9 * std / n) + 2, dtype=torch.float64)
    offset = torch.arange(n, dtype=torch.float64) - n // 2
    values = torch.exp(-0.5 * ((offset[:, None] + n * periods) / std) ** 2).sum(1)
    return values / values.sum()


def _embed(operator: Blur) -> Tensor:
    """Return the kernels in double precision on the grid of the image, origin at index (0, 0)."""
    kernel = operator.kernel.double()
    grid = kernel.new_zeros(kernel.shape[0], *operator.domain.shape[-2:])
    ky, kx = kernel.shape[-2:]
    grid[:, :ky, :kx] = kernel
    return grid.roll((-(ky // 2), -(kx // 2)), AXES)


def _half_or_full(operator: Blur) -> tuple[Tensor]:
    """Return the transfer function, half of it for real images, ``(1 or N, y, x or x // 2 + 1)``."""
    transform = torch.fft.fft2 if operator.domain.is_complex else torch.fft.rfft2
    return (transform(_embed(operator)).to(operator.domain.real_dtype.to_complex()),)


def _transfer(operator: Blur) -> Tensor:
    return operator._derived(_half_or_full)[0]


def _polar(operator: Blur) -> tuple[Tensor, Tensor]:
    """Return ``|h|`` in centred order, and the phase factor of the transfer function as ``_filter`` takes it."""
    (h,) = operator._derived(_half_or_full)
    size = math.prod(operator.domain.shape[-2:])
    full = torch.fft.fft2(_embed(operator)).abs().to(operator.domain.real_dtype)
    phase = torch.where(h.abs() > 0, torch.sgn(h), torch.ones_like(h))
    return torch.fft.fftshift(cut_small(full, round(size**0.5)), AXES), phase
