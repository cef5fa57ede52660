"""Options that several commands share, and the checks that come before any work."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from invdiff.errors import InvdiffError

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output and nothing else.")]
Draws = Annotated[int, typer.Option("--draws", "-n", help="Number of posterior draws.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed; the same seed gives the same draws.")]
Device = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda, cuda:1 ...; a CUDA device if there is one.")
]
Batch = Annotated[int | None, typer.Option("--batch", help="Most draws at once; what fits if left out.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue an interrupted run of the same command.")]
SamplerName = Annotated[str, typer.Option("--sampler", help="Sampler; see `invdiff samplers`.")]
Preset = Annotated[str | None, typer.Option("--preset", help="Named settings of the sampler.")]
Steps = Annotated[int | None, typer.Option("--steps", help="Noise levels; the sampler's default if left out.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="A setting of the sampler; repeatable.")
]
PriorName = Annotated[str, typer.Option("--prior", help="Prior by name, or a .safetensors file with its card.")]


def check_numbers(draws: int, batch: int | None, seed: int, time_budget: float | None = None) -> None:
    """Refuse counts that make no sense, before anything is read."""
    if draws < 1:
        raise InvdiffError(f"The number of draws must be at least 1, got {draws}; use --draws 16, for example.")
    if batch is not None and batch < 1:
        raise InvdiffError(f"The batch must be at least 1, got {batch}; leave --batch out to take what fits.")
    if seed < 0:
        raise InvdiffError(f"The seed must be an integer of at least 0, got {seed}.")
    if time_budget is not None and not time_budget > 0:
        raise InvdiffError(f"The time budget must be a positive number of seconds, got {time_budget:g}.")


def check_output(path: Path, suffixes: tuple[str, ...], what: str) -> None:
    """Refuse an output that could not be written, before any work."""
    if path.suffix.lower() not in suffixes:
        raise InvdiffError(f"{what} {path} must end in {' or '.join(suffixes)}; rename it.")
    if not path.parent.is_dir():
        raise InvdiffError(f"{what} {path} is in a folder that does not exist; create {path.parent} first.")
    if path.is_dir() and path.suffix != ".zarr":
        raise InvdiffError(f"{what} {path} is a folder; give a file name.")
    if not os.access(path.parent, os.W_OK):
        raise InvdiffError(f"{what} {path} is in a folder that cannot be written to; choose another.")


def check_disk(path: Path, nbytes: int, draws: int) -> None:
    """Refuse draws that the disk cannot hold (twice: in the checkpoint and in the store)."""
    free = shutil.disk_usage(path.parent).free
    if 2 * nbytes > free:
        raise InvdiffError(
            f"{draws} draws take {2 * nbytes / 1e9:.3g} GB while they are made, and {free / 1e9:.3g} GB are free "
            f"in {path.parent.resolve()}; ask for fewer draws or use another disk."
        )


def make_sampler(name: str, preset: str | None, steps: int | None, settings: list[str] | None) -> Any:
    """Return the sampler with the settings given as ``NAME=VALUE``."""
    import dataclasses

    from invdiff import samplers

    fields: dict[str, Any] = {} if steps is None else {"steps": steps}
    cls = type(samplers.get(name))
    known = {f.name: f for f in dataclasses.fields(cls)}
    for item in settings or []:
        key, equals, text = item.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not key:
            raise InvdiffError(f"--set takes NAME=VALUE, got {item!r}; for example --set steps=50.")
        default = known[key].default if key in known else None
        fields[key] = read_value(text.strip(), default, f"--set {key}")
    return samplers.get(name, preset, **fields)


def read_value(text: str, default: Any, what: str) -> Any:
    """Read a setting from text, as the kind of thing its default is."""
    if isinstance(default, str):
        return text
    try:
        value = json.loads({"true": "true", "false": "false", "none": "null"}.get(text.lower(), text))
    except ValueError:
        value = text
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if isinstance(default, bool):
        fits, kind = isinstance(value, bool), "true or false"
    elif isinstance(default, int):
        fits, kind = number and float(value).is_integer(), "a whole number"
        value = int(value) if fits else value
    elif isinstance(default, float):
        fits, kind = number, "a number"
        value = float(value) if fits else value
    else:
        return tuple(value) if isinstance(value, list) else value
    if not fits:
        raise InvdiffError(f"{what} takes {kind}, got {text!r}.")
    return value


def print_json(values: dict[str, Any]) -> None:
    """Write one JSON object to standard output."""
    sys.stdout.write(json.dumps(_plain(values), indent=2, allow_nan=False) + "\n")


def _plain(value: Any) -> Any:
    """Return only what JSON has: numbers that are not finite become null."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        items = sorted(value) if isinstance(value, (set, frozenset)) else value
        return [_plain(v) for v in items]
    if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
        value = value.item()
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    return value if value is None or isinstance(value, (str, int, bool)) else str(value)
