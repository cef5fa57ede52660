"""DDSMC: decoupled diffusion sequential Monte Carlo (Ekstrom Kelvinius, Zhao, Lindsten, ICML 2025).

Particles follow the decoupled kernel ``p(x' | x) = N(f xhat + (1 - f) x, f t^2)`` from ``s`` to ``t``, with the
reconstruction ``xhat(x, s)`` and ``f = (s^2 - t^2) / (s^2 - t^2 + eta t^2)``: the ancestral step for ``eta = 1``,
renoising as in DAPS for ``eta = 0``. In singular coordinates, with ``x0 ~ N(xhat, rho^2)``,
``rho^2 = r0^2 s^2 / (r0^2 + s^2)`` and ``G = rho^2 / (rho^2 + tau^2)``, ``tau = sigma / s_i``:

    twist      T_s(x) = prod_i N(ybar_i; xhat_i, rho^2 + tau_i^2)
    propose    x' ~ q = N(f (xhat + G (ybar - xhat)) + (1 - f) x,  f t^2 - f^2 rho^2 G)
    weight     T_t(x') p(x' | x) / (T_s(x) q(x' | x)); resample

Converges to the posterior of the chain's own prior, which is the prior itself for ``eta = 1`` with
``reconstruct="tweedie"`` and for ``eta = 0`` with ``"ode"``. A small ``eta`` moves far at every step, and the
weights vary the more. No network gradient.

Differences from the published code: ``rho`` does not grow past the prior's width ``r0``; the step to level 0 is
the conditional mean and its weight is one, as the twist is its normaliser; systematic resampling; ``sigma = 0`` is
allowed; ``order=2`` for ``eta = 1`` with ``tweedie``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from invdiff import schedule as schedules
from invdiff.primitives import extrapolate, log_normal, particles, probability_flow, select
from invdiff.primitives.spectral import spectrum
from invdiff.rng import Streams
from invdiff.sampler import Context, Sampler, State


@dataclass(frozen=True, kw_only=True)
class DDSMC(Sampler):
    """DDSMC; one evaluation (or ``ode_steps``) per particle and step; the draws of a case are its particles.

    Args:
        eta: 1: ancestral kernel; 0: the next state is the reconstruction, renoised.
        reconstruct: ``tweedie`` (the denoised image) or ``ode`` (the end of the probability flow).
        ode_steps: Evaluations of the probability flow.
        spread: ``r0`` in prior units; None takes the prior's.
        threshold: Share of effective particles at or below which a case is resampled.
        order: 1 (published) or 2.
    """

    name: ClassVar[str] = "ddsmc"
    title: ClassVar[str] = "Decoupled diffusion sequential Monte Carlo"
    reference: ClassVar[str] = "Ekstrom Kelvinius, Zhao, Lindsten, ICML 2025, arXiv:2502.06379"
    kind: ClassVar = "ensemble"
    exactness: ClassVar = "asymptotic"
    requires: ClassVar[frozenset[str]] = frozenset({"linear", "quadratic", "svd"})
    presets: ClassVar = {
        "published": {"steps": 200, "schedule": "edm", "eta": 0.5, "order": 1},
    }

    steps: int = 100
    schedule: Literal["edm", "geometric", "vp", "vp-quadratic"] = "geometric"
    sigma_min: float | None = 0.01
    eta: float = 1.0
    reconstruct: Literal["tweedie", "ode"] = "tweedie"
    ode_steps: int = 5
    spread: float | None = None
    threshold: float = 0.5
    order: Literal[1, 2] = 2

    def init(self, ctx: Context, rows: int, rng: Streams) -> State:
        """Start from noise, equally weighted."""
        twist = torch.zeros(rows, dtype=torch.float64, device=ctx.device)
        return {**super().init(ctx, rows, rng), "twist": twist, **particles(rows, rng, ctx.device)}

    def step(self, k: int, state: State, ctx: Context, rng: Streams) -> State:
        """Finish the weights of the last step, resample, propose."""
        x, (s, t) = state["x"], ctx.level(k)
        svd, target, tau = spectrum(ctx.measured)
        seen = tau < torch.inf
        d = self._reconstruct(x, s, ctx)
        rho2 = 1 / (1 / s**2 + 1 / ctx.spread(self.spread) ** 2)
        twist = log_normal(target, torch.where(seen, svd.vh(d), target), torch.where(seen, rho2 + tau**2, 1.0))
        log_weight = state["log_weight"] + twist - state["twist"]
        index, weights = select(state, log_weight, rng, 1.0 if t == 0 else self.threshold)
        x, d, twist = x[index], d[index], twist[index]
        second = self.order == 2 and self.eta == 1 and self.reconstruct == "tweedie"
        ahead = extrapolate(d, state["d"][index] if second and "d" in state else None, ctx.sigmas, k)
        f = (s * s - t * t) / (s * s - t * t + self.eta * t * t)
        g = math.sqrt(f) * t
        gain = rho2 / (rho2 + tau**2)
        z = ctx.noise(rng, x.shape[0])
        mean, free = f * ahead + (1 - f) * x, svd.vh(f * ahead + (1 - f) * x)
        bound = free + f * gain * (target - svd.vh(ahead))
        new = {"d": d, "twist": twist, **weights}
        if t == 0:
            return {"x": (mean + svd.v(bound - free)).to(x.dtype), **new}
        shrink = (f / (t * t) * rho2 * gain).clamp(max=0.99)  # of the variance, seen from the data
        c = svd.vh(z)
        there = bound + g * (1 - shrink).sqrt() * c
        ratio = log_normal(there, free, g * g) - log_normal(there, bound, g * g * (1 - shrink))
        new["log_weight"] = weights["log_weight"] + ratio
        return {"x": (mean + g * z + svd.v(there - free - g * c)).to(x.dtype), **new}

    def _reconstruct(self, x: Tensor, s: float, ctx: Context) -> Tensor:
        if self.reconstruct == "tweedie":
            return ctx.denoise(x, s)
        low = min(float(ctx.sigmas[-2]), s / 10)
        return probability_flow(ctx.denoise, x, schedules.edm(self.ode_steps, low, s).tolist())
