"""Closed forms that follow from a singular value decomposition ``A = U diag(s) V^H``."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from invdiff.errors import InvdiffError
from invdiff.operators._parameters import ParametricOperator
from invdiff.spaces import per_row

CLOSED_FORMS = frozenset({"svd", "pinv", "prox", "conditional"})


class SpectralOperator(ParametricOperator):
    """Linear operator with ``prox``, ``pinv`` and ``conditional`` derived from its ``svd``.

    Instances that lack a decomposition leave ``svd`` out of ``capabilities``.
    """

    provides: ClassVar[frozenset[str]] = ParametricOperator.provides | CLOSED_FORMS

    def prox(self, z: Tensor, y: Tensor, rho: Tensor) -> Tensor:
        """Return ``argmin_x ||A x - y||^2 + rho ||x - z||^2 = z + V s (U^H y - s V^H z) / (s^2 + rho)``.

        The null space of ``A`` keeps ``z`` exactly, and ``rho = 0`` gives the nearest least-squares solution.

        Args:
            z: Centre, ``(B, *domain)``.
            y: Data, ``(B, *range)``.
            rho: Weight of the proximal term, ``(B,)``, at least 0.
        """
        if "prox" not in self.capabilities:
            return super().prox(z, y, rho)
        self.domain.check(z, f"Centre z of the prox of {self.name}")
        self.range.check(y, f"Data y of the prox of {self.name}")
        z, y, d = self._enter(z, self.domain), y.to(self.range.dtype), self.svd()
        c = d.uh(y) - d.s * d.vh(z)
        return z + d.v(over(d.s, d.s**2 + per_row(rho, c), d.s > 0) * c)

    def pinv(self, y: Tensor) -> Tensor:
        """Return ``A^+ y = V s^+ U^H y``, ``(B, *range) -> (B, *domain)``."""
        if "pinv" not in self.capabilities:
            return super().pinv(y)
        self.range.check(y, f"Data y of the pseudo-inverse of {self.name}")
        d = self.svd()
        return d.v(over(torch.ones_like(d.s), d.s, d.s > 0) * d.uh(self._enter(y, self.range)))

    def conditional(self, z: Tensor, y: Tensor, sigma: Tensor, tau: Tensor, noise: Tensor) -> Tensor:
        """Return an exact draw of ``x`` given ``y = A x + sigma n`` under the prior ``x ~ N(z, tau^2 I)``.

        ``prox(z, y, sigma^2 / tau^2) + tau noise + V ((s^2 / sigma^2 + 1 / tau^2)^(-1/2) - tau) V^H noise``, which
        holds whether or not the coordinates reach the null space.

        Args:
            z: Prior mean, ``(B, *domain)``.
            y: Data, ``(B, *range)``.
            sigma: Noise level per real component, ``(B,)``.
            tau: Prior standard deviation per real component, ``(B,)``.
            noise: Standard normal numbers (unit variance per real component), ``(B, *domain)``.
        """
        if "conditional" not in self.capabilities:
            raise InvdiffError(f"{self.name} has no closed-form Gaussian draw; solve by conjugate gradients.")
        self.domain.check(noise, f"Noise of the conditional draw of {self.name}")
        d = self.svd()
        noise = self._enter(noise, self.domain)
        c, spread = d.vh(noise), per_row(tau, noise) * noise
        sigma, tau = per_row(sigma, c), per_row(tau, c)
        width = torch.where(d.s > 0, over(sigma * tau, (d.s**2 * tau**2 + sigma**2).sqrt(), d.s > 0), tau)
        rho = ((sigma / tau) ** 2).reshape(-1) if sigma.ndim or tau.ndim else (sigma / tau) ** 2
        return self.prox(z, y, rho) + spread + d.v((width - tau) * c)


def unchanged(x: Tensor) -> Tensor:
    """Return ``x``: the factors ``U`` and ``V`` of a diagonal operator."""
    return x


def over(a: Tensor, b: Tensor, keep: Tensor) -> Tensor:
    """Return ``a / b`` where ``keep``, and 0 elsewhere (where ``b`` may be 0)."""
    return torch.where(keep, a / torch.where(keep, b, torch.ones_like(b)), torch.zeros_like(a))


def cut_small(s: Tensor, size: int) -> Tensor:
    """Set singular values ``(1 or N, ...)`` below rounding, ``size * eps * max``, to exactly zero."""
    top = s.flatten(1).amax(1).reshape(-1, *([1] * (s.ndim - 1)))
    return torch.where(s > size * torch.finfo(s.dtype).eps * top, s, torch.zeros_like(s))
