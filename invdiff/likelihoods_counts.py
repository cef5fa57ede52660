"""Noise of counting detectors: Poisson, and Poisson with Gaussian read-out noise."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from invdiff.errors import InvdiffError
from invdiff.likelihood import Likelihood, positive
from invdiff.rng import Streams

#: Counts of more than this times the expected ones are more probable here than by the law; see `Poisson`.
SURPRISE = 20.0
#: Expected counts below this are taken as this by the Poisson-Gaussian law, whose sum needs a logarithm of them.
FLOOR = 1e-3
#: Nodes on either side of the largest term of the Poisson-Gaussian sum.
_NODES = 52


class _Counting(Likelihood):
    """What both laws share: ``gain``, ``background`` and the expected count ``(z + background) / gain``."""

    gain: Tensor
    background: Tensor

    def _rate(self, z: Tensor) -> Tensor:
        """Return the expected counts, which iterates may make negative."""
        if z.is_complex():
            raise InvdiffError(f"{self.name} noise needs real data, and the operator gives complex numbers.")
        return (z + self.background.to(z)) / self.gain.to(z)

    def mean(self, z: Tensor) -> Tensor:
        """Return ``z + background``."""
        return z + self.background.to(z)

    def _counts(self, z: Tensor, rng: Streams) -> Tensor:
        """Draw Poisson counts, row ``r`` from stream ``r``."""
        rate = self._rate(z).detach().clamp_min(0).to("cpu", torch.float64).numpy()
        rows = [torch.from_numpy(rng.numpy(r).poisson(row).astype("float64")) for r, row in enumerate(rate)]
        return torch.stack([r.reshape(z.shape[1:]) for r in rows]).to(z)


class Poisson(_Counting):
    """``y = gain * k`` with ``k ~ Poisson((z + background) / gain)``.

    ``log p(y) = k log(rate) - rate - log k!``, a probability per count. ``E y = z + background`` and
    ``Var y = gain (z + background)``.

    Where ``rate < k / 20``, and where it is negative, the log-probability goes on as a parabola of the curvature
    ``400 / max(k, 1)``: concave and finite everywhere, so that iterates of samplers that expect next to nothing,
    or less, are drawn back and are not thrown far away by the score ``k / rate``. That concerns counts that are
    twenty times the expected ones, whose law is below ``exp(-2 k)`` of its largest value; the probabilities sum to
    1 within 1e-7 at rates above 0.2, and within 1.2 % below.

    Args:
        gain: Units of ``y`` per count; a number or ``(1 or N, ...)`` over ``(N, *range)``.
        background: Known mean background in units of ``y``, not subtracted from it; likewise.

    Raises:
        InvdiffError: If the gain is not positive or the background negative; on use, if ``y`` is negative.
    """

    def __init__(self, gain: float | Tensor = 1.0, background: float | Tensor = 0.0) -> None:
        self.gain = strictly_positive(gain, "The Poisson gain")
        self.background = positive(background, "The Poisson background")

    def sample(self, z: Tensor, rng: Streams) -> Tensor:
        """Return ``gain * k``."""
        return self._counts(z, rng) * self.gain.to(z)

    def log_prob(self, z: Tensor, y: Tensor) -> Tensor:
        """Return the log-probability of the counts ``y / gain``, ``(B,)``."""
        k, rate, edge, beyond = self._split(z, y)
        law = torch.xlogy(k, rate) - rate - torch.lgamma(k + 1)
        slope = torch.where(k > 0, SURPRISE - 1, -1.0)
        return (law + slope * beyond - 0.5 * edge * beyond**2).flatten(1).sum(1)

    def score(self, z: Tensor, y: Tensor) -> Tensor:
        """Return ``(k / rate - 1) / gain``, and the slope of the parabola where that holds."""
        k, rate, edge, beyond = self._split(z, y)
        inside = torch.where(k > 0, k / torch.where(k > 0, rate, 1), 0) - 1
        return (inside - edge * beyond) / self.gain.to(z)

    def curvature(self, z: Tensor, y: Tensor) -> Tensor | None:
        """Return ``max(k, rate) / rate^2``, at least what it is at ``rate = k``, and at most the parabola's.

        The local ``k / rate^2`` next to vanishes where far more is expected than counted, and a step of that size
        would end far below 0.
        """
        k, rate, top, _ = self._split(z, y)
        rate = rate.clamp_min(1 / SURPRISE**2)
        here = torch.minimum(torch.maximum(k, rate) / rate**2, top)
        return torch.maximum(here, 1 / k.clamp_min(1)) / self.gain.to(z) ** 2

    def _split(self, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return counts, rates moved up to where the law holds, the parabola's curvature, and minus the move."""
        not_negative(y, self.name)
        k, rate = y / self.gain.to(z), self._rate(z)
        held = torch.maximum(rate, k / SURPRISE)
        return k, held, SURPRISE**2 / k.clamp_min(1), rate - held

    def gaussian_sigma(self, z: Tensor) -> Tensor | None:
        """Return ``sqrt(gain * z)``, at least that of one count; None with a background.

        With a background ``y`` is not centred on ``z``, and a surrogate around ``y - z`` would be biased.
        """
        if bool((self.background > 0).any()):
            return None
        return self.gain.to(z) * self._rate(z).clamp_min(1).sqrt()


