"""EnsembleScore: posterior score from a weighted ensemble of prior draws (after Riel, Bischoff 2024).

The paper estimates the score of a density known up to a constant from an ensemble, without gradients. A
diffusion prior has no density to evaluate, but it can be drawn from. The ``J`` draws of a case first become
``J`` draws ``xi_j`` of the prior (probability-flow ODE, second order), each given ``L_j = log p(y | A(xi_j))``,
the only use of the operator. Then new noise is taken through the reverse diffusion with

    D_y(x, s) = sum_j w_j xi_j + [D(x, s) - sum_j v_j xi_j],   v_j ~ N(x; xi_j, s^2 I),   w_j ~ v_j exp(tau L_j)

(weights normalised over ``j``). The first sum is the self-normalised importance estimate of the posterior mean
of ``x0`` given ``x``; the bracket, 0 for ``J`` without bound, is a control variate: the same estimate without
data, against the denoiser that is its limit. A row whose ``w`` have an effective number below ``switch`` goes
without it, and ends near one of the ``xi_j``.

What is estimated: the posterior, as ``J`` and the steps grow. With finite ``J`` everything depends on how many
prior draws the data leave alive, ``1 / sum_j (weight)^2``. Where these are fewer than ``least`` the likelihood
is tempered (``tau < 1``, with a warning) until they are not, and the draws come from a law between prior and
posterior: too wide, never confident by collapse. That is the rule beyond a few precisely measured directions.

Differences from the published method: the proposal is the prior itself (no Gaussian fit, no affine
preconditioning); the control variate; the tempering.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from invdiff.conditioning import stack_real
from invdiff.primitives import ddim, extrapolate, groups, renoise, resample
from invdiff.prior import Prior
from invdiff.rng import Streams
from invdiff.sampler import Context, Sampler, State


@dataclass(frozen=True, kw_only=True)
class EnsembleScore(Sampler):
    """Score of the weighted prior ensemble; ``prior_steps + steps`` evaluations, one of the operator per draw.

    Args:
        steps: Levels of the guided diffusion.
        prior_steps: Levels of the prior draws.
        least: Least effective number of prior draws, at most a quarter of them; fewer are tempered.
        switch: Least effective number of a row's weights for which the control variate is used.
    """

    name: ClassVar[str] = "ensemblescore"
    title: ClassVar[str] = "Score of a weighted prior ensemble"
    reference: ClassVar[str] = "Riel, Bischoff, 2024, arXiv:2401.17539"
    kind: ClassVar = "ensemble"
    exactness: ClassVar = "asymptotic"
    requires: ClassVar[frozenset[str]] = frozenset({"noise"})
    presets: ClassVar = {"fine": {"steps": 200, "prior_steps": 80}}

    steps: int = 60
    schedule: Literal["edm", "geometric", "vp", "vp-quadratic"] = "geometric"
    sigma_min: float | None = 0.01
    prior_steps: int = 40
    least: float = 20.0
    switch: float = 5.0

    def sigmas(self, prior: Prior) -> Tensor:
        """Return the noise grid of the prior draws, down to 0, and the one of the guided diffusion after it."""
        return torch.cat(
            [Sampler.sigmas(replace(self, steps=self.prior_steps), prior), Sampler.sigmas(self, prior)]
        )

    def step(self, k: int, state: State, ctx: Context, rng: Streams) -> State:
        """One level of the prior draw, the weighing, or one level of the guided diffusion."""
        x, (s, t) = state["x"], ctx.level(k)
        if s == 0:
            tilt = self._temper(ctx.measured.log_likelihood(x), rng)
            index, _ = resample(tilt, rng)
            return {"x": renoise(x[index], t, ctx.noise(rng, x.shape[0])), "members": x, "tilt": tilt}
        d = ctx.denoise(x, s)
        guided = "members" in state
        kept = {name: state[name] for name in ("members", "tilt")} if guided else {}
        d = self._posterior(x, d, s, state, rng) if guided else d
        ahead = extrapolate(d, state.get("d"), ctx.sigmas, k)
        noise = ctx.noise(rng, x.shape[0]) if guided else None
        return {"x": ddim(x, ahead, s, t, 1.0 if guided else 0.0, noise), "d": d, **kept}

    def _temper(self, log_likelihood: Tensor, rng: Streams) -> Tensor:
        """Return ``tau L``, with the largest ``tau = 0.95^i`` that leaves each case enough prior draws."""
        out = torch.nan_to_num(log_likelihood, nan=-torch.inf, posinf=-torch.inf)
        for _, rows in groups(rng):
            level, alive = out[rows] - out[rows].max(), torch.isfinite(out[rows])
            tau, enough = 1.0, min(self.least, 0.25 * int(alive.sum()))
            while _effective(tau * level[alive]) < enough:
                tau *= 0.95
            if tau < 1:
                warnings.warn(
                    f"ensemblescore: the data leave alive {_effective(level[alive]):.1f} of {len(level)} prior "
                    f"draws; the likelihood is tempered to its power {tau:.2g}, and the draws will be too wide. "
                    "Ask for more draws, or use enkg.",
                    stacklevel=2,
                )
            out[rows] = torch.where(alive, tau * level, -torch.inf)
        return out

    def _posterior(self, x: Tensor, d: Tensor, s: float, state: State, rng: Streams) -> Tensor:
        """Return the estimate of the posterior's denoised image, case by case."""
        out = d.clone()
        for _, rows in groups(rng):
            live = torch.isfinite(state["members"][rows]).flatten(1).all(1) & torch.isfinite(state["tilt"][rows])
            members, tilt = state["members"][rows][live], state["tilt"][rows][live]
            if not len(members):  # the operator can do none of them: nothing is known, and no draw is made up
                out[rows] = torch.nan
                continue
            here, there = stack_real(x[rows]), stack_real(members)
            centre = there.mean(0)
            here, there = here - centre, there - centre
            kernel = (here @ there.T - 0.5 * (there * there).sum(1)) / (s * s)
            v, w = torch.softmax(kernel, 1), torch.softmax(kernel + tilt, 1)
            control = (1 / (w * w).sum(1, keepdim=True) >= self.switch).to(w.dtype)
            flat = members.flatten(1)
            mean = (w - control * v).to(flat.dtype) @ flat + control.to(flat.dtype) * d[rows].flatten(1)
            out[rows] = mean.reshape(d[rows].shape)
        return out


def _effective(log_weight: Tensor) -> float:
    """``1 / sum w^2`` of normalised weights."""
    return float(1 / (torch.softmax(log_weight, 0) ** 2).sum())
