"""Anderson acceleration of fixed-point iterations ``x <- F(x)``, every row on its own."""

from __future__ import annotations

import torch
from torch import Tensor


def anderson(points: Tensor, images: Tensor, ridge: float = 1e-6) -> Tensor:
    """Return the next iterate ``sum_i alpha_i F(x_i)`` from the last ``m`` points and their images.

    ``alpha`` minimises ``||sum_i alpha_i g_i||^2 + ridge * mean_i ||g_i||^2 * ||alpha||^2`` under
    ``sum_i alpha_i = 1``, with the residuals ``g_i = F(x_i) - x_i``. With one point it is ``F(x)``. For a linear
    ``F`` and no ridge the residual is that of the best combination of all points (as GMRES finds it).

    Args:
        points: ``(B, m, ...)``, real or complex, in any order.
        images: ``F`` of them, ``(B, m, ...)``.
        ridge: Relative Tikhonov term, which keeps the weights bounded when residuals are nearly parallel.

    Source: Walker, Ni, "Anderson acceleration for fixed-point iterations", 2011.
    """
    g = (images - points).flatten(2)
    gram = torch.einsum("bmn,bkn->bmk", g.conj(), g)
    gram = gram.real if gram.is_complex() else gram
    size = gram.diagonal(dim1=1, dim2=2).mean(1)
    size = torch.where(size > 0, size, torch.ones_like(size))[:, None, None]
    eye = torch.eye(g.shape[1], dtype=gram.dtype, device=gram.device)
    weights = torch.linalg.solve(gram / size + ridge * eye, torch.ones_like(gram[:, :, 0]))
    weights = weights / weights.sum(1, keepdim=True)
    return (weights.reshape(*weights.shape, *[1] * (images.ndim - 2)).to(images.dtype) * images).sum(1)


class History:
    """The last points and images of an iteration, in a sampler's state, scaled by ``unit``.

    Args:
        points: ``(B, m, ...)``, slots that are filled in turn.
        images: The same of the images.
        unit: What residuals are measured in, broadcast over ``(B, ...)``.
    """

    def __init__(self, points: Tensor, images: Tensor, unit: Tensor) -> None:
        self.points, self.images, self.unit = points.clone(), images.clone(), unit

    def next(self, k: int, point: Tensor, image: Tensor) -> Tensor:
        """Put the pair of iteration ``k`` into its slot and return Anderson's next iterate."""
        size = self.points.shape[1]
        slot, filled = k % size, min(k + 1, size)
        self.points[:, slot], self.images[:, slot] = point / self.unit, image / self.unit
        return anderson(self.points[:, :filled], self.images[:, :filled]) * self.unit
