"""Training images: from files on disk, or from a synthesiser.

Every source ends as a list of real float arrays ``(channels, ny, nx)``: one channel for real
images, two (real and imaginary part) for complex ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from invdiff.io.atomic import whole_file
from invdiff.training.array_files import ARRAYS, LABEL, PICTURES, is_store, read_arrays, read_picture
from invdiff.training.dicom import is_dicom, read_dicom
from invdiff.training.nifti import read_nifti
from invdiff.training.synthesisers import SYNTHESISERS

__all__ = ["class_folders", "read_images", "read_labelled", "synthetic_images", "to_channels"]

Images = list[NDArray[Any]]


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


def _read_one(path: Path, channels: int, slice_axis: int, labelled: bool) -> tuple[Images, list[int]]:
    """Images of one file, and the class of each where that is asked for."""
    suffix = path.suffix.lower()
    volume = path.name.lower().endswith((".nii", ".nii.gz"))
    if labelled and (volume or suffix in PICTURES):
        raise ValueError(
            f"{path} says no class; put the images of every class into a sub-folder of its name, or use .npz or "
            f"HDF5 with a list '{LABEL}' beside the images."
        )
    if suffix in PICTURES:
        return [to_channels(read_picture(path), channels, str(path))], []
    if volume:
        return [to_channels(x, channels, str(path)) for x in read_nifti(path, slice_axis)], []
    arrays = read_arrays(path)
    lists = {n: a for n, a in arrays.items() if a.ndim == 1 and n.rsplit("/", 1)[-1] == LABEL}
    images: Images = []
    labels: list[int] = []
    for name, array in arrays.items():
        if name in lists:
            continue
        found = list(_stack(array, channels, f"{path}{':' + name if name else ''}"))
        images += found
        if labelled:
            labels += _classes(path, name, lists, len(found))
    return images, labels


def _classes(path: Path, name: str, lists: dict[str, NDArray[Any]], count: int) -> list[int]:
    """Classes of the images of one array, from the list in its group."""
    beside = lists.get(f"{name.rpartition('/')[0]}/{LABEL}".lstrip("/"))
    if beside is None or len(beside) != count or beside.dtype.kind not in "iu":
        raise ValueError(
            f"{path} needs a list '{LABEL}' of {count} whole numbers beside {name or 'its images'}, one class per "
            "image."
        )
    return [int(v) for v in beside]


def _files(path: Path) -> list[Path]:
    """The files of a folder that may hold images, by name; a file or a Zarr store alone."""
    if not path.exists():
        raise ValueError(f"There is no training data at {path}; give a file or a folder of images.")
    if not path.is_dir() or is_store(path):
        return [path]
    known = PICTURES | ARRAYS
    return sorted(
        p
        for p in path.iterdir()
        if p.suffix.lower() in known or p.name.lower().endswith((".nii", ".nii.gz")) or is_dicom(p)
    )


def _read(
    path: Path, channels: int, normalise: str, slice_axis: int, labelled: bool = False
) -> tuple[Images, list[int]]:
    """Images of a file or folder, and their classes where these are asked for."""
    if normalise not in ("p99", "none"):
        raise ValueError(f"normalise must be 'p99' or 'none'; got {normalise!r}.")
    files = _files(path)
    dicom = {p for p in files if is_dicom(p)}
    images: Images = []
    labels: list[int] = []
    for file in files:
        if file not in dicom:
            found, classes = _read_one(file, channels, slice_axis, labelled)
            images.extend(found)
            labels.extend(classes)
    if labelled and dicom:
        raise ValueError(
            f"{path} holds DICOM files, which say no class; put those of every class into a sub-folder."
        )
    images += [to_channels(x, channels, where) for x, where in read_dicom(sorted(dicom))] if dicom else []
    if not images:
        raise ValueError(
            f"{path} holds no images of rank 2 or more; give .npy, .npz, HDF5, Zarr, NIfTI, DICOM or pictures."
        )
    return ([_normalised(image) for image in images] if normalise == "p99" else images), labels


def read_images(source: str | Path, channels: int, normalise: str = "p99", slice_axis: int = 2) -> Images:
    """Read every image below a path.

    Args:
        source: a .npy, .npz, .h5, .hdf5 or .zarr file, a NIfTI volume (.nii, .nii.gz), a DICOM file, a picture
            (.png, .jpg, .tif), or a folder of such files (searched in name order, not recursively).
        channels: 2 for complex images, 1 for real ones.
        normalise: ``"p99"`` divides each image by the 99th percentile of its magnitude; ``"none"``
            leaves values as they are.
        slice_axis: axis along which volumes of NIfTI are cut into slices.

    Returns:
        float32 arrays ``(channels, ny, nx)``, in file order.

    Raises:
        ValueError: the path is missing or empty, or a file cannot be used.
    """
    return _read(Path(source), channels, normalise, slice_axis)[0]


def read_labelled(
    source: str | Path, channels: int, normalise: str = "p99", slice_axis: int = 2
) -> tuple[Images, list[int], list[str]]:
    """Read images and their classes: of sub-folders, one per class, or of arrays with a list ``label`` beside.

    Args:
        source: as for `read_images`.
        channels: as for `read_images`.
        normalise: as for `read_images`.
        slice_axis: as for `read_images`.

    Returns:
        Images; the class of each, counted from 0; and the names of the classes, in order: of the sub-folders, or
        the numbers that occur in the lists.

    Raises:
        ValueError: as for `read_images`, or an image has no class.
    """
    path = Path(source)
    folders = class_folders(path)
    if not folders:
        images, found = _read(path, channels, normalise, slice_axis, labelled=True)
        values = sorted(set(found))
        return images, [values.index(v) for v in found], [str(v) for v in values]
    images, labels = [], []
    for n, folder in enumerate(folders):
        found_here = _read(folder, channels, normalise, slice_axis)[0]
        images += found_here
        labels += [n] * len(found_here)
    return images, labels, [f.name for f in folders]


def class_folders(path: Path) -> list[Path]:
    """Sub-folders of a folder of images by name, one per class; none for files and Zarr stores.

    Raises:
        ValueError: images lie beside the sub-folders.
    """
    if not path.is_dir() or is_store(path):
        return []
    folders = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith(".") and not is_store(p))
    if folders and (beside := [p for p in _files(path) if p not in folders]):
        raise ValueError(f"{beside[0]} lies beside the sub-folders of the classes; move it into one of them.")
    return folders


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
