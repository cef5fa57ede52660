"""Folders of the diffusers library with an unconditional ``UNet2DModel`` on pixels, and their scheduler.

The network is diffusers' own class, built from ``config.json`` and filled strictly; the library loads nothing by
itself. The table of noise levels is the scheduler's, ``abar_i = prod_(j <= i) (1 - beta_j)`` in float64. What a
scheduler says of sampling (steps, clipping, spacing) is no part of the denoiser.

von Platen et al., "Diffusers", 2022; zero terminal SNR: Lin et al., WACV 2024, arXiv:2305.08891.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from invdiff.errors import InvdiffError
from invdiff.prior import Prior
from invdiff.priors.assemble import IMAGE_OPTIONS, assemble, fill
from invdiff.priors.frames import VE, VP, Frame, betas
from invdiff.priors.source import Source

__all__ = ["OPTIONS", "TITLE", "build", "recognise", "renamed", "training_betas", "training_frame"]

TITLE = "diffusers folders with a UNet2DModel"
OPTIONS = {
    "schedule": "betas of the training where no scheduler is there: linear, scaled_linear, squaredcos_cap_v2, "
    "sigmoid, or a list of betas",
    "predicts": "what the network gives where no scheduler is there: epsilon, v_prediction or sample",
    **IMAGE_OPTIONS,
}
_PREDICTS = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x0"}
# Samplers of one and the same training: a table of betas.
_DISCRETE = (
    "DDPMScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDIMParallelScheduler",
    "DDIMInverseScheduler",
    "PNDMScheduler",
    "LMSDiscreteScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
)
_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
# Attention weights had other names until 2023.
_RENAMED = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
#: Licences of checkpoints by the name that their configuration carries.
_LICENCES = {"google/ddpm-": "Apache-2.0", "google/ncsnpp-": "Apache-2.0"}


class _Network(nn.Module):
    """``network(z, time, label)`` around diffusers' class, which returns an object and calls labels otherwise."""

    def __init__(self, unet: nn.Module, classes: int | None) -> None:
        super().__init__()
        self.unet, self.classes = unet, classes

    def forward(self, z: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        if label is not None and not bool(((label >= 0) & (label < (self.classes or 0))).all()):
            raise InvdiffError(f"label must hold whole numbers from 0 to {(self.classes or 0) - 1}.")
        out: Tensor = self.unet(z, time, class_labels=label, return_dict=False)[0]
        return out


def recognise(source: Source) -> str | None:
    """Return the architecture and what it predicts, where the folder holds a ``UNet2DModel`` on pixels."""
    if not source.folder:
        return None
    parts = source.json("model_index.json") or {}
    if any(name in parts or (source.path / name).is_dir() for name in ("vae", "vqvae")):
        return None
    place = _place(source)
    if place is None:
        return None
    config = source.json(f"{place}config.json") or {}
    size = config.get("sample_size")
    scheduler = _scheduler(source)
    said = "no scheduler" if scheduler is None else str(scheduler.get("_class_name"))
    return f"diffusers UNet2DModel, {config.get('in_channels', 3)} channels, size {size}, {said}"


def build(source: Source, **declared: Any) -> Prior:
    """Make the prior; see `invdiff.priors.formats`.

    Raises:
        InvdiffError: If the library is missing, the configuration is not one of a denoiser of images, the weights
            are not those of the configuration, or the scheduler is unknown.
    """
    place = _place(source)
    assert place is not None
    config = source.json(f"{place}config.json") or {}
    inputs, outputs = config.get("in_channels", 3), config.get("out_channels", 3)
    if outputs not in (inputs, 2 * inputs):
        raise InvdiffError(
            f"{source.path} has {inputs} input and {outputs} output channels; a prior's network gives as many "
            "as it takes, or twice as many with a learned variance."
        )
    weights = next((place + name for name in _WEIGHTS if (source.path / (place + name)).is_file()), None)
    if weights is None:
        raise InvdiffError(
            f"{source.path} has no weights; expected {place}{_WEIGHTS[0]} or {place}{_WEIGHTS[1]} in one piece."
        )
    schedule, predicts = declared.pop("schedule", None), declared.pop("predicts", None)
    frame, parametrisation = training_frame(source, config, schedule, predicts)
    unet = _unet(config, source.weights(weights), str(source.file(weights)))
    levels = len(config.get("block_out_channels", (0, 0, 0, 0)))
    native = (0.0, 1.0) if config.get("time_embedding_type") == "fourier" else (-1.0, 1.0)
    name = str(config.get("_name_or_path") or source.path.name)
    card = {
        "name": name,
        "format": "diffusers UNet2DModel",
        "sha256": source.sha256(weights),
        "licence": next((v for k, v in _LICENCES.items() if name.startswith(k)), "not stated in the checkpoint"),
        "size": config.get("sample_size"),
        "images": "natural" if inputs == 3 else "unknown",
    }
    return assemble(
        _Network(unet, config.get("num_class_embeds")),
        parametrisation,
        frame,
        inputs,
        card=card,
        multiple=2 ** (levels - 1),
        learned_variance=outputs == 2 * inputs,
        conditions=("label",) if config.get("num_class_embeds") is not None else (),
        native_range=native,
        **declared,
    )


def _place(source: Source) -> str | None:
    """Prefix of the network's files: the folder itself, or ``unet/`` of a pipeline."""
    for place in ("unet/", ""):
        config = source.json(f"{place}config.json")
        if config is not None and config.get("_class_name") == "UNet2DModel":
            return place
    return None


def _scheduler(source: Source) -> dict[str, Any] | None:
    for name in ("scheduler/scheduler_config.json", "scheduler_config.json", "../scheduler/scheduler_config.json"):
        if (found := source.json(name)) is not None:
            return found
    return None


def _unet(config: Mapping[str, Any], state: Any, where: str) -> nn.Module:
    try:
        from diffusers import UNet2DModel
        from diffusers.models.attention_processor import Attention, AttnProcessor
    except ImportError:
        raise InvdiffError(
            "Checkpoints of diffusers need that library; `pip install 'invdiff[hub]'` brings it."
        ) from None
    known = set(inspect.signature(UNet2DModel.__init__).parameters) - {"self"}
    values = {k: v for k, v in config.items() if not k.startswith("_")}
    for key in values:
        if key not in known:
            raise InvdiffError(
                f"The configuration beside {where} has {key!r}, which the installed diffusers does not know; "
                "update diffusers."
            )
    if config.get("class_embed_type") is not None:
        raise InvdiffError(
            f"{where} embeds its classes by {config['class_embed_type']!r}; networks with a table of classes load."
        )
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise InvdiffError(f"{where} does not hold a flat list of weights; fetch the checkpoint again.")

    def make() -> nn.Module:
        unet: nn.Module = UNet2DModel.from_config(values)
        return unet

    unet = fill(make, {renamed(k): v for k, v in state.items()}, where)
    # Fused attention has no second derivatives.
    for part in unet.modules():
        if isinstance(part, Attention):
            part.set_processor(AttnProcessor())
    return unet


def renamed(key: str) -> str:
    """Return the name that the library gives a weight today."""
    for old, new in _RENAMED.items():
        key = key.replace(old, new) if ".attentions." in key else key
    return key


def training_frame(source: Source, config: Mapping[str, Any], schedule: Any, predicts: Any) -> tuple[Frame, str]:
    """Frame and parametrisation of the scheduler's file, or of what is declared."""
    found = _scheduler(source)
    fourier = config.get("time_embedding_type") == "fourier"
    if found is None:
        if schedule is None or predicts is None or fourier:
            raise InvdiffError(
                f"{source.path} has no scheduler_config.json; give the pipeline's folder, or declare schedule= "
                f"and predicts= ({', '.join(_PREDICTS)})."
            )
        found = {"_class_name": "DDPMScheduler", "prediction_type": predicts}
        found |= {"beta_schedule": schedule} if isinstance(schedule, str) else {"trained_betas": schedule}
    elif schedule is not None or predicts is not None:
        raise InvdiffError(
            f"{source.path} comes with its scheduler, which says schedule and prediction; leave them out."
        )
    kind = found.get("_class_name")
    if kind == "ScoreSdeVeScheduler":
        # The class divides its output by its time where that is embedded by random frequencies: a score.
        if not fourier:
            raise InvdiffError(
                f"{source.path} pairs ScoreSdeVeScheduler with the time embedding "
                f"{config.get('time_embedding_type', 'positional')!r}; expected 'fourier'."
            )
        return VE(float(found.get("sigma_min", 0.01)), float(found.get("sigma_max", 1348.0))), "score"
    if kind not in _DISCRETE or fourier:
        raise InvdiffError(
            f"{source.path} has the scheduler {kind!r}"
            f"{' with a network that takes levels as time' if fourier else ''}; known are ScoreSdeVeScheduler "
            f"and, with steps as time, {', '.join(_DISCRETE)}."
        )
    name = found.get("prediction_type", "epsilon")
    if name not in _PREDICTS:
        raise InvdiffError(f"{source.path} has prediction_type {name!r}; known are {', '.join(_PREDICTS)}.")
    abar = (1 - training_betas(found)).cumprod(0)
    # A table that ends in pure noise has no level there.
    abar = abar[abar > 1e-12]
    return VP(abar, whole=config.get("time_embedding_type") == "learned"), _PREDICTS[name]


#: Schedules by diffusers' names and by ours.
_SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}


