"""Draws from anybody's sampler, brought into one form: usable ones with their weights, case by case."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from invdiff.errors import InvdiffError


@dataclass(frozen=True)
class Draws:
    """Usable draws of several cases.

    Attributes:
        n_cases: Number of cases.
        shape: Image shape.
        n_excluded: Draws left out over all cases, because they are not finite, failed, or have no weight.
    """

    n_cases: int
    shape: tuple[int, ...]
    n_excluded: int
    _get: Callable[[int], tuple[np.ndarray, np.ndarray]]

    def case(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the usable draws of a case ``(n, *image)``, float64 or complex128, and weights that sum to 1."""
        return self._get(i)

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        return (self._get(i) for i in range(self.n_cases))


def read_draws(draws: Any, weights: Any = None, least: int = 2) -> Draws:
    """Return draws in one form.

    Args:
        draws: ``(case, draw, ...)``, real or complex, a numpy array, a torch tensor or a labelled array; or a
            `Posterior`, which brings its own weights and leaves out draws that failed; or draws already read.
        weights: ``(case, draw)`` or ``(draw,)``, not negative, where draws are weighted; not with a `Posterior`.
        least: Usable draws needed per case. From 2 on a spread is wanted, and draws that are all the same are
            refused.

    Raises:
        InvdiffError: If the shape is another, the weights of a case sum to 0, too few draws are usable, they are
            all the same, or they are point estimates.
    """
    from invdiff.posterior import Posterior

    if isinstance(draws, Draws):
        return draws
    found = _posterior(draws, weights) if isinstance(draws, Posterior) else _array(draws, weights)
    for i, (x, w) in enumerate(found):
        _check(i, x, w, least, found.n_excluded)
    return found


def _array(draws: Any, weights: Any) -> Draws:
    x = to_numpy(draws)
    if x.ndim < 3 or not x.size:
        raise InvdiffError(
            f"Draws have shape (case, draw, ...) with at least one axis of pixels, got {x.shape}; add the axis "
            "that is missing."
        )
    if weights is None:
        w = np.ones(x.shape[:2])
    else:
        w = to_numpy(weights).astype(float)
        if w.shape not in (x.shape[:2], x.shape[1:2]):
            raise InvdiffError(f"The weights have shape {w.shape}, expected {x.shape[:2]}, one per case and draw.")
        w = np.broadcast_to(w, x.shape[:2])
        if not np.isfinite(w).all() or (w < 0).any():
            raise InvdiffError("The weights of draws must be finite and not negative; exponentiate log weights.")
    keep = np.isfinite(x).reshape(*x.shape[:2], -1).all(2) & (w > 0)

    def get(i: int) -> tuple[np.ndarray, np.ndarray]:
        own = w[i][keep[i]]
        if not own.sum() > 0 and not (w[i] > 0).any():
            raise InvdiffError(f"The weights of case {i} sum to 0; give at least one of its draws some weight.")
        return _double(x[i][keep[i]]), own / max(own.sum(), 1e-300)

    return Draws(x.shape[0], x.shape[2:], int((~keep).sum()), get)


def _posterior(posterior: Any, weights: Any) -> Draws:
    from invdiff.scoring import usable

    if posterior.kind == "point":
        raise InvdiffError("These are point estimates, whose scatter is no uncertainty; give posterior draws.")
    if weights is not None:
        raise InvdiffError("A posterior brings the weights of its draws; leave `weights` out.")
    counts = [usable(posterior, i).weights.size for i in range(posterior.n_cases)]
    shape = tuple(n for d, n in posterior.draws.sizes.items() if d not in ("case", "draw"))
    excluded = posterior.n_draws * posterior.n_cases - sum(counts)

    def get(i: int) -> tuple[np.ndarray, np.ndarray]:
        own = usable(posterior, i)
        return _double(own.x), own.weights

    return Draws(posterior.n_cases, shape, excluded, get)


def _check(i: int, x: np.ndarray, w: np.ndarray, least: int, excluded: int) -> None:
    if len(x) < least:
        why = f" ({excluded} over all cases are not finite, failed or have no weight)" if excluded else ""
        raise InvdiffError(
            f"Case {i} has {len(x)} usable draw{'s' * (len(x) != 1)}{why}, and this needs at least {least}: "
            f"{'one draw has no spread; ' * (len(x) == 1)}ask for more draws."
        )
    if least > 1 and (x == x[:1]).all():
        raise InvdiffError(
            f"All {len(x)} usable draws of case {i} are the same, so they say nothing about uncertainty; check "
            "the seeds and the noise of the sampler."
        )


def read_truth(truth: Any, draws: Draws) -> np.ndarray:
    """Return true images ``(case, *image)``, float64 or complex128.

    Raises:
        InvdiffError: If the shape is not that of the draws or a value is not finite.
    """
    x = to_numpy(truth)
    wanted = (draws.n_cases, *draws.shape)
    if draws.n_cases == 1 and x.shape == draws.shape:
        x = x[None]
    if x.shape != wanted:
        raise InvdiffError(f"The truth has shape {x.shape}, expected {wanted}: one image per case.")
    if not np.isfinite(x).all():
        raise InvdiffError("The truth holds NaN or infinite values; leave those cases out.")
    return _double(x)


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


def ordered(x: np.ndarray) -> np.ndarray:
    """Return numbers that have an order: real values as they are, magnitudes of complex ones."""
    return np.abs(x) if np.iscomplexobj(x) else x


def vectors(x: np.ndarray) -> np.ndarray:
    """Return rows ``(n, ...)`` as real vectors ``(n, D)``; complex numbers count as two."""
    flat = np.ascontiguousarray(x).reshape(len(x), -1)
    return flat.view(np.float64) if np.iscomplexobj(flat) else flat


def effective_size(weights: np.ndarray) -> float:
    """Return Kish's effective number of draws, ``(sum w)^2 / sum w^2``, along the last axis of one case."""
    return float(weights.sum() ** 2 / (weights**2).sum())


def to_numpy(values: Any) -> np.ndarray:
    """Return an array of anything array-like: tensors on any device, labelled arrays, lists."""
    if hasattr(values, "detach"):
        values = values.detach().cpu().resolve_conj().resolve_neg()
    out = np.asarray(values)
    if out.dtype.kind not in "biufc":
        raise InvdiffError(f"Images hold numbers, got an array of {out.dtype}.")
    return out


def _double(x: np.ndarray) -> np.ndarray:
    return x.astype(np.complex128 if np.iscomplexobj(x) else np.float64)
