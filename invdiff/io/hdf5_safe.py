"""Opening HDF5 files from strangers: everything that could lead elsewhere is refused before it is followed.

An HDF5 file can name other local files (external links, external storage, virtual datasets), declare
terabytes it does not hold, nest without end, or ask for a filter plugin to be loaded. The checks below read
links, types and declared shapes only, never data.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from invdiff.errors import StoreError
from invdiff.memory import readable_size

#: Declared bytes above this are refused unless the caller asks for more.
MAX_BYTES = 64 << 30
#: Declared bytes may exceed the size of the file by this factor (zlib cannot pass 1032).
MAX_RATIO = 1100
MAX_DEPTH = 16
MAX_OBJECTS = 10_000
_SLACK = 16 << 20
_MAX_ATTRIBUTE = 64 << 20
#: deflate, shuffle, fletcher32, szip, nbit, scale-offset, lzf: built in, no plugin needed.
_FILTERS = frozenset({1, 2, 3, 4, 5, 6, 32000})


def open_h5(path: str | Path, *, max_bytes: int = MAX_BYTES, max_ratio: float = MAX_RATIO) -> Any:
    """Open an HDF5 file for reading after checking that it is whole and self-contained.

    Args:
        path: The file.
        max_bytes: Largest sum of declared dataset sizes.
        max_ratio: Largest ratio of declared size to file size (small files get 16 MiB of grace).

    Returns:
        An open ``h5py.File``, to be closed by the caller.

    Raises:
        StoreError: In one sentence, if the file is missing, not HDF5, truncated, leads to other files, or
            declares more than the limits allow.
    """
    import h5py

    path = Path(path)
    if not path.exists():
        raise StoreError(f"The file {path} does not exist; check the name.")
    if not path.is_file():
        raise StoreError(f"{path} is not a file; give an HDF5 or netCDF-4 file.")
    try:
        if not h5py.is_hdf5(path):
            raise StoreError(f"{path} is not an HDF5 file (its first bytes say otherwise); check what it is.")
        file = h5py.File(path, "r")
    except OSError as error:
        why = "it is truncated" if "truncated" in str(error) else str(error)
        raise StoreError(f"{path} cannot be opened as HDF5 ({why}); copy or download it again.") from None
    try:
        _Inspector(path, max_bytes, max_ratio).check(file)
    except StoreError:
        file.close()
        raise
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, OverflowError) as error:
        file.close()
        raise StoreError(f"{path} is damaged HDF5 ({error}); copy or download it again.") from None
    except BaseException:
        file.close()
        raise
    return file


class _Inspector:
    """One walk over the hard links of a file, without recursion."""

    def __init__(self, path: Path, max_bytes: int, max_ratio: float) -> None:
        self.path = path
        self.max_bytes = max_bytes
        self.allowance = max(_SLACK, int(max_ratio * path.stat().st_size))
        self.declared = 0
        self.seen: set[Any] = set()
        self.soft: list[tuple[Any, str]] = []

    def check(self, file: Any) -> None:
        import h5py

        stack = [(file["/"], 0)]
        self._count(stack[0][0])
        while stack:
            group, depth = stack.pop()
            for name in self._hard_links(group):
                item = group[name]
                if not self._count(item):
                    continue
                if isinstance(item, h5py.Group):
                    if depth + 1 > MAX_DEPTH:
                        raise self._refuse(
                            f"nests groups deeper than {MAX_DEPTH}", "flatten it to read it with this library"
                        )
                    stack.append((item, depth + 1))
                elif isinstance(item, h5py.Dataset):
                    self._dataset(item)
        # Only now is it known that no path inside the file can leave it.
        for group, name in self.soft:
            if group.get(name) is None:
                raise self._refuse(f"holds a link {name!r} that leads nowhere", "remove the link")

    def _hard_links(self, group: Any) -> list[str]:
        import h5py

        names = []
        for name in group:
            link = group.get(name, getlink=True)
            if isinstance(link, h5py.HardLink):
                names.append(name)
            elif isinstance(link, h5py.SoftLink):
                self.soft.append((group, name))
            else:
                target = getattr(link, "filename", "elsewhere")
                raise self._refuse(f"holds an external link {name!r} to {target!r}", "copy the data into one file")
        return names

    def _count(self, item: Any) -> bool:
        """Note an object; return whether it is new (hard links can make cycles)."""
        import h5py

        info = h5py.h5o.get_info(item.id)
        key = (info.fileno, info.addr)
        if key in self.seen:
            return False
        self.seen.add(key)
        if len(self.seen) > MAX_OBJECTS:
            raise self._refuse(f"holds more than {MAX_OBJECTS} objects", "split it")
        for i in range(h5py.h5a.get_num_attrs(item.id)):
            attribute = h5py.h5a.open(item.id, index=i)
            if attribute.get_storage_size() > _MAX_ATTRIBUTE:
                raise self._refuse("declares an attribute larger than 64 MiB", "store it as a dataset")
        return True

    def _dataset(self, item: Any) -> None:
        plist = item.id.get_create_plist()
        if item.is_virtual:
            raise self._refuse(
                f"holds a virtual dataset {item.name!r} that reads other files", "copy the data into one file"
            )
        if plist.get_external_count():
            raise self._refuse(
                f"keeps the values of {item.name!r} in other files (external storage)",
                "copy the data into one file",
            )
        for i in range(plist.get_nfilters()):
            if plist.get_filter(i)[0] not in _FILTERS:
                raise self._refuse(
                    f"compresses {item.name!r} with filter {plist.get_filter(i)[0]}, which needs a plugin",
                    "write it again with gzip",
                )
        if not _plain(item.dtype):
            raise self._refuse(
                f"holds {item.name!r} of type {item.dtype}, which could hide pickled objects",
                "store numbers or text",
            )
        self.declared += int(item.size or 0) * item.dtype.itemsize
        if self.declared > self.max_bytes:
            raise self._refuse(
                f"declares {readable_size(self.declared)} of data at least, "
                f"above the limit of {readable_size(self.max_bytes)}",
                "raise the limit if you trust it",
            )
        if self.declared > self.allowance:
            raise self._refuse(
                f"declares {readable_size(self.declared)} of data at least, far more than its "
                f"{readable_size(self.path.stat().st_size)} can hold",
                "do not trust it",
            )

    def _refuse(self, what: str, remedy: str) -> StoreError:
        return StoreError(f"{self.path} {what}, so it is not read; {remedy}.")


def _plain(dtype: Any) -> bool:
    """Numbers, fixed or variable text, enums of them, and records of those."""
    import h5py

    if dtype.kind == "O":
        return h5py.check_string_dtype(dtype) is not None
    if dtype.fields is not None:
        return all(_plain(part[0]) for part in dtype.fields.values())
    if dtype.subdtype is not None:
        return _plain(dtype.subdtype[0])
    return dtype.kind in "biufcSU"
