"""invdiff: scientific inverse problems with diffusion priors, and how sure the answer is.

```python
import invdiff
from invdiff import likelihoods, operators, priors, samplers

A = operators.MultiCoilMRI(mask, coil_maps)
problem = invdiff.Problem(A, likelihoods.Gaussian(0.0125), y)
posterior = invdiff.sample(problem, priors.load("brain-mri"), samplers.DDS(), draws=16, seed=0)
posterior.mean(); posterior.std(); posterior.interval(0.9)
```
"""

from __future__ import annotations

import importlib
from pathlib import Path as _Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_root = _Path(__file__).resolve().parent
if not (_root / "operators").is_dir():  # a checkout whose git could not make the links
    __path__.append(str(_root.parent))

if TYPE_CHECKING:
    from invdiff import bridge, likelihoods, operators, priors, problems, reference, samplers, testing, uq
    from invdiff.acquiring import acquire
    from invdiff.calibrating import calibrate
    from invdiff.callbacks import Callback, StopWhen, Trace
    from invdiff.certifying import certify
    from invdiff.choosing import suggest
    from invdiff.comparing import compare
    from invdiff.driver import sample
    from invdiff.errors import InvdiffError
    from invdiff.posterior import Posterior, open_posterior
    from invdiff.prior import Denoiser, Prior
    from invdiff.problem import Problem
    from invdiff.sampler import Sampler
    from invdiff.spaces import Space

_NAMES = {
    "acquire": "acquiring",
    "calibrate": "calibrating",
    "Callback": "callbacks",
    "StopWhen": "callbacks",
    "Trace": "callbacks",
    "certify": "certifying",
    "suggest": "choosing",
    "compare": "comparing",
    "sample": "driver",
    "InvdiffError": "errors",
    "Posterior": "posterior",
    "open_posterior": "posterior",
    "Denoiser": "prior",
    "Prior": "prior",
    "Problem": "problem",
    "Sampler": "sampler",
    "Space": "spaces",
}
_MODULES = ("bridge", "likelihoods", "operators", "priors", "problems", "reference", "samplers", "testing", "uq")


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(f"invdiff.{_NAMES[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"invdiff.{name}")
    raise AttributeError(f"module 'invdiff' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*_NAMES, *_MODULES, "__version__"])


__all__ = [
    "Callback",
    "Denoiser",
    "InvdiffError",
    "Posterior",
    "Prior",
    "Problem",
    "Sampler",
    "Space",
    "StopWhen",
    "Trace",
    "acquire",
    "bridge",
    "calibrate",
    "certify",
    "compare",
    "likelihoods",
    "open_posterior",
    "operators",
    "priors",
    "problems",
    "reference",
    "sample",
    "samplers",
    "suggest",
    "testing",
    "uq",
]
