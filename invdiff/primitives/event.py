"""The Gaussian step towards user-defined events, with the denoiser's own covariance."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from invdiff.likelihoods_event import Event
from invdiff.primitives.tweedie import nonlinear_rest
from invdiff.problem import Problem


def event_update(
    problem: Problem, d: Tensor, pull: Callable[[Tensor], Tensor], s: float, floor: float, points: list[Tensor]
) -> Tensor:
    """Return ``D + S G^T w``, the mean of ``N(D, S)``, ``S = s^2 J``, given the events of the likelihood.

    ``G`` is the Jacobian of ``C`` at ``D`` and ``V = G S G^T``; both are held whole, there are few events.

    Args:
        problem: Problem with the operator ``C`` and events as likelihood.
        d: ``D(x, s)``, ``(B, *domain)``.
        pull: ``v -> J^T v``.
        s: Noise level of ``x``.
        floor: Least variance of ``C(x0)``, as a share of ``s^2 |G|^2``.
        points: Where ``C`` is compared with its linear part (none: it counts as linear).
    """
    c, likelihood = problem.operator, problem.likelihood
    assert isinstance(likelihood, Event)
    z = c(d)
    units = torch.eye(z[0].numel(), dtype=z.dtype, device=z.device)
    g = [c.vjp(d, e.reshape(z[:1].shape).expand_as(z)).to(d.dtype) for e in units]
    rows = torch.stack([v.flatten(1) for v in g], 1)
    spread = s * s * torch.stack([pull(v).flatten(1) for v in g], 1)
    v = 0.5 * (rows @ spread.mT + spread @ rows.mT)
    least = floor * s * s * (rows**2).sum(2)
    v = v + torch.diag_embed((least - v.diagonal(dim1=1, dim2=2)).clamp_min(0))
    mean = z.flatten(1).to(d.dtype)
    if points:
        shift, more = nonlinear_rest(problem, d, z, rows, points)
        mean, v = mean + shift, v + torch.diag_embed(more)
    w = likelihood.weigh(mean, v, problem.y)
    return d + (w[:, None] @ spread).reshape(d.shape)
