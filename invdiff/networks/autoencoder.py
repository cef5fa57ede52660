"""The autoencoders of latent diffusion (KL and VQ), with the names of their published weights.

``encode`` gives the mean of the latent's distribution (KL), or the latent before it is snapped to the codebook
(VQ); ``decode`` goes from latents, snapped or not, to images. Which latents the diffusion sees (scale, codebook)
is the codec's business: `invdiff.codec_latent.Latent`.

Rombach, Blattmann, Lorenz, Esser, Ommer, CVPR 2022, arXiv:2112.10752; Esser, Rombach, Ommer, CVPR 2021,
arXiv:2012.09841.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from invdiff.errors import InvdiffError

__all__ = ["Autoencoder"]


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class _Residual(nn.Module):
    """``x + conv2(silu(norm2(conv1(silu(norm1(x))))))``."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1 = _norm(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = _norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        if inputs != outputs:
            self.nin_shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(functional.silu(self.norm2(self.conv1(functional.silu(self.norm1(x))))))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class _Attention(nn.Module):
    """``x + proj_out(softmax(q^T k / sqrt(c)) v)`` over all pixels, one head."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        query, key, value = (part(h).flatten(2) for part in (self.q, self.k, self.v))
        weight = torch.einsum("bcq,bck->bqk", query, key / math.sqrt(x.shape[1]))
        weight = weight.to(torch.promote_types(x.dtype, torch.float32)).softmax(dim=-1).to(x.dtype)
        return x + self.proj_out(torch.einsum("bqk,bck->bcq", weight, value).reshape(x.shape))


class _Change(nn.Module):
    """Half the resolution by a strided convolution that looks right and down, or double it by repetition."""

    def __init__(self, channels: int, up: bool) -> None:
        super().__init__()
        self.up = up
        self.conv = nn.Conv2d(channels, channels, 3, stride=1 if up else 2, padding=1 if up else 0)

    def forward(self, x: Tensor) -> Tensor:
        if self.up:
            return self.conv(functional.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.conv(functional.pad(x, (0, 1, 0, 1)))


class _Level(nn.Module):
    """Residual blocks, with attention after each or after none, and a change of resolution."""

    def __init__(self, inputs: int, width: int, blocks: int, attends: bool, change: str | None) -> None:
        super().__init__()
        self.block = nn.ModuleList([_Residual(width if i else inputs, width) for i in range(blocks)])
        self.attn = nn.ModuleList([_Attention(width) for _ in range(blocks if attends else 0)])
        if change is not None:
            setattr(self, change, _Change(width, change == "upsample"))
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            x = self.attn[i](x) if len(self.attn) else x
        return x if self.change is None else getattr(self, self.change)(x)


class _Middle(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.block_1, self.attn_1, self.block_2 = (
            _Residual(width, width),
            _Attention(width),
            _Residual(width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class _Encoder(nn.Module):
    def __init__(
        self, inputs: int, outputs: int, inlet: int, widths: Sequence[int], blocks: int, attention: Sequence[int]
    ) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(inputs, inlet, 3, padding=1)
        before = [inlet, *widths[:-1]]
        last = len(widths) - 1
        self.down = nn.ModuleList(
            _Level(a, b, blocks, i in attention, "downsample" if i < last else None)
            for i, (a, b) in enumerate(zip(before, widths))
        )
        self.mid = _Middle(widths[-1])
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(functional.silu(self.norm_out(self.mid(x))))


class _Decoder(nn.Module):
    def __init__(
        self, inputs: int, outputs: int, widths: Sequence[int], blocks: int, attention: Sequence[int]
    ) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(inputs, widths[-1], 3, padding=1)
        self.mid = _Middle(widths[-1])
        before = [*widths[1:], widths[-1]]
        self.up = nn.ModuleList(
            _Level(a, b, blocks + 1, i in attention, "upsample" if i else None)
            for i, (a, b) in enumerate(zip(before, widths))
        )
        self.norm_out = _norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(functional.silu(self.norm_out(x)))


class _Quantize(nn.Module):
    def __init__(self, count: int, channels: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(count, channels)


class Autoencoder(nn.Module):
    """``encode``: ``(B, channels, H, W)`` to ``(B, latent, H / f, W / f)``, ``decode``: back.

    Args:
        channels: Of the image.
        inner: Channels at the ends of encoder and decoder, before and after the 1 x 1 convolutions.
        latent: Channels of the latents.
        inlet: Channels after the first convolution.
        widths: Channels of the levels, full resolution first.
        blocks: Residual blocks per level of the encoder; the decoder has one more.
        attention: Levels with attention; the middle has it anyway.
        codes: Entries of the codebook; 0 for KL autoencoders, whose encoder gives mean and log variance.
    """

    def __init__(
        self,
        *,
        channels: int,
        inner: int,
        latent: int,
        inlet: int,
        widths: Sequence[int],
        blocks: int,
        attention: Sequence[int],
        codes: int,
    ) -> None:
        super().__init__()
        twice = 1 if codes else 2
        self.latent, self.channels = latent, channels
        #: Pixels per latent along each axis.
        self.factor = 1 << (len(widths) - 1)
        self.encoder = _Encoder(channels, twice * inner, inlet, widths, blocks, attention)
        self.decoder = _Decoder(inner, channels, widths, blocks, attention)
        self.quant_conv = nn.Conv2d(twice * inner, twice * latent, 1)
        self.post_quant_conv = nn.Conv2d(latent, inner, 1)
        if codes:
            self.quantize = _Quantize(codes, latent)

    @property
    def codebook(self) -> Tensor | None:
        """Entries ``(K, latent)`` to which latents are snapped, or None."""
        return self.quantize.embedding.weight if hasattr(self, "quantize") else None

    def encode(self, x: Tensor) -> Tensor:
        """Return the mean of the latent, or the latent before it is snapped."""
        out: Tensor = self.quant_conv(self.encoder(x))[:, : self.latent]
        return out

    def decode(self, z: Tensor) -> Tensor:
        """Return the image of a latent."""
        out: Tensor = self.decoder(self.post_quant_conv(z))
        return out

    @staticmethod
    def layout(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """Return the arguments of the autoencoder that has weights of these names and shapes.

        Raises:
            InvdiffError: If none has.
        """
        levels = {int(m[1]) for k in shapes if (m := re.match(r"encoder\.down\.(\d{1,2})\.block\.", k))}
        try:
            inlet, channels = shapes["encoder.conv_in.weight"][:2]
            inner, latent = shapes["post_quant_conv.weight"][:2]
            codebook = shapes.get("quantize.embedding.weight")
            return {
                "channels": channels,
                "inner": inner,
                "latent": latent,
                "inlet": inlet,
                "widths": [shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in range(len(levels))],
                "blocks": sum(
                    bool(re.fullmatch(r"encoder\.down\.0\.block\.\d+\.conv1\.weight", k)) for k in shapes
                ),
                "attention": [i for i in sorted(levels) if f"encoder.down.{i}.attn.0.q.weight" in shapes],
                "codes": 0 if codebook is None else codebook[0],
            }
        except (KeyError, IndexError, ValueError) as error:
            raise InvdiffError(
                f"The weights are not those of an autoencoder of latent diffusion: {error} is missing or has the "
                "wrong number of axes."
            ) from None
