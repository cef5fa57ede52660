"""``invdiff calibrate``: are the draws of a sampler to be believed on scans like this one?"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from invdiff.cli.guard import Interrupted, guarded
from invdiff.cli.options import (
    Batch,
    Debug,
    Device,
    Json,
    Preset,
    PriorName,
    SamplerName,
    Seed,
    Settings,
    Steps,
    check_numbers,
    make_sampler,
    print_json,
)
from invdiff.cli.output import console, print_facts
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
    from invdiff.calibration import Calibration

_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}


@guarded
def calibrate(
    file: Annotated[Path, typer.Argument(help=FILES)],
    sampler: SamplerName = "dds",
    cases: Annotated[int, typer.Option("--cases", help="Simulated cases; 200 tell most, 20 is the least.")] = 200,
    draws: Annotated[int, typer.Option("--draws", "-n", help="Draws of each case.")] = 16,
    budget: Annotated[
        str | None, typer.Option("--budget", help="Time for the draws: seconds, or 30m, 2h; no limit if left out.")
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder that keeps what is done, and the result.")
    ] = Path("calibration"),
    images: Annotated[
        Path | None,
        typer.Option("--images", help="True images (n, y, x) as .npy or .npz; draws of the prior if left out."),
    ] = None,
    population: Annotated[
        str, typer.Option("--population", help="What the images are, in words; needed with --images.")
    ] = "",
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
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Go on with what the folder holds, or refuse it.")
    ] = True,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Simulate scans like this one, sample them, and test the draws against the known truth."""
    from invdiff.calibrating import calibrate as run
    from invdiff.calibrating import check_folder

    check_numbers(draws, batch, seed)
    seconds = None if budget is None else read_budget(budget)
    check_sigma(sigma)
    check_folder(output)
    chosen = make_sampler(sampler, preset, steps, set)
    problem = read_problem(file, mask, coil_maps, noise_scan, sigma, slice, key)
    loaded = load_prior(prior, problem)
    given = None if images is None else _read_images(images, problem.operator.domain.shape)
    if not json:
        facts = {**scan_facts(problem), "prior": loaded.name}
        print_facts({**facts, "sampler": f"{chosen.name}, {chosen.steps} steps"})
    try:
        found = run(
            problem,
            loaded,
            chosen,
            cases=cases,
            draws=draws,
            images=given,
            population=population,
            seed=seed,
            budget_s=seconds,
            output=output,
            resume=resume,
            device=device,
            max_batch=batch,
            progress=False if json else None,
        )
    except KeyboardInterrupt:
        raise Interrupted(_how_to_go_on(output)) from None
    paths = [str(path) for path in found.save(output)]
    if json:
        print_json({**found.to_dict(), "scan": dict(problem.meta), "files": paths})
        return
    _print(found, paths)


def read_budget(text: str) -> float:
    """Return seconds from ``1800``, ``1800s``, ``30m`` or ``0.5h``.

    Raises:
        InvdiffError: If it is something else, or nothing is left.
    """
    found = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*([smh]?)", text.strip().lower())
    seconds = float(found[1]) * _UNITS[found[2]] if found else 0.0
    if not 0 < seconds < float("inf"):
        raise InvdiffError(f"--budget takes a time such as 1800, 30m or 2h, got {text!r}.")
    return seconds


def _read_images(path: Path, shape: tuple[int, ...]) -> Any:
    """Return images ``(n, *shape)``; the axis of channels may be left out."""
    from invdiff.io.arrays import read_array

    values = read_array(path, what="The file of images")
    return values[:, None] if values.ndim == len(shape) and shape[0] == 1 else values


def _how_to_go_on(output: Path) -> str:
    if not output.exists():
        return "Interrupted; nothing was written."
    return f"Interrupted; what is done is kept in {output}: run the same command again to go on."


def _print(found: Calibration, paths: list[str]) -> None:
    wide = console()
    wide.width = max(wide.width, 150) if not wide.is_terminal else wide.width
    wide.print(f"\n{found!r}", markup=False, soft_wrap=True)
    wide.print(f"\nWritten: {', '.join(paths)}", markup=False, soft_wrap=True)
    if found.diagnosis.n_cases < found.asked:
        wide.print("Stopped early: run the same command again to go on.", markup=False)
