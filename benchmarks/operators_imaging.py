"""Time operators of imaging against deepinv, torch's convolution and bare transforms.

All candidates run in turn, round after round, so that load on the machine falls on all alike; processor time is
counted. The table gives medians, and the median over rounds of the ratio to the first row of the group: above 1 is
faster than that row. Run with ``python benchmarks/operators_imaging.py [rounds]`` and ``OMP_NUM_THREADS=1``.
"""

from __future__ import annotations

import statistics
import sys
import time
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F

from invdiff import operators
from invdiff.operators import kernels

BATCHES = (1, 16)
SHAPE = (3, 256, 256)
Runs = dict[str, Callable[[], object]]


def blur(batch: int) -> Runs:
    import deepinv

    k = kernels.motion(61, seed=1)
    wide = kernels.gaussian(3.0, 61)
    x = torch.randn(batch, *SHAPE, generator=torch.Generator().manual_seed(0))
    spatial = deepinv.physics.Blur(filter=k[None, None], padding="circular")
    spectral = deepinv.physics.BlurFFT(img_size=SHAPE, filter=k[None, None])
    circular = operators.Blur(k, SHAPE)
    reflect = operators.Blur(k, SHAPE, boundary="reflect")
    separable = operators.Blur(wide, SHAPE, boundary="reflect")
    assert separable.method == "separable"
    assert torch.allclose(circular(x), spatial.A(x), atol=1e-4)
    weight = k.flip(0, 1)[None, None].expand(3, 1, 61, 61)
    v, rho = circular(x), torch.ones(batch)
    return {
        "deepinv Blur": lambda: spatial.A(x),
        "deepinv BlurFFT": lambda: spectral.A(x),
        "torch conv2d, padded": lambda: F.conv2d(F.pad(x, (30,) * 4, mode="reflect"), weight, groups=3),
        "invdiff Blur circular": lambda: circular(x),
        "invdiff Blur circular, adjoint": lambda: circular.adjoint(v),
        "invdiff Blur circular, normal": lambda: circular.normal(x),
        "invdiff Blur reflect, fft": lambda: reflect(x),
        "invdiff Blur reflect, separable": lambda: separable(x),
        "deepinv BlurFFT prox": lambda: spectral.prox_l2(x, v, gamma=1.0),
        "invdiff Blur circular, prox": lambda: circular.prox(x, v, rho),
        "invdiff Blur reflect separable, prox": lambda: separable.prox(x, v, rho),
    }


def downsampling(batch: int) -> Runs:
    import deepinv

    x = torch.randn(batch, *SHAPE, generator=torch.Generator().manual_seed(0))
    theirs = deepinv.physics.Downsampling(img_size=SHAPE, factor=4, filter="bicubic", padding="circular")
    bicubic = operators.Downsampling(4, SHAPE)
    average = operators.Downsampling(4, SHAPE, "average")
    filtered = operators.Downsampling(4, SHAPE, "blur", kernel=kernels.gaussian(2.0, 17))
    y, rho = bicubic(x), torch.ones(batch)
    return {
        "deepinv Downsampling": lambda: theirs.A(x),
        "torch interpolate": lambda: F.interpolate(x, size=(64, 64), mode="bicubic", antialias=True),
        "invdiff bicubic": lambda: bicubic(x),
        "invdiff average": lambda: average(x),
        "invdiff blur": lambda: filtered(x),
        "deepinv Downsampling, adjoint": lambda: theirs.A_adjoint(y),
        "invdiff bicubic, adjoint": lambda: bicubic.adjoint(y),
        "deepinv Downsampling, prox": lambda: theirs.prox_l2(x, y, gamma=1.0),
        "invdiff bicubic, prox": lambda: bicubic.prox(x, y, rho),
        "invdiff blur, prox": lambda: filtered.prox(x, y, rho),
    }


def phase_retrieval(batch: int) -> Runs:
    x = torch.randn(batch, 1, 256, 256, generator=torch.Generator().manual_seed(0))
    op = operators.FourierMagnitude(x.shape[1:], 1.5)
    v = op(x)

    def centred(z: torch.Tensor) -> torch.Tensor:
        k = torch.fft.ifftshift(F.pad(z, (64,) * 4), dim=(-2, -1))
        return torch.fft.fftshift(torch.fft.fft2(k, norm="ortho"), dim=(-2, -1)).abs()

    def gradient(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], object]:
        def run() -> object:
            with torch.enable_grad():
                z = x.clone().requires_grad_(True)
                return torch.autograd.grad(function(z), z, v)

        return run

    assert torch.allclose(op(x), centred(x), atol=1e-4)
    return {
        "centred fft2 of the padded image": lambda: centred(x),
        "bare rfft2(s=).abs()": lambda: torch.fft.rfft2(x, s=(384, 384), norm="ortho").abs(),
        "invdiff FourierMagnitude": lambda: op(x),
        "centred fft2, vjp by autograd": gradient(centred),
        "invdiff FourierMagnitude, vjp": lambda: op.vjp(x, v),
        "invdiff FourierMagnitude, vjp by autograd": gradient(op),
    }


def measure(runs: Runs, rounds: int) -> dict[str, list[tuple[float, float]]]:
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.process_time(), time.perf_counter()
            run()
            times[name].append((time.process_time() - start[0], time.perf_counter() - start[1]))
    return times


def main(rounds: int = 5) -> None:
    warnings.simplefilter("ignore")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), {rounds} rounds\n")
    print("| batch | candidate | CPU ms | wall ms | times faster than the first |\n|---|---|---|---|---|")
    with torch.no_grad():
        for group in (blur, downsampling, phase_retrieval):
            for batch in BATCHES:
                times = measure(group(batch), rounds)
                first = next(iter(times.values()))
                for name, values in times.items():
                    cpu, wall = (1e3 * statistics.median(v[i] for v in values) for i in (0, 1))
                    ratio = statistics.median(f[0] / v[0] for f, v in zip(first, values))
                    print(f"| {batch} | {name} | {cpu:.1f} | {wall:.1f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
