"""Checkpoints of guided diffusion (ADM): a flat list of weights in a torch file or safetensors.

Sizes are read off names and shapes. What shapes cannot tell (number of heads, order of attention weights,
schedule) comes from the published checkpoint that has these sizes, or is declared. The network gives the noise at
whole steps 0 to 999; its embedding of time takes fractions. A learned variance is dropped.

Dhariwal, Nichol, NeurIPS 2021, arXiv:2105.05233; FFHQ: Choi et al., ICCV 2021, arXiv:2108.02938; CT and MRI:
Chung, Lee, Ye, ICLR 2024, arXiv:2303.05754.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from invdiff.errors import InvdiffError
from invdiff.networks.adm import ADM, ADMConfig, infer_config
from invdiff.prior import Prior
from invdiff.priors.assemble import IMAGE_OPTIONS, assemble, fill
from invdiff.priors.frames import VP
from invdiff.priors.source import Source

__all__ = ["OPTIONS", "PRESETS", "TITLE", "Preset", "build", "prior_of", "recognise", "recognise_state"]

TITLE = "guided diffusion (ADM) state dicts"
OPTIONS = {
    "head_channels": "channels of one attention head (64 in most published networks)",
    "heads": "number of attention heads, where that was fixed instead",
    "qkv": "order of the attention weights: 'legacy' or 'new'",
    "schedule": "levels of the training: 'linear' or 'cosine'",
    "steps": "number of steps of the training, 1000",
    "size": "height and width of the images of the training, which the self-test takes",
    **IMAGE_OPTIONS,
}
_MARKS = ("time_embed.0.weight", "input_blocks.0.0.weight", "middle_block.1.qkv.weight", "out.2.weight")


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A published network: the sizes by which it is known, and what they do not tell."""

    title: str
    sizes: tuple[Any, ...]
    size: int
    images: str = "natural"
    training: str = ""
    licence: str = "MIT"
    head_channels: int | None = 64
    heads: int = 1
    qkv: str = "legacy"
    schedule: str = "linear"


def _sizes(c: ADMConfig) -> tuple[Any, ...]:
    return (
        c.width,
        c.blocks,
        c.multipliers,
        c.attention,
        c.inputs,
        c.outputs,
        c.classes,
        c.scale_shift,
        c.resample,
    )


_PYRAMID = (1.0, 1.0, 2.0, 2.0, 4.0, 4.0)
_MODERN = (True, "block")
_FFHQ = "MIT code; weights without a licence of their own; FFHQ images CC BY-NC-SA 4.0"
_UNSAID = "not stated for the weights"
#: Published checkpoints; those with the same sizes and settings share one entry.
PRESETS = (
    Preset(
        title="FFHQ 256 (ffhq_10m)",
        sizes=(128, 1, _PYRAMID, (4,), 3, 6, None, *_MODERN),
        size=256,
        training="faces, FFHQ",
        licence=_FFHQ,
    ),
    Preset(
        title="ImageNet 256 unconditional, or LSUN",
        sizes=(256, 2, _PYRAMID, (3, 4, 5), 3, 6, None, *_MODERN),
        size=256,
        training="ImageNet, or one class of LSUN",
    ),
    Preset(
        title="ImageNet 256 conditional",
        sizes=(256, 2, _PYRAMID, (3, 4, 5), 3, 6, 1000, *_MODERN),
        size=256,
        training="ImageNet",
    ),
    Preset(
        title="ImageNet 512 conditional",
        sizes=(256, 2, (0.5, *_PYRAMID), (4, 5, 6), 3, 6, 1000, *_MODERN),
        size=512,
        training="ImageNet",
    ),
    Preset(
        title="ImageNet 128 conditional",
        sizes=(256, 2, (1.0, 1.0, 2.0, 3.0, 4.0), (2, 3, 4), 3, 6, 1000, *_MODERN),
        size=128,
        training="ImageNet",
        head_channels=None,
        heads=4,
    ),
    Preset(
        title="ImageNet 64 conditional",
        sizes=(192, 3, (1.0, 2.0, 3.0, 4.0), (1, 2, 3), 3, 6, 1000, *_MODERN),
        size=64,
        training="ImageNet",
        qkv="new",
        schedule="cosine",
    ),
    Preset(
        title="AAPM CT 256 of DDS",
        sizes=(256, 1, _PYRAMID, (4,), 1, 2, None, *_MODERN),
        size=256,
        images="CT slices",
        training="slices of the AAPM low-dose CT challenge",
        licence=_UNSAID,
    ),
    # Attention at 16 of 320 pixels falls on no level, so that only the middle has any.
    Preset(
        title="fastMRI knee 320 of DDS",
        sizes=(256, 1, _PYRAMID, (), 2, 4, None, *_MODERN),
        size=320,
        images="complex MRI slices",
        training="knees of fastMRI",
        licence=_UNSAID,
    ),
)


