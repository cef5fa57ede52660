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
from invdiff.uq.draws import read_draws, read_truth, to_numpy, vectors

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
    from invdiff.uq.learned import Leading

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


class Logistic:
    """Logistic regression on features and their products, with a quadratic penalty; calling it gives log odds.

    Exact for telling two Gaussians apart, which is why products suffice.

    Args:
        features: ``(n, p)``.
        labels: 0 or 1, ``(n,)``.
        weights: ``(n,)``.
        penalty: On the squared coefficients of standardised features.
    """

    def __init__(
        self, features: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None, penalty: float = 1.0
    ) -> None:
        self._upper = np.triu_indices(features.shape[1])
        self._mean, self._scale = np.zeros(()), np.ones(())
        f = self._expand(features)
        self._mean, self._scale = f.mean(0), np.maximum(f.std(0), 1e-12)
        f = np.concatenate([np.ones((len(f), 1)), (f - self._mean) / self._scale], axis=1)
        w = np.ones(len(f)) if weights is None else weights
        ridge = np.diag(np.r_[1e-6, np.full(f.shape[1] - 1, penalty)])

        def loss(beta: np.ndarray) -> float:
            eta = f @ beta
            return float(w @ (np.logaddexp(0, eta) - labels * eta) + 0.5 * beta @ ridge @ beta)

        beta = np.zeros(f.shape[1])
        now = loss(beta)
        for _ in range(30):
            p = 1 / (1 + np.exp(-np.clip(f @ beta, -30, 30)))
            gradient = f.T @ (w * (labels - p)) - ridge @ beta
            step = np.linalg.solve((f.T * (w * np.maximum(p * (1 - p), 1e-6))) @ f + ridge, gradient)
            # Newton's step may overshoot where the classes can nearly be separated.
            size = next((0.5**i for i in range(12) if loss(beta + 0.5**i * step) < now), 0.0)
            beta = beta + size * step
            before, now = now, loss(beta)
            if before - now < 1e-6 * max(1.0, abs(now)):
                break
        self._beta = beta

    def _expand(self, features: np.ndarray) -> np.ndarray:
        i, j = self._upper
        return np.concatenate([features, features[:, i] * features[:, j]], axis=1)

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Return log odds of label 1, ``(n,)``."""
        f = (self._expand(features) - self._mean) / self._scale
        return np.asarray(self._beta[0] + f @ self._beta[1:])


def read_data(y: Any, cases: int) -> np.ndarray:
    """Return data as real vectors ``(case, m)``.

    Raises:
        InvdiffError: If there are not as many as cases, or a value is not finite.
    """
    values = to_numpy(y)
    if values.ndim < 2 or values.shape[0] != cases:
        raise InvdiffError(
            f"The data have shape {values.shape}, expected ({cases}, ...): one measurement per case."
        )
    if not np.isfinite(values).all():
        raise InvdiffError("The data hold NaN or infinite values; leave those cases out.")
    return vectors(values.astype(np.complex128 if np.iscomplexobj(values) else np.float64))


def _fit(classifier: str, rows: np.ndarray, labels: np.ndarray, seed: int) -> Any:
    from invdiff.uq.learned import Leading

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
