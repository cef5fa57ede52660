"""Operators of imaging for `operators.py`: deepinv, torch's convolution and bare transforms beside ours."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from interleaved import Group, Make, Runs
from torch import Tensor

from invdiff import operators
from invdiff.operators import kernels

SHAPE = (3, 256, 256)


def noise(batch: int, *shape: int) -> Tensor:
    return torch.randn(batch, *(shape or SHAPE), generator=torch.Generator().manual_seed(batch))


def ours(op: Any, batch: int, *names: str) -> Runs:
    """Return what an operator does; the data are those of an image."""
    x, rho = noise(batch, *op.domain.shape), torch.ones(batch)
    y = op(x)
    runs: Runs = {
        "forward": lambda: op(x),
        "adjoint": lambda: op.adjoint(y),
        "normal": lambda: op.normal(x),
        "prox": lambda: op.prox(x, y, rho),
        "pinv": lambda: op.pinv(y),
    }
    return {name: runs[name] for name in names}


def theirs(make: Callable[[Any], Any], shape: tuple[int, ...], batch: int, *names: str) -> Runs:
    """Return the same of what is made from the module ``deepinv.physics``, for images of a shape."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepinv

    physics = make(deepinv.physics)
    x = noise(batch, *shape)
    y = physics.A(x)
    runs: Runs = {
        "forward": lambda: physics.A(x),
        "adjoint": lambda: physics.A_adjoint(y),
        "normal": lambda: physics.A_adjoint_A(x),
        "prox": lambda: physics.prox_l2(x, y, gamma=1.0),
        "pinv": lambda: physics.A_dagger(y),
    }
    return {name: runs[name] for name in names}


def gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], object]:
    """Return the reverse pass of a function by autograd, the forward one included."""
    with torch.no_grad():
        v = function(x)

    def run() -> object:
        with torch.enable_grad():
            z = x.clone().requires_grad_(True)
            return torch.autograd.grad(function(z), z, v)

    return run


# --- blur ------------------------------------------------------------------------------------------------------

_ALL = ("forward", "adjoint", "normal", "prox")


def blur() -> dict[str, Make]:
    k = kernels.motion(61, seed=1)
    op = operators.Blur(k, SHAPE)

    def spectra(batch: int) -> Runs:
        x = noise(batch)
        h = torch.fft.rfft2(torch.fft.ifftshift(F.pad(k, (98, 97, 98, 97))))
        assert torch.allclose(torch.fft.irfft2(torch.fft.rfft2(x) * h), op(x), atol=1e-4)
        return {
            "forward": lambda: torch.fft.irfft2(torch.fft.rfft2(x).mul_(h)),
            "adjoint": lambda: torch.fft.irfft2(torch.fft.rfft2(x).mul_(h.conj())),
        }

    def direct(physics: Any) -> Any:
        made = physics.Blur(filter=k[None, None], padding="circular")
        assert torch.allclose(op(noise(1)), made.A(noise(1)), atol=1e-4)
        return made

    def spectral(physics: Any) -> Any:
        return physics.BlurFFT(img_size=SHAPE, filter=k[None, None])

    return {
        "deepinv Blur": lambda batch: theirs(direct, SHAPE, batch, *_ALL[:3]),
        "deepinv BlurFFT": lambda batch: theirs(spectral, SHAPE, batch, *_ALL),
        "invdiff Blur": lambda batch: ours(op, batch, *_ALL),
        "rfft2, product, irfft2": spectra,
    }


def reflected() -> dict[str, Make]:
    k = kernels.gaussian(3.0, 61)
    plain, separable = (operators.Blur(k, SHAPE, boundary="reflect", method=m) for m in ("fft", "separable"))
    weight = k[None, None].expand(3, 1, 61, 61)

    def convolve(x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (30,) * 4, mode="reflect"), weight, groups=3)

    def conv2d(batch: int) -> Runs:
        x = noise(batch)
        assert torch.allclose(convolve(x), plain(x), atol=1e-4)
        return {"forward": lambda: convolve(x), "adjoint": gradient(convolve, x)}

    def direct(physics: Any) -> Any:
        return physics.Blur(filter=k[None, None], padding="reflect")

    return {
        "deepinv Blur": lambda batch: theirs(direct, SHAPE, batch, *_ALL[:2]),
        "invdiff Blur, spectra": lambda batch: ours(plain, batch, *_ALL[:2]),
        "invdiff Blur, separable": lambda batch: ours(separable, batch, *_ALL),
        "torch conv2d (adjoint by autograd)": conv2d,
    }


# --- super-resolution ------------------------------------------------------------------------------------------