def recognise(source: Source) -> str | None:
    """Return the sizes and, where there is one, the published network that has them."""
    return recognise_state(source.state, str(source.path))


def recognise_state(state: Mapping[str, Tensor], where: str) -> str | None:
    """`recognise` for weights that lie in some other wrapping."""
    if not all(k in state for k in _MARKS) or any("transformer_blocks" in k for k in state):
        return None
    config = _config(state, where)
    known = _preset(config)
    title = "no published one" if known is None else known.title
    return (
        f"guided diffusion U-Net, {config.inputs} channels, width {config.width}, "
        f"{len(config.multipliers)} levels ({title})"
    )


def build(source: Source, **declared: Any) -> Prior:
    """Make the prior; see `invdiff.priors.formats`.

    Raises:
        InvdiffError: If the weights are not those of the architecture, or the heads must be declared.
    """
    return prior_of(source.state, str(source.path), {"sha256": source.sha256()}, **declared)


def prior_of(
    state: Mapping[str, Tensor],
    where: str,
    about: Mapping[str, Any],
    *,
    head_channels: int | None = None,
    heads: int | None = None,
    qkv: str | None = None,
    schedule: str | None = None,
    steps: int = 1000,
    size: int | None = None,
    **declared: Any,
) -> Prior:
    """Make a prior of weights; those of formats that wrap this network come here too.

    Args:
        state: The weights, by the names of guided diffusion.
        where: Their file, for messages.
        about: What the card says besides.
        head_channels: See `OPTIONS`, as all others.
        heads: Number of heads.
        qkv: Order of attention weights.
        schedule: Schedule of the training.
        steps: Steps of the training.
        size: Height and width of its images.
        declared: See `invdiff.priors.assemble.IMAGE_OPTIONS`.

    Raises:
        InvdiffError: As `build`.
    """
    config = _config(state, where)
    known = _preset(config)
    if head_channels is not None and heads is not None:
        raise InvdiffError("heads and head_channels exclude each other; declare one.")
    if head_channels is None and heads is None:
        if known is None:
            raise InvdiffError(
                f"{where} has the sizes of no published network, and they do not tell its attention heads; "
                "declare head_channels= (64 in most) or heads=, and qkv='new', schedule='cosine' if they apply."
            )
        head_channels, heads = known.head_channels, known.heads
    # Presets say these two; without one, what guided diffusion does unless told otherwise.
    qkv = qkv or (known.qkv if known else "legacy")
    schedule = schedule or (known.schedule if known else "linear")
    if schedule not in ("linear", "cosine"):
        raise InvdiffError(f"Unknown schedule {schedule!r}; guided diffusion has 'linear' and 'cosine'.")
    if config.outputs not in (config.inputs, 2 * config.inputs):
        raise InvdiffError(
            f"{where} takes {config.inputs} channels and gives {config.outputs}; a prior's network gives as many "
            "as it takes, or twice as many with a learned variance (one that enlarges images is no prior)."
        )
    config = replace(config, head_channels=head_channels, heads=heads or 1, qkv=qkv)
    network = fill(lambda: ADM(config), state, where)
    # Other numbers of steps keep the levels at the ends, as guided diffusion does.
    ends = (0.1 / steps, 20 / steps) if schedule == "linear" else (1e-4, 0.02)
    card = {
        "name": known.title if known else where.rsplit("/", 1)[-1],
        "format": TITLE,
        "licence": known.licence if known else "not stated in the checkpoint",
        "training": known.training if known else "unknown",
        "images": known.images if known else "natural" if config.inputs == 3 else "unknown",
        "size": size or (known.size if known else None),
        "schedule": schedule,
        "qkv": qkv,
        "heads": f"{head_channels} channels each" if head_channels is not None else heads,
        **about,
    }
    return assemble(
        network,
        "epsilon",
        VP.from_betas(schedule, steps, *ends),
        config.inputs,
        card=card,
        multiple=2 ** (len(config.multipliers) - 1),
        learned_variance=config.outputs == 2 * config.inputs,
        conditions=() if config.classes is None else ("label",),
        **declared,
    )


def _config(state: Mapping[str, Tensor], where: str) -> ADMConfig:
    try:
        return infer_config({k: tuple(v.shape) for k, v in state.items()})
    except InvdiffError as error:
        raise InvdiffError(f"{where}: {error}") from None


def _preset(config: ADMConfig) -> Preset | None:
    return next((p for p in PRESETS if p.sizes == _sizes(config)), None)
