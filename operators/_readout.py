"""Exact prox of Cartesian MRI with a fully sampled readout: one small Hermitian matrix per readout position.

With a mask ``m(k)`` that does not depend on the frequency along the readout, the FFT along the readout
cancels in ``A^H A``. What is left at readout position ``r`` couples only the other axis:
``N_r[i, j] = C[i, j] sum_c conj(S_c[i, r]) S_c[j, r]`` with the circulant ``C = F^H diag(m) F``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from invdiff.operators._spectral import cut_small, over
from invdiff.spaces import per_row


@dataclass(frozen=True)
class ReadoutBlocks:
    """Eigendecompositions ``N_r = V diag(values) V^H`` of all cases.

    Args:
        values: ``(N, readout, n)``, zero where below rounding.
        vectors: ``(N, readout, n, n)``, eigenvectors in columns.
        index: Case of every row, or None where row and case agree (or all share one).
        axis: Readout axis of the image, -1 or -2.
    """

    values: Tensor
    vectors: Tensor
    index: Tensor | None
    axis: int

    @staticmethod
    def factor(mask: Tensor, coil_maps: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        """Factor masks ``(1 or N, 1, ky, kx)`` with maps ``(1 or N, coil, y, x)``; return values and vectors."""
        if axis == -2:
            mask, coil_maps = mask.mT, coil_maps.mT
        line = torch.fft.ifftshift(mask[:, 0, :, 0], -1)  # (1 or N, n)
        n = line.shape[-1]
        index = torch.arange(n, device=mask.device)
        circulant = torch.fft.ifft(line.to(coil_maps.dtype))[:, (index[:, None] - index) % n]
        maps = coil_maps.permute(0, 3, 1, 2)  # (1 or N, readout, coil, n)
        values, vectors = torch.linalg.eigh((maps.mH @ maps) * circulant[:, None])
        # Rounding leaves +-eps where the mask leaves a null space; those directions must keep z exactly.
        return cut_small(values, n), vectors

    def prox(self, z: Tensor, back: Tensor, rho: Tensor) -> Tensor:
        """Return ``z + V (V^H A^H y - values V^H z) / (values + rho)`` for ``back = A^H y``."""
        values = self._of_rows(self.values)
        c, of_z = self._analyse(torch.cat([back, z])).chunk(2)  # the vectors are read once for both
        c = c - values * of_z
        return z + self._synthesise(over(torch.ones_like(values), values + per_row(rho, c), values > 0) * c)

    def conditional(self, z: Tensor, back: Tensor, sigma: Tensor, tau: Tensor, noise: Tensor) -> Tensor:
        """Return the prox at ``rho = sigma^2 / tau^2`` plus ``V (values/sigma^2 + 1/tau^2)^(-1/2) V^H noise``."""
        c, values = self._analyse(noise), self._of_rows(self.values)
        rho = (torch.as_tensor(sigma) / torch.as_tensor(tau)) ** 2
        sigma, tau = per_row(sigma, c), per_row(tau, c)
        seen = values > 0
        width = torch.where(seen, over(sigma * tau, (values * tau**2 + sigma**2).sqrt(), seen), tau)
        return self.prox(z, back, rho) + self._synthesise(width * c)

    def _of_rows(self, values: Tensor) -> Tensor:
        return values if self.index is None or values.shape[0] == 1 else values[self.index.to(values.device)]

    def _analyse(self, x: Tensor) -> Tensor:
        """Return ``V^H x``, ``(B, 1, y, x) -> (B, readout, n)``."""
        lines = x[:, 0] if self.axis == -2 else x[:, 0].mT
        return self._rotate(lines, adjoint=True)

    def _synthesise(self, c: Tensor) -> Tensor:
        """Return ``V c``, ``(B, readout, n) -> (B, 1, y, x)``."""
        lines = self._rotate(c, adjoint=False)
        return (lines if self.axis == -2 else lines.mT)[:, None]

    def _rotate(self, lines: Tensor, adjoint: bool) -> Tensor:
        """Multiply by ``V`` or ``V^H``, case by case, so that draws of one case share its factors.

        Rows may be several times those of the operator, one after the other.
        """
        if self.vectors.shape[0] == 1:
            return _apply(self.vectors[0], lines, adjoint)
        cases = torch.arange(self.vectors.shape[0]) if self.index is None else self.index
        cases = cases.repeat(len(lines) // max(len(cases), 1))
        order = cases.argsort(stable=True)
        groups = [order[cases[order] == case].to(lines.device) for case in cases.unique().tolist()]
        parts = [_apply(self.vectors[int(cases[rows[0]])], lines[rows], adjoint) for rows in groups]
        return torch.cat(parts)[order.argsort().to(lines.device)] if parts else lines


def _apply(vectors: Tensor, lines: Tensor, adjoint: bool) -> Tensor:
    """Multiply ``(B, readout, n)`` by ``V_r`` ``(readout, n, n)`` with the rows as columns of one product."""
    columns = lines.permute(1, 2, 0)
    wanted = torch.is_grad_enabled() and (lines.requires_grad or vectors.requires_grad)
    if len(lines) <= _FEW and not lines.is_cuda and not wanted:
        return _apply_few(vectors, lines, adjoint)
    if adjoint:  # V^H c = conj(V^T conj(c)): the product with a conjugated matrix would copy the matrix
        return (vectors.mT @ columns.conj().resolve_conj()).conj().permute(2, 0, 1).resolve_conj()
    return (vectors @ columns).permute(2, 0, 1)


#: Rows up to which numpy's matrix times vector, which reads the matrix at the speed of the memory, is faster than
#: torch's batched product (measured: 4 times for one row at 320 x 320 x 320, as fast at four).
_FEW = 3


def _apply_few(vectors: Tensor, lines: Tensor, adjoint: bool) -> Tensor:
    """`_apply` on a CPU, row by row."""
    matrix = vectors.detach().resolve_conj().numpy()
    matrix = matrix.transpose(0, 2, 1) if adjoint else matrix
    out = torch.empty_like(lines, memory_format=torch.contiguous_format)
    for row, line in zip(out, lines):
        column = (line.conj() if adjoint else line).resolve_conj().contiguous().numpy()[..., None]
        product = torch.from_numpy(np.matmul(matrix, column)[..., 0])
        row.copy_(product.conj() if adjoint else product)
    return out
