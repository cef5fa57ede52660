"""Priors of functions: networks that were trained with coloured noise, in coordinates where it is white.

With noise of covariance ``C = L L^H`` the network knows ``D_C(x, s) = E[x0 | x0 + s L eps = x]``. In coordinates
``u``, ``x = L u``, the noise is white and

    D(u, s) = L^-1 D_C(L u, s),

so that every sampler serves it, and a linear operator ``A`` stays one, ``A L``. The posterior does not depend on
the choice of the root.

Source: Lim et al., "Score-based diffusion models in function space", JMLR 2025, arXiv:2302.07400.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from invdiff.codec import Codec
from invdiff.errors import InvdiffError
from invdiff.operator import LinearOperator
from invdiff.prior import Denoiser, Prior
from invdiff.spaces import Space
from invdiff.tensors import move

__all__ = ["Coloured", "StationaryRoot"]


class StationaryRoot(LinearOperator):
    """The symmetric root of a periodic stationary covariance: ``L = F^H diag(sqrt(S)) F``.

    Args:
        space: Real images ``(channel, *grid)``.
        spectrum: Eigenvalues ``S`` of the covariance on the grid of ``torch.fft.fftn``, ``(*grid)``, positive, and
            even as those of a real covariance are.
    """

    provides = frozenset({"linear", "vjp", "normal"})

    def __init__(self, space: Space, spectrum: Tensor) -> None:
        self.domain = self.range = space
        spectrum = torch.as_tensor(spectrum).to(torch.float64)
        if tuple(spectrum.shape) != space.shape[1:] or not bool((spectrum > 0).all()):
            raise InvdiffError(
                f"The spectrum of a covariance on {space} is positive and of shape {space.shape[1:]}, got shape "
                f"{tuple(spectrum.shape)} and a least value of {float(spectrum.min()):.3g}."
            )
        self.root = spectrum.sqrt().to(space.real_dtype)
        super().__init__()

    def _filter(self, x: Tensor, root: Tensor) -> Tensor:
        if not len(x):  # MKL refuses transforms of nothing
            return x
        axes = tuple(range(2, x.ndim))
        return torch.fft.ifftn(torch.fft.fftn(x, dim=axes) * root, dim=axes).real.to(x.dtype)

    def _forward(self, x: Tensor) -> Tensor:
        return self._filter(x, self.root)

    def _adjoint(self, y: Tensor) -> Tensor:
        return self._filter(y, self.root)

    def solve(self, x: Tensor) -> Tensor:
        """Return ``L^-1 x``."""
        return self._filter(x, 1 / self.root)


class ColouredCodec(Codec):
    """``decode(u) = L u``, ``encode(x) = L^-1 x``."""

    is_linear = True

    def __init__(self, root: LinearOperator, solve: Callable[[Tensor], Tensor]) -> None:
        self.root, self.solve = root, solve
        self.prior, self.image = root.domain, root.range

    def decode(self, u: Tensor) -> Tensor:
        """Return ``L u``."""
        return self.root(u.to(self.prior.dtype))

    def encode(self, x: Tensor) -> Tensor:
        """Return ``L^-1 x``."""
        return self.solve(x.to(self.image.dtype))

    def linear_operator(self) -> LinearOperator:
        """Return ``L``."""
        return self.root

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Any:
        """Return a copy on another device or in another precision."""
        root = self.root.to(device, dtype)
        return ColouredCodec(root, _solver(root, self.solve))


class ColouredDenoiser(Denoiser):
    """``D(u, s) = L^-1 D_C(L u, s)``."""

    def __init__(self, base: Denoiser, root: LinearOperator, solve: Callable[[Tensor], Tensor]) -> None:
        self.base, self.root, self.solve = base, root, solve
        self.space, self.channels, self.dtype = root.domain, base.channels, base.dtype
        self.sigma_min, self.sigma_max, self.sigma_data = base.sigma_min, base.sigma_max, base.sigma_data
        self.noise, self.differentiable = "white", base.differentiable

    def __call__(self, x: Tensor, sigma: Tensor, cond: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return ``E[u0 | u]``."""
        image = self.root(x.to(self.root.domain.dtype))
        return self.solve(self.base(image, sigma, cond).to(self.root.range.dtype)).to(x.dtype)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Any:
        """Return a copy on another device or in another precision."""
        new = super().to(device, dtype)
        new.base, new.root = self.base.to(device, dtype), self.root.to(device, dtype)
        new.solve, new.space = _solver(new.root, self.solve), move(self.space, None, dtype)
        return new


def Coloured(prior: Prior, root: LinearOperator, solve: Callable[[Tensor], Tensor] | None = None) -> Prior:
    """Return a prior of functions whose network was trained with noise of covariance ``L L^H``.

    Args:
        prior: The network as it was trained: ``D_C(x, s)`` on images of the root's space, without a codec. Its
            ``sigma_data`` should be the spread of ``L^-1 x``.
        root: ``L``, square; `StationaryRoot` for periodic stationary noise, `operators.Matrix` for any covariance
            of moderate size (by its Cholesky factor).
        solve: ``L^-1``; None takes ``root.solve``, or ``root.pinv`` where the operator has one.

    Raises:
        InvdiffError: If the root is not square, has no inverse at hand, or the prior has a codec already.
    """
    if prior.codec is not None or prior.make_codec is not None:
        raise InvdiffError("Give the network's own prior, without a codec; units are put around the coloured one.")
    if root.domain.shape != root.range.shape:
        raise InvdiffError(f"A root of a covariance is square; this one maps {root.domain} to {root.range}.")
    inverse = _solver(root, solve)
    denoiser = ColouredDenoiser(prior.denoiser, root, inverse)
    card = {**prior.card, "name": f"{prior.name}, coloured noise"}
    return replace(prior, denoiser=denoiser, codec=ColouredCodec(root, inverse), card=card)


def _solver(root: LinearOperator, solve: Callable[[Tensor], Tensor] | None) -> Callable[[Tensor], Tensor]:
    own: Callable[[Tensor], Tensor] | None = getattr(root, "solve", None)
    if own is not None:
        return own
    if solve is not None:
        return solve
    if "pinv" in root.capabilities:
        return root.pinv
    raise InvdiffError(f"{root.name} has no inverse at hand; give solve=, a function that applies it.")
