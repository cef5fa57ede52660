"""Checkpoints as they lie on disk, read without executing anything in them.

Weights come from safetensors, or from torch files through ``torch.load(weights_only=True)``; everything that needs
more than that is refused with the name of the command that converts it.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from invdiff.errors import InvdiffError

__all__ = ["Source"]

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
#: Formats that only the converter reads.
PICKLE_SUFFIXES = (".pkl", ".pickle")
LARGEST_JSON = 1 << 24


class Source:
    """One checkpoint: a file of weights with its JSON card beside it, or a folder of such files.

    Args:
        path: The file, or the folder (diffusers' layout).

    Raises:
        InvdiffError: If nothing is there.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise InvdiffError(f"There is no prior at {self.path}; check the path.")

    @property
    def folder(self) -> bool:
        """Whether the checkpoint is a folder."""
        return self.path.is_dir()

    @cached_property
    def files(self) -> tuple[str, ...]:
        """Files of a folder, relative, at most two levels down; the file's own name otherwise."""
        if not self.folder:
            return (self.path.name,)
        found = [p for pattern in ("*", "*/*") for p in self.path.glob(pattern) if p.is_file()]
        return tuple(sorted(p.relative_to(self.path).as_posix() for p in found))

    def file(self, name: str = "") -> Path:
        """Path of a file of the folder, or the file itself."""
        return self.path / name if self.folder else self.path

    def json(self, name: str = "") -> dict[str, Any] | None:
        """Read a JSON object of the folder, or the card beside the file; None where there is none.

        Raises:
            InvdiffError: If it is not a JSON object, or larger than a configuration can be.
        """
        path = self.path / name if self.folder else self.path.with_suffix(".json")
        if not path.is_file():
            return None
        if path.stat().st_size > LARGEST_JSON:
            raise InvdiffError(
                f"{path} has {path.stat().st_size} bytes; a configuration has at most {LARGEST_JSON}."
            )
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise InvdiffError(f"{path} is not valid JSON ({error}); write or fetch it again.") from None
        if not isinstance(found, dict):
            raise InvdiffError(f"{path} must hold a JSON object; got {type(found).__name__}.")
        return found

    def weights(self, name: str = "") -> Any:
        """Read a file of weights: a flat mapping of tensors, or whatever plain structure a torch file nests.

        Args:
            name: File of the folder; its suffix says how it is read.

        Raises:
            InvdiffError: If the file is truncated, damaged, or would have to execute something.
        """
        path = self.file(name)
        if not path.is_file():
            raise InvdiffError(f"{path} is missing; fetch the checkpoint again.")
        if path.suffix == ".safetensors":
            return _safetensors(path)
        if path.suffix in TORCH_SUFFIXES:
            return _torch(path)
        if path.suffix in PICKLE_SUFFIXES:
            raise InvdiffError(
                f"{path} is a pickle, which can run any code when it is opened; "
                f"`invdiff priors convert {path.name}` reads it without running anything and writes safetensors."
            )
        raise InvdiffError(f"{path} is none of .safetensors, {', '.join(TORCH_SUFFIXES)}; give a checkpoint.")

    @cached_property
    def content(self) -> Any:
        """`weights` of a single file, read once."""
        return self.weights()

    @cached_property
    def state(self) -> Mapping[str, Tensor]:
        """`content` where it is a flat mapping of names to tensors, else an empty mapping."""
        if self.folder:
            return {}
        content = self.content
        flat = isinstance(content, Mapping) and content and all(isinstance(v, Tensor) for v in content.values())
        return content if flat else {}

    def sha256(self, name: str = "") -> str:
        """SHA-256 of a file."""
        from invdiff.priors.learned import sha256_file

        return sha256_file(self.file(name))


def _safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise InvdiffError(f"{path} is not a readable safetensors file ({error}); fetch it again.") from None


def _torch(path: Path) -> Any:
    _check_archive(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # its failures have no common class
        if "weights_only" in str(error) or "Unsupported" in str(error):
            reason = str(error).split("\n")[0][:160]
            raise InvdiffError(
                f"{path} holds more than weights ({reason}); `invdiff priors convert {path.name}` reads it "
                "without running anything and writes safetensors."
            ) from None
        raise InvdiffError(f"{path} is damaged or truncated ({str(error)[:160]}); fetch it again.") from None


def _check_archive(path: Path) -> None:
    """Refuse torch archives that unpack to more than they are: torch stores its tensors uncompressed."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(info.file_size for info in archive.infolist())
    if unpacked > 2 * path.stat().st_size + LARGEST_JSON:
        raise InvdiffError(f"{path} unpacks to {unpacked} bytes, far more than its size; it is not loaded.")
