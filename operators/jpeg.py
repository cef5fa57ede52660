"""JPEG compression as a measurement: what quantised cosine coefficients leave of an image."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from invdiff.errors import InvdiffError
from invdiff.operator import Operator
from invdiff.operators._parameters import as_space
from invdiff.operators.blur import require
from invdiff.operators.pointwise import straight_through
from invdiff.spaces import Space

ROUNDINGS = ("hard", "soft")
SUBSAMPLINGS = ("4:4:4", "4:2:0")

#: Tables of ITU-T T.81, Annex K, in rows of the block.
_LUMA = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
_CHROMA_CORNER = ((17, 18, 24, 47), (18, 21, 26, 66), (24, 26, 56, 99), (47, 66, 99, 99))
#: ITU-R BT.601 in full range (JFIF): luma and two colour differences of red, green, blue.
_TO_YCC = ((0.299, 0.587, 0.114), (-0.168735892, -0.331264108, 0.5), (0.5, -0.418687589, -0.081312411))


class JPEG(Operator):
    """``y = `` the image after JPEG: colour transform, 8 x 8 cosine transform, quantisation, and all that undone.

    Coefficients ``c`` become ``q round(c / q)`` with the tables ``q`` of the standard at a quality. With "hard"
    rounding, values are those of a file: input, colours and output are whole levels of 255 too, and values beyond
    [0, 1] are clipped first. Derivatives are then those of a codec that rounds nothing (the "straight-through"
    surrogate: a direction, not a gradient). With "soft" rounding ``t - sin(2 pi t) / (2 pi)`` of ``t = c / q``
    takes the place of ``round(t)``, with which it agrees at whole numbers, and nothing else is rounded: a smooth
    operator that is no JPEG.

    Colour differences may be averaged over 2 x 2 pixels ("4:2:0") and are then interpolated linearly. Sizes that
    are no multiple of a block are filled up with their last row and column. The result is clipped to [0, 1].

    Args:
        quality: 1 to 100, on the scale of the Independent JPEG Group.
        shape: Shape ``(1, y, x)`` (grey) or ``(3, y, x)`` (red, green, blue) of images in [0, 1], or a Space.
        subsampling: "4:4:4" or "4:2:0"; of no effect on grey images.
        rounding: "hard" or "soft".
        dtype: Real precision; that of the Space, or float32.
        units: Units of the image.
        spacing: Distance between neighbours, per named dimension.

    Raises:
        InvdiffError: If the quality is out of range, or images are complex or have other than 1 or 3 channels.
    """

    def __init__(
        self,
        quality: int,
        shape: Space | Sequence[int],
        *,
        subsampling: str = "4:2:0",
        rounding: str = "hard",
        dtype: torch.dtype | None = None,
        units: str | None = None,
        spacing: Mapping[str, float] | None = None,
    ) -> None:
        self.domain = self.range = as_space(shape, dtype, units, spacing)
        if self.domain.is_complex or len(self.domain.shape) != 3 or self.domain.shape[0] not in (1, 3):
            raise InvdiffError(f"JPEG takes real images of 1 or 3 channels (channel, y, x), got {self.domain}.")
        if isinstance(quality, bool) or int(quality) != quality or not 1 <= quality <= 100:
            raise InvdiffError(f"A JPEG quality is a whole number from 1 to 100, got {quality!r:.60}.")
        self.quality = int(quality)
        self.subsampling = require("chroma subsampling", subsampling, SUBSAMPLINGS)
        self.rounding = require("rounding of JPEG", rounding, ROUNDINGS)
        self.luma, self.chroma = (t.to(self.domain.dtype) for t in tables(self.quality))
        self.colours = torch.tensor(_TO_YCC, dtype=torch.float64).to(self.domain.dtype)

    def _forward(self, x: Tensor) -> Tensor:
        x = 255 * x.to(self.domain.dtype)
        x = self._bytes(x.clamp(0, 255)) if self.rounding == "hard" else x
        if self.domain.shape[0] == 1:
            return (self._bytes(self._code(x - 128, self.luma, 8) + 128) / 255).clamp(0, 1)
        planes = self._bytes(torch.einsum("ij,bjyx->biyx", self.colours, x))
        luma, chroma = self._bytes(self._code(planes[:, :1] - 128, self.luma, 8)) + 128, planes[:, 1:]
        if self.subsampling == "4:4:4":
            chroma = self._bytes(self._code(chroma, self.chroma, 8))
        else:
            size = chroma.shape[-2:]
            small = self._bytes(torch.nn.functional.avg_pool2d(_fill(chroma, 2), 2))
            small = self._bytes(self._code(small, self.chroma, 8))
            large = torch.nn.functional.interpolate(small, scale_factor=2, mode="bilinear", align_corners=False)
            chroma = large[..., : size[0], : size[1]]
        planes = torch.cat([luma, chroma], 1)
        rgb = torch.einsum("ij,bjyx->biyx", torch.linalg.inv(self.colours.double()).to(x.dtype), planes)
        return (self._bytes(rgb) / 255).clamp(0, 1)

    def _bytes(self, t: Tensor) -> Tensor:
        """Round to whole levels, as every stage of a codec of 8 bits does, where rounding is hard."""
        return straight_through(t, t.round()) if self.rounding == "hard" else t

    def _code(self, plane: Tensor, table: Tensor, block: int) -> Tensor:
        """Return planes ``(B, c, y, x)`` with their coefficients quantised."""
        ny, nx = plane.shape[-2:]
        full = _fill(plane, block)
        blocks = full.unflatten(-1, (-1, block)).unflatten(-3, (-1, block)).transpose(-3, -2)
        d = _cosines().to(device=plane.device, dtype=plane.dtype)
        t = d @ blocks @ d.mT / table
        t = self._bytes(t) if self.rounding == "hard" else t - torch.sin(2 * math.pi * t) / (2 * math.pi)
        blocks = d.mT @ (t * table) @ d
        return blocks.transpose(-3, -2).reshape(full.shape)[..., :ny, :nx]


def tables(quality: int) -> tuple[Tensor, Tensor]:
    """Return the quantisation tables of luma and chroma at a quality from 1 to 100, each ``(8, 8)``."""
    chroma = torch.full((8, 8), 99.0)
    chroma[:4, :4] = torch.tensor(_CHROMA_CORNER, dtype=torch.float32)
    percent = 5000 // quality if quality < 50 else 200 - 2 * quality
    scaled = [((t * percent + 50) / 100).floor().clamp(1, 255) for t in (torch.tensor(_LUMA).float(), chroma)]
    return scaled[0], scaled[1]


@functools.lru_cache
def _cosines() -> Tensor:
    """Return the orthonormal cosine transform of 8 numbers."""
    k, n = torch.arange(8, dtype=torch.float64)[:, None], torch.arange(8, dtype=torch.float64)
    d = torch.cos(math.pi * k * (2 * n + 1) / 16) / 2
    d[0] /= 2**0.5
    return d


def _fill(x: Tensor, block: int) -> Tensor:
    """Repeat the last row and column up to a multiple of ``block``."""
    for dim in (-2, -1):
        short = -x.shape[dim] % block
        if short:
            last = x.narrow(dim, x.shape[dim] - 1, 1)
            x = torch.cat(
                [x, last.expand(*[short if i == x.ndim + dim else n for i, n in enumerate(x.shape)])], dim
            )
    return x
