"""Simulated multi-coil scans: birdcage coils, variable-density Poisson-disc sampling, Gaussian noise."""

from __future__ import annotations

import warnings

import numpy as np

from invdiff.errors import InvdiffError
from invdiff.io.kspace import KSpace


def birdcage_maps(coils: int, shape: tuple[int, int]) -> np.ndarray:
    """Return sensitivities of coils on a ring, ``(coil, y, x)`` complex64, unit root-sum-of-squares."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sigpy.mri.sim import birdcage_maps as make

        return np.asarray(make((coils, *shape)), dtype=np.complex64)


def poisson_disc_mask(shape: tuple[int, int], acceleration: float, centre: int = 24, seed: int = 0) -> np.ndarray:
    """Return a variable-density Poisson-disc mask, bool ``(ky, kx)``, with a fully sampled centre.

    Args:
        shape: ``(ky, kx)``.
        acceleration: Positions over sampled positions, met to about 0.1.
        centre: Width of the fully sampled square.
        seed: Seed of the pattern.

    Raises:
        InvdiffError: If no pattern has that acceleration (the centre alone is too large, for instance).
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sigpy.mri.samp import poisson

        # about one seed in twenty finds no density that is near enough, and its neighbours do
        for attempt in [seed, *np.random.SeedSequence(seed).generate_state(4).tolist()]:
            try:
                mask = poisson(
                    shape, acceleration, calib=(centre, centre), tol=0.1, seed=attempt, dtype=np.float32
                )
            except ValueError:
                continue
            return np.asarray(mask) > 0
    raise InvdiffError(
        f"No Poisson-disc pattern on {shape[0]} x {shape[1]} with a {centre} x {centre} centre has acceleration "
        f"{acceleration:g}; ask for another acceleration or a smaller centre."
    )


def simulate_scan(
    image: np.ndarray,
    coils: int = 8,
    acceleration: float = 8.0,
    centre: int = 24,
    snr: float = 10.0,
    seed: int = 0,
) -> tuple[KSpace, float]:
    """Simulate ``k = M (F S x + noise)`` of a complex image.

    Args:
        image: ``(y, x)`` complex.
        coils: Number of coils on a ring.
        acceleration: See `poisson_disc_mask`.
        centre: See `poisson_disc_mask`.
        snr: 99th percentile of the magnitude over the noise level per real component of a fully sampled image.
        seed: Seed of pattern and noise.

    Returns:
        The scan, with its mask and without its coil maps, and the noise level per real component.
    """
    image = np.asarray(image, dtype=np.complex64)
    sigma = float(np.percentile(np.abs(image), 99)) / snr
    mask = poisson_disc_mask((image.shape[0], image.shape[1]), acceleration, centre, seed)
    coil_images = np.fft.ifftshift(birdcage_maps(coils, (image.shape[0], image.shape[1])) * image, axes=(-2, -1))
    kspace = np.fft.fftshift(np.fft.fft2(coil_images, norm="ortho"), axes=(-2, -1))
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((2, *kspace.shape))
    kspace = np.where(mask, kspace + sigma * (noise[0] + 1j * noise[1]), 0).astype(np.complex64)
    source = f"simulated: {coils} coils, {image.shape[0]} x {image.shape[1]}, seed {seed}"
    return KSpace(kspace, mask=mask, source=source), sigma
