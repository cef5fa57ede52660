"""DPS: diffusion posterior sampling (Chung, Kim, Mccann, Klasky, Ye, ICLR 2023).

With ``r = y - A(D(x))`` in prior units, and in units of the operator's norm where that is above 1:

    x' = ancestral(x, D) - zeta w grad_x ||r||,      w = sqrt((1 + s^2)(1 + t^2))

``w`` translates the paper's constant weight from the variance-preserving chain. The noise level of the data does
not enter: ``zeta`` sets the width of the draws, and no value of it is right in measured and unmeasured directions
at once.

Differences from the published code: the norm is per draw, not over the batch; no clamp of ``D`` (it kills
gradients, and data need not live on [-1, 1]); no learned variance; second-order transition by default
(``order=1`` is published); any differentiable operator and likelihood, of any norm.

On a latent prior this is Latent-DPS: the operator then holds the decoder.

The states of deepinv 0.5's ``DPS`` on the same noise and levels, with ``order=1``, ``frame="ve"`` and at each step
``zeta = weight (s^2 - t^2)`` times image units per prior unit (1/2 there): its weight multiplies a score.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from invdiff.primitives import ddim, extrapolate
from invdiff.primitives.misfit import misfit_ascent, misfit_unit
from invdiff.rng import Streams
from invdiff.sampler import Context, Sampler, State


@dataclass(frozen=True, kw_only=True)
class DPS(Sampler):
    """Diffusion posterior sampling; one evaluation and one network VJP per step.

    Args:
        zeta: Guidance weight of the paper.
        frame: ``vp`` translates the weight from the variance-preserving chain; ``ve`` takes it as it is.
        order: 1 (ancestral, published) or 2.
    """

    name: ClassVar[str] = "dps"
    title: ClassVar[str] = "Diffusion posterior sampling"
    reference: ClassVar[str] = "Chung et al., ICLR 2023, arXiv:2209.14687"
    requires: ClassVar[frozenset[str]] = frozenset({"vjp", "denoiser-vjp"})
    presets: ClassVar = {
        "published": {"zeta": 0.3, "order": 1},
        "tuned": {"zeta": 0.1, "order": 2},
        "100-steps": {"steps": 100, "zeta": 10.0},
        "super-resolution": {"zeta": 0.3, "order": 1},
        "gaussian-deblur": {"zeta": 0.3, "order": 1},
        "motion-deblur": {"zeta": 0.3, "order": 1},
        "inpainting": {"zeta": 0.5, "order": 1},
        "phase-retrieval": {"zeta": 1.0, "order": 1},
    }

    steps: int = 1000
    schedule: Literal["edm", "geometric", "vp", "vp-quadratic"] = "vp"
    zeta: float = 0.3
    frame: Literal["vp", "ve"] = "vp"
    order: Literal[1, 2] = 2

    def init(self, ctx: Context, rows: int, rng: Streams) -> State:
        """Start from noise; find the unit of the misfit."""
        state = super().init(ctx, rows, rng)
        return {**state, "unit": misfit_unit(ctx.measured, torch.zeros_like(state["x"]))}

    def step(self, k: int, state: State, ctx: Context, rng: Streams) -> State:
        """One ancestral step and one gradient of the data misfit."""
        x, (s, t) = state["x"], ctx.level(k)
        d, pull = ctx.denoise.vjp(x, s, once=True)
        noise = ctx.noise(rng, x.shape[0])
        ascent = misfit_ascent(ctx.measured, d, pull, state["unit"])
        weight = math.sqrt((1 + s * s) * (1 + t * t)) if self.frame == "vp" else 1.0
        ahead = extrapolate(d, state.get("d") if self.order == 2 else None, ctx.sigmas, k)
        x = ddim(x, ahead, s, t, 1.0, noise) + self.zeta * weight * ascent
        return {"x": x, "d": d, "unit": state["unit"]}
