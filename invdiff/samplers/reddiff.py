"""RED-diff: regularisation by denoising diffusion, a point estimate (Mardani, Song, Kautz, Vahdat, ICLR 2024).

An optimiser on ``mu``: for descending levels ``s``, with ``x = mu + s n`` and ``eps = (x - D(x, s)) / s``
(no gradient through the network),

    G = -A^H(y - A mu) / m + lam w(s) (eps - n) / d,      mu <- Adam(mu, G)

with ``m`` data and ``d`` unknowns, data in prior units, and ``w(s) = s`` by default, for which the second term is
``lam (mu - D(mu + s n)) / d``.

It seeks a mode: the draws differ by their noise alone and are stored as an estimate, never as uncertainty.

Differences from the published code: means are taken per draw, not over the batch; ``balance="likelihood"`` uses
``grad log p(y | A mu)`` and ``lam w(s) (eps - n) / s^2`` instead, in which the noise level counts and the ratio of
data to unknowns does not; the start is a regularised pseudo-inverse; the operator is the same at every call.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from invdiff.primitives import adam, gaussian_prox
from invdiff.rng import Streams
from invdiff.sampler import Context, Sampler, State
from invdiff.spaces import per_row


@dataclass(frozen=True, kw_only=True)
class REDdiff(Sampler):
    """RED-diff; one evaluation and one operator gradient per step, no network gradient.

    Args:
        lam: Weight of the prior term.
        lr: Adam's learning rate, in prior units.
        weighting: ``linear`` (``w = s``), ``sqrt``, ``square``, ``log``, ``clip`` or ``const``.
        balance: ``means`` (published) or ``likelihood``.
        start: ``pinv`` (regularised pseudo-inverse of the data) or ``zero``.
    """

    name: ClassVar[str] = "reddiff"
    title: ClassVar[str] = "Regularisation by denoising diffusion (point estimate)"
    reference: ClassVar[str] = "Mardani et al., ICLR 2024, arXiv:2305.04391"
    kind: ClassVar = "point"
    requires: ClassVar[frozenset[str]] = frozenset({"vjp"})
    presets: ClassVar = {
        "published": {"lam": 0.25, "lr": 0.1},
        "tuned": {"lam": 1.0, "lr": 0.1},
        "likelihood": {"lam": 1.0, "lr": 0.05, "steps": 500, "weighting": "square", "balance": "likelihood"},
        "gaussian-deblur": {"lam": 0.25, "lr": 0.5},
        "inpainting": {"lam": 0.25, "lr": 0.25},
        "inpainting-noisy": {"lam": 1.0, "lr": 0.25},
        "phase-retrieval": {"lam": 0.25, "lr": 0.5},
        "hdr": {"lam": 0.25, "lr": 0.5},
        "inversebench": {"lam": 0.25, "lr": 0.02, "weighting": "const", "start": "zero"},
    }

    steps: int = 1000
    schedule: Literal["edm", "geometric", "vp", "vp-quadratic"] = "vp"
    lam: float = 0.25
    lr: float = 0.1
    weighting: Literal["linear", "sqrt", "square", "log", "clip", "const"] = "linear"
    balance: Literal["means", "likelihood"] = "means"
    start: Literal["pinv", "zero"] = "pinv"

    def init(self, ctx: Context, rows: int, rng: Streams) -> State:
        """Start from the data, with empty moments."""
        mu = torch.zeros(rows, *ctx.space.shape, dtype=ctx.dtype, device=ctx.device)
        problem = ctx.measured
        if self.start == "pinv" and {"linear", "quadratic"} <= problem.capabilities:
            mu = gaussian_prox(problem, mu, 1e2)
        return {"mu": mu, "m": torch.zeros_like(mu), "v": torch.zeros_like(mu)}

    def step(self, k: int, state: State, ctx: Context, rng: Streams) -> State:
        """One Adam step."""
        mu, s = state["mu"], float(ctx.sigmas[k])
        problem = ctx.measured
        n = ctx.noise(rng, mu.shape[0])
        x = mu + s * n
        push = (x - ctx.denoise(x, s)) / s - n
        if self.balance == "likelihood":
            gradient = self.lam * self._weight(s) * push / (s * s) - problem.grad_log_likelihood(mu)
        else:
            gain = torch.ones(()) if problem.gain is None else problem.gain
            residual = problem.residual(mu)
            back = problem.operator.vjp(mu, residual)
            count = residual[0].numel() * (2 if residual.is_complex() else 1)
            gradient = self.lam * self._weight(s) * push / mu[0].numel() - back / per_row(gain**2 * count, back)
        mu, (m, v) = adam(mu, gradient.to(mu.dtype), (state["m"], state["v"]), k, self.lr)
        return {"mu": mu, "m": m, "v": v}

    def finish(self, state: State, ctx: Context) -> Tensor:
        """Return the point estimate."""
        return state["mu"]

    def _weight(self, s: float) -> float:
        return {
            "linear": s,
            "sqrt": math.sqrt(s),
            "square": s * s,
            "log": math.log1p(s),
            "clip": min(s, 1.0),
            "const": 1.0,
        }[self.weighting]
