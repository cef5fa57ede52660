"""Classifier two-sample tests: can a classifier tell draws from the truth, overall and at one measurement?

Sources: Lopez-Paz and Oquab, "Revisiting classifier two-sample tests", ICLR 2017; Linhart, Gramfort, Rodrigues,
"L-C2ST: local diagnostics for posterior approximations in simulation-based inference", NeurIPS 2023.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from invdiff.errors import InvdiffError
from invdiff.uq.draws import read_data, read_draws, read_truth, to_numpy, vectors
from invdiff.uq.regression import Leading, Logistic

Classifier = Literal["auto", "boosting", "quadratic", "neighbours"]


@dataclass(frozen=True)
class TwoSample:
    """Result of a classifier two-sample test.

    Attributes:
        auc: Chance that the classifier ranks a held-out row of the one sample above one of the other; 0.5 where it
            cannot tell them apart.
        p_value: Exact for any classifier, because it is judged on rows that it has not seen.
    """

    auc: float
    p_value: float


def c2st(a: Any, b: Any, classifier: Classifier = "auto", seed: int = 0) -> TwoSample:
    """Train on one half of two samples to tell them apart, and rank the other half (Mann-Whitney test).

    Args:
        a: ``(n, ...)``, rows independent: draws of different cases, or all draws of one case.
        b: ``(m, ...)``.
        classifier: ``boosting`` (histogram trees of scikit-learn), ``quadratic`` (logistic regression on products
            of principal components), ``neighbours``; ``auto`` takes the first where scikit-learn is installed and
            there are 400 rows or more, else the second.
        seed: Of the split.
    """
    from scipy.stats import mannwhitneyu

    x, z = (vectors(to_numpy(v).astype(np.complex128 if np.iscomplexobj(v) else float)) for v in (a, b))
    if x.shape[1] != z.shape[1] or min(len(x), len(z)) < 8:
        raise InvdiffError(
            f"Two samples of the same kind with at least 8 rows each are needed, got {x.shape} and {z.shape}."
        )
    rng = np.random.default_rng([seed, 0xC257])
    parts = [np.array_split(v[rng.permutation(len(v))], 2) for v in (x, z)]
    rows = np.concatenate([parts[0][0], parts[1][0]])
    labels = np.repeat([1.0, 0.0], [len(parts[0][0]), len(parts[1][0])])
    score = _fit(classifier, rows, labels, seed)
    ours, theirs = score(parts[0][1]), score(parts[1][1])
    test = mannwhitneyu(ours, theirs, alternative="greater")
    return TwoSample(float(test.statistic / (len(ours) * len(theirs))), float(test.pvalue))


def local_c2st(
    draws: Any, truth: Any, y: Any, at_draws: Any, at_y: Any, nulls: int = 99, seed: int = 0
) -> tuple[float, float]:
    """Test draws at one measurement, where no truth is known, with a classifier trained on simulated cases.

    A classifier learns to tell ``(truth, y)`` from ``(draw, y)`` over the simulated cases; the statistic is the
    mean of ``(p - 1/2)^2`` over the draws at ``at_y``. Its null distribution comes from classifiers trained after
    truth and draw were exchanged in every other case at random, which changes nothing where the draws are exact.

    Args:
        draws: ``(case, draw, ...)`` or a `Posterior`; one draw per case is used.
        truth: ``(case, ...)``.
        y: ``(case, ...)``.
        at_draws: ``(draw, ...)`` at the measurement in question.
        at_y: That measurement, ``(...)``.
        nulls: Classifiers for the null distribution; the p-value is at least ``1 / (nulls + 1)``.
        seed: Of draws and exchanges.

    Returns:
        Statistic and p-value.
    """
    found = read_draws(draws)
    true = vectors(read_truth(truth, found))
    rng = np.random.default_rng([seed, 0x10C])
    one = np.stack([vectors(x)[rng.choice(len(x), p=w)] for x, w in found])
    data = read_data(y, found.n_cases)
    here = read_data(to_numpy(at_y)[None], 1)
    tested = read_draws(to_numpy(at_draws)[None]).case(0)[0]
    if tested.shape[1:] != found.shape or here.shape[1] != data.shape[1]:
        raise InvdiffError(
            "Draws and data at the measurement in question have another shape than the simulated ones."
        )
    coordinates, conditions = Leading(np.concatenate([true, one]), 6), Leading(data, 6)
    c = conditions(data)
    target = np.concatenate(
        [coordinates(vectors(tested)), np.repeat(conditions(here), len(tested), axis=0)], axis=1
    )
    labels = np.repeat([1.0, 0.0], len(true))

    def statistic(first: np.ndarray, second: np.ndarray) -> float:
        rows = np.concatenate([np.concatenate([coordinates(v), c], axis=1) for v in (first, second)])
        logit = Logistic(rows, labels)(target)
        return float(((1 / (1 + np.exp(-logit)) - 0.5) ** 2).mean())

    value = statistic(true, one)
    exceeded = 0
    for _ in range(nulls):
        swap = rng.random((len(true), 1)) < 0.5
        exceeded += statistic(np.where(swap, one, true), np.where(swap, true, one)) >= value
    return value, (1 + exceeded) / (nulls + 1)


def _fit(classifier: str, rows: np.ndarray, labels: np.ndarray, seed: int) -> Any:
    if classifier == "auto":
        installed = importlib.util.find_spec("sklearn") is not None
        classifier = "boosting" if installed and len(rows) >= 200 else "quadratic"
    if classifier == "boosting":
        try:
            from sklearn.ensemble import HistGradientBoostingClassifier
        except ImportError as error:
            raise InvdiffError(
                "The classifier 'boosting' needs scikit-learn; install it, or use 'quadratic' or 'neighbours'."
            ) from error
        model = HistGradientBoostingClassifier(max_iter=60, random_state=seed).fit(rows, labels)
        return lambda v: model.predict_proba(v)[:, 1]
    leading = Leading(rows, 12)
    known = leading(rows)
    if classifier == "quadratic":
        fitted = Logistic(known, labels)
        return lambda v: fitted(leading(v))
    if classifier == "neighbours":
        from scipy.spatial import cKDTree

        tree, k = cKDTree(known), max(5, int(np.sqrt(len(known))))
        return lambda v: labels[tree.query(leading(v), k)[1]].mean(1)
    raise InvdiffError(f"Classifiers are auto, boosting, quadratic and neighbours, not {classifier!r}.")
