"""Grids of noise levels: decreasing, ``n + 1`` values, the last of them 0. Functions, not objects."""

from __future__ import annotations

import torch
from torch import Tensor

from invdiff.errors import InvdiffError


def edm(n: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """Polynomial grid ``(smax^(1/rho) + i/(n-1) (smin^(1/rho) - smax^(1/rho)))^rho``, then 0.

    Source: Karras et al., "Elucidating the design space of diffusion-based generative models", 2022.
    """
    _check(n, sigma_min, sigma_max)
    ramp = torch.linspace(0, 1, n, dtype=torch.float64) if n > 1 else torch.zeros(1, dtype=torch.float64)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return torch.cat([(high + ramp * (low - high)) ** rho, torch.zeros(1, dtype=torch.float64)])


def geometric(n: int, sigma_min: float, sigma_max: float) -> Tensor:
    """Geometric grid (equal steps in log sigma), then 0."""
    _check(n, sigma_min, sigma_max)
    ramp = torch.linspace(0, 1, n, dtype=torch.float64) if n > 1 else torch.zeros(1, dtype=torch.float64)
    grid = sigma_max * (sigma_min / sigma_max) ** ramp
    return torch.cat([grid, torch.zeros(1, dtype=torch.float64)])


def vp_linear(n: int, sigma_min: float, sigma_max: float, quadratic: bool = False) -> Tensor:
    """The DDPM chain (beta from 1e-4 to 0.02 in 1000 steps) respaced to ``n`` levels, then 0.

    ``sigma = sqrt((1 - abar) / abar)`` at equal steps of the chain, between whose levels ``log sigma`` is linear;
    clipped to the given range, and repeated levels dropped. Codes that skip levels (0, 50, ... 950) start a little
    lower. ``quadratic`` is DiffPIR's grid, which passes quickly through high noise: level ``k`` is
    ``min(floor(1000 sqrt(k / (n - 1))), 999)`` steps down the chain.
    """
    _check(n, sigma_min, sigma_max)
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    table = ((1 - abar) / abar).sqrt().log()
    ramp = torch.linspace(0, 1, n, dtype=torch.float64) if n > 1 else torch.zeros(1, dtype=torch.float64)
    position = 999 - ((1e6 * ramp).sqrt().floor().clamp(max=999) if quadratic else 999 * ramp)
    lower = position.floor().long().clamp(max=998)
    log_sigma = table[lower] + (position - lower) * (table[lower + 1] - table[lower])
    grid = log_sigma.exp().clamp(sigma_min, sigma_max)
    keep = torch.cat([torch.ones(1, dtype=torch.bool), grid[1:] < grid[:-1]])
    return torch.cat([grid[keep], torch.zeros(1, dtype=torch.float64)])


def flow(n: int, sigma_min: float, sigma_max: float, shift: float = 1.0) -> Tensor:
    """Clock of rectified flows: equal steps of ``u`` in ``sigma = shift u / (1 - u)``, then 0.

    ``t = sigma / (1 + sigma)`` is the share of noise, and ``u`` is ``t`` where ``shift`` is 1; a larger one spends
    more steps at high noise, ``t = shift u / (1 + (shift - 1) u)``. ``t = 1`` is infinite noise, so that a run
    starts a little below it.

    Source: Esser et al., "Scaling rectified flow transformers for high-resolution image synthesis", 2024.
    """
    _check(n, sigma_min, sigma_max)
    if not 0 < shift < float("inf"):
        raise InvdiffError(f"The shift of a flow's clock must be positive, got {shift:g}.")
    high, low = sigma_max / (shift + sigma_max), sigma_min / (shift + sigma_min)
    u = torch.linspace(high, low, n, dtype=torch.float64)
    return torch.cat([shift * u / (1 - u), torch.zeros(1, dtype=torch.float64)])


def _check(n: int, sigma_min: float, sigma_max: float) -> None:
    if n < 1 or not 0 < sigma_min <= sigma_max:
        raise InvdiffError(
            f"A noise schedule needs steps >= 1 and 0 < sigma_min <= sigma_max, "
            f"got steps {n}, sigma_min {sigma_min:g}, sigma_max {sigma_max:g}."
        )
