"""User-defined events and nonlinear constraints by Tweedie moments (Finzi, Boral, Wilson, Sha, Zepeda-Nunez).

The covariance of ``p(x0 | x)`` is ``S = s^2 J`` with ``J`` the Jacobian of ``D`` (Tweedie's second moment), and
``C`` is linear near ``D``: ``z = C(x0) ~ N(C(D), V)``, ``V = G S G^T`` with its Jacobian ``G`` at ``D``. Then

    data z + noise = y:    D_y = D + S G^T (V + sigma^2)^-1 (y - C(D))
    event a < z < b:       D_y = D + S G^T w = E[x0 | event] under that Gaussian

are the denoised images of the posterior; by Tweedie's formula that adds ``grad log p(y | x)`` to the score. For
one event ``w = d/dm log P(a < N(m, V) < b)`` at ``m = C(D)``. Several are taken one after another, each with the
moments that its predecessors left (exact for one). The rest ``C(D + r n) - C(D) - r G n`` at a few random points
adds its mean to ``C(D)`` and its variance to ``V``: without it an event of ``|x|^2``, say, is pushed at too hard.

``weights=True`` keeps ``log_weight = log p(y | x) + log p(path) - log q(path)`` of the guided path ``q`` against
the prior's own ancestral path ``p``: weighted draws are right up to the steps, mode weights too, and the mean
weight is the probability of the data (`invdiff.likelihoods.event_probability`). The weights of many data collapse.

Differences from the published code: the conditional mean in closed form, so that no second derivative of the
network is needed; the whole ``V`` of several events; ``Phi`` itself, not a sigmoid; variances are at least
``floor`` times ``s^2 |G|^2`` (the code takes absolute values where a network's Jacobian is not positive); no
special case for inpainting; the moments of the rest; second-order transition; importance weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from invdiff.errors import CapabilityError, InvdiffError
from invdiff.likelihoods_event import Event
from invdiff.primitives import ddim, event_update, extrapolate, log_path_ratio, tweedie_update
from invdiff.rng import Streams
from invdiff.sampler import Context, Sampler, State

#: Most events at once: each costs one network VJP per step.
MOST = 64


@dataclass(frozen=True, kw_only=True)
class EventGuided(Sampler):
    """Events and nonlinear constraints; one evaluation per step and one network VJP per event (or CG iteration).

    Args:
        eta: Stochasticity of the transition (1: ancestral, 0: deterministic).
        order: 1 or 2.
        floor: Least variance of ``z``, as a share of ``s^2 |G|^2``.
        cg_iterations: Most conjugate-gradient iterations per step, for data.
        tol: Relative residual at which a row's solve stops, for data.
        probes: Points around ``D`` at which ``C`` is compared with its linear part, where it has another.
        weights: Whether to keep importance weights (``eta`` above 0).
    """

    name: ClassVar[str] = "eventguided"
    title: ClassVar[str] = "User-defined events by Tweedie moments"
    reference: ClassVar[str] = "Finzi et al., ICML 2023, arXiv:2306.07526"
    requires: ClassVar[frozenset[str]] = frozenset({"vjp", "denoiser-vjp"})
    exactness: ClassVar = "gaussian"
    presets: ClassVar = {
        "weighted": {"weights": True},
        "published": {"steps": 500, "order": 1, "schedule": "edm", "sigma_min": None, "probes": 0},
    }

    steps: int = 200
    schedule: Literal["edm", "geometric", "vp", "vp-quadratic"] = "geometric"
    sigma_min: float | None = 0.003
    eta: float = 1.0
    order: Literal[1, 2] = 2
    floor: float = 1e-3
    cg_iterations: int = 60
    tol: float = 1e-4
    probes: int = 8
    weights: bool = False

    def init(self, ctx: Context, rows: int, rng: Streams) -> State:
        """Start from noise."""
        problem, m = ctx.measured, ctx.measured.operator.range.size
        if not isinstance(problem.likelihood, Event) and "quadratic" not in problem.capabilities:
            raise CapabilityError(
                f"eventguided needs events, or data with a Gaussian noise level, not {problem.likelihood.name}."
            )
        if isinstance(problem.likelihood, Event) and m > MOST:
            raise CapabilityError(f"eventguided takes at most {MOST} events at once, and the problem has {m}.")
        if self.weights and not self.eta:
            raise InvdiffError("eventguided weighs stochastic paths only; set eta above 0, or weights=False.")
        state = super().init(ctx, rows, rng)
        return {**state, "log_weight": torch.zeros_like(state["x"].flatten(1)[:, 0])} if self.weights else state

    def step(self, k: int, state: State, ctx: Context, rng: Streams) -> State:
        """One guided step."""
        x, (s, t) = state["x"], ctx.level(k)
        problem = ctx.measured
        d, pull = ctx.denoise.vjp(x, s)
        if self.weights and t == 0:
            last = problem.log_likelihood(d).clamp_min(-1e30)
            return {**state, "x": d, "log_weight": state["log_weight"] + last}
        if isinstance(problem.likelihood, Event):
            bent = self.probes > 1 and "linear" not in problem.operator.capabilities
            r = s / math.sqrt(1 + (s / ctx.spread(None)) ** 2)
            points = [r * ctx.noise(rng, len(d)) for _ in range(self.probes if bent else 0)]
            guided = event_update(problem, d, pull, s, self.floor, points)
        else:
            guided = tweedie_update(problem, d, pull, s, self.tol, self.cg_iterations)
        noise = ctx.noise(rng, len(d)) if self.eta else None
        second = self.order == 2
        ahead = extrapolate(guided, state.get("guided") if second else None, ctx.sigmas, k)
        out = {"x": ddim(x, ahead, s, t, self.eta, noise), "guided": guided}
        if self.weights:
            assert noise is not None
            plain = extrapolate(d, state.get("plain") if second else None, ctx.sigmas, k)
            gain = log_path_ratio(plain, ahead, s, t, noise, self.eta)
            out |= {"log_weight": state["log_weight"] + gain.to(d.dtype), "plain": d}
        return out
