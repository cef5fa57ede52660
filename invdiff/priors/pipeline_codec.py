"""The autoencoder of a diffusers pipeline as a codec: the scale of its latents, and which images it takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from invdiff.codec import Codec, Pad
from invdiff.codec_latent import Latent
from invdiff.errors import InvdiffError
from invdiff.priors.pipeline_parts import Part, filled
from invdiff.priors.source import Source
from invdiff.spaces import Space

__all__ = ["codec_of", "pixels_per_latent"]


def pixels_per_latent(stage: Part) -> int:
    """Pixels along one side of what one latent stands for."""
    return 1 << stage.halvings()


def codec_of(
    source: Source, part: Part, stage: Part, declared: dict[str, Any]
) -> tuple[Callable[[Space, Tensor], Codec], int, dict[str, Any]]:
    """Return what makes the codec of an image, the multiple its sides are padded to, and what the card says.

    Args:
        source: The folder.
        part: The denoiser.
        stage: The autoencoder.
        declared: Options of the format; those of the codec are taken out.

    Raises:
        InvdiffError: If no scale is stated or declared, or weights are not those of the configuration.
    """
    from diffusers.models.attention_processor import Attention, AttnProcessor

    scale, shift = _scaling(source, part, stage, declared)
    flow = part.kind == "SD3Transformer2DModel"
    multiple = pixels_per_latent(stage) * (part.whole("patch_size") if flow else 1 << part.halvings())
    largest = multiple * part.whole("pos_embed_max_size") if flow else None
    colours = stage.whole("in_channels")
    image_range = tuple(declared.pop("image_range", None) or (0.0, 1.0))
    snap = bool(declared.pop("snap", True)) and stage.kind == "VQModel"
    vae, found = filled(source, stage, torch.float32)
    # Samplers take second derivatives of the decoder, which fused attention has not.
    for layer in vae.modules():
        if isinstance(layer, Attention):
            layer.set_processor(AttnProcessor())
    first: Any = _Stage(vae, stage.kind == "VQModel")
    codebook = first.vae.quantize.embedding.weight if snap else None

    def make_codec(image: Space, _: Tensor) -> Codec:
        if image.is_complex or len(image.shape) != 3 or image.shape[0] != colours:
            raise InvdiffError(
                f"This prior makes real images ({colours}, y, x), and the problem's are {image}; choose a prior "
                "that fits."
            )
        if largest is not None and max(image.shape[1:]) > largest:
            raise InvdiffError(
                f"This prior makes images of at most {largest} x {largest} pixels, and the problem's are {image}; "
                "choose another prior."
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


def _scaling(source: Source, part: Part, stage: Part, declared: dict[str, Any]) -> tuple[Tensor, Tensor]:
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
