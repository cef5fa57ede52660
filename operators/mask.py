"""Inpainting: sampled positions are kept, the others are zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from invdiff.operator import SVD
from invdiff.operators._parameters import as_mask, as_space, fit_mask
from invdiff.operators._spectral import SpectralOperator, unchanged
from invdiff.spaces import Space


class Mask(SpectralOperator):
    """``A x = m x`` with ``m`` in {0, 1}: an orthogonal projection.

    The range has the shape of the domain, and unsampled positions hold zeros; values of ``y`` there are
    ignored by the adjoint and by every closed form.

    Args:
        mask: Zeros and ones (bool, integer or float), broadcastable to the shape of the domain, or with one
            more leading axis of 1 or N cases.
        shape: Shape of one image or its whole Space; the shape of the mask by default.
        dtype: Precision, and real or complex; that of the Space, or float32.
        units: Units of the image.
        spacing: Distance between neighbours, per named dimension.

    Raises:
        InvdiffError: If the mask holds other values than 0 and 1, samples nothing, or does not fit the shape.
    """

    _per_case = ("mask",)

    def __init__(
        self,
        mask: Any,
        shape: Space | Sequence[int] | None = None,
        *,
        dtype: torch.dtype | None = None,
        units: str | None = None,
        spacing: Mapping[str, float] | None = None,
    ) -> None:
        values = as_mask(mask, torch.float32)
        self.domain = self.range = as_space(values.shape if shape is None else shape, dtype, units, spacing)
        self.mask = fit_mask(values, self.domain)
        super().__init__()

    @property
    def support(self) -> Tensor:
        """The mask: data exist where it is 1."""
        return self.mask

    def _forward(self, x: Tensor) -> Tensor:
        return self._enter(x, self.domain) * self.mask

    def _adjoint(self, y: Tensor) -> Tensor:
        return self._enter(y, self.range) * self.mask

    def normal(self, x: Tensor) -> Tensor:
        """Return ``m x``, as ``m^2 = m``."""
        return self(x)

    def svd(self) -> SVD:
        """Return ``U = V = I`` with the mask as singular values."""

        def keep(x: Tensor) -> Tensor:
            return x * self.mask

        s = self.mask.expand(self.mask.shape[0], *self.domain.shape)
        return SVD(s, vh=unchanged, v=unchanged, uh=keep, u=keep)
