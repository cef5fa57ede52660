"""Colour images seen in grey: the forward model of colourisation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from invdiff.errors import InvdiffError
from invdiff.operator import SVD
from invdiff.operators._parameters import as_parameter, as_space
from invdiff.operators._spectral import SpectralOperator, unchanged
from invdiff.spaces import Space


class Grayscale(SpectralOperator):
    """``y = sum_c w_c x_c``: one weighted mean of the channels per pixel.

    Its only singular value is ``|w|``; the null space holds every colour contrast.

    Args:
        shape: Shape ``(channel, y, x)`` of one image, or its whole Space; the channels come first.
        weights: One weight per channel; equal ones of unit sum by default. ``(0.299, 0.587, 0.114)`` is the luma
            of ITU-R BT.601.
        dtype: Precision, and real or complex; that of the Space, or float32.
        units: Units of the image.
        spacing: Distance between neighbours, per named dimension.

    Raises:
        InvdiffError: If there is not one real weight per channel, or all are zero.
    """

    def __init__(
        self,
        shape: Space | Sequence[int],
        weights: Any = None,
        *,
        dtype: torch.dtype | None = None,
        units: str | None = None,
        spacing: Mapping[str, float] | None = None,
    ) -> None:
        self.domain = as_space(shape, dtype, units, spacing)
        channels = self.domain.shape[0]
        values = torch.full((channels,), 1 / channels).double() if weights is None else weights
        values = as_parameter(values, "The grey weights")
        if values.is_complex() or values.shape != (channels,) or not bool(values.any()):
            raise InvdiffError(
                f"The grey weights need one real number for each of {channels} channels, not all zero; "
                f"got shape {tuple(values.shape)}."
            )
        self.weights = values.to(self.domain.real_dtype)
        self.range = self.domain.replace(shape=(1, *self.domain.shape[1:]))
        super().__init__()

    def _forward(self, x: Tensor) -> Tensor:
        return (self._enter(x, self.domain) * self._column).sum(1, keepdim=True)

    def _adjoint(self, y: Tensor) -> Tensor:
        return self._enter(y, self.range) * self._column

    @property
    def _column(self) -> Tensor:
        return self.weights.reshape(-1, *([1] * (len(self.domain.shape) - 1)))

    def svd(self) -> SVD:
        """Return ``s = |w|`` with ``U = I`` and ``V = w / |w|``, in the shape of the range."""
        size = self.weights.norm()
        return SVD(
            s=size.expand(1, *self.range.shape),
            vh=lambda x: self._forward(x) / size,
            v=lambda c: self._adjoint(c) / size,
            uh=unchanged,
            u=unchanged,
        )
