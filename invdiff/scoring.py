"""Scores of draws: how well they predict data that were set aside, explain the others, and find the truth.

All figures are means over cases; what does not exist (spread of a point estimate, truth of a real scan) is None.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from invdiff.metrics import crps
from invdiff.rng import INIT, Streams
from invdiff.summaries import quantile

if TYPE_CHECKING:
    from invdiff.posterior import Posterior
    from invdiff.problem import Problem
    from invdiff.withholding import Withheld

LEVEL = 0.9
#: Pixels below this share of the largest magnitude do not count: there is next to nothing.
FLOOR = 0.05

Scores = dict[str, float | None]


@dataclass(frozen=True)
class Draws:
    """The usable draws of one case, ``x`` ``(n, *image)``, with weights that sum to 1.

    A point estimate is one draw whose spread means nothing.
    """

    x: np.ndarray
    weights: np.ndarray
    point: bool

    @property
    def spread(self) -> bool:
        """Whether there is a spread to speak of."""
        return not self.point and self.effective >= 2 - 1e-9

    @property
    def effective(self) -> float:
        """Effective number of draws."""
        return 1 / float((self.weights**2).sum()) if len(self.weights) else 0.0

    @property
    def level(self) -> float:
        """Level of the intervals that so many draws support, at most 90 %."""
        return min(LEVEL, (self.effective - 1) / (self.effective + 1))

    def interval(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the ends of the central interval of ``values`` ``(n, ...)``, one per draw."""
        low, high = quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], self.weights)
        return low, high


def usable(posterior: Posterior, case: int) -> Draws:
    """Return the draws of a case that count, or the first point estimate."""
    if posterior.kind == "point":
        image = posterior.estimate
        for dim, index in (("case", case), ("restart", 0)):
            image = image.isel({dim: index}) if dim in image.dims else image
        return Draws(image.values[None], np.ones(1), point=True)
    from invdiff.posterior import TreeDraws

    source = TreeDraws(posterior)
    weights = source.weights(case)
    keep = np.flatnonzero(weights > 0)
    x = np.stack([source.get(case, int(s)) for s in keep]) if keep.size else np.zeros((0, *source.shape))
    return Draws(x, weights[keep] / max(weights[keep].sum(), 1e-300), point=False)


def data_scores(
    posterior: Posterior, full: Problem, used: torch.Tensor, withheld: Withheld | None, seed: int
) -> Scores:
    """Score predictions of the data.

    ``misfit``: ``||y - A x||^2 / (m sigma^2)`` over the ``m`` data used, median over draws; at the noise level
    about 1. On the data withheld: ``prediction_error`` is ``||y - A mean|| / ||y||``; ``prediction_coverage`` the
    share of the real components inside the central interval of draws plus noise, whose nominal level is
    ``prediction_level``; ``prediction_crps`` the fair score of draws plus noise, in noise levels, which would be
    ``1 / sqrt(pi)`` = 0.564 on average if the truth were known.

    Args:
        posterior: Draws or estimate.
        full: The problem with all data.
        used: True at the data used, ``(1 or N, *range)``.
        withheld: The data set aside, if any.
        seed: Of the noise.
    """
    return average([_data(usable(posterior, c), full, used, withheld, seed, c) for c in range(full.n_cases)])


def image_scores(posterior: Posterior, truth: torch.Tensor | None, reference: np.ndarray) -> Scores:
    """Score images, magnitudes where they are complex, over the pixels where there is something.

    ``width``: median width of the central interval, in image units. With a truth: ``psnr`` in decibels (peak: the
    largest magnitude of the truth) and ``nrmse`` of the mean over all pixels; ``coverage`` of the intervals, whose
    nominal level is ``coverage_level``, and ``crps`` in image units, over pixels with a magnitude above 5 % of the
    largest.

    Args:
        posterior: Draws or estimate.
        truth: ``(N, *image)``.
        reference: ``(N, *image)``, whose magnitude says where there is something; the truth wins over it.
    """
    found = []
    for case in range(posterior.n_cases):
        true = None if truth is None else truth[case].cpu().resolve_conj().numpy()
        size = np.abs(reference[case] if true is None else true)
        found.append(_image(usable(posterior, case), true, size >= FLOOR * size.max()))
    return average(found)


