"""``invdiff demo``: the main job on a simulated scan of a slice that the prior has not seen."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from invdiff.cli.guard import guarded
from invdiff.cli.options import (
    Batch,
    Debug,
    Device,
    Draws,
    Json,
    PriorName,
    Resume,
    SamplerName,
    Seed,
    Settings,
    Steps,
    check_numbers,
    check_output,
    make_sampler,
    print_json,
)
from invdiff.cli.output import console, print_facts, table, totals
from invdiff.cli.runs import check_prior, draw
from invdiff.errors import InvdiffError

if TYPE_CHECKING:
    import numpy as np

    from invdiff.posterior import Posterior
    from invdiff.problem import Problem

_COILS, _ACCELERATION, _CENTRE, _SNR = 8, 8.0, 24, 60.0


@guarded
def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for invdiff-demo.nc and invdiff-demo.png.")
    ] = Path(),
    index: Annotated[int, typer.Option("--index", help="Which of the held-out synthetic slices.")] = 1,
    sampler: SamplerName = "dds",
    draws: Draws = 19,
    prior: PriorName = "brain-mri",
    steps: Steps = 40,
    set: Settings = None,
    seed: Seed = 0,
    device: Device = None,
    batch: Batch = None,
    resume: Resume = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Simulate an 8-coil, 8-fold accelerated brain scan, reconstruct it, and compare with the truth."""
    from invdiff.figures import save_png, summary_figure
    from invdiff.priors import library

    start = time.monotonic()
    check_numbers(draws, batch, seed)
    store, picture = output / "invdiff-demo.nc", output / "invdiff-demo.png"
    check_output(store, (".nc",), "The output")
    chosen = make_sampler(sampler, None, steps, set)
    problem = simulate_slice(index, seed)
    loaded = library.load(prior)
    check_prior(loaded, problem)
    if not json:
        _announce(problem, loaded.name, chosen)
    posterior = draw(
        problem,
        loaded,
        chosen,
        store,
        progress=False if json else None,
        draws=draws,
        seed=seed,
        device=device,
        max_batch=batch,
        resume=resume,
        title="Simulated 8-coil brain scan, 8-fold accelerated",
    )
    with posterior:
        found = {
            "output": str(store),
            "figure": str(save_png(summary_figure(posterior), picture)),
            **totals(posterior),
            "coverage": _coverage(posterior, problem),
            "scores": _scores(posterior, problem),
        }
    found["total_seconds"] = round(time.monotonic() - start, 1)
    if json:
        print_json(found)
    else:
        _print(found)


def simulate_slice(index: int, seed: int) -> Problem:
    """Return the simulated scan as a problem that knows its truth."""
    import torch

    from invdiff import mri, mri_simulation
    from invdiff.priors.held_out import count, held_out_slice

    if not 0 <= index < count():
        raise InvdiffError(
            f"There are {count()} held-out slices, and slice {index} was asked for; use 0 to {count() - 1}."
        )
    image = held_out_slice(index)
    scan, sigma = mri_simulation.simulate_scan(image, _COILS, _ACCELERATION, _CENTRE, _SNR, seed)
    maps = mri_simulation.birdcage_maps(_COILS, (image.shape[0], image.shape[1]))
    problem = mri.problem_from_kspace(scan, coil_maps=maps, sigma=sigma)
    return dataclasses.replace(problem, x_true=torch.from_numpy(image)[None, None])


def _announce(problem: Problem, prior: str, sampler: Any) -> None:
    meta = problem.meta
    print_facts(
        {
            "scan": meta["source"],
            "sampling": f"acceleration {meta['acceleration']:.3g}, Poisson disc, {_CENTRE} x {_CENTRE} centre",
            "noise": f"{meta['sigma']:.3g} per real component",
            "prior": prior,
            "sampler": f"{sampler.name}, {sampler.steps} steps",
        }
    )


def _truth(problem: Problem) -> np.ndarray:
    assert problem.x_true is not None
    return problem.x_true[0, 0].numpy()


def _scores(posterior: Posterior, problem: Problem) -> dict[str, dict[str, float]]:
    """Return PSNR, SSIM and NRMSE of the magnitude for each method; baselines take their best weight."""
    import numpy as np

    from invdiff import baselines, metrics, mri

    truth = _truth(problem)
    peak = float(np.abs(truth).max())
    kspace, maps = problem.y[0].numpy(), mri.coil_maps_of(problem)[0].numpy()

    def error(image: np.ndarray) -> float:
        return metrics.nrmse(image, truth)

    sense = min((baselines.cg_sense(kspace, maps, lam) for lam in (1e-3, 1e-2, 3e-2, 0.1)), key=error)
    point = posterior.estimate if posterior.kind == "point" else posterior.mean()
    images = {
        "zero-filled": baselines.zero_filled(kspace, maps),
        "SENSE": sense,
        "l1-wavelet": baselines.l1_wavelet(kspace, maps, (3e-3, 1e-2, 2e-2), 50, error=error),
        "invdiff, mean of the draws": np.asarray(point).reshape(-1, *truth.shape)[0],
    }
    return {
        name: {
            "psnr": metrics.psnr(image, truth, peak),
            "ssim": metrics.ssim(image, truth, peak),
            "nrmse": metrics.nrmse(image, truth),
        }
        for name, image in images.items()
    }


def _head(truth: np.ndarray) -> np.ndarray:
    """Return the pixels inside the head: above 5 % of the maximum, holes filled."""
    import numpy as np
    from scipy import ndimage

    inside = np.abs(truth) > 0.05 * np.abs(truth).max()
    return np.asarray(ndimage.binary_fill_holes(ndimage.binary_closing(inside, iterations=3)))


def _coverage(posterior: Posterior, problem: Problem) -> dict[str, float] | None:
    """Return which share of the pixels inside the head has its true magnitude in the 90 % interval."""
    import numpy as np

    if posterior.kind == "point" or posterior.n_draws < 2:
        return None
    interval = posterior.interval(0.9)
    truth = np.abs(_truth(problem))
    lower, upper = (np.asarray(interval[k]).reshape(truth.shape) for k in ("lower", "upper"))
    inside = _head(truth)
    return {
        "level": float(interval.attrs["supported_level"]),
        "covered": float(((truth >= lower) & (truth <= upper))[inside].mean()),
    }


def _print(found: dict[str, Any]) -> None:
    out = table("reconstruction", "PSNR (dB)", "SSIM", "NRMSE", right=("PSNR (dB)", "SSIM", "NRMSE"))
    for name, score in found["scores"].items():
        style = "bold" if name.startswith("invdiff") else None
        out.add_row(name, f"{score['psnr']:.1f}", f"{score['ssim']:.3f}", f"{score['nrmse']:.3f}", style=style)
    console().print(out)
    shown: dict[str, Any] = {}
    if found["coverage"]:
        level, covered = found["coverage"]["level"], found["coverage"]["covered"]
        shown["coverage"] = f"{covered:.1%} of the pixels inside the head lie in their {level:.0%} interval"
    shown["network evaluations"] = f"{found.get('network_evaluations', 0)} for {found['draws']} draws"
    shown["time"] = f"{found['total_seconds']:.0f} s in all, {found.get('seconds', 0):.0f} s of it drawing"
    shown["written"] = f"{found['output']}, {found['figure']}"
    print_facts(shown)
