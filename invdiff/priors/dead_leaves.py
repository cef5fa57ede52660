"""Dead leaves: synthetic images with the statistics that all natural images share.

Discs of random place, colour and radius lie on each other until nothing of the ground is seen. With radii of
density ``r^-3`` the images look alike at every scale, have edges, and a power spectrum near ``1 / f^2``, as
photographs do.

Matheron, "Modele de sequence de partition aleatoire", 1968; Lee, Mumford, Huang, IJCV 41, 2001.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["dead_leaves"]

#: Discs per image at most; what they leave open is grey.
MOST = 4000
#: Rendered this much finer and averaged, as the optics of a camera do.
FINER = 2


def dead_leaves(count: int, channels: int, size: int, seed: int = 0) -> Tensor:
    """Return ``count`` images ``(count, channels, size, size)`` with values in [0, 1], float32.

    Args:
        count: Number of images.
        channels: Colours of a disc share most of their brightness, as in photographs.
        size: Height and width.
        seed: Seed; a seed gives the same images everywhere.
    """
    g = torch.Generator().manual_seed(0xDEAD1EAF + seed)
    n = FINER * size
    axis = torch.arange(n, dtype=torch.float32) + 0.5
    images = torch.full((count, channels, n, n), 0.5)
    for image in images:
        bare = torch.ones(n, n, dtype=torch.bool)
        low, high = 2.0 * FINER, n / 2.0
        for _ in range(MOST):
            u, x, y, brightness = torch.rand(4, generator=g).tolist()
            colour = brightness + 0.1 * torch.randn(channels, generator=g)
            # Inverse of the distribution function of r^-3 on (low, high).
            radius = (low**-2 - u * (low**-2 - high**-2)) ** -0.5
            ys, xs = _span(y * n, radius, n), _span(x * n, radius, n)
            inside = (axis[ys, None] - y * n) ** 2 + (axis[None, xs] - x * n) ** 2 < radius**2
            seen = inside & bare[ys, xs]
            if not bool(seen.any()):
                continue
            image[:, ys, xs] = torch.where(seen, colour.clamp(0, 1)[:, None, None], image[:, ys, xs])
            bare[ys, xs] &= ~inside
            if not bool(bare.any()):
                break
    return functional.avg_pool2d(images, FINER)


def _span(middle: float, radius: float, n: int) -> slice:
    """Pixels that a disc can reach along one axis."""
    return slice(max(0, int(middle - radius)), min(n, int(middle + radius) + 2))
