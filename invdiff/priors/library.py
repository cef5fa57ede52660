"""Priors by name: embedded ones, safetensors files of the embedded format, and checkpoints of other formats.

A learned prior serves images of any size: its codec is made for each problem (scale, complex against channels,
padding to the network's multiple).
"""

from __future__ import annotations

import difflib
import functools
import json
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from invdiff.codec import Codec, ComplexChannels, Pad, Scale
from invdiff.errors import InvdiffError
from invdiff.prior import Denoiser, Prior
from invdiff.spaces import Space

if TYPE_CHECKING:
    from invdiff.networks.latent_pair import LatentPair
    from invdiff.priors.learned import Network

_FOLDER = Path(__file__).resolve().parent
_EMBEDDED = {
    "brain-mri": "brain_mri.safetensors",
    "ct-phantom": "ct_phantom.safetensors",
    "ct-latent": "ct_latent.safetensors",
    "black-hole": "black_hole.safetensors",
}


class NetworkDenoiser(Denoiser):
    """A network that already is ``D(x, sigma)`` in the variance-exploding frame, for any spatial size.

    Args:
        network: Module ``(x, sigma) -> D`` with attribute ``multiple``.
        card: Card with ``sigma_min``, ``sigma_max`` and ``channels``.
    """

    space = None

    def __init__(self, network: torch.nn.Module, card: Mapping[str, Any]) -> None:
        self.network = network.eval().requires_grad_(False)
        self.sigma_min, self.sigma_max = float(card["sigma_min"]), float(card["sigma_max"])
        self.sigma_data = float(card.get("sigma_data", getattr(network, "sigma_data", 1.0)))
        self.channels = len(card["channels"])
        #: What height and width must be multiples of.
        self.multiple = int(getattr(network, "multiple", 1))

    def __call__(self, x: Tensor, sigma: Tensor, cond: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return ``D(x, sigma)``, ``(B, C, H, W)``."""
        return self.network(x, sigma)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> NetworkDenoiser:
        """Return a denoiser on another device or in another precision (weights are copied only if they move)."""
        parameter = next(self.network.parameters())
        target = torch.device(device) if device is not None else parameter.device
        if target == parameter.device and dtype in (None, parameter.dtype):
            return self
        import copy

        new = copy.copy(self)
        new.network = copy.deepcopy(self.network).to(device=target, dtype=dtype)
        new.dtype = dtype or self.dtype
        return new


def real_codec(image: Space, scale: Tensor, multiple: int, channels: int) -> Codec:
    """Codec of a prior for real images ``(channels, y, x)`` of any size."""
    if image.is_complex or len(image.shape) != 3 or image.shape[0] != channels:
        raise InvdiffError(
            f"This prior has {channels} real channel(s), and the problem's images are {image}; "
            "choose a prior that fits."
        )
    units = Scale(image, scale)
    return units @ Pad(units.prior, multiple)


def complex_codec(image: Space, scale: Tensor, multiple: int, channels: int = 2) -> Codec:
    """Codec of a two-channel prior for complex (or real) images ``(1, y, x)`` of any size."""
    if image.shape[0] != 1 or len(image.shape) != 3:
        raise InvdiffError(
            f"This prior has two channels (real and imaginary part of one image (1, y, x)), and the problem's "
            f"images are {image}; choose a prior with {image.shape[0]} channel(s)."
        )
    units = Scale(image, scale)
    parts = ComplexChannels(units.prior)
    return units @ parts @ Pad(parts.prior, multiple)


def available() -> list[str]:
    """Names of the embedded priors."""
    return [name for name, file in _EMBEDDED.items() if (_FOLDER / file).exists()]


def path_of(name: str | Path) -> Path:
    """Return the weights file of an embedded prior, or the path itself.

    Raises:
        InvdiffError: If there is no such prior or file.
    """
    if str(name) in _EMBEDDED:
        return _FOLDER / _EMBEDDED[str(name)]
    path = Path(name)
    if path.exists():
        return path
    if path.suffix or path.parent != Path():
        raise InvdiffError(f"There is no prior file {path}; check the path.")
    near = difflib.get_close_matches(str(name), list(_EMBEDDED), n=1, cutoff=0.4)
    hint = (
        f"did you mean {near[0]!r}?" if near else f"there are {', '.join(_EMBEDDED)}, or the path of a checkpoint."
    )
    raise InvdiffError(f"Unknown prior {str(name)!r}; {hint}")


def card(name: str | Path, **declared: Any) -> dict[str, Any]:
    """Return the card of a prior: data, training, licence, sha256, measured denoising error.

    Checkpoints of other formats are loaded for it, untested.

    Args:
        name: As for `load`.
        declared: As for `load`.
    """
    if not _is_own(name):
        about = dict(load(name, check=False, **declared).card)
        about.pop("check")
        return about
    path = path_of(name).with_suffix(".json")
    if not path.is_file():
        raise InvdiffError(f"Prior {name} has no card; expected {path.name} beside the weights.")
    return json.loads(path.read_text())


def _is_own(name: str | Path) -> bool:
    """Whether it is an embedded prior or a file of that format (or nothing that exists)."""
    if str(name) in _EMBEDDED:
        return True
    return not str(name).startswith("hf://") and (not Path(name).exists() or _ours(name))


def load(
    name: str | Path,
    *,
    samples: Tensor | None = None,
    check: bool = True,
    sha256: str | Mapping[str, str] | None = None,
    compile: bool = False,
    **declared: Any,
) -> Prior:
    """Load a prior by name (``"brain-mri"``), from a checkpoint of any format that is known, or from the hub.

    The load is strict (names, shapes, hashes), executes nothing from the file, and is followed by a self-test
    whose verdict is on the card, under ``check``; see `invdiff.priors.self_test`.

    Args:
        name: An embedded prior, a file, a folder (see `invdiff.priors.formats`), or ``hf://org/name@revision``,
            with ``/file`` where a repository holds several.
        samples: Clean images ``(B, C, y, x)`` in image units for the self-test.
        check: Whether to test that the prior denoises.
        sha256: What the file of weights must hash to; for repositories also hashes by file.
        compile: Turn the network into compiled code (torch.compile) when it is first called, which takes up to
            minutes, for every new size of a batch too; `Prior.cost` measures what it gains. A compiled network is
            differentiable once.
        declared: What the format cannot know from the file; ``label`` for a prior with classes.

    Raises:
        InvdiffError: If the file is not what its card or ``sha256`` says, no format knows it, or it fails the
            self-test.
    """
    from invdiff.priors.formats import build
    from invdiff.priors.self_test import self_test

    if compile:
        return _compiled(load(name, samples=samples, check=check, sha256=sha256, **declared))
    if str(name).startswith("hf://"):
        from invdiff.priors.hub import fetch

        path, about = fetch(str(name), sha256)
        prior = load(path, samples=samples, check=check, **declared)
        return replace(prior, card={**prior.card, **about})
    if sha256 is not None:
        _hashed(path_of(name), sha256)
    if not _is_own(name):
        return build(name, samples=samples, check=check, **declared)
    prior = _load(str(path_of(name)), check)
    if "label" in declared and "classes" in prior.card:
        prior = _of_class(prior, declared.pop("label"))
    if declared:
        raise InvdiffError(f"Prior {name} needs nothing declared; leave out {', '.join(declared)}.")
    return prior if samples is None else self_test(prior, samples, check)


def _compiled(prior: Prior) -> Prior:
    """Return the prior with its network compiled."""
    import copy

    denoiser: Any = copy.copy(prior.denoiser)
    if not isinstance(getattr(denoiser, "network", None), torch.nn.Module):
        raise InvdiffError(f"Prior {prior.name} has no network that can be compiled; leave out compile.")
    denoiser.network = torch.compile(denoiser.network)
    denoiser.differentiable = min(1, denoiser.differentiable)
    return replace(prior, denoiser=denoiser)


def _of_class(prior: Prior, label: int | str) -> Prior:
    """Return a prior of the images of one class, named or counted from 0."""
    import copy

    classes = list(prior.card["classes"])
    # A name wins, so that classes that are called by numbers are what they are called.
    number = classes.index(str(label)) if str(label) in classes else label
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < len(classes):
        raise InvdiffError(
            f"Prior {prior.name} has the classes {', '.join(classes)}, and label is {label!r}; give one of these "
            f"names, or a number from 0 to {len(classes) - 1}."
        )
    denoiser: Any = copy.copy(prior.denoiser)
    denoiser.given = {**denoiser.given, "label": torch.tensor(number)}
    return replace(prior, denoiser=denoiser, card={**prior.card, "name": f"{prior.name}, {classes[number]}"})


def _hashed(path: Path, sha256: str | Mapping[str, str]) -> None:
    """Refuse a file that has another hash."""
    from invdiff.priors.learned import sha256_file

    if not isinstance(sha256, str) or not path.is_file():
        raise InvdiffError(f"sha256 is the hash of one file, and {path} is a folder; name the file of weights.")
    if (found := sha256_file(path)) != sha256.lower():
        raise InvdiffError(f"{path} has SHA-256 {found}, and {sha256} was demanded; it was not loaded.")


def _ours(name: str | Path) -> bool:
    """Whether a file says that it is of the embedded format."""
    from safetensors import SafetensorError, safe_open

    from invdiff.priors import latent
    from invdiff.priors.learned import FORMATS
    from invdiff.priors.source import Source

    path = Path(name)
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    if (about := Source(path).json()) is not None:
        return about.get("format") in {*FORMATS, latent.FORMAT}
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            return "inlet.weight" in names
    except (SafetensorError, OSError):
        return True


def verify(
    path: str | Path, check: bool = True
) -> tuple[LatentPair | Network, dict[str, Any], dict[str, Any] | None]:
    """Read the networks of a file of the embedded format and repeat the self-test of its card.

    Returns:
        The network (a `LatentPair` where the prior is a latent one), the card, and what the self-test found: None
        where it is not asked for or the card has no figures.

    Raises:
        InvdiffError: If the file is not what its card says, or fails the self-test.
    """
    from invdiff.networks.latent_pair import LatentPair
    from invdiff.priors import latent, learned
    from invdiff.priors.source import Source

    path = Path(path)
    network: LatentPair | Network
    try:
        if ((path.is_file() and Source(path).json()) or {}).get("format") == latent.FORMAT:
            pair, about = learned.load_as(path, {latent.FORMAT: LatentPair.from_config})
            network = pair
            latent.codec_maker(pair, about)  # refuses shift and scale that do not fit
            wanted = functools.partial(latent.reference_errors, pair, about)
        else:
            plain, about = learned.load_network(path)
            network = plain
            wanted = functools.partial(learned.reference_errors, plain)
        tested = check and "self_test" in about
        return network, about, learned.compare(wanted(), about) if tested else None
    except InvdiffError:
        raise
    except ValueError as error:
        raise InvdiffError(str(error)) from error


@lru_cache(maxsize=8)
def _load(path: str, check: bool = True) -> Prior:
    from invdiff.networks.latent_pair import LatentPair
    from invdiff.priors import latent, learned

    network, about, found = verify(path, check)
    verdict: dict[str, Any] = {"verdict": "not checked"}
    if found is not None:
        verdict = {"verdict": "passed", **found}
    elif check:
        verdict = {"verdict": "format and shapes verified, denoising not: its card has no figures"}
    embedded = {str(_FOLDER / file): name for name, file in _EMBEDDED.items()}
    about = {**about, "name": embedded.get(path, about.get("name", Path(path).stem)), "check": verdict}
    if isinstance(network, LatentPair):
        latents = {**about, "channels": range(network.codec.latent)}
        return Prior(
            NetworkDenoiser(network.denoiser, latents), card=about, make_codec=latent.codec_maker(network, about)
        )
    multiple, channels = int(network.multiple), len(about["channels"])
    make = complex_codec if channels == 2 else real_codec
    denoiser = learned.denoiser_of(network)
    return Prior(
        denoiser if isinstance(denoiser, Denoiser) else NetworkDenoiser(network, about),
        card=about,
        make_codec=lambda image, scale: make(image, scale, multiple, channels),
    )
