"""Ultrasound: echoes of plane waves on a linear array of elements."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from invdiff.errors import InvdiffError
from invdiff.operators import _delays
from invdiff.operators._compiled import is_compiled
from invdiff.operators._convolve import fast_length
from invdiff.operators._delays import DelayTable, Part, Path
from invdiff.operators._parameters import ParametricOperator, as_parameter, as_space
from invdiff.operators._ray_transform import MAX_TABLE_BYTES, as_angles, as_count, as_length, stacklevel_outside
from invdiff.operators._table import TableHolder
from invdiff.operators.blur import require
from invdiff.spaces import Space

DATA = ("rf", "iq")
METHODS = ("auto", "table", "matrix-free")
#: Metres per unit of length.
_METRES = {"m": 1.0, "cm": 1e-2, "mm": 1e-3, "um": 1e-6}
#: Standard deviations of the pulse's envelope that it reaches to; what is cut off is 2e-8.
_REACH = 6.0
#: Steering beyond this draws a warning: it is unusual, and mostly in degrees.
_STEEP = math.pi / 4
#: Relative error of a random delay, times the square of the envelope's standard deviation in samples.
_ERROR = math.sqrt(3 / 4) / (2 * math.sqrt(180))
#: More samples than this are a mistake in the units.
_LONGEST = 1 << 20
#: Complex samples at work at once.
_AT_WORK = 1 << 23


class PlaneWaveUltrasound(ParametricOperator):
    """``y[a, e, t] = sum_p w[p, e] x[p] h(t - tau_a[p] - |p - e| / c)``: channel data of a reflectivity map.

    ``(B, ..., z, x)`` to ``(B, ..., angle, element, time)``, with elements at ``(0, e)``, the transmission
    ``tau_a = (z cos a + x sin a) / c`` of a plane wave steered by ``a``, and the pulse
    ``h(t) = exp(-t^2 / (2 s^2)) cos(2 pi f0 t)``. Time 0 is when the wave passes the origin, usually the middle of
    the array; ``transmit_delays`` move it. First Born approximation: single scattering, no absorption, no loss by
    distance (data after time-gain compensation), and a wave as wide as the image.

    ``data="rf"`` gives the radio-frequency samples. ``data="iq"`` gives them demodulated,
    ``y[a, e, t] = sum_p w x[p] exp(-2 pi i f0 tau) exp(-(t - tau)^2 / (2 s^2))`` with both delays in ``tau``;
    their magnitude is the envelope, and images may be complex.

    ``adjoint`` is delay-and-sum with the matched pulse, apodised by ``w``; `envelope` makes an image of it.

    The phase of the carrier is exact at every delay. Only the envelope is interpolated, linearly, and the pulse
    makes up for the mean error of that; ``interpolation_error`` says what is left.

    Implementations (``method``), which agree to rounding: ``"table"`` keeps all weights as sparse matrices, built
    on first use and shared between operators of the same geometry; ``"matrix-free"`` computes them on the fly, a
    few elements at a time, in compiled loops on the CPU where numba is there; ``"auto"`` takes a table of at most
    ``max_table_bytes``.

    Args:
        shape: Shape of one image, or its whole Space; the columns are centred at ``lateral``.
        angles: Steering angle of every transmission, in radians; positive ones travel towards growing ``x``.
        elements: Positions of the elements along ``x``, in metres.
        sampling_frequency: Of the data, in Hz.
        centre_frequency: ``f0`` of the pulse (two ways), in Hz.
        bandwidth: Width of its spectrum at -6 dB over ``f0``.
        sound_speed: ``c`` in metres per second.
        samples: Samples per channel; up to the last echo by default.
        start: Time of the first sample, in seconds.
        transmit_delays: Seconds added to the transmission, one number or one per angle.
        depth: Depth of the first row of pixels, in metres.
        lateral: Position of the middle of the columns, in metres.
        data: ``"rf"`` or ``"iq"``.
        f_number: Each pixel is heard by the elements within ``z / (2 f_number)`` of it; all of them by default.
        element_width: In metres: weights ``sinc(width sin(theta) f0 / c) cos(theta)`` for the angle ``theta`` of
            arrival; none by default.
        method: Which implementation.
        max_table_bytes: Largest table that ``"auto"`` builds.
        dtype: Precision, and complex for complex images; that of the Space, or float32.
        units: Units of the image.
        spacing: Size of the pixels in metres: a number, or one per named dimension; that of the Space, whose
            ``spacing_units`` must be m, cm, mm or um.

    Raises:
        InvdiffError: If lengths, frequencies or angles are out of range, the sampling is too slow for the pulse,
            no echo falls into the samples, or images are complex and data are ``"rf"``.

    Reference: Montaldo et al., Coherent plane-wave compounding, IEEE TUFFC 56(3), 2009; Selfridge, Kino and
    Khuri-Yakub, Radiation pattern of a narrow-strip acoustic transducer, Appl. Phys. Lett. 37(1), 1980.
    """

    def __init__(
        self,
        shape: Space | Sequence[int],
        angles: Any,
        elements: Any,
        *,
        sampling_frequency: float,
        centre_frequency: float,
        bandwidth: float = 0.6,
        sound_speed: float = 1540.0,
        samples: int | None = None,
        start: float = 0.0,
        transmit_delays: Any = 0.0,
        depth: float = 0.0,
        lateral: float = 0.0,
        data: str = "rf",
        f_number: float | None = None,
        element_width: float | None = None,
        method: str = "auto",
        max_table_bytes: int = MAX_TABLE_BYTES,
        dtype: torch.dtype | None = None,
        units: str | None = None,
        spacing: float | Mapping[str, float] | None = None,
    ) -> None:
        self.domain, steps = _image_space(shape, dtype, units, spacing)
        self.data = require("kind of ultrasound data", data, DATA)
        if self.domain.is_complex and data == "rf":
            raise InvdiffError("Radio-frequency data are of real images; give a real dtype, or data='iq'.")
        self.angles, self.elements = _steering(angles), _positions(elements)
        self.sampling_frequency = as_length(sampling_frequency, "The sampling frequency in Hz")
        self.centre_frequency = as_length(centre_frequency, "The centre frequency in Hz")
        self.sound_speed = as_length(sound_speed, "The speed of sound in m/s")
        self.pulse_std = _pulse_std(centre_frequency, bandwidth, sampling_frequency, data)
        self.start = _finite(start, "The time of the first sample")
        self.transmit_delays = _delays_of(transmit_delays, len(self.angles))
        self.f_number = None if f_number is None else as_length(f_number, "The f-number")
        self.element_width = (
            None if element_width is None else as_length(element_width, "The width of the elements")
        )
        nz, nx = self.domain.shape[-2:]
        self.z = as_length(depth, "The depth of the first row", zero=True) + steps[0] * np.arange(nz)
        self.x = _finite(lateral, "The lateral position") + steps[1] * (np.arange(nx) - (nx - 1) / 2)
        count = self._count(samples)
        lead = self.domain.shape[:-2]
        self.range = Space(
            (*lead, len(self.angles), len(self.elements), count),
            self.domain.real_dtype if data == "rf" else self.domain.dtype.to_complex(),
            (*self.domain.dims[:-2], "angle", "element", "time"),
            self.domain.units,
            {"time": 1 / self.sampling_frequency},
            "s",
        )
        # The only tensor here; it tells on which device the operator works.
        self.place = torch.zeros((), dtype=self.domain.real_dtype)
        arrays = (self.angles, self.elements, self.transmit_delays, self.z, self.x)
        numbers = [self.sampling_frequency, self.centre_frequency, self.sound_speed, self.pulse_std, self.start]
        text = f"{numbers} {count} {self.f_number} {self.element_width}"
        digest = hashlib.sha256(text.encode() + b"".join(a.tobytes() + b" " for a in arrays))
        self.geometry_digest = digest.hexdigest()
        super().__init__()
        self._holder = TableHolder()
        self.method = self._choose(method, max_table_bytes)

    def _choose(self, method: str, limit: int) -> str:
        require("method of ultrasound", method, METHODS)
        pixels, elements = self.z.size * self.x.size, len(self.elements)
        if method == "auto":
            size = _delays.table_bytes(len(self.angles), elements, pixels, self.domain.real_dtype.itemsize)
            method = "table" if size <= limit else "matrix-free"
        if method == "table" and max(4 * pixels, 2 * self._padded) * elements >= 1 << 31:
            raise InvdiffError(f"A table for {self.name} would hold 2^31 numbers per angle; use 'matrix-free'.")
        return method

    def _count(self, samples: int | None) -> int:
        """Return the number of samples, refusing a window without echoes."""
        z, x = (torch.from_numpy(v) for v in (self.z[[0, 0, -1, -1]], self.x[[0, -1, 0, -1]]))
        sent = torch.stack([self._arrival(a, z, x) for a in range(len(self.angles))])
        away = torch.hypot(z, x - torch.from_numpy(self.elements)[:, None])
        # delays are convex in the position, so that corners have the latest
        last = float((sent[:, None] + away / self.sound_speed).max())
        if samples is None:
            count = math.ceil((last - self.start) * self.sampling_frequency) + 1 + self._reach
            if count > _LONGEST:
                raise InvdiffError(
                    f"The last echo comes {last - self.start:g} s after the first sample, {count} samples later; "
                    "check that lengths are in metres, times in seconds and frequencies in Hz."
                )
        else:
            count = as_count(samples, "The number of samples")
        off = np.abs(self.elements - np.clip(self.elements, self.x[0], self.x[-1]))
        first = float(sent.min()) + np.hypot(off, self.z[0]).min() / self.sound_speed
        end = self.start + count / self.sampling_frequency
        if last < self.start or first > end:
            raise InvdiffError(
                f"Echoes arrive from {first:g} s to {last:g} s, and samples from {self.start:g} s to {end:g} s; "
                "check start, transmit_delays, and that lengths are in metres and times in seconds."
            )
        return count

    @property
    def _reach(self) -> int:
        """Samples on either side of an echo that its pulse reaches to."""
        return math.ceil(_REACH * self.pulse_std * self.sampling_frequency) + 1

    @property
    def _padded(self) -> int:
        """Samples with those around, whose echoes reach into the data."""
        return self.range.shape[-1] + 2 * self._reach

    @property
    def times(self) -> np.ndarray:
        """Time of every sample in seconds, ``(samples,)``."""
        return self.start + np.arange(self.range.shape[-1]) / self.sampling_frequency

    @property
    def interpolation_error(self) -> float:
        """Error of an echo by interpolation, over its norm, for random delays: ``0.032 / (s fs)^2``."""
        return _ERROR / (self.pulse_std * self.sampling_frequency) ** 2

    def describe(self) -> dict[str, Any]:
        """Return what provenance records, with the geometry."""
        numbers = ("data", "method", "sampling_frequency", "centre_frequency", "sound_speed", "start", "f_number")
        counts = {"angles": len(self.angles), "elements": len(self.elements)}
        return {**super().describe(), **counts, **{k: getattr(self, k) for k in numbers}}

    def _sent(self, angle: int) -> Path:
        """Return the way of one wave to the pixels, from the first padded sample; times in double precision."""
        tau = self._arrival(angle, *self._pixels())
        delay = (tau - self.start) * self.sampling_frequency + self._reach
        return Path(delay, self._turned(tau, torch.ones_like(tau)))

    def _arrival(self, angle: int, z: Tensor, x: Tensor) -> Tensor:
        """Return when one wave reaches points, in seconds."""
        a = float(self.angles[angle])
        return (z * math.cos(a) + x * math.sin(a)) / self.sound_speed + float(self.transmit_delays[angle])

    def _heard(self, start: int, stop: int) -> Path:
        """Return the way from the pixels to some elements, with their weights."""
        z, x = self._pixels()
        across = x - torch.from_numpy(self.elements[start:stop]).to(x.device)[:, None]
        away = torch.hypot(z.expand_as(across), across)
        weight = torch.ones_like(away)
        if self.element_width is not None:
            length = away.clamp_min(torch.finfo(torch.float64).tiny)
            width = self.element_width * self.centre_frequency / self.sound_speed
            weight = torch.sinc(width * across / length) * z / length
        if self.f_number is not None:
            weight = weight * (across.abs() <= z / (2 * self.f_number))
        tau = away / self.sound_speed
        return Path(tau * self.sampling_frequency, self._turned(tau, weight))

    def _turned(self, tau: Tensor, weight: Tensor) -> Tensor:
        """Return ``w exp(-2 pi i f0 tau)`` in our own precision."""
        return torch.polar(weight, -2 * math.pi * self.centre_frequency * tau).to(self.domain.dtype.to_complex())

    def _pixels(self) -> tuple[Tensor, Tensor]:
        """Return the coordinates of all pixels, ``(pixels,)`` each, in double precision."""
        z, x = (torch.from_numpy(v).to(self.place.device) for v in (self.z, self.x))
        return z[:, None].expand(-1, len(x)).reshape(-1), x.repeat(len(z))

    def _parts(self, rows: int) -> Iterator[tuple[int, int, int, Part]]:
        """Yield angle, first and last element, and what takes images to their samples."""
        angles, elements, pixels = len(self.angles), len(self.elements), self.z.size * self.x.size
        if self.method == "table":
            yield from ((a, 0, elements, part) for a, part in enumerate(self._table().parts))
        else:
            compiled = is_compiled(self.place.device)
            width = pixels * (1 if compiled else rows)
            yield from _delays.direct(self._sent, self._heard, angles, elements, self._padded, width, compiled)

    def _table(self) -> DelayTable:
        """Return the weights, from this operator, another one of the same geometry, or computed now."""
        device, dtype = self.place.device, self.domain.real_dtype
        key = (self.geometry_digest, str(dtype), str(device))
        sizes = (len(self.angles), len(self.elements), self._padded)
        return self._holder.get(key, lambda: DelayTable(self._sent, self._heard, *sizes, dtype, device))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Any:
        """Return a copy on another device or in another precision; the geometry stays in double precision."""
        new = super().to(device, dtype)
        new._holder = TableHolder()
        return new

    def _forward(self, x: Tensor) -> Tensor:
        rows = self._enter(x, self.domain).reshape(-1, self.z.size * self.x.size)
        out = rows.new_empty(len(rows), *self.range.shape[-3:], dtype=self.range.dtype)
        spectrum, carrier = self._derived(_pulse)
        reach, count = self._reach, self.range.shape[-1]
        for block in self._row_blocks(len(rows)):
            for a, first, last, part in self._parts(len(rows[block])):
                u = _convolved(part.scatter(rows[block]), spectrum)[..., reach : reach + count]
                out[block, a, first:last] = u if self.data == "iq" else (u * carrier).real
        return out.reshape(len(x), *self.range.shape)

    def _adjoint(self, y: Tensor) -> Tensor:
        rows = self._enter(y, self.range).reshape(-1, *self.range.shape[-3:])
        out = rows.new_zeros(len(rows), self.z.size * self.x.size, dtype=self.domain.dtype)
        spectrum, carrier = self._derived(_pulse)
        padding = (self._reach, self._reach)
        for block in self._row_blocks(len(rows)):
            for a, first, last, part in self._parts(len(rows[block])):
                v = rows[block, a, first:last]
                v = torch.nn.functional.pad(v if self.data == "iq" else v * carrier.conj(), padding)
                out[block] += part.gather(_convolved(v, spectrum)[..., : self._padded], not self.domain.is_complex)
        return out.reshape(len(y), *self.domain.shape)

    def _row_blocks(self, rows: int) -> list[slice]:
        step = max(1, _AT_WORK // (len(self.elements) * self._padded))
        return [slice(i, i + step) for i in range(0, rows, step)]


def envelope(image: Tensor, dim: int = -2) -> Tensor:
    """Return the magnitude of the analytic signal along the depth, of the shape of ``image``.

    Complex images, as from IQ data, already are analytic. Real ones, as ``adjoint`` gives from radio-frequency
    data, oscillate at ``2 f0 / c``; their rows must be closer than ``c / (4 f0 (1 + bandwidth))``. The
    transform is periodic in depth.

    Args:
        image: ``(..., z, x)``.
        dim: Axis of the depth.
    """
    if image.is_complex() or not image.numel():
        return image.abs()
    n = image.shape[dim]
    gain = torch.zeros(n, dtype=image.dtype, device=image.device)
    gain[0] = 1
    gain[1 : (n + 1) // 2] = 2
    if n % 2 == 0:
        gain[n // 2] = 1
    spectrum = torch.fft.fft(image.movedim(dim, -1)) * gain
    return torch.fft.ifft(spectrum).abs().movedim(-1, dim)


def _convolved(u: Tensor, spectrum: Tensor) -> Tensor:
    """Return the convolution of signals with the pulse, periodic beyond the padding."""
    if not u.numel():
        return u.new_zeros(*u.shape[:-1], len(spectrum))
    return torch.fft.ifft(torch.fft.fft(u, n=len(spectrum)).mul_(spectrum))


def _pulse(operator: PlaneWaveUltrasound) -> tuple[Tensor, Tensor]:
    """Return the spectrum of the envelope, real, and the carrier at the samples.

    Linear interpolation at random shares of a sample multiplies the spectrum by ``1 - w^2 / 12 + ...`` on average
    (``w`` in radians per sample); taking a twelfth of its second derivative off the envelope makes up for it.
    """
    n, reach = fast_length(operator._padded), operator._reach
    std = operator.pulse_std * operator.sampling_frequency
    t = torch.arange(-reach, reach + 1, dtype=torch.float64)
    taps = torch.exp(-0.5 * (t / std) ** 2) * (1 - ((t / std) ** 2 - 1) / (12 * std**2))
    kernel = torch.zeros(n, dtype=torch.float64)
    kernel.index_add_(0, t.long() % n, taps)
    phase = 2 * math.pi * operator.centre_frequency * torch.from_numpy(operator.times)
    place, dtype = operator.place, operator.domain.dtype.to_complex()
    return torch.fft.fft(kernel).real.to(place), torch.polar(torch.ones_like(phase), phase).to(place.device, dtype)


def _image_space(
    shape: Space | Sequence[int],
    dtype: torch.dtype | None,
    units: str | None,
    spacing: float | Mapping[str, float] | None,
) -> tuple[Space, tuple[float, float]]:
    """Return the domain, and the size of its pixels in metres."""
    if isinstance(shape, Space):
        space = shape
    else:
        names = {2: ("z", "x"), 3: ("channel", "z", "x")}.get(len(tuple(shape)), ())
        space = Space(tuple(shape), dims=names, spacing_units="m")
    if len(space.shape) < 2:
        raise InvdiffError(f"The image has shape {space.shape}; expected at least the axes (z, x).")
    if space.spacing_units not in _METRES:
        raise InvdiffError(
            f"The spacing of the image is in {space.spacing_units!r}; expected one of {', '.join(_METRES)}."
        )
    unit, names = _METRES[space.spacing_units], space.dims[-2:]
    if isinstance(spacing, (int, float)):
        spacing = dict.fromkeys(names, float(spacing))
    found = {**space.spacing, **{k: v / unit for k, v in (spacing or {}).items()}}
    missing = [n for n in names if n not in found]
    if missing:
        raise InvdiffError(
            f"The size of the pixels along {' and '.join(missing)} is missing; give spacing in metres."
        )
    space = as_space(space, dtype, units, found)
    z, x = (as_length(space.spacing[n] * unit, f"The spacing along {n}") for n in names)
    return space, (z, x)


def _steering(angles: Any) -> np.ndarray:
    """Return the steering angles, refusing what travels backwards and warning where they look like degrees."""
    values = as_angles(angles, turns=True)
    steepest = float(np.abs(values).max())
    if steepest >= math.pi / 2:
        raise InvdiffError(
            f"The steering angles reach {steepest:g} radians; waves travel downwards within pi / 2. For degrees "
            "give numpy.deg2rad(angles)."
        )
    if steepest > _STEEP:
        warnings.warn(
            f"The steering angles reach {steepest:g} and are taken in radians; for degrees give "
            "numpy.deg2rad(angles).",
            stacklevel=stacklevel_outside(),
        )
    return values


def _positions(elements: Any) -> np.ndarray:
    """Return the positions of the elements in metres, ``(elements,)``."""
    values = as_parameter(elements, "The positions of the elements")
    if values.is_complex() or values.ndim != 1 or not values.numel():
        raise InvdiffError(
            f"The positions of the elements have shape {tuple(values.shape)}; give at least one, in metres."
        )
    return values.double().cpu().numpy()


def _delays_of(values: Any, angles: int) -> np.ndarray:
    delays = as_parameter(values, "The transmit delays").double().cpu().numpy()
    if delays.shape not in ((), (1,), (angles,)):
        raise InvdiffError(f"The transmit delays have shape {delays.shape}; give one, or one for {angles} angles.")
    return np.broadcast_to(delays, (angles,)).copy()


def _pulse_std(frequency: float, bandwidth: float, sampling: float, data: str) -> float:
    """Return the standard deviation of the envelope in seconds, for a bandwidth at -6 dB; refuse slow sampling."""
    width = as_length(bandwidth, "The fractional bandwidth")
    if width > 2:
        raise InvdiffError(f"The bandwidth is a fraction of the centre frequency, below 2, got {bandwidth:g}.")
    needed = 2 * frequency * (1 + width / 2) if data == "rf" else 2 * width * frequency
    if sampling < needed * (1 - 1e-9):
        raise InvdiffError(
            f"The sampling frequency of {sampling:g} Hz is below the {needed:g} Hz that {data.upper()} data of a "
            f"pulse at {frequency:g} Hz of fractional bandwidth {width:g} need."
        )
    return math.sqrt(2 * math.log(10 ** (6 / 20))) / (math.pi * width * frequency)


def _finite(value: float, what: str) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise InvdiffError(f"{what} must be finite, got {value}.")
    return number
