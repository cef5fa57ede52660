"""What loops compiled by numba share: whether there are any, and the threads that they run in."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch


def is_compiled(device: torch.device) -> bool:
    """Return whether there are compiled loops for a device."""
    return device.type == "cpu" and importlib.util.find_spec("numba") is not None


#: Steps of a loop that pay for a thread (measured: starting one takes as long as about 2^16).
_STEPS = 1 << 18


def thread_count(steps: int) -> int:
    """Return how many of torch's threads a loop of so many steps is worth."""
    return max(1, min(torch.get_num_threads(), steps // _STEPS))


def in_threads(loop: Callable[..., None], arrays: Sequence[np.ndarray], count: int, steps: int) -> None:
    """Call ``loop(*arrays, first, last)`` on parts of ``range(count)``, one for each thread.

    The loop lets go of Python's lock. numba's own parallel loops would change the number of threads of torch.

    Args:
        loop: What to call.
        arrays: Its first arguments.
        count: What there is to do.
        steps: Innermost steps of all of it.
    """
    threads = min(thread_count(steps), count)
    if threads < 2:
        loop(*arrays, 0, count)
        return
    ends = np.linspace(0, count, threads + 1).astype(int).tolist()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda i: loop(*arrays, ends[i], ends[i + 1]), range(threads)))
