"""The card of a learned prior: what it is, what made it, how well it denoises.

Weights are a safetensors file; the card is a JSON file of the same name beside it and carries the
SHA-256 of the weights, so that the two cannot be mixed up.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from invdiff.networks import TrainedNetwork
from invdiff.priors.learned import Network, format_of, reference_errors, sha256_file
from invdiff.training.synthesisers import SYNTHESISERS

__all__ = ["make", "write"]


def make(
    training: dict[str, Any],
    network: Network,
    curve: dict[str, Any],
    step: int,
    seconds: float,
    images: int,
    classes: Sequence[str] = (),
) -> dict[str, Any]:
    """Assemble the card.

    Args:
        training: the training configuration as a plain dict.
        network: the exported network.
        curve: denoising error on held-out images.
        step: optimiser steps taken.
        seconds: wall time of training.
        images: number of training images.
        classes: names of the classes of a prior that has some.

    Returns:
        Plain dict, without the SHA-256 that :func:`write` adds.
    """
    recipe = {k: v for k, v in training.items() if k not in ("output", "cache", "threads", "device")}
    data: dict[str, Any] = {"source": "files", "images": images}
    limits = ["Use only on images like the training images; the posterior inherits what the prior lacks."]
    synthetic = training["data"] in SYNTHESISERS
    if synthetic:
        made = SYNTHESISERS[training["data"]]
        data = {"source": "synthetic", "images": images, **made.describe()}
        limits = list(made.limits)
    else:
        recipe["data"] = Path(str(training["data"])).name
    if isinstance(network, TrainedNetwork) and network.config()["backbone"] != "unet":
        limits = [*limits, f"Attention was learned on crops of {network.size} pixels; it is at its best there."]
    normalisation = (
        {"statistic": "p99_magnitude", "value": 1.0}
        if synthetic or training["normalise"] == "p99"
        else {"statistic": "none", "value": 1.0}
    )
    known = {"classes": list(classes), "no_class": len(classes)} if classes else {}
    return {
        "name": training["name"],
        "description": training["description"],
        "format": format_of(network),
        "config": network.config(),
        "sigma_min": training["sigma_min"],
        "sigma_max": training["sigma_max"],
        "sigma_data": training["sigma_data"],
        "channels": ["real", "imag"] if network.channels == 2 else [f"c{n}" for n in range(network.channels)],
        **known,
        "normalisation": normalisation,
        "scale_jitter": training["scale_jitter"],
        "training_data": data,
        "recipe": recipe,
        "licence": training["licence"],
        "parameters": sum(p.numel() for p in network.parameters()),
        "training_steps": step,
        "training_seconds": round(seconds),
        "denoising_error": curve,
        "self_test": reference_errors(network),
        "limits": limits,
    }


def write(path: str | Path, tensors: dict[str, Tensor], card: dict[str, Any]) -> tuple[Path, Path]:
    """Write weights and card, each by renaming a complete temporary file.

    Args:
        path: of the weights, ending in .safetensors; the card goes to the same name with .json.
        tensors: the state dict to store.
        card: from :func:`make`.

    Returns:
        Paths of the weights and of the card.
    """
    from safetensors.torch import save_file

    path = Path(path)
    beside = path.with_suffix(".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as folder:
        weights = Path(folder) / "weights"
        # One entry only: safetensors writes several in random order, and the hash would vary.
        about = {"format": card["format"], "config": card["config"], "name": card["name"]}
        metadata = {"invdiff": json.dumps(about, sort_keys=True)}
        save_file(tensors, weights, metadata=metadata)
        card = {**card, "sha256": sha256_file(weights), "bytes": weights.stat().st_size}
        text = Path(folder) / "card"
        text.write_text(json.dumps(card, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        for item in (weights, text):
            item.chmod(0o644)
        os.replace(weights, path)  # noqa: PTH105
        os.replace(text, beside)  # noqa: PTH105
    return path, beside
