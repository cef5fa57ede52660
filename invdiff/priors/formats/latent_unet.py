"""U-Nets of latent diffusion, as `invdiff priors convert` takes them out of Lightning checkpoints.

The network is that of guided diffusion on latents ``z``, and gives the noise at whole steps; the table of its
levels is the checkpoint's own, which the card holds: ``abar_i = prod_(j <= i) (1 - beta_j)``. With the first stage
declared, the prior makes images, by the codec `invdiff.codec_latent.Latent` around the autoencoder; else latents.

Rombach, Blattmann, Lorenz, Esser, Ommer, CVPR 2022, arXiv:2112.10752.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from invdiff.codec import Codec, Pad
from invdiff.codec_latent import Latent
from invdiff.errors import InvdiffError
from invdiff.networks.adm import ADM, infer_config
from invdiff.networks.autoencoder import Autoencoder
from invdiff.prior import Prior
from invdiff.priors.assemble import IMAGE_OPTIONS, assemble, fill
from invdiff.priors.frames import VP
from invdiff.priors.source import Source
from invdiff.spaces import Space

__all__ = ["OPTIONS", "TITLE", "build", "recognise"]

TITLE = "U-Nets of latent diffusion, converted"
OPTIONS = {
    "head_channels": "channels of one attention head (32 in the networks on VQ-f4 latents)",
    "heads": "number of attention heads, where that was fixed instead (8 in those on KL-f8 latents)",
    "first_stage": "converted file of the autoencoder, which makes images of the latents",
    "latent_scale": "factor on the autoencoder's latents, where the card has none (1 for VQ-f4)",
    "snap": "whether decoding snaps to the codebook of a VQ autoencoder, True",
    "image_range": "image values that the autoencoder's -1 and 1 stand for, (0, 1)",
    **{k: IMAGE_OPTIONS[k] for k in ("sigma_data", "outside", "network_dtype")},
}
_FORMAT = "invdiff-converted/1"


def recognise(source: Source) -> str | None:
    """Return the part of latent diffusion that a card names."""
    card = None if source.folder else source.json()
    if card is None or card.get("format") != _FORMAT or "part" not in card:
        return None
    return f"part of a latent diffusion: {str(card['part'])[:40]}"


def build(source: Source, **declared: Any) -> Prior:
    """Make the prior of latents; see `invdiff.priors.formats`.

    Raises:
        InvdiffError: If it is another part, the card has no table of levels, or heads must be declared.
    """
    card, found = _checked(source)
    where = str(source.path)
    if card["part"] != "unet":
        raise InvdiffError(
            f"{where} is the {card['part']} of a latent diffusion and no prior; load its U-Net, with the "
            "autoencoder as first_stage=."
        )
    state = source.state
    if any("transformer_blocks" in name for name in state):
        raise InvdiffError(f"{where} is conditional on text or classes by cross-attention, and is not read.")
    heads, head_channels = declared.pop("heads", None), declared.pop("head_channels", None)
    if (heads is None) == (head_channels is None):
        raise InvdiffError(
            f"The weights of {where} do not tell the heads of its attention; declare either head_channels= or "
            "heads=."
        )
    sizes = infer_config({k: tuple(v.shape) for k, v in state.items()})
    config = {**vars(sizes), "heads": heads or 1, "head_channels": head_channels}
    network = fill(lambda: ADM(type(sizes)(**config)), state, where)
    schedule = card.get("schedule")
    about = {
        "name": card.get("name") or source.path.stem,
        "format": "latent diffusion",
        "weights": card.get("weights"),
        "sha256": found,
        "licence": card.get("licence", "not stated in the checkpoint"),
        "images": "latents",
        "latent_scale": schedule.get("scale_factor") if isinstance(schedule, Mapping) else None,
    }
    stage = {k: declared.pop(k) for k in ("first_stage", "latent_scale", "snap", "image_range") if k in declared}
    native = (-1.0, 1.0)
    prior = assemble(
        network,
        "epsilon",
        _frame(schedule, where),
        sizes.inputs,
        card=about,
        multiple=2 ** (len(sizes.multipliers) - 1),
        learned_variance=sizes.outputs == 2 * sizes.inputs,
        native_range=native,
        image_range=native,
        sigma_data=declared.pop("sigma_data", 1.0),
        **declared,
    )
    if "first_stage" not in stage:
        if stage:
            raise InvdiffError(f"{', '.join(stage)} say how latents become images; give first_stage= too.")
        return prior
    stage.setdefault("latent_scale", about["latent_scale"])
    return _decoded(prior, sizes.inputs, **stage)


def _checked(source: Source) -> tuple[dict[str, Any], str]:
    """The card of a converted part, and the hash that file and card agree on."""
    card = source.json() or {}
    if card.get("sha256") != (found := source.sha256()):
        raise InvdiffError(
            f"{source.path} is not the file of its card (SHA-256 {found[:12]}...); convert it again."
        )
    return card, found


def _decoded(
    prior: Prior,
    channels: int,
    first_stage: str | Path,
    latent_scale: float | None,
    snap: bool = True,
    image_range: tuple[float, float] = (0.0, 1.0),
) -> Prior:
    """Return the prior with an autoencoder around it; images are padded to what both networks take."""
    source = Source(first_stage)
    card, found = _checked(source)
    if card.get("part") != "first_stage":
        raise InvdiffError(f"{first_stage} is no first stage of a latent diffusion, by its card.")
    if latent_scale is None:
        raise InvdiffError(
            "The checkpoint has no factor on its latents (scale_factor), and it is not guessed; declare "
            "latent_scale= of its configuration (1 for VQ-f4; 0.18215 for Stable Diffusion 1)."
        )
    # Discriminators and perceptual distances of the autoencoder's own training.
    state = {k: v for k, v in source.state.items() if not k.startswith("loss.")}
    layout = Autoencoder.layout({k: tuple(v.shape) for k, v in state.items()})
    network = fill(lambda: Autoencoder(**layout), state, str(source.path))
    assert isinstance(network, Autoencoder)
    if network.latent != channels:
        raise InvdiffError(
            f"{first_stage} has latents of {network.latent} channels, and the U-Net takes {channels}; they belong "
            "to different checkpoints."
        )
    multiple = network.factor * int(prior.card["multiple"])

    def make_codec(image: Space, scale: Tensor) -> Codec:
        pixels = Pad(image, multiple)
        latent = Latent(
            network.encode,
            network.decode,
            pixels.prior,
            scale=latent_scale,
            network_range=(-1.0, 1.0),
            image_range=image_range,
            codebook=network.codebook if snap else None,
        )
        return pixels @ latent

    about = {
        "first_stage": found,
        "latent_scale": latent_scale,
        "image_range": list(image_range),
        "images": "unknown",
    }
    return replace(prior, make_codec=make_codec, scale=1.0, card={**prior.card, **about, "multiple": multiple})


def _frame(schedule: Any, where: str) -> VP:
    """Levels from the table on the card: its betas, or what they multiply up to."""
    table = schedule if isinstance(schedule, Mapping) else {}
    for key in ("betas", "alphas_cumprod"):
        if isinstance(table.get(key), list) and table[key]:
            try:
                values = torch.tensor(table[key], dtype=torch.float64)
            except (TypeError, ValueError) as error:
                raise InvdiffError(f"The {key} on the card of {where} are no numbers ({error}).") from None
            return VP((1 - values).cumprod(0) if key == "betas" else values)
    raise InvdiffError(
        f"The card of {where} has no betas, and no formula stands in for them; convert the whole checkpoint again."
    )
