"""DDIM and DDPM: draws from the prior (Song, Meng, Ermon, ICLR 2021; Ho, Jain, Abbeel, NeurIPS 2020).

``x' = D + a (x - D)/s + b z`` with ``b = eta t sqrt(1 - t^2/s^2)``, ``a^2 + b^2 = t^2``: ``eta = 0`` is
deterministic, ``eta = 1`` is the ancestral DDPM step.

Differences from the published code: the variance-exploding frame (the same step divided by the signal level);
the last level is 0 and returns the denoised image; first order on purpose, see ``dpmpp`` for second order.

The states of deepinv 0.5's ``DDIMSolver`` on the same noise and levels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from invdiff.primitives import ddim
from invdiff.rng import Streams
from invdiff.sampler import Context, Sampler, State


@dataclass(frozen=True, kw_only=True)
class DDIM(Sampler):
    """DDIM with ``eta``; one network evaluation per step.

    Args:
        eta: Share of ancestral noise, from 0 (deterministic) to 1 (DDPM).
    """

    name: ClassVar[str] = "ddim"
    title: ClassVar[str] = "DDIM / DDPM (prior draws, first order)"
    reference: ClassVar[str] = "Song, Meng, Ermon, ICLR 2021, arXiv:2010.02502"
    exactness: ClassVar = "asymptotic"
    conditional: ClassVar[bool] = False
    presets: ClassVar = {"ddpm": {"eta": 1.0, "steps": 1000, "schedule": "vp"}, "ddim-50": {"steps": 50}}

    eta: float = 0.0

    def step(self, k: int, state: State, ctx: Context, rng: Streams) -> State:
        """One step, one evaluation."""
        x, (s, t) = state["x"], ctx.level(k)
        noise = ctx.noise(rng, x.shape[0]) if self.eta else None
        return {"x": ddim(x, ctx.denoise(x, s), s, t, self.eta, noise)}
