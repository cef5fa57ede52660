"""Smooth random fields on a pixel grid, from which synthetic images draw shape, texture and shading."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Canvas:
    """A pixel grid with a generator of random numbers.

    Attributes:
        rng: Source of everything random; the order of calls decides the image.
        shape: Pixels ``(ny, nx)``.
        spacing: Size of a pixel in mm.
    """

    rng: np.random.Generator
    shape: tuple[int, int]
    spacing: float

    def field(self, length: float) -> Array:
        """Smooth Gaussian random field of about unit variance and correlation length ``length`` mm."""
        return self.field_px(length / self.spacing)

    def field_px(self, length: float) -> Array:
        """Smooth Gaussian random field of about unit variance and correlation length ``length`` px."""
        length = max(float(length), 1.0)
        rows = _basis(self.shape[0], length, self.rng.random())
        columns = _basis(self.shape[1], length, self.rng.random())
        knots = self.rng.standard_normal((rows.shape[1], columns.shape[1])).astype(np.float32)
        # A sum of B-splines with unit-variance weights has variance (0.479)^2 on average in 2-D.
        return np.asarray(rows @ knots @ columns.T / 0.479, np.float32)

    def thickness(self, mean: float, spread: float, length: float) -> Array:
        """Log-normal thickness in mm that varies over ``length`` mm."""
        return np.asarray(mean * np.exp(spread * self.field(length)), np.float32)

    def grid(self, dtype: type[np.floating[Any]] = np.float64) -> tuple[NDArray[Any], NDArray[Any]]:
        """Rows and columns of the pixels in mm from the centre, each ``(ny, nx)``."""
        rows, columns = ((np.arange(n, dtype=dtype) - (n - 1) / 2) * self.spacing for n in self.shape)
        v, u = np.meshgrid(rows, columns, indexing="ij")
        return v, u


def _basis(count: int, length: float, offset: float) -> Array:
    """Uniform cubic B-spline basis on ``count`` points, one knot per ``length`` points."""
    t = np.arange(count, dtype=np.float32) / np.float32(length) + np.float32(offset)
    cell = np.floor(t).astype(int)
    f = t - cell
    out = np.zeros((count, int(cell[-1]) + 4), np.float32)
    rows = np.arange(count)
    out[rows, cell] = (1 - f) ** 3 / 6
    out[rows, cell + 1] = (3 * f**3 - 6 * f**2 + 4) / 6
    out[rows, cell + 2] = (-3 * f**3 + 3 * f**2 + 3 * f + 1) / 6
    out[rows, cell + 3] = f**3 / 6
    return out


def soft_step(distance: NDArray[Any], width: float) -> Array:
    """Soft step: 0 where distance is well below zero, 1 well above, over ``width``."""
    return np.asarray(np.clip(distance / np.float32(width) + 0.5, 0, 1))
