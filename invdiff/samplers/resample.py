"""ReSample: latent diffusion with hard data consistency (Song, Kwon, Zhang, Hu, Qu, Shen, ICLR 2024).

Every step is DDIM with a gradient of the misfit, ``G`` the decoder and ``abar = 1 / (1 + s^2)``:

    x' = D + (t / s)(x - D) - zeta abar w grad_x ||y - A(G(D))||,      w = sqrt((1 + s^2)(1 + t^2))

and every ``period`` steps, after the first third of them, with ``D~`` the denoised image a few steps on:

    z = E(argmin_u ||y - A(u)||  from G(D~))    in the second third,     argmin_z ||y - A(G(z))||  in the last,
    x' = (v z + t^2 x') / (v + t^2) + sqrt(v t^2 / (v + t^2)) n,         v = gamma t^2 (1 - t^2 / s^2)

The fits stop at the noise level of the data: a residual below it has taken noise for image. A last fit of the
latent ends the run. No step draws from the posterior; the spread of the draws is what the resampling makes of it.

Differences from the published code: ``D`` is Tweedie's (the code removes ``sqrt(1 - abar)`` of that noise, a tenth
of it at ``abar = 0.99``; ``tweedie="published"``); the fits stop at the likelihood's noise level (the code's
tolerance is a tenth of it, which only its cap on iterations reaches; ``noise_share=0.1``), or where the decoder
gets no nearer to it (``progress=0`` goes on), and take gradient steps whose lengths follow from the misfit instead
of AdamW's, which has units; encoder and scale factor are the codec's, for any autoencoder; levels of network and
transition agree on the way to ``D~``; norms per draw; second-order transitions.

Cost: an evaluation and a network VJP per step, through decoder and operator; ``ahead`` evaluations more, one
encoder pass and up to ``iterations`` operator VJPs (half of them through the decoder) per resampling.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from invdiff.errors import InvdiffError
from invdiff.primitives import ddim, extrapolate, probability_flow
from invdiff.primitives.consistency import decode, fit_to_noise, seen_data
from invdiff.primitives.misfit import misfit_ascent, misfit_unit
from invdiff.problem import Problem
from invdiff.rng import Streams
from invdiff.sampler import Context, Sampler, State


@dataclass(frozen=True, kw_only=True)
class ReSample(Sampler):
    """ReSample; see the module for its cost.

    Args:
        zeta: Weight of the gradient, in the units of DPS.
        period: Steps from one resampling to the next.
        ahead: Steps to ``D~``.
        gamma: Weight of the fit against the state.
        iterations: Most gradient steps of a fit.
        noise_share: Share of the noise level at which fits stop.
        progress: Share of the way there that ten gradient steps must make, or a fit gives up; 0 never does.
        tweedie: ``exact`` or ``published``.
        order: 1 (published) or 2.
    """

    name: ClassVar[str] = "resample"
    title: ClassVar[str] = "Latent diffusion with hard data consistency (ReSample)"
    reference: ClassVar[str] = "Song et al., ICLR 2024, arXiv:2307.08123"
    requires: ClassVar[frozenset[str]] = frozenset({"vjp", "quadratic", "noise", "denoiser-vjp"})
    _code = {"tweedie": "published", "noise_share": 0.1, "progress": 0.0}
    presets: ClassVar = {"published": {"steps": 500, "period": 10, "iterations": 500, "order": 1, **_code}}

    steps: int = 100
    schedule: Literal["edm", "geometric", "vp", "vp-quadratic", "flow"] = "vp"
    zeta: float = 0.5
    period: int = 5
    ahead: int = 5
    gamma: float = 40.0
    iterations: int = 100
    noise_share: float = 1.0
    progress: float = 0.05
    tweedie: Literal["exact", "published"] = "exact"
    order: Literal[1, 2] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.period < 1 or self.ahead < 1:
            raise InvdiffError(f"resample needs period and ahead of at least 1, got {self.period}, {self.ahead}.")

    def init(self, ctx: Context, rows: int, rng: Streams) -> State:
        """Start from noise; find the unit of the misfit, and where there are data."""
        state, problem = super().init(ctx, rows, rng), ctx.measured
        unit = misfit_unit(problem, torch.zeros_like(state["x"]))
        return {**state, "unit": unit, "seen": seen_data(problem, ctx.noise(rng, rows))}

    def step(self, k: int, state: State, ctx: Context, rng: Streams) -> State:
        """DDIM and a gradient of the misfit; now and then a fit and a resampling."""
        x, (s, t), problem = state["x"], ctx.level(k), ctx.measured
        kept = {"unit": state["unit"], "seen": state["seen"]}
        d, pull = ctx.denoise.vjp(x, s, once=True)
        if t == 0:
            return {**kept, "x": self._fit(problem, state, d)}
        c = self._share(s)
        ascent = misfit_ascent(problem, x + c * (d - x), lambda v: (1 - c) * v + c * pull(v), state["unit"])
        ahead = extrapolate(d, state.get("d") if self.order == 2 else None, ctx.sigmas, k)
        x = ddim(x, ahead, s, t, 0.0, None) + self.zeta * math.sqrt((1 + t * t) / (1 + s * s)) * ascent
        done, steps = k + 1, len(ctx.sigmas) - 1
        if 3 * done < steps or (steps - done) % self.period:
            return {**kept, "x": x, "d": d}
        near = self._ahead(ctx, x, done)
        if 3 * done < 2 * steps:
            z = ctx.codec.encode(self._fit(ctx.image, state, decode(ctx.codec, near))).to(x.dtype)
        else:
            z = self._fit(problem, state, near)
        v = self.gamma * t * t * (1 - (t / s) ** 2)
        spread = math.sqrt(v * t * t / (v + t * t))
        return {**kept, "x": (v * z + t * t * x) / (v + t * t) + spread * ctx.noise(rng, len(x))}

    def _fit(self, problem: Problem, state: State, z: Tensor) -> Tensor:
        return fit_to_noise(problem, z, state["seen"], self.iterations, self.noise_share, self.progress)

    def _share(self, s: float) -> float:
        return s / math.sqrt(1 + s * s) if self.tweedie == "published" else 1.0

    def _ahead(self, ctx: Context, x: Tensor, k: int) -> Tensor:
        """Return the denoised image after a few steps along the flow from level ``k``, without the data."""
        levels = [float(s) for s in ctx.sigmas[k : k + self.ahead] if s > 0]
        x = probability_flow(ctx.denoise, x, levels, second_order=self.order == 2)
        return x + self._share(levels[-1]) * (ctx.denoise(x, levels[-1]) - x)
