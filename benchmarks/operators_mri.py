"""Time MRI operators: Cartesian ones against bare FFTs, sigpy and deepinv; radial ones against sigpy and finufft.

All candidates run in turn, round after round, so that load on the machine falls on all alike, and processor
time is counted; the tables give the median over rounds of the ratio to the first candidate of the same round.
Run with ``python benchmarks/operators_mri.py [rounds] [cartesian|radial]``, radial with one thread for the figures
of the documents.
"""

from __future__ import annotations

import statistics
import sys
import time
import warnings
from collections.abc import Callable

import numpy as np
import torch

from invdiff.operators import MultiCoilMRI, NonCartesianMRI, trajectories

SIZES = [(16, 320, 320), (8, 230, 180)]
BATCHES = [1, 4]
RADIAL = [("gridding", 7e-3), ("gridding", 1e-3), ("gridding", 1e-6), ("finufft", 1e-3), ("finufft", 1e-6)]


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


def radial_candidates(batch: int) -> tuple[dict[str, Callable[[], object]], dict[str, float]]:
    """256 x 256 pixels, 96 spokes of 512 samples, 8 coils; each method with its error against the exact sums."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import sigpy
        import sigpy.mri

    n, coils = 256, 8
    k = trajectories.radial(n, 96, 512)
    maps = torch.randn(coils, n, n, generator=torch.Generator().manual_seed(0), dtype=torch.complex64)
    linop = sigpy.mri.linop.Sense(maps.numpy(), coord=k.numpy().astype(np.float32))
    ops = {f"{m} {a:g}": NonCartesianMRI(k, maps, accuracy=a, method=m) for m, a in RADIAL}
    toeplitz = NonCartesianMRI(k, maps, normal="toeplitz")
    x, y = toeplitz.domain.randn(batch, 1), toeplitz.range.randn(batch, 2)
    images, data = x[:, 0].numpy(), y.numpy()

    some = torch.randperm(k.shape[0] * k.shape[1], generator=torch.Generator().manual_seed(0))[:300]
    exact = NonCartesianMRI(k.reshape(-1, 2)[some], maps, method="reference")(x[:1]).flatten(2)
    found = {"sigpy": torch.from_numpy(linop(images[0]))[None], **{name: op(x[:1]) for name, op in ops.items()}}
    errors = {m: float((v.flatten(2)[..., some] - exact).norm() / exact.norm()) for m, v in found.items()}

    runs: dict[str, Callable[[], object]] = {}
    runs["forward sigpy"] = lambda: [linop(v) for v in images]
    runs |= {f"forward {name}": lambda op=op: op(x) for name, op in ops.items()}
    runs["adjoint sigpy"] = lambda: [linop.H(v) for v in data]
    runs |= {f"adjoint {name}": lambda op=op: op.adjoint(y) for name, op in ops.items()}
    runs["normal sigpy"] = lambda: [linop.H(linop(v)) for v in images]
    runs |= {f"normal {name}": lambda op=op: op.normal(x) for name, op in ops.items()}
    runs["normal toeplitz"] = lambda: toeplitz.normal(x)
    return runs, errors


def radial(rounds: int) -> None:
    print(
        "\n| batch | direction | method | error | median CPU ms | times sigpy's speed |\n|---|---|---|---|---|---|"
    )
    for batch in (1, 16):
        runs, errors = radial_candidates(batch)
        times = measure(runs, rounds if batch == 1 else max(2, rounds // 4))
        for name, values in times.items():
            direction, _, method = name.partition(" ")
            base = times[f"{direction} sigpy"]
            speed = statistics.median(b / v for v, b in zip(values, base))
            error = f"{errors[method]:.1e}" if method in errors else "1e-6"
            ms = 1e3 * statistics.median(values)
            print(f"| {batch} | {direction} | {method} | {error} | {ms:.1f} | {speed:.2f} |")


def main(rounds: int = 15, what: str = "") -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), {rounds} rounds\n")
    if what == "radial":
        with torch.no_grad():
            radial(rounds)
        return
    print("| coils, ky, kx | batch | candidate | median CPU ms | ratio to bare FFTs |\n|---|---|---|---|---|")
    with torch.no_grad():
        for size in SIZES:
            for batch in BATCHES:
                times = measure(candidates(*size, batch), rounds)
                bare = times["two bare FFTs"]
                for name, values in times.items():
                    ratio = statistics.median(v / b for v, b in zip(values, bare))
                    print(f"| {size} | {batch} | {name} | {1e3 * statistics.median(values):.1f} | {ratio:.2f} |")
        if not what:
            radial(rounds)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]), *sys.argv[2:3])
