"""Controls for diagnostics: problems with exact posterior draws, and six samplers that are wrong in known ways.

A diagnostic that accepts everything is worthless, and so is one that rejects exact draws. `gaussian` and `mixture`
make as many cases with exact draws as one likes, in closed form; `IMPOSTORS` spoil them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from invdiff.errors import InvdiffError


@dataclass(frozen=True)
class Control:
    """Cases of ``x ~ sum_k w_k N(m_k, C)``, ``y = A x + sigma e``, with draws from the exact posterior.

    Attributes:
        truth: ``(case, d)``.
        y: ``(case, m)``.
        draws: ``(case, draw, d)``.
        component: Which Gaussian each draw is from, ``(case, draw)``.
        matrix: ``A``, ``(m, d)``.
        sigma: Noise level.
        weights: Posterior weights, ``(case, K)``.
        means: Posterior means of the components, ``(case, K, d)``.
        covariance: Posterior covariance of every component, ``(d, d)``.
        prior_weights: ``w``, ``(K,)``.
        prior_means: ``m``, ``(K, d)``.
        prior_covariance: ``C``, ``(d, d)``.
    """

    truth: np.ndarray
    y: np.ndarray
    draws: np.ndarray
    component: np.ndarray
    matrix: np.ndarray
    sigma: float
    weights: np.ndarray
    means: np.ndarray
    covariance: np.ndarray
    prior_weights: np.ndarray
    prior_means: np.ndarray
    prior_covariance: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        """Exact posterior mean, ``(case, d)``."""
        return np.asarray((self.weights[..., None] * self.means).sum(1))

    @property
    def std(self) -> np.ndarray:
        """Exact posterior standard deviation, ``(case, d)``."""
        between = (self.weights[..., None] * (self.means - self.mean[:, None]) ** 2).sum(1)
        return np.asarray(np.sqrt(np.diag(self.covariance) + between))


def gaussian(cases: int = 200, draws: int = 64, seed: int = 0) -> Control:
    """Return 12 correlated unknowns behind 6 mixed measurements with noise of 0.4, Gaussian prior."""
    rng = np.random.default_rng([0x6A55, 12])
    d, m = 12, 6
    covariance = np.exp(-np.abs(np.subtract.outer(np.arange(d), np.arange(d))) / 3.0)
    matrix = rng.standard_normal((m, d)) / np.sqrt(d)
    return simulate(np.ones(1), np.zeros((1, d)), covariance, matrix, 0.4, cases, draws, seed)


def mixture(cases: int = 200, draws: int = 64, seed: int = 0) -> Control:
    """Return 8 unknowns with two modes that 3 measurements hardly tell apart, weights 0.6 and 0.4."""
    rng = np.random.default_rng([0x6A55, 8])
    d, m = 8, 3
    matrix = rng.standard_normal((m, d)) / np.sqrt(d)
    hidden = np.linalg.svd(matrix)[2][-1]
    seen = np.linalg.svd(matrix)[2][0]
    offset = 2.5 * hidden + 0.4 * seen
    return simulate(np.array([0.6, 0.4]), np.stack([offset, -offset]), np.eye(d), matrix, 0.4, cases, draws, seed)


def simulate(
    weights: np.ndarray,
    means: np.ndarray,
    covariance: np.ndarray,
    matrix: np.ndarray,
    sigma: float,
    cases: int,
    draws: int,
    seed: int,
) -> Control:
    """Simulate cases and draw from their exact posteriors.

    With ``S = A C A^T + sigma^2 I`` and ``G = C A^T S^-1``, component ``k`` has posterior mean
    ``m_k + G (y - A m_k)``, covariance ``C - G A C`` and weight proportional to ``w_k N(y; A m_k, S)``.
    """
    rng = np.random.default_rng([seed, 0xC0])
    root = np.linalg.cholesky(covariance)
    which = rng.choice(len(weights), cases, p=weights)
    truth = means[which] + rng.standard_normal((cases, len(root))) @ root.T
    y = truth @ matrix.T + sigma * rng.standard_normal((cases, len(matrix)))
    spread = matrix @ covariance @ matrix.T + sigma**2 * np.eye(len(matrix))
    gain = np.linalg.solve(spread, matrix @ covariance).T
    innovation = y[:, None] - means @ matrix.T
    posterior_means = means + innovation @ gain.T
    posterior_covariance = covariance - gain @ matrix @ covariance
    fit = np.log(weights) - 0.5 * (
        innovation * np.linalg.solve(spread, innovation.swapaxes(1, 2)).swapaxes(1, 2)
    ).sum(2)
    posterior_weights = np.exp(fit - fit.max(1, keepdims=True))
    posterior_weights /= posterior_weights.sum(1, keepdims=True)
    pick = (rng.random((cases, draws, 1)) > posterior_weights.cumsum(1)[:, None]).sum(2).clip(max=len(weights) - 1)
    deviation = rng.standard_normal((cases, draws, len(root))) @ np.linalg.cholesky(posterior_covariance).T
    x = np.take_along_axis(posterior_means, pick[..., None], axis=1) + deviation
    return Control(
        truth,
        y,
        x,
        pick,
        matrix,
        sigma,
        posterior_weights,
        posterior_means,
        posterior_covariance,
        weights,
        means,
        covariance,
    )


def ignores_data(control: Control, seed: int) -> np.ndarray:
    """Return draws from the prior: a sampler that never looks at ``y``."""
    like = (control.prior_weights, control.prior_means, control.prior_covariance, control.matrix, control.sigma)
    cases, count = control.draws.shape[:2]
    return simulate(*like, cases * count, 1, seed + 0x1D).truth.reshape(control.draws.shape)


def too_narrow(control: Control, seed: int) -> np.ndarray:
    """Return draws at 0.6 of their distance from the exact mean."""
    return _about_mean(control, 0.6)


def too_wide(control: Control, seed: int) -> np.ndarray:
    """Return draws at 1.6 times their distance from the exact mean."""
    return _about_mean(control, 1.6)


def shifted(control: Control, seed: int) -> np.ndarray:
    """Return draws moved by half an exact standard deviation in every unknown."""
    return control.draws + 0.5 * control.std[:, None]


def misses_mode(control: Control, seed: int) -> np.ndarray:
    """Return draws that all come from the heavier component of their case."""
    if control.weights.shape[1] < 2:
        raise InvdiffError("A mode can be missing from mixtures only; use the control `mixture`.")
    heavy = control.weights.argmax(1)
    rng = np.random.default_rng([seed, 0x30D])
    deviation = rng.standard_normal(control.draws.shape) @ np.linalg.cholesky(control.covariance).T
    return control.means[np.arange(len(heavy)), heavy][:, None] + deviation


def duplicated(control: Control, seed: int) -> np.ndarray:
    """Return draws of which the second half repeats the first."""
    half = control.draws.shape[1] // 2
    return np.concatenate([control.draws[:, :half], control.draws[:, :half]], axis=1)


def nearly_duplicated(control: Control, seed: int) -> np.ndarray:
    """Return draws of which the second half repeats the first but for a thousandth of the standard deviation."""
    rng = np.random.default_rng([seed, 0xD0B])
    out = duplicated(control, seed)
    return out + 1e-3 * control.std[:, None] * rng.standard_normal(out.shape)


def _about_mean(control: Control, factor: float) -> np.ndarray:
    mean = control.mean[:, None]
    return mean + factor * (control.draws - mean)


#: The six, by name: ``(control, seed) -> draws``.
IMPOSTORS: dict[str, Callable[[Control, int], np.ndarray]] = {
    "ignores y": ignores_data,
    "too narrow": too_narrow,
    "too wide": too_wide,
    "shifted": shifted,
    "mode missing": misses_mode,
    "duplicated": duplicated,
}


def spoiled(control: Control, name: str, seed: int = 0) -> Control:
    """Return the control with the draws of an impostor."""
    if name not in IMPOSTORS:
        raise InvdiffError(f"The impostors are {', '.join(IMPOSTORS)}, not {name!r}.")
    return replace(control, draws=IMPOSTORS[name](control, seed))
