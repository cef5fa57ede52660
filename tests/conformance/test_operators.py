"""Every operator, plain and in the algebra, against the contract, dense matrices and other people's code."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import ndimage

from invdiff import codec, operators
from invdiff.operator import Affine, LinearOperator, Operator, compose, stack, tensor_digest
from invdiff.operators import trajectories
from invdiff.pulled import Pulled
from invdiff.spaces import Space
from invdiff.testing import check_operator, dense_matrix
from tests.conformance.operators_ct import CT
from tests.conformance.operators_imaging import IMAGING
from tests.conformance.operators_mri import MRI
from tests.conformance.operators_pet_ultrasound import PET_ULTRASOUND

REAL = [torch.float32, torch.float64]
SHAPE = (1, 5, 6)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def mask(*shape: int, seed: int = 0) -> torch.Tensor:
    values = torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    values[..., shape[-2] // 2, shape[-1] // 2] = True
    return values


def maps(*shape: int, seed: int = 1) -> torch.Tensor:
    return randn(*shape, seed=seed, dtype=torch.complex128)


def lines(n: int, m: int, picked: list[int]) -> torch.Tensor:
    out = torch.zeros(n, m)
    out[picked] = 1
    return out


def space(shape: tuple[int, ...], dtype: torch.dtype) -> Space:
    return Space(shape, dtype)


def spokes(size: int, count: int, readout: int) -> torch.Tensor:
    return trajectories.radial(size, count, readout)


def low_rank() -> torch.Tensor:
    return randn(6, 2, seed=2) @ randn(2, 5, seed=3)


def magnitude_squared(d: torch.dtype) -> Operator:
    class MagnitudeSquared(Operator):
        def __init__(self) -> None:
            self.domain, self.range = space((3, 2), d.to_complex()), space((3, 2), d)

        def _forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.to(self.domain.dtype)
            return x.real**2 + x.imag**2

    return MagnitudeSquared()


def pulled(op: LinearOperator, c: codec.Codec) -> LinearOperator:
    assert isinstance(c, codec.AffineCodec)
    return Pulled(op, c)


def head(op: LinearOperator, scale: object = 2.5) -> codec.Codec:
    """The codec a complex scan meets: channels, padding, and one scale per case."""
    channels = codec.ComplexChannels(op.domain)
    return codec.Chain([codec.Scale(op.domain, scale), channels, codec.Pad(channels.prior, 4)])


O = operators
C = {torch.float32: torch.complex64, torch.float64: torch.complex128}

#: name -> factory of an operator in the precision of a real dtype
FACTORIES: dict[str, Callable[[torch.dtype], Operator]] = {
    "identity": lambda d: O.Identity((2, 3, 4), dtype=d),
    "identity-complex": lambda d: O.Identity((5,), dtype=C[d]),
    "matrix-wide": lambda d: O.Matrix(randn(4, 7).to(d)),
    "matrix-tall-per-case": lambda d: O.Matrix(randn(3, 8, 5).to(d)),
    "matrix-low-rank": lambda d: O.Matrix(low_rank().to(d)),
    "matrix-complex": lambda d: O.Matrix(maps(4, 7).to(C[d])),
    "matrix-complex-per-case": lambda d: O.Matrix(maps(2, 7, 4).to(C[d])),
    "matrix-complex-on-real-images": lambda d: O.Matrix(maps(4, 6).to(C[d]), space((1, 2, 3), d)),
    "matrix-real-on-complex-images": lambda d: O.Matrix(randn(4, 6).to(d), space((1, 2, 3), C[d])),
    "mask": lambda d: O.Mask(mask(5, 6), SHAPE, dtype=d),
    "mask-complex-per-case": lambda d: O.Mask(mask(3, 1, 5, 6), (2, 5, 6), dtype=C[d]),
    "mask-1d": lambda d: O.Mask(mask(3, 4)[0], dtype=d),
    "fourier": lambda d: O.SubsampledFourier(mask(5, 6), dtype=C[d]),
    "fourier-per-case": lambda d: O.SubsampledFourier(mask(3, 1, 4, 7), (2, 4, 7), dtype=C[d]),
    "fourier-real": lambda d: O.SubsampledFourier(mask(5, 6), dtype=d),
    "fourier-real-even": lambda d: O.SubsampledFourier(mask(4, 6, seed=5), dtype=d),
    "fourier-real-per-case": lambda d: O.SubsampledFourier(mask(2, 1, 5, 4), (1, 5, 4), dtype=d),
    "blur": lambda d: O.Blur(randn(3, 4), (1, 7, 6), dtype=d),
    "blur-odd": lambda d: O.Blur(randn(5, 3), (2, 5, 7), dtype=d),
    "blur-complex": lambda d: O.Blur(randn(3, 4), (1, 7, 6), dtype=C[d]),
    "blur-per-case": lambda d: O.Blur(randn(2, 3, 3), (5, 6), dtype=d),
    "gaussian-blur": lambda d: O.GaussianBlur((0.6, 0.8), SHAPE, dtype=d),
    "box-blur-with-null-space": lambda d: O.Blur(torch.ones(1, 3) / 3, (1, 4, 6), dtype=d),
    "mri": lambda d: O.MultiCoilMRI(mask(5, 6), maps(3, 5, 6).to(C[d])),
    "mri-mask-per-case": lambda d: O.MultiCoilMRI(mask(3, 4, 7), maps(2, 4, 7).to(C[d])),
    "mri-maps-per-case": lambda d: O.MultiCoilMRI(mask(4, 6), maps(3, 2, 4, 6).to(C[d])),
    "mri-lines-ky": lambda d: O.MultiCoilMRI(lines(6, 5, [0, 3, 4]), maps(2, 6, 5).to(C[d])),
    "mri-lines-kx": lambda d: O.MultiCoilMRI(lines(5, 6, [1, 2]).mT, maps(3, 6, 5).to(C[d])),
    "mri-lines-per-case": lambda d: O.MultiCoilMRI(
        torch.stack([lines(5, 4, [0, 2]), lines(5, 4, [1, 2, 4]), lines(5, 4, [2])]), maps(3, 2, 5, 4).to(C[d])
    ),
    "mri-full-sampling": lambda d: O.MultiCoilMRI(torch.ones(5, 4), maps(2, 5, 4).to(C[d])),
    "mri-one-unit-coil": lambda d: O.MultiCoilMRI(
        mask(2, 5, 6), torch.polar(torch.ones(1, 5, 6).double(), randn(1, 5, 6)).to(C[d])
    ),
    "radial": lambda d: O.NonCartesianMRI(spokes(5, 4, 7), maps(3, 6, 5).to(C[d])),
    "radial-maps-per-case": lambda d: O.NonCartesianMRI(spokes(6, 3, 5), maps(2, 3, 6, 7).to(C[d]), accuracy=1e-5),
    "radial-reference": lambda d: O.NonCartesianMRI(spokes(5, 4, 7), maps(2, 5, 6).to(C[d]), method="reference"),
    "radial-toeplitz": lambda d: O.NonCartesianMRI(
        spokes(5, 4, 7), maps(2, 5, 6).to(C[d]), accuracy=1e-12, normal="toeplitz"
    ),
    "radial-toeplitz-reference": lambda d: O.NonCartesianMRI(
        spokes(4, 2, 5), maps(2, 2, 4, 5).to(C[d]), method="reference", normal="toeplitz"
    ),
    "radial-off-resonance": lambda d: O.NonCartesianMRI(
        spokes(5, 4, 7),
        maps(2, 5, 6).to(C[d]),
        off_resonance=O.OffResonance(200 * randn(5, 6), torch.arange(7) / 2e3),
    ),
    "noncartesian-3d": lambda d: O.NonCartesianMRI(4 * randn(20, 3).tanh() / 2, maps(2, 4, 5, 6).to(C[d])),
    "interferometry": lambda d: O.RadioInterferometry(400 * randn(30, 2).tanh(), (6, 5), 1e-3, dtype=d),
    "interferometry-toeplitz": lambda d: O.RadioInterferometry(
        400 * randn(9, 2).tanh(), (5, 6), 1e-3, beam=randn(5, 6), dtype=d, accuracy=1e-12, normal="toeplitz"
    ),
    "sum": lambda d: O.Blur(randn(3, 3), SHAPE, dtype=d) + O.Mask(mask(5, 6), SHAPE, dtype=d),
    "difference": lambda d: O.Mask(mask(5, 6), SHAPE, dtype=d) - 0.5 * O.Identity(SHAPE, dtype=d),
    "scaled": lambda d: -3 * O.Blur(randn(3, 3), SHAPE, dtype=d),
    "scaled-complex": lambda d: (1 - 2j) * O.SubsampledFourier(mask(5, 6), dtype=C[d]),
    "stack": lambda d: stack([O.Mask(mask(5, 6), SHAPE, dtype=d), O.Blur(randn(3, 3), SHAPE, dtype=d)]),
    "stack-of-stacks": lambda d: stack([stack([O.Identity((3,), dtype=d)] * 2)] * 2),
    "composition": lambda d: compose(
        O.SubsampledFourier(mask(5, 6), dtype=d), O.GaussianBlur(0.7, SHAPE, dtype=d)
    ),
    "composition-per-case": lambda d: compose(
        O.MultiCoilMRI(mask(3, 4, 6), maps(2, 4, 6).to(C[d])), O.Mask(mask(3, 1, 4, 6), (1, 4, 6), dtype=C[d])
    ),
    "composition-twice": lambda d: compose(
        compose(O.Matrix(randn(3, 30).to(d), SHAPE), O.Blur(randn(3, 3), SHAPE, dtype=d)),
        O.Identity(SHAPE, dtype=d),
    ),
    "adjoint": lambda d: O.MultiCoilMRI(mask(3, 4, 5), maps(2, 4, 5).to(C[d])).H,
    "adjoint-of-stack": lambda d: stack([O.SubsampledFourier(mask(5, 6, seed=s), dtype=d) for s in (0, 1)]).H,
    "codec-linear": lambda d: head(O.Identity((1, 5, 3), dtype=C[d])).linear_operator(),  # type: ignore[attr-defined]
    "pulled-scale": lambda d: pulled(
        O.Mask(mask(5, 6), SHAPE, dtype=d), codec.Scale(space(SHAPE, d), torch.tensor([0.5, 2.0, 4.0]))
    ),
    "pulled-mri": lambda d: pulled(mri := O.MultiCoilMRI(lines(5, 3, [0, 2]), maps(2, 5, 3).to(C[d])), head(mri)),
    "pulled-mri-per-case": lambda d: pulled(
        mri := O.MultiCoilMRI(torch.stack([lines(5, 3, [0, 2]), lines(5, 3, [1])]), maps(2, 5, 3).to(C[d])),
        head(mri, torch.tensor([0.3, 7.0])),
    ),
    "pulled-real-channel": lambda d: pulled(
        O.GaussianBlur(0.6, SHAPE, dtype=d), codec.ComplexChannels(space(SHAPE, d))
    ),
    "nonlinear": magnitude_squared,
    "nonlinear-composed": lambda d: compose(magnitude_squared(d), O.Matrix(maps(6, 4).to(C[d]), range=(3, 2))),
    "affine": lambda d: Affine(O.Mask(mask(5, 6), SHAPE, dtype=d), randn(2, *SHAPE).to(d)),
    **IMAGING,
    **MRI,
    **CT,
    **PET_ULTRASOUND,
    "navier-stokes": lambda d: O.NavierStokes((1, 8, 8), 0.2, 0.05, torch.ones(8, 8), side=3.0, dtype=d),
    "navier-stokes-inviscid": lambda d: O.NavierStokes((1, 10, 10), 0.3, 0.0, segments=2, dtype=d),
}


@pytest.mark.parametrize("dtype", REAL, ids=["float32", "float64"])
@pytest.mark.parametrize("name", FACTORIES)
def test_contract(name: str, dtype: torch.dtype) -> None:
    check_operator(FACTORIES[name](dtype)).raise_if_failed()


@pytest.mark.parametrize("name", FACTORIES)
def test_moving_precision_keeps_the_contract(name: str) -> None:
    check_operator(FACTORIES[name](torch.float64).to(dtype=torch.float32)).raise_if_failed()


def test_closed_forms_are_declared_where_they_exist() -> None:
    can = {name: make(torch.float64).capabilities for name, make in FACTORIES.items()}
    for name in ("identity", "matrix-wide", "mask", "fourier", "fourier-real", "blur", "mri-one-unit-coil"):
        assert {"svd", "pinv", "prox", "conditional"} <= can[name]
    for name in ("mri-lines-ky", "mri-lines-kx", "mri-lines-per-case", "mri-full-sampling"):
        assert {"prox", "conditional"} <= can[name] and "svd" not in can[name]
    assert not {"svd", "pinv", "prox"} & can["mri"]
    assert "prox" in can["pulled-mri-per-case"]


def test_prox_without_closed_form_is_refused() -> None:
    op = FACTORIES["mri"](torch.float64)
    assert isinstance(op, LinearOperator)
    with pytest.raises(ValueError, match="conjugate gradients"):
        op.prox(op.domain.zeros(1), op.range.zeros(1), torch.ones(1))


@pytest.mark.parametrize("name", ["mri", "mri-mask-per-case", "mri-maps-per-case"])
def test_normal_in_blocks_of_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from invdiff.operators import mri

    op = FACTORIES[name](torch.float64)
    assert isinstance(op, LinearOperator)
    whole = op.normal(op.domain.randn(3))
    monkeypatch.setattr(mri, "_BLOCK", 2 * op.range.size)
    torch.testing.assert_close(op.normal(op.domain.randn(3)), whole)


def test_readout_factors_are_shared_between_rows() -> None:
    op = FACTORIES["mri-lines-per-case"](torch.float64)
    op.rows(torch.tensor([0, 0])).rows(torch.tensor([1]))._blocks()  # type: ignore[union-attr]
    assert list(op._memo._values) == ["_readout_factors"]  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["mri-lines-per-case", "matrix-low-rank", "blur"])
def test_what_is_derived_is_no_state(name: str) -> None:
    import copy
    import pickle

    op = FACTORIES[name](torch.float64)
    assert isinstance(op, LinearOperator)
    before, pickled = tensor_digest(op), pickle.dumps(op)
    n = op.n_cases or 1
    out = op.prox(op.domain.randn(n), op.range.randn(n), torch.ones(n))
    assert tensor_digest(op) == before and len(pickle.dumps(op)) == len(pickled)
    for other in (pickle.loads(pickled), copy.deepcopy(op)):
        torch.testing.assert_close(other.prox(op.domain.randn(n), op.range.randn(n), torch.ones(n)), out)


# ---- dense oracles and other people's code ----


def dense_fft(n: int) -> np.ndarray:
    c = n // 2
    k = np.arange(n) - c
    return np.exp(-2j * np.pi * np.outer(k, k) / n) / np.sqrt(n)


@pytest.mark.parametrize("shape", [(5, 6), (4, 7), (1, 3)])
def test_fourier_against_its_definition(shape: tuple[int, int]) -> None:
    m = mask(*shape)
    op = O.SubsampledFourier(m, dtype=torch.complex128)
    x = op.domain.randn(1)
    fy, fx = dense_fft(shape[0]), dense_fft(shape[1])
    expected = m.numpy() * (fy @ x[0, 0].numpy() @ fx.T)
    np.testing.assert_allclose(op(x)[0, 0].numpy(), expected, atol=1e-12)


def test_prox_against_a_dense_solve() -> None:
    for name in ("mri-lines-per-case", "fourier-real", "blur", "matrix-low-rank", "pulled-mri-per-case"):
        op = FACTORIES[name](torch.float64)
        assert isinstance(op, LinearOperator)
        n = op.n_cases or 1
        z, y, rho = op.domain.randn(n, 1), op.range.randn(n, 2), torch.full((n,), 0.2, dtype=torch.float64)
        out = op.prox(z, y, rho)
        for i in range(n):
            a = dense_matrix(op, i)
            flat = [
                torch.cat([v[i].real.flatten(), v[i].imag.flatten()]) if v.is_complex() else v[i].flatten()
                for v in (y, z, out)
            ]
            solved = torch.linalg.solve(
                a.mT @ a + 0.2 * torch.eye(a.shape[1], dtype=a.dtype), a.mT @ flat[0] + 0.2 * flat[1]
            )
            torch.testing.assert_close(flat[2], solved, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("kernel", [(3, 3), (2, 3), (4, 2)])
def test_blur_against_scipy(kernel: tuple[int, int]) -> None:
    k = randn(*kernel)
    op = O.Blur(k, (1, 7, 6), dtype=torch.float64)
    x = op.domain.randn(1)
    expected = ndimage.convolve(x[0, 0].numpy(), k.numpy(), mode="wrap")
    np.testing.assert_allclose(op(x)[0, 0].numpy(), expected, atol=1e-12)


def test_gaussian_blur_against_scipy() -> None:
    op = O.GaussianBlur((1.3, 2.0), (1, 12, 9), dtype=torch.float64)
    x = op.domain.randn(1)
    expected = ndimage.gaussian_filter(x[0, 0].numpy(), (1.3, 2.0), mode="wrap", truncate=10)
    np.testing.assert_allclose(op(x)[0, 0].numpy(), expected, atol=1e-10)


@pytest.fixture(scope="module")
def sigpy():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import sigpy
        import sigpy.mri
    return sigpy


@pytest.fixture(scope="module")
def deepinv():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepinv
    return deepinv


@pytest.mark.parametrize("shape", [(6, 8), (5, 7)])
def test_mri_against_sigpy(sigpy, shape: tuple[int, int]) -> None:
    m, s = mask(*shape), maps(3, *shape)
    op = O.MultiCoilMRI(m, s)
    linop = (
        sigpy.linop.Multiply((3, *shape), m.numpy().astype(float))
        * sigpy.linop.FFT((3, *shape), axes=(-2, -1))
        * sigpy.linop.Multiply(shape, s.numpy())
    )
    x, y = op.domain.randn(1, 1), op.range.randn(1, 2)
    np.testing.assert_allclose(op(x)[0].numpy(), linop(x[0, 0].numpy()), atol=1e-12)
    np.testing.assert_allclose(op.adjoint(y)[0, 0].numpy(), linop.H(y[0].numpy()), atol=1e-12)
    np.testing.assert_allclose(op.normal(x)[0, 0].numpy(), (linop.H * linop)(x[0, 0].numpy()), atol=1e-12)
    fourier = O.SubsampledFourier(torch.ones(shape), dtype=torch.complex128)
    np.testing.assert_allclose(fourier(x)[0].numpy(), sigpy.fft(x[0].numpy(), axes=(-2, -1)), atol=1e-12)


def test_mri_and_inpainting_against_deepinv(deepinv) -> None:
    m, s = mask(6, 8), maps(3, 6, 8).to(torch.complex64)
    op = O.MultiCoilMRI(m, s)
    physics = deepinv.physics.MultiCoilMRI(mask=m.float()[None, None], coil_maps=s[None], img_size=(2, 6, 8))
    x, y = op.domain.randn(2, 1), op.range.randn(2, 2)

    def channels(v: torch.Tensor) -> torch.Tensor:
        return torch.view_as_real(v).movedim(-1, 1)

    torch.testing.assert_close(channels(op(x)), physics.A(channels(x[:, 0])), atol=1e-5, rtol=1e-5)
    back = physics.A_adjoint(channels(y))
    torch.testing.assert_close(channels(op.adjoint(y)[:, 0]), back, atol=1e-5, rtol=1e-5)
    inpaint = deepinv.physics.Inpainting(img_size=(1, 6, 8), mask=m.float()[None])
    z = torch.randn(2, 1, 6, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(O.Mask(m, (1, 6, 8))(z), inpaint.A(z))


# ---- impostors: check_operator must refuse what is wrong ----


class Good(LinearOperator):
    """A complex diagonal; the impostors below each break one thing."""

    def __init__(self) -> None:
        self.domain = self.range = space((6,), torch.complex128)
        self.weights = maps(1, 6)

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self.domain.dtype) * self.weights

    def _adjoint(self, y: torch.Tensor) -> torch.Tensor:
        return y.to(self.domain.dtype) * self.weights.conj()


class WrongScale(Good):
    def _adjoint(self, y):
        return 1.001 * super()._adjoint(y)


class NoConjugate(Good):
    def _adjoint(self, y):
        return y.to(self.domain.dtype) * self.weights


class Counting(Good):
    calls = 0

    def _forward(self, x):
        self.calls = self.calls + 1
        return super()._forward(x)


class Drifting(Good):
    def __init__(self) -> None:
        super().__init__()
        self.box = [object()]

    def _forward(self, x):
        self.box.append(object())
        return super()._forward(x) * (1 + 1e-3 * len(self.box))


class BatchCoupled(Good):
    def _forward(self, x):
        return super()._forward(x) - 0.1 * x.to(self.domain.dtype).mean(0, keepdim=True)

    def _adjoint(self, y):
        return super()._adjoint(y) - 0.1 * y.to(self.domain.dtype).mean(0, keepdim=True)


class Overwriting(Good):
    def _forward(self, x):
        return (
            x.mul_(self.weights) if x.dtype == self.domain.dtype and not x.requires_grad else super()._forward(x)
        )


class Shifted(Good):
    def _forward(self, x):
        return super()._forward(x) + 0.1


class OtherPrecision(Good):
    def _forward(self, x):
        return super()._forward(x).to(torch.complex64)


class WrongNormal(Good):
    def normal(self, x):
        return self(x)


class WrongDerivative(Good):
    def jvp(self, x, dx):
        return 2 * self(dx)


class WrongProx(Good):
    provides = Good.provides | {"prox"}

    def prox(self, z, y, rho):
        return (self.adjoint(y) + rho[:, None] * z) / (1 + rho[:, None])


class WrongRows(Good):
    def __init__(self) -> None:
        super().__init__()
        self.weights = maps(3, 6)

    n_cases = 3  # type: ignore[assignment]

    def rows(self, index):
        return self


IMPOSTORS = {
    WrongScale: "adjoint, aligned data",
    NoConjugate: "adjoint, aligned data",
    Counting: "unchanged by use",
    Drifting: "same input, same output",
    BatchCoupled: "rows do not mix",
    Overwriting: "inputs left alone",
    Shifted: "zero to zero",
    OtherPrecision: "dtype of the output",
    WrongNormal: "normal = adjoint of forward",
    WrongDerivative: "jvp against finite differences",
    WrongProx: "prox optimal, rho 1",
    WrongRows: "rows do not mix",
}


def test_the_control_passes() -> None:
    check_operator(Good()).raise_if_failed()


@pytest.mark.parametrize("impostor", IMPOSTORS, ids=lambda c: c.__name__)
def test_impostors_are_rejected(impostor: type[Good]) -> None:
    report = check_operator(impostor())
    assert not report.ok
    assert IMPOSTORS[impostor] in report.failed
    assert "FAIL" in str(report)


def test_report_prints_every_check() -> None:
    report = check_operator(O.Identity((3,)))
    assert len(str(report).splitlines()) == len(report.checks) + 2
    assert report.ok and bool(report) and not report.failed
