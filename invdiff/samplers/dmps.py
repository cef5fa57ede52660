"""DMPS: diffusion model based posterior sampling (Meng, Kabashima, ACML 2024).

Take ``x0`` given ``x`` as uninformed by the prior, ``N(x, s^2 I)``. Then
``p(y | x) = N(A x, s^2 A A^H + sigma^2 I)``, whose score needs no network gradient,

    g = A^H (s^2 A A^H + sigma^2 I)^-1 (y - A x) = (prox(x; s^2) - x) / s^2,      D' = D + lam s^2 g

and ``D'`` is used in an ancestral step, which for ``lam`` is the published ``x' + lam (s^2 - t^2) g``.

Differences from the published code: ``g`` is taken at the current state as in the paper (the code takes it at the
next one with the old level); closed form or conjugate gradients instead of a decomposition in the sampler; the
network runs without a graph; ``sigma = 0`` is a case like any other; second-order transition by default.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from invdiff.primitives import ddim, extrapolate, gaussian_prox
from invdiff.rng import Streams
from invdiff.sampler import Context, Sampler, State


@dataclass(frozen=True, kw_only=True)
class DMPS(Sampler):
    """DMPS; one evaluation and one Gaussian solve per step, no network gradient.

    Args:
        lam: Weight of the likelihood score; 1 is the value of the derivation.
        eta: Stochasticity of the transition (1: ancestral, published).
        order: 1 (published) or 2.
        cg_iterations: Most iterations of a Gaussian solve without closed form.
    """

    name: ClassVar[str] = "dmps"
    title: ClassVar[str] = "Diffusion model based posterior sampling"
    reference: ClassVar[str] = "Meng, Kabashima, ACML 2024, arXiv:2211.12343"
    requires: ClassVar[frozenset[str]] = frozenset({"linear", "quadratic"})
    presets: ClassVar = {
        "published": {"lam": 1.75, "order": 1, "steps": 1000, "schedule": "vp", "sigma_min": None},
        "tuned": {"lam": 1.75},
    }

    steps: int = 200
    schedule: Literal["edm", "geometric", "vp", "vp-quadratic"] = "geometric"
    sigma_min: float | None = 0.01
    lam: float = 1.0
    eta: float = 1.0
    order: Literal[1, 2] = 2
    cg_iterations: int = 50

    def step(self, k: int, state: State, ctx: Context, rng: Streams) -> State:
        """Denoise, add the likelihood's pull on the noisy image, step."""
        x, (s, t) = state["x"], ctx.level(k)
        near = gaussian_prox(ctx.measured, x, s * s, max_iter=self.cg_iterations)
        d = ctx.denoise(x, s) + self.lam * (near - x)
        ahead = extrapolate(d, state.get("d") if self.order == 2 else None, ctx.sigmas, k)
        noise = ctx.noise(rng, x.shape[0]) if self.eta else None
        return {"x": ddim(x, ahead, s, t, self.eta, noise), "d": d}
