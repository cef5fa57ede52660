"""Blur: convolution with a kernel, for every boundary, through spectra, small matrices or sums."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from invdiff.errors import InvdiffError
from invdiff.operator import SVD, apply_linear
from invdiff.operators import _convolve as convolve
from invdiff.operators import _separable as separable
from invdiff.operators._fft import AXES, centred_fft, centred_ifft, hartley
from invdiff.operators._parameters import as_parameter, as_space
from invdiff.operators._spectral import CLOSED_FORMS, SpectralOperator, cut_small, over
from invdiff.spaces import Space, per_row

METHODS = ("auto", "fft", "separable", "direct")
#: Standard deviations that a Gaussian reaches to where its periods are not summed; what is cut off is 2e-9.
_REACH = 6.0


class Blur(SpectralOperator):
    """``(A x)[n] = sum_j k[j] x[n - j]`` with a real kernel, channel by channel.

    The kernel's origin is its element ``size // 2``; it is used as given, not normalised. Beyond the edge, ``x``
    is periodic ("circular"), mirrored without repeating the edge ("reflect", as in ``torch.nn.functional.pad`` and
    numpy; scipy says "mirror") or zero ("zero"); "valid" keeps only pixels for which no such value is needed,
    which makes the range smaller.

    The ways to compute it agree to rounding. "auto" takes spectra for periodic images, one small matrix per axis
    for other boundaries where the kernel is an outer product, and else spectra of the extended image; a direct sum
    was slower than one of these at every size measured.

    There is a decomposition for periodic images and for outer products. For the former, with the transfer function
    ``h = |h| exp(i phi)``, ``A = U |h| V^H`` where ``V^H`` is the Fourier transform (Hartley for real images,
    which keeps the coordinates real) and ``U`` is ``V`` followed by the all-pass filter ``exp(i phi)``.
    Frequencies with ``|h|`` below rounding count as lost.

    Args:
        kernel: ``(ky, kx)``, or ``(N, ky, kx)`` for one kernel per case; at most as large as the image.
        shape: Shape ``(channel, y, x)`` (or ``(y, x)``) of one image, or its whole Space.
        boundary: "circular", "reflect", "zero" or "valid".
        method: "auto", "fft", "separable" (for outer products) or "direct".
        dtype: Precision, and real or complex; that of the Space, or float32.
        units: Units of the image.
        spacing: Distance between neighbours, per named dimension.

    Raises:
        InvdiffError: If the kernel is complex, not finite, all zero, of another rank, or larger than the image, or
            "separable" is asked for with a kernel that is no outer product.
    """

    _per_case = ("kernel",)

    def __init__(
        self,
        kernel: Any,
        shape: Space | Sequence[int],
        *,
        boundary: str = "circular",
        method: str = "auto",
        dtype: torch.dtype | None = None,
        units: str | None = None,
        spacing: Mapping[str, float] | None = None,
    ) -> None:
        self.domain = as_space(shape, dtype, units, spacing)
        self.kernel = as_kernels(kernel, self.domain)
        self.boundary = require("boundary of a blur", boundary, convolve.BOUNDARIES)
        self.method = self._choose(require("method of a blur", method, METHODS))
        self.range = self.domain
        if boundary == "valid":
            inner = tuple(n - k + 1 for n, k in zip(self.domain.shape[-2:], self._sizes))
            self.range = self.domain.replace(shape=(*self.domain.shape[:-2], *inner))
        super().__init__()

    @property
    def _sizes(self) -> tuple[int, int]:
        return self.kernel.shape[-2], self.kernel.shape[-1]

    def _choose(self, method: str) -> str:
        if method in ("fft", "direct") or (method == "auto" and self.boundary == "circular"):
            return "fft" if method == "auto" else method
        # A kernel kept in single precision is an outer product up to that precision.
        s = torch.linalg.svdvals(self.kernel.double())
        outer = s.shape[1] < 2 or bool((s[:, 1] <= 8 * torch.finfo(self.kernel.dtype).eps * s[:, 0]).all())
        if method == "separable" and not outer:
            raise InvdiffError(
                "The blur kernel is no outer product of a column and a row, which the method 'separable' needs; "
                "use method 'fft'."
            )
        return "separable" if outer and (method == "separable" or self._fits) else "fft"

    @property
    def _fits(self) -> bool:
        return max(self.domain.shape[-2:]) <= separable.LONGEST

    @property
    def capabilities(self) -> frozenset[str]:
        """What this boundary and this kernel allow in closed form."""
        if self.boundary == "circular" or (self.method == "separable" and self._fits):
            return self.provides
        return self.provides - CLOSED_FORMS

    def _forward(self, x: Tensor) -> Tensor:
        x = self._enter(x, self.domain)
        if self.method == "separable":
            ty, tx = self._derived(_matrices)
            by, bx = (_blocks(k, n, self.boundary)[0] for k, n in zip(self._sizes, self.domain.shape[-2:]))
            return separable.multiply(ty, tx, x, by, bx)
        if self.method == "direct":
            return convolve.direct(convolve.extend(x, self._sizes, self.boundary), self.kernel)
        return convolve.in_blocks(self._filter, (x,), (self._transfer,))

    def _adjoint(self, y: Tensor) -> Tensor:
        y = self._enter(y, self.range)
        if self.method == "separable":
            ty, tx = self._derived(_matrices)
            by, bx = (_blocks(k, n, self.boundary)[1] for k, n in zip(self._sizes, self.domain.shape[-2:]))
            return separable.multiply(ty.mT, tx.mT, y, by, bx)
        if self.method == "direct":
            ky, kx = self._sizes
            y = torch.nn.functional.pad(y, (kx - 1, kx - 1, ky - 1, ky - 1))
            return convolve.fold(convolve.direct(y, self.kernel.flip(AXES)), self._sizes, self.boundary)
        return convolve.in_blocks(self._filter_back, (y,), (self._transfer.conj(),))

    def normal(self, x: Tensor) -> Tensor:
        """Return ``A^H A x``; for periodic images ``F^H |h|^2 F x``, one pair of FFTs."""
        if self.boundary != "circular" or self.method != "fft":
            return super().normal(x)
        self.domain.check(x, f"Input of the normal operator of {self.name}")
        return apply_linear(x, self._normal, self._normal)

    def _normal(self, x: Tensor) -> Tensor:
        (power,) = self._derived(_power)
        return convolve.in_blocks(self._filter, (self._enter(x, self.domain),), (self._over_channels(power),))

    @property
    def _transfer(self) -> Tensor:
        """Transfer function on the grid of the transform, half of it for real images, over channels."""
        return self._over_channels(self._derived(_transfer)[0])

    def _over_channels(self, h: Tensor) -> Tensor:
        """Return ``(N, y, x)`` with the axes of an image that broadcast."""
        return h.reshape(h.shape[0], *([1] * (len(self.domain.shape) - 2)), *h.shape[-2:])

    @property
    def lengths(self) -> tuple[int, int]:
        """Size of the transform: of the image if it is periodic, else one that is fast and large enough."""
        (ny, nx), (ky, kx) = self.domain.shape[-2:], self._sizes
        if self.boundary == "circular":
            return ny, nx
        my, mx = sum(convolve.margins(ky, self.boundary)), sum(convolve.margins(kx, self.boundary))
        return convolve.fast_length(ny + my), convolve.fast_length(nx + mx)

    def _filter(self, x: Tensor, h: Tensor) -> Tensor:
        """Return the image after multiplying its spectrum by ``h``."""
        if self.boundary != "circular":
            x = convolve.extend(x, self._sizes, self.boundary)
        return self.crop(convolve.multiply_spectrum(x, h, self.lengths))

    def _filter_back(self, y: Tensor, h: Tensor) -> Tensor:
        return self.refold(convolve.multiply_spectrum(self.uncrop(y), h, self.lengths))

    def crop(self, out: Tensor) -> Tensor:
        """Return the valid part of what a transform gives; all of it for periodic images."""
        if self.boundary == "circular":
            return out
        (ky, kx), (my, mx) = self._sizes, self.range.shape[-2:]
        return out[..., ky - 1 : ky - 1 + my, kx - 1 : kx - 1 + mx]

    def uncrop(self, y: Tensor) -> Tensor:
        """Put data where `crop` took them from; the transform fills up the rest."""
        if self.boundary == "circular":
            return y
        ky, kx = self._sizes
        return torch.nn.functional.pad(y, (kx - 1, 0, ky - 1, 0))

    def refold(self, out: Tensor) -> Tensor:
        """Return the adjoint of extending, of what a transform gives."""
        if self.boundary == "circular":
            return out
        (ky, kx), (my, mx) = self._sizes, self.range.shape[-2:]
        return convolve.fold(out[..., : my + ky - 1, : mx + kx - 1], self._sizes, self.boundary)

    def prox(self, z: Tensor, y: Tensor, rho: Tensor) -> Tensor:
        """Return ``argmin_x ||A x - y||^2 + rho ||x - z||^2``, ``(B, *domain)``; ``rho`` is ``(B,)``.

        For periodic images ``F^-1 (z + conj(h) (y - h z) / (|h|^2 + rho))`` on spectra: three FFTs.
        """
        if self.boundary != "circular":
            return super().prox(z, y, rho)
        self.domain.check(z, f"Centre z of the prox of {self.name}")
        self.range.check(y, f"Data y of the prox of {self.name}")
        z, y = self._enter(z, self.domain), self._enter(y, self.range)
        if not z.numel():
            return z
        h = self._over_channels(self._derived(_kept)[0])
        power, seen = h.abs().square(), h != 0
        weights = per_row(torch.as_tensor(rho).expand(len(z)), z)
        complex_, size = z.is_complex(), self.lengths
        forward, back = (torch.fft.fft2, torch.fft.ifft2) if complex_ else (torch.fft.rfft2, torch.fft.irfft2)

        def solve(z: Tensor, y: Tensor, rho: Tensor, h: Tensor, power: Tensor, seen: Tensor) -> Tensor:
            k = forward(z)
            gain = over(
                h.conj(), (power + rho).to(h.dtype), seen.expand(torch.broadcast_shapes(h.shape, rho.shape))
            )
            return back(k + (forward(y) - h * k) * gain, s=size)

        return convolve.in_blocks(solve, (z, y, weights), (h, power, seen))

    def svd(self) -> SVD:
        """Return the decomposition, in centred frequencies of the shape of the domain for periodic images."""
        if "svd" not in self.capabilities:
            return super().svd()
        if self.boundary != "circular":
            return separable.separable_svd(self._derived(_factors), self.domain.shape)
        s, phase = (self._over_channels(v) for v in self._derived(_polar))
        seen = s > 0
        forward, back = (centred_fft, centred_ifft) if self.domain.is_complex else (hartley, hartley)
        return SVD(
            s=s.expand(s.shape[0], *self.domain.shape),
            vh=forward,
            v=back,
            uh=lambda y: forward(self._filter(y, phase.conj())) * seen,
            u=lambda c: self._filter(back(c * seen), phase),
        )


class GaussianBlur(Blur):
    """Blur by a Gaussian of unit sum: for periodic images summed over their periods, else cut off at 6 std.

    Args:
        std: Standard deviation in pixels, one number or ``(std_y, std_x)``.
        shape: Shape ``(channel, y, x)`` (or ``(y, x)``) of one image, or its whole Space.
        boundary: "circular", "reflect", "zero" or "valid"; see `Blur`.
        method: "auto", "fft", "separable" or "direct".
        dtype: Precision, and real or complex; that of the Space, or float32.
        units: Units of the image.
        spacing: Distance between neighbours, per named dimension.

    Raises:
        InvdiffError: If a standard deviation is not positive and finite, or 6 of them do not fit the image.
    """

    def __init__(
        self,
        std: float | Sequence[float],
        shape: Space | Sequence[int],
        *,
        boundary: str = "circular",
        method: str = "auto",
        dtype: torch.dtype | None = None,
        units: str | None = None,
        spacing: Mapping[str, float] | None = None,
    ) -> None:
        space = as_space(shape, dtype, units, spacing)
        stds = as_parameter(std, "The blur's standard deviation").flatten().tolist()
        stds = stds * 2 if len(stds) == 1 else stds
        if len(stds) != 2 or not all(math.isfinite(v) and v > 0 for v in stds):
            raise InvdiffError(
                f"The blur's standard deviation must be one or two positive numbers, got {std!r:.60}."
            )
        if len(space.shape) < 2:
            raise InvdiffError(f"A blur needs images of at least two axes (y, x), got shape {space.shape}.")
        if boundary == "circular":
            ky, kx = (_periodic_gaussian(v, n) for v, n in zip(stds, space.shape[-2:]))
        else:
            ky, kx = (_cut_gaussian(v) for v in stds)
        super().__init__(ky[:, None] * kx, space, boundary=boundary, method=method)


def as_kernels(kernel: Any, space: Space) -> Tensor:
    """Return kernels ``(1 or N, ky, kx)`` for images of ``space``, refusing what is none."""
    if len(space.shape) < 2:
        raise InvdiffError(f"A blur needs images of at least two axes (y, x), got shape {space.shape}.")
    values = as_parameter(kernel, "The blur kernel")
    if values.is_complex() or values.ndim not in (2, 3) or not values.numel():
        raise InvdiffError(
            f"The blur kernel has shape {tuple(values.shape)} and dtype {values.dtype}, "
            "expected real (ky, kx) or (cases, ky, kx)."
        )
    if any(k > n for k, n in zip(values.shape[-2:], space.shape[-2:])):
        raise InvdiffError(
            f"The blur kernel {tuple(values.shape[-2:])} is larger than the image {space.shape[-2:]}."
        )
    values = values if values.ndim == 3 else values[None]
    if bool((values == 0).flatten(1).all(1).any()):
        raise InvdiffError("The blur kernel is zero everywhere; give one with a non-zero value.")
    return values.to(space.real_dtype)


def require(what: str, value: str, known: Sequence[str]) -> str:
    """Return ``value`` if it is one of the known names."""
    if value not in known:
        raise InvdiffError(f"The {what} is one of {', '.join(map(repr, known))}, got {value!r:.60}.")
    return value


def _periodic_gaussian(std: float, n: int) -> Tensor:
    """Return a Gaussian on ``n`` pixels, origin at ``n // 2``, summed over its periods, of unit sum."""
    periods = torch.arange(-math.ceil(9 * std / n) - 1, math.ceil(9 * std / n) + 2, dtype=torch.float64)
    offset = torch.arange(n, dtype=torch.float64) - n // 2
    values = torch.exp(-0.5 * ((offset[:, None] + n * periods) / std) ** 2).sum(1)
    return values / values.sum()


