"""Training images: from files on disk, or from a synthesiser.

Every source ends as a list of real float arrays ``(channels, ny, nx)``: one channel for real
images, two (real and imaginary part) for complex ones. Nothing here executes what a file says:
arrays are read with ``allow_pickle=False``, and HDF5 links and external storage are refused before
they are followed.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from invdiff.io.atomic import whole_file
from invdiff.training.synthesisers import SYNTHESISERS

__all__ = ["read_images", "synthetic_images", "to_channels"]

Images = list[NDArray[Any]]

_PICTURES = {".png", ".jpg", ".jpeg", ".tif", ".tiff"}
# More than this many values in one training set would not fit a laptop's memory.
_MAX_VALUES = 4_000_000_000


def to_channels(image: NDArray[Any], channels: int, where: str = "image") -> NDArray[np.float32]:
    """Turn one image into real channels.

    Args:
        image: ``(ny, nx)`` real or complex, or ``(channels, ny, nx)`` real.
        channels: 1 for real images, 2 for complex ones, more for multi-channel images.
        where: name for the error message.

    Returns:
        float32 ``(channels, ny, nx)``.

    Raises:
        ValueError: the rank, number of channels or values do not fit.
    """
    if image.dtype.kind not in "fiucb":
        raise ValueError(f"{where} holds {image.dtype} values; numbers are needed.")
    if image.ndim == 2 and channels == 2:
        image = np.stack([image.real, image.imag])
    elif image.ndim == 2:
        if image.dtype.kind == "c":
            raise ValueError(f"{where} is complex but {channels} channel(s) were asked for: use channels = 2.")
        image = image[None]
    if image.ndim != 3 or image.shape[0] != channels or image.dtype.kind == "c":
        raise ValueError(
            f"{where} has shape {image.shape} and type {image.dtype}; "
            f"expected (ny, nx), or real ({channels}, ny, nx)."
        )
    out = np.asarray(image, np.float32)
    if not np.isfinite(out).all():
        raise ValueError(f"{where} holds NaN or infinite values; clean the data first.")
    return out


def _stack(array: NDArray[Any], channels: int, where: str) -> Iterator[NDArray[np.float32]]:
    """Images of one array: ``(ny, nx)``, ``(n, ny, nx)`` or ``(n, channels, ny, nx)``."""
    if array.ndim == 2:
        array = array[None]
    if array.ndim not in (3, 4):
        raise ValueError(
            f"{where} has shape {array.shape}; expected (ny, nx), (images, ny, nx) "
            f"or (images, {channels}, ny, nx)."
        )
    for n, image in enumerate(array):
        yield to_channels(image, channels, f"{where}, image {n}")


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
            elif isinstance(item, h5py.Dataset) and item.ndim >= 2 and item.dtype.kind in "fiuc":
                if item.external or item.is_virtual:
                    raise ValueError(
                        f"{path} keeps {prefix}{name} in other files, which are not opened: copy the data in."
                    )
                if item.size > _MAX_VALUES:
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
        if not hasattr(item, "dtype") or item.ndim < 2 or np.dtype(item.dtype).kind not in "fiuc":
            continue
        if math.prod(item.shape) > _MAX_VALUES:
            raise ValueError(f"{path} declares {math.prod(item.shape)} values at {name or '/'}; split the store.")
        found[name] = np.asarray(item[...])
    return found


def _read_picture(path: Path) -> NDArray[Any]:
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


def _read_one(path: Path, channels: int) -> Images:
    suffix = path.suffix.lower()
    if suffix in _PICTURES:
        return [to_channels(_read_picture(path), channels, str(path))]
    if suffix in (".npy", ".npz"):
        arrays = _read_npy(path)
    elif suffix in (".h5", ".hdf5"):
        arrays = _read_hdf5(path)
    elif suffix == ".zarr" or (
        path.is_dir() and any((path / n).exists() for n in ("zarr.json", ".zarray", ".zgroup"))
    ):
        arrays = _read_zarr(path)
    else:
        raise ValueError(
            f"{path} is of unknown kind '{suffix}'; "
            "expected .npy, .npz, .h5, .hdf5, .zarr or a folder of pictures."
        )
    return [
        image
        for name, array in arrays.items()
        for image in _stack(array, channels, f"{path}{':' + name if name else ''}")
    ]


def read_images(source: str | Path, channels: int, normalise: str = "p99") -> Images:
    """Read every image below a path.

    Args:
        source: a .npy, .npz, .h5, .hdf5 or .zarr file, a picture (.png, .jpg, .tif), or a folder
            of such files (searched in name order, not recursively).
        channels: 2 for complex images, 1 for real ones.
        normalise: ``"p99"`` divides each image by the 99th percentile of its magnitude; ``"none"``
            leaves values as they are.

    Returns:
        float32 arrays ``(channels, ny, nx)``, in file order.

    Raises:
        ValueError: the path is missing or empty, or a file cannot be used.
    """
    path = Path(source)
    if normalise not in ("p99", "none"):
        raise ValueError(f"normalise must be 'p99' or 'none'; got {normalise!r}.")
    if not path.exists():
        raise ValueError(f"There is no training data at {path}; give a file or a folder of images.")
    is_store = path.suffix == ".zarr" or (path / "zarr.json").exists() or (path / ".zgroup").exists()
    if path.is_dir() and not is_store and not (path / ".zarray").exists():
        known = _PICTURES | {".npy", ".npz", ".h5", ".hdf5", ".zarr"}
        files = sorted(p for p in path.iterdir() if p.suffix.lower() in known)
    else:
        files = [path]
    images = [image for file in files for image in _read_one(file, channels)]
    if not images:
        raise ValueError(f"{path} holds no images of rank 2 or more; give .npy, .npz, HDF5, Zarr or pictures.")
    return [_normalised(image) for image in images] if normalise == "p99" else images


def _normalised(image: NDArray[np.float32]) -> NDArray[np.float32]:
    level = float(np.percentile(np.sqrt(np.sum(image.astype(np.float64) ** 2, axis=0)), 99))
    return np.asarray(image / np.float32(level), np.float32) if level > 0 else image


def synthetic_images(
    kind: str,
    count: int,
    *,
    held_out: bool = False,
    cache: str | Path | None = None,
    notify: Callable[[int, int], None] | None = None,
) -> Images:
    """Draw ``count`` images from a synthesiser, keeping them in a cache folder where one is given.

    Args:
        kind: A name in :data:`invdiff.training.synthesisers.SYNTHESISERS`.
        count: number of images; seeds 0 to count - 1.
        held_out: draw from the held-out stream.
        cache: folder for one float16 .npy per image; made where absent.
        notify: called with (done, count) after each image.

    Returns:
        float16 arrays ``(channels, ny, nx)``: half precision is 2^-11 relative, far below the smallest
        noise level, and halves the memory.

    Raises:
        ValueError: unknown synthesiser, or a count that is not positive.
    """
    if kind not in SYNTHESISERS:
        raise ValueError(f"There is no synthesiser {kind!r}; there are {', '.join(SYNTHESISERS)}.")
    if count < 1:
        raise ValueError(f"The number of synthetic images must be at least 1; got {count}.")
    images: Images = []
    for seed in range(count):
        kept = None
        if cache is not None:
            kept = Path(cache) / f"{kind}-{'held' if held_out else 'train'}-{seed:07d}.npy"
        if kept is not None and kept.exists():
            image = np.load(kept, allow_pickle=False)
        else:
            image = SYNTHESISERS[kind].image(seed, held_out).astype(np.float16)
            if kept is not None:
                kept.parent.mkdir(parents=True, exist_ok=True)
                with whole_file(kept) as temporary, temporary.open("wb") as file:
                    np.save(file, image)
        images.append(image)
        if notify is not None:
            notify(seed + 1, count)
    return images
