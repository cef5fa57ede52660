"""Pipelines of the diffusers library that make latents: Stable Diffusion 1, 2, XL and 3, and unconditional ones.

    D(z, sigma) = a z + b network(c z, time, conditions),      x = n^-1(G(z / scale + shift))

with ``a``, ``b`` and ``c`` of the parametrisation and frame of the scheduler's file: the table of its betas,
whatever its sampler, or rectified flow with the time ``1000 sigma / (1 + sigma)``. The autoencoder ``G`` is the
codec `invdiff.codec_latent.Latent`, at the mean of its distribution.

The networks are diffusers' own classes, named here and never taken from a file, built from their ``config.json``
and filled strictly; the library loads nothing by itself. A prompt reaches them as tensors, ``embeddings``
``(rows, tokens, width)`` and, where the network takes a summary too, ``pooled`` ``(rows, width)``: given once for
all images, or in ``cond``, where they may require gradients.

Rombach et al., CVPR 2022, arXiv:2112.10752; Podell et al., "SDXL", arXiv:2307.01952; Esser et al., "Scaling
rectified flow transformers", arXiv:2403.03206.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from invdiff.errors import InvdiffError
from invdiff.prior import Prior
from invdiff.priors.assemble import IMAGE_OPTIONS, assemble
from invdiff.priors.formats.diffusers_unet import training_frame
from invdiff.priors.frames import Flow, Frame
from invdiff.priors.guided import Guided
from invdiff.priors.pipeline_codec import codec_of, pixels_per_latent
from invdiff.priors.pipeline_parts import Part, filled, read_part
from invdiff.priors.source import Source

__all__ = ["OPTIONS", "TITLE", "build", "recognise"]

TITLE = "diffusers folders of latent pipelines"
OPTIONS = {
    "embeddings": "embedding of the prompt, (tokens, width) or (1, tokens, width); may require gradients",
    "negative": "the same of the empty or negative prompt, for guidance",
    "pooled": "pooled embedding of the prompt, (width,) or (1, width), where the network takes one (SDXL, SD3)",
    "negative_pooled": "the same of the empty or negative prompt",
    "guidance": "weight of classifier-free guidance, 1 (none); a number, or a function of the levels",
    "prompt": "text, embedded by the folder's own CLIP encoder (Stable Diffusion 1 and 2; needs transformers)",
    "negative_prompt": "text to guide away from, the empty one",
    "time_ids": "SDXL's original height and width, top and left of the crop, target height and width; the image's",
    "latent_scale": "factor on the autoencoder's latents, where its configuration states none",
    "latent_shift": "what is subtracted from the latents before, where its configuration states none",
    "snap": "whether decoding snaps to the codebook of a VQ autoencoder, True",
    "image_range": "image values that the autoencoder's -1 and 1 stand for, (0, 1)",
    "attention": "'fused' (little memory, one derivative) or 'math' (two derivatives)",
    "schedule": "betas of the training where no scheduler is there; see folders with a UNet2DModel",
    "predicts": "epsilon, v_prediction or sample, where no scheduler is there",
    **{k: IMAGE_OPTIONS[k] for k in ("sigma_data", "outside", "network_dtype")},
}
_PIPELINES = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusion3Pipeline",
    "StableDiffusion3Img2ImgPipeline",
    "LDMPipeline",
)
_NETWORKS = {
    "unet": ("UNet2DConditionModel", "UNet2DModel"),
    "transformer": ("SD3Transformer2DModel",),
}
_STAGES = {"vae": ("AutoencoderKL", "VQModel"), "vqvae": ("VQModel", "AutoencoderKL")}
_FLOWS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
# What other networks of these classes are conditional on: not on text, or not alone.
_UNSERVED = ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type", "time_cond_proj_dim")


class _Network(nn.Module):
    """``network(z, time, embeddings, pooled)`` around diffusers' classes, which name these each in their own way.

    Args:
        network: The filled network.
        widths: Width of each condition by name.
        factor: Pixels per latent.
        time_ids: SDXL's six numbers, or None for those of the image; False where it takes none.
        math: Whether attention can be differentiated twice.
    """

    def __init__(
        self, network: nn.Module, widths: Mapping[str, int], factor: int, time_ids: Any, math: bool
    ) -> None:
        super().__init__()
        self.network, self.widths = network, dict(widths)
        self.factor, self.time_ids, self.math = factor, time_ids, math
        self.flow = type(network).__name__ == "SD3Transformer2DModel"

    def forward(self, z: Tensor, time: Tensor, **conditions: Tensor) -> Tensor:
        given = {}
        for name, value in conditions.items():
            value = _checked(name, value, self.widths[name])
            if len(value) not in (1, len(z)):
                raise InvdiffError(f"{name} has {len(value)} rows, and the batch has {len(z)}; give one, or each.")
            given[name] = value.to(z).expand(len(z), *value.shape[1:])
        with sdpa_kernel(SDPBackend.MATH) if self.math else nullcontext():
            out: Tensor = self.network(z, timestep=time, **self._named(z, given), return_dict=False)[0]
        return out

    def _named(self, z: Tensor, given: dict[str, Tensor]) -> dict[str, Any]:
        if not given:
            return {}
        text = {"encoder_hidden_states": given["embeddings"]}
        if self.flow:
            return {**text, "pooled_projections": given["pooled"]}
        if self.time_ids is False:
            return text
        size = (self.factor * z.shape[-2], self.factor * z.shape[-1])
        ids = torch.tensor(self.time_ids or (*size, 0, 0, *size), dtype=torch.float32, device=z.device)
        added = {"text_embeds": given["pooled"], "time_ids": ids.expand(len(z), -1)}
        return {**text, "added_cond_kwargs": added}


def recognise(source: Source) -> str | None:
    """Return the pipeline and its networks, where the folder's index names an autoencoder."""
    index = source.json("model_index.json") if source.folder else None
    if index is None or not any(name in index for name in _STAGES):
        return None
    kinds = [str(index[k][-1])[:40] for k in (*_NETWORKS, *_STAGES) if isinstance(index.get(k), list) and index[k]]
    return f"diffusers {str(index.get('_class_name'))[:60]}: {' and '.join(kinds) or 'no network'}"


