"""``invdiff show``: summary and figure of a stored posterior."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from invdiff.cli.guard import guarded
from invdiff.cli.options import Debug, Json, check_output, print_json
from invdiff.cli.output import console, print_facts, totals


@guarded
def show(
    file: Annotated[Path, typer.Argument(help="A posterior written by this library (.nc or .zarr).")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Figure (.png) or page (.html); FILE.png if left out.")
    ] = None,
    case: Annotated[int, typer.Option("--case", help="Which case, where there are several.")] = 0,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Print a summary of a posterior and draw it: mean, spread, interval width, two draws."""
    from invdiff.cli.report import write_report
    from invdiff.posterior import Posterior

    target = output or Path(file.name).with_suffix(".png")
    check_output(target, (".png", ".html"), "The figure")
    with Posterior.open(file) as posterior:
        facts: dict[str, Any] = {**posterior.facts(), **totals(posterior)}
        write_report(posterior, target, {}, case)
        title = posterior.title
    if json:
        print_json({"title": title, "file": str(file), "figure": str(target), **facts})
        return
    console().print(title, style="bold", markup=False)
    facts["draws"] = f"{facts['draws']} of {facts.pop('asked')}"
    print_facts({k.replace("_", " "): v for k, v in facts.items()})
    console().print(f"\nFigure: {target}", markup=False)
