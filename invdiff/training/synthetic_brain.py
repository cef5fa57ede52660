"""Synthetic complex head slices by domain randomisation.

A slice is a random cut through the grey- and white-matter probability maps of the ICBM152 2009a
nonlinear template (bundled with nilearn), moved by a random affine and elastic deformation, wrapped
in drawn layers of fluid, skull, muscle, fat and skin, and given random tissue contrasts, texture,
receive shading, point-spread function and phase:

    x(r) = PSF * [ m(r) exp(i phi(r)) ],    m(r) = b(r) sum_k p_k(u(r)) mu_k (1 + tau_k(r))

with tissue probabilities p_k, deformation u, tissue intensities mu_k, texture tau_k, shading b and
phase phi. No measured image enters except the template. Every random number comes from one
generator keyed by the seed, and the keys of held-out slices differ from those of training slices,
so that the two sets are disjoint for all seeds.

The template: Copyright (C) 1993-2009 Louis Collins, McConnell Brain Imaging Centre, Montreal
Neurological Institute, McGill University; permission to use, copy, modify and distribute for any
purpose and without fee, with this notice kept.
"""

from __future__ import annotations

import functools
import math
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["brain_slice"]

Array = NDArray[np.float32]

# Second word of the generator's key: one for training slices, one for held-out slices.
_TRAINING_KEY = 0x7472616E
_HELD_OUT_KEY = 0x68656C64
# Nominal head extent in mm, (rows, columns), per orientation; sets the pixel spacing.
_EXTENT = {"axial": (212.0, 168.0), "coronal": (196.0, 168.0), "sagittal": (200.0, 212.0)}


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


def _field(rng: np.random.Generator, shape: tuple[int, int], length: float) -> Array:
    """Smooth Gaussian random field of about unit variance and correlation length ``length`` px."""
    length = max(float(length), 1.0)
    rows = _basis(shape[0], length, rng.random())
    columns = _basis(shape[1], length, rng.random())
    knots = rng.standard_normal((rows.shape[1], columns.shape[1])).astype(np.float32)
    # A sum of B-splines with unit-variance weights has variance (0.479)^2 on average in 2-D.
    return np.asarray(rows @ knots @ columns.T / 0.479, np.float32)


def _edge(distance: NDArray[Any], width: float) -> Array:
    """Soft step: 0 where distance is well below zero, 1 well above, over ``width``."""
    return np.asarray(np.clip(distance / np.float32(width) + 0.5, 0, 1))


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


def _tissues(
    rng: np.random.Generator, shape: tuple[int, int], orientation: str, position: float, spacing: float
) -> tuple[Array, Array, Array, Array]:
    """Cut the deformed template: grey, white, support, detail, each ``shape``."""
    ny, nx = shape
    v, u = np.meshgrid(
        (np.arange(ny, dtype=np.float32) - (ny - 1) / 2) * spacing,
        (np.arange(nx, dtype=np.float32) - (nx - 1) / 2) * spacing,
        indexing="ij",
    )
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
            points[axis] += np.float32(amplitude) * _field(rng, shape, wavelength / spacing)
    volumes, to_voxel = _volumes()
    index = np.tensordot(to_voxel[:, :3], points, 1) + to_voxel[:, 3, None, None]
    # One set of trilinear weights serves the four maps.
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
    grey, white, support, detail = (row.reshape(ny, nx) for row in out)
    return grey, white, support, detail


def _contrast(rng: np.random.Generator) -> dict[str, float]:
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


def _extra_head(
    rng: np.random.Generator, shape: tuple[int, int], orientation: str, position: float, spacing: float
) -> NDArray[np.bool_]:
    """Face and neck as ellipses: where the head is larger than the wrapped brain."""
    ny, nx = shape
    v, u = np.meshgrid(
        (np.arange(ny) - (ny - 1) / 2) * spacing, (np.arange(nx) - (nx - 1) / 2) * spacing, indexing="ij"
    )
    extra = np.zeros(shape, bool)
    wobble = 8 * _field(rng, shape, 30 / spacing)

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


