"""U-Nets of latent diffusion, as `invdiff priors convert` takes them out of Lightning checkpoints.

The network is that of guided diffusion on latents ``z``, and gives the noise at whole steps; the table of its
levels is the checkpoint's own, which the card holds: ``abar_i = prod_(j <= i) (1 - beta_j)``. The prior makes
latents. The autoencoder that turns them into images goes around it as a codec, `invdiff.codec_latent.Latent`, with
the scale that the card says.

Rombach, Blattmann, Lorenz, Esser, Ommer, CVPR 2022, arXiv:2112.10752.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from invdiff.errors import InvdiffError
from invdiff.networks.adm import ADM, infer_config
from invdiff.prior import Prior
from invdiff.priors.assemble import IMAGE_OPTIONS, assemble, fill
from invdiff.priors.frames import VP
from invdiff.priors.source import Source

__all__ = ["OPTIONS", "TITLE", "build", "recognise"]

TITLE = "U-Nets of latent diffusion, converted"
OPTIONS = {
    "head_channels": "channels of one attention head (32 in the networks on VQ-f4 latents)",
    "heads": "number of attention heads, where that was fixed instead (8 in those on KL-f8 latents)",
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
    card = source.json() or {}
    where = str(source.path)
    if card["part"] != "unet":
        raise InvdiffError(
            f"{where} is the {card['part']} of a latent diffusion and no prior; the prior is its U-Net, and an "
            "autoencoder is the codec around it (invdiff.codec_latent.Latent)."
        )
    if card.get("sha256") != (found := source.sha256()):
        raise InvdiffError(f"{where} is not the file of its card (SHA-256 {found[:12]}...); convert it again.")
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
    native = (-1.0, 1.0)
    return assemble(
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
