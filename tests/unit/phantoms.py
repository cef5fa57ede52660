"""Ellipses and ellipsoids with exact line integrals, for tests of ray transforms."""

from __future__ import annotations

import numpy as np

#: Modified Shepp-Logan: value, half axes (x, y), centre (x, y), turn in degrees, in a square from -1 to 1.
SHEPP_LOGAN = [
    (1.0, 0.69, 0.92, 0.0, 0.0, 0.0),
    (-0.8, 0.6624, 0.874, 0.0, -0.0184, 0.0),
    (-0.2, 0.11, 0.31, 0.22, 0.0, -18.0),
    (-0.2, 0.16, 0.41, -0.22, 0.0, 18.0),
    (0.1, 0.21, 0.25, 0.0, 0.35, 0.0),
    (0.1, 0.046, 0.046, 0.0, 0.1, 0.0),
    (0.1, 0.046, 0.046, 0.0, -0.1, 0.0),
    (0.1, 0.046, 0.023, -0.08, -0.605, 0.0),
    (0.1, 0.023, 0.023, 0.0, -0.606, 0.0),
    (0.1, 0.023, 0.046, 0.06, -0.605, 0.0),
]


def _unit(points: np.ndarray, ellipse: tuple[float, ...]) -> np.ndarray:
    """Vectors ``(..., 2)`` as (x, y), turned and scaled so that the ellipse becomes a unit circle."""
    _, a, b, _, _, turn = ellipse
    c, s = np.cos(np.deg2rad(turn)), np.sin(np.deg2rad(turn))
    x, y = points[..., 0], points[..., 1]
    return np.stack([(c * x + s * y) / a, (c * y - s * x) / b], -1)


def chord(points: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """Length, in units of the directions, of the lines' way through the unit ball."""
    a, b, c = (directions**2).sum(-1), (points * directions).sum(-1), (points**2).sum(-1) - 1
    return 2 * np.sqrt(np.maximum(b * b - a * c, 0)) / a


def ellipse_integrals(points: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """Line integrals of the phantom through ``points`` along ``directions``, both ``(..., 2)`` as (x, y)."""
    size = np.linalg.norm(directions, axis=-1)
    out = np.zeros(points.shape[:-1])
    for e in SHEPP_LOGAN:
        out += e[0] * size * chord(_unit(points - np.array(e[3:5]), e), _unit(directions, e))
    return out


def shepp_logan(n: int, fine: int = 4) -> np.ndarray:
    """Means of the phantom over ``n x n`` pixels, rows along y."""
    u = (np.arange(n * fine) - (n * fine - 1) / 2) * 2 / (n * fine)
    points = np.stack(np.meshgrid(u, u), -1)
    inside = [e[0] * ((_unit(points - np.array(e[3:5]), e) ** 2).sum(-1) <= 1) for e in SHEPP_LOGAN]
    return sum(inside).reshape(n, fine, n, fine).mean((1, 3))


def ball(
    sizes: tuple[int, ...], spacing: tuple[float, ...], centre: tuple[float, ...], radius: float
) -> np.ndarray:
    """Share of every voxel that lies within a ball, in the order of the axes."""
    fine = 4
    axes = [(np.arange(n * fine) - (n * fine - 1) / 2) * h / fine - c for n, h, c in zip(sizes, spacing, centre)]
    square = sum(a.reshape([-1 if i == j else 1 for j in range(len(sizes))]) ** 2 for i, a in enumerate(axes))
    inside = (square <= radius**2).astype(float)
    for i, n in enumerate(sizes):
        inside = inside.reshape(*inside.shape[:i], n, fine, *inside.shape[i + 1 :]).mean(i + 1)
    return inside
