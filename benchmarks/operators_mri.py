"""MRI operators for `operators.py`: deepinv, sigpy, finufft and bare FFTs beside ours."""

from __future__ import annotations

import functools
import warnings
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from interleaved import Group, Make, Runs

from invdiff.operators import MultiCoilMRI, NonCartesianMRI, trajectories
from invdiff.primitives.solve import cg
from invdiff.spaces import per_row

COILS, N = 16, 320
RADIAL_COILS, RADIAL_N = 8, 256
FINUFFT = find_spec("finufft") is not None


# --- Cartesian -------------------------------------------------------------------------------------------------


@functools.cache
def _cartesian(lines: bool) -> MultiCoilMRI:
    g = torch.Generator().manual_seed(0)
    mask = (torch.rand(N, 1 if lines else N, generator=g) < 0.3).float().expand(N, N)
    maps = torch.randn(COILS, N, N, generator=g, dtype=torch.complex64)
    return MultiCoilMRI(mask, maps / maps.abs().square().sum(0).sqrt())


def ours(lines: bool, batch: int) -> Runs:
    op = _cartesian(lines)
    x, y = op.domain.randn(batch, 1), op.range.randn(batch, 2)
    runs: Runs = {"forward": lambda: op(x), "adjoint": lambda: op.adjoint(y), "normal": lambda: op.normal(x)}
    if lines:
        rho = torch.ones(batch)
        runs["prox"] = lambda: op.prox(x, y, rho)
    return runs


def bare(lines: bool, batch: int) -> Runs:
    k = _cartesian(lines).range.randn(batch, 2)
    return {
        "forward": lambda: torch.fft.fft2(k),
        "adjoint": lambda: torch.fft.ifft2(k),
        "normal": lambda: torch.fft.ifft2(torch.fft.fft2(k)),
    }


def conjugate_gradients(batch: int) -> Runs:
    op = _cartesian(True)
    x, y, rho = (
        op.domain.randn(batch, 1),
        op.range.randn(batch, 2),
        per_row(torch.ones(batch), torch.ones(1, 1, 1, 1)),
    )

    back = op.adjoint(y)  # as the exact step keeps it for data that come back

    def run() -> torch.Tensor:
        return cg(lambda v: op.normal(v) + rho * v, back + rho * x, x, tol=0.0, max_iter=10)

    exact = op.prox(x, y, torch.ones(batch))
    assert (run() - exact).norm() < 0.1 * exact.norm()
    return {"prox": run}


def sigpy(batch: int) -> Runs:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import sigpy

    op = _cartesian(False)
    shape = op.range.shape
    linop = (
        sigpy.linop.Multiply(shape, op.mask[0].numpy())
        * sigpy.linop.FFT(shape, axes=(-2, -1))
        * sigpy.linop.Multiply(shape[1:], op.coil_maps[0].numpy())
    )
    x, y = op.domain.randn(batch, 1), op.range.randn(batch, 2)
    _same(op.normal(x)[0, 0], torch.from_numpy(linop.H(linop(x[0, 0].numpy()))))
    return _one_by_one(linop, x[:, 0].numpy(), y.numpy())


def deepinv(lines: bool, batch: int) -> Runs:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepinv

    op = _cartesian(lines)
    physics = deepinv.physics.MultiCoilMRI(mask=op.mask, coil_maps=op.coil_maps, img_size=(2, N, N))
    x, y = (
        torch.view_as_real(v).movedim(-1, 1).contiguous()
        for v in (op.domain.randn(batch, 1)[:, 0], op.range.randn(batch, 2))
    )
    _same(
        op.normal(op.domain.randn(batch, 1))[:, 0],
        torch.view_as_complex(physics.A_adjoint_A(x).movedim(1, -1).contiguous()),
    )
    runs: Runs = {
        "forward": lambda: physics.A(x),
        "adjoint": lambda: physics.A_adjoint(y),
        "normal": lambda: physics.A_adjoint_A(x),
    }
    if lines:
        runs["prox"] = lambda: physics.prox_l2(x, y, 1.0, max_iter=10, tol=0.0)
    return runs


def _one_by_one(linop: Any, images: np.ndarray, data: np.ndarray) -> Runs:
    return {
        "forward": lambda: [linop(v) for v in images],
        "adjoint": lambda: [linop.H(v) for v in data],
        "normal": lambda: [linop.H(linop(v)) for v in images],
    }


def _same(a: torch.Tensor, b: torch.Tensor) -> None:
    assert (a - b).abs().max() < 1e-4 * a.abs().max()


def cartesian() -> dict[str, Make]:
    return {
        "deepinv MultiCoilMRI": functools.partial(deepinv, False),
        "invdiff MultiCoilMRI": functools.partial(ours, False),
        "bare FFTs of all coils": functools.partial(bare, False),
        "sigpy": sigpy,
    }


def lines() -> dict[str, Make]:
    return {
        "deepinv MultiCoilMRI": functools.partial(deepinv, True),
        "invdiff MultiCoilMRI": functools.partial(ours, True),
        "bare FFTs of all coils": functools.partial(bare, True),
        "ten CG steps on the normal operator of invdiff": conjugate_gradients,
    }


# --- radial ----------------------------------------------------------------------------------------------------


