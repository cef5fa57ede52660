"""Certified draws: a chain that converges to the exact posterior of the learned prior, and says how far it is.

1. Start: Tweedie-covariance guidance (second order), exact for Gaussian priors and a good start elsewhere.
2. ``sweeps`` of split Gibbs with the noise split: ``z ~ N(z; x, rho^2) N(y; A z, sigma^2 - rho^2 A A^H)``, then
   ``x ~ p(x) N(x; z, rho^2)`` by the reverse SDE. Invariant: ``p(x | y)`` for every ``rho`` with
   ``rho^2 s_max^2 < sigma^2``; the reverse SDE asks the denoiser only.
3. ``moves`` of Metropolis-adjusted Langevin on ``(D(x, s0) - x) / s0^2 + grad log p(y | x)``, the acceptance ratio
   a line integral of that score.

What it certifies: with more steps, sweeps and moves the draws converge to the posterior under the prior that the
*denoiser* defines. What it cannot see: the denoiser's own error against the truth; a denoiser whose score is not a
gradient (then the ratio depends on the path); mode weights, which steps 2 and 3 leave as step 1 made them. For few
measurements and many modes use ``tds`` with ``mala`` moves, which gets mode weights right.

Diagnostic: the residual norm, prior energy and random projections of each draw before, half-way through and after
step 2, and the accepted share of step 3. Over draws, what is invariant must not drift (`invdiff.certify`).

Reference: the parts are Boys et al. 2024 (start), Vono et al. 2019 and Wu et al. 2024 (split Gibbs), Roberts and
Tweedie 1996 (Metropolis-adjusted Langevin); the noise split and the line integral are this package's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from invdiff.primitives import ddim, extrapolate, mala, posterior_score, tweedie_update
from invdiff.primitives.curvature import stiffness
from invdiff.primitives.gibbs import SPLIT_TOP, prior_draw, split_draw
from invdiff.prior import Prior
from invdiff.rng import Streams
from invdiff.sampler import Context, Sampler, State
from invdiff.spaces import real_inner

#: Random projections among the diagnostics.
PROJECTIONS = 8


@dataclass(frozen=True, kw_only=True)
class Certified(Sampler):
    """Tweedie start, split Gibbs, Metropolis finish.

    Args:
        sweeps: Gibbs sweeps after the start.
        inner: Evaluations per reverse SDE.
        moves: Metropolis moves at the end, three score evaluations each.
        tol: Relative residual of the start's linear solves.
    """

    name: ClassVar[str] = "certified"
    title: ClassVar[str] = "Certified: Tweedie start, split Gibbs, Metropolis finish"
    reference: ClassVar[str] = "this package"
    exactness: ClassVar = "asymptotic"
    requires: ClassVar[frozenset[str]] = frozenset({"linear", "quadratic", "noise", "denoiser-vjp"})
    presets: ClassVar = {"long": {"steps": 100, "tol": 1e-4, "sweeps": 200, "inner": 20, "moves": 100}}

    steps: int = 50
    schedule: Literal["edm", "geometric", "vp", "vp-quadratic"] = "geometric"
    sigma_min: float | None = 0.003
    sweeps: int = 40
    inner: int = 14
    moves: int = 40
    tol: float = 1e-2

    def sigmas(self, prior: Prior) -> Tensor:
        """Return the grid of the start, its last level once for every sweep and once for the finish, then 0."""
        grid = super().sigmas(prior)
        return torch.cat([grid[:-1], grid[-2:-1].expand(self.sweeps), torch.zeros(1, dtype=grid.dtype)])

    def init(self, ctx: Context, rows: int, rng: Streams) -> State:
        """Start from noise; find the largest coupling that the noise split allows."""
        state = super().init(ctx, rows, rng)
        x = state["x"]
        limit = (SPLIT_TOP / stiffness(ctx.measured, x)).sqrt()
        rho = torch.minimum(limit, torch.full_like(limit, 10 * ctx.spread(None)))
        none = torch.zeros(rows, 3, 2 + PROJECTIONS, dtype=x.dtype, device=x.device)
        return {**state, "rho": rho, "trail": none, "accepted": torch.ones_like(rho)}

    def step(self, k: int, state: State, ctx: Context, rng: Streams) -> State:
        """One level of the start, one sweep, or the finish."""
        (s, t), x = ctx.level(k), state["x"]
        if t == 0:
            return self._finish_chain(state, ctx, rng, s)
        if s > t:
            d, pull = ctx.denoise.vjp(x, s)
            d = tweedie_update(ctx.measured, d, pull, s, self.tol)
            ahead = extrapolate(d, state.get("d"), ctx.sigmas, k)
            return {**state, "x": ddim(x, ahead, s, t, 1.0, ctx.noise(rng, len(x))), "d": d}
        sweep = k - (len(ctx.sigmas) - 2 - self.sweeps)
        trail = state["trail"]
        if sweep in (0, self.sweeps // 2):
            trail = trail.clone()
            trail[:, 0 if sweep == 0 else 1] = self._facts(x, ctx)
        z = split_draw(ctx.measured, x, state["rho"], rng)
        lowest = ctx.denoise.denoiser.sigma_min
        x = prior_draw(ctx.denoise, z, state["rho"], rng, self.inner, lowest=lowest)
        return {**state, "x": x, "trail": trail}

    def _finish_chain(self, state: State, ctx: Context, rng: Streams, s0: float) -> State:
        problem, x = ctx.measured, state["x"]
        step = 1.0 / (x[0].numel() ** (1 / 3) * (stiffness(problem, x) + 1 / state["rho"] ** 2))
        x, accepted = mala(x, posterior_score(ctx.denoise, problem, s0), step, self.moves, rng, nodes=3)
        trail = state["trail"].clone()
        trail[:, 2] = self._facts(x, ctx)
        return {**state, "x": x, "trail": trail, "accepted": accepted}

    def _facts(self, x: Tensor, ctx: Context) -> Tensor:
        """Squared residual over noise, squared norm, and projections on fixed random directions, ``(B, n)``."""
        problem = ctx.measured
        rest = problem.residual(x) / problem.sigma(x)
        generator = torch.Generator().manual_seed(1)
        v = torch.randn(PROJECTIONS, x[0].numel(), generator=generator, dtype=torch.float64).to(x)
        return torch.cat([real_inner(rest, rest)[:, None].to(x), real_inner(x, x)[:, None], x.flatten(1) @ v.T], 1)
