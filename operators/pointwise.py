"""What a sensor does to every pixel by itself: clipping and quantisation."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from invdiff.errors import InvdiffError
from invdiff.operator import Operator
from invdiff.operators._parameters import as_space
from invdiff.spaces import Space


class _Pointwise(Operator):
    """A real function of every pixel, with its slope (or what stands for it)."""

    def __init__(
        self,
        shape: Space | Sequence[int],
        low: float,
        high: float,
        dtype: torch.dtype | None,
        units: str | None,
        spacing: Mapping[str, float] | None,
    ) -> None:
        self.domain = self.range = as_space(shape, dtype, units, spacing)
        if self.domain.is_complex:
            raise InvdiffError(f"{self.name} needs real images, got {self.domain.dtype}.")
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise InvdiffError(f"{self.name} needs finite limits low < high, got {low!r:.30} and {high!r:.30}.")
        self.low, self.high = float(low), float(high)

    @abstractmethod
    def _slope(self, x: Tensor) -> Tensor:
        """Return the slope at ``x``, shaped as ``x``."""

    def vjp(self, x: Tensor, v: Tensor) -> Tensor:
        """Return the slope at ``x`` times ``v``."""
        self.domain.check(x, f"Point of the vjp of {self.name}")
        self.range.check(v, f"Input of the vjp of {self.name}")
        return self._slope(x.to(self.domain.dtype)) * v.to(self.domain.dtype)

    def jvp(self, x: Tensor, dx: Tensor) -> Tensor:
        """Return the slope at ``x`` times ``dx``."""
        return self.vjp(x, dx)


class Clip(_Pointwise):
    """``y = min(max(gain x, low), high)``: an exposure of limited dynamic range.

    The derivative is ``gain`` strictly between the limits and where ``gain x`` meets one of them, and 0 beyond: a
    subgradient at the limits.

    Args:
        shape: Shape of one image, or its whole Space.
        gain: Factor before clipping, not 0; 2 is usual for images in [-1, 1] in benchmarks of high dynamic range.
        low: Least value.
        high: Greatest value.
        dtype: Real precision; that of the Space, or float32.
        units: Units of the image.
        spacing: Distance between neighbours, per named dimension.

    Raises:
        InvdiffError: If the limits are not in order, the gain is 0, or the images are complex.
    """

    def __init__(
        self,
        shape: Space | Sequence[int],
        gain: float = 1.0,
        low: float = 0.0,
        high: float = 1.0,
        *,
        dtype: torch.dtype | None = None,
        units: str | None = None,
        spacing: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(shape, low, high, dtype, units, spacing)
        if not math.isfinite(gain) or gain == 0:
            raise InvdiffError(f"The gain of Clip must be finite and not 0, got {gain!r:.60}.")
        self.gain = float(gain)

    def _forward(self, x: Tensor) -> Tensor:
        return (self.gain * x.to(self.domain.dtype)).clamp(self.low, self.high)

    def _slope(self, x: Tensor) -> Tensor:
        y = self.gain * x
        return self.gain * ((y >= self.low) & (y <= self.high)).to(x.dtype)


class Quantise(_Pointwise):
    """``y = low + step round((min(max(x, low), high) - low) / step)``, ``step = (high - low) / (levels - 1)``.

    The true derivative is 0 almost everywhere. What ``vjp``, ``jvp`` and autograd return instead is that of the
    clipping alone, 1 inside the limits and 0 beyond (the "straight-through" surrogate): a direction that reduces
    the misfit, not a gradient.

    Args:
        shape: Shape of one image, or its whole Space.
        levels: Number of levels, at least 2; 256 are 8 bits.
        low: Least level.
        high: Greatest level.
        dtype: Real precision; that of the Space, or float32.
        units: Units of the image.
        spacing: Distance between neighbours, per named dimension.

    Raises:
        InvdiffError: If there are fewer than two levels, the limits are not in order, or the images are complex.
    """

    def __init__(
        self,
        shape: Space | Sequence[int],
        levels: int,
        low: float = 0.0,
        high: float = 1.0,
        *,
        dtype: torch.dtype | None = None,
        units: str | None = None,
        spacing: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(shape, low, high, dtype, units, spacing)
        if isinstance(levels, bool) or int(levels) != levels or levels < 2:
            raise InvdiffError(f"The levels of Quantise must be a whole number of at least 2, got {levels!r:.60}.")
        self.levels = int(levels)

    def _forward(self, x: Tensor) -> Tensor:
        kept = x.to(self.domain.dtype).clamp(self.low, self.high)
        step = (self.high - self.low) / (self.levels - 1)
        return straight_through(kept, self.low + step * ((kept - self.low) / step).round())

    def _slope(self, x: Tensor) -> Tensor:
        return ((x >= self.low) & (x <= self.high)).to(x.dtype)


def straight_through(smooth: Tensor, value: Tensor) -> Tensor:
    """Return ``value``, differentiated as if it were ``smooth``."""
    return _StraightThrough.apply(smooth, value.detach())


class _StraightThrough(torch.autograd.Function):
    """The value of one tensor with the derivative of another."""

    @staticmethod
    def forward(ctx: object, smooth: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None

    @staticmethod
    def jvp(ctx: object, smooth: Tensor, value: None) -> Tensor:
        return smooth
