"""Priors: exact ones in closed form, and the library of learned ones. Names load on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from invdiff.priors.checks import check_denoiser as check_denoiser
    from invdiff.priors.coloured import Coloured as Coloured
    from invdiff.priors.coloured import StationaryRoot as StationaryRoot
    from invdiff.priors.frames import EDM as EDM
    from invdiff.priors.frames import VE as VE
    from invdiff.priors.frames import VP as VP
    from invdiff.priors.frames import Flow as Flow
    from invdiff.priors.gaussian import Gaussian as Gaussian
    from invdiff.priors.gaussian import StationaryGaussian as StationaryGaussian
    from invdiff.priors.gaussian import power_law_spectrum as power_law_spectrum
    from invdiff.priors.guided import Guided as Guided
    from invdiff.priors.guided import cfg_plus_plus as cfg_plus_plus
    from invdiff.priors.joint import Joint as Joint
    from invdiff.priors.mixture import GaussianMixture as GaussianMixture
    from invdiff.priors.parametrisation import from_network as from_network
    from invdiff.priors.slices import SlicePrior as SlicePrior
    from invdiff.priors.tiles import Tiled as Tiled

_HOME = {
    "Gaussian": "gaussian",
    "StationaryGaussian": "gaussian",
    "power_law_spectrum": "gaussian",
    "GaussianMixture": "mixture",
    "Joint": "joint",
    "Guided": "guided",
    "cfg_plus_plus": "guided",
    "Coloured": "coloured",
    "StationaryRoot": "coloured",
    "Tiled": "tiles",
    "SlicePrior": "slices",
    "from_network": "parametrisation",
    "VP": "frames",
    "VE": "frames",
    "EDM": "frames",
    "Flow": "frames",
    "check_denoiser": "checks",
    "load": "library",
    "available": "library",
    "card": "library",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """Import a public name from its module on first use."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
