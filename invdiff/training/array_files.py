"""Arrays in files: NumPy, HDF5, Zarr and pictures. Nothing here executes what a file says.

NumPy files are read with ``allow_pickle=False``, HDF5 links and external storage are refused before they are
followed, and declared sizes are compared with a limit before anything is read.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["ARRAYS", "LABEL", "MAX_VALUES", "PICTURES", "is_store", "read_arrays", "read_picture"]

PICTURES = {".png", ".jpg", ".jpeg", ".tif", ".tiff"}
ARRAYS = {".npy", ".npz", ".h5", ".hdf5", ".zarr"}
#: Name of a list of classes beside images, ``(images,)``.
LABEL = "label"
#: More than this many values in one training set would not fit a laptop's memory.
MAX_VALUES = 4_000_000_000


def is_store(path: Path) -> bool:
    """Whether a folder is a Zarr store."""
    return path.suffix == ".zarr" or (
        path.is_dir() and any((path / name).exists() for name in ("zarr.json", ".zarray", ".zgroup"))
    )


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Read every numeric array of rank 2 or more, and lists called ``label``, by name.

    Raises:
        ValueError: the file is unreadable, holds objects or links, or is of no known kind.
    """
    suffix = path.suffix.lower()
    if suffix in (".npy", ".npz"):
        return _read_npy(path)
    if suffix in (".h5", ".hdf5"):
        return _read_hdf5(path)
    if is_store(path):
        return _read_zarr(path)
    raise ValueError(
        f"{path} is of unknown kind '{suffix}'; expected .npy, .npz, .h5, .hdf5, .zarr, .nii, .nii.gz, .dcm or a "
        "folder of such files or of pictures."
    )


def _wanted(name: str, rank: int, kind: str) -> bool:
    """Whether a dataset is images, or a list of classes."""
    return kind in "fiuc" and (rank >= 2 or (rank == 1 and name.rsplit("/", 1)[-1] == LABEL))


def _read_npy(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                return {"": loaded}
            return {name: loaded[name] for name in loaded.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        if "pickle" in str(error) or "Object arrays" in str(error):
            raise ValueError(
                f"{path} holds Python objects, which are never unpickled: save plain numeric arrays."
            ) from None
        raise ValueError(f"{path} is not a readable NumPy file: {error}.") from None


def _read_hdf5(path: Path) -> dict[str, NDArray[Any]]:
    import h5py

    found: dict[str, NDArray[Any]] = {}

    def visit(group: Any, prefix: str) -> None:
        for name in group:
            link = group.get(name, getlink=True)
            if not isinstance(link, h5py.HardLink):
                raise ValueError(f"{path} has a link at {prefix}{name}; links are not followed: copy the data in.")
            item = group[name]
            if isinstance(item, h5py.Group):
                # A hard link to an ancestor would never end.
                if prefix.count("/") > 16:
                    raise ValueError(f"{path} nests groups more than 16 deep; give a flat file.")
                visit(item, f"{prefix}{name}/")
            elif isinstance(item, h5py.Dataset) and _wanted(name, item.ndim, item.dtype.kind):
                if item.external or item.is_virtual:
                    raise ValueError(
                        f"{path} keeps {prefix}{name} in other files, which are not opened: copy the data in."
                    )
                if item.size > MAX_VALUES:
                    raise ValueError(f"{path} declares {item.size} values at {prefix}{name}; split the file.")
                found[prefix + name] = item[...]

    try:
        with h5py.File(path, "r") as file:
            visit(file, "")
    except OSError as error:
        raise ValueError(f"{path} is not a readable HDF5 file: {error}.") from None
    return found


def _read_zarr(path: Path) -> dict[str, NDArray[Any]]:
    try:
        import zarr
    except ImportError:
        raise ValueError("Reading Zarr needs the zarr package: pip install 'invdiff[zarr]'.") from None
    try:
        node: Any = zarr.open(str(path), mode="r")
    except Exception as error:
        raise ValueError(f"{path} is not a readable Zarr store: {error}.") from None
    members = [("", node)] if hasattr(node, "dtype") else list(node.members(max_depth=8))
    found = {}
    for name, item in members:
        if not hasattr(item, "dtype") or not _wanted(name, item.ndim, np.dtype(item.dtype).kind):
            continue
        if math.prod(item.shape) > MAX_VALUES:
            raise ValueError(f"{path} declares {math.prod(item.shape)} values at {name or '/'}; split the store.")
        found[name] = np.asarray(item[...])
    return found


def read_picture(path: Path) -> NDArray[Any]:
    """Read a picture as grey float32 values, 1 for white."""
    try:
        from PIL import Image

        with Image.open(path) as image:
            # 16- and 32-bit greys keep their depth, everything else becomes 8-bit grey.
            grey = image if image.mode in ("L", "I", "F", "I;16") else image.convert("L")
            pixels = np.asarray(grey)
    except ValueError as error:
        raise ValueError(f"{path} is not a readable picture: {error}.") from None
    except OSError as error:
        raise ValueError(f"{path} is not a readable picture: {error}.") from None
    full = 255.0 if pixels.dtype == np.uint8 else 65535.0 if pixels.dtype.kind in "iu" else 1.0
    return np.asarray(pixels, np.float32) / np.float32(full)
