"""FPS-SMC: filtering posterior sampling (Dou, Song, ICLR 2024).

The data are given a noise path of their own, ``y_t = y + A n_t`` with ``n_t`` a DDIM path of standard deviation
``t`` that a case's particles share, and the chain is filtered as if every ``y_t`` were seen through ``A x_t`` with
noise ``sigma``. With the DDIM kernel ``N(m, b^2)``, ``b = eta t sqrt(1 - t^2/s^2)``, in singular coordinates

    weight     prod_i N(ybar_i(t); m_i, b^2 + tau_i^2),   ybar(t) = (U^H y) / s + V^H n_t,  tau = sigma / s
    resample
    x_i        ~ N(m_i + K (ybar_i(t) - m_i), b^2 (1 - K)),  K = b^2 / (b^2 + tau_i^2)

The data enter at every level as if anew, though their noise is one: draws are too narrow along what is measured,
and the more so the more levels lie below ``tau``. ``weigh=False`` is FPS, the same steps without weights.

Differences from the published code: a decomposition in place of matrix inverses; ``sigma = 0`` is allowed;
systematic resampling; no weight in the step to level 0; ``order=2``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from invdiff.primitives import conditioned, extrapolate, log_normal, particles, select, shared
from invdiff.primitives.spectral import spectrum
from invdiff.rng import Streams
from invdiff.sampler import Context, Sampler, State


@dataclass(frozen=True, kw_only=True)
class FPSSMC(Sampler):
    """FPS-SMC; one evaluation per particle and step, no gradient; the draws of a case are its particles.

    Args:
        eta: Stochasticity of the DDIM kernels, of data and particles; above 0.
        weigh: Whether particles are weighted (FPS-SMC) or not (FPS).
        threshold: Share of effective particles at or below which a case is resampled.
        order: 1 (published) or 2.
    """

    name: ClassVar[str] = "fpssmc"
    title: ClassVar[str] = "Filtering posterior sampling"
    reference: ClassVar[str] = "Dou, Song, ICLR 2024"
    kind: ClassVar = "ensemble"
    requires: ClassVar[frozenset[str]] = frozenset({"linear", "quadratic", "svd"})
    presets: ClassVar = {
        "published": {"steps": 100, "schedule": "vp", "sigma_min": None, "eta": 0.85, "order": 1},
    }

    steps: int = 100
    schedule: Literal["edm", "geometric", "vp", "vp-quadratic"] = "geometric"
    sigma_min: float | None = 0.01
    eta: float = 1.0
    weigh: bool = True
    threshold: float = 1.0
    order: Literal[1, 2] = 2

    def init(self, ctx: Context, rows: int, rng: Streams) -> State:
        """Draw the data's noise, and particles that agree with the noisy data."""
        s = float(ctx.sigmas[0])
        svd, target, tau = spectrum(ctx.measured)
        path = s * shared(ctx.noise(rng, rows), rng)
        noise = ctx.noise(rng, rows)
        z = svd.vh(noise)
        x = s * noise + svd.v(conditioned(torch.zeros_like(z), z, s, target + svd.vh(path), tau**2))
        return {"x": x.to(noise.dtype), "path": path, **particles(rows, rng, x.device)}

    def step(self, k: int, state: State, ctx: Context, rng: Streams) -> State:
        """Move the data, weight, resample, draw from the conditional kernel."""
        x, path, (s, t) = state["x"], state["path"], ctx.level(k)
        svd, target, tau = spectrum(ctx.measured)
        b = self.eta * t * math.sqrt(1 - (t / s) ** 2)
        keep = math.sqrt(t * t - b * b) / s
        path = keep * path + b * shared(ctx.noise(rng, x.shape[0]), rng)
        target = target + svd.vh(path)
        d = ctx.denoise(x, s)
        ahead = extrapolate(d, state.get("d") if self.order == 2 else None, ctx.sigmas, k)
        mean = ahead + keep * (x - ahead)
        log_weight = state["log_weight"]
        if self.weigh and t > 0:
            seen = tau < torch.inf
            guess = torch.where(seen, svd.vh(mean), target)
            log_weight = log_weight + log_normal(target, guess, torch.where(seen, tau**2 + b * b, 1.0))
        index, weights = select(state, log_weight, rng, 1.0 if t == 0 else self.threshold)
        noise = ctx.noise(rng, x.shape[0])
        mean = mean[index]
        new = mean + b * noise + svd.v(conditioned(svd.vh(mean), svd.vh(noise), b, target, tau**2))
        return {"x": new.to(x.dtype), "d": d[index], "path": path, **weights}
