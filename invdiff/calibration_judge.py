"""From draws of simulated cases to what they say of a sampler."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from invdiff import uq
from invdiff.calibration import LEVELS, SHOWN, Calibration, Estimate
from invdiff.errors import InvdiffError
from invdiff.loop import ADVICE
from invdiff.uq.draws import Draws, ordered

if TYPE_CHECKING:
    from invdiff.posterior import Posterior
    from invdiff.problem import Problem
    from invdiff.sampler import Sampler

#: Bytes of draws that are kept in memory while they are looked at.
_CACHE = 1 << 30


def judge(
    done: Sequence[tuple[Problem, Posterior, np.ndarray]],
    *,
    sampler: Sampler,
    prior: str,
    population: str,
    from_prior: bool,
    asked: int,
    level: float,
    seed: int,
    origin: str,
) -> Calibration:
    """Return what the finished cases say.

    Args:
        done: Simulated problem, draws, and which of its cases are finished, block by block.
        sampler: The sampler.
        prior: Name of the prior.
        population: What the cases are.
        from_prior: Whether the images are draws of the prior.
        asked: Cases asked for.
        level: Of the conformal intervals.
        seed: Of the tests.
        origin: Fingerprint of problem, prior and sampler.
    """
    problem = done[0][0]
    truth = np.concatenate([_numpy(p.x_true)[kept] for p, _, kept in done])
    y = np.concatenate([_numpy(p.y)[kept] for p, _, kept in done])
    draws = _read(done, problem.operator.domain.shape)
    _check(draws)
    varies = np.stack([np.ptp(ordered(x), axis=0) > 0 for x, _ in draws])
    place = np.abs(2 * uq.pit(draws, truth, seed=seed) - 1)
    coverage = {k: _mean(place <= k, varies) for k in LEVELS}
    half = draws.n_cases // 2
    first, second = _part(draws, 0, half), _part(draws, half, draws.n_cases)
    conformal = uq.calibrate(first, truth[:half], level, population=population, fingerprint=origin)
    low, high = conformal.apply(second, origin)
    inside = (ordered(truth[half:]) >= low) & (ordered(truth[half:]) <= high)
    diagnosis = uq.diagnose(draws, truth, y, problem.operator, problem.likelihood, seed=seed)
    return Calibration(
        sampler=sampler,
        prior=prior,
        population=population,
        from_prior=from_prior,
        # All tables and figures speak of the same pixels.
        diagnosis=replace(diagnosis, coverage={k: coverage[k] for k in SHOWN}),
        coverage=coverage,
        spread_skill=uq.spread_skill(draws, truth),
        crps=_mean(uq.crps(draws, truth), varies),
        psnr=_psnr(draws, truth),
        conformal=conformal,
        conformal_coverage=_mean(inside, varies[half:]),
        asked=asked,
        seed=seed,
    )


def _read(done: Sequence[tuple[Problem, Posterior, np.ndarray]], shape: tuple[int, ...]) -> Draws:
    """Return the usable draws of the finished cases; those that do not fit into the cache are read again."""
    blocks = [(p.draws, p.stats["status"].values.reshape(p.n_cases, -1) == "ok", kept) for _, p, kept in done]
    where = [(block, int(case)) for block in blocks for case in block[2]]
    size = 16 * math.prod(shape) * done[0][1].n_draws

    @functools.lru_cache(maxsize=max(1, _CACHE // size))
    def get(i: int) -> tuple[np.ndarray, np.ndarray]:
        (draws, ok, _), case = where[i]
        x = (draws.isel(case=case) if "case" in draws.dims else draws).values[ok[case]]
        return x.astype(np.complex128 if np.iscomplexobj(x) else np.float64), np.full(len(x), 1 / max(len(x), 1))

    return Draws(len(where), shape, sum(int((~ok[kept]).sum()) for _, ok, kept in blocks), get)


def _check(draws: Draws) -> None:
    """Refuse cases whose draws have no spread to speak of, naming the first."""
    for i, (x, _) in enumerate(draws):
        if len(x) < 2 or (x == x[:1]).all():
            what = "has no two draws that are finite" if len(x) < 2 else "has draws that are all the same"
            raise InvdiffError(f"Case {i} {what}; {ADVICE}.")


def _part(draws: Draws, start: int, stop: int) -> Draws:
    return Draws(stop - start, draws.shape, draws.n_excluded, lambda i: draws.case(start + i))


def _mean(values: np.ndarray, where: np.ndarray) -> Estimate:
    """Return the mean over cases, and its standard error, of the mean over pixels that count."""
    per_case = np.array([v[w].mean() for v, w in zip(values, where)])
    return float(per_case.mean()), float(per_case.std(ddof=1) / np.sqrt(len(per_case)))


def _psnr(draws: Draws, truth: np.ndarray) -> Estimate:
    """Peak: the largest magnitude of any truth."""
    peak = float(np.abs(truth).max())
    error = np.array([(np.abs(x.mean(0) - t) ** 2).mean() for (x, _), t in zip(draws, truth)])
    values = 10 * np.log10(peak**2 / np.maximum(error, 1e-300))
    return float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values)))


def _numpy(values: torch.Tensor | None) -> np.ndarray:
    assert values is not None
    return values.detach().cpu().resolve_conj().numpy()
