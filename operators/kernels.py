"""Blur kernels of unit sum, as tensors ``(size, size)`` with their origin in the middle.

====================  =======================================================
``gaussian``          isotropic or axis-aligned Gaussian
``motion``            a camera's path during the exposure, smooth and random
``defocus``           disc: a lens of round aperture out of focus
====================  =======================================================
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from invdiff.errors import InvdiffError

_PATH = 4000  # points along a motion path
_FINE = 16  # points per pixel and axis that measure how much of it a disc covers


def gaussian(
    std: float | Sequence[float], size: int | None = None, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return ``k(y, x) ~ exp(-y^2 / (2 std_y^2) - x^2 / (2 std_x^2))`` of unit sum.

    Args:
        std: Standard deviation in pixels, one number or ``(std_y, std_x)``.
        size: Odd number of pixels per axis; by default ``2 ceil(4 std) + 1`` for the larger one.
        dtype: Floating dtype of the result.

    Raises:
        InvdiffError: If a standard deviation is not positive, or the size is even.
    """
    stds = [float(std)] * 2 if isinstance(std, (int, float)) else [float(v) for v in std]
    if len(stds) != 2 or not all(math.isfinite(v) and v > 0 for v in stds):
        raise InvdiffError(f"A Gaussian kernel's std must be one or two positive numbers, got {std!r:.60}.")
    size = _odd(2 * math.ceil(4 * max(stds)) + 1 if size is None else size)
    offset = torch.arange(size, dtype=torch.float64) - size // 2
    ky, kx = (torch.exp(-0.5 * (offset / v) ** 2) for v in stds)
    return ((ky / ky.sum())[:, None] * (kx / kx.sum())).to(dtype)


def defocus(radius: float, size: int | None = None, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a disc of unit sum; a pixel counts by the part of it that lies within ``radius``.

    Args:
        radius: Radius in pixels, positive.
        size: Odd number of pixels per axis; by default as few as hold the disc.
        dtype: Floating dtype of the result.

    Raises:
        InvdiffError: If the radius is not positive, or the size is even or too small for the disc.
    """
    if not (math.isfinite(radius) and radius > 0):
        raise InvdiffError(f"A defocus kernel's radius must be a positive number of pixels, got {radius!r:.60}.")
    size = _odd(2 * math.ceil(radius) + 1 if size is None else size)
    if radius > size / 2:
        raise InvdiffError(f"A disc of radius {radius:g} does not fit {size} pixels; give a larger size.")
    fine = (torch.arange(size * _FINE, dtype=torch.float64) + 0.5) / _FINE - size / 2
    inside = (fine[:, None] ** 2 + fine**2 <= radius**2).double()
    disc = inside.reshape(size, _FINE, size, _FINE).mean((1, 3))
    return (disc / disc.sum()).to(dtype)


def motion(
    size: int = 61,
    length: float | None = None,
    intensity: float = 0.5,
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return the trace of a point that moves at constant speed along a smooth random path, of unit sum.

    The direction at time ``t`` in [0, 1] is
    ``theta_0 + 2 pi intensity sum_k (a_k cos(pi k t) + b_k sin(pi k t)) / k`` for ``k`` from 1 to 4, with standard
    normal ``a_k, b_k`` and uniform ``theta_0``. Points are spread over their four neighbours bilinearly, and the
    path's bounding box is centred.

    Args:
        size: Odd number of pixels per axis.
        length: Length of the path in pixels, at most ``size - 1``; ``3 / 4 size`` by default.
        intensity: How much the path bends, 0 (a straight line) or more.
        seed: Seed of the path.
        dtype: Floating dtype of the result.

    Raises:
        InvdiffError: If the size is even, the length does not fit, or the intensity is negative.
    """
    size = _odd(size)
    length = 0.75 * (size - 1) if length is None else float(length)
    if not 0 <= length <= size - 1:
        raise InvdiffError(
            f"A motion path of {length:g} pixels does not fit a kernel of {size}; give a larger size."
        )
    if not (math.isfinite(intensity) and intensity >= 0):
        raise InvdiffError(
            f"The intensity of a motion kernel must be a number of at least 0, got {intensity!r:.60}."
        )
    generator = torch.Generator().manual_seed(seed)
    start = 2 * math.pi * torch.rand(1, generator=generator, dtype=torch.float64)
    weights = torch.randn(2, 4, 1, generator=generator, dtype=torch.float64)
    t = (torch.arange(_PATH, dtype=torch.float64) + 0.5) / _PATH
    k = torch.arange(1, 5, dtype=torch.float64)[:, None]
    bends = ((weights[0] * torch.cos(math.pi * k * t) + weights[1] * torch.sin(math.pi * k * t)) / k).sum(0)
    angle = start + 2 * math.pi * intensity * bends
    path = torch.stack([angle.sin(), angle.cos()]).cumsum(1) * (length / _PATH)
    path = path - (path.amax(1, keepdim=True) + path.amin(1, keepdim=True)) / 2 + size // 2
    return _spread(path, size).to(dtype)


def _spread(path: Tensor, size: int) -> Tensor:
    """Return the mean of bilinear hats at the points ``(2, n)``."""
    corner = path.floor().clamp(0, max(size - 2, 0))
    part = path - corner
    out = torch.zeros(size * size, dtype=torch.float64)
    for dy in range(min(2, size)):
        for dx in range(min(2, size)):
            weight = (part[0] if dy else 1 - part[0]) * (part[1] if dx else 1 - part[1])
            index = (corner[0] + dy) * size + corner[1] + dx
            out.index_add_(0, index.long(), weight)
    return (out / out.sum()).reshape(size, size)


def _odd(size: int) -> int:
    if int(size) != size or size < 1 or size % 2 == 0:
        raise InvdiffError(
            f"A kernel's size must be an odd number of pixels, so that it has a middle; got {size}."
        )
    return int(size)
