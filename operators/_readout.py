"""Exact prox of Cartesian MRI with a fully sampled readout: one small Hermitian matrix per readout position.

With a mask ``m(k)`` that does not depend on the frequency along the readout, the FFT along the readout
cancels in ``A^H A``. What is left at readout position ``r`` couples only the other axis:
``N_r[i, j] = C[i, j] sum_c conj(S_c[i, r]) S_c[j, r]`` with the circulant ``C = F^H diag(m) F``.
"""

from __future__ import annotations

from collections.abc import Callable
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

    def analyse(self, x: Tensor) -> Tensor:
        """Return ``V^H x``, ``(B, 1, y, x) -> (B, readout, n)``."""
        lines = x[:, 0] if self.axis == -2 else x[:, 0].mT
        return self._by_case(lambda vectors, lines: _coefficients(vectors, lines[None])[0], lines)

    def prox(self, z: Tensor, seen: Tensor, rho: Tensor) -> Tensor:
        """Return ``z + V (seen - values V^H z) / (values + rho)`` for ``seen = V^H A^H y``."""
        weight, values = self._pull(rho)
        return z + self._filtered(weight * seen, [z], [-weight * values])

    def conditional(self, z: Tensor, seen: Tensor, sigma: Tensor, tau: Tensor, noise: Tensor) -> Tensor:
        """Return the prox at ``rho = sigma^2 / tau^2`` plus ``V (values/sigma^2 + 1/tau^2)^(-1/2) V^H noise``."""
        weight, values = self._pull((torch.as_tensor(sigma) / torch.as_tensor(tau)) ** 2)
        sigma, tau = per_row(sigma, values), per_row(tau, values)
        there = values > 0
        width = torch.where(there, over(sigma * tau, (values * tau**2 + sigma**2).sqrt(), there), tau)
        return z + self._filtered(weight * seen, [z, noise], [-weight * values, width])

    def _pull(self, rho: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``1 / (values + rho)``, zero where nothing is seen, and the values, of all rows or of the one."""
        values = self.values
        if self.index is not None and len(values) > 1:
            values = values[self.index.to(values.device)]
        return over(torch.ones_like(values), values + per_row(rho, values), values > 0), values

    def _filtered(self, start: Tensor, images: list[Tensor], gains: list[Tensor]) -> Tensor:
        """Return ``V (start + sum_k gains_k V^H images_k)``, ``(B, 1, y, x)``."""
        lines = torch.stack(images, 1)[:, :, 0]  # (B, K, y, x)
        lines = lines if self.axis == -2 else lines.mT
        gain = torch.stack(torch.broadcast_tensors(*gains), 1).to(lines.real).expand(lines.shape)
        out = self._by_case(_filtered, start, lines, gain)
        return (out if self.axis == -2 else out.mT)[:, None]

    def _by_case(self, work: Callable[..., Tensor], *rows: Tensor) -> Tensor:
        """Call ``work(V of a case, rows of the case ...)``, so that draws of one case share its factors."""
        if len(self.vectors) == 1:
            return work(self.vectors[0], *rows)
        cases = torch.arange(len(self.vectors)) if self.index is None else self.index.cpu()
        out = torch.empty_like(rows[0])
        for case in cases.unique().tolist():
            which = torch.nonzero(cases == case)[:, 0].to(out.device)
            out = out.index_copy(0, which, work(self.vectors[case], *(r[which] for r in rows)))
        return out


def _filtered(vectors: Tensor, start: Tensor, lines: Tensor, gains: Tensor) -> Tensor:
    """Return ``V_r (start + sum_k gains_k V_r^H lines_k)``, ``(B, readout, n)``.

    Args:
        vectors: ``(readout, n, n)``.
        start: ``(B, readout, n)``.
        lines: ``(B, K, readout, n)``.
        gains: The same.
    """
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in (vectors, start, lines, gains))
    if not wanted and len(start) <= _FEW and is_compiled(lines.device):
        from invdiff.operators._readout_compiled import filtered

        return filtered(vectors, start, lines, gains)
    total = start + (gains * _coefficients(vectors, lines)).sum(1)
    return (vectors @ total.permute(1, 2, 0)).permute(2, 0, 1)


def _coefficients(vectors: Tensor, lines: Tensor) -> Tensor:
    """Return ``V_r^H lines``, ``(B, K, readout, n)``, with all rows as columns of one product."""
    columns = lines.flatten(0, 1).permute(1, 2, 0)
    # V^H x = conj(V^T conj(x)): the product with a conjugated matrix would copy the matrix
    seen = (vectors.mT @ columns.conj().resolve_conj()).conj().permute(2, 0, 1)
    return seen.unflatten(0, lines.shape[:2]).resolve_conj()


#: Rows up to which the compiled loops are faster than torch's products (measured: 3 times for one row at
#: 320 x 320 x 320, 1.3 times for eight).
_FEW = 8
