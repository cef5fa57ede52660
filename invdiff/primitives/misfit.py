"""The gradient of the misfit ``||y - A(D(x))||`` through the denoiser, as DPS and its relatives step along it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from invdiff.primitives.curvature import operator_norm
from invdiff.problem import Problem
from invdiff.spaces import norm, per_row


def misfit_unit(problem: Problem, x: Tensor) -> Tensor:
    """Return what published guidance weights divide by, data units per prior unit, ``(B,)``.

    Image units per prior unit (the gain of the codec), times the norm of the operator at ``x``, the same in all
    rows, where that is above 1, to a few percent. The weights were found on masks, blurs and transforms, whose
    norms are 1 or less; along a line integral through hundreds of pixels, or counts of ten thousand per unit, they
    step far too far.
    """
    one = x if problem.operator.n_cases is not None else x[:1]  # all rows are alike then, and one is enough
    found = operator_norm(problem, one, 10).expand(len(x))
    gain = torch.ones_like(found) if problem.gain is None else problem.gain.to(found).expand_as(found)
    # power iteration comes from below; what it finds of an operator of norm 1 must not exceed it by rounding
    return torch.where(found > gain * (1 + 1e-5), found, gain)


def misfit_ascent(problem: Problem, d: Tensor, pull: Callable[[Tensor], Tensor], unit: Tensor) -> Tensor:
    """Return ``-grad_x ||r|| = J^H A^H r / ||r||`` over ``unit``, for ``r = y - A(d)``; 0 where ``r`` is 0."""
    residual = problem.residual(d)
    return pull(problem.operator.vjp(d, residual * per_row(inverse_norm(residual) / unit, residual)))


def inverse_norm(v: Tensor) -> Tensor:
    """Return ``1 / ||v||`` per row, 0 where that is 0, ``(B,)``."""
    size = norm(v)
    return torch.where(size > 0, 1 / size.clamp_min(torch.finfo(size.dtype).tiny), torch.zeros_like(size))
