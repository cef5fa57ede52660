"""Parts of solving steps in parallel: steps to solve, a denoiser that answers from a guess nearby, guesses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from invdiff.counting import CountedDenoiser
from invdiff.errors import InvdiffError
from invdiff.primitives.transitions import ddim, extrapolate
from invdiff.rng import Streams
from invdiff.sampler import Context, Sampler, State
from invdiff.spaces import per_row


@dataclass(frozen=True, kw_only=True)
class FlowSteps(Sampler):
    """Second-order multistep steps of the probability flow, where no other steps are given."""

    name: ClassVar[str] = "flow"
    conditional: ClassVar[bool] = False

    def step(self, k: int, state: State, ctx: Context, rng: Streams) -> State:
        """One step, one evaluation."""
        d = ctx.denoise(state["x"], ctx.level(k)[0])
        ahead = extrapolate(d, state.get("d"), ctx.sigmas, k)
        return {"x": ddim(state["x"], ahead, *ctx.level(k), 0.0, None), "d": d}


class Lagged(CountedDenoiser):
    """``D(x) ~ D(guess) + slope (x - guess)`` from an answer at hand; once, and without a gradient.

    Args:
        asked: The denoiser itself, for what else samplers read off it.
        guess: Where it was asked, ``(B, ...)``.
        answer: What it answered, ``(B, ...)``.
        slope: A number in place of the Jacobian.
    """

    def __init__(self, asked: CountedDenoiser, guess: Tensor, answer: Tensor, slope: float) -> None:
        super().__init__(asked.denoiser, asked.counts)
        self.guess, self.answer, self.slope, self.used = guess, answer, slope, False

    def __call__(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """Return the answer, moved to ``x``."""
        if self.used:
            raise InvdiffError("Steps run in parallel must ask the network once each, and this sampler asks more.")
        self.used = True
        return self.answer + self.slope * (x - self.guess)

    def vjp(
        self, x: Tensor, sigma: Tensor | float, once: bool = False
    ) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Refuse."""
        raise InvdiffError("Steps run in parallel take no gradient of the network, and this sampler does.")


def where_rows(rows: Tensor, new: dict[str, Tensor], old: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state that is ``new`` in some rows, ``(B,)``; what ``old`` lacks is 0 in the others."""
    out = {}
    for key, value in new.items():
        keep = old.get(key, torch.zeros_like(value))
        out[key] = torch.where(rows.reshape(-1, *([1] * (value.ndim - 1))), value, keep)
    return out


def shift_path(path: Tensor, d: Tensor, level: Tensor, arrived: Tensor, sigmas: Tensor) -> Tensor:
    """Return guesses for the levels ``arrived, arrived + 1, ...``, ``(B, W, ...)``.

    They lie on the path where it leads that far, and beyond its end ``x`` on the straight line towards ``d``,
    ``d + (s' / s) (x - d)``, as a DDIM step of any length does.

    Args:
        path: States at ``level, ..., level + W``, ``(B, W + 1, ...)``.
        d: Denoised image at the end of the path, ``(B, ...)``.
        level: First level of the path, ``(B,)``.
        arrived: First level asked for, ``(B,)``.
        sigmas: The noise grid, ``(K + 1,)``.
    """
    window, end, last = path.shape[1] - 1, path[:, -1], len(sigmas) - 1
    rows, out = torch.arange(len(path), device=path.device), []
    s = sigmas[(level + window).clamp_max(last - 1)]
    for j in range(window):
        at = arrived + j - level
        share = per_row(sigmas[(arrived + j).clamp_max(last)] / s, end)
        beyond = d + share * (end - d)
        out.append(torch.where(per_row(at, end) <= window, path[rows, at.clamp_max(window)], beyond))
    return torch.stack(out, 1)
