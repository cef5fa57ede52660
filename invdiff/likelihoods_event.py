"""Events: data that say only whether a quantity lies between two bounds; and the probability of an event."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from invdiff.errors import InvdiffError
from invdiff.likelihood import Likelihood, positive
from invdiff.rng import Streams

if TYPE_CHECKING:
    from invdiff.prior import Prior
    from invdiff.problem import Problem

#: Bounds further away than this, in units of the width, are put here: beyond, squares lose all digits.
_FAR = 1e6


class Event(Likelihood):
    """``y = 1`` where ``low < z + sigma eps < high``, else ``y = 0``; every component of ``y`` is an event.

    ``log p(1) = log(Phi(b) - Phi(a))`` and ``log p(0) = log(Phi(a) + Phi(-b))`` with ``a = (low - z) / sigma`` and
    ``b = (high - z) / sigma``. By default the event ``C(x) > 0``: ``Problem(C, Event(), torch.ones(1))``.

    With ``sigma = 0`` the event is sharp: ``log p`` is 0 or minus infinity, and the score is 0 everywhere, of no
    use to gradient guidance; `EventGuided` widens the event by the spread of ``p(x0 | x)`` and needs no ``sigma``.

    Args:
        low: Lower bound in units of ``z``: a number, or ``(1 or N, ...)`` over ``(N, *range)``; may be ``-inf``.
        high: Upper bound, above ``low``; may be ``inf``.
        sigma: Width of the bounds, at least 0; likewise.

    Raises:
        InvdiffError: If the bounds are not ordered, or both infinite; on use, if ``y`` is neither 0 nor 1, or
            ``z`` complex.

    Source: Finzi et al., "User-defined event sampling and uncertainty quantification in diffusion models for
    physical dynamical systems", ICML 2023.
    """

    def __init__(
        self, low: float | Tensor = 0.0, high: float | Tensor = math.inf, sigma: float | Tensor = 0.0
    ) -> None:
        self.low, self.high = torch.as_tensor(low).double(), torch.as_tensor(high).double()
        self.sigma = positive(sigma, "The width sigma of the event")
        if not bool((self.low < self.high).all()) or bool((self.low.isinf() & self.high.isinf()).any()):
            raise InvdiffError("An event needs low < high, at least one of them finite; check its bounds.")

    def widened(self, variance: Tensor) -> Event:
        """Return ``int N(z; m, variance) p(y | z) dz`` as a likelihood of the mean ``m``."""
        out = Event.__new__(Event)
        out.low, out.high = self.low, self.high
        out.sigma = (self.sigma.to(variance) ** 2 + variance).sqrt()
        return out

    def sample(self, z: Tensor, rng: Streams) -> Tensor:
        """Return 1 where the event happens, else 0."""
        low, high, sigma = self._numbers(z)
        seen = z + sigma * rng.normal(z)
        return ((seen > low) & (seen < high)).to(z.dtype)

    def log_prob(self, z: Tensor, y: Tensor) -> Tensor:
        """Return the log-probability that all components are as observed, ``(B,)``."""
        inside = _labels(y)
        low, high, sigma = self._numbers(z)
        if bool((sigma == 0).all()):
            right = ((z > low) & (z < high)) == inside
            return torch.where(right, 0.0, -torch.inf).to(z.dtype).flatten(1).sum(1)
        return self._log(*self._ends(z), inside).to(z.dtype).flatten(1).sum(1)

    def score(self, z: Tensor, y: Tensor) -> Tensor:
        """Return ``+-(phi(a) - phi(b)) / (sigma p)``; 0 where sigma is 0."""
        return self.slope_and_bend(z, y)[0]

    def slope_and_bend(self, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the first derivative of ``log p`` per component of ``z``, and minus the second.

        For ``z ~ N(m, v)`` and the widened event at ``m`` these give the moments of ``z`` given the event:
        ``E z = m + v slope`` and ``Var z = v - v^2 bend``.
        """
        inside, sigma = _labels(y), self._numbers(z)[2]
        if bool((sigma == 0).all()):
            return torch.zeros_like(z), torch.zeros_like(z)
        a, b = self._ends(z)
        log_p = self._log(a, b, inside) + 0.5 * math.log(2 * math.pi)
        sign = torch.where(inside, 1.0, -1.0)
        at_a, at_b = (-0.5 * a * a - log_p).exp(), (-0.5 * b * b - log_p).exp()
        slope = sign * (at_a - at_b) / sigma
        bend = slope**2 - sign * (a * at_a - b * at_b) / sigma**2
        return slope.to(z.dtype), bend.to(z.dtype)

    def weigh(self, mean: Tensor, covariance: Tensor, y: Tensor) -> Tensor:
        """Return ``w``, ``(B, m)``, with ``E[x | events] = E x + Cov(x, z) w`` for jointly Gaussian ``x``, ``z``.

        Events are taken one after another, each with the moments of ``z`` that its predecessors left: exact for
        one event, and wherever they are independent.

        Args:
            mean: ``E z``, ``(B, m)``.
            covariance: ``Cov z``, ``(B, m, m)``.
            y: ``(B, *range)``.
        """
        w, v = torch.zeros_like(mean), covariance
        mix = torch.eye(mean.shape[1], dtype=mean.dtype, device=mean.device).expand_as(v)
        for j in range(mean.shape[1]):
            wide = self.widened(v.diagonal(dim1=1, dim2=2).reshape(y.shape))
            slope, bend = (u.flatten(1)[:, j, None] for u in wide.slope_and_bend(mean.reshape(y.shape), y))
            row = (v[:, j, :] * bend)[:, None]
            w, mean = w + mix[:, :, j] * slope, mean + v[:, :, j] * slope
            mix, v = mix - mix[:, :, j, None] * row, v - v[:, :, j, None] * row
        return w

    def _numbers(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if z.is_complex():
            raise InvdiffError("An event needs a real quantity, and the operator gives complex numbers.")
        return self.low.to(z), self.high.to(z), self.sigma.to(z)

    def _ends(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """``a`` and ``b``, finite and in double precision."""
        z = z.double()
        low, high, sigma = self._numbers(z)
        wide = sigma.clamp_min(1e-300)
        return ((low - z) / wide).clamp(-_FAR, _FAR), ((high - z) / wide).clamp(-_FAR, _FAR)

    def _log(self, a: Tensor, b: Tensor, inside: Tensor) -> Tensor:
        """Log-probability per component."""
        flip = a + b > 0  # in the lower tail both terms are small and their difference is accurate
        low, high = torch.where(flip, -b, a), torch.where(flip, -a, b)
        top = torch.special.log_ndtr(high)
        within = top + torch.log(-torch.expm1(torch.special.log_ndtr(low) - top))
        without = torch.logaddexp(torch.special.log_ndtr(a), torch.special.log_ndtr(-b))
        return torch.where(inside, within, without)


def _labels(y: Tensor) -> Tensor:
    if not bool(((y == 0) | (y == 1)).all()):
        raise InvdiffError("The data of an event are 1 (it happened) or 0 (it did not), and y holds other values.")
    return y == 1


class EventProbability(NamedTuple):
    """A probability, its standard error, and the effective number of draws behind it."""

    value: float
    error: float
    ess: float


def event_probability(
    problem: Problem,
    prior: Prior,
    *,
    draws: int = 1000,
    seed: int = 0,
    method: Literal["guided", "prior"] = "guided",
    **options: Any,
) -> EventProbability:
    """Estimate ``P(y) = E_prior p(y | A(x))``: the probability of an event, or the evidence of any data.

    ``prior`` averages over draws from the prior: unbiased, and hopeless for events rarer than ``1 / draws``.
    ``guided`` averages importance weights of paths that `EventGuided` steers to the event, ``p(path) p(y | x) /
    q(path)``: unbiased for the prior that the discretised chain draws from, and good for rare events.

    Args:
        problem: Operator, likelihood (`Event`, say) and data of one case.
        prior: Prior of the images.
        draws: Number of draws.
        seed: Of the draws.
        method: ``guided`` or ``prior``.
        **options: Settings of `EventGuided`, for ``guided``.

    Returns:
        Value, standard error, and effective number of draws (at most ``draws``; below some tens trust nothing).
    """
    from invdiff.driver import sample
    from invdiff.samplers import get

    if problem.n_cases != 1:
        raise InvdiffError(f"One event at a time: the problem has {problem.n_cases} cases; pick one with rows.")
    if method == "guided":
        posterior = sample(problem, prior, get("eventguided", weights=True, **options), draws=draws, seed=seed)
        log_weight = np.asarray(posterior.stats["log_weight"], dtype=np.float64).reshape(-1)
    else:
        posterior = sample(None, prior.adapt(problem), draws=draws, seed=seed, shape=problem.operator.domain)
        x = torch.from_numpy(np.array(posterior.draws)).reshape(-1, *problem.operator.domain.shape)
        log_weight = problem.rows(torch.zeros(len(x), dtype=torch.long)).log_likelihood(x).double().numpy()
    return _mean_of_logs(log_weight)


def _mean_of_logs(log_weight: np.ndarray) -> EventProbability:
    usable = log_weight[np.isfinite(log_weight) | np.isneginf(log_weight)]
    top = float(usable.max(initial=-np.inf))
    if not np.isfinite(top):
        return EventProbability(0.0, math.nan, 0.0)
    w = np.exp(usable - top)
    scale, n = math.exp(top), len(w)
    error = w.std(ddof=1) / math.sqrt(n) if n > 1 else math.nan
    return EventProbability(scale * float(w.mean()), scale * float(error), float(w.sum() ** 2 / (w**2).sum()))