def average(found: list[Scores]) -> Scores:
    """Return the mean over cases of every figure; None where a case lacks it."""
    out: Scores = {}
    for key in dict.fromkeys(k for f in found for k in f):
        values = [f.get(key) for f in found]
        numbers = [v for v in values if v is not None]
        out[key] = float(np.mean(numbers)) if len(numbers) == len(values) else None
    return out


def _data(
    draws: Draws, full: Problem, used: torch.Tensor, withheld: Withheld | None, seed: int, case: int
) -> Scores:
    if not len(draws.x):
        return {}
    own = int(np.random.SeedSequence([seed, 0x9E]).generate_state(1)[0])  # not the numbers of the draws themselves
    problem = full.rows(torch.tensor([case]))
    whitener = problem.likelihood.whiten()
    inside = used[case if used.shape[0] > 1 else 0]
    misfits: list[float] = []
    clean: list[np.ndarray] = []
    noisy: list[np.ndarray] = []
    target = np.zeros(0)
    for s, x in enumerate(draws.x):
        z = problem.operator(torch.from_numpy(np.ascontiguousarray(x))[None].to(problem.y.device))
        level = torch.ones(()) if whitener is not None else problem.likelihood.gaussian_sigma(z)
        if level is not None and bool((level > 0).all()):
            rest = (problem.y - z) if whitener is None else whitener(problem.y - z)
            misfits.append(float((_components((rest / level)[0][inside]) ** 2).mean()))
        if withheld is not None:
            assert level is not None  # Gaussian noise, or nothing could be withheld
            at = withheld.at(case)
            y = problem.likelihood.sample(z, Streams(own, [(case, s)]).at(INIT))
            unit = torch.where(level > 0, level, torch.ones_like(level))
            # in noise levels, one row of real components
            white = [(v if whitener is None else whitener(v)) / unit for v in (z, y, problem.y)]
            without, predicted, target = (_components(v[0][at]) for v in white)
            clean.append(without)
            noisy.append(predicted)
    out: Scores = {"misfit": float(np.median(misfits)) if misfits else None}
    if withheld is None:
        return out
    wrong = target - draws.weights @ np.stack(clean)
    out["prediction_error"] = _norm(wrong) / max(_norm(target), 1e-300)
    names = ("prediction_coverage", "prediction_level", "prediction_crps")
    return {**out, **dict(zip(names, _spread_scores(draws, np.stack(noisy), target)))}


def _image(draws: Draws, truth: np.ndarray | None, region: np.ndarray) -> Scores:
    if not len(draws.x):
        return {}
    is_complex = np.iscomplexobj(draws.x)
    values = np.abs(draws.x) if is_complex else draws.x
    low, high = draws.interval(values[:, region]) if draws.spread else (None, None)
    out: Scores = {"width": None if low is None or high is None else float(np.median(high - low))}
    if truth is None:
        return out
    mean = np.tensordot(draws.weights, draws.x, axes=1)
    wrong = np.abs(mean) - np.abs(truth) if is_complex else mean - truth
    peak, square = float(np.abs(truth).max()), float((wrong**2).mean())
    out["psnr"] = 10 * math.log10(peak**2 / square) if square and peak else None
    out["nrmse"] = _norm(wrong) / max(_norm(truth), 1e-300)
    names = ("coverage", "coverage_level", "crps")
    target = (np.abs(truth) if is_complex else truth)[region]
    return {**out, **dict(zip(names, _spread_scores(draws, values[:, region], target)))}


def _spread_scores(
    draws: Draws, values: np.ndarray, target: np.ndarray
) -> tuple[float | None, float | None, float | None]:
    """Return coverage, its nominal level, and the mean score of ``values`` ``(n, m)`` for ``target`` ``(m,)``."""
    if not draws.spread:
        return None, None, None
    low, high = draws.interval(values)
    covered = float(((target >= low) & (target <= high)).mean())
    return covered, draws.level, float(crps(values, target, draws.weights).mean())


def _norm(values: np.ndarray) -> float:
    return float(np.linalg.norm(values))


def _components(values: torch.Tensor) -> np.ndarray:
    """Return the real components of a tensor as one float64 row."""
    values = torch.view_as_real(values.resolve_conj()) if values.is_complex() else values
    return values.flatten().double().cpu().numpy()
