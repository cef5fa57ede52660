"""Super-resolution: images seen at a lower resolution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from invdiff.errors import InvdiffError
from invdiff.operator import SVD
from invdiff.operators import _separable as separable
from invdiff.operators._fft import AXES, centred_fft, centred_ifft, hartley
from invdiff.operators._parameters import as_space
from invdiff.operators._spectral import CLOSED_FORMS, SpectralOperator, cut_small, over
from invdiff.operators.blur import Blur, embed, require
from invdiff.spaces import Space

KINDS = ("bicubic", "average", "blur")


class Downsampling(SpectralOperator):
    """One pixel out of ``factor`` by ``factor``, channel by channel.

    * "bicubic": ``A x = R_y x R_x^T`` with the antialiased cubic weights
      ``R[i, j] ~ c((j + 1/2) / f - i - 1/2)`` of unit row sum, ``c`` the cubic of Keys with ``a = -1/2``; what
      ``torch.nn.functional.interpolate(mode="bicubic", antialias=True)`` and Pillow compute.
    * "average": the same with the mean over ``factor`` pixels.
    * "blur": periodic convolution with a kernel, then pixels 0, ``factor``, 2 ``factor``, ... In the Fourier
      domain every low frequency sees a block of ``factor^2`` aliases, so ``A A^H`` is a filter with the transfer
      function ``s^2 = sum |h|^2 / factor^2`` over the block.

    All have a decomposition in as many coordinates as there are data, hence exact closed forms.

    Args:
        factor: Whole number, or ``(factor_y, factor_x)``; it divides the size of the image.
        shape: Shape ``(channel, y, x)`` (or ``(y, x)``) of one image, or its whole Space.
        kind: "bicubic", "average" or "blur".
        kernel: Kernel ``(ky, kx)`` of the kind "blur", origin at ``size // 2``.
        dtype: Precision, and real or complex; that of the Space, or float32.
        units: Units of the image.
        spacing: Distance between neighbours, per named dimension; of the range it is ``factor`` times that.

    Raises:
        InvdiffError: If the factor is no whole number of at least 1 or does not divide the size, or a kernel is
            missing or given without use.
    """

    def __init__(
        self,
        factor: int | Sequence[int],
        shape: Space | Sequence[int],
        kind: str = "bicubic",
        *,
        kernel: Any = None,
        dtype: torch.dtype | None = None,
        units: str | None = None,
        spacing: Mapping[str, float] | None = None,
    ) -> None:
        self.domain = as_space(shape, dtype, units, spacing)
        self.kind = require("kind of downsampling", kind, KINDS)
        self.factor = _factors_of(factor, self.domain)
        if (kernel is None) == (kind == "blur"):
            raise InvdiffError("Downsampling takes a kernel for the kind 'blur', and for that kind alone.")
        small = tuple(n // f for n, f in zip(self.domain.shape[-2:], self.factor))
        coarse = {d: f * self.domain.spacing[d] for d, f in self._axes() if d in self.domain.spacing}
        self.range = self.domain.replace(
            shape=(*self.domain.shape[:-2], *small), spacing={**self.domain.spacing, **coarse}
        )
        if kernel is not None:
            self.blur = Blur(kernel, self.domain)
            if self.blur.n_cases is not None:
                raise InvdiffError("Downsampling takes one kernel (ky, kx) for all cases.")
        else:
            real = self.domain.real_dtype
            self.rows_y, self.rows_x = (_ROWS[kind](n, f)[None].to(real) for n, f in self._lengths)
        super().__init__()

    def _axes(self) -> list[tuple[str, int]]:
        return list(zip(self.domain.dims[-2:], self.factor))

    @property
    def _lengths(self) -> list[tuple[int, int]]:
        return list(zip(self.domain.shape[-2:], self.factor))

    @property
    def capabilities(self) -> frozenset[str]:
        """All closed forms, unless the image is too large or the kernel loses a whole block of aliases."""
        if self.kind == "blur":
            whole = bool((self._derived(_alias_gains)[0] > 0).all())
            return self.provides if whole else self.provides - {"svd"}
        small = max(self.domain.shape[-2:]) <= separable.LONGEST
        return self.provides if small else self.provides - CLOSED_FORMS

    def _forward(self, x: Tensor) -> Tensor:
        x = self._enter(x, self.domain)
        if self.kind == "blur":
            fy, fx = self.factor
            return self.blur._forward(x)[..., ::fy, ::fx]
        by, bx = (_blocks(self.kind, n, f)[0] for n, f in self._lengths)
        return separable.multiply(self.rows_y, self.rows_x, x, by, bx)

    def _adjoint(self, y: Tensor) -> Tensor:
        y = self._enter(y, self.range)
        if self.kind == "blur":
            fy, fx = self.factor
            full = y.new_zeros(len(y), *self.domain.shape)
            full[..., ::fy, ::fx] = y
            return self.blur._adjoint(full)
        by, bx = (_blocks(self.kind, n, f)[1] for n, f in self._lengths)
        return separable.multiply(self.rows_y.mT, self.rows_x.mT, y, by, bx)

    def svd(self) -> SVD:
        """Return the decomposition in the shape of the range, in centred frequencies for the kind "blur"."""
        if self.kind != "blur":
            if "svd" not in self.capabilities:
                return super().svd()
            return separable.separable_svd(self._derived(_decomposed), self.domain.shape)
        (gains,) = self._derived(_alias_gains)
        s = gains.expand(1, *self.range.shape)
        inverse = over(torch.ones_like(s), s, s > 0)
        forward, back = (centred_fft, centred_ifft) if self.domain.is_complex else (hartley, hartley)
        return SVD(
            s=s,
            vh=lambda x: inverse * forward(self._forward(x)),
            v=lambda c: self._adjoint(back(inverse * c)),
            uh=lambda y: forward(y) * (s > 0),
            u=lambda c: back(c * (s > 0)),
        )


def _factors_of(factor: int | Sequence[int], space: Space) -> tuple[int, int]:
    """Return the factors along y and x, refusing what does not divide the size."""
    pair = [factor] * 2 if isinstance(factor, (int, float)) else list(factor)
    if len(pair) != 2 or any(isinstance(f, bool) or int(f) != f or f < 1 for f in pair):
        raise InvdiffError(f"A downsampling factor is a whole number of at least 1, or two, got {factor!r:.60}.")
    if len(space.shape) < 2:
        raise InvdiffError(f"Downsampling needs images of at least two axes (y, x), got shape {space.shape}.")
    sizes = space.shape[-2:]
    if any(n % f for n, f in zip(sizes, pair)):
        raise InvdiffError(
            f"The factor {factor} does not divide the image size {sizes}; crop or pad the image to a multiple."
        )
    return int(pair[0]), int(pair[1])


def _mean_rows(n: int, f: int) -> Tensor:
    return torch.eye(n // f, dtype=torch.float64).repeat_interleave(f, 1) / f


def _cubic_rows(n: int, f: int) -> Tensor:
    """Return the matrix ``(n / f, n)`` of antialiased cubic weights; what lies outside the image is left out."""
    centre = torch.arange(n // f, dtype=torch.float64)[:, None] + 0.5
    t = ((torch.arange(n, dtype=torch.float64) + 0.5) / f - centre).abs()
    near = 1.5 * t**3 - 2.5 * t**2 + 1
    far = -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2
    weights = torch.where(t < 1, near, torch.where(t < 2, far, torch.zeros_like(t)))
    return weights / weights.sum(1, keepdim=True)


_ROWS = {"bicubic": _cubic_rows, "average": _mean_rows}


@lru_cache(maxsize=64)
def _blocks(kind: str, n: int, f: int) -> tuple[separable.Blocks, separable.Blocks]:
    """Return the blocks of the matrix of an axis and of its transpose."""
    rows = _ROWS[kind](n, f)
    return separable.split(rows), separable.split(rows.mT)


def _decomposed(operator: Downsampling) -> tuple[Tensor, ...]:
    return separable.decompose(operator.rows_y, operator.rows_x, operator.domain.real_dtype)


def _alias_gains(operator: Downsampling) -> tuple[Tensor]:
    """Return the singular values ``(1, y, x)`` of blurring and decimating, in centred low frequencies."""
    blur, (fy, fx) = operator.blur, operator.factor
    my, mx = operator.range.shape[-2:]
    power = torch.fft.fft2(embed(blur))[0].abs().square().reshape(fy, my, fx, mx).sum((0, 2)) / (fy * fx)
    s = cut_small(power.sqrt().to(operator.domain.real_dtype)[None], my * mx)
    return (torch.fft.fftshift(s, AXES),)
