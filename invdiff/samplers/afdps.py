"""AFDPS: approximation-free diffusion posterior sampling (Chen, Ren, Min, Ying, Izzo, 2025).

The weighted particles at level ``t`` stand for ``p_t(x) p(y | A x)^beta_t``: the likelihood is taken at the
*noisy* image, so that no approximation of ``p(y | x_t)`` enters, and at level 0 this is the posterior. With the
prior's ancestral kernel ``N(m, g^2)`` from ``s`` to ``t`` and ``l(x) = log p(y | A x)``

    x'       ~ q = N(m + g^2 beta_t grad l(m), g^2)
    log w   += beta_t l(x') - beta_s l(x) + log p(x' | x) - log q(x' | x); resample

which is the weighted particle system of the paper in the limit of small steps, and needs neither its Laplacian nor
the divergence of the drift. ``beta_t = (1 - t / s_0) / (1 + L t^2)``, with ``L`` the curvature of ``-l`` along its
stiffest direction and ``s_0`` the first level: it begins at 0, stays where the step is stable, and ends at 1.
The weights are heavy-tailed: one run in eight with 2000 particles had its mean off by 0.6 standard deviations in a
problem of one datum, with an effective sample size of 240, which does not show it. Compare two seeds.

Any likelihood with derivatives; no network gradient. The weights' variance grows with the number of data: meant
for few of them, or many particles.

Differences from the published method: ``beta`` (published: 1 at all levels, where all weight falls on one particle
at the start and no step is stable); weights of the kernels that are drawn from, right for every number of steps;
``order=2``; no deterministic variant.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from invdiff.primitives import ddim, extrapolate, particles, select
from invdiff.primitives.curvature import stiffness
from invdiff.rng import Streams
from invdiff.sampler import Context, Sampler, State
from invdiff.spaces import per_row, real_inner


@dataclass(frozen=True, kw_only=True)
class AFDPS(Sampler):
    """AFDPS; one evaluation per particle and step and one gradient of the likelihood.

    Args:
        threshold: Share of effective particles at or below which a case is resampled.
        order: 1 (published) or 2.
    """

    name: ClassVar[str] = "afdps"
    title: ClassVar[str] = "Approximation-free diffusion posterior sampling"
    reference: ClassVar[str] = "Chen et al., 2025, arXiv:2506.03979"
    kind: ClassVar = "ensemble"
    exactness: ClassVar = "asymptotic"
    requires: ClassVar[frozenset[str]] = frozenset({"vjp", "noise"})
    presets: ClassVar = {"first-order": {"order": 1}, "fine": {"steps": 800}}

    steps: int = 200
    schedule: Literal["edm", "geometric", "vp", "vp-quadratic"] = "geometric"
    sigma_min: float | None = 0.01
    threshold: float = 0.5
    order: Literal[1, 2] = 2

    def init(self, ctx: Context, rows: int, rng: Streams) -> State:
        """Start from noise; find the curvature of the likelihood."""
        x = super().init(ctx, rows, rng)["x"]
        curvature = stiffness(ctx.measured, torch.zeros_like(x)).double()
        potential = torch.zeros(rows, dtype=torch.float64, device=x.device)
        return {"x": x, "curvature": curvature, "potential": potential, **particles(rows, rng, x.device)}

    def step(self, k: int, state: State, ctx: Context, rng: Streams) -> State:
        """Move under the tempered likelihood, weight, resample."""
        x, (s, t), problem = state["x"], ctx.level(k), ctx.measured
        d = ctx.denoise(x, s)
        new = ahead = extrapolate(d, state.get("d") if self.order == 2 else None, ctx.sigmas, k)
        beta = (1 - t / float(ctx.sigmas[0])) / (1 + state["curvature"] * t * t)
        log_weight = state["log_weight"] - state["potential"]
        if t > 0:
            g = t * math.sqrt(1 - (t / s) ** 2)
            mean, noise = ddim(x, ahead, s, t, 1.0, None), ctx.noise(rng, x.shape[0])
            shift = g * per_row(beta, x) * problem.grad_log_likelihood(mean)
            new = mean + g * (noise + shift)
            log_weight = log_weight - (0.5 * real_inner(shift, shift) + real_inner(shift, noise)).double()
        potential = beta * problem.log_likelihood(new).double()
        index, weights = select(state, log_weight + potential, rng, 1.0 if t == 0 else self.threshold)
        kept = {"x": new.to(x.dtype), "d": d, "potential": potential, "curvature": state["curvature"]}
        return {**{key: v[index] for key, v in kept.items()}, **weights}
