"""MCGDiff: Monte Carlo guided diffusion (Cardoso, Janati El Idrissi, Le Corff, Moulines, ICLR 2024).

In singular coordinates datum ``i`` is the state of the diffusion at level ``tau_i = sigma / s_i``: conditioning on
the data makes coordinate ``i`` of the chain pass through ``ybar_i = y_i / s_i`` at level ``tau_i``. Particles
follow the prior's ancestral kernel ``N(m, g^2)`` from ``s`` to ``t`` under the potentials
``G_t(x) = prod over tau_i < t of N(x_i; ybar_i, v_i)``, ``v_i = t^2 - tau_i^2``:

    weight     prod_i N(ybar_i; m_i, g^2 + v_i) / G_s(x)      (t <= tau_i < s: with the step from s to tau_i)
    resample
    x_i        ~ N(m_i + K (ybar_i - m_i), v_i K),  K = g^2 / (g^2 + v_i)
               (t <= tau_i < s: the step from ybar_i at tau_i to t;  tau_i >= s: the prior's kernel)

Exact for many particles and steps. Below the smallest ``tau_i`` nothing is weighted any more: the draws are
equally weighted, and differ by the noise below that level.

Differences from the published code: a level ``tau_i`` need not be on the grid; no likelihood weight at the end,
which would use the data twice and makes the measured width too small; ``sigma = 0`` is allowed and makes the data
hold exactly; systematic resampling, at every step (published) or by ``threshold``; ``order=2``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from invdiff.primitives import conditioned, extrapolate, log_normal, particles, select
from invdiff.primitives.spectral import spectrum
from invdiff.rng import Streams
from invdiff.sampler import Context, Sampler, State


@dataclass(frozen=True, kw_only=True)
class MCGDiff(Sampler):
    """MCGDiff; one evaluation per particle and step, no gradient; the draws of a case are its particles.

    Args:
        threshold: Share of effective particles at or below which a case is resampled; 1: at every step.
        order: 1 (published) or 2, which is nearer to the right width.
    """

    name: ClassVar[str] = "mcgdiff"
    title: ClassVar[str] = "Monte Carlo guided diffusion"
    reference: ClassVar[str] = "Cardoso et al., ICLR 2024, arXiv:2308.07983"
    kind: ClassVar = "ensemble"
    exactness: ClassVar = "asymptotic"
    requires: ClassVar[frozenset[str]] = frozenset({"linear", "quadratic", "svd"})
    presets: ClassVar = {
        "published": {"steps": 100, "schedule": "vp", "sigma_min": None, "order": 1},
        "fine": {"steps": 400},
    }

    steps: int = 100
    schedule: Literal["edm", "geometric", "vp", "vp-quadratic"] = "geometric"
    sigma_min: float | None = 0.01
    threshold: float = 1.0
    order: Literal[1, 2] = 2

    def init(self, ctx: Context, rows: int, rng: Streams) -> State:
        """Draw from ``N(0, s^2) G_s``."""
        s = float(ctx.sigmas[0])
        svd, target, tau = spectrum(ctx.measured)
        noise = ctx.noise(rng, rows)
        z = svd.vh(noise)
        x = s * noise + svd.v(conditioned(torch.zeros_like(z), z, s, target, _left(tau, s)))
        return {"x": x.to(noise.dtype), **particles(rows, rng, x.device)}

    def step(self, k: int, state: State, ctx: Context, rng: Streams) -> State:
        """Weight by how well the next level can meet the data, resample, draw from the guided kernel."""
        x, (s, t) = state["x"], ctx.level(k)
        svd, target, tau = spectrum(ctx.measured)
        d = ctx.denoise(x, s)
        ahead = extrapolate(d, state.get("d") if self.order == 2 else None, ctx.sigmas, k)
        c, dc = svd.vh(x), svd.vh(ahead)
        log_weight = state["log_weight"] + _increment(c, dc, target, tau, s, t)
        last = not bool((tau < t).any())
        index, weights = select(state, log_weight, rng, 1.0 if last else self.threshold)
        x, d, ahead, c, dc = (v[index] for v in (x, d, ahead, c, dc))  # target and tau are the case's own
        shrink = (t / s) ** 2
        g = t * math.sqrt(1 - shrink)
        noise = ctx.noise(rng, x.shape[0])
        z = svd.vh(noise)
        mean = dc + shrink * (c - dc)
        change = conditioned(mean, z, g, target, _left(tau, t))
        crossed = (tau < s) & (tau >= t)
        if bool(crossed.any()):
            change = torch.where(crossed, _cross(c, dc, z, target, tau, s, t) - mean - g * z, change)
        new = ahead + shrink * (x - ahead) + g * noise + svd.v(change)
        return {"x": new.to(x.dtype), "d": d, **weights}


def _left(tau: Tensor, t: float) -> Tensor:
    """Return ``t^2 - tau^2``, the noise between the levels; infinite where ``tau >= t``."""
    active = tau < t
    return torch.where(active, t * t - torch.where(active, tau, torch.zeros_like(tau)) ** 2, torch.inf)


def _cross(c: Tensor, dc: Tensor, z: Tensor, target: Tensor, tau: Tensor, s: float, t: float) -> Tensor:
    """Return the coordinates at ``t`` that pass through ``target`` at ``tau``, where ``t <= tau < s``."""
    at = target - (tau / s) ** 2 * (c - dc)  # denoised there: the score is held, it changes least where data count
    shrink = (t / tau.clamp_min(1e-30)).clamp(max=1) ** 2
    return at + shrink * (target - at) + t * (1 - shrink).sqrt() * z


def _increment(c: Tensor, dc: Tensor, target: Tensor, tau: Tensor, s: float, t: float) -> Tensor:
    """Return the log of the weight's factor, ``(B,)``; none in the last step, below which the prior is flat."""
    if t == 0:
        return torch.zeros(c.shape[0], dtype=torch.float64, device=c.device)
    seen, tiny = tau < s, 1e-12 * s * s
    tau = torch.where(seen, tau, torch.zeros_like(tau)).double()
    level2 = tau.clamp(min=t) ** 2  # compared at t, or at tau on the way there
    k = level2 / (s * s)
    before, after = s * s - tau**2, level2 * (1 - k) + (level2 - tau**2)
    guess = torch.where(seen, dc + k.to(c.real.dtype) * (c - dc), target)
    new = log_normal(target, guess, torch.where(seen, after.clamp_min(tiny), 1.0))
    return new - log_normal(target, torch.where(seen, c, target), torch.where(seen, before.clamp_min(tiny), 1.0))
