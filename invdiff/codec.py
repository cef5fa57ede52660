"""Codecs: the one place where image space meets prior coordinates.

A codec owns range, units, complex against channels, cropping and padding (or a VAE). ``decode`` maps prior
coordinates ``u`` to the image ``x``; ``encode`` goes back. For an affine codec ``decode(u) = L u + b`` with
``L L^H = gain^2 I`` (every codec here), so that closed forms survive the change of coordinates.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from invdiff.errors import InvdiffError
from invdiff.operator import LinearOperator
from invdiff.spaces import Space
from invdiff.tensors import Movable, take_rows


class Codec(Movable, ABC):
    """Map between image space ``image`` and prior coordinates ``prior``, batched over rows."""

    image: Space
    prior: Space
    #: Whether ``decode`` is affine with ``L L^H = gain^2 I``; dispatch is on this flag, never on the class.
    is_affine: bool = False
    #: Whether ``decode`` is any other linear map, which ``linear_operator()`` then gives.
    is_linear: bool = False

    @abstractmethod
    def decode(self, u: Tensor) -> Tensor:
        """Map ``(B, *prior.shape)`` to ``(B, *image.shape)``."""

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """Map ``(B, *image.shape)`` to ``(B, *prior.shape)``, so that ``decode(encode(x)) = x``."""

    @property
    def image_unit(self) -> Tensor:
        """Image units per unit in which guidance weights are published, ``()`` or ``(N,)``."""
        return torch.ones((), dtype=self.image.real_dtype)

    def rows(self, index: Tensor) -> Codec:
        """Return the codec whose row ``r`` has the parameters of case ``index[r]``."""
        return self

    def linear_operator(self) -> LinearOperator:
        """Return ``decode`` without its constant, where it is affine or linear."""
        raise InvdiffError(f"{type(self).__name__} is not linear.")

    def describe(self) -> dict[str, Any]:
        """Return what provenance records."""
        return {"name": type(self).__name__}

    def __matmul__(self, inner: Codec) -> Codec:
        """Chain: ``(outer @ inner).decode(u) = outer.decode(inner.decode(u))``."""
        return Chain((self, inner))

    def __repr__(self) -> str:
        return f"{type(self).__name__}: prior {self.prior} -> image {self.image}"


class AffineCodec(Codec):
    """``decode(u) = L u + b`` with ``L L^H = gain^2 I``."""

    is_affine = True

    @property
    @abstractmethod
    def gain(self) -> Tensor:
        """``c`` with ``L L^H = c^2 I``; shape ``()`` or ``(N,)``."""

    @property
    def image_unit(self) -> Tensor:
        """The gain."""
        return self.gain

    @abstractmethod
    def linear(self, u: Tensor) -> Tensor:
        """Return ``L u``."""

    @abstractmethod
    def linear_adjoint(self, x: Tensor) -> Tensor:
        """Return ``L^H x``."""

    @property
    def offset(self) -> Tensor | None:
        """``b``, broadcastable to ``(B, *image.shape)``, or None where it is zero."""
        return None

    def decode(self, u: Tensor) -> Tensor:
        """Return ``L u + b``."""
        x = self.linear(u)
        return x if self.offset is None else x + self.offset.to(x.dtype)

    def encode(self, x: Tensor) -> Tensor:
        """Return ``L^+ (x - b)``, with ``L^+ = L^H / gain^2``."""
        x = x if self.offset is None else x - self.offset.to(x.dtype)
        g = self.gain
        back = self.linear_adjoint(x)
        return back / (g * g).reshape(g.shape + (1,) * (back.ndim - 1) if g.ndim else ()).to(back.dtype)

    def linear_operator(self) -> LinearOperator:
        """Return ``L`` as an operator from prior coordinates to image space."""
        return CodecLinear(self)


class CodecLinear(LinearOperator):
    """The linear part of an affine codec; casts to the precision of the image space."""

    def __init__(self, codec: AffineCodec) -> None:
        self.codec = codec
        self.domain, self.range = codec.prior, codec.image

    @property
    def n_cases(self) -> int | None:
        """Cases of the scale."""
        gain = self.codec.gain
        return gain.shape[0] if gain.ndim and gain.shape[0] > 1 else None

    def _forward(self, x: Tensor) -> Tensor:
        return self.codec.linear(x.to(self.domain.dtype))

    def _adjoint(self, y: Tensor) -> Tensor:
        return self.codec.linear_adjoint(y.to(self.range.dtype))

    def rows(self, index: Tensor) -> LinearOperator:
        """Pick the parameters of the given cases."""
        rows = self.codec.rows(index)
        assert isinstance(rows, AffineCodec)
        return CodecLinear(rows)


class Scale(AffineCodec):
    """``decode(u) = scale * u + offset`` on the same shape.

    Args:
        image: Image space (real or complex).
        scale: Image units per prior unit; a number, or one per case ``(N,)``.
        offset: Image value at prior zero; a number.
    """

    def __init__(self, image: Space, scale: float | Tensor = 1.0, offset: float = 0.0) -> None:
        self.image = self.prior = image
        self.scale = torch.as_tensor(scale, dtype=image.real_dtype)
        self.shift = float(offset)
        if self.scale.ndim > 1 or not bool(((self.scale > 0) & torch.isfinite(self.scale)).all()):
            raise InvdiffError(
                f"A scale must be one positive number, or one per case, got {self.scale.tolist()!r:.60}."
            )

    @property
    def gain(self) -> Tensor:
        """The scale."""
        return self.scale

    @property
    def offset(self) -> Tensor | None:
        """The constant offset."""
        return torch.as_tensor(self.shift, dtype=self.image.real_dtype) if self.shift else None

    def _broadcast(self, x: Tensor) -> Tensor:
        scale = self.scale.to(x.real.dtype if x.is_complex() else x.dtype)
        return scale.reshape(-1, *([1] * (x.ndim - 1))) if scale.ndim else scale

    def linear(self, u: Tensor) -> Tensor:
        """Return ``scale * u``."""
        return u * self._broadcast(u)

    def linear_adjoint(self, x: Tensor) -> Tensor:
        """Return ``scale * x``."""
        return x * self._broadcast(x)

    def rows(self, index: Tensor) -> Codec:
        """Pick the scale of the given cases."""
        if not self.scale.ndim:
            return self
        return Scale(self.image, take_rows(self.scale, index), self.shift)

    def describe(self) -> dict[str, Any]:
        """Return scale and offset."""
        return {"name": "Scale", "scale": self.scale.tolist(), "offset": self.shift}


class ComplexChannels(AffineCodec):
    """Complex image ``(1, ...)`` as two real channels ``(2, ...)``, real part first; an isometry.

    For a real image ``(1, ...)`` (magnitude, say) decode keeps the first channel.
    """

    def __init__(self, image: Space) -> None:
        if image.shape[0] != 1:
            raise InvdiffError(f"Complex-to-channels needs one image channel, got shape {image.shape}.")
        self.image = image
        self.prior = image.replace(shape=(2, *image.shape[1:]), dtype=image.real_dtype)

    @property
    def gain(self) -> Tensor:
        """One."""
        return torch.ones((), dtype=self.image.real_dtype)

    def linear(self, u: Tensor) -> Tensor:
        """Return ``u[0] + i u[1]`` (or ``u[0]`` for real images)."""
        if not self.image.is_complex:
            return u[:, :1]
        return torch.complex(u[:, :1].contiguous(), u[:, 1:].contiguous())

    def linear_adjoint(self, x: Tensor) -> Tensor:
        """Return the real and imaginary parts as channels."""
        if not self.image.is_complex:
            return torch.cat([x, torch.zeros_like(x)], dim=1)
        return torch.cat([x.real, x.imag], dim=1)


class Grey(AffineCodec):
    """A grey image ``(1, y, x)`` is the mean of the three colours ``(3, y, x)`` of a prior's image.

    ``encode`` gives every colour the grey value. The prior of the grey image is that of colour images whose
    colours are averaged: nothing is retrained, and what the colours do beside their mean stays unseen.
    """

    def __init__(self, image: Space) -> None:
        if image.shape[0] != 1 or image.is_complex:
            raise InvdiffError(f"Grey images have one real channel, and these are {image}.")
        self.image = image
        self.prior = image.replace(shape=(3, *image.shape[1:]))

    @property
    def gain(self) -> Tensor:
        """``1 / sqrt(3)``: the noise of the mean of three."""
        return torch.tensor(3**-0.5, dtype=self.image.real_dtype)

    def linear(self, u: Tensor) -> Tensor:
        """Return the mean over the colours."""
        return u.mean(1, keepdim=True)

    def linear_adjoint(self, x: Tensor) -> Tensor:
        """Return a third of the image in every colour."""
        return x.expand(x.shape[0], *self.prior.shape) / 3

    def encode(self, x: Tensor) -> Tensor:
        """Return the image in every colour."""
        return x.expand(x.shape[0], *self.prior.shape).clone()


class Pad(AffineCodec):
    """The image is the centre crop of a padded prior canvas whose sizes are multiples of ``multiple``.

    ``decode`` crops, its adjoint pads with zeros (``L L^H = I``); ``encode`` pads by reflection instead, which
    is also a right inverse and kinder to networks.
    """

    def __init__(self, image: Space, multiple: int | Sequence[int] = 8, axes: int = 2) -> None:
        self.image = image
        self.axes = axes
        sizes = image.shape[-axes:]
        multiples = [multiple] * axes if isinstance(multiple, int) else list(multiple)
        if len(multiples) != axes or any(m < 1 for m in multiples):
            raise InvdiffError(f"Padding needs {axes} positive multiples, one per axis, got {multiples}.")
        padded = [math.ceil(n / m) * m for n, m in zip(sizes, multiples)]
        self.before = tuple((p - n) // 2 for p, n in zip(padded, sizes))
        self.after = tuple(p - n - b for p, n, b in zip(padded, sizes, self.before))
        self.prior = image.replace(shape=(*image.shape[:-axes], *padded))

    @property
    def gain(self) -> Tensor:
        """One."""
        return torch.ones((), dtype=self.image.real_dtype)

    @property
    def _pads(self) -> list[int]:
        return [n for b, a in zip(reversed(self.before), reversed(self.after)) for n in (b, a)]

    def linear(self, u: Tensor) -> Tensor:
        """Crop."""
        for axis, (b, n) in enumerate(zip(self.before, self.image.shape[-self.axes :])):
            u = u.narrow(axis - self.axes, b, n)
        return u

    def linear_adjoint(self, x: Tensor) -> Tensor:
        """Pad with zeros."""
        return F.pad(x, self._pads) if any(self._pads) else x

    def encode(self, x: Tensor) -> Tensor:
        """Pad by reflection (by zeros where the image is too small to reflect)."""
        if not any(self._pads):
            return x
        small = any(max(b, a) >= n for b, a, n in zip(self.before, self.after, x.shape[-self.axes :]))
        return F.pad(x, self._pads, mode="constant" if small else "reflect")


class Chain(Codec):
    """``decode(u) = outer.decode(inner.decode(u))``; affine where both are."""

    def __new__(cls, parts: Sequence[Codec] = ()) -> Chain:
        """Return an affine chain where every part is affine (copy and pickle pass no parts)."""
        affine = bool(parts) and all(p.is_affine for p in parts)
        return super().__new__(AffineChain if affine and cls is Chain else cls)

    def __init__(self, parts: Sequence[Codec]) -> None:
        self.parts: tuple[Codec, ...]
        parts = [q for p in parts for q in (p.parts if isinstance(p, Chain) else (p,))]
        for outer, inner in itertools.pairwise(parts):
            if outer.prior.shape != inner.image.shape or outer.prior.is_complex != inner.image.is_complex:
                raise InvdiffError(f"Codecs do not chain: {inner!r} does not give {outer.prior}.")
        self.parts = tuple(parts)
        self.image, self.prior = parts[0].image, parts[-1].prior

    def decode(self, u: Tensor) -> Tensor:
        """Decode from the innermost part outwards."""
        for part in reversed(self.parts):
            u = part.decode(u)
        return u

    def encode(self, x: Tensor) -> Tensor:
        """Encode from the outermost part inwards."""
        for part in self.parts:
            x = part.encode(x)
        return x

    @property
    def image_unit(self) -> Tensor:
        """Product over the parts down to the first that is not affine: what is inside it scales latents."""
        out = torch.ones((), dtype=self.image.real_dtype)
        for part in self.parts:
            out = out * part.image_unit.to(out)
            if not part.is_affine:
                break
        return out

    def rows(self, index: Tensor) -> Codec:
        """Pick the parameters of the given cases."""
        return Chain([p.rows(index) for p in self.parts])

    def describe(self) -> dict[str, Any]:
        """Describe every part, outermost first."""
        return {"name": "Chain", "parts": [p.describe() for p in self.parts]}


class AffineChain(Chain, AffineCodec):
    """A chain of affine codecs: gains multiply, offsets pass through the outer linear parts."""

    is_affine = True
    parts: tuple[AffineCodec, ...]
    decode = Chain.decode
    encode = Chain.encode
    image_unit = AffineCodec.image_unit

    @property
    def gain(self) -> Tensor:
        """Product of the gains."""
        out = torch.ones((), dtype=self.image.real_dtype)
        for part in self.parts:
            out = out * part.gain.to(out.dtype)
        return out

    @property
    def offset(self) -> Tensor | None:
        """The image of prior zero, where any part has an offset."""
        if all(p.offset is None for p in self.parts):
            return None
        return self.decode(self.prior.zeros(1, self.parts[0].gain.device))

    def linear(self, u: Tensor) -> Tensor:
        """Apply the linear parts from the innermost outwards."""
        for part in reversed(self.parts):
            u = part.linear(u)
        return u

    def linear_adjoint(self, x: Tensor) -> Tensor:
        """Apply the adjoints from the outermost inwards."""
        for part in self.parts:
            x = part.linear_adjoint(x)
        return x


class Identity(Scale):
    """Prior coordinates are the image itself."""

    def __init__(self, image: Space) -> None:
        super().__init__(image, 1.0, 0.0)

    def linear(self, u: Tensor) -> Tensor:
        """Return ``u``."""
        return u

    def linear_adjoint(self, x: Tensor) -> Tensor:
        """Return ``x``."""
        return x

    def describe(self) -> dict[str, Any]:
        """Return the name."""
        return {"name": "Identity"}
