"""SITCOM: step-wise triple-consistent sampling (Alkhouri et al., ICML 2025).

At each level ``s`` (``x_vp = x / sqrt(1 + s^2)``, as in the paper, whose chain is variance preserving):

    v = argmin_v ||y - A(D(v))||^2 + lam ||x_vp - v_vp||^2        a few Adam steps from v = x
    x' = D(v) + t z                                                fresh noise for the next level

A row stops once ``||y - A(D(v))||^2 < (1 + slack)^2 m sigma^2`` (``m`` real data): that alone keeps the noise of
the data from being fitted. What comes out is consistent with the data, with the network (``D(v)`` is a denoised
image) and with the forward process (fresh noise); it is an optimum near a random start, so draws are too narrow.

Differences from the published code: the stop is per draw, from the likelihood's ``sigma`` and the true number of
data (the code has a constant 0.051 and counts pixels); ``D(v)`` belongs to the last ``v``; squares in prior units,
weighted where the noise varies over the data; no clamp of ``D``; no best image picked by the truth.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from invdiff.primitives import adam, extrapolate, renoise
from invdiff.rng import Streams
from invdiff.sampler import Context, Sampler, State
from invdiff.spaces import per_row, real_inner


@dataclass(frozen=True, kw_only=True)
class SITCOM(Sampler):
    """SITCOM; up to ``iterations + 1`` evaluations and as many network VJPs per step.

    Args:
        iterations: Most Adam steps per level.
        lr: Adam's step, in units of ``x_vp``.
        lam: Weight of staying near ``x``.
        slack: Share of the noise by which the residual may exceed it when a row stops.
        order: 1 (published) or 2.
    """

    name: ClassVar[str] = "sitcom"
    title: ClassVar[str] = "Step-wise triple-consistent sampling"
    reference: ClassVar[str] = "Alkhouri et al., ICML 2025, arXiv:2410.04479"
    requires: ClassVar[frozenset[str]] = frozenset({"vjp", "quadratic", "denoiser-vjp"})
    presets: ClassVar = {"published": {"steps": 20, "schedule": "vp"}}

    steps: int = 50
    iterations: int = 20
    lr: float = 0.01
    lam: float = 0.0
    slack: float = 0.02
    order: Literal[1, 2] = 1

    def init(self, ctx: Context, rows: int, rng: Streams) -> State:
        """Start from noise; find where there are data at all (a mask leaves zeros elsewhere)."""
        problem = ctx.measured
        seen = problem.operator(ctx.noise(rng, rows).to(problem.operator.domain.dtype)).abs() > 0
        return {**super().init(ctx, rows, rng), "seen": seen.to(ctx.dtype)}

    def step(self, k: int, state: State, ctx: Context, rng: Streams) -> State:
        """Adam on the input of the denoiser, then renoise."""
        x, seen, (s, t) = state["x"], state["seen"], ctx.level(k)
        problem, scale = ctx.measured, math.sqrt(1 + s * s)
        count = seen.flatten(1).sum(1) * (2 if problem.y.is_complex() else 1)
        gain = torch.ones(()) if problem.gain is None else problem.gain
        v, moments = x / scale, (torch.zeros_like(x), torch.zeros_like(x))
        d, open_ = x, torch.ones_like(count, dtype=torch.bool)
        for i in range(self.iterations + 1):
            now, pull = ctx.denoise.vjp(v * scale, s, once=True)
            d = torch.where(per_row(open_.to(x.dtype), x) > 0, now, d)
            sigma = problem.sigma(now)
            rest = problem.residual(now) * seen
            open_ = open_ & (real_inner(rest / sigma, rest / sigma) > (1 + self.slack) ** 2 * count)
            if i == self.iterations or not bool(open_.any()):
                break
            level = sigma.expand(rest.shape).flatten(1).square().mean(1).sqrt()
            weight = torch.where(sigma > 0, per_row(level, rest) / sigma, 1.0) / per_row(gain, rest)
            back = pull(problem.operator.vjp(now, weight**2 * rest).to(x.dtype))
            gradient = 2 * self.lam * (v - x / scale) - 2 * scale * back
            moved, moments = adam(v, gradient, moments, i, self.lr, (0.9, 0.999))
            v = torch.where(per_row(open_.to(x.dtype), x) > 0, moved, v)
        ahead = extrapolate(d, state.get("d") if self.order == 2 else None, ctx.sigmas, k)
        return {"x": d if t == 0 else renoise(ahead, t, ctx.noise(rng, len(x))), "d": d, "seen": seen}
