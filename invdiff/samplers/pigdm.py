"""PiGDM: pseudoinverse-guided diffusion (Song, Vahdat, Mardani, Kautz, ICLR 2023).

Take ``p(x0 | x) = N(D, r^2 I)`` with ``r^2 = r0^2 s^2 / (r0^2 + s^2)``. Then

    g = grad_x log p(y | x) = J^T A^H (r^2 A A^H + sigma^2 I)^-1 (y - A D) = J^T (prox(D; r^2) - D) / r^2

* ``weight="tweedie"`` (default): ``D_y = D + s^2 g`` is the posterior's denoised image, used in any transition.
  With ``line_search`` the length of ``s^2 g`` is the one that the Tweedie covariance ``C = s^2 J`` allows: one
  conjugate-gradient step along ``z = (y - A prox)/sigma^2``, ``<z, y - A D> / <z, A C A^H z + sigma^2 z>``.
* ``weight="paper"``: DDIM step with ``eta`` plus ``sqrt(1 + t^2) r^2 g``; ``weight="code"``: plus ``r^2 g``.

Differences from the published code: the data's noise level enters (the code ignores it); the Gram system is solved
in closed form or by conjugate gradients, never as a dense inverse; ``r0`` is a setting (the paper has 1); the
start is noise alone (the code adds ``A^+ y``). The published guidance overshoots, and can diverge, where the prior
is much wider than ``r0`` along a measured axis; the line search (off in the published presets) cannot.

The states of deepinv 0.5's ``PiGDMDataFidelity`` in a DDIM solver on the same noise and levels, with ``tweedie``
weight, ``order=1``, no line search and ``r0 = 2`` on [-1, 1] (1 on its [0, 1]).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from invdiff.primitives import ddim, extrapolate, gaussian_prox, guidance_length
from invdiff.rng import Streams
from invdiff.sampler import Context, Sampler, State


@dataclass(frozen=True, kw_only=True)
class PiGDM(Sampler):
    """Pseudoinverse guidance; one evaluation, one network VJP and one Gaussian solve per step.

    Args:
        spread: ``r0``, standard deviation of the prior in its own units; None takes the denoiser's.
        weight: ``tweedie``, ``paper`` or ``code``.
        eta: Stochasticity of the DDIM step.
        order: 1 or 2 (second-order transition; ``tweedie`` only).
        line_search: Whether the guidance's length is searched for (``tweedie`` only).
        cg_iterations: Most iterations of a Gaussian solve without closed form.
    """

    name: ClassVar[str] = "pigdm"
    title: ClassVar[str] = "Pseudoinverse-guided diffusion"
    reference: ClassVar[str] = "Song, Vahdat, Mardani, Kautz, ICLR 2023"
    requires: ClassVar[frozenset[str]] = frozenset({"linear", "quadratic", "denoiser-vjp"})
    _published = {"spread": 1.0, "order": 1, "steps": 100, "schedule": "vp", "line_search": False}
    presets: ClassVar = {
        "published": {**_published, "weight": "paper"},
        "published-code": {**_published, "weight": "code"},
        "inversebench": {"weight": "code", "eta": 0.2, "order": 1, "spread": 1.0, "line_search": False},
    }

    steps: int = 100
    spread: float | None = None
    schedule: Literal["edm", "geometric", "vp", "vp-quadratic"] = "geometric"
    sigma_min: float | None = 0.01
    weight: Literal["tweedie", "paper", "code"] = "tweedie"
    eta: float = 1.0
    order: Literal[1, 2] = 2
    line_search: bool = True
    cg_iterations: int = 50

    def step(self, k: int, state: State, ctx: Context, rng: Streams) -> State:
        """One guided step."""
        x, (s, t) = state["x"], ctx.level(k)
        d, pull = ctx.denoise.vjp(x, s, once=True)
        r0 = ctx.spread(self.spread)
        r2 = (r0 * s) ** 2 / (r0**2 + s * s)
        near = gaussian_prox(ctx.measured, d, r2, max_iter=self.cg_iterations)
        moved = pull(near - d)  # r^2 g
        noise = ctx.noise(rng, x.shape[0])
        if self.weight != "tweedie":
            c = math.sqrt(1 + t * t) if self.weight == "paper" else 1.0
            return {"x": ddim(x, d, s, t, self.eta, noise) + c * moved}
        full = (s * s / r2) * moved
        if self.line_search:
            full = full * guidance_length(ctx.measured, d, near, full)
        d = d + full
        ahead = extrapolate(d, state.get("d") if self.order == 2 else None, ctx.sigmas, k)
        return {"x": ddim(x, ahead, s, t, self.eta, noise), "d": d}
