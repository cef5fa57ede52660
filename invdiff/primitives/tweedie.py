"""The Gaussian step whose covariance is the denoiser's own: Tweedie's second moment."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from invdiff.primitives.solve import cg
from invdiff.problem import Problem


def tweedie_weights(
    problem: Problem, d: Tensor, pull: Callable[[Tensor], Tensor], s: float, tol: float = 1e-4, max_iter: int = 60
) -> Tensor:
    """Return ``w = s^2 (A C A^H + sigma^2 I)^-1 (y - A D)`` with ``C = s^2 J``, ``(B, *range)``.

    Solved in data space by conjugate gradients, one network VJP for each product (``J`` is symmetric for an exact
    denoiser). ``<y - A D, w> / s^2`` is the squared Mahalanobis distance of the data from ``N(A D, A C A^H +
    sigma^2)``, to second order in the error of the solve.

    Args:
        problem: Linear problem with a quadratic surrogate likelihood.
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
        return a(pull(a.vjp(d, v))) + (sigma / s) ** 2 * v

    return cg(gram, problem.residual(d), tol=tol, max_iter=max_iter)


def tweedie_update(
    problem: Problem, d: Tensor, pull: Callable[[Tensor], Tensor], s: float, tol: float = 1e-4, max_iter: int = 60
) -> Tensor:
    """Return ``D + C A^H (A C A^H + sigma^2 I)^-1 (y - A D)`` with ``C = s^2 J``, the mean of N(D, C) given ``y``.

    Exact where ``p(x0 | x)`` is Gaussian; the arguments are those of `tweedie_weights`.
    """
    return d + pull(problem.operator.vjp(d, tweedie_weights(problem, d, pull, s, tol, max_iter)))
