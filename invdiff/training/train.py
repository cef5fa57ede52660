"""Training of a diffusion prior by denoising.

    loss = E_{x, sigma, eps}  lambda(sigma) || D(x + sigma eps, sigma) - x ||^2,
    lambda(sigma) = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2

with log(sigma) normal (mean ``p_mean``, standard deviation ``p_std``) for most images and uniform
over [sigma_min, sigma_max] for the rest (Karras et al., NeurIPS 2022, section 5; lambda gives every
noise level a unit-variance regression target).

Everything random at step n depends on (seed, n) only, so a resumed run needs no random state: it
repeats the very batches of an uninterrupted one and, on the same machine and number of threads,
ends with identical bits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from invdiff.networks import EDMUNet
from invdiff.training import card as cards
from invdiff.training.data import read_images, synthetic_images

__all__ = ["TrainConfig", "TrainResult", "denoising_curve", "train"]

SIGMA_GRID = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 20.0)


def _f(default: Any, help: str) -> Any:
    """Field with a help string, from which the command line builds its flags."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class TrainConfig:
    """All settings of a training run; every field is a flag and a key of the config file.

    Raises:
        ValueError: a value is out of range.
    """

    data: str = _f("brain", "training images: a file or folder, or the synthesiser 'brain'")
    output: str = _f("prior", "folder for checkpoint, weights, card and plots")
    name: str = _f("my-prior", "name of the prior; also the file name of the weights")
    description: str = _f("", "one sentence for the card")
    licence: str = _f("unspecified", "licence of the weights, for the card")
    note: str = _f("", "remark on the training, for the card")
    cache: str = _f("", "folder that keeps synthetic images between runs; empty for none")
    images: int = _f(3000, "number of synthetic images")
    validation_images: int = _f(8, "held-out images for the denoising curve")
    normalise: str = _f("p99", "scale of file images: 'p99' (99th percentile of magnitude is 1) or 'none'")
    channels: int = _f(2, "1 for real images, 2 for complex ones")
    widths: tuple[int, ...] = _f((64, 96, 128), "feature channels at 1/2, 1/4, 1/8 of the resolution")
    blocks: int = _f(2, "residual blocks per resolution")
    embedding: int = _f(128, "width of the noise-level embedding")
    sigma_data: float = _f(0.25, "standard deviation of the images per channel")
    sigma_min: float = _f(0.002, "smallest noise level of the prior")
    sigma_max: float = _f(80.0, "largest noise level of the prior")
    p_mean: float = _f(-1.6, "mean of log sigma in training")
    p_std: float = _f(1.3, "standard deviation of log sigma in training")
    uniform_fraction: float = _f(0.1, "share of images with log sigma uniform over the whole range")
    steps: int = _f(8000, "optimiser steps")
    batch: int = _f(16, "crops per step")
    crop: int = _f(64, "height and width of training crops")
    late_fraction: float = _f(0.2, "last part of training, which uses larger crops")
    late_batch: int = _f(4, "crops per step in the last part")
    late_crop: int = _f(128, "height and width of crops in the last part")
    learning_rate: float = _f(1e-3, "peak learning rate of Adam")
    final_learning_rate: float = _f(2e-5, "learning rate at the last step")
    warmup: int = _f(200, "steps of linear warm-up")
    decay_fraction: float = _f(0.7, "last part of training, with cosine decay of the learning rate")
    clip: float = _f(1.0, "largest gradient norm")
    ema: float = _f(0.998, "decay per step of the averaged weights")
    scale_jitter: float = _f(0.3, "random scaling of images, plus or minus this fraction")
    augment: bool = _f(True, "random flips, transposition, and for complex images phase and conjugation")
    seed: int = _f(0, "seed of everything random")
    device: str = _f("auto", "'auto', 'cpu' or 'cuda'")
    precision: str = _f("auto", "'auto' (bfloat16 on CUDA, float32 elsewhere), 'float32' or 'bfloat16'")
    threads: int = _f(0, "CPU threads; 0 leaves the default")
    checkpoint_every: int = _f(250, "steps between checkpoints")
    validate_every: int = _f(1000, "steps between denoising curves and exported weights")
    export_dtype: str = _f("float32", "storage of the exported weights: 'float32' or 'float16'")

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(self.widths))
        positive: tuple[str, ...] = ("images", "validation_images", "channels", "blocks", "steps", "batch", "crop")
        positive += ("late_batch", "late_crop", "learning_rate", "final_learning_rate", "clip", "sigma_data")
        positive += ("p_std", "checkpoint_every", "validate_every", "sigma_min")
        for key in positive:
            value = getattr(self, key)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{key} must be positive; got {value}.")
        for key in ("uniform_fraction", "late_fraction", "decay_fraction", "ema", "scale_jitter"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"{key} must lie between 0 and 1; got {getattr(self, key)}.")
        if self.ema == 1 or self.scale_jitter == 1:
            raise ValueError("ema and scale_jitter must be less than 1.")
        if self.sigma_max <= self.sigma_min:
            raise ValueError(f"sigma_max ({self.sigma_max}) must exceed sigma_min ({self.sigma_min}).")
        multiple = 2 ** len(self.widths)
        for key in ("crop", "late_crop"):
            if getattr(self, key) % multiple:
                raise ValueError(f"{key} must be a multiple of {multiple}; got {getattr(self, key)}.")
        if self.export_dtype not in ("float32", "float16"):
            raise ValueError(f"export_dtype must be 'float32' or 'float16'; got {self.export_dtype!r}.")
        if self.precision not in ("auto", "float32", "bfloat16"):
            raise ValueError(f"precision must be 'auto', 'float32' or 'bfloat16'; got {self.precision!r}.")
        if not self.name or Path(self.name).name != self.name:
            raise ValueError(f"name must be a plain file name; got {self.name!r}.")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """Build from a plain dict, as read from TOML or JSON.

        Raises:
            ValueError: a key is unknown or a value has the wrong type or range.
        """
        fields = {f.name: f for f in dataclasses.fields(cls)}
        for key, value in values.items():
            if key not in fields:
                raise ValueError(f"Training config has the unknown key {key!r}; known are {sorted(fields)}.")
            default = fields[key].default
            if isinstance(default, bool) or isinstance(value, bool):
                fits = isinstance(default, bool) and isinstance(value, bool)
            elif isinstance(default, float):
                fits = isinstance(value, int | float)
            elif isinstance(default, tuple):
                fits = isinstance(value, list | tuple) and all(isinstance(v, int) for v in value)
            else:
                fits = isinstance(value, type(default))
            if not fits:
                raise ValueError(f"Training config: {key} must be like {default!r}; got {value!r}.")
        return cls(**values)

    @classmethod
    def from_file(cls, path: str | Path) -> TrainConfig:
        """Read a .toml or .json file of keys named as the fields.

        Raises:
            ValueError: the file is missing or malformed, or holds a bad key or value.
        """
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"There is no config file at {path}.")
        try:
            is_json = path.suffix == ".json"
            values = json.loads(path.read_text(encoding="utf-8")) if is_json else _read_toml(path)
        except ValueError as error:
            raise ValueError(f"{path} is not a readable config: {error}.") from None
        if not isinstance(values, dict):
            raise ValueError(f"{path} must hold one table of settings; got {type(values).__name__}.")
        return cls.from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        """Plain dict that :meth:`from_dict` takes back."""
        return {**dataclasses.asdict(self), "widths": list(self.widths)}


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        import tomllib
    except ImportError:  # Python 3.10
        try:
            import tomli as tomllib  # type: ignore[no-redef, import-not-found, unused-ignore]
        except ImportError:
            raise ValueError("TOML needs Python 3.11 or the tomli package; use a .json file") from None
    return tomllib.loads(path.read_text(encoding="utf-8"))


