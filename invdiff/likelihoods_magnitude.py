"""Noise of magnitude images: Rician."""

from __future__ import annotations

import torch
from torch import Tensor

from invdiff.errors import InvdiffError
from invdiff.likelihood import Likelihood
from invdiff.likelihoods_counts import not_negative, strictly_positive
from invdiff.rng import Streams


class Rician(Likelihood):
    """``y = |z + sigma (eps_1 + i eps_2)|`` for a real amplitude ``z``.

    ``log p = log(y / sigma^2) - (y - |z|)^2 / (2 sigma^2) + log i0e(y |z| / sigma^2)`` with
    ``i0e(t) = exp(-t) I0(t)``, so that nothing overflows.

    Args:
        sigma: Noise level per real component of the complex data, above 0; a number or ``(1 or N, ...)``.

    Raises:
        InvdiffError: If sigma is not positive; on use, if ``y`` is negative or ``z`` complex.

    Source: Gudbjartsson and Patz, "The Rician distribution of noisy MRI data", MRM 1995.
    """

    def __init__(self, sigma: float | Tensor) -> None:
        self.sigma = strictly_positive(sigma, "The Rician noise level sigma")

    def _sigma(self, z: Tensor) -> Tensor:
        if z.is_complex():
            raise InvdiffError(
                "Rician noise needs real amplitudes, and the operator gives complex numbers; "
                "let it end in a magnitude, or use Gaussian noise on complex data."
            )
        return self.sigma.to(z)

    def sample(self, z: Tensor, rng: Streams) -> Tensor:
        """Return ``|z + sigma (eps_1 + i eps_2)|``."""
        sigma = self._sigma(z)
        return torch.hypot(z + sigma * rng.normal(z), sigma * rng.normal(z))

    def log_prob(self, z: Tensor, y: Tensor) -> Tensor:
        """Return the normalised log-density, ``(B,)``; minus infinity where ``y`` is 0."""
        not_negative(y, self.name)
        sigma, a = self._sigma(z), z.abs()
        log_p = (y / sigma**2).log() - 0.5 * ((y - a) / sigma) ** 2 + torch.special.i0e(y * a / sigma**2).log()
        return log_p.flatten(1).sum(1)

    def score(self, z: Tensor, y: Tensor) -> Tensor:
        """Return ``(y I1(t) / I0(t) sign(z) - z) / sigma^2`` with ``t = y |z| / sigma^2``."""
        not_negative(y, self.name)
        sigma = self._sigma(z)
        t = y * z.abs() / sigma**2
        return (y * torch.special.i1e(t) / torch.special.i0e(t) * z.sign() - z) / sigma**2

    def gaussian_sigma(self, z: Tensor) -> Tensor | None:
        """Return ``sigma``: right where ``z`` is several ``sigma``; below, data lie ``sigma^2 / 2z`` too high."""
        return self._sigma(z)
