"""Operators of imaging that the conformance suite runs, by name; see ``FACTORIES`` in ``test_operators``."""

from __future__ import annotations

from collections.abc import Callable

import torch

from invdiff import operators as O
from invdiff.operator import Operator
from invdiff.operators._magnitude import Detected
from invdiff.operators.phase import CodedField
from invdiff.spaces import Space


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def outer(ky: int, kx: int, seed: int = 3) -> torch.Tensor:
    return randn(ky, seed=seed)[:, None] * randn(kx, seed=seed + 1)


def ptychography(d: torch.dtype, propagation: str = "far-field", quantity: str = "amplitude") -> Detected:
    return O.Ptychography(
        randn(3, 4, dtype=torch.complex128),
        [(0, 0), (1, 2), (4, 1)],
        (7, 6),
        wavelength=1e-10,
        distance=2.0,
        pixel=1e-8,
        propagation=propagation,
        quantity=quantity,
        dtype=d.to_complex(),
    )


def fourier_ptychography(d: torch.dtype) -> Detected:
    return O.FourierPtychography(
        randn(4, 3, dtype=torch.complex128),
        [(0.0, 0.0), (0.1, -0.06), (-0.09, 0.05)],
        (8, 9),
        wavelength=5e-7,
        pixel=8e-7,
        dtype=d.to_complex(),
    )


