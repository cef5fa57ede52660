"""How long one draw takes, from one network evaluation and one step, before the whole is begun."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from invdiff import memory
from invdiff.plan import Plan
from invdiff.rng import INIT


@dataclass(frozen=True)
class Cost:
    """What a run would take.

    Attributes:
        evaluation_s: Seconds of one network evaluation of one batch (with its reverse pass, where the sampler asks
            for derivatives of the network).
        chunk_s: Seconds from the first step to the last of one batch.
        draws: Draws per case that one batch holds.
        ensemble: Whether these draws cannot be made one by one.
    """

    evaluation_s: float
    chunk_s: float
    draws: float
    ensemble: bool

    @property
    def least_s(self) -> float:
        """Seconds of the least that can be run: one draw of every case, or the ensemble."""
        return self.chunk_s if self.ensemble else self.chunk_s / self.draws

    def affordable(self, seconds: float) -> int:
        """Return the number of draws that fit."""
        whole = int(self.draws * (seconds // self.chunk_s))
        return whole if whole or self.ensemble else int(seconds / self.least_s)


def estimate(plan: Plan, max_batch: int | None, patience_s: float) -> Cost:
    """Time one evaluation and, where the whole could fit into ``patience_s`` after that, one step in the middle.

    On a CPU one row is timed, elsewhere the batch that a run would use; an ensemble is timed whole.

    Args:
        plan: The run.
        max_batch: Most rows at once.
        patience_s: Seconds beyond which the sampler will not be run anyway.
    """
    device, cases = plan.target.device, plan.target.cases
    rows = plan.unit
    if device.type != "cpu":
        rows = max(rows, min(memory.start_batch(plan.canvas, plan.rows, device), max_batch or plan.rows))
    ctx, rng, _ = plan.context(0, rows)
    ensemble = plan.sampler.kind == "ensemble"
    batches = cases if ensemble else 1  # ensembles go case by case
    draws = float(plan.draws) if ensemble else rows / cases

    def evaluate() -> None:
        x = ctx.noise(rng.at(INIT), rows) * float(ctx.sigmas[0])
        if "denoiser-vjp" in plan.sampler.requires:
            d, pull = ctx.denoise.vjp(x, float(ctx.sigmas[0]))
            pull(d)
        else:
            ctx.denoise(x, float(ctx.sigmas[0]))

    with torch.no_grad():
        evaluation_s = timed(evaluate, device)
        # A step takes at least one evaluation.
        lower = Cost(evaluation_s, batches * evaluation_s * plan.steps, draws, ensemble)
        if lower.least_s > patience_s:
            return lower
        state = plan.sampler.init(ctx, rows, rng.at(INIT))
        state = plan.sampler.step(0, state, ctx, rng.at(0))  # what is computed once is computed here
        middle = plan.steps // 2
        step_s = timed(lambda: plan.sampler.step(middle, state, ctx, rng.at(middle)), device, warm=False)
    return Cost(evaluation_s, batches * step_s * plan.steps, draws, ensemble)


def timed(function: Callable[[], Any], device: torch.device, warm: bool = True) -> float:
    """Return the seconds of one call, after one that is not timed."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    if warm:
        function()
    wait()
    start = time.perf_counter()
    function()
    wait()
    return max(time.perf_counter() - start, 1e-9)
