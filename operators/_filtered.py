"""Filtered back-projection: ramp filters, weights of views, interpolating back-projection.

Reference: Kak and Slaney, "Principles of Computerized Tomographic Imaging", chapter 3, IEEE Press 1988.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from invdiff.errors import InvdiffError

#: Apodisation by name, as a function of frequency over the Nyquist frequency (0 to 1).
WINDOWS = {
    "ram-lak": lambda f: torch.ones_like(f),
    "shepp-logan": lambda f: torch.sinc(f / 2),
    "cosine": lambda f: torch.cos(math.pi * f / 2),
    "hamming": lambda f: 0.54 + 0.46 * torch.cos(math.pi * f),
    "hann": lambda f: 0.5 + 0.5 * torch.cos(math.pi * f),
}


def ramp_filter(y: Tensor, spacing: float, name: str, equiangular: bool = False) -> Tensor:
    """Convolve the last axis with the band-limited ramp, by FFTs long enough not to wrap around.

    Args:
        y: Data ``(..., n)``.
        spacing: Distance between detectors, or angle between them where ``equiangular``.
        name: Window, a key of ``WINDOWS``.
        equiangular: Multiply the kernel at angle ``g`` by ``(g / sin g)^2``.
    """
    if name not in WINDOWS:
        raise InvdiffError(f"The filter {name!r} is unknown; choose one of {', '.join(WINDOWS)}.")
    n = y.shape[-1]
    size = 1 << max(1, (2 * n - 1).bit_length())
    k = torch.fft.fftfreq(size, 1 / size, dtype=torch.float64).round()
    # Sampling the kernel, and not |f|, keeps the mean of the image right.
    kernel = torch.where(k % 2 == 0, 0.0, -1 / (math.pi * k * spacing) ** 2)
    kernel[0] = 1 / (4 * spacing**2)
    if equiangular:
        g = (k * spacing).clamp(-math.pi / 2, math.pi / 2)
        kernel = kernel * torch.where(g == 0, 1.0, (g / torch.sin(torch.where(g == 0, 1.0, g))) ** 2)
    response = torch.fft.rfft(kernel).real * spacing
    response = response * WINDOWS[name](torch.linspace(0, 1, size // 2 + 1, dtype=torch.float64))
    spectrum = torch.fft.rfft(y, size) * response.to(y.device, y.dtype)
    return torch.fft.irfft(spectrum, size)[..., :n]


def view_weights(angles: np.ndarray, period: float) -> np.ndarray:
    """Return the share of ``period`` that each view stands for: half the gaps to its neighbours.

    A gap of more than three times the typical one and a twentieth of the period is a missing wedge, which no view
    stands for.
    """
    order = np.argsort(np.mod(angles, period), kind="stable")
    ordered = np.mod(angles, period)[order]
    gaps = np.diff(ordered, append=ordered[0] + period)
    true = gaps[gaps > 1e-6 * period]
    wedge = gaps > max(3 * np.median(true), period / 20)
    gaps = np.where(wedge, np.median(true), gaps)
    out = np.empty(len(angles))
    out[order] = 0.5 * (gaps + np.roll(gaps, 1))
    return out


def interpolate(rows: Tensor, at: Tensor) -> Tensor:
    """Return ``rows`` ``(B, n)`` at fractional positions ``(N,)``, linear, zero outside: ``(B, N)``."""
    n = rows.shape[-1]
    padded = torch.nn.functional.pad(rows, (1, 1))
    at = (at + 1).clamp(0, n + 1)
    j = at.floor().clamp(max=n).long()
    f = (at - j).to(rows.dtype)
    return padded[:, j] * (1 - f) + padded[:, j + 1] * f


def redundancy(angles: np.ndarray, fan: np.ndarray, half_fan: float) -> np.ndarray:
    """Return the weight of every ray ``(views, detectors)``, 1 in sum over all measurements of one line.

    The ray at fan angle ``g`` of the view ``b`` is measured again at ``-g`` of the view ``b + pi - 2 g``. A whole
    turn counts every ray one half; shorter scans have Parker's smooth weights, widened to the overscan.

    Args:
        angles: Angles of the views in radians.
        fan: Angle of every detector from the central ray, ``(detectors,)``.
        half_fan: Largest angle at which the object is seen.

    Raises:
        InvdiffError: If the views cover less than half a turn and the fan.

    Reference: Parker, Medical Physics 9(2), 1982; Silver, Medical Physics 27(4), 2000.
    """
    ordered = np.sort(angles)
    gap = float(np.median(np.diff(ordered))) if len(ordered) > 1 else 0.0
    covered = float(np.ptp(angles)) + gap
    if covered >= 2 * math.pi - 0.5 * gap and len(angles) > 2:
        return np.full((len(angles), len(fan)), 0.5)
    over = 0.5 * (covered - math.pi)
    if over < half_fan - gap:
        raise InvdiffError(
            f"The views cover {math.degrees(covered):.0f} degrees, and filtered back-projection of a fan needs "
            f"{180 + 2 * math.degrees(half_fan):.0f}; reconstruct by conjugate gradients instead."
        )
    b, g = (angles - ordered[0] + 0.5 * gap)[:, None], np.clip(fan, -over, over)[None]
    with np.errstate(divide="ignore", invalid="ignore"):
        rise = np.sin(0.25 * math.pi * np.clip(b / (over + g), 0, 2)) ** 2
        fall = np.sin(0.25 * math.pi * np.clip((math.pi + 2 * over - b) / (over - g), 0, 2)) ** 2
    return np.nan_to_num(rise, nan=1.0) * np.nan_to_num(fall, nan=1.0)


def interpolate_frame(frames: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Return ``frames`` ``(B, m, n)`` at fractional positions ``(N,)``, bilinear, zero outside: ``(B, N)``."""
    m, n = frames.shape[1:]
    padded = torch.nn.functional.pad(frames, (1, 1, 1, 1)).flatten(1)
    row, column = (row + 1).clamp(0, m + 1), (column + 1).clamp(0, n + 1)
    i, j = row.floor().clamp(max=m).long(), column.floor().clamp(max=n).long()
    f, g = (row - i).to(frames.dtype), (column - j).to(frames.dtype)
    at = i * (n + 2) + j
    near = padded[:, at] * (1 - g) + padded[:, at + 1] * g
    far = padded[:, at + n + 2] * (1 - g) + padded[:, at + n + 3] * g
    return near * (1 - f) + far * f
