"""How stiff a likelihood is in image space, and square roots of its curvature without a decomposition."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from invdiff.likelihoods import Gaussian
from invdiff.problem import Problem
from invdiff.spaces import norm, per_row


def curvature(problem: Problem, x: Tensor, v: Tensor) -> Tensor:
    """Return ``H v`` with the Gauss-Newton curvature ``H = J^H (-d score/dz) J`` of ``-log p(y | A(x))``.

    ``H = A^H A / sigma^2`` for a linear operator and Gaussian noise; elsewhere the derivative of the score is what
    the likelihood says of it, or a finite difference along ``J v``.
    """
    dz = problem.operator.jvp(x, v)
    sigma = problem.likelihood.gaussian_sigma(dz)
    if sigma is not None and problem.likelihood.shift_invariant:
        return problem.operator.vjp(x, dz / sigma**2)
    z = problem.operator(x)
    bound = problem.likelihood.curvature(z, problem.y)
    if bound is not None:
        return problem.operator.vjp(x, bound * dz)
    size = norm(dz)
    small = per_row(1e-4 * (norm(z) + 1e-3 * size) / torch.where(size > 0, size, torch.ones_like(size)), dz)
    change = problem.likelihood.score(z, problem.y) - problem.likelihood.score(z + small * dz, problem.y)
    return problem.operator.vjp(x, change / small)


def stiffness(problem: Problem, x: Tensor, iterations: int = 30) -> Tensor:
    """Return the largest eigenvalue of `curvature` at ``x`` per row, ``(B,)``, by power iterations.

    The start is the same pseudo-random image for every row and every call, so that no row depends on another.
    """
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(1, *x.shape[1:], dtype=x.dtype, generator=generator).to(x.device).expand_as(x)
    value = norm(v)
    for _ in range(iterations):
        v = curvature(problem, x, v / per_row(torch.where(value > 0, value, torch.ones_like(value)), v))
        value = norm(v)
    return value


def operator_norm(problem: Problem, x: Tensor, iterations: int = 30) -> Tensor:
    """Return the largest singular value of the operator's Jacobian at ``x`` per row, ``(B,)``; see `stiffness`."""
    return stiffness(replace(problem, likelihood=Gaussian(1.0).to(x.device)), x, iterations).sqrt()


def prior_stiffness(pull: Callable[[Tensor], Tensor], v: Tensor, s: float, iterations: int = 4) -> Tensor:
    """Return the largest eigenvalue of ``(I - J) / s^2``, the curvature of ``-log p_s``, per row, ``(B,)``.

    Args:
        pull: ``v -> J^T v`` of the denoiser at the point.
        v: Where the power iterations start, ``(B, ...)``.
        s: Noise level.
        iterations: Power iterations.
    """
    for _ in range(iterations):
        v = v / per_row(norm(v), v)
        v = (v - pull(v)) / s**2
    return norm(v)


def root_of_rest(apply: Callable[[Tensor], Tensor], x: Tensor, top: float = 0.9, degree: int = 20) -> Tensor:
    """Return ``(I - M)^(1/2) x`` for Hermitian ``M`` with spectrum in ``[0, top]``, ``top`` below 1.

    Chebyshev series of the root; at ``top`` 0.9 and degree 20 it is exact to 1e-6.

    Args:
        apply: ``M``, ``(B, ...) -> (B, ...)``.
        x: Rows ``(B, ...)``.
        top: Bound of the spectrum.
        degree: Applications of ``M``.
    """
    series = _root_series(top, degree)
    back, here = x, (2 / top) * apply(x) - x
    out = series[0] * back + series[1] * here
    for c in series[2:]:
        back, here = here, 2 * ((2 / top) * apply(here) - here) - back
        out = out + c * here
    return out


@functools.lru_cache
def _root_series(top: float, degree: int) -> list[float]:
    """Chebyshev coefficients of ``sqrt(1 - top (t + 1) / 2)`` on [-1, 1]."""
    nodes = torch.cos(torch.pi * (torch.arange(200, dtype=torch.float64) + 0.5) / 200)
    values = (1 - top * (nodes + 1) / 2).sqrt()
    orders = torch.arange(degree + 1, dtype=torch.float64)[:, None]
    series = 2 / 200 * (values * torch.cos(orders * nodes.arccos())).sum(1)
    series[0] /= 2
    return series.tolist()
