"""Ensemble Kalman increments: covariances from particles in place of derivatives, case by case."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from invdiff.primitives.smc import groups
from invdiff.rng import Streams


def kalman_increment(
    members: Tensor,
    images: Tensor,
    innovation: Tensor,
    sigma: Tensor,
    rng: Streams,
    inflation: float = 1.0,
    folds: int = 1,
    centre: bool = False,
) -> Tensor:
    """Return ``C_xz (C_zz + a sigma^2)^-1 innovation`` of every row, ``(B, *state)``.

    ``C_xz`` and ``C_zz`` are moments of ``n`` members about 0, or with ``centre`` about their mean; the increment
    is a combination of members, of rank at most ``n``, and what they do not span stays as it is. With ``folds``
    above 1 the rows of a case are dealt out to that many folds (at most half as many as there are rows) and the
    gain of each comes from the members of the others. A row that takes part in its own gain is drawn towards the
    data too far, so that a single ensemble ends too narrow. Rows with NaN are left out of all moments.

    Args:
        members: ``(R, B, *state)``, ``R`` of them for every row.
        images: What the operator makes of them, ``(R, B, *data)``, real or complex.
        innovation: Data minus prediction, ``(B, *data)``.
        sigma: Noise level per real component, broadcastable over ``(B, *data)``; its mean square over a case is
            used.
        rng: Streams of the rows, which say what belongs to which case.
        inflation: ``a``.
        folds: 1 for a single ensemble.
        centre: Whether to subtract the mean of the members.

    Source: Evensen, "The ensemble Kalman filter", Ocean Dynamics 2003; folds after Houtekamer, Mitchell, "Data
    assimilation using an ensemble Kalman filter technique", Monthly Weather Review 1998.
    """
    out = torch.zeros_like(members[0])
    level2 = (sigma**2).expand(innovation.shape)
    for _, rows in groups(rng):
        finite = [torch.isfinite(v[:, rows]).flatten(2).all(2) for v in (members, images)]
        live = finite[0] & finite[1]
        level = level2[rows][live.all(0)].mean(0).sqrt()
        z = _real(images[:, rows] / level)
        e = _real((innovation[rows] / level)[None])[0]
        x = members[:, rows].flatten(2)
        count = rows.stop - rows.start
        k = max(1, min(folds, count // 2))
        fold = torch.arange(count, device=live.device) % k
        for f in range(k):
            mine = fold == f
            use = live & (~mine if k > 1 else torch.ones_like(mine))
            xs, zs = x[use], z[use]
            n = len(xs)
            if centre and n:
                xs, zs, n = xs - xs.mean(0), zs - zs.mean(0), n - 1
            step = _weights(zs, e[mine], inflation * max(n, 1)).to(xs.dtype) @ xs
            out[rows][mine] = step.reshape(-1, *out.shape[1:])
    return out


def _weights(z: Tensor, e: Tensor, a: float) -> Tensor:
    """Return ``e (Z^T Z + a)^-1 Z^T``, ``(rows, members)``, solved in the smaller of data and ensemble space."""
    n, m = z.shape
    small = z.T @ z if m <= n else z @ z.T
    right = e.T if m <= n else z @ e.T
    found, failed = torch.linalg.solve_ex(small + a * torch.eye(len(small), dtype=z.dtype, device=z.device), right)
    if int(failed):  # members that ran away; what becomes of the rows is flagged as any other divergence
        found = torch.full_like(found, math.nan)
    return found.T @ z.T if m <= n else found.T


def _real(v: Tensor) -> Tensor:
    """Flatten data ``(R, B, *data)`` to real double precision ``(R, B, m)``."""
    parts = torch.view_as_real(v.resolve_conj()) if v.is_complex() else v
    return parts.flatten(2).double()
