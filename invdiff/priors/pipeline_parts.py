"""Parts of a diffusers pipeline: a class named here, its configuration, and weights filled strictly."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from invdiff.errors import InvdiffError
from invdiff.priors.assemble import fill
from invdiff.priors.formats.diffusers_unet import renamed
from invdiff.priors.source import Source

__all__ = ["Part", "class_of", "filled", "read_part"]

_WEIGHTS = tuple(
    f"diffusion_pytorch_model{variant}.{suffix}" for suffix in ("safetensors", "bin") for variant in ("", ".fp16")
)
# Far beyond what networks have, and small enough to compute with.
_LARGEST, _LEVELS = 1 << 20, 12
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.(safetensors|bin)")


@dataclass(frozen=True)
class Part:
    """One network of a pipeline: its folder, its class and its configuration."""

    place: str
    kind: str
    config: Mapping[str, Any]

    def get(self, key: str) -> Any:
        """Value of the configuration, or the default of the class."""
        if key in self.config:
            return self.config[key]
        return inspect.signature(class_of(self.kind).__init__).parameters[key].default

    def whole(self, key: str) -> int:
        """A positive whole number of the configuration.

        Raises:
            InvdiffError: If it is none.
        """
        value = self.get(key)
        if not isinstance(value, int) or not 0 < value < _LARGEST:
            raise InvdiffError(f"{self.place}/config.json has {key} = {value!r:.60}; expected a whole number.")
        return value

    def halvings(self) -> int:
        """How many times a U-Net or an autoencoder halves its images.

        Raises:
            InvdiffError: If its levels are not listed.
        """
        levels = self.get("block_out_channels")
        if not isinstance(levels, list | tuple) or not 0 < len(levels) <= _LEVELS:
            raise InvdiffError(
                f"{self.place}/config.json has block_out_channels = {levels!r:.60}; expected the channels of "
                f"at most {_LEVELS} levels."
            )
        return len(levels) - 1


def read_part(source: Source, index: Mapping[str, Any], known: Mapping[str, tuple[str, ...]], what: str) -> Part:
    """Return the part that the index of a pipeline names.

    Args:
        source: The folder.
        index: Its ``model_index.json``.
        known: Classes that are served, by the folder they may lie in.
        what: What the part is, for messages.

    Raises:
        InvdiffError: If the index names none or an unknown class, the configuration is missing or another's, or
            the library is missing or too old for it.
    """
    place = next((name for name in known if index.get(name) not in (None, [None, None])), None)
    if place is None:
        raise InvdiffError(f"{source.path}/model_index.json names no {what}; expected {' or '.join(known)}.")
    entry = index[place]
    if not isinstance(entry, list) or len(entry) != 2 or entry[0] != "diffusers" or entry[1] not in known[place]:
        raise InvdiffError(
            f"{source.path}/model_index.json names {str(entry)!r:.80} as {place}; known are "
            f"{', '.join(known[place])} of diffusers."
        )
    config = source.json(f"{place}/config.json")
    if config is None:
        raise InvdiffError(f"{source.path} lacks {place}/config.json; fetch the checkpoint again.")
    if config.get("_class_name", entry[1]) != entry[1]:
        raise InvdiffError(
            f"{source.path}/{place}/config.json describes a {str(config['_class_name'])!r:.60}, and "
            f"model_index.json a {entry[1]}; they belong to different checkpoints."
        )
    part = Part(place, entry[1], config)
    accepted = inspect.signature(class_of(part.kind).__init__).parameters
    for key in config:
        if not key.startswith("_") and key not in accepted:
            raise InvdiffError(
                f"{source.path}/{place}/config.json has {key!r:.60}, which the installed diffusers does not know; "
                "update diffusers."
            )
    return part


def class_of(kind: str) -> Any:
    """A class of the library; only names written in this package come here."""
    try:
        import diffusers
    except ImportError:
        raise InvdiffError(
            "Checkpoints of diffusers need that library; `pip install 'invdiff[hub]'` brings it."
        ) from None
    return getattr(diffusers, kind)


def filled(source: Source, part: Part, dtype: torch.dtype) -> tuple[nn.Module, str]:
    """Return the network with its weights, and their SHA-256 (several with spaces between).

    Raises:
        InvdiffError: If weights are missing, damaged, or not those of the configuration.
    """
    state, names = _state(source, part.place)
    where = str(source.file(names[0]))
    values = {k: v for k, v in part.config.items() if not k.startswith("_")}
    cls = class_of(part.kind)
    network = fill(lambda: cls.from_config(values), {renamed(k): v for k, v in state.items()}, where, dtype)
    return network, " ".join(source.sha256(name) for name in names)


def _state(source: Source, place: str) -> tuple[dict[str, Tensor], list[str]]:
    """Weights of a part, in one file or in those of an index; and the files."""
    names = [f"{place}/{name}" for name in _WEIGHTS if source.file(f"{place}/{name}").is_file()][:1]
    if not names:
        shards = source.json(f"{place}/diffusion_pytorch_model.safetensors.index.json") or {}
        listed = shards.get("weight_map")
        files = set(listed.values()) if isinstance(listed, dict) else set()
        for name in files:
            if not isinstance(name, str) or not _PLAIN_NAME.fullmatch(name):
                raise InvdiffError(f"The index of {source.path}/{place} names {name!r:.80}, no file beside it.")
        names = [f"{place}/{name}" for name in sorted(files)]
    if not names:
        raise InvdiffError(f"{source.path} has no weights in {place}/; expected {_WEIGHTS[0]} or {_WEIGHTS[2]}.")
    state: dict[str, Tensor] = {}
    for name in names:
        part = source.weights(name)
        if not isinstance(part, Mapping) or not all(isinstance(v, Tensor) for v in part.values()):
            raise InvdiffError(f"{source.file(name)} does not hold a flat list of weights; fetch it again.")
        state.update(part)
    return state, names
