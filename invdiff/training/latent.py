"""Training of a latent prior: an autoencoder, then a denoiser of its latents.

    python -m invdiff.training.latent latent_ct.toml [--output FOLDER] [--cache FOLDER]

1. The autoencoder learns to reconstruct images (`invdiff.training.latent_codec`).
2. Random crops of the images are encoded once; shift and scale bring every channel to mean 0 and spread 1.
3. The denoiser learns from these as `invdiff train` learns from a file of images.
4. Both go into one file of weights, with a card beside it, that `invdiff.priors.load` reads.

Each stage leaves its own checkpoint in the output folder; the same command continues an interrupted run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from invdiff.io.atomic import whole_file
from invdiff.networks import EDMUNet
from invdiff.networks.compact_autoencoder import CompactAutoencoder
from invdiff.networks.latent_pair import LatentPair
from invdiff.priors import latent as loading
from invdiff.training import card as cards
from invdiff.training.batches import Batches
from invdiff.training.config import TrainConfig
from invdiff.training.data import read_images, synthetic_images
from invdiff.training.latent_codec import AutoencoderConfig, CodecState, reconstruction, to_network, update
from invdiff.training.synthesisers import SYNTHESISERS
from invdiff.training.train import Report, train

__all__ = ["LatentConfig", "train_latent"]

Images = list[NDArray[Any]]

#: What the first stage takes of the settings of `invdiff train`, and what the third stage is told elsewhere.
_CODEC_KEYS = frozenset(
    (
        "steps",
        "batch",
        "crop",
        "late_fraction",
        "late_batch",
        "late_crop",
        "learning_rate",
        "final_learning_rate",
        "warmup",
        "decay_fraction",
        "clip",
        "ema",
        "scale_jitter",
        "augment",
        "seed",
        "precision",
    )
)
_COMMON = frozenset(
    (
        "name",
        "description",
        "licence",
        "note",
        "data",
        "images",
        "validation_images",
        "normalise",
        "channels",
        "augment",
        "scale_jitter",
    )
)


@dataclass(frozen=True)
class LatentConfig:
    """All settings of a latent prior.

    Args:
        name: Of the prior, and of its file.
        description, licence, note: For the card.
        data: Images, as for `invdiff train`: a file, a folder, or the name of a synthesiser.
        output: Folder for checkpoints, latents, weights and card.
        cache: Folder that keeps synthetic images; empty for none.
        images: Number of synthetic images.
        held_out: Images for the figures on the card.
        normalise: Scale of images from files.
        channels: Of the images; they are real.
        binning: Pixels averaged along each side before anything else.
        latents: Number of encoded crops to train the denoiser on.
        crop: Their height and width, in pixels after binning.
        autoencoder: Network and loss of the first stage.
        codec: Training of the first stage, with the keys of `invdiff train`.
        denoiser: Training of the third stage, likewise.

    Raises:
        ValueError: A value is out of range.
    """

    name: str = "my-latent-prior"
    description: str = ""
    licence: str = "unspecified"
    note: str = ""
    data: str = "ct"
    output: str = "latent-prior"
    cache: str = ""
    images: int = 3000
    held_out: int = 16
    normalise: str = "p99"
    channels: int = 1
    binning: int = 1
    latents: int = 8192
    crop: int = 128
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    codec: TrainConfig = field(default_factory=TrainConfig)
    denoiser: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        if min(self.images, self.held_out, self.channels, self.binning, self.latents) < 1:
            raise ValueError("images, held_out, channels, binning and latents must be at least 1.")
        factor = 2 ** len(self.autoencoder.widths)
        multiple = factor * 2 ** len(self.denoiser.widths)
        if self.crop % multiple or self.crop < multiple:
            raise ValueError(f"crop must be a multiple of {multiple}; got {self.crop}.")
        if self.codec.crop % factor or self.codec.late_crop % factor:
            raise ValueError(f"Crops of the autoencoder must be multiples of {factor}.")

    @classmethod
    def from_file(cls, path: str | Path, **changes: str) -> LatentConfig:
        """Read a .toml file with the tables ``autoencoder``, ``codec`` and ``denoiser``.

        Args:
            path: The file.
            changes: Keys of the first level that win over it.

        Raises:
            ValueError: The file is missing or malformed, or holds a bad key or value.
        """
        import tomllib

        path = Path(path)
        if not path.is_file():
            raise ValueError(f"There is no config file at {path}.")
        try:
            values = {**tomllib.loads(path.read_text(encoding="utf-8")), **changes}
        except ValueError as error:
            raise ValueError(f"{path} is not a readable config: {error}.") from None
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"Latent config has unknown keys {unknown}; known are {sorted(known)}.")
        tables = {k: values.pop(k, {}) for k in ("autoencoder", "codec", "denoiser")}
        common: dict[str, Any] = {k: values[k] for k in ("name", "data") if k in values}
        try:
            return cls(
                **values,
                autoencoder=AutoencoderConfig(**tables["autoencoder"]),
                codec=TrainConfig.from_dict({**common, "channels": values.get("channels", 1), **tables["codec"]}),
                denoiser=TrainConfig.from_dict(
                    {**common, "channels": tables["autoencoder"].get("latent", 3), **tables["denoiser"]}
                ),
            )
        except TypeError as error:
            raise ValueError(f"Latent config has a key or value of the wrong kind: {error}.") from None

    def recipe(self) -> dict[str, Any]:
        """Settings for the card, without places on this machine."""
        out = dataclasses.asdict(self)
        out["codec"] = {k: v for k, v in out["codec"].items() if k in _CODEC_KEYS}
        left_out = ("output", "cache", "threads", "device")
        for part in (out, out["denoiser"]):
            for key in left_out if part is out else (*left_out, *_COMMON):
                part.pop(key, None)
        if self.data not in SYNTHESISERS:
            out["data"] = Path(self.data).name
        return json.loads(json.dumps(out))


def train_latent(config: LatentConfig, progress: Report | None = None) -> Path | None:
    """Train a latent prior, or go on with it; see the module.

    Args:
        config: All settings.
        progress: Called with dicts as in `invdiff.training.train`; ``stage`` says which stage.

    Returns:
        The weights, or None where the run was interrupted.

    Raises:
        ValueError: The settings or the data cannot be used.
        FloatingPointError: The loss is not finite.
    """
    report = progress or (lambda _: None)
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    training, held = _images(config, report)
    state = train_codec(config, training, held, report)
    codec = state.averaged()
    file = output / "latents.npz"
    if not file.exists():
        _write_latents(config, codec, training, held, file)
    with np.load(file, allow_pickle=False) as kept:
        shift, scale = kept["shift"], kept["scale"]
    denoiser = dataclasses.replace(
        config.denoiser,
        name=config.name,
        data=str(output / "latents.npy"),
        output=str(output / "denoiser"),
        normalise="none",
        channels=config.autoencoder.latent,
        validation_images=config.held_out,
        augment=False,
        scale_jitter=0.0,
    )
    result = train(denoiser, lambda event: report({"stage": "denoiser", **event}))
    if result.interrupted or result.weights is None:
        return None
    return _merge(config, state, shift, scale, held, result.weights, len(training))


def train_codec(config: LatentConfig, training: Images, held: Images, report: Report) -> CodecState:
    """Train the autoencoder to the last step, from its checkpoint where there is one."""
    recipe = config.codec
    if recipe.threads > 0:
        torch.set_num_threads(recipe.threads)
    device = torch.device("cuda" if recipe.device != "cpu" and torch.cuda.is_available() else "cpu")
    state = CodecState(recipe, config.autoencoder, device)
    checkpoint = Path(config.output) / "codec_checkpoint.safetensors"
    if checkpoint.exists():
        state.load(checkpoint)
    batches, started = Batches(training, recipe), time.monotonic() - state.seconds
    while state.step < recipe.steps:
        loss = update(state, batches.batch(state.step)[0])
        state.seconds = time.monotonic() - started
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"The loss is {loss} at step {state.step}; lower learning_rate (now {recipe.learning_rate})."
            )
        report({"stage": "codec", "event": "step", "step": state.step, "loss": loss, "seconds": state.seconds})
        last = state.step == recipe.steps
        if state.step % recipe.checkpoint_every == 0 or last:
            state.save(checkpoint)
        if state.step % recipe.validate_every == 0 or last:
            figures = reconstruction(state.averaged(), held, state.network.factor)
            report({"stage": "codec", "event": "validated", "step": state.step, **figures})
    return state


def binned(image: NDArray[Any], side: int) -> NDArray[Any]:
    """Average an image ``(C, ny, nx)`` over squares of ``side`` pixels; the rest is cut."""
    ny, nx = (n // side for n in image.shape[1:])
    whole = image[:, : ny * side, : nx * side].astype(np.float32)
    means = whole.reshape(len(image), ny, side, nx, side).mean((2, 4))
    return means.astype(image.dtype) if side > 1 else image


def _images(config: LatentConfig, report: Report) -> tuple[Images, Images]:
    """Training and held-out images."""
    if config.data in SYNTHESISERS:
        if SYNTHESISERS[config.data].channels != config.channels:
            raise ValueError(
                f"The synthesiser {config.data!r} makes images of {SYNTHESISERS[config.data].channels} real "
                f"channel(s), not {config.channels}."
            )
        cache = config.cache or None
        training = synthetic_images(config.data, config.images, cache=cache)
        held = synthetic_images(config.data, config.held_out, held_out=True, cache=cache)
    else:
        images = read_images(config.data, config.channels, config.normalise)
        if len(images) < 2:
            raise ValueError(
                f"{config.data} holds {len(images)} image; at least 2 are needed, one to validate on."
            )
        count = min(config.held_out, max(1, len(images) // 10))
        training, held = images[:-count], images[-count:]
    report({"stage": "images", "event": "images", "done": len(training), "count": len(training)})
    return [binned(x, config.binning) for x in training], [binned(x, config.binning) for x in held]


@torch.no_grad()
def _encoded(codec: CompactAutoencoder, images: Images, config: LatentConfig, count: int) -> Tensor:
    """Encode ``count`` random crops, ``(count, C, n, n)``, neither shifted nor scaled."""
    size = min(32, count)
    recipe = dataclasses.replace(config.codec, crop=config.crop, batch=size, late_fraction=0.0)
    batches, out = Batches(images, recipe), []
    parameter = next(codec.parameters())
    for step in range(-(-count // size)):
        out.append(codec.encode(to_network(batches.batch(step)[0].to(parameter))).cpu())
    return torch.cat(out)[:count]


def _write_latents(
    config: LatentConfig, codec: CompactAutoencoder, training: Images, held: Images, file: Path
) -> None:
    """Write latents of unit spread, those of held-out images last, then shift and scale."""
    z = _encoded(codec, training, config, config.latents)
    # What is held out is the last tenth at most.
    unseen = _encoded(codec, held, config, max(1, min(config.held_out, config.latents // 10)))
    shift = z.mean((0, 2, 3))
    scale = 1 / z.std((0, 2, 3))
    both = (torch.cat([z, unseen]) - shift[:, None, None]) * scale[:, None, None]
    with whole_file(file.with_suffix(".npy")) as temporary, temporary.open("wb") as stream:
        np.save(stream, both.numpy().astype(np.float16))
    with whole_file(file) as temporary, temporary.open("wb") as stream:
        np.savez(stream, shift=shift.numpy(), scale=scale.numpy())


def _merge(
    config: LatentConfig,
    state: CodecState,
    shift: NDArray[Any],
    scale: NDArray[Any],
    held: Images,
    weights: Path,
    images: int,
) -> Path:
    """Write both networks and the card as one prior; return its weights."""
    from safetensors.torch import load_file

    about = json.loads(weights.with_suffix(".json").read_text(encoding="utf-8"))
    denoiser = EDMUNet.from_config(about["config"])
    denoiser.load_state_dict({k: v.float() for k, v in load_file(weights).items()})
    dtype = getattr(torch, config.denoiser.export_dtype)
    codec = state.averaged().cpu()
    codec.load_state_dict({k: v.to(dtype).float() for k, v in codec.state_dict().items()})
    pair = LatentPair(codec, denoiser).eval()
    source: dict[str, Any] = {"source": "files", "images": images}
    limits = ["Use only on images like the training images; the posterior inherits what the prior lacks."]
    if config.data in SYNTHESISERS:
        made = SYNTHESISERS[config.data]
        source = {"source": "synthetic", "images": images, "binning": config.binning, **made.describe()}
        limits = [text for text in made.limits if "pixels" not in text]
    figures = reconstruction(codec, held, pair.multiple)
    card = {
        "name": config.name,
        "description": config.description,
        "format": loading.FORMAT,
        "config": pair.config(),
        "sigma_min": about["sigma_min"],
        "sigma_max": about["sigma_max"],
        "sigma_data": about["sigma_data"],
        "channels": [f"c{n}" for n in range(config.channels)],
        "latent_shift": [float(v) for v in shift],
        "latent_scale": [float(v) for v in scale],
        "normalisation": {
            "statistic": "p99_magnitude" if config.data in SYNTHESISERS or config.normalise == "p99" else "none",
            "value": 1.0,
        },
        "scale_jitter": config.codec.scale_jitter,
        "training_data": source,
        "recipe": config.recipe(),
        "licence": config.licence,
        "parameters": sum(p.numel() for p in pair.parameters()),
        "training_steps": [state.step, about["training_steps"]],
        "training_seconds": [round(state.seconds), about["training_seconds"]],
        "reconstruction": figures,
        "denoising_error": about["denoising_error"],
        "limits": [
            *limits,
            f"Draws are images of latents: what the autoencoder loses of an image (an RMSE of {figures['rmse']:g} "
            "in images of unit scale) no posterior has.",
            f"Learned from crops of {config.crop} pixels; an image of another size is served, and its large "
            "structure was not learned.",
        ],
    }
    card["self_test"] = loading.reference_errors(pair, card)
    tensors = {k: v.to(dtype).contiguous() for k, v in pair.state_dict().items()}
    return cards.write(Path(config.output) / f"{config.name}.safetensors", tensors, card)[0]


def main() -> None:
    """Train from a recipe; one line per hundred steps and per validation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a .toml file, or the name of one in the package")
    parser.add_argument("--output", default=None, help="folder for everything that is written")
    parser.add_argument("--cache", default=None, help="folder that keeps synthetic images")
    options = parser.parse_args()
    path = Path(options.recipe)
    path = path if path.exists() else Path(__file__).parent / path.name
    changes = {k: v for k in ("output", "cache") if (v := getattr(options, k)) is not None}
    try:
        done = train_latent(LatentConfig.from_file(path, **changes), _say)
    except ValueError as error:
        sys.exit(f"error: {error}")
    sys.stderr.write(f"{done}\n" if done else "Interrupted; the same command continues.\n")


def _say(event: dict[str, Any]) -> None:
    if event["event"] == "step" and event["step"] % 100:
        return
    facts = {k: round(v, 5) if isinstance(v, float) else v for k, v in event.items() if k != "event"}
    sys.stderr.write(f"{event['event']} {facts}\n")


if __name__ == "__main__":
    main()
