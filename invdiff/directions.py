"""Measured and unmeasured directions of a linear operator, to grade posteriors on each apart."""

from __future__ import annotations

import torch
from torch import Tensor

from invdiff.conditioning import DENSE_LIMIT, Measurement, in_blocks, stack_real
from invdiff.errors import InvdiffError
from invdiff.operator import LinearOperator

#: Above this many unknowns the right singular vectors come from the normal matrix.
_SVD_LIMIT = 1500


def singular_directions(
    operator: LinearOperator, rtol: float = 1e-6, limit: int = 512, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Return right singular vectors of ``A`` with ``s > rtol * max(s)``, and a basis of the rest.

    Args:
        operator: Linear operator for one case.
        rtol: Where the null space begins, relative to the largest singular value.
        limit: At most so many of each, picked at random.
        seed: Seed of the pick.

    Returns:
        Measured ``(r, n)`` and null ``(q, n)`` orthonormal directions over the real components of the domain
        (real and imaginary parts interleaved), float64.

    Raises:
        InvdiffError: If there are more than 4,200 unknowns and the operator publishes no decomposition.
    """
    generator = torch.Generator().manual_seed(seed)
    if "svd" in operator.capabilities:
        return _published(operator, rtol, limit, generator)
    n = operator.domain.real_size
    if n > DENSE_LIMIT:
        raise InvdiffError(
            f"{operator.name} has {n} unknowns and no singular value decomposition; "
            f"measured directions need one, or at most {DENSE_LIMIT} unknowns."
        )
    a = Measurement(operator, torch.ones(()))
    dense = in_blocks(a.forward, n, a.levels).T
    if n <= _SVD_LIMIT:
        _, s, vh = torch.linalg.svd(dense, full_matrices=True)
        s = torch.cat([s, s.new_zeros(n - s.numel())])
    else:
        s2, v = torch.linalg.eigh(dense.T @ dense)
        s, vh = s2.clamp_min(0).sqrt(), v.T
    seen = s > rtol * s.max()
    return vh[_pick(seen, limit, generator)], vh[_pick(~seen, limit, generator)]


def _pick(chosen: Tensor, limit: int, generator: torch.Generator) -> Tensor:
    """Indices where ``chosen``, at most ``limit`` of them."""
    index = chosen.flatten().nonzero()[:, 0]
    if index.numel() <= limit:
        return index
    keep = torch.randperm(index.numel(), generator=generator)[:limit].to(index.device)
    return index[keep.sort().values]


def _published(
    operator: LinearOperator, rtol: float, limit: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    svd = operator.svd()
    s = svd.s[0]
    coordinates = svd.vh(operator.domain.zeros(1, s.device))
    seen = s > rtol * s.max()

    def vectors(index: Tensor) -> Tensor:
        units = torch.zeros(index.numel(), *s.shape, dtype=coordinates.dtype, device=s.device)
        units.view(index.numel(), s.numel())[torch.arange(index.numel()), index] = 1
        if units.is_complex():
            units = torch.cat([units, 1j * units])
        if not units.shape[0]:
            return torch.zeros(0, operator.domain.real_size, dtype=torch.float64)
        return stack_real(svd.v(units)).to(torch.float64)

    return vectors(_pick(seen, limit, generator)), vectors(_pick(~seen, limit, generator))
