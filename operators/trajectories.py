"""Trajectories through k-space in cycles per field of view, columns ``(ky, kx)``, and their sampling density.

A density is the area that a sample stands for, in k-space cells: ones on a Cartesian grid, so that
``N^(-1/2) sum_j w_j y_j exp(+2 pi i k_j n / N)`` of fully sampled data is the image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from invdiff.errors import InvdiffError
from invdiff.operators.nufft import Grid, fast_even, interpolation

#: Angle between successive golden-angle spokes.
GOLDEN = math.pi * (math.sqrt(5) - 1) / 2


def radial(size: int, spokes: int, readout: int | None = None, golden: bool = False) -> Tensor:
    """Return spokes through the centre, ``(spoke, sample, 2)``, from ``-size / 2`` to just below ``size / 2``.

    Args:
        size: Pixels across the field of view. ``pi / 2 * size`` spokes satisfy Nyquist at the edge.
        spokes: Number of spokes, evenly over half a turn.
        readout: Samples along a spoke; ``2 * size`` where left out.
        golden: Turn by 111.25 degrees from spoke to spoke, so that any run of them covers evenly (Winkelmann et
            al. 2007).
    """
    readout = 2 * size if readout is None else readout
    _positive(size=size, spokes=spokes, readout=readout)
    angle = torch.arange(spokes, dtype=torch.float64) * (GOLDEN if golden else math.pi / spokes)
    radius = (torch.arange(readout, dtype=torch.float64) - readout // 2) * (size / readout)
    return torch.stack([torch.sin(angle)[:, None] * radius, torch.cos(angle)[:, None] * radius], -1)


def spiral(size: int, interleaves: int, readout: int, acceleration: float = 1.0) -> Tensor:
    """Return Archimedean spirals ``(interleaf, sample, 2)`` from the centre to ``size / 2``.

    ``k(s) = (size / 2) s exp(2 pi i (turns s + interleaf / interleaves))``, with samples evenly spaced along the
    curve. Neighbouring arms are ``acceleration`` cycles apart, so 1 satisfies Nyquist.
    """
    _positive(size=size, interleaves=interleaves, readout=readout, acceleration=acceleration)
    turns = size / (2 * interleaves * acceleration)
    fine = np.linspace(0, 1, 32 * readout)
    length = np.cumsum(np.hypot(1, 2 * math.pi * turns * (fine - fine[1] / 2)))
    length = (length - length[0]) / max(length[-1] - length[0], 1e-300)
    s = torch.from_numpy(np.interp(np.linspace(0, 1, readout), length, fine))
    start = torch.arange(interleaves, dtype=torch.float64)[:, None] / interleaves
    angle = 2 * math.pi * (turns * s + start)
    return torch.stack([torch.sin(angle), torch.cos(angle)], -1) * (size / 2 * s)[:, None]


def epi(shape: Sequence[int], shots: int = 1, acceleration: int = 1) -> Tensor:
    """Return echo-planar lines ``(shot, sample, 2)``: ky line by line, kx there and back.

    Shot ``i`` takes lines ``i * acceleration, (i + shots) * acceleration, ...``; lines of a shot that the others
    have more of are left out.
    """
    ny, nx = (int(n) for n in shape)
    _positive(ny=ny, nx=nx, shots=shots, acceleration=acceleration)
    lines = torch.arange(0, ny, acceleration, dtype=torch.float64) - ny // 2
    per_shot = len(lines) // shots
    if not per_shot:
        raise InvdiffError(f"{len(lines)} lines cannot be shared by {shots} shots; use fewer shots.")
    ky = lines[: per_shot * shots].reshape(per_shot, shots).mT
    kx = torch.arange(nx, dtype=torch.float64) - nx // 2
    back = torch.where((torch.arange(per_shot) % 2 == 1)[:, None], kx.flip(0), kx)
    grid = torch.stack([ky[:, :, None].expand(-1, -1, nx), back.expand(shots, -1, -1)], -1)
    return grid.reshape(shots, -1, 2)


def cartesian(mask: Any) -> Tensor:
    """Return the sampled positions of a centred mask, ``(sample, axes)``."""
    sampled = torch.as_tensor(mask)
    centre = torch.tensor([n // 2 for n in sampled.shape], dtype=torch.float64)
    return sampled.nonzero().double() - centre


def ramp(trajectory: Tensor) -> Tensor:
    """Return the density of straight spokes through the centre, ``(spoke, sample)``: ``|k| dk dtheta``.

    ``dtheta`` is half the gap to both neighbouring spokes, whatever their order, and the samples at the centre
    share a disc of diameter ``dk``.
    """
    points = _as_points(trajectory)
    if points.ndim != 3 or points.shape[-1] != 2 or points.shape[1] < 2:
        raise InvdiffError(f"The ramp needs spokes (spoke, sample, 2), got {tuple(points.shape)}.")
    step = points[:, 1] - points[:, 0]
    dk = step.norm(dim=-1)
    angle = torch.atan2(step[:, 0], step[:, 1]) % math.pi
    order = angle.argsort()
    ahead = (angle[order].roll(-1) - angle[order]) % math.pi
    gaps = 0.5 * (ahead + ahead.roll(1))
    width = torch.empty_like(gaps)
    width[order] = gaps if len(gaps) > 1 else torch.full_like(gaps, math.pi)
    radius = points.norm(dim=-1)
    area = radius * dk[:, None] * width[:, None]
    centre = math.pi * (dk / 2) ** 2 / len(points)
    return torch.where(radius < 1e-9 * radius.max(), centre[:, None], area)


def pipe_menon(trajectory: Tensor, shape: Sequence[int], iterations: int = 20) -> Tensor:
    """Return the density of any trajectory by ``w <- w / (P w)`` (Pipe and Menon 1999).

    ``P`` convolves with the autocorrelation of a Kaiser-Bessel kernel two cells wide, of unit integral.

    Args:
        trajectory: ``(..., axes)`` in cycles per field of view.
        shape: Shape of the image.
        iterations: Number of iterations.
    """
    points = _as_points(trajectory)
    flat = points.reshape(-1, points.shape[-1])
    grid = Grid(tuple(fast_even(2 * n) for n in shape), 4)
    down, up = interpolation(flat, shape, grid, torch.complex128)
    integral = 1.0
    for axis, n in enumerate(shape):
        beta = grid.beta(axis, n)
        integral *= (math.exp(-beta) * grid.width * math.sinh(beta) / beta) ** 2 * n / grid.shape[axis]
    w = torch.ones(len(flat), 1, dtype=torch.float64)
    for _ in range(iterations):
        w = w / (down @ (up @ w) / integral)
    return w.reshape(points.shape[:-1])


def _as_points(trajectory: Tensor) -> Tensor:
    points = torch.as_tensor(trajectory).double().cpu()
    if points.ndim < 2 or not bool(torch.isfinite(points).all()):
        raise InvdiffError(f"The trajectory must be finite (..., axes), got shape {tuple(points.shape)}.")
    return points


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise InvdiffError(f"The {name} of a trajectory must be positive, got {value}.")
