"""The two blocks of split Gibbs sampling: a draw from the prior and one from the likelihood, each near a point."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from torch import Tensor

from invdiff import schedule
from invdiff.primitives.curvature import curvature, root_of_rest
from invdiff.primitives.transitions import ddim, extrapolate
from invdiff.problem import Problem
from invdiff.rng import Streams
from invdiff.spaces import per_row

#: Largest ``rho^2 s_max^2 / sigma^2`` of the noise split: a little below the limit 1, where the draw degenerates.
SPLIT_TOP = 0.9


def prior_draw(
    denoise: Callable[[Tensor, Tensor], Tensor],
    z: Tensor,
    rho: Tensor,
    rng: Streams,
    steps: int = 12,
    depth: float = 0.05,
    lowest: float = 0.0,
    order: int = 2,
) -> Tensor:
    """Draw from ``p(x) N(x; z, rho^2 I)`` by the reverse SDE from level ``rho``; exact as the steps grow.

    Args:
        denoise: ``D(x, sigma)`` with ``sigma`` of shape ``(B,)``.
        z: ``(B, ...)``.
        rho: Level of every row, ``(B,)``.
        rng: Streams of the rows.
        steps: Evaluations.
        depth: Last level over ``rho``.
        lowest: Level below which the denoiser is not asked.
        order: 1 or 2.
    """
    r = per_row(rho, z)
    grid = schedule.geometric(steps, depth, 1.0).tolist()
    u, previous = z / r, None
    for k, (s, t) in enumerate(itertools.pairwise(grid)):
        d = denoise(u * r, (s * rho).clamp_min(lowest)) / r
        u = ddim(u, extrapolate(d, previous, grid, k), s, t, 1.0, rng.normal(u))
        previous = d if order == 2 else None
    return u * r


def split_draw(problem: Problem, x: Tensor, rho: Tensor, rng: Streams) -> Tensor:
    """Draw ``z`` from ``N(z; x, rho^2 I) N(y; A z, sigma^2 I - rho^2 A A^H)``: the noise split of Gibbs sampling.

    ``z = x + rho^2 g(x) + rho (I - rho^2 H)^(1/2) n`` with the gradient ``g`` and the curvature ``H = A^H A /
    sigma^2`` of the log-likelihood. With ``z | x ~ N(x, rho^2 I)`` the data have noise ``sigma^2 I`` given ``x``,
    so that the ``x`` of the chain follow the posterior itself, whatever ``rho``.

    Args:
        problem: Linear, Gaussian noise of its own level.
        x: ``(B, ...)``.
        rho: ``(B,)``, with ``rho^2 H`` at most `SPLIT_TOP`.
        rng: Streams of the rows.
    """
    r = per_row(rho, x)
    noise = root_of_rest(lambda u: r**2 * curvature(problem, u, u), rng.normal(x), SPLIT_TOP)
    return x + r**2 * problem.grad_log_likelihood(x) + r * noise
