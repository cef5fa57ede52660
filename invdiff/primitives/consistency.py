"""Steps that fit data down to their noise level and not below it, for any operator with derivatives."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from invdiff.codec import Codec
from invdiff.problem import Problem
from invdiff.pulled import DecodeOperator
from invdiff.spaces import norm, per_row, real_inner

#: Steps whose worst misfit a new one has to beat.
_MEMORY = 4
#: Steps over which progress is judged.
_STRIDE = 10


def seen_data(problem: Problem, x: Tensor) -> Tensor:
    """Return ones where there are data at all, zeros elsewhere (a mask leaves zeros), ``(B, *range)``.

    Args:
        problem: Rows of the problem.
        x: Any point in general position, noise say, ``(B, *domain)``.
    """
    return (problem.operator(x).abs() > 0).to(x.dtype)


def fit_to_noise(
    problem: Problem, x: Tensor, seen: Tensor, iterations: int, share: float = 1.0, progress: float = 0.0
) -> Tensor:
    """Return ``x`` moved down the misfit ``f = ||(y - A(x)) / sigma||`` until ``f = share sqrt(m)``.

    Gradient steps of the shorter of two lengths. One would reach the goal if ``f`` were linear: it is enough where
    ``A`` is a mask, and keeps the fit out of the noise. The other is that of Barzilai and Borwein, long and short
    in turns, which knows the curvature along the last step: behind a decoder it is worth three steps of the first.
    None has a step size to tune. A row that would leave its last few ``f`` behind goes back and takes half of its
    step; a row at the goal, or below it from the start, stays. So does one that no longer gets nearer: what is
    left of its misfit is what the decoder cannot make, and steps that go on make up details to fit it.

    Args:
        problem: With a noise level; ``m`` counts the real numbers that are seen.
        x: Start, ``(B, *domain)``.
        seen: See `seen_data`.
        iterations: Most steps; one operator and one vjp each.
        share: Of the noise level. Below 1 the fit goes into the noise.
        progress: Share of the way to the goal that ten steps must make; 0 for fits that never give up.

    Source: B. Polyak, "Minimization of unsmooth functionals", 1969; V. Morozov, "On the solution of functional
    equations by the method of regularization", 1966; J. Barzilai, J. Borwein, "Two-point step size gradient
    methods", 1988; M. Raydan, "The Barzilai and Borwein gradient method for the large scale unconstrained
    minimization problem", 1997.
    """
    weight = seen / problem.sigma(x)
    goal = share * (seen.flatten(1).sum(1) * (2 if problem.y.is_complex() else 1)).sqrt()
    rest = problem.residual(x) * weight
    f, length = norm(rest), torch.ones_like(goal)
    best, lowest, past, marks = x, f, [f], [f]
    curvature, last = torch.zeros_like(f), None
    for k in range(iterations):
        # What rounding leaves of a reached goal is no reason for a step.
        open_ = (lowest > goal * (1 + 1e-6)) & (length > 1e-3)
        if not bool(open_.any()):
            break
        back = problem.operator.vjp(x, weight * rest).to(x.dtype)  # -f grad f
        if last is not None:
            curvature = _curvature(x - last[0], last[1] - back, curvature, long=k % 2 == 0)
        polyak, bent = f * (f - goal) / norm(back) ** 2, torch.where(curvature > 0, 1 / curvature, torch.inf)
        step = torch.where(open_, length * torch.minimum(polyak, bent), torch.zeros_like(f))
        moved = x + per_row(torch.nan_to_num(step, nan=0.0, posinf=0.0), x) * back
        there = problem.residual(moved) * weight
        found = norm(there)
        taken = open_ & (found < torch.stack(past[-_MEMORY:]).amax(0))
        last = (x, back)
        length = torch.where(open_ & ~taken, 0.5 * length, torch.ones_like(length))
        x, rest, f = _where(taken, moved, x), _where(taken, there, rest), torch.where(taken, found, f)
        best, lowest, past = _where(f < lowest, x, best), torch.minimum(f, lowest), [*past, f]
        marks = [*marks, lowest]
        if progress and k >= _STRIDE:
            before = marks[-1 - _STRIDE]
            length = torch.where(before - lowest < progress * (before - goal), torch.zeros_like(length), length)
    return best


def _curvature(dx: Tensor, dg: Tensor, before: Tensor, long: bool) -> Tensor:
    """Return the curvature along ``dx``, smaller for a long step; that of before for rows that did not move."""
    bend, size = real_inner(dx, dg), norm(dx) ** 2
    found = bend / size if long else norm(dg) ** 2 / bend
    return torch.where(size > 0, torch.where(bend > 0, found, torch.zeros_like(bend)), before)


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
