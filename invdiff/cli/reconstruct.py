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
    check_numbers,
    check_output,
    make_sampler,
    print_json,
)
from invdiff.cli.output import print_facts, totals
from invdiff.cli.runs import draw, misfit
from invdiff.cli.scan import (
    FILES,
    CoilMaps,
    Key,
    MaskFile,
    NoiseScan,
    Sigma,
    Slice,
    check_sigma,
    load_prior,
    read_problem,
    scan_facts,
)
from invdiff.errors import InvdiffError

if TYPE_CHECKING:
    from invdiff.problem import Problem


@guarded
def reconstruct(
    file: Annotated[Path, typer.Argument(help=FILES)],
    sampler: SamplerName = "dds",
    draws: Draws = 16,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Posterior (.nc or .zarr); FILE.nc here if left out.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option("--report", help="Figure (.png) or page (.html) to write.")
    ] = None,
    mask: MaskFile = None,
    coil_maps: CoilMaps = None,
    noise_scan: NoiseScan = None,
    sigma: Sigma = None,
    slice: Slice = None,
    key: Key = None,
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
    target = output or Path(Path(file).with_suffix(".nc").name)
    check_numbers(draws, batch, seed, time_budget)
    check_output(target, (".nc", ".zarr"), "The output")
    if report is not None:
        check_output(report, (".png", ".html"), "The report")
    check_sigma(sigma)
    chosen = make_sampler(sampler, preset, steps, set)
    if not chosen.conditional:
        raise InvdiffError(f"{chosen.name} draws from the prior alone and ignores data; use dds, for example.")
    problem = read_problem(file, mask, coil_maps, noise_scan, sigma, slice, key, draws=(draws, target))
    loaded = load_prior(prior, problem)
    facts = scan_facts(problem)
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
