"""The U-Net with attention of guided diffusion (ADM), with the names of its published weights.

``eps(z, t)``, with twice the channels where a variance was learned. Residual blocks take the embedded time as
scale and shift after their second norm (``norm(h) (1 + scale) + shift``) or as an added vector; attention over all
pixels follows them at some levels and in the middle.

Dhariwal, Nichol, NeurIPS 2021, arXiv:2105.05233; Nichol, Dhariwal, ICML 2021, arXiv:2102.09672.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from invdiff.errors import InvdiffError

__all__ = ["ADM", "ADMConfig", "infer_config"]

_GROUPS = 32
_SLOWEST = 1e4


@dataclass(frozen=True, kw_only=True)
class ADMConfig:
    """What fixes the network; all but ``heads``, ``head_channels`` and ``qkv`` follow from the weights' shapes.

    Args:
        inputs: Channels of the image.
        outputs: Channels of the output.
        width: Channels that ``multipliers`` multiply; also the size of the embedding of time.
        multipliers: Channels of each level, in ``width``.
        blocks: Residual blocks per level on the way down (one more on the way up).
        attention: Levels with attention, 0 for full resolution.
        classes: Number of classes, or None.
        scale_shift: Time as scale and shift, else added.
        resample: ``"block"`` (residual blocks that resample) or ``"conv"``.
        head_channels: Channels of one head.
        heads: Number of heads at every level, where ``head_channels`` is None.
        qkv: Order of the rows of ``qkv.weight``: ``"legacy"`` (for each head q, k, v) or ``"new"`` (q of all
            heads, then k, then v).
    """

    inputs: int
    outputs: int
    width: int
    multipliers: tuple[float, ...]
    blocks: int
    attention: tuple[int, ...] = ()
    classes: int | None = None
    scale_shift: bool = True
    resample: str = "block"
    head_channels: int | None = 64
    heads: int = 1
    qkv: str = "legacy"

    def heads_of(self, channels: int) -> int:
        """Return the number of heads of an attention over ``channels``.

        Raises:
            InvdiffError: If they do not divide.
        """
        heads = self.heads if self.head_channels is None else channels // self.head_channels
        if heads < 1 or channels % heads or (self.head_channels and channels % self.head_channels):
            said = f"heads={self.heads}" if self.head_channels is None else f"head_channels={self.head_channels}"
            raise InvdiffError(f"{said} does not divide the {channels} channels of an attention of this network.")
        return heads


class _Norm(nn.GroupNorm):
    """Norm of 32 groups of channels, in float32 at least."""

    def __init__(self, channels: int) -> None:
        super().__init__(_GROUPS, channels)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype not in (torch.float16, torch.bfloat16):
            return super().forward(x)
        weight, bias = self.weight.float(), self.bias.float()
        return functional.group_norm(x.float(), self.num_groups, weight, bias, self.eps).to(x.dtype)


def _half(x: Tensor) -> Tensor:
    return functional.avg_pool2d(x, 2)


def _double(x: Tensor) -> Tensor:
    return functional.interpolate(x, scale_factor=2, mode="nearest")


class _Residual(nn.Module):
    """``skip(r x) + conv(silu(mod(norm(conv(r silu(norm(x)))))))``, ``r`` the resampling, ``mod`` by time."""

    def __init__(
        self, inputs: int, outputs: int, embedding: int, scale_shift: bool, resample: str | None = None
    ) -> None:
        super().__init__()
        self.scale_shift, self.resample = scale_shift, resample
        self.in_layers = nn.Sequential(_Norm(inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, (1 + scale_shift) * outputs))
        # The published third layer is dropout.
        last = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.out_layers = nn.Sequential(_Norm(outputs), nn.SiLU(), nn.Identity(), last)
        self.skip_connection = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        norm, act, conv = self.in_layers
        h = act(norm(x))
        if self.resample is not None:
            change = _half if self.resample == "down" else _double
            h, x = change(h), change(x)
        h, time = conv(h), self.emb_layers(e)[:, :, None, None]
        norm, act, _, conv = self.out_layers
        if self.scale_shift:
            scale, shift = time.chunk(2, dim=1)
            h = norm(h) * (1 + scale) + shift
        else:
            h = norm(h + time)
        return self.skip_connection(x) + conv(act(h))


class _Attention(nn.Module):
    """``x + proj(softmax(q^T k / sqrt(c)) v)`` over all pixels, with ``c`` channels per head."""

    def __init__(self, channels: int, heads: int, qkv: str) -> None:
        super().__init__()
        self.heads, self.order = heads, qkv
        self.norm = _Norm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        batch, channels, *size = x.shape
        flat = x.reshape(batch, channels, -1)
        rows = self.qkv(self.norm(flat))
        each = channels // self.heads
        if self.order == "legacy":
            q, k, v = rows.reshape(batch, self.heads, 3, each, -1).unbind(2)
        else:
            q, k, v = rows.reshape(batch, 3, self.heads, each, -1).unbind(1)
        # Written out, as fused attention has no second derivatives; both factors scaled, for half precision.
        root = each**-0.25
        weights = torch.einsum("bhcs,bhct->bhst", q * root, k * root)
        weights = weights.softmax(-1, dtype=torch.promote_types(x.dtype, torch.float32)).to(x.dtype)
        h = torch.einsum("bhst,bhct->bhcs", weights, v).reshape(batch, channels, -1)
        return (flat + self.proj_out(h)).reshape(batch, channels, *size)


class _Down(nn.Module):
    """Convolution of stride two."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        return self.op(x)


