"""A transformer on patches of an image, whose layers are modulated by noise level and class.

    h <- h + g1 * attention(s1 * norm(h) + b1),    h <- h + g2 * mlp(s2 * norm(h) + b2)

with ``(s - 1, b, g)`` linear in the embedding of noise level and class, and zero at first, so that every block
starts as the identity. Attention knows places by rotations of its queries and keys in the two directions of the
image, so that only differences of places count: crops have no place of their own, and images of sizes other than
in training are taken, though not learned.

Peebles, Xie, ICCV 2023, arXiv:2212.09748 (adaLN-zero); Su et al., arXiv:2104.09864 (rotations).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from invdiff.errors import InvdiffError

__all__ = ["Transformer"]

#: Wave lengths of the rotations reach from 2 pi to 2 pi times this, in patches.
_LONGEST = 100.0


class _Norm(nn.Module):
    """Layer norm over the features of a token, then ``scale`` and ``shift`` from outside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, h: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return functional.layer_norm(h, (self.width,), eps=1e-6) * (1 + scale) + shift


class _Block(nn.Module):
    """Attention and a two-layer network, each added to what comes in."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = _Norm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
        )
        self.modulate = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulate.weight)
        nn.init.zeros_(self.modulate.bias)

    def forward(self, h: Tensor, e: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        s1, b1, g1, s2, b2, g2 = self.modulate(e)[:, None].chunk(6, dim=-1)
        h = h + g1 * self._attention(self.norm(h, s1, b1), turn)
        return h + g2 * self.mlp(self.norm(h, s2, b2))

    def _attention(self, h: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        b, n, width = h.shape
        q, k, v = self.qkv(h).reshape(b, n, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        q, k = _turned(q, turn), _turned(k, turn)
        if self.training or not torch.is_grad_enabled():
            out = functional.scaled_dot_product_attention(q, k, v)
        else:
            # Fused attention has no second derivatives, which some samplers take of a loaded prior.
            weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
            out = weights @ v
        return self.project(out.transpose(1, 2).reshape(b, n, width))


def _turned(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate pairs of features (first half, second half) by the angles of their token."""
    cos, sin = (t.to(x.dtype) for t in turn)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


class Transformer(nn.Module):
    """``F(u, c)``, ``u`` ``(B, channels, H, W)`` of about unit variance, ``c`` ``(B,)``, about -2 to 2.

    Args:
        channels: Image channels, of input and output.
        width: Features of a token.
        blocks: Layers.
        head_channels: Features of one head of attention, a multiple of 4 that divides ``width``.
        patch: Height and width of a patch, which becomes one token.
        embedding: Features of ``c``.
        classes: Classes; 0 where the network has none.

    Raises:
        InvdiffError: If a size is not positive or the heads do not divide the width.
    """

    frequencies: Tensor

    def __init__(
        self,
        *,
        channels: int,
        width: int,
        blocks: int,
        head_channels: int,
        patch: int,
        embedding: int,
        classes: int = 0,
    ) -> None:
        super().__init__()
        if min(channels, width, blocks, head_channels, patch) < 1 or embedding < 2 or classes < 0:
            raise InvdiffError(
                f"A transformer has positive sizes, got {channels} channels, width {width}, {blocks} blocks, "
                f"head_channels {head_channels}, patch {patch}, embedding {embedding}."
            )
        if head_channels % 4 or width % head_channels:
            raise InvdiffError(
                f"head_channels must be a multiple of 4 that divides the width {width}, got {head_channels}."
            )
        self.patch, self.head_channels = patch, head_channels
        # As in EDMUNet: from half a turn to 16 turns over c in [-2, 2].
        frequencies = torch.logspace(math.log10(0.5), math.log10(16.0), embedding // 2)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.embed = nn.Sequential(nn.Linear(2 * (embedding // 2), width), nn.SiLU(), nn.Linear(width, width))
        self.classify = nn.Linear(classes, width, bias=False) if classes else None
        self.inlet = nn.Conv2d(channels, width, patch, stride=patch)
        self.blocks = nn.ModuleList(_Block(width, width // head_channels) for _ in range(blocks))
        self.norm = _Norm(width)
        self.modulate = nn.Linear(width, 2 * width)
        self.outlet = nn.Linear(width, channels * patch**2)
        for layer in (self.modulate, self.outlet):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    @property
    def multiple(self) -> int:
        """Height and width must be multiples of this number."""
        return self.patch

    def forward(self, u: Tensor, c: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return ``F``; ``weights`` of the classes, ``(B, classes)``, are zero for no class."""
        angles = c[:, None] * self.frequencies.to(c.dtype) * math.pi
        e = self.embed(torch.cat([angles.cos(), angles.sin()], dim=1).to(u.dtype))
        if self.classify is not None and weights is not None:
            e = e + self.classify(weights)
        e = functional.silu(e)
        h = self.inlet(u)
        height, width = h.shape[-2:]
        h, turn = h.flatten(2).transpose(1, 2), self._rotations(height, width, u.device)
        for block in self.blocks:
            h = block(h, e, turn)
        scale, shift = self.modulate(e)[:, None].chunk(2, dim=-1)
        out = self.outlet(self.norm(h, scale, shift)).transpose(1, 2)
        return functional.pixel_shuffle(out.unflatten(2, (height, width)), self.patch)

    def _rotations(self, height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``(H W, head_channels / 2)``: half of the angles by row, half by column."""
        count = self.head_channels // 4
        rates = _LONGEST ** (-torch.arange(count, device=device, dtype=torch.float32) / count)
        rows = torch.arange(height, device=device, dtype=torch.float32)[:, None] * rates
        columns = torch.arange(width, device=device, dtype=torch.float32)[:, None] * rates
        angles = torch.cat(
            [rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)], dim=-1
        ).reshape(height * width, 2 * count)
        return angles.cos(), angles.sin()
