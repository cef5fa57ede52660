"""Gaussian solves: batched conjugate gradients with a stop per row, the proximal step, the exact draw."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from invdiff.operator import LinearOperator
from invdiff.problem import Problem
from invdiff.rng import Streams
from invdiff.spaces import per_row, real_inner


def cg(
    apply: Callable[[Tensor], Tensor],
    b: Tensor,
    x: Tensor | None = None,
    tol: float = 1e-6,
    max_iter: int = 50,
) -> Tensor:
    """Solve ``M x = b`` for Hermitian positive ``M``, every row on its own.

    A row stops when ``||b - M x|| <= tol ||b||`` and is frozen from then on, so that no row depends on its
    neighbours in the batch; a row that turns non-finite stops too. Inner products are ``Re sum conj(a) b``.

    Args:
        apply: ``M``, ``(B, ...) -> (B, ...)``.
        b: Right-hand side, real or complex.
        x: Start; zero where not given.
        tol: Relative residual to stop at.
        max_iter: Most iterations.
    """
    if x is None:
        x, r = torch.zeros_like(b), b.clone()
    else:
        r = b - apply(x)
    p = r
    rr = real_inner(r, r)
    stop = (tol * tol) * real_inner(b, b)
    for _ in range(max_iter):
        active = rr > stop
        if not bool(active.any()):
            break
        mp = apply(p)
        curvature = real_inner(p, mp)
        active = active & (curvature > 0)
        alpha = per_row(torch.where(active, rr / curvature, torch.zeros_like(rr)), b)
        x = torch.addcmul(x, alpha.to(x.dtype), p) if not x.is_complex() else x + alpha * p
        r = r - alpha * mp
        new = real_inner(r, r)
        beta = per_row(torch.where(active, new / rr, torch.zeros_like(rr)), b)
        p = r + beta * p
        rr = torch.where(active, new, torch.zeros_like(rr))
    return x


def gaussian_prox(
    problem: Problem,
    z: Tensor,
    r2: Tensor | float,
    y: Tensor | None = None,
    max_iter: int = 30,
    tol: float = 1e-4,
) -> Tensor:
    """Return ``argmin_x ||A x - y||^2_{1/sigma^2} + ||x - z||^2 / r2``, the mean of N(z, r2 I) given ``y``.

    Closed form where the operator has one and the noise level is one number per row; otherwise conjugate
    gradients started at ``z`` on ``(r^-2 sigma^2 + A^H A) delta = A^H (y - A z)``, in the precision of the
    operator.

    Args:
        problem: Linear problem with a quadratic surrogate likelihood (sigma may be 0: hard consistency).
        z: Centre, ``(B, *domain)``.
        r2: Variance of the Gaussian around ``z``: number or ``(B,)``.
        y: Data instead of ``problem.y`` (perturbed, say).
        max_iter: Most conjugate-gradient iterations.
        tol: Relative residual to stop at.
    """
    a = problem.operator
    assert isinstance(a, LinearOperator)
    sigma = problem.sigma(z)
    rows = z.shape[0]
    r2 = per_row(r2, z).reshape(-1).expand(rows)
    one_level = sigma.numel() == 1 or sigma.numel() == sigma.shape[0]
    if one_level:
        level2 = (sigma.reshape(-1) ** 2).expand(rows)
        rho = (level2 / r2).to(a.domain.dtype)
        if "prox" in a.capabilities:
            return a.prox(z, problem.y if y is None else y, rho).to(z.dtype)
        centre = z.to(a.domain.dtype)
        back = problem.adjoint_y if y is None else a.adjoint(y)
        weight = per_row(rho, centre)
        step = cg(lambda v: weight * v + a.normal(v), back - a.normal(centre), tol=tol, max_iter=max_iter)
        return z + step.to(z.dtype)
    # Noise that varies over the data: weights relative to their mean keep the system well scaled.
    w = 1 / sigma.clamp_min(torch.finfo(sigma.dtype).tiny) ** 2
    mean = w.mean()
    w = w / mean
    centre = z.to(a.domain.dtype)
    weight = per_row(1 / (r2 * mean), centre)
    back = a.adjoint(w * ((problem.y if y is None else y) - a(centre)))
    step = cg(lambda v: weight * v + a.adjoint(w * a(v)), back, tol=tol, max_iter=max_iter)
    return z + step.to(z.dtype)


def gaussian_draw(
    problem: Problem, z: Tensor, r2: Tensor | float, rng: Streams, max_iter: int = 100, tol: float = 1e-5
) -> Tensor:
    """Draw from N(z, r2 I) given ``y`` exactly, by perturbing centre and data and solving.

    With ``z' = z + r e1`` and ``y' = y + sigma e2`` the proximal point of ``(z', y')`` has the right mean and
    the right covariance ``(A^H A / sigma^2 + I / r2)^-1``.

    Source: Papandreou, Yuille, "Gaussian sampling by local perturbations", 2010.
    """
    sigma = problem.sigma(z)
    r = per_row(r2, z).sqrt()
    y = problem.y + sigma * rng.normal(problem.y)
    return gaussian_prox(problem, z + r * rng.normal(z), r2, y, max_iter, tol)
