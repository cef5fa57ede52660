"""``invdiff priors convert``: weights out of pickled checkpoints, without executing anything in them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from invdiff.cli.guard import guarded
from invdiff.cli.options import Debug, Json, print_json
from invdiff.cli.output import console, print_facts


@guarded
def convert(
    file: Annotated[
        Path, typer.Argument(help="A checkpoint: a pickle of EDM, a .ckpt of Lightning, a .pth or .pt.")
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Where to write, ending in .safetensors; by default beside the file."),
    ] = None,
    weights: Annotated[
        str,
        typer.Option("--weights", help="ema: weights averaged over the training; raw: those of its last step."),
    ] = "ema",
    force: Annotated[bool, typer.Option("--force", help="Write over files that are there.")] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Write the weights of a pickled checkpoint as safetensors with a card; nothing in the file is executed."""
    from invdiff.errors import InvdiffError
    from invdiff.priors import formats
    from invdiff.priors.converting import convert, summary
    from invdiff.priors.source import Source

    done = convert(file, output, weights=weights, force=force)
    loads: list[str | None] = []
    for path in done.files:
        try:
            loads.append(formats.recognise(Source(path))[1])
        except InvdiffError:
            loads.append(None)
    if json:
        files = [
            {"file": str(path), "card": card, "recognised": known}
            for path, card, known in zip(done.files, done.cards, loads)
        ]
        print_json({"found": done.found, "files": files, "left_out": list(done.left_out)})
        return
    for path, card, known in zip(done.files, done.cards, loads):
        facts = {"found": summary(card), "written": path, "tensors": card["tensors"], "sha256": card["sha256"]}
        facts["loads as"] = known or "no format that is known here; build its network and use priors.from_network"
        print_facts(facts)
    if done.left_out:
        shown = ", ".join(done.left_out[:8]) + (
            f" and {len(done.left_out) - 8} more" if len(done.left_out) > 8 else ""
        )
        console().print(f"Left out: {shown}.", markup=False)
