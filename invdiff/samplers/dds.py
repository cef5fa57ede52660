"""DDS: decomposed diffusion sampling (Chung, Lee, Ye, ICLR 2024).

    D = D(x, s);   x0 = M conjugate-gradient steps from D on (I + gamma A^H A) u = D + gamma A^H y
    x' = x0 + t ( sqrt(1 - eta^2) eps + eta z ),   eps = (x - D) / s  from the uncorrected D

``consistency="noise"`` (default): ``gamma = r^2 / sigma^2`` with ``r^2 = r0^2 s^2 / (r0^2 + s^2) / lam`` and the
likelihood's ``sigma``, the weight at which the step is the mean of N(D, r^2 I) given ``y``.
``consistency="fixed"``: the published constant ``gamma`` in prior units.

Differences from the published code: Hermitian inner products (with ``r^T r`` it is not conjugate gradients on
complex images); the exact adjoint; the system is solved exactly where the operator has a closed form; the last
level returns ``x0``; ``sigma`` is used; ``order=2`` extrapolates.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from invdiff.primitives import extrapolate, gaussian_prox, mix_noise
from invdiff.prior import Prior
from invdiff.rng import Streams
from invdiff.sampler import Context, Sampler, State


@dataclass(frozen=True, kw_only=True)
class DDS(Sampler):
    """DDS; one evaluation and a few conjugate-gradient steps per level, no network gradient.

    Args:
        eta: Share of fresh noise, ``sqrt`` of the variance drawn anew.
        consistency: ``noise`` or ``fixed``.
        lam: Weight of the denoised image against the data for ``noise``.
        spread: ``r0`` for ``noise``, in prior units; None takes the prior's.
        gamma: Weight of the data for ``fixed``, with operator and data in prior units.
        cg_iterations: ``M``, conjugate-gradient steps per level.
        order: 1 (published) or 2, which is nearer to the right width.
    """

    name: ClassVar[str] = "dds"
    title: ClassVar[str] = "Decomposed diffusion sampling"
    reference: ClassVar[str] = "Chung, Lee, Ye, ICLR 2024, arXiv:2303.05754"
    requires: ClassVar[frozenset[str]] = frozenset({"linear", "quadratic"})
    presets: ClassVar = {
        "published": {
            "steps": 50,
            "eta": 0.85,
            "consistency": "fixed",
            "gamma": 1.0,
            "cg_iterations": 5,
            "order": 1,
        },
        "tuned": {
            "steps": 200,
            "eta": 1.0,
            "order": 2,
            "schedule": "geometric",
            "sigma_max": 1e6,  # the prior's own
            "sigma_min": 0.01,
            "cg_iterations": 50,
        },
        "published-99": {
            "steps": 99,
            "eta": 0.85,
            "consistency": "fixed",
            "gamma": 1.0,
            "cg_iterations": 5,
            "order": 1,
        },
    }

    steps: int = 40
    sigma_min: float | None = 0.01
    eta: float = 0.85
    consistency: Literal["noise", "fixed"] = "noise"
    lam: float = 1.0
    spread: float | None = None
    gamma: float = 1.0
    cg_iterations: int = 8
    order: Literal[1, 2] = 2

    def sigmas(self, prior: Prior) -> Tensor:
        """Return the noise grid; where no ``sigma_max`` is given it starts at 40 times the width of the prior.

        The data fix what they measure from the first step on, and levels far above the image cost steps.
        """
        start = self.sigma_max or 40 * prior.denoiser.sigma_data
        return Sampler.sigmas(replace(self, sigma_max=start), prior)

    def step(self, k: int, state: State, ctx: Context, rng: Streams) -> State:
        """Denoise, conjugate gradients, DDIM step."""
        x, (s, t) = state["x"], ctx.level(k)
        problem = ctx.measured
        d = ctx.denoise(x, s)
        eps = (x - d) / s
        r2: float | Tensor
        if self.consistency == "noise":
            r2, tol = 1 / (1 / s**2 + 1 / ctx.spread(self.spread) ** 2) / self.lam, 1e-3
        else:  # always as many conjugate-gradient steps as published
            gain = torch.ones(()) if problem.gain is None else problem.gain
            r2, tol = self.gamma * (problem.sigma(d).reshape(-1) / gain) ** 2, 0.0
        d = gaussian_prox(problem, d, r2, max_iter=self.cg_iterations, tol=tol)
        ahead = extrapolate(d, state.get("d") if self.order == 2 else None, ctx.sigmas, k)
        noise = ctx.noise(rng, x.shape[0]) if self.eta else None
        return {"x": mix_noise(ahead, eps, t, self.eta**2, noise), "d": d}
