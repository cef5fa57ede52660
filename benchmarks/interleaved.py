"""Time functions in turn, round after round, so that load on the machine falls on all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TypeVar

#: Direction ("forward", "adjoint", "normal", "prox", ...) to what is timed.
Runs = dict[str, Callable[[], object]]
#: What builds a candidate for a batch size, with input of its own.
Make = Callable[[int], Runs]
Key = TypeVar("Key", bound=Hashable)

#: Processor seconds that a call is repeated for within one round.
_LEAST = 0.02


@dataclass(frozen=True)
class Group:
    """Candidates that do the same.

    Args:
        title: What they do.
        text: Sentences on what the rows are.
        candidates: Makes the candidates by name. Those of this package begin with "invdiff"; the first that begins
            with "deepinv" is what others are compared with.
        batches: Batch sizes.
        memory: Names whose peak memory is measured too.
        error: Relative error of what a forward run of one row returned, where candidates differ in it.
    """

    title: str
    text: str
    candidates: Callable[[], dict[str, Make]]
    batches: tuple[int, ...] = (1, 16)
    memory: tuple[str, ...] = ()
    error: Callable[[object], float] | None = None


def measure(runs: dict[Key, Callable[[], object]], rounds: int) -> dict[Key, tuple[list[float], list[float]]]:
    """Return processor and wall times in milliseconds, one per round, after a round that does not count.

    Short functions are called again within a round, and the mean counts.
    """
    times: dict[Key, tuple[list[float], list[float]]] = {key: ([], []) for key in runs}
    for run in runs.values():
        run()
    for _ in range(rounds):
        for key, run in runs.items():
            cpu, wall, calls, spent = time.process_time(), time.perf_counter(), 0, 0.0
            while spent < _LEAST:
                run()
                calls, spent = calls + 1, time.process_time() - cpu
            for values, value in zip(times[key], (spent, time.perf_counter() - wall)):
                values.append(1e3 * value / calls)
    return times
