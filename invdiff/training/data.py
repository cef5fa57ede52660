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
from invdiff.training.synthesisers import SYNTHESISERS

__all__ = ["read_images", "synthetic_images", "to_channels"]

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


def _read_one(path: Path, channels: int, slice_axis: int) -> tuple[Images, list[int] | None]:
    """Images of one file, and the class of each where the file has a list of them."""
    suffix = path.suffix.lower()
    if suffix in PICTURES:
        return [to_channels(read_picture(path), channels, str(path))], None
    if path.name.lower().endswith((".nii", ".nii.gz")):
        from invdiff.training.nifti import read_nifti

        return [to_channels(x, channels, str(path)) for x in read_nifti(path, slice_axis)], None
    arrays = read_arrays(path)
    lists = {n: a for n, a in arrays.items() if a.ndim == 1 and n.rsplit("/", 1)[-1] == LABEL}
    images, labels = [], []
    for name, array in arrays.items():
        if name in lists:
            continue
        found = list(_stack(array, channels, f"{path}{':' + name if name else ''}"))
        images += found
        labels.append((name, len(found)))
    return images, _classes_of(path, lists, labels) if lists else None


def _classes_of(path: Path, lists: dict[str, NDArray[Any]], stacks: list[tuple[str, int]]) -> list[int]:
    """Class of every image, from the list in the group of each stack."""
    out: list[int] = []
    for name, count in stacks:
        beside = lists.get(f"{name.rpartition('/')[0]}/{LABEL}".lstrip("/"))
        if beside is None or len(beside) != count or beside.dtype.kind not in "iu":
            raise ValueError(
                f"{path} needs a list '{LABEL}' of {count} whole numbers beside {name or 'its images'}, one class "
                "per image."
            )
        out += [int(v) for v in beside]
    return out


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


def _read(path: Path, channels: int, normalise: str, slice_axis: int) -> tuple[Images, list[int] | None]:
    """Images of a file or folder, and their classes where every file tells them."""
    if normalise not in ("p99", "none"):
        raise ValueError(f"normalise must be 'p99' or 'none'; got {normalise!r}.")
    files = _files(path)
    dicom = {p for p in files if is_dicom(p)}
    images: Images = []
    labels: list[int] | None = []
    for file in files:
        if file in dicom:
            continue
        found, classes = _read_one(file, channels, slice_axis)
        images += found
        labels = labels + classes if labels is not None and classes is not None else None
    if dicom:
        images += [to_channels(x, channels, where) for x, where in read_dicom(sorted(dicom))]
        labels = None
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
