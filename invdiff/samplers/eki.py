"""EKI: ensemble Kalman inversion started from draws of the diffusion prior (Iglesias, Law, Stuart 2013).

The ``J`` draws of a case are one ensemble. First each is a draw ``x^j`` from the prior (probability-flow ODE,
second order, on the noise grid). Then ``n`` times, with perturbed data and inflated noise,

    x^j <- x^j + C_xz (C_zz + n sigma^2)^-1 (y + sqrt(n) sigma e^j - A(x^j))

``C_xz`` and ``C_zz`` are covariances of the ensemble, so that ``A`` is only ever applied. The ``n`` inflations
sum to one use of the data (Emerick, Reynolds 2013).

What the spread means: the posterior's width for a Gaussian prior, a linear operator and many particles.
Otherwise it is that of a Gaussian approximation; with fewer particles than the data constrain directions the
update has too small a rank, the mean is off, and the spread of a single ensemble is too narrow. ``folds`` takes
the gain of each particle from the others; then the spread covers that sampling error too, at the price of being
wider than the posterior. Results leave the range of the prior: nothing denoises them again.

Differences from the published code: the data are used once in all. Repeating the full update (500 times in a
public benchmark) shrinks the ensemble to a point of its own span, which is a fit and no uncertainty, so it is
not offered. The start is the diffusion prior, not a Gaussian field; no step normalised by the size of the
update.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from invdiff.errors import InvdiffError
from invdiff.primitives import ddim, extrapolate, kalman_increment
from invdiff.prior import Prior
from invdiff.rng import Streams
from invdiff.sampler import Context, Sampler, State


@dataclass(frozen=True, kw_only=True)
class EKI(Sampler):
    """Ensemble Kalman inversion; one evaluation per level of the prior draws, one of the operator per iteration.

    Args:
        steps: Levels of the prior draws.
        iterations: ``n``, Kalman updates after them.
        folds: Groups of particles, each updated with the gain of the others; 1 is the single ensemble.
    """

    name: ClassVar[str] = "eki"
    title: ClassVar[str] = "Ensemble Kalman inversion of prior draws"
    reference: ClassVar[str] = "Iglesias, Law, Stuart, Inverse Problems 2013; Emerick, Reynolds 2013"
    kind: ClassVar = "ensemble"
    requires: ClassVar[frozenset[str]] = frozenset({"quadratic", "noise"})
    presets: ClassVar = {"published": {"folds": 1}, "tuned": {"iterations": 1, "steps": 100}}

    steps: int = 40
    schedule: Literal["edm", "geometric", "vp", "vp-quadratic"] = "geometric"
    sigma_min: float | None = 0.01
    iterations: int = 4
    folds: int = 8

    def sigmas(self, prior: Prior) -> Tensor:
        """Return the noise grid of the prior draws, and a 0 for every iteration after them."""
        grid = Sampler.sigmas(self, prior)
        return torch.cat([grid, grid.new_zeros(self.iterations)])

    def init(self, ctx: Context, rows: int, rng: Streams) -> State:
        """Start from noise, with an ensemble of at least two."""
        if len(rng.keys) < 2 * len({case for case, _ in rng.keys}):
            raise InvdiffError("eki moves the draws of a case together and needs at least 2 of them, got 1.")
        return Sampler.init(self, ctx, rows, rng)

    def step(self, k: int, state: State, ctx: Context, rng: Streams) -> State:
        """One level of the prior draw, or one Kalman update."""
        x, (s, t) = state["x"], ctx.level(k)
        if s > 0:
            d = ctx.denoise(x, s)
            return {"x": ddim(x, extrapolate(d, state.get("d"), ctx.sigmas, k), s, t, 0.0, None), "d": d}
        problem, n = ctx.measured, self.iterations
        z = problem.operator(x)
        sigma = problem.sigma(x)
        innovation = problem.y + math.sqrt(n) * sigma * rng.normal(problem.y) - z
        return {"x": x + kalman_increment(x[None], z[None], innovation, sigma, rng, n, self.folds, centre=True)}
