"""Checkpoints of EDM and of codes built on it: DDPM++, NCSN++ and ADM under four preconditionings.

| preconditioning | ``D(x, sigma)`` | time | levels |
|---|---|---|---|
| ``edm`` | ``c_skip x + c_out F(c_in x, time)``, ``sigma_data`` 0.5 | ``log(sigma) / 4`` | 0.002 to 80 |
| ``vp`` | ``x - sigma F(x / sqrt(1 + sigma^2), time)`` | ``999 t(sigma)``, continuous | 0.001 to 152 |
| ``ve`` | ``x + sigma F(x, time)`` | ``log(sigma / 2)`` | 0.02 to 100 |
| ``iddpm`` | as ``vp``, of half the channels | step of the table | 0.0064 to 20291 |

Architecture and sizes are read off names and shapes. The preconditioning comes from the card of a converted
pickle, or from a preset, or is declared: nothing in a bare list of weights tells. EDM snaps the time of ``iddpm``
to whole steps; here a fraction of a step is passed on.

Karras, Aittala, Aila, Laine, NeurIPS 2022, arXiv:2206.00364. InverseBench: Zheng et al., ICLR 2025,
arXiv:2503.11043.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from invdiff.errors import InvdiffError
from invdiff.networks.dhariwal import DhariwalUNet
from invdiff.networks.songunet import SongUNet
from invdiff.prior import Prior
from invdiff.priors.assemble import IMAGE_OPTIONS, assemble, fill
from invdiff.priors.frames import EDM, VP, Frame
from invdiff.priors.frames_sde import SDEVP, LogVE
from invdiff.priors.source import Source

__all__ = ["OPTIONS", "PRESETS", "TITLE", "build", "recognise"]

TITLE = "networks of EDM (DDPM++, NCSN++, ADM) and InverseBench"
OPTIONS = {
    "preset": "a known checkpoint by name, where the file is not called so",
    "preconditioning": "edm, vp, ve or iddpm, where neither a card nor a preset says",
    "weights": "'ema' or 'raw', where a checkpoint of InverseBench holds averaged and raw weights",
    **IMAGE_OPTIONS,
}
_CLASSES = {"EDMPrecond": "edm", "VPPrecond": "vp", "VEPrecond": "ve", "iDDPMPrecond": "iddpm"}
_SIGMA_DATA = 0.5
_ADM = "time_embed.0.weight"
_NAME = re.compile(r"enc\.(\d+)x\1_(conv|block\d+\.conv0)\.weight$")


@dataclass(frozen=True)
class Preset:
    """What is known of a published checkpoint beyond its weights.

    Args:
        network: ``DDPM++``, ``NCSN++`` or ``ADM``.
        inputs, resolution: Channels and size of its images.
        preconditioning: See the table of the module.
        network_range, image_range: Values of the network and the image values that they stand for; without the
            second, the 99th percentile of the magnitude of an image is 1 in network units.
        units: Of the image values.
        images: ``natural``, or what they show.
        licence: Of the weights.
    """

    network: str
    inputs: int
    resolution: int
    preconditioning: str
    network_range: tuple[float, float]
    image_range: tuple[float, float] | None
    units: str
    images: str
    licence: str


_EDM = "CC-BY-NC-SA-4.0"
_BENCH = "not stated with the weights; the code of InverseBench is under the MIT licence"
_RAW = (-1.0, 1.0)


def _picture(network: str, size: int, preconditioning: str) -> Preset:
    return Preset(network, 3, size, preconditioning, _RAW, (0.0, 1.0), "1", "natural", _EDM)


_TRAINED = ("cifar10-32x32-uncond", "cifar10-32x32-cond", "ffhq-64x64-uncond", "afhqv2-64x64-uncond")
_SONG = {"vp": "DDPM++", "ve": "NCSN++"}
PRESETS = {
    **{f"edm-{d}-{k}": _picture(n, 32 if "32" in d else 64, "edm") for d in _TRAINED for k, n in _SONG.items()},
    **{f"baseline-{d}-{k}": _picture(n, 32 if "32" in d else 64, k) for d in _TRAINED for k, n in _SONG.items()},
    "edm-imagenet-64x64-cond-adm": _picture("ADM", 64, "edm"),
    "baseline-imagenet-64x64-cond-adm": _picture("ADM", 64, "iddpm"),
    # The same as the first of the two, in deepinv's copy.
    "adm-imagenet64-cond": _picture("ADM", 64, "edm"),
    "fwi-5m": Preset(
        "ADM", 1, 128, "edm", (-1.5, 1.5), (1.5, 4.5), "km/s", "velocities of rock, OpenFWI CurveFault", _BENCH
    ),
    "in-scatter-5m": Preset("ADM", 1, 128, "edm", _RAW, (0.0, 1.0), "1", "permittivity of cells, HL60", _BENCH),
    "ns-5m": Preset("ADM", 1, 128, "edm", _RAW, (-10.0, 10.0), "1", "vorticity of forced flow", _BENCH),
    "blackhole": Preset("DDPM++", 1, 64, "vp", _RAW, (0.0, 1.0), "1", "black holes, GRMHD", _BENCH),
    "mri-brain": Preset("ADM", 2, 320, "edm", _RAW, None, "p99", "brain slices, fastMRI", _BENCH),
    "mri-knee": Preset("ADM", 2, 320, "edm", _RAW, None, "p99", "knee slices, fastMRI", _BENCH),
}


class _Negative(nn.Module):
    """``-F``: networks of ``ve`` predict minus the noise."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, z: Tensor, time: Tensor, **cond: Tensor) -> Tensor:
        out: Tensor = -self.network(z, time, **cond)
        return out


