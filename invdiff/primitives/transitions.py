"""Transitions from noise level ``s`` to a lower level ``t`` in the variance-exploding frame.

All of them take a denoised image ``d`` (guided or not), so that every sampler is "a way to get ``d``" and "a
transition". ``extrapolate`` turns any of them into its second-order form at no cost.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

from torch import Tensor

from invdiff.spaces import real_inner


def ddim(x: Tensor, d: Tensor, s: float, t: float, eta: float, noise: Tensor | None) -> Tensor:
    """Step ``x' = d + a (x - d)/s + b noise`` with ``b = eta t sqrt(1 - t^2/s^2)`` and ``a^2 + b^2 = t^2``.

    ``eta = 0`` is the deterministic DDIM step; ``eta = 1`` is the ancestral (DDPM) step, whose kernel is
    ``(1 - k) d + k x + sqrt(t^2 (1 - k)) noise`` with ``k = t^2/s^2``.

    Source: Song, Meng, Ermon, "Denoising diffusion implicit models", 2021.
    """
    if t == 0:
        return d
    b = eta * t * math.sqrt(max(0.0, 1 - (t / s) ** 2))
    a = math.sqrt(max(0.0, t * t - b * b))
    out = d + (a / s) * (x - d)
    return out if b == 0 or noise is None else out + b * noise


def log_path_ratio(free: Tensor, bound: Tensor, s: float, t: float, noise: Tensor, eta: float = 1.0) -> Tensor:
    """Return ``log p(x' | x) - log q(x' | x)`` of stochastic `ddim` steps, ``(B,)`` in float64.

    Kernel ``p`` steps towards ``free``, ``q`` towards ``bound``, and ``x'`` was drawn from ``q`` with ``noise``:
    ``-|h|^2 / 2 - <h, noise>`` with ``h`` the distance of the two means in standard deviations.
    """
    b = eta * t * math.sqrt(1 - (t / s) ** 2)
    h = (1 - math.sqrt(t * t - b * b) / s) / b * (bound - free)
    return (-0.5 * real_inner(h, h) - real_inner(h, noise)).double()


def mix_noise(d: Tensor, eps: Tensor, t: float, fresh: float, noise: Tensor | None) -> Tensor:
    """Step ``x' = d + t (sqrt(1 - fresh) eps + sqrt(fresh) noise)``: keep part of the predicted noise.

    ``fresh`` is the share of variance that is drawn anew: ``zeta`` of DiffPIR, ``eta^2`` of DDS and DDNM.
    """
    if t == 0:
        return d
    out = d + (t * math.sqrt(1 - fresh)) * eps
    return out if fresh == 0 or noise is None else out + (t * math.sqrt(fresh)) * noise


def renoise(d: Tensor, t: float, noise: Tensor) -> Tensor:
    """Return ``d + t noise``."""
    return d + t * noise


def extrapolate(d: Tensor, previous: Tensor | None, sigmas: Tensor | Sequence[float], k: int) -> Tensor:
    """Second-order multistep correction of the denoised image: ``d + (d - previous) h / (2 h_previous)``.

    ``h = ln(sigma_k / sigma_{k+1})`` is the step in log noise. Used in a DDIM step it gives DPM-Solver++ 2M, in an
    ancestral step SDE-DPM-Solver++ 2M. A first-order ancestral chain of 100 steps loses 5 % of the posterior's
    width even with the exact score; this one loses 0.5 %. The first step, the step to 0 and a missing
    ``previous`` (first order asked for) leave ``d`` alone.

    Source: Lu et al., "DPM-Solver++", 2022.
    """
    if previous is None or k == 0 or sigmas[k + 1] == 0:
        return d
    ratio = math.log(sigmas[k] / sigmas[k + 1]) / math.log(sigmas[k - 1] / sigmas[k])
    return d + (0.5 * ratio) * (d - previous)


def probability_flow(
    denoise: Callable[[Tensor, float], Tensor], x: Tensor, sigmas: list[float], second_order: bool = True
) -> Tensor:
    """Solve the probability-flow ODE ``dx/dsigma = (x - D(x, sigma))/sigma`` along ``sigmas`` (to 0 at the end).

    Multistep exponential integrator in log noise (DPM-Solver++ 2M); first order is Euler in sigma (DDIM).
    One evaluation for each interval.
    """
    previous = None
    for k, (s, t) in enumerate(itertools.pairwise(sigmas)):
        d = denoise(x, s)
        x = ddim(x, extrapolate(d, previous, sigmas, k), s, t, 0.0, None)
        previous = d if second_order else None
    return x
