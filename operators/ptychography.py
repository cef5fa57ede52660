"""Ptychography: overlapping parts of an object, each seen as one diffraction pattern or image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from invdiff.errors import InvdiffError
from invdiff.operators._fft import centred_fft, centred_ifft, fft2, ifft2
from invdiff.operators._magnitude import Detected
from invdiff.operators._parameters import ParametricOperator, as_parameter
from invdiff.operators.blur import require
from invdiff.operators.propagation import length, plane, response

PROPAGATIONS = ("far-field", "fresnel")


class Ptychography(Detected):
    """``y_j = |D (p x[r_j + .])|`` or its square: a probe ``p`` lights the object at positions ``r_j``.

    ``D`` is the centred orthonormal FFT ("far-field") or Fresnel propagation over a distance ("fresnel"). The
    unknown is the object's complex transmission.

    Args:
        probe: Complex or real ``(py, px)``.
        positions: Whole numbers ``(J, 2)``: first pixel ``(y, x)`` of the probe in the object.
        shape: Size ``(y, x)`` of the object.
        wavelength: Wavelength in metres.
        distance: Distance from object to detector in metres.
        pixel: Distance between neighbouring pixels of the object in metres; in the far field, those of the
            detector are ``wavelength distance / (py pixel)`` apart.
        propagation: "far-field" or "fresnel".
        quantity: "amplitude" or "intensity".
        dtype: ``complex64`` or ``complex128``.

    Raises:
        InvdiffError: If the probe is dark or not of rank 2, or a position puts it outside the object.
    """

    def __init__(
        self,
        probe: Any,
        positions: Any,
        shape: tuple[int, int],
        *,
        wavelength: float,
        distance: float,
        pixel: float,
        propagation: str = "far-field",
        quantity: str = "amplitude",
        dtype: torch.dtype = torch.complex64,
    ) -> None:
        field = PtychographicField(
            probe,
            positions,
            shape,
            wavelength=wavelength,
            distance=distance,
            pixel=pixel,
            propagation=propagation,
            dtype=dtype,
        )
        super().__init__(field, quantity)


class _Windows(ParametricOperator):
    """Windows of one plane at several places: gathering, and its adjoint, scattering."""

    index: Tensor  # (J, wy * wx) into the flattened plane

    def _gather(self, plane_: Tensor, size: tuple[int, int]) -> Tensor:
        return plane_.flatten(1)[:, self.index].unflatten(-1, size)

    def _scatter(self, windows: Tensor) -> Tensor:
        out = windows.new_zeros(len(windows), self.domain.size)
        return out.index_add(1, self.index.flatten(), windows.flatten(1)).reshape(-1, *self.domain.shape)


class PtychographicField(_Windows):
    """``u_j = D (p x[r_j + .])``, ``(1, y, x) -> (position, y, x)``; see `Ptychography` for the arguments."""

    def __init__(
        self,
        probe: Any,
        positions: Any,
        shape: tuple[int, int],
        *,
        wavelength: float,
        distance: float,
        pixel: float,
        propagation: str = "far-field",
        dtype: torch.dtype = torch.complex64,
    ) -> None:
        self.domain = plane(shape, length("pixel", pixel), dtype)
        values = as_parameter(probe, "The probe")
        if values.ndim != 2 or not values.numel() or not bool((values != 0).any()):
            raise InvdiffError(f"A probe is an image (y, x) with some light, got shape {tuple(values.shape)}.")
        self.probe = values.to(dtype)
        self.index = _index(positions, tuple(values.shape), self.domain.shape[1:], "probe")
        wavelength, distance = length("wavelength", wavelength), length("distance", distance)
        self.propagation = require("propagation", propagation, PROPAGATIONS)
        names = ("ky", "kx") if propagation == "far-field" else ("y", "x")
        spacing = dict.fromkeys(names, pixel)
        if propagation == "far-field":
            spacing = {n: wavelength * distance / (size * pixel) for n, size in zip(names, values.shape)}
        self.range = self.domain.replace(
            shape=(len(self.index), *values.shape), dims=("position", *names), spacing=spacing
        )
        self.response = response(values.shape, wavelength, distance, pixel, "fresnel").to(dtype)
        super().__init__()

    def _forward(self, x: Tensor) -> Tensor:
        size = (self.probe.shape[0], self.probe.shape[1])
        leaving = self._gather(self._enter(x, self.domain), size) * self.probe
        return centred_fft(leaving) if self.propagation == "far-field" else ifft2(fft2(leaving) * self.response)

    def _adjoint(self, y: Tensor) -> Tensor:
        y = self._enter(y, self.range)
        back = centred_ifft(y) if self.propagation == "far-field" else ifft2(fft2(y) * self.response.conj())
        return self._scatter(back * self.probe.conj())

    def normal(self, x: Tensor) -> Tensor:
        """Return ``sum_j |p|^2 x`` on the windows: ``D`` is unitary."""
        self.domain.check(x, f"Input of the normal operator of {self.name}")
        light = self._scatter(self.probe.abs().square().expand(1, *self.range.shape))
        return self._enter(x, self.domain) * light


class FourierPtychography(Detected):
    """``y_j = |F_m^H (P F_n x [k_j + .])|`` or its square: images under oblique light from several LEDs.

    LED ``j`` in the direction ``(sin_y, sin_x)`` shifts the object's spectrum by ``k_j = sin / wavelength``,
    rounded to the grid of frequencies ``1 / (n pixel)``; the pupil ``P`` lets ``m`` by ``m`` of them through.
    Transforms are centred, and an object of constant 1 gives the pupil's middle value as amplitude.

    Args:
        pupil: Complex or real ``(my, mx)`` on the grid of frequencies, zero frequency at ``m // 2``; see
            `circular_pupil`.
        leds: Direction sines ``(J, 2)`` without units, ``(sin_y, sin_x)``.
        shape: Size ``(y, x)`` of the object, of high resolution.
        wavelength: Wavelength in metres.
        pixel: Distance between neighbouring pixels of the object in metres.
        quantity: "intensity" or "amplitude".
        dtype: ``complex64`` or ``complex128``.

    Raises:
        InvdiffError: If the pupil is dark or not of rank 2, or an LED moves it out of the object's frequencies.
    """

    def __init__(
        self,
        pupil: Any,
        leds: Any,
        shape: tuple[int, int],
        *,
        wavelength: float,
        pixel: float,
        quantity: str = "intensity",
        dtype: torch.dtype = torch.complex64,
    ) -> None:
        field = LowResolutionField(pupil, leds, shape, wavelength=wavelength, pixel=pixel, dtype=dtype)
        super().__init__(field, quantity)


class LowResolutionField(_Windows):
    """``u_j = F_m^H (P F_n x [k_j + .])``, ``(1, y, x) -> (led, y, x)``; see `FourierPtychography`."""

    def __init__(
        self,
        pupil: Any,
        leds: Any,
        shape: tuple[int, int],
        *,
        wavelength: float,
        pixel: float,
        dtype: torch.dtype = torch.complex64,
    ) -> None:
        self.domain = plane(shape, length("pixel", pixel), dtype)
        values = as_parameter(pupil, "The pupil")
        if values.ndim != 2 or not values.numel() or not bool((values != 0).any()):
            raise InvdiffError(f"A pupil is an image (ky, kx) that is open somewhere, got {tuple(values.shape)}.")
        sines = as_parameter(leds, "The LED directions").double()
        if sines.ndim != 2 or sines.shape[1:] != (2,) or bool((sines.norm(dim=1) > 1).any()):
            raise InvdiffError(
                f"LED directions are sines (J, 2) of at most unit length, got shape {tuple(sines.shape)}."
            )
        n, m = torch.tensor(self.domain.shape[1:]), torch.tensor(values.shape)
        shift = (sines * n * pixel / length("wavelength", wavelength)).round()
        small = tuple(values.shape)
        self.index = _index(n // 2 - m // 2 + shift, small, self.domain.shape[1:], "pupil")
        #: With it, orthonormal transforms of two sizes keep the brightness.
        self.pupil = values.to(dtype) * float((m / n).prod().sqrt())
        spacing = {d: pixel * float(a / b) for d, a, b in zip("yx", n, m)}
        self.range = self.domain.replace(shape=(len(self.index), *small), dims=("led", "y", "x"), spacing=spacing)
        super().__init__()

    def _forward(self, x: Tensor) -> Tensor:
        size = (self.pupil.shape[0], self.pupil.shape[1])
        return centred_ifft(self._gather(centred_fft(self._enter(x, self.domain)), size) * self.pupil)

    def _adjoint(self, y: Tensor) -> Tensor:
        return centred_ifft(self._scatter(centred_fft(self._enter(y, self.range)) * self.pupil.conj()))

    def normal(self, x: Tensor) -> Tensor:
        """Return ``F^H (sum_j |P|^2 at k_j) F x``: one pair of FFTs."""
        self.domain.check(x, f"Input of the normal operator of {self.name}")
        passed = self._scatter(self.pupil.abs().square().expand(1, *self.range.shape))
        return centred_ifft(centred_fft(self._enter(x, self.domain)) * passed)


def circular_pupil(
    numerical_aperture: float, size: tuple[int, int], shape: tuple[int, int], *, wavelength: float, pixel: float
) -> Tensor:
    """Return the open pupil of a lens, ones within ``NA / wavelength`` of the zero frequency, ``(my, mx)``.

    Args:
        numerical_aperture: Numerical aperture of the lens.
        size: Size ``(my, mx)`` of the pupil and of the images.
        shape: Size ``(y, x)`` of the object, whose frequencies are ``1 / (n pixel)`` apart.
        wavelength: Wavelength in metres.
        pixel: Distance between neighbouring pixels of the object in metres.

    Raises:
        InvdiffError: If the aperture is not above 0, or does not fit the size.
    """
    reach = numerical_aperture / length("wavelength", wavelength) * length("pixel", pixel)
    if not reach > 0 or any(reach * n > m / 2 for n, m in zip(shape, size)):
        raise InvdiffError(
            f"A numerical aperture of {numerical_aperture:g} must be above 0 and reach no further than {size} "
            "frequencies; enlarge the images."
        )
    ky, kx = ((torch.arange(m, dtype=torch.float64) - m // 2) / n for m, n in zip(size, shape))
    return (ky[:, None] ** 2 + kx**2 <= reach**2).float()


def _index(corners: Any, size: tuple[int, ...], shape: tuple[int, ...], what: str) -> Tensor:
    """Return the flat indices ``(J, wy * wx)`` of windows with these first pixels, all inside ``shape``."""
    values = as_parameter(corners, f"The positions of the {what}").double()
    if values.ndim != 2 or values.shape[1:] != (2,) or not len(values) or bool((values != values.round()).any()):
        raise InvdiffError(
            f"Positions of the {what} are whole numbers (J, 2) for at least one J, got {tuple(values.shape)}."
        )
    last = torch.tensor(shape) - torch.tensor(size)
    if bool(((values < 0) | (values > last)).any()):
        raise InvdiffError(
            f"A {what} of {size} leaves the plane of {shape} at one of its {len(values)} positions."
        )
    y, x = values.long().unbind(1)
    rows = (y[:, None] + torch.arange(size[0]))[:, :, None] * shape[1]
    return (rows + (x[:, None] + torch.arange(size[1]))[:, None]).flatten(1)
