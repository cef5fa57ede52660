"""Emission tomography and ultrasound that the conformance suite runs, by name; see ``FACTORIES``."""

from __future__ import annotations

from collections.abc import Callable

import torch

from invdiff import operators as O
from invdiff.operator import Operator

ANGLES = (0.0, 0.6, 1.4, 2.3)


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


PET_ULTRASOUND: dict[str, Callable[[torch.dtype], Operator]] = {
    "pet": lambda d: O.PET((1, 7, 6), ANGLES, attenuation_map=0.1 * rand(7, 6), duration=5.0, dtype=d),
    "pet-blurred": lambda d: O.PET((2, 9, 10), ANGLES[:3], resolution=1.2, sensitivity=rand(3, 1), dtype=d),
    "pet-per-case": lambda d: O.PET(
        (1, 7, 8), ANGLES, sensitivity=rand(12), attenuation=rand(3, 1, 4, 12), bins=12, resolution=0.9, dtype=d
    ),
    "pet-ring": lambda d: O.PET(
        (1, 6, 5),
        ANGLES,
        ring_radius=6.0,
        bin_width=0.8,
        method="matrix-free",
        spacing={"y": 1.3, "x": 0.9},
        dtype=d,
    ),
}
