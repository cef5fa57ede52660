"""Reading BART's .cfl/.hdr pairs: complex float32, column-major, dimensions padded with ones."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from invdiff.errors import InvdiffError
from invdiff.io.arrays import check_fits, existing

#: Positions in BART's list of dimensions.
READ, PHASE1, PHASE2, COIL, MAPS, SLICE = 0, 1, 2, 3, 4, 13


def read_cfl(path: str | os.PathLike[str]) -> np.ndarray:
    """Read a pair ``name.cfl`` / ``name.hdr`` as complex64 in C order (BART's dimensions reversed).

    Raises:
        InvdiffError: If one of the two is missing, or their sizes do not match.
    """
    stem = Path(path).with_suffix("")
    header = existing(stem.with_suffix(".hdr"), "The BART header")
    data = existing(stem.with_suffix(".cfl"), "The BART data file")
    dims = _dimensions(header)
    declared, there = 8 * _product(dims), data.stat().st_size
    if declared != there:
        raise InvdiffError(
            f"{data} has {there} bytes and {header.name} declares {declared} (dimensions {dims}); "
            "write or copy the pair again."
        )
    check_fits(declared, str(data))
    return np.fromfile(data, dtype="<c8").reshape(dims[::-1])


def kspace_layout(array: np.ndarray, path: Path) -> np.ndarray:
    """Bring k-space (or coil maps) as read by `read_cfl` to ``(slice, coil, ky, kx)``.

    One encoded plane in any two of BART's first three dimensions, coils in dimension 3, slices in dimension 13.
    """
    dims = list(array.shape[::-1]) + [1] * (16 - array.ndim)
    plane = [i for i in (READ, PHASE1, PHASE2) if dims[i] > 1]
    if len(plane) != 2:
        raise InvdiffError(
            f"{path} has the dimensions {dims[:4]} and a plane with exactly two of the first three longer "
            "than 1 is needed; for a 3-D scan, transform along the readout and cut out one slice first "
            "(bart fft -u -i 1, then bart slice 0 ...)."
        )
    extra = [i for i, n in enumerate(dims) if n > 1 and i not in (*plane, COIL, SLICE)]
    if extra:
        raise InvdiffError(
            f"{path} has {dims[extra[0]]} entries along BART dimension {extra[0]}, and only plane, coils (3) and "
            "slices (13) can be used; pick one entry with bart slice."
        )
    return array.reshape(dims[SLICE], dims[COIL], dims[plane[1]], dims[plane[0]])


def _dimensions(header: Path) -> list[int]:
    """Return the dimensions declared in a .hdr file."""
    if header.stat().st_size > 2**20:
        raise InvdiffError(f"{header} is too long for a BART header; is it another kind of .hdr file?")
    lines = header.read_text(errors="replace").splitlines()
    try:
        text = lines[next(i for i, line in enumerate(lines) if line.strip() == "# Dimensions") + 1]
        dims = [int(word) for word in text.split()]
    except (StopIteration, IndexError, ValueError):
        dims = []
    if not dims or min(dims) < 1 or len(dims) > 32:
        raise InvdiffError(f"{header} declares no usable '# Dimensions'; is it a BART header?")
    return dims


def _product(dims: list[int]) -> int:
    out = 1
    for n in dims:
        out *= n
    return out
