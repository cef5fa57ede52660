"""DPM-Solver++ 2M and SDE-2M: second-order draws from the prior (Lu et al., 2022).

``D* = D + (D - D_prev) h / (2 h_prev)``, ``h = ln(s/t)``, then the DDIM step with ``D*``: with ``eta = 0`` this is
2M (``x' = (t/s) x + (1 - t/s) D*``), with ``eta = 1`` SDE-2M
(``x' = (t/s)^2 x + (1 - (t/s)^2) D* + t sqrt(1 - (t/s)^2) z``).

Differences from the published code: none in the formulas; the step to 0 returns the denoised image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from invdiff.primitives import ddim, extrapolate
from invdiff.rng import Streams
from invdiff.sampler import Context, Sampler, State


@dataclass(frozen=True, kw_only=True)
class DPMpp(Sampler):
    """DPM-Solver++ 2M (``eta`` 0) and its SDE form (``eta`` 1); one network evaluation per step.

    Args:
        eta: 0 for the ODE solver, 1 for the SDE solver.
    """

    name: ClassVar[str] = "dpmpp"
    title: ClassVar[str] = "DPM-Solver++ 2M and SDE-2M (prior draws, second order)"
    reference: ClassVar[str] = "Lu et al., 2022, arXiv:2211.01095"
    exactness: ClassVar = "asymptotic"
    conditional: ClassVar[bool] = False
    presets: ClassVar = {"2m": {"eta": 0.0, "steps": 25}, "sde-2m": {"eta": 1.0, "steps": 50}}

    steps: int = 40
    eta: float = 1.0

    def step(self, k: int, state: State, ctx: Context, rng: Streams) -> State:
        """One step, one evaluation; the previous denoised image is the only history."""
        x, (s, t) = state["x"], ctx.level(k)
        d = ctx.denoise(x, s)
        ahead = extrapolate(d, state.get("d"), ctx.sigmas, k)
        noise = ctx.noise(rng, x.shape[0]) if self.eta else None
        return {"x": ddim(x, ahead, s, t, self.eta, noise), "d": d}