@dataclass(frozen=True)
class TrainResult:
    """What a run left behind: ``interrupted`` runs have a checkpoint and continue on the next call."""

    weights: Path | None
    card: Path | None
    step: int
    interrupted: bool
    curve: dict[str, Any] | None


class _Source:
    """Batches of crops; the batch of step n depends on (seed, n) only."""

    def __init__(self, images: list[NDArray[Any]], config: TrainConfig) -> None:
        self.images = images
        self.config = config

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Clean crops ``(B, C, n, n)``, sigma ``(B,)`` and unit noise, all float32 on the CPU."""
        c = self.config
        rng = np.random.default_rng([c.seed, 1, step])
        late = step >= c.steps * (1 - c.late_fraction)
        count, size = (c.late_batch, c.late_crop) if late else (c.batch, c.crop)
        crops = np.zeros((count, c.channels, size, size), np.float32)
        for n in range(count):
            crops[n] = self._crop(rng, size)
        normal = c.p_mean + c.p_std * rng.standard_normal(count)
        low, high = math.log(c.sigma_min), math.log(c.sigma_max)
        uniform = rng.uniform(low, high, count)
        log_sigma = np.where(rng.random(count) < c.uniform_fraction, uniform, normal).clip(low, high)
        noise = rng.standard_normal(crops.shape, dtype=np.float32)
        sigma = np.exp(log_sigma).astype(np.float32)
        return torch.from_numpy(crops), torch.from_numpy(sigma), torch.from_numpy(noise)

    def _crop(self, rng: np.random.Generator, size: int) -> NDArray[np.float32]:
        c = self.config
        image = self.images[int(rng.integers(len(self.images)))]
        ny, nx = image.shape[1:]
        y, x = int(rng.integers(max(ny - size, 0) + 1)), int(rng.integers(max(nx - size, 0) + 1))
        part = image[:, y : y + size, x : x + size].astype(np.float32)
        part *= np.float32(1 + c.scale_jitter * rng.uniform(-1, 1))
        if c.augment:
            if rng.random() < 0.5:
                part = part[:, :, ::-1]
            if rng.random() < 0.5:
                part = part[:, ::-1]
            if rng.random() < 0.5:
                part = part.transpose(0, 2, 1)
            if c.channels == 2:
                angle = rng.uniform(-math.pi, math.pi)
                re, im = part[0], part[1] if rng.random() < 0.5 else -part[1]
                part = np.stack(
                    [re * math.cos(angle) - im * math.sin(angle), re * math.sin(angle) + im * math.cos(angle)]
                )
        out = np.zeros((c.channels, size, size), np.float32)
        top, left = (size - part.shape[1]) // 2, (size - part.shape[2]) // 2
        out[:, top : top + part.shape[1], left : left + part.shape[2]] = part
        return out


def _learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, plateau, cosine decay over the last ``decay_fraction`` of the steps."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    start = config.steps * (1 - config.decay_fraction)
    if step <= start:
        return config.learning_rate
    done = min(1.0, (step - start) / max(1.0, config.steps - start))
    cosine = 0.5 + 0.5 * math.cos(math.pi * done)
    return config.final_learning_rate + (config.learning_rate - config.final_learning_rate) * cosine


def _pad(image: NDArray[Any], multiple: int) -> NDArray[np.float32]:
    ny, nx = image.shape[1:]
    return np.pad(image.astype(np.float32), ((0, 0), (0, -ny % multiple), (0, -nx % multiple)))


@torch.no_grad()
def denoising_curve(
    network: EDMUNet,
    images: list[NDArray[Any]],
    sigmas: tuple[float, ...] = SIGMA_GRID,
    seed: int = 0,
) -> dict[str, Any]:
    """Error of the denoiser on whole images against the noise level.

        rmse(sigma) = sqrt( mean || D(x + sigma eps, sigma) - x ||^2 / number of values )

    Args:
        network: the denoiser; evaluated on its own device in its own precision.
        images: real ``(channels, ny, nx)`` arrays; padded with zeros as needed.
        sigmas: noise levels, in the units of the images.
        seed: of the noise.

    Returns:
        Lists ``sigma``, ``rmse`` (per real component) and ``relative`` (rmse / sigma).
    """
    parameter = next(network.parameters())
    total = np.zeros(len(sigmas))
    count = 0
    for index, image in enumerate(images):
        padded = torch.from_numpy(_pad(image, network.multiple))
        rng = np.random.default_rng([seed, 2, index])
        count += image.size
        ny, nx = image.shape[1:]
        for n, sigma in enumerate(sigmas):
            noise = torch.from_numpy(rng.standard_normal(padded.shape, dtype=np.float32))
            noisy = (padded + sigma * noise)[None].to(parameter.device, parameter.dtype)
            level = torch.full((1,), sigma, device=parameter.device, dtype=parameter.dtype)
            error = network(noisy, level)[0].float().cpu() - padded
            total[n] += float(error[:, :ny, :nx].double().square().sum())
    rmse = np.sqrt(total / max(count, 1))
    return {
        "sigma": [float(s) for s in sigmas],
        "rmse": [float(f"{r:.5g}") for r in rmse],
        "relative": [float(f"{r / s:.4g}") for r, s in zip(rmse, sigmas)],
        "images": len(images),
    }


def _plot(curve: dict[str, Any], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.loglog(curve["sigma"], curve["rmse"], "o-", label="denoised")
    axes.loglog(curve["sigma"], curve["sigma"], ":", color="grey", label="noisy input")
    axes.set_xlabel("noise level sigma (units of the images)")
    axes.set_ylabel("RMSE per real component")
    axes.set_ylim(min(curve["rmse"]) / 2, max(curve["rmse"]) * 4)
    axes.legend()
    axes.grid(alpha=0.3)
    with _atomic(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


@contextlib.contextmanager
def _atomic(path: Path) -> Iterator[Path]:
    """Write beside the target and rename, so that no reader ever sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


