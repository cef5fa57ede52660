"""LGD-MC: loss-guided diffusion with Monte Carlo (Song, Zhang, Yin, Mardani, Liu, Kautz, Chen, Vahdat, ICML 2023).

Take ``p(x0 | x) = N(D, r^2 I)`` with ``r^2 = r0^2 s^2 / (r0^2 + s^2)`` and average the likelihood over ``K``
points ``x_i = D + r n_i``:

    g = sum_i w_i grad log p(y | A(x_i)),   w = 1/K ("mean")   or   w = softmax_i log p(y | A(x_i)) ("softmax")

* ``weight="likelihood"`` (default): ``D_y = D + a v``, ``v = s^2 J^T g``, used in any transition. The length is
  that of one step of steepest ascent, ``a = <g, v> / (<g, v> + <v, H v>)`` with ``H`` the curvature of ``-log p``
  and ``s^2 J`` the covariance of ``p(x0 | x)``: exact for one measurement of a Gaussian, never past the maximum.
* ``weight="norm"`` (published code): after the transition ``x' -= zeta c J^T grad sqrt(l)`` for the mean ``l`` of
  ``||y - A(x_i)||^2`` in prior units; ``c = sqrt((1 + s^2)(1 + t^2))`` translates the weight from the
  variance-preserving chain.

The softmax is the paper's loss. With few points in many dimensions it picks the best point, which is no average:
draws are too wide, and mode weights worse than with the plain mean.

Differences from the published code (a re-implementation; the authors' is not public): any likelihood; norms per
draw; ``K`` points for every draw of a batch; ``r0`` is a setting (1 there); the length; an ancestral transition in
place of Euler's, of second order by default.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from invdiff.primitives import ddim, extrapolate
from invdiff.primitives.curvature import curvature
from invdiff.problem import Problem
from invdiff.rng import Streams
from invdiff.sampler import Context, Sampler, State
from invdiff.spaces import per_row, real_inner


@dataclass(frozen=True, kw_only=True)
class LGD(Sampler):
    """Loss guidance; one evaluation, one network VJP and ``points`` operator gradients per step.

    Args:
        points: ``K``.
        average: ``mean`` (published code) or ``softmax`` (the paper's loss).
        weight: ``likelihood`` or ``norm``.
        zeta: Guidance weight for ``norm``.
        spread: ``r0`` in prior units; None takes the prior's.
        eta: Stochasticity of the transition.
        order: 1 or 2.
    """

    name: ClassVar[str] = "lgd"
    title: ClassVar[str] = "Loss-guided diffusion, Monte Carlo"
    reference: ClassVar[str] = "Song et al., ICML 2023 (PMLR 202:32483)"
    requires: ClassVar[frozenset[str]] = frozenset({"vjp", "noise", "denoiser-vjp"})
    presets: ClassVar = {
        "softmax": {"average": "softmax", "points": 16},
        "inversebench": {
            "steps": 1000,
            "schedule": "vp",
            "sigma_min": None,
            "weight": "norm",
            "points": 3,
            "zeta": 3e-3,
            "spread": 1.0,
            "order": 1,
        },
    }

    steps: int = 200
    schedule: Literal["edm", "geometric", "vp", "vp-quadratic"] = "geometric"
    sigma_min: float | None = 0.01
    points: int = 4
    average: Literal["mean", "softmax"] = "mean"
    weight: Literal["likelihood", "norm"] = "likelihood"
    zeta: float = 0.1
    spread: float | None = None
    eta: float = 1.0
    order: Literal[1, 2] = 2

    def step(self, k: int, state: State, ctx: Context, rng: Streams) -> State:
        """One guided step."""
        x, (s, t) = state["x"], ctx.level(k)
        problem = ctx.measured
        d, pull = ctx.denoise.vjp(x, s, once=True)
        r = s / math.sqrt(1 + (s / ctx.spread(self.spread)) ** 2)
        g = self._ascent(problem, [d + r * ctx.noise(rng, len(d)) for _ in range(self.points)])
        v = pull(g)
        if self.weight == "likelihood":
            v = s * s * v
            slope = real_inner(g, v).abs()  # a network's Jacobian need not be positive
            bend = slope + real_inner(v, curvature(problem, d, v)).clamp_min(0)
            d = d + per_row(torch.where(bend > 0, slope / bend, torch.zeros_like(bend)), v) * v
        ahead = extrapolate(d, state.get("d") if self.order == 2 else None, ctx.sigmas, k)
        out = ddim(x, ahead, s, t, self.eta, ctx.noise(rng, len(d)) if self.eta else None)
        if self.weight == "norm":
            out = out + self.zeta * math.sqrt((1 + s * s) * (1 + t * t)) * v
        return {"x": out, "d": d}

    def _ascent(self, problem: Problem, points: list[Tensor]) -> Tensor:
        """Return ``g``, for ``norm`` that of ``-sqrt(l)``."""
        gain = torch.ones(()) if problem.gain is None else problem.gain
        logs, losses, gradients = [], [], []
        for u in points:
            z = problem.operator(u)
            rest = problem.y - z
            scaled = rest / per_row(gain**2, rest)
            up = scaled if self.weight == "norm" else problem.likelihood.score(z, problem.y)
            gradients.append(problem.operator.vjp(u, up))
            losses.append(real_inner(rest, scaled))
            logs.append(problem.likelihood.log_prob(z, problem.y))
        score = torch.stack(logs)
        w = torch.softmax(score, 0) if self.average == "softmax" else torch.full_like(score, 1 / len(points))
        if self.weight == "norm":
            w = w / (w * torch.stack(losses)).sum(0).sqrt().clamp_min(1e-30)
        return torch.stack([per_row(w_i, g_i) * g_i for w_i, g_i in zip(w, gradients)]).sum(0)
