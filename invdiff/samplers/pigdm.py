"""PiGDM: pseudoinverse-guided diffusion (Song, Vahdat, Mardani, Kautz, ICLR 2023).

Take ``p(x0 | x) = N(D, r^2 I)`` with ``r^2 = r0^2 s^2 / (r0^2 + s^2)``. Then

    g = grad_x log p(y | x) = J^T A^H (r^2 A A^H + sigma^2 I)^-1 (y - A D) = J^T (prox(D; r^2) - D) / r^2

* ``weight="tweedie"`` (default): ``D_y = D + s^2 g`` is the posterior's denoised image, used in any transition.
* ``weight="paper"``: DDIM step with ``eta`` plus ``sqrt(1 + t^2) r^2 g``; ``weight="code"``: plus ``r^2 g``.

Differences from the published code: the data's noise level enters (the code ignores it); the Gram system is solved
in closed form or by conjugate gradients, never as a dense inverse; ``r0`` is a setting (the paper has 1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from invdiff.primitives import ddim, extrapolate, gaussian_prox
from invdiff.rng import Streams
from invdiff.sampler import Context, Sampler, State


@dataclass(frozen=True, kw_only=True)
class PiGDM(Sampler):
    """Pseudoinverse guidance; one evaluation, one network VJP and one Gaussian solve per step.

    Args:
        spread: ``r0``, standard deviation of the prior in its own units; where correlations make the prior much
            wider than ``r0`` along some direction, the guidance overshoots and can diverge.
        weight: ``tweedie``, ``paper`` or ``code``.
        eta: Stochasticity of the DDIM step.
        order: 1 or 2 (second-order transition; ``tweedie`` only).
        cg_iterations: Most iterations of a Gaussian solve without closed form.
    """

    name: ClassVar[str] = "pigdm"
    title: ClassVar[str] = "Pseudoinverse-guided diffusion"
    reference: ClassVar[str] = "Song, Vahdat, Mardani, Kautz, ICLR 2023"
    requires: ClassVar[frozenset[str]] = frozenset({"linear", "quadratic", "denoiser-vjp"})
    _published = {"spread": 1.0, "order": 1, "steps": 100, "schedule": "vp"}
    presets: ClassVar = {
        "published": {**_published, "weight": "paper"},
        "published-code": {**_published, "weight": "code"},
        "inversebench": {"weight": "code", "eta": 0.2, "order": 1, "steps": 100, "spread": 1.0},
        "unit": {"steps": 400, "spread": 1.0},
    }

    steps: int = 400
    spread: float = 1.75
    schedule: Literal["edm", "geometric", "vp", "vp-quadratic"] = "geometric"
    sigma_min: float | None = 0.01
    weight: Literal["tweedie", "paper", "code"] = "tweedie"
    eta: float = 1.0
    order: Literal[1, 2] = 2
    cg_iterations: int = 50

    def step(self, k: int, state: State, ctx: Context, rng: Streams) -> State:
        """One guided step."""
        x, (s, t) = state["x"], ctx.level(k)
        d, pull = ctx.denoise.vjp(x, s)
        r2 = (self.spread * s) ** 2 / (self.spread**2 + s * s)
        moved = pull(gaussian_prox(ctx.measured, d, r2, max_iter=self.cg_iterations) - d)  # r^2 g
        noise = ctx.noise(rng, x.shape[0])
        if self.weight != "tweedie":
            c = math.sqrt(1 + t * t) if self.weight == "paper" else 1.0
            return {"x": ddim(x, d, s, t, self.eta, noise) + c * moved}
        d = d + (s * s / r2) * moved
        ahead = extrapolate(d, state.get("d") if self.order == 2 else None, ctx.sigmas, k)
        return {"x": ddim(x, ahead, s, t, self.eta, noise), "d": d}
