"""Checkpoint folder of a run: what is asked, finished chunks, the chunk in progress.

``run.json`` holds the configuration and its hash; ``chunk-<first row>.safetensors`` the draws of finished rows in
image space with their statistics; ``state.safetensors`` the state of the chunk in progress and its step. Random
numbers are functions of (seed, case, draw, step), so no generator state is needed for a bit-exact resume. Every
file is written under a temporary name, flushed and renamed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from invdiff.errors import ResumeError
from invdiff.io.atomic import whole_file

SCHEMA = "invdiff.checkpoint/1"


def config_hash(config: dict[str, Any]) -> str:
    """SHA-256 of a configuration in canonical JSON."""
    text = json.dumps(config, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class InProgress:
    """Rows ``[first, first + count)`` as they were before step ``k``, with the counters so far."""

    first: int
    count: int
    k: int
    state: dict[str, Tensor]
    extra: dict[str, float]


class Checkpoint:
    """A folder of finished chunks and the state of the one in progress.

    Args:
        folder: Where to write; made when needed.
        config: Everything that determines the draws.
        resume: Continue what is there; otherwise an earlier run in the folder is refused.

    Raises:
        ResumeError: If the folder holds another run, or a run and ``resume`` was not asked for.
    """

    def __init__(self, folder: str | Path, config: dict[str, Any], resume: bool) -> None:
        self.folder = Path(folder)
        self.hash = config_hash(config)
        record = self.folder / "run.json"
        if record.exists():
            self._check(record, config, resume)
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            body = {"schema": SCHEMA, "hash": self.hash, "config": config}
            with whole_file(record) as temporary:
                temporary.write_text(json.dumps(body, indent=1, default=str), encoding="utf-8")

    def _check(self, record: Path, config: dict[str, Any], resume: bool) -> None:
        try:
            there = json.loads(record.read_text())
        except (OSError, ValueError) as error:
            raise ResumeError(f"{record} cannot be read ({error}); delete the folder to start afresh.") from error
        if not resume:
            raise ResumeError(
                f"{self.folder} holds an unfinished run; continue it with resume, or delete the folder."
            )
        if there.get("schema") != SCHEMA or there.get("hash") != self.hash:
            old = there.get("config", {})
            differing = [
                k for k in config if json.dumps(config[k], default=str) != json.dumps(old.get(k), default=str)
            ]
            raise ResumeError(
                f"{self.folder} belongs to another run (different {', '.join(differing) or 'schema'}); "
                "repeat the original settings, or delete the folder to start afresh."
            )

    def finished(self) -> list[tuple[int, int, Path]]:
        """Return ``(first row, number of rows, path)`` of the finished chunks, in order."""
        from safetensors import safe_open

        out = []
        for path in sorted(self.folder.glob("chunk-*.safetensors")):
            with safe_open(str(path), framework="pt") as f:
                out.append((int(path.stem.split("-")[1]), f.get_slice("nfe").get_shape()[0], path))
        return out

    def save_chunk(self, first: int, tensors: dict[str, Tensor]) -> Path:
        """Store a finished chunk and drop the state in progress."""
        path = self.folder / f"chunk-{first:08d}.safetensors"
        _save(path, tensors, {})
        (self.folder / "state.safetensors").unlink(missing_ok=True)
        return path

    def save_state(self, chunk: InProgress) -> None:
        """Store the chunk in progress, replacing what was there."""
        meta = {"first": str(chunk.first), "count": str(chunk.count), "k": str(chunk.k)}
        _save(self.folder / "state.safetensors", chunk.state, {**meta, "extra": json.dumps(chunk.extra)})

    def load_state(self) -> InProgress | None:
        """Return the chunk in progress, if there is one."""
        from safetensors import safe_open

        path = self.folder / "state.safetensors"
        if not path.exists():
            return None
        with safe_open(str(path), framework="pt") as f:
            meta = f.metadata()
            state = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118 (not a mapping)
        first, count, k = (int(meta[key]) for key in ("first", "count", "k"))
        return InProgress(first, count, k, state, json.loads(meta["extra"]))

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    from safetensors.torch import save

    plain = {k: v.detach().cpu().contiguous().resolve_conj() for k, v in tensors.items()}
    plain = {k: torch.view_as_real(v) if v.dtype == torch.complex128 else v for k, v in plain.items()}
    with whole_file(path) as temporary:
        temporary.write_bytes(save(plain, metadata=metadata))
