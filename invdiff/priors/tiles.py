"""A denoiser of images of a bounded size on larger ones: overlapping tiles, blended without seams.

    D(x) = sum_k w_k D(x_k) / sum_k w_k

over tiles ``x_k``. The weight ``w_k`` is the product over both axes of a ramp that is 0 within ``margin`` pixels
of an inner edge, where the network misses its surroundings, rises as ``sin^2`` over the rest of the overlap, and
is 1 inside; at the edge of the image it stays 1. A network that sees no further than ``margin`` pixels gives the
same with tiles and without.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from invdiff.errors import InvdiffError
from invdiff.prior import Denoiser, Prior

__all__ = ["Tiled", "TiledDenoiser"]


class TiledDenoiser(Denoiser):
    """``D`` tile by tile, for images ``(B, C, y, x)``; a few tiles at a time bound the memory, also of gradients.

    Args:
        base: Denoiser that takes images of any size, or of the tile's.
        tile: Height and width of a tile; smaller images are one tile.
        overlap: Pixels that neighbouring tiles share, at most half a tile.
        margin: Pixels at inner edges that count for nothing, less than half the overlap; None takes a quarter.
        multiple: Tiles begin at multiples of this: those of a network that halves its images.
        max_tiles: Most tiles that the network is given at once.
    """

    space = None

    def __init__(
        self,
        base: Denoiser,
        tile: int = 256,
        overlap: int = 64,
        margin: int | None = None,
        multiple: int = 8,
        max_tiles: int = 4,
    ) -> None:
        margin = overlap // 4 if margin is None else margin
        if not 0 <= overlap <= tile // 2 or tile % multiple or overlap % multiple or min(tile, max_tiles) < 1:
            raise InvdiffError(
                f"Tiles need a size and an overlap that are multiples of {multiple}, the overlap at most half the "
                f"size; got {tile} and {overlap} ({max_tiles} at once)."
            )
        if not 0 <= margin <= overlap // 2 or (overlap and 2 * margin == overlap):
            raise InvdiffError(f"The margin must be less than half the overlap of {overlap}, got {margin}.")
        self.base, self.tile, self.overlap, self.margin = base, tile, overlap, margin
        self.multiple, self.max_tiles = multiple, max_tiles
        self.channels, self.dtype = base.channels, base.dtype
        self.sigma_min, self.sigma_max, self.sigma_data = base.sigma_min, base.sigma_max, base.sigma_data
        self.noise, self.differentiable = base.noise, min(base.differentiable, 1)

    def __call__(self, x: Tensor, sigma: Tensor, cond: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return ``D(x, sigma)``, ``(B, C, y, x)``; conditions hold for whole rows."""
        if x.ndim != 4:
            raise InvdiffError(f"Tiles need images (B, channel, y, x), got shape {tuple(x.shape)}.")
        if max(x.shape[-2:]) <= self.tile:
            return self.base(x, sigma, cond)
        level = torch.as_tensor(sigma, device=x.device).reshape(-1).expand(len(x))
        total, weight = torch.zeros_like(x), x.new_zeros(x.shape[-2:])
        work = [(row, place) for place in self._places(x.shape) for row in range(len(x))]
        for chunk in (work[i : i + self.max_tiles] for i in range(0, len(work), self.max_tiles)):
            rows = torch.tensor([row for row, _ in chunk], device=x.device)
            parts = torch.stack([x[row, :, y, z] for row, (y, z) in chunk])
            given = None if cond is None else {k: v if v.ndim == 0 else v[rows] for k, v in cond.items()}
            if torch.is_grad_enabled() and parts.requires_grad:  # activations of one chunk at a time
                out = checkpoint(self.base, parts, level[rows], given, use_reentrant=False)
            else:
                out = self.base(parts, level[rows], given)
            assert out is not None
            for tile, (row, (y, z)) in zip(out, chunk):
                w = self._window(y, x.shape[-2], x)[:, None] * self._window(z, x.shape[-1], x)
                total = _add(total, row, y, z, w * tile)
                if row == 0:
                    weight[y, z] += w
        return total / weight

    def _places(self, shape: torch.Size) -> Iterator[tuple[slice, slice]]:
        """Tiles that cover the image."""
        return itertools.product(self._starts(shape[-2]), self._starts(shape[-1]))

    def _starts(self, size: int) -> list[slice]:
        """Slices along one axis, as evenly spread as the multiple allows; the last one ends with the image."""
        if size <= self.tile:
            return [slice(0, size)]
        if size % self.multiple:
            raise InvdiffError(
                f"Tiles need images of a multiple of {self.multiple} pixels, got {size}; pad them, as the codec "
                "of a prior does."
            )
        count = math.ceil((size - self.overlap) / (self.tile - self.overlap))
        step = (size - self.tile) / (count - 1)
        starts = [int(k * step) // self.multiple * self.multiple for k in range(count - 1)] + [size - self.tile]
        return [slice(s, s + self.tile) for s in starts]

    def _window(self, place: slice, size: int, like: Tensor) -> Tensor:
        """Weight along one axis of a tile."""
        n = place.stop - place.start
        index = torch.arange(n, device=like.device, dtype=like.dtype)
        width = max(self.overlap - 2 * self.margin, 1)

        def ramp(distance: Tensor) -> Tensor:
            share = ((distance + 0.5 - self.margin) / width).clamp(0, 1)
            return torch.sin(0.5 * math.pi * share) ** 2

        out = torch.ones_like(index)
        if place.start > 0:
            out = out * ramp(index)
        if place.stop < size:
            out = out * ramp(n - 1 - index)
        return out


def _add(total: Tensor, row: int, y: slice, z: slice, part: Tensor) -> Tensor:
    """Add a tile in place; autograd follows."""
    total[row, :, y, z] += part
    return total


def Tiled(
    prior: Prior, tile: int = 256, overlap: int = 64, margin: int | None = None, max_tiles: int = 4
) -> Prior:
    """Return a prior for larger images than its network takes or the memory holds.

    The prior sees no further than a tile: nothing links structures that lie further apart, the data excepted.

    Args:
        prior: Prior of images ``(channel, y, x)``.
        tile: Height and width of a tile; smaller images are one tile.
        overlap: Pixels that neighbouring tiles share, at most half a tile.
        margin: Pixels at inner edges of tiles that count for nothing; None takes a quarter of the overlap.
        max_tiles: Most tiles that the network is given at once.
    """
    multiple = getattr(prior.denoiser, "multiple", 8)
    denoiser = TiledDenoiser(prior.denoiser, tile, overlap, margin, multiple, max_tiles)
    return replace(prior, denoiser=denoiser, card={**prior.card, "name": f"{prior.name}, in tiles"})
