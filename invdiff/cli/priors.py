"""``invdiff priors``: list the embedded priors, show a card, verify weights, check the denoising.

A prior is an embedded one by name, a checkpoint by path (file or folder), or hf://org/name@revision.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from invdiff.cli.check_operator import FAILED
from invdiff.cli.guard import guarded
from invdiff.cli.options import Debug, Json, print_json, read_value
from invdiff.cli.output import console, print_facts, table
from invdiff.errors import InvdiffError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

app = typer.Typer(
    help="List, describe and check priors: embedded ones, checkpoints (`invdiff priors formats` lists the formats "
    "that load), and hf://org/name@revision.",
    invoke_without_command=True,
)
Name = Annotated[
    str, typer.Argument(help="Embedded prior, checkpoint (file or folder), or hf://org/name@revision.")
]
Declared = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="What the format cannot know of a checkpoint; repeatable."),
]


@app.callback()
@guarded
def listing(context: typer.Context, json: Json = False, debug: Debug = False) -> None:
    """List the priors that ship with the library."""
    from invdiff.priors import library

    if context.invoked_subcommand is not None:
        return
    cards = {name: library.card(name) for name in library.available()}
    if json:
        print_json({"priors": list(cards.values())})
        return
    out = table("name", "description", "licence", "channels", "sha256")
    for name, card in cards.items():
        channels = card.get("channels", "")
        shown = ", ".join(map(str, channels)) if isinstance(channels, list) else str(channels)
        out.add_row(
            f"[bold]{name}[/bold]",
            str(card.get("description", "")),
            str(card.get("licence", "")),
            shown,
            str(card.get("sha256", ""))[:12],
        )
    console().print(out)


@app.command("card")
@guarded
def card(name: Name, declared: Declared = None, json: Json = False, debug: Debug = False) -> None:
    """Show the card of a prior: training data, licence, hash, measured denoising error."""
    from invdiff.priors import library

    about = library.card(name, **_declared(declared))
    if json:
        print_json(about)
        return
    apart = ("recipe", "config", "self_test", "denoising_error")
    print_facts({k.replace("_", " "): _short(v) for k, v in about.items() if k not in apart})
    errors = about.get("denoising_error", {})
    if not errors:
        return
    console().print("\nDenoising of held-out images, root mean square error per real component:", markup=False)
    out = table("sigma", "error", right=("sigma", "error"))
    for sigma, rmse in zip(errors.get("sigma", ()), errors.get("rmse", ())):
        out.add_row(f"{sigma:g}", f"{rmse:.4g}")
    console().print(out)


@app.command("verify")
@guarded
def verify(name: Name, json: Json = False, debug: Debug = False) -> None:
    """Check the weights of a prior: hash, names and shapes, and the denoising of a known image."""
    from invdiff.priors import library

    _, about, found = library.verify(library.path_of(name))
    if found is None:
        raise InvdiffError(f"The card of {about.get('name')!r} has no self-test figures; export the prior again.")
    if json:
        print_json({"prior": about.get("name"), "ok": True, "sha256": about["sha256"], "self_test": found})
        return
    console().print(
        f"{about.get('name')}: weights match the card (sha256 {str(about['sha256'])[:12]}...)", markup=False
    )
    out = table(
        "sigma",
        "error",
        "on the card",
        right=("sigma", "error", "on the card"),
    )
    for sigma, rmse, stated in zip(found["sigma"], found["rmse"], found["expected"]):
        out.add_row(f"{sigma:g}", f"{rmse:.4g}", f"{stated:.4g}")
    console().print(out)
    console().print("The prior is as its card says.", markup=False)


@app.command("formats")
@guarded
def formats(json: Json = False, debug: Debug = False) -> None:
    """List the formats of checkpoints that load, and what may be declared with --set."""
    from invdiff.priors import formats as known

    found = {known.module(name).TITLE: known.module(name).OPTIONS for name in known.FORMATS}
    if json:
        print_json({"formats": found})
        return
    for title, options in found.items():
        console().print(f"\n[bold]{title}[/bold]")
        print_facts(dict(options))


@app.command("check")
@guarded
def check(
    name: Name,
    samples: Annotated[
        Path | None,
        typer.Option(
            "--samples",
            help="A .npy array (case, channel, y, x) of clean images, in prior units for embedded priors and "
            "files of that format, in image units for others. If left out, held-out images of the kind that "
            "the former were trained on, and synthetic images (dead leaves) for priors of natural images.",
        ),
    ] = None,
    declared: Declared = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the noise.")] = 0,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Denoise clean images at every noise level and judge the errors; exit code 3 if a check fails."""
    from invdiff.priors import latent, library, self_test
    from invdiff.priors.checks import check_denoiser
    from invdiff.spaces import Space

    prior = library.load(name, check=False, **_declared(declared))
    drawn = _drawn(prior.card) if samples is None else None
    if isinstance(prior.denoiser, library.NetworkDenoiser):
        multiple = prior.denoiser.multiple
        slices = _clean(samples, len(prior.card["channels"])) if drawn is None else drawn
        if prior.card["format"] == latent.FORMAT:
            prior = prior.bind(Space(tuple(slices.shape[1:])))
        else:
            ny, nx = (n - n % multiple for n in slices.shape[-2:])
            slices = slices[..., :ny, :nx]
        report = check_denoiser(prior, slices, seed=seed)
    elif samples is None and drawn is None and not self_test.is_natural(prior):
        raise InvdiffError(
            f"Nothing is known of the images of {name}; give clean ones of their kind with --samples."
        )
    else:
        clean = drawn if samples is None else _clean(samples, prior.denoiser.channels)
        report, _ = self_test.examine(prior, clean, seed)
    if json:
        checks = [{"name": c.name, "error": c.error, "bound": c.bound, "ok": c.ok} for c in report.checks]
        print_json({"prior": prior.name, "ok": report.ok, "failed": list(report.failed), "checks": checks})
    else:
        console().print(str(report), markup=False, highlight=False)
    if not report.ok:
        raise typer.Exit(FAILED)


