"""Checks on a Zarr folder before any of its codecs runs: format 3, known codecs, no links, sane shapes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from invdiff.errors import StoreError

MAX_BYTES = 1 << 50
_CODECS = frozenset(
    {"bytes", "blosc", "gzip", "zstd", "crc32c", "transpose", "vlen-utf8", "vlen-bytes", "sharding_indexed"}
)
_OLD = frozenset({".zgroup", ".zarray", ".zattrs", ".zmetadata"})
_MAX_METADATA = 16 << 20


def check_zarr(path: Path, *, max_bytes: int = MAX_BYTES) -> None:
    """Raise `StoreError` unless ``path`` is a self-contained Zarr format 3 store with built-in codecs.

    Format 2 is refused because its filters include one that unpickles.
    """
    if not (path / "zarr.json").is_file():
        raise StoreError(f"{path} is a folder and not a Zarr format 3 store (no zarr.json); check the name.")
    declared = 0
    for item in path.rglob("*"):
        if item.is_symlink():
            raise StoreError(f"{path} holds a link ({item.name}) that may lead elsewhere, so it is not read.")
        if item.name in _OLD:
            raise StoreError(f"{path} holds Zarr format 2 parts ({item.name}), which can run code; convert it.")
        if item.name == "zarr.json":
            declared += _declared_bytes(path, item)
            if declared > max_bytes:
                raise StoreError(f"{path} declares more than {max_bytes} bytes, so it is not read.")


def _declared_bytes(store: Path, file: Path) -> int:
    where = file.relative_to(store)
    if file.stat().st_size > _MAX_METADATA:
        raise StoreError(f"{store} has metadata of more than 16 MiB in {where}, so it is not read.")
    try:
        meta = json.loads(file.read_text("utf-8"))
        if meta.get("node_type") != "array":
            return 0
        unknown = sorted(_codec_names(meta.get("codecs", [])) - _CODECS)
        count = math.prod(int(n) for n in meta["shape"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise StoreError(f"{store} has damaged metadata in {where}; copy it again.") from None
    if unknown:
        raise StoreError(f"{store} asks for the codec {unknown[0]!r} in {where}, which is not built in.")
    return 16 * count


def _codec_names(codecs: Any) -> set[str]:
    names = set()
    for codec in codecs:
        name = codec if isinstance(codec, str) else codec["name"]
        names.add(str(name))
        if isinstance(codec, dict):
            inner = codec.get("configuration") or {}
            names |= _codec_names(inner.get("codecs", [])) | _codec_names(inner.get("index_codecs", []))
    return names
