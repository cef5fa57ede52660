"""Cartesian parallel MRI: coil maps, centred FFT, k-space mask.

On a GPU ``normal`` moves the data of all coils 14 times through memory, in reads and writes: 1 for ``S_c x``, 4
for each FFT, 2 for the mask, 2 for ``conj(S_c)`` and 1 for the sum. A kernel of our own could fuse the last two
and save 2 of the 14, because cuFFT is closed to what comes before and after it; that is not worth one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from invdiff.operator import SVD, apply_linear
from invdiff.operators._coils import as_coil_maps, as_kspace_mask
from invdiff.operators._fft import AXES, fft2, ifft2, phases
from invdiff.operators._readout import ReadoutBlocks
from invdiff.operators._spectral import CLOSED_FORMS, SpectralOperator
from invdiff.spaces import Space


class MultiCoilMRI(SpectralOperator):
    """``A x = m F (S_c x)`` for coils ``c``: centred orthonormal FFT over (y, x), mask ``m`` in {0, 1}.

    ``(B, 1, y, x)`` complex to ``(B, coil, ky, kx)`` complex; the zero frequency stands at index ``N // 2``.
    ``normal`` is two bare batched FFTs and multiplications, because the centring cancels around the mask.

    Closed forms, declared per instance in ``capabilities``:

    * one coil whose map has unit modulus: all of them, as ``F S`` is unitary;
    * a mask that is constant along ky or along kx (every fully sampled readout): ``prox`` and
      ``conditional``. The FFT cancels along that axis and leaves one Hermitian matrix per readout position,
      eigendecomposed once, on first use, for any ``rho``. It is not declared where the factors of all cases
      would take more than ``max_factor_bytes``.

    Args:
        mask: Zeros and ones in centred order, ``(ky, kx)``, or ``(N, ky, kx)`` with one mask per case.
        coil_maps: Coil sensitivities ``(coil, y, x)``, or ``(N, coil, y, x)`` for one set per case; real
            maps are promoted. Their precision is that of the operator.
        units: Units of the image.
        spacing: Distance between neighbours, per named dimension.

    Raises:
        InvdiffError: If ranks or sizes do not fit each other, the mask holds other values than 0 and 1 or
            samples nothing, or the maps hold NaN or infinity or are zero everywhere.
    """

    provides: ClassVar[frozenset[str]] = frozenset({"linear", "vjp", "normal"})
    _per_case = ("mask", "coil_maps")
    #: Largest size of the readout factors for which ``prox`` is declared.
    max_factor_bytes: ClassVar[int] = 2 << 30

    def __init__(
        self,
        mask: Any,
        coil_maps: Any,
        *,
        units: str = "1",
        spacing: Mapping[str, float] | None = None,
    ) -> None:
        self.coil_maps = as_coil_maps(coil_maps, ("y", "x"))
        coils, *image = self.coil_maps.shape[1:]
        dtype = self.coil_maps.dtype
        self.domain = Space((1, *image), dtype, units=units, spacing=spacing or {})
        self.range = Space((coils, *image), dtype, ("coil", "ky", "kx"), units)
        # (1 or N, 1, ky, kx), so that it broadcasts over coils
        self.mask = as_kspace_mask(mask, image, ("ky", "kx"), self.domain.real_dtype)
        super().__init__()
        self._unitary = coils == 1 and bool(((self.coil_maps.abs() - 1).abs() < _UNIT[dtype]).all())
        # image axes (-1 or -2) along which every mask is constant: of whole lines, and with factors that fit
        constant = [a for a in (-1, -2) if bool((self.mask == self.mask.narrow(a, 0, 1)).all())]
        self._lines = constant[0] if constant else None
        self._readout = None if self._unitary else next(filter(self._factors_fit, constant), None)

    def _factors_fit(self, axis: int) -> bool:
        ny, nx = self.domain.shape[1:]
        factors = (self.n_cases or 1) * ny * nx * (ny if axis == -1 else nx)
        return factors * self.domain.dtype.itemsize <= self.max_factor_bytes

    @property
    def capabilities(self) -> frozenset[str]:
        """What this mask and these maps allow in closed form."""
        if self._unitary:
            return self.provides | CLOSED_FORMS
        return self.provides | ({"prox", "conditional"} if self._readout else frozenset())

    @property
    def support(self) -> Tensor:
        """The mask: data exist where it is 1."""
        return self.mask

    def _forward(self, x: Tensor) -> Tensor:
        before, weights, _, _ = self._derived(_factors)
        x = self._enter(x, self.domain)
        return self._in_blocks(_fused_forward, x, self.range, before, self.coil_maps, weights)

    def _adjoint(self, y: Tensor) -> Tensor:
        before, weights, _, conj_maps = self._derived(_factors)
        y = self._enter(y, self.range)
        return self._in_blocks(_fused_adjoint, y, self.domain, weights.conj(), conj_maps, before.conj())

    def _in_blocks(self, work: Callable[..., Tensor], x: Tensor, to: Space, *parameters: Tensor) -> Tensor:
        """Do a few rows at a time on a CPU, with what they have of parameters of one or of all rows."""
        step = len(x) if x.is_cuda else max(1, _BLOCK // self.range.size)
        if not len(x):  # MKL refuses transforms of nothing
            return x.new_zeros(0, *to.shape)
        if len(x) <= step:
            return work(x, *parameters)
        out = x.new_empty(len(x), *to.shape)
        for i in range(0, len(x), step):
            b = slice(i, i + step)
            work(x[b], *(p if len(p) == 1 else p[b] for p in parameters), out=out[b])
        return out

    def normal(self, x: Tensor) -> Tensor:
        """Return ``sum_c conj(S_c) F^H m F S_c x`` by one pair of bare FFTs, ``(B, 1, y, x)``."""
        self.domain.check(x, f"Input of the normal operator of {self.name}")
        return apply_linear(x, self._normal, self._normal)

    def _normal(self, x: Tensor) -> Tensor:
        x = self._enter(x, self.domain)
        if self._lines is not None and not x.is_cuda:
            work = functools.partial(_lines_normal, self._lines == -1)
            return self._in_blocks(work, x, self.domain, *self._derived(_line_factors))
        _, _, bare, conj_maps = self._derived(_factors)
        return self._in_blocks(_fused_normal, x, self.domain, self.coil_maps, bare, conj_maps)

    def svd(self) -> SVD:
        """Return ``V^H = F S`` with the mask as singular values, for one coil of unit modulus."""
        if not self._unitary:
            return super().svd()
        before, _, _, conj_maps = self._derived(_factors)
        after = self._derived(_output_phase)[0]

        def keep(c: Tensor) -> Tensor:
            return c * self.mask

        def v(c: Tensor) -> Tensor:
            return ifft2(c * after.conj(), norm="ortho") * conj_maps * before.conj()

        def vh(x: Tensor) -> Tensor:
            return fft2(x * before * self.coil_maps, norm="ortho") * after

        s = self.mask.expand(self.mask.shape[0], *self.domain.shape)
        return SVD(s, vh=vh, v=v, uh=keep, u=keep)

    def prox(self, z: Tensor, y: Tensor, rho: Tensor) -> Tensor:
        """Return ``argmin_x ||A x - y||^2 + rho ||x - z||^2``, ``(B, 1, y, x)``; ``rho`` is ``(B,)``."""
        blocks = self._blocks()
        if blocks is None:
            return super().prox(z, y, rho)
        self.domain.check(z, f"Centre z of the prox of {self.name}")
        return blocks.prox(self._enter(z, self.domain), self._memo.last(y, self._seen), rho)

    def conditional(self, z: Tensor, y: Tensor, sigma: Tensor, tau: Tensor, noise: Tensor) -> Tensor:
        """Return an exact draw of ``x`` given ``y = A x + sigma n`` and ``x ~ N(z, tau^2 I)``."""
        blocks = self._blocks()
        if blocks is None:
            return super().conditional(z, y, sigma, tau, noise)
        for what, value in (("Prior mean z", z), ("Noise", noise)):
            self.domain.check(value, f"{what} of the conditional draw of {self.name}")
        z, noise = self._enter(z, self.domain), self._enter(noise, self.domain)
        return blocks.conditional(z, self._memo.last(y, self._seen), sigma, tau, noise)

    def _seen(self, y: Tensor) -> Tensor:
        """Return ``V^H A^H y``."""
        blocks = self._blocks()
        assert blocks is not None
        return blocks.analyse(self.adjoint(y))

    def _blocks(self) -> ReadoutBlocks | None:
        """Return the factors by readout position, shared with the operator that ``rows`` was called on."""
        if self._readout is None:
            return None
        (values, vectors), index = self._memo.lookup(self, _readout_factors)
        return ReadoutBlocks(values, vectors, index, self._readout)


#: Elements of k-space that one pass on a CPU may hold: larger temporaries leave the caches and are mapped anew
#: by the allocator at every call (measured: 1.5 times slower at 4 rows of 16 x 320 x 320).
_BLOCK = 1 << 20

#: The same for one-dimensional transforms, which stay in the nearest caches.
_LINES = 1 << 18

#: How far a map may be from unit modulus and still count as unitary.
_UNIT = {torch.complex64: 1e-6, torch.complex128: 1e-14}


def _fused_forward(x: Tensor, before: Tensor, maps: Tensor, weights: Tensor, out: Tensor | None = None) -> Tensor:
    return torch.mul(fft2(x * before * maps), weights, out=out)


def _fused_adjoint(
    y: Tensor, weights: Tensor, conj_maps: Tensor, after: Tensor, out: Tensor | None = None
) -> Tensor:
    coils = ifft2(y * weights, norm="forward").mul_(conj_maps)
    return torch.mul(coils.sum(1, keepdim=True), after, out=out)


def _fused_normal(
    x: Tensor, maps: Tensor, bare_mask: Tensor, conj_maps: Tensor, out: Tensor | None = None
) -> Tensor:
    k = fft2(x * maps).mul_(bare_mask)
    return torch.sum(ifft2(k, norm="forward").mul_(conj_maps), 1, keepdim=True, out=out)


def _lines_normal(
    turned: bool, x: Tensor, maps: Tensor, line_mask: Tensor, conj_maps: Tensor, out: Tensor | None = None
) -> Tensor:
    """The normal operator of whole lines: along them the FFT cancels, and what is left is one-dimensional.

    The maps lie with the other axis innermost, ``turned`` where that is y: strided transforms take 1.6 times as
    long.
    """
    inner = x.mT.contiguous() if turned else x
    total = torch.zeros_like(inner)
    step = max(1, _LINES // x.numel())
    for c in range(0, maps.shape[1], step):
        k = torch.fft.fft(inner * maps[:, c : c + step]).mul_(line_mask)
        total += torch.fft.ifft(k, norm="forward").mul_(conj_maps[:, c : c + step]).sum(1, keepdim=True)
    total = total.mT if turned else total
    return total.contiguous() if out is None else out.copy_(total)


def _line_factors(operator: MultiCoilMRI) -> tuple[Tensor, Tensor, Tensor]:
    """Return maps, mask and conjugate maps with the axis of the one-dimensional FFT innermost.

    The mask is in the order of a bare FFT and carries its scaling.
    """
    mask, maps = operator.mask, operator.coil_maps
    if operator._lines == -1:
        mask, maps = mask.mT, maps.mT.contiguous()
    line = torch.fft.ifftshift(mask[..., :1, :], -1) / mask.shape[-1]
    return maps, line, maps.conj().resolve_conj()


def _factors(operator: MultiCoilMRI) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return input phase, mask times output phase, mask in the order of a bare FFT, conjugate maps.

    The masks carry the scaling of the FFTs that follow or precede them, which would be a pass of its own on a GPU.
    """
    ny, nx = operator.domain.shape[1:]
    before, after = phases((ny, nx), operator.domain.dtype, operator.mask.device)
    bare = torch.fft.ifftshift(operator.mask, AXES) / (ny * nx)
    return (
        before[None, None],
        operator.mask * (after / (ny * nx) ** 0.5),
        bare,
        operator.coil_maps.conj().resolve_conj(),
    )


def _output_phase(operator: MultiCoilMRI) -> tuple[Tensor]:
    ny, nx = operator.domain.shape[1:]
    return (phases((ny, nx), operator.domain.dtype, operator.mask.device)[1][None, None],)


def _readout_factors(operator: MultiCoilMRI) -> tuple[Tensor, Tensor]:
    assert operator._readout is not None
    return ReadoutBlocks.factor(operator.mask, operator.coil_maps, operator._readout)
