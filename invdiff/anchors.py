"""Standard problems with exact posteriors, and the grading of draws against them.

Source of the mixture: Cardoso et al., "Monte Carlo guided diffusion for Bayesian linear inverse problems",
arXiv 2308.07983.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from invdiff import likelihoods, operators, priors
from invdiff.conditioning import Measurement, stack_real
from invdiff.errors import InvdiffError
from invdiff.operator import LinearOperator
from invdiff.prior import Prior
from invdiff.priors.exact import ExactDenoiser
from invdiff.priors.mixture import MixtureDenoiser
from invdiff.problem import Problem
from invdiff.reference import ExactPosterior
from invdiff.spaces import Space


def gaussian_field(
    size: int = 32, operator: Literal["mask", "fourier", "blur"] = "mask", seed: int = 0
) -> tuple[Problem, Prior]:
    """Stationary Gaussian field of unit variance and 4 pixels of correlation, measured with sigma 0.05.

    Args:
        size: Pixels per side.
        operator: ``mask`` keeps 30 % of the pixels at random; ``fourier`` keeps a quarter of the rows of
            k-space, the 4 lowest among them and the others at random; ``blur`` is a circular Gaussian of
            standard deviation 1.5 pixels.
        seed: Of mask, truth and noise.

    Returns:
        Problem (float64, with ``x_true``) and prior.
    """
    prior = priors.StationaryGaussian((size, size))
    space = Space((1, size, size), torch.float64)
    rng = np.random.default_rng([seed, size, 1])
    a: LinearOperator
    if operator == "mask":
        kept = rng.permutation(size * size)[: round(0.3 * size * size)]
        mask = torch.zeros(size * size, dtype=torch.float64)
        mask[torch.from_numpy(kept)] = 1
        a = operators.Mask(mask.reshape(1, size, size), space)
    elif operator == "fourier":
        low = size // 2 + np.arange(-2, 2)
        others = np.setdiff1d(np.arange(size), low)
        rows = np.concatenate([low, rng.permutation(others)[: max(size // 4 - 4, 0)]])
        mask = torch.zeros(size, size, dtype=torch.float64)
        mask[torch.from_numpy(rows)] = 1
        a = operators.SubsampledFourier(mask, space)
    elif operator == "blur":
        a = operators.GaussianBlur(1.5, space)
    else:
        raise InvdiffError(f"The Gaussian field has operators mask, fourier and blur, not {operator!r}.")
    x = _draw(prior, seed, 101)
    return Problem.simulate(
        a, likelihoods.Gaussian(0.05), x, seed, {"title": f"Gaussian field, {operator}"}
    ), prior


def mcgdiff_mixture(d: int, m: int, seed: int = 0) -> tuple[Problem, Prior]:
    """Mixture of 25 unit Gaussians in ``d`` dimensions behind ``m`` linear measurements.

    Means ``(-8 i, -8 j)`` repeated ``d / 2`` times for ``i, j`` in -2..2; weights chi-squared with one degree of
    freedom, normalised; ``A = U diag(s) V^T`` with ``U``, ``V`` from a Gaussian matrix and ``s`` sorted uniforms;
    sigma uniform on [0, 1] times the largest ``s``.

    Args:
        d: Even dimension (8, 80, 800 in the paper).
        m: Number of measurements (1, 2, 4 in the paper).
        seed: Of weights, operator, truth and noise.

    Returns:
        Problem (float64, with ``x_true``) and prior.
    """
    if d < 2 or d % 2 or not 1 <= m <= d:
        raise InvdiffError(f"The mixture needs an even d of at least 2 and m from 1 to d, got d {d} and m {m}.")
    rng = np.random.default_rng([seed, d, m])
    centres = [[-8.0 * i, -8.0 * j] * (d // 2) for i in range(-2, 3) for j in range(-2, 3)]
    weights = rng.chisquare(1, 25)
    prior = priors.GaussianMixture(weights / weights.sum(), np.array(centres), 1.0)
    u, _, vt = np.linalg.svd(rng.standard_normal((m, d)), full_matrices=False)
    s = np.sort(rng.uniform(size=m))[::-1]
    a = operators.Matrix(torch.from_numpy((u * s) @ vt))
    sigma = float(rng.uniform() * s.max())
    x = _draw(prior, seed, 102)
    problem = Problem.simulate(a, likelihoods.Gaussian(sigma), x, seed, {"title": f"MCGDiff mixture, {d} x {m}"})
    return problem, prior


def _draw(prior: Prior, seed: int, salt: int) -> Tensor:
    """Return one truth, from numbers that no other use of ``seed`` shares."""
    own = int(np.random.SeedSequence([seed, salt]).generate_state(1)[0])
    assert isinstance(prior.denoiser, ExactDenoiser)
    return prior.denoiser.sample(1, own)


def sliced_wasserstein(a: Tensor, b: Tensor, n_projections: int = 1000, seed: int = 0) -> float:
    """Sliced Wasserstein-1 distance, ``mean over unit v of W1(v . a, v . b)``.

    Args:
        a: Draws ``(n, ...)``; complex ones count as twice as many real components.
        b: As many draws ``(n, ...)`` (more of either are cut).
        n_projections: Random directions.
        seed: Of the directions.
    """
    n = min(len(a), len(b))
    a, b = stack_real(a[:n]).double(), stack_real(b[:n]).double()
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(a.shape[1], n_projections, generator=generator, dtype=torch.float64).to(a.device)
    v = v / v.norm(dim=0)
    return float(((a @ v).sort(0).values - (b @ v).sort(0).values).abs().mean())


def grade(draws: Tensor, exact: ExactPosterior, seed: int = 0, case: int = 0) -> dict[str, float]:
    """Compare draws with the exact posterior.

    Args:
        draws: ``(n, *image)``, or ``(N, n, *image)`` of which case ``case`` is graded.
        exact: The exact posterior.
        seed: Of the exact draws and the projections that some figures need.
        case: Which case.

    Returns:
        ``mean_error``: root mean square over components of (mean - exact mean) / exact std; ``1 / sqrt(n)`` is
        the floor. ``std_ratio``, ``std_ratio_measured``, ``std_ratio_null``: mean over components, measured
        and null directions of std / exact std. ``coverage``, ``coverage_measured``: mass of the exact
        marginals inside the draws' empirical central 90 % intervals (quantiles at rank ``p (n + 1)``, so that
        exact draws give 0.9 on average). ``sliced_wasserstein``: against as many fresh exact draws.
        ``chi2``, ``chi2_exact``, ``chi2_ratio``: squared residual over noise per datum, for the draws, for
        fresh exact draws, and their ratio. ``logp_shift``: mean log posterior density minus that of exact
        draws (NaN where it has none). ``mode_tv`` (mixtures): total variation between mode masses of
        the draws (mean responsibilities) and exact weights. NaN where a figure does not exist.
    """
    image = exact.problem.operator.domain
    if draws.ndim == len(image.shape) + 2:
        draws = draws[case]
    if draws.ndim != len(image.shape) + 1 or tuple(draws.shape[1:]) != image.shape or len(draws) < 2:
        raise InvdiffError(f"grade needs at least two draws (n, {image}), got shape {tuple(draws.shape)}.")
    draws = draws.to(image.dtype)
    fresh = exact.sample(len(draws), seed + 7919)[case]
    flat = stack_real(draws)
    out = {}
    weights, means, stds = exact.marginals(case=case)
    mean, std = _moments(weights, means, stds)
    out["mean_error"] = float((((flat.mean(0) - mean) / std) ** 2).mean().sqrt())
    out["std_ratio"] = float((flat.std(0) / std).mean())
    out["coverage"] = coverage(flat, weights, means, stds)
    measured, null = _directions(exact, case)
    for name, v in (("measured", measured), ("null", null)):
        if v is None or not len(v):
            out[f"std_ratio_{name}"] = out[f"coverage_{name}"] = math.nan
            continue
        marginals = exact.marginals(v, case)
        along = flat @ v.T
        out[f"std_ratio_{name}"] = float((along.std(0) / _moments(*marginals)[1]).mean())
        out[f"coverage_{name}"] = coverage(along, *marginals)
    out["sliced_wasserstein"] = sliced_wasserstein(draws, fresh, seed=seed)
    out["chi2"], out["chi2_exact"] = chi_squared(draws, exact, case), chi_squared(fresh, exact, case)
    out["chi2_ratio"] = out["chi2"] / out["chi2_exact"]
    out["logp_shift"] = _logp_shift(draws, fresh, exact, case)
    out["mode_tv"] = mode_total_variation(draws, exact, case)
    return out


def coverage(flat: Tensor, weights: Tensor, means: Tensor, stds: Tensor, level: float = 0.9) -> float:
    """Mass of the exact marginals between the draws' quantiles, averaged over components.

    Args:
        flat: Draws ``(n, r)``.
        weights: Of the marginal mixtures, ``(K,)``.
        means: ``(K, r)``.
        stds: ``(K, r)``.
        level: Nominal mass of the central interval.
    """
    tail = 0.5 * (1 - level)
    values = flat.sort(0).values
    edges = [_quantile(values, p) for p in (tail, 1 - tail)]
    low, high = (torch.special.ndtr((edge - means) / stds) for edge in edges)
    return float((weights[:, None] * (high - low)).sum(0).mean())


def chi_squared(draws: Tensor, exact: ExactPosterior, case: int = 0) -> float:
    """``||y - A x||^2 / (m sigma^2)`` over the ``m`` seen data, averaged over draws."""
    problem = exact.problem.rows(torch.tensor([case])).whiten()
    assert isinstance(problem.operator, LinearOperator) and isinstance(problem.likelihood, likelihoods.Gaussian)
    a = Measurement(problem.operator, problem.likelihood.sigma)
    residual = a.data(problem.y) - a.data(problem.operator(draws))
    return float((residual**2).sum(1).mean() / a.m)


def mode_total_variation(draws: Tensor, exact: ExactPosterior, case: int = 0) -> float:
    """``1/2 sum_k |mean over draws of P(k | x) - P(k | y)|``; NaN for one Gaussian."""
    denoiser = exact.prior.denoiser
    if not isinstance(denoiser, MixtureDenoiser):
        return math.nan
    u = exact.prior_codec.rows(torch.tensor([case])).encode(draws)
    return 0.5 * float((denoiser.responsibilities(u).mean(0) - exact.weights[case]).abs().sum())


def _logp_shift(draws: Tensor, fresh: Tensor, exact: ExactPosterior, case: int) -> float:
    try:
        return float(exact.log_prob(draws, case).mean() - exact.log_prob(fresh, case).mean())
    except InvdiffError:
        return math.nan


def _directions(exact: ExactPosterior, case: int) -> tuple[Tensor | None, Tensor | None]:
    try:
        return exact.directions(case)
    except InvdiffError:
        return None, None


def _moments(weights: Tensor, means: Tensor, stds: Tensor) -> tuple[Tensor, Tensor]:
    w = weights[:, None]
    mean = (w * means).sum(0)
    return mean, (w * (stds**2 + (means - mean) ** 2)).sum(0).sqrt()


def _quantile(ordered: Tensor, p: float) -> Tensor:
    """Quantile at rank ``p (n + 1)`` of ordered values ``(n, r)``."""
    n = len(ordered)
    rank = min(max(p * (n + 1) - 1, 0.0), n - 1.0)
    low = min(int(rank), n - 2)
    return ordered[low] + (rank - low) * (ordered[low + 1] - ordered[low])
