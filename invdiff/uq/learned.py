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
from invdiff.uq.regression import Leading, Logistic, Ridge

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
