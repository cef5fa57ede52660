"""Risk control: intervals whose expected share of pixels outside is small, with a confidence: RCPS and K-RCPS.

Where split-conformal intervals (`invdiff.uq.conformal`) make a promise for every pixel by itself, these make one
for whole images, with a statement about the calibration itself: with probability ``confidence`` over the choice of
the calibration cases the risk is at most ``1 - level``.

Sources: Bates, Angelopoulos, Lei, Malik, Jordan, "Distribution-free, risk-controlling prediction sets", JACM 68
(2021); Teneggi, Tivnan, Stayman, Sulam, "How to trust your diffusion model: a convex optimization approach to
conformal risk control", ICML 2023.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np

from invdiff.errors import InvdiffError
from invdiff.uq.bounds import hoeffding_bentkus, waudby_smith_ramdas
from invdiff.uq.conformal import (
    Conformal,
    Score,
    check_score,
    conformal_score,
    interval_values,
    origin_of,
    uncorrected,
)
from invdiff.uq.draws import ordered, read_draws, read_truth

#: Factors (in standard deviations, or image units for quantiles) that risk control tries, the largest first.
STEP, LARGEST = 0.01, 50.0


def control_risk(
    draws: Any,
    truth: Any,
    level: float = 0.9,
    confidence: float = 0.9,
    groups: int = 1,
    bound: Literal["wsr", "hb"] = "wsr",
    score: Score = "scaled",
    *,
    population: str,
    fingerprint: str | None = None,
    weights: Any = None,
) -> Conformal:
    """Calibrate intervals of whole images: RCPS with one factor, K-RCPS with one per group of pixels.

    Factors are tried from large to small; the last for which a test at level ``1 - confidence`` still says that
    the expected share of pixels outside is at most ``1 - level`` is kept. With groups, half of the cases first
    choose groups (by the typical score of a pixel) and relative factors that make the mean width smallest, and the
    other half calibrates a constant added to them.

    Args:
        draws: ``(case, draw, ...)`` or a `Posterior`; magnitudes, where complex.
        truth: ``(case, ...)``, cases independent of each other.
        level: Share of the pixels to be inside.
        confidence: Over the choice of the cases.
        groups: Number of groups of pixels.
        bound: ``wsr`` (betting) or ``hb`` (Hoeffding-Bentkus).
        score: See `calibrate`.
        population: What the cases are, in words.
        fingerprint: Of problem, prior and sampler; a `Posterior` knows its own.
        weights: ``(case, draw)``, where draws are weighted.
    """
    origin = origin_of(draws, fingerprint, population)
    check_score(score)
    if not (0 < level < 1 and 0 < confidence < 1) or bound not in ("wsr", "hb") or groups < 1:
        raise InvdiffError(
            "Risk control needs level and confidence between 0 and 1, at least one group and the bound 'wsr' or "
            f"'hb', got {level!r}, {confidence!r}, {groups!r} and {bound!r}."
        )
    found = read_draws(draws, weights)
    target = ordered(read_truth(truth, found))
    scores, units = [], []
    for (values, w), t in zip(interval_values(draws, None, weights), target):
        low, high, unit = uncorrected(values, w, score, level)
        scores.append(conformal_score(t, low, high, unit).ravel())
        units.append(unit.ravel())
    s, alpha = np.stack(scores), 1 - level
    anchor: np.ndarray = np.zeros(s.shape[1])
    used = np.arange(len(s))
    if groups > 1:
        chosen, used = np.array_split(used, 2)
        anchor = _anchor(s[chosen], np.stack(units)[chosen].mean(0), groups, alpha)
    added = _smallest(s[used] - anchor, alpha, 1 - confidence, bound, float(anchor.max()))
    factor = np.maximum(anchor + added, 0).reshape(found.shape) if groups > 1 else np.array(added)
    return Conformal(score, level, factor, None, confidence, len(s), population, origin)


def _smallest(scores: np.ndarray, alpha: float, delta: float, bound: str, below: float) -> float:
    """Return the smallest constant of a fixed grid down to which all pass the test of the risk."""
    grid = STEP * np.arange(round(LARGEST / STEP), -math.ceil(below / STEP) - 1, -1)
    inside = np.stack([np.searchsorted(np.sort(s), grid, side="right") for s in scores])
    losses = 1 - inside.T / scores.shape[1]
    # Above the largest score all losses are 0, and so all tests are the same.
    first = max(int(losses.any(1).argmax()) - 1, 0)
    last = None
    for value, loss in zip(grid[first:], losses[first:]):
        p = hoeffding_bentkus(loss, alpha) if bound == "hb" else waudby_smith_ramdas(loss, alpha, delta)
        if p > delta:
            break
        last = float(value)
    if last is None:
        raise InvdiffError(
            f"{len(scores)} cases do not show that any factor keeps {1 - alpha:.0%} of the pixels inside; use "
            "more cases, or a lower level or confidence."
        )
    return last


def _anchor(scores: np.ndarray, unit: np.ndarray, groups: int, alpha: float) -> np.ndarray:
    """Return factors, one per group of pixels with similar scores, of smallest mean width at risk ``alpha``.

    Minimises ``sum_k c_k f_k + mu sum_k risk_k(f_k)`` group by group for a multiplier ``mu`` found by bisection.
    """
    typical = np.median(np.where(np.isfinite(scores), scores, LARGEST), axis=0)
    edges = np.quantile(typical, np.linspace(0, 1, groups + 1)[1:-1])
    group = np.searchsorted(edges, typical, side="right")
    grid = np.linspace(0, min(LARGEST, max(float(np.quantile(scores, 0.9999)), STEP)), 400)
    cost, risk = [], []
    for k in range(groups):
        own = np.sort(scores[:, group == k].ravel())
        cost.append(unit[group == k].sum() / len(unit))
        risk.append((len(own) - np.searchsorted(own, grid, side="right")) / scores.size)

    def best(mu: float) -> list[int]:
        return [int((c * grid + mu * r).argmin()) for c, r in zip(cost, risk)]

    low, high = -20.0, 30.0  # of log mu
    for _ in range(60):
        middle = 0.5 * (low + high)
        total = sum(r[i] for r, i in zip(risk, best(math.exp(middle))))
        low, high = (low, middle) if total <= alpha else (middle, high)
    return np.asarray(grid[np.array(best(math.exp(high)))][group])
