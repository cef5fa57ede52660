"""Callbacks: watch a run, trace it, stop it early."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from invdiff.sampler import Context, State


@dataclass(frozen=True)
class RunInfo:
    """What a run is about to do: sampler name, rows (cases x draws), steps per row, device."""

    sampler: str
    rows: int
    steps: int
    device: str
    done_rows: int = 0


@dataclass(frozen=True)
class StepInfo:
    """One finished step of one chunk of rows.

    Attributes:
        k: Step, from 0.
        steps: Number of steps.
        sigma, sigma_next: Noise levels of the step.
        rows: ``(case, draw)`` of each row.
        state: The state after the step; read it, do not change it.
        context: The context of the chunk.
        elapsed: Seconds since the run began.
    """

    k: int
    steps: int
    sigma: float
    sigma_next: float
    rows: tuple[tuple[int, int], ...]
    state: State
    context: Context
    elapsed: float


class Callback:
    """Base of callbacks; override what you need."""

    def on_start(self, run: RunInfo) -> None:
        """Called once before the first chunk."""

    def on_step(self, info: StepInfo) -> bool | None:
        """Called after each step; return True to stop the run after keeping the finished draws."""

    def on_chunk(self, rows: int, restarted: bool = False) -> None:
        """Called when a chunk of ``rows`` rows is finished, or given up for want of memory (``restarted``)."""

    def on_end(self) -> None:
        """Called once, whatever happened."""


@dataclass
class Trace(Callback):
    """Record a function of each step, by default the residual norm of the state.

    Args:
        function: ``StepInfo -> value`` (a tensor per row, a number, anything); None records
            ``||y - A x||`` per row, ``(B,)``.
        every: Record every this many steps.
    """

    function: Callable[[StepInfo], Any] | None = None
    every: int = 1
    records: list[dict[str, Any]] = field(default_factory=list)

    def on_step(self, info: StepInfo) -> bool | None:
        """Append one record with ``k``, ``sigma``, ``rows`` and ``value``."""
        if info.k % self.every == 0:
            value = (self.function or _residual)(info)
            self.records.append({"k": info.k, "sigma": info.sigma, "rows": info.rows, "value": value})
        return None


@dataclass
class StopWhen(Callback):
    """Stop the run as soon as ``condition(info)`` is true; finished draws are kept."""

    condition: Callable[[StepInfo], bool]

    def on_step(self, info: StepInfo) -> bool | None:
        """Evaluate the condition."""
        return bool(self.condition(info))


def _residual(info: StepInfo) -> Tensor:
    from invdiff.spaces import norm

    x = info.state.get("x", next(iter(info.state.values())))
    return norm(info.context.measured.residual(x)).detach().cpu()