def bicubic() -> dict[str, Make]:
    op = operators.Downsampling(4, SHAPE)

    def interpolate(x: Tensor) -> Tensor:
        return F.interpolate(x, size=(64, 64), mode="bicubic", antialias=True)

    def in_torch(batch: int) -> Runs:
        x = noise(batch)
        assert torch.allclose(interpolate(x), op(x), atol=1e-4)
        return {"forward": lambda: interpolate(x), "adjoint": gradient(interpolate, x)}

    def make(physics: Any) -> Any:
        return physics.Downsampling(img_size=SHAPE, factor=4, filter="bicubic", padding="circular")

    return {
        "deepinv Downsampling": lambda batch: theirs(make, SHAPE, batch, *_ALL),
        "invdiff Downsampling": lambda batch: ours(op, batch, *_ALL),
        "torch interpolate (adjoint by autograd)": in_torch,
    }


def blurred() -> dict[str, Make]:
    k = kernels.gaussian(2.0, 17)
    op = operators.Downsampling(4, SHAPE, "blur", kernel=k)

    def make(physics: Any) -> Any:
        made = physics.Downsampling(img_size=SHAPE, factor=4, filter=k[None, None], padding="circular")
        assert torch.allclose(op(noise(1)), made.A(noise(1)), atol=1e-4)
        return made

    return {
        "deepinv Downsampling": lambda batch: theirs(make, SHAPE, batch, *_ALL),
        "invdiff Downsampling, blur": lambda batch: ours(op, batch, *_ALL),
    }


# --- phase retrieval and compressed sensing --------------------------------------------------------------------


def phase_retrieval() -> dict[str, Make]:
    op = operators.FourierMagnitude((1, 256, 256), 1.5)

    def centred(z: Tensor) -> Tensor:
        k = torch.fft.ifftshift(F.pad(z, (64,) * 4), dim=(-2, -1))
        return torch.fft.fftshift(torch.fft.fft2(k, norm="ortho"), dim=(-2, -1)).abs()

    def half(z: Tensor) -> Tensor:
        return torch.fft.rfft2(z, s=(384, 384), norm="ortho").abs()

    def by_autograd(function: Callable[[Tensor], Tensor], batch: int) -> Runs:
        x = noise(batch, 1, 256, 256)
        return {"forward": lambda: function(x), "vjp": gradient(function, x)}

    def in_ours(batch: int) -> Runs:
        x = noise(batch, 1, 256, 256)
        v = op(x)
        assert torch.allclose(v, centred(x), atol=1e-4)
        return {"forward": lambda: op(x), "vjp": lambda: op.vjp(x, v)}

    return {
        "invdiff FourierMagnitude": in_ours,
        "centred fft2 of the padded image, autograd": functools.partial(by_autograd, centred),
        "half of the spectrum by rfft2, autograd": functools.partial(by_autograd, half),
    }


_LINEAR = ("forward", "adjoint", "prox", "pinv")


def sensing() -> dict[str, Make]:
    shape, m = (1, 64, 64), 1024
    op = operators.RandomSensing(m, shape)

    def make(physics: Any) -> Any:
        return physics.CompressedSensing(m=m, img_size=shape)

    def product(batch: int) -> Runs:
        x, y = noise(batch, 4096), noise(batch, m)
        return {"forward": lambda: x @ op.matrix.mT, "adjoint": lambda: y @ op.matrix}

    return {
        "deepinv CompressedSensing": lambda batch: theirs(make, shape, batch, *_LINEAR),
        "invdiff RandomSensing": lambda batch: ours(op, batch, *_LINEAR),
        "matrix product": product,
    }


def single_pixel() -> dict[str, Make]:
    shape, m = (1, 128, 128), 4096
    op = operators.Hadamard(shape, m)

    def make(physics: Any) -> Any:
        return physics.SinglePixelCamera(m=m, img_size=shape, fast=True)

    return {
        "deepinv SinglePixelCamera": lambda batch: theirs(make, shape, batch, *_LINEAR),
        "invdiff Hadamard": lambda batch: ours(op, batch, *_LINEAR),
    }


GROUPS = {
    "blur": Group(
        "Blur, 61 x 61 on 3 x 256 x 256, periodic",
        "deepinv `Blur` sums directly, `BlurFFT` is the fast one; it counts among the other packages here.",
        blur,
    ),
    "blur-reflect": Group("Gaussian blur, 61 x 61 on 3 x 256 x 256, reflecting boundary", "", reflected),
    "super-resolution": Group(
        "Super-resolution by 4, bicubic, 3 x 256 x 256",
        "deepinv convolves with a bicubic kernel, which is another operator than torch's and ours.",
        bicubic,
    ),
    "super-resolution-blur": Group(
        "Super-resolution by 4 behind a blur of 17 x 17, 3 x 256 x 256, periodic", "", blurred
    ),
    "phase-retrieval": Group(
        "Phase retrieval, 256 x 256 on a canvas of 384 x 384",
        "deepinv has no such operator. Half of the spectrum is not what is measured, but bounds what FFTs take.",
        phase_retrieval,
    ),
    "compressed-sensing": Group(
        "Compressed sensing, 64 x 64, 1024 projections",
        "deepinv solves the proximal step by conjugate gradients.",
        sensing,
    ),
    "single-pixel": Group("Single-pixel camera, 128 x 128, 4096 Hadamard patterns", "", single_pixel),
}
