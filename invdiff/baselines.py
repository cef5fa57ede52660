"""Classical reconstructions to compare with: zero-filled, CG-SENSE, l1-wavelet, total variation.

All take k-space ``(coil, ky, kx)`` (zero where not sampled) and coil maps ``(coil, y, x)`` as numpy arrays and
return a complex64 image ``(y, x)`` in the units of the data. They call sigpy.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from invdiff.errors import InvdiffError


def zero_filled(kspace: np.ndarray, coil_maps: np.ndarray) -> np.ndarray:
    """Return ``S^H F^H k``: the adjoint of the measurement, with no correction for the sampling density."""
    _check(kspace, coil_maps)
    shifted = np.fft.ifftshift(kspace, axes=(-2, -1))
    images = np.fft.fftshift(np.fft.ifft2(shifted, norm="ortho"), axes=(-2, -1))
    return np.asarray((coil_maps.conj() * images).sum(axis=0), dtype=np.complex64)


def cg_sense(
    kspace: np.ndarray,
    coil_maps: np.ndarray,
    lam: float = 1e-3,
    iterations: int = 30,
    mask: np.ndarray | None = None,
) -> np.ndarray:
    """Return ``argmin_x ||M F S x - k||^2 / 2 + lam ||x||^2 / 2`` by conjugate gradients (Pruessmann et al. 2001).

    Args:
        kspace: ``(coil, ky, kx)``.
        coil_maps: ``(coil, y, x)``.
        lam: Weight of the penalty; 0 leaves the number of iterations as the only regularisation.
        iterations: Number of conjugate-gradient steps.
        mask: Sampled positions ``(ky, kx)``; where any coil is not zero if left out.
    """
    return _app("SenseRecon", kspace, coil_maps, lam, iterations, mask)


def l1_wavelet(
    kspace: np.ndarray,
    coil_maps: np.ndarray,
    lam: float | Sequence[float] = 0.01,
    iterations: int = 100,
    mask: np.ndarray | None = None,
    error: Callable[[np.ndarray], float] | None = None,
) -> np.ndarray:
    """Return ``argmin_x ||M F S x - k||^2 / 2 + lam ||W x||_1`` (Lustig et al. 2007), W a Daubechies-4 transform.

    Args:
        kspace: ``(coil, ky, kx)``.
        coil_maps: ``(coil, y, x)``.
        lam: Weight of the penalty in units of the data, or several to choose from.
        iterations: Number of accelerated proximal-gradient steps.
        mask: Sampled positions ``(ky, kx)``; where any coil is not zero if left out.
        error: Error of an image, smallest wins; needed where ``lam`` lists several.
    """
    return _best("L1WaveletRecon", kspace, coil_maps, lam, iterations, mask, error)


def total_variation(
    kspace: np.ndarray,
    coil_maps: np.ndarray,
    lam: float | Sequence[float] = 0.01,
    iterations: int = 100,
    mask: np.ndarray | None = None,
    error: Callable[[np.ndarray], float] | None = None,
) -> np.ndarray:
    """Return ``argmin_x ||M F S x - k||^2 / 2 + lam ||grad x||_1`` by the primal-dual method; see `l1_wavelet`."""
    return _best("TotalVariationRecon", kspace, coil_maps, lam, iterations, mask, error)


def _best(
    name: str,
    kspace: np.ndarray,
    coil_maps: np.ndarray,
    lam: float | Sequence[float],
    iterations: int,
    mask: np.ndarray | None,
    error: Callable[[np.ndarray], float] | None,
) -> np.ndarray:
    """Run one method for every weight and keep the image of smallest error."""
    weights = [float(lam)] if isinstance(lam, (int, float)) else [float(v) for v in lam]
    if not weights or (len(weights) > 1 and error is None):
        raise InvdiffError("Give one lam, or several together with an error function to choose by.")
    images = [_app(name, kspace, coil_maps, weight, iterations, mask) for weight in weights]
    return images[0] if error is None else min(images, key=error)


def _app(
    name: str, kspace: np.ndarray, coil_maps: np.ndarray, lam: float, iterations: int, mask: np.ndarray | None
) -> np.ndarray:
    """Run a reconstruction of sigpy, silently."""
    _check(kspace, coil_maps)
    if lam < 0 or iterations < 1:
        raise InvdiffError(
            f"A penalty weight of at least 0 and 1 iteration are needed, got {lam:g}, {iterations}."
        )
    sampled = (kspace != 0).any(axis=0) if mask is None else mask
    with _sigpy() as apps:
        recon: Any = getattr(apps, name)
        weights = sampled.astype(np.float32)
        image = recon(kspace, coil_maps, lamda=lam, weights=weights, max_iter=iterations, show_pbar=False).run()
    return np.asarray(image, dtype=np.complex64)


@contextmanager
def _sigpy() -> Iterator[Any]:
    """Give sigpy's applications; their warnings, and their use of numpy's global generator, stay inside."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import sigpy.mri.app as apps

        before = np.random.get_state()  # noqa: NPY002
        np.random.seed(0)  # noqa: NPY002
        try:
            yield apps
        finally:
            np.random.set_state(before)  # noqa: NPY002


def _check(kspace: np.ndarray, coil_maps: np.ndarray) -> None:
    if kspace.ndim != 3 or kspace.shape != coil_maps.shape:
        raise InvdiffError(
            f"k-space {kspace.shape} and coil maps {coil_maps.shape} must both be (coil, ky, kx), of one shape."
        )
