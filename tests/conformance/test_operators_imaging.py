"""Operators of imaging against other people's code, dense matrices and bad input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage, signal

from invdiff import operators as O
from invdiff.errors import InvdiffError
from invdiff.operator import LinearOperator
from invdiff.operators import kernels
from invdiff.operators.varying import windows
from invdiff.testing import check_operator, dense_matrix
from tests.conformance.operators_imaging import IMAGING, outer, randn

DOUBLE = torch.float64


# ---- blur ----


@pytest.mark.parametrize("method", ["fft", "separable", "direct"])
@pytest.mark.parametrize("size", [(3, 3), (2, 5), (7, 4), (1, 1)])
@pytest.mark.parametrize(("boundary", "mode"), [("circular", "wrap"), ("reflect", "mirror"), ("zero", "constant")])
def test_boundaries_against_scipy(boundary: str, mode: str, size: tuple[int, int], method: str) -> None:
    k = outer(*size)
    op = O.Blur(k, (2, 9, 10), boundary=boundary, method=method, dtype=DOUBLE)
    x = op.domain.randn(1)
    expected = [ndimage.convolve(c.numpy(), k.numpy(), mode=mode) for c in x[0]]
    np.testing.assert_allclose(op(x)[0].numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("method", ["fft", "separable", "direct"])
@pytest.mark.parametrize("size", [(3, 3), (2, 5), (9, 10)])
def test_valid_against_scipy(size: tuple[int, int], method: str) -> None:
    k = outer(*size)
    op = O.Blur(k, (1, 9, 10), boundary="valid", method=method, dtype=DOUBLE)
    x = op.domain.randn(1)
    expected = signal.convolve2d(x[0, 0].numpy(), k.numpy(), mode="valid")
    np.testing.assert_allclose(op(x)[0, 0].numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("boundary", ["circular", "reflect", "zero", "valid"])
@pytest.mark.parametrize("shape", [(2, 17, 12), (1, 110, 260)], ids=["small", "in blocks"])
@pytest.mark.parametrize("cases", [1, 3])
def test_methods_agree_in_both_directions(cases: int, shape: tuple[int, ...], boundary: str) -> None:
    kernel = torch.stack([(i + 1) * outer(6, 5) for i in range(cases)])
    ops = [
        O.Blur(kernel, shape, boundary=boundary, method=m, dtype=DOUBLE) for m in ("fft", "separable", "direct")
    ]
    x, y = ops[0].domain.randn(3), ops[0].range.randn(3, 1)
    for op in ops[1:]:
        torch.testing.assert_close(op(x), ops[0](x), atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(op.adjoint(y), ops[0].adjoint(y), atol=1e-12, rtol=1e-12)


def test_blur_in_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    from invdiff.operators import _convolve

    for name in ("blur-reflect", "blur-reflect-complex-per-case", "blur-valid"):
        op = IMAGING[name](DOUBLE)
        assert isinstance(op, LinearOperator)
        x, y = op.domain.randn(op.n_cases or 5), op.range.randn(op.n_cases or 5, 1)
        with monkeypatch.context() as patch:
            patch.setattr(_convolve, "_BLOCK", 10**9)
            whole = op(x), op.adjoint(y), op.normal(x)
            patch.setattr(_convolve, "_BLOCK", 2 * op.domain.size - 1)
            for a, b in zip((op(x), op.adjoint(y), op.normal(x)), whole):
                torch.testing.assert_close(a, b, atol=1e-13, rtol=1e-13)


@pytest.mark.parametrize("complex_", [False, True])
def test_prox_of_periodic_blur_is_that_of_its_decomposition(
    complex_: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from invdiff.operators import _convolve
    from invdiff.operators._spectral import SpectralOperator

    dtype = torch.complex128 if complex_ else DOUBLE
    for kernel in (torch.ones(1, 3) / 3, randn(3, 3, 4)):  # one with a null space, and one kernel per case
        op = O.Blur(kernel, (2, 4, 6), dtype=dtype)
        monkeypatch.setattr(_convolve, "_BLOCK", op.domain.size)
        z, y = op.domain.randn(3), op.range.randn(3, 1)
        for rho in (torch.zeros(3).double(), torch.tensor([0.0, 0.3, 2.0]).double()):
            torch.testing.assert_close(
                op.prox(z, y, rho), SpectralOperator.prox(op, z, y, rho), atol=1e-10, rtol=0
            )


def test_the_method_follows_from_boundary_and_kernel() -> None:
    def chosen(kernel: torch.Tensor, boundary: str) -> str:
        return O.Blur(kernel, (1, 9, 9), boundary=boundary).method

    assert chosen(outer(3, 3), "circular") == chosen(randn(3, 3), "reflect") == "fft"
    assert chosen(outer(3, 3), "reflect") == chosen(torch.ones(1, 3), "valid") == "separable"
    assert chosen(torch.stack([outer(3, 3), randn(3, 3)]), "zero") == "fft"


def test_gaussian_blur_with_reflection_against_scipy() -> None:
    op = O.GaussianBlur((1.3, 2.0), (1, 17, 25), boundary="reflect", dtype=DOUBLE)
    x = op.domain.randn(1)
    expected = ndimage.gaussian_filter(x[0, 0].numpy(), (1.3, 2.0), mode="mirror", truncate=7)
    np.testing.assert_allclose(op(x)[0, 0].numpy(), expected, atol=1e-7)
    assert op.method == "separable" and "prox" in op.capabilities


def test_every_closed_prox_against_conjugate_gradients_and_a_dense_solve() -> None:
    for name, make in IMAGING.items():
        op = make(DOUBLE)
        if "prox" not in op.capabilities or not isinstance(op, LinearOperator) or op.domain.is_complex:
            continue
        n = op.n_cases or 2
        z, y, rho = op.domain.randn(n, 1), op.range.randn(n, 2), torch.linspace(0.2, 0.4, n, dtype=DOUBLE)
        out, right = op.prox(z, y, rho), op.adjoint(y)
        for i in range(n):
            a = dense_matrix(op, i)
            gram = a.mT @ a + rho[i] * torch.eye(a.shape[1], dtype=DOUBLE)
            solved = torch.linalg.solve(gram, (right[i] + rho[i] * z[i]).flatten())
            torch.testing.assert_close(out[i].flatten(), solved, atol=1e-10, rtol=1e-9, msg=name)


# ---- kernels ----


@pytest.mark.parametrize(
    "kernel",
    [
        kernels.gaussian(1.5, dtype=DOUBLE),
        kernels.gaussian((0.5, 2), 21, dtype=DOUBLE),
        kernels.motion(21, seed=3, dtype=DOUBLE),
        kernels.motion(31, length=30, intensity=2.0, seed=1, dtype=DOUBLE),
        kernels.defocus(2.7, dtype=DOUBLE),
        kernels.defocus(0.4, 5, dtype=DOUBLE),
    ],
)
def test_kernels_have_unit_sum_and_a_middle(kernel: torch.Tensor) -> None:
    assert kernel.shape[0] == kernel.shape[1] and kernel.shape[0] % 2 == 1
    assert float(kernel.min()) >= 0
    assert float(kernel.sum()) == pytest.approx(1, abs=1e-12)


def moment(kernel: torch.Tensor, axis: int) -> float:
    offset = torch.arange(kernel.shape[axis], dtype=DOUBLE) - kernel.shape[axis] // 2
    weights = kernel.sum(1 - axis)
    return float((weights * offset**2).sum())


def test_kernels_have_the_width_they_were_asked_for() -> None:
    k = kernels.gaussian((1.5, 3.0), 41, dtype=DOUBLE)
    assert moment(k, 0) == pytest.approx(1.5**2, rel=1e-6) and moment(k, 1) == pytest.approx(9, rel=1e-6)
    # of a disc the second moment along an axis is a quarter of the squared radius, plus 1/12 from the pixels
    assert moment(kernels.defocus(6.0, dtype=DOUBLE), 0) == pytest.approx(9 + 1 / 12, rel=5e-3)
    straight = kernels.motion(41, length=30, intensity=0, seed=5, dtype=DOUBLE)
    # of a segment it is a twelfth of the squared length; bilinear spreading adds 1/6 per axis
    assert moment(straight, 0) + moment(straight, 1) == pytest.approx(30**2 / 12 + 1 / 3, rel=1e-2)


def test_motion_depends_on_its_seed_alone() -> None:
    torch.testing.assert_close(kernels.motion(21, seed=4), kernels.motion(21, seed=4))
    assert not torch.allclose(kernels.motion(21, seed=4), kernels.motion(21, seed=5), atol=1e-2)


# ---- super-resolution ----


@pytest.mark.parametrize("factor", [2, 3, 4, 6])
@pytest.mark.parametrize("shape", [(3, 24, 36), (1, 264, 108)], ids=["small", "in blocks"])
def test_bicubic_against_torch(shape: tuple[int, ...], factor: int) -> None:
    op = O.Downsampling(factor, shape, dtype=DOUBLE)
    x = op.domain.randn(2).requires_grad_()
    expected = torch.nn.functional.interpolate(
        x, size=op.range.shape[1:], mode="bicubic", antialias=True, align_corners=False
    )
    torch.testing.assert_close(op(x), expected, atol=1e-6, rtol=0)
    y = op.range.randn(2, 1)
    (gradient,) = torch.autograd.grad(expected, x, y)
    torch.testing.assert_close(op.adjoint(y), gradient, atol=1e-6, rtol=0)


def test_blocks_leave_out_zeros_alone() -> None:
    from invdiff.operators import _separable

    rows = torch.tril(torch.triu(torch.ones(150, 260), -20), 20)
    rows[149, 259] = 1.0
    parts = _separable.split(rows)
    assert len(parts) == 4 and sum(p.numel() for p in (rows[r, c] for r, c in parts)) < 0.6 * rows.numel()
    kept = torch.zeros_like(rows)
    for r, c in parts:
        kept[r, c] += rows[r, c]
    torch.testing.assert_close(kept, rows, atol=0, rtol=0)
    assert len(_separable.split(torch.eye(100))) == 1


def test_average_against_pooling_and_blur_against_scipy() -> None:
    op = O.Downsampling((2, 3), (2, 8, 9), "average", dtype=DOUBLE)
    x = op.domain.randn(2)
    torch.testing.assert_close(op(x), torch.nn.functional.avg_pool2d(x, (2, 3)))
    k = randn(5, 4)
    op = O.Downsampling((2, 3), (2, 8, 9), "blur", kernel=k, dtype=DOUBLE)
    expected = [ndimage.convolve(c.numpy(), k.numpy(), mode="wrap")[::2, ::3] for c in x[0]]
    np.testing.assert_allclose(op(x)[0].numpy(), expected, atol=1e-12)


def test_downsampling_keeps_units_and_scales_the_spacing() -> None:
    op = O.Downsampling((2, 4), (1, 8, 8), units="HU", spacing={"y": 0.5, "x": 0.25})
    assert op.range.units == "HU" and dict(op.range.spacing) == {"y": 1.0, "x": 1.0}
    assert "svd" not in IMAGING["downsampling-blur-with-lost-blocks"](DOUBLE).capabilities


# ---- masks, colour, compressed sensing ----


def test_masks_keep_what_they_say() -> None:
    assert float((1 - O.masks.box((9, 8), (3, 4))).sum()) == 12
    assert O.masks.box((9, 8), (3, 4), (0, 1))[:3, 1:5].sum() == 0
    for side, index in (("left", (0, 0)), ("right", (4, 6)), ("top", (0, 3)), ("bottom", (4, 3))):
        mask = O.masks.half((5, 7), side)
        assert mask[index] == 0 and float(mask.sum()) == (20 if side in ("left", "right") else 21)
    assert float(O.masks.random((20, 30), 0.3, seed=1).sum()) == 180
    assert torch.equal(O.masks.random((20, 30), 0.3, seed=1), O.masks.random((20, 30), 0.3, seed=1))
    for seed in range(4):
        gone = 1 - float(O.masks.strokes((64, 48), 0.2, seed=seed).mean())
        assert 0.2 <= gone < 0.28  # one segment more at most, an eleventh of the image wide and a quarter long
    for make in (lambda s: O.masks.random((9, 9), 0.5, s), lambda s: O.masks.strokes((32, 32), seed=s)):
        assert not torch.equal(make(0), make(1))
        assert set(make(0).unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("pattern", ["RGGB", "BGGR", "GRBG", "GBRG"])
def test_bayer_patterns(pattern: str) -> None:
    mask = O.masks.bayer((5, 7), pattern)
    assert torch.equal(mask.sum(0), torch.ones(5, 7))
    seen = "".join("RGB"[int(mask[:, y, x].argmax())] for y in (0, 1) for x in (0, 1))
    assert seen == pattern and torch.equal(mask[:, 2:, 2:], mask[:, :-2, :-2])


def test_hadamard_against_scipy() -> None:
    from scipy.linalg import hadamard

    from invdiff.operators.sensing import _changes, hadamard_transform

    for n in (1, 2, 64, 256):
        h = torch.from_numpy(hadamard(n)).double()
        x = randn(3, 2, n)
        torch.testing.assert_close(hadamard_transform(x), x @ h / n**0.5, atol=1e-12, rtol=1e-12)
        assert torch.equal(_changes(n), (h[:, 1:] != h[:, :-1]).sum(1))
    op = O.Hadamard((1, 4, 8), 10, scramble=True, dtype=DOUBLE)
    x = op.domain.randn(1)
    dense = torch.from_numpy(hadamard(32)).double()[op.picked] / 32**0.5
    torch.testing.assert_close(op(x)[0, 0], dense @ x.flatten()[op.pixels], atol=1e-12, rtol=1e-12)


def test_random_rows_follow_from_the_seed_and_orthonormal_ones_span_the_same_space() -> None:
    plain = O.RandomSensing(5, (3, 4), dtype=DOUBLE, seed=1).matrix
    rows = O.RandomSensing(5, (3, 4), dtype=DOUBLE, seed=1, orthonormal=True).matrix
    torch.testing.assert_close(plain, O.RandomSensing(5, (3, 4), dtype=DOUBLE, seed=1).matrix)
    assert not torch.allclose(plain, O.RandomSensing(5, (3, 4), dtype=DOUBLE, seed=2).matrix)
    torch.testing.assert_close(rows @ rows.mT, torch.eye(5).double())
    torch.testing.assert_close(plain @ rows.mT @ rows, plain)
    many = O.RandomSensing(400, (20, 30), seed=0, dtype=DOUBLE).matrix
    assert float(many.var() * 400) == pytest.approx(1, abs=5 * (2 / many.numel()) ** 0.5)


# ---- phase retrieval ----


@pytest.mark.parametrize("canvas", [(8, 10), (9, 15), (6, 5)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_fourier_magnitude_against_numpy(canvas: tuple[int, int], dtype: torch.dtype) -> None:
    shape, factor = {(8, 10): ((4, 5), 2.0), (9, 15): ((6, 10), 1.5), (6, 5): ((6, 5), 1.0)}[canvas]
    for padding, fill in (("black", 0.0), ("grey", 0.5), (-0.3, -0.3)):
        op = O.FourierMagnitude((1, *shape), factor, padding, dtype=dtype)
        x = op.domain.randn(1)
        full = np.full(canvas, fill, dtype=x.numpy().dtype)
        top, left = (canvas[0] - shape[0]) // 2, (canvas[1] - shape[1]) // 2
        full[top : top + shape[0], left : left + shape[1]] = x[0, 0].numpy()
        expected = np.abs(np.fft.fftshift(np.fft.fft2(full, norm="ortho")))
        np.testing.assert_allclose(op(x)[0, 0].numpy(), expected, atol=1e-12)


def test_a_zero_magnitude_has_a_finite_derivative() -> None:
    for op in (
        O.FourierMagnitude((1, 4, 4), dtype=DOUBLE),
        O.CodedDiffraction(O.masks.phases((4, 4)), dtype=DOUBLE),
    ):
        assert bool((op.vjp(op.domain.zeros(1), op.range.randn(1)) == 0).all())


def test_coded_diffraction_against_numpy() -> None:
    masks = O.masks.phases((4, 6), 3, seed=2)
    assert torch.allclose(masks.abs(), torch.ones(()))
    op = O.CodedDiffraction(masks, dtype=torch.complex128, quantity="intensity")
    x = op.domain.randn(1)
    spectra = np.fft.fftshift(
        np.fft.fft2(masks.numpy().astype(complex) * x[0].numpy(), norm="ortho"), axes=(-2, -1)
    )
    np.testing.assert_allclose(op(x)[0].numpy(), np.abs(spectra) ** 2, atol=1e-12)


# ---- propagation, ptychography ----


@pytest.mark.parametrize("model", ["angular spectrum", "fresnel"])
def test_a_gaussian_beam_spreads_as_it_should(model: str) -> None:
    """The intensity of a beam of waist w has the variance ``w^2 / 4 (1 + (z / z_R)^2)`` per axis."""
    n, lam, pixel, waist = 128, 5e-7, 2e-6, 2e-5
    rayleigh = np.pi * waist**2 / lam
    op = O.InlineHologram((n, n), lam, (rayleigh, -2 * rayleigh), pixel, model=model, dtype=torch.complex128)
    at = (torch.arange(n).double() - n // 2) * pixel
    beam = torch.exp(-(at[:, None] ** 2 + at**2) / waist**2).to(torch.complex128)
    for intensity, z in zip(op(beam[None, None])[0], (1, -2)):
        variance = float((intensity.sum(1) * at**2).sum() / intensity.sum())
        assert variance == pytest.approx(waist**2 / 4 * (1 + z**2), rel=1e-3)


def test_propagation_adds_up_and_has_its_units() -> None:
    one = O.FreeSpace((8, 9), 5e-7, 3e-5, 2e-6, dtype=torch.complex128)
    two = O.FreeSpace((8, 9), 5e-7, 7e-5, 2e-6, dtype=torch.complex128)
    both = O.FreeSpace((8, 9), 5e-7, 1e-4, 2e-6, dtype=torch.complex128)
    x = one.domain.randn(1)
    torch.testing.assert_close(two(one(x)), both(x), atol=1e-9, rtol=0)
    assert dict(one.range.spacing) == {"y": 2e-6, "x": 2e-6} and one.range.spacing_units == "m"
    assert bool((IMAGING["free-space-evanescent"](DOUBLE).svd().s == 0).any())


def test_ptychography_against_its_definition() -> None:
    op = IMAGING["ptychography"](DOUBLE)
    x, probe = op.domain.randn(1), randn(3, 4, dtype=torch.complex128)
    for j, (top, left) in enumerate([(0, 0), (1, 2), (4, 1)]):
        leaving = (x[0, 0, top : top + 3, left : left + 4] * probe).numpy()
        expected = np.abs(np.fft.fftshift(np.fft.fft2(leaving, norm="ortho")))
        np.testing.assert_allclose(op(x)[0, j].numpy(), expected, atol=1e-12)
    assert op.range.spacing["ky"] == pytest.approx(1e-10 * 2.0 / (3 * 1e-8))


def test_fourier_ptychography_sees_tilted_waves() -> None:
    """An LED sees the part of the spectrum that its tilt moves into the pupil: a plane wave of that frequency."""
    n, m, lam, pixel = 32, 12, 5e-7, 1e-6
    pupil = O.circular_pupil(0.05, (m, m), (n, n), wavelength=lam, pixel=pixel)
    assert float(pupil.sum()) == sum(
        np.hypot(y, x) <= 0.05 / lam * pixel * n for y in range(-6, 6) for x in range(-6, 6)
    )
    step = lam / (n * pixel)
    op = O.FourierPtychography(
        pupil, [(0, 0), (5 * step, -8 * step)], (n, n), wavelength=lam, pixel=pixel, dtype=torch.complex128
    )
    y, x = torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")
    wave = torch.polar(torch.ones(n, n).double(), 2 * np.pi * (5 * y - 8 * x).double() / n)
    dark, bright = op(wave[None, None])[0]
    assert float(dark.abs().max()) < 1e-20
    torch.testing.assert_close(bright, torch.ones_like(bright))
    assert op.range.spacing["y"] == pytest.approx(pixel * n / m)


# ---- clipping, quantisation, JPEG ----


def test_clip_has_a_subgradient_at_its_limits() -> None:
    op = O.Clip((5,), 2.0, -1.0, 1.0, dtype=DOUBLE)
    x = torch.tensor([[-0.7, -0.5, 0.1, 0.5, 0.6]], dtype=DOUBLE)
    assert op(x).tolist() == [[-1.0, -1.0, 0.2, 1.0, 1.0]]
    assert op.vjp(x, torch.ones_like(x)).tolist() == [[0.0, 2.0, 2.0, 2.0, 0.0]]


def test_quantise_has_levels_and_the_surrogate_derivative_it_names() -> None:
    op = O.Quantise((1, 6, 6), 5, -1.0, 1.0, dtype=DOUBLE)
    x = op.domain.randn(2)
    assert set(op(x).unique().tolist()) <= {-1.0, -0.5, 0.0, 0.5, 1.0}
    inside = x.abs() <= 1
    assert float((op(x) - x)[inside].abs().max()) <= 0.25
    torch.testing.assert_close(op.vjp(x, torch.ones_like(x)), inside.double())
    for surrogate in (op, O.JPEG(50, (3, 9, 10), dtype=DOUBLE)):
        assert set(check_operator(surrogate).failed) == {"jvp against finite differences"}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:0"])
def test_soft_jpeg_is_differentiable(channels: int, subsampling: str) -> None:
    shape = (channels, 11, 18)
    for dtype in (DOUBLE, torch.float32):
        report = check_operator(O.JPEG(20, shape, subsampling=subsampling, rounding="soft", dtype=dtype))
        gaps = {c.name: c.error for c in report.checks}
        # the step of the differences is no small part of a quantisation step in single precision
        assert set(report.failed) <= {"jvp against finite differences"}
        assert dtype != DOUBLE or gaps["jvp against finite differences"] < 1e-4


def photograph(size: tuple[int, int]) -> np.ndarray:
    """A colour image in bytes with smooth parts, edges and texture."""
    y, x = np.mgrid[: size[0], : size[1]]
    rgb = np.stack([120 + 90 * np.sin(x / 9 + c) * np.cos(y / (6 + c)) + 40 * (x > y) for c in range(3)], -1)
    noise = np.random.default_rng(0).normal(0, 6, rgb.shape)
    return np.clip(rgb + noise, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("quality", [10, 50, 75, 95])
@pytest.mark.parametrize("size", [(48, 64), (41, 51)])
@pytest.mark.parametrize("mode", ["L", "4:4:4", "4:2:0"])
def test_jpeg_against_pillow(mode: str, size: tuple[int, int], quality: int) -> None:
    import io

    from PIL import Image

    from invdiff.operators.jpeg import tables

    image, file = Image.fromarray(photograph(size)), io.BytesIO()
    image = image.convert("L") if mode == "L" else image
    image.save(file, "JPEG", quality=quality, subsampling=2 if mode == "4:2:0" else 0)
    decoded = Image.open(file)
    for i, table in enumerate(tables(quality)[: len(decoded.quantization)]):
        assert table.flatten().int().tolist() == list(decoded.quantization[i])
    theirs = np.asarray(decoded).reshape(*size, -1).astype(float)
    x = torch.from_numpy(np.asarray(image).reshape(*size, -1).copy()).movedim(-1, 0)[None].double() / 255
    op = O.JPEG(quality, x.shape[1:], subsampling="4:2:0" if mode == "4:2:0" else "4:4:4", dtype=DOUBLE)
    ours = 255 * op(x)[0].movedim(0, -1).numpy()
    gap = np.abs(ours - theirs)
    # Their integer transform turns a rounding here and there, which moves a coefficient by a whole step; measured
    # mean gaps are 0.35 (grey), 0.8 (4:4:4) and 0.95 (4:2:0) levels of 255, a quarter of what JPEG itself changes.
    own = np.abs(theirs - np.asarray(image).reshape(*size, -1)).mean()
    assert gap.mean() < {"L": 0.45, "4:4:4": 0.95, "4:2:0": 1.1}[mode] and gap.mean() < 0.3 * own


# ---- varying and nonlinear blur ----


@pytest.mark.parametrize("boundary", ["circular", "reflect", "zero", "valid"])
def test_space_varying_blur_is_a_sum_of_blurs(boundary: str) -> None:
    k, w = randn(4, 3, 2), windows((7, 8), (2, 2))
    op = O.SpaceVaryingBlur(k, w, (2, 7, 8), boundary=boundary, dtype=DOUBLE)
    x = op.domain.randn(2)
    parts = [O.Blur(a, op.domain, boundary=boundary, method="direct")(x * b.double()) for a, b in zip(k, w)]
    torch.testing.assert_close(op(x), torch.stack(parts).sum(0), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (7, 8)])
def test_windows_sum_to_one(grid: tuple[int, int]) -> None:
    w = windows((7, 8), grid)
    assert w.shape == (grid[0] * grid[1], 7, 8) and float(w.min()) >= 0
    torch.testing.assert_close(w.sum(0), torch.ones(7, 8))


def test_nonlinear_blur_averages_light() -> None:
    blur = O.Blur(kernels.gaussian(1.0, 5, dtype=DOUBLE), (1, 8, 8), dtype=DOUBLE)
    op = O.NonlinearBlur(blur, gamma=2.0, offset=0.1)
    flat = torch.full((1, 1, 8, 8), 0.37, dtype=DOUBLE)
    torch.testing.assert_close(op(flat), flat)
    x = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    light = blur((x + 0.1) ** 2)  # the constants cancel for kernels of unit sum
    torch.testing.assert_close(op(x), light.sqrt() - 0.1)
    torch.testing.assert_close(op(-x), -op(x))
    torch.testing.assert_close(O.NonlinearBlur(blur, gamma=1.0)(x), blur(x))


# ---- bad input ----


def ptycho(**changes: Any) -> object:
    given = {"probe": torch.ones(3, 3), "positions": [(0, 0)], "wavelength": 1e-10, "distance": 1.0, "pixel": 1e-8}
    return O.Ptychography(shape=(6, 6), **{**given, **changes})


def leds(**changes: Any) -> object:
    given = {"pupil": torch.ones(3, 3), "leds": [(0.0, 0.0)], "wavelength": 5e-7, "pixel": 1e-6}
    return O.FourierPtychography(shape=(6, 6), **{**given, **changes})


BAD: dict[str, tuple[Callable[[], object], str]] = {
    "blur-boundary": (
        lambda: O.Blur(torch.ones(3, 3), (1, 4, 6), boundary="wrap"),
        "boundary of a blur is one of",
    ),
    "blur-method": (lambda: O.Blur(torch.ones(3, 3), (1, 4, 6), method="conv"), "method of a blur is one of"),
    "blur-outer": (lambda: O.Blur(randn(3, 3), (1, 4, 6), method="separable"), "no outer product"),
    "blur-reflect-large": (
        lambda: O.Blur(torch.ones(5, 3), (1, 4, 6), boundary="reflect"),
        "larger than the image",
    ),
    "gaussian-large": (lambda: O.GaussianBlur(3, (1, 9, 9), boundary="zero"), "larger than the image"),
    "kernel-even": (lambda: kernels.motion(60), "odd number of pixels"),
    "kernel-even-gaussian": (lambda: kernels.gaussian(1.0, 4), "odd number of pixels"),
    "kernel-std": (lambda: kernels.gaussian(0.0), "positive"),
    "kernel-disc": (lambda: kernels.defocus(4.0, 5), "does not fit 5 pixels"),
    "kernel-radius": (lambda: kernels.defocus(-1.0), "positive"),
    "kernel-path": (lambda: kernels.motion(11, length=20), "does not fit a kernel of 11"),
    "kernel-intensity": (lambda: kernels.motion(11, intensity=-1), "at least 0"),
    "factor-part": (lambda: O.Downsampling(1.5, (1, 6, 6)), "whole number"),
    "factor-zero": (lambda: O.Downsampling(0, (1, 6, 6)), "whole number"),
    "factor-size": (lambda: O.Downsampling(4, (1, 6, 6)), "does not divide the image size"),
    "factor-kernel": (lambda: O.Downsampling(2, (1, 6, 6), "blur"), "takes a kernel for the kind"),
    "factor-useless-kernel": (lambda: O.Downsampling(2, (1, 6, 6), kernel=randn(3, 3)), "takes a kernel for"),
    "factor-kind": (lambda: O.Downsampling(2, (1, 6, 6), "lanczos"), "kind of downsampling is one of"),
    "factor-axes": (lambda: O.Downsampling(2, (6,)), "two axes"),
    "box-outside": (lambda: O.masks.box((5, 6), (3, 3), (3, 0)), "must lie in the image"),
    "box-whole": (lambda: O.masks.box((5, 6), (5, 6)), "leave some of it"),
    "half-side": (lambda: O.masks.half((5, 6), "west"), "missing half is one of"),
    "half-thin": (lambda: O.masks.half((5, 1), "left"), "one pixel across"),
    "random-part": (lambda: O.masks.random((5, 6), 0.0), "above 0 and at most 1"),
    "strokes-part": (lambda: O.masks.strokes((9, 9), 1.0), "below 0.9"),
    "strokes-width": (lambda: O.masks.strokes((9, 9), width=5), "at most a quarter"),
    "bayer-pattern": (lambda: O.masks.bayer((5, 6), "RGBG"), "Bayer pattern is one of"),
    "masks-shape": (lambda: O.masks.random((1, 5, 6), 0.5), r"size \(y, x\)"),
    "grey-weights": (lambda: O.Grayscale((3, 4, 4), (0.5, 0.5)), "each of 3 channels"),
    "grey-zero": (lambda: O.Grayscale((3, 4, 4), (0.0, 0.0, 0.0)), "not all zero"),
    "sensing-many": (lambda: O.RandomSensing(13, (3, 4)), "from 1 to 12"),
    "sensing-none": (lambda: O.RandomSensing(0, (3, 4)), "from 1 to 12"),
    "hadamard-size": (lambda: O.Hadamard((1, 6, 4)), "power of 2"),
    "hadamard-none": (lambda: O.Hadamard((1, 4, 4), 0), "from 1 to 16"),
    "hadamard-rows": (lambda: O.Hadamard((1, 4, 4), rows="high"), "'low' or 'random'"),
    "hadamard-axes": (lambda: O.Hadamard((4,)), "two axes"),
    "phase-oversampling": (lambda: O.FourierMagnitude((1, 4, 4), 0.5), "at least 1"),
    "phase-padding": (lambda: O.FourierMagnitude((1, 4, 4), padding="white"), "'black', 'grey' or a number"),
    "phase-axes": (lambda: O.FourierMagnitude((4,)), "two axes"),
    "coded-none": (lambda: O.CodedDiffraction(torch.ones(0, 4, 4)), "at least one pattern"),
    "coded-rank": (lambda: O.CodedDiffraction(torch.ones(4, 4)), "at least one pattern"),
    "coded-zero": (lambda: O.CodedDiffraction(torch.zeros(2, 4, 4)), "zero everywhere"),
    "coded-quantity": (lambda: O.CodedDiffraction(torch.ones(2, 4, 4), quantity="phase"), "detected quantity"),
    "phases-none": (lambda: O.masks.phases((4, 4), 0), "at least 1"),
    "windows-count": (
        lambda: O.SpaceVaryingBlur(torch.ones(2, 3, 3), torch.ones(3, 6, 6), (1, 6, 6)),
        "for each of 2 kernels",
    ),
    "windows-kernel": (
        lambda: O.SpaceVaryingBlur(torch.ones(1, 9, 9), torch.ones(1, 6, 6), (1, 6, 6)),
        "larger than the image",
    ),
    "windows-grid": (lambda: windows((4, 4), (5, 1)), "at most as many"),
    "nonlinear-blur": (lambda: O.NonlinearBlur(torch.ones(3, 3)), "takes a linear operator"),
    "nonlinear-gamma": (lambda: O.NonlinearBlur(O.Identity((1, 4, 4)), 0.5), "at least 1"),
    "nonlinear-offset": (lambda: O.NonlinearBlur(O.Identity((1, 4, 4)), offset=0), "above 0"),
    "clip-limits": (lambda: O.Clip((1, 4, 4), low=1.0), "limits low < high"),
    "clip-gain": (lambda: O.Clip((1, 4, 4), 0.0), "gain of Clip"),
    "clip-complex": (lambda: O.Clip((1, 4, 4), dtype=torch.complex64), "Clip needs real images"),
    "quantise-levels": (lambda: O.Quantise((1, 4, 4), 1), "at least 2"),
    "jpeg-quality": (lambda: O.JPEG(0, (1, 8, 8)), "1 to 100"),
    "jpeg-channels": (lambda: O.JPEG(50, (2, 8, 8)), "1 or 3 channels"),
    "jpeg-complex": (lambda: O.JPEG(50, (1, 8, 8), dtype=torch.complex64), "real images"),
    "jpeg-subsampling": (lambda: O.JPEG(50, (3, 8, 8), subsampling="4:1:1"), "chroma subsampling is one of"),
    "jpeg-rounding": (lambda: O.JPEG(50, (3, 8, 8), rounding="none"), "rounding of JPEG is one of"),
    "wave-shape": (lambda: O.FreeSpace((1, 4, 4), 5e-7, 1e-3, 1e-6), "size \\(y, x\\)"),
    "wave-length": (lambda: O.FreeSpace((4, 4), 0, 1e-3, 1e-6), "wavelength must be a positive number of metres"),
    "wave-distance": (
        lambda: O.FreeSpace((4, 4), 5e-7, float("nan"), 1e-6),
        "distance must be a number of metres",
    ),
    "wave-no-distance": (lambda: O.FreeSpace((4, 4), 5e-7, [], 1e-6), "at least one distance"),
    "wave-real": (lambda: O.InlineHologram((4, 4), 5e-7, 1e-3, 1e-6, dtype=torch.float32), "wave is complex"),
    "wave-model": (lambda: O.FreeSpace((4, 4), 5e-7, 1e-3, 1e-6, model="ray"), "model of propagation is one"),
    "probe-dark": (lambda: ptycho(probe=torch.zeros(3, 3)), "some light"),
    "probe-outside": (lambda: ptycho(positions=[(0, 4)]), "leaves the plane"),
    "probe-between": (lambda: ptycho(positions=[(0, 0.5)]), "whole numbers"),
    "probe-nowhere": (lambda: ptycho(positions=torch.zeros(0, 2)), "whole numbers"),
    "probe-propagation": (lambda: ptycho(propagation="near"), "propagation is one of"),
    "pupil-closed": (lambda: leds(pupil=torch.zeros(3, 3)), "open somewhere"),
    "leds-outside": (lambda: leds(leds=[(0.3, 0.0)]), "leaves the plane"),
    "leds-rank": (lambda: leds(leds=[0.1, 0.2]), "sines"),
    "pupil-large": (
        lambda: O.circular_pupil(0.5, (4, 4), (16, 16), wavelength=5e-7, pixel=1e-6),
        "enlarge the images",
    ),
    "phase-point": (
        lambda: O.FourierMagnitude((1, 4, 4)).vjp(torch.ones(1, 4, 4), torch.ones(1, 1, 8, 8)),
        "Point of the vjp",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_one_sentence(name: str) -> None:
    make, message = BAD[name]
    with pytest.raises(InvdiffError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
