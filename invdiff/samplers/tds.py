"""TDS: twisted diffusion sampler (Wu, Trippe, Naesseth, Blei, Cunningham, NeurIPS 2023).

Sequential Monte Carlo on the prior's chain ``p(x' | x)`` from ``s`` to ``t``, with a twist ``T_s(x)`` that stands
for ``p(y | x)``:

    propose   x' ~ q(x' | x): the prior's kernel with a guided image in place of D
    weight    T_t(x') p(x' | x) / (T_s(x) q(x' | x)); resample where the effective sample size asks for it

``log T = -1/2 e^H (A R A^H + sigma^2)^-1 e`` with ``e = y - A D(x, s)``, and

* ``twist="tweedie"`` (default): ``R = s^2 J``, guided image ``D + R A^H (A R A^H + sigma^2)^-1 e``;
* ``twist="pigdm"``: ``R = r^2 I``, ``r^2 = r0^2 s^2 / (r0^2 + s^2)``, guided image ``D + s^2 grad log T`` as
  published. On images its weights collapse.

Every positive twist, normalised or not, and every proposal give the posterior for many particles and steps; how
many it takes depends on them. The last resampling leaves the draws equally weighted.

Differences from the published code: the noise level and a covariance enter the twist; ``line_search`` bounds the
published guidance, which can diverge; ``order=2`` in kernel and proposal, with the weights of the kernels that are
drawn from; ``mala`` Metropolis-adjusted Langevin moves at the end, which spread duplicates within their modes (the
acceptance ratio is a line integral of ``(D - x)/s^2 + grad log p(y | x)`` at the last level ``s``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from invdiff.primitives import (
    ddim,
    extrapolate,
    gaussian_prox,
    guidance_length,
    log_path_ratio,
    mala,
    particles,
    posterior_score,
    select,
    tweedie_weights,
)
from invdiff.primitives.curvature import prior_stiffness, stiffness
from invdiff.rng import Streams
from invdiff.sampler import Context, Sampler, State
from invdiff.spaces import real_inner


@dataclass(frozen=True, kw_only=True)
class TDS(Sampler):
    """Twisted diffusion sampler; one evaluation per particle and step, and one network VJP or a solve's worth.

    Args:
        twist: ``tweedie`` (ten to forty VJPs per step) or ``pigdm`` (one).
        spread: ``r0`` of ``pigdm``, in prior units; None takes the prior's.
        line_search: Whether the length of the guidance of ``pigdm`` is searched for, as in the PiGDM sampler.
        threshold: Share of effective particles at or below which a case is resampled.
        order: 1 (published) or 2.
        mala: Metropolis-adjusted Langevin moves at the end, three evaluations each.
        tol: Relative residual of the solves.
    """

    name: ClassVar[str] = "tds"
    title: ClassVar[str] = "Twisted diffusion sampler"
    reference: ClassVar[str] = "Wu et al., NeurIPS 2023, arXiv:2306.17775"
    kind: ClassVar = "ensemble"
    exactness: ClassVar = "asymptotic"
    requires: ClassVar[frozenset[str]] = frozenset({"linear", "quadratic", "noise", "denoiser-vjp"})
    _paper = {"steps": 100, "schedule": "vp", "sigma_min": None, "order": 1}
    presets: ClassVar = {
        "published": {**_paper, "twist": "pigdm", "spread": 1.0, "line_search": False},
        "tuned": {"mala": 100},
        "certified": {"steps": 400, "mala": 100},
    }

    steps: int = 100
    schedule: Literal["edm", "geometric", "vp", "vp-quadratic"] = "geometric"
    sigma_min: float | None = 0.003
    twist: Literal["tweedie", "pigdm"] = "tweedie"
    spread: float | None = None
    line_search: bool = True
    threshold: float = 0.5
    order: Literal[1, 2] = 2
    mala: int = 0
    tol: float = 1e-2

    def init(self, ctx: Context, rows: int, rng: Streams) -> State:
        """Start from noise, equally weighted."""
        twist = torch.zeros(rows, dtype=torch.float64, device=ctx.device)
        return {**super().init(ctx, rows, rng), "twist": twist, **particles(rows, rng, ctx.device)}

    def step(self, k: int, state: State, ctx: Context, rng: Streams) -> State:
        """Finish the weights of the last step, resample, propose."""
        x, (s, t) = state["x"], ctx.level(k)
        d, guided, twist = self._twist(x, s, ctx)
        log_weight = state["log_weight"] + twist - state["twist"]
        index, weights = select(state, log_weight, rng, 1.0 if t == 0 else self.threshold)
        state = {key: v[index] for key, v in state.items()}
        x, d, guided, twist = x[index], d[index], guided[index], twist[index]
        new = {"d": d, "guided": guided, "twist": twist, **weights}
        if t == 0:
            return {"x": self._settle(x, guided, s, ctx, rng), **new}
        second = self.order == 2
        free = extrapolate(d, state.get("d") if second else None, ctx.sigmas, k)
        bound = extrapolate(guided, state.get("guided") if second else None, ctx.sigmas, k)
        noise = ctx.noise(rng, x.shape[0])
        new["log_weight"] = weights["log_weight"] + log_path_ratio(free, bound, s, t, noise)
        return {"x": ddim(x, bound, s, t, 1.0, noise), **new}

    def _twist(self, x: Tensor, s: float, ctx: Context) -> tuple[Tensor, Tensor, Tensor]:
        """Return the denoised image, the guided one, and ``log T_s(x)``."""
        problem = ctx.measured
        d, pull = ctx.denoise.vjp(x, s)
        if self.twist == "tweedie":
            w = tweedie_weights(problem, d, pull, s, self.tol)
            guided = d + pull(problem.operator.vjp(d, w))
            return d, guided, -0.5 / s**2 * real_inner(problem.residual(d), w).double()
        r2 = 1 / (1 / s**2 + 1 / ctx.spread(self.spread) ** 2)
        near = gaussian_prox(problem, d, r2, tol=self.tol)
        rest = problem.residual(near) / problem.sigma(near)
        cost = real_inner(rest, rest) + real_inner(near - d, near - d) / r2
        move = (s * s / r2) * pull(near - d)
        if self.line_search:
            move = move * guidance_length(problem, d, near, move)
        return d, d + move, -0.5 * cost.double()

    def _settle(self, x: Tensor, guided: Tensor, s: float, ctx: Context, rng: Streams) -> Tensor:
        """Return the conditional mean, or ``x`` after its Metropolis moves."""
        if not self.mala:
            return guided
        _, pull = ctx.denoise.vjp(x, s)
        own = prior_stiffness(pull, ctx.noise(rng, x.shape[0]), s)
        step = 2.0 / (x[0].numel() ** (1 / 3) * (stiffness(ctx.measured, x) + own))
        return mala(x, posterior_score(ctx.denoise, ctx.measured, s), step, self.mala, rng, nodes=4)[0]
