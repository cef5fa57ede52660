"""``invdiff train``: train a prior from a config file, flags, or both."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from invdiff.cli.guard import Interrupted, guarded, say
from invdiff.cli.options import Debug, Json, print_json, read_value
from invdiff.cli.output import console, print_facts, table
from invdiff.errors import InvdiffError

if TYPE_CHECKING:
    from invdiff.training.config import TrainConfig


@guarded
def train(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG.toml] [--SETTING VALUE]",
            help="Settings in a .toml or .json file, and flags, which win over it.",
            show_default=False,
        ),
    ] = None,
    config: Annotated[Path | None, typer.Option("--config", help="The file of settings, as an option.")] = None,
    settings: Annotated[bool, typer.Option("--settings", help="List all settings with their defaults.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume/--restart", help="Continue from the checkpoint in the output folder, if any.")
    ] = True,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Train a prior on images or on synthetic heads.

    Every setting is also a flag, which wins over the file: --data, --output, --name, --steps, --batch, --crop, ...
    List them all with --settings. Several devices: torchrun --nproc-per-node 2 -m invdiff train ...
    """
    from invdiff.training.config import TrainConfig
    from invdiff.training.processes import launched
    from invdiff.training.train import train as run

    if settings:
        _list_settings(TrainConfig, json)
        return
    try:
        chosen = _config(TrainConfig, config, words or [])
        first = launched()[0] == 0
        with _Progress(quiet=json or not first) as progress:
            result = run(chosen, progress, resume=resume)
    except (ValueError, FloatingPointError) as error:
        raise error if isinstance(error, InvdiffError) else InvdiffError(str(error)) from error
    if not first:
        # One voice is enough; the code of the first is the code of all.
        raise typer.Exit(130 if result.interrupted else 0)
    found = {
        "weights": result.weights and str(result.weights),
        "card": result.card and str(result.card),
        "step": result.step,
        "steps": chosen.steps,
        "interrupted": result.interrupted,
        "denoising": result.curve,
    }
    if json:
        print_json(found)
    elif result.weights:
        _print_result(found)
    if result.interrupted:
        raise Interrupted(
            f"Interrupted at step {result.step} of {chosen.steps}; the checkpoint is in {chosen.output}: "
            "run the same command to continue."
        )


def _config(cls: type[TrainConfig], path: Path | None, words: list[str]) -> TrainConfig:
    """Return the settings of the file, with those given as flags in their place."""
    known = {f.name: f for f in dataclasses.fields(cls)}
    values: dict[str, Any] = {}
    queue = list(words)
    while queue:
        word = queue.pop(0)
        if not word.startswith("--"):
            if path is not None:
                raise InvdiffError(
                    f"Unexpected argument {word!r}; give one config file, and settings as --name value."
                )
            path = Path(word)
            continue
        name, equals, text = word[2:].partition("=")
        negated = name.startswith("no-")
        name = name.removeprefix("no-").replace("-", "_")
        if name not in known:
            raise InvdiffError(f"Unknown setting --{name.replace('_', '-')}; {_nearest(name, list(known))}")
        default = known[name].default
        if isinstance(default, bool) and not equals:
            values[name] = not negated
            continue
        if not equals:
            if not queue:
                raise InvdiffError(f"--{name} needs a value; for example --{name} {default}.")
            text = queue.pop(0)
        many = isinstance(default, tuple)
        values[name] = _numbers(text, name) if many else read_value(text, default, f"--{name}")
    base = cls.from_file(path) if path is not None else cls()
    return cls.from_dict({**base.to_dict(), **values})


def _nearest(name: str, known: list[str]) -> str:
    import difflib

    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean --{near[0].replace('_', '-')}?" if near else "`invdiff train --settings` lists them."


def _numbers(text: str, name: str) -> list[int]:
    try:
        return [int(word) for word in text.strip("[]() ").split(",") if word.strip()]
    except ValueError as error:
        raise InvdiffError(f"{name} takes whole numbers between commas, like 64,96,128; got {text!r}.") from error


def _list_settings(cls: type[TrainConfig], json: bool) -> None:
    fields = dataclasses.fields(cls)
    if json:
        print_json({f.name: {"default": f.default, "help": f.metadata.get("help", "")} for f in fields})
        return
    out = table("setting", "default", "meaning")
    for f in fields:
        default = ",".join(map(str, f.default)) if isinstance(f.default, tuple) else str(f.default)
        out.add_row(f"--{f.name.replace('_', '-')}", default, f.metadata.get("help", ""))
    console().print(out)


def _print_result(found: dict[str, Any]) -> None:
    print_facts({"weights": found["weights"], "card": found["card"], "steps": found["step"]})
    curve = found["denoising"]
    if curve:
        console().print("\nDenoising of held-out images, root mean square error per real component:", markup=False)
        out = table("sigma", "error", "error / sigma")
        for sigma, rmse, relative in zip(curve["sigma"], curve["rmse"], curve["relative"]):
            out.add_row(f"{sigma:g}", f"{rmse:.4g}", f"{relative:.3g}")
        console().print(out)


class _Progress:
    """A bar on standard error in a terminal; silence in pipes."""

    def __init__(self, quiet: bool) -> None:
        import sys

        self.bar: Any = None
        if not quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self.tasks: dict[str, Any] = {}

    def __enter__(self) -> _Progress:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()

    def __call__(self, event: dict[str, Any]) -> None:
        """Show one event of the training loop."""
        if not self.bar:
            return
        kind = event.get("event")
        if kind == "images":
            self._advance("images", event["done"], event["count"], "")
        elif kind == "step":
            self._advance("training", event["step"], event["steps"], f"loss {event['loss']:.3f}")
        elif kind == "validated":
            curve = event["curve"]
            pairs = ", ".join(f"{s:g}: {r:.3g}" for s, r in zip(curve["sigma"], curve["rmse"]))
            say(f"step {event['step']}, error per sigma {pairs}")

    def _advance(self, name: str, done: int, total: int, note: str) -> None:
        if name not in self.tasks:
            self.tasks[name] = self.bar.add_task(name, total=total, note="")
        self.bar.update(self.tasks[name], completed=done, total=total, note=note)