class PoissonGaussian(_Counting):
    """``y = gain * k + sigma * eps`` with ``k ~ Poisson(z / gain)``.

    ``p(y) = sum_k Poisson(k; z / gain) N(y; gain k, sigma^2)``. The sum runs over the terms within ten
    standard deviations of its largest one; where these are more than a hundred, it runs in equal strides,
    which is exact to rounding for a summand that smooth. Expected counts below 1e-3 are taken as 1e-3, and a
    parabola of curvature 400 draws negative ones back.

    Args:
        gain: Units of ``y`` per count; a number or ``(1 or N, ...)`` over ``(N, *range)``.
        sigma: Read-out noise in units of ``y``, above 0; likewise.

    Raises:
        InvdiffError: If gain or sigma is not positive.
    """

    def __init__(self, gain: float | Tensor, sigma: float | Tensor) -> None:
        self.gain = strictly_positive(gain, "The Poisson-Gaussian gain")
        self.sigma = strictly_positive(sigma, "The Poisson-Gaussian read-out noise sigma")
        self.background = torch.zeros((), dtype=torch.float64)

    def sample(self, z: Tensor, rng: Streams) -> Tensor:
        """Return ``gain * k + sigma * eps``."""
        return self._counts(z, rng) * self.gain.to(z) + self.sigma.to(z) * rng.normal(z)

    def log_prob(self, z: Tensor, y: Tensor) -> Tensor:
        """Return the normalised log-density, ``(B,)``."""
        below = self._rate(z).clamp_max(0)
        return (self._sum(z, y)[0] - 0.5 * SURPRISE**2 * below**2).flatten(1).sum(1)

    def score(self, z: Tensor, y: Tensor) -> Tensor:
        """Return ``(E[k | y] / rate - 1) / gain``, and the slope of the parabola below 0."""
        rate = self._rate(z)
        inside = torch.where(rate < FLOOR, 0, self._sum(z, y)[1] / rate.clamp_min(FLOOR) - 1)
        return (inside - SURPRISE**2 * rate.clamp_max(0)) / self.gain.to(z)

    def _sum(self, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``log p(y)`` and ``E[k | y]`` per element."""
        gain, rate = self.gain.to(z), self._rate(z).clamp_min(FLOOR)
        sigma, log_rate = self.sigma.to(z), rate.log()
        centre, stride = self._window(rate.detach(), y.detach() / gain, sigma / gain)

        def term(k: Tensor) -> Tensor:
            return k * log_rate - rate - torch.lgamma(k + 1) - 0.5 * ((y - gain * k) / sigma) ** 2

        top = term(centre)
        total, moment = torch.zeros_like(top), torch.zeros_like(top)
        for j in range(-_NODES, _NODES + 1):
            k = centre + j * stride
            weight = torch.where(k >= 0, (term(k.clamp_min(0)) - top).exp(), 0)
            total, moment = total + weight, moment + weight * k
        log_p = top + (total * stride).log() - (sigma * math.sqrt(2 * math.pi)).log()
        return log_p, moment / total

    @staticmethod
    def _window(rate: Tensor, y: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """Return the integer nearest to the largest term, and the stride, per element (in counts).

        Newton's method on the concave ``k log rate - log k! - (y - k)^2 / (2 s^2)``.
        """
        k = (rate * (s**2 + y) / (rate + s**2)).clamp_min(0)
        for _ in range(8):
            slope = rate.log() - torch.digamma(k + 1) + (y - k) / s**2
            k = (k + slope / (torch.polygamma(1, k + 1) + 1 / s**2)).clamp_min(0)
        width = (torch.polygamma(1, k + 1) + 1 / s**2).rsqrt()
        return k.round(), (width / 4).floor().clamp_min(1)

    def gaussian_sigma(self, z: Tensor) -> Tensor | None:
        """Return ``sqrt(gain * max(z, 0) + sigma^2)``, with the mean and variance of ``y``."""
        gain, rate = self.gain.to(z), self._rate(z).clamp_min(FLOOR)
        return (gain**2 * rate + self.sigma.to(z) ** 2).sqrt()


def strictly_positive(value: float | Tensor, what: str) -> Tensor:
    """Return ``value`` as a tensor that is finite and above 0 everywhere."""
    out = positive(value, what)
    if bool((out == 0).any()):
        raise InvdiffError(f"{what} must be above 0, got 0.")
    return out


def not_negative(y: Tensor, name: str) -> None:
    """Raise one sentence if data are negative."""
    if bool((y < 0).any()):
        raise InvdiffError(
            f"{name} data cannot be negative, and y holds {int((y < 0).sum())} negative values; "
            "undo any subtraction."
        )
