"""Small regressions that diagnostics learn with: ridge, principal coordinates, logistic on products of features.

They are our own so that a verdict depends on inputs and seed only, not on which packages are installed.
"""

from __future__ import annotations

import numpy as np


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
        coordinates, size = v.T @ centred, float(values.max()) or 1.0
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
