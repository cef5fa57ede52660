"""Checkpoint formats of the field, each a module that recognises its files and makes a prior of them.

A module of this package has

* ``TITLE``: the format's name for people;
* ``recognise(source) -> str | None``: what the checkpoint is, in a few words (architecture, size, what it
  predicts), or None where it is something else. Looks at names, shapes and configurations only;
* ``OPTIONS``: what a user may or must declare, by name, with a sentence each;
* ``build(source, **declared) -> Prior``: strict in names and shapes; brings its own table of noise levels, range,
  learned variance and averaged weights, or refuses with the sentence that says what is missing.
"""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from invdiff.errors import InvdiffError
from invdiff.prior import Prior
from invdiff.priors.source import Source

__all__ = ["FORMATS", "build", "recognise"]

#: Modules of this package, asked in this order: those that a configuration names come before those by shapes.
FORMATS: tuple[str, ...] = (
    "diffusers_unet",
    "diffusers_latent",
    "latent_unet",
    "deepinv",
    "guided_diffusion",
    "edm",
    "score_sde",
)


def module(name: str) -> ModuleType:
    """Import the module of a format."""
    return import_module(f"invdiff.priors.formats.{name}")


def recognise(source: Source) -> tuple[str, str]:
    """Return the format's name and what it found.

    Raises:
        InvdiffError: If no format knows the checkpoint.
    """
    for name in FORMATS:
        if (found := module(name).recognise(source)) is not None:
            return name, found
    known = "; ".join(module(name).TITLE for name in FORMATS)
    shown = ", ".join(list(source.state)[:3] if source.state else source.files[:5])
    raise InvdiffError(
        f"{source.path} is no checkpoint that is known here (it holds {shown or 'nothing'}); there are {known}. "
        "A network of your own becomes a prior by priors.from_network."
    )


def build(path: str | Path, *, samples: Tensor | None = None, check: bool = True, **declared: Any) -> Prior:
    """Recognise a checkpoint, make a prior of it and test it; the card says what was recognised and found.

    Args:
        path: File or folder.
        samples: Clean images for the test; see `invdiff.priors.self_test`.
        check: Whether to test that the prior denoises.
        declared: Options of the format.

    Raises:
        InvdiffError: If the format is unknown, something declared is not an option of the format, the weights are
            not those of the architecture, or the prior does not denoise as it should.
    """
    from invdiff.priors.self_test import self_test

    source = Source(path)
    name, found = recognise(source)
    options = module(name).OPTIONS
    for key in declared:
        if key not in options:
            listed = "; ".join(f"{k}: {v}" for k, v in options.items()) or "none"
            raise InvdiffError(f"{found}: {key!r} is no option of this format; there are {listed}.")
    prior: Prior = module(name).build(source, **declared)
    return self_test(replace(prior, card={**prior.card, "recognised": found}), samples, check)
