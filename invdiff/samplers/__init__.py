"""Samplers: one small file each, found by name.

``REGISTRY`` maps names to classes; ``get("dds", steps=30)`` makes one; ``invdiff.samplers.DDS()`` too.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from invdiff.errors import InvdiffError

if TYPE_CHECKING:
    from invdiff.sampler import Sampler
    from invdiff.samplers.afdps import AFDPS
    from invdiff.samplers.certified import Certified
    from invdiff.samplers.daps import DAPS
    from invdiff.samplers.ddim import DDIM
    from invdiff.samplers.ddnm import DDNM
    from invdiff.samplers.ddrm import DDRM
    from invdiff.samplers.dds import DDS
    from invdiff.samplers.dds3d import DDS3D
    from invdiff.samplers.ddsmc import DDSMC
    from invdiff.samplers.deqir import DeqIR
    from invdiff.samplers.diffpir import DiffPIR
    from invdiff.samplers.dmps import DMPS
    from invdiff.samplers.dpg import DPG
    from invdiff.samplers.dpmpp import DPMpp
    from invdiff.samplers.dps import DPS
    from invdiff.samplers.eki import EKI
    from invdiff.samplers.enkg import EnKG
    from invdiff.samplers.ensemblescore import EnsembleScore
    from invdiff.samplers.eventguided import EventGuided
    from invdiff.samplers.flowchef import FlowChef
    from invdiff.samplers.flowdps import FlowDPS
    from invdiff.samplers.fpssmc import FPSSMC
    from invdiff.samplers.heun import Heun
    from invdiff.samplers.ilvr import ILVR
    from invdiff.samplers.lanpaint import LanPaint
    from invdiff.samplers.lgd import LGD
    from invdiff.samplers.mbir import DiffusionMBIR
    from invdiff.samplers.mcg import MCG
    from invdiff.samplers.mcgdiff import MCGDiff
    from invdiff.samplers.nrlg import NRLG
    from invdiff.samplers.paradigms import Parallel
    from invdiff.samplers.pigdm import PiGDM
    from invdiff.samplers.pnpdm import PnPDM
    from invdiff.samplers.psld import PSLD
    from invdiff.samplers.reddiff import REDdiff
    from invdiff.samplers.resample import ReSample
    from invdiff.samplers.scg import SCG
    from invdiff.samplers.scoreald import ScoreALD
    from invdiff.samplers.sitcom import SITCOM
    from invdiff.samplers.tds import TDS
    from invdiff.samplers.tmpd import TMPD

_CLASSES = {
    "heun": "Heun",
    "ddim": "DDIM",
    "dpmpp": "DPMpp",
    "dps": "DPS",
    "pigdm": "PiGDM",
    "tmpd": "TMPD",
    "certified": "Certified",
    "daps": "DAPS",
    "diffpir": "DiffPIR",
    "dds": "DDS",
    "dds3d": "DDS3D",
    "mbir": "DiffusionMBIR",
    "paradigms": "Parallel",
    "reddiff": "REDdiff",
    "pnpdm": "PnPDM",
    "lgd": "LGD",
    "lanpaint": "LanPaint",
    "sitcom": "SITCOM",
    "eventguided": "EventGuided",
    "mcgdiff": "MCGDiff",
    "tds": "TDS",
    "fpssmc": "FPSSMC",
    "ddsmc": "DDSMC",
    "afdps": "AFDPS",
    "eki": "EKI",
    "enkg": "EnKG",
    "scg": "SCG",
    "dpg": "DPG",
    "ddrm": "DDRM",
    "ddnm": "DDNM",
    "dmps": "DMPS",
    "nrlg": "NRLG",
    "mcg": "MCG",
    "ilvr": "ILVR",
    "scoreald": "ScoreALD",
    "deqir": "DeqIR",
    "ensemblescore": "EnsembleScore",
    "resample": "ReSample",
    "psld": "PSLD",
    "flowdps": "FlowDPS",
    "flowchef": "FlowChef",
}


class _Registry(Mapping[str, "type[Sampler]"]):
    """Name to class, importing a sampler's file when it is asked for."""

    def __getitem__(self, name: str) -> type[Sampler]:
        if name in _extra:
            return _extra[name]
        if name not in _CLASSES:
            raise KeyError(name)
        return getattr(importlib.import_module(f"invdiff.samplers.{name}"), _CLASSES[name])

    def __iter__(self) -> Iterator[str]:
        return iter([*_CLASSES, *_extra])

    def __len__(self) -> int:
        return len(_CLASSES) + len(_extra)


_extra: dict[str, type[Sampler]] = {}
REGISTRY: Mapping[str, type[Sampler]] = _Registry()


def register(cls: type[Sampler]) -> type[Sampler]:
    """Add a sampler of one's own under its ``name`` (usable as a decorator)."""
    if cls.name in _CLASSES:
        raise InvdiffError(f"The sampler name {cls.name!r} is taken; choose another.")
    _extra[cls.name] = cls
    return cls


def get(name: str, preset: str | None = None, **fields: Any) -> Sampler:
    """Return a sampler by name, e.g. ``get("dps", zeta=0.5)`` or ``get("dds", preset="published")``.

    Raises:
        InvdiffError: For an unknown name (with the nearest ones), preset or field.
    """
    key = name.lower().replace("-", "").replace("_", "")
    aliases = {"ddpm": "ddim", "dpmsolver": "dpmpp", "finzi": "eventguided"}
    aliases |= {"latentdps": "dps", "latentdaps": "daps"}  # pixel samplers, on the operator with the decoder
    key = aliases.get(key, key)
    if key not in REGISTRY:
        near = difflib.get_close_matches(key, list(REGISTRY), n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(REGISTRY)}."
        raise InvdiffError(f"Unknown sampler {name!r}; {hint}")
    cls = REGISTRY[key]
    known = {f.name for f in dataclasses.fields(cls)}
    for field in fields:
        if field not in known:
            near = difflib.get_close_matches(field, sorted(known), n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(sorted(known))}."
            raise InvdiffError(f"Sampler {key} has no setting {field!r}; {hint}")
    return cls.preset(preset, **fields) if preset else cls(**fields)


def __getattr__(name: str) -> Any:
    for key, cls in _CLASSES.items():
        if cls == name:
            return REGISTRY[key]
    raise AttributeError(f"module 'invdiff.samplers' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*_CLASSES.values(), "REGISTRY", "get", "register"])


__all__ = [
    "AFDPS",
    "DAPS",
    "DDIM",
    "DDNM",
    "DDRM",
    "DDS",
    "DDS3D",
    "DDSMC",
    "DMPS",
    "DPG",
    "DPS",
    "EKI",
    "FPSSMC",
    "ILVR",
    "LGD",
    "MCG",
    "NRLG",
    "PSLD",
    "REGISTRY",
    "SCG",
    "SITCOM",
    "TDS",
    "TMPD",
    "Certified",
    "DPMpp",
    "DeqIR",
    "DiffPIR",
    "DiffusionMBIR",
    "EnKG",
    "EnsembleScore",
    "EventGuided",
    "FlowChef",
    "FlowDPS",
    "Heun",
    "LanPaint",
    "MCGDiff",
    "Parallel",
    "PiGDM",
    "PnPDM",
    "REDdiff",
    "ReSample",
    "ScoreALD",
    "get",
    "register",
]
