"""Positron emission tomography beside its operator: the noise of a scan, and images of maximum likelihood.

The mean of the counts is ``A x + scatter + randoms`` with `invdiff.operators.PET` for ``A``, and the counts are
Poisson. All images and sinograms are batches ``(N, ...)``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from invdiff.errors import InvdiffError
from invdiff.operator import LinearOperator
from invdiff.problem import Problem

if TYPE_CHECKING:
    from invdiff.likelihoods import Poisson


def noise(operator: LinearOperator, scatter: Any = 0.0, randoms: Any = 0.0) -> Poisson:
    """Return the noise that goes with an operator: Poisson counts of mean ``A x + scatter + randoms``.

    ``Problem(A, noise(A, scatter, randoms), y)`` takes the prompts ``y`` as they were counted, and
    ``Problem.simulate(A, noise(A, scatter, randoms), x)`` draws them. Counts that randoms were subtracted from are
    not Poisson; add them back.

    Args:
        operator: `invdiff.operators.PET`, or any linear operator that gives counts.
        scatter: Expected scattered coincidences of the whole scan, in counts: a number, an array that broadcasts
            over one element of the range, or one with a further leading axis of 1 or N cases.
        randoms: Expected random coincidences, likewise.

    Raises:
        InvdiffError: If an expectation is negative, not finite, or does not fit the range.
    """
    from invdiff.likelihoods import Poisson
    from invdiff.operators.pet import fit_to

    parts = [fit_to(v, f"The {k}", operator.range) for k, v in (("scatter", scatter), ("randoms", randoms))]
    if len({len(p) for p in parts} - {1}) > 1:
        raise InvdiffError(f"Scatter is for {len(parts[0])} cases and randoms for {len(parts[1])}; give as many.")
    return Poisson(background=parts[0] + parts[1])


def mlem(problem: Problem, iterations: int = 50, start: Tensor | None = None) -> Tensor:
    """Return ``iterations`` steps of ``x <- x / (A^T 1) * A^T (y / (A x + r))``, ``(N, *domain)``.

    The expectation-maximisation algorithm of Poisson counts with the mean ``A x + r``: images stay at least 0,
    the likelihood never falls, and without a background ``A x`` has the sum of ``y``. Late iterations fit the
    noise; their number is the regularisation. Pixels that no datum sees are 0.

    Args:
        problem: A linear operator without negative weights, behind Poisson noise; ``gain`` and ``background`` are
            those of its likelihood.
        iterations: Number of steps, at least 1.
        start: Images above 0, ``(N, *domain)``; constant ones that explain the sum of the counts by default.

    Raises:
        InvdiffError: If the noise is no Poisson noise, the operator is not linear and real or weighs negatively,
            or data or start are negative.

    Reference: Shepp and Vardi, Maximum likelihood reconstruction for emission tomography, IEEE TMI 1(2), 1982.
    """
    (a, law), y = _counting(problem, "MLEM"), problem.y
    if iterations < 1 or bool((y < 0).any()):
        raise InvdiffError(f"MLEM needs at least 1 iteration and no negative data, got {iterations}, {y.min():g}.")
    y = y.to(a.domain.dtype)
    seen = torch.ones_like(y) if a.support is None else a.support.to(y).expand_as(y)
    weights = seen / law.gain.to(y)
    sensitivity = a.adjoint(weights)
    if bool((sensitivity < 0).any()):
        raise InvdiffError(f"MLEM needs an operator without negative weights, and {a.name} has some.")
    inverse = torch.where(sensitivity > 0, 1 / sensitivity, 0)
    background, tiny = law.background.to(y), torch.finfo(y.dtype).tiny
    x = _start(a, seen * y, seen * background, (sensitivity > 0).to(y)) if start is None else start.to(y)
    a.domain.check(x, "The start of MLEM")
    if bool((x < 0).any()):
        raise InvdiffError("MLEM starts from images that are not negative; a pixel at 0 stays at 0.")
    for _ in range(iterations):
        ratio = y / (a(x) + background).clamp_min(tiny)
        x = x * inverse * a.adjoint(weights * ratio)
    return x


def gaussian(problem: Problem, image: Tensor) -> Problem:
    """Return the problem with the Gaussian noise of the counts that an image expects.

    ``y - r = A x + sigma eps`` with ``sigma^2 = A image + r``, the noise of at least one count. With tens of
    counts per bin it takes the place of Poisson noise, and every sampler for linear Gaussian problems serves.
    Weights from an image, e.g. of `mlem`, are free of the bias of those from the counts themselves.

    Args:
        problem: A real linear operator behind Poisson noise.
        image: ``(1 or N, *domain)``.

    Raises:
        InvdiffError: If the noise is no Poisson noise, or the operator is not linear and real.
    """
    from invdiff.likelihoods import Gaussian

    a, law = _counting(problem, "The Gaussian approximation")
    a.domain.check(image, "The image of the Gaussian approximation")
    y = problem.y.to(a.domain.dtype)
    gain, background = law.gain.to(y), law.background.to(y)
    expected = a(image.to(y).expand(len(y), *a.domain.shape)) + background
    data = y - background if a.support is None else (y - background) * a.support.to(y)
    return replace(problem, likelihood=Gaussian((gain * torch.maximum(expected, gain)).sqrt()), y=data)


def _counting(problem: Problem, what: str) -> tuple[LinearOperator, Poisson]:
    """Return the operator and the noise of a problem of counts, refusing others."""
    from invdiff.likelihoods import Poisson

    a, law = problem.operator, problem.likelihood
    real = not (a.domain.is_complex or a.range.is_complex)
    if isinstance(law, Poisson) and isinstance(a, LinearOperator) and "linear" in a.capabilities and real:
        return a, law
    raise InvdiffError(
        f"{what} is for Poisson counts of a real linear operator, and the problem has {law.name} noise behind "
        f"{a.name}."
    )


def _start(a: LinearOperator, y: Tensor, background: Tensor, seen: Tensor) -> Tensor:
    """Return constant images whose expected counts have the sum of ``y``, at least a thousandth of it."""
    total, added = y.flatten(1).sum(1), background.expand_as(y).flatten(1).sum(1)
    unit = a(seen).flatten(1).sum(1)
    level = torch.maximum(total - added, 1e-3 * total.clamp_min(1)) / unit.clamp_min(torch.finfo(y.dtype).tiny)
    return seen * level.reshape(-1, *[1] * (seen.ndim - 1))
