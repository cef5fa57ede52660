"""Size, width and brightest side of a ring in an image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, optimize

from invdiff.errors import InvdiffError

__all__ = ["Rings", "measure_rings"]

Array: TypeAlias = NDArray[np.float64]
#: Directions and radii of the polar image.
_ANGLES, _RADII = 180, 128


@dataclass(frozen=True)
class Rings:
    """What `measure_rings` found, one entry per image.

    Args:
        diameter: Twice the mean radius of the brightest point over directions, in units of the pixel size.
        width: Mean full width at half maximum over directions.
        position_angle: Direction of the centre of brightness, degrees from up (north) to the left (east),
            from -180 to 180.
        asymmetry: ``|sum I e^{i angle}| / sum I`` along the ring, 0 for an even one.
        floor: Mean brightness inside a fifth of the radius over that on the ring: near 0 for a dark middle.
        roundness: Standard deviation of the radius over directions, over its mean.
        centre: Row and column, ``(n, 2)``.
    """

    diameter: Array
    width: Array
    position_angle: Array
    asymmetry: Array
    floor: Array
    roundness: Array
    centre: Array


def measure_rings(images: Array, pixel: float = 1.0) -> Rings:
    """Measure the ring in every image.

    The centre is where the radius of the brightest point varies least over directions, relative to its mean.
    Radial profiles are cubic interpolations of the image, smoothed by a pixel.

    Args:
        images: ``(n, y, x)``, brightness, north up and east to the left.
        pixel: Size of a pixel.

    Raises:
        InvdiffError: If images are not finite, or have no brightness.

    Reference:
        Event Horizon Telescope Collaboration, "First M87 results IV", ApJL 875, L4, 2019, section 9.
    """
    images = np.asarray(images, np.float64)
    if images.ndim != 3 or not np.isfinite(images).all() or (images.max((1, 2)) <= 0).any():
        raise InvdiffError(f"Rings are measured in finite, bright images (n, y, x), got shape {images.shape}.")
    rows = [_measure(image) for image in images]
    length, width, angle, strength, floor, round_, y, x = np.array(rows).T
    return Rings(pixel * length, pixel * width, angle, strength, floor, round_, np.stack([y, x], 1))


def _measure(image: Array) -> tuple[float, ...]:
    smooth = ndimage.gaussian_filter(image, 1.0)
    coefficients = ndimage.spline_filter(smooth, order=3)
    n = min(image.shape)
    theta = 2 * np.pi * np.arange(_ANGLES) / _ANGLES
    radii = np.linspace(0, 0.49 * n, _RADII)

    def polar(centre: Array) -> Array:
        at = (
            centre[0] - radii * np.cos(theta)[:, None],  # up, then to the left: north through east
            centre[1] - radii * np.sin(theta)[:, None],
        )
        return ndimage.map_coordinates(coefficients, at, order=3, prefilter=False, mode="constant")

    def uneven(centre: Array) -> float:
        radius = _peaks(polar(centre), radii)
        off = np.hypot(*(centre - middle)) / n
        return float(radius.std() / max(radius.mean(), 1.0) + 10 * max(off - 0.25, 0))

    weights = np.clip(smooth, 0, None)
    middle = np.array(ndimage.center_of_mass(weights))
    starts = [middle + 0.06 * n * np.array(step) for step in ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1))]
    best = min(starts, key=uneven)
    found = optimize.minimize(uneven, best, method="Nelder-Mead", options={"xatol": 0.02, "fatol": 1e-4})
    centre = found.x
    profile = polar(centre)
    radius = _peaks(profile, radii)
    peak = profile.max(1)
    inside = radii < 0.2 * radius.mean()
    floor = float(profile[:, inside].mean() / max(peak.mean(), 1e-12))
    mean = radius.mean()
    on_ring = np.abs(radii - mean) < 0.25 * mean
    brightness = (np.clip(profile[:, on_ring], 0, None) * radii[on_ring]).sum(1)
    moment = (brightness * np.exp(1j * theta)).sum() / max(brightness.sum(), 1e-12)
    widths = [_width(row, radii, k) for row, k in zip(profile, profile.argmax(1))]
    angle = float(np.rad2deg(np.angle(moment)))
    return 2 * mean, float(np.mean(widths)), angle, abs(moment), floor, radius.std() / mean, centre[0], centre[1]


def _peaks(profile: Array, radii: Array) -> Array:
    """Radius of the largest value of each row, between samples by a parabola."""
    k = profile.argmax(1).clip(1, profile.shape[1] - 2)
    rows = np.arange(len(profile))
    a, b, c = (profile[rows, k + step] for step in (-1, 0, 1))
    bend = a - 2 * b + c
    shift = np.where(np.abs(bend) > 1e-12, 0.5 * (a - c) / np.where(np.abs(bend) > 1e-12, bend, 1), 0).clip(-1, 1)
    return np.asarray(radii[k] + shift * (radii[1] - radii[0]))


def _width(row: Array, radii: Array, k: int) -> float:
    """Full width at half maximum around sample ``k``, up to the ends of the profile."""
    half = 0.5 * row[k]
    low, high = k, k
    while low > 0 and row[low] > half:
        low -= 1
    while high < len(row) - 1 and row[high] > half:
        high += 1
    return float(radii[high] - radii[low])
