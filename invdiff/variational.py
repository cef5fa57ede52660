"""Classical reconstruction for any linear operator: total variation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from invdiff.errors import CapabilityError, InvdiffError
from invdiff.operator import LinearOperator
from invdiff.primitives.curvature import stiffness
from invdiff.primitives.total_variation import difference, difference_adjoint
from invdiff.problem import Problem
from invdiff.spaces import norm, per_row


def total_variation(
    problem: Problem, weight: float, *, iterations: int = 300, nonnegative: bool = False
) -> Tensor:
    """Return ``argmin_x ||(A x - y) / sigma||^2 / 2 + weight TV(x)``, ``(N, *domain)``, a point estimate.

    ``TV`` is the isotropic total variation over the axes behind the channel, ``sum_i ||(grad x)_i||_2`` with
    forward differences, per pixel and none across the border; channels count one by one. ``weight`` is in one over
    the units of the image: a jump of ``1 / weight`` costs as much as one datum that is ``sqrt(2)`` standard
    deviations off.

    Primal-dual hybrid gradients; the step sizes come from the largest eigenvalue of ``A^H A / sigma^2`` and from
    the size of the first back-projection.

    Args:
        problem: A linear operator behind Gaussian noise with ``sigma`` above 0.
        weight: Weight of the total variation.
        iterations: Number of steps; each applies ``A`` and its adjoint once.
        nonnegative: Whether ``x >= 0`` is asked, for real images.

    Raises:
        InvdiffError: If the operator is not linear, the noise not Gaussian or without a level, or a number out of
            range.

    Source: Chambolle and Pock, "A first-order primal-dual algorithm for convex problems with applications to
    imaging", J. Math. Imaging Vis. 40, 2011; Rudin, Osher, Fatemi, Physica D 60, 1992.
    """
    operator = problem.operator
    if not isinstance(operator, LinearOperator) or problem.operator_dependent_noise:
        raise CapabilityError(f"Total variation needs a linear operator behind Gaussian noise, got {problem!r}.")
    if weight < 0 or iterations < 1:
        raise InvdiffError(f"A weight of at least 0 and 1 iteration are needed, got {weight:g} and {iterations}.")
    if nonnegative and operator.domain.is_complex:
        raise InvdiffError("Complex images have no sign; leave nonnegative out.")
    rows = len(problem.y)
    x = operator.domain.zeros(rows, problem.y.device)
    sigma = problem.sigma(x)
    if not bool((sigma > 0).all()):
        raise InvdiffError("The noise level is 0; give the level of the data, or a small one to fit them closely.")
    axes = range(2, x.ndim)
    top = stiffness(problem, x).clamp_min(1e-30)
    scale = (top / (4 * len(axes))).sqrt()  # gradients weigh as much as data: the norm of both together is 2 top
    x = operator.adjoint(problem.y / sigma**2) / per_row(top, x)
    balance = (norm(x) / math.sqrt(problem.y[0].numel())).clamp_min(1e-30)
    primal, dual = balance / (2 * top).sqrt(), 1 / (balance * (2 * top).sqrt())
    ahead, data = x, torch.zeros_like(problem.y)
    jumps = [torch.zeros_like(x) for _ in axes]
    for _ in range(iterations):
        s = per_row(dual, data)
        data = (data + s * (operator(ahead) - problem.y) / sigma) / (1 + s)
        step = per_row(dual * scale, x)
        jumps = [p + step * difference(ahead, a) for p, a in zip(jumps, axes)]
        size = torch.stack([p.abs().square() for p in jumps]).sum(0).sqrt()
        shrink = (size * per_row(scale, x) / weight).clamp_min(1) if weight > 0 else torch.inf
        jumps = [p / shrink for p in jumps]
        slope = operator.adjoint(data / sigma)
        for p, a in zip(jumps, axes):
            slope = slope + per_row(scale, x) * difference_adjoint(p, a)
        new = x - per_row(primal, x) * slope
        new = new.clamp_min(0) if nonnegative else new
        x, ahead = new, 2 * new - x
    return x
