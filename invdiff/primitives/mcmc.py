"""Markov chain moves on rows: unadjusted Langevin and Hamiltonian Monte Carlo."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from invdiff.rng import Streams
from invdiff.spaces import per_row

Score = Callable[[Tensor], Tensor]


def langevin(x: Tensor, score: Score, step: Tensor | float, iterations: int, rng: Streams) -> Tensor:
    """Unadjusted Langevin: ``x <- x + step score(x) + sqrt(2 step) noise``, ``iterations`` times.

    Args:
        x: Rows ``(B, ...)``.
        score: Gradient of the target's log-density.
        step: Step size, a number or ``(B,)``.
        iterations: Number of moves.
        rng: Streams of the rows.
    """
    h = per_row(torch.as_tensor(step), x)
    spread = (2 * h).sqrt()
    for _ in range(iterations):
        x = x + h * score(x) + spread * rng.normal(x)
    return x


def hmc(x: Tensor, score: Score, step: Tensor | float, iterations: int, momentum: float, rng: Streams) -> Tensor:
    """Unadjusted Hamiltonian Monte Carlo, one leapfrog step between partial refreshments of the velocity.

    ``v <- m v + sqrt(1 - m^2) noise``, then the leapfrog ``v += h/2 score(x)``, ``x += h v``,
    ``v += h/2 score(x)`` with ``h = sqrt(step)``. One score evaluation for each iteration. ``momentum`` 0 is
    Langevin with half the step.

    Source: Horowitz, "A generalized guided Monte Carlo algorithm", 1991.
    """
    h = per_row(torch.as_tensor(step).sqrt(), x)
    v = rng.normal(x)
    refresh = math.sqrt(1 - momentum * momentum)
    pull = score(x)
    for _ in range(iterations):
        v = momentum * v + refresh * rng.normal(x) + 0.5 * h * pull
        x = x + h * v
        pull = score(x)
        v = v + 0.5 * h * pull
    return x
