"""Reading one slice of Cartesian k-space from .npy, .npz, fastMRI-layout HDF5 and BART .cfl/.hdr."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from invdiff.errors import InvdiffError
from invdiff.io import arrays

KEY = "kspace"


@dataclass(frozen=True, eq=False)
class KSpace:
    """One slice of k-space and what came with it.

    Attributes:
        kspace: ``(coil, ky, kx)`` complex64, FFT centred, zero where not sampled.
        coil_maps: ``(coil, y, x)`` complex64, or None.
        mask: Sampling mask as stored (unchecked; see `invdiff.io.sampling`), or None.
        noise: Noise scan ``(coil, ...)`` complex64, or None.
        spacing: Distance between neighbouring pixels in mm per dimension, where known.
        source: What was read, in words.
        slice: Index of the slice, and how many there are.
        slices: Number of slices in the file.
    """

    kspace: np.ndarray
    coil_maps: np.ndarray | None = None
    mask: np.ndarray | None = None
    noise: np.ndarray | None = None
    spacing: Mapping[str, float] = field(default_factory=dict)
    source: str = ""
    slice: int = 0
    slices: int = 1


def read_kspace(path: str | os.PathLike[str], key: str | None = None, slice: int | None = None) -> KSpace:
    """Read one slice of k-space.

    Layouts: ``.npy`` and ``.npz`` hold ``(coil, ky, kx)``, ``(ky, kx)`` for one coil, or
    ``(slice, coil, ky, kx)``; ``.npz`` may also hold ``mask``, ``coil_maps`` and ``noise``. HDF5 follows
    fastMRI: ``kspace`` is ``(slice, coil, ky, kx)``, or ``(slice, ky, kx)`` for one coil, with an
    optional ``mask``. BART pairs hold a plane in two of the first three dimensions, coils in the fourth, slices
    in dimension 13.

    Args:
        path: The file (either one of a BART pair).
        key: Name of the array in .npz or HDF5; ``kspace`` where left out.
        slice: Which slice of a volume; the middle one where left out.

    Returns:
        The slice; ``source`` says what was read.

    Raises:
        InvdiffError: In one sentence, if the file is missing, cut short, of unknown kind, of the wrong rank, real,
            empty, holds NaN, infinity or Python objects, or has no such slice.
    """
    file = arrays.existing(path)
    suffix = file.suffix.lower()
    if suffix == ".npy":
        found = _from_arrays({KEY: arrays.read_npy(file)}, file, slice)
    elif suffix == ".npz":
        found = _from_npz(file, key, slice)
    elif suffix in arrays.HDF5_SUFFIXES:
        found = _from_hdf5(file, key or KEY, slice)
    elif suffix in {".cfl", ".hdr"}:
        from invdiff.io.bart import kspace_layout, read_cfl

        found = _from_arrays({KEY: kspace_layout(read_cfl(file), file)}, file, slice)
    else:
        raise arrays.unknown_format(file)
    check_kspace(found.kspace, str(file))
    return found


def check_kspace(kspace: np.ndarray, what: str = "The k-space") -> None:
    """Raise one sentence unless ``kspace`` is finite complex ``(coil, ky, kx)`` and not zero everywhere."""
    if kspace.ndim != 3:
        raise InvdiffError(f"{what} has shape {kspace.shape}; expected (coil, ky, kx).")
    if not np.iscomplexobj(kspace):
        raise InvdiffError(
            f"{what} holds real numbers ({kspace.dtype}) and k-space is complex; if real and imaginary parts are "
            "stored along an axis, join them first (a[..., 0] + 1j * a[..., 1])."
        )
    if min(kspace.shape) < 1 or min(kspace.shape[1:]) < 8:
        raise InvdiffError(f"{what} has shape {kspace.shape}; a plane (ky, kx) of at least 8 x 8 is needed.")
    bad = int((~np.isfinite(kspace)).sum())
    if bad:
        raise InvdiffError(
            f"{what} holds {bad} NaN or infinite values of {kspace.size}; set those positions to zero "
            "in every coil (not sampled), or repair the file."
        )
    if not kspace.any():
        raise InvdiffError(f"{what} is zero everywhere, so no position was sampled; check the file and the key.")


def read_coil_maps(path: str | os.PathLike[str], slice: int | None = None) -> np.ndarray:
    """Read coil maps ``(coil, y, x)``; volumes ``(slice, coil, y, x)`` give one slice (the middle one)."""
    file = arrays.existing(path, "The coil map file")
    if file.suffix.lower() in {".cfl", ".hdr"}:
        from invdiff.io.bart import kspace_layout, read_cfl

        maps = kspace_layout(read_cfl(file), file)
    else:
        maps = arrays.read_array(file, what="The coil map file")
    if maps.ndim == 4:
        maps = maps[_pick(maps.shape[0], slice, file)]
    return maps


def read_noise(path: str | os.PathLike[str]) -> np.ndarray:
    """Read a noise scan ``(coil, ...)``; of a BART pair, coils are the fourth dimension."""
    file = arrays.existing(path, "The noise scan file")
    if file.suffix.lower() in {".cfl", ".hdr"}:
        from invdiff.io.bart import COIL, read_cfl

        full = read_cfl(file)
        axis = full.ndim - 1 - COIL
        return np.moveaxis(full, axis, 0) if axis >= 0 else full[None]
    return arrays.read_array(file, what="The noise scan file")


def _from_npz(file: Path, key: str | None, slice: int | None) -> KSpace:
    names = arrays.npz_names(file)
    main = key or (KEY if KEY in names else arrays.pick_key(names, None, file))
    arrays.pick_key(names, main, file)
    extra = [n for n in ("mask", "coil_maps", "noise") if n in names and n != main]
    held = dict(arrays.read_npz(file, [main, *extra]))
    return _from_arrays({KEY: held.pop(main), **held}, file, slice)


def _from_arrays(held: Mapping[str, np.ndarray], file: Path, slice: int | None) -> KSpace:
    """Pick the slice out of whole arrays."""
    kspace, maps, mask = held[KEY], held.get("coil_maps"), held.get("mask")
    if kspace.ndim not in (2, 3, 4):
        raise InvdiffError(
            f"{file} holds an array of shape {kspace.shape}; expected (coil, ky, kx), "
            "(slice, coil, ky, kx), or (ky, kx) for one coil: reorder or cut it first."
        )
    volume = kspace if kspace.ndim == 4 else kspace[None] if kspace.ndim == 3 else kspace[None, None]
    index = _pick(volume.shape[0], slice, file)
    if maps is not None and maps.ndim == 4:
        maps = maps[index if maps.shape[0] > 1 else 0]
    if mask is not None and mask.ndim > 2 and mask.shape[0] == volume.shape[0]:
        mask = mask[index]
    return KSpace(
        kspace=_single(volume[index]),
        coil_maps=None if maps is None else _single(maps),
        mask=mask,
        noise=held.get("noise"),
        source=_describe(file, volume.shape[1:], index, volume.shape[0], slice),
        slice=index,
        slices=volume.shape[0],
    )


def _from_hdf5(file: Path, key: str, slice: int | None) -> KSpace:
    """Read one slice of a fastMRI-layout file; only that slice is loaded."""
    import h5py

    from invdiff.io.hdf5_safe import open_h5

    with open_h5(file) as held:
        names = [name for name, item in held.items() if isinstance(item, h5py.Dataset)]
        data = held[key] if key in held else held[arrays.pick_key(names, key, file)]
        if not isinstance(data, h5py.Dataset):
            raise InvdiffError(f"{file}: {key} is a group, not a dataset; give the full name of one inside it.")
        if data.ndim not in (3, 4):
            raise InvdiffError(
                f"{file}: {key} has shape {data.shape}; expected the fastMRI layout (slice, coil, ky, kx), "
                "or (slice, ky, kx) for one coil."
            )
        index = _pick(data.shape[0], slice, file)
        plane = arrays.read_dataset(data, index, f"{file}: {key}")
        plane = plane if plane.ndim == 3 else plane[None]
        return KSpace(
            kspace=_single(plane),
            mask=_fastmri_mask(held, plane.shape, f"{file}: mask"),
            spacing=_fastmri_spacing(held),
            source=_describe(file, plane.shape, index, data.shape[0], slice),
            slice=index,
            slices=data.shape[0],
        )


def _fastmri_mask(held: Any, shape: tuple[int, ...], what: str) -> np.ndarray | None:
    """Read the mask of a fastMRI file, without the zero-padded columns that its attributes declare."""
    import h5py

    if not isinstance(held.get("mask"), h5py.Dataset):
        return None
    mask = arrays.read_dataset(held["mask"], slice(None), what)
    edges = [held.attrs.get(name) for name in ("padding_left", "padding_right")]
    if mask.shape[-1:] == shape[-1:] and all(np.ndim(e) == 0 and np.asarray(e).dtype.kind in "iu" for e in edges):
        columns = np.arange(shape[-1])
        mask = mask * ((columns >= int(edges[0])) & (columns < int(edges[1])))
    return mask


def _fastmri_spacing(held: Any) -> dict[str, float]:
    """Return pixel spacing in mm from the header of a fastMRI file (field of view over matrix), if it is there."""
    import h5py

    item = held.get("ismrmrd_header")
    if not isinstance(item, h5py.Dataset) or item.shape != ():
        return {}
    text = item[()]
    text = text.decode(errors="replace") if isinstance(text, bytes) else str(text)
    space = re.search(r"<encodedSpace>(.{0,4000}?)</encodedSpace>", text, re.DOTALL)
    if space is None:
        return {}
    out = {}
    for dim, axis in (("y", "x"), ("x", "y")):  # the readout is the first axis of the stored plane
        number = rf"<{axis}>\s*([0-9.]+)\s*</{axis}>"
        size = re.search(rf"<matrixSize>.*?{number}", space[1], re.DOTALL)
        view = re.search(rf"<fieldOfView_mm>.*?{number}", space[1], re.DOTALL)
        try:
            out[dim] = float(view[1]) / float(size[1]) if view and size else 0.0
        except (ValueError, ZeroDivisionError):
            return {}
    return out if all(0 < v < 1000 for v in out.values()) else {}


def _pick(count: int, wanted: int | None, file: Path) -> int:
    """Return the index of the slice to read, the middle one where none is wanted."""
    if count == 0:
        raise InvdiffError(f"{file} holds no slices; its first axis has length 0.")
    if wanted is None:
        return count // 2
    if not 0 <= wanted < count:
        raise InvdiffError(f"{file} has {count} slice(s), and slice {wanted} was asked for; use 0 to {count - 1}.")
    return wanted


def _single(array: np.ndarray) -> np.ndarray:
    """Return a complex array as complex64 (a real one as it is, to be refused by its own check)."""
    if not np.iscomplexobj(array):
        return np.asarray(array)
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(array, dtype=np.complex64)


def _describe(file: Path, shape: tuple[int, ...], index: int, count: int, wanted: int | None) -> str:
    coils = f"{shape[0]} coil{'s' if shape[0] != 1 else ''}, {shape[1]} x {shape[2]}"
    if count == 1:
        return f"{file.name}: {coils}"
    middle = "" if wanted is not None else ", the middle one"
    return f"{file.name}: {coils}, slice {index} of {count}{middle}"