def recognise(source: Source) -> str | None:
    """Return architecture and size where the names are those of EDM's networks."""
    found = _states(source)
    if found is None:
        return None
    state = next(iter(found.values()))
    if _ADM in state:
        return "guided diffusion U-Net in a checkpoint of InverseBench"
    try:
        kind, layout = _layout(state)
    except InvdiffError:
        # What is missing is said when it is built.
        return "a network of EDM with weights missing"
    return f"EDM {kind}, {layout['inputs']} channel(s), {layout['resolution']} x {layout['resolution']} pixels"


def build(source: Source, **declared: Any) -> Prior:
    """Make the prior; see `invdiff.priors.formats`.

    Raises:
        InvdiffError: If the weights are not those of the architecture, or preconditioning, kind of weights or
            preset must be declared.
    """
    found = _states(source)
    assert found is not None
    state, weights = _chosen(found, declared.pop("weights", None), source)
    card = source.json() or {}
    if _ADM in state:
        return _guided(state, weights, source, declared)
    kind, layout = _layout(state)
    preset_name = _preset(declared.pop("preset", None), kind, layout, source, card)
    preset = PRESETS.get(preset_name or "")
    name = _preconditioning(declared.pop("preconditioning", None), card, preset, state, source)
    table = state.pop("u", None)
    make = DhariwalUNet if kind == "ADM" else SongUNet
    network = fill(lambda: make(**layout), state, str(source.path))
    assert isinstance(network, DhariwalUNet | SongUNet)
    inputs, outputs = layout["inputs"], layout["outputs"]
    if outputs != (2 * inputs if name == "iddpm" else inputs):
        raise InvdiffError(
            f"{source.path} has {inputs} input and {outputs} output channels, which does not go with the "
            f"preconditioning {name!r}."
        )
    about: dict[str, Any] = {
        "name": preset_name or card.get("name") or source.path.stem,
        "format": f"EDM {kind}",
        "architecture": layout,
        "preconditioning": name,
        "weights": weights,
        "sha256": _digest(source, card),
        "licence": preset.licence if preset else card.get("licence", "not stated in the checkpoint"),
        "images": preset.images if preset else "natural" if inputs == 3 else "unknown",
        "size": layout["resolution"],
    }
    if preset is not None:
        about["units"] = preset.units
        declared = {"network_range": preset.network_range, "image_range": preset.image_range} | declared
    frame, spread = _frame(name, table, card, declared.pop("sigma_data", None))
    return assemble(
        _Negative(network) if name == "ve" else network,
        "edm" if name == "edm" else "epsilon",
        frame,
        inputs,
        card=about,
        multiple=network.multiple,
        learned_variance=name == "iddpm",
        conditions=("label",) if layout["label"] else (),
        sigma_data=spread,
        **declared,
    )


