"""Handwritten-looking digits for teaching, drawn from strokes.

A digit is a few smooth curves through control points; the points move, the page is slanted, turned and scaled, and
a pen of random width follows them. No measured image enters.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import interpolate, ndimage

__all__ = ["digit_image", "digit_of"]

Array = NDArray[np.float32]
_TRAINING_KEY, _HELD_OUT_KEY = 0x64697472, 0x64696865
#: Control points ``(x, y)`` of every stroke, x to the right and y down, in a box from 0 to 1.
_STROKES: dict[int, list[list[tuple[float, float]]]] = {
    0: [[(0.5, 0), (0.12, 0.25), (0.12, 0.75), (0.5, 1), (0.88, 0.75), (0.88, 0.25), (0.5, 0)]],
    1: [[(0.3, 0.2), (0.55, 0.0), (0.53, 0.5), (0.5, 1)]],
    2: [[(0.1, 0.25), (0.4, 0.0), (0.8, 0.15), (0.7, 0.5), (0.1, 1)], [(0.1, 1), (0.5, 0.98), (0.9, 1)]],
    3: [[(0.15, 0.1), (0.6, 0.0), (0.8, 0.25), (0.4, 0.47)], [(0.4, 0.47), (0.9, 0.6), (0.75, 0.95), (0.1, 0.92)]],
    4: [
        [(0.6, 0), (0.35, 0.35), (0.1, 0.65)],
        [(0.1, 0.65), (0.5, 0.65), (0.9, 0.63)],
        [(0.65, 0.3), (0.65, 0.6), (0.6, 1)],
    ],
    5: [
        [(0.85, 0.02), (0.5, 0.03), (0.25, 0.03)],
        [(0.25, 0.03), (0.2, 0.25), (0.18, 0.42)],
        [(0.18, 0.42), (0.6, 0.35), (0.9, 0.65), (0.6, 0.98), (0.1, 0.92)],
    ],
    6: [[(0.75, 0.0), (0.3, 0.3), (0.12, 0.7), (0.45, 1), (0.85, 0.78), (0.6, 0.5), (0.18, 0.68)]],
    7: [[(0.1, 0.05), (0.5, 0.04), (0.88, 0.03)], [(0.88, 0.03), (0.6, 0.45), (0.4, 1)]],
    8: [
        [
            (0.5, 0.47),
            (0.15, 0.25),
            (0.5, 0),
            (0.85, 0.22),
            (0.5, 0.47),
            (0.1, 0.75),
            (0.5, 1),
            (0.9, 0.76),
            (0.5, 0.47),
        ]
    ],
    9: [[(0.85, 0.3), (0.5, 0.5), (0.15, 0.28), (0.5, 0), (0.85, 0.25), (0.8, 0.6), (0.6, 1)]],
}


def digit_image(seed: int, size: int = 32, *, held_out: bool = False, digit: int | None = None) -> Array:
    """Draw one digit.

    Args:
        seed: Non-negative integer; the same seed gives the same image.
        size: Pixels in both directions, at least 16.
        held_out: Draw from the stream of held-out images, which training never sees.
        digit: 0 to 9; random where None.

    Returns:
        float32 ``(size, size)``, ink 1 on paper 0.
    """
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise ValueError(f"seed must be a non-negative integer; got {seed!r}.")
    if size < 16:
        raise ValueError(f"size must be at least 16 pixels; got {size}.")
    rng = _generator(seed, held_out)
    drawn = int(rng.integers(10))
    if digit not in (None, *range(10)):
        raise ValueError(f"digit must be 0 to 9; got {digit!r}.")
    pen = rng.uniform(0.035, 0.075)
    turn, slant = rng.normal(0, 0.12), rng.normal(0.1, 0.2)
    wide, tall = rng.uniform(0.42, 0.62), rng.uniform(0.58, 0.74)
    middle = 0.5 + rng.normal(0, 0.025, 2)
    page = (np.arange(size) + 0.5) / size
    v, u = np.meshgrid(page, page, indexing="ij")
    nearest = np.full((size, size), np.inf)
    for stroke in _STROKES[drawn if digit is None else digit]:
        points = np.asarray(stroke) - 0.5
        moved = points + rng.normal(0, 0.035, points.shape)
        if stroke[0] == stroke[-1]:
            moved[-1] = moved[0]
        x, y = wide * (moved[:, 0] - slant * moved[:, 1]), tall * moved[:, 1]
        x, y = np.cos(turn) * x - np.sin(turn) * y, np.sin(turn) * x + np.cos(turn) * y
        knots = np.linspace(0, 1, len(x))
        fine = np.linspace(0, 1, 24 * (len(x) - 1))
        x, y = (interpolate.make_interp_spline(knots, c, k=min(3, len(c) - 1))(fine) for c in (x, y))
        for a, b in zip(x + middle[0], y + middle[1]):
            nearest = np.minimum(nearest, np.hypot(u - a, v - b))
    ink = np.clip(0.5 + (pen - nearest) * size / 1.5, 0, 1)
    return np.asarray(ndimage.gaussian_filter(ink, rng.uniform(0.2, 0.6)), np.float32)


def digit_of(seed: int, *, held_out: bool = False) -> int:
    """Return which digit `digit_image` draws for a seed."""
    return int(_generator(seed, held_out).integers(10))


def _generator(seed: int, held_out: bool) -> np.random.Generator:
    return np.random.default_rng([int(seed), _HELD_OUT_KEY if held_out else _TRAINING_KEY])


def describe() -> dict[str, Any]:
    """Facts about the synthesiser for a prior's card."""
    return {"generator": "invdiff.training.synthetic_digits.digit_image", "measured_images": "none"}
