"""SCG: stochastic control guidance (Huang, Ghatare, Liu and others, ICML 2024).

At each level draw ``M`` candidates from the reverse kernel, denoise each at the next level, and keep one:

    x'_m = ancestral(x, D; t),     l_m = -log p(y | A(D(x'_m, t)))

Candidate ``m`` is kept with probability proportional to ``exp(-l_m / temperature)``; at ``temperature`` 0
(published) it is the best. None is chosen in the first ``theta`` share of the levels, nor on the step to 0.

At ``temperature`` 1 (default) this is Bayes' rule for the reverse kernel but for two errors that pull against
each other: the likelihood of the denoised image is sharper than that of the noisy one, which makes draws too
narrow as ``M`` and the levels grow, and ``M`` random tries reach few of the measured directions, which leaves
them too wide while ``M`` and the levels are few. Keeping the best is greedy: the width then is not that of the
noise level.

Differences from the published code: on the first guided level a candidate is chosen like on all others (the
public code puts the denoised image there, at a high noise level); the likelihood of any noise model in place of
a squared residual; second-order transitions (``order=1`` is published); a candidate that the operator cannot do
(NaN) is never chosen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from invdiff.primitives import ddim, extrapolate
from invdiff.rng import Streams
from invdiff.sampler import Context, Sampler, State
from invdiff.spaces import per_row


@dataclass(frozen=True, kw_only=True)
class SCG(Sampler):
    """Stochastic control guidance; ``M`` evaluations of denoiser and operator per guided level, no gradient.

    Args:
        candidates: ``M``.
        theta: Share of the levels before guidance begins.
        temperature: 1 chooses by the likelihood, 0 keeps the best candidate (published).
        order: 1 (published) or 2.
    """

    name: ClassVar[str] = "scg"
    title: ClassVar[str] = "Stochastic control guidance"
    reference: ClassVar[str] = "Huang et al., ICML 2024, arXiv:2402.14285"
    requires: ClassVar[frozenset[str]] = frozenset()
    _published = {"steps": 1000, "schedule": "vp", "sigma_min": None, "temperature": 0.0, "order": 1}
    presets: ClassVar = {
        "published": {**_published, "candidates": 512},
        "black-hole": {**_published, "candidates": 1024},
        "faces": {**_published, "candidates": 256},
    }

    steps: int = 100
    schedule: Literal["edm", "geometric", "vp", "vp-quadratic"] = "geometric"
    sigma_min: float | None = 0.01
    candidates: int = 32
    theta: float = 0.25
    temperature: float = 1.0
    order: Literal[1, 2] = 2

    def step(self, k: int, state: State, ctx: Context, rng: Streams) -> State:
        """Draw candidates and keep one of each row's."""
        x, (s, t) = state["x"], ctx.level(k)
        d = state["next"] if "next" in state else ctx.denoise(x, s)
        ahead = extrapolate(d, state.get("d") if self.order == 2 else None, ctx.sigmas, k)
        if k < int(self.theta * self.steps) or t == 0:
            return {"x": ddim(x, ahead, s, t, 1.0, ctx.noise(rng, x.shape[0])), "d": d}
        best = kept = score = None
        for _ in range(self.candidates):
            tried = ddim(x, ahead, s, t, 1.0, ctx.noise(rng, x.shape[0]))
            denoised = ctx.denoise(tried, t)
            value = self._score(denoised, ctx, rng)
            if best is None or kept is None or score is None:
                best, kept, score = tried, denoised, value
                continue
            better = per_row((value > score).to(x.dtype), x) > 0
            best, kept = torch.where(better, tried, best), torch.where(better, denoised, kept)
            score = torch.maximum(value, score)
        assert best is not None and kept is not None
        return {"x": best, "d": d, "next": kept}

    def _score(self, d: Tensor, ctx: Context, rng: Streams) -> Tensor:
        """Return what the kept candidate has most of: ``-l``, or ``-l / temperature`` plus Gumbel noise."""
        score = torch.nan_to_num(ctx.measured.log_likelihood(d), nan=-torch.inf)
        if self.temperature == 0:
            return score
        u = rng.uniform(score).clamp_min(torch.finfo(score.dtype).tiny)
        return score / self.temperature - (-u.log()).log()
