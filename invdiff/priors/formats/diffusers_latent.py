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

import inspect
import re
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from invdiff.codec import Codec, Pad
from invdiff.codec_latent import Latent
from invdiff.errors import InvdiffError
from invdiff.prior import Prior
from invdiff.priors.assemble import IMAGE_OPTIONS, assemble, fill
from invdiff.priors.formats.diffusers_unet import _frame as training_frame
from invdiff.priors.formats.diffusers_unet import _renamed as renamed
from invdiff.priors.frames import Flow, Frame
from invdiff.priors.guided import Guided
from invdiff.priors.source import Source
from invdiff.spaces import Space

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
_WEIGHTS = tuple(
    f"diffusion_pytorch_model{variant}.{suffix}" for suffix in ("safetensors", "bin") for variant in ("", ".fp16")
)
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.(safetensors|bin)")
# What other networks of these classes are conditional on: not on text, or not alone.
_UNSERVED = ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type", "time_cond_proj_dim")


@dataclass(frozen=True)
class _Part:
    """One network of a pipeline: its folder, its class and its configuration."""

    place: str
    kind: str
    config: Mapping[str, Any]

    def get(self, key: str) -> Any:
        """Value of the configuration, or the default of the class."""
        if key in self.config:
            return self.config[key]
        return inspect.signature(_class(self.kind).__init__).parameters[key].default


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
    make_codec, multiple, about = _codec(source, part, stage, channels, declared)
    network, found = _filled(source, part, dtype or torch.float32)
    card = {
        "name": source.path.name,
        "format": "diffusers latent pipeline",
        "sha256": found,
        "licence": "not stated in the checkpoint",
        "size": part.config.get("sample_size"),
        **about,
    }
    prior = assemble(
        _Network(network, widths, _factor(stage), time_ids, attention == "math"),
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


def _parts(source: Source) -> tuple[_Part, _Part]:
    """The network and the autoencoder that the index names, each of a class that is known here."""
    index = source.json("model_index.json") or {}
    if index.get("_class_name") not in _PIPELINES:
        raise InvdiffError(
            f"{source.path} is a pipeline of the class {str(index.get('_class_name'))!r:.80}; known are "
            f"{', '.join(_PIPELINES)}."
        )
    return _part(source, index, _NETWORKS, "denoiser"), _part(source, index, _STAGES, "autoencoder")


def _part(source: Source, index: Mapping[str, Any], known: Mapping[str, tuple[str, ...]], what: str) -> _Part:
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
    part = _Part(place, entry[1], config)
    accepted = inspect.signature(_class(part.kind).__init__).parameters
    for key in config:
        if not key.startswith("_") and key not in accepted:
            raise InvdiffError(
                f"{source.path}/{place}/config.json has {key!r:.60}, which the installed diffusers does not know; "
                "update diffusers."
            )
    return part


def _class(kind: str) -> Any:
    """A class of the library, by one of the names in this file."""
    try:
        import diffusers
    except ImportError:
        raise InvdiffError(
            "Checkpoints of diffusers need that library; `pip install 'invdiff[hub]'` brings it."
        ) from None
    return getattr(diffusers, kind)


def _filled(source: Source, part: _Part, dtype: torch.dtype) -> tuple[nn.Module, str]:
    """The network with its weights, and their hash."""
    state, names = _state(source, part.place)
    where = str(source.file(names[0]))
    values = {k: v for k, v in part.config.items() if not k.startswith("_")}
    cls = _class(part.kind)
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


def _channels(source: Source, part: _Part, stage: _Part) -> int:
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


def _levels(source: Source, part: _Part, schedule: Any, predicts: Any) -> tuple[Frame, str]:
    """Frame and parametrisation of the scheduler's file."""
    if part.place != "transformer":
        return training_frame(source, part.config, schedule, predicts)
    found = source.json("scheduler/scheduler_config.json") or {}
    if found.get("_class_name") not in _FLOWS:
        raise InvdiffError(
            f"{source.path} has the scheduler {str(found.get('_class_name'))!r:.60} with a {part.kind}; known are "
            f"{', '.join(_FLOWS)}."
        )
    # The shift of the times is the sampler's choice of steps; the network was trained on times as they are.
    return Flow(1, time_scale=float(found.get("num_train_timesteps", 1000))), "flow"


def _conditions(source: Source, part: _Part, time_ids: Any) -> tuple[dict[str, int], Any]:
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
    ids = None if time_ids is None else tuple(float(v) for v in time_ids)
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


def _factor(stage: _Part) -> int:
    """Pixels per latent."""
    return int(2 ** (len(stage.get("block_out_channels")) - 1))


def _codec(
    source: Source, part: _Part, stage: _Part, channels: int, declared: dict[str, Any]
) -> tuple[Callable[[Space, Tensor], Codec], int, dict[str, Any]]:
    """What makes the codec of an image, what sizes are padded to, and what the card says of it."""
    from diffusers.models.attention_processor import Attention, AttnProcessor

    scale, shift = _scaling(source, part, stage, declared)
    image_range = tuple(declared.pop("image_range", None) or (0.0, 1.0))
    snap = bool(declared.pop("snap", True)) and stage.kind == "VQModel"
    vae, found = _filled(source, stage, torch.float32)
    # Samplers take second derivatives of the decoder, which fused attention has not.
    for layer in vae.modules():
        if isinstance(layer, Attention):
            layer.set_processor(AttnProcessor())
    first: Any = _Stage(vae, stage.kind == "VQModel")
    flow = part.kind == "SD3Transformer2DModel"
    steps = int(part.get("patch_size")) if flow else 2 ** (len(part.get("block_out_channels")) - 1)
    codebook = first.vae.quantize.embedding.weight if snap else None
    colours, multiple = stage.get("in_channels"), _factor(stage) * steps
    largest = _factor(stage) * steps * int(part.get("pos_embed_max_size")) if flow else None

    def make_codec(image: Space, _: Tensor) -> Codec:
        if image.is_complex or len(image.shape) != 3 or image.shape[0] != colours:
            raise InvdiffError(
                f"This prior makes real images ({colours}, y, x), and the problem's are {image}; choose a prior "
                "that fits."
            )
        if largest is not None and max(image.shape[1:]) > largest:
            raise InvdiffError(
                f"This prior makes images of at most {largest} x {largest} pixels, and the problem's are {image}; "
                "priors.Tiled or another prior serves larger ones."
            )
        pixels = Pad(image, multiple)
        return pixels @ Latent(
            first.encode,
            first.decode,
            pixels.prior,
            scale=scale,
            shift=shift,
            network_range=(-1.0, 1.0),
            image_range=image_range,
            codebook=codebook,
        )

    about = {
        "first_stage": found,
        "latent_scale": scale.tolist(),
        "latent_shift": shift.tolist(),
        "image_range": list(image_range),
    }
    return make_codec, multiple, about


class _Stage(nn.Module):
    """An autoencoder: latents are means, or those before the codebook; decoding leaves snapping out."""

    def __init__(self, vae: nn.Module, codes: bool) -> None:
        super().__init__()
        self.vae: Any = vae
        self.codes = codes

    def encode(self, x: Tensor) -> Any:
        return self.vae.encode(x)

    def decode(self, z: Tensor) -> Any:
        return self.vae.decode(z, force_not_quantize=True) if self.codes else self.vae.decode(z)


def _scaling(source: Source, part: _Part, stage: _Part, declared: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Scale and shift as stated or declared: the defaults of the classes are those of one model."""
    where = f"{source.path}/{stage.place}/config.json"
    scale, shift = declared.pop("latent_scale", None), declared.pop("latent_shift", None)
    scale = stage.config.get("scaling_factor") if scale is None else scale
    if scale is None:
        raise InvdiffError(
            f"{where} states no scaling_factor, and it is not guessed; declare latent_scale= (0.18215 for Stable "
            "Diffusion 1 and 2, 1 for VQ-f4)."
        )
    shift = stage.config.get("shift_factor") if shift is None else shift
    if shift is None and part.kind == "SD3Transformer2DModel":
        raise InvdiffError(f"{where} states no shift_factor, and it is not guessed; declare latent_shift=.")
    mean, std = stage.config.get("latents_mean"), stage.config.get("latents_std")
    if (mean is None) != (std is None) or (mean is not None and shift is not None):
        raise InvdiffError(f"{where} states latents_mean, latents_std and shift_factor in part; fetch it again.")
    try:
        factor = torch.as_tensor(scale, dtype=torch.float32)
        offset = torch.as_tensor((shift or 0.0) if mean is None else mean, dtype=torch.float32)
        factor = factor if std is None else factor / torch.as_tensor(std, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvdiffError(f"{where}: scale and shift of the latents are no numbers ({error}).") from None
    if not bool(((factor > 0) & torch.isfinite(factor)).all() and torch.isfinite(offset).all()):
        raise InvdiffError(f"{where}: the scale of the latents must be positive, and their shift finite.")
    return factor, offset
