"""Checkpoints of training: weights, their average and the moments of the optimiser, in one safetensors file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from invdiff.io.atomic import whole_file

__all__ = ["read", "restore", "write"]

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def write(
    path: Path,
    about: Mapping[str, Any],
    form: str,
    network: nn.Module,
    average: Mapping[str, Tensor],
    optimiser: torch.optim.Optimizer,
) -> None:
    """Write a checkpoint, which appears whole or not at all.

    Args:
        path: File.
        about: What else a resumed run needs, as JSON holds it.
        form: Name of the format.
        network: Whose parameters are trained.
        average: Averaged weights by the names of the parameters.
        optimiser: Adam, with its moments.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    for name, parameter in network.named_parameters():
        tensors[f"network.{name}"] = parameter.detach()
        tensors[f"average.{name}"] = average[name]
        for key, value in optimiser.state.get(parameter, {}).items():
            tensors[f"optimiser.{key}.{name}"] = value
    metadata = {"format": form, "state": json.dumps(dict(about))}
    with whole_file(path) as temporary:
        save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, temporary, metadata=metadata)


def read(path: Path, form: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what `write` was given besides tensors, and the tensors by name.

    Raises:
        ValueError: The file is unreadable, or of another format.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata, names = file.metadata() or {}, file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable checkpoint ({error}); delete it to start anew.") from None
    if metadata.get("format") != form:
        raise ValueError(f"{path} is not a training checkpoint; delete it or choose another output folder.")
    return json.loads(metadata["state"]), tensors


def restore(
    tensors: Mapping[str, Tensor],
    network: nn.Module,
    average: Mapping[str, Tensor],
    optimiser: torch.optim.Optimizer,
) -> None:
    """Copy weights, averages and moments into the objects of a run."""
    for name, parameter in network.named_parameters():
        parameter.data.copy_(tensors[f"network.{name}"])
        average[name].copy_(tensors[f"average.{name}"])
        names = {key: f"optimiser.{key}.{name}" for key in _MOMENTS if f"optimiser.{key}.{name}" in tensors}
        if names:
            optimiser.state[parameter] = {
                key: tensors[full] if key == "step" else tensors[full].to(parameter.device)
                for key, full in names.items()
            }
