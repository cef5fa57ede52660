"""Where things are in a synthetic head: a cut through a deformed template, and the layers around it.

The template: Copyright (C) 1993-2009 Louis Collins, McConnell Brain Imaging Centre, Montreal
Neurological Institute, McGill University; permission to use, copy, modify and distribute for any
purpose and without fee, with this notice kept.
"""

from __future__ import annotations

import functools
import math
import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from invdiff.training.random_fields import Array, Canvas


@functools.lru_cache(maxsize=1)
def _volumes() -> tuple[Array, Array]:
    """Template maps, and the affine from mm to voxels.

    Returns:
        ``(4, X, Y, Z)``: grey matter, white matter, brain support, T1 detail that the tissue maps
        do not explain; and the 3x4 affine from world mm to voxel indices.
    """
    try:
        from nilearn import datasets
    except ImportError:
        raise ValueError(
            "The brain synthesiser needs nilearn, which is not installed: pip install 'invdiff[train]'."
        ) from None
    from scipy import ndimage

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = datasets.load_mni152_gm_template(resolution=1)
        grey = np.asarray(image.get_fdata(), np.float32)
        white = np.asarray(datasets.load_mni152_wm_template(resolution=1).get_fdata(), np.float32)
        mask = np.asarray(datasets.load_mni152_brain_mask(resolution=1).get_fdata(), np.float32)
        t1 = np.asarray(datasets.load_mni152_template(resolution=1).get_fdata(), np.float32)
    grey, white, t1 = grey / grey.max(), white / white.max(), t1 / t1.max()
    # The mask has a hole at the brain stem's cistern and jagged edges.
    support = ndimage.gaussian_filter(ndimage.binary_closing(mask > 0.5, iterations=4).astype(np.float32), 0.8)
    fluid = np.clip(support - grey - white, 0, 1)
    inside = mask > 0.5
    design = np.stack([v[inside] for v in (grey, white, fluid)], axis=1)
    weights = np.linalg.lstsq(design, t1[inside], rcond=None)[0]
    detail = np.where(inside, t1 - np.tensordot(weights, np.stack([grey, white, fluid]), 1), 0)
    detail -= ndimage.gaussian_filter(detail, 6.0)
    volumes = np.stack([grey, white, support, detail.astype(np.float32)]).astype(np.float32)
    return volumes, np.linalg.inv(image.affine)[:3].astype(np.float32)


def _rotation(angles: NDArray[np.float64]) -> NDArray[np.float64]:
    """Product of rotations about x, y and z by the given angles (radians)."""
    out = np.eye(3)
    for axis, angle in enumerate(angles):
        c, s = math.cos(angle), math.sin(angle)
        turn = np.eye(3)
        i, j = [(1, 2), (2, 0), (0, 1)][axis]
        turn[i, i], turn[i, j], turn[j, i], turn[j, j] = c, -s, s, c
        out = out @ turn
    return out


@dataclass(frozen=True)
class Tissues:
    """Maps over the pixels: grey and white matter, support of the brain, detail that these do not explain."""

    grey: Array
    white: Array
    support: Array
    detail: Array


def cut_tissues(canvas: Canvas, orientation: str, position: float) -> Tissues:
    """Cut the deformed template."""
    volumes, to_voxel = _volumes()
    points = _deformed_plane(canvas, orientation, position)
    index = np.tensordot(to_voxel[:, :3], points, 1) + to_voxel[:, 3, None, None]
    return Tissues(*_interpolate(volumes, index))


def _deformed_plane(canvas: Canvas, orientation: str, position: float) -> Array:
    """Points ``(3, ny, nx)`` of the template, in mm, that the pixels of a slice show."""
    rng = canvas.rng
    v, u = canvas.grid(np.float32)
    constant = np.full_like(u, position)
    # Rows run from the front (axial) or the top (others); the centre is the middle of the head.
    if orientation == "axial":
        points = np.stack([u, -v - 18, constant])
    elif orientation == "coronal":
        points = np.stack([u, constant, -v + 4])
    else:
        points = np.stack([constant, -u - 18, -v + 4])
    shift = rng.normal(0, 3, 2)
    rows, columns = {"axial": (1, 0), "coronal": (2, 0), "sagittal": (2, 1)}[orientation]
    points[rows] += np.float32(shift[0])
    points[columns] += np.float32(shift[1])
    in_plane = {"axial": 2, "coronal": 1, "sagittal": 0}[orientation]
    angles = rng.normal(0, math.radians(5), 3)
    angles[in_plane] = rng.normal(0, math.radians(7))
    zoom = np.exp(rng.normal(0, 0.06, 3))
    shear = np.eye(3) + rng.normal(0, 0.02, (3, 3))
    affine = (shear @ _rotation(angles)) * zoom[None]
    points = np.tensordot(affine.astype(np.float32), points, 1)
    # Long waves move lobes; short waves make the folds of another person.
    for wavelength, amplitude in ((45.0, rng.uniform(1, 5)), (16.0, rng.uniform(0.5, 2.2)), (8, 0.5)):
        for axis in range(3):
            points[axis] += np.float32(amplitude) * canvas.field(wavelength)
    return np.asarray(points)


