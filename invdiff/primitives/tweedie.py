"""The Gaussian step whose covariance is the denoiser's own: Tweedie's second moment."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from invdiff.primitives.solve import cg
from invdiff.problem import Problem
from invdiff.spaces import per_row, real_inner


def tweedie_weights(
    problem: Problem, d: Tensor, pull: Callable[[Tensor], Tensor], s: float, tol: float = 1e-4, max_iter: int = 60
) -> Tensor:
    """Return ``w = s^2 (A C A^H + sigma^2 I)^-1 (y - A D)`` with ``C = s^2 J``, ``(B, *range)``.

    Solved in data space by conjugate gradients, one network VJP for each product (``J`` is symmetric for an exact
    denoiser). ``<y - A D, w> / s^2`` is the squared Mahalanobis distance of the data from ``N(A D, A C A^H +
    sigma^2)``, to second order in the error of the solve.

    Args:
        problem: Problem with a quadratic surrogate likelihood; a nonlinear operator is linearised at ``d``.
        d: ``D(x, s)``, ``(B, *domain)``.
        pull: ``v -> J^T v``.
        s: Noise level of ``x``.
        tol: Relative residual at which a row's solve stops.
        max_iter: Most iterations.
    """
    a = problem.operator
    sigma = problem.sigma(d)

    def gram(v: Tensor) -> Tensor:
        """``(A C A^H + sigma^2) v``, divided by ``s^2`` to stay of order one."""
        return a.jvp(d, pull(a.vjp(d, v))) + (sigma / s) ** 2 * v

    return cg(gram, problem.residual(d), tol=tol, max_iter=max_iter)


def tweedie_update(
    problem: Problem, d: Tensor, pull: Callable[[Tensor], Tensor], s: float, tol: float = 1e-4, max_iter: int = 60
) -> Tensor:
    """Return ``D + C A^H (A C A^H + sigma^2 I)^-1 (y - A D)`` with ``C = s^2 J``, the mean of N(D, C) given ``y``.

    Exact where ``p(x0 | x)`` is Gaussian; the arguments are those of `tweedie_weights`.
    """
    return d + pull(problem.operator.vjp(d, tweedie_weights(problem, d, pull, s, tol, max_iter)))


def guidance_length(problem: Problem, d: Tensor, near: Tensor, move: Tensor) -> Tensor:
    """Return the length of ``move = C A^H z``, ``z = (y - A near) / sigma^2``, that fits the data best, per row.

    One conjugate-gradient step on ``A C A^H + sigma^2 I`` along ``z``: 1 where ``C = r^2 I`` with the ``r`` of the
    proximal point ``near``, less where the denoiser's own covariance ``C`` is larger and guidance would diverge.
    Where ``sigma`` is 0 and ``near`` fits the data, ``z = y - A D``.

    Args:
        problem: Linear problem with a quadratic surrogate likelihood.
        d: ``D(x, s)``, ``(B, *domain)``.
        near: Proximal point of ``d``.
        move: Guidance of full length.
    """
    rest, here = problem.residual(near), problem.residual(d)
    level = problem.sigma(near)
    z = torch.where(level > 0, rest / torch.where(level > 0, level, torch.ones_like(level)) ** 2, here)
    bend = real_inner(z, here - problem.residual(d + move)) + real_inner(z, rest)
    return per_row(real_inner(z, here) / torch.where(bend > 0, bend, torch.inf), d)


def nonlinear_rest(
    problem: Problem, d: Tensor, z: Tensor, gradients: Tensor, points: list[Tensor]
) -> list[Tensor]:
    """Return mean and variance of ``C(D + n) - C(D) - G n`` over ``points`` ``n``, two tensors ``(B, m)``.

    Args:
        problem: Problem with the operator ``C``.
        d: ``D``, ``(B, *domain)``.
        z: ``C(D)``.
        gradients: Rows of the Jacobian ``G`` at ``D``, ``(B, m, n)``.
        points: Tensors shaped as ``d``, at least two for a variance.
    """
    changes = [(problem.operator(d + n) - z).flatten(1) for n in points]
    rest = torch.stack([c - (gradients @ n.flatten(1)[..., None])[..., 0] for c, n in zip(changes, points)])
    return [rest.mean(0), rest.var(0)]