class _Run:
    """Network, averaged weights and optimiser, which are saved and restored as one file."""

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(config.seed)
            self.network = EDMUNet(
                config.channels, config.widths, config.blocks, config.embedding, config.sigma_data
            ).to(device)
        self.average = {k: v.detach().clone() for k, v in self.network.named_parameters()}
        self.optimiser = torch.optim.Adam(
            self.network.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), foreach=True
        )
        self.step = 0
        self.seconds = 0.0

    def save(self, path: Path, config: TrainConfig) -> None:
        from safetensors.torch import save_file

        tensors: dict[str, Tensor] = {}
        for name, parameter in self.network.named_parameters():
            tensors[f"network.{name}"] = parameter.detach()
            tensors[f"average.{name}"] = self.average[name]
            for key, value in self.optimiser.state.get(parameter, {}).items():
                tensors[f"optimiser.{key}.{name}"] = value
        metadata = {
            "format": "invdiff-training/1",
            "state": json.dumps({"step": self.step, "seconds": self.seconds, "config": config.to_dict()}),
        }
        with _atomic(path) as temporary:
            save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, temporary, metadata=metadata)

    def load(self, path: Path, config: TrainConfig) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is not a readable checkpoint ({error}); delete it to start anew.") from None
        if metadata.get("format") != "invdiff-training/1":
            raise ValueError(f"{path} is not a training checkpoint; delete it or choose another output folder.")
        state = json.loads(metadata["state"])
        for key in ("channels", "widths", "blocks", "embedding", "sigma_data"):
            if state["config"][key] != config.to_dict()[key]:
                raise ValueError(
                    f"{path} was trained with {key} = {state['config'][key]}, not {config.to_dict()[key]}; "
                    "choose another output folder."
                )
        for name, parameter in self.network.named_parameters():
            parameter.data.copy_(tensors[f"network.{name}"])
            self.average[name].copy_(tensors[f"average.{name}"])
            kept = {
                key: tensors[f"optimiser.{key}.{name}"]
                for key in ("step", "exp_avg", "exp_avg_sq")
                if f"optimiser.{key}.{name}" in tensors
            }
            if kept:
                self.optimiser.state[parameter] = {
                    key: value if key == "step" else value.to(parameter.device) for key, value in kept.items()
                }
        self.step, self.seconds = int(state["step"]), float(state["seconds"])

    def averaged(self) -> EDMUNet:
        """Copy of the network with averaged weights, for validation and export."""
        with torch.random.fork_rng(devices=[]):
            out = EDMUNet.from_config(self.network.config()).to(next(self.network.parameters()).device)
        out.load_state_dict(self.average, strict=True)
        return out.eval()

    def update(self, batch: tuple[Tensor, Tensor, Tensor], config: TrainConfig, autocast: Any) -> float:
        """One optimiser step; returns the weighted loss per value."""
        device = next(self.network.parameters()).device
        clean, sigma, noise = (t.to(device, non_blocking=True) for t in batch)
        noisy = clean + sigma[:, None, None, None] * noise
        with autocast():
            denoised = self.network(noisy, sigma)
        weight = (sigma**2 + config.sigma_data**2) / (sigma * config.sigma_data) ** 2
        loss = (weight[:, None, None, None] * (denoised.float() - clean).square()).mean()
        for group in self.optimiser.param_groups:
            group["lr"] = _learning_rate(config, self.step)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), config.clip)
        self.optimiser.step()
        # A short horizon at first, or the average would remember the initial weights.
        decay = min(config.ema, (1 + self.step) / (10 + self.step))
        parameters = [p.detach() for p in self.network.parameters()]
        torch._foreach_lerp_(list(self.average.values()), parameters, 1 - decay)
        self.step += 1
        return float(loss.detach())


