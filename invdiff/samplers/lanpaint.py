"""LanPaint: Langevin inpainting with bidirectional guidance (Zheng, Lan, Wang, TMLR 2025).

Known coordinates are those that ``A`` sees, with projection ``P``; ``ybar = A^H y / c^2`` is the data there and
``sigma`` its noise. At each level ``s``, ``inner`` Langevin moves on the law of ``x`` at that level with the drift

    unknown:  (D - x) / s^2                                       the score
    known:    (D - x) / s^2 + (1 + lam_s) (ybar - D) / (s^2 + sigma^2)

then one step of the outer chain with ``D`` drawn to the data, ``D + P (ybar - D) s^2 / (s^2 + sigma^2)``. The
known part is driven beyond the data by ``lam`` times what ``D`` is off, so that the unknown part feels the data
and not only their noised copy. Without noise this is the published drift ``((1 + lam)(ybar - x) - lam (D - x)) /
s^2``. ``lam_s = lam (s^2 / (s^2 + sigma^2))^2`` fades out below the noise of the data, where the law of the moves
is the posterior.

Differences from the published code: noisy data (the code knows ``sigma = 0`` only); any ``A`` with ``A^H A =
c^2 P`` (masks in image or Fourier space), found out by applying ``A^H A`` twice; variance-exploding frame, where
the step over ``s^2`` is the same number; moves by the scheme of Leimkuhler and Matthews, whose width is exact for
Gaussians, in place of the Ornstein-Uhlenbeck integrator with frozen drift (``order=1``); stochastic outer step of
second order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from invdiff.errors import CapabilityError, InvdiffError
from invdiff.operator import LinearOperator
from invdiff.primitives import ddim, extrapolate
from invdiff.problem import Problem
from invdiff.rng import Streams
from invdiff.sampler import Context, Sampler, State
from invdiff.spaces import norm, per_row, real_inner


@dataclass(frozen=True, kw_only=True)
class LanPaint(Sampler):
    """Langevin inpainting; ``inner + 1`` evaluations per step, no network gradient.

    Args:
        inner: Langevin moves per level.
        step_size: Step of the moves over ``s^2``.
        lam: Strength of the bidirectional guidance.
        beta: Factor on the step of known coordinates.
        eta: Stochasticity of the outer step.
        order: 1 (published) or 2, of moves and outer step.
    """

    name: ClassVar[str] = "lanpaint"
    title: ClassVar[str] = "Langevin inpainting with bidirectional guidance"
    reference: ClassVar[str] = "Zheng, Lan, Wang, TMLR 2025, arXiv:2502.03491"
    requires: ClassVar[frozenset[str]] = frozenset({"linear", "quadratic"})
    presets: ClassVar = {
        "published": {"steps": 30, "inner": 5, "step_size": 0.2, "lam": 5.0, "eta": 0.0, "order": 1},
        "fast": {"inner": 5},
    }

    steps: int = 100
    schedule: Literal["edm", "geometric", "vp", "vp-quadratic"] = "geometric"
    sigma_min: float | None = 0.01
    inner: int = 10
    step_size: float = 0.3
    lam: float = 3.0
    beta: float = 1.0
    eta: float = 1.0
    order: Literal[1, 2] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order == 2 and self.step_size * max(1.0, self.beta * (1 + self.lam)) >= 2:
            raise InvdiffError("lanpaint: step_size (1 + lam) beta must stay below 2, or the moves diverge.")

    def init(self, ctx: Context, rows: int, rng: Streams) -> State:
        """Start from noise; find ``c^2``, and whether ``A^H A`` is a multiple of a projection at all."""
        state = super().init(ctx, rows, rng)
        problem, a = ctx.measured, _linear(ctx.measured)
        seen = a.normal(ctx.noise(rng, rows).to(a.domain.dtype))
        twice = a.normal(seen)
        gain2 = real_inner(seen, twice) / real_inner(seen, seen).clamp_min(1e-300)
        if bool((norm(twice - per_row(gain2, seen) * seen) > 1e-3 * norm(twice)).any()):
            raise CapabilityError(
                f"lanpaint is for inpainting, where A^H A is a multiple of a projection, and {a.name} is no mask; "
                "samplers that would do: pnpdm, dds."
            )
        if problem.sigma(state["x"]).numel() not in (1, rows):
            raise CapabilityError("lanpaint takes one noise level per case, and sigma varies over the data.")
        return {**state, "gain2": gain2.to(ctx.dtype)}

    def step(self, k: int, state: State, ctx: Context, rng: Streams) -> State:
        """Langevin moves at one level, and a step to the next."""
        x, (s, t) = state["x"], ctx.level(k)
        problem, a, gain2 = ctx.measured, _linear(ctx.measured), per_row(state["gain2"], state["x"])
        share = s * s / (s * s + per_row(problem.sigma(x).reshape(-1), x) ** 2 / gain2)
        over = 1 + self.lam * share**2
        h = torch.as_tensor(self.step_size, dtype=gain2.dtype)
        h_known = self.beta * h
        if self.order == 2:
            pull, pull_known, width, width_known = h, h_known, (h / 2).sqrt(), (h_known / 2).sqrt()
        else:
            pull, pull_known = -torch.expm1(-h), -torch.expm1(-over * h_known) / over
            width, width_known = (-torch.expm1(-2 * h)).sqrt(), (-torch.expm1(-2 * over * h_known) / over).sqrt()

        def look(u: Tensor) -> tuple[Tensor, Tensor]:
            """``D`` and ``P (ybar - D) s^2 / (s^2 + sigma^2)``."""
            d = ctx.denoise(u, s)
            return d, share * a.adjoint(problem.residual(d)).to(d.dtype) / gain2

        last = ctx.noise(rng, len(x))
        for _ in range(self.inner):
            d, off = look(x)
            drift, fresh = d - x + over * off, ctx.noise(rng, len(x))
            z, last = s * (last + fresh if self.order == 2 else fresh), fresh
            more = (pull_known - pull) * drift + (width_known - width) * z
            x = x + pull * drift + width * z + a.normal(more.to(a.domain.dtype)).to(x.dtype) / gain2
        d, off = look(x)
        d = d + off
        ahead = extrapolate(d, state.get("d") if self.order == 2 else None, ctx.sigmas, k)
        noise = ctx.noise(rng, len(x)) if self.eta else None
        return {"x": ddim(x, ahead, s, t, self.eta, noise), "d": d, "gain2": state["gain2"]}


def _linear(problem: Problem) -> LinearOperator:
    assert isinstance(problem.operator, LinearOperator)
    return problem.operator
