"""The two networks of a latent prior as one module, so that their weights are one file."""

from __future__ import annotations

from typing import Any

from torch import nn

from invdiff.networks.compact_autoencoder import CompactAutoencoder
from invdiff.networks.edm_unet import EDMUNet

__all__ = ["LatentPair"]


class LatentPair(nn.Module):
    """An autoencoder and the denoiser of its latents.

    Args:
        codec: The autoencoder.
        denoiser: Denoiser of latents that were shifted and scaled to unit spread.

    Raises:
        ValueError: The denoiser takes another number of channels than the latents have.
    """

    def __init__(self, codec: CompactAutoencoder, denoiser: EDMUNet) -> None:
        super().__init__()
        if denoiser.channels != codec.latent:
            raise ValueError(
                f"The denoiser takes {denoiser.channels} channels, and the latents have {codec.latent}; they do "
                "not belong together."
            )
        self.codec, self.denoiser = codec, denoiser

    @property
    def multiple(self) -> int:
        """Height and width of an image must be multiples of this number."""
        return self.codec.factor * self.denoiser.multiple

    def config(self) -> dict[str, Any]:
        """Plain description from which :meth:`from_config` builds the same networks."""
        return {"codec": self.codec.config(), "denoiser": self.denoiser.config()}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> LatentPair:
        """Build the networks from :meth:`config`.

        Raises:
            ValueError: A key is missing or unknown, or a value has the wrong type.
        """
        if set(config) != {"codec", "denoiser"} or not all(isinstance(v, dict) for v in config.values()):
            raise ValueError(f"A latent config has the tables codec and denoiser; found {sorted(config)}.")
        return cls(CompactAutoencoder.from_config(config["codec"]), EDMUNet.from_config(config["denoiser"]))
