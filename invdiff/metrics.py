"""How near an image is to a reference: PSNR, SSIM, NRMSE, on magnitudes; and how near draws are: CRPS.

The range of the data is always explicit: a metric that takes it from its inputs changes when they do.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from invdiff.errors import InvdiffError


def nrmse(image: Any, reference: Any) -> float:
    """Return ``|| |x| - |r| || / ||r||``.

    Args:
        image: Real or complex array or tensor.
        reference: The same shape.
    """
    x, r = _magnitudes(image, reference)
    size = float(np.linalg.norm(r))
    if size == 0:
        raise InvdiffError("The reference image is zero everywhere, so no relative error exists.")
    return float(np.linalg.norm(x - r)) / size


def psnr(image: Any, reference: Any, data_range: float) -> float:
    """Return ``10 log10(data_range^2 / mean (|x| - |r|)^2)`` in decibels.

    Args:
        image: Real or complex array or tensor.
        reference: The same shape.
        data_range: Largest value minus smallest value the reference can take; for magnitudes usually its maximum.
    """
    x, r = _magnitudes(image, reference)
    mse = float(np.mean((x - r) ** 2))
    return float("inf") if mse == 0 else float(10 * np.log10(_positive(data_range) ** 2 / mse))


def ssim(image: Any, reference: Any, data_range: float) -> float:
    """Return the mean structural similarity (Wang et al. 2004): Gaussian window, sigma 1.5, 11 x 11, K 0.01, 0.03.

    Windows that would reach over the edge are left out, as in the original and in scikit-image.

    Args:
        image: Real or complex ``(y, x)``, at least 11 x 11.
        reference: The same shape.
        data_range: Largest value minus smallest value the reference can take.
    """
    from scipy.ndimage import gaussian_filter

    x, r = _magnitudes(image, reference)
    if x.ndim != 2 or min(x.shape) < 11:
        raise InvdiffError(f"SSIM takes images (y, x) of at least 11 x 11, got shape {x.shape}.")

    def blur(a: np.ndarray) -> np.ndarray:
        return np.asarray(gaussian_filter(a, sigma=1.5, radius=5))[5:-5, 5:-5]

    c1, c2 = (0.01 * _positive(data_range)) ** 2, (0.03 * data_range) ** 2
    mx, mr = blur(x), blur(r)
    vx, vr, cov = blur(x * x) - mx * mx, blur(r * r) - mr * mr, blur(x * r) - mx * mr
    score = (2 * mx * mr + c1) * (2 * cov + c2) / ((mx * mx + mr * mr + c1) * (vx + vr + c2))
    return float(score.mean())


def crps(draws: Any, truth: Any, weights: Any = None) -> np.ndarray:
    """Return the fair continuous ranked probability score of draws, component by component; smaller is better.

    ``E|X - y| - E|X - X'| / 2`` with ``X``, ``X'`` two different draws, which makes the score of a few draws an
    unbiased estimate of that of the law they come from. Of ``N(m, s^2)`` at ``y = m + s z`` it is
    ``s (z (2 Phi(z) - 1) + 2 phi(z) - 1 / sqrt(pi))`` on average.

    Args:
        draws: Real, ``(n, ...)``, at least two.
        truth: Real, ``(...)``.
        weights: ``(n,)`` where draws are weighted.

    Reference: Ferro, "Fair scores for ensemble forecasts", Q. J. R. Meteorol. Soc. 140 (2014).
    """
    x, y = _array(draws), _array(truth)
    if x.shape[1:] != y.shape or np.iscomplexobj(x) or np.iscomplexobj(y) or len(x) < 2:
        raise InvdiffError(
            f"The score takes at least two real draws (n, ...) of shape {y.shape}, got {x.shape} {x.dtype}."
        )
    x = x.astype(np.float64)
    w = np.ones(len(x)) if weights is None else np.asarray(weights, dtype=np.float64)
    w = w / w.sum()
    order = np.argsort(x, axis=0)
    x, w = np.take_along_axis(x, order, axis=0), w[order]
    # sum over pairs of w_i w_j |x_i - x_j| in one pass over the ordered draws
    below = np.cumsum(w, axis=0) - w
    pairs = (w * (x * below - (np.cumsum(w * x, axis=0) - w * x))).sum(axis=0)
    different = 1 - (w * w).sum(axis=0)
    return np.asarray((w * np.abs(x - y)).sum(axis=0) - pairs / np.maximum(different, 1e-12))


def _magnitudes(image: Any, reference: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return both as float64 magnitudes after checking their shapes."""
    x, r = np.abs(_array(image)).astype(np.float64), np.abs(_array(reference)).astype(np.float64)
    if x.shape != r.shape:
        raise InvdiffError(f"The image has shape {x.shape} and the reference {r.shape}; they must be the same.")
    return x, r


def _array(values: Any) -> np.ndarray:
    if hasattr(values, "detach"):
        values = values.detach().cpu().resolve_conj()
    return np.asarray(values)


def _positive(data_range: float) -> float:
    if not data_range > 0:
        raise InvdiffError(f"The data range of a metric must be positive, got {data_range:g}.")
    return float(data_range)
