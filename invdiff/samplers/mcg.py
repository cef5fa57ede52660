"""MCG: manifold-constrained gradients (Chung, Sim, Ryu, Ye, NeurIPS 2022).

With ``r = y - A(D(x))`` in prior units, ``J`` the Jacobian of ``D`` and ``P = A^+ A``,

    x' = ancestral(x, D) - zeta w (I - P) grad_x ||r||,      w = sqrt((1 + s^2)(1 + t^2))
    x' <- x' + A^+ (y + t A z - A x')

``w`` translates the paper's constant weight from the variance-preserving chain. The method is for data without
noise: the second line (``hard``, published) fits the data exactly, noise included, so that the draws have no
width along measured directions, and an operator with small singular values amplifies the noise without bound. By
default both lines use ``t^2 A^H (t^2 A A^H + sigma^2 I)^-1`` in place of ``A^+``, and ``y + sigma n`` in place
of ``y``, which is the same thing where ``sigma`` is 0; the width along measured directions is then finite, and
still wrong.

Differences from the published code: known parts are noised to the level of the state (the code takes the level
before, which leaves noise in the result); the exact adjoint and pseudo-inverse; the norm is per draw; no clamp of
``D``; no corrector steps; second-order transition by default.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from invdiff.primitives import ddim, extrapolate, gaussian_prox
from invdiff.primitives.misfit import misfit_ascent, misfit_unit
from invdiff.primitives.replacement import replace_measured
from invdiff.rng import Streams
from invdiff.sampler import Context, Sampler, State


@dataclass(frozen=True, kw_only=True)
class MCG(Sampler):
    """MCG; one evaluation, one network VJP and two Gaussian solves per step.

    Args:
        zeta: Weight of the gradient.
        hard: Whether the data are taken as exact (published).
        order: 1 (published) or 2.
        cg_iterations: Most iterations of a solve without closed form.
    """

    name: ClassVar[str] = "mcg"
    title: ClassVar[str] = "Manifold-constrained gradients"
    reference: ClassVar[str] = "Chung, Sim, Ryu, Ye, NeurIPS 2022, arXiv:2206.00941"
    requires: ClassVar[frozenset[str]] = frozenset({"linear", "quadratic", "denoiser-vjp"})
    presets: ClassVar = {
        "published": {"hard": True, "order": 1, "steps": 1000, "schedule": "vp", "sigma_min": None},
        "tuned": {},  # the defaults
    }

    steps: int = 100
    schedule: Literal["edm", "geometric", "vp", "vp-quadratic"] = "geometric"
    sigma_min: float | None = 0.01
    zeta: float = 1.0
    hard: bool = False
    order: Literal[1, 2] = 2
    cg_iterations: int = 30

    def init(self, ctx: Context, rows: int, rng: Streams) -> State:
        """Start from noise; find the unit of the misfit."""
        state = super().init(ctx, rows, rng)
        return {**state, "unit": misfit_unit(ctx.measured, torch.zeros_like(state["x"]))}

    def step(self, k: int, state: State, ctx: Context, rng: Streams) -> State:
        """An ancestral step, the gradient across the data, then the data in place of what they measure."""
        x, (s, t) = state["x"], ctx.level(k)
        problem, rows = ctx.measured, x.shape[0]
        d, pull = ctx.denoise.vjp(x, s, once=True)
        ascent = misfit_ascent(problem, d, pull, state["unit"])
        r2 = torch.inf if self.hard else max(t, 1e-8) ** 2
        across = gaussian_prox(problem, ascent, r2, torch.zeros_like(problem.y), self.cg_iterations)
        ahead = extrapolate(d, state.get("d") if self.order == 2 else None, ctx.sigmas, k)
        noise, z = ctx.noise(rng, rows), ctx.noise(rng, rows)
        weight = self.zeta * math.sqrt((1 + s * s) * (1 + t * t))
        x = ddim(x, ahead, s, t, 1.0, noise) + weight * across
        x = replace_measured(problem, x, t, z, rng, self.hard, self.cg_iterations)
        return {"x": x, "d": d, "unit": state["unit"]}