@contextlib.contextmanager
def _stop_flag() -> Iterator[threading.Event]:
    """Event that SIGINT or SIGTERM sets; signal handlers exist in the main thread only."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = {s: signal.signal(s, lambda *_: stop.set()) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _images(config: TrainConfig, report: Callable[[dict[str, Any]], None]) -> tuple[list[Any], list[Any]]:
    """Training and held-out images."""
    if config.data == "brain":
        if config.channels != 2:
            raise ValueError(
                f"The brain synthesiser makes complex images: channels must be 2, not {config.channels}."
            )

        def notify(done: int, count: int) -> None:
            if done % 50 == 0 or done == count:
                report({"event": "images", "done": done, "count": count})

        cache = config.cache or None
        held = synthetic_images("brain", config.validation_images, held_out=True, cache=cache)
        return synthetic_images("brain", config.images, cache=cache, notify=notify), held
    images = read_images(config.data, config.channels, config.normalise)
    if len(images) < 2:
        raise ValueError(f"{config.data} holds {len(images)} image; at least 2 are needed, one to validate on.")
    held_count = min(config.validation_images, max(1, len(images) // 10))
    return images[:-held_count], images[-held_count:]


def _device(config: TrainConfig) -> torch.device:
    wanted = config.device
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("device is 'cuda' but no CUDA device is available; use 'auto' or 'cpu'.")
    try:
        return torch.device(wanted)
    except RuntimeError:
        raise ValueError(f"device must be 'auto', 'cpu' or 'cuda'; got {config.device!r}.") from None


def train(
    config: TrainConfig,
    progress: Callable[[dict[str, Any]], None] | None = None,
    *,
    resume: bool = True,
    stop_at: int | None = None,
) -> TrainResult:
    """Train a prior; formula in the module docstring.

    Leaves in ``config.output``: ``checkpoint.safetensors`` (everything a resumed run needs),
    ``<name>.safetensors`` (averaged weights), ``<name>.json`` (card), ``<name>_denoising.json`` and
    ``.png`` (denoising curve on held-out images). Files appear by renaming, never half-written. On
    SIGINT or SIGTERM the current step ends, a checkpoint is written and the call returns.

    Args:
        config: all settings.
        progress: called with a dict whose ``event`` is ``"images"`` (done, count), ``"step"`` (step,
            steps, loss, learning_rate, seconds), ``"validated"`` (step, curve) or ``"exported"``
            (weights).
        resume: continue from the checkpoint in the output folder where there is one.
        stop_at: return after this step, as if interrupted.

    Returns:
        Where the weights and card are, the step reached, and whether the run was interrupted.

    Raises:
        ValueError: the settings or the data cannot be used.
        FloatingPointError: the loss is not finite.

    Reference:
        Karras, Aittala, Aila, Laine, NeurIPS 2022 (arXiv:2206.00364).
    """
    report = progress or (lambda _: None)
    device = _device(config)
    output = Path(config.output)
    checkpoint = output / "checkpoint.safetensors"
    threads = torch.get_num_threads()
    if config.threads > 0:
        torch.set_num_threads(config.threads)
    try:
        run = _Run(config, device)
        if resume and checkpoint.exists():
            run.load(checkpoint, config)
        training, held_out = _images(config, report)
        source = _Source(training, config)
        low = config.precision == "bfloat16" or (config.precision == "auto" and device.type == "cuda")

        def autocast() -> Any:
            return torch.autocast(device.type, torch.bfloat16, enabled=low)

        with _stop_flag() as stop:
            return _loop(config, run, source, held_out, autocast, stop, report, stop_at, checkpoint)
    finally:
        torch.set_num_threads(threads)


def _loop(
    config: TrainConfig,
    run: _Run,
    source: _Source,
    held_out: list[NDArray[Any]],
    autocast: Callable[[], Any],
    stop: threading.Event,
    report: Callable[[dict[str, Any]], None],
    stop_at: int | None,
    checkpoint: Path,
) -> TrainResult:
    output = checkpoint.parent
    started = time.monotonic() - run.seconds
    smooth: float | None = None
    curve = None
    while run.step < config.steps:
        if stop.is_set() or (stop_at is not None and run.step >= stop_at):
            run.save(checkpoint, config)
            return TrainResult(None, None, run.step, True, curve)
        loss = run.update(source.batch(run.step), config, autocast)
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"The loss is {loss} at step {run.step}; lower learning_rate (now {config.learning_rate})."
            )
        smooth = loss if smooth is None else 0.98 * smooth + 0.02 * loss
        run.seconds = time.monotonic() - started
        report(
            {
                "event": "step",
                "step": run.step,
                "steps": config.steps,
                "loss": loss,
                "smooth_loss": smooth,
                "learning_rate": _learning_rate(config, run.step - 1),
                "seconds": run.seconds,
            }
        )
        if run.step % config.checkpoint_every == 0:
            run.save(checkpoint, config)
        if run.step % config.validate_every == 0 and run.step < config.steps:
            curve = _export(config, run, held_out, len(source.images), output, report)[2]
    run.save(checkpoint, config)
    weights, card, curve = _export(config, run, held_out, len(source.images), output, report)
    return TrainResult(weights, card, run.step, False, curve)


def _export(
    config: TrainConfig,
    run: _Run,
    held_out: list[NDArray[Any]],
    images: int,
    output: Path,
    report: Callable[[dict[str, Any]], None],
) -> tuple[Path, Path, dict[str, Any]]:
    """Validate the averaged weights as they will be stored, and write weights, card and curve."""
    network = run.averaged()
    dtype = getattr(torch, config.export_dtype)
    stored = {k: v.to(dtype).cpu().contiguous() for k, v in network.state_dict().items()}
    network.load_state_dict(stored, strict=True)
    curve = denoising_curve(network, held_out)
    report({"event": "validated", "step": run.step, "curve": curve})
    weights, card = cards.write(
        output / f"{config.name}.safetensors",
        stored,
        cards.make(config.to_dict(), network, curve, run.step, run.seconds, images),
    )
    with _atomic(output / f"{config.name}_denoising.json") as temporary:
        temporary.write_text(json.dumps({"step": run.step, **curve}, indent=1) + "\n", encoding="utf-8")
    _plot(curve, output / f"{config.name}_denoising.png")
    report({"event": "exported", "weights": str(weights)})
    return weights, card, curve
