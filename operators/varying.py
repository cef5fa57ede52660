"""Blur that varies over the image, and blur seen through a camera's response."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from invdiff.errors import InvdiffError
from invdiff.operator import LinearOperator, Operator
from invdiff.operators import _convolve as convolve
from invdiff.operators._parameters import ParametricOperator, as_parameter, as_space
from invdiff.operators.blur import Blur, as_kernels
from invdiff.spaces import Space


class SpaceVaryingBlur(ParametricOperator):
    """``A x = sum_i k_i * (w_i x)``: product-convolution, each window ``w_i`` spread by its own kernel ``k_i``.

    With windows that sum to 1 everywhere and kernels of unit sum, the light of every pixel is spread by the
    mixture of kernels at that pixel. The sum is taken in the Fourier domain: one transform per kernel, one back.

    Args:
        kernels: Real ``(I, ky, kx)``, origin at ``size // 2``; at most as large as the image.
        windows: Real ``(I, y, x)``.
        shape: Shape ``(channel, y, x)`` (or ``(y, x)``) of one image, or its whole Space.
        boundary: "circular", "reflect", "zero" or "valid"; see `Blur`.
        dtype: Precision, and real or complex; that of the Space, or float32.
        units: Units of the image.
        spacing: Distance between neighbours, per named dimension.

    Raises:
        InvdiffError: If kernels or windows are complex, a kernel is zero everywhere or larger than the image, or
            the windows are not as many and as large.
    """

    def __init__(
        self,
        kernels: Any,
        windows: Any,
        shape: Space | Sequence[int],
        *,
        boundary: str = "circular",
        dtype: torch.dtype | None = None,
        units: str | None = None,
        spacing: Mapping[str, float] | None = None,
    ) -> None:
        self.domain = as_space(shape, dtype, units, spacing)
        values = as_kernels(kernels, self.domain)
        shapes = as_parameter(windows, "The windows")
        if shapes.is_complex() or shapes.shape != (len(values), *self.domain.shape[-2:]):
            raise InvdiffError(
                f"The windows need one real image of {self.domain.shape[-2:]} for each of {len(values)} kernels, "
                f"got shape {tuple(shapes.shape)} and dtype {shapes.dtype}."
            )
        self.windows = shapes.to(self.domain.real_dtype)
        # One row per kernel: the products are blurred as if they were cases, and then summed.
        self.blur = Blur(values, self.domain, boundary=boundary, method="fft")
        self.range = self.blur.range
        super().__init__()

    def _forward(self, x: Tensor) -> Tensor:
        x = self._enter(x, self.domain)
        products = x[:, None] * self._over_channels(self.windows)
        if self.blur.boundary != "circular":
            products = convolve.extend(products, self.blur._sizes, self.blur.boundary)
        return self.blur.crop(self._mix(products, self.blur._transfer))

    def _mix(self, products: Tensor, h: Tensor) -> Tensor:
        """Return ``sum_i F^-1 h_i F p_i`` for ``(B, I, ..., y, x)``."""
        lengths = self.blur.lengths
        if not products.numel():
            return products.new_zeros(0, *products.shape[2:-2], *lengths)
        if products.is_complex():
            return torch.fft.ifft2((torch.fft.fft2(products, s=lengths) * h).sum(1))
        return torch.fft.irfft2((torch.fft.rfft2(products, s=lengths) * h).sum(1), s=lengths)

    def _adjoint(self, y: Tensor) -> Tensor:
        y, h = self.blur.uncrop(self._enter(y, self.range)), self.blur._transfer.conj()
        if not y.numel():
            return y.new_zeros(0, *self.domain.shape)
        lengths = self.blur.lengths
        if y.is_complex():
            spread = torch.fft.ifft2(torch.fft.fft2(y, s=lengths)[:, None] * h)
        else:
            spread = torch.fft.irfft2(torch.fft.rfft2(y, s=lengths)[:, None] * h, s=lengths)
        return (self.blur.refold(spread) * self._over_channels(self.windows)).sum(1)

    def _over_channels(self, values: Tensor) -> Tensor:
        return values.reshape(len(values), *([1] * (len(self.domain.shape) - 2)), *values.shape[-2:])


class NonlinearBlur(Operator):
    """``y = g(B g^-1(x))``: light is blurred, and images are the light as a camera's response ``g`` shows it.

    ``g^-1(x) = sign(x) ((|x| + a)^gamma - a^gamma)`` turns values into light, ``g`` is its inverse, and ``B`` any
    blur. With a ``B`` that mixes kernels, this is the usual synthetic model of motion blur: frames are averaged
    in linear light and then shown. The offset ``a`` keeps the slope of ``g`` finite at 0, and both functions are
    odd, so that images may stray below 0. Constant images are kept by kernels of unit sum.

    It is not the neural blur of the benchmarks, an encoder and decoder trained on recorded video (GOPRO), whose
    weights and licence are their authors' own; figures for one say nothing about the other.

    Args:
        blur: Linear operator ``B`` on real images, such as `Blur` or `SpaceVaryingBlur`.
        gamma: Exponent of the response, at least 1; 2.2 is near that of sRGB.
        offset: The number ``a`` above 0; 0.055 is that of sRGB.

    Raises:
        InvdiffError: If the blur is no linear operator on real images, or a number is out of range.
    """

    def __init__(self, blur: LinearOperator, gamma: float = 2.2, offset: float = 0.055) -> None:
        if not isinstance(blur, LinearOperator) or blur.domain.is_complex or blur.range.is_complex:
            raise InvdiffError("NonlinearBlur takes a linear operator between real images, such as Blur.")
        if not (math.isfinite(gamma) and gamma >= 1):
            raise InvdiffError(f"The exponent gamma of NonlinearBlur must be at least 1, got {gamma!r:.60}.")
        if not (math.isfinite(offset) and offset > 0):
            raise InvdiffError(f"The offset of NonlinearBlur must be above 0, got {offset!r:.60}.")
        self.blur, self.gamma, self.offset = blur, float(gamma), float(offset)
        self.domain, self.range = blur.domain, blur.range

    @property
    def n_cases(self) -> int | None:
        """Cases of the blur."""
        return self.blur.n_cases

    def rows(self, index: Tensor) -> NonlinearBlur:
        """Pick the parameters of the blur."""
        return NonlinearBlur(self.blur.rows(index), self.gamma, self.offset)

    def _light(self, x: Tensor) -> Tensor:
        x = x.to(self.domain.dtype)
        return torch.sgn(x) * ((x.abs() + self.offset) ** self.gamma - self.offset**self.gamma)

    def _shown(self, u: Tensor) -> Tensor:
        return torch.sgn(u) * ((u.abs() + self.offset**self.gamma) ** (1 / self.gamma) - self.offset)

    def _forward(self, x: Tensor) -> Tensor:
        return self._shown(self.blur(self._light(x)))

    def vjp(self, x: Tensor, v: Tensor) -> Tensor:
        """Return ``(g^-1)'(x) B^T (g'(u) v)`` with ``u = B g^-1(x)``."""
        self.domain.check(x, f"Point of the vjp of {self.name}")
        self.range.check(v, f"Input of the vjp of {self.name}")
        lit, shown = self._slopes(x)
        return lit * self.blur.adjoint(shown * v.to(self.range.dtype))

    def jvp(self, x: Tensor, dx: Tensor) -> Tensor:
        """Return ``g'(u) B ((g^-1)'(x) dx)``."""
        self.domain.check(dx, f"Input of the jvp of {self.name}")
        lit, shown = self._slopes(x)
        return shown * self.blur(lit * dx.to(self.domain.dtype))

    def _slopes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``(g^-1)'(x)`` and ``g'(u)``."""
        u = self.blur(self._light(x))
        lit = self.gamma * (x.to(self.domain.dtype).abs() + self.offset) ** (self.gamma - 1)
        shown = (u.abs() + self.offset**self.gamma) ** (1 / self.gamma - 1) / self.gamma
        return lit, shown


def windows(shape: Sequence[int], grid: Sequence[int]) -> Tensor:
    """Return smooth windows ``(gy * gx, y, x)`` on a grid of centres that sum to 1 in every pixel.

    Each is the product of two hat functions, 1 at its own centre and 0 at the next ones, and constant beyond the
    outermost centres.

    Args:
        shape: Size ``(y, x)`` of the image.
        grid: Number of windows along y and x, each at least 1 and at most as many as pixels.

    Raises:
        InvdiffError: If shape or grid are no two whole numbers in that range.
    """
    if len(shape) != 2 or len(grid) != 2 or any(not 1 <= g <= n for g, n in zip(grid, shape)):
        raise InvdiffError(f"Windows need a size (y, x) and a grid of at most as many, got {shape} and {grid}.")
    hats = []
    for n, g in zip(shape, grid):
        at = (torch.arange(n, dtype=torch.float64) + 0.5) * g / n - 0.5
        hats.append((1 - (at.clamp(0, g - 1) - torch.arange(g, dtype=torch.float64)[:, None]).abs()).clamp_min(0))
    return (hats[0][:, None, :, None] * hats[1][None, :, None, :]).flatten(0, 1).float()
