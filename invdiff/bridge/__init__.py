"""Bridges to other worlds, one module each; none is imported before it is asked for.

``bridge.numpy.from_function`` makes an operator of a function on numpy arrays and
``bridge.astra.from_projector`` of a projector of the ASTRA toolbox; ``bridge.scipy`` (for PyLops too),
``bridge.sigpy`` and ``bridge.deepinv`` translate operators both ways, the last one noise models, priors and
samplers too.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from invdiff.bridge import astra, deepinv, numpy, scipy, sigpy

_MODULES = ("astra", "deepinv", "numpy", "scipy", "sigpy")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"invdiff.bridge.{name}")
    raise AttributeError(f"module 'invdiff.bridge' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(_MODULES)


__all__ = ["astra", "deepinv", "numpy", "scipy", "sigpy"]
