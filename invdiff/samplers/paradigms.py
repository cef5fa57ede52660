"""ParaDiGMS: a chain of steps solved in parallel (Shih, Belkhale, Ermon, Sadigh, Anari, NeurIPS 2023).

The steps ``x_{i+1} = F_i(x_i, D(x_i, s_i))`` of any sampler that asks the network once are solved for a window of
levels. One round asks the network at the guesses ``p_i`` of all levels in one batch, then runs through them with

    D(x_i, s_i) ~ D(p_i, s_i) + r0^2 / (r0^2 + s_i^2) (x_i - p_i)

and moves the window on to the first level whose guess is off by more than ``tol``: by one level at least, because
the first guess is exact. The network sees ``W`` rows for one; what else a step does stays serial. The fixed point
is the base sampler's own chain, random numbers included.

Differences from the published code: the linear term (Picard sums in the variance-preserving frame imply it);
conditional, stochastic and multistep samplers (what they keep of former steps comes from the same round); errors
are relative to the width of the state, not to a noise that deterministic samplers do not have; each draw has a
window of its own; new guesses follow the last denoised image instead of repeating the last state.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from invdiff.errors import InvdiffError
from invdiff.primitives.picard import FlowSteps, Lagged, shift_path, where_rows
from invdiff.prior import Prior
from invdiff.rng import Streams
from invdiff.sampler import Context, Sampler, State
from invdiff.spaces import norm

_GRID = ("steps", "schedule", "sigma_max", "sigma_min")


@dataclass(frozen=True, kw_only=True)
class Parallel(Sampler):
    """Any sampler of one evaluation per step, several levels at once; the statistic ``rounds`` counts the calls.

    Args:
        base: The sampler; its grid (``steps``, ``schedule``, ends) holds. None draws from the prior by the
            probability flow.
        window: Levels at once; rows times window go through the network together.
        tol: Largest accepted change of a guess, relative to the width of the state.
    """

    name: ClassVar[str] = "paradigms"
    title: ClassVar[str] = "ParaDiGMS: steps of a sampler in parallel"
    reference: ClassVar[str] = "Shih et al., NeurIPS 2023, arXiv:2305.16317"
    exactness: ClassVar = "asymptotic"
    conditional: ClassVar[bool] = False

    base: Sampler | None = None
    window: int = 8
    tol: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.window, int) or self.window < 1 or not self.tol >= 0:
            raise InvdiffError(f"paradigms needs window >= 1 and tol >= 0, got {self.window!r} and {self.tol!r}.")
        base = self._chain
        if base.kind == "ensemble" or "denoiser-vjp" in base.requires:
            raise InvdiffError(
                f"paradigms serves samplers that move each draw by itself and take no gradient of the network, "
                f"unlike {base.name}; ddim, dpmpp, dds and diffpir are among them."
            )
        for name in (*_GRID, "kind", "exactness", "requires", "conditional") if self.base else ():
            object.__setattr__(self, name, getattr(base, name))

    @property
    def _chain(self) -> Sampler:
        return self.base or FlowSteps(**{name: getattr(self, name) for name in _GRID})

    def sigmas(self, prior: Prior) -> Tensor:
        """Return the grid of the base."""
        return self._chain.sigmas(prior)

    def describe(self) -> dict[str, Any]:
        """Return the configuration with that of the base."""
        own = super().describe()
        return {**own, "config": {**own["config"], "base": self._chain.describe()}}

    def init(self, ctx: Context, rows: int, rng: Streams) -> State:
        """Start of the base; the guesses are the start, shrunk to their levels."""
        state = self._chain.init(ctx, rows, rng)
        x, window = state["x"], min(self.window, len(ctx.sigmas) - 1)
        shrink = (ctx.sigmas[:window] / ctx.sigmas[0]).to(x)
        points = x[:, None] * shrink.reshape(1, -1, *([1] * (x.ndim - 1)))
        zero = torch.zeros(rows, dtype=torch.long, device=x.device)
        return {**state, "points": points, "level": zero, "rounds": zero.clone()}

    def step(self, k: int, state: State, ctx: Context, rng: Streams) -> State:
        """One round; nothing where all draws have arrived."""
        points, level, last = state["points"], state["level"], len(ctx.sigmas) - 1
        live = level < last
        if not bool(live.any()):
            return state
        rows, window = torch.arange(len(level), device=level.device), points.shape[1]
        sigmas, index = ctx.sigmas.to(points), level[:, None] + torch.arange(window, device=level.device)
        inside = index < last
        asked = torch.zeros_like(points)
        asked[inside] = ctx.denoise(points[inside], sigmas[index[inside]])
        ctx.denoise.counts.nfe += int(inside.sum(1).max()) - 1  # the call above counted one
        chain = front = self._own(state)
        path = torch.cat([chain["x"][:, None], points], 1)
        trusted, arrived, r0 = live, level, ctx.spread(None)
        for i in range(int(level[live].min()), min(last, int(level[live].max()) + window)):
            at = i - level
            here, first, at = live & (at >= 0) & (at < window), at == 0, at.clamp(0, window - 1)
            x, guess, width = chain["x"], points[rows, at], (r0**2 + float(ctx.sigmas[i]) ** 2) ** 0.5
            off = norm(x - guess) / (x[0].numel() ** 0.5 * width)
            trusted = trusted & (~here | first | (off <= self.tol))
            lagged = Lagged(ctx.denoise, guess, asked[rows, at], (r0 / width) ** 2)
            moved = self._chain.step(i, chain, replace(ctx, denoise=lagged), rng.at(i))
            chain, front = where_rows(here, moved, chain), where_rows(here & trusted, moved, front)
            arrived = torch.where(here & trusted, i + 1, arrived)
            path[rows[here], at[here] + 1] = chain["x"][here]
        ahead = shift_path(path, chain.get("d", asked[:, -1]), level, arrived, sigmas)
        return {**front, "points": ahead, "level": arrived, "rounds": state["rounds"] + live}

    def finish(self, state: State, ctx: Context) -> Tensor:
        """Return the draws of the base."""
        return self._chain.finish(self._own(state), ctx)

    def _own(self, state: State) -> State:
        """The base's part of the state."""
        return {key: v for key, v in state.items() if key not in ("points", "level", "rounds")}
