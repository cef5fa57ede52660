"""Embedded latent priors: a compact autoencoder and the denoiser of its latents, in one file.

    image --scale--> unit scale --pad--> multiples of the networks --encode--> latents of unit spread

Images of unit scale (0 to 1 and a little above) are -1 to 1 for the autoencoder. Neither network depends on the
size of the image, so that any size is served; what is no multiple is padded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from invdiff.codec import Codec, Pad, Scale
from invdiff.codec_latent import Latent
from invdiff.errors import InvdiffError
from invdiff.networks.latent_pair import LatentPair
from invdiff.priors.held_out import held_out_slice
from invdiff.spaces import Space

__all__ = ["FORMAT", "codec_maker", "reference_errors"]

FORMAT = "invdiff-latent/1"
#: Noise levels of the self-test, in latents of unit spread.
SIGMAS = (0.02, 0.1, 0.5, 2.0)


def codec_maker(pair: LatentPair, card: Mapping[str, Any]) -> Callable[[Space, Tensor], Codec]:
    """Return what makes the codec for images ``(channels, y, x)`` of any size.

    Args:
        pair: The networks.
        card: With ``latent_shift`` and ``latent_scale``, one number per channel of the latents.
    """
    channels = pair.codec.channels
    shift, scale = (_per_channel(pair, card, k) for k in ("latent_shift", "latent_scale"))

    def make(image: Space, unit: Tensor) -> Codec:
        if image.is_complex or len(image.shape) != 3 or image.shape[0] != channels:
            raise InvdiffError(
                f"This prior has {channels} real channel(s), and the problem's images are {image}; "
                "choose a prior that fits."
            )
        units = Scale(image, unit)
        pixels = Pad(units.prior, pair.multiple)
        inner = Latent(
            pair.codec.encode,
            pair.codec.decode,
            pixels.prior,
            scale=scale,
            shift=shift,
            network_range=(-1.0, 1.0),
            image_range=(0.0, 1.0),
        )
        return units @ pixels @ inner

    return make


def _per_channel(pair: LatentPair, card: Mapping[str, Any], key: str) -> Tensor:
    try:
        value = torch.tensor(card[key], dtype=torch.float32)
    except (KeyError, TypeError, ValueError, RuntimeError):
        value = torch.zeros(0)
    if value.shape != (pair.codec.latent,) or not bool(torch.isfinite(value).all()):
        raise InvdiffError(
            f"The card of {card.get('name')!r} needs {key}, one number for each of {pair.codec.latent} channels; "
            "fetch it again."
        )
    return value


@torch.no_grad()
def reference_errors(pair: LatentPair, card: Mapping[str, Any]) -> dict[str, Any]:
    """Code and denoise the magnitude of the first bundled slice, with fixed noise.

    Returns:
        Lists ``sigma`` and ``rmse``, in latents of unit spread, and ``reconstruction``, the RMSE of the slice that
        its latents decode to.
    """
    x = np.abs(held_out_slice(0)).astype(np.float32)
    ny, nx = (n - n % pair.multiple for n in x.shape)
    parameter = next(pair.parameters())
    clean = torch.from_numpy(x[:ny, :nx]).expand(1, pair.codec.channels, ny, nx).to(parameter)
    codec = codec_maker(pair, card)(Space(tuple(clean.shape[1:]), parameter.dtype), torch.tensor(1.0))
    codec = codec.to(parameter.device)
    z = codec.encode(clean)
    rng = np.random.default_rng(20240229)
    errors = []
    for sigma in SIGMAS:
        noise = torch.from_numpy(rng.standard_normal(tuple(z.shape), dtype=np.float32)).to(z)
        out = pair.denoiser(z + sigma * noise, torch.full((1,), sigma, device=z.device, dtype=z.dtype))
        errors.append(float((out - z).square().mean().sqrt()))
    lost = float((codec.decode(z) - clean).square().mean().sqrt())
    return {
        "sigma": list(SIGMAS),
        "rmse": [float(f"{e:.5g}") for e in errors],
        "reconstruction": float(f"{lost:.5g}"),
    }
