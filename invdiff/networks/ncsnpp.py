"""NCSN++ and DDPM++ of score_sde, whose weights are one flat list ``all_modules.{i}`` in the order of the layers.

A U-Net of BigGAN blocks weighted by ``sqrt(1/2)``. It may take the shrunken image into the encoder, by a 1 x 1
convolution of it (``sum``) or by a strided 3 x 3 one that is handed down (``residual``), and may add up the
predictions of all resolutions (``pyramid``). Resolutions change by the filter (1, 3, 3, 1) or by plain means.

Song et al., ICLR 2021, arXiv:2011.13456, appendix H.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from invdiff.errors import InvdiffError
from invdiff.networks.edm_blocks import Precise, double, halve

__all__ = ["FlatNCSNpp"]

_HALF = math.sqrt(0.5)
_SMOOTH = torch.tensor([1.0, 3.0, 3.0, 1.0]).outer(torch.tensor([1.0, 3.0, 3.0, 1.0]))[None, None] / 64
_PLAIN = torch.full((1, 1, 2, 2), 0.25)


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(max(1, min(channels // 4, 32)), channels, eps=1e-6)


def _change(x: Tensor, up: bool, smooth: bool) -> Tensor:
    """Double or halve the resolution, channel by channel."""
    return (double if up else halve)(x, _SMOOTH if smooth else _PLAIN, 1 if smooth else 0)


class _Frequencies(Precise):
    """``[sin(2 pi W t), cos(2 pi W t)]``."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.empty(count).normal_(std=16), requires_grad=False)

    def forward(self, time: Tensor) -> Tensor:
        angle = torch.outer(time, 2 * math.pi * self.W.to(time.dtype))
        return torch.cat([angle.sin(), angle.cos()], dim=1)


def _sines(time: Tensor, count: int) -> Tensor:
    """``[sin(t w_k), cos(t w_k)]``, ``w_k = 10000^(-k / (count / 2 - 1))``."""
    half = count // 2
    w = 10000.0 ** -(torch.arange(half, dtype=time.dtype, device=time.device) / (half - 1))
    angle = torch.outer(time, w)
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class _Residual(nn.Module):
    """BigGAN block: the resolution changes after the first activation."""

    def __init__(
        self, inputs: int, outputs: int, embedding: int, *, up: bool = False, down: bool = False, smooth: bool
    ) -> None:
        super().__init__()
        self.up, self.down, self.smooth = up, down, smooth
        self.GroupNorm_0 = _norm(inputs)
        self.Conv_0 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.Dense_0 = nn.Linear(embedding, outputs)
        self.GroupNorm_1 = _norm(outputs)
        self.Conv_1 = nn.Conv2d(outputs, outputs, 3, padding=1)
        if up or down or inputs != outputs:
            self.Conv_2 = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = functional.silu(self.GroupNorm_0(x))
        if self.up or self.down:
            h, x = _change(h, self.up, self.smooth), _change(x, self.up, self.smooth)
        h = self.Conv_0(h) + self.Dense_0(embedding)[:, :, None, None]
        h = self.Conv_1(functional.silu(self.GroupNorm_1(h)))
        return _HALF * (h + (self.Conv_2(x) if hasattr(self, "Conv_2") else x))


