"""Principal components of draws: the few images along which a posterior varies most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from invdiff.errors import InvdiffError
from invdiff.uq.draws import read_draws, vectors


@dataclass(frozen=True)
class Components:
    """Principal components of the draws of one case.

    Attributes:
        mean: ``(*image)``.
        images: Orthonormal (for ``Re sum conj(a) b``), ``(k, *image)``, the one of largest variance first.
        std: Standard deviation along each, ``(k,)``.
        share: Share of the total variance, ``(k,)``.
        coordinates: Of every draw, ``(n, k)``.
    """

    mean: np.ndarray
    images: np.ndarray
    std: np.ndarray
    share: np.ndarray
    coordinates: np.ndarray


def principal_components(draws: Any, count: int | None = None, case: int = 0, weights: Any = None) -> Components:
    """Return the leading eigenvectors of the covariance of the draws, by way of the ``(n, n)`` Gram matrix.

    With centred draws ``X`` ``(n, D)`` and weights ``w`` that sum to 1, ``diag(w)^(1/2) X X^T diag(w)^(1/2) = U s
    U^T`` gives components ``X^T diag(w)^(1/2) U s^(-1/2)``: ``n`` draws of ``D`` pixels cost ``n^2 D``, never
    ``D^2``.

    Args:
        draws: ``(case, draw, ...)`` or a `Posterior`; complex numbers count as two.
        count: How many; by default all ``n - 1``.
        case: Which case.
        weights: ``(case, draw)``, where draws are weighted.
    """
    found = read_draws(draws, weights)
    if not 0 <= case < found.n_cases:
        raise InvdiffError(f"There are {found.n_cases} cases, and case {case} is not among them.")
    x, w = found.case(case)
    v = vectors(x)
    mean = w @ v
    rows = np.sqrt(w)[:, None] * (v - mean)
    values, u = np.linalg.eigh(rows @ rows.T)
    values, u = values[::-1], u[:, ::-1]
    keep = (values > 1e-12 * values[0]) & (np.arange(len(values)) < (count or len(values)))
    images = (u[:, keep].T @ rows) / np.sqrt(values[keep])[:, None]
    # Either sign would do; the largest pixel is made positive so that results do not flip between runs.
    images *= np.sign(np.take_along_axis(images, np.abs(images).argmax(1)[:, None], axis=1))
    unbiased = 1 - float((w**2).sum())
    variance = np.maximum(values, 0)
    return Components(
        mean=_image(mean[None], x)[0],
        images=_image(images, x),
        std=np.sqrt(variance[keep] / unbiased),
        share=variance[keep] / variance.sum(),
        coordinates=(v - mean) @ images.T,
    )


def _image(rows: np.ndarray, like: np.ndarray) -> np.ndarray:
    rows = np.ascontiguousarray(rows)
    return (rows.view(np.complex128) if np.iscomplexobj(like) else rows).reshape(len(rows), *like.shape[1:])
