"""Time ``MultiCoilMRI.normal`` against its floor (two bare batched FFTs), sigpy and deepinv.

All candidates run in turn, round after round, so that load on the machine falls on all alike, and processor
time is counted; the table gives the median over rounds of the ratio to the bare FFTs of the same round.
Run with ``python benchmarks/operators_mri.py [rounds]``.
"""

from __future__ import annotations

import statistics
import sys
import time
import warnings
from collections.abc import Callable

import numpy as np
import torch

from invdiff.operators import MultiCoilMRI

SIZES = [(16, 320, 320), (8, 230, 180)]
BATCHES = [1, 4]


def candidates(coils: int, ny: int, nx: int, batch: int) -> dict[str, Callable[[], object]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepinv
        import sigpy

    g = torch.Generator().manual_seed(0)
    mask = (torch.rand(ny, nx, generator=g) < 0.3).float()
    maps = torch.randn(coils, ny, nx, generator=g, dtype=torch.complex64)
    op = MultiCoilMRI(mask, maps)
    x, k = op.domain.randn(batch, 1), op.range.randn(batch, 2)

    linop = (
        sigpy.linop.Multiply((coils, ny, nx), mask.numpy())
        * sigpy.linop.FFT((coils, ny, nx), axes=(-2, -1))
        * sigpy.linop.Multiply((ny, nx), maps.numpy())
    )
    images = x[:, 0].numpy()
    physics = deepinv.physics.MultiCoilMRI(mask=mask[None, None], coil_maps=maps[None], img_size=(2, ny, nx))
    channels = torch.view_as_real(x[:, 0]).movedim(-1, 1).contiguous()

    ours = op.normal(x)
    theirs = np.stack([linop.H(linop(v)) for v in images])
    assert np.abs(ours[:, 0].numpy() - theirs).max() < 1e-4 * np.abs(theirs).max()
    deep = physics.A_adjoint_A(channels)
    assert torch.allclose(torch.view_as_real(ours[:, 0]).movedim(-1, 1), deep, atol=1e-4 * float(deep.abs().max()))
    return {
        "two bare FFTs": lambda: torch.fft.ifft2(torch.fft.fft2(k)),
        "invdiff normal": lambda: op.normal(x),
        "invdiff adjoint(forward)": lambda: op.adjoint(op(x)),
        "sigpy A.H * A": lambda: [linop.H(linop(v)) for v in images],
        "deepinv A_adjoint_A": lambda: physics.A_adjoint_A(channels),
    }


def measure(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.process_time()
            run()
            times[name].append(time.process_time() - start)
    return times


def main(rounds: int = 15) -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), {rounds} rounds\n")
    print("| coils, ky, kx | batch | candidate | median CPU ms | ratio to bare FFTs |\n|---|---|---|---|---|")
    with torch.no_grad():
        for size in SIZES:
            for batch in BATCHES:
                times = measure(candidates(*size, batch), rounds)
                bare = times["two bare FFTs"]
                for name, values in times.items():
                    ratio = statistics.median(v / b for v, b in zip(values, bare))
                    print(f"| {size} | {batch} | {name} | {1e3 * statistics.median(values):.1f} | {ratio:.2f} |")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
