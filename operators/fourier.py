"""Subsampled Fourier measurements of one image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from invdiff.errors import InvdiffError
from invdiff.operator import SVD, apply_linear
from invdiff.operators._fft import AXES, centred_fft, centred_ifft, fft2, hartley, ifft2, phases, reflect
from invdiff.operators._parameters import as_mask, as_space, fit_mask
from invdiff.operators._spectral import SpectralOperator, over
from invdiff.spaces import Space


class SubsampledFourier(SpectralOperator):
    """``A x = m F x`` with the centred orthonormal FFT over (y, x) and a mask ``m`` in {0, 1}.

    The closed forms hold for every mask. For real images the adjoint ends in a real part, so the normal
    operator ``Re F^H m F`` is diagonal in the real Hartley basis with values ``(m(k) + m(-k)) / 2``: a
    frequency sampled on one side only has the singular value ``sqrt(1/2)``. The zero frequency stands at
    index ``N // 2``.

    Args:
        mask: Zeros and ones in centred order: ``(ky, kx)``, broadcastable to ``(channel, ky, kx)``, or with
            one more leading axis, ``(1 or N, channel or 1, ky, kx)``, for one mask per case.
        shape: Shape ``(channel, y, x)`` or the whole Space; ``(1, ky, kx)`` of the mask by default.
        dtype: complex64 (default), complex128, or a real dtype for real images.
        units: Units of the image.
        spacing: Distance between neighbours, per named dimension.

    Raises:
        InvdiffError: If the mask holds other values than 0 and 1, samples nothing, or does not fit the shape.
    """

    _per_case = ("mask",)

    def __init__(
        self,
        mask: Any,
        shape: Space | Sequence[int] | None = None,
        *,
        dtype: torch.dtype | None = None,
        units: str | None = None,
        spacing: Mapping[str, float] | None = None,
    ) -> None:
        values = as_mask(mask, torch.float32)
        if values.ndim < 2:
            raise InvdiffError(f"The k-space mask has shape {tuple(values.shape)}, expected at least (ky, kx).")
        if dtype is None and not isinstance(shape, Space):
            dtype = torch.complex64
        self.domain = as_space((1, *values.shape[-2:]) if shape is None else shape, dtype, units, spacing)
        if len(self.domain.shape) != 3:
            raise InvdiffError(f"Subsampled Fourier needs images (channel, y, x), got shape {self.domain.shape}.")
        self.range = Space(
            self.domain.shape, self.domain.real_dtype.to_complex(), ("channel", "ky", "kx"), self.domain.units
        )
        self.mask = fit_mask(values, self.domain)
        super().__init__()

    @property
    def support(self) -> Tensor:
        """The mask: data exist where it is 1."""
        return self.mask

    def _forward(self, x: Tensor) -> Tensor:
        before, weights, _ = self._derived(_factors)
        return fft2(self._enter(x, self.domain) * before, norm="ortho") * weights

    def _adjoint(self, y: Tensor) -> Tensor:
        before, weights, _ = self._derived(_factors)
        x = ifft2(self._enter(y, self.range) * weights.conj(), norm="ortho") * before.conj()
        return x if self.domain.is_complex else x.real

    def normal(self, x: Tensor) -> Tensor:
        """Return ``F^H m F x`` (its real part for real images) by two bare FFTs: the centring cancels."""
        self.domain.check(x, f"Input of the normal operator of {self.name}")
        return apply_linear(x, self._normal, self._normal)

    def _normal(self, x: Tensor) -> Tensor:
        _, _, bare = self._derived(_factors)
        out = ifft2(fft2(self._enter(x, self.domain)) * bare)
        return out if self.domain.is_complex else out.real

    def svd(self) -> SVD:
        """Return ``V^H = F`` with ``s = m`` (complex), or ``V^H = Hartley`` with ``s^2 = (m(k) + m(-k)) / 2``."""
        mask = self.mask.expand(self.mask.shape[0], *self.domain.shape)

        def keep(c: Tensor) -> Tensor:
            return c * self.mask

        if self.domain.is_complex:
            return SVD(mask, vh=centred_fft, v=centred_ifft, uh=keep, u=keep)
        s = ((mask + reflect(mask)) / 2).sqrt()
        inverse = over(torch.ones_like(s), s, s > 0)
        return SVD(
            s,
            vh=hartley,
            v=hartley,
            uh=lambda y: hartley(centred_ifft(keep(y)).real) * inverse,
            u=lambda c: keep(centred_fft(hartley(c * inverse))),
        )


def _factors(operator: SubsampledFourier) -> tuple[Tensor, Tensor, Tensor]:
    """Return input phase, mask times output phase, and the mask in the order of a bare FFT."""
    shape = operator.domain.shape[-2:]
    before, after = phases((shape[0], shape[1]), operator.range.dtype, operator.mask.device)
    bare = torch.fft.ifftshift(operator.mask.expand(*operator.mask.shape[:2], *shape), AXES)
    return before[None, None], operator.mask * after, bare
