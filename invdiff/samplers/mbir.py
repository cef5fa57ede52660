"""DiffusionMBIR: volumes from a prior of slices, linked by total variation (Chung et al., CVPR 2023).

From level ``s`` to ``t``, with ``S(x) = (D(x, t) - x) / t^2`` and differences ``G`` between neighbouring slices:

    x <- (1 - k) D + k x + t sqrt(1 - k) z,  k = t^2/s^2      (predictor, slice by slice)
    x <- x + e S(x) + sqrt(2 e) z,  e = 2 (snr sqrt(n) / ||S||)^2      (corrector)
    u = ADMM round from x on  w/2 ||A u - y||^2 + q/2 ||u - x||^2 + lam ||G u||_1;   x <- x + f (u - x)

``consistency="fixed"`` (published): ``w = 1, q = 0, f = 1`` in prior units: the data step takes the noisy ``x``
for an image; its ``rho`` and ``lam`` belong to the operator they were chosen for, and with one of smaller norm the
splitting outweighs the data. ``consistency="noise"`` (default): ``w = 1/sigma^2, q = 1/t^2`` and
``f = min(1, (s^2 - t^2 + e) / t^2)``, so that ``f (u - x)`` is the step of the two moves above along the gradient
of ``log N(y; A x, sigma^2 + t^2 A A^H)``.

Differences from the published code: the exact adjoint; the likelihood's ``sigma``; the ancestral predictor, whose
mean is that of the published Euler step and which leaves no noise behind at the end; the corrector's step from the
expected norm of the noise, per draw; the first and the last slice are no neighbours; no Kaczmarz sweep. An image
without ``z`` is one slice and has no neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from invdiff.errors import InvdiffError
from invdiff.primitives import ddim, langevin
from invdiff.primitives.total_variation import tv_step
from invdiff.rng import Streams
from invdiff.sampler import Context, Sampler, State
from invdiff.spaces import norm, per_row


@dataclass(frozen=True, kw_only=True)
class DiffusionMBIR(Sampler):
    """Predictor, corrector and ADMM round per level; two evaluations per slice and level.

    Args:
        lam: Weight of the total variation across slices.
        rho: Weight of ADMM's splitting, in units of ``q`` for ``noise``, absolute for ``fixed``.
        snr: Length of the corrector's step relative to the noise; 0 leaves it out, with its evaluation.
        consistency: ``noise`` or ``fixed``.
        cg_iterations: Conjugate-gradient steps per round.
    """

    name: ClassVar[str] = "mbir"
    title: ClassVar[str] = "DiffusionMBIR: volumes from a prior of slices, total variation across slices"
    reference: ClassVar[str] = "Chung et al., CVPR 2023, arXiv:2211.10655"
    requires: ClassVar[frozenset[str]] = frozenset({"linear", "quadratic"})
    _published = {"steps": 2000, "schedule": "geometric", "sigma_min": 0.01, "consistency": "fixed"}
    presets: ClassVar = {
        "published-ct": {**_published, "rho": 10.0, "lam": 0.04, "cg_iterations": 1},
        "published-mri": {**_published, "rho": 0.01, "lam": 0.005, "cg_iterations": 1},
    }

    steps: int = 200
    schedule: Literal["edm", "geometric", "vp", "vp-quadratic"] = "geometric"
    sigma_min: float | None = 0.01
    lam: float = 1.0
    rho: float = 1.0
    snr: float = 0.16
    consistency: Literal["noise", "fixed"] = "noise"
    cg_iterations: int = 8

    def init(self, ctx: Context, rows: int, rng: Streams) -> State:
        """Noise, and ADMM's variables at 0."""
        x = ctx.noise(rng, rows) * float(ctx.sigmas[0])
        return {"x": x, "split": torch.zeros_like(x), "dual": torch.zeros_like(x)}

    def step(self, k: int, state: State, ctx: Context, rng: Streams) -> State:
        """Predictor, corrector, ADMM round."""
        x, (s, t) = state["x"], ctx.level(k)
        x = ddim(x, ctx.denoise(x, s), s, t, 1.0, ctx.noise(rng, x.shape[0]))
        moved = torch.full((x.shape[0],), s * s - t * t, dtype=x.dtype, device=x.device)
        if self.snr and t:
            score = (ctx.denoise(x, t) - x) / t**2
            e = 2 * ctx.space.size * (self.snr / norm(score)) ** 2
            x, moved = langevin(x, lambda _: score, e, 1, rng), moved + e
        if t == 0 and self.consistency == "noise":
            return {**state, "x": x}
        split, dual, share = state["split"], state["dual"], moved / (t * t) if t else moved
        q, weight = self._weights(t, ctx)
        rho = self.rho * q if self.consistency == "noise" else self.rho
        axis = 1 + ctx.space.dims.index("z") if "z" in ctx.space.dims else None
        most = self.cg_iterations
        u, split, dual = tv_step(ctx.measured, x, q, weight, split, dual, axis, self.lam, rho, max_iter=most)
        if self.consistency == "noise":
            u = x + per_row(share.clamp_max(1.0), x) * (u - x)
        return {"x": u, "split": split, "dual": dual}

    def _weights(self, t: float, ctx: Context) -> tuple[float, Tensor]:
        """Return ``q`` and ``w``."""
        problem = ctx.measured
        if self.consistency == "fixed":
            gain = torch.ones(()) if problem.gain is None else problem.gain
            return 0.0, per_row(1 / gain**2, problem.y)
        sigma = problem.sigma(problem.y)
        if bool((sigma == 0).any()):
            raise InvdiffError(
                f"{self.name} weighs the data by the noise level, which is 0; set consistency='fixed', or give "
                "the likelihood a noise level above 0."
            )
        return 1 / t**2, 1 / sigma**2
