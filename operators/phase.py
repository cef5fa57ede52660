"""Phase retrieval: magnitudes of Fourier transforms, plain or behind coded masks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from invdiff.errors import InvdiffError
from invdiff.operator import Operator
from invdiff.operators._convolve import row_blocks
from invdiff.operators._fft import AXES, centred_fft, centred_ifft
from invdiff.operators._magnitude import Detected
from invdiff.operators._parameters import ParametricOperator, as_parameter, as_space
from invdiff.spaces import Space

_PADDINGS = {"black": 0.0, "grey": 0.5}


class FourierMagnitude(Operator):
    """``y = |F P x|``: the centred orthonormal FFT of the image on a larger, uniform canvas, channel by channel.

    A larger canvas samples the spectrum more densely. "black" fills it with 0 and "grey" with 0.5, the middle of
    images in [0, 1]; for images in [-1, 1] these are the numbers -1 and 0, so give the number. Shifts, inversion
    and a global sign of ``x - fill`` leave ``y`` unchanged up to what the fill and the support fix.

    Of real images half the spectrum is computed and mirrored. Derivatives are closed forms of one transform
    each way; where a magnitude is 0 its derivative is taken as 0.

    Args:
        shape: Shape ``(channel, y, x)`` (or ``(y, x)``) of one image, or its whole Space.
        oversampling: Size of the canvas over that of the image, per axis, at least 1; 2 determines most images,
            and 1.5 is usual in benchmarks (256 on 384).
        padding: "black", "grey", or the number that fills the canvas.
        dtype: Precision, and real or complex; that of the Space, or float32.
        units: Units of the image.
        spacing: Distance between neighbours, per named dimension.

    Raises:
        InvdiffError: If the oversampling is below 1 or the padding has another name.
    """

    def __init__(
        self,
        shape: Space | Sequence[int],
        oversampling: float = 2.0,
        padding: str | float = "black",
        *,
        dtype: torch.dtype | None = None,
        units: str | None = None,
        spacing: Mapping[str, float] | None = None,
    ) -> None:
        self.domain = as_space(shape, dtype, units, spacing)
        if len(self.domain.shape) < 2:
            raise InvdiffError(f"Phase retrieval needs images of two axes (y, x), got shape {self.domain.shape}.")
        if not (math.isfinite(oversampling) and oversampling >= 1):
            raise InvdiffError(f"The oversampling must be a number of at least 1, got {oversampling!r:.60}.")
        if isinstance(padding, str) and padding not in _PADDINGS:
            raise InvdiffError(f"The padding is 'black', 'grey' or a number, got {padding!r:.60}.")
        self.fill = _PADDINGS[padding] if isinstance(padding, str) else float(padding)
        self.canvas = tuple(round(oversampling * n) for n in self.domain.shape[-2:])
        self.range = self.domain.replace(
            shape=(*self.domain.shape[:-2], *self.canvas),
            dtype=self.domain.real_dtype,
            dims=(*self.domain.dims[:-2], "ky", "kx"),
            spacing={},
        )

    def _spectrum(self, x: Tensor, fill: float) -> Tensor:
        """Return the transform of the canvas, half of it for real images, zero frequency first.

        The canvas minus its fill is zero outside the image, so the fill adds to the zero frequency alone.
        """
        x = x.to(self.domain.dtype)
        if not x.numel():
            half = self.canvas[1] if x.is_complex() else self.canvas[1] // 2 + 1
            return x.new_zeros(*x.shape[:-2], self.canvas[0], half, dtype=self.domain.real_dtype.to_complex())
        transform = torch.fft.fft2 if x.is_complex() else torch.fft.rfft2
        k = transform(x - fill if fill else x, s=self.canvas, norm="ortho")
        if fill:
            k[..., 0, 0] += fill * math.sqrt(self.canvas[0] * self.canvas[1])
        return k

    def _whole(self, half: Tensor) -> Tensor:
        """Return a centred, symmetric spectrum from what `_spectrum` computes."""
        if self.domain.is_complex:
            return torch.fft.fftshift(half, AXES)
        if not half.numel():
            return half.new_zeros(*half.shape[:-2], *self.canvas)
        c, d = self.canvas[0] // 2, self.canvas[1] // 2
        right = half[..., : self.canvas[1] - d]
        right = torch.cat([right[..., self.canvas[0] - c :, :], right[..., : self.canvas[0] - c, :]], -2)
        left = half[..., 1 : d + 1].flip(AXES)  # the frequency at (-ky, -kx)
        top = self.canvas[0] - 1 - c
        return torch.cat([torch.cat([left[..., top:, :], left[..., :top, :]], -2), right], -1)

    def _half(self, v: Tensor) -> Tensor:
        """Return the mean of ``v(k)`` and ``v(-k)`` where `_spectrum` computes, of a centred spectrum."""
        if self.domain.is_complex:
            return torch.fft.ifftshift(v, AXES)
        c, d = self.canvas[0] // 2, self.canvas[1] // 2
        there = torch.cat([v[..., d:], v[..., : 1 - self.canvas[1] % 2]], -1)
        there = torch.cat([there[..., c:, :], there[..., :c, :]], -2)
        back = v[..., : d + 1].flip(AXES)
        top = self.canvas[0] - 1 - c
        return 0.5 * (there + torch.cat([back[..., top:, :], back[..., :top, :]], -2))

    def _forward(self, x: Tensor) -> Tensor:
        return self._whole(self._spectrum(x, self.fill).abs())

    def vjp(self, x: Tensor, v: Tensor) -> Tensor:
        """Return ``J(x)^H v = P^T F^H (v u / |u|)`` with ``u = F P x``: two transforms."""
        self.domain.check(x, f"Point of the vjp of {self.name}")
        self.range.check(v, f"Input of the vjp of {self.name}")
        if not x.numel():
            return x.to(self.domain.dtype)
        return torch.cat([self._back(x[b], v[b]) for b in row_blocks(x, self.range.size)])

    def _back(self, x: Tensor, v: Tensor) -> Tensor:
        k = torch.sgn(self._spectrum(x, self.fill)) * self._half(v.to(self.range.dtype))
        transform = torch.fft.ifft2 if self.domain.is_complex else torch.fft.irfft2
        out = transform(k, s=self.canvas, norm="ortho")
        return out[..., : self.domain.shape[-2], : self.domain.shape[-1]]

    def jvp(self, x: Tensor, dx: Tensor) -> Tensor:
        """Return ``J(x) dx = Re(conj(u / |u|) F P dx)``."""
        self.domain.check(x, f"Point of the jvp of {self.name}")
        self.domain.check(dx, f"Input of the jvp of {self.name}")
        direction = torch.sgn(self._spectrum(x, self.fill))
        return self._whole((direction.conj() * self._spectrum(dx, 0.0)).real)


class CodedDiffraction(Detected):
    """``y_l = |F (m_l x)|`` or its square: diffraction patterns behind known masks ``m_l``.

    Args:
        masks: Real or complex ``(pattern, y, x)``, or ``(N, pattern, y, x)`` with masks per case;
            `operators.masks.phases` draws some.
        dtype: ``complex64`` or ``complex128`` for complex images, a real dtype for real ones; by default complex,
            in the precision of the masks.
        quantity: "amplitude" or "intensity".
        units: Units of the image.
        spacing: Distance between neighbours, per named dimension.

    Raises:
        InvdiffError: If there are no patterns, the masks have another rank, or a case has only zeros.
    """

    def __init__(
        self,
        masks: Any,
        *,
        dtype: torch.dtype | None = None,
        quantity: str = "amplitude",
        units: str | None = None,
        spacing: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(CodedField(masks, dtype=dtype, units=units, spacing=spacing), quantity)


class CodedField(ParametricOperator):
    """``u_l = F (m_l x)``: centred orthonormal spectra behind masks, ``(1, y, x) -> (pattern, ky, kx)``.

    ``A^H A = sum_l |m_l|^2`` is diagonal. See `CodedDiffraction` for the arguments.
    """

    _per_case = ("masks",)

    def __init__(
        self,
        masks: Any,
        *,
        dtype: torch.dtype | None = None,
        units: str | None = None,
        spacing: Mapping[str, float] | None = None,
    ) -> None:
        values = as_parameter(masks, "The diffraction masks")
        if values.ndim not in (3, 4) or not values.numel():
            raise InvdiffError(
                f"Diffraction masks have the shape (pattern, y, x) or (cases, pattern, y, x) with at least one "
                f"pattern, got {tuple(values.shape)}."
            )
        values = values if values.ndim == 4 else values[None]
        if not bool((values != 0).flatten(1).any(1).all()):
            raise InvdiffError("The diffraction masks of a case are zero everywhere; a measurement needs light.")
        dtype = values.dtype.to_complex() if dtype is None else dtype
        self.domain = as_space((1, *values.shape[2:]), dtype, units, spacing)
        self.range = Space(
            tuple(values.shape[1:]),
            self.domain.real_dtype.to_complex(),
            ("pattern", "ky", "kx"),
            self.domain.units,
        )
        self.masks = values.to(self.range.dtype)
        super().__init__()

    def _forward(self, x: Tensor) -> Tensor:
        return centred_fft(self._enter(x, self.domain) * self.masks)

    def _adjoint(self, y: Tensor) -> Tensor:
        out = (centred_ifft(self._enter(y, self.range)) * self.masks.conj()).sum(1, keepdim=True)
        return out if self.domain.is_complex else out.real

    def normal(self, x: Tensor) -> Tensor:
        """Return ``sum_l |m_l|^2 x``."""
        self.domain.check(x, f"Input of the normal operator of {self.name}")
        return self._enter(x, self.domain) * self.masks.abs().square().sum(1, keepdim=True)
