"""A compact convolutional denoiser with EDM preconditioning.

The network stands on one formula (Karras et al., "Elucidating the Design Space of Diffusion-Based
Generative Models", NeurIPS 2022, section 5 and table 1):

    D(x, sigma) = c_skip(sigma) * x + c_out(sigma) * F(c_in(sigma) * x, c_noise(sigma))

    c_skip  = sigma_data^2 / (sigma^2 + sigma_data^2)
    c_out   = sigma * sigma_data / sqrt(sigma^2 + sigma_data^2)
    c_in    = 1 / sqrt(sigma^2 + sigma_data^2)
    c_noise = log(sigma) / 4

so that both the input and the regression target of the raw network F have unit variance at every
noise level. F is a U-Net without attention, which works on images of any size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["EDMUNet"]


class _ChannelNorm(nn.Module):
    """Layer norm over the channels of each pixel: y = (x - mean_c) / sqrt(var_c + eps).

    Statistics never mix pixels. A norm over whole images (group norm, instance norm) sees another
    mixture of head and background in a crop than in a slice, so a network trained on crops would
    change its answer on full images; this one does not.
    """

    def __init__(self, channels: int, affine: bool) -> None:
        super().__init__()
        self.channels = channels
        self.weight = nn.Parameter(torch.ones(channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(channels)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = functional.layer_norm(x, (self.channels,), self.weight, self.bias, 1e-5)
        return x.permute(0, 3, 1, 2)


class _Block(nn.Module):
    """Residual block: x + conv(silu(scale * norm(conv(silu(norm(x)))) + shift))."""

    def __init__(self, inputs: int, outputs: int, embedding: int) -> None:
        super().__init__()
        self.norm1 = _ChannelNorm(inputs, affine=True)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.modulate = nn.Linear(embedding, 2 * outputs)
        self.norm2 = _ChannelNorm(outputs, affine=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip: nn.Module = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)
        # A block starts as the identity, so depth costs nothing at the start of training.
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias if self.conv2.bias is not None else torch.empty(0))
        nn.init.zeros_(self.modulate.bias)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(functional.silu(self.norm1(x)))
        scale, shift = self.modulate(embedding)[:, :, None, None].chunk(2, dim=1)
        h = torch.addcmul(shift, self.norm2(h), 1 + scale)
        h = self.conv2(functional.silu(h))
        return self.skip(x) + h


class EDMUNet(nn.Module):
    """Denoiser D(x, sigma) = E[x0 | x0 + sigma * eps = x] as a preconditioned U-Net.

    D(x, sigma) = c_skip * x + c_out * F(c_in * x, log(sigma) / 4), coefficients in the module
    docstring. F takes the image apart into 2x2 pixel blocks (pixel unshuffle), runs residual
    blocks at ``len(widths)`` resolutions, and puts the blocks together again (pixel shuffle).

    Shapes:
        x: real ``(B, channels, H, W)`` with H and W multiples of :attr:`multiple`; sigma: ``(B,)``,
        positive, in the units of x; returns ``(B, channels, H, W)``.

    Args:
        channels: image channels (2 for complex images: real and imaginary part).
        widths: feature channels at 1/2, 1/4, 1/8, ... of the resolution.
        blocks: residual blocks per resolution, in the encoder and again in the decoder.
        embedding: width of the noise-level embedding.
        sigma_data: standard deviation of the training images per channel.
        classes: classes of images that :meth:`raw` takes; 0 for none.

    Raises:
        ValueError: a size that is not positive, or at call time an input of the wrong shape.

    Reference:
        Karras, Aittala, Aila, Laine, NeurIPS 2022 (arXiv:2206.00364).
    """

    frequencies: Tensor

    def __init__(
        self,
        channels: int = 2,
        widths: Sequence[int] = (64, 96, 128),
        blocks: int = 2,
        embedding: int = 128,
        sigma_data: float = 0.25,
        classes: int = 0,
    ) -> None:
        super().__init__()
        if channels < 1 or blocks < 1 or embedding < 2 or not widths or min(widths) < 1:
            raise ValueError(
                "EDMUNet needs positive channels, widths and blocks and an embedding of at least 2; "
                f"got channels={channels}, widths={list(widths)}, blocks={blocks}, embedding={embedding}."
            )
        if not (math.isfinite(sigma_data) and sigma_data > 0):
            raise ValueError(f"sigma_data must be a positive number; got {sigma_data}.")
        self.channels = int(channels)
        self.widths = tuple(int(w) for w in widths)
        self.blocks = int(blocks)
        self.embedding = int(embedding)
        self.sigma_data = float(sigma_data)

        # Frequencies from half a turn to 16 turns over c_noise in [-2, 2] resolve the noise level
        # to a few per cent without letting neighbouring levels decorrelate.
        frequencies = torch.logspace(math.log10(0.5), math.log10(16.0), embedding // 2)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.embed = nn.Sequential(
            nn.Linear(2 * (embedding // 2), embedding), nn.SiLU(), nn.Linear(embedding, embedding), nn.SiLU()
        )

        self.classify = nn.Linear(classes, embedding, bias=False) if classes else None

        self.inlet = nn.Conv2d(4 * channels, self.widths[0], 3, padding=1)
        self.encoder = nn.ModuleList()
        self.down = nn.ModuleList()
        self.decoder = nn.ModuleList()
        self.up = nn.ModuleList()
        for level, width in enumerate(self.widths):
            self.encoder.append(nn.ModuleList(_Block(width, width, embedding) for _ in range(blocks)))
            # The first decoder block of a level takes the upsampled features beside the skip.
            deepest = level == len(self.widths) - 1
            self.decoder.append(
                nn.ModuleList(
                    _Block(width if deepest or n else 2 * width, width, embedding) for n in range(blocks)
                )
            )
            if not deepest:
                deeper = self.widths[level + 1]
                self.down.append(nn.Conv2d(4 * width, deeper, 1))
                self.up.append(nn.Conv2d(deeper, 4 * width, 1))
        self.outlet_norm = _ChannelNorm(self.widths[0], affine=True)
        self.outlet = nn.Conv2d(self.widths[0], 4 * channels, 3, padding=1)
        nn.init.zeros_(self.outlet.weight)
        if self.outlet.bias is not None:
            nn.init.zeros_(self.outlet.bias)

    @property
    def multiple(self) -> int:
        """Height and width must be multiples of this number."""
        return int(2 ** len(self.widths))

    def config(self) -> dict[str, Any]:
        """Plain description from which :meth:`from_config` builds the same network."""
        return {
            "channels": self.channels,
            "widths": list(self.widths),
            "blocks": self.blocks,
            "embedding": self.embedding,
            "sigma_data": self.sigma_data,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> EDMUNet:
        """Build a network from :meth:`config`.

        Raises:
            ValueError: a key is unknown or a value has the wrong type.
        """
        known = {"channels", "widths", "blocks", "embedding", "sigma_data"}
        unknown = sorted(set(config) - known)
        if unknown:
            raise ValueError(f"Network config has unknown keys {unknown}; known are {sorted(known)}.")
        try:
            return cls(**config)
        except TypeError as error:
            raise ValueError(f"Network config has a value of the wrong type: {error}.") from None

    def _check(self, x: Tensor, sigma: Tensor) -> None:
        if x.ndim != 4 or x.shape[1] != self.channels or x.is_complex():
            raise ValueError(
                f"The network takes real images (B, {self.channels}, H, W); got {tuple(x.shape)} of {x.dtype}."
            )
        if x.shape[2] % self.multiple or x.shape[3] % self.multiple:
            raise ValueError(
                f"Height and width must be multiples of {self.multiple}; got {x.shape[2]}x{x.shape[3]}: "
                "pad the image first."
            )
        if sigma.shape != x.shape[:1]:
            raise ValueError(f"sigma must be ({x.shape[0]},), one value per image; got {tuple(sigma.shape)}.")

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Return D(x, sigma); shapes in the class docstring.

        Raises:
            ValueError: the shape of x or sigma does not fit.
        """
        self._check(x, sigma)
        s = sigma.to(x.dtype)[:, None, None, None]
        total = s.square() + self.sigma_data**2
        c_skip = self.sigma_data**2 / total
        c_out = s * self.sigma_data * total.rsqrt()
        raw = self.raw(x * total.rsqrt(), sigma.to(x.dtype).log() / 4)
        return c_skip * x + c_out * raw.to(x.dtype)

    def raw(self, x: Tensor, c_noise: Tensor, weights: Tensor | None = None) -> Tensor:
        """The network F itself, input and target of unit variance; weights ``(B, classes)`` of the classes."""
        angles = c_noise[:, None] * self.frequencies * math.pi
        e = self.embed(torch.cat([angles.cos(), angles.sin()], dim=1))
        if self.classify is not None and weights is not None:
            e = e + self.classify(weights)
        h = functional.pixel_unshuffle(x, 2)
        h = self.inlet(h.contiguous(memory_format=torch.channels_last))
        skips = []
        for level in range(len(self.widths)):
            for block in self._stage(self.encoder, level):
                h = block(h, e)
            if level < len(self.down):
                skips.append(h)
                h = self.down[level](functional.pixel_unshuffle(h, 2))
        for level in reversed(range(len(self.widths))):
            if level < len(self.up):
                h = functional.pixel_shuffle(self.up[level](h), 2)
                h = torch.cat([skips.pop(), h], dim=1).contiguous(memory_format=torch.channels_last)
            for block in self._stage(self.decoder, level):
                h = block(h, e)
        h = self.outlet(functional.silu(self.outlet_norm(h)))
        return functional.pixel_shuffle(h, 2)

    @staticmethod
    def _stage(stages: nn.ModuleList, level: int) -> nn.ModuleList:
        stage = stages[level]
        assert isinstance(stage, nn.ModuleList)
        return stage