def _declared(items: list[str] | None) -> dict[str, Any]:
    """Read NAME=VALUE: numbers, lists as pairs, else text."""
    found = {}
    for item in items or []:
        key, equals, text = item.partition("=")
        if not equals or not key.strip():
            raise InvdiffError(f"--set takes NAME=VALUE, got {item!r}; for example --set head_channels=64.")
        found[key.strip().replace("-", "_")] = read_value(text.strip(), None, f"--set {key}")
    return found


def _drawn(card: Mapping[str, Any]) -> Tensor | None:
    """Held-out images of the synthesiser that made a prior's training images, of one size; None if none did."""
    import numpy as np
    import torch

    from invdiff.training.latent import binned
    from invdiff.training.synthesisers import SYNTHESISERS

    data = card.get("recipe", {}).get("data")
    if data not in SYNTHESISERS or data == "brain":  # head slices are stored, and drawing them needs a template
        return None
    side = card["training_data"].get("binning", 1)
    images = [binned(SYNTHESISERS[data].image(seed, held_out=True), side) for seed in range(16)]
    ny, nx = (min(image.shape[axis] for image in images) for axis in (-2, -1))
    cut = [im[:, (im.shape[1] - ny) // 2 :, (im.shape[2] - nx) // 2 :][:, :ny, :nx] for im in images]
    return torch.from_numpy(np.asarray(cut, np.float32))


def _clean(path: Path | None, channels: int) -> Tensor:
    """Clean images from a file, or the stored head slices as the network takes them."""
    import numpy as np
    import torch

    from invdiff.priors.held_out import count, held_out_slice

    if path is None:
        slices = [held_out_slice(i) for i in range(count())]
        planes = [[x.real, x.imag] if channels == 2 else [np.abs(x)] * channels for x in slices]
        return torch.from_numpy(np.asarray(planes, np.float32))
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InvdiffError(f"{path} cannot be read as a .npy array ({str(error)[:200]}).") from error
    if (
        not isinstance(array, np.ndarray)
        or array.ndim != 4
        or array.shape[1] != channels
        or array.dtype.kind != "f"
    ):
        found = getattr(array, "shape", type(array).__name__)
        raise InvdiffError(f"{path} holds {found}, expected real images (case, {channels}, y, x).")
    return torch.from_numpy(array.astype(np.float32))


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{k} {_short(v)}" for k, v in value.items())
    if isinstance(value, list):
        return " ".join(_short(v) for v in value)
    return f"{value:g}" if isinstance(value, float) else str(value)
