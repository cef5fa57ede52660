"""Masks: zeros and ones for `Mask`, unit complex numbers for `CodedDiffraction`.

====================  =======================================================
``box``               a rectangle is missing
``half``              one half of the image is missing
``random``            every pixel is kept with equal probability
``strokes``           brush strokes of random shape are missing
``bayer``             one of three colours is kept per pixel
``phases``            unit complex numbers, for `CodedDiffraction`
====================  =======================================================
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from invdiff.errors import InvdiffError

_SIDES = ("left", "right", "top", "bottom")


def box(shape: Sequence[int], size: Sequence[int], corner: Sequence[int] | None = None) -> Tensor:
    """Return a mask ``(y, x)`` that lacks a rectangle.

    Args:
        shape: Size ``(y, x)`` of the image.
        size: Size ``(y, x)`` of the missing rectangle.
        corner: Its first pixel ``(y, x)``; the rectangle is in the middle by default.

    Raises:
        InvdiffError: If the rectangle does not lie inside the image or covers it whole.
    """
    ny, nx = _image(shape)
    by, bx = (int(n) for n in size)
    y, x = ((ny - by) // 2, (nx - bx) // 2) if corner is None else (int(n) for n in corner)
    if by < 1 or bx < 1 or y < 0 or x < 0 or y + by > ny or x + bx > nx or (by, bx) == (ny, nx):
        raise InvdiffError(
            f"A missing box of {by} x {bx} at ({y}, {x}) must lie in the image {ny} x {nx} and leave some of it."
        )
    mask = torch.ones(ny, nx)
    mask[y : y + by, x : x + bx] = 0
    return mask


def half(shape: Sequence[int], missing: str = "right") -> Tensor:
    """Return a mask ``(y, x)`` that lacks the "left", "right", "top" or "bottom" half (rounded down).

    Raises:
        InvdiffError: If the side has another name, or the image has one pixel across.
    """
    ny, nx = _image(shape)
    if missing not in _SIDES:
        raise InvdiffError(f"The missing half is one of {', '.join(map(repr, _SIDES))}, got {missing!r:.60}.")
    axis = 1 if missing in ("left", "right") else 0
    n = (ny, nx)[axis]
    if n < 2:
        raise InvdiffError(f"An image of {ny} x {nx} has no {missing} half; it is one pixel across.")
    mask = torch.ones(ny, nx)
    mask.narrow(axis, 0 if missing in ("left", "top") else n - n // 2, n // 2).zero_()
    return mask


def random(shape: Sequence[int], keep: float, seed: int = 0) -> Tensor:
    """Return a mask ``(y, x)`` that keeps ``round(keep * y * x)`` pixels, drawn without replacement.

    Args:
        shape: Size ``(y, x)`` of the image.
        keep: Part of the pixels that is kept, above 0 and at most 1; at least one pixel is.
        seed: Seed of the draw.

    Raises:
        InvdiffError: If the part is not in that range.
    """
    ny, nx = _image(shape)
    if not 0 < keep <= 1:
        raise InvdiffError(f"The part of the pixels to keep must be above 0 and at most 1, got {keep!r:.60}.")
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(ny * nx)
    mask[torch.randperm(ny * nx, generator=generator)[: max(1, round(keep * ny * nx))]] = 1
    return mask.reshape(ny, nx)


def strokes(shape: Sequence[int], missing: float = 0.2, width: float | None = None, seed: int = 0) -> Tensor:
    """Return a mask ``(y, x)`` that lacks brush strokes, drawn until at least a part ``missing`` is gone.

    A stroke is a chain of 4 to 12 round-ended segments, each up to a quarter of the image long, whose direction
    turns by a random angle at every joint.

    Args:
        shape: Size ``(y, x)`` of the image.
        missing: Least part of the pixels that is missing, above 0 and below 0.9.
        width: Width of the brush in pixels; a twelfth of the smaller axis by default.
        seed: Seed of the strokes.

    Raises:
        InvdiffError: If the part or the width is out of range.
    """
    ny, nx = _image(shape)
    if not 0 < missing < 0.9:
        raise InvdiffError(f"The missing part must be above 0 and below 0.9, got {missing!r:.60}.")
    width = max(1.0, min(ny, nx) / 12) if width is None else float(width)
    if not 0 < width <= min(ny, nx) / 4:
        raise InvdiffError(f"A brush must be wider than 0 and at most a quarter of {min(ny, nx)}, got {width:g}.")
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator, dtype=torch.float64))

    yx = torch.stack(torch.meshgrid(torch.arange(ny), torch.arange(nx), indexing="ij"), -1).double()
    mask = torch.ones(ny, nx)
    while float(mask.mean()) > 1 - missing:
        here, angle = torch.tensor([uniform(0, ny), uniform(0, nx)]).double(), uniform(0, 2 * math.pi)
        for _ in range(int(uniform(4, 13))):
            angle += uniform(-math.pi / 2, math.pi / 2)
            step = uniform(0.05, 0.25) * min(ny, nx)
            there = here + step * torch.tensor([math.sin(angle), math.cos(angle)]).double()
            mask[_distance(yx, here, there) <= width / 2] = 0
            here = there
            if float(mask.mean()) <= 1 - missing:
                break
    return mask


def bayer(shape: Sequence[int], pattern: str = "RGGB") -> Tensor:
    """Return a mask ``(3, y, x)`` that keeps one of red, green, blue per pixel.

    Args:
        shape: Size ``(y, x)`` of the image.
        pattern: Colours of the pixels (0, 0), (0, 1), (1, 0), (1, 1), repeated over the image: one of "RGGB",
            "BGGR", "GRBG" and "GBRG".

    Raises:
        InvdiffError: If the pattern is another one.
    """
    ny, nx = _image(shape)
    known = ("RGGB", "BGGR", "GRBG", "GBRG")
    if pattern not in known:
        raise InvdiffError(f"A Bayer pattern is one of {', '.join(known)}, got {pattern!r:.60}.")
    mask = torch.zeros(3, ny, nx)
    for i, colour in enumerate(pattern):
        mask["RGB".index(colour), i // 2 :: 2, i % 2 :: 2] = 1
    return mask


def phases(shape: Sequence[int], patterns: int = 4, seed: int = 0) -> Tensor:
    """Return masks ``(pattern, y, x)`` of independent uniform phases, complex64 of unit modulus.

    Args:
        shape: Size ``(y, x)`` of the image.
        patterns: Number of masks, at least 1.
        seed: Seed of the phases.

    Raises:
        InvdiffError: If there is no pattern.
    """
    ny, nx = _image(shape)
    if int(patterns) != patterns or patterns < 1:
        raise InvdiffError(f"The number of patterns must be a whole number of at least 1, got {patterns!r:.60}.")
    generator = torch.Generator().manual_seed(seed)
    angle = 2 * math.pi * torch.rand(int(patterns), ny, nx, generator=generator, dtype=torch.float64)
    return torch.polar(torch.ones_like(angle), angle).to(torch.complex64)


def _distance(points: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return the distance of points ``(..., 2)`` from the segment between ``a`` and ``b``."""
    along = b - a
    t = (((points - a) @ along) / (along @ along)).clamp(0, 1)
    return (points - a - t[..., None] * along).norm(dim=-1)


def _image(shape: Sequence[int]) -> tuple[int, int]:
    if len(shape) != 2 or any(int(n) != n or n < 1 for n in shape):
        raise InvdiffError(f"A mask is made for an image of size (y, x), got {tuple(shape)}.")
    return int(shape[0]), int(shape[1])
