"""Gaussian priors in closed form: any covariance matrix, or a stationary field on a grid of any size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from invdiff.errors import InvdiffError
from invdiff.prior import Prior
from invdiff.priors.covariance import Circulant, Covariance, Dense, floating
from invdiff.priors.exact import ExactDenoiser
from invdiff.spaces import Space


class GaussianDenoiser(ExactDenoiser):
    """``x0 ~ N(m, C)`` with ``C = Q diag(lam) Q^T``.

    ``D(x) = m + Q diag(lam / (lam + sigma^2)) Q^T (x - m)``, and ``p_sigma = N(m, C + sigma^2 I)``.

    Args:
        mean: ``m``, shape ``space.shape``.
        covariance: ``C`` by its eigenvalues.
        space: Real prior coordinates.
        sigma_min, sigma_max: Noise range; None takes 1e-3 standard deviations, and 20 times the root of the
            largest eigenvalue (plus the squared length of the mean).
    """

    def __init__(
        self,
        mean: Tensor,
        covariance: Covariance,
        space: Space,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
    ) -> None:
        self.mean, self.covariance = mean, covariance
        lam = covariance.eigenvalues
        if float(lam.max()) <= 0:
            raise InvdiffError("The covariance is zero everywhere; a prior needs some spread.")
        moment = float(lam.max()) + float((mean**2).sum())
        self._set(space, math.sqrt(float(lam.mean())), moment, sigma_min, sigma_max)

    def _noisy(self, sigma: Tensor | float, x: Tensor) -> Tensor:
        """Eigenvalues of ``C + sigma^2 I``, ``(B or 1, *shape)``."""
        return self.covariance.eigenvalues[None] + self._variance(sigma, x)

    def _gain(self, sigma: Tensor | float, x: Tensor) -> Tensor:
        noisy = self._noisy(sigma, x)
        return self.covariance.eigenvalues / noisy.clamp_min(torch.finfo(noisy.dtype).tiny)

    def __call__(self, x: Tensor, sigma: Tensor, cond: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return ``E[x0 | x]``, ``(B, *shape)``; ``sigma`` is ``(B,)`` or a number."""
        return self.mean + self.covariance.filter(x - self.mean, self._gain(sigma, x))

    def score(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """Return ``-(C + sigma^2 I)^-1 (x - m)``."""
        return -self.covariance.filter(x - self.mean, 1 / self._noisy(sigma, x))

    def jacobian_product(self, x: Tensor, sigma: Tensor | float, v: Tensor) -> Tensor:
        """Return ``C (C + sigma^2 I)^-1 v``, which does not depend on ``x`` but for its shape."""
        return self.covariance.filter(v, self._gain(sigma, x))

    def log_prob(self, x: Tensor, sigma: Tensor | float = 0.0) -> Tensor:
        """Return ``log N(x; m, C + sigma^2 I)``, ``(B,)``.

        Raises:
            InvdiffError: If the covariance is singular and ``sigma`` is 0.
        """
        noisy = self._noisy(sigma, x)
        if float(noisy.min()) <= 0:
            raise InvdiffError(
                "This Gaussian has directions of zero variance and no density; ask for sigma above 0."
            )
        c = self.covariance.to_basis(x - self.mean)
        return -0.5 * (c**2 / noisy + (2 * math.pi * noisy).log()).flatten(1).sum(1)

    def sample(self, n: int, seed: int = 0) -> Tensor:
        """Return ``m + C^(1/2) eps``, ``(n, *shape)``."""
        eps = self.space.with_precision(self.dtype).randn(n, seed, self.mean.device)
        return self.mean + self.covariance.root(eps)

    def covariance_matrix(self) -> Tensor:
        """Return ``C`` as a dense ``(n, n)`` matrix over flattened elements (at most 8,192 of them)."""
        return self.covariance.matrix()

    def components(self) -> list[tuple[float, Tensor, Covariance]]:
        """Return the one component."""
        return [(0.0, self.mean, self.covariance)]


def Gaussian(
    mean: Tensor | np.ndarray,
    covariance: Tensor | np.ndarray,
    space: Space | None = None,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
) -> Prior:
    """Gaussian prior with any covariance matrix, ``x ~ N(mean, covariance)``.

    Args:
        mean: ``space.shape``, or flat ``(n,)``.
        covariance: ``(n, n)`` over flattened elements, symmetric and positive semi-definite.
        space: Space of the images; by default one axis of ``n`` in the precision of ``mean``.
        sigma_min: Lowest noise level of the denoiser; None takes 1e-3 standard deviations.
        sigma_max: Highest noise level; None takes 20 times the root of the largest second moment.

    Returns:
        A prior whose ``denoiser`` is a `GaussianDenoiser`.

    Raises:
        InvdiffError: If shapes do not fit or the matrix is no covariance.
    """
    m = floating(mean)
    space = space or Space((m.numel(),), dtype=m.dtype)
    if space.is_complex:
        raise InvdiffError("Prior coordinates are real; describe a complex image by two channels and a codec.")
    if m.numel() != space.size:
        raise InvdiffError(f"The mean has {m.numel()} elements, expected {space.size} for {space}.")
    cov = Dense(floating(covariance).to(space.dtype), space.shape)
    denoiser = GaussianDenoiser(m.to(space.dtype).reshape(space.shape), cov, space, sigma_min, sigma_max)
    return Prior(denoiser, card={"name": "gaussian", "licence": "BSD-3-Clause", "training": "none: closed form"})


def StationaryGaussian(
    shape: Sequence[int],
    spectrum: Tensor | np.ndarray | None = None,
    mean: float | Tensor = 0.0,
    correlation_length: float = 4.0,
    white: float = 1e-3,
    dtype: torch.dtype = torch.float64,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
) -> Prior:
    """Stationary Gaussian field on a periodic grid, ``C = F^H diag(S) F``.

    Args:
        shape: ``(channel, *grid)``; ``(y, x)`` is read as ``(1, y, x)`` and ``(n,)`` as ``(1, n)``. Channels
            are independent and alike.
        spectrum: ``S`` on the FFT grid, shape ``grid``, even and not negative; its mean is the pixel variance.
            None takes `power_law_spectrum`.
        mean: A number or an array broadcasting to ``shape``.
        correlation_length: Correlation of the default spectrum, in pixels.
        white: White part of the default spectrum, relative to the correlated one.
        dtype: Precision of the denoiser.
        sigma_min: Lowest noise level of the denoiser; None takes 1e-3 standard deviations.
        sigma_max: Highest noise level; None takes 20 times the root of the largest second moment.

    Returns:
        A prior whose ``denoiser`` is a `GaussianDenoiser` that costs two FFTs per call.

    Raises:
        InvdiffError: If the spectrum is negative, not even, or does not fit the grid.
    """
    full = tuple(int(n) for n in shape)
    full = (1, *full) if len(full) < 3 else full
    space = Space(full, dtype=dtype, dims=() if len(full) > 2 else ("channel", "x"))
    s = power_law_spectrum(full[1:], correlation_length, white) if spectrum is None else floating(spectrum)
    m = torch.as_tensor(mean, dtype=dtype)
    try:
        m = m.expand(full).clone()
    except RuntimeError:
        raise InvdiffError(f"The mean has shape {tuple(m.shape)}, which does not broadcast to {full}.") from None
    denoiser = GaussianDenoiser(m, Circulant(s.to(dtype), full), space, sigma_min, sigma_max)
    name = "stationary-gaussian"
    return Prior(denoiser, card={"name": name, "licence": "BSD-3-Clause", "training": "none: closed form"})


def power_law_spectrum(shape: Sequence[int], correlation: float = 4.0, white: float = 1e-3) -> Tensor:
    """Spectrum ``S(k) ~ (k0^2 + |k|^2)^-3``, ``k0 = 1 / (2 pi correlation)``, plus a white part.

    The correlated part is normalised to unit pixel variance, the white part added, and the sum normalised to
    unit pixel variance again.

    Args:
        shape: Grid, e.g. ``(y, x)``.
        correlation: Correlation length in pixels.
        white: Variance of the white part relative to the correlated one.

    Returns:
        float64 tensor of shape ``shape`` on the FFT grid, with mean 1.

    Raises:
        InvdiffError: If the correlation length is not positive or the white part negative.
    """
    if not correlation > 0 or not white >= 0:
        raise InvdiffError(
            f"A power-law spectrum needs correlation > 0 and white >= 0, got {correlation:g} and {white:g}."
        )
    axes = [torch.fft.fftfreq(int(n), dtype=torch.float64) for n in shape]
    k2 = sum((f**2 for f in torch.meshgrid(*axes, indexing="ij")), torch.zeros(()))
    assert isinstance(k2, Tensor)
    s = ((1 / (2 * math.pi * correlation)) ** 2 + k2) ** -3
    s = s / s.mean() + white
    return s / s.mean()
