"""NRLG: noise-refined likelihood guidance (Wang, Liu, Wei, 2025).

Take ``p(x0 | x) = N(D, r^2 I)`` with ``r^2 = r0^2 s^2 / (r0^2 + s^2)``, so that ``p(y | x)`` is normal with mean
``A D`` and covariance ``r^2 A A^H + sigma^2 I``. Leaving out the Jacobian of ``D``, its score and the refined
noise are

    g = A^H (r^2 A A^H + sigma^2 I)^-1 (y - A D),      eps' = (x - D)/s - c (r^2 / s) g

that is ``D' = D + c (prox(D; r^2) - D)``, which is used in a DDIM step with ``eta``. ``c = 1`` is the mean of
``N(D, r^2 I)`` given ``y``; a larger ``c`` stands in for directions in which the prior is wider than ``r0``.

No code was published, and the constants of the paper could not be verified: ``published`` is the derivation with
``r = s`` and a deterministic step. Differences: the network's noise is refined along ``r^2 g`` (along ``s^2 g`` it
diverges where ``s`` is far above ``r0``); ``sigma = 0`` is a case like any other; ``order=2`` extrapolates ``D'``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from invdiff.primitives import ddim, extrapolate, gaussian_prox
from invdiff.rng import Streams
from invdiff.sampler import Context, Sampler, State


@dataclass(frozen=True, kw_only=True)
class NRLG(Sampler):
    """NRLG; one evaluation and one Gaussian solve per step, no network gradient.

    Args:
        c: Length of the refinement.
        spread: ``r0`` in prior units; None takes the prior's, infinity gives ``r = s``.
        eta: Stochasticity of the DDIM step.
        order: 1 or 2.
        cg_iterations: Most iterations of a Gaussian solve without closed form.
    """

    name: ClassVar[str] = "nrlg"
    title: ClassVar[str] = "Noise-refined likelihood guidance"
    reference: ClassVar[str] = "Wang, Liu, Wei, 2025, arXiv:2506.13391"
    requires: ClassVar[frozenset[str]] = frozenset({"linear", "quadratic"})
    _published = {"steps": 50, "schedule": "vp", "sigma_min": None, "c": 1.0, "spread": float("inf")}
    presets: ClassVar = {"published": {**_published, "eta": 0.0, "order": 1}, "tuned": {"steps": 200, "c": 1.3}}

    steps: int = 100
    schedule: Literal["edm", "geometric", "vp", "vp-quadratic"] = "geometric"
    sigma_min: float | None = 0.01
    c: float = 1.0
    spread: float | None = None
    eta: float = 1.0
    order: Literal[1, 2] = 2
    cg_iterations: int = 50

    def step(self, k: int, state: State, ctx: Context, rng: Streams) -> State:
        """Denoise, refine by the likelihood, step."""
        x, (s, t) = state["x"], ctx.level(k)
        d = ctx.denoise(x, s)
        r2 = 1 / (1 / s**2 + 1 / ctx.spread(self.spread) ** 2)
        d = d + self.c * (gaussian_prox(ctx.measured, d, r2, max_iter=self.cg_iterations) - d)
        ahead = extrapolate(d, state.get("d") if self.order == 2 else None, ctx.sigmas, k)
        noise = ctx.noise(rng, x.shape[0]) if self.eta else None
        return {"x": ddim(x, ahead, s, t, self.eta, noise), "d": d}
