"""Coil maps and k-space masks as Cartesian MRI takes them, of slices and of volumes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from invdiff.errors import InvdiffError
from invdiff.operators._parameters import as_mask, as_parameter, require_samples


def as_coil_maps(value: Any, axes: Sequence[str]) -> Tensor:
    """Return complex coil maps ``(1 or N, coil, *image)`` from ``(coil, *image)`` or ``(N, coil, *image)``.

    Args:
        value: The maps, real or complex.
        axes: Names of the axes of the image.

    Raises:
        InvdiffError: If the rank is another, an axis is empty, or the maps are zero everywhere.
    """
    maps, shape = as_parameter(value, "The array of coil maps"), ", ".join(("coil", *axes))
    if maps.ndim not in (len(axes) + 1, len(axes) + 2) or 0 in maps.shape:
        raise InvdiffError(
            f"The coil maps have shape {tuple(maps.shape)}, expected ({shape}) or (cases, {shape})."
        )
    if not bool((maps != 0).any()):
        raise InvdiffError("The coil maps are zero everywhere; estimate them from the calibration region first.")
    maps = maps if maps.ndim == len(axes) + 2 else maps[None]
    return maps if maps.is_complex() else maps.to(maps.dtype.to_complex())


def as_kspace_mask(value: Any, image: Sequence[int], axes: Sequence[str], dtype: torch.dtype) -> Tensor:
    """Return a mask ``(1 or N, 1, *image)``, which broadcasts over coils.

    Args:
        value: Zeros and ones, ``image`` or ``(N, *image)``.
        image: Shape of the image.
        axes: Names of the axes of k-space.
        dtype: Real precision.

    Raises:
        InvdiffError: If the shape is another, other values occur, or a case samples nothing.
    """
    mask, shape = as_mask(value, dtype), ", ".join(axes)
    if mask.ndim not in (len(axes), len(axes) + 1) or tuple(mask.shape[-len(axes) :]) != tuple(image):
        raise InvdiffError(
            f"The mask has shape {tuple(mask.shape)}, expected {tuple(image)} as ({shape}) of the coil maps, "
            f"or (cases, {shape})."
        )
    mask = (mask if mask.ndim == len(axes) + 1 else mask[None])[:, None]
    require_samples(mask)
    return mask
