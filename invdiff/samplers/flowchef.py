"""FlowChef: steering a flow by the gradient at its denoised image (Patel, Wen, Metaxas, Yang, ICCV 2025).

    x' = D + t eps - (1 + t) eta grad_D ||y - A(G(D))||,      eps = (x - D) / s

a deterministic step of a flow with one gradient of the misfit, taken at ``D``: no derivative of the network. By
default that gradient has the length of one conjugate-gradient step towards the mean of N(D, r^2 I) given ``y``,
``r^2 = r0^2 s^2 / (r0^2 + s^2)``. The start alone is random, and nothing adds the noise that the data leave open:
the draws are too narrow where the data are.

Differences from the published code: the clock ``sigma = shift u / (1 - u)`` starts at a finite ``sigma_max``; step
lengths from the noise level (``eta`` gives a constant, a length in units of the latent; ``1 + t`` translates it
from the flow's state ``x / (1 + t)``); norms per draw; it serves any prior, not flows alone; ``order=2``.

Cost: one evaluation per step, no network VJP; one conjugate-gradient step, a derivative forward and two back of
decoder and operator (or one of the latter).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from invdiff.primitives import extrapolate, tweedie_update
from invdiff.primitives.misfit import misfit_ascent, misfit_unit
from invdiff.rng import Streams
from invdiff.sampler import Context, Sampler, State


@dataclass(frozen=True, kw_only=True)
class FlowChef(Sampler):
    """FlowChef; see the module for its cost.

    Args:
        eta: Published length of the gradient step, data in prior units; None takes the noise level.
        spread: ``r0``, in prior units; None takes the prior's.
        shift: Of the clock: larger values spend more steps at high noise.
        order: 1 (published) or 2.
    """

    name: ClassVar[str] = "flowchef"
    title: ClassVar[str] = "Steering a flow by the gradient at its denoised image"
    reference: ClassVar[str] = "Patel et al., ICCV 2025, arXiv:2412.00100"
    requires: ClassVar[frozenset[str]] = frozenset({"vjp", "quadratic"})
    presets: ClassVar = {"published": {"steps": 28, "eta": 50.0, "shift": 4.0, "sigma_min": None, "order": 1}}

    steps: int = 50
    schedule: Literal["edm", "geometric", "vp", "vp-quadratic", "flow"] = "flow"
    sigma_min: float | None = 0.03
    eta: float | None = None
    spread: float | None = None
    shift: float = 1.0
    order: Literal[1, 2] = 2

    def init(self, ctx: Context, rows: int, rng: Streams) -> State:
        """Start from noise; find the unit of the misfit."""
        state = super().init(ctx, rows, rng)
        return state if self.eta is None else {**state, "unit": misfit_unit(ctx.measured, 0 * state["x"])}

    def step(self, k: int, state: State, ctx: Context, rng: Streams) -> State:
        """Denoise, one gradient, a deterministic step."""
        x, (s, t), problem = state["x"], ctx.level(k), ctx.measured
        d = ctx.denoise(x, s)
        if self.eta is None:
            share = 1 / (1 + (s / ctx.spread(self.spread)) ** 2)  # r^2 / s^2
            push = tweedie_update(problem, d, lambda v: share * v, s, max_iter=1) - d
        else:
            push = (1 + t) * self.eta * misfit_ascent(problem, d, lambda v: v, state["unit"])
        x0 = d + push
        ahead = extrapolate(x0, state.get("x0") if self.order == 2 else None, ctx.sigmas, k)
        return {**state, "x": ahead + t * (x - d) / s, "x0": x0}
