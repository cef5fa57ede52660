"""The application: commands, ``--version`` and ``--debug``."""

from __future__ import annotations

from typing import Annotated

import typer

from invdiff import __version__
from invdiff.cli import (
    calibrate,
    check_operator,
    compare,
    demo,
    guard,
    priors,
    priors_convert,
    reconstruct,
    samplers,
    show,
    train,
)

app = typer.Typer(
    name="invdiff",
    help="Scientific inverse problems with diffusion priors: posterior draws, and how sure the answer is.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"invdiff {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Scientific inverse problems with diffusion priors: posterior draws, and how sure the answer is."""
    guard.debugging = debug


app.command("demo")(demo.demo)
app.command("reconstruct")(reconstruct.reconstruct)
app.command("compare")(compare.compare)
app.command("calibrate")(calibrate.calibrate)
app.command("show")(show.show)
app.command("samplers")(samplers.samplers)
priors.app.command("convert")(priors_convert.convert)
app.add_typer(priors.app, name="priors")
app.command("check-operator")(check_operator.check_operator)
app.command("train", context_settings={"ignore_unknown_options": True})(train.train)
