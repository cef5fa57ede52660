"""``invdiff samplers``: the registry as a table, or one sampler with its settings."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Annotated, Any

import typer

from invdiff.cli.guard import guarded
from invdiff.cli.options import Debug, Json, print_json
from invdiff.cli.output import console, table


@guarded
def samplers(
    name: Annotated[str | None, typer.Argument(help="Show this sampler with its settings.")] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """List the samplers, or show one with its update, settings and presets."""
    from invdiff.samplers import REGISTRY, get

    if name is not None:
        _show_one(type(get(name)), json)
        return
    entries = [_entry(cls) for cls in REGISTRY.values()]
    if json:
        print_json({"samplers": entries})
        return
    out = table("name", "title", "kind", "exactness", "needs")
    for e in entries:
        about = f"{e['title']}\n[dim]presets: {', '.join(e['presets']) or 'none'}[/dim]"
        needs = ", ".join(e["needs"]) or "nothing"
        out.add_row(f"[bold]{e['name']}[/bold]", about, e["kind"], e["exactness"], needs)
    console().print(out)
    console().print("`invdiff samplers NAME` shows one with its update and settings.", style="dim", markup=False)


def _entry(cls: Any) -> dict[str, Any]:
    """Return what there is to know about a sampler class."""
    return {
        "name": cls.name,
        "title": cls.title,
        "kind": cls.kind if cls.conditional else "prior",
        "exactness": cls.exactness,
        "needs": sorted(cls.requires),
        "presets": sorted(cls.presets),
        "reference": cls.reference,
        "settings": {f.name: f.default for f in dataclasses.fields(cls)},
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