def _cut_gaussian(std: float) -> Tensor:
    reach = math.ceil(_REACH * std)
    values = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, dtype=torch.float64) / std) ** 2)
    return values / values.sum()


def embed(operator: Blur) -> Tensor:
    """Return the kernels in double precision on the grid of the transform, their first element at (0, 0)."""
    kernel = operator.kernel.double()
    grid = kernel.new_zeros(kernel.shape[0], *operator.lengths)
    ky, kx = kernel.shape[-2:]
    grid[:, :ky, :kx] = kernel
    # Of a periodic image the origin comes first instead; extended ones are cut to what is valid.
    return grid.roll((-(ky // 2), -(kx // 2)), AXES) if operator.boundary == "circular" else grid


def _transfer(operator: Blur) -> tuple[Tensor]:
    """Return the transfer function, half of it for real images, ``(1 or N, y, x or x // 2 + 1)``."""
    transform = torch.fft.fft2 if operator.domain.is_complex else torch.fft.rfft2
    return (transform(embed(operator)).to(operator.domain.real_dtype.to_complex()),)


def _power(operator: Blur) -> tuple[Tensor]:
    return (operator._derived(_transfer)[0].abs().square(),)


def _kept(operator: Blur) -> tuple[Tensor]:
    """Return the transfer function without what is lost to rounding, as `_polar` counts it."""
    (h,) = operator._derived(_transfer)
    size = round(math.prod(operator.domain.shape[-2:]) ** 0.5)
    return (torch.where(cut_small(h.abs(), size) > 0, h, torch.zeros_like(h)),)


def _polar(operator: Blur) -> tuple[Tensor, Tensor]:
    """Return ``|h|`` in centred order, and the phase factor of the transfer function as ``_filter`` takes it."""
    (h,) = operator._derived(_transfer)
    size = math.prod(operator.domain.shape[-2:])
    full = torch.fft.fft2(embed(operator)).abs().to(operator.domain.real_dtype)
    phase = torch.where(h.abs() > 0, torch.sgn(h), torch.ones_like(h))
    return torch.fft.fftshift(cut_small(full, round(size**0.5)), AXES), phase


def _matrices(operator: Blur) -> tuple[Tensor, Tensor]:
    """Return the matrices along y and x of a kernel that is an outer product, each ``(N, m, n)``."""
    u, s, vh = torch.linalg.svd(operator.kernel.double(), full_matrices=False)
    root = s[:, :1].sqrt()
    factors = (u[:, :, 0] * root, vh[:, 0] * root)
    ny, nx = operator.domain.shape[-2:]
    ty, tx = (convolve.banded(k, n, operator.boundary) for k, n in zip(factors, (ny, nx)))
    return ty.to(operator.kernel.dtype), tx.to(operator.kernel.dtype)


@lru_cache(maxsize=64)
def _blocks(size: int, n: int, boundary: str) -> tuple[separable.Blocks, separable.Blocks]:
    """Return the blocks of the matrix of an axis for kernels of ``size``, and of its transpose."""
    pattern = convolve.banded(torch.ones(1, size), n, boundary)[0]
    return separable.split(pattern), separable.split(pattern.mT)


def _factors(operator: Blur) -> tuple[Tensor, ...]:
    ty, tx = operator._derived(_matrices)
    return separable.decompose(ty, tx, operator.kernel.dtype)
