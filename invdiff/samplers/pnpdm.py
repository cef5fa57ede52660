"""PnP-DM: split Gibbs sampling with a diffusion prior (Wu et al., NeurIPS 2024).

One step is one Gibbs sweep at coupling ``rho``, which falls from ``rho_max`` to a floor:

    likelihood:  z ~ p(y | z) N(z; x, rho^2 I)      exact Gaussian draw where linear and Gaussian, else Langevin
    prior:       x ~ p(x) N(x; z, rho^2 I)          reverse SDE from z at noise level rho down to 0

At fixed ``rho`` the draws ``x`` follow the posterior for noise ``sigma^2 I + rho^2 A A^H``: too wide. With the
*noise split* (Gaussian noise, linear ``A``, ``rho^2 A A^H <= sigma^2 I``) the likelihood step carries only
``sigma^2 I - rho^2 A A^H``, so that the noise in all is ``sigma^2 I`` and the draws follow the posterior itself.
The step then needs no solve: ``z = x + rho^2 g(x) + rho (I - rho^2 H)^(1/2) n`` with the gradient ``g`` of the
log-likelihood and its curvature ``H = A^H A / sigma^2``. A short chain remembers its start, above all mode weights
(they are those of the couplings at which the chain froze).

Differences from the published code: the noise split; the reverse SDE is second order and starts at ``rho`` itself
(the code starts at the first level of a fixed grid below it); the first sweep draws from the prior; Langevin steps
follow the stiffness of their target; a draw is the end of a chain of its own, not one of many states of one chain.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from invdiff.errors import InvdiffError
from invdiff.primitives import gaussian_draw, langevin
from invdiff.primitives.curvature import stiffness
from invdiff.primitives.gibbs import SPLIT_TOP, prior_draw, split_draw
from invdiff.problem import Problem
from invdiff.rng import Streams
from invdiff.sampler import Context, Sampler, State
from invdiff.spaces import per_row


@dataclass(frozen=True, kw_only=True)
class PnPDM(Sampler):
    """Split Gibbs; ``inner`` evaluations and one draw from the likelihood per step, no network gradient.

    Args:
        split: Whether to split the noise, where the problem is linear with Gaussian noise.
        rho_max: First coupling in prior units; None takes 3 times the width of the prior.
        rho_min: Floor of the coupling in prior units; None takes the largest that the noise split allows, 0.4 of
            it where the noise is not split, and 0.1 of the prior's width where there is no exact draw.
        anneal: Share of the sweeps in which the coupling falls, geometrically.
        inner: Evaluations per reverse SDE.
        depth: Last noise level of the reverse SDE over ``rho``.
        order: 1 (published) or 2, of the reverse SDE.
        moves: Langevin moves per sweep, where there is no exact draw.
        step_size: Of the Langevin moves, in prior units squared; None is a fifth of the inverse stiffness.
    """

    name: ClassVar[str] = "pnpdm"
    title: ClassVar[str] = "Split Gibbs with a diffusion prior (PnP-DM)"
    reference: ClassVar[str] = "Wu et al., NeurIPS 2024, arXiv:2405.18782"
    exactness: ClassVar = "asymptotic"
    requires: ClassVar[frozenset[str]] = frozenset({"vjp"})
    _published = {"split": False, "rho_max": 10.0, "inner": 27, "depth": 0.03, "order": 1}
    presets: ClassVar = {
        "tuned": {"steps": 200, "inner": 16},
        "published": {**_published, "rho_min": 0.3, "anneal": 0.33},
        "coded-diffraction": {**_published, "rho_min": 0.1, "anneal": 0.44, "step_size": 1e-3},
        "phase-retrieval": {**_published, "rho_min": 0.1, "anneal": 0.44, "step_size": 1e-4},
        "black-hole": {
            **_published,
            "steps": 200,
            "rho_min": 0.02,
            "anneal": 0.43,
            "moves": 200,
            "step_size": 1e-5,
        },
    }

    steps: int = 100
    split: bool = True
    rho_max: float | None = None
    rho_min: float | None = None
    anneal: float = 0.5
    inner: int = 12
    depth: float = 0.05
    order: Literal[1, 2] = 2
    moves: int = 100
    step_size: float | None = None

    def init(self, ctx: Context, rows: int, rng: Streams) -> State:
        """Start from a draw of the prior; find the floor of the coupling."""
        first = torch.full((rows,), float(ctx.sigmas[0]), dtype=ctx.dtype, device=ctx.device)
        x = self._prior(ctx.noise(rng, rows) * first[0], first, ctx, rng)
        return {"x": x, "floor": self._floor(ctx, x)}

    def step(self, k: int, state: State, ctx: Context, rng: Streams) -> State:
        """One Gibbs sweep."""
        x, floor, problem = state["x"], state["floor"], ctx.measured
        share = min(1.0, k / max(1.0, self.anneal * self.steps))
        rho = self._first(ctx) * (floor / self._first(ctx)) ** share
        if not _exact(problem):
            step = self.step_size or 0.2 / (stiffness(problem, x, 8) + rho**-2)
            r = per_row(rho, x)
            z = langevin(x, lambda u: problem.grad_log_likelihood(u) - (u - x) / r**2, step, self.moves, rng)
        elif self.split and share == 1:
            z = split_draw(problem, x, rho, rng)
        else:
            z = gaussian_draw(problem, x, rho**2, rng)
        return {"x": self._prior(z, rho, ctx, rng), "floor": floor}

    def _prior(self, z: Tensor, rho: Tensor, ctx: Context, rng: Streams) -> Tensor:
        lowest = ctx.denoise.denoiser.sigma_min
        return prior_draw(ctx.denoise, z, rho, rng, self.inner, self.depth, lowest, self.order)

    def _first(self, ctx: Context) -> float:
        return 3 * ctx.spread(None) if self.rho_max is None else self.rho_max

    def _floor(self, ctx: Context, x: Tensor) -> Tensor:
        """Last coupling of every row, ``(B,)``."""
        problem, one = ctx.measured, torch.ones_like(x.flatten(1)[:, 0])
        floor = one * (0.1 * ctx.spread(None) if self.rho_min is None else self.rho_min)
        if _exact(problem) and (self.split or self.rho_min is None):
            if bool((problem.sigma(x) == 0).any()):
                raise InvdiffError("pnpdm takes rho from sigma, and sigma is 0; set split=False and a rho_min.")
            limit = (SPLIT_TOP / stiffness(problem, 0 * x)).sqrt() * (1.0 if self.split else 0.4)
            floor = limit if self.rho_min is None else torch.minimum(floor, limit)
        return floor.clamp_max(self._first(ctx))


def _exact(problem: Problem) -> bool:
    """Whether the likelihood is Gaussian in ``x`` with a noise level of its own."""
    return {"linear", "quadratic"} <= problem.capabilities and not problem.operator_dependent_noise
