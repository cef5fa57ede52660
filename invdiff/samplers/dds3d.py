"""DDS-3D: volumes from a prior of slices, linked by total variation across them (Chung, Lee, Ye, ICLR 2024).

    D = D(x, s) slice by slice;   x0 = ADMM rounds from D on  w/2 ||A u - y||^2 + q/2 ||u - D||^2 + lam ||G u||_1
    x' = x0 + t ( sqrt(1 - eta^2) eps + eta z ),   eps = (x - D) / s  from the uncorrected D

with differences ``G`` between neighbouring slices. ``consistency="noise"`` (default): ``w = 1/sigma^2`` of the
likelihood and ``q = 1/r^2`` with ``r^2 = r0^2 s^2 / (r0^2 + s^2)``, so that the target is ``p(x) p(y | x)
exp(-lam ||G x||_1)``. ``consistency="fixed"``: ``w = 1, q = 0`` in prior units, the published step. ``lam`` counts
in one over prior units; at 0 this is DDS on each slice.

Differences from the published code: the likelihood's ``sigma``; the exact adjoint and Hermitian inner products;
the first and the last slice are no neighbours; split and dual variables belong to each draw; the last level
returns ``x0``; ``order=2`` extrapolates. An image without ``z`` is one slice and has no neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from invdiff.errors import InvdiffError
from invdiff.primitives import extrapolate, gaussian_prox, mix_noise
from invdiff.primitives.total_variation import tv_step
from invdiff.prior import Prior
from invdiff.rng import Streams
from invdiff.sampler import Context, Sampler, State
from invdiff.spaces import per_row


@dataclass(frozen=True, kw_only=True)
class DDS3D(Sampler):
    """DDS with total variation across slices; one evaluation per slice and level, no network gradient.

    Args:
        lam: Weight of the total variation across slices.
        rho: Weight of ADMM's splitting, in units of ``q`` for ``noise``, absolute for ``fixed``.
        rounds: ADMM rounds per level.
        eta: Share of fresh noise, ``sqrt`` of the variance drawn anew.
        consistency: ``noise`` or ``fixed``.
        spread: ``r0``, in prior units; None takes the prior's.
        cg_iterations: Conjugate-gradient steps per round.
        order: 1 (published) or 2, which is nearer to the right width.
    """

    name: ClassVar[str] = "dds3d"
    title: ClassVar[str] = "Decomposed diffusion sampling of volumes, total variation across slices"
    reference: ClassVar[str] = "Chung, Lee, Ye, ICLR 2024, arXiv:2303.05754"
    requires: ClassVar[frozenset[str]] = frozenset({"linear", "quadratic"})
    _published = {"steps": 50, "eta": 0.85, "consistency": "fixed", "order": 1, "rounds": 1, "cg_iterations": 5}
    presets: ClassVar = {
        "published": {**_published, "lam": 0.04, "rho": 10.0},
        "limited-angle": {**_published, "lam": 0.4, "rho": 10.0},
    }

    steps: int = 40
    sigma_min: float | None = 0.01
    lam: float = 0.3
    rho: float = 1.0
    rounds: int = 5
    eta: float = 0.85
    consistency: Literal["noise", "fixed"] = "noise"
    spread: float | None = None
    cg_iterations: int = 8
    order: Literal[1, 2] = 2

    def sigmas(self, prior: Prior) -> Tensor:
        """Return the noise grid, by default from 40 times the width of the prior, as for slices alone."""
        start = self.sigma_max or 40 * prior.denoiser.sigma_data
        return Sampler.sigmas(replace(self, sigma_max=start), prior)

    def init(self, ctx: Context, rows: int, rng: Streams) -> State:
        """Noise, and ADMM's variables at 0."""
        x = ctx.noise(rng, rows) * float(ctx.sigmas[0])
        return {"x": x, "split": torch.zeros_like(x), "dual": torch.zeros_like(x)}

    def step(self, k: int, state: State, ctx: Context, rng: Streams) -> State:
        """Denoise, ADMM rounds, DDIM step."""
        x, (s, t), problem = state["x"], ctx.level(k), ctx.measured
        d = ctx.denoise(x, s)
        eps = (x - d) / s
        q = 1 / s**2 + 1 / ctx.spread(self.spread) ** 2
        sigma = problem.sigma(d)
        gain = torch.ones(()) if problem.gain is None else problem.gain
        noise = self.consistency == "noise"
        split, dual = state["split"], state["dual"]
        if self.lam == 0 and noise:
            d = gaussian_prox(problem, d, 1 / q, max_iter=self.cg_iterations, tol=1e-3)
        elif noise and bool((sigma == 0).any()):
            raise InvdiffError(
                f"{self.name} weighs total variation against the noise level, which is 0; set lam=0 or "
                "consistency='fixed', or give the likelihood a noise level above 0."
            )
        else:
            axis = 1 + ctx.space.dims.index("z") if "z" in ctx.space.dims else None
            weight = 1 / sigma**2 if noise else per_row(1 / gain**2, problem.y)
            d, split, dual = tv_step(
                problem,
                d,
                q if noise else 0.0,
                weight,
                split,
                dual,
                axis,
                self.lam,
                self.rho * q if noise else self.rho,
                self.rounds,
                self.cg_iterations,
            )
        ahead = extrapolate(d, state.get("d") if self.order == 2 else None, ctx.sigmas, k)
        fresh = ctx.noise(rng, x.shape[0]) if self.eta else None
        return {"x": mix_noise(ahead, eps, t, self.eta**2, fresh), "d": d, "split": split, "dual": dual}
