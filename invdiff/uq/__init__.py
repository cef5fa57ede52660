"""Uncertainty: scores and summaries of draws, diagnostics of calibration, conformal intervals.

Everything takes plain draws ``(case, draw, ...)`` from any sampler, numpy arrays or tensors, or a `Posterior`, and
computes in double precision.

```python
from invdiff import uq

uq.crps(draws, truth)                                     # scores, per case and pixel
uq.region_statistics(draws, labels, above=0.3)            # volumes and means of regions, with their posteriors
uq.diagnose(draws, truth, y, operator, likelihood)        # can these be exact posterior draws?
```
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from invdiff.uq.chains import ess, ess_of_weights, mcse, r_hat
    from invdiff.uq.classifiers import c2st, local_c2st
    from invdiff.uq.components import principal_components
    from invdiff.uq.conformal import Conformal, calibrate, fingerprint, fingerprint_of
    from invdiff.uq.diagnosis import Diagnosis, diagnose
    from invdiff.uq.draws import read_draws
    from invdiff.uq.intervals import coverage, interval, interval_score, pit, width
    from invdiff.uq.predictive import predictive_chi_squared, residual_whiteness
    from invdiff.uq.ranks import sbc
    from invdiff.uq.regions import region_statistics
    from invdiff.uq.risk import control_risk
    from invdiff.uq.scores import crps, diversity, energy_score, spread_skill
    from invdiff.uq.summaries import quantiles, stream
    from invdiff.uq.uniformity import band, ecdf, uniform_p_value

_HOMES = {
    "classifiers": ("c2st", "local_c2st"),
    "chains": ("ess", "ess_of_weights", "mcse", "r_hat"),
    "components": ("principal_components",),
    "conformal": ("Conformal", "calibrate", "fingerprint", "fingerprint_of"),
    "diagnosis": ("Diagnosis", "diagnose"),
    "draws": ("read_draws",),
    "intervals": ("coverage", "interval", "interval_score", "pit", "width"),
    "predictive": ("predictive_chi_squared", "residual_whiteness"),
    "ranks": ("sbc",),
    "regions": ("region_statistics",),
    "risk": ("control_risk",),
    "scores": ("crps", "diversity", "energy_score", "spread_skill"),
    "summaries": ("quantiles", "stream"),
    "uniformity": ("band", "ecdf", "uniform_p_value"),
}
_NAMES = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(f"invdiff.uq.{_NAMES[name]}"), name)
    raise AttributeError(f"module 'invdiff.uq' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(_NAMES)


__all__ = [
    "Conformal",
    "Diagnosis",
    "band",
    "c2st",
    "calibrate",
    "control_risk",
    "coverage",
    "crps",
    "diagnose",
    "diversity",
    "ecdf",
    "energy_score",
    "ess",
    "ess_of_weights",
    "fingerprint",
    "fingerprint_of",
    "interval",
    "interval_score",
    "local_c2st",
    "mcse",
    "pit",
    "predictive_chi_squared",
    "principal_components",
    "quantiles",
    "r_hat",
    "read_draws",
    "region_statistics",
    "residual_whiteness",
    "sbc",
    "spread_skill",
    "stream",
    "uniform_p_value",
    "width",
]
