"""Emission tomography and ultrasound that the conformance suite runs, by name; see ``FACTORIES``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from invdiff import operators as O
from invdiff.operator import Operator

ANGLES = (0.0, 0.6, 1.4, 2.3)


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ultrasound(d: torch.dtype, **options: Any) -> Operator:
    given = {"sampling_frequency": 16e6, "centre_frequency": 5e6, "bandwidth": 0.8, "spacing": 2e-4, "dtype": d}
    return O.PlaneWaveUltrasound((1, 5, 6), [0.1, -0.25], [-2e-4, 1e-4, 4e-4], **{**given, **options})


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
    "ultrasound": ultrasound,
    "ultrasound-matrix-free": lambda d: ultrasound(d, method="matrix-free", spacing={"z": 1e-4, "x": 3e-4}),
    "ultrasound-window-aperture": lambda d: ultrasound(
        d, depth=1e-3, start=1.4e-6, samples=23, f_number=1.0, element_width=2e-4, transmit_delays=[1e-7, 0.0]
    ),
    "ultrasound-iq": lambda d: ultrasound(d, data="iq", sampling_frequency=9e6),
    "ultrasound-iq-complex": lambda d: ultrasound(d, data="iq", sampling_frequency=9e6, dtype=d.to_complex()),
    "ultrasound-iq-complex-matrix-free": lambda d: ultrasound(
        d, data="iq", sampling_frequency=9e6, dtype=d.to_complex(), method="matrix-free"
    ),
}
