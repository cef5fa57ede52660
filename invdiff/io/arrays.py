"""Reading plain arrays from .npy, .npz, HDF5 and BART .cfl: nothing executes, sizes are checked before reading."""

from __future__ import annotations

import difflib
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from invdiff.errors import InvdiffError

#: A compressed member may be this many times smaller than what it unpacks to, and no more.
MAX_RATIO = 1100
#: Below this many bytes nothing is called too large.
SMALL = 64 * 2**20
HDF5_SUFFIXES = {".h5", ".hdf5", ".hdf", ".nxs"}
SUFFIXES = (".npy", ".npz", ".h5", ".cfl")


def existing(path: str | os.PathLike[str], what: str = "The file") -> Path:
    """Return the path of a file that is there.

    Raises:
        InvdiffError: If it is not; the sentence names files of similar name in the same folder.
    """
    given = Path(path)
    if given.is_file():
        return given
    if given.is_dir():
        raise InvdiffError(f"{what} {given} is a folder; give the path of one file inside it.")
    if not given.parent.is_dir():
        raise InvdiffError(f"{what} {given} does not exist, and neither does its folder; check the path.")
    names = [p.name for p in given.parent.iterdir() if p.is_file()]
    near = difflib.get_close_matches(given.name, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else "check the path."
    raise InvdiffError(f"{what} {given} does not exist; {hint}")


def available_memory() -> int | None:
    """Return the bytes of memory that are free for use, or None where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


def check_fits(nbytes: int, what: str) -> None:
    """Raise one sentence if ``nbytes`` declared bytes do not fit into memory."""
    free = available_memory()
    if free is not None and nbytes > max(free, SMALL):
        raise InvdiffError(
            f"{what} declares {nbytes / 2**30:.1f} GiB and {free / 2**30:.1f} GiB of memory are free; "
            "cut out the part you need, or use a larger machine."
        )


def read_array(path: str | os.PathLike[str], key: str | None = None, what: str = "The file") -> np.ndarray:
    """Read one numeric array from .npy, .npz, HDF5 or a BART .cfl/.hdr pair.

    Args:
        path: File to read; the suffix says what it is.
        key: Name of the array in .npz or HDF5; may be left out where the file holds only one.
        what: How to call the file in messages, e.g. ``"The mask file"``.

    Returns:
        The array as stored (BART arrays in C order, without trailing axes of length 1).

    Raises:
        InvdiffError: If the file is missing, broken, of unknown kind, too large, or holds Python objects.
    """
    file = existing(path, what)
    suffix = file.suffix.lower()
    if suffix == ".npy":
        return read_npy(file)
    if suffix == ".npz":
        names = npz_names(file)
        return read_npz(file, [pick_key(names, key, file)])[pick_key(names, key, file)]
    if suffix in HDF5_SUFFIXES:
        return read_hdf5_array(file, key)
    if suffix in {".cfl", ".hdr"}:
        from invdiff.io.bart import read_cfl

        full = read_cfl(file)
        return full.reshape(full.shape[next((i for i, n in enumerate(full.shape) if n > 1), full.ndim - 1) :])
    raise unknown_format(file)


def unknown_format(path: Path) -> InvdiffError:
    """Return the sentence for a file whose suffix is not known."""
    return InvdiffError(
        f"{path} has the unknown suffix {path.suffix or '(none)'!r}; "
        f"expected one of {', '.join(SUFFIXES)}: convert the file or rename it."
    )


def pick_key(names: list[str], key: str | None, path: Path) -> str:
    """Return the name of the array to read, or raise a sentence that lists what there is."""
    if key is not None:
        if key in names:
            return key
        raise InvdiffError(f"{path} holds no array {key!r}; it holds {_listing(names)}: name one of those.")
    if len(names) == 1:
        return names[0]
    raise InvdiffError(f"{path} holds {_listing(names)}; say which one to read by its name (key).")


def _listing(names: list[str]) -> str:
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return shown or "no arrays at all"


def read_npy(path: Path) -> np.ndarray:
    """Read a .npy file after its header has been checked against the size of the file."""
    with path.open("rb") as stream:
        start = _check_header(stream, path.stat().st_size, f"{path}")
        stream.seek(start)
        return _load(stream, path)


def npz_names(path: Path) -> list[str]:
    """Return the names of the arrays in a .npz file."""
    try:
        with zipfile.ZipFile(path) as archive:
            return [n.removesuffix(".npy") for n in archive.namelist() if n.endswith(".npy")]
    except (zipfile.BadZipFile, OSError) as error:
        raise InvdiffError(f"{path} is not a readable .npz file ({error}); write or copy it again.") from error


def read_npz(path: Path, names: list[str]) -> Mapping[str, np.ndarray]:
    """Read the named arrays of a .npz file, each after a check of its declared size and ratio."""
    out: dict[str, np.ndarray] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for name in names:
                info = archive.getinfo(f"{name}.npy")
                if info.file_size > SMALL and info.file_size > MAX_RATIO * max(info.compress_size, 1):
                    raise InvdiffError(
                        f"{path}: {name} unpacks to {info.file_size} bytes from {info.compress_size}, "
                        "which no measurement does; get the file from a source you trust."
                    )
                with archive.open(info) as stream:
                    _check_header(stream, info.file_size, f"{path}: {name}")
                with archive.open(info) as stream:
                    out[name] = _load(stream, path)
    except (zipfile.BadZipFile, EOFError, OSError, KeyError) as error:
        raise InvdiffError(f"{path} is damaged or cut short ({error}); write or copy it again.") from error
    return out


def _check_header(stream: IO[bytes], size: int, what: str) -> int:
    """Check dtype and declared size of a .npy stream against ``size`` bytes; return where it began."""
    start = 0
    try:
        version = np.lib.format.read_magic(stream)
        reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = reader(stream)
    except ValueError as error:
        raise InvdiffError(
            f"{what} is not a readable .npy array ({_first_line(error)}); write it again."
        ) from error
    if dtype.hasobject:
        raise InvdiffError(
            f"{what} holds Python objects, which could run code when read; store a plain numeric array instead."
        )
    declared = dtype.itemsize
    for n in shape:
        declared *= int(n)
    if stream.tell() + declared > size:
        raise InvdiffError(
            f"{what} is cut short: its header declares {declared} bytes of data "
            f"and {size - stream.tell()} are there; write or copy it again."
        )
    check_fits(declared, what)
    return start


def _load(stream: IO[bytes], path: Path) -> np.ndarray:
    try:
        return np.asarray(np.lib.format.read_array(stream, allow_pickle=False))
    except (ValueError, EOFError) as error:
        raise InvdiffError(f"{path} cannot be read ({_first_line(error)}); write or copy it again.") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")[:120]


def read_hdf5_array(path: Path, key: str | None) -> np.ndarray:
    """Read one dataset of an HDF5 file that has passed the safety checks."""
    import h5py

    from invdiff.io.hdf5_safe import open_h5

    with open_h5(path) as file:
        names = [name for name, item in file.items() if isinstance(item, h5py.Dataset)]
        item = file[key] if key is not None and key in file else None
        if not isinstance(item, h5py.Dataset):
            item = file[pick_key(names, key, path)]
        return read_dataset(item, slice(None), f"{path}: {item.name}")


def read_dataset(dataset: Any, index: Any, what: str) -> np.ndarray:
    """Read ``dataset[index]`` of an open HDF5 file; a truncated one gives one sentence."""
    if dataset.dtype.kind not in "biufcV":
        raise InvdiffError(f"{what} holds {dataset.dtype}, not numbers; name a numeric dataset.")
    share = dataset.nbytes // dataset.shape[0] if isinstance(index, int) and dataset.shape else dataset.nbytes
    check_fits(int(share), what)
    try:
        return np.asarray(dataset[index])
    except (OSError, ValueError) as error:
        raise InvdiffError(
            f"{what} cannot be read ({_first_line(error)}); write or copy the file again."
        ) from error
