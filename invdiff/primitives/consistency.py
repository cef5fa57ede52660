"""Steps that fit data down to their noise level and not below it, for any operator with derivatives."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from invdiff.codec import Codec
from invdiff.problem import Problem
from invdiff.pulled import DecodeOperator
from invdiff.spaces import norm, per_row


def seen_data(problem: Problem, x: Tensor) -> Tensor:
    """Return ones where there are data at all, zeros elsewhere (a mask leaves zeros), ``(B, *range)``.

    Args:
        problem: Rows of the problem.
        x: Any point in general position, noise say, ``(B, *domain)``.
    """
    return (problem.operator(x).abs() > 0).to(x.dtype)


def fit_to_noise(problem: Problem, x: Tensor, seen: Tensor, iterations: int, share: float = 1.0) -> Tensor:
    """Return ``x`` moved down the misfit ``f = ||(y - A(x)) / sigma||`` until ``f = share sqrt(m)``.

    Gradient steps of the length that would reach the goal if ``f`` were linear, ``(f - goal) / ||grad f||^2``: one
    is enough where ``A`` is a mask, and none has a step size to tune. A row that its step would take uphill goes
    back and takes half of it; a row at the goal, or below it from the start, stays.

    Args:
        problem: With a noise level; ``m`` counts the real numbers that are seen.
        x: Start, ``(B, *domain)``.
        seen: See `seen_data`.
        iterations: Most steps; one operator and one vjp each.
        share: Of the noise level. Below 1 the fit goes into the noise.

    Source: B. Polyak, "Minimization of unsmooth functionals", 1969; V. Morozov, "On the solution of functional
    equations by the method of regularization", 1966.
    """
    weight = seen / problem.sigma(x)
    goal = share * (seen.flatten(1).sum(1) * (2 if problem.y.is_complex() else 1)).sqrt()
    rest = problem.residual(x) * weight
    f, length = norm(rest), torch.ones_like(goal)
    for _ in range(iterations):
        # What rounding leaves of a reached goal is no reason for a step.
        open_ = (f > goal * (1 + 1e-6)) & (length > 1e-3)
        if not bool(open_.any()):
            break
        back = problem.operator.vjp(x, weight * rest).to(x.dtype)  # -f grad f
        square = norm(back) ** 2
        step = torch.where(open_ & (square > 0), length * f * (f - goal) / square, torch.zeros_like(f))
        moved = x + per_row(torch.nan_to_num(step, nan=0.0, posinf=0.0), x) * back
        there = problem.residual(moved) * weight
        found = norm(there)
        better = open_ & (found < f)
        length = torch.where(open_ & ~better, 0.5 * length, length)
        x, rest, f = _where(better, moved, x), _where(better, there, rest), torch.where(better, found, f)
    return x


def encode_with_vjp(codec: Codec, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return ``E(x)`` and ``v -> J_E(x)^H v``, ``(B, *prior) -> (B, *image)``, which can be taken once."""
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        z = codec.encode(x)

    def pull(v: Tensor) -> Tensor:
        return torch.autograd.grad(z, x, v.to(z.dtype))[0]

    return z.detach(), pull


def decode(codec: Codec, z: Tensor) -> Tensor:
    """Return ``G(z)``, ``(B, *prior) -> (B, *image)``, in the precision of the codec."""
    return DecodeOperator(codec)(z)


def _where(rows: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Pick rows ``(B,)`` of ``a``, the others of ``b``."""
    return torch.where(rows.reshape(-1, *([1] * (a.ndim - 1))), a, b)