def build(source: Source, **declared: Any) -> Prior:
    """Make the prior; see `invdiff.priors.formats`.

    Raises:
        InvdiffError: If the library is missing, a class or a condition is not served, weights are not those of the
            configuration, the scale of the latents is stated nowhere, or embeddings do not fit.
    """
    part, stage = _parts(source)
    channels = _channels(source, part, stage)
    dtype = declared.pop("network_dtype", None)
    frame, parametrisation = _levels(source, part, declared.pop("schedule", None), declared.pop("predicts", None))
    widths, time_ids = _conditions(source, part, declared.pop("time_ids", None))
    given, null, guidance = _prompt(source, widths, declared)
    if (attention := declared.pop("attention", "fused")) not in ("fused", "math"):
        raise InvdiffError(f"attention is 'fused' or 'math', got {attention!r}.")
    make_codec, multiple, about = codec_of(source, part, stage, declared)
    network, found = filled(source, part, dtype or torch.float32)
    card = {
        "name": source.path.name,
        "format": "diffusers latent pipeline",
        "sha256": found,
        "licence": "not stated in the checkpoint",
        "size": part.config.get("sample_size"),
        **about,
    }
    prior = assemble(
        _Network(network, widths, pixels_per_latent(stage), time_ids, attention == "math"),
        parametrisation,
        frame,
        channels,
        card=card,
        multiple=multiple,
        conditions=tuple(widths),
        network_range=(-1.0, 1.0),
        image_range=(-1.0, 1.0),
        differentiable=2 if attention == "math" else 1,
        sigma_data=declared.pop("sigma_data", 1.0),
        network_dtype=dtype,
        **declared,
    )
    card = {**prior.card, "image_range": about["image_range"], "images": "unknown", "attention": attention}
    prior = replace(prior, make_codec=make_codec, scale=1.0, card=card)
    return prior if given is None else Guided(prior, given, null, guidance)


