"""Ray transforms that the conformance suite runs, by name; see ``FACTORIES`` in ``test_operators``."""

from __future__ import annotations

from collections.abc import Callable

import torch

from invdiff import operators as O
from invdiff.operator import Operator

ANGLES = (0.0, 0.5, 0.7853981633974483, 1.5, 2.2, 4.0)
DISTANCES = {"source_distance": 9.0, "detector_distance": 6.0}
#: rays that are steeper in z than across
CLOSE = {"source_distance": 2.0, "detector_distance": 0.5, "detector_spacing": (2.0, 1.0)}
SIDES = {"spacing": {"y": 1.3, "x": 0.8}}

CT: dict[str, Callable[[torch.dtype], Operator]] = {
    "ct-parallel": lambda d: O.ParallelBeamCT((1, 7, 6), ANGLES, dtype=d),
    "ct-parallel-pixels-not-square": lambda d: O.ParallelBeamCT((1, 5, 9), ANGLES, dtype=d, **SIDES),
    "ct-parallel-matrix-free": lambda d: O.ParallelBeamCT((1, 7, 6), ANGLES, method="matrix-free", dtype=d),
    "ct-parallel-reference": lambda d: O.ParallelBeamCT((1, 7, 6), ANGLES, method="reference", dtype=d),
    "ct-parallel-slices": lambda d: O.ParallelBeamCT((2, 3, 5, 6), ANGLES[:3], dtype=d),
    "ct-parallel-narrow-off-centre": lambda d: O.ParallelBeamCT(
        (6, 7), ANGLES, detectors=5, centre=1.3, detector_spacing=0.7, truncated=True, dtype=d
    ),
    "ct-fan": lambda d: O.FanBeamCT((1, 6, 7), ANGLES, dtype=d, **DISTANCES),
    "ct-fan-curved": lambda d: O.FanBeamCT((1, 7, 5), ANGLES, curved=True, dtype=d, **DISTANCES, **SIDES),
    "ct-fan-matrix-free": lambda d: O.FanBeamCT((2, 5, 6), ANGLES, method="matrix-free", dtype=d, **DISTANCES),
    "ct-fan-reference": lambda d: O.FanBeamCT((1, 6, 5), ANGLES, method="reference", dtype=d, **DISTANCES),
    "ct-cone": lambda d: O.ConeBeamCT((1, 4, 5, 6), ANGLES[:4], method="matrix-free", dtype=d, **DISTANCES),
    "ct-cone-table": lambda d: O.ConeBeamCT((4, 3, 5), ANGLES[:4], method="table", dtype=d, **DISTANCES),
    "ct-cone-reference": lambda d: O.ConeBeamCT(
        (1, 3, 4, 5), ANGLES[:3], method="reference", dtype=d, spacing={"z": 2.0, "y": 1.3, "x": 0.8}, **DISTANCES
    ),
    "ct-cone-tall": lambda d: O.ConeBeamCT(
        (1, 12, 2, 2), ANGLES[:3], detectors=(9, 4), method="matrix-free", dtype=d, **CLOSE
    ),
    "ct-helix": lambda d: O.ConeBeamCT(
        (1, 5, 4, 6), ANGLES, pitch=3.0, method="matrix-free", detectors=(3, 8), dtype=d, **DISTANCES
    ),
    "beer-lambert": lambda d: O.BeerLambert((1, 3, 4), 7.0, dtype=d),
    "beer-lambert-per-case": lambda d: O.BeerLambert((3, 4), torch.arange(1.0, 3.0)[:, None, None], dtype=d),
    "beer-lambert-of-rays": lambda d: (
        O.BeerLambert((1, 6, 9), 3.0, dtype=d) @ (0.02 * O.ParallelBeamCT((1, 6, 6), ANGLES, dtype=d))
    ),
    "ct-parallel-one-view": lambda d: O.ParallelBeamCT((1, 4, 1), [0.2], dtype=d),
}
