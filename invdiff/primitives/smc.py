"""Weighted particles: normalised weights, effective sample size, systematic resampling, case by case.

The rows of a batch are the particles of one case or of several, each case's particles side by side; nothing here
mixes cases. Log-weights are kept unnormalised.
"""

from __future__ import annotations

from itertools import groupby

import torch
from torch import Tensor

from invdiff.rng import Streams


def groups(rng: Streams) -> list[tuple[int, slice]]:
    """Return ``(case, rows)`` of every case in the batch."""
    out, first = [], 0
    for case, rows in groupby(rng.keys, key=lambda key: key[0]):
        count = len(list(rows))
        out.append((case, slice(first, first + count)))
        first += count
    return out


def particles(rows: int, rng: Streams, device: torch.device) -> dict[str, Tensor]:
    """Return the accounts of particles that have not been weighted yet: see `select`."""
    zero = torch.zeros(rows, dtype=torch.float64, device=device)
    return {"log_weight": zero, "ess": ess(zero, rng), "ess_run": ess(zero, rng)}


def select(
    state: dict[str, Tensor], log_weight: Tensor, rng: Streams, threshold: float = 1.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Resample where `resample` would, and keep the accounts that the driver stores.

    Args:
        state: Holds the accounts so far.
        log_weight: New weights, ``(B,)``.
        rng: Streams of the rows.
        threshold: Share of effective particles at or below which a case is resampled.

    Returns:
        Index of the ancestor of each row, and ``log_weight`` after resampling; ``ess``, the smallest effective
        sample size of the case so far; ``ess_run``, with ``1 / ess_run = 1 / N + sum (1 / ess - 1 / N)`` over all
        resamplings: what is left of ``N`` particles for a feature that the chain never changes afterwards.
    """
    size, whole = ess(log_weight, rng), ess(torch.zeros_like(log_weight), rng)
    index, log_weight = resample(log_weight, rng, threshold)
    lost = torch.where(size <= threshold * whole, 1 / size - 1 / whole, torch.zeros_like(size))
    run = 1 / (1 / state["ess_run"] + lost.clamp_min(0)).clamp_max(1)
    return index, {"log_weight": log_weight, "ess": torch.minimum(state["ess"], size), "ess_run": run}


def shared(x: Tensor, rng: Streams) -> Tensor:
    """Give every row the values of its case's first row (numbers that a whole ensemble shares)."""
    first = [rows.start for _, rows in groups(rng) for _ in range(rows.stop - rows.start)]
    return x[torch.tensor(first, device=x.device)]


def normalise(log_weight: Tensor, rng: Streams) -> Tensor:
    """Return weights ``w_i = exp(l_i) / sum_j exp(l_j)`` over each case, ``(B,)``; uniform where all vanish."""
    out = torch.empty_like(log_weight)
    for _, rows in groups(rng):
        w = torch.softmax(_usable(log_weight[rows]), 0)
        out[rows] = w if bool(torch.isfinite(w).all()) else torch.full_like(w, 1 / len(w))
    return out


def _usable(log_weight: Tensor) -> Tensor:
    """Give no weight to a particle whose weight is not a number."""
    return torch.nan_to_num(log_weight, nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf)


def ess(log_weight: Tensor, rng: Streams) -> Tensor:
    """Effective sample size ``1 / sum_i w_i^2`` of each row's case, ``(B,)``."""
    w = normalise(log_weight, rng)
    out = torch.empty_like(w)
    for _, rows in groups(rng):
        out[rows] = 1 / (w[rows] ** 2).sum()
    return out


def resample(log_weight: Tensor, rng: Streams, threshold: float = 1.0) -> tuple[Tensor, Tensor]:
    """Systematic resampling of every case whose ESS is at most ``threshold`` times its particles.

    Args:
        log_weight: ``(B,)``.
        rng: Streams of the rows; one uniform number per case is used.
        threshold: Share of particles; 1 always resamples, 0 never.

    Returns:
        Index of the ancestor of each row, ``(B,)``, and the new log-weights: equal in a resampled case and with
        the same total, unchanged elsewhere.
    """
    weights, size = normalise(log_weight, rng), ess(log_weight, rng)
    index = torch.arange(len(log_weight), device=log_weight.device)
    new = log_weight.clone()
    for case, rows in groups(rng):
        count = rows.stop - rows.start
        uniform = float(rng.case_uniform(case, 1)[0])
        if float(size[rows.start]) > threshold * count:
            continue
        positions = (torch.arange(count, dtype=torch.float64, device=weights.device) + uniform) / count
        edges = weights[rows].double().cumsum(0)
        index[rows] = rows.start + torch.searchsorted(edges / edges[-1], positions).clamp_max(count - 1)
        new[rows] = torch.logsumexp(_usable(log_weight[rows]), 0) - torch.log(torch.tensor(float(count)))
    return index, new


def conditioned(mean: Tensor, z: Tensor, g: float, target: Tensor, v: Tensor) -> Tensor:
    """Return what sight of ``target = x + sqrt(v) noise`` adds to ``x = mean + g z``.

    ``K (target - mean) - g (1 - sqrt(1 - K)) z`` with ``K = g^2 / (g^2 + v)``: the sum has the conditional mean
    and variance. ``v`` may be infinite (nothing is added) or 0 (``x`` becomes ``target``); all per component.
    """
    total, one = v + g * g, torch.ones_like(v)
    gain = torch.where(total > 0, g * g / torch.where(total > 0, total, one), one)
    return gain * (target - mean) - g * (1 - (1 - gain).sqrt()) * z


def log_normal(x: Tensor, mean: Tensor, variance: Tensor | float) -> Tensor:
    """Log-density of independent normals per row, without the constant ``-n/2 log 2 pi``; ``(B,)`` in float64.

    Args:
        x: ``(B, ...)``, real or complex (unit variance per real component times ``variance``).
        mean: Broadcastable to ``x``.
        variance: Number, ``(B,)`` shaped to broadcast, or one per component.
    """
    v = torch.as_tensor(variance, dtype=torch.float64, device=x.device)
    parts = 2 if x.is_complex() else 1
    terms = (x - mean).abs().double() ** 2 / v + parts * v.log()
    return -0.5 * terms.flatten(1).sum(1)
