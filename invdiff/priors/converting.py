"""From pickled checkpoints to safetensors with a card, without executing anything in them.

| what | recognised by | weights |
|---|---|---|
| EDM | objects whose classes travel as source | ``ema``, or ``net`` as raw ones |
| module | a whole network of torch, alone or as in EDM | the same |
| Lightning | ``state_dict`` | U-Net (``model_ema.*``, names without dots, or ``model.*``), both other stages |
| score_sde | ``ema`` with ``shadow_params`` | that list in the order of ``model``, or ``model`` |
| nested | ``ema``, ``net``, ``model`` or ``state_dict`` with tensors | ``ema``, or the others |
| flat | tensors by name | all |

Averaged weights denoise better than the raw ones, so a checkpoint without them is refused unless raw ones are
asked for.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from invdiff.errors import InvdiffError
from invdiff.io.atomic import whole_file
from invdiff.priors.formats.score_sde import averaged
from invdiff.priors.learned import sha256_file
from invdiff.priors.unpickling import Inert, Name, Pickled, read_pickled

__all__ = ["FORMAT", "Converted", "Part", "convert", "parts_of"]

FORMAT = "invdiff-converted/1"
_PERSISTENT = "torch_utils.persistence"
#: Depth of modules in modules, and modules in all.
_DEEPEST, _MOST = 64, 100_000
#: Parts of latent diffusion, by the prefix of their names.
_STAGES = {
    "unet": "model.diffusion_model.",
    "first_stage": "first_stage_model.",
    "cond_stage": "cond_stage_model.",
}
#: Buffers of latent diffusion that say how the network was trained.
_SCHEDULE = ("betas", "alphas_cumprod", "scale_factor")


@dataclass
class Part:
    """One list of weights and what is known of it.

    Attributes:
        label: Empty for a checkpoint of one part, else its name.
        state: The weights.
        about: What the card says of them.
    """

    label: str
    state: dict[str, Tensor]
    about: dict[str, Any]


@dataclass(frozen=True)
class Converted:
    """What a conversion found and wrote.

    Attributes:
        found: What the checkpoint is, in a few words.
        files: Weights that were written; a card of the same name lies beside each.
        cards: Their cards.
        left_out: What the checkpoint holds besides.
    """

    found: str
    files: tuple[Path, ...]
    cards: tuple[dict[str, Any], ...]
    left_out: tuple[str, ...] = field(default=())


def convert(
    path: str | Path, output: str | Path | None = None, *, weights: str = "ema", force: bool = False
) -> Converted:
    """Write the weights of a pickled checkpoint as safetensors, with a card beside them.

    Args:
        path: The checkpoint.
        output: A name ending in ``.safetensors``; by default that of the checkpoint. Several parts get their names
            before the ending.
        weights: ``"ema"`` or ``"raw"``.
        force: Write over files that are there.

    Raises:
        InvdiffError: If the checkpoint is damaged or none that is known, has no such weights, or a file is there.
    """
    path = Path(path)
    target = Path(output) if output is not None else path.with_suffix(".safetensors")
    if target.suffix != ".safetensors":
        raise InvdiffError(f"The output must end in .safetensors, got {target}.")
    if weights not in ("ema", "raw"):
        raise InvdiffError(f"weights must be 'ema' or 'raw', got {weights!r}.")
    if path.suffix == ".safetensors":
        raise InvdiffError(f"{path} is safetensors already; load it as it is.")
    pickled = read_pickled(path)
    found, parts, left_out = parts_of(pickled, weights, str(path))
    files = [target.with_suffix(f".{part.label}.safetensors") if part.label else target for part in parts]
    for file in (f for name in files for f in (name, name.with_suffix(".json"))):
        if file.exists() and not force:
            raise InvdiffError(f"{file} is there already; give another output, or --force to write over it.")
    if sum(v.numel() * v.itemsize for p in parts for v in p.state.values()) > 2 * path.stat().st_size:
        raise InvdiffError(f"{path} holds the same weights under many names, more than the file is large.")
    original = {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256_file(path)}
    target.parent.mkdir(parents=True, exist_ok=True)
    cards = []
    # All files appear, or none.
    with ExitStack() as stack:
        for part, file in zip(parts, files):
            card = {
                "format": FORMAT,
                "name": path.stem if not part.label else f"{path.stem}.{part.label}",
                "kind": found,
                "licence": "not stated in the checkpoint",
                "original": original,
                **part.about,
                "left_out": list(left_out),
            }
            places = (
                stack.enter_context(whole_file(file.with_suffix(".json"))),
                stack.enter_context(whole_file(file)),
            )
            cards.append(_write(*places, part.state, card, file))
    return Converted(found, tuple(files), tuple(cards), left_out)


def _write(
    text: Path, weights: Path, state: Mapping[str, Tensor], card: dict[str, Any], path: Path
) -> dict[str, Any]:
    """Write both files, and return the card."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    # Tensors that share memory, or are no plain blocks of it, are not written.
    whole = {k: v.detach().contiguous().clone() for k, v in state.items()}
    try:
        save_file(whole, weights)
    except (SafetensorError, ValueError, KeyError) as error:
        raise InvdiffError(f"{path} cannot hold these weights ({error}).") from None
    weights.chmod(0o644)
    card = {**card, "tensors": len(whole), "sha256": sha256_file(weights)}
    text.write_text(json.dumps(card, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return card


def parts_of(pickled: Pickled, weights: str, where: str) -> tuple[str, list[Part], tuple[str, ...]]:
    """Return what a checkpoint is, its parts, and what is left out.

    Args:
        pickled: The checkpoint.
        weights: ``"ema"`` or ``"raw"``.
        where: The file, for messages.

    Raises:
        InvdiffError: If it is none that is known, or has no such weights.
    """
    value = pickled.value
    if isinstance(value, Inert) and _is_module(value):
        part = _module(value, "not stated in the checkpoint", {}, where)
        return _kind(value), [part], _left_out({}, (), pickled)
    if not isinstance(value, dict):
        raise InvdiffError(f"{where} holds {type(value).__name__}, and no weights by name.")
    if any(isinstance(v, Inert) and _is_module(v) for v in value.values()):
        key = _chosen(value, weights, where)
        part = _module(value[key], weights, value, where)
        return _kind(value[key]), [part], _left_out(value, (key,), pickled)
    ema = value.get("ema")
    if isinstance(ema, dict) and "shadow_params" in ema:
        state, taken = averaged(value, weights, where)
        about = {"weights": weights, "step": value.get("step") if isinstance(value.get("step"), int) else None}
        return "score_sde", [Part("", state, about)], _left_out(value, taken, pickled)
    if isinstance(value.get("state_dict"), dict):
        return (
            "Lightning",
            (parts := _lightning(value["state_dict"], weights, where)),
            _left_out(value, ("state_dict",), pickled, _others(value["state_dict"], parts)),
        )
    if _tensors(value):
        return "flat", [Part("", dict(value), {"weights": "not stated in the checkpoint"})], ()
    if any(_tensors(v) for v in value.values()):
        key = _chosen(value, weights, where)
        return "nested", [Part("", dict(value[key]), {"weights": weights})], _left_out(value, (key,), pickled)
    raise InvdiffError(
        f"{where} holds {', '.join(map(_shown, list(value)[:6]))}, and none of these are weights by name; "
        "known are checkpoints of EDM, of Lightning, of score_sde, and lists of weights."
    )


def _chosen(value: Mapping[Any, Any], weights: str, where: str) -> str:
    """Key of the weights that are asked for."""
    usable = {k for k, v in value.items() if _tensors(v) or (isinstance(v, Inert) and _is_module(v))}
    for key in ("ema",) if weights == "ema" else ("net", "model"):
        if key in usable:
            return key
    other = "raw" if weights == "ema" else "ema"
    raise InvdiffError(
        f"{where} has weights under {', '.join(sorted(map(_shown, usable)))} and none that are {weights}; "
        f"convert it with --weights {other}."
    )


def _tensors(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
    )


def _left_out(
    value: Mapping[Any, Any], taken: tuple[str, ...], pickled: Pickled, more: Iterable[str] = ()
) -> tuple[str, ...]:
    """Other keys, further weights, and classes that were not made."""
    keys = sorted(_shown(k) for k in value if k not in taken)
    names = (_shown(name) for name in pickled.names if not name.startswith(_PERSISTENT))
    return (*keys, *more, *names)


def _shown(name: Any) -> str:
    """A name from a file, fit for a terminal."""
    return re.sub(r"[^ -~]", "?", str(name))[:100]


def _is_module(value: Inert) -> bool:
    return isinstance(value.state, dict) and isinstance(value.state.get("_modules"), dict)


def _kind(module: Inert) -> str:
    return "EDM" if module.name.module == _PERSISTENT else "module"


def _module(module: Inert, weights: str, whole: Mapping[Any, Any], where: str) -> Part:
    """Weights of a module, its class and arguments, and those of the network inside."""
    state: dict[str, Tensor] = {}
    waiting: list[tuple[str, Inert, int]] = [("", module, 0)]
    seen = 0
    while waiting:
        prefix, at, depth = waiting.pop()
        seen += 1
        if depth > _DEEPEST or seen > _MOST:
            raise InvdiffError(f"{where} holds modules without end; it is not converted.")
        for kind in ("_parameters", "_buffers"):
            group = at.state.get(kind)
            for name, tensor in group.items() if isinstance(group, dict) else ():
                if tensor is None or not isinstance(name, str) or _passing(at, kind, name):
                    continue
                if not isinstance(tensor, Tensor):
                    raise InvdiffError(f"{where} has weights {_shown(prefix + name)} of a kind that is not read.")
                state[prefix + name] = tensor
        inner = at.state.get("_modules")
        for name, child in inner.items() if isinstance(inner, dict) else ():
            if child is None:
                continue
            if not isinstance(child, Inert) or not isinstance(child.state, dict):
                raise InvdiffError(
                    f"{where} has a module {_shown(prefix + str(name))} of a kind that is not read."
                )
            waiting.append((f"{prefix}{name}.", child, depth + 1))
    if not state:
        raise InvdiffError(f"{where} holds a {_shown(module.name.name)} without weights; fetch it again.")
    network = module.state["_modules"].get("model")
    inside = isinstance(network, Inert) and isinstance(network.state, dict)
    described = {"preconditioning": module, "network": network} if inside else {"network": module}
    return Part(
        "",
        state,
        {
            "weights": weights,
            "classes": {k: _shown(m.name.name) for k, m in described.items()},
            "arguments": {k: _plain(m.state.get("_init_kwargs")) for k, m in described.items()},
            "attributes": _plain({k: v for k, v in module.state.items() if not str(k).startswith("_")}),
            **_data(whole.get("dataset_kwargs")),
        },
    )


def _passing(module: Inert, kind: str, name: str) -> bool:
    """Whether a buffer is one that is not saved."""
    listed = module.state.get("_non_persistent_buffers_set")
    return kind == "_buffers" and isinstance(listed, list) and name in listed


def _data(dataset: Any) -> dict[str, Any]:
    """What EDM says of its data: its class of folders reads 8-bit pictures, which its training maps to -1..1."""
    if not isinstance(dataset, dict):
        return {}
    pictures = str(dataset.get("class_name", "")).endswith(".ImageFolderDataset")
    known = {k: v for k, v in _plain(dataset).items() if k not in ("path", "class_name")}
    return {"data": known | ({"network_range": [-1.0, 1.0]} if pictures else {})}


def _plain(value: Any, depth: int = 4) -> Any:
    """Numbers, short text, and short lists and dictionaries of them; all else is dropped."""
    if isinstance(value, bool | float | type(None)) or (isinstance(value, int) and abs(value) < 1 << 53):
        # What JSON has no number for.
        return value if value is None or math.isfinite(value) else str(value)
    if isinstance(value, str):
        return value[:200]
    if isinstance(value, Name):
        return str(value)[:200]
    if depth and isinstance(value, list | tuple) and len(value) <= 64:
        return [_plain(v, depth - 1) for v in value]
    if depth and isinstance(value, dict) and len(value) <= 256:
        simple = (bool, int, float, str, type(None), list, tuple, dict)
        return {str(k)[:100]: _plain(v, depth - 1) for k, v in value.items() if isinstance(v, simple)}
    return None


def _lightning(state: dict[Any, Any], weights: str, where: str) -> list[Part]:
    """Parts of latent diffusion, or all weights of another model."""
    tensors = {k: v for k, v in state.items() if isinstance(k, str) and isinstance(v, Tensor)}
    if not any(k.startswith(_STAGES["unet"]) for k in tensors):
        return [Part("", tensors, {"weights": "as saved by Lightning"})]
    schedule = {k: _numbers(tensors[k]) for k in _SCHEDULE if k in tensors}
    parts = []
    for label, prefix in _STAGES.items():
        own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        if not own:
            continue
        about: dict[str, Any] = {"part": label, "prefix": prefix}
        if label == "unet":
            about |= {"weights": weights, "schedule": schedule}
            if weights == "ema":
                own = _dotless(own, prefix, tensors, where)
        parts.append(Part(label, own, about))
    return parts if len(parts) > 1 else [Part("", parts[0].state, parts[0].about)]


def _others(state: Mapping[Any, Any], parts: list[Part]) -> list[str]:
    """Weights of no part; the kind of a diffusion's weights that was not asked for goes without saying."""
    taken = {part.about.get("prefix", "") + name for part in parts for name in part.state}
    own = ("model_ema.", _STAGES["unet"])
    listed = sorted(_shown(k) for k in state if k not in taken and not str(k).startswith(own))
    return [f"state_dict: {name}" for name in listed[:100]]


def _dotless(
    own: Mapping[str, Tensor], prefix: str, tensors: Mapping[str, Tensor], where: str
) -> dict[str, Tensor]:
    """Averaged weights under the names of the raw ones; they are saved under names without dots."""
    if not any(k.startswith("model_ema.") for k in tensors):
        raise InvdiffError(f"{where} has no averaged weights (model_ema.*); convert it with --weights raw.")
    names = {k: "model_ema." + (prefix + k).removeprefix("model.").replace(".", "") for k in own}
    if len(set(names.values())) != len(names):
        raise InvdiffError(f"{where} has weights whose names differ by dots alone; convert it with --weights raw.")
    for key, name in names.items():
        if name not in tensors or tensors[name].shape != own[key].shape:
            raise InvdiffError(
                f"{where} has no averaged weights of the right shape for {_shown(key)}; convert it with "
                "--weights raw."
            )
    return {key: tensors[name] for key, name in names.items()}


def _numbers(tensor: Tensor) -> Any:
    """A short list of numbers, or one."""
    return tensor.double().tolist() if tensor.ndim < 2 and tensor.numel() <= 10_000 else None


def summary(card: Mapping[str, Any]) -> str:
    """A card in a few words."""
    classes = " of ".join(reversed(list(card.get("classes", {}).values())))
    said = [str(card["kind"]), classes, str(card.get("part", "")), f"weights: {card.get('weights', 'all')}"]
    return re.sub(r"\s+", " ", ", ".join(part for part in said if part))
