"""How a synthetic head looks to a scanner: tissue contrasts, textures, phase, point-spread function."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from invdiff.training.brain_anatomy import Layers, Tissues
from invdiff.training.random_fields import Array, Canvas, soft_step


def contrast(rng: np.random.Generator) -> dict[str, float]:
    """Random tissue intensities, most of them ordered as in a T1-weighted scan."""
    u = rng.uniform
    style = u()
    if style < 0.72:
        white = 1.0
        grey = u(0.5, 0.88)
        fluid = grey * u(0.1, 0.75)
        fat = u(0.8, 2.6)
        return {
            "white": white,
            "grey": grey,
            "fluid": fluid,
            "outer": fluid * u(0.3, 1.2),
            "fat": fat,
            "skin": u(0.3, 1.0),
            "muscle": u(0.3, 0.8),
            "bone": u(0.0, 0.2),
            "marrow": fat * u(0.1, 0.8),
        }
    if style < 0.86:
        fluid = 1.0
        return {
            "white": u(0.2, 0.45),
            "grey": u(0.4, 0.7),
            "fluid": fluid,
            "outer": u(0.6, 1.0),
            "fat": u(0.2, 1.0),
            "skin": u(0.2, 0.6),
            "muscle": u(0.1, 0.4),
            "bone": u(0.0, 0.1),
            "marrow": u(0.1, 0.6),
        }
    names = ("white", "grey", "fluid", "outer", "fat", "skin", "muscle", "marrow")
    return {name: float(u(0.05, 1.0)) for name in names} | {"bone": float(u(0.0, 0.3))}


def surroundings(canvas: Canvas, layers: Layers, mu: dict[str, float]) -> tuple[Array, Array, Array]:
    """Render everything around the brain.

    Returns:
        Magnitude, weight of fat (for its phase), and the soft indicator of the inside of the brain's hull.
    """
    width = canvas.spacing * canvas.rng.uniform(0.8, 1.6)
    magnitude, fat_weight = _soft_tissue(canvas, layers, mu, width)
    # Skull from the outside inwards, then the fluid under it.
    spongy = mu["marrow"] * np.clip(1 + 0.4 * canvas.field(3), 0, 3)
    for boundary, value, is_fat in (
        (layers.skull, mu["bone"], 0.0),
        (layers.marrow, spongy, 1.0),
        (layers.inner, mu["bone"], 0.0),
        (layers.fluid, mu["outer"] * (1 + 0.2 * canvas.field(4)), 0.0),
    ):
        layer = soft_step(boundary - layers.distance, width)
        magnitude += (value - magnitude) * layer
        fat_weight += (is_fat - fat_weight) * layer
    return magnitude, fat_weight, soft_step(-layers.distance + 0.5, width)


def _soft_tissue(canvas: Canvas, layers: Layers, mu: dict[str, float], width: float) -> tuple[Array, Array]:
    """Magnitude and weight of fat outside the skull: muscle with streaks of fat, fat under the skin, skin."""
    u, depth = canvas.rng.uniform, layers.depth
    # Deep inside, and in the face, there are air and bone too.
    streaks = canvas.field(u(4, 10)) + 0.6 * canvas.field(20)
    fatty = soft_step((streaks - u(0.3, 1.2)) * 2, 1.0)
    empty = soft_step((canvas.field(u(7, 16)) - u(0.5, 1.3)) * 3, 1.0)
    empty = empty * soft_step(layers.distance - layers.skull - 8, 6.0)
    magnitude = mu["muscle"] + (mu["fat"] - mu["muscle"]) * fatty
    magnitude = magnitude + (mu["bone"] - magnitude) * empty
    fat_weight = fatty * (1 - empty)
    skin = canvas.thickness(u(0.6, 2.2), 0.3, 30)
    fat = skin + canvas.thickness(u(1.0, 7.5), 0.4, 45)
    layer = soft_step(fat - depth, width)
    lobules = 1 + u(0, 0.2) * canvas.field(u(2, 5))
    magnitude += (mu["fat"] * lobules - magnitude) * layer
    fat_weight += (1 - fat_weight) * layer
    layer = soft_step(skin - depth, width)
    magnitude += (mu["skin"] - magnitude) * layer
    fat_weight *= 1 - layer
    magnitude *= 1 + u(0, 0.12) * canvas.field(u(2, 5))
    magnitude *= soft_step(depth, width)
    fat_weight *= soft_step(depth, width)
    return magnitude, fat_weight


def brain(canvas: Canvas, tissues: Tissues, mu: dict[str, float]) -> tuple[Array, Array]:
    """Magnitude of the brain, and its soft support."""
    u, grey, white, support = canvas.rng.uniform, tissues.grey, tissues.white, tissues.support
    fluid = np.clip(support - grey - white, 0, 1) * np.float32(np.exp(canvas.rng.normal(0.2, 0.5)))
    # The template is a mean of many heads, so its edges are soft; a power makes them crisp again.
    power = u(0.9, 2.4)
    grey, white, fluid = (np.clip(m, 0, 1) ** power for m in (grey, white, fluid))
    total = grey + white + fluid + 1e-4
    fine = canvas.field(u(1.0, 2.5))
    patchy = canvas.field(u(5, 20))
    grey_value = mu["grey"] * (1 + u(0, 0.05) * patchy + u(0, 0.04) * fine)
    white_value = mu["white"] * (1 + u(0, 0.04) * canvas.field(25) + u(0, 0.03) * fine)
    fluid_value = mu["fluid"] * np.clip(1 + u(0, 0.25) * canvas.field(u(2, 6)), 0, 3)
    magnitude = (grey * grey_value + white * white_value + fluid * fluid_value) / total
    magnitude += u(0, 2.0) * (mu["white"] - mu["grey"]) / 0.3 * tissues.detail * 0.5
    # Vessels: level lines of a smooth field, cut to pieces by another.
    if u() < 0.6:
        lines = np.abs(canvas.field(u(8, 25)))
        gate = soft_step(canvas.field(u(8, 20)) - u(0.6, 1.6), 0.3)
        weight = np.exp(-((lines * 14 / (u(0.6, 1.6))) ** 2)) * gate
        magnitude += (u(0.0, 2.0) - magnitude) * weight * u(0.2, 0.9)
    # A few lesions or cysts, so that a surprise is not erased.
    if u() < 0.15:
        spot = soft_step((canvas.field(u(5, 15)) - u(1.6, 2.4)) * 3, 1.0)
        magnitude += (u(0.0, 1.6) - magnitude) * spot
    return np.clip(magnitude, 0, None), np.clip(support * 1.02, 0, 1)


def phase(canvas: Canvas) -> Array:
    """Smooth phase in radians: ramps and waves, or the phase of a complex random field.

    The second kind has vortices, as the phase of one receive coil does where it sees nothing.
    """
    rng, u, size = canvas.rng, canvas.rng.uniform, float(max(canvas.shape))
    out = np.full(canvas.shape, u(-math.pi, math.pi), np.float32)
    for axis, count in enumerate(canvas.shape):
        ramp = np.linspace(-0.5, 0.5, count, dtype=np.float32) * np.float32(rng.normal(0, 2.0))
        out += ramp[:, None] if axis == 0 else ramp[None]
    if u() < 0.5:
        length = size * u(0.25, 0.8)
        a, b = canvas.field_px(length), canvas.field_px(length)
        out += np.angle(rng.normal(0, 0.8) + a + 1j * b).astype(np.float32)
    else:
        out += u(0, 1.2) * canvas.field_px(size * u(0.2, 0.7))
    return out + np.float32(u(0, 0.06)) * canvas.field_px(u(4, 15))


def blur(rng: np.random.Generator, x: NDArray[np.complex64]) -> NDArray[np.complex64]:
    """Finite k-space support: an ellipse or a rectangle, with or without apodisation."""
    if rng.random() < 0.25:
        return x
    ny, nx = x.shape
    ky = np.abs(np.fft.fftfreq(ny).astype(np.float32) * 2)[:, None] / np.float32(rng.uniform(0.7, 1.05))
    kx = np.abs(np.fft.fftfreq(nx).astype(np.float32) * 2)[None] / np.float32(rng.uniform(0.7, 1.05))
    radius = np.sqrt(ky**2 + kx**2) if rng.random() < 0.6 else np.maximum(ky, kx)
    soft = rng.uniform(0.02, 0.6)
    window = np.clip((1 - radius) / np.float32(soft), 0, 1)
    window = 0.5 - 0.5 * np.cos(np.pi * window)
    return np.asarray(np.fft.ifft2(np.fft.fft2(x) * window), np.complex64)