def _states(source: Source) -> dict[str, dict[str, Tensor]] | None:
    """Lists of weights by kind (``ema``, ``net``), names without prefix; None where there is none of ours."""
    if source.folder:
        return None
    content = source.content
    if not isinstance(content, Mapping):
        return None
    nested = {k: content[k] for k in ("ema", "net", "model") if isinstance(content.get(k), Mapping)}
    out = {}
    for kind, state in (nested or {"weights": content}).items():
        if not state or not all(isinstance(v, Tensor) for v in state.values()):
            return None
        plain = {re.sub(r"^(_orig_mod\.|module\.|model\.)*", "", str(k)): v for k, v in state.items()}
        ours = _ADM in plain or any(_NAME.match(k) for k in plain)
        if len(plain) != len(state) or not ours:
            return None
        out[kind] = plain
    return out


def _chosen(
    states: Mapping[str, dict[str, Tensor]], wanted: str | None, source: Source
) -> tuple[dict[str, Tensor], str]:
    """The weights that are asked for, and which ones they are."""
    if set(states) == {"weights"}:
        if wanted is not None:
            raise InvdiffError(f"{source.path} holds one list of weights; leave out weights={wanted!r}.")
        return dict(states["weights"]), str((source.json() or {}).get("weights", "not stated in the checkpoint"))
    if wanted not in (None, "ema", "raw"):
        raise InvdiffError(f"weights must be 'ema' or 'raw', got {wanted!r}.")
    kind = wanted or "ema"
    key = "ema" if kind == "ema" else next((k for k in ("net", "model") if k in states), "net")
    if key not in states:
        hint = "which denoise better" if kind == "raw" else "though averaged weights denoise better"
        raise InvdiffError(
            f"{source.path} holds weights under {', '.join(map(repr, states))} and not under {key!r}; declare "
            f"weights={'raw' if kind == 'ema' else 'ema'} to take them, {hint}."
        )
    return dict(states[key]), kind


def _layout(state: Mapping[str, Tensor]) -> tuple[str, dict[str, Any]]:
    """Name of the architecture and arguments of its class."""
    shapes = {k: tuple(v.shape) for k, v in state.items()}
    if "out_conv.weight" in shapes:
        return "ADM", DhariwalUNet.layout(shapes)
    layout = SongUNet.layout(shapes)
    return "NCSN++" if layout["fourier"] else "DDPM++", layout


def _guided(state: dict[str, Tensor], weights: str, source: Source, declared: dict[str, Any]) -> Prior:
    """The network for faces of InverseBench, which is one of guided diffusion in a ``vp`` preconditioning.

    It was trained on a table of 1000 steps, and gets its times from that table.
    """
    from invdiff.priors.formats.guided_diffusion import prior_of

    for key in ("preset", "preconditioning"):
        if key in declared:
            raise InvdiffError(f"{source.path} is a network of guided diffusion; leave out {key}.")
    about = {"weights": weights, "sha256": _digest(source, source.json() or {})}
    return prior_of(state, str(source.path), about, **declared)


def _preset(
    declared: str | None, kind: str, layout: Mapping[str, Any], source: Source, card: Mapping[str, Any]
) -> str | None:
    """Name of the preset that is declared, or that the file is called by, where the architecture is its own."""
    found = (kind, layout["inputs"], layout["resolution"])
    if declared is not None:
        if declared not in PRESETS:
            raise InvdiffError(f"Unknown preset {declared!r}; there are {', '.join(PRESETS)}.")
        p = PRESETS[declared]
        if (p.network, p.inputs, p.resolution) != found:
            raise InvdiffError(
                f"The preset {declared!r} is a {p.network} of {p.inputs} channel(s) and {p.resolution} pixels, "
                f"and {source.path} is a {found[0]} of {found[1]} and {found[2]}."
            )
        return declared
    for name in (source.path.stem, str(card.get("name"))):
        near = PRESETS.get(name)
        if near is not None and (near.network, near.inputs, near.resolution) == found:
            return name
    return None


