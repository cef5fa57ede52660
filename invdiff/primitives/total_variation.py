"""Total variation along one axis of a volume inside a Gaussian data step, by ADMM."""

from __future__ import annotations

import torch
from torch import Tensor

from invdiff.operator import LinearOperator
from invdiff.primitives.solve import cg
from invdiff.problem import Problem
from invdiff.spaces import per_row


def difference(x: Tensor, axis: int | None) -> Tensor:
    """Return ``G x``: ``x[i + 1] - x[i]`` along ``axis``, 0 at the last place (no wrap-around) and for None."""
    if axis is None:
        return torch.zeros_like(x)
    n = x.shape[axis]
    step = x.narrow(axis, 1, n - 1) - x.narrow(axis, 0, n - 1)
    return torch.cat([step, torch.zeros_like(x.narrow(axis, 0, 1))], axis)


def difference_adjoint(v: Tensor, axis: int | None) -> Tensor:
    """Return ``G^T v``."""
    if axis is None:
        return torch.zeros_like(v)
    n = v.shape[axis]
    step, none = v.narrow(axis, 0, n - 1), torch.zeros_like(v.narrow(axis, 0, 1))
    return torch.cat([none, step], axis) - torch.cat([step, none], axis)


def tv_step(
    problem: Problem,
    x: Tensor,
    precision: Tensor | float,
    weight: Tensor,
    split: Tensor,
    dual: Tensor,
    axis: int | None,
    lam: float,
    rho: Tensor | float,
    rounds: int = 1,
    max_iter: int = 10,
    tol: float = 1e-3,
) -> tuple[Tensor, Tensor, Tensor]:
    """ADMM rounds on ``min_u w/2 ||A u - y||^2 + q/2 ||u - x||^2 + lam ||G u||_1`` with differences ``G``.

        (w A^H A + q + rho G^T G) u = w A^H y + q x + G^T (rho split - dual)   (conjugate gradients from ``x``)
        split = shrink(G u + dual/rho, lam/rho);   dual <- dual + rho (G u - split)

    The dual is kept unscaled, so that ``rho`` may change from call to call.

    Args:
        problem: Linear.
        x: Centre, ``(B, *domain)``.
        precision: ``q``, a number or ``(B,)``.
        weight: ``w``, broadcastable over the data ``(B, *range)``.
        split: ADMM's copy of ``G u``, shaped as ``x``.
        dual: Its unscaled multiplier.
        axis: Axis of ``x`` along which neighbours are linked; None links none.
        lam: Weight of the total variation.
        rho: Weight of the splitting, a number or ``(B,)``.
        rounds: ADMM rounds.
        max_iter: Most conjugate-gradient iterations of a round.
        tol: Relative residual to stop at.

    Returns:
        ``u`` and the new ``split`` and ``dual``.
    """
    a = problem.operator
    assert isinstance(a, LinearOperator)
    q, r = per_row(precision, x), per_row(rho, x)

    one = weight.ndim == 0 or weight[0].numel() == 1  # weight per row: the fast normal operator serves

    def apply(v: Tensor) -> Tensor:
        data = per_row(weight.reshape(-1), v) * a.normal(v) if one else a.adjoint(weight * a(v))
        return data.to(v.dtype) + q * v + r * difference_adjoint(difference(v, axis), axis)

    u = x
    for _ in range(rounds):
        pull = difference_adjoint(r * (split - difference(u, axis)) - dual, axis)
        rest = a.adjoint(weight * problem.residual(u)).to(u.dtype) + q * (x - u) + pull
        u = u + cg(apply, rest, tol=tol, max_iter=max_iter)
        jump = difference(u, axis)
        moved = jump + dual / r
        split = moved.sign() * (moved.abs() - lam / r).clamp_min(0)
        dual = dual + r * (jump - split)
    return u, split, dual