def training_betas(config: Mapping[str, Any]) -> Tensor:
    """Return ``beta`` of every training step from a scheduler's configuration, float64.

    Raises:
        InvdiffError: If the schedule is unknown.
    """
    steps = int(config.get("num_train_timesteps", 1000))
    low, high = float(config.get("beta_start", 1e-4)), float(config.get("beta_end", 0.02))
    name = config.get("beta_schedule", "linear")
    given: Sequence[float] | None = config.get("trained_betas")
    if given is not None:
        beta = torch.as_tensor(given, dtype=torch.float64).clone()
    elif name in _SCHEDULES:
        beta = betas(_SCHEDULES[name], steps, low, high)
    elif name == "sigmoid":
        beta = torch.sigmoid(torch.linspace(-6, 6, steps, dtype=torch.float64)) * (high - low) + low
    else:
        raise InvdiffError(
            f"Unknown beta_schedule {name!r}; known are linear, scaled_linear, squaredcos_cap_v2, sigmoid, and a "
            "list of trained_betas."
        )
    if beta.ndim != 1 or len(beta) < 2 or not bool(((beta > 0) & (beta < 1)).all()):
        raise InvdiffError("The betas of a schedule must be at least two numbers between 0 and 1.")
    if not config.get("rescale_betas_zero_snr", False):
        return beta
    # sqrt(abar) is shifted to end at 0 and stretched to start where it did.
    root = (1 - beta).cumprod(0).sqrt()
    abar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return 1 - torch.cat([abar[:1], abar[1:] / abar[:-1]])