def _preconditioning(
    declared: str | None,
    card: Mapping[str, Any],
    preset: Preset | None,
    state: Mapping[str, Tensor],
    source: Source,
) -> str:
    known = _CLASSES.get(str(card.get("classes", {}).get("preconditioning")))
    known = known or ("iddpm" if "u" in state else preset.preconditioning if preset else None)
    if declared is not None and declared not in _CLASSES.values():
        raise InvdiffError(f"Unknown preconditioning {declared!r}; there are {', '.join(_CLASSES.values())}.")
    if known is not None and declared not in (None, known):
        raise InvdiffError(f"{source.path} has the preconditioning {known!r}; leave out {declared!r}.")
    if known is None and declared is None:
        candidates = ", ".join(n for n, p in PRESETS.items() if p.inputs == next(iter(_inputs(state)), 0))
        raise InvdiffError(
            f"{source.path} does not say how its network meets the noise level; declare preconditioning= "
            f"('edm' for edm-*, 'vp' or 've' for baseline-*, 'iddpm'), or preset= ({candidates or 'none fits'})."
        )
    return known or str(declared)


def _inputs(state: Mapping[str, Tensor]) -> list[int]:
    return [v.shape[1] for k, v in state.items() if k.startswith("enc.") and k.endswith("_conv.weight")]


def _frame(
    name: str, table: Tensor | None, card: Mapping[str, Any], declared: float | None
) -> tuple[Frame, float]:
    """Frame of a preconditioning, with the numbers of a converted pickle where it has them; and sigma_data."""
    own = card.get("attributes", {})
    try:
        known = own.get("sigma_data")
        spread = float(known if known is not None else _SIGMA_DATA if declared is None else declared)
        if declared is not None and declared != spread:
            raise InvdiffError(f"The card says sigma_data {spread:g}; leave out {declared:g}.")
        if name == "edm":
            return EDM(spread), spread
        if name == "vp":
            steps, first = int(own.get("M", 1000)), float(own.get("epsilon_t", 1e-5))
            return SDEVP(float(own.get("beta_d", 19.9)), float(own.get("beta_min", 0.1)), steps, first), spread
        if name == "ve":
            return LogVE(float(own.get("sigma_min", 0.02)), float(own.get("sigma_max", 100.0))), spread
    except InvdiffError:
        raise
    except (TypeError, ValueError) as error:
        raise InvdiffError(f"The card has numbers that make no frame ({error}); convert the file again.") from None
    sigma = iddpm_levels() if table is None else table.double().flip(0)
    sigma = sigma[sigma > 0]
    return VP(1 / (1 + sigma**2), torch.arange(len(sigma), dtype=torch.float64)), spread


def iddpm_levels(steps: int = 1000, floor: float = 0.001, offset: float = 0.008) -> Tensor:
    """Return the levels of ``iddpm`` from step 0 on, float64.

    ``sigma_(j+1)^2 = (sigma_j^2 + 1) / max(a(j+1) / a(j), floor) - 1`` from ``sigma_(-1) = 0``, with
    ``a(j) = cos^2(pi/2 (j/steps + offset) / (1 + offset))`` up to a constant factor.
    """
    j = torch.arange(steps + 1, dtype=torch.float64)
    a = torch.sin(math.pi / 2 * (steps - j) / steps / (1 + offset)) ** 2
    ratio = (a[1:] / a[:-1]).clamp_min(floor)
    return torch.expm1(-ratio.log().cumsum(0)).sqrt()


def _digest(source: Source, card: Mapping[str, Any]) -> str:
    found = source.sha256()
    stated = card.get("sha256")
    if stated is not None and stated != found:
        raise InvdiffError(
            f"{source.path} has SHA-256 {found[:12]}..., its card says {str(stated)[:12]}...: the weights are "
            "damaged or belong to another card; convert the checkpoint again."
        )
    return found
