"""A linear problem in its singular coordinates: one pseudo-datum and one noise level for each."""

from __future__ import annotations

import torch
from torch import Tensor

from invdiff.errors import InvdiffError
from invdiff.operator import SVD, LinearOperator
from invdiff.problem import Problem
from invdiff.spaces import per_row


def spectrum(problem: Problem) -> tuple[SVD, Tensor, Tensor]:
    """Return ``A = U diag(s) V^H`` and the data as ``ybar_i ~ N((V^H x)_i, level_i^2)``.

    ``ybar = s^+ U^H y`` and ``level = sigma / s``; where ``s`` is 0 they are 0 and infinity, and with noiseless
    data ``level`` is 0 elsewhere. Both have the shape of the coordinates, a leading axis of 1 or B rows
    included.

    Raises:
        InvdiffError: If the noise level varies within a case, which no singular coordinate can carry.
    """
    a = problem.operator
    assert isinstance(a, LinearOperator)
    d = a.svd()
    sigma = problem.sigma(problem.y)
    if sigma.numel() not in (1, problem.n_cases):
        raise InvdiffError(
            f"Samplers that work in singular coordinates need one noise level per case, and that of "
            f"{problem.likelihood.name} varies over the data; use dds or pigdm."
        )
    seen = d.s > 0
    inverse = torch.where(seen, 1 / torch.where(seen, d.s, torch.ones_like(d.s)), torch.zeros_like(d.s))
    level = torch.where(seen, per_row(sigma.reshape(-1), d.s) * inverse, torch.inf)
    return d, inverse * d.uh(problem.y), level
