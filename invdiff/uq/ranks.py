"""Simulation-based calibration: where the truth ranks among draws, in quantities that may depend on the data.

Given ``y``, the truth and ``n`` exact independent draws are ``n + 1`` points of which none is special. So the
rank of the truth in any quantity ``t(point; all points, y)`` that treats the points alike is uniform, exactly and
for every ``n``; ties are broken at random. Quantities of ``x`` alone cannot see a sampler that ignores the data;
the log-likelihood, the residual, distances from a reference that depends on ``y`` can.

A quantity is a function ``(points, case) -> values`` with points ``(n + 1, *image)``, the truth first, and one
value each.

Sources: Talts et al., "Validating Bayesian inference algorithms with simulation-based calibration", arXiv
1804.06788; Modrak et al., "Simulation-based calibration checking for Bayesian computation: the choice of test
quantities shapes sensitivity", Bayesian Analysis 20 (2025).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from invdiff.errors import InvdiffError
from invdiff.uq.draws import Draws, effective_size, read_draws, read_truth, to_numpy, vectors

if TYPE_CHECKING:
    from invdiff.problem import Problem

Quantity = Callable[[np.ndarray, int], np.ndarray]


def sbc(draws: Any, truth: Any, quantity: Quantity, seed: int = 0) -> np.ndarray:
    """Return the randomised rank of the truth in a quantity, ``(case,)`` in (0, 1); uniform for exact draws.

    Args:
        draws: ``(case, draw, ...)`` or a `Posterior`, of equal weight.
        truth: ``(case, ...)``.
        quantity: See the head of this file.
        seed: Of the randomisation.
    """
    found = read_equal(draws)
    target = read_truth(truth, found)
    return np.array([_rank(quantity, found, target, i, seed) for i in range(found.n_cases)])


def read_equal(draws: Any) -> Draws:
    """Read draws, refusing weighted ones: ranks among them have no exact law."""
    found = read_draws(draws)
    for i, (x, w) in enumerate(found):
        if effective_size(w) < len(x) * (1 - 1e-9):
            raise InvdiffError(
                f"The draws of case {i} are weighted, and ranks need draws of equal weight; resample them first."
            )
    return found


def _rank(quantity: Quantity, draws: Draws, truth: np.ndarray, case: int, seed: int) -> float:
    x = draws.case(case)[0]
    values = quantity(np.concatenate([truth[case][None].astype(x.dtype), x]), case)
    return exchange_rank(values, np.random.default_rng([seed, case, 0x5BC]))


def exchange_rank(values: np.ndarray, rng: np.random.Generator) -> float:
    """Return ``(#(v < v_0) + U #(v = v_0)) / n`` for the first of ``n`` values, itself among its ties."""
    below, equal = (values < values[0]).sum(), (values == values[0]).sum()
    return float((below + rng.random() * equal) / len(values))


def log_likelihood(problem: Problem) -> Quantity:
    """``log p(y | A(x))``: low where a point does not explain the data, high where it fits the noise."""
    import torch

    def values(points: np.ndarray, case: int) -> np.ndarray:
        own = problem.rows(torch.full((len(points),), case, dtype=torch.long))
        x = torch.from_numpy(points).to(problem.y.device, problem.operator.domain.dtype)
        return own.log_likelihood(x).double().cpu().numpy()

    return values


def residual_norm(problem: Problem) -> Quantity:
    """``||y - A(x)||``."""
    import torch

    def values(points: np.ndarray, case: int) -> np.ndarray:
        own = problem.rows(torch.full((len(points),), case, dtype=torch.long))
        x = torch.from_numpy(points).to(problem.y.device, problem.operator.domain.dtype)
        return own.residual(x).flatten(1).norm(dim=1).double().cpu().numpy()

    return values


def projection(direction: np.ndarray | Callable[[int], np.ndarray]) -> Quantity:
    """``<v, x>`` for one direction, or one per case: ``(D,)`` over real numbers (see `vectors`)."""

    def values(points: np.ndarray, case: int) -> np.ndarray:
        return vectors(points) @ (direction(case) if callable(direction) else direction)

    return values


def random_projection(seed: int = 0) -> Quantity:
    """``<v, x>`` with one random direction ``v`` for all cases."""

    def values(points: np.ndarray, case: int) -> np.ndarray:
        flat = vectors(points)
        return flat @ np.random.default_rng([seed, 0x9801]).standard_normal(flat.shape[1])

    return values


def mean_value(points: np.ndarray, case: int) -> np.ndarray:
    """Mean of all pixels (of the magnitude, where complex)."""
    return np.abs(points).reshape(len(points), -1).mean(1) if np.iscomplexobj(points) else _flat(points).mean(1)


def region_mean(labels: Any, label: int) -> Quantity:
    """Mean over the pixels with a label (of the magnitude, where complex); labels cover the last axes."""
    members = (to_numpy(labels) == label).ravel()
    if not members.any():
        raise InvdiffError(f"No pixel has the label {label}.")

    def values(points: np.ndarray, case: int) -> np.ndarray:
        x = np.abs(points) if np.iscomplexobj(points) else points
        return x.reshape(len(points), -1, members.size)[..., members].mean((1, 2))

    return values


def band_energy(low: float, high: float) -> Quantity:
    """Energy of frequencies between two shares of the Nyquist frequency, ``low <= |k| < high``.

    The last axes count, two of them or three for volumes ``(channel, z, y, x)``.
    """

    def values(points: np.ndarray, case: int) -> np.ndarray:
        axes = tuple(range(-min(max(points.ndim - 2, 1), 3), 0))
        grids = np.meshgrid(*(2 * np.fft.fftfreq(points.shape[a]) for a in axes), indexing="ij", sparse=True)
        radius = np.sqrt(sum(g**2 for g in grids))
        power = np.abs(np.fft.fftn(points, axes=axes)) ** 2
        return np.asarray((power * ((radius >= low) & (radius < high))).reshape(len(points), -1).sum(1))

    return values


def mean_distance(points: np.ndarray, case: int) -> np.ndarray:
    """Mean distance from the other points: large for a point far out. Sees width and missing modes."""
    from invdiff.uq.scores import distances

    return distances(vectors(points)).mean(1)


def nearest_distance(points: np.ndarray, case: int) -> np.ndarray:
    """Distance from the nearest other point. Sees repeated draws, however little they were changed."""
    from invdiff.uq.scores import distances

    return np.asarray((distances(vectors(points)) + np.diag(np.full(len(points), np.inf))).min(1))


def pixels_outside(points: np.ndarray, case: int) -> np.ndarray:
    """Share of pixels in which a point is in the outer tenth of all: the coverage of pixelwise intervals."""
    from scipy.stats import rankdata

    flat = vectors(points)
    n = len(flat)
    # Ties share their mean rank: where all points agree none of them is outside.
    return np.asarray((np.abs(2 * rankdata(flat, axis=0) - (n + 1)) > 0.9 * n).mean(1))


def principal_distance(points: np.ndarray, case: int) -> np.ndarray:
    """Distance from the mean along the direction in which the points vary most."""
    flat = vectors(points)
    centred = flat - flat.mean(0)
    values, u = np.linalg.eigh(centred @ centred.T)
    return np.abs(u[:, -1]) * np.sqrt(max(values[-1], 0))


def distance_from(references: np.ndarray | Callable[[int], np.ndarray]) -> Quantity:
    """``||x - r||`` from a reference per case, ``(case, D)`` over real numbers: the quantity of TARP.

    Expected coverage of the balls around references that end at the truth is then uniform. References must depend
    on ``y``, or a sampler that ignores the data passes.

    Reference: Lemos et al., "Sampling-based accuracy testing of posterior estimators for general inference", ICML
    2023.
    """

    def values(points: np.ndarray, case: int) -> np.ndarray:
        r = references(case) if callable(references) else references[case]
        return np.asarray(np.linalg.norm(vectors(points) - r, axis=1))

    return values


def _flat(points: np.ndarray) -> np.ndarray:
    return points.reshape(len(points), -1)