class _Up(nn.Module):
    """Pixels twice, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        return self.conv(_double(x))


class _Inlet(nn.Conv2d):
    """The first convolution, called like a block."""

    def forward(self, x: Tensor, e: Tensor | None = None) -> Tensor:
        return super().forward(x)


class ADM(nn.Module):
    """The network; see the module.

    Shapes:
        z: ``(B, inputs, y, x)``, sizes multiples of :attr:`multiple`; time: ``(B,)``, steps or fractions of them;
        label: ``(B,)`` int64 where there are classes; returns ``(B, outputs, y, x)``.

    Args:
        config: Sizes.

    Raises:
        InvdiffError: If sizes do not fit each other, or a label is missing, superfluous or out of range.
    """

    def __init__(self, config: ADMConfig) -> None:
        super().__init__()
        c = self.config = config
        if c.qkv not in ("legacy", "new"):
            raise InvdiffError(f"qkv is the order of attention weights, 'legacy' or 'new', got {c.qkv!r}.")
        embedding = 4 * c.width
        widths = [int(c.width * m) for m in c.multipliers]
        self.time_embed = nn.Sequential(nn.Linear(c.width, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        if c.classes is not None:
            self.label_emb = nn.Embedding(c.classes, embedding)

        def block(level: int, inputs: int) -> list[nn.Module]:
            parts: list[nn.Module] = [_Residual(inputs, widths[level], embedding, c.scale_shift)]
            return parts + ([self._attention(widths[level])] if level in c.attention else [])

        def resampled(width: int, way: str) -> nn.Module:
            if c.resample == "block":
                return _Residual(width, width, embedding, c.scale_shift, way)
            return _Down(width) if way == "down" else _Up(width)

        inlet: list[nn.Module] = [_Inlet(c.inputs, widths[0], 3, padding=1)]
        down, skips, width = [inlet], [widths[0]], widths[0]
        for level in range(len(widths)):
            for _ in range(c.blocks):
                down.append(block(level, width))
                width = widths[level]
                skips.append(width)
            if level < len(widths) - 1:
                down.append([resampled(width, "down")])
                skips.append(width)
        middle = [
            _Residual(width, width, embedding, c.scale_shift),
            self._attention(width),
            _Residual(width, width, embedding, c.scale_shift),
        ]
        up = []
        for level in reversed(range(len(widths))):
            for i in range(c.blocks + 1):
                up.append(block(level, width + skips.pop()))
                width = widths[level]
                if level and i == c.blocks:
                    up[-1].append(resampled(width, "up"))
        self.input_blocks = nn.ModuleList(nn.ModuleList(parts) for parts in down)
        self.middle_block = nn.ModuleList(middle)
        self.output_blocks = nn.ModuleList(nn.ModuleList(parts) for parts in up)
        self.out = nn.Sequential(_Norm(width), nn.SiLU(), nn.Conv2d(width, c.outputs, 3, padding=1))

    def _attention(self, channels: int) -> nn.Module:
        return _Attention(channels, self.config.heads_of(channels), self.config.qkv)

    @property
    def multiple(self) -> int:
        """Height and width must be multiples of this number."""
        return int(2 ** (len(self.config.multipliers) - 1))

    def forward(self, z: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        """Return the raw output, ``(B, outputs, y, x)``."""
        if z.shape[-2] % self.multiple or z.shape[-1] % self.multiple:
            raise InvdiffError(
                f"Height and width must be multiples of {self.multiple}, got {z.shape[-2]} x {z.shape[-1]}; pad "
                "the image first."
            )
        e = self.time_embed(_waves(time, self.config.width).to(z.dtype))
        e = e if self.config.classes is None else e + self.label_emb(self._label(label))
        h, skips = z, []
        for parts in self.input_blocks:
            h = _through(parts, h, e)
            skips.append(h)
        h = _through(self.middle_block, h, e)
        for parts in self.output_blocks:
            h = _through(parts, torch.cat([h, skips.pop()], dim=1), e)
        return self.out(h)

    def _label(self, label: Tensor | None) -> Tensor:
        if label is None:
            raise InvdiffError("This network was trained with a class for every image; give label.")
        assert self.config.classes is not None
        if label.is_floating_point() or not bool(((label >= 0) & (label < self.config.classes)).all()):
            raise InvdiffError(f"label must hold whole numbers from 0 to {self.config.classes - 1}.")
        return label.long()


def _through(parts: Any, h: Tensor, e: Tensor) -> Tensor:
    for part in parts:
        h = part(h, e)
    return h


def _waves(time: Tensor, size: int) -> Tensor:
    """Cosines then sines of time at frequencies from 1 down to almost 1e-4, at least float32."""
    half = size // 2
    kind = torch.promote_types(time.dtype, torch.float32) if time.is_floating_point() else torch.float32
    order = torch.arange(half, device=time.device, dtype=torch.float32)
    rates = torch.exp(-math.log(_SLOWEST) / half * order).to(kind)
    angles = time.to(kind)[:, None] * rates
    waves = torch.cat([angles.cos(), angles.sin()], dim=1)
    return functional.pad(waves, (0, size % 2))


def infer_config(shapes: Mapping[str, tuple[int, ...]], **declared: Any) -> ADMConfig:
    """Read the sizes of a network off the names and shapes of its weights.

    Args:
        shapes: Shape of every weight.
        declared: What shapes cannot tell: ``heads`` or ``head_channels``, and ``qkv``.

    Raises:
        InvdiffError: If they are no weights of this architecture.
    """
    try:
        width = shapes["time_embed.0.weight"][1]
        first, inputs = shapes["input_blocks.0.0.weight"][:2]
        outputs = shapes["out.2.weight"][0]
        ups = _ups(shapes)
        count = 1 + max(int(k.split(".")[1]) for k in shapes if k.startswith("output_blocks."))
        blocks = ups[0] if ups else count - 1
        per_level = blocks + 1
        levels = count // per_level
        attention, widths = [], []
        for level in range(levels):
            place = f"input_blocks.{1 + level * per_level}"
            widths.append(shapes[f"{place}.0.in_layers.2.weight"][0])
            if f"{place}.1.qkv.weight" in shapes:
                attention.append(level)
        spread = shapes["input_blocks.1.0.emb_layers.1.weight"][0]
    except (KeyError, IndexError, ValueError):
        raise InvdiffError(
            "The weights have the names of the U-Net of guided diffusion in part only; it must have residual "
            "blocks, and resampling by blocks or convolutions."
        ) from None
    if widths[0] != first or count != levels * per_level or spread not in (widths[0], 2 * widths[0]):
        raise InvdiffError("The weights have the names of the U-Net of guided diffusion, but not its sizes.")
    return ADMConfig(
        inputs=inputs,
        outputs=outputs,
        width=width,
        multipliers=tuple(w / width for w in widths),
        blocks=blocks,
        attention=tuple(attention),
        classes=shapes["label_emb.weight"][0] if "label_emb.weight" in shapes else None,
        scale_shift=spread == 2 * widths[0],
        resample="conv" if any(k.endswith(".op.weight") for k in shapes) else "block",
        **declared,
    )


def _ups(shapes: Mapping[str, tuple[int, ...]]) -> list[int]:
    """Blocks of the way up that end in a resampling: a second residual block, or a convolution of its own."""
    found = set()
    for key in shapes:
        parts = key.split(".")
        if parts[0] == "output_blocks" and parts[2] != "0" and parts[3] in ("in_layers", "conv"):
            found.add(int(parts[1]))
    return sorted(found)
