"""What commands print: rich tables on standard output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from invdiff.posterior import Posterior


def console() -> Console:
    """Return a console on standard output; plain text in pipes, and wide enough there not to fold tables."""
    import sys

    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else 110, soft_wrap=False)


def table(*columns: str, right: tuple[str, ...] = ()) -> Table:
    """Return an empty table with light lines."""
    from rich import box
    from rich.table import Table

    out = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        out.add_column(name, justify="right" if name in right else "left", overflow="fold")
    return out


def print_facts(facts: Mapping[str, Any]) -> None:
    """Print names and values, aligned."""
    from rich.markup import escape
    from rich.table import Table

    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim")
    grid.add_column(overflow="fold")
    for name, value in facts.items():
        grid.add_row(escape(str(name)), escape(str(value)))
    console().print(grid)


def totals(posterior: Posterior) -> dict[str, Any]:
    """Return draws made, evaluations and time, over all draws of a posterior."""
    stats = posterior.stats
    status = stats["status"].values
    out: dict[str, Any] = {"draws": int((status == "ok").sum()), "asked": int(status.size)}
    for name, key in (("network_evaluations", "nfe"), ("operator_evaluations", "noe")):
        if key in stats:
            out[name] = int(stats[key].values.sum())
    if "wall_s" in stats:
        made = stats["wall_s"].values[status != "missing"]
        out["seconds"] = round(float(made.sum()), 2)
    return out