def _head(
    rng: np.random.Generator,
    shape: tuple[int, int],
    support: Array,
    extra: NDArray[np.bool_],
    mu: dict[str, float],
    spacing: float,
) -> tuple[Array, Array, Array, Array]:
    """Everything around the brain.

    Returns:
        Magnitude outside the brain's hull, weight of fat (for its phase), depth below the skin in
        mm, and the soft indicator of the hull's inside.
    """
    from scipy import ndimage

    u = rng.uniform
    hull = ndimage.gaussian_filter(support, 5.0 / spacing) > 0.45
    if not hull.any():
        hull[shape[0] // 2, shape[1] // 2] = True
    outside = np.asarray(ndimage.distance_transform_edt(~hull), np.float32) * np.float32(spacing)
    inside = np.asarray(ndimage.distance_transform_edt(hull), np.float32) * np.float32(spacing)
    d = outside - inside

    def thickness(mean: float, spread: float, length: float) -> Array:
        return np.asarray(mean * np.exp(spread * _field(rng, shape, length / spacing)), np.float32)

    fluid = thickness(u(0.3, 4.0), 0.5, 35)
    inner = fluid + thickness(u(0.8, 2.5), 0.25, 25)
    marrow = inner + thickness(u(0.2, 4.5), 0.6, 25)
    skull = marrow + thickness(u(0.8, 2.5), 0.25, 25)
    soft = skull + thickness(u(2.5, 9.5), u(0.1, 0.35), 60)
    head = (d < soft) | extra
    head = ndimage.gaussian_filter(head.astype(np.float32), 2.0 / spacing) > 0.5
    depth = np.asarray(ndimage.distance_transform_edt(head), np.float32) * np.float32(spacing)
    depth -= np.asarray(ndimage.distance_transform_edt(~head), np.float32) * np.float32(spacing)

    width = spacing * u(0.8, 1.6)
    # Deep soft tissue: muscle with streaks of fat and, in the face, air and bone.
    streaks = _field(rng, shape, u(4, 10) / spacing) + 0.6 * _field(rng, shape, 20 / spacing)
    fatty = _edge((streaks - u(0.3, 1.2)) * 2, 1.0)
    empty = _edge((_field(rng, shape, u(7, 16) / spacing) - u(0.5, 1.3)) * 3, 1.0) * _edge(d - skull - 8, 6.0)
    magnitude = mu["muscle"] + (mu["fat"] - mu["muscle"]) * fatty
    magnitude = magnitude + (mu["bone"] - magnitude) * empty
    fat_weight = fatty * (1 - empty)
    skin = thickness(u(0.6, 2.2), 0.3, 30)
    fat = skin + thickness(u(1.0, 7.5), 0.4, 45)
    layer = _edge(fat - depth, width)
    lobules = 1 + u(0, 0.2) * _field(rng, shape, u(2, 5) / spacing)
    magnitude += (mu["fat"] * lobules - magnitude) * layer
    fat_weight += (1 - fat_weight) * layer
    layer = _edge(skin - depth, width)
    magnitude += (mu["skin"] - magnitude) * layer
    fat_weight *= 1 - layer
    magnitude *= 1 + u(0, 0.12) * _field(rng, shape, u(2, 5) / spacing)
    magnitude *= _edge(depth, width)
    fat_weight *= _edge(depth, width)
    # Skull from the outside inwards, then the fluid under it.
    spongy = mu["marrow"] * np.clip(1 + 0.4 * _field(rng, shape, 3 / spacing), 0, 3)
    for boundary, value, is_fat in (
        (skull, mu["bone"], 0.0),
        (marrow, spongy, 1.0),
        (inner, mu["bone"], 0.0),
        (fluid, mu["outer"] * (1 + 0.2 * _field(rng, shape, 4 / spacing)), 0.0),
    ):
        layer = _edge(boundary - d, width)
        magnitude += (value - magnitude) * layer
        fat_weight += (is_fat - fat_weight) * layer
    return magnitude, fat_weight, depth, _edge(-d + 0.5, width)


def _brain(
    rng: np.random.Generator,
    shape: tuple[int, int],
    maps: tuple[Array, Array, Array, Array],
    mu: dict[str, float],
    spacing: float,
) -> tuple[Array, Array]:
    """Magnitude of the brain, and its soft support."""
    u = rng.uniform
    grey, white, support, detail = maps
    fluid = np.clip(support - grey - white, 0, 1) * np.float32(np.exp(rng.normal(0.2, 0.5)))
    # The template is a mean of many heads, so its edges are soft; a power makes them crisp again.
    power = u(0.9, 2.4)
    grey, white, fluid = (np.clip(m, 0, 1) ** power for m in (grey, white, fluid))
    total = grey + white + fluid + 1e-4
    fine = _field(rng, shape, u(1.0, 2.5) / spacing)
    patchy = _field(rng, shape, u(5, 20) / spacing)
    grey_value = mu["grey"] * (1 + u(0, 0.05) * patchy + u(0, 0.04) * fine)
    white_value = mu["white"] * (1 + u(0, 0.04) * _field(rng, shape, 25 / spacing) + u(0, 0.03) * fine)
    fluid_value = mu["fluid"] * np.clip(1 + u(0, 0.25) * _field(rng, shape, u(2, 6) / spacing), 0, 3)
    magnitude = (grey * grey_value + white * white_value + fluid * fluid_value) / total
    magnitude += u(0, 2.0) * (mu["white"] - mu["grey"]) / 0.3 * detail * 0.5
    # Vessels: level lines of a smooth field, cut to pieces by another.
    if u() < 0.6:
        lines = np.abs(_field(rng, shape, u(8, 25) / spacing))
        gate = _edge(_field(rng, shape, u(8, 20) / spacing) - u(0.6, 1.6), 0.3)
        weight = np.exp(-((lines * 14 / (u(0.6, 1.6))) ** 2)) * gate
        magnitude += (u(0.0, 2.0) - magnitude) * weight * u(0.2, 0.9)
    # A few lesions or cysts, so that a surprise is not erased.
    if u() < 0.15:
        spot = _edge((_field(rng, shape, u(5, 15) / spacing) - u(1.6, 2.4)) * 3, 1.0)
        magnitude += (u(0.0, 1.6) - magnitude) * spot
    return np.clip(magnitude, 0, None), np.clip(support * 1.02, 0, 1)


def _phase(rng: np.random.Generator, shape: tuple[int, int]) -> Array:
    """Smooth phase in radians: ramps and waves, or the phase of a complex random field.

    The second kind has vortices, as the phase of one receive coil does where it sees nothing.
    """
    u = rng.uniform
    size = float(max(shape))
    phase = np.full(shape, u(-math.pi, math.pi), np.float32)
    for axis, count in enumerate(shape):
        ramp = np.linspace(-0.5, 0.5, count, dtype=np.float32) * np.float32(rng.normal(0, 2.0))
        phase += ramp[:, None] if axis == 0 else ramp[None]
    if u() < 0.5:
        length = size * u(0.25, 0.8)
        a, b = _field(rng, shape, length), _field(rng, shape, length)
        phase += np.angle(rng.normal(0, 0.8) + a + 1j * b).astype(np.float32)
    else:
        phase += u(0, 1.2) * _field(rng, shape, size * u(0.2, 0.7))
    return phase + np.float32(u(0, 0.06)) * _field(rng, shape, u(4, 15))


def _blur(rng: np.random.Generator, x: NDArray[np.complex64]) -> NDArray[np.complex64]:
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


def brain_slice(
    seed: int,
    shape: tuple[int, int] | None = None,
    *,
    orientation: str | None = None,
    held_out: bool = False,
) -> NDArray[np.complex64]:
    """Draw one synthetic head slice; formula in the module docstring.

    Args:
        seed: non-negative integer; the same seed gives the same slice.
        shape: ``(ny, nx)`` in pixels, each at least 32; random (112 to 256) when absent.
        orientation: ``"axial"``, ``"coronal"`` or ``"sagittal"``; random when absent, mostly axial.
        held_out: draw from the stream of held-out slices, which training never sees.

    Returns:
        complex64 ``(ny, nx)``, dimensionless; the 99th percentile of the magnitude over the frame
        is 1. Axial rows run from front to back, the others from top to bottom.

    Raises:
        ValueError: a bad seed, shape or orientation, or nilearn is not installed.
    """
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise ValueError(f"seed must be a non-negative integer; got {seed!r}.")
    if orientation is not None and orientation not in _EXTENT:
        raise ValueError(f"orientation must be one of {sorted(_EXTENT)}; got {orientation!r}.")
    rng = np.random.default_rng([int(seed), _HELD_OUT_KEY if held_out else _TRAINING_KEY])
    chosen = rng.choice(["axial", "coronal", "sagittal"], p=[0.76, 0.12, 0.12])
    orientation = orientation or str(chosen)
    fill = rng.uniform(0.66, 1.06)
    extent = _EXTENT[orientation]
    long_side, slack = rng.uniform(144, 256), rng.uniform(0.9, 1.12)
    if shape is None:
        ny = long_side if extent[0] >= extent[1] else long_side * extent[0] / extent[1] * slack
        nx = ny * extent[1] / extent[0] * slack
        shape = (max(112, min(256, round(ny))), max(112, min(256, round(nx))))
    if len(shape) != 2 or min(shape) < 32:
        raise ValueError(f"shape must be (ny, nx) with at least 32 pixels each; got {shape}.")
    shape = (int(shape[0]), int(shape[1]))
    position = {
        "axial": rng.triangular(-38, 18, 72),
        "coronal": rng.triangular(-85, -15, 45),
        "sagittal": rng.uniform(-55, 55),
    }[orientation]
    # Axial cuts near the crown are smaller than the head.
    crown = max(0.0, position - 30) / 42 if orientation == "axial" else 0.0
    spacing = max(extent[0] / shape[0], extent[1] / shape[1]) / fill * (1 - 0.3 * crown**2)
    return _draw(rng, shape, orientation, float(position), float(spacing))


def _draw(
    rng: np.random.Generator, shape: tuple[int, int], orientation: str, position: float, spacing: float
) -> NDArray[np.complex64]:
    u = rng.uniform
    mu = _contrast(rng)
    maps = _tissues(rng, shape, orientation, position, spacing)
    extra = _extra_head(rng, shape, orientation, position, spacing)
    around, fat_weight, depth, hull = _head(rng, shape, maps[2], extra, mu, spacing)
    brain, support = _brain(rng, shape, maps, mu, spacing)
    # Between brain and skull, inside the hull, there is fluid.
    cistern = mu["outer"] * (1 + 0.15 * _field(rng, shape, 6 / spacing))
    magnitude = around + (cistern - around) * hull
    magnitude += (brain - magnitude) * support
    fat_weight = fat_weight * (1 - hull) * (1 - support)
    # Receive shading: slow waves, and brighter towards the coils.
    shading = np.exp(u(0, 0.3) * _field(rng, shape, max(shape) * u(0.3, 0.8)))
    shading *= 1 + u(-0.1, 1.0) * np.exp(-np.clip(depth, 0, None) / u(10, 45))
    magnitude = np.clip(magnitude * shading, 0, None)
    phase = _phase(rng, shape)
    if u() < 0.5:
        phase = phase + np.float32(rng.normal(0, 0.7)) * fat_weight
    x = _blur(rng, (magnitude * np.exp(1j * phase)).astype(np.complex64))
    level = float(np.percentile(np.abs(x), 99))
    return np.asarray(x / max(level, 1e-6), np.complex64)


def describe() -> dict[str, Any]:
    """Facts about the synthesiser for a prior's card."""
    return {
        "generator": "invdiff.training.synthetic_brain.brain_slice",
        "anatomy": "ICBM152 2009a nonlinear symmetric tissue maps (MNI, McGill), as bundled with nilearn",
        "template_licence": (
            "Copyright (C) 1993-2009 Louis Collins, McConnell Brain Imaging Centre, Montreal Neurological "
            "Institute, McGill University; permission to use, copy, modify and distribute for any purpose "
            "and without fee, with this notice kept"
        ),
        "measured_images": "none but the template",
    }
