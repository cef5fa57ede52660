"""DPG: diffusion policy gradient (Tang, Xie, Feng, Zhang, Wang, AISTATS 2024).

The operator is applied to random images about ``D = D(x, s)`` and never differentiated. With the misfit
``l(u) = log p(y | y) - log p(y | A(u))`` in nats and ``n_i ~ N(0, I)``, ``i = 1 .. M``,

    Z <- 0.9 Z + 0.1 l(D),     r^2 <- 0.9 r^2 + 0.1 ||y - A(D)||^2 / 4 d  in prior units
    R_i = exp(-(l(D + r n_i) - l(D)) / Z),     b_i = mean of the other R_j
    w = mean_i (R_i - b_i) n_i / r,     w <- c_k w_previous + (1 - c_k) w,     g = J^T w

with ``d`` unknowns, ``J`` the Jacobian of ``D`` and ``c_k`` falling from ``momentum`` to 0. The direction ``w`` is
that of the gradient, its length means little. ``D_y`` then takes the place of ``D`` in an ancestral step:

* ``length="unit"`` (published): ``D_y = D + zeta sqrt(d) s^2 / sqrt(1 + s^2) g / ||g||``; the paper's constant
  ``B = zeta sqrt(d)`` translated from the variance-preserving chain (180 for 3 x 256 x 256 pixels is 0.4).
* ``length="search"`` (default): ``D_y = D + a q`` along ``q = s^2 g`` with the ``a`` most probable under
  ``N(D, s^2 J)`` and the data, ``a = <v, y - A(D)> / (<v, v> + sigma^2 <w, q>)``, ``v = A(D + q) - A(D)``: the
  noise level counts, and a direction that is all chance gets little length. ``M`` random images find a direction
  in ``d`` dimensions with a cosine of about ``sqrt(M / (M + d))``: few of them leave the draws too wide.

Differences from the published code: averages and momentum belong to a row and a run (the public code carries them
from one image to the next); momentum is taken before ``J^T``; the misfit is a likelihood; ``zeta`` does not depend
on the size of the image; images that the operator cannot do (NaN) get reward 0; second-order transitions
(``order=1`` is published).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from invdiff.primitives import ddim, extrapolate
from invdiff.rng import Streams
from invdiff.sampler import Context, Sampler, State
from invdiff.spaces import norm, per_row, real_inner


@dataclass(frozen=True, kw_only=True)
class DPG(Sampler):
    """Policy-gradient guidance; per level one evaluation and one VJP of the denoiser, ``M + 2`` of the operator.

    Args:
        samples: ``M``, random images per level.
        length: ``search`` or ``unit``.
        zeta: Guidance weight of ``unit``.
        momentum: Share of the previous direction at the first level.
        order: 1 (published) or 2.
    """

    name: ClassVar[str] = "dpg"
    title: ClassVar[str] = "Diffusion policy gradient"
    reference: ClassVar[str] = "Tang et al., AISTATS 2024, arXiv:2403.10585"
    requires: ClassVar[frozenset[str]] = frozenset({"quadratic", "denoiser-vjp"})
    _published = {
        "steps": 1000,
        "schedule": "vp",
        "sigma_min": None,
        "samples": 5000,
        "length": "unit",
        "order": 1,
    }
    presets: ClassVar = {
        "published": {**_published, "zeta": 0.4, "samples": 5000},
        "super-resolution": {**_published, "zeta": 0.36, "samples": 1000},
        "gaussian-deblur": {**_published, "zeta": 0.45, "samples": 1000},
        "phase-retrieval": {**_published, "zeta": 0.68, "samples": 1000},
        "black-hole": {**_published, "zeta": 0.16, "samples": 5000},
        "navier-stokes": {**_published, "zeta": 0.5, "samples": 4000},
        "tuned": {"samples": 1000},
    }

    steps: int = 100
    schedule: Literal["edm", "geometric", "vp", "vp-quadratic"] = "geometric"
    sigma_min: float | None = 0.01
    samples: int = 256
    length: Literal["search", "unit"] = "search"
    zeta: float = 0.4
    momentum: float = 0.1
    order: Literal[1, 2] = 2

    def step(self, k: int, state: State, ctx: Context, rng: Streams) -> State:
        """Estimate a direction by random images and take a guided step."""
        x, (s, t) = state["x"], ctx.level(k)
        problem = ctx.measured
        d, pull = ctx.denoise.vjp(x, s, once=True)
        z = problem.operator(d)
        gap = problem.y - z
        misfit, reach = self._misfit(z, ctx), real_inner(gap, gap) / (4 * d[0].numel())
        reach = reach if problem.gain is None else reach / problem.gain.to(reach) ** 2
        z_mean = 0.9 * state.get("misfit", misfit) + 0.1 * misfit
        r2 = 0.9 * state.get("reach", reach) + 0.1 * reach
        w = self._direction(d, misfit, z_mean, r2.sqrt(), ctx, rng)
        mix = self.momentum * (1 - (k + 1) / len(ctx.sigmas))
        both = mix * state.get("w", w) + (1 - mix) * w
        g = pull(both)
        if self.length == "unit":
            size = self.zeta * math.sqrt(d[0].numel()) * s * s / math.sqrt(1 + s * s)
            d = d + per_row(size / norm(g).clamp_min(1e-30), d) * g
        else:
            # As long as the random moves were, so that a nonlinear operator is asked where it was asked before.
            scale = (r2 * d[0].numel()).sqrt() / norm(g).clamp_min(1e-30)
            q, prior = per_row(scale, d) * g, scale * scale / (s * s) * real_inner(both, g)
            sigma = problem.sigma(d)
            v = (problem.operator(d + q) - z) / sigma
            length = real_inner(v, gap / sigma) / (real_inner(v, v) + prior.clamp_min(0)).clamp_min(1e-30)
            d = d + per_row(torch.nan_to_num(length, nan=0.0), d) * q
        ahead = extrapolate(d, state.get("d") if self.order == 2 else None, ctx.sigmas, k)
        x = ddim(x, ahead, s, t, 1.0, ctx.noise(rng, x.shape[0]))
        return {"x": x, "d": d, "w": w, "misfit": z_mean, "reach": r2}

    def _misfit(self, z: Tensor, ctx: Context) -> Tensor:
        """Return ``log p(y | y) - log p(y | z)``, ``(B,)``."""
        problem = ctx.measured
        return problem.likelihood.log_prob(problem.y, problem.y) - problem.likelihood.log_prob(z, problem.y)

    def _direction(
        self, d: Tensor, misfit: Tensor, z_mean: Tensor, r: Tensor, ctx: Context, rng: Streams
    ) -> Tensor:
        """Return ``mean_i (R_i - b_i) n_i / r`` with the leave-one-out baseline, from running sums."""
        rewards, noise, both = torch.zeros_like(misfit), torch.zeros_like(d), torch.zeros_like(d)
        for _ in range(self.samples):
            n = rng.normal(d)
            loss = self._misfit(ctx.measured.operator(d + per_row(r, d) * n), ctx)
            reward = torch.nan_to_num(torch.exp((misfit - loss) / z_mean.clamp_min(1e-30)), nan=0.0)
            rewards, noise, both = rewards + reward, noise + n, both + per_row(reward, d) * n
        m = self.samples
        total = (m * both - per_row(rewards, d) * noise) / (m - 1)
        return total / per_row(m * r.clamp_min(1e-30), d)
