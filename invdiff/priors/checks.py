"""Self-test of a denoiser on clean samples: does it remove the noise it says it removes?

The exact denoiser satisfies every line of the report, whatever the data; a mistaken schedule, parametrisation,
range or channel order breaks some. What no such test sees: whether the samples are those of its training.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from invdiff.errors import InvdiffError
from invdiff.prior import Denoiser, Prior
from invdiff.testing import Check, Report

__all__ = ["check_denoiser"]

#: Slack of the denoising error over the best shrinkage of every pixel alike.
ERROR_SLACK = 1.1
#: Share of the noise that may be left beside that. A network that gives the noise to within 5 % is a good one, and
#: at a level of 150 its image is then off by 7; samplers do not mind, as their next level is not far below.
NOISE_SHARE = 0.05
#: Steps of the draws.
DRAW_STEPS = 18
#: How far the best step along ``D(x) - x`` may be from 1, the exact denoiser's; twice that at the lowest level,
#: where trained networks are weakest (0.17 off in the embedded prior, 0.03 at every other level).
STEP_SLACK = 0.1
#: Noise levels that are checked.
LEVELS = 8


@dataclass(frozen=True)
class _Slack:
    """Bounds of the report; ``high`` ones hold at levels above the samples' spread."""

    error: float
    error_high: float
    step: float
    step_high: float
    rise: float
    mean: float
    draws_mean: float
    draws_width: float


_SAME = _Slack(ERROR_SLACK, ERROR_SLACK, STEP_SLACK, STEP_SLACK, 1.02, 0.25, 0.5, 1.5)
# Images that only share local statistics with those of the training. The error is then no longer orthogonal to the
# step, and at high noise the network answers with the mean of its own images. What still holds: much of the noise
# goes, in about the right amount. A small network of photographs that meets dead leaves has steps 0.37 off at the
# lowest level and 0.04 at the others, errors no larger than best shrinkage and 5 % of the noise allow, draws up
# to 2.7 times as wide; with the schedule mistaken, which its steps hide as it sees the level in the image itself,
# draws are 100 times as wide.
_SIMILAR = _Slack(1.1, 1.5, 0.3, 0.6, 1.1, 1.0, 1.0, 4.0)


def check_denoiser(
    denoiser: Denoiser | Prior,
    samples: Tensor,
    seed: int = 0,
    repeats: int = 1,
    *,
    similar: bool = False,
    draws: int = 0,
    reach: float = math.inf,
) -> Report:
    """Check a denoiser against clean samples.

    With ``x = x0 + sigma eps`` at levels spread over the denoiser's range:

    * error: ``rms(D - x0)`` at most 1.1 times ``sigma s / sqrt(sigma^2 + s^2)``, the error of the best shrinkage
      towards the mean, ``s`` the samples' spread, and 5 % of the noise (added in squares); the former tends to
      ``sigma`` at low noise and to ``s`` at high noise;
    * step: ``<x0 - x, D - x> / |D - x|^2``, which is 1 for ``E[x0 | x]``, as the error is orthogonal to any
      function of ``x``; above 1 it removes too little, below 1 too much. Within 0.1 (0.2 at the
      lowest level) and four standard errors;
    * order: errors that fall with the noise;
    * ends: ``D`` stays within 1.5 ``sigma`` of ``x`` at the lowest level, and its mean within a quarter of the
      spread (and three standard errors, and 0.5 % of the noise) of the samples' mean at the first level above 30
      spreads, or the highest where that is at least 5;
    * draws, where asked for and the range reaches 5 spreads: their mean within half a spread (and three standard
      errors) of the samples', their spread within a factor 1.5 (and three standard errors); by 18 steps without
      noise, which is coarse;
    * rows that do not depend on each other, repeatability, finite float32 at both ends of the range.

    Args:
        denoiser: The denoiser, or a prior; samples are in the denoiser's coordinates, or in those of the images
            where the prior has a codec.
        samples: ``(B, *shape)`` clean data, not met in training; two or more rows. A few thousand values in all
            make the figures sharp.
        seed: Seed of the noise.
        repeats: Draws of noise per sample.
        similar: The samples are not of the kind of the training, but share its local statistics, as synthetic
            images and photographs do. The bounds are then wider: step 0.3, and above the samples' spread step 0.6,
            error 1.5 times the best shrinkage's, means 1 spread, spread of the draws a factor 4.
        draws: Number of draws from the denoiser to look at; none by default.
        reach: Levels above this many spreads of the samples are not looked at.

    Returns:
        A report; ``report.ok`` is the verdict and ``print(report)`` shows every figure.

    Raises:
        InvdiffError: If there are fewer than two samples, or none of their values differ.
    """
    name = denoiser.name if isinstance(denoiser, Prior) else type(denoiser).__name__
    if isinstance(denoiser, Prior):
        samples = samples if denoiser.codec is None else denoiser.codec.encode(samples)
        denoiser = denoiser.denoiser
    if len(samples) < 2 or not float(samples.std()) > 0:
        raise InvdiffError("Checking a denoiser needs at least two clean samples that are not constant.")
    with torch.no_grad():
        x0 = samples.to(denoiser.dtype).repeat(repeats, *[1] * (samples.ndim - 1))
        slack = _SIMILAR if similar else _SAME
        checks = (
            *_levels(denoiser, x0, seed, repeats, slack, reach),
            *_rows(denoiser, x0, seed),
            *_float32(denoiser, x0, seed),
            *_draws(denoiser, x0[: len(samples)], seed, draws, slack),
        )
    return Report(name, checks)


