"""EDM's stochastic Heun sampler: draws from the prior (Karras, Aittala, Aila, Laine, NeurIPS 2022).

With churn ``gamma = min(churn / K, sqrt(2) - 1)`` on ``[churn_min, churn_max]``: raise the noise level to
``s' = s (1 + gamma)``, ``x' = x + noise_scale sqrt(s'^2 - s^2) z``, then a second-order step of
``dx/dsigma = (x - D(x, sigma)) / sigma`` from ``s'`` to ``t``: Euler, then the trapezoidal correction (not on
the last step).

Differences from the published code: a stream of random numbers per draw; 32-bit or 64-bit state as the driver
says; nothing else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from invdiff.rng import Streams
from invdiff.sampler import Context, Sampler, State


@dataclass(frozen=True, kw_only=True)
class Heun(Sampler):
    """EDM Heun with churn; ``2 steps - 1`` network evaluations.

    Args:
        churn: ``S_churn``; 0 is deterministic.
        churn_min, churn_max: Noise levels between which churn acts.
        noise_scale: ``S_noise``.
    """

    name: ClassVar[str] = "heun"
    title: ClassVar[str] = "EDM Heun sampler with churn (prior draws)"
    reference: ClassVar[str] = "Karras et al., NeurIPS 2022, arXiv:2206.00364"
    exactness: ClassVar = "asymptotic"
    conditional: ClassVar[bool] = False
    presets: ClassVar = {
        "cifar10": {"steps": 18},
        "ffhq-64": {"steps": 40},
        "imagenet-64": {
            "steps": 256,
            "churn": 40.0,
            "churn_min": 0.05,
            "churn_max": 50.0,
            "noise_scale": 1.003,
        },
    }

    steps: int = 40
    churn: float = 0.0
    churn_min: float = 0.0
    churn_max: float = math.inf
    noise_scale: float = 1.0

    def step(self, k: int, state: State, ctx: Context, rng: Streams) -> State:
        """One Heun step, two evaluations (one on the last)."""
        x, (s, t) = state["x"], ctx.level(k)
        gamma = min(self.churn / self.steps, math.sqrt(2) - 1) if self.churn_min <= s <= self.churn_max else 0.0
        if gamma > 0:
            raised = s * (1 + gamma)
            x = x + self.noise_scale * math.sqrt(raised**2 - s**2) * ctx.noise(rng, x.shape[0])
            s = raised
        slope = (x - ctx.denoise(x, s)) / s
        euler = x + (t - s) * slope
        if t == 0:
            return {"x": euler}
        return {"x": x + (t - s) * 0.5 * (slope + (euler - ctx.denoise(euler, t)) / t)}
