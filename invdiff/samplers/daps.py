"""DAPS: decoupled annealing posterior sampling (Zhang et al., CVPR 2025).

At each level ``s``: (1) solve the probability-flow ODE from ``x`` at ``s`` to 0, ``x0``; (2) draw from
``p(u) ~ p(y | A(u)) N(u; x0, r^2 I)`` by Langevin, Hamiltonian moves or exactly; (3) renoise ``x' = u + t z``.

``spread_rule="sigma"`` (published): ``r = s``. ``"tau"``: ``r^2 = r0^2 s^2 / (r0^2 + s^2)``, which does not
grow past the prior's own width ``r0``. The likelihood's noise level is used unless ``tau`` is given: then
``||y - A(u)||^2 / tau^2`` in prior units as in the published code (a Gaussian of level ``tau / sqrt(2)``).

Differences from the published code: the likelihood owns the noise level (the code's tau = 0.01 is a temperature,
not sigma = 0.05); step sizes are relative to the stiffness ``1/r^2 + L/sigma^2`` where ``step_size`` is None;
the velocity of the Hamiltonian moves keeps unit variance; a NaN is flagged, never replaced by zeros;
``ode_order=2`` for second-order ODE steps. By default ``x0`` is the denoised image with the ``tau`` rule, which is
nearest to exact posteriors; published values are the presets.

On a latent prior this is Latent-DAPS: the operator then holds the decoder. The clock is the network's own (the
code of the latent models takes another's), and gradients are not cut off at 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from invdiff import schedule
from invdiff.primitives import gaussian_draw, hmc, langevin, probability_flow, renoise
from invdiff.primitives.curvature import stiffness
from invdiff.rng import Streams
from invdiff.sampler import Context, Sampler, State
from invdiff.spaces import per_row


@dataclass(frozen=True, kw_only=True)
class DAPS(Sampler):
    """DAPS; ``ode_steps`` evaluations and ``moves`` operator gradients per level.

    Args:
        ode_steps: Evaluations of the reverse ODE (1: ``x0`` is the denoised image).
        ode_order: 1 (Euler, published) or 2.
        inner: ``langevin``, ``hmc``, ``exact`` (a Gaussian draw; linear problems only) or ``auto`` (``exact``
            where it can be, else ``langevin``).
        moves: Moves of the inner chain.
        step_size: ``eta_0`` of the paper in prior units; None scales it by the stiffness of the target.
        step_decay: ``delta``: step size falls linearly to this fraction over the run.
        momentum: Momentum of ``hmc``.
        tau: Temperature of the published code; None uses the likelihood.
        spread_rule: ``sigma`` (published) or ``tau``.
        spread: ``r0`` (None: the prior's), or the factor on ``s`` (None: 1) for the ``sigma`` rule.
    """

    name: ClassVar[str] = "daps"
    title: ClassVar[str] = "Decoupled annealing posterior sampling"
    reference: ClassVar[str] = "Zhang et al., CVPR 2025, arXiv:2407.01521"
    requires: ClassVar[frozenset[str]] = frozenset({"vjp"})
    _published = {
        "steps": 200,
        "ode_steps": 5,
        "inner": "langevin",
        "tau": 0.01,
        "step_decay": 0.01,
        "spread_rule": "sigma",
        "schedule": "edm",
        "sigma_max": 100.0,
        "sigma_min": 0.1,
    }
    presets: ClassVar = {
        "super-resolution": {**_published, "step_size": 1e-4},
        "gaussian-deblur": {**_published, "step_size": 1e-4},
        "inpainting": {**_published, "step_size": 1e-4},
        "box-inpainting": {**_published, "step_size": 5e-5},
        "motion-deblur": {**_published, "step_size": 5e-5},
        "phase-retrieval": {**_published, "step_size": 5e-5},
        "nonlinear-deblur": {**_published, "step_size": 1e-5, "moves": 200},
        "hdr": {**_published, "step_size": 2e-5},
        "super-resolution-hmc": {**_published, "inner": "hmc", "moves": 12, "step_size": 1.04e-4, "momentum": 0.9},
        "gaussian-deblur-hmc": {**_published, "inner": "hmc", "moves": 82, "step_size": 4e-5, "momentum": 0.1},
        "inpainting-hmc": {**_published, "inner": "hmc", "moves": 11, "step_size": 3.6e-5, "momentum": 0.8},
        "published": {**_published, "step_size": 1e-4},
        "latent-super-resolution": {
            **_published,
            "steps": 50,
            "sigma_max": 10.0,
            "ode_steps": 2,
            "inner": "hmc",
            "moves": 24,
            "step_size": 1.35e-4,
            "step_decay": 0.023,
            "momentum": 0.86,
        },
        "tuned": {"steps": 200},
    }

    steps: int = 100
    schedule: Literal["edm", "geometric", "vp", "vp-quadratic"] = "geometric"
    ode_steps: int = 1
    ode_order: Literal[1, 2] = 1
    inner: Literal["auto", "langevin", "hmc", "exact"] = "auto"
    moves: int = 100
    step_size: float | None = None
    step_decay: float = 1.0
    momentum: float = 0.9
    tau: float | None = None
    spread_rule: Literal["sigma", "tau"] = "tau"
    spread: float | None = None
    sigma_min: float | None = 0.02

    def step(self, k: int, state: State, ctx: Context, rng: Streams) -> State:
        """Reverse ODE, inner chain, renoise."""
        x, (s, t) = state["x"], ctx.level(k)
        problem = ctx.measured
        low = min(0.01, s / 10)
        grid = schedule.edm(self.ode_steps, low, s).tolist() if self.ode_steps > 1 else [s, 0.0]
        x0 = probability_flow(ctx.denoise, x, grid, second_order=self.ode_order == 2)
        r2 = (
            ((self.spread or 1.0) * s) ** 2
            if self.spread_rule == "sigma"
            else 1 / (1 / s**2 + 1 / ctx.spread(self.spread) ** 2)
        )
        gaussian = {"linear", "quadratic"} <= problem.capabilities
        if self.inner == "exact" or (self.inner == "auto" and gaussian):
            u = gaussian_draw(problem, x0, r2, rng)
        else:
            gain = torch.ones(()) if problem.gain is None else problem.gain

            def score(u: Tensor) -> Tensor:
                if self.tau is None:
                    pull = problem.grad_log_likelihood(u)
                else:
                    back = problem.operator.vjp(u, problem.residual(u))
                    pull = 2 * back / per_row(gain**2 * self.tau**2, back)
                return pull - (u - x0) / r2

            decay = 1 + (k / len(ctx.sigmas)) * (self.step_decay - 1)
            fixed = self.step_size  # a fifth of the inverse stiffness of the target is stable
            step = decay * (0.2 / (stiffness(problem, x0, 8) + 1 / r2) if fixed is None else fixed)
            if self.inner == "hmc":
                u = hmc(x0, score, step, self.moves, self.momentum, rng)
            else:
                u = langevin(x0, score, step, self.moves, rng)
        return {"x": u if t == 0 else renoise(u, t, ctx.noise(rng, x.shape[0]))}
