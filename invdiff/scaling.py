"""Scale of an image from its data, for priors that were trained on images of unit scale."""

from __future__ import annotations

import torch
from torch import Tensor

from invdiff.errors import InvdiffError
from invdiff.operator import LinearOperator
from invdiff.primitives.solve import cg
from invdiff.problem import Problem

#: The statistic that is 1 for images of unit scale, as written on the cards of embedded priors.
STATISTIC = "p99_magnitude"


def magnitude_percentile(x: Tensor, q: float = 0.99) -> Tensor:
    """Return the ``q`` quantile of ``|x|`` per row, ``(B,)``."""
    values = x.abs().flatten(1).to(torch.float64)
    k = max(1, round(q * values.shape[1]))
    return values.kthvalue(k, dim=1).values


def estimate_scale(problem: Problem, iterations: int = 12) -> Tensor:
    """Estimate image units per prior unit for each case, ``(N,)``: the 99th percentile of ``|x|``.

    The image is a few conjugate-gradient steps on ``(A^H A + mu I) x = A^H y`` from zero, where stopping early
    keeps noise out. The statistic is linear in the data, so a problem in other units gives the same draws in
    those units.

    Raises:
        InvdiffError: If the operator is not linear, or the data carry no signal.
    """
    operator = problem.operator
    if not isinstance(operator, LinearOperator):
        raise InvdiffError(
            f"The scale of images behind {operator.name} cannot be read off the data; "
            "give it with prior.with_scale(image units per prior unit)."
        )
    x = cg(operator.normal, problem.adjoint_y, tol=1e-3, max_iter=iterations)
    scale = magnitude_percentile(x)
    if not bool((scale > 0).all()):
        raise InvdiffError("The data carry no signal (the adjoint image is zero); check y and the mask.")
    return scale
