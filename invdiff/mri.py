"""The steps from k-space to a problem: noise level, whitening, coil maps, operator and likelihood.

Conventions: k-space is FFT centred and orthonormal, ``(coil, ky, kx)``; sigma is per real component; data keep
their own units (the prior's codec owns the scale).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from invdiff import baselines
from invdiff.errors import InvdiffError
from invdiff.io import sampling
from invdiff.io.kspace import KSpace, check_kspace
from invdiff.problem import Problem

if TYPE_CHECKING:
    import torch

#: The 0.75 quantile of the standard normal law: median absolute deviation over standard deviation.
_MAD = 0.6744897501960817
#: The smallest fully sampled centre that coil maps are estimated from.
MIN_CALIBRATION = 12


def estimate_noise(
    kspace: np.ndarray, mask: np.ndarray | None = None, noise_scan: np.ndarray | None = None
) -> float:
    """Estimate the noise level per real component.

    From a noise scan: ``sqrt(mean |n - mean n|^2 / 2)``. Without one: the outermost tenth of the sampled positions
    (at least 64 of them), where next to no signal is left; per coil the median absolute deviation over 0.6745,
    then the root mean square over coils.

    Args:
        kspace: ``(coil, ky, kx)``.
        mask: Sampled positions ``(ky, kx)``; found from the data where left out.
        noise_scan: Samples without signal, ``(coil, ...)``.

    Raises:
        InvdiffError: If the estimate is zero, or the noise scan does not fit.
    """
    if noise_scan is not None:
        level = float(
            np.sqrt(np.trace(noise_covariance(noise_scan, kspace.shape[0])).real / (2 * kspace.shape[0]))
        )
    else:
        level = _outer_level(kspace, sampling.find_mask(kspace) if mask is None else mask)
    if not np.isfinite(level) or level <= 0:
        raise InvdiffError("The noise level could not be estimated from the data (it came out as 0); give sigma.")
    return level


def _outer_level(kspace: np.ndarray, mask: np.ndarray) -> float:
    ny, nx = mask.shape
    radius = np.hypot((np.arange(ny) - ny // 2)[:, None] / (ny / 2), (np.arange(nx) - nx // 2)[None] / (nx / 2))
    count = int(mask.sum())
    keep = min(count, max(64, count // 10))
    cut = np.partition(radius[mask], count - keep)[count - keep]
    outer = kspace[:, mask & (radius >= cut)]
    parts = np.concatenate([outer.real, outer.imag], axis=1)
    per_coil = np.median(np.abs(parts), axis=1) / _MAD
    return float(np.sqrt(np.mean(per_coil.astype(np.float64) ** 2)))


def noise_covariance(noise_scan: np.ndarray, coils: int) -> np.ndarray:
    """Return the coil covariance ``E[n n^H]`` of a noise scan ``(coil, ...)``, shape ``(coil, coil)``.

    Raises:
        InvdiffError: If coils do not match, numbers are real or not finite, or there are too few samples.
    """
    noise = np.asarray(noise_scan)
    if noise.ndim < 2 or noise.shape[0] != coils:
        raise InvdiffError(
            f"The noise scan has shape {noise.shape}; expected ({coils}, ...) with one row per coil."
        )
    if not np.iscomplexobj(noise):
        raise InvdiffError(f"The noise scan holds real numbers ({noise.dtype}); expected complex samples.")
    if not np.isfinite(noise).all():
        raise InvdiffError("The noise scan holds NaN or infinite values; repair it or leave it out.")
    flat = noise.reshape(coils, -1).astype(np.complex128)
    flat = flat[:, (flat != 0).any(axis=0)]
    if flat.shape[1] < 10 * coils:
        raise InvdiffError(
            f"The noise scan has {flat.shape[1]} samples that are not zero; "
            f"{10 * coils} are needed for {coils} coils."
        )
    flat = flat - flat.mean(axis=1, keepdims=True)
    return np.asarray(flat @ flat.conj().T / (flat.shape[1] - 1))


def whitening_matrix(noise_scan: np.ndarray, coils: int) -> np.ndarray:
    """Return ``W`` such that ``W n`` is independent between coils, each with the mean level of the scan.

    ``W = s L^{-1}`` with ``E[n n^H] = L L^H`` and ``s^2`` the mean variance, so data keep their units.
    """
    covariance = noise_covariance(noise_scan, coils)
    try:
        lower = np.linalg.cholesky(covariance)
    except np.linalg.LinAlgError as error:
        raise InvdiffError(
            "The noise scan has dead or identical coils; remove those coils from all files."
        ) from error
    level = np.sqrt(np.trace(covariance).real / coils)
    return np.asarray(level * np.linalg.inv(lower))


def apply_coils(matrix: np.ndarray, array: np.ndarray) -> np.ndarray:
    """Apply a coil matrix ``(coil, coil)`` to ``(coil, ...)``; the result is complex64."""
    return np.tensordot(matrix, array, axes=1).astype(np.complex64)


def estimate_coil_maps(
    kspace: np.ndarray, calib_width: int | None = None, crop: float = 0.95, mask: np.ndarray | None = None
) -> np.ndarray:
    """Estimate coil maps ``(coil, y, x)`` from the fully sampled centre by ESPIRiT (Uecker et al. 2014).

    The maps have unit root-sum-of-squares where there is an object and are zero elsewhere. ESPIRiT leaves their
    common phase open; it is chosen so that the image of the centre of k-space is real and positive, which leaves
    little phase to the image.

    Args:
        kspace: ``(coil, ky, kx)``.
        calib_width: Width of the square of k-space to use; the largest fully sampled one up to 24 where left out.
        crop: Maps are set to zero where the eigenvalue is below this.
        mask: Sampled positions ``(ky, kx)``; found from the data where left out.

    Raises:
        InvdiffError: If the fully sampled centre is too small.
    """
    coils = kspace.shape[0]
    if coils == 1:
        return np.ones_like(kspace)
    full = sampling.centre_square(sampling.find_mask(kspace) if mask is None else mask)
    width = min(full, 24) if calib_width is None else calib_width
    if width > full or width < MIN_CALIBRATION:
        raise InvdiffError(
            f"Coil maps need a fully sampled centre of k-space of at least {max(width, MIN_CALIBRATION)} x "
            f"{max(width, MIN_CALIBRATION)}, and the data have {full} x {full}; give coil maps in a file instead."
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sigpy.mri.app import EspiritCalib

        maps = EspiritCalib(kspace, calib_width=width, crop=crop, show_pbar=False).run()
    maps = np.nan_to_num(maps).astype(np.complex64)
    if not maps.any():
        raise InvdiffError("Coil map estimation found no object in the data; give coil maps in a file instead.")
    return _with_image_phase(maps, kspace, width)


def _with_image_phase(maps: np.ndarray, kspace: np.ndarray, width: int) -> np.ndarray:
    """Rotate the maps so that the image of the tapered centre of k-space is real and positive."""
    ny, nx = kspace.shape[-2:]
    y0, x0 = ny // 2 - width // 2, nx // 2 - width // 2
    window = np.zeros((ny, nx), dtype=np.float32)
    taper = np.hanning(width + 2)[1:-1]
    window[y0 : y0 + width, x0 : x0 + width] = taper[:, None] * taper
    low = baselines.zero_filled(kspace * window, maps)
    return np.asarray(maps * np.exp(1j * np.angle(low)), dtype=np.complex64)


def check_coil_maps(coil_maps: np.ndarray, kspace: np.ndarray) -> np.ndarray:
    """Return given coil maps as complex64 ``(coil, y, x)``, or raise one sentence if they do not fit."""
    maps = np.asarray(coil_maps)
    if maps.shape != kspace.shape:
        raise InvdiffError(
            f"The coil maps have shape {maps.shape} and the k-space {kspace.shape}; "
            "expected the same (coil, y, x)."
        )
    if not np.isfinite(maps).all():
        raise InvdiffError("The coil maps hold NaN or infinite values; set them to zero outside the object.")
    if not maps.any():
        raise InvdiffError("The coil maps are zero everywhere; check the file.")
    return maps.astype(np.complex64)


def problem_from_kspace(
    kspace: np.ndarray | KSpace,
    mask: np.ndarray | None = None,
    coil_maps: np.ndarray | None = None,
    sigma: float | None = None,
    noise_scan: np.ndarray | None = None,
    spacing: Mapping[str, float] | None = None,
    calib_width: int | None = None,
    crop: float = 0.95,
) -> Problem:
    """Build the problem ``y = M F S x + noise`` of one slice, in the units of the data.

    What is given wins over what the file brought, and that over what is estimated: the mask from the data, the
    coil maps by ESPIRiT, the noise level from the noise scan or from the outermost samples. With a noise scan the
    coils are whitened first.

    Args:
        kspace: ``(coil, ky, kx)``, or what `read_kspace` returned.
        mask: Sampled positions, ``(ky, kx)`` or one line ``(kx,)``.
        coil_maps: ``(coil, y, x)``.
        sigma: Noise level per real component in units of ``kspace``.
        noise_scan: Samples without signal, ``(coil, ...)``.
        spacing: Pixel spacing in mm for ``y`` and ``x``.
        calib_width: Width of the centre for coil maps; see `estimate_coil_maps`.
        crop: See `estimate_coil_maps`.

    Returns:
        A problem with one case; ``meta`` records source, acceleration, spacing and where sigma and maps came from.

    Raises:
        InvdiffError: In one sentence, for anything that does not fit.
    """
    scan = kspace if isinstance(kspace, KSpace) else KSpace(np.asarray(kspace))
    check_kspace(scan.kspace)
    if sigma is not None and not (np.isfinite(sigma) and sigma > 0):
        raise InvdiffError(f"Sigma is the noise level per real component and must be positive, got {sigma:g}.")
    mask = mask if mask is not None else scan.mask
    coil_maps = coil_maps if coil_maps is not None else scan.coil_maps
    noise_scan = noise_scan if noise_scan is not None else scan.noise
    data = scan.kspace.astype(np.complex64)
    sampled = sampling.find_mask(data) if mask is None else sampling.check_mask(mask, data)
    given = None if coil_maps is None else check_coil_maps(coil_maps, data)
    origin = {"mask": "found from the data" if mask is None else "given"}
    if noise_scan is not None:
        whitener = whitening_matrix(noise_scan, len(data))
        level, origin["sigma"] = estimate_noise(data, sampled, noise_scan), "noise scan, coils whitened"
        data, given = apply_coils(whitener, data), None if given is None else apply_coils(whitener, given)
    if sigma is not None:
        level, origin["sigma"] = float(sigma), "given"
    elif noise_scan is None:
        level, origin["sigma"] = estimate_noise(data, sampled), "estimated from the outermost samples"
    origin["coil_maps"] = "given" if given is not None else "ESPIRiT" if len(data) > 1 else "one coil, ones"
    maps = estimate_coil_maps(data, calib_width, crop, sampled) if given is None else given
    meta = {**_meta(scan, sampled, spacing), **{f"{k}_source": v for k, v in origin.items()}, "sigma": level}
    return _assemble(data, sampled, maps, level, meta, {**scan.spacing, **(spacing or {})})


def coil_maps_of(problem: Problem) -> torch.Tensor:
    """Return the coil maps of an MRI problem, ``(1 or N, coil, y, x)``.

    Raises:
        InvdiffError: If the problem has another operator.
    """
    from invdiff.operators import MultiCoilMRI

    if not isinstance(problem.operator, MultiCoilMRI):
        raise InvdiffError(f"Coil maps belong to MultiCoilMRI, and this problem has {problem.operator.name}.")
    return problem.operator.coil_maps


def support(problem: Problem) -> torch.Tensor:
    """Return the pixels that some coil sees, bool ``(1, y, x)``; see `invdiff.support.restrict`."""
    return (coil_maps_of(problem) != 0).any(dim=0).any(dim=0, keepdim=True)


def _meta(scan: KSpace, sampled: np.ndarray, spacing: Mapping[str, float] | None) -> dict[str, Any]:
    found = {**scan.spacing, **(spacing or {})}
    return {
        "title": "multi-coil Cartesian MRI",
        "source": scan.source,
        "coils": int(scan.kspace.shape[0]),
        "sampled": int(sampled.sum()),
        "acceleration": round(sampling.acceleration(sampled), 3),
        "scale": "data in their own units",
        **{f"spacing_{dim}_mm": float(value) for dim, value in found.items()},
    }


def _assemble(
    data: np.ndarray,
    sampled: np.ndarray,
    maps: np.ndarray,
    sigma: float,
    meta: Mapping[str, Any],
    spacing: Mapping[str, float],
) -> Problem:
    """Put operator, likelihood and data together."""
    import torch

    from invdiff import likelihoods, operators

    operator = operators.MultiCoilMRI(torch.from_numpy(sampled), torch.from_numpy(maps), spacing=spacing)
    y = torch.from_numpy(np.where(sampled, data, 0).astype(np.complex64))
    return Problem(operator, likelihoods.Gaussian(sigma), y[None], meta=meta)
