"""Building blocks of the U-Nets that EDM trains: resampling convolutions, embeddings, residual blocks, the U.

Names of parameters and buffers are those of the published weights, so that these load by name. Everything can be
differentiated any number of times: no in-place sums, attention by plain matrix products.

Karras, Aittala, Aila, Laine, NeurIPS 2022, arXiv:2206.00364, appendix C; the blocks are those of Song et al., ICLR
2021, arXiv:2011.13456, and Dhariwal, Nichol, NeurIPS 2021, arXiv:2105.05233.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from invdiff.errors import InvdiffError

__all__ = [
    "Block",
    "Conv",
    "Fourier",
    "GroupNorm",
    "Positional",
    "Precise",
    "Resample",
    "UNet",
    "class_weights",
    "common_layout",
]


def _filter(taps: Sequence[float]) -> Tensor:
    """Return the separable filter of these taps with sum 1, ``(1, 1, k, k)``."""
    # In plain numbers: a network that is built without memory would load torch's decompositions for seconds.
    total = float(sum(taps)) ** 2
    return torch.tensor([[[[a * b / total for b in taps] for a in taps]]])


def halve(x: Tensor, taps: Tensor, padding: int) -> Tensor:
    """Filter each channel and keep every second pixel."""
    c = x.shape[1]
    return functional.conv2d(x, taps.to(x).expand(c, 1, -1, -1), stride=2, padding=padding, groups=c)


def double(x: Tensor, taps: Tensor, padding: int) -> Tensor:
    """Put zeros between the pixels and filter each channel; a constant stays what it is."""
    c = x.shape[1]
    return functional.conv_transpose2d(x, 4 * taps.to(x).expand(c, 1, -1, -1), stride=2, padding=padding, groups=c)


class Resample(nn.Module):
    """Half or double the resolution by a fixed filter, channel by channel.

    Args:
        taps: Filter along one axis, e.g. ``(1, 1)`` or ``(1, 3, 3, 1)``; normalised here.
        up: Double instead of half.
    """

    resample_filter: Tensor

    def __init__(self, taps: Sequence[float], up: bool) -> None:
        super().__init__()
        self.up = up
        self.register_buffer("resample_filter", _filter(taps))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(B, C, H / 2, W / 2)`` or ``(B, C, 2 H, 2 W)``."""
        padding = (self.resample_filter.shape[-1] - 1) // 2
        return (double if self.up else halve)(x, self.resample_filter, padding)


