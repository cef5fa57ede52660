"""Adam as a pure function of its state, so that a run can be checkpointed and rows stay independent."""

from __future__ import annotations

from torch import Tensor


def adam(
    x: Tensor,
    gradient: Tensor,
    moments: tuple[Tensor, Tensor],
    k: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.99),
    eps: float = 1e-8,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Return the point and the moments after Adam step ``k`` (counted from 0).

    Source: Kingma, Ba, "Adam: a method for stochastic optimization", 2015.
    """
    m = betas[0] * moments[0] + (1 - betas[0]) * gradient
    v = betas[1] * moments[1] + (1 - betas[1]) * gradient * gradient
    mean = m / (1 - betas[0] ** (k + 1))
    spread = (v / (1 - betas[1] ** (k + 1))).sqrt()
    return x - lr * mean / (spread + eps), (m, v)
