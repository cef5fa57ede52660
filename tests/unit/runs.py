"""Small made-up runs for the tests of the result side."""

import numpy as np
import torch

from invdiff.run import MemoryDraws, Run
from invdiff.spaces import Space

COMPLEX = Space((1, 9, 7), torch.complex64, spacing={"y": 1.5, "x": 0.5}, units="mT")
REAL = Space((2, 6, 5), torch.float64)
LINE = Space((11,), torch.float32)


def make_run(
    space=COMPLEX, cases=1, draws=12, *, kind="posterior", bad=(), missing=(), truth=True, seed=0, **more
):
    """A run with standard normal draws; ``bad`` and ``missing`` list (case, draw)."""
    rng = np.random.default_rng(seed)
    dtype = str(space.dtype).removeprefix("torch.")

    def normal(*shape):
        x = rng.standard_normal(shape)
        return (x + 1j * rng.standard_normal(shape) if space.is_complex else x).astype(dtype)

    x = normal(cases, draws, *space.shape)
    status = np.full((cases, draws), "ok", dtype="U7")
    for case, draw in bad:
        x[case, draw].flat[0] = np.nan
        status[case, draw] = "nan"
    for case, draw in missing:
        x[case, draw] = np.nan
        status[case, draw] = "missing"
    data = Space((3, 4, 5), torch.complex64, dims=("coil", "y", "x"))
    stats = {
        "nfe": np.full((cases, draws), 40),
        "wall_s": rng.random((cases, draws)),
        "log_likelihood": rng.standard_normal((cases, draws)),
        "status": status,
        **more.pop("stats", {}),
    }
    observed = {
        "y": (rng.standard_normal((cases, 3, 4, 5)) + 1j).astype("complex64"),
        "mask": np.ones((1, 1, 4, 5), dtype=bool),
        "sigma": np.array(0.1),
    }
    provenance = {
        "sampler": {"name": "dds", "config": {"steps": 30, "eta": 0.5}},
        "prior": {"id": "brain-mri", "sha256": "ab" * 32},
        "seed": 0,
        "device": "cpu",
        "note": "line one\nline two, \u00e9",
    }
    return Run(
        space=space,
        kind=kind,
        draws=MemoryDraws(x),
        stats=stats,
        observed=observed,
        range_space=data,
        x_true=normal(cases, *space.shape) if truth else None,
        provenance=more.pop("provenance", provenance),
        title=more.pop("title", "test run"),
        **more,
    )
