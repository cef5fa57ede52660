"""Frames of networks that were trained in continuous time, where no table of steps exists.

Song et al., ICLR 2021, arXiv:2011.13456; Karras et al., NeurIPS 2022, arXiv:2206.00364, table 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from invdiff.errors import InvdiffError
from invdiff.priors.frames import Frame

__all__ = ["SDEVP", "LogVE"]


class SDEVP(Frame):
    """Variance preserving with ``beta`` linear in time: ``sigma(t)^2 = exp(beta_d t^2 / 2 + beta_min t) - 1``.

    ``c = 1 / sqrt(1 + sigma^2)``, and the network's time is ``steps - 1`` times ``t``, with

        t(sigma) = (sqrt(beta_min^2 + 2 beta_d log(1 + sigma^2)) - beta_min) / beta_d.

    Args:
        beta_d, beta_min: Slope of ``beta`` and its value at time 0.
        steps: Number that the network counts to.
        first: Smallest ``t`` of the training; the largest is 1.

    Raises:
        InvdiffError: If a number is not positive.
    """

    serves = ("epsilon", "score", "x0", "v")

    def __init__(
        self, beta_d: float = 19.9, beta_min: float = 0.1, steps: int = 1000, first: float = 1e-5
    ) -> None:
        if not all(0 < v < math.inf for v in (beta_d, beta_min, steps - 1, first)):
            raise InvdiffError(
                f"A VP frame needs positive beta_d, beta_min and first time and more than one step, got "
                f"{beta_d:g}, {beta_min:g}, {first:g}, {steps}."
            )
        self.beta_d, self.beta_min, self.steps = float(beta_d), float(beta_min), int(steps)
        self._limits(*(math.sqrt(math.expm1(beta_d * t * t / 2 + beta_min * t)) for t in (first, 1.0)))

    def scale(self, sigma: Tensor) -> Tensor:
        """Return ``1 / sqrt(1 + sigma^2)``."""
        return (1 + sigma**2).rsqrt()

    def time(self, sigma: Tensor) -> Tensor:
        """Return ``(steps - 1) t(sigma)``."""
        # t = 2 L / (sqrt(beta_min^2 + 2 beta_d L) + beta_min): no cancellation at low noise.
        log = torch.log1p(sigma**2)
        return (self.steps - 1) * 2 * log / ((self.beta_min**2 + 2 * self.beta_d * log).sqrt() + self.beta_min)


class LogVE(Frame):
    """Variance exploding with time ``log(sigma / 2)``, as EDM conditions its VE networks.

    Args:
        sigma_min, sigma_max: Levels of the training.

    Raises:
        InvdiffError: If levels are not ``0 < sigma_min < sigma_max``.
    """

    serves = ("epsilon", "x0")

    def __init__(self, sigma_min: float = 0.02, sigma_max: float = 100.0) -> None:
        self._limits(sigma_min, sigma_max)

    def scale(self, sigma: Tensor) -> Tensor:
        """Return one."""
        return torch.ones_like(sigma)

    def time(self, sigma: Tensor) -> Tensor:
        """Return ``log(sigma / 2)``."""
        return (sigma / 2).log()
