"""Synthetic brightness of compact radio sources by domain randomisation: rings, crescents, flows, and others.

With polar coordinates ``(r, theta)`` about a centre that is off the middle,

    ring       exp(-(r - R(theta))^2 / 2 w^2) exp(sum_k a_k cos(k theta + phi_k)),  R an ellipse
    crescent   a disc less a smaller one that touches it from inside, blurred
    flow       r^-p beyond an edge, turned into spirals of a random field, brighter on the approaching side by
               (1 - b cos theta)^-n, with a thin ring of light inside and a dim floor
    other      discs, Gaussian blobs, double sources, a core with a jet

each at times with a faint halo or jet, and blurred. Sizes spread widely (ring diameters from a tenth to three
quarters of the field), and a fifth of the images have no ring, so that a ring and its size are the data's answer.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from invdiff.training.random_fields import Canvas

__all__ = ["source_image"]

Array = NDArray[np.float32]
_TRAINING_KEY, _HELD_OUT_KEY = 0x62687472, 0x62686865
#: Pixels drawn for one that is kept, in each direction.
_FINE = 3


def source_image(seed: int, size: int = 64, *, held_out: bool = False) -> Array:
    """Draw one source; formulas in the module docstring.

    Args:
        seed: Non-negative integer; the same seed gives the same image.
        size: Pixels in both directions, at least 16.
        held_out: Draw from the stream of held-out images, which training never sees.

    Returns:
        float32 ``(size, size)``, not negative; the 99th percentile over the frame is 1, or less where the maximum
        would pass 5.
    """
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise ValueError(f"seed must be a non-negative integer; got {seed!r}.")
    if size < 16:
        raise ValueError(f"size must be at least 16 pixels; got {size}.")
    rng = np.random.default_rng([int(seed), _HELD_OUT_KEY if held_out else _TRAINING_KEY])
    canvas = Canvas(rng, (_FINE * size, _FINE * size), 2.0 / (_FINE * size))
    kind = rng.choice(["ring", "crescent", "flow", "other"], p=[0.3, 0.15, 0.35, 0.2])
    x = {"ring": _ring, "crescent": _crescent, "flow": _flow, "other": _other}[str(kind)](canvas)
    v, u = canvas.grid(np.float32)
    window = np.clip((1 - np.maximum(np.abs(u), np.abs(v))) / 0.15, 0, 1)  # nothing is cut by the frame
    x = window * (x / max(float(x.max()), 1e-12) + _around(canvas))
    x = ndimage.gaussian_filter(x, rng.uniform(0.3, 1.6) * _FINE, mode="constant")
    x = x.reshape(size, _FINE, size, _FINE).mean((1, 3))
    level = max(float(np.percentile(x, 99)), 0.2 * float(x.max()))  # the smallest fill less than a hundredth
    return np.asarray(x / level, np.float32)


def _polar(canvas: Canvas, wander: float = 0.15) -> tuple[Array, Array]:
    """Radius and angle about a centre near the middle."""
    v, u = canvas.grid(np.float32)
    v, u = v - np.float32(canvas.rng.uniform(-wander, wander)), u - np.float32(canvas.rng.uniform(-wander, wander))
    return np.hypot(u, v), np.arctan2(v, u)


def _modulation(canvas: Canvas, theta: Array, strength: float) -> Array:
    """Brightness along a ring, ``exp(sum_k a_k cos(k theta + phi_k))``."""
    u, wave = canvas.rng.uniform, np.zeros_like(theta)
    for k in range(1, 5):
        wave += np.float32(strength * abs(canvas.rng.normal()) / k) * np.cos(k * theta + np.float32(u(0, 6.28)))
    return np.asarray(np.exp(wave), np.float32)


def _ellipse(canvas: Canvas, theta: Array, radius: float) -> Array:
    """Radius of an ellipse as seen from its centre."""
    e, turn = canvas.rng.uniform(0, 0.3) ** 2, canvas.rng.uniform(0, np.pi)
    return np.asarray(radius * (1 + e * np.cos(2 * (theta - turn))), np.float32)


def _ring(canvas: Canvas) -> Array:
    u = canvas.rng.uniform
    r, theta = _polar(canvas)
    radius = np.exp(u(np.log(0.1), np.log(0.75)))
    width = radius * u(0.06, 0.5)
    edge = _ellipse(canvas, theta, radius)
    ring = np.exp(-0.5 * ((r - edge) / width) ** 2) * _modulation(canvas, theta, u(0, 1.2))
    floor = u(0, 0.4) * float(canvas.rng.random() < 0.4) * np.exp(-0.5 * (r / radius) ** 4)
    return np.asarray(ring + floor, np.float32)


def _crescent(canvas: Canvas) -> Array:
    u = canvas.rng.uniform
    v, x = canvas.grid(np.float32)
    cx, cy, turn = u(-0.15, 0.15), u(-0.15, 0.15), u(0, 2 * np.pi)
    radius = np.exp(u(np.log(0.15), np.log(0.75)))
    inner = radius * u(0.4, 0.9)
    shift = (radius - inner) * u(0.3, 1.0)
    soft = canvas.spacing * _FINE
    outer = np.clip(0.5 + (radius - np.hypot(x - cx, v - cy)) / soft, 0, 1)
    hole = np.hypot(x - cx - shift * np.cos(turn), v - cy - shift * np.sin(turn))
    out = outer * (1 - u(0.6, 1.0) * np.clip(0.5 + (inner - hole) / soft, 0, 1))
    out = out * np.exp(u(0, 0.5) * canvas.field(0.3))
    return np.asarray(ndimage.gaussian_filter(out, radius * u(0.05, 0.25) / canvas.spacing), np.float32)


def _flow(canvas: Canvas) -> Array:
    u = canvas.rng.uniform
    r, theta = _polar(canvas, 0.12)
    shadow = np.exp(u(np.log(0.08), np.log(0.45)))
    edge = _ellipse(canvas, theta, shadow)
    ratio = np.maximum(r, 0.3 * shadow) / edge
    disc = ratio ** -u(1.5, 5.0) * np.clip((ratio - u(0.7, 1.0)) / u(0.1, 0.5), 0, 1)
    # a field on (angle, log radius), sheared with the radius, makes spirals; blended over the seam of the angle
    turns = theta + u(-3, 3) * np.log(np.maximum(ratio, 0.2))
    field = canvas.field(u(0.15, 0.5))
    n = field.shape[0]
    columns = (
        np.mod(turns / (2 * np.pi), 1) * n,
        np.clip(np.log2(np.maximum(ratio, 0.3)) + 2, 0, 5) / 5 * (n - 1),
    )
    swirl = ndimage.map_coordinates(field, [columns[0], columns[1]], order=1, mode="wrap")
    blend = 0.5 - 0.5 * np.cos(np.mod(turns, 2 * np.pi))
    disc = disc * np.exp(u(0, 1.0) * swirl * blend)
    beta, power, side = u(0, 0.75), u(1.5, 4.0), u(0, 2 * np.pi)
    disc = disc * (1 - beta * np.cos(theta - side)) ** -power
    light = np.exp(-0.5 * ((ratio - 1) / u(0.04, 0.15)) ** 2) * (1 - 0.7 * beta * np.cos(theta - side)) ** -power
    disc, light = disc / max(float(disc.max()), 1e-9), light / max(float(light.max()), 1e-9)
    return np.asarray(disc + u(0, 1.0) * light + u(0, 0.25) * (ratio < 1), np.float32)


def _other(canvas: Canvas) -> Array:
    u = canvas.rng.uniform
    v, x = canvas.grid(np.float32)
    out = np.zeros_like(x)
    if canvas.rng.random() < 0.25:
        r, theta = _polar(canvas)
        radius = _ellipse(canvas, theta, np.exp(u(np.log(0.1), np.log(0.7))))
        return np.asarray(np.exp(-((r / radius) ** u(4, 30))) * _modulation(canvas, theta, u(0, 0.4)), np.float32)
    turn = u(0, 2 * np.pi)
    jet = canvas.rng.random() < 0.4
    for k in range(int(canvas.rng.integers(1, 6))):
        along = (k * u(0.05, 0.25), u(-0.04, 0.04)) if jet else (u(-0.4, 0.4), u(-0.4, 0.4))
        cx, cy = (
            along[0] * np.cos(turn) - along[1] * np.sin(turn),
            along[0] * np.sin(turn) + along[1] * np.cos(turn),
        )
        out += u(0.1, 1.0) * _gaussian(canvas, x, v, cx, cy, u(0.02, 0.25))
    return np.asarray(out, np.float32)


def _gaussian(canvas: Canvas, x: Array, v: Array, cx: float, cy: float, size: float) -> Array:
    turn, squeeze = canvas.rng.uniform(0, np.pi), canvas.rng.uniform(0.3, 1.0)
    a = np.cos(turn) * (x - cx) + np.sin(turn) * (v - cy)
    b = np.cos(turn) * (v - cy) - np.sin(turn) * (x - cx)
    return np.asarray(np.exp(-0.5 * ((a / size) ** 2 + (b / size / squeeze) ** 2)), np.float32)


def _around(canvas: Canvas) -> Array:
    """A faint halo or jet, or nothing."""
    u = canvas.rng.uniform
    v, x = canvas.grid(np.float32)
    out = np.zeros_like(x)
    if canvas.rng.random() < 0.3:
        out += u(0, 0.15) * _gaussian(canvas, x, v, u(-0.2, 0.2), u(-0.2, 0.2), u(0.2, 0.6))
    return out


def describe() -> dict[str, Any]:
    """Facts about the synthesiser for a prior's card."""
    return {"generator": "invdiff.training.synthetic_black_hole.source_image", "measured_images": "none"}