IMAGING: dict[str, Callable[[torch.dtype], Operator]] = {
    "blur-direct": lambda d: O.Blur(randn(3, 4), (1, 7, 6), dtype=d, method="direct"),
    "blur-separable": lambda d: O.Blur(outer(3, 4), (1, 7, 6), dtype=d, method="separable"),
    "blur-reflect": lambda d: O.Blur(randn(3, 4), (2, 7, 6), boundary="reflect", dtype=d),
    "blur-reflect-complex-per-case": lambda d: O.Blur(
        randn(2, 4, 3), (5, 6), boundary="reflect", dtype=d.to_complex()
    ),
    "blur-reflect-as-wide-as-the-image": lambda d: O.Blur(randn(5, 6), (1, 5, 6), boundary="reflect", dtype=d),
    "blur-reflect-direct-per-case": lambda d: O.Blur(
        randn(3, 2, 3), (2, 4, 5), boundary="reflect", method="direct", dtype=d
    ),
    "blur-reflect-separable": lambda d: O.Blur(outer(3, 5), (2, 5, 7), boundary="reflect", dtype=d),
    "blur-zero": lambda d: O.Blur(randn(5, 3), (1, 5, 7), boundary="zero", dtype=d),
    "blur-zero-direct-complex": lambda d: O.Blur(
        randn(2, 3), (2, 4, 5), boundary="zero", method="direct", dtype=d.to_complex()
    ),
    "blur-zero-separable-complex-per-case": lambda d: O.Blur(
        torch.stack([outer(3, 2), outer(3, 2, 7)]), (4, 5), boundary="zero", dtype=d.to_complex()
    ),
    "blur-valid": lambda d: O.Blur(randn(3, 4), (2, 7, 6), boundary="valid", dtype=d),
    "blur-valid-direct": lambda d: O.Blur(randn(4, 3), (1, 5, 6), boundary="valid", method="direct", dtype=d),
    "blur-valid-separable": lambda d: O.Blur(outer(3, 4), (1, 7, 6), boundary="valid", dtype=d),
    "blur-low-rank-separable": lambda d: O.Blur(torch.ones(1, 2) / 2, (1, 3, 4), method="separable", dtype=d),
    "gaussian-blur-reflect": lambda d: O.GaussianBlur((0.5, 0.4), (1, 7, 8), boundary="reflect", dtype=d),
    "downsampling": lambda d: O.Downsampling(2, (2, 6, 8), dtype=d),
    "downsampling-complex": lambda d: O.Downsampling((3, 2), (6, 4), dtype=d.to_complex()),
    "downsampling-average": lambda d: O.Downsampling((1, 3), (1, 5, 9), "average", dtype=d),
    "downsampling-blur": lambda d: O.Downsampling((2, 3), (2, 6, 9), "blur", kernel=randn(3, 4), dtype=d),
    "downsampling-blur-complex": lambda d: O.Downsampling(
        2, (8, 6), "blur", kernel=randn(4, 3), dtype=d.to_complex()
    ),
    "downsampling-blur-with-lost-blocks": lambda d: O.Downsampling(
        (1, 2), (1, 4, 4), "blur", kernel=torch.ones(2, 1), dtype=d
    ),
    "bayer": lambda d: O.Mask(O.masks.bayer((5, 6), "GRBG"), dtype=d),
    "grayscale": lambda d: O.Grayscale((3, 4, 5), dtype=d),
    "grayscale-luma-complex": lambda d: O.Grayscale((3, 4, 3), (0.299, 0.587, 0.114), dtype=d.to_complex()),
    "random-sensing": lambda d: O.RandomSensing(9, (1, 4, 5), seed=2, dtype=d),
    "random-sensing-complex": lambda d: O.RandomSensing(4, (3, 4), dtype=d.to_complex()),
    "random-sensing-orthonormal": lambda d: O.RandomSensing(7, (2, 3, 4), orthonormal=True, dtype=d),
    "random-sensing-orthonormal-complex": lambda d: O.RandomSensing(
        12, (3, 4), orthonormal=True, dtype=d.to_complex()
    ),
    "hadamard": lambda d: O.Hadamard((1, 8, 4), 11, dtype=d),
    "hadamard-scrambled": lambda d: O.Hadamard((2, 4, 4), 9, rows="random", scramble=True, seed=3, dtype=d),
    "hadamard-whole-complex": lambda d: O.Hadamard((2, 8), dtype=d.to_complex()),
    "fourier-magnitude": lambda d: O.FourierMagnitude((2, 4, 5), dtype=d),
    "fourier-magnitude-odd-canvas": lambda d: O.FourierMagnitude((1, 3, 5), 1.6, "grey", dtype=d),
    "fourier-magnitude-complex": lambda d: O.FourierMagnitude((4, 3), 1.5, -1.0, dtype=d.to_complex()),
    "coded-diffraction": lambda d: O.CodedDiffraction(O.masks.phases((4, 5), 3, seed=4), dtype=d),
    "coded-diffraction-complex-per-case": lambda d: O.CodedDiffraction(
        randn(2, 2, 3, 4, dtype=torch.complex128), quantity="intensity", dtype=d.to_complex()
    ),
    "coded-field": lambda d: CodedField(O.masks.phases((3, 4), 2), dtype=d),
    "coded-field-complex-per-case": lambda d: CodedField(
        randn(3, 2, 4, 3, dtype=torch.complex128), dtype=d.to_complex()
    ),
    "closures": lambda d: O.Closures(
        Space((4,), d.to_complex(), ("baseline",)), [[1, 1, -1, 0], [0, 1, 0, -1]], [[1, -1, 1, -1]], floor=0.0
    ),
    "free-space": lambda d: O.FreeSpace((4, 5), 5e-7, (1e-4, -3e-5), 2e-6, dtype=d.to_complex()),
    "free-space-fresnel": lambda d: O.FreeSpace((5, 3), 5e-7, 2e-4, 2e-6, model="fresnel", dtype=d.to_complex()),
    "free-space-evanescent": lambda d: O.FreeSpace((6, 6), 5e-7, (3e-7, 8e-7), 3e-7, dtype=d.to_complex()),
    "hologram": lambda d: O.InlineHologram((4, 5), 5e-7, (1e-4, 2e-4), 2e-6, dtype=d.to_complex()),
    "ptychographic-field": lambda d: ptychography(d).field,
    "ptychographic-field-fresnel": lambda d: ptychography(d, "fresnel").field,
    "ptychography": lambda d: ptychography(d),
    "ptychography-fresnel": lambda d: ptychography(d, "fresnel", "intensity"),
    "fourier-ptychographic-field": lambda d: fourier_ptychography(d).field,
    "fourier-ptychography": fourier_ptychography,
    "clip": lambda d: O.Clip((1, 4, 5), 0.4, -2.0, 1.3, dtype=d),
    "space-varying-blur": lambda d: O.SpaceVaryingBlur(randn(3, 3, 2), randn(3, 6, 7), (2, 6, 7), dtype=d),
    "space-varying-blur-reflect": lambda d: O.SpaceVaryingBlur(
        randn(2, 3, 4), randn(2, 5, 6), (1, 5, 6), boundary="reflect", dtype=d
    ),
    "space-varying-blur-valid-complex": lambda d: O.SpaceVaryingBlur(
        randn(2, 3, 4), randn(2, 5, 6), (5, 6), boundary="valid", dtype=d.to_complex()
    ),
    "nonlinear-blur": lambda d: O.NonlinearBlur(O.Blur(O.kernels.gaussian(0.6, 5), (1, 6, 7), dtype=d), 2.0, 0.3),
    "nonlinear-blur-per-case": lambda d: O.NonlinearBlur(
        O.Blur(randn(2, 2, 2) ** 2, (4, 5), boundary="reflect", dtype=d), 1.8, 0.2
    ),
}
