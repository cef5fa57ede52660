"""EnKG: ensemble Kalman diffusion guidance (Zheng, Chu, Wang, Kovachki, Baptista, Yue, 2024).

The draws of a case are one ensemble, and differences between its members stand in for every derivative.

``guidance="conditional"`` (default). At level ``s`` every particle ``x^i`` with ``D^i = D(x^i, s)`` sends out
draws ``u`` of ``p(x0 | x^i)``, made by a short ancestral chain from ``s`` to 0. Over all of them

    C_xz = E (u - D)(A(u) - A(D))^H,     C_zz = E (A(u) - A(D))(A(u) - A(D))^H
    D_y^i = D^i + C_xz (C_zz + sigma^2)^-1 (y - A(D^i))

is the denoised image of the posterior in an ancestral step of second order: exact as the ensemble, the chain and
the steps grow, for a Gaussian prior and a linear operator. The members are fresh at every level, so that the
rank of one update does not bound that of the whole.

``guidance="paper"``. With ``u^i`` the end of a short probability-flow ODE from ``x^i``, and whitened data,

    C_ij = <A(u^i) - y, A(u^j) - mean A(u)>,     x^i <- x^i - w sum_j C_ij (x^j - mean x) / ||C||_F

``updates`` times, then an Euler step of the ODE; none in the first and last 5 % of the levels. The norm makes
``w`` free of units, and the result free of the noise level: the particles contract onto a fit, and their spread
is no uncertainty.

Differences from the published code: ``conditional`` is ours; data are whitened by the likelihood's noise level;
the threshold is a share of the levels, not a number of steps; second-order transitions for ``conditional``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from invdiff.conditioning import stack_real
from invdiff.primitives import ddim, extrapolate, groups, kalman_increment, probability_flow
from invdiff.prior import Prior
from invdiff.rng import Streams
from invdiff.sampler import Context, Sampler, State


@dataclass(frozen=True, kw_only=True)
class EnKG(Sampler):
    """Ensemble Kalman guidance; forward evaluations of denoiser and operator alone.

    A level costs ``1 + R (chain - 1)`` evaluations of the denoiser and ``1 + R`` of the operator for each draw,
    with ``R`` the least number for which draws times ``R`` reaches ``members``.

    Args:
        guidance: ``conditional`` or ``paper``.
        members: Least size of the ensemble; it should exceed the number of directions that the data see.
        chain: Levels of the chain that makes a conditional draw.
        weight: ``w`` of ``paper``.
        updates: Updates per level of ``paper``.
    """

    name: ClassVar[str] = "enkg"
    title: ClassVar[str] = "Ensemble Kalman diffusion guidance"
    reference: ClassVar[str] = "Zheng et al., 2024, arXiv:2409.20175"
    kind: ClassVar = "ensemble"
    requires: ClassVar[frozenset[str]] = frozenset({"quadratic", "noise"})
    _published = {"guidance": "paper", "steps": 80, "schedule": "edm", "sigma_max": 80.0, "sigma_min": 0.002}
    presets: ClassVar = {
        "published": {**_published, "weight": 2.0, "updates": 2},
        "black-hole": {**_published, "weight": 3.5, "updates": 1},
        "tuned": {"steps": 100, "members": 1024},
    }

    steps: int = 40
    schedule: Literal["edm", "geometric", "vp", "vp-quadratic"] = "geometric"
    sigma_min: float | None = 0.01
    guidance: Literal["conditional", "paper"] = "conditional"
    members: int = 256
    chain: int = 6
    weight: float = 2.0
    updates: int = 2

    def sigmas(self, prior: Prior) -> Tensor:
        """Return the noise grid; where no ``sigma_max`` is given it starts at 40 times the width of the prior."""
        start = self.sigma_max or 40 * prior.denoiser.sigma_data
        return Sampler.sigmas(replace(self, sigma_max=start), prior)

    def step(self, k: int, state: State, ctx: Context, rng: Streams) -> State:
        """Guide the ensemble and take it to the next level."""
        x, (s, t) = state["x"], ctx.level(k)
        if self.guidance == "paper":
            if 0.05 * self.steps < k < 0.95 * self.steps:
                for _ in range(self.updates):
                    x = self._paper(x, k, ctx, rng)
            return {"x": ddim(x, ctx.denoise(x, s), s, t, 0.0, None)}
        problem, d = ctx.measured, ctx.denoise(x, s)
        z = problem.operator(d)
        repeats = math.ceil(self.members / (groups(rng)[0][1].stop))
        ends = [self._conditional(x, d, s, ctx, rng) for _ in range(repeats)]
        images = torch.stack([problem.operator(u) - z for u in ends])
        deviations = torch.stack([u - d for u in ends])
        d = d + kalman_increment(deviations, images, problem.y - z, problem.sigma(d), rng)
        ahead = extrapolate(d, state.get("d"), ctx.sigmas, k)
        return {"x": ddim(x, ahead, s, t, 1.0, ctx.noise(rng, x.shape[0])), "d": d}

    def _conditional(self, x: Tensor, d: Tensor, s: float, ctx: Context, rng: Streams) -> Tensor:
        """Draw from ``p(x0 | x)``: ancestral steps of second order on levels even in ``sqrt(s)``."""
        end = min(s / 8, 0.1 * ctx.spread(None))
        edge = [math.sqrt(s) + i / (self.chain - 1) * (math.sqrt(end) - math.sqrt(s)) for i in range(self.chain)]
        levels = [v * v for v in edge]
        previous = None
        for i in range(self.chain - 1):
            ahead = extrapolate(d, previous, levels, i)
            x = ddim(x, ahead, levels[i], levels[i + 1], 1.0, rng.normal(x))
            previous, d = d, ctx.denoise(x, levels[i + 1])
        return d

    def _paper(self, x: Tensor, k: int, ctx: Context, rng: Streams) -> Tensor:
        """One normalised update of the particles."""
        problem, s = ctx.measured, float(ctx.sigmas[k])
        n = min(1 + (self.steps - k) // 4, 20)
        low = min(float(ctx.sigmas[-2]), s)
        levels = [(s ** (1 / 7) + i / max(n - 1, 1) * (low ** (1 / 7) - s ** (1 / 7))) ** 7 for i in range(n)]
        z = problem.operator(probability_flow(ctx.denoise, x, [*levels, 0.0], second_order=False))
        sigma = problem.sigma(x)
        out, images, error = x.clone(), stack_real(z / sigma), stack_real((z - problem.y) / sigma)
        for _, rows in groups(rng):
            live = torch.isfinite(images[rows]).all(1) & torch.isfinite(x[rows]).flatten(1).all(1)
            zs, xs = images[rows][live], x[rows][live].flatten(1)
            c = error[rows] @ (zs - zs.mean(0)).T
            size = c[live].norm().clamp_min(torch.finfo(c.dtype).tiny)
            out[rows] -= ((self.weight / size) * c.to(xs.dtype) @ (xs - xs.mean(0))).reshape(x[rows].shape)
        return out