def _interpolate(volumes: Array, index: Array) -> Array:
    """Trilinear values ``(4, ny, nx)`` at voxel indices ``(3, ny, nx)``; one set of weights serves all maps."""
    flat = index.reshape(3, -1)
    limits = np.array(volumes.shape[1:])[:, None]
    flat = np.clip(flat, 0, limits - 1.001)
    base = flat.astype(np.int32)
    f = (flat - base).astype(np.float32)
    out = np.zeros((4, flat.shape[1]), np.float32)
    strides = np.array([volumes.shape[2] * volumes.shape[3], volumes.shape[3], 1])
    start = (base * strides[:, None]).sum(0)
    table = volumes.reshape(4, -1)
    for corner in range(8):
        bits = np.array([corner >> 2 & 1, corner >> 1 & 1, corner & 1])
        weight = np.prod(np.where(bits[:, None] == 1, f, 1 - f), axis=0)
        out += table[:, start + int(bits @ strides)] * weight
    return out.reshape(4, *index.shape[1:])


def face_and_neck(canvas: Canvas, orientation: str, position: float) -> NDArray[np.bool_]:
    """Face and neck as ellipses: where the head is larger than the wrapped brain."""
    rng, (v, u) = canvas.rng, canvas.grid()
    extra = np.zeros(canvas.shape, bool)
    wobble = 8 * canvas.field(30)

    def ellipse(cv: float, cu: float, rv: float, ru: float) -> NDArray[np.bool_]:
        radius = np.sqrt(((v - cv) / rv) ** 2 + ((u - cu) / ru) ** 2)
        return np.asarray((radius - 1) * min(rv, ru) + wobble < 0)

    if orientation == "axial" and position < -12:
        depth = min(1.0, (-12 - position) / 25)
        extra |= ellipse(-30, 0, 60 + 12 * depth, 66 + 4 * depth)
    elif orientation == "coronal":
        extra |= ellipse(80, 0, 70, rng.uniform(45, 65))
    elif orientation == "sagittal":
        extra |= ellipse(75, -40, 62, 50) | ellipse(95, 35, 80, rng.uniform(35, 50))
    return extra


@dataclass(frozen=True)
class Layers:
    """Distances in mm over the pixels of a head.

    Attributes:
        distance: From the hull of the brain, negative inside.
        depth: Below the skin, negative in air.
        fluid, inner, marrow, skull: Distance from the hull where the fluid under the skull, the inner table, the
            marrow and the whole skull end.
    """

    distance: Array
    depth: Array
    fluid: Array
    inner: Array
    marrow: Array
    skull: Array


def wrap(canvas: Canvas, support: Array, extra: NDArray[np.bool_]) -> Layers:
    """Wrap the brain in layers of random thickness; ``extra`` is head too."""
    from scipy import ndimage

    u, spacing = canvas.rng.uniform, canvas.spacing
    hull = ndimage.gaussian_filter(support, 5.0 / spacing) > 0.45
    if not hull.any():
        hull[canvas.shape[0] // 2, canvas.shape[1] // 2] = True
    distance = _distance(~hull, spacing) - _distance(hull, spacing)
    fluid = canvas.thickness(u(0.3, 4.0), 0.5, 35)
    inner = fluid + canvas.thickness(u(0.8, 2.5), 0.25, 25)
    marrow = inner + canvas.thickness(u(0.2, 4.5), 0.6, 25)
    skull = marrow + canvas.thickness(u(0.8, 2.5), 0.25, 25)
    soft = skull + canvas.thickness(u(2.5, 9.5), u(0.1, 0.35), 60)
    head = (distance < soft) | extra
    head = ndimage.gaussian_filter(head.astype(np.float32), 2.0 / spacing) > 0.5
    depth = _distance(head, spacing) - _distance(~head, spacing)
    return Layers(distance, depth, fluid, inner, marrow, skull)


def _distance(inside: NDArray[np.bool_], spacing: float) -> Array:
    """Distance in mm to the nearest pixel that is not inside."""
    from scipy import ndimage

    return np.asarray(ndimage.distance_transform_edt(inside), np.float32) * np.float32(spacing)