class Conv(nn.Conv2d):
    """Convolution that keeps the size, after an optional change of resolution.

    Args:
        inputs, outputs: Channels.
        kernel: Odd width of the kernel.
        taps: Filter of the change of resolution.
        up, down: Which change, if any.
        fused: Filter after the convolution instead of before (for ``down``); the edge is then padded once.
    """

    resample_filter: Tensor

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        *,
        taps: Sequence[float] = (1, 1),
        up: bool = False,
        down: bool = False,
        fused: bool = False,
    ) -> None:
        super().__init__(inputs, outputs, kernel, padding=kernel // 2)
        self.up, self.down, self.fused = up, down, fused
        if up or down:
            self.register_buffer("resample_filter", _filter(taps))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(B, outputs, H', W')``."""
        if not (self.up or self.down):
            return super().forward(x)
        margin = (self.resample_filter.shape[-1] - 1) // 2
        if self.fused:
            x = functional.conv2d(x, self.weight, padding=self.weight.shape[-1] // 2 + margin)
            x = halve(x, self.resample_filter, 0)
            return x if self.bias is None else x + self.bias[:, None, None]
        return super().forward((double if self.up else halve)(x, self.resample_filter, margin))


class GroupNorm(nn.GroupNorm):
    """Group norm of at most 32 groups with at least 4 channels each."""

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__(max(1, min(32, channels // 4)), channels, eps)


class Positional(nn.Module):
    """``[cos(t w_k), sin(t w_k)]`` with ``w_k = 10000^(-k / (n - e))``, ``n`` half the channels.

    Args:
        channels: Even number of features.
        endpoint: Whether the slowest frequency is 1 / 10000 (``e = 1``) or the next one would be (``e = 0``).
    """

    def __init__(self, channels: int, endpoint: bool) -> None:
        super().__init__()
        self.count, self.endpoint = channels // 2, endpoint

    def forward(self, time: Tensor) -> Tensor:
        """Return ``(B, channels)``."""
        k = torch.arange(self.count, dtype=time.dtype, device=time.device)
        angle = torch.outer(time, 10000.0 ** -(k / (self.count - self.endpoint)))
        return torch.cat([angle.cos(), angle.sin()], dim=1)


class Precise(nn.Module):
    """A module whose numbers keep float32 where a network turns to half precision.

    Random frequencies reach 50, so that half precision would put an angle of hundreds off by a radian.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Precise:
        def keep(t: Tensor) -> Tensor:
            new = fn(t)
            lost = new.is_floating_point() and new.dtype.itemsize < 4 <= t.dtype.itemsize
            return t.to(new.device) if lost else new

        super()._apply(keep, recurse)
        return self


class Fourier(Precise):
    """``[cos(2 pi t f_k), sin(2 pi t f_k)]`` with random frequencies, which are part of the weights."""

    freqs: Tensor

    def __init__(self, channels: int, scale: float = 16.0) -> None:
        super().__init__()
        self.register_buffer("freqs", torch.empty(channels // 2).normal_(std=scale))

    def forward(self, time: Tensor) -> Tensor:
        """Return ``(B, channels)``."""
        angle = torch.outer(time, 2 * math.pi * self.freqs.to(time.dtype))
        return torch.cat([angle.cos(), angle.sin()], dim=1)


class Block(nn.Module):
    """Residual block: ``h = conv1(silu(norm1(conv0(silu(norm0(x))) + a)))``, out ``s (skip(x) + h)``, attention.

    Args:
        inputs, outputs: Channels.
        embedding: Width of the embedding of time, from which ``a`` is made.
        heads: Heads of self-attention; 0 for none.
        up, down: Change of resolution, in ``conv0`` and ``skip``.
        taps: Filter of that change.
        scaled: ``a`` scales and shifts what ``norm1`` gives, instead of being added before it.
        project: ``skip`` has a 1 x 1 convolution wherever the resolution changes.
        skip_scale: ``s``, after the residual and after the attention.
        eps: Of the norms.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        embedding: int,
        *,
        heads: int = 0,
        up: bool = False,
        down: bool = False,
        taps: Sequence[float] = (1, 1),
        scaled: bool,
        project: bool,
        skip_scale: float,
        eps: float,
    ) -> None:
        super().__init__()
        self.inputs, self.heads, self.scaled, self.skip_scale = inputs, heads, scaled, skip_scale
        self.norm0 = GroupNorm(inputs, eps)
        self.conv0 = Conv(inputs, outputs, 3, taps=taps, up=up, down=down)
        self.affine = nn.Linear(embedding, 2 * outputs if scaled else outputs)
        self.norm1 = GroupNorm(outputs, eps)
        self.conv1 = Conv(outputs, outputs, 3)
        self.skip: nn.Module | None = None
        if inputs != outputs or (project and (up or down)):
            self.skip = Conv(inputs, outputs, 1, taps=taps, up=up, down=down)
        elif up or down:
            self.skip = Resample(taps, up)
        if heads:
            self.norm2 = GroupNorm(outputs, eps)
            self.qkv = Conv(outputs, 3 * outputs, 1)
            self.proj = Conv(outputs, outputs, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Return ``(B, outputs, H', W')``."""
        h = self.conv0(functional.silu(self.norm0(x)))
        a = self.affine(embedding)[:, :, None, None]
        if self.scaled:
            scale, shift = a.chunk(2, dim=1)
            h = shift + self.norm1(h) * (1 + scale)
        else:
            h = self.norm1(h + a)
        h = self.conv1(functional.silu(h))
        x = self.skip_scale * (h + (x if self.skip is None else self.skip(x)))
        return self.skip_scale * (x + self._attention(x)) if self.heads else x

    def _attention(self, x: Tensor) -> Tensor:
        """Self-attention over pixels; channels of ``qkv`` count head, feature, (query, key, value)."""
        b, c, height, width = x.shape
        qkv = self.qkv(self.norm2(x)).reshape(b, self.heads, c // self.heads, 3, height * width)
        query, key, value = qkv.unbind(3)
        # Exponentials leave the range of half precision.
        weight = torch.einsum("bhcq,bhck->bhqk", query, key / math.sqrt(key.shape[2]))
        weight = weight.to(torch.promote_types(x.dtype, torch.float32)).softmax(dim=-1).to(x.dtype)
        return self.proj(torch.einsum("bhqk,bhck->bhcq", weight, value).reshape(b, c, height, width))


class UNet(nn.Module):
    """What the two U-Nets share: an encoder that leaves a trace after every module, a decoder that takes it up.

    Args:
        inputs, outputs: Channels of the image, and of the prediction.
        resolution: Size of the training images; it is part of the names, and any other size works too.
        inlet: Channels after the first convolution.
        widths: Channels of each level, full resolution first.
        blocks: Residual blocks per level in the encoder; the decoder has one more.
        attention: Resolutions whose blocks have attention; the bottleneck has it anyway.
        embedding: Width of the embedding of time.
        options: Further options of every `Block`.

    Raises:
        InvdiffError: If a size is not positive, or the levels do not divide the resolution.
    """

    #: Whether every block of the decoder has attention where the level has, or the last alone.
    attention_in_every_block: bool
    #: Channels per head of attention; None for a single head.
    head_channels: int | None

    def __init__(
        self,
        *,
        inputs: int,
        outputs: int,
        resolution: int,
        inlet: int,
        widths: Sequence[int],
        blocks: int,
        attention: Sequence[int],
        embedding: int,
        residual: bool = False,
        taps: Sequence[float] = (1, 1),
        **options: Any,
    ) -> None:
        super().__init__()
        if min(inputs, outputs, resolution, inlet, blocks, embedding, *widths, 1) < 1 or not widths:
            raise InvdiffError(
                f"A U-Net has positive sizes, got {inputs} inputs, {outputs} outputs, resolution {resolution}, "
                f"widths {inlet}, {list(widths)}, {blocks} blocks, embedding {embedding}."
            )
        if not resolution >> (len(widths) - 1):
            raise InvdiffError(f"{len(widths)} levels are too many for images of {resolution} pixels.")
        self.inputs, self.outputs, self.resolution = inputs, outputs, resolution
        #: Height and width must be multiples of this.
        self.multiple = 1 << (len(widths) - 1)
        options |= {"taps": taps}

        def block(n: int, m: int, attends: bool = False, **more: Any) -> Block:
            heads = 0 if not attends else 1 if self.head_channels is None else m // self.head_channels
            return Block(n, m, embedding, heads=heads, **options, **more)

        sizes = [resolution >> level for level in range(len(widths))]
        self.enc = nn.ModuleDict({f"{sizes[0]}x{sizes[0]}_conv": Conv(inputs, inlet, 3)})
        now, pyramid = inlet, inputs
        traces = [inlet]
        for size, width in zip(sizes, widths):
            if size != sizes[0]:
                self.enc[f"{size}x{size}_down"] = block(now, now, down=True)
                traces.append(now)
                if residual:
                    self.enc[f"{size}x{size}_aux_residual"] = Conv(
                        pyramid, now, 3, taps=taps, down=True, fused=True
                    )
                    pyramid = now
            for i in range(blocks):
                self.enc[f"{size}x{size}_block{i}"] = block(now, width, size in attention)
                now = width
                traces.append(now)
        self.dec = nn.ModuleDict()
        for size, width in reversed(list(zip(sizes, widths))):
            if size == sizes[-1]:
                self.dec[f"{size}x{size}_in0"] = block(now, now, True)
                self.dec[f"{size}x{size}_in1"] = block(now, now)
            else:
                self.dec[f"{size}x{size}_up"] = block(now, now, up=True)
            for i in range(blocks + 1):
                attends = size in attention and (self.attention_in_every_block or i == blocks)
                self.dec[f"{size}x{size}_block{i}"] = block(now + traces.pop(), width, attends)
                now = width

    def _run(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Return the features after the last block of the decoder, ``(B, widths[0], H, W)``."""
        if x.shape[1] != self.inputs or x.shape[2] % self.multiple or x.shape[3] % self.multiple:
            raise InvdiffError(
                f"The network takes images (B, {self.inputs}, H, W), H and W multiples of {self.multiple}, got "
                f"{tuple(x.shape)}."
            )
        pyramid = x
        traces: list[Tensor] = []
        for name, module in self.enc.items():
            if name.endswith("aux_residual"):
                x = traces[-1] = pyramid = (x + module(pyramid)) * math.sqrt(0.5)
                continue
            x = module(x, embedding) if isinstance(module, Block) else module(x)
            traces.append(x)
        for name, module in self.dec.items():
            if isinstance(module, Block):
                x = module(torch.cat([x, traces.pop()], dim=1) if "_block" in name else x, embedding)
        return x


def class_weights(label: Tensor | None, labels: int, like: Tensor) -> Tensor:
    """Return weights of the classes, ``(B, labels)``: of whole numbers ``(B,)`` one class each, of None no class.

    Raises:
        InvdiffError: If a class is not between 0 and ``labels - 1``.
    """
    if label is None:
        return like.new_zeros(len(like), labels)
    if label.ndim == 2:
        return label.to(like)
    if label.is_floating_point() or bool(((label < 0) | (label >= labels)).any()):
        raise InvdiffError(f"A label must be a whole number from 0 to {labels - 1}, got {label.tolist()!r:.60}.")
    return functional.one_hot(label.long(), labels).to(like)


def common_layout(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Return what names and shapes of weights say about `UNet`: its arguments, less ``outputs`` and ``embedding``.

    Raises:
        InvdiffError: If the names are not those of such a network.
    """
    found = re.compile(r"enc\.(\d+)x\1_")
    sizes = sorted({int(m[1]) for name in shapes if (m := found.match(name))}, reverse=True)
    try:
        top = sizes[0] if sizes else 0
        inlet, inputs = shapes[f"enc.{top}x{top}_conv.weight"][:2]
        taken = [n for n in shapes if re.fullmatch(rf"enc\.{top}x{top}_block\d+\.conv0\.weight", n)]
        attention = {int(m[1]) for n in shapes if (m := re.match(r"enc\.(\d+)x\1_block\d+\.qkv\.", n))}
        return {
            "inputs": inputs,
            "resolution": top,
            "inlet": inlet,
            "widths": [shapes[f"enc.{n}x{n}_block0.conv0.weight"][0] for n in sizes],
            "blocks": len(taken),
            "attention": sorted(attention, reverse=True),
            "label": shapes["map_label.weight"][1] if "map_label.weight" in shapes else 0,
            "augment": shapes["map_augment.weight"][1] if "map_augment.weight" in shapes else 0,
        }
    except (KeyError, IndexError, ValueError) as error:
        raise InvdiffError(
            f"The weights are not those of a U-Net of EDM: {error} is missing or has the wrong number of axes."
        ) from None
