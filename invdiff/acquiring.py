"""Active acquisition: let the draws say which measurement to take next (Nolan et al., 2024).

A loop: draw from the posterior given what is measured, predict every measurement that could follow from each draw,
take the one whose prediction has the largest entropy, repeat. With noise of one level, the most uncertain
measurement is the one that tells most about the image.

The predictive law of a candidate is a mixture of ``N(A_c x_i, v)`` over the draws ``x_i``; its entropy is taken as

    H = d/2 log(2 pi e v) - mean_i log mean_j exp(-||A_c x_i - A_c x_j||^2 / (4 v)),

which grows with the distances between predictions, is right where they coincide or nearly so and where they are
far apart, and is off by at most 0.13 nats for one real component in between. ``v = sigma^2 + h^2`` with the
likelihood's ``sigma`` and the bandwidth ``h`` of a kernel density estimate from as many draws (Silverman's rule),
without which a few draws of a wide law would all seem equally far apart.

Differences from the published code: distances enter with the right sign, through a log-sum that cannot overflow;
``v`` comes from the likelihood and the draws instead of a constant; any sampler; the draws are made anew after
every measurement instead of acquiring along one diffusion, so that each choice rests on finished draws. That costs
as many runs as there are rounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from invdiff.algebra import ComposedLinear
from invdiff.errors import InvdiffError
from invdiff.operator import LinearOperator
from invdiff.prior import Prior
from invdiff.problem import Problem
from invdiff.rng import resolve_seed
from invdiff.sampler import Sampler

if TYPE_CHECKING:
    from invdiff.posterior import Posterior


@dataclass(frozen=True, eq=False)
class Choice:
    """One decision.

    Attributes:
        candidate: What was measured next.
        entropy: Predictive entropy of every candidate in nats, data in units of the noise; NaN where it is not
            on offer.
    """

    candidate: int
    entropy: Tensor


@dataclass(frozen=True, eq=False)
class Acquisition:
    """What was measured, in which order and why, and the posterior given all of it.

    Attributes:
        posterior: Draws given the acquired data; its ``observed_data`` holds them with the mask, its provenance
            the order.
        problem: The problem with the acquired data.
        mask: Zeros and ones over the data, shaped as one mask of the operator.
        order: Candidates in the order of measurement, those of the start first.
        history: The decisions, one for each candidate after those of the start.
    """

    posterior: Posterior
    problem: Problem
    mask: Tensor
    order: tuple[int, ...]
    history: tuple[Choice, ...]


def acquire(
    problem: Problem,
    prior: Prior,
    sampler: Sampler | str | None = None,
    *,
    budget: int,
    axis: str | None = None,
    start: Sequence[int] | None = None,
    per_round: int = 1,
    draws: int = 16,
    seed: int | None = None,
    measure: Callable[[Tensor], Tensor] | None = None,
    **options: Any,
) -> Acquisition:
    """Choose measurements one after another by the entropy of their predictions.

    Args:
        problem: Everything that could be measured: an operator with all of its data, the noise, and ``y``, which
            is read only where a choice fell. Where the operator has a mask, its zeros are not on offer.
        prior: Prior of the image.
        sampler: Any sampler of draws; see `invdiff.sample`.
        budget: Candidates to measure in all, those of the start included.
        axis: Name of a data dimension, e.g. ``"kx"``: a candidate is a line across it. None: a candidate is one
            element of the operator's mask (a pixel, or a place in k-space in all coils).
        start: Candidates to begin with; by default the one in the middle (the centre of k-space).
        per_round: Candidates chosen from one set of draws, each given that those before it will be known.
        draws: Draws per round, and of the posterior at the end.
        seed: Any integer from 0; the last run has this seed, those before it others that follow from it.
        measure: Takes a mask (zeros and ones, shaped as `Acquisition.mask`) and returns all data measured so far,
            ``(*range)``; None reads them from ``problem.y``.
        **options: Passed on to every run of `invdiff.sample`.

    Returns:
        The posterior given what was measured, and how it was chosen.

    Raises:
        InvdiffError: If the problem has several cases, is not linear or not Gaussian, or budget, axis, start or
            sampler do not fit it.
    """
    from invdiff.driver import sample
    from invdiff.plan import choose_sampler

    chosen_sampler = choose_sampler(sampler, problem)
    _check(problem, chosen_sampler, draws)
    offer = _Offer(problem, axis)
    order = list(offer.check_start(start))
    if not len(order) <= budget <= len(offer.pool) or per_round < 1:
        raise InvdiffError(
            f"The budget must lie between the {len(order)} candidates of the start and the {len(offer.pool)} on "
            f"offer, and per_round be at least 1; got {budget} and {per_round}."
        )
    seed = resolve_seed(seed)
    history: list[Choice] = []
    while True:
        mask = offer.mask(order)
        y = problem.y if measure is None else measure(mask)
        meta = {**problem.meta, "acquired": list(order), "acquired_along": axis or "elements"}
        own = restrict(replace(problem, y=y, meta=meta), mask)
        if len(order) == budget:
            final = sample(own, prior, chosen_sampler, draws=draws, seed=seed, **options)
            return Acquisition(final, own, mask, tuple(order), tuple(history))
        round_seed = int(np.random.SeedSequence([seed, len(order)]).generate_state(1)[0])
        made = sample(own, prior, chosen_sampler, draws=draws, seed=round_seed, **options)
        z, groups = offer.predict(_draws(made, problem))
        for _ in range(min(per_round, budget - len(order))):
            entropy = predictive_entropy(z, groups, offer.n)
            entropy[offer.gone(order)] = torch.nan
            best = int(entropy.nan_to_num(-torch.inf).argmax())
            history.append(Choice(best, entropy))
            order.append(best)
            z = condition(z, groups == best)


def mixture_entropy(distance2: Tensor, size: Tensor | float, variance: Tensor | float = 1.0) -> Tensor:
    """Entropy of a mixture of equal Gaussians in nats, from the distances of their means.

    ``H = d/2 log(2 pi e v) - mean_i log mean_j exp(-D_ij^2 / (4 v))``.

    Args:
        distance2: Squared distances ``(P, P, ...)``.
        size: ``d``, number of real components.
        variance: ``v``, of one component.

    Returns:
        ``(...)``.

    Source: the exponent is that of Huber et al., "On entropy approximation for Gaussian mixture random vectors",
    MFI 2008 (``int N_i N_j``); between the bounds of Kolchinsky, Tracey, "Estimating mixture entropy with pairwise
    distances", Entropy 2017 (1/8 and 1/2 in place of 1/4).
    """
    count = distance2.shape[0]
    v = torch.as_tensor(variance, dtype=distance2.dtype)
    spread = torch.logsumexp(-distance2 / (4 * v), 1).mean(0) - math.log(count)
    return 0.5 * size * (2 * math.pi * math.e * v).log() - spread


def predictive_entropy(predictions: Tensor, groups: Tensor, n: int) -> Tensor:
    """Entropy of ``n`` groups of data under the mixture of some predictions, in units of the noise.

    Args:
        predictions: ``(P, m)``, real, divided by the noise level.
        groups: Group of each datum, ``(m,)``, from 0 to ``n - 1``.
        n: Number of groups.

    Returns:
        ``(n,)``, in nats.
    """
    z = predictions.double()
    size = torch.bincount(groups, minlength=n).double()

    def total(values: Tensor) -> Tensor:
        return values.new_zeros(*values.shape[:-1], n).index_add_(-1, groups, values)

    distance2 = torch.stack([total((z - one).square()) for one in z])
    per_datum = total(z.var(0)) / size
    d = size.clamp_max(len(z) - 1)  # draws span no more directions
    bandwidth2 = (4 / ((d + 2) * len(z))) ** (2 / (d + 4)) * per_datum
    return mixture_entropy(distance2, size, 1 + bandwidth2)


def condition(predictions: Tensor, known: Tensor) -> Tensor:
    """Return predictions as wide as they will be once some of the data are known, whatever their values.

    ``m + (I + Z_k Z_k^T / (P - 1))^(-1/2) (z - m)`` with deviations ``Z_k`` of the known data: the square-root
    form of the ensemble Kalman update (Bishop, Etherton, Majumdar, Monthly Weather Review 2001). Exact where the
    predictions are Gaussian and span all there is.

    Args:
        predictions: ``(P, m)``, divided by the noise level.
        known: Which data will be known, ``(m,)``.
    """
    mean = predictions.mean(0)
    apart = predictions - mean
    values, vectors = torch.linalg.eigh(apart[:, known] @ apart[:, known].T / (len(apart) - 1))
    root = (vectors * (1 + values.clamp_min(0)).rsqrt()) @ vectors.T
    return mean + root @ apart


def restrict(problem: Problem, mask: Tensor) -> Problem:
    """Return the problem with the data of a mask alone, zeros elsewhere.

    Args:
        problem: Linear; its operator may have a mask already.
        mask: Zeros and ones, broadcastable over the data ``(*range)``.
    """
    from invdiff import operators

    a = problem.operator
    assert isinstance(a, LinearOperator)
    own = getattr(a, "mask", None)
    mask = mask.to(problem.y.real if problem.y.is_complex() else problem.y)
    both = mask if own is None else mask * own[0]
    b: LinearOperator
    if type(a) is operators.Mask:
        b = operators.Mask(both, a.domain)
    elif type(a) is operators.SubsampledFourier:
        b = operators.SubsampledFourier(both, a.domain)
    elif type(a) is operators.MultiCoilMRI:
        b = operators.MultiCoilMRI(both[0], a.coil_maps, units=a.domain.units, spacing=a.domain.spacing)
    else:
        b = Restricted(operators.Mask(mask, a.range), a)
    return replace(problem, operator=b, y=problem.y * both)


class Restricted(ComposedLinear):
    """``M A`` with a mask ``M`` on the data of ``A``."""

    @property
    def mask(self) -> Tensor:
        """The mask."""
        return self.parts[0].mask

    @property
    def support(self) -> Tensor:
        """The mask: data exist where it is 1."""
        return self.mask


class _Offer:
    """The candidates of a problem: which data belong to which, and which are on offer."""

    def __init__(self, problem: Problem, axis: str | None) -> None:
        self.problem = problem
        self.whitened = problem.whiten()
        space = problem.operator.range
        own = getattr(problem.operator, "mask", None)
        whole = torch.ones(space.shape) if own is None else own[0].float()
        if axis is not None:
            if axis not in space.dims:
                raise InvdiffError(f"The data have no dimension {axis!r}; they have {', '.join(space.dims)}.")
            at = space.dims.index(axis)
            shape = [space.shape[at] if i == at else 1 for i in range(len(space.shape))]
            whole = whole.expand(*whole.shape[:at], space.shape[at], *whole.shape[at + 1 :])
            labels = torch.arange(space.shape[at]).reshape(shape).expand(whole.shape)
        else:
            labels = torch.arange(whole.numel()).reshape(whole.shape)
        self.labels, self.n = labels, int(labels.max()) + 1
        missing = torch.zeros(self.n).index_add_(0, labels.flatten(), 1 - whole.flatten())
        self.pool = (missing == 0).nonzero()[:, 0].tolist()

    def check_start(self, start: Sequence[int] | None) -> list[int]:
        """Return the candidates to begin with, or say what is wrong with them."""
        if start is None:
            middle = int(self.labels[tuple(n // 2 for n in self.labels.shape)])
            start = [middle] if middle in self.pool else self.pool[len(self.pool) // 2 :][:1]
        chosen = list(dict.fromkeys(int(c) for c in start))
        if not chosen or not set(chosen) <= set(self.pool):
            raise InvdiffError(
                f"The start must be among the {len(self.pool)} candidates on offer, got {list(start)!r:.60}."
            )
        return chosen

    def mask(self, taken: Sequence[int]) -> Tensor:
        """Return zeros and ones, shaped as one mask of the operator."""
        return torch.isin(self.labels, torch.tensor(taken)).double()

    def gone(self, taken: Sequence[int]) -> Tensor:
        """Return ``(n,)``: which candidates are taken or not on offer."""
        gone = torch.ones(self.n, dtype=torch.bool)
        gone[self.pool] = False
        gone[list(taken)] = True
        return gone

    def predict(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the data that draws ``(P, *image)`` predict, ``(P, m)``, over their noise, and their groups."""
        problem = self.whitened.rows(torch.zeros(len(x), dtype=torch.long))
        z = problem.operator(x)
        sigma = problem.likelihood.gaussian_sigma(z)
        assert sigma is not None
        z = z / sigma.clamp_min(torch.finfo(sigma.dtype).tiny)
        groups = self.labels.expand(z.shape[1:])
        if z.is_complex():
            z, groups = torch.view_as_real(z.resolve_conj()), groups[..., None].expand(*z.shape[1:], 2)
        return z.flatten(1).double(), groups.flatten()


