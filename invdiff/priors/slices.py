"""A prior of images as a prior of volumes: every slice by itself, slices as rows of the network's batch.

``p(x) = prod_z p_2(x[:, z])`` over volumes ``(channel, z, y, x)``. Nothing links neighbouring slices; the data do,
and samplers such as ``dds3d`` and ``mbir`` add a link of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from invdiff.codec import AffineCodec, Codec
from invdiff.errors import InvdiffError
from invdiff.prior import Denoiser, Prior
from invdiff.spaces import Space


class SliceDenoiser(Denoiser):
    """``D(u, s)[:, :, z] = D_2(u[:, :, z], s)`` on volumes ``(B, channel, z, y, x)``.

    Args:
        base: Denoiser of images ``(channel, y, x)``.
        max_slices: Most slices that the network is given at once; None gives it all of a batch.
    """

    def __init__(self, base: Denoiser, max_slices: int | None = None) -> None:
        self.base, self.max_slices = base, max_slices
        self.space, self.channels, self.dtype = None, base.channels, base.dtype
        self.sigma_min, self.sigma_max, self.sigma_data = base.sigma_min, base.sigma_max, base.sigma_data
        self.noise, self.differentiable = base.noise, base.differentiable

    def __call__(self, x: Tensor, sigma: Tensor, cond: Mapping[str, Tensor] | None = None) -> Tensor:
        """Denoise every slice, ``(B, C, z, y, x)``; ``sigma`` is ``(B,)``."""
        depth = x.shape[2]
        slices, level = slices_to_rows(x), sigma.repeat_interleave(depth)
        most = self.max_slices or len(slices)
        parts = [self.base(u, s, cond) for u, s in zip(slices.split(most), level.split(most))]
        return rows_to_slices(torch.cat(parts), depth)


class SliceCodec(Codec):
    """The codec of images, slice by slice.

    Args:
        base: Codec of one slice; parameters per case are those of the volume's.
        image: Space of volumes ``(channel, z, y, x)``.
    """

    def __init__(self, base: Codec, image: Space) -> None:
        self.base, self.depth = base, image.shape[1]
        self.image = image.with_precision(base.image.dtype)
        channels, *plane = base.prior.shape
        self.prior = Space((channels, self.depth, *plane), base.prior.dtype, image.dims)

    def decode(self, u: Tensor) -> Tensor:
        """Decode every slice."""
        return self._each("decode", u)

    def encode(self, x: Tensor) -> Tensor:
        """Encode every slice."""
        return self._each("encode", x)

    def rows(self, index: Tensor) -> Codec:
        """Pick the parameters of the given cases."""
        return type(self)(self.base.rows(index), self.image)

    def describe(self) -> dict[str, Any]:
        """Describe the codec of one slice."""
        return {"name": "Slices", "slices": self.depth, "slice": self.base.describe()}

    def _each(self, method: str, v: Tensor) -> Tensor:
        base = self.base.rows(torch.arange(len(v)).repeat_interleave(self.depth))
        return rows_to_slices(getattr(base, method)(slices_to_rows(v)), self.depth)


class AffineSliceCodec(SliceCodec, AffineCodec):
    """An affine codec, slice by slice; ``L L^H = gain^2 I`` as for one slice."""

    is_affine = True
    base: AffineCodec

    @property
    def gain(self) -> Tensor:
        """Gain of one slice."""
        return self.base.gain

    @property
    def offset(self) -> Tensor | None:
        """The volume of prior zero, where a slice has an offset."""
        if self.base.offset is None:
            return None
        return self.decode(self.prior.zeros(self.gain.shape[0] if self.gain.ndim else 1, self.gain.device))

    def linear(self, u: Tensor) -> Tensor:
        """Apply the linear part to every slice."""
        return self._each("linear", u)

    def linear_adjoint(self, x: Tensor) -> Tensor:
        """Apply its adjoint to every slice."""
        return self._each("linear_adjoint", x)

    decode = SliceCodec.decode
    encode = SliceCodec.encode


def SlicePrior(prior: Prior, max_slices: int | None = None) -> Prior:
    """Return a prior of volumes ``(channel, z, y, x)`` under which slices along ``z`` are independent images.

    One evaluation asks the network once for every slice. The scale is one per volume, given or estimated from all
    of its data.

    Args:
        prior: Prior of images ``(channel, y, x)``.
        max_slices: Most slices that the network is given at once.

    Raises:
        InvdiffError: If ``max_slices`` is not positive.
    """
    if max_slices is not None and max_slices < 1:
        raise InvdiffError(f"max_slices must be at least 1, got {max_slices}.")
    estimated = prior.codec is None and prior.make_codec is not None
    card = {**prior.card, "name": f"{prior.name}, slice by slice"}
    make: Callable[[Space, Tensor], Codec] = partial(_slice_codec, prior)
    scale = prior.scale if estimated else 1.0
    return replace(
        prior,
        denoiser=SliceDenoiser(prior.denoiser, max_slices),
        codec=None,
        card=card,
        make_codec=make,
        scale=scale,
    )


def slices_to_rows(x: Tensor) -> Tensor:
    """``(B, C, z, y, x)`` to ``(B z, C, y, x)``."""
    return x.transpose(1, 2).flatten(0, 1)


def rows_to_slices(x: Tensor, depth: int) -> Tensor:
    """``(B z, C, y, x)`` to ``(B, C, z, y, x)``."""
    return x.unflatten(0, (-1, depth)).transpose(1, 2)


def _slice_codec(prior: Prior, image: Space, scale: Tensor) -> Codec:
    """Codec of volumes of space ``image`` for a prior of their slices."""
    if len(image.shape) != 4:
        raise InvdiffError(
            f"Prior {prior.name} by slices makes volumes (channel, z, y, x), and the problem asks for {image}; "
            "use the prior itself for images, or choose a prior for that space."
        )
    channel, z, *plane = image.dims
    spacing = {k: v for k, v in image.spacing.items() if k != z}
    one = image.replace(shape=(image.shape[0], *image.shape[2:]), dims=(channel, *plane), spacing=spacing)
    base = prior.bind(one, scale).codec
    assert base is not None
    return (AffineSliceCodec if base.is_affine else SliceCodec)(base, image)
