"""Correlated Gaussian noise on data some of which are angles."""

from __future__ import annotations

import torch
from torch import Tensor

from invdiff.errors import InvdiffError
from invdiff.likelihoods_gaussian import CorrelatedGaussian
from invdiff.rng import Streams
from invdiff.spaces import Space


class WrappedGaussian(CorrelatedGaussian):
    """Correlated Gaussian noise where some data are angles, which know no full turns.

    ``log p = -||L^-1 r||^2 / 2 - sum log diag L - (m / 2) log 2 pi`` with ``C = L L^T`` and ``r = y - z``, of
    which angles are brought to ``(-pi, pi]``. That is the law of wrapped noise as long as it rarely reaches half a
    turn, so that standard deviations of angles above 1 radian are refused: such data say next to nothing.

    Args:
        covariance: ``C``, ``(m, m)`` or ``(1 or N, m, m)``.
        space: Range of the operator, one real axis of ``m`` data.
        angles: Which data are angles in radians, ``(m,)`` of booleans.

    Raises:
        InvdiffError: If shapes do not fit, data are complex, or an angle is uncertain by more than 1 radian.
    """

    def __init__(self, covariance: Tensor, space: Space, angles: Tensor) -> None:
        if space.is_complex or len(space.shape) != 1:
            raise InvdiffError(f"Wrapped noise is on one axis of real data, got {space}.")
        super().__init__(covariance, space)
        self.angles = torch.as_tensor(angles, dtype=torch.bool).reshape(1, -1)
        if self.angles.shape[1] != space.size:
            raise InvdiffError(f"There are {self.angles.shape[1]} marks of angles for {space.size} data.")
        worst = float((self.factor.square().sum(-1).sqrt() * self.angles).max())
        if worst > 1:
            raise InvdiffError(
                f"An angle is uncertain by {worst:.2g} radians; leave out those above 1, or average."
            )

    def sample(self, z: Tensor, rng: Streams) -> Tensor:
        """Return ``z + L eps``, angles in (-pi, pi]."""
        return self._wrapped(super().sample(z, rng))

    def _wrapped(self, r: Tensor) -> Tensor:
        turned = torch.remainder(r + torch.pi, 2 * torch.pi) - torch.pi
        return torch.where(self.angles.to(r.device), turned, r)

    def _whitened(self, z: Tensor, y: Tensor) -> Tensor:
        return super()._whitened(torch.zeros_like(z), self._wrapped(y - z))

    def whiten(self) -> None:
        """Return None: residuals are wrapped before they are whitened, which no operator on data can do."""
        return None
