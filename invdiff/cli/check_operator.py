"""``invdiff check-operator``: does an operator of one's own keep the contract?

The module is imported, which executes it, because its name was given on the command line; nothing else is.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from invdiff.cli.guard import guarded
from invdiff.cli.options import Debug, Json, print_json
from invdiff.cli.output import console, table
from invdiff.errors import InvdiffError

if TYPE_CHECKING:
    from invdiff.operator import Operator

#: Exit code of a check that failed; 2 is bad input, 1 a fault of the program.
FAILED = 3


@guarded
def check_operator(
    target: Annotated[
        str,
        typer.Argument(
            metavar="MODULE:OBJECT",
            help="An operator, or a function without arguments that returns one. The module is imported, which "
            "executes it; it is looked for in the current folder too.",
        ),
    ],
    seed: Annotated[int, typer.Option("--seed", help="Seed of the random inputs.")] = 0,
    tol: Annotated[
        float | None, typer.Option("--tol", help="Bound on relative errors; 1e-10 in float64, 1e-4 in float32.")
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Check adjoint, linearity, derivatives, rows, purity and dtype of an operator; exit code 3 if one fails."""
    from invdiff import testing

    if tol is not None and not tol > 0:
        raise InvdiffError(f"The bound on relative errors must be positive, got {tol:g}.")
    operator = _load(target)
    report = testing.check_operator(operator, seed=seed, tol=tol)
    if json:
        print_json(
            {
                "target": target,
                "operator": operator.name,
                "domain": str(operator.domain),
                "range": str(operator.range),
                "capabilities": sorted(operator.capabilities),
                "ok": report.ok,
                "failed": list(report.failed),
                "checks": [
                    {"name": c.name, "error": c.error, "bound": c.bound, "ok": c.ok, "note": c.note}
                    for c in report.checks
                ],
            }
        )
    else:
        out = console()
        out.print(repr(operator), markup=False)
        rows = table("check", "error", "bound", "verdict", "note", right=("error", "bound"))
        for c in report.checks:
            verdict = "pass" if c.ok else "[bold red]FAIL[/bold red]"
            rows.add_row(c.name, f"{c.error:.1e}", f"{c.bound:.1e}", verdict, _plain(c.note))
        out.print(rows)
        count = f"{len(report.failed)} of {len(report.checks)}"
        verdict = f"pass: all {len(report.checks)} checks" if report.ok else f"FAIL: {count} checks"
        out.print(verdict, style="bold", markup=False)
    if not report.ok:
        raise typer.Exit(FAILED)


def _load(target: str) -> Operator:
    """Import ``module:object`` and return the operator that it is or makes."""
    from invdiff.operator import Operator

    module, colon, path = target.partition(":")
    if not (module and colon and path):
        raise InvdiffError(f"{target!r} is not of the form MODULE:OBJECT, e.g. mypackage.operators:blur.")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module)
        for name in path.split("."):
            found = getattr(found, name)
        if not isinstance(found, Operator) and callable(found):
            found = found()
    except Exception as error:  # whatever the user's own code raises is about that code
        text = " ".join(str(error).split())
        raise InvdiffError(f"{target} cannot be had ({type(error).__name__}: {text[:300]}).") from error
    finally:
        sys.path.remove(here)
    if not isinstance(found, Operator):
        kind = type(found).__name__
        raise InvdiffError(f"{target} is a {kind}; expected an operator or a function that makes one.")
    return found


def _plain(note: str) -> str:
    from rich.markup import escape

    return escape(note)
