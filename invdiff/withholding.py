"""Set measurements aside, reconstruct from the others, and see how well the draws predict what was set aside."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from invdiff.algebra import ComposedLinear
from invdiff.errors import InvdiffError
from invdiff.operator import LinearOperator
from invdiff.operators import Mask, MultiCoilMRI, SubsampledFourier
from invdiff.operators._fft import reflect
from invdiff.problem import Problem

#: Widest block at the centre of k-space that is never withheld (on small grids a quarter of the grid).
CENTRE = 24


@dataclass(frozen=True, eq=False)
class Withheld:
    """Measurements set aside.

    Attributes:
        problem: What is left to reconstruct from: the same range, the data set aside zero.
        full: The problem with all data.
        where: True at the data set aside, ``(1 or N, *range)``.
    """

    problem: Problem
    full: Problem
    where: Tensor

    @property
    def count(self) -> int:
        """Number of data set aside in the first case (a complex number counts once)."""
        return int(self.where[0].sum())

    @property
    def share(self) -> float:
        """Share of the data set aside, of the first case."""
        return self.count / int(measured(self.full)[0].sum())

    def at(self, case: int) -> Tensor:
        """Return where data of a case are set aside, ``(*range)``."""
        return self.where[case if self.where.shape[0] > 1 else 0]

    def data(self, case: int = 0) -> Tensor:
        """Return the data of a case that were set aside, ``(n,)``."""
        return self.full.y[case][self.at(case)]

    def predict(self, x: Tensor, case: int = 0) -> Tensor:
        """Return what images ``(B, *domain)`` predict for them, without noise, ``(B, n)``."""
        rows = torch.full((x.shape[0],), case, dtype=torch.long)
        return self.full.operator.rows(rows)(x)[:, self.at(case)]


def withhold(problem: Problem, share: float = 0.1, seed: int = 0) -> Withheld:
    """Set a random share of the measurements aside.

    Whole positions go, over all coils and channels at once; where the samples form full lines of k-space, as with
    every fully sampled readout, whole lines go; and for real images a frequency goes with its mirror image, which
    holds the same number. The central block of k-space, 24 x 24 or a quarter of a smaller grid, stays: it gives
    coil maps and scale, and a scan without it is another problem. ``share`` counts what lies outside that block.

    Mask, SubsampledFourier and MultiCoilMRI are rebuilt with the smaller mask and keep their closed forms; any
    other linear operator ``A`` becomes ``M A``.

    Args:
        problem: Linear operator, and noise that is Gaussian.
        share: Share of the measurements to set aside, between 0 and 1.
        seed: Of the choice.

    Raises:
        InvdiffError: If the operator is not linear, the noise is of another kind or correlated across positions,
            or there is nothing to set aside.
    """
    if not 0 < share < 1:
        raise InvdiffError(f"The share of the measurements to withhold lies between 0 and 1, got {share:g}.")
    operator = problem.operator
    if not isinstance(operator, LinearOperator):
        raise InvdiffError(f"Measurements are withheld from linear operators, and {operator.name} is not linear.")
    if not problem.likelihood.shift_invariant:
        raise InvdiffError(
            f"Measurements are withheld from problems with Gaussian noise, and this one has "
            f"{problem.likelihood.name}."
        )
    sampled = measured(problem)
    units = _units(sampled, problem)
    candidates = units & ~_centre(units, operator)
    chosen = torch.stack([_choose(c, share, seed, i, operator) for i, c in enumerate(candidates)])
    where = (chosen & sampled).expand(-1, *operator.range.shape)
    kept = sampled & ~where
    if not bool(kept.flatten(1).any(1).all()):
        raise InvdiffError("Nothing would be left to reconstruct from; withhold a smaller share.")
    meta = {**problem.meta, "withheld": int(where[0].sum())}
    y = torch.where(where, torch.zeros_like(problem.y), problem.y)
    reduced = replace(problem, operator=_with_mask(operator, kept), y=y, meta=meta)
    return Withheld(reduced, problem, where)


def measured(problem: Problem) -> Tensor:
    """Return where data exist, bool ``(1 or N, *range)``."""
    operator = problem.operator
    if operator.support is None:
        return torch.ones(1, *operator.range.shape, dtype=torch.bool, device=problem.y.device)
    support = operator.support != 0
    return support.expand(support.shape[0], *operator.range.shape)


def _units(sampled: Tensor, problem: Problem) -> Tensor:
    """Return the mask with length 1 along every axis whose data go together: coils, channels, whole readouts."""
    dims = problem.operator.range.dims
    axes = {i for i, d in enumerate(dims) if d in ("coil", "channel")}
    if problem.likelihood.whiten() is not None:
        # Noise must stay independent between what is kept and what is set aside.
        correlated = getattr(problem.likelihood, "axis", None)
        if correlated is None or not _constant(sampled, correlated + 1):
            raise InvdiffError("The noise is correlated between positions, so none of them can be withheld alone.")
        axes.add(correlated)
    for axis in sorted(axes):
        sampled = sampled.narrow(axis + 1, 0, 1) if _constant(sampled, axis + 1) else sampled
    if _is_kspace(dims):
        for axis in (-1, -2):
            if _constant(sampled, axis) and sampled.shape[axis] > 1:
                return sampled.narrow(axis, 0, 1)
    return sampled


def _constant(mask: Tensor, axis: int) -> bool:
    return bool((mask == mask.narrow(axis, 0, 1)).all())


def _is_kspace(dims: tuple[str, ...]) -> bool:
    return dims[-2:] == ("ky", "kx")


def _centre(units: Tensor, operator: LinearOperator) -> Tensor:
    """Return the block around the centre of k-space that stays, shaped as ``units``."""
    if not _is_kspace(operator.range.dims):
        return torch.zeros_like(units[:1])
    block = torch.ones_like(units[:1])
    for axis in (-2, -1):
        n = units.shape[axis]
        width = min(CENTRE, n // 4) if n > 1 else 1
        inside = torch.zeros(n, dtype=torch.bool, device=units.device)
        inside[n // 2 - width // 2 : n // 2 - width // 2 + width] = True
        block = block & (inside[:, None] if axis == -2 else inside)
    return block if operator.domain.is_complex else block | reflect(block)


def _choose(candidates: Tensor, share: float, seed: int, case: int, operator: LinearOperator) -> Tensor:
    """Return ``share`` of the candidates of one case, at random."""
    count = int(candidates.sum())
    if not count:
        raise InvdiffError(
            "No measurement lies outside the centre of k-space, which is never withheld; "
            "compare without withholding."
        )
    rng = np.random.default_rng([seed, case, 0x3D])
    lot = torch.from_numpy(rng.random(tuple(candidates.shape))).to(candidates.device)
    if _is_kspace(operator.range.dims) and not operator.domain.is_complex:
        lot = torch.minimum(lot, reflect(lot))
    n = max(1, round(share * count))
    return candidates & (lot <= lot[candidates].kthvalue(n).values)


def _with_mask(operator: LinearOperator, kept: Tensor) -> LinearOperator:
    """Return the operator with a smaller mask ``(1 or N, *range)``, closed forms kept where it has some."""
    space = operator.domain
    if type(operator) is MultiCoilMRI:
        return MultiCoilMRI(kept[:, 0], operator.coil_maps, units=space.units, spacing=space.spacing)
    if type(operator) in (Mask, SubsampledFourier):
        rebuild: Any = type(operator)
        return rebuild(kept, space)
    return _Sampled(kept, operator)


class _Sampled(ComposedLinear):
    """``M A`` for a data mask ``M``, which knows where its data are."""

    def __init__(self, kept: Tensor, operator: LinearOperator) -> None:
        super().__init__(Mask(kept, operator.range), operator)

    @property
    def support(self) -> Tensor:
        """The data mask."""
        return self.parts[0].mask
