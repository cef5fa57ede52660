"""Quantities that are learned from earlier cases: references from the data, predictable errors, a classifier.

A quantity for case ``i`` may use truths of other cases, but then the ranks of different cases depend on each
other. Here cases come in blocks, and what is used for a block was learned from the blocks before it: given the
past the rank is uniform, so all ranks together are independent and uniform, and p-values are exact. The price is
that the first block is not tested.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from invdiff.uq.draws import Draws, vectors
from invdiff.uq.ranks import exchange_rank

#: Blocks of cases; the first is only learned from.
BLOCKS = 5
#: Fewest cases to learn from.
LEAST = 10

#: ``(training cases) -> (points, case) -> values``.
Learner = Callable[[np.ndarray], Callable[[np.ndarray, int], np.ndarray]]


@dataclass(frozen=True)
class Simulated:
    """Cases as real vectors: draws ``(n, D)`` each, truths ``(N, D)``, data ``(N, m)``."""

    draws: Draws
    truth: np.ndarray
    y: np.ndarray

    def points(self, case: int) -> np.ndarray:
        """Truth and draws of a case, ``(n + 1, D)``."""
        return np.concatenate([self.truth[case][None], vectors(self.draws.case(case)[0])])


def learned_ranks(data: Simulated, learner: Learner, seed: int) -> np.ndarray:
    """Return randomised ranks of the truth for all cases but those of the first block; empty for too few cases."""
    n = len(data.truth)
    edges = np.linspace(0, n, BLOCKS + 1).astype(int)
    out = []
    for start, stop in itertools.pairwise(edges):
        if start < LEAST:
            continue
        quantity = learner(np.arange(start))
        for case in range(start, stop):
            rng = np.random.default_rng([seed, case, 0x1EA2])
            out.append(exchange_rank(quantity(data.points(case), case), rng))
    return np.array(out)


class Ridge:
    """``t = b + K a``, linear regression with the penalty that leaves each case out best.

    Works in the space of cases, so that images cost no more than numbers.

    Args:
        features: ``(n, p)``.
        targets: ``(n, q)``.
    """

    def __init__(self, features: np.ndarray, targets: np.ndarray) -> None:
        n = len(features)
        self._offset, self._mean = features.mean(0), targets.mean(0)
        self._features, centred = features - self._offset, targets - self._mean
        values, v = np.linalg.eigh(self._features @ self._features.T)
        values = np.maximum(values, 0)
        coordinates, size = v.T @ centred, max(float(values.max()), 1e-300)
        best = np.inf
        for penalty in [*(size * np.logspace(-8, 2, 31)), np.inf]:
            shrink = values / (values + penalty) if np.isfinite(penalty) else np.zeros(n)
            leverage = (v**2 @ shrink) + 1 / n
            left_out = (centred - v @ (shrink[:, None] * coordinates)) / np.maximum(1 - leverage, 1e-9)[:, None]
            loss = float((left_out**2).sum())
            if loss < best:
                best, self.left_out = loss, left_out
                gain = 1 / (values + penalty) if np.isfinite(penalty) else np.zeros(n)
                self._alpha = v @ (gain[:, None] * coordinates)

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Predict ``(q,)`` for one row of features."""
        return np.asarray(self._mean + ((features - self._offset) @ self._features.T) @ self._alpha)


def tarp_references(data: Simulated, seed: int) -> Learner:
    """Learn references from the data: regression of truths on ``y``, plus the error it made on another case."""

    def learn(known: np.ndarray) -> Callable[[np.ndarray, int], np.ndarray]:
        ridge = Ridge(data.y[known], data.truth[known])

        def values(points: np.ndarray, case: int) -> np.ndarray:
            other = np.random.default_rng([seed, case, 0x7A29]).integers(len(known))
            return np.asarray(np.linalg.norm(points - ridge(data.y[case]) - ridge.left_out[other], axis=1))

        return values

    return learn


def predictable_error(data: Simulated) -> Learner:
    """Learn the error of the mean from the data: ``E[x - mean | y] = 0`` for exact draws."""
    means = np.stack([vectors(x).mean(0) for x, _ in data.draws])

    def learn(known: np.ndarray) -> Callable[[np.ndarray, int], np.ndarray]:
        ridge = Ridge(data.y[known], (data.truth - means)[known])
        return lambda points, case: points @ ridge(data.y[case])

    return learn


def classifier(data: Simulated, seed: int, negatives: int = 4, components: int = 6) -> Learner:
    """Learn to tell truths from draws, given the data: logistic regression on products of principal components."""
    from invdiff.uq.classifiers import Logistic

    def learn(known: np.ndarray) -> Callable[[np.ndarray, int], np.ndarray]:
        rng = np.random.default_rng([seed, len(known), 0xC2])
        rows, labels, weight, cases = [], [], [], []
        for case in known:
            points = data.points(int(case))
            count = min(negatives, len(points) - 1)
            chosen = 1 + rng.choice(len(points) - 1, count, replace=False)
            rows.append(points[np.concatenate([[0], chosen])])
            labels += [1.0] + [0.0] * count
            weight += [1.0] + [1 / count] * count
            cases += [case] * (1 + count)
        x = Leading(np.concatenate(rows), components)
        y = Leading(data.y[known], components)

        def features(points: np.ndarray, case: np.ndarray) -> np.ndarray:
            return np.concatenate([x(points), y(data.y[case])], axis=1)

        model = Logistic(features(np.concatenate(rows), np.array(cases)), np.array(labels), np.array(weight))
        return lambda points, case: model(features(points, np.full(len(points), case)))

    return learn


class Leading:
    """Leading principal coordinates of rows, scaled to unit variance.

    Args:
        rows: ``(n, p)``.
        count: How many at most.
    """

    def __init__(self, rows: np.ndarray, count: int) -> None:
        self._mean = rows.mean(0)
        centred = rows - self._mean
        values, u = np.linalg.eigh(centred @ centred.T) if len(rows) < rows.shape[1] else _covariance(centred)
        keep = np.argsort(values)[::-1][:count]
        keep = keep[values[keep] > 1e-12 * max(float(values.max()), 1e-300)]
        basis = centred.T @ u[:, keep] / np.sqrt(values[keep]) if len(rows) < rows.shape[1] else u[:, keep]
        self._basis = basis * np.sqrt(len(rows) / values[keep])

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """Return coordinates ``(n, count)``."""
        return np.asarray((rows - self._mean) @ self._basis)


def _covariance(centred: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    values, u = np.linalg.eigh(centred.T @ centred)
    return values, u
