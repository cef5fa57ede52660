"""``invdiff compare``: several samplers side by side on one scan."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from invdiff.cli.guard import guarded
from invdiff.cli.options import (
    Batch,
    Debug,
    Device,
    Draws,
    Json,
    PriorName,
    Seed,
    Steps,
    check_numbers,
    make_sampler,
    print_json,
)
from invdiff.cli.output import console, print_facts, table
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
    from invdiff.comparison import Comparison
    from invdiff.problem import Problem
    from invdiff.sampler import Sampler


@guarded
def compare(
    file: Annotated[Path | None, typer.Argument(help=FILES, show_default=False)] = None,
    samplers: Annotated[
        str | None,
        typer.Option(
            "--samplers",
            help="Names between commas, each with :preset where wanted; the three suggested first if left out.",
        ),
    ] = None,
    draws: Draws = 16,
    time: Annotated[
        float | None, typer.Option("--time", help="Seconds for all samplers together; no limit if left out.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for compare.md, .csv, .json and .png.")
    ] = None,
    withhold: Annotated[
        float, typer.Option("--withhold", help="Share of the measurements to set aside and predict; 0 for none.")
    ] = 0.1,
    demo: Annotated[
        bool, typer.Option("--demo", help="Compare on the simulated scan of `invdiff demo`, whose truth is known.")
    ] = False,
    mask: MaskFile = None,
    coil_maps: CoilMaps = None,
    noise_scan: NoiseScan = None,
    sigma: Sigma = None,
    slice: Slice = None,
    key: Key = None,
    prior: PriorName = "brain-mri",
    steps: Steps = None,
    seed: Seed = 0,
    device: Device = None,
    batch: Batch = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Run several samplers on one scan and compare prediction of withheld data, misfit, width and cost."""
    check_numbers(draws, batch, seed, time)
    check_sigma(sigma)
    if not 0 <= withhold < 1:
        raise InvdiffError(f"--withhold is a share from 0 to below 1, got {withhold:g}.")
    if output is not None:
        _check_folder(output)
    chosen = None if samplers is None else _read_samplers(samplers, steps)
    given = (mask, coil_maps, noise_scan, sigma, slice, key)
    problem = _problem(file, demo, seed, given)
    loaded = load_prior(prior, problem)
    if not json:
        print_facts({**scan_facts(problem), "prior": loaded.name})
    from invdiff.comparing import compare as run

    found = run(
        problem,
        loaded,
        chosen,
        draws,
        seed,
        time,
        withhold,
        device=device,
        max_batch=batch,
        progress=False if json else None,
    )
    paths = [] if output is None else [str(p) for p in found.save(output)]
    if json:
        print_json({**found.to_dict(), "scan": dict(problem.meta), "files": paths})
        return
    _print(found)
    if paths:
        console().print(f"\nWritten: {', '.join(paths)}", markup=False, soft_wrap=True)


def _read_samplers(text: str, steps: int | None) -> list[tuple[str, Sampler]]:
    """Read ``dds,dps:published``, in which a name may carry a preset; labels stay as they were written."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise InvdiffError("--samplers takes names between commas, for example --samplers dds,diffpir,pigdm.")
    out = []
    for word in words:
        name, _, preset = word.partition(":")
        out.append((" ".join((name, preset)).strip(), make_sampler(name, preset or None, steps, None)))
    return out


def _problem(
    file: Path | None,
    demo: bool,
    seed: int,
    given: tuple[Path | None, Path | None, Path | None, float | None, int | None, str | None],
) -> Problem:
    """Read the scan, or simulate the one of the demonstration."""
    if demo == (file is not None):
        raise InvdiffError("Give either a file of k-space or --demo, for example `invdiff compare scan.h5`.")
    if file is not None:
        return read_problem(file, *given)
    if any(value is not None for value in given):
        raise InvdiffError("--demo brings its own mask, coil maps and noise level; leave those options out.")
    from invdiff.cli.demo import simulate_slice

    return simulate_slice(1, seed)


def _check_folder(folder: Path) -> None:
    """Refuse a folder that could not be written to, before any work."""
    import os

    if folder.exists() and not folder.is_dir():
        raise InvdiffError(f"The output {folder} is a file; give a folder.")
    if not folder.absolute().parent.is_dir():
        raise InvdiffError(
            f"The output {folder} is in a folder that does not exist; create {folder.parent} first."
        )
    if not os.access(folder if folder.is_dir() else folder.absolute().parent, os.W_OK):
        raise InvdiffError(f"The output {folder} cannot be written to; choose another folder.")


def _print(found: Comparison) -> None:
    headers, rows = found.table()
    out = table(*headers, right=tuple(headers[1:]))
    for row in rows:
        out.add_row(*row)
    wide = console()
    wide.width = max(wide.width, 150) if not wide.is_terminal else wide.width
    wide.print(out)
    for note in found.notes():
        wide.print(note, style="dim", markup=False, soft_wrap=True)
