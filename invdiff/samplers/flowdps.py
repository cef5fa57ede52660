"""FlowDPS: flow-driven posterior sampling (Kim, Kim, Ye, ICCV 2025).

With ``eps = (x - D) / s``, ``n`` fresh noise, and the share of noise ``tau(s) = s / (1 + s)``, a flow's time:

    x0 = the mean of N(D, r^2 I) given y, linearised at D,      r^2 = r0^2 s^2 / (r0^2 + s^2)
    x' = x0 + t ( sqrt(tau(t)) eps + sqrt(1 - tau(t)) n )       a flow's noise kept early, fresh late

from a finite ``sigma_max``, on a geometric grid or (``schedule="flow"``) on the clock of a flow, equal steps of
``u`` in ``sigma = shift u / (1 - u)``, which wants twice the steps for the same width. Where ``eta`` is given,
``x0`` is the published one, ``inner`` steps of constant length from ``D`` of which little is kept late:

    z <- z - eta grad ||y - A(G(z))||,      x0 = (1 - tau(s)) D + tau(s) z

Differences from the published code: ``x0`` has the data's noise level by default (the published rule all but
ignores the data below ``s = 0.1``, and its draws are as wide as that); ``||y - A(G(z))||`` itself instead of
``A^H`` or ``A^+`` of it, so that any operator with derivatives will do; norms per draw, and ``eta`` in prior units
(a length, which grows as the root of the number of latents); no half precision of gradients; it serves any prior,
not flows alone; ``order=2`` extrapolates ``x0``.

Cost: one evaluation per step, no network VJP; ``inner`` conjugate-gradient steps, each a derivative forward and
one back of decoder and operator (or ``inner`` of the latter).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from invdiff.primitives import extrapolate, mix_noise, tweedie_update
from invdiff.primitives.misfit import misfit_ascent, misfit_unit
from invdiff.rng import Streams
from invdiff.sampler import Context, Sampler, State


@dataclass(frozen=True, kw_only=True)
class FlowDPS(Sampler):
    """FlowDPS; see the module for its cost.

    Args:
        inner: Conjugate-gradient steps per level, or gradient steps of length ``eta``.
        eta: Published length of a gradient step, data in prior units; None takes the noise level.
        spread: ``r0``, in prior units; None takes the prior's.
        shift: Of a flow's clock: larger values spend more steps at high noise.
        order: 1 (published) or 2.
    """

    name: ClassVar[str] = "flowdps"
    title: ClassVar[str] = "Flow-driven posterior sampling"
    reference: ClassVar[str] = "Kim et al., ICCV 2025, arXiv:2503.08136"
    requires: ClassVar[frozenset[str]] = frozenset({"vjp", "quadratic"})
    _clock = {"schedule": "flow", "shift": 4.0, "sigma_min": None}
    presets: ClassVar = {
        "published": {"steps": 28, "eta": 15.0, "inner": 3, **_clock, "order": 1},
        "flow-clock": {"schedule": "flow"},
    }

    steps: int = 100
    schedule: Literal["edm", "geometric", "vp", "vp-quadratic", "flow"] = "geometric"
    sigma_min: float | None = 0.01
    inner: int = 5
    eta: float | None = None
    spread: float | None = None
    shift: float = 1.0
    order: Literal[1, 2] = 2

    def init(self, ctx: Context, rows: int, rng: Streams) -> State:
        """Start from noise; find the unit of the misfit."""
        state = super().init(ctx, rows, rng)
        return state if self.eta is None else {**state, "unit": misfit_unit(ctx.measured, 0 * state["x"])}

    def step(self, k: int, state: State, ctx: Context, rng: Streams) -> State:
        """Denoise, meet the data, mix the noise."""
        x, (s, t), problem = state["x"], ctx.level(k), ctx.measured
        d = ctx.denoise(x, s)
        if self.eta is None:
            share = 1 / (1 + (s / ctx.spread(self.spread)) ** 2)  # r^2 / s^2
            x0 = tweedie_update(problem, d, lambda v: share * v, s, max_iter=self.inner)
        else:
            z = d
            for _ in range(self.inner):
                z = z + self.eta * misfit_ascent(problem, z, lambda v: v, state["unit"])
            x0 = d + s / (1 + s) * (z - d)
        ahead = extrapolate(x0, state.get("x0") if self.order == 2 else None, ctx.sigmas, k)
        x = mix_noise(ahead, (x - d) / s, t, 1 / (1 + t), ctx.noise(rng, len(x)))
        return {**state, "x": x, "x0": x0}
