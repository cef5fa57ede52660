"""Loading of trained denoisers: safetensors weights beside a JSON card.

Nothing in a file is executed. Names and shapes of the weights must match the network of the card
exactly, the weights must have the SHA-256 that the card states, and a self-test compares the
denoising error on a bundled image with the card's figures.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from invdiff.networks import EDMUNet, TrainedNetwork
from invdiff.priors.frames import EDM, Flow
from invdiff.priors.held_out import held_out_slice
from invdiff.priors.parametrisation import ParametrisedDenoiser

__all__ = [
    "FORMAT",
    "FORMATS",
    "Network",
    "bundled",
    "compare",
    "denoiser_of",
    "format_of",
    "load_as",
    "load_network",
    "reference_errors",
    "self_test",
    "sha256_file",
]

Network = EDMUNet | TrainedNetwork
_Module = TypeVar("_Module", bound=torch.nn.Module)

#: Of `EDMUNet`, which is the denoiser itself.
FORMAT = "invdiff-edm-unet/1"
#: What builds the network of a format from the card.
FORMATS: dict[str, Callable[[dict[str, Any]], Network]] = {
    FORMAT: EDMUNet.from_config,
    "invdiff-trained/1": TrainedNetwork.from_config,
}
SELF_TEST_SIGMAS = (0.02, 0.1, 0.5, 2.0)
# Other processors and half precision change the error by far less than this.
SELF_TEST_TOLERANCE = 0.03
_NEEDED = ("name", "format", "config", "sigma_min", "sigma_max", "normalisation", "licence", "sha256")
_LARGEST_CARD = 1 << 20


def sha256_file(path: str | Path) -> str:
    """SHA-256 of a file as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def bundled(name: str = "brain-mri") -> Path:
    """Path of the weights of a prior that ships in the package.

    Raises:
        ValueError: there is no such prior.
    """
    folder = Path(__file__).parent
    path = folder / f"{name.replace('-', '_')}.safetensors"
    if Path(name).name != name or not path.with_suffix(".json").exists() or not path.exists():
        known = sorted(
            p.stem.replace("_", "-") for p in folder.glob("*.json") if p.with_suffix(".safetensors").exists()
        )
        raise ValueError(f"No prior named {name!r} ships with the package; there are {known}.")
    return path


def _read_card(path: Path, formats: Mapping[str, Any]) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"There is no card at {path}: weights need a JSON card of the same name beside them.")
    if path.stat().st_size > _LARGEST_CARD:
        raise ValueError(f"{path} is larger than a card can be ({_LARGEST_CARD} bytes).")
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(card, dict):
        raise ValueError(f"{path} must hold a JSON object; got {type(card).__name__}.")
    missing = [key for key in _NEEDED if key not in card]
    if missing:
        raise ValueError(f"{path} lacks {missing}; a card needs {list(_NEEDED)}.")
    if card["format"] not in formats:
        raise ValueError(f"{path} has format {card['format']!r}; this version reads {', '.join(formats)}.")
    low, high = card["sigma_min"], card["sigma_max"]
    numbers = all(isinstance(v, int | float) and math.isfinite(v) for v in (low, high))
    if not numbers or not 0 < low < high:
        raise ValueError(
            f"{path} has sigma_min {low!r} and sigma_max {high!r}; 0 < sigma_min < sigma_max is needed."
        )
    if not isinstance(card["config"], dict):
        raise ValueError(f"{path} has a config of type {type(card['config']).__name__}; an object is needed.")
    return card


def format_of(network: Network) -> str:
    """Name of the format of a network."""
    return FORMAT if isinstance(network, EDMUNet) else "invdiff-trained/1"


def denoiser_of(network: Network, call: Callable[..., Tensor] | None = None) -> Callable[..., Tensor]:
    """Return ``D(x, sigma, cond=None)`` of a network.

    An `EDMUNet` is that already. Any other is told to be what it was trained as; without a label it denoises
    images of no class in particular.

    Args:
        network: The network.
        call: What to call in its place, a compiled twin for example.
    """
    if isinstance(network, EDMUNet):
        return network if call is None else call
    low, high = network.sigma_min, network.sigma_max
    flow = network.parametrisation == "flow"
    conditions = ("label",) if network.classes else ()
    return ParametrisedDenoiser(
        network if call is None else call,
        network.parametrisation,
        Flow(1, low, high) if flow else EDM(network.sigma_data, low, high),
        network.channels,
        outside="clamp",
        sigma_data=network.sigma_data,
        conditions=conditions,
        given=dict.fromkeys(conditions, torch.tensor(network.classes)),
    )


def load_network(path: str | Path, *, device: str | torch.device = "cpu") -> tuple[Network, dict[str, Any]]:
    """Load a denoiser and its card.

    Args:
        path: the .safetensors file; the card is the .json file of the same name.
        device: where to put the network.

    Returns:
        The network in float32, in evaluation mode, with gradients to its weights off; and the card.

    Raises:
        ValueError: weights or card are missing or damaged, or do not belong together.
    """
    return load_as(path, FORMATS, device)


