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

from typing import Any

import numpy as np
from numpy.typing import NDArray

from invdiff.training import brain_anatomy as anatomy
from invdiff.training import brain_rendering as rendering
from invdiff.training.random_fields import Canvas

__all__ = ["brain_slice"]

# Second word of the generator's key: one for training slices, one for held-out slices.
_TRAINING_KEY = 0x7472616E
_HELD_OUT_KEY = 0x68656C64
# Nominal head extent in mm, (rows, columns), per orientation; sets the pixel spacing.
_EXTENT = {"axial": (212.0, 168.0), "coronal": (196.0, 168.0), "sagittal": (200.0, 212.0)}


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
    return _draw(Canvas(rng, shape, float(spacing)), orientation, float(position))


def _draw(canvas: Canvas, orientation: str, position: float) -> NDArray[np.complex64]:
    """Put anatomy and rendering together; the order of the calls is part of what a seed means."""
    rng, u = canvas.rng, canvas.rng.uniform
    mu = rendering.contrast(rng)
    tissues = anatomy.cut_tissues(canvas, orientation, position)
    extra = anatomy.face_and_neck(canvas, orientation, position)
    layers = anatomy.wrap(canvas, tissues.support, extra)
    around, fat_weight, hull = rendering.surroundings(canvas, layers, mu)
    brain, support = rendering.brain(canvas, tissues, mu)
    # Between brain and skull, inside the hull, there is fluid.
    cistern = mu["outer"] * (1 + 0.15 * canvas.field(6))
    magnitude = around + (cistern - around) * hull
    magnitude += (brain - magnitude) * support
    fat_weight = fat_weight * (1 - hull) * (1 - support)
    # Receive shading: slow waves, and brighter towards the coils.
    shading = np.exp(u(0, 0.3) * canvas.field_px(max(canvas.shape) * u(0.3, 0.8)))
    shading *= 1 + u(-0.1, 1.0) * np.exp(-np.clip(layers.depth, 0, None) / u(10, 45))
    magnitude = np.clip(magnitude * shading, 0, None)
    phase = rendering.phase(canvas)
    if u() < 0.5:
        phase = phase + np.float32(rng.normal(0, 0.7)) * fat_weight
    x = rendering.blur(rng, (magnitude * np.exp(1j * phase)).astype(np.complex64))
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