def _noise(like: Tensor, seed: int) -> Tensor:
    # Far from small seeds, by which the samples may have been drawn: the same numbers in both would bias all.
    g = torch.Generator().manual_seed(0x1D1FF000000 + seed)
    draw = torch.randn(like.shape, generator=g, dtype=torch.float64)
    return draw.to(like)


def _rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def _levels(d: Denoiser, x0: Tensor, seed: int, repeats: int, slack: _Slack, reach: float) -> Iterator[Check]:
    """Error, step, order and ends."""
    spread, middle = float(x0.double().std(correction=0)), float(x0.double().mean())
    top = max(min(d.sigma_max, reach * spread), 2 * d.sigma_min)
    grid = torch.logspace(math.log10(d.sigma_min), math.log10(top), LEVELS, dtype=torch.float64)
    errors: list[float] = []
    judged = False
    for k, sigma in enumerate(grid.clamp(d.sigma_min, d.sigma_max).tolist()):
        x = x0 + sigma * _noise(x0, seed + k)
        out = d(x, torch.full((len(x),), sigma, dtype=x.dtype, device=x.device))
        errors.append(_rms(out - x0))
        best = sigma * spread / math.hypot(sigma, spread)
        high = sigma > spread
        allowed = (slack.error_high if high else slack.error) * math.hypot(best, NOISE_SHARE * sigma)
        yield Check(f"error at sigma {sigma:.3g}", errors[-1], allowed)
        move, wanted = (out - x).double(), (x0 - x).double()
        step = float((wanted * move).sum() / move.square().sum().clamp_min(1e-300))
        # Where next to nothing is to be removed, its amount is known poorly.
        sampling = errors[-1] / max(_rms(move), 1e-150) / math.sqrt(x0.numel())
        bound = (slack.step_high if high else slack.step) * (1 if k else 2) + 4 * sampling
        yield Check(f"step at sigma {sigma:.3g}", abs(step - 1), bound, f"{step:.3f}, ideal 1")
        if k == 0:
            yield Check("stays at the lowest level", _rms(out - x) / sigma, 1.5, "in sigma")
        if not judged and (sigma >= 30 * spread or k == LEVELS - 1) and sigma >= 5 * spread:
            judged = True
            off = abs(float(out.double().mean()) - middle) / spread
            bound = slack.mean + 3 * _uncertainty(x0, len(x0) // repeats) / spread + 0.005 * sigma / spread
            yield Check(f"mean at sigma {sigma:.3g}", off, bound, "in spreads of the samples")
    # A rise within the noise of the figures is none.
    rise = float(torch.tensor([a / b for a, b in itertools.pairwise(errors)]).max())  # NaN stays NaN
    yield Check("error falls with the noise", rise, slack.rise, "largest ratio of neighbours")


def _uncertainty(x0: Tensor, count: int) -> float:
    """Standard error of the mean of all values: few samples know their own mean poorly."""
    return float(x0.double().flatten(1).mean(1).std()) / math.sqrt(count)


def _draws(d: Denoiser, x0: Tensor, seed: int, count: int, slack: _Slack) -> Iterator[Check]:
    """Mean and spread of images that the denoiser makes of noise."""
    spread, middle = float(x0.double().std(correction=0)), float(x0.double().mean())
    if not count or d.sigma_max < 5 * spread:
        return
    grid = torch.logspace(math.log10(d.sigma_max), math.log10(d.sigma_min), DRAW_STEPS, dtype=torch.float64)
    levels = grid.clamp(d.sigma_min, d.sigma_max).tolist()
    like = x0[:1].expand(count, *x0.shape[1:])
    x = levels[0] * _noise(like, seed + LEVELS + 1)
    for sigma, following in zip(levels, [*levels[1:], 0.0]):
        out = d(x, torch.full((count,), sigma, dtype=x.dtype, device=x.device))
        x = out + (following / sigma) * (x - out)
    error = math.hypot(_uncertainty(x0, len(x0)), _uncertainty(x0, count)) / spread
    off = abs(float(x.double().mean()) - middle) / spread
    yield Check("mean of draws", off, slack.draws_mean + 3 * error, "in spreads of the samples")
    ratio = float(x.double().std(correction=0)) / spread
    width = max(ratio, 1 / ratio) if ratio > 0 else math.inf
    each = (x0.double().flatten(1) - middle).square().mean(1).sqrt()
    error = float(each.std()) / spread * math.hypot(len(x0) ** -0.5, count**-0.5)
    yield Check("spread of draws", width, slack.draws_width + 3 * error, f"{ratio:.2f} of the samples'")


def _rows(d: Denoiser, x0: Tensor, seed: int) -> Iterator[Check]:
    """Rows one by one against the batch, each with its own level; twice the same."""
    ends = torch.logspace(math.log10(d.sigma_min), math.log10(d.sigma_max), len(x0[:4]) + 2, dtype=torch.float64)
    sigma = ends[1:-1].to(x0)
    x = x0[:4] + sigma.reshape(-1, *[1] * (x0.ndim - 1)) * _noise(x0[:4], seed + LEVELS)
    out = d(x, sigma)
    bound = 1e-8 if x.dtype == torch.float64 else 1e-3
    alone = torch.cat([d(x[i : i + 1], sigma[i : i + 1]) for i in range(len(x))])
    scale = _rms(out) + 1e-30
    yield Check("rows are independent", _rms(alone - out) / scale, bound)
    yield Check("repeatable", _rms(d(x, sigma) - out) / scale, 1e-2 * bound)


def _float32(d: Denoiser, x0: Tensor, seed: int) -> Iterator[Check]:
    """Finite output in float32 at both ends."""
    single = d if d.dtype == torch.float32 else d.to(dtype=torch.float32)
    bad = 0
    for sigma in (d.sigma_min, d.sigma_max):
        x = x0[:2].float() + sigma * _noise(x0[:2].float(), seed)
        level = torch.full((len(x),), sigma, dtype=torch.float32, device=x.device)
        bad += int((~single(x, level).isfinite()).sum())
    yield Check("finite in float32 at both ends", float(bad), 0.0, "values that are not")
