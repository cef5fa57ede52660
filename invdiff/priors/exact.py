"""What priors known in closed form share: noise levels per row, a range of sigma, score, Jacobian, draws."""

from __future__ import annotations

import copy
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from invdiff.prior import Denoiser
from invdiff.priors.covariance import Covariance
from invdiff.spaces import Space, per_row
from invdiff.tensors import move

#: ``sigma_max`` over the root of the largest second moment; starting from pure noise then costs 0.1 % of width.
SIGMA_MAX_FACTOR = 20.0
#: ``sigma_min`` over the standard deviation.
SIGMA_MIN_FACTOR = 1e-3


class ExactDenoiser(Denoiser):
    """A denoiser with closed-form score, Jacobian, density and draws.

    ``p_sigma`` is the law of ``x0 + sigma * eps``; ``D(x) = x + sigma^2 grad log p_sigma(x)``.
    """

    space: Space
    differentiable = 2

    @abstractmethod
    def log_prob(self, x: Tensor, sigma: Tensor | float = 0.0) -> Tensor:
        """Return ``log p_sigma(x)``, ``(B, *shape) -> (B,)``."""

    @abstractmethod
    def score(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """Return ``grad log p_sigma(x)``, ``(B, *shape)``."""

    @abstractmethod
    def jacobian_product(self, x: Tensor, sigma: Tensor | float, v: Tensor) -> Tensor:
        """Return ``J v`` for the symmetric Jacobian ``J = dD/dx = Cov[x0 | x] / sigma^2``, ``(B, *shape)``."""

    @abstractmethod
    def sample(self, n: int, seed: int = 0) -> Tensor:
        """Return ``n`` independent exact draws, ``(n, *shape)``."""

    @abstractmethod
    def components(self) -> list[tuple[float, Tensor, Covariance]]:
        """Return the law as a mixture of Gaussians: ``(log weight, mean of shape (*shape), covariance)``."""

    def _set(
        self, space: Space, std: float, moment: float, sigma_min: float | None, sigma_max: float | None
    ) -> None:
        """Set what the contract asks for, with a range of noise levels fit for ``std`` and ``moment``."""
        self.space, self.dtype, self.channels = space, space.dtype, space.shape[0]
        self.sigma_data = std
        self.sigma_min = SIGMA_MIN_FACTOR * std if sigma_min is None else float(sigma_min)
        self.sigma_max = SIGMA_MAX_FACTOR * moment**0.5 if sigma_max is None else float(sigma_max)

    def _variance(self, sigma: Tensor | float, x: Tensor) -> Tensor:
        """Return ``sigma^2`` broadcasting over ``(B, *shape)``."""
        return per_row(sigma, x) ** 2

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Any:
        """Return a copy on another device or in another precision."""
        new = copy.copy(self)
        covariances: dict[int, Any] = {}  # components may share one, and go on sharing it

        def moved(value: Any) -> Any:
            if isinstance(value, Covariance):
                return covariances.setdefault(id(value), value.to(device, dtype))
            if isinstance(value, list):
                return [moved(v) for v in value]
            return move(value, device, dtype)

        for key, value in self.__dict__.items():
            new.__dict__[key] = moved(value)
        if dtype is not None:
            new.dtype = dtype
        return new
