"""What the driver and the sampler cost beyond the network: wall time over bare batched network calls.

For each sampler the same problem is solved, and in between the bare network is called as often, on the same batch,
with as many reverse passes as the sampler asks for, and the bare operator as often as it was needed. Interleaved,
after one round that does not count; medians. The first ratio is wall time over network calls; the second has the
operator's own time in the denominator too, so that what is left is driver and sampler. On a busy machine take one
thread and ``--clock process``, which counts the time of this process alone.

    python benchmarks/overhead.py [--rounds 5] [--batch 4] [--steps 20] [--samplers dds diffpir dps | all]
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable

import torch

import invdiff
from invdiff import likelihoods, operators, priors, samplers
from invdiff.plan import missing_capabilities
from invdiff.priors.held_out import held_out_slice

Clock = Callable[[], float]


def problems() -> dict[str, invdiff.Problem]:
    """A single-coil scan (closed-form prox) and an eight-coil scan (conjugate gradients)."""
    image = torch.from_numpy(held_out_slice(0))[None, None]
    ny, nx = image.shape[-2:]
    generator = torch.Generator().manual_seed(0)
    lines = (torch.rand(ny, 1, generator=generator) < 0.3).float().expand(ny, nx).clone()
    lines[ny // 2 - 8 : ny // 2 + 8] = 1
    points = (torch.rand(ny, nx, generator=generator) < 0.15).float()
    points[ny // 2 - 12 : ny // 2 + 12, nx // 2 - 12 : nx // 2 + 12] = 1
    y, x = torch.meshgrid(torch.linspace(-1, 1, ny), torch.linspace(-1, 1, nx), indexing="ij")
    angles = torch.arange(8) * (2 * torch.pi / 8)
    maps = torch.stack([torch.exp(-((y - a.sin()) ** 2) - (x - a.cos()) ** 2) * torch.exp(1j * a) for a in angles])
    maps = (maps / maps.abs().square().sum(0).sqrt()).to(torch.complex64)
    noise = likelihoods.Gaussian(0.01)
    single = operators.MultiCoilMRI(lines, torch.ones(1, ny, nx, dtype=torch.complex64))
    several = operators.MultiCoilMRI(points, maps)
    return {
        "1 coil, closed form": invdiff.Problem.simulate(single, noise, image),
        "8 coils, conjugate gradients": invdiff.Problem.simulate(several, noise, image),
    }


def bare(prior: invdiff.Prior, shape: tuple[int, ...], calls: int, reverse: int, clock: Clock) -> float:
    """Seconds for ``calls`` bare batched network calls with ``reverse`` reverse passes spread over them."""
    x, sigma = torch.randn(shape), torch.full((shape[0],), 0.5)
    pairs = min(calls, reverse)
    start = clock()
    for i in range(pairs):
        z = x.detach().requires_grad_(True)
        d = prior.denoiser(z, sigma)
        passes = reverse // pairs + (i < reverse % pairs)
        for j in range(passes):
            torch.autograd.grad(d, z, x, retain_graph=j + 1 < passes)
    for _ in range(calls - pairs):
        with torch.no_grad():
            prior.denoiser(x, sigma)
    return clock() - start


def applications(problem: invdiff.Problem, rows: int, evaluations: int, clock: Clock) -> float:
    """Seconds for half as many bare normal operators (two evaluations each) on a batch."""
    x = problem.operator.domain.randn(rows)
    start = clock()
    for _ in range(evaluations // 2):
        problem.operator.normal(x)
    return clock() - start


def chosen(names: list[str], steps: int) -> list[samplers.Sampler]:
    """Samplers by name at a number of steps; ``all`` are those of single images that take data."""
    volumes = {"dds3d", "mbir"}
    if names == ["all"]:
        names = [n for n, cls in samplers.REGISTRY.items() if cls.conditional and n not in volumes]
    return [samplers.get(name, steps=steps) for name in names]


def main() -> None:
    """Print one Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--samplers", nargs="+", default=["dds", "diffpir", "dps"], help="names, or all")
    parser.add_argument("--problems", nargs="+", type=int, default=[1, 8], help="numbers of coils")
    parser.add_argument("--threads", type=int, default=0, help="threads to use")
    parser.add_argument("--clock", choices=["wall", "process"], default="wall")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    clock = time.process_time if options.clock == "process" else time.perf_counter
    prior = priors.load("brain-mri")
    print("| problem | sampler | wall / network (median, range) | / (network + operator) |\n|---|---|---|---|")
    for title, problem in problems().items():
        if int(title.split()[0]) not in options.problems:
            continue
        canvas = prior.adapt(problem).codec.prior.shape
        for made in chosen(options.samplers, options.steps):
            if missing_capabilities(made, problem.pullback(prior.adapt(problem).codec), prior):
                continue
            ratios, both = [], []
            for _ in range(options.rounds + 1):
                start = clock()
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)  # a few steps and draws may collapse
                    out = invdiff.sample(
                        problem, prior, made, draws=options.batch, max_batch=options.batch, progress=False
                    )
                wall = clock() - start
                calls, reverse, evaluations = (int(out.stats[k].values.ravel()[0]) for k in ("nfe", "vjp", "noe"))
                network = bare(prior, (options.batch, *canvas), calls, reverse, clock)
                ratios.append(wall / network)
                both.append(wall / (network + applications(problem, options.batch, evaluations, clock)))
            ratios, both = ratios[1:], both[1:]
            span = f"{statistics.median(ratios):.3f}, {min(ratios):.3f} to {max(ratios):.3f}"
            print(f"| {title} | {made.name} | {span} | {statistics.median(both):.3f} |", flush=True)


if __name__ == "__main__":
    main()
