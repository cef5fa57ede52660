"""Operators that are one small matrix along y and another along x, ``A = T_y (x) T_x``."""

from __future__ import annotations

import torch
from torch import Tensor

from invdiff.operator import SVD
from invdiff.operators._spectral import cut_small

#: Longest axis whose matrix is decomposed.
LONGEST = 2048
#: Blocks of rows of a matrix, each with the columns outside which it is zero.
Blocks = tuple[tuple[slice, slice], ...]
#: The whole matrix.
WHOLE: Blocks = ((slice(None), slice(None)),)
#: Length of an axis per block (measured: shorter blocks cost more than the zeros they spare), and most blocks.
_STEP, _MOST = 64, 8


def split(pattern: Tensor) -> Blocks:
    """Return the blocks of a matrix ``(m, n)`` that is zero far from its diagonal."""
    count = min(_MOST, 1 << max(max(pattern.shape) // _STEP, 1).bit_length() - 1)
    step = -(-pattern.shape[0] // count)
    parts = []
    for start in range(0, pattern.shape[0], step):
        used = pattern[start : start + step].any(0).nonzero().flatten().tolist() or [0]
        parts.append((slice(start, start + step), slice(used[0], used[-1] + 1)))
    return tuple(parts)


def multiply(ty: Tensor, tx: Tensor, x: Tensor, by: Blocks = WHOLE, bx: Blocks = WHOLE) -> Tensor:
    """Return ``T_y x T_x^T`` for matrices ``(1 or B, m, n)`` and images ``(B, ..., y, x)``.

    Args:
        ty: Matrix along y.
        tx: Matrix along x.
        x: Images.
        by: What of ``ty`` is not zero, from `split`; a CPU multiplies by nothing else.
        bx: The same of ``tx``.
    """
    ty, tx = (_broadcast(t, x) for t in (ty, tx))
    if x.is_cuda or len(by) == len(bx) == 1:
        return ty @ x @ tx.mT
    x = torch.cat([ty[..., rows, columns] @ x[..., columns, :] for rows, columns in by], -2)
    return torch.cat([x[..., columns] @ tx[..., rows, columns].mT for rows, columns in bx], -1)


def _broadcast(t: Tensor, x: Tensor) -> Tensor:
    t = t.to(x.dtype)
    return t[0] if len(t) == 1 else t.reshape(len(t), *([1] * (x.ndim - 3)), *t.shape[1:])


def decompose(ty: Tensor, tx: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return ``U_y, U_x, s, V_y^H, V_x^H`` in ``dtype``, where ``s`` ``(N, r_y, r_x)`` has the products."""
    (uy, sy, vy), (ux, sx, vx) = (torch.linalg.svd(t.double(), full_matrices=False) for t in (ty, tx))
    s = (sy[:, :, None] * sx[:, None]).to(dtype)
    s = cut_small(s, max(*ty.shape[1:], *tx.shape[1:]))
    return uy.to(dtype), ux.to(dtype), s, vy.to(dtype), vx.to(dtype)


def separable_svd(factors: tuple[Tensor, ...], shape: tuple[int, ...]) -> SVD:
    """Return the decomposition of an operator on images of ``shape`` from the factors of its matrices."""
    uy, ux, s, vy, vx = factors
    s = s.reshape(s.shape[0], *([1] * (len(shape) - 2)), *s.shape[-2:])
    seen = s > 0
    return SVD(
        s=s.expand(s.shape[0], *shape[:-2], *s.shape[-2:]),
        vh=lambda x: multiply(vy, vx, x),
        v=lambda c: multiply(vy.mT, vx.mT, c),
        uh=lambda y: multiply(uy.mT, ux.mT, y) * seen,
        u=lambda c: multiply(uy, ux, c * seen),
    )
