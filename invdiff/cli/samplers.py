"""``invdiff samplers``: the registry as a table, one sampler with its settings, or those that fit a scan."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from invdiff.cli.guard import guarded
from invdiff.cli.options import Debug, Json, PriorName, print_json
from invdiff.cli.output import console, print_facts, table
from invdiff.cli.scan import (
    FILES,
    CoilMaps,
    Key,
    MaskFile,
    NoiseScan,
    Sigma,
    Slice,
    load_prior,
    read_problem,
    scan_facts,
)
from invdiff.errors import InvdiffError

if TYPE_CHECKING:
    from invdiff.problem import Problem


@guarded
def samplers(
    name: Annotated[str | None, typer.Argument(help="Show this sampler with its settings.")] = None,
    file: Annotated[Path | None, typer.Option("--for", help=f"Which can run on this scan? {FILES}")] = None,
    mask: MaskFile = None,
    coil_maps: CoilMaps = None,
    noise_scan: NoiseScan = None,
    sigma: Sigma = None,
    slice: Slice = None,
    key: Key = None,
    prior: PriorName = "brain-mri",
    json: Json = False,
    debug: Debug = False,
) -> None:
    """List the samplers with what is measured about them, show one, or say which can run on a scan."""
    from invdiff.samplers import REGISTRY, get

    if file is not None:
        if name is not None:
            raise InvdiffError("Give the name of a sampler or --for with a scan, not both.")
        problem = read_problem(file, mask, coil_maps, noise_scan, sigma, slice, key)
        _suggest(problem, prior, json)
        return
    if name is not None:
        _show_one(type(get(name)), json)
        return
    entries = [_entry(cls) for cls in REGISTRY.values()]
    if json:
        print_json({"samplers": entries})
        return
    out = table("name", "title", "kind", "exactness", "needs", "bias", "width", right=("bias", "width"))
    for e in entries:
        about = f"{e['title']}\n[dim]presets: {', '.join(e['presets']) or 'none'}[/dim]"
        needs = ", ".join(e["needs"]) or "nothing"
        known = [f"{e[k]:.2f}" if e[k] is not None else "–" for k in ("measured_bias", "measured_width")]
        out.add_row(f"[bold]{e['name']}[/bold]", about, e["kind"], e["exactness"], needs, *known)
    console().print(out)
    console().print(
        "bias and width: measured on exact posteriors at the default settings or the nearest; 0 and 1 are right.",
        style="dim",
        markup=False,
    )
    console().print("`invdiff samplers NAME` shows one with its update and settings.", style="dim", markup=False)


def _suggest(problem: Problem, prior: str, json: bool) -> None:
    from invdiff.choosing import LEGEND, suggest

    loaded = load_prior(prior, problem)
    found = suggest(problem, loaded)
    if json:
        print_json({"scan": dict(problem.meta), "prior": loaded.name, "samplers": found.rows()})
        return
    print_facts({**scan_facts(problem), "prior": loaded.name})
    headers, rows = found.table()
    out = table(*headers, right=("passes", "bias", "width"))
    for choice, row in zip(found, rows):
        out.add_row(*row, style=None if choice.runs else "dim")
    console().print(out)
    console().print(LEGEND, style="dim", markup=False)


def _entry(cls: Any) -> dict[str, Any]:
    """Return what there is to know about a sampler class."""
    from invdiff.honesty import measured

    known = measured(cls()) if cls.conditional else None
    return {
        "name": cls.name,
        "title": cls.title,
        "kind": cls.kind if cls.conditional else "prior",
        "exactness": cls.exactness,
        "needs": sorted(cls.requires),
        "presets": sorted(cls.presets),
        "reference": cls.reference,
        "settings": {f.name: f.default for f in dataclasses.fields(cls)},
        "measured_bias": None if known is None else known.bias,
        "measured_width": None if known is None or cls.kind == "point" else known.width,
        "measured_setting": None if known is None else known.setting,
    }


def _show_one(cls: Any, json: bool) -> None:
    entry = _entry(cls)
    module = inspect.getmodule(cls)
    about = inspect.cleandoc((module.__doc__ if module else None) or cls.__doc__ or "")
    if json:
        print_json({**entry, "presets": dict(cls.presets), "about": about})
        return
    out = console()
    out.print(f"{cls.name}: {cls.title}", style="bold", markup=False)
    out.print(f"{cls.reference}\n", style="dim", markup=False)
    out.print(about, markup=False, soft_wrap=True)
    out.print()
    out.print(inspect.cleandoc(cls.__doc__ or ""), markup=False, soft_wrap=True)
    out.print("\nSettings, changed with --set NAME=VALUE:", markup=False)
    settings = table("setting", "default")
    for field, default in entry["settings"].items():
        settings.add_row(field, str(default))
    out.print(settings)
    for preset, values in cls.presets.items():
        shown = ", ".join(f"{k}={v}" for k, v in values.items()) or "the defaults"
        out.print(f"  preset {preset}: {shown}", markup=False)
