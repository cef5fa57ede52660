"""Gaussian conditioning in whitened coordinates: what exact posteriors are computed with.

In prior coordinates ``u = m + R w`` with ``R R^T = C`` and ``w ~ N(0, I)``; the data, divided by their noise
level, are ``r = B w + eps`` with ``B = W A R``. Then ``w | r ~ N(P^-1 B^T r, P^-1)`` with ``P = I + B^T B``.
A `Factor` solves with ``P``: by Cholesky in the smaller of data and unknowns (Woodbury), in closed form where
``P`` is a Fourier filter, or by conjugate gradients where it is too large.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from invdiff.codec import AffineCodec, Scale
from invdiff.errors import InvdiffError
from invdiff.operator import LinearOperator
from invdiff.priors.covariance import Circulant, Covariance
from invdiff.rng import Streams
from invdiff.spaces import Space

#: Largest matrix that is factorised.
DENSE_LIMIT = 4200
#: Largest dense map from unknowns to data, in numbers.
DENSE_NUMBERS = 60_000_000
#: Draws that estimate a standard deviation where nothing better is possible.
STD_DRAWS = 512
_BLOCK = 256


def stack_real(x: Tensor) -> Tensor:
    """Flatten rows to real vectors, real and imaginary parts interleaved, ``(B, real_size)``."""
    return (torch.view_as_real(x.resolve_conj()) if x.is_complex() else x).flatten(1)


def unstack_real(v: Tensor, space: Space) -> Tensor:
    """Undo `stack_real` for elements of ``space``."""
    if space.is_complex:
        return torch.view_as_complex(v.reshape(v.shape[0], *space.shape, 2).contiguous())
    return v.reshape(v.shape[0], *space.shape)


def in_blocks(function: Callable[[Tensor], Tensor], n: int, like: Tensor) -> Tensor:
    """Apply ``function`` to the rows of the ``n x n`` identity, a block at a time."""
    out = []
    for start in range(0, n, _BLOCK):
        rows = min(_BLOCK, n - start)
        eye = torch.zeros(rows, n, dtype=torch.float64, device=like.device)
        eye[torch.arange(rows), start + torch.arange(rows)] = 1
        out.append(function(eye))
    return torch.cat(out)


class Measurement:
    """A linear operator with its noise divided out, on real vectors: ``r = (A x) / sigma`` where data are seen.

    Data elements that do not depend on ``x`` (unsampled positions) are left out.

    Args:
        operator: Linear operator for one case.
        sigma: Noise level per real component, broadcasting over ``(1, *range)``.
    """

    def __init__(self, operator: LinearOperator, sigma: Tensor) -> None:
        self.operator, self.domain, self.range = operator, operator.domain, operator.range
        levels = sigma.to(torch.float64).expand(1, *self.range.shape)
        self.uniform = bool((levels == levels.flatten()[0]).all())
        if float(levels.min()) <= 0:
            raise InvdiffError("An exact posterior needs a noise level sigma above 0 everywhere.")
        self.levels = stack_real(torch.complex(levels, levels) if self.range.is_complex else levels)[0]
        probe = self.domain.with_precision(torch.float64).randn(2, seed=1, device=levels.device)
        self.active = (stack_real(operator(probe)) != 0).any(0).nonzero()[:, 0]
        self.levels = self.levels[self.active]
        self.n, self.m = self.domain.real_size, self.active.numel()

    def data(self, y: Tensor) -> Tensor:
        """Return the seen data over their noise, ``(B, *range) -> (B, m)``."""
        return stack_real(y).to(torch.float64)[:, self.active] / self.levels

    def forward(self, x: Tensor) -> Tensor:
        """``(B, n) -> (B, m)``."""
        return self.data(self.operator(unstack_real(x, self.domain)))

    def adjoint(self, r: Tensor) -> Tensor:
        """``(B, m) -> (B, n)``."""
        full = torch.zeros(r.shape[0], self.range.real_size, dtype=torch.float64, device=r.device)
        full[:, self.active] = r / self.levels
        return stack_real(self.operator.adjoint(unstack_real(full, self.range))).to(torch.float64)


class Frame:
    """White coordinates of one case and one Gaussian component.

    Args:
        measurement: In prior coordinates (real).
        covariance: Of the component.
        codec: Affine, for one case.
    """

    def __init__(self, measurement: Measurement, covariance: Covariance, codec: AffineCodec) -> None:
        self.measurement, self.covariance, self.codec = measurement, covariance, codec
        self.n, self.m = measurement.n, measurement.m
        self.image_size = codec.image.real_size

    def root(self, w: Tensor) -> Tensor:
        """Return ``R w``, ``(B, n)``."""
        return self.covariance.root(w.reshape(-1, *self.covariance.shape)).flatten(1)

    def forward(self, w: Tensor) -> Tensor:
        """Return ``B w``, ``(B, m)``."""
        return self.measurement.forward(self.root(w))

    def back(self, r: Tensor) -> Tensor:
        """Return ``B^T r``, ``(B, n)``."""
        return self.root(self.measurement.adjoint(r))

    def to_image(self, w: Tensor) -> Tensor:
        """Return ``L R w`` as real vectors, ``(B, n) -> (B, image_size)``."""
        return stack_real(self.codec.linear(self.root(w).reshape(-1, *self.covariance.shape))).to(torch.float64)

    def from_image(self, v: Tensor) -> Tensor:
        """Return ``R^T L^T v``, ``(B, image_size) -> (B, n)``."""
        return self.root(self.codec.linear_adjoint(unstack_real(v, self.codec.image)).flatten(1).to(torch.float64))

    def prior_variance(self) -> Tensor:
        """Diagonal of ``L C L^T``, ``(image_size,)``."""
        if isinstance(self.codec, Scale):
            return self.codec.gain.reshape(-1)[0] ** 2 * self.covariance.variances().flatten()
        like = self.covariance.eigenvalues
        return in_blocks(lambda e: (self.from_image(e) ** 2).sum(1), self.image_size, like)


class Factor(ABC):
    """Solves with ``P = I + B^T B`` and draws from ``N(0, P^-1)``."""

    frame: Frame
    #: ``log det P``, None where it is out of reach.
    logdet: float | None
    #: Relative standard error of `variance` (0 where exact).
    variance_error: float = 0.0

    @abstractmethod
    def solve(self, v: Tensor) -> Tensor:
        """Return ``P^-1 v``, ``(B, n)``."""

    @abstractmethod
    def deviations(self, like: Tensor, rng: Streams) -> Tensor:
        """Return draws from ``N(0, P^-1)`` shaped as ``like`` ``(B, n)``, row ``r`` from stream ``r``."""

    @abstractmethod
    def variance(self) -> Tensor:
        """Diagonal of the posterior covariance in image space, ``(image_size,)``."""

    def mean(self, r: Tensor) -> Tensor:
        """Return ``P^-1 B^T r``, ``(B, m) -> (B, n)``."""
        return self.solve(self.frame.back(r))

    def covariance(self) -> Tensor:
        """Posterior covariance in image space (real components), ``(image_size, image_size)``."""
        size = self.frame.image_size
        if size > DENSE_LIMIT:
            raise InvdiffError(
                f"A dense posterior covariance of {size} unknowns is too large (at most {DENSE_LIMIT}); "
                "use std(), or directions of your own."
            )
        out = in_blocks(
            lambda e: self.frame.to_image(self.solve(self.frame.from_image(e))),
            size,
            self.frame.covariance.eigenvalues,
        )
        return 0.5 * (out + out.T)


class DataFactor(Factor):
    """Woodbury with ``S = I + B B^T`` of the size of the data: ``P^-1 = I - B^T S^-1 B``."""

    def __init__(self, frame: Frame) -> None:
        self.frame = frame
        self.b = in_blocks(frame.back, frame.m, frame.covariance.eigenvalues)
        s = self.b @ self.b.T
        s.diagonal().add_(1)
        self.l = torch.linalg.cholesky(s)
        self.logdet = 2 * float(self.l.diagonal().log().sum())

    def solve(self, v: Tensor) -> Tensor:
        """Return ``v - B^T S^-1 B v``."""
        return v - self.mean(v @ self.b.T)

    def mean(self, r: Tensor) -> Tensor:
        """Return ``B^T S^-1 r``."""
        return torch.cholesky_solve(r.T, self.l).T @ self.b

    def deviations(self, like: Tensor, rng: Streams) -> Tensor:
        """Return ``w - B^T S^-1 (B w + eps)`` for prior draws ``w`` and noise ``eps`` (Matheron's rule)."""
        w = rng.normal(like)
        eps = rng.normal(like.new_empty(like.shape[0], self.frame.m))
        return w - self.mean(w @ self.b.T + eps)

    def variance(self) -> Tensor:
        """Diagonal of ``Z Z^T - Z B^T S^-1 B Z^T`` with ``Z = L R``."""
        t = torch.linalg.solve_triangular(self.l, self.frame.to_image(self.b), upper=False)
        return (self.frame.prior_variance() - (t * t).sum(0)).clamp_min(0)


class PrecisionFactor(Factor):
    """Cholesky of ``P`` itself, of the size of the unknowns."""

    def __init__(self, frame: Frame) -> None:
        self.frame = frame
        p = in_blocks(lambda e: frame.back(frame.forward(e)), frame.n, frame.covariance.eigenvalues)
        p = 0.5 * (p + p.T)
        p.diagonal().add_(1)
        self.l = torch.linalg.cholesky(p)
        self.logdet = 2 * float(self.l.diagonal().log().sum())

    def solve(self, v: Tensor) -> Tensor:
        """Return ``L^-T L^-1 v``."""
        return torch.cholesky_solve(v.T, self.l).T

    def deviations(self, like: Tensor, rng: Streams) -> Tensor:
        """Return ``L^-T eps``."""
        eps = rng.normal(like)
        return torch.linalg.solve_triangular(self.l.T, eps.T, upper=True).T

    def variance(self) -> Tensor:
        """Diagonal of ``Z P^-1 Z^T``."""
        z = in_blocks(self.frame.to_image, self.frame.n, self.l)
        t = torch.linalg.solve_triangular(self.l, z, upper=False)
        return (t * t).sum(0)


class FilterFactor(Factor):
    """``P`` is a Fourier filter: stationary prior, uniform noise, ``A^T A`` circulant. Exact at any size."""

    def __init__(self, frame: Frame, normal: Tensor) -> None:
        assert isinstance(frame.covariance, Circulant)
        self.frame, self.circulant = frame, frame.covariance
        self.p = 1 + self.circulant.eigenvalues * normal
        self.logdet = float(self.p.log().sum())

    def _filter(self, v: Tensor, weights: Tensor) -> Tensor:
        return self.circulant.filter(v.reshape(-1, *self.circulant.shape), weights).flatten(1)

    def solve(self, v: Tensor) -> Tensor:
        """Divide every mode."""
        return self._filter(v, 1 / self.p)

    def deviations(self, like: Tensor, rng: Streams) -> Tensor:
        """Return ``P^(-1/2) eps``."""
        return self._filter(rng.normal(like), self.p.rsqrt())

    def variance(self) -> Tensor:
        """The posterior field is stationary: its pixel variance is the mean of its spectrum."""
        per_channel = (self.circulant.eigenvalues / self.p).flatten(1).mean(1, keepdim=True)
        gain2 = self.frame.codec.gain.reshape(-1)[0] ** 2
        return gain2 * per_channel.expand(-1, self.frame.n // self.circulant.shape[0]).flatten()


class IterativeFactor(Factor):
    """Conjugate gradients; draws by perturbing the right-hand side, the standard deviation from draws.

    Source: Papandreou and Yuille, "Gaussian sampling by local perturbations", NeurIPS 2010.
    """

    logdet = None
    variance_error = (2 * STD_DRAWS) ** -0.5

    def __init__(self, frame: Frame, rtol: float = 1e-9, max_iter: int = 2000) -> None:
        self.frame, self.rtol, self.max_iter = frame, rtol, max_iter

    def solve(self, v: Tensor) -> Tensor:
        """Return ``P^-1 v`` to a relative residual of 1e-9 per row.

        Raises:
            InvdiffError: If the iterations do not converge.
        """
        x, r = torch.zeros_like(v), v
        p, rr = r, (r * r).sum(1, keepdim=True)
        goal = self.rtol**2 * rr
        for _ in range(self.max_iter):
            if bool((rr <= goal).all()):
                return x
            ap = p + self.frame.back(self.frame.forward(p))
            live = (rr > goal).to(v.dtype)
            alpha = live * rr / (p * ap).sum(1, keepdim=True).clamp_min(torch.finfo(v.dtype).tiny)
            x, r = x + alpha * p, r - alpha * ap
            new = (r * r).sum(1, keepdim=True)
            p = r + live * (new / rr.clamp_min(torch.finfo(v.dtype).tiny)) * p
            rr = torch.where(live > 0, new, rr)
        raise InvdiffError(
            f"The exact posterior mean did not converge in {self.max_iter} iterations; "
            "use a smaller problem or a larger noise level."
        )

    def deviations(self, like: Tensor, rng: Streams) -> Tensor:
        """Return ``P^-1 (eps_0 + B^T eps_1)``, whose covariance is ``P^-1``."""
        eps = rng.normal(like)
        return self.solve(eps + self.frame.back(rng.normal(like.new_empty(like.shape[0], self.frame.m))))

    def variance(self) -> Tensor:
        """Mean square of 512 exact deviations: a relative standard error of 3 % in the standard deviation."""
        rng = Streams(0, [(0, i) for i in range(STD_DRAWS)])
        like = torch.empty(STD_DRAWS, self.frame.n, dtype=torch.float64)
        return (self.frame.to_image(self.deviations(like, rng)) ** 2).mean(0)


def factorise(frame: Frame) -> Factor:
    """Return the cheapest exact way to solve with ``P``."""
    normal = normal_spectrum(frame)
    if normal is not None:
        return FilterFactor(frame, normal)
    if frame.m <= frame.n and frame.m <= DENSE_LIMIT and frame.m * frame.n <= DENSE_NUMBERS:
        return DataFactor(frame)
    if frame.n <= DENSE_LIMIT:
        return PrecisionFactor(frame)
    return IterativeFactor(frame)


def normal_spectrum(frame: Frame) -> Tensor | None:
    """Eigenvalues of ``A^T A / sigma^2`` on the FFT grid where it is circulant like the prior, else None.

    Found from one impulse response and checked on random fields: a map that is no filter fails the check with
    probability one.
    """
    cov, a = frame.covariance, frame.measurement
    if not isinstance(cov, Circulant) or not a.uniform or not isinstance(frame.codec, Scale):
        return None
    probe = torch.zeros(1, frame.n, dtype=torch.float64, device=cov.spectrum.device)
    probe[0, 0] = 1
    axes = tuple(range(1 - len(cov.shape), 0))
    response = a.adjoint(a.forward(probe)).reshape(cov.shape)
    spectrum = torch.fft.fftn(response[0], dim=axes).real.clamp_min(0)
    x = Space(cov.shape, torch.float64).randn(2, seed=2, device=probe.device)
    want = a.adjoint(a.forward(x.flatten(1)))
    have = cov.filter(x, spectrum).flatten(1)
    if float((have - want).abs().max()) > 1e-9 * float(want.abs().max().clamp_min(1e-300)):
        return None
    return spectrum
