"""Markov chain moves on rows: unadjusted Langevin and Hamiltonian Monte Carlo."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from invdiff.problem import Problem
from invdiff.rng import Streams
from invdiff.spaces import per_row, real_inner

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
    h = per_row(step, x)
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
    h = per_row(step, x).sqrt()
    v = rng.normal(x)
    refresh = math.sqrt(1 - momentum * momentum)
    pull = score(x)
    for _ in range(iterations):
        v = momentum * v + refresh * rng.normal(x) + 0.5 * h * pull
        x = x + h * v
        pull = score(x)
        v = v + 0.5 * h * pull
    return x


def posterior_score(denoise: Callable[[Tensor, float], Tensor], problem: Problem, s: float) -> Score:
    """Return the score of prior and data at the level ``s``: ``(D(x, s) - x) / s^2 + grad log p(y | x)``."""

    def score(x: Tensor) -> Tensor:
        return (denoise(x, s) - x) / s**2 + problem.grad_log_likelihood(x)

    return score


def mala(
    x: Tensor, score: Score, step: Tensor | float, iterations: int, rng: Streams, nodes: int = 4
) -> tuple[Tensor, Tensor]:
    """Metropolis-adjusted Langevin that needs the score alone, never the density.

    Propose ``x' = x + h score(x) + sqrt(2 h) noise`` and accept with the usual ratio, in which
    ``log p(x') - log p(x) = int_0^1 <score(x + u (x' - x)), x' - x> du`` by Gauss-Lobatto quadrature along the
    move (``nodes`` nodes, ends included; exact for a Gaussian target from 2 on). For a score that is not a
    gradient the ratio, and so the law that is left invariant, depends on the path.

    Args:
        x: Rows ``(B, ...)``.
        score: Gradient of the target's log-density.
        step: ``h``, a number or ``(B,)``.
        iterations: Number of moves; ``nodes - 1`` score evaluations for each, and one to begin with.
        rng: Streams of the rows.
        nodes: 2, 3 or 4.

    Returns:
        The rows and the share of accepted moves of each, ``(B,)``.
    """
    h = per_row(step, x)
    points, weights = _LOBATTO[nodes]
    here = score(x)
    accepted = torch.zeros(x.shape[0], dtype=x.real.dtype if x.is_complex() else x.dtype, device=x.device)
    for _ in range(iterations):
        noise = rng.normal(x)
        move = h * here + (2 * h).sqrt() * noise
        there = score(x + move)
        rise = weights[0] * real_inner(here, move) + weights[-1] * real_inner(there, move)
        for u, w in zip(points[1:-1], weights[1:-1]):
            rise = rise + w * real_inner(score(x + u * move), move)
        back = -move - h * there
        quarter = (0.25 / h).reshape(-1)
        log_ratio = rise - quarter * real_inner(back, back) + 0.5 * real_inner(noise, noise)
        take = rng.uniform(accepted).log() < log_ratio
        chosen = per_row(take.to(h.dtype), x) > 0
        x, here = torch.where(chosen, x + move, x), torch.where(chosen, there, here)
        accepted = accepted + take.to(accepted.dtype)
    return x, accepted / max(iterations, 1)


_LOBATTO = {
    2: ((0.0, 1.0), (0.5, 0.5)),
    3: ((0.0, 0.5, 1.0), (1 / 6, 2 / 3, 1 / 6)),
    4: ((0.0, 0.5 - 0.05**0.5, 0.5 + 0.05**0.5, 1.0), (1 / 12, 5 / 12, 5 / 12, 1 / 12)),
}
