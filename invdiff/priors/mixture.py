"""Gaussian mixture prior in closed form."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, overload

import numpy as np
import torch
from torch import Tensor

from invdiff.errors import InvdiffError
from invdiff.prior import Prior
from invdiff.priors.covariance import Covariance, Dense, Diagonal, check_variances, floating
from invdiff.priors.exact import ExactDenoiser
from invdiff.spaces import Space, per_row


class MixtureDenoiser(ExactDenoiser):
    """``x0 ~ sum_k w_k N(m_k, C_k)``.

    With responsibilities ``r_k(x) ~ w_k N(x; m_k, C_k + sigma^2 I)``,
    ``D(x) = sum_k r_k (m_k + C_k (C_k + sigma^2 I)^-1 (x - m_k))``. Isotropic components cost two matrix
    products of ``(B, d)`` with ``(d, K)``; the others are visited one after another.

    Args:
        log_weights: ``log w_k``, ``(K,)``, normalised.
        means: ``(K, *space.shape)``.
        covariances: ``K`` covariances, equal ones preferably the same object.
        isotropic: Variances ``(K,)`` where every ``C_k`` is a multiple of the identity, else None.
        space: Real prior coordinates.
        sigma_min, sigma_max: Noise range; None takes 1e-3 of the smallest component's standard deviation, and
            20 times the root of the largest second moment.
    """

    def __init__(
        self,
        log_weights: Tensor,
        means: Tensor,
        covariances: list[Covariance],
        isotropic: Tensor | None,
        space: Space,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
    ) -> None:
        self.log_weights, self.means, self.covariances, self.isotropic = log_weights, means, covariances, isotropic
        flat = means.flatten(1) * log_weights.exp().sqrt()[:, None]
        spread = float(torch.linalg.matrix_norm(flat, 2)) ** 2
        largest = max(float(c.eigenvalues.max()) for c in covariances)
        std = min(math.sqrt(float(c.eigenvalues.mean())) for c in covariances)
        self._set(space, std, largest + spread, sigma_min, sigma_max)
        self.sigma_data = math.sqrt(std**2 + float((flat**2).sum()) / flat.shape[1])
        if not self.sigma_min > 0:
            raise InvdiffError("A component has zero variance everywhere; give it some spread, or sigma_min.")

    @property
    def weights(self) -> Tensor:
        """``w_k``, ``(K,)``."""
        return self.log_weights.exp()

    @property
    def mean(self) -> Tensor:
        """Mean of the mixture, ``(*shape)``."""
        return torch.tensordot(self.weights, self.means, dims=1)

    def _level(self, sigma: Tensor | float, x: Tensor) -> Tensor:
        """``sigma^2`` as ``(B or 1, 1)``."""
        return per_row(sigma, x.flatten(1)).reshape(-1, 1) ** 2

    def _joint(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """``log w_k + log N(x; m_k, C_k + sigma^2 I)``, ``(B, K)``."""
        d = self.space.size
        if self.isotropic is not None:
            noisy = self.isotropic + self._level(sigma, x)
            m, z = self.means.flatten(1), x.flatten(1)
            centre = m.mean(0)
            m, z = m - centre, z - centre
            square = (z * z).sum(1, keepdim=True) - 2 * z @ m.T + (m * m).sum(1)
            return self.log_weights - 0.5 * square / noisy - 0.5 * d * (2 * math.pi * noisy).log()
        out = []
        for log_w, mean, cov in zip(self.log_weights, self.means, self.covariances):
            noisy = cov.eigenvalues[None] + self._variance(sigma, x)
            c = cov.to_basis(x - mean)
            out.append(log_w - 0.5 * (c * c / noisy + (2 * math.pi * noisy).log()).flatten(1).sum(1))
        return torch.stack(out, 1)

    def log_prob(self, x: Tensor, sigma: Tensor | float = 0.0) -> Tensor:
        """Return ``log sum_k w_k N(x; m_k, C_k + sigma^2 I)``, ``(B,)``."""
        return torch.logsumexp(self._joint(x, sigma), 1)

    def responsibilities(self, x: Tensor, sigma: Tensor | float = 0.0) -> Tensor:
        """Return ``P(component k | x)``, ``(B, K)``."""
        return torch.softmax(self._joint(x, sigma), 1)

    def __call__(self, x: Tensor, sigma: Tensor, cond: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return ``E[x0 | x]``, ``(B, *shape)``; ``sigma`` is ``(B,)`` or a number."""
        r = self.responsibilities(x, sigma)
        if self.isotropic is not None:
            gain = self.isotropic / (self.isotropic + self._level(sigma, x))
            out = (r * gain).sum(1, keepdim=True) * x.flatten(1) + (r * (1 - gain)) @ self.means.flatten(1)
            return out.reshape(x.shape)
        out = torch.zeros_like(x)
        for k, (mean, cov) in enumerate(zip(self.means, self.covariances)):
            part = mean + cov.filter(x - mean, self._gain(cov, sigma, x))
            out = out + per_row(r[:, k], x) * part
        return out

    def _gain(self, cov: Covariance, sigma: Tensor | float, x: Tensor) -> Tensor:
        return cov.eigenvalues / (cov.eigenvalues[None] + self._variance(sigma, x))

    def score(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """Return ``-sum_k r_k (C_k + sigma^2 I)^-1 (x - m_k)``."""
        r = self.responsibilities(x, sigma)
        if self.isotropic is not None:
            weight = r / (self.isotropic + self._level(sigma, x))
            out = weight @ self.means.flatten(1) - weight.sum(1, keepdim=True) * x.flatten(1)
            return out.reshape(x.shape)
        out = torch.zeros_like(x)
        for k, (mean, cov) in enumerate(zip(self.means, self.covariances)):
            noisy = cov.eigenvalues[None] + self._variance(sigma, x)
            out = out - per_row(r[:, k], x) * cov.filter(x - mean, 1 / noisy)
        return out

    def jacobian_product(self, x: Tensor, sigma: Tensor | float, v: Tensor) -> Tensor:
        """Return ``sum_k r_k (A_k v + (s_k - s).v mu_k)``.

        ``A_k = C_k (C_k + sigma^2 I)^-1``, ``mu_k = m_k + A_k (x - m_k)``, ``s_k`` the component's score and
        ``s`` their mean under ``r``.
        """
        r = self.responsibilities(x, sigma)
        if self.isotropic is not None:
            m, z, u = self.means.flatten(1), x.flatten(1), v.flatten(1)
            noisy = self.isotropic + self._level(sigma, x)
            gain = self.isotropic / noisy
            slope = (u @ m.T - (z * u).sum(1, keepdim=True)) / noisy
            q = r * (slope - (r * slope).sum(1, keepdim=True))
            out = (r * gain).sum(1, keepdim=True) * u + (q * gain).sum(1, keepdim=True) * z + (q * (1 - gain)) @ m
            return out.reshape(x.shape)
        parts, means, slopes = torch.zeros_like(x), [], []
        for k, (mean, cov) in enumerate(zip(self.means, self.covariances)):
            gain, e = self._gain(cov, sigma, x), x - mean
            parts = parts + per_row(r[:, k], x) * cov.filter(v, gain)
            means.append(cov.filter(e, gain) + mean)
            noisy = cov.eigenvalues[None] + self._variance(sigma, x)
            slopes.append(-(cov.filter(e, 1 / noisy) * v).flatten(1).sum(1))
        slope = torch.stack(slopes, 1)
        q = r * (slope - (r * slope).sum(1, keepdim=True))
        return parts + sum((per_row(q[:, k], x) * mu for k, mu in enumerate(means)), torch.zeros_like(x))

    @overload
    def sample(self, n: int, seed: int = 0, labels: Literal[False] = False) -> Tensor: ...

    @overload
    def sample(self, n: int, seed: int = 0, *, labels: Literal[True]) -> tuple[Tensor, Tensor]: ...

    def sample(self, n: int, seed: int = 0, labels: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Return ``n`` draws ``(n, *shape)``, with ``labels`` also the component of each, ``(n,)``."""
        generator = torch.Generator().manual_seed(seed)
        which = torch.multinomial(self.weights.cpu(), n, replacement=True, generator=generator)
        which = which.to(self.means.device)
        eps = torch.randn(n, *self.space.shape, generator=generator, dtype=self.dtype).to(self.means.device)
        out = self.means[which]
        if self.isotropic is not None:
            out = out + per_row(self.isotropic[which].sqrt(), out) * eps
        else:
            for k, cov in enumerate(self.covariances):
                rows = which == k
                out[rows] = out[rows] + cov.root(eps[rows])
        return (out, which) if labels else out

    def components(self) -> list[tuple[float, Tensor, Covariance]]:
        """Return ``(log w_k, m_k, C_k)`` of every component."""
        return [(float(w), m, c) for w, m, c in zip(self.log_weights, self.means, self.covariances)]


def GaussianMixture(
    weights: Tensor | np.ndarray,
    means: Tensor | np.ndarray,
    covariances: float | Tensor | np.ndarray = 1.0,
    space: Space | None = None,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
) -> Prior:
    """Gaussian mixture prior, ``x ~ sum_k w_k N(m_k, C_k)``.

    Args:
        weights: ``(K,)``, positive; normalised here.
        means: ``(K, *space.shape)`` or ``(K, d)``.
        covariances: Variance(s) of isotropic components, a number or ``(K,)``; variances per element
            ``(K, d)`` or ``(K, *space.shape)``; or matrices ``(K, d, d)``.
        space: Space of the images; by default the shape of one mean.
        sigma_min: Lowest noise level of the denoiser; None takes 1e-3 standard deviations.
        sigma_max: Highest noise level; None takes 20 times the root of the largest second moment.

    Returns:
        A prior whose ``denoiser`` is a `MixtureDenoiser`.

    Raises:
        InvdiffError: If weights are not positive or shapes do not fit.
    """
    m = floating(means)
    dtype = space.dtype if space is not None else m.dtype
    m = m.to(dtype)
    if m.ndim < 2:
        raise InvdiffError(f"The means have shape {tuple(m.shape)}, expected (K, d) or (K, *shape).")
    space = space or Space(tuple(m.shape[1:]), dtype=dtype)
    count = m.shape[0]
    if m[0].numel() != space.size or space.is_complex:
        raise InvdiffError(f"The means have {m[0].numel()} elements each, expected real ones for {space}.")
    m = m.reshape(count, *space.shape)
    w = floating(weights).to(dtype)
    if tuple(w.shape) != (count,) or not bool((torch.isfinite(w) & (w > 0)).all()):
        raise InvdiffError(f"The weights must be {count} positive numbers, one per mean, got {tuple(w.shape)}.")
    cov, isotropic = _covariances(floating(covariances).to(dtype), count, space)
    log_weights = (w / w.sum()).log()
    denoiser = MixtureDenoiser(log_weights, m, cov, isotropic, space, sigma_min, sigma_max)
    name = "gaussian-mixture"
    return Prior(denoiser, card={"name": name, "licence": "BSD-3-Clause", "training": "none: closed form"})


def _covariances(values: Tensor, count: int, space: Space) -> tuple[list[Covariance], Tensor | None]:
    """Read scalars, diagonals or matrices; equal isotropic components share one object."""
    check_variances(values if values.ndim < 3 else torch.zeros(()), "The variances of a mixture")
    if values.ndim == 0 or tuple(values.shape) == (count,):
        variances = values.expand(count).clone()
        made: dict[float, Covariance] = {}
        for v in variances:
            made.setdefault(float(v), Diagonal(v.expand(space.shape)))
        return [made[float(v)] for v in variances], variances
    if tuple(values.shape) in {(count, space.size), (count, *space.shape)}:
        return [Diagonal(v) for v in values.reshape(count, *space.shape)], None
    if tuple(values.shape) == (count, space.size, space.size):
        return [Dense(v, space.shape) for v in values], None
    raise InvdiffError(
        f"The covariances have shape {tuple(values.shape)}, expected a number, ({count},), "
        f"({count}, {space.size}) or ({count}, {space.size}, {space.size})."
    )
