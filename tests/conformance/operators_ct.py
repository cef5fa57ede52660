"""Ray transforms that the conformance suite runs, by name; see ``FACTORIES`` in ``test_operators``."""

from __future__ import annotations

from collections.abc import Callable

import torch

from invdiff import operators as O
from invdiff.operator import Operator

ANGLES = (0.0, 0.5, 0.7853981633974483, 1.5, 2.2, 4.0)
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
    "beer-lambert": lambda d: O.BeerLambert((1, 3, 4), 7.0, dtype=d),
    "beer-lambert-per-case": lambda d: O.BeerLambert((3, 4), torch.arange(1.0, 3.0)[:, None, None], dtype=d),
    "beer-lambert-of-rays": lambda d: (
        O.BeerLambert((1, 6, 9), 3.0, dtype=d) @ (0.02 * O.ParallelBeamCT((1, 6, 6), ANGLES, dtype=d))
    ),
    "ct-parallel-one-view": lambda d: O.ParallelBeamCT((1, 4, 1), [0.2], dtype=d),
}