@functools.cache
def _radial(accuracy: float, method: str = "gridding", normal: str = "exact") -> NonCartesianMRI:
    maps = torch.randn(
        RADIAL_COILS, RADIAL_N, RADIAL_N, generator=torch.Generator().manual_seed(0), dtype=torch.complex64
    )
    k = trajectories.radial(RADIAL_N, 96, 512)
    return NonCartesianMRI(k, maps, accuracy=accuracy, method=method, normal=normal)


@functools.cache
def _exact() -> tuple[torch.Tensor, torch.Tensor]:
    """Return some samples and the exact sums there, ``(coil, sample)``, for the image of seed 1."""
    op = _radial(1e-3)
    some = torch.randperm(96 * 512, generator=torch.Generator().manual_seed(0))[:300]
    sums = NonCartesianMRI(op.trajectory.reshape(-1, 2)[some], op.coil_maps[0], method="reference")
    return some, sums(op.domain.randn(1, 1))[0]


def radial_error(samples: Any) -> float:
    """Return the relative error of data of the image of seed 1."""
    some, exact = _exact()
    found = torch.as_tensor(np.asarray(samples)).reshape(RADIAL_COILS, -1)[:, some]
    return float((found - exact).norm() / exact.norm())


def gridding(accuracy: float, batch: int) -> Runs:
    op = _radial(accuracy)
    x, y = op.domain.randn(batch, 1), op.range.randn(batch, 2)
    return {"forward": lambda: op(x), "adjoint": lambda: op.adjoint(y), "normal": lambda: op.normal(x)}


def toeplitz(batch: int) -> Runs:
    op = _radial(1e-6, normal="toeplitz")
    x = op.domain.randn(batch, 1)
    return {"normal": lambda: op.normal(x)}


def sigpy_radial(batch: int) -> Runs:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import sigpy.mri

    op = _radial(1e-3)
    linop = sigpy.mri.linop.Sense(op.coil_maps[0].numpy(), coord=op.trajectory.numpy().astype(np.float32))
    return _one_by_one(linop, op.domain.randn(batch, 1)[:, 0].numpy(), op.range.randn(batch, 2).numpy())


def finufft(accuracy: float, finer: float, batch: int) -> Runs:
    """Return bare plans, which get coil images and give coil images, so that sums over coils are not timed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import finufft

    op, many = _radial(1e-3), batch * RADIAL_COILS
    points = (op.trajectory.reshape(-1, 2).numpy() * (2 * np.pi / RADIAL_N)).astype(np.float32)
    options = {"dtype": "complex64", "nthreads": torch.get_num_threads(), "upsampfac": finer}
    plans = {
        kind: finufft.Plan(kind, (RADIAL_N, RADIAL_N), many, accuracy, sign, **options)
        for kind, sign in ((2, -1), (1, 1))
    }
    for plan in plans.values():
        plan.setpts(*(np.ascontiguousarray(p) for p in points.T))
    images = (op.domain.randn(batch, 1) * op.coil_maps / RADIAL_N).flatten(0, 1).numpy()
    data = op.range.randn(batch, 2).flatten(2).flatten(0, 1).numpy()
    return {"forward": lambda: plans[2].execute(images), "adjoint": lambda: plans[1].execute(data)}


def radial(accuracy: float) -> dict[str, Make]:
    made: dict[str, Make] = {f"invdiff, accuracy {accuracy:g}": functools.partial(gridding, accuracy)}
    if accuracy > 1e-3:
        made["sigpy"] = sigpy_radial
    if accuracy < 1e-3:
        made["invdiff, normal by convolution"] = toeplitz
    if FINUFFT:
        for finer in (1.25, 2.0):
            made[f"finufft, {accuracy:g}, grid finer by {finer:g}"] = functools.partial(finufft, accuracy, finer)
    return made


_RADIAL = "Radial MRI, 256 x 256, 96 spokes of 512 samples, 8 coils"
_FINUFFT = (
    "The plans of finufft, in single precision, get and give coil images: the maps and the sum over coils are not "
    "timed. deepinv's operator wraps finufft. The error is that against the exact sums."
)
GROUPS = {
    "mri-cartesian": Group(
        "Cartesian MRI, 320 x 320, 16 coils",
        "The bare FFTs transform all coils, without maps, mask or centring.",
        cartesian,
    ),
    "mri-lines": Group(
        "Cartesian MRI, 320 x 320, 16 coils, whole lines sampled",
        "A mask that is constant along an axis lets `invdiff` solve the proximal step exactly; what that needs is "
        "factored on the first call, which is not timed, and the adjoint of the data is kept while they stay the "
        "same, as they do in a sampler; so it is for ten steps on our own normal operator. deepinv takes ten "
        "steps of conjugate gradients.",
        lines,
    ),
    "mri-radial": Group(
        f"{_RADIAL}: at the accuracy of sigpy",
        _FINUFFT,
        functools.partial(radial, 7e-3),
        error=radial_error,
    ),
    "mri-radial-1e-3": Group(
        f"{_RADIAL}: accuracy 1e-3",
        _FINUFFT,
        functools.partial(radial, 1e-3),
        error=radial_error,
    ),
    "mri-radial-1e-6": Group(
        f"{_RADIAL}: accuracy 1e-6",
        _FINUFFT,
        functools.partial(radial, 1e-6),
        error=radial_error,
    ),
}
