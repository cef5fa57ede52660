"""Cartesian parallel MRI of volumes: coil maps, centred 3-D FFT, k-space mask."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from invdiff.errors import InvdiffError
from invdiff.operator import apply_linear
from invdiff.operators._coils import as_coil_maps, as_kspace_mask
from invdiff.operators._fft import phases_1d
from invdiff.operators._parameters import ParametricOperator
from invdiff.operators._readout import ReadoutBlocks
from invdiff.spaces import Space

_DIMS = (-3, -2, -1)


class VolumeMRI(ParametricOperator):
    """``A x = m F (S_c x)`` for coils ``c``: centred orthonormal FFT over (z, y, x), mask ``m`` in {0, 1}.

    ``(B, 1, z, y, x)`` complex to ``(B, coil, kz, ky, kx)`` complex; the zero frequency stands at ``N // 2``.
    ``normal`` is two bare FFTs per coil. Where the mask is constant along two of the three axes (lines left out
    along one phase encoding), ``prox`` and ``conditional`` are exact: one small Hermitian matrix per position
    along the other two.

    Args:
        mask: Zeros and ones in centred order, ``(kz, ky, kx)``, or ``(N, kz, ky, kx)`` per case.
        coil_maps: ``(coil, z, y, x)``, or ``(N, coil, z, y, x)`` per case; their precision is the operator's.
        units: Units of the image.
        spacing: Distance between neighbours, per named dimension.

    Raises:
        InvdiffError: If ranks or sizes do not fit, or the mask samples nothing.
    """

    provides: ClassVar[frozenset[str]] = frozenset({"linear", "vjp", "normal"})
    _per_case = ("mask", "coil_maps")
    #: Largest size of the factors for which ``prox`` is declared.
    max_factor_bytes: ClassVar[int] = 2 << 30

    def __init__(
        self,
        mask: Any,
        coil_maps: Any,
        *,
        units: str = "1",
        spacing: Mapping[str, float] | None = None,
    ) -> None:
        self.coil_maps = as_coil_maps(coil_maps, ("z", "y", "x"))
        coils, *image = self.coil_maps.shape[1:]
        dtype = self.coil_maps.dtype
        self.domain = Space((1, *image), dtype, units=units, spacing=spacing or {})
        self.range = Space((coils, *image), dtype, ("coil", "kz", "ky", "kx"), units)
        self.mask = as_kspace_mask(mask, image, ("kz", "ky", "kx"), self.domain.real_dtype)
        super().__init__()
        self._undersampled = self._find_axis()

    def _find_axis(self) -> int | None:
        """Return the only axis that the masks vary along (-3 to -1), if its factors fit."""
        size = (self.n_cases or 1) * self.domain.size * self.domain.dtype.itemsize
        for axis in _DIMS:
            others = self.mask
            for other in _DIMS:
                others = others if other == axis else others.narrow(other, 0, 1)
            fits = size * self.domain.shape[axis] <= self.max_factor_bytes
            if fits and bool((self.mask == others).all()):
                return axis
        return None

    @property
    def capabilities(self) -> frozenset[str]:
        """What the mask allows in closed form."""
        return self.provides | ({"prox", "conditional"} if self._undersampled else frozenset())

    @property
    def support(self) -> Tensor:
        """The mask: data exist where it is 1."""
        return self.mask

    def _forward(self, x: Tensor) -> Tensor:
        before, weights, _, _ = self._derived(_factors)
        return _fft(self._enter(x, self.domain) * before * self.coil_maps, "ortho").mul_(weights)

    def _adjoint(self, y: Tensor) -> Tensor:
        before, weights, _, conj = self._derived(_factors)
        k = _fft(self._enter(y, self.range) * weights.conj(), "ortho", inverse=True)
        return k.mul_(conj).sum(1, keepdim=True).mul_(before.conj())

    def normal(self, x: Tensor) -> Tensor:
        """Return ``sum_c conj(S_c) F^H m F S_c x`` coil by coil, each by one pair of bare FFTs."""
        self.domain.check(x, f"Input of the normal operator of {self.name}")
        return apply_linear(x, self._normal, self._normal)

    def _normal(self, x: Tensor) -> Tensor:
        _, _, bare, conj = self._derived(_factors)
        x = self._enter(x, self.domain)
        out = torch.zeros_like(x)
        for c in range(self.range.shape[0]):  # one coil at a time: a volume of all coils is large
            k = _fft(x * self.coil_maps[:, c : c + 1]).mul_(bare)
            out += _fft(k, inverse=True).mul_(conj[:, c : c + 1])
        return out

    def prox(self, z: Tensor, y: Tensor, rho: Tensor) -> Tensor:
        """Return ``argmin_x ||A x - y||^2 + rho ||x - z||^2``, ``(B, 1, z, y, x)``; ``rho`` is ``(B,)``."""
        if self._undersampled is None:
            return super().prox(z, y, rho)
        self.domain.check(z, f"Centre z of the prox of {self.name}")
        z = self._enter(z, self.domain)
        return self._unfold(self._blocks().prox(self._fold(z), self._memo.last(y, self._seen), rho))

    def conditional(self, z: Tensor, y: Tensor, sigma: Tensor, tau: Tensor, noise: Tensor) -> Tensor:
        """Return an exact draw of ``x`` given ``y = A x + sigma n`` and ``x ~ N(z, tau^2 I)``."""
        if self._undersampled is None:
            raise InvdiffError(f"{self.name} has no closed-form Gaussian draw; solve by conjugate gradients.")
        for what, value in (("Prior mean z", z), ("Noise", noise)):
            self.domain.check(value, f"{what} of the conditional draw of {self.name}")
        z, noise = (self._fold(self._enter(v, self.domain)) for v in (z, noise))
        return self._unfold(self._blocks().conditional(z, self._memo.last(y, self._seen), sigma, tau, noise))

    def _seen(self, y: Tensor) -> Tensor:
        return self._blocks().analyse(self._fold(self.adjoint(y)))

    def _blocks(self) -> ReadoutBlocks:
        (values, vectors), index = self._memo.lookup(self, _block_factors)
        return ReadoutBlocks(values, vectors, index, -1)

    def _fold(self, x: Tensor) -> Tensor:
        """Return ``(..., z, y, x)`` as ``(..., undersampled axis, other two axes)``."""
        assert self._undersampled is not None
        return x.movedim(self._undersampled, -3).flatten(-2)

    def _unfold(self, x: Tensor) -> Tensor:
        assert self._undersampled is not None
        sizes = list(self.domain.shape[1:])
        sizes.pop(self._undersampled)
        return x.unflatten(-1, sizes).movedim(-3, self._undersampled)


def _fft(x: Tensor, norm: str = "backward", inverse: bool = False) -> Tensor:
    if not x.numel():  # some builds of torch refuse no rows
        return x
    return (torch.fft.ifftn if inverse else torch.fft.fftn)(x, dim=_DIMS, norm=norm)


def _factors(operator: VolumeMRI) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return input phase, mask times output phase, mask in the order of a bare FFT, conjugate maps."""
    before = after = torch.ones(1, 1, 1, 1, 1, dtype=torch.complex128)
    for axis, n in zip(_DIMS, operator.domain.shape[1:]):
        into, out = (p.reshape(-1, *[1] * (-1 - axis)) for p in phases_1d(n))
        before, after = before * into, after * out
    like = operator.coil_maps
    bare = torch.fft.ifftshift(operator.mask, _DIMS)
    return before.to(like), operator.mask * after.to(like), bare, like.conj().resolve_conj()


def _block_factors(operator: VolumeMRI) -> tuple[Tensor, Tensor]:
    return ReadoutBlocks.factor(operator._fold(operator.mask), operator._fold(operator.coil_maps), -1)
