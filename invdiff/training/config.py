"""All settings of a training run, from code, a file, or flags."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["TrainConfig"]


def _f(default: Any, help: str) -> Any:
    """Field with a help string, from which the command line builds its flags."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class TrainConfig:
    """All settings of a training run; every field is a flag and a key of the config file.

    Raises:
        ValueError: a value is out of range.
    """

    data: str = _f(
        "brain", "training images: a file or folder, or 'brain', 'ct', 'black-hole', 'digits', 'vorticity'"
    )
    output: str = _f("prior", "folder for checkpoint, weights, card and plots")
    name: str = _f("my-prior", "name of the prior; also the file name of the weights")
    description: str = _f("", "one sentence for the card")
    licence: str = _f("unspecified", "licence of the weights, for the card")
    note: str = _f("", "remark on the training, for the card")
    cache: str = _f("", "folder that keeps synthetic images between runs; empty for none")
    images: int = _f(3000, "number of synthetic images")
    validation_images: int = _f(8, "held-out images for the denoising curve")
    normalise: str = _f("p99", "scale of file images: 'p99' (99th percentile of magnitude is 1) or 'none'")
    slice_axis: int = _f(2, "axis along which NIfTI volumes are cut into slices: 0, 1 or 2")
    channels: int = _f(2, "1 for real images, 2 for complex ones")
    loss: str = _f("edm", "'edm' (denoising at every noise level alike) or 'flow' (flow matching: velocities)")
    backbone: str = _f("unet", "architecture: 'unet' (no attention, any size), 'adm', 'ddpmpp' or 'transformer'")
    widths: tuple[int, ...] = _f(
        (64, 96, 128),
        "features at 1/2, 1/4, 1/8 of the resolution (unet), at 1, 1/2, 1/4 (adm, ddpmpp), or one (transformer)",
    )
    blocks: int = _f(2, "residual blocks per resolution, or layers of the transformer")
    attention: tuple[int, ...] = _f(
        (), "sizes of feature maps with attention, counted in crops (adm, ddpmpp); the smallest map always has it"
    )
    head_channels: int = _f(32, "features of one head of attention (adm, transformer)")
    patch: int = _f(4, "pixels along the side of one token (transformer)")
    embedding: int = _f(128, "width of the noise-level embedding")
    condition: str = _f("", "'label' for a prior that takes the class of an image; empty for none")
    condition_dropout: float = _f(0.1, "share of images shown without their class, for a prior without one")
    sigma_data: float = _f(0.25, "standard deviation of the images per channel")
    sigma_min: float = _f(0.002, "smallest noise level of the prior")
    sigma_max: float = _f(80.0, "largest noise level of the prior")
    p_mean: float = _f(-1.6, "mean of log sigma in training; of logit t for 'flow', which is the same")
    p_std: float = _f(1.3, "standard deviation of log sigma in training; of logit t for 'flow'")
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
    compile: bool = _f(False, "torch.compile the network: minutes at the start, then faster steps on CUDA")
    channels_last: bool = _f(False, "keep channels together in memory; faster convolutions on CUDA")
    threads: int = _f(0, "CPU threads; 0 leaves the default")
    checkpoint_every: int = _f(250, "steps between checkpoints")
    validate_every: int = _f(1000, "steps between denoising curves and exported weights")
    export_dtype: str = _f("float32", "storage of the exported weights: 'float32' or 'float16'")

    def __post_init__(self) -> None:
        for name in ("widths", "attention"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        positive: tuple[str, ...] = ("images", "validation_images", "channels", "blocks", "steps", "batch", "crop")
        positive += ("head_channels", "patch")
        positive += ("late_batch", "late_crop", "learning_rate", "final_learning_rate", "clip", "sigma_data")
        positive += ("p_std", "checkpoint_every", "validate_every", "sigma_min")
        for key in positive:
            value = getattr(self, key)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{key} must be positive; got {value}.")
        for key in (
            "uniform_fraction",
            "late_fraction",
            "decay_fraction",
            "ema",
            "scale_jitter",
            "condition_dropout",
        ):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"{key} must lie between 0 and 1; got {getattr(self, key)}.")
        if self.ema == 1 or self.scale_jitter == 1:
            raise ValueError("ema and scale_jitter must be less than 1.")
        if self.sigma_max <= self.sigma_min:
            raise ValueError(f"sigma_max ({self.sigma_max}) must exceed sigma_min ({self.sigma_min}).")
        self._check_network()
        if self.slice_axis not in (0, 1, 2):
            raise ValueError(f"slice_axis must be 0, 1 or 2; got {self.slice_axis}.")
        if self.condition not in ("", "label"):
            raise ValueError(f"condition must be 'label' or empty; got {self.condition!r}.")
        if self.export_dtype not in ("float32", "float16"):
            raise ValueError(f"export_dtype must be 'float32' or 'float16'; got {self.export_dtype!r}.")
        if self.precision not in ("auto", "float32", "bfloat16"):
            raise ValueError(f"precision must be 'auto', 'float32' or 'bfloat16'; got {self.precision!r}.")
        if not self.name or Path(self.name).name != self.name:
            raise ValueError(f"name must be a plain file name; got {self.name!r}.")

    def _check_network(self) -> None:
        """Refuse what the architecture cannot be; its sizes are checked again where it is built."""
        if self.loss not in ("edm", "flow"):
            raise ValueError(f"loss must be 'edm' or 'flow'; got {self.loss!r}.")
        if self.backbone not in ("unet", "adm", "ddpmpp", "transformer"):
            raise ValueError(f"backbone must be 'unet', 'adm', 'ddpmpp' or 'transformer'; got {self.backbone!r}.")
        if not self.widths or min(self.widths) < 1:
            raise ValueError(f"widths must be one or more positive numbers; got {list(self.widths)}.")
        if self.backbone == "transformer" and len(self.widths) != 1:
            raise ValueError(f"widths must be one number for the transformer; got {list(self.widths)}.")
        if self.attention and self.backbone not in ("adm", "ddpmpp"):
            raise ValueError(f"attention is chosen for adm and ddpmpp; leave it empty for {self.backbone}.")
        levels = len(self.widths)
        multiple = {"unet": 2**levels, "transformer": self.patch}.get(self.backbone, 2 ** (levels - 1))
        for key in ("crop", "late_crop"):
            if getattr(self, key) % multiple:
                raise ValueError(f"{key} must be a multiple of {multiple}; got {getattr(self, key)}.")

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
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        if sys.version_info >= (3, 11):
            import tomllib
        else:
            import tomli as tomllib
    except ImportError:
        raise ValueError("TOML needs Python 3.11 or the tomli package; use a .json file") from None
    return tomllib.loads(path.read_text(encoding="utf-8"))
