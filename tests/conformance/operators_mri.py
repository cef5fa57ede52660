"""MRI of frames and volumes for the conformance suite."""

import torch

from invdiff import operators as O
from invdiff.operator import stack

C = {torch.float32: torch.complex64, torch.float64: torch.complex128}


def _mask(*shape, seed=0):
    mask = torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    mask[..., shape[-2] // 2, shape[-1] // 2] = True
    return mask


def _maps(d, *shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.complex128).to(C[d])


def _lines(*shape, axis=-1, seed=0):
    """A mask that is constant along every axis but one."""
    line = _mask(1, shape[axis], seed=seed)[0]
    return line.reshape(-1, *[1] * (-1 - axis)).expand(shape)


MRI = {
    "frames": lambda d: O.FramesMRI(_mask(3, 4, 5), _maps(d, 2, 4, 5)),
    "frames-slices": lambda d: O.FramesMRI(_mask(2, 5, 4), _maps(d, 2, 3, 5, 4), frame="z"),
    "frames-lines": lambda d: O.FramesMRI(
        torch.stack([_lines(5, 4, axis=-2, seed=s) for s in range(3)]), _maps(d, 2, 5, 4)
    ),
    "frames-per-case": lambda d: O.FramesMRI(_mask(3, 2, 4, 5), _maps(d, 2, 4, 5)),
    "frames-lines-per-case": lambda d: O.FramesMRI(
        torch.stack([_lines(2, 4, 3, seed=s) for s in range(2)]), _maps(d, 2, 2, 2, 4, 3)
    ),
    "frame-alone": lambda d: O.FramesMRI(_mask(1, 4, 5), _maps(d, 2, 4, 5)),
    "volume": lambda d: O.VolumeMRI(_mask(3, 4, 5), _maps(d, 2, 3, 4, 5)),
    "volume-per-case": lambda d: O.VolumeMRI(_mask(2, 3, 4, 3), _maps(d, 2, 2, 3, 4, 3)),
    "volume-lines-z": lambda d: O.VolumeMRI(_lines(4, 3, 5, axis=-3), _maps(d, 2, 4, 3, 5)),
    "volume-lines-y": lambda d: O.VolumeMRI(_lines(3, 4, 5, axis=-2), _maps(d, 2, 3, 4, 5)),
    "volume-lines-per-case": lambda d: O.VolumeMRI(
        torch.stack([_lines(2, 3, 5, seed=s) for s in range(2)]), _maps(d, 2, 2, 3, 5)
    ),
    # q-space: the same coils, another shift of the mask and another motion phase for every direction
    "diffusion-directions": lambda d: stack(
        [
            O.MultiCoilMRI(_mask(4, 5, seed=s), _maps(d, 2, 4, 5) * torch.polar(*_phase(4, 5, s)).to(C[d]))
            for s in range(3)
        ]
    ),
}


def _phase(ny, nx, seed):
    angle = torch.randn(ny, nx, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.ones_like(angle), angle
