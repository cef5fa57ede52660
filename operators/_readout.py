"""Exact prox of Cartesian MRI with a fully sampled readout: one small Hermitian matrix per readout position.

With a mask ``m(k)`` that does not depend on the frequency along the readout, the FFT along the readout
cancels in ``A^H A``. What is left at readout position ``r`` couples only the other axis:
``N_r[i, j] = C[i, j] sum_c conj(S_c[i, r]) S_c[j, r]`` with the circulant ``C = F^H diag(m) F``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from invdiff.operators._compiled import is_compiled
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
        return cut_small(values, n), vectors.contiguous()  # LAPACK's are stored by columns

    def prox(self, z: Tensor, back: Tensor, rho: Tensor) -> Tensor:
        """Return ``z + V (V^H A^H y - values V^H z) / (values + rho)`` for ``back = A^H y``."""
        weight, values = self._pull(rho)
        return z + self._filtered([back, z], [weight, -weight * values])

    def conditional(self, z: Tensor, back: Tensor, sigma: Tensor, tau: Tensor, noise: Tensor) -> Tensor:
        """Return the prox at ``rho = sigma^2 / tau^2`` plus ``V (values/sigma^2 + 1/tau^2)^(-1/2) V^H noise``."""
        weight, values = self._pull((torch.as_tensor(sigma) / torch.as_tensor(tau)) ** 2)
        sigma, tau = per_row(sigma, values), per_row(tau, values)
        seen = values > 0
        width = torch.where(seen, over(sigma * tau, (values * tau**2 + sigma**2).sqrt(), seen), tau)
        return z + self._filtered([back, z, noise], [weight, -weight * values, width])

    def _pull(self, rho: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``1 / (values + rho)``, zero where nothing is seen, and the values, of all rows or of the one."""
        values = self.values
        if self.index is not None and len(values) > 1:
            values = values[self.index.to(values.device)]
        return over(torch.ones_like(values), values + per_row(rho, values), values > 0), values

    def _filtered(self, images: list[Tensor], gains: list[Tensor]) -> Tensor:
        """Return ``sum_k V (gains_k V^H images_k)``, case by case, so that draws of one case share its factors."""
        lines = torch.stack(images)[:, :, 0]  # (K, B, y, x)
        lines = lines if self.axis == -2 else lines.mT
        gain = torch.stack(torch.broadcast_tensors(*gains)).to(lines.real).expand(lines.shape)
        out = torch.empty_like(lines[0])
        if len(self.vectors) == 1:
            out = _filtered(self.vectors[0], lines, gain)
        else:
            cases = torch.arange(len(self.vectors)) if self.index is None else self.index.cpu()
            parts = [
                (case, torch.nonzero(cases == case)[:, 0].to(lines.device)) for case in cases.unique().tolist()
            ]
            for case, rows in parts:
                out = out.index_copy(0, rows, _filtered(self.vectors[case], lines[:, rows], gain[:, rows]))
        return (out if self.axis == -2 else out.mT)[:, None]


def _filtered(vectors: Tensor, lines: Tensor, gains: Tensor) -> Tensor:
    """Return ``sum_k V_r (gains_k V_r^H lines_k)``, ``(K, B, readout, n) -> (B, readout, n)``."""
    wanted = torch.is_grad_enabled() and (lines.requires_grad or vectors.requires_grad or gains.requires_grad)
    if not wanted and lines.shape[1] <= _FEW and is_compiled(lines.device):
        from invdiff.operators._readout_compiled import filtered

        return filtered(vectors, lines, gains)
    columns = lines.flatten(0, 1).permute(1, 2, 0)  # the rows are columns of one product
    # V^H x = conj(V^T conj(x)): the product with a conjugated matrix would copy the matrix
    seen = (vectors.mT @ columns.conj().resolve_conj()).conj().permute(2, 0, 1).unflatten(0, lines.shape[:2])
    return (vectors @ (gains * seen).sum(0).permute(1, 2, 0)).permute(2, 0, 1)


#: Rows up to which the compiled loops are faster than torch's products (measured: 3 times for one row at
#: 320 x 320 x 320, 1.3 times for eight).
_FEW = 8
