"""Images that are zero outside a region, such as the air around a head that no coil map covers.

Where the data say nothing about a pixel, posterior draws show what the prior imagines there. Where it is known
that there is nothing, the image can be restricted to its region: ``x = m u`` with ``m`` in {0, 1}.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from invdiff.codec import AffineCodec, Codec
from invdiff.errors import InvdiffError
from invdiff.prior import Prior
from invdiff.spaces import Space


class Support(AffineCodec):
    """``decode(u) = m u`` with a mask ``m``.

    ``L L^H`` is the mask, not the identity; closed forms stay exact for operators that do not see the pixels
    outside, which is what this is for.

    Args:
        image: Image space.
        region: True where the image may be other than zero; broadcasts over ``image.shape``.

    Raises:
        InvdiffError: If the region does not fit or is empty.
    """

    def __init__(self, image: Space, region: Tensor) -> None:
        region = torch.as_tensor(region, dtype=torch.bool)
        if region.ndim > len(image.shape) or any(
            n not in (1, m) for n, m in zip(reversed(region.shape), reversed(image.shape))
        ):
            raise InvdiffError(f"The region has shape {tuple(region.shape)}, and the images are {image}.")
        if not bool(region.any()):
            raise InvdiffError("The region of the image is empty; give one with at least one pixel.")
        self.image = self.prior = image
        self.region = region

    @property
    def gain(self) -> Tensor:
        """One."""
        return torch.ones((), dtype=self.image.real_dtype)

    def linear(self, u: Tensor) -> Tensor:
        """Return ``m u``."""
        return torch.where(self.region, u, 0)

    def linear_adjoint(self, x: Tensor) -> Tensor:
        """Return ``m x``."""
        return self.linear(x)

    def describe(self) -> dict[str, Any]:
        """Return the share of pixels inside."""
        return {"name": "Support", "share": round(float(self.region.double().mean()), 6)}


def restrict(prior: Prior, region: Tensor) -> Prior:
    """Return a prior whose images are zero outside ``region``.

    Meant for regions that hold every pixel the operator sees; then the draws inside are those of the prior
    itself.

    Args:
        prior: Any prior.
        region: True inside; broadcasts over the image shape ``(1, y, x)``.
    """
    if prior.codec is not None:
        return replace(prior, codec=Support(prior.codec.image, region) @ prior.codec)
    base = prior.make_codec
    if base is None:
        return prior

    def make_codec(image: Space, scale: Tensor) -> Codec:
        return Support(image, region) @ base(image, scale)

    return replace(prior, make_codec=make_codec)
