"""ILVR: iterative latent variable refinement (Choi, Kim, Jeong, Gwon, Yoon, ICCV 2021), for any linear operator.

An ancestral step ``x'`` from ``s`` to ``t``; then what the data measure is replaced by the data at level ``t``,

    x' <- x' + A^+ (y + t A z - A x')                                                   (``hard``, published)
    x' <- x' + t^2 A^H (t^2 A A^H + sigma^2 I)^-1 (y + t A z + sigma n - A x')          (default)

for levels ``t >= stop sigma``. The published method has no noise model: its draws fit the data exactly, noise
included, and an operator with small singular values amplifies that without bound. The default weighs the data by
their noise; below the noise level they have been used, and going on would use them again at every level.

Differences from the published code: any linear operator instead of a pair of resizers (down- and up-sampling
there is ``A^+ A`` here only up to the quality of the filter); ``stop`` is in units of the data's noise (the code
counts time steps: ``published-range``); second-order transition by default.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from invdiff.primitives import ddim, extrapolate
from invdiff.primitives.replacement import replace_measured
from invdiff.rng import Streams
from invdiff.sampler import Context, Sampler, State
from invdiff.spaces import per_row


@dataclass(frozen=True, kw_only=True)
class ILVR(Sampler):
    """ILVR; one evaluation and one Gaussian solve per step, no network gradient.

    Args:
        hard: Whether the data are taken as exact (published).
        stop: Level below which nothing is replaced, over the noise level of the data in prior units.
        stop_at: The same as a level in prior units.
        order: 1 (published) or 2.
        cg_iterations: Most iterations of a solve without closed form.
    """

    name: ClassVar[str] = "ilvr"
    title: ClassVar[str] = "Iterative latent variable refinement"
    reference: ClassVar[str] = "Choi et al., ICCV 2021, arXiv:2108.02938"
    requires: ClassVar[frozenset[str]] = frozenset({"linear", "quadratic"})
    _published = {"schedule": "vp", "sigma_min": None, "hard": True, "stop": 0.0, "order": 1}
    presets: ClassVar = {
        "published": _published,
        "published-range": {**_published, "stop_at": 0.72},  # its last 20 of 100 steps
        "tuned": {"steps": 50},
    }

    steps: int = 100
    schedule: Literal["edm", "geometric", "vp", "vp-quadratic"] = "geometric"
    sigma_min: float | None = 0.01
    hard: bool = False
    stop: float = 0.7
    stop_at: float = 0.0
    order: Literal[1, 2] = 2
    cg_iterations: int = 30

    def step(self, k: int, state: State, ctx: Context, rng: Streams) -> State:
        """An ancestral step, then the data in place of what they measure."""
        x, (s, t) = state["x"], ctx.level(k)
        problem = ctx.measured
        d = ctx.denoise(x, s)
        ahead = extrapolate(d, state.get("d") if self.order == 2 else None, ctx.sigmas, k)
        noise, z = ctx.noise(rng, x.shape[0]), ctx.noise(rng, x.shape[0])
        x = ddim(x, ahead, s, t, 1.0, noise)
        sigma = problem.sigma(d)
        sigma = sigma.reshape(sigma.shape[0] if sigma.ndim else 1, -1).amax(1)
        gain = 1.0 if problem.gain is None else problem.gain
        use = ((t >= self.stop * sigma / gain) & (t >= self.stop_at)).expand(x.shape[0])
        if bool(use.any()):
            new = replace_measured(problem, x, t, z, rng, self.hard, self.cg_iterations)
            x = torch.where(per_row(use, x) > 0, new, x)
        return {"x": x, "d": d}