def load_as(
    path: str | Path,
    formats: Mapping[str, Callable[[dict[str, Any]], _Module]],
    device: str | torch.device = "cpu",
) -> tuple[_Module, dict[str, Any]]:
    """Load weights and card of one of some formats, as `load_network` does.

    Args:
        path: the .safetensors file; the card is the .json file of the same name.
        formats: what builds the network of each from the card's ``config``.
        device: where to put the network.

    Raises:
        ValueError: weights or card are missing or damaged, or do not belong together.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There are no weights at {path}.")
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} is not a .safetensors file; other formats may run code and are not loaded.")
    card = _read_card(path.with_suffix(".json"), formats)
    found = sha256_file(path)
    if found != card["sha256"]:
        raise ValueError(
            f"{path} has SHA-256 {found[:12]}..., the card says {str(card['sha256'])[:12]}...: "
            "the weights are damaged or belong to another card; fetch both again."
        )
    build = formats[card["format"]]
    # On the meta device a hostile config costs no memory.
    try:
        with torch.device("meta"):
            expected = {k: tuple(v.shape) for k, v in build(card["config"]).state_dict().items()}
    except (RuntimeError, OverflowError) as error:
        raise ValueError(f"The card of {path} describes no network that can be built: {error}.") from None
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
            if shapes != expected:
                raise ValueError(_difference(path, shapes, expected))
            tensors = {key: file.get_tensor(key).float() for key in shapes}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}.") from None
    for key, value in tensors.items():
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{path} holds NaN or infinite values in {key}.")
    # Initial weights are drawn and thrown away; that must not move the caller's random numbers.
    with torch.random.fork_rng(devices=[]):
        network = build(card["config"])
    network.load_state_dict(tensors, strict=True)
    return network.to(device).eval().requires_grad_(False), card


def _difference(path: Path, found: dict[str, Any], expected: dict[str, Any]) -> str:
    for key in expected:
        if key not in found:
            return f"{path} lacks the weights {key} of the network that the card describes."
        if found[key] != expected[key]:
            return f"{path}: {key} has shape {found[key]}; the card's network needs {expected[key]}."
    extra = next(key for key in found if key not in expected)
    return f"{path} holds the weights {extra}, which the card's network does not have."


@torch.no_grad()
def reference_errors(network: Network) -> dict[str, Any]:
    """RMSE of denoising the first bundled slice, with fixed noise, at a few noise levels.

    Args:
        network: any number of channels: one takes the magnitude, two the real and imaginary part,
            more the magnitude repeated.

    Returns:
        Lists ``sigma`` and ``rmse`` (per real component).
    """
    x = held_out_slice(0)
    planes = [x.real, x.imag] if network.channels == 2 else [np.abs(x)] * network.channels
    multiple = network.multiple
    # Attention over a whole slice takes gigabytes; a network with a size is shown a middle part of that size.
    sides = x.shape if isinstance(network, EDMUNet) else [min(n, network.size) for n in x.shape]
    ny, nx = (n - n % multiple for n in sides)
    top, left = (0, 0) if isinstance(network, EDMUNet) else ((n - m) // 2 for n, m in zip(x.shape, (ny, nx)))
    clean = torch.from_numpy(np.stack(planes)[:, top : top + ny, left : left + nx].astype(np.float32))
    parameter = next(network.parameters())
    denoise = denoiser_of(network)
    rng = np.random.default_rng(20240229)
    errors = []
    for sigma in SELF_TEST_SIGMAS:
        noisy = clean + sigma * torch.from_numpy(rng.standard_normal(clean.shape, dtype=np.float32))
        level = torch.full((1,), sigma, device=parameter.device, dtype=parameter.dtype)
        out = denoise(noisy[None].to(parameter.device, parameter.dtype), level)[0]
        errors.append(float((out.float().cpu() - clean).square().mean().sqrt()))
    return {"sigma": list(SELF_TEST_SIGMAS), "rmse": [float(f"{e:.5g}") for e in errors]}


def self_test(network: Network, card: dict[str, Any]) -> dict[str, Any]:
    """Denoise a known image and compare with the card.

    Args:
        network: the loaded network.
        card: its card; the figures are under ``"self_test"``.

    Returns:
        ``sigma``, ``rmse`` (found), ``expected``, and ``largest_deviation`` (relative).

    Raises:
        ValueError: the card has no figures, or the network does not reproduce them.
    """
    return compare(reference_errors(network), card)


def compare(found: dict[str, Any], card: dict[str, Any]) -> dict[str, Any]:
    """Compare the errors that a loaded network makes with those on its card; see `self_test`.

    Args:
        found: ``sigma`` and ``rmse``, and ``reconstruction`` for a latent prior.
        card: the card.
    """
    stated = card.get("self_test")
    if (
        not isinstance(stated, dict)
        or any(stated.get(k) is None for k in found)
        or stated["sigma"] != found["sigma"]
    ):
        raise ValueError(f"The card of {card.get('name')!r} has no self-test figures; export the prior again.")
    pairs = list(zip(found["rmse"], stated["rmse"]))
    if "reconstruction" in found:
        pairs.append((found["reconstruction"], stated["reconstruction"]))
    deviation = max(abs(a - b) / b if b > 0 else math.inf for a, b in pairs)
    if not deviation <= SELF_TEST_TOLERANCE:
        raise ValueError(
            f"The prior {card.get('name')!r} fails its self-test: denoising errors {found['rmse']} where the card "
            f"says {stated['rmse']}; do not use it."
        )
    return {**found, "expected": list(stated["rmse"]), "largest_deviation": deviation}