def _parts(source: Source) -> tuple[Part, Part]:
    """The network and the autoencoder that the index names, each of a class that is known here."""
    index = source.json("model_index.json") or {}
    if index.get("_class_name") not in _PIPELINES:
        raise InvdiffError(
            f"{source.path} is a pipeline of the class {str(index.get('_class_name'))!r:.80}; known are "
            f"{', '.join(_PIPELINES)}."
        )
    return read_part(source, index, _NETWORKS, "denoiser"), read_part(source, index, _STAGES, "autoencoder")


def _channels(source: Source, part: Part, stage: Part) -> int:
    """Channels of the latents, on which both networks agree."""
    inputs, latent = part.get("in_channels"), stage.get("latent_channels")
    outputs = part.get("out_channels") or inputs
    if stage.kind == "VQModel":
        latent = stage.get("vq_embed_dim") or latent
        if stage.get("lookup_from_codebook") or stage.get("norm_type") != "group":
            raise InvdiffError(
                f"{source.path}/{stage.place} decodes indices or by a spatial norm, and is not read."
            )
    if not inputs == outputs == latent or not isinstance(inputs, int):
        raise InvdiffError(
            f"{source.path} has latents of {latent} channels, and its denoiser takes {inputs} and gives "
            f"{outputs}; a prior's takes and gives the latents alone (no inpainting, upscaling or depth)."
        )
    return inputs


def _levels(source: Source, part: Part, schedule: Any, predicts: Any) -> tuple[Frame, str]:
    """Frame and parametrisation of the scheduler's file."""
    if part.place != "transformer":
        return training_frame(source, part.config, schedule, predicts)
    found = source.json("scheduler/scheduler_config.json") or {}
    if found.get("_class_name") not in _FLOWS:
        raise InvdiffError(
            f"{source.path} has the scheduler {str(found.get('_class_name'))!r:.60} with a {part.kind}; known are "
            f"{', '.join(_FLOWS)}."
        )
    steps = found.get("num_train_timesteps", 1000)
    if not isinstance(steps, int) or steps < 1:
        raise InvdiffError(f"{source.path} has a scheduler of {steps!r:.60} steps; expected a whole number.")
    # The shift of the times is the sampler's choice of steps; the network was trained on times as they are.
    return Flow(1, time_scale=float(steps)), "flow"


def _conditions(source: Source, part: Part, time_ids: Any) -> tuple[dict[str, int], Any]:
    """Widths of the tensors that the network is conditional on, and SDXL's numbers (False where it takes none)."""
    if part.kind == "SD3Transformer2DModel":
        widths = {"embeddings": part.get("joint_attention_dim"), "pooled": part.get("pooled_projection_dim")}
        return _declared_none(widths, time_ids)
    unserved = [k for k in _UNSERVED if part.config.get(k) is not None]
    added = part.config.get("addition_embed_type")
    if unserved or added not in (None, "text_time") or part.config.get("attention_type", "default") != "default":
        raise InvdiffError(
            f"{source.path}/{part.place} is conditional on more than text "
            f"({', '.join(unserved) or added or 'boxes'}), and is not read."
        )
    if part.kind == "UNet2DModel":
        return _declared_none({}, time_ids)
    width = part.get("cross_attention_dim")
    if not isinstance(width, int):
        raise InvdiffError(f"{source.path}/{part.place} attends to embeddings of several widths, and is not read.")
    if added is None:
        return _declared_none({"embeddings": width}, time_ids)
    try:
        ids = None if time_ids is None else tuple(float(v) for v in time_ids)
    except (TypeError, ValueError):
        raise InvdiffError(f"time_ids are six numbers (five for refiners), got {time_ids!r:.60}.") from None
    count = 6 if ids is None else len(ids)
    total, each = part.get("projection_class_embeddings_input_dim"), part.get("addition_time_embed_dim")
    if not isinstance(total, int) or not isinstance(each, int) or total <= count * each:
        raise InvdiffError(
            f"{source.path}/{part.place} has no room for {count} time_ids of width {each} in {total} numbers."
        )
    return {"embeddings": width, "pooled": total - count * each}, ids


