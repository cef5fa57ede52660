"""A small autoencoder for latent priors that run on a laptop: convolutions alone, at every size the same.

    encode: x -> pixel blocks -> residual blocks, level by level -> z,        decode: the same way back.

Published autoencoders (`invdiff.networks.autoencoder`) take statistics over whole images in every norm and attend
over all pixels in the middle, so that a value depends on the image everywhere, and on its size. This one takes
statistics over the channels of each pixel only: a latent sees the pixels around it, and an image of another size
is coded as its parts would be. It works on 2 x 2 blocks and coarser, which makes a decoder pass several times
cheaper; samplers take thousands of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["CompactAutoencoder"]


class _Norm(nn.Module):
    """``y = (x - mean_c) / sqrt(var_c + eps)`` over the channels of each pixel, times a weight, plus a bias."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class _Residual(nn.Module):
    """``x + conv2(silu(norm2(conv1(silu(norm1(x))))))``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = _Norm(width), _Norm(width)
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        nn.init.zeros_(self.conv2.weight)  # a block starts as the identity

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(functional.silu(self.norm2(self.conv1(functional.silu(self.norm1(x))))))


class CompactAutoencoder(nn.Module):
    """``encode``: ``(B, channels, H, W)`` to ``(B, latent, H / f, W / f)``, ``decode``: back; ``f = 2^levels``.

    Args:
        channels: Of the image.
        latent: Channels of the latents.
        widths: Feature channels at 1/2, 1/4, ... of the resolution.
        blocks: Residual blocks per level of the encoder; the decoder has one more.

    Raises:
        ValueError: A size is not positive, or at call time an image has the wrong shape.
    """

    def __init__(
        self, channels: int = 1, latent: int = 3, widths: Sequence[int] = (32, 64), blocks: int = 1
    ) -> None:
        super().__init__()
        if channels < 1 or latent < 1 or blocks < 1 or not widths or min(widths) < 1:
            raise ValueError(
                "CompactAutoencoder needs positive channels, latent, widths and blocks; "
                f"got {channels}, {latent}, {list(widths)}, {blocks}."
            )
        self.channels, self.latent, self.blocks = int(channels), int(latent), int(blocks)
        self.widths = tuple(int(w) for w in widths)
        first, last = self.widths[0], self.widths[-1]
        finer = list(zip(self.widths, self.widths[1:]))
        self.image_in = nn.Conv2d(4 * channels, first, 3, padding=1)
        self.down = nn.ModuleList(nn.Conv2d(4 * a, b, 1) for a, b in finer)
        self.encoder = nn.ModuleList(_stage(w, blocks) for w in self.widths)
        self.latent_norm = _Norm(last)
        self.latent_out = nn.Conv2d(last, latent, 3, padding=1)
        self.latent_in = nn.Conv2d(latent, last, 3, padding=1)
        self.up = nn.ModuleList(nn.Conv2d(b, 4 * a, 1) for a, b in finer)
        self.decoder = nn.ModuleList(_stage(w, blocks + 1) for w in self.widths)
        self.image_norm = _Norm(first)
        self.image_out = nn.Conv2d(first, 4 * channels, 3, padding=1)

    @property
    def factor(self) -> int:
        """Pixels per latent along each axis; height and width must be multiples of it."""
        return int(2 ** len(self.widths))

    def config(self) -> dict[str, Any]:
        """Plain description from which :meth:`from_config` builds the same network."""
        return {
            "channels": self.channels,
            "latent": self.latent,
            "widths": list(self.widths),
            "blocks": self.blocks,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> CompactAutoencoder:
        """Build a network from :meth:`config`.

        Raises:
            ValueError: A key is unknown or a value has the wrong type.
        """
        known = {"channels", "latent", "widths", "blocks"}
        if unknown := sorted(set(config) - known):
            raise ValueError(f"Codec config has unknown keys {unknown}; known are {sorted(known)}.")
        try:
            return cls(**config)
        except TypeError as error:
            raise ValueError(f"Codec config has a value of the wrong type: {error}.") from None

    def encode(self, x: Tensor) -> Tensor:
        """Return the latent of an image.

        Raises:
            ValueError: The shape does not fit.
        """
        if x.ndim != 4 or x.shape[1] != self.channels or x.shape[2] % self.factor or x.shape[3] % self.factor:
            raise ValueError(
                f"The codec takes images (B, {self.channels}, H, W), H and W multiples of {self.factor}; got "
                f"{tuple(x.shape)}: pad the image first."
            )
        h = functional.pixel_unshuffle(x, 2).contiguous(memory_format=torch.channels_last)
        h = self.encoder[0](self.image_in(h))
        for down, stage in zip(self.down, self.encoder[1:]):
            h = stage(down(functional.pixel_unshuffle(h, 2)))
        return self.latent_out(functional.silu(self.latent_norm(h)))

    def decode(self, z: Tensor) -> Tensor:
        """Return the image of a latent."""
        h = self.decoder[-1](self.latent_in(z.contiguous(memory_format=torch.channels_last)))
        for up, stage in zip(reversed(self.up), reversed(self.decoder[:-1])):
            h = stage(functional.pixel_shuffle(up(h), 2).contiguous(memory_format=torch.channels_last))
        h = self.image_out(functional.silu(self.image_norm(h)))
        return functional.pixel_shuffle(h, 2)


def _stage(width: int, blocks: int) -> nn.Sequential:
    return nn.Sequential(*(_Residual(width) for _ in range(blocks)))
