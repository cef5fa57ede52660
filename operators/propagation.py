"""Free-space propagation of a wave, and in-line holograms."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from invdiff.errors import InvdiffError
from invdiff.operator import SVD, apply_linear
from invdiff.operators._fft import fft2, ifft2
from invdiff.operators._magnitude import Detected
from invdiff.operators._spectral import SpectralOperator, cut_small, over
from invdiff.operators.blur import require
from invdiff.spaces import Space

MODELS = ("angular spectrum", "fresnel")


class FreeSpace(SpectralOperator):
    """``u_d = F^H H_d F x``: a monochromatic wave after each of several distances.

    It maps ``(1, y, x)`` to ``(distance, y, x)``. With the frequency ``f`` and the wavelength ``lam``, the model
    "angular spectrum" has ``H_d = exp(2 pi i d sqrt(lam^-2 - |f|^2))`` for propagating waves and 0 for evanescent
    ones, and "fresnel" its paraxial form ``H_d = exp(2 pi i d / lam) exp(-i pi lam d |f|^2)``. The plane is
    periodic, so the wave should not reach its edge; ``H_d`` is well sampled for distances up to
    ``n pixel^2 / lam``.

    Args:
        shape: Size ``(y, x)`` of the plane.
        wavelength: Wavelength in metres.
        distances: One distance in metres or several, negative ones backwards.
        pixel: Distance between neighbouring pixels in metres.
        model: "angular spectrum" or "fresnel".
        dtype: ``complex64`` or ``complex128``.

    Raises:
        InvdiffError: If a length is not finite, wavelength or pixel are not positive, or there is no distance.
    """

    def __init__(
        self,
        shape: Sequence[int],
        wavelength: float,
        distances: float | Sequence[float],
        pixel: float,
        *,
        model: str = "angular spectrum",
        dtype: torch.dtype = torch.complex64,
    ) -> None:
        if len(shape) != 2:
            raise InvdiffError(f"A wave propagates from a plane of size (y, x), got {tuple(shape)}.")
        values = [distances] if isinstance(distances, (int, float)) else list(distances)
        self.wavelength, self.pixel = length("wavelength", wavelength), length("pixel", pixel)
        self.distances = tuple(length("distance", d, signed=True) for d in values)
        if not self.distances:
            raise InvdiffError("Propagation needs at least one distance in metres.")
        self.model = require("model of propagation", model, MODELS)
        self.domain = plane(shape, pixel, dtype)
        self.range = self.domain.replace(shape=(len(self.distances), *shape), dims=("distance", "y", "x"))
        h = [response(shape, self.wavelength, d, self.pixel, self.model) for d in self.distances]
        self.responses = torch.stack(h)[None].to(dtype)  # (1, distance, y, x)
        super().__init__()

    def _forward(self, x: Tensor) -> Tensor:
        return ifft2(fft2(self._enter(x, self.domain)) * self.responses)

    def _adjoint(self, y: Tensor) -> Tensor:
        return ifft2((fft2(self._enter(y, self.range)) * self.responses.conj()).sum(1, keepdim=True))

    def normal(self, x: Tensor) -> Tensor:
        """Return ``F^H (sum_d |H_d|^2) F x``."""
        self.domain.check(x, f"Input of the normal operator of {self.name}")
        return apply_linear(x, self._normal, self._normal)

    def _normal(self, x: Tensor) -> Tensor:
        s = self.svd().s
        return ifft2(fft2(self._enter(x, self.domain)) * s.square())

    def svd(self) -> SVD:
        """Return the decomposition in frequencies, zero frequency first."""
        h = self.responses
        s = cut_small(h.abs().square().sum(1, keepdim=True).sqrt(), self.domain.size)
        u = over(h, s.to(h.dtype), (s > 0).expand_as(h))
        return SVD(
            s=s,
            vh=lambda x: fft2(x, norm="ortho"),
            v=lambda c: ifft2(c, norm="ortho"),
            uh=lambda y: (fft2(y, norm="ortho") * u.conj()).sum(1, keepdim=True),
            u=lambda c: ifft2(c * u, norm="ortho"),
        )


class InlineHologram(Detected):
    """``y_d = |u_d|^2``: intensity of a plane wave behind an object, after each of several distances.

    The unknown is the object's complex transmission (1 where there is none), ``u_d`` its wave after free
    propagation; see `FreeSpace` for the model and its limits.

    Args:
        shape: Size ``(y, x)`` of the object and the detector.
        wavelength: Wavelength in metres.
        distances: One distance from object to detector in metres, or several.
        pixel: Distance between neighbouring pixels in metres.
        model: "angular spectrum" or "fresnel".
        quantity: "intensity" or "amplitude".
        dtype: ``complex64`` or ``complex128``.
    """

    def __init__(
        self,
        shape: Sequence[int],
        wavelength: float,
        distances: float | Sequence[float],
        pixel: float,
        *,
        model: str = "angular spectrum",
        quantity: str = "intensity",
        dtype: torch.dtype = torch.complex64,
    ) -> None:
        field = FreeSpace(shape, wavelength, distances, pixel, model=model, dtype=dtype)
        super().__init__(field, quantity)


def length(what: str, value: float, *, signed: bool = False) -> float:
    """Return a length in metres, refusing what is not finite, or not positive unless ``signed``."""
    if not isinstance(value, (int, float)) or not math.isfinite(value) or (value <= 0 and not signed):
        raise InvdiffError(
            f"The {what} must be a {'' if signed else 'positive '}number of metres, got {value!r:.60}."
        )
    return float(value)


def plane(shape: Sequence[int], pixel: float, dtype: torch.dtype) -> Space:
    """Return the space of complex images ``(1, y, x)`` with pixels in metres."""
    if not dtype.is_complex:
        raise InvdiffError(f"A wave is complex; use complex64 or complex128 instead of {dtype}.")
    return Space((1, *shape), dtype, spacing={"y": pixel, "x": pixel}, spacing_units="m")


def response(shape: Sequence[int], wavelength: float, distance: float, pixel: float, model: str) -> Tensor:
    """Return ``H`` on the frequencies of a plane ``(y, x)``, zero frequency first, complex128."""
    fy, fx = (torch.fft.fftfreq(n, pixel, dtype=torch.float64) for n in shape)
    f2 = fy[:, None] ** 2 + fx**2
    turns = f2.new_tensor(distance / wavelength) - 0.5 * wavelength * distance * f2
    if model == "angular spectrum":
        turns = distance * (wavelength**-2 - f2).clamp_min(0).sqrt()
    turns = turns - turns.floor()  # whole turns lose digits
    h = torch.polar(torch.ones_like(f2), 2 * math.pi * turns)
    return h * (f2 < wavelength**-2) if model == "angular spectrum" else h