class _Mix(nn.Module):
    """The same matrix for the channels of every pixel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.empty(channels, channels).normal_(std=0.1))
        self.b = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bchw,cd->bdhw", x, self.W) + self.b[:, None, None]


class _Attention(nn.Module):
    """Self-attention over pixels, one head."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.GroupNorm_0 = _norm(channels)
        self.NIN_0, self.NIN_1, self.NIN_2, self.NIN_3 = (_Mix(channels) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.GroupNorm_0(x)
        query, key, value = (mix(h).flatten(2) for mix in (self.NIN_0, self.NIN_1, self.NIN_2))
        weight = torch.einsum("bcq,bck->bqk", query, key / math.sqrt(x.shape[1]))
        weight = weight.to(torch.promote_types(x.dtype, torch.float32)).softmax(dim=-1).to(x.dtype)
        return _HALF * (x + self.NIN_3(torch.einsum("bqk,bck->bcq", weight, value).reshape(x.shape)))


class _Merge(nn.Module):
    """Adds a 1 x 1 convolution of the shrunken image."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.Conv_0 = nn.Conv2d(inputs, outputs, 1)

    def forward(self, image: Tensor, x: Tensor) -> Tensor:
        return self.Conv_0(image) + x


class _Shrink(nn.Module):
    """Filter (1, 3, 3, 1), then a strided 3 x 3 convolution."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.Conv2d_0 = nn.Conv2d(inputs, outputs, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        c = x.shape[1]
        return self.Conv2d_0(functional.conv2d(x, _SMOOTH.to(x).expand(c, 1, -1, -1), padding=2, groups=c))


class FlatNCSNpp(nn.Module):
    """``network(x, time)``: the score at level ``time`` (NCSN++), or the noise at step ``time`` (DDPM++).

    Args:
        channels: Of the image.
        width: Features of time, and channels of the first convolution.
        widths: Channels of the levels, full resolution first.
        blocks: Residual blocks per level of the encoder; the decoder has one more.
        attention: Levels with attention; the bottleneck has it anyway.
        fourier: Random frequencies of ``log time``, and an output divided by ``time``.
        smooth: Change the resolution by (1, 3, 3, 1).
        image: How the shrunken image enters: ``""``, ``sum`` or ``residual``.
        pyramid: Add up predictions of all resolutions.
        centred: The image is in [-1, 1]; else it is in [0, 1] and mapped here.

    Raises:
        InvdiffError: If sizes are not positive or ``image`` is unknown.
    """

    def __init__(
        self,
        *,
        channels: int,
        width: int,
        widths: Sequence[int],
        blocks: int,
        attention: Sequence[int],
        fourier: bool,
        smooth: bool,
        image: str = "",
        pyramid: bool = False,
        centred: bool = False,
    ) -> None:
        super().__init__()
        if not widths or min(channels, width, blocks, *widths) < 1 or image not in ("", "sum", "residual"):
            raise InvdiffError(
                f"An NCSN++ has positive sizes and takes the image as '', 'sum' or 'residual'; got {channels} "
                f"channels, width {width}, {list(widths)}, {blocks} blocks, {image!r}."
            )
        self.channels, self.width, self.fourier, self.centred = channels, width, fourier, centred
        self.levels, self.blocks, self.attention = len(widths), blocks, frozenset(attention)
        self.image, self.pyramid, self.smooth = image, pyramid, smooth
        #: Height and width must be multiples of this.
        self.multiple = 1 << (self.levels - 1)
        e = 4 * width
        flat: list[nn.Module] = [_Frequencies(width)] if fourier else []
        flat += [nn.Linear((1 + fourier) * width, e), nn.Linear(e, e), nn.Conv2d(channels, width, 3, padding=1)]
        now, shrunk, traces = width, channels, [width]
        for level, wide in enumerate(widths):
            for _ in range(blocks):
                flat.append(_Residual(now, wide, e, smooth=smooth))
                now = wide
                flat += [_Attention(now)] if level in self.attention else []
                traces.append(now)
            if level < self.levels - 1:
                flat.append(_Residual(now, now, e, down=True, smooth=smooth))
                if image == "sum":
                    flat.append(_Merge(channels, now))
                elif image == "residual":
                    flat.append(_Shrink(shrunk, now))
                    shrunk = now
                traces.append(now)
        flat += [_Residual(now, now, e, smooth=smooth), _Attention(now), _Residual(now, now, e, smooth=smooth)]
        for level in reversed(range(self.levels)):
            for _ in range(blocks + 1):
                flat.append(_Residual(now + traces.pop(), widths[level], e, smooth=smooth))
                now = widths[level]
            flat += [_Attention(now)] if level in self.attention else []
            flat += self._outlet(now) if pyramid else []
            if level:
                flat.append(_Residual(now, now, e, up=True, smooth=smooth))
        flat += [] if pyramid else self._outlet(now)
        self.all_modules = nn.ModuleList(flat)

    def _outlet(self, now: int) -> list[nn.Module]:
        return [_norm(now), nn.Conv2d(now, self.channels, 3, padding=1)]

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Return the score at level ``time`` or the noise at step ``time``, shaped as ``x``.

        Raises:
            InvdiffError: If the size of the image is no multiple of `multiple`.
        """
        if x.shape[1] != self.channels or x.shape[2] % self.multiple or x.shape[3] % self.multiple:
            raise InvdiffError(
                f"The network takes images (B, {self.channels}, H, W), H and W multiples of {self.multiple}, got "
                f"{tuple(x.shape)}."
            )
        flat = iter(self.all_modules)
        e = next(flat)(time.log()) if self.fourier else _sines(time, self.width)
        e = next(flat)(e.to(x.dtype))
        e = functional.silu(next(flat)(functional.silu(e)))
        x = x if self.centred else 2 * x - 1
        h = self._decode(*self._encode(x, e, flat), e, flat)
        return h / time.to(h.dtype)[:, None, None, None] if self.fourier else h

    def _encode(self, x: Tensor, e: Tensor, flat: Iterator[nn.Module]) -> tuple[Tensor, list[Tensor]]:
        """Features at the bottleneck, and what the decoder takes up."""
        shrunk, traces = x, [next(flat)(x)]
        for level in range(self.levels):
            for _ in range(self.blocks):
                h = next(flat)(traces[-1], e)
                traces.append(next(flat)(h) if level in self.attention else h)
            if level < self.levels - 1:
                h = next(flat)(traces[-1], e)
                if self.image == "sum":
                    shrunk = _change(shrunk, False, self.smooth)
                    h = next(flat)(shrunk, h)
                elif self.image == "residual":
                    h = shrunk = _HALF * (next(flat)(shrunk) + h)
                traces.append(h)
        h = next(flat)(traces[-1], e)
        h = next(flat)(h)
        return next(flat)(h, e), traces

    def _decode(self, h: Tensor, traces: list[Tensor], e: Tensor, flat: Iterator[nn.Module]) -> Tensor:
        """The prediction."""
        total: Tensor | None = None
        for level in reversed(range(self.levels)):
            for _ in range(self.blocks + 1):
                h = next(flat)(torch.cat([h, traces.pop()], dim=1), e)
            h = next(flat)(h) if level in self.attention else h
            if self.pyramid:
                part = self._out(h, flat)
                total = part if total is None else part + _change(total, True, self.smooth)
            if level:
                h = next(flat)(h, e)
        return self._out(h, flat) if total is None else total

    @staticmethod
    def _out(h: Tensor, flat: Iterator[nn.Module]) -> Tensor:
        norm, conv = next(flat), next(flat)
        out: Tensor = conv(functional.silu(norm(h)))
        return out

    @staticmethod
    def layout(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """Return what names and shapes of weights tell: all arguments but ``smooth`` and ``centred``.

        Raises:
            InvdiffError: If they are those of no such network.
        """
        try:
            return _layout(shapes)
        except (KeyError, IndexError, ValueError, StopIteration) as error:
            raise InvdiffError(
                f"The weights are not those of an NCSN++ or DDPM++ of score_sde with BigGAN blocks: {error} is "
                "missing or has the wrong number of axes."
            ) from None


def _layout(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    flat: dict[int, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        if found := re.fullmatch(r"all_modules\.(\d{1,4})\.(.+)", name):
            flat.setdefault(int(found[1]), {})[found[2]] = shape
    parts = [flat[i] for i in range(len(flat))]
    fourier = "W" in parts[0]
    linear = parts[int(fourier)]["weight"]
    width, start = linear[1] // (1 + fourier), 2 + fourier
    channels = parts[start]["weight"][1]
    body = parts[start + 1 :]

    def blocky(part: Mapping[str, Any]) -> bool:
        return "Conv_1.weight" in part

    def changes(part: Mapping[str, Any]) -> bool:
        # A shortcut that keeps the channels: the resolution changes.
        return "Conv_2.weight" in part and part["Conv_2.weight"][0] == part["Conv_2.weight"][1]

    turns = [i for i, part in enumerate(body) if blocky(part) and changes(part)]
    levels = len(turns) // 2 + 1
    widths, attention = [], []
    for level, start in enumerate([0, *(i + 1 for i in turns[: levels - 1])]):
        first = next(i for i in range(start, len(body)) if blocky(body[i]))
        widths.append(body[first]["Conv_0.weight"][0])
        attention += [level] if "NIN_0.W" in body[first + 1] else []
    # Of one level: the blocks of the encoder, two between, and one more in the decoder.
    blocks = sum(map(blocky, body[: turns[0]])) if turns else (sum(map(blocky, body)) - 3) // 2
    after = body[turns[0] + 1] if turns else {}
    image = "residual" if "Conv2d_0.weight" in after else "sum" if turns and not blocky(after) else ""
    norms = sum(set(part) == {"weight", "bias"} and len(part["weight"]) == 1 for part in body)
    return {
        "channels": channels,
        "width": width,
        "widths": widths,
        "blocks": blocks,
        "attention": attention,
        "fourier": fourier,
        "image": image,
        "pyramid": norms > 1,
    }
