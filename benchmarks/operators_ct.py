"""Time ``ParallelBeamCT`` against deepinv's ``Tomography``, scipy's CSR and torch's CSR with 64-bit positions.

All candidates run in turn, round after round, so that load on the machine falls on all alike. The table gives the
medians over rounds of processor and wall time, and of the ratio of processor times to deepinv's of the same round
(how many times faster). Peak memory is the growth of the resident set in a process of its own, one call each way.

Run with ``OMP_NUM_THREADS=1 python benchmarks/operators_ct.py [rounds]``.
"""

from __future__ import annotations

import importlib
import math
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from invdiff.operators import ParallelBeamCT

CASES = [(256, 180, 1), (256, 180, 16), (512, 60, 1)]
Runs = dict[str, tuple[Callable[[], object], Callable[[], object]]]


def ours(
    n: int, views: int, batch: int, method: str = "auto"
) -> tuple[Callable[[], object], Callable[[], object]]:
    op = ParallelBeamCT((1, n, n), np.linspace(0, np.pi, views, endpoint=False), method=method)
    x, y = op.domain.randn(batch, 1), op.range.randn(batch, 2)
    return lambda: op(x), lambda: op.adjoint(y)


def deepinv(n: int, views: int, batch: int) -> tuple[Callable[[], object], Callable[[], object]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from deepinv.physics import Tomography

        angles = torch.linspace(0, 180, views + 1)[:-1]
        physics = Tomography(angles=angles, img_width=n, circle=False, normalize=False)
        x = torch.randn(batch, 1, n, n)
        y = torch.randn_like(physics.A(x))
    return lambda: physics.A(x), lambda: physics.A_adjoint(y)


def as_torch(m: Any) -> torch.Tensor:
    start, columns, values = (torch.from_numpy(v) for v in (m.indptr.astype("i8"), m.indices.astype("i8"), m.data))
    return torch.sparse_csr_tensor(start, columns, values, m.shape)


def candidates(n: int, views: int, batch: int) -> Runs:
    from scipy import sparse

    op = ParallelBeamCT((1, n, n), np.linspace(0, np.pi, views, endpoint=False), method="table")
    transpose = op._table().transpose
    parts = [t.numpy() for t in (transpose.values(), transpose.col_indices(), transpose.crow_indices())]
    back = sparse.csr_matrix(tuple(parts), transpose.shape)
    csr = back.T.tocsr()
    x, y = op.domain.randn(batch, 1), op.range.randn(batch, 2)
    xs, ys = x.flatten(1).T.contiguous(), y.flatten(1).T.contiguous()
    assert np.abs(csr @ xs.numpy() - op(x).flatten(1).T.numpy()).max() < 1e-2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        long = [as_torch(m) for m in (csr, back)]
    return {
        "deepinv Tomography": deepinv(n, views, batch),
        "invdiff table": (lambda: op(x), lambda: op.adjoint(y)),
        "invdiff matrix-free": ours(n, views, batch, "matrix-free"),
        "scipy CSR": (lambda: csr @ xs.numpy(), lambda: back @ ys.numpy()),
        "torch CSR, 64-bit positions": (lambda: long[0] @ xs, lambda: long[1] @ ys),
    }


def measure(runs: Runs, rounds: int) -> dict[tuple[str, int], list[tuple[float, float]]]:
    """Return processor and wall times by candidate and direction, candidates in turn."""
    times: dict[tuple[str, int], list[tuple[float, float]]] = {(name, i): [] for name in runs for i in (0, 1)}
    for pair in runs.values():
        for run in pair:
            run()
    for _ in range(rounds):
        for name, pair in runs.items():
            for i, run in enumerate(pair):
                cpu, wall = time.process_time(), time.perf_counter()
                run()
                times[name, i].append((time.process_time() - cpu, time.perf_counter() - wall))
    return times


def table(runs: Runs, rounds: int, label: str) -> None:
    times = measure(runs, rounds)
    first = next(iter(runs))
    for i, direction in enumerate(("forward", "adjoint")):
        for name in runs:
            cpu, wall = (1e3 * statistics.median(t[k] for t in times[name, i]) for k in (0, 1))
            gain = statistics.median(a[0] / b[0] for a, b in zip(times[first, i], times[name, i]))
            print(f"| {label} | {direction} | {name} | {cpu:.1f} | {wall:.1f} | {gain:.1f} |", flush=True)


def normals(n: int, views: int, batch: int, rounds: int) -> float:
    """Return the time of ``normal`` over that of a forward and an adjoint."""
    op = ParallelBeamCT((1, n, n), np.linspace(0, np.pi, views, endpoint=False))
    x = op.domain.randn(batch, 1)
    runs: Runs = {"both": (lambda: op.normal(x), lambda: op.adjoint(op(x)))}
    times = measure(runs, rounds)
    return statistics.median(a[0] / b[0] for a, b in zip(times["both", 0], times["both", 1]))


def resident(field: str) -> float:
    """Return a figure of Linux's account of this process, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def peak(name: str, n: int, views: int, batch: int) -> None:
    """Print by how many MB one call each way raises the resident set, everything built on the way included."""
    importlib.import_module("deepinv" if name == "deepinv" else "scipy.sparse")  # their own weight is not counted
    before = resident("VmRSS")
    pair = deepinv(n, views, batch) if name == "deepinv" else ours(n, views, batch, name)
    for run in pair:
        run()
    print(resident("VmHWM") - before)


def main(rounds: int = 5) -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), {rounds} rounds\n")
    print("| image, views, batch | direction | candidate | CPU ms | wall ms | times faster than deepinv |")
    print("|---|---|---|---|---|---|")
    with torch.no_grad():
        for n, views, batch in CASES:
            table(candidates(n, views, batch), rounds, f"{n}, {views}, {batch}")
        print(f"\nnormal at 256, 180, 16: {normals(256, 180, 16, rounds):.2f} times forward and adjoint\n")
    print("| image, views, batch | candidate | peak MB |\n|---|---|---|")
    for n, views, batch in CASES[:2]:
        for name in ("table", "matrix-free", "deepinv"):
            command = [sys.executable, __file__, "--peak", name, *map(str, (n, views, batch))]
            out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            print(f"| {n}, {views}, {batch} | {name} | {math.ceil(float(out.split()[-1]))} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak"]:
        with torch.no_grad():
            peak(sys.argv[2], *map(int, sys.argv[3:6]))
    else:
        main(*map(int, sys.argv[1:2]))
