"""``invdiff reconstruct``: from k-space to posterior draws of the image."""

from __future__ import annotations

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
    Preset,
    PriorName,
    Resume,
    SamplerName,
    Seed,
    Settings,
    Steps,
    check_disk,
    check_numbers,
    check_output,
    make_sampler,
    print_json,
)
from invdiff.cli.output import print_facts, totals
from invdiff.cli.runs import check_prior, draw, misfit
from invdiff.errors import InvdiffError

if TYPE_CHECKING:
    from invdiff.problem import Problem


@guarded
def reconstruct(
    file: Annotated[
        Path, typer.Argument(help="k-space: .npy, .npz, HDF5 in the layout of fastMRI, or BART .cfl/.hdr.")
    ],
    sampler: SamplerName = "dds",
    draws: Draws = 16,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Posterior (.nc or .zarr); FILE.nc here if left out.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option("--report", help="Figure (.png) or page (.html) to write.")
    ] = None,
    mask: Annotated[
        Path | None, typer.Option("--mask", help="Sampling mask; found from the data if left out.")
    ] = None,
    coil_maps: Annotated[
        Path | None, typer.Option("--coil-maps", help="Coil maps (coil, y, x); ESPIRiT if left out.")
    ] = None,
    noise_scan: Annotated[
        Path | None,
        typer.Option("--noise-scan", help="Noise scan (coil, ...): noise level, and whitening of coils."),
    ] = None,
    sigma: Annotated[
        float | None,
        typer.Option(
            "--sigma", help="Noise level per real component; estimated from the outermost samples if left out."
        ),
    ] = None,
    slice: Annotated[
        int | None, typer.Option("--slice", help="Slice of a volume; the middle one if left out.")
    ] = None,
    key: Annotated[str | None, typer.Option("--key", help="Name of the array in .npz or HDF5.")] = None,
    prior: PriorName = "brain-mri",
    preset: Preset = None,
    steps: Steps = None,
    set: Settings = None,
    seed: Seed = 0,
    device: Device = None,
    batch: Batch = None,
    resume: Resume = False,
    time_budget: Annotated[
        float | None, typer.Option("--time-budget", help="Start no further draws after this many seconds.")
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Reconstruct a Cartesian MRI scan: draws of the image given k-space, with provenance."""
    from invdiff import mri, support
    from invdiff.priors import library

    target = output or Path(Path(file).with_suffix(".nc").name)
    check_numbers(draws, batch, seed, time_budget)
    check_output(target, (".nc", ".zarr"), "The output")
    if report is not None:
        check_output(report, (".png", ".html"), "The report")
    if sigma is not None and not 0 < sigma < float("inf"):
        raise InvdiffError(f"--sigma is the noise level per real component and must be positive, got {sigma:g}.")
    chosen = make_sampler(sampler, preset, steps, set)
    problem = _problem(file, mask, coil_maps, noise_scan, sigma, slice, key, chosen, target, draws)
    loaded = library.load(prior)
    check_prior(loaded, problem)
    seen = mri.support(problem)
    loaded = support.restrict(loaded, seen) if not bool(seen.all()) else loaded
    facts = _scan_facts(problem)
    if not json:
        print_facts({**facts, "prior": loaded.name, "sampler": f"{chosen.name}, {chosen.steps} steps"})
    posterior = draw(
        problem,
        loaded,
        chosen,
        target,
        progress=False if json else None,
        draws=draws,
        seed=seed,
        device=device,
        max_batch=batch,
        resume=resume,
        time_budget_s=time_budget,
        title=f"{Path(file).name}: {chosen.title}",
    )
    with posterior:
        found = _result(posterior, problem, target)
        if report is not None:
            from invdiff.cli.report import write_report

            write_report(posterior, report, facts)
            found["report"] = str(report)
    if json:
        print_json({**found, "scan": dict(problem.meta)})
        return
    _print_result(found)


def _problem(
    file: Path,
    mask: Path | None,
    coil_maps: Path | None,
    noise_scan: Path | None,
    sigma: float | None,
    slice: int | None,
    key: str | None,
    sampler: Any,
    target: Path,
    draws: int,
) -> Problem:
    """Read what is given, check it, and build the problem."""
    from invdiff import mri
    from invdiff.io import arrays
    from invdiff.io.kspace import read_coil_maps, read_kspace, read_noise

    if not sampler.conditional:
        raise InvdiffError(f"{sampler.name} draws from the prior alone and ignores data; use dds, for example.")
    scan = read_kspace(file, key, slice)
    check_disk(target, draws * scan.kspace[0].nbytes, draws)
    return mri.problem_from_kspace(
        scan,
        mask=None if mask is None else arrays.read_array(mask, what="The mask file"),
        coil_maps=None if coil_maps is None else read_coil_maps(coil_maps, slice),
        sigma=sigma,
        noise_scan=None if noise_scan is None else read_noise(noise_scan),
    )


def _scan_facts(problem: Problem) -> dict[str, str]:
    """Return what was read and estimated, in words."""
    meta = problem.meta
    positions = problem.y.shape[-2] * problem.y.shape[-1]
    return {
        "scan": str(meta["source"]),
        "sampling": f"{meta['sampled']} of {positions} positions, acceleration {meta['acceleration']:.3g}, "
        f"mask {meta['mask_source']}",
        "noise": f"{meta['sigma']:.3g} per real component, {meta['sigma_source']}",
        "coil maps": str(meta["coil_maps_source"]),
    }


def _result(posterior: Any, problem: Problem, target: Path) -> dict[str, Any]:
    """Return what came out, for people and for JSON."""
    meta = problem.meta
    provenance = posterior.provenance
    return {
        "output": str(target),
        "status": posterior.status,
        "kind": posterior.kind,
        **totals(posterior),
        "misfit": misfit(posterior, meta["sampled"] * meta["coils"], meta["sigma"]),
        "seed": provenance.get("seed"),
        "sampler": provenance.get("sampler"),
        "prior": provenance.get("prior"),
    }


def _print_result(found: dict[str, Any]) -> None:
    shown: dict[str, Any] = {"draws": f"{found['draws']} of {found['asked']}"}
    if found["misfit"] is not None:
        shown["data misfit"] = f"{found['misfit']:.3g} (1 is the noise level)"
    shown["network evaluations"] = found.get("network_evaluations", "")
    shown["time"] = f"{found.get('seconds', 0):.0f} s"
    shown["seed"] = found["seed"]
    shown["written"] = ", ".join(str(found[k]) for k in ("output", "report") if k in found)
    if found["status"] != "complete":
        shown["stopped early"] = "run the same command with --resume to go on"
    print_facts(shown)
