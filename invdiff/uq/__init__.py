"""Uncertainty: scores and summaries of draws, diagnostics of calibration, conformal intervals.

Everything takes plain draws ``(case, draw, ...)`` from any sampler, numpy arrays or tensors, or a `Posterior`, and
computes in double precision.

```python
from invdiff import uq

uq.crps(draws, truth)                                     # scores, per case and pixel
uq.region_statistics(draws, labels, above=0.3)            # volumes and means of regions, with their posteriors
```
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from invdiff.uq.chains import ess, ess_of_weights, mcse, r_hat
    from invdiff.uq.components import principal_components
    from invdiff.uq.draws import read_draws
    from invdiff.uq.intervals import coverage, interval, interval_score, pit, width
    from invdiff.uq.regions import region_statistics
    from invdiff.uq.scores import crps, diversity, energy_score, spread_skill
    from invdiff.uq.summaries import quantiles, stream

_HOMES = {
    "chains": ("ess", "ess_of_weights", "mcse", "r_hat"),
    "components": ("principal_components",),
    "draws": ("read_draws",),
    "intervals": ("coverage", "interval", "interval_score", "pit", "width"),
    "regions": ("region_statistics",),
    "scores": ("crps", "diversity", "energy_score", "spread_skill"),
    "summaries": ("quantiles", "stream"),
}
_NAMES = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(f"invdiff.uq.{_NAMES[name]}"), name)
    raise AttributeError(f"module 'invdiff.uq' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(_NAMES)


__all__ = [
    "coverage",
    "crps",
    "diversity",
    "energy_score",
    "ess",
    "ess_of_weights",
    "interval",
    "interval_score",
    "mcse",
    "pit",
    "principal_components",
    "quantiles",
    "r_hat",
    "read_draws",
    "region_statistics",
    "spread_skill",
    "stream",
    "width",
]
