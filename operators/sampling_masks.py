"""Cartesian sampling patterns in centred order, and the acceleration that each reaches.

The acceleration is positions over sampled positions, centre included. Patterns along one axis come as full masks
``(ky, kx)`` that are constant along kx, so that `MultiCoilMRI` finds its exact prox. The same arguments and seed
give the same mask. Poisson-disc masks are in `invdiff.mri_simulation`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from invdiff.errors import InvdiffError


@dataclass(frozen=True)
class SamplingMask:
    """A mask and what it reaches; ``torch.as_tensor(m)``, operators and numpy take it as its mask.

    Args:
        mask: Zeros and ones, ``(ky, kx)`` or ``(frame, ky, kx)``, float32.
        title: What the pattern is.
    """

    mask: Tensor
    title: str

    @property
    def acceleration(self) -> float:
        """Positions over sampled positions."""
        return self.mask.numel() / float(self.mask.sum())

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.mask.numpy(), dtype=dtype)

    def __str__(self) -> str:
        shape = " x ".join(map(str, self.mask.shape))
        return f"{self.title}, {shape}, acceleration {self.acceleration:.2f}"


def equispaced(shape: Sequence[int], step: int, centre: int = 0, offset: int = 0) -> SamplingMask:
    """Return every ``step``-th line of ky from ``offset`` on, and ``centre`` lines in the middle.

    Raises:
        InvdiffError: If sizes do not fit.
    """
    ny, nx = _shape(shape, 2)
    _whole(step=step, top=ny)
    line = (torch.arange(ny) - offset) % step == 0
    return SamplingMask(_lines(line, ny, nx, centre), f"every {step}. line with {centre} in the centre")


def random_lines(shape: Sequence[int], acceleration: float, centre: int = 0, seed: int = 0) -> SamplingMask:
    """Return ``round(ny / acceleration)`` lines of ky: ``centre`` in the middle, the others at random.

    Raises:
        InvdiffError: If the centre alone has more lines than the acceleration allows.
    """
    ny, nx = _shape(shape, 2)
    count = _count(ny, acceleration)
    line = _middle(ny, centre)
    if count < int(line.sum()):
        raise InvdiffError(
            f"Acceleration {acceleration:g} leaves {count} of {ny} lines, and the centre takes {centre}; ask for "
            "less acceleration or a smaller centre."
        )
    free = (~line).nonzero().flatten()
    pick = torch.randperm(len(free), generator=torch.Generator().manual_seed(seed))[: count - int(line.sum())]
    line[free[pick]] = True
    return SamplingMask(_lines(line, ny, nx, 0), f"random lines with {centre} in the centre")


def partial_fourier(shape: Sequence[int], fraction: float = 0.75) -> SamplingMask:
    """Return the lines of ky up to ``fraction`` of them, more than half: the far end of one side is left out.

    Raises:
        InvdiffError: If the fraction is not above one half and at most one.
    """
    ny, nx = _shape(shape, 2)
    if not 0.5 < fraction <= 1:
        raise InvdiffError(f"Partial Fourier takes more than half of the lines, and the fraction is {fraction:g}.")
    count = max(math.ceil(fraction * ny), ny // 2 + 1)
    return SamplingMask(_lines(torch.arange(ny) < count, ny, nx, 0), f"partial Fourier {fraction:g}")


def caipi(shape: Sequence[int], steps: tuple[int, int], shift: int = 1, centre: int = 0) -> SamplingMask:
    """Return a sheared lattice over two phase encodings ``(kz, ky)``: CAIPIRINHA (Breuer et al. 2006).

    Every ``steps[0]``-th row is sampled at every ``steps[1]``-th position, and each sampled row is shifted by
    ``shift`` against the one before, so that aliases fall beside each other instead of onto each other.

    Raises:
        InvdiffError: If sizes do not fit.
    """
    nz, ny = _shape(shape, 2)
    _whole(step=steps[0], top=nz)
    _whole(step=steps[1], top=ny)
    row, column = torch.arange(nz)[:, None] - nz // 2, torch.arange(ny) - ny // 2
    sampled = (row % steps[0] == 0) & ((column - shift * (row // steps[0])) % steps[1] == 0)
    sampled = sampled | (_middle(nz, centre)[:, None] & _middle(ny, centre))
    return SamplingMask(sampled.float(), f"lattice of {steps[0]} x {steps[1]} sheared by {shift}")


def shifted_frames(shape: Sequence[int], step: int, centre: int = 0) -> SamplingMask:
    """Return equispaced lines ``(frame, ky, kx)``, shifted by one from frame to frame (k-t sampling).

    Any ``step`` successive frames together sample everything.

    Raises:
        InvdiffError: If sizes do not fit.
    """
    frames, ny, nx = _shape(shape, 3)
    masks = [equispaced((ny, nx), step, centre, offset=t % step).mask for t in range(frames)]
    return SamplingMask(torch.stack(masks), f"every {step}. line, shifted from frame to frame")


def random_frames(shape: Sequence[int], acceleration: float, centre: int = 0, seed: int = 0) -> SamplingMask:
    """Return random lines ``(frame, ky, kx)``, drawn anew for every frame; each has the same number.

    Raises:
        InvdiffError: As `random_lines`.
    """
    frames, ny, nx = _shape(shape, 3)
    masks = [random_lines((ny, nx), acceleration, centre, 10_007 * seed + t).mask for t in range(frames)]
    return SamplingMask(torch.stack(masks), f"random lines per frame with {centre} in the centre")


def _shape(shape: Sequence[int], rank: int) -> tuple[int, ...]:
    sizes = tuple(int(n) for n in shape)
    if len(sizes) != rank or min(sizes) < 1:
        raise InvdiffError(f"The pattern needs {rank} positive sizes, got {sizes}.")
    return sizes


def _whole(step: int, top: int) -> None:
    if not 1 <= step <= top:
        raise InvdiffError(f"The step between samples must be from 1 to {top}, got {step}.")


def _count(lines: int, acceleration: float) -> int:
    if not 1 <= acceleration <= lines:
        raise InvdiffError(
            f"The acceleration must be from 1 to the {lines} lines there are, got {acceleration:g}."
        )
    return max(1, round(lines / acceleration))


def _middle(n: int, width: int) -> Tensor:
    if not 0 <= width <= n:
        raise InvdiffError(f"The centre must have from 0 to {n} lines, got {width}.")
    first = n // 2 - width // 2
    index = torch.arange(n)
    return (index >= first) & (index < first + width)


def _lines(line: Tensor, ny: int, nx: int, centre: int) -> Tensor:
    return (line | _middle(ny, centre)).float()[:, None].expand(ny, nx).contiguous()
