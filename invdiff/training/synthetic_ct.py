"""Synthetic attenuation maps by domain randomisation: sections of bodies, teeth and bones, and made things.

A map is a stack of shapes painted one over another, each with a soft edge of one pixel and a material of its own,

    x = PSF * [ m_1 (1 + tau_1) painted over by m_2 (1 + tau_2), ... ]

with attenuation ``m`` and texture ``tau`` (grain, trabeculae, foam). Shapes are closed curves in polar form,
``r(theta) = R exp(sum_k a_k cos(k theta + phi_k))``, polygons, capsules, rings, and level sets of smooth random
fields. No measured image enters. Every random number comes from one generator keyed by the seed, and held-out maps
have keys of their own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from invdiff.training.random_fields import Canvas

__all__ = ["attenuation_map"]

Array = NDArray[np.float32]
_TRAINING_KEY, _HELD_OUT_KEY = 0x63747472, 0x63746865


def attenuation_map(seed: int, size: int | None = None, *, held_out: bool = False) -> Array:
    """Draw one attenuation map; formula in the module docstring.

    Args:
        seed: Non-negative integer; the same seed gives the same map.
        size: Pixels in both directions, at least 32; random from 160 to 480 where None, so that a prior meets
            coarse and fine sampling of the same shapes.
        held_out: Draw from the stream of held-out maps, which training never sees.

    Returns:
        float32 ``(size, size)``, not negative, 0 in air; the 99th percentile over the frame is
        1, or less where the maximum would pass 2.5.
    """
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise ValueError(f"seed must be a non-negative integer; got {seed!r}.")
    rng = np.random.default_rng([int(seed), _HELD_OUT_KEY if held_out else _TRAINING_KEY])
    drawn = int(rng.integers(160, 481))
    size = drawn if size is None else size
    if size < 32:
        raise ValueError(f"size must be at least 32 pixels; got {size}.")
    kind = rng.choice(["body", "hard", "made"], p=[0.35, 0.35, 0.3])
    scene = _Scene(Canvas(rng, (size, size), 2.0 / size))
    {"body": _body, "hard": _hard, "made": _made}[str(kind)](scene)
    x = scene.image
    if rng.random() < 0.7:
        x = ndimage.gaussian_filter(x, rng.uniform(0.2, 1.0), mode="nearest")
    level = max(float(np.percentile(x, 99)), 0.4 * float(x.max()))  # small things fill less than a hundredth
    return np.asarray(np.clip(x, 0, None) / level, np.float32)


class _Scene:
    """An image under construction, in coordinates from -1 to 1."""

    def __init__(self, canvas: Canvas) -> None:
        self.canvas, self.rng, self.u = canvas, canvas.rng, canvas.rng.uniform
        self.image = np.zeros(canvas.shape, np.float32)
        v, u = canvas.grid(np.float32)
        if self.rng.random() < 0.7:  # nothing that grew is quite round or straight
            bend = self.u(0, 0.06)
            v, u = v + bend * canvas.field(0.7), u + bend * canvas.field(0.7)
        self.v, self.x = np.asarray(v, np.float32), np.asarray(u, np.float32)

    def paint(self, mask: Array, value: float, grain: float = 0.0, length: float = 0.05) -> None:
        """Paint a material where the mask is 1, with a texture of relative size ``grain``."""
        material: Any = np.float32(value)
        if grain:
            material = material * (1 + np.float32(grain) * self.canvas.field(length))
        self.image += mask * (material - self.image)

    def soft(self, distance: Array) -> Array:
        """Mask of a shape from the distance inside its edge."""
        return np.asarray(np.clip(0.5 + distance / self.canvas.spacing, 0, 1), np.float32)

    def polar(self, cx: float, cy: float, turn: float = 0.0, squeeze: float = 1.0) -> tuple[Array, Array]:
        """Radius and angle about a centre, with one axis squeezed."""
        c, s = np.float32(np.cos(turn)), np.float32(np.sin(turn))
        a, b = self.x - np.float32(cx), self.v - np.float32(cy)
        a, b = c * a + s * b, (c * b - s * a) / np.float32(squeeze)
        return np.hypot(a, b), np.arctan2(b, a)

    def blob(
        self, cx: float, cy: float, radius: float, rough: float = 0.08, squeeze: float = 1.0, turn: float = 0.0
    ) -> Array:
        """Distance inside a closed curve in polar form."""
        r, theta = self.polar(cx, cy, turn, squeeze)
        wave = np.zeros_like(r)
        for k in range(2, 2 + int(self.rng.integers(1, 7))):
            wave += np.float32(self.rng.normal() * rough / k) * np.cos(k * theta + np.float32(self.u(0, 6.28)))
        return np.asarray((np.float32(radius) * np.exp(wave) - r) * np.float32(min(1.0, squeeze)), np.float32)

    def polygon(self, cx: float, cy: float, radius: float, sides: int, turn: float, squeeze: float = 1.0) -> Array:
        """Distance inside a regular polygon, stretched along one axis."""
        r, theta = self.polar(cx, cy, turn, squeeze)
        part = np.pi / sides
        fold = np.abs((theta + part) % (2 * part) - part)
        inside = np.float32(radius * np.cos(part)) - r * np.cos(fold)
        return np.asarray(inside * np.float32(min(1.0, squeeze)), np.float32)

    def capsule(self, a: tuple[float, float], b: tuple[float, float], radius: float) -> Array:
        """Distance inside the set of points within ``radius`` of a segment."""
        d = np.asarray([b[0] - a[0], b[1] - a[1]], np.float32)
        length2 = max(float(d @ d), 1e-8)
        t = np.clip(((self.x - a[0]) * d[0] + (self.v - a[1]) * d[1]) / length2, 0, 1)
        return np.asarray(radius - np.hypot(self.x - a[0] - t * d[0], self.v - a[1] - t * d[1]), np.float32)

    def foam(self, length: float, share: float) -> Array:
        """Mask of the level set of a random field that fills about ``share`` of the plane."""
        field = self.canvas.field(length) + 0.5 * self.canvas.field(length / 2)
        steep = np.float32(length / self.canvas.spacing / 2.5)
        return np.asarray(np.clip(0.5 + steep * (field - np.quantile(field, 1 - share)), 0, 1), np.float32)

    def within(self, distance: Array) -> tuple[float, float] | None:
        """A random place well inside a shape, or None where it has no inside."""
        places = np.argwhere(distance > 0.03)
        if not len(places):
            return None
        row, column = places[int(self.rng.integers(len(places)))]
        scale, (ny, nx) = self.canvas.spacing, self.canvas.shape
        return (column - (nx - 1) / 2) * scale, (row - (ny - 1) / 2) * scale


def _body(s: _Scene) -> None:
    """Trunk, limb or head: skin, fat, muscle, organs, lungs, bones, air and contrast medium."""
    u = s.u
    water = 1.0
    outline = s.blob(u(-0.08, 0.08), u(-0.08, 0.08), u(0.6, 0.95), 0.05, u(0.55, 1.0), u(-0.3, 0.3))
    s.paint(s.soft(outline), water * u(0.85, 0.95), 0.02, 0.1)
    wall = s.soft(outline - u(0.02, 0.15))
    s.paint(wall, water * u(1.0, 1.08), u(0, 0.05), u(0.02, 0.1))
    for _ in range(s.rng.integers(2, 9)):
        place = s.within(outline - 0.1)
        if place is None:
            return
        organ = s.blob(*place, u(0.08, 0.35), 0.2, u(0.5, 1.0), u(0, 3.1))
        s.paint(s.soft(organ) * wall, water * u(0.92, 1.15), u(0, 0.03), u(0.02, 0.1))
    if s.rng.random() < 0.4:
        for side in (-1, 1):
            lung = s.blob(side * u(0.28, 0.42), u(-0.2, 0.05), u(0.22, 0.4), 0.15, u(0.6, 1.1), side * u(0.8, 1.6))
            mask = s.soft(lung) * wall
            s.paint(mask, water * u(0.2, 0.35), 0.15, 0.05)
            vessels = s.foam(u(0.03, 0.07), u(0.02, 0.08))
            s.paint(vessels * mask, water * u(0.7, 1.0))
    for _ in range(s.rng.integers(0, 4)):
        place = s.within(outline - 0.12)
        if place:
            s.paint(s.soft(s.blob(*place, u(0.02, 0.15), 0.2)) * wall, u(0, 0.1))
    for _ in range(s.rng.integers(1, 5)):
        place = s.within(outline - 0.15)
        if place:
            _bone(s, *place, u(0.05, 0.22), wall)
    if s.rng.random() < 0.5:  # ribs
        for _ in range(s.rng.integers(4, 14)):
            r, theta = s.polar(0, 0)
            depth, middle, half = u(0.05, 0.2), u(-3.1, 3.1), u(0.05, 0.35)
            arc = np.minimum(
                0.018 - np.abs(outline - depth), (half - np.abs((theta - middle + 3.14) % 6.28 - 3.14)) * r
            )
            s.paint(s.soft(arc), water * u(1.5, 2.2))
    for _ in range(s.rng.integers(0, 6)):  # vessels with contrast medium, calcifications
        place = s.within(outline - 0.1)
        if place:
            s.paint(s.soft(s.blob(*place, u(0.008, 0.05), 0.1)), water * u(1.2, 2.5))


def _bone(s: _Scene, cx: float, cy: float, radius: float, where: Array | float) -> None:
    """Cortical shell around trabeculae in marrow."""
    u = s.u
    edge = s.blob(cx, cy, radius, 0.15, u(0.6, 1.0), u(0, 3.1))
    s.paint(s.soft(edge) * where, u(1.6, 2.4), 0.03, 0.05)
    inside = s.soft(edge - radius * u(0.1, 0.4)) * where
    s.paint(inside, u(0.9, 1.3))
    if s.rng.random() < 0.7:
        s.paint(inside * s.foam(u(0.015, 0.05), u(0.2, 0.5)), u(1.3, 2.0))


def _hard(s: _Scene) -> None:
    """Tooth, bone, shell or seed: nested layers, a cavity, cracks and pores, at times in a holder."""
    u = s.u
    if s.rng.random() < 0.35:
        holder = s.blob(0, 0, u(0.8, 0.95), 0.0)
        s.paint(s.soft(holder) * (1 - s.soft(holder - u(0.02, 0.08))), u(0.1, 0.35))
    count = int(s.rng.integers(1, 3)) if s.rng.random() < 0.25 else 1
    for n in range(count):
        radius = u(0.3, 0.8) / count**0.7
        cx, cy = (u(-0.15, 0.15), u(-0.15, 0.15)) if count == 1 else ((n - 0.5) * u(0.7, 0.9), u(-0.3, 0.3))
        outline = s.blob(cx, cy, radius, u(0.05, 0.35), u(0.6, 1.0), u(0, 3.1))
        body = s.soft(outline)
        s.paint(body, u(0.5, 1.0), u(0, 0.06), u(0.02, 0.2))
        layer, value = 0.0, u(0.8, 1.2)
        for _ in range(s.rng.integers(0, 4)):  # enamel, cement, rings of growth
            layer += radius * u(0.04, 0.2)
            partial = s.foam(u(0.4, 0.9), u(0.4, 1.0)) if s.rng.random() < 0.4 else np.float32(1)
            s.paint(body * (1 - s.soft(outline - layer)) * partial, value)
            value *= u(0.7, 1.2)
            s.paint(s.soft(outline - layer), value * u(0.6, 1.0), u(0, 0.05), u(0.02, 0.2))
        for _ in range(s.rng.integers(0, 4)):  # pulp, marrow, voids
            place = s.within(outline - 0.3 * radius)
            if place:
                cavity = s.blob(*place, radius * u(0.05, 0.4), 0.3, u(0.3, 1.0), u(0, 3.1))
                s.paint(s.soft(cavity) * body, u(0, 0.35))
        if s.rng.random() < 0.3:
            s.paint(body * s.soft(outline - radius * u(0.1, 0.3)) * s.foam(u(0.02, 0.08), u(0.2, 0.6)), u(0, 0.3))
        for _ in range(s.rng.integers(0, 4)):  # cracks and canals
            a, b = s.within(outline), s.within(outline)
            if a and b:
                s.paint(s.soft(s.capsule(a, b, u(0.003, 0.012))) * body, u(0, 0.4))


def _made(s: _Scene) -> None:
    """Castings, bolts, boards, fibres and foams: straight edges, holes, pores and several materials."""
    u = s.u
    whole: Array | None = None
    for _ in range(s.rng.integers(1, 6)):
        cx, cy, radius = u(-0.35, 0.35), u(-0.35, 0.35), u(0.15, 0.6)
        form = s.rng.random()
        if form < 0.35:
            shape = s.polygon(cx, cy, radius, int(s.rng.integers(3, 9)), u(0, 3.1), u(0.3, 1.0))
        elif form < 0.6:
            shape = s.blob(cx, cy, radius, 0.0)
        elif form < 0.8:
            shape = s.capsule((cx, cy), (cx + u(-0.6, 0.6), cy + u(-0.6, 0.6)), u(0.03, 0.2))
        else:
            ring = s.blob(cx, cy, radius, 0.0)
            shape = np.minimum(ring, radius * u(0.1, 0.6) - ring)
        s.paint(s.soft(shape), u(0.2, 1.2), u(0, 0.03) if s.rng.random() < 0.5 else 0.0, u(0.02, 0.2))
        whole = shape if whole is None else np.maximum(whole, shape)
    assert whole is not None
    body = s.soft(whole)
    for _ in range(s.rng.integers(0, 12)):  # drilled holes, inserts
        place = s.within(whole)
        if place:
            sides = int(s.rng.integers(3, 9))
            hole = (
                s.blob(*place, u(0.01, 0.12), 0.0)
                if s.rng.random() < 0.6
                else s.polygon(*place, u(0.02, 0.12), sides, u(0, 3))
            )
            s.paint(s.soft(hole) * body, 0.0 if s.rng.random() < 0.6 else u(0.3, 1.5))
    if s.rng.random() < 0.3:
        s.paint(body * s.foam(u(0.02, 0.12), u(0.1, 0.5)), u(0, 0.8))
    if s.rng.random() < 0.25:  # bundles of fibres, lattices
        pitch, turn = u(0.05, 0.15), u(0, 3.1)
        c, d = np.cos(turn) * s.x + np.sin(turn) * s.v, np.cos(turn) * s.v - np.sin(turn) * s.x
        dots = np.hypot((c + pitch / 2) % pitch - pitch / 2, (d + pitch / 2) % pitch - pitch / 2)
        s.paint(s.soft(np.asarray(pitch * u(0.15, 0.4) - dots, np.float32)) * body, u(0, 1.3))
    for _ in range(s.rng.integers(0, 30)):  # pores and inclusions
        place = s.within(whole)
        if place:
            s.paint(
                s.soft(s.blob(*place, u(0.004, 0.025), 0.1)) * body, 0.0 if s.rng.random() < 0.8 else u(0.5, 1.5)
            )


def describe() -> dict[str, Any]:
    """Facts about the synthesiser for a prior's card."""
    return {"generator": "invdiff.training.synthetic_ct.attenuation_map", "measured_images": "none"}
