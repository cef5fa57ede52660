"""Slices of NIfTI volumes, by nibabel."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from invdiff.training.array_files import MAX_VALUES

__all__ = ["read_nifti"]

#: A slice below this share of its volume's 99th percentile holds next to nothing.
_EMPTY = 0.05


def read_nifti(path: Path, slice_axis: int = 2) -> Iterator[NDArray[Any]]:
    """Yield the slices of a volume, or of every volume of a series, neither turned nor resampled.

    Values are ``scl_slope * stored + scl_inter``. Rows run along the later of the two axes of a slice. Slices
    whose 99th percentile is below a twentieth of their volume's largest are left out: scaled to one, they would be
    noise.

    Args:
        path: A .nii or .nii.gz file of 2 to 4 axes.
        slice_axis: 0, 1 or 2.

    Returns:
        Real float32 or complex64 ``(ny, nx)``.

    Raises:
        ValueError: the file is unreadable, too large, or holds no volumes of numbers.
    """
    try:
        import nibabel
    except ImportError:
        raise ValueError("Reading NIfTI needs the nibabel package: pip install 'invdiff[train]'.") from None
    if slice_axis not in (0, 1, 2):
        raise ValueError(f"slice_axis must be 0, 1 or 2; got {slice_axis}.")
    try:
        image: Any = nibabel.load(path, mmap=False)
        shape = tuple(int(n) for n in image.shape)
        kind = np.dtype(image.get_data_dtype()).kind
    except Exception as error:  # nibabel's readers raise what they meet in the header
        raise ValueError(f"{path} is not a readable NIfTI file: {_line(error)}.") from None
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if not 2 <= len(shape) <= 4 or min(shape) < 1 or kind not in "fiuc":
        raise ValueError(
            f"{path} has shape {shape} and values of kind {kind!r}; expected numbers (x, y), (x, y, z) or "
            "(x, y, z, t)."
        )
    if math.prod(shape) > MAX_VALUES:
        raise ValueError(f"{path} declares {math.prod(shape)} values; split the file.")
    try:
        values = np.asarray(image.dataobj, np.complex64 if kind == "c" else np.float32).reshape(shape)
    except Exception as error:  # a truncated or damaged file fails in gzip, zlib, numpy or nibabel
        raise ValueError(f"{path} is not a readable NIfTI file: {_line(error)}.") from None
    if values.ndim == 2:
        yield values.T
        return
    for volume in np.moveaxis(values, 3, 0) if values.ndim == 4 else [values]:
        slices = np.moveaxis(volume, slice_axis, 0)
        levels = np.array([np.percentile(np.abs(x), 99) for x in slices])
        for x, level in zip(slices, levels):
            # A value that is not a number must be told of, not left out.
            if not level < _EMPTY * np.nanmax(levels, initial=0):
                yield x.T


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