def _check(problem: Problem, sampler: Sampler, draws: int) -> None:
    if problem.n_cases != 1:
        raise InvdiffError(
            f"Acquisition chooses for one case at a time, and the problem has {problem.n_cases}; pick one with "
            "problem.rows(torch.tensor([i]))."
        )
    if not {"linear", "quadratic"} <= problem.capabilities:
        raise InvdiffError(
            f"Acquisition needs a linear operator and a likelihood with a Gaussian noise level, and "
            f"{problem.operator.name} with {problem.likelihood.name} is not that."
        )
    if bool((problem.whiten().sigma(problem.y) == 0).any()):
        raise InvdiffError("Acquisition weighs predictions by the noise level, which is 0; give it one above 0.")
    if sampler.kind == "point" or draws < 2:
        raise InvdiffError(f"Acquisition needs at least 2 draws, and {sampler.name} was asked for {draws}.")


def _draws(made: Posterior, problem: Problem) -> Tensor:
    """Return the draws that did not fail, ``(P, *image)``, in the precision of the problem."""
    x = torch.from_numpy(np.array(made.draws)).reshape(-1, *problem.operator.domain.shape)
    good = torch.from_numpy(np.array(made.stats["status"] == "ok").reshape(-1))
    return x[good].to(problem.operator.domain.dtype)
