"""Do draws explain the data as the noise law says? Tests of residuals that need no truth.

If ``x`` is a draw from the exact posterior of ``y``, the pair ``(x, y)`` has the same law as (truth, data). So the
residual ``y - A(x)`` of one draw per case follows the law of the noise, exactly: not the residual of the mean,
and not on average only. Both tests turn it into one number per case that is uniform for exact draws.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from invdiff.uq.draws import read_draws

if TYPE_CHECKING:
    from torch import Tensor

    from invdiff.problem import Problem

#: Replicated data where the law of a statistic is not known in closed form.
REPLICATES = 63
#: Neighbouring pairs of data from which on their correlation is taken as normal.
MANY_PAIRS = 2000


def predictive_chi_squared(problem: Problem, draws: Any, seed: int = 0) -> np.ndarray:
    """Return the place of ``||W (y - A(x))||^2`` of one draw per case in its law, ``(case,)`` in (0, 1).

    Near 0 the draws fit the noise, near 1 they miss the data. Gaussian noise has the chi-squared law with as many
    degrees of freedom as real data; for other noise the log-likelihood of ``y`` is ranked among that of
    replicated data.

    Args:
        problem: Operator, noise and the data of every case.
        draws: ``(case, draw, ...)`` or a `Posterior`; one per case is enough.
        seed: Of the choice of the draw.
    """
    from scipy.stats import chi2

    from invdiff.likelihoods import CorrelatedGaussian, Gaussian

    if not isinstance(problem.likelihood, (Gaussian, CorrelatedGaussian)):
        return np.array([_replicated(own, x, case, seed) for case, own, x in _one_draw(problem, draws, seed)])
    out = []
    for _, own, x in _one_draw(problem, draws, seed):
        r = _white_residual(own, x)[_support(own)]
        out.append(chi2.cdf(float((r**2).sum()), r.size))
    return np.array(out)


def residual_whiteness(problem: Problem, draws: Any, seed: int = 0) -> np.ndarray | None:
    """Return the place of the correlation of neighbouring residuals in its law, ``(case,)`` in (0, 1).

    The statistic is the sum of ``r_k r_(k+1)`` over all axes of the data, of the whitened residual of one draw per
    case. Near 1 the residuals vary slowly: structure is left in the data, or the operator is wrong. None where
    there are no neighbours, or the noise is not Gaussian.
    """
    from scipy.special import ndtr

    from invdiff.likelihoods import CorrelatedGaussian, Gaussian

    if not isinstance(problem.likelihood, (Gaussian, CorrelatedGaussian)):
        return None
    out = []
    for case, own, x in _one_draw(problem, draws, seed):
        r, there = _white_residual(own, x), _support(own)
        rank = r.ndim - 1
        pairs = _neighbours(there[None].astype(float), rank)[0]
        if pairs < 1:
            return None
        value = _neighbours(np.where(there, r, 0.0)[None], rank)[0]
        if pairs >= MANY_PAIRS:
            out.append(float(ndtr(value / np.sqrt(pairs))))
            continue
        rng = np.random.default_rng([seed, case, 0x3417E])
        noise = np.where(there, rng.standard_normal((REPLICATES, *r.shape)), 0.0)
        out.append(((_neighbours(noise, rank) < value).sum() + rng.random()) / (REPLICATES + 1))
    return np.array(out)


def _one_draw(problem: Problem, draws: Any, seed: int) -> Iterator[tuple[int, Problem, Tensor]]:
    """Yield case, its problem, and one of its draws as a row."""
    import torch

    for case, (x, w) in enumerate(read_draws(draws, least=1)):
        chosen = np.random.default_rng([seed, case, 0x0D2]).choice(len(x), p=w)
        own = problem.rows(torch.tensor([case]))
        row = torch.from_numpy(np.ascontiguousarray(x[chosen][None]))
        yield case, own, row.to(problem.y.device, problem.operator.domain.dtype)


def _white_residual(own: Problem, x: Tensor) -> np.ndarray:
    """Residual in noise levels, complex ones with an axis of two at the front, ``([2,] *range)``."""
    whitener = own.likelihood.whiten()
    z = own.operator(x)
    r = own.y - z
    if whitener is not None:
        return _stacked(whitener(r)[0])
    level = own.likelihood.gaussian_sigma(z)
    assert level is not None  # both Gaussian laws have one or the other
    return _stacked((r / level)[0])


def _stacked(r: Any) -> np.ndarray:
    values = r.detach().cpu().resolve_conj().numpy()
    return np.stack([values.real, values.imag]) if np.iscomplexobj(values) else values[None]


def _support(own: Problem) -> np.ndarray:
    """Where data exist, shaped as the stacked residual."""
    support = own.operator.support
    shape = (2 if own.y.is_complex() else 1, *own.operator.range.shape)
    if support is None:
        return np.ones(shape, dtype=bool)
    return np.broadcast_to((support[:1] != 0).expand(1, *shape[1:]).cpu().numpy(), shape)


def _neighbours(r: np.ndarray, rank: int) -> np.ndarray:
    """Sum of products of neighbours along the last ``rank`` axes, over all axes but the first, ``(n,)``."""
    total = np.zeros(len(r))
    for axis in range(r.ndim - rank, r.ndim):
        ahead, behind = (r[(slice(None),) * axis + (part,)] for part in (slice(1, None), slice(-1)))
        total += (ahead * behind).reshape(len(r), -1).sum(1)
    return total


def _replicated(own: Problem, x: Tensor, case: int, seed: int) -> float:
    """Rank of the misfit of the data among replicates given the same draw."""
    import torch

    from invdiff.rng import INIT, Streams
    from invdiff.uq.ranks import exchange_rank

    z = own.operator(x)
    noisy = own.likelihood.rows(torch.zeros(REPLICATES, dtype=torch.long))
    many = z.expand(REPLICATES, *z.shape[1:]).contiguous()
    key = int(np.random.SeedSequence([seed, 0x9E9]).generate_state(1)[0])
    made = noisy.sample(many, Streams(key, [(case, s) for s in range(REPLICATES)]).at(INIT)).to(own.y.dtype)
    if own.operator.support is not None:
        made = made * own.operator.support[:1].to(made.device, made.real.dtype)
    misfit = -torch.cat([own.likelihood.log_prob(z, own.y), noisy.log_prob(many, made)]).double().cpu().numpy()
    return exchange_rank(misfit, np.random.default_rng([seed, case, 0x9E9]))