def _declared_none(widths: dict[str, int], time_ids: Any) -> tuple[dict[str, int], bool]:
    if time_ids is not None:
        raise InvdiffError("This network takes no time_ids; leave them out.")
    return widths, False


def _checked(name: str, value: Any, width: int) -> Tensor:
    """A condition with its axis of rows."""
    ndim = 3 if name == "embeddings" else 2
    value = torch.as_tensor(value)
    value = value[None] if value.ndim == ndim - 1 else value
    if value.ndim != ndim or value.shape[-1] != width or not value.is_floating_point():
        expected = f"(rows, tokens, {width})" if ndim == 3 else f"(rows, {width})"
        raise InvdiffError(
            f"{name} has shape {tuple(value.shape)} of {value.dtype}, and the network takes {expected} of "
            "floating point; use the text encoder of the checkpoint."
        )
    return value


def _prompt(
    source: Source, widths: Mapping[str, int], declared: dict[str, Any]
) -> tuple[dict[str, Tensor] | None, dict[str, Tensor] | None, Any]:
    """What is given for all images, what it is guided away from, and the weight."""
    guidance = declared.pop("guidance", 1.0)
    texts = [declared.pop(name, None) for name in ("prompt", "negative_prompt")]
    sides = [
        {name: v for name, key in keys.items() if (v := declared.pop(key, None)) is not None}
        for keys in (
            {"embeddings": "embeddings", "pooled": "pooled"},
            {"embeddings": "negative", "pooled": "negative_pooled"},
        )
    ]
    if texts[0] is not None or texts[1] is not None:
        if any(sides) or texts[0] is None:
            raise InvdiffError(
                "Give prompt= (and negative_prompt=), or embeddings= (and negative=), not parts of each."
            )
        sides = _embedded(source, widths, texts[0], texts[1] or "", guidance)
    for side in sides:
        for name in side:
            if name not in widths:
                raise InvdiffError(
                    f"This network takes no {name}; it takes {', '.join(widths) or 'no condition'}."
                )
            side[name] = _checked(name, side[name], widths[name])
        if side and set(side) != set(widths):
            raise InvdiffError(f"This network takes {' and '.join(widths)} together; give both.")
    given, null = sides
    if not given:
        if null or guidance != 1:
            raise InvdiffError("Guidance needs the prompt itself; give embeddings= too, or leave guidance out.")
        return None, None, 1.0
    if null and any(null[k].shape[1:] != given[k].shape[1:] for k in given):
        raise InvdiffError(
            f"The embeddings have {given['embeddings'].shape[1]} tokens, and the negative ones "
            f"{null['embeddings'].shape[1]}; pad both to one length."
        )
    return given, null or None, guidance


def _embedded(
    source: Source, widths: Mapping[str, int], prompt: str, negative: str, guidance: Any
) -> list[dict[str, Tensor]]:
    from invdiff.priors.prompts import clip_embeddings

    if set(widths) != {"embeddings"}:
        raise InvdiffError(
            "prompt= serves pipelines with one CLIP encoder (Stable Diffusion 1 and 2); compute the embeddings of "
            "this one yourself, and give embeddings= and pooled=."
        )
    texts = [prompt] if guidance == 1 else [prompt, negative]
    rows = clip_embeddings(source, texts)
    return [{"embeddings": row[None]} for row in rows] + [{}] * (2 - len(texts))
