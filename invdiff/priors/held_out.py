"""Synthetic head slices that no bundled prior has seen, for demonstrations and self-tests.

They come from the held-out stream of :func:`invdiff.training.synthetic_brain.brain_slice` and are
stored in the package, so that using them needs neither nilearn nor a network.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

__all__ = ["count", "held_out_slice"]

_FILE = Path(__file__).with_name("held_out.safetensors")


@functools.lru_cache(maxsize=1)
def _stored() -> NDArray[np.float16]:
    from safetensors.numpy import load_file

    return load_file(_FILE)["slices"]


def count() -> int:
    """Number of stored slices."""
    return int(_stored().shape[0])


def held_out_slice(index: int = 0) -> NDArray[np.complex64]:
    """Return one stored head slice.

    Args:
        index: 0 to :func:`count` - 1.

    Returns:
        complex64 ``(192, 160)``, a fresh array, dimensionless; the 99th percentile of the magnitude
        is 1. Rows run from front to back.

    Raises:
        ValueError: there is no such slice.
    """
    slices = _stored()
    if isinstance(index, bool) or not isinstance(index, int | np.integer) or not 0 <= index < len(slices):
        raise ValueError(
            f"There are {len(slices)} held-out slices; index must be 0 to {len(slices) - 1}, got {index!r}."
        )
    pair = slices[index].astype(np.float32)
    return (pair[0] + 1j * pair[1]).astype(np.complex64)
