"""Beer-Lambert law: expected counts from line integrals of attenuation."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from invdiff.errors import InvdiffError
from invdiff.operator import Operator
from invdiff.operators._parameters import as_parameter, as_space
from invdiff.spaces import Space
from invdiff.tensors import take_rows


class BeerLambert(Operator):
    """``z -> I0 exp(-z)``: expected counts behind an object with line integrals ``z``.

    ``(B, *shape)`` to the same shape, element by element. Below ``tangent_below`` the tangent goes on in place of
    the exponential: no object has line integrals far below 0, but iterates of samplers do, and there exponential
    counts overflow and steps diverge. Composed with a ray transform it is the model of X-ray
    counts: ``BeerLambert(A.range, I0) @ A`` with ``likelihoods.Poisson(background=b)``.

    Args:
        shape: The Space of the line integrals, ``A.range``, or a bare shape.
        intensity: Expected counts without an object: a number, an array that broadcasts over one element of the
            space, or one with a further leading axis of 1 or N cases.
        dtype: Precision; that of the Space, or float32.
        tangent_below: Line integral below which the law is extended by its tangent; ``-inf`` never does.

    Raises:
        InvdiffError: If the intensity is not positive everywhere or does not fit the space, or the space is
            complex.
    """

    provides: ClassVar[frozenset[str]] = frozenset({"vjp"})

    def __init__(
        self,
        shape: Space | Sequence[int],
        intensity: Any,
        *,
        dtype: torch.dtype | None = None,
        tangent_below: float = -1.0,
    ) -> None:
        self.domain = as_space(shape, dtype)
        if self.domain.is_complex:
            raise InvdiffError(f"Line integrals are real, and the space is {self.domain}; give a real dtype.")
        self.range = self.domain.replace(units="counts")
        values = as_parameter(intensity, "The intensity")
        if values.is_complex() or not bool((values > 0).all()):
            raise InvdiffError("The intensity without an object must be real and above 0 everywhere.")
        rank = len(self.domain.shape) + 1
        values = values.reshape(*[1] * (rank - values.ndim), *values.shape)
        fits = values.ndim == rank and all(m in (1, n) for m, n in zip(values.shape[1:], self.domain.shape))
        if not fits:
            raise InvdiffError(
                f"The intensity has shape {tuple(values.shape)}, which fits neither {self.domain.shape} nor "
                "one more leading axis of cases."
            )
        self.intensity = values.to(self.domain.dtype)
        if not tangent_below <= 0:
            raise InvdiffError(f"tangent_below must be at most 0, got {tangent_below}.")
        self.tangent_below = float(tangent_below)

    @property
    def n_cases(self) -> int | None:
        """Number of cases the intensity is given for, or None where all share it."""
        return self.intensity.shape[0] if self.intensity.shape[0] > 1 else None

    def rows(self, index: Tensor) -> BeerLambert:
        """Return the operator whose row ``r`` has the intensity of case ``index[r]``."""
        new = copy.copy(self)
        new.intensity = take_rows(self.intensity, torch.as_tensor(index, dtype=torch.long))
        return new

    def _forward(self, x: Tensor) -> Tensor:
        x = x.to(self.domain.dtype)
        inside = x.clamp_min(self.tangent_below)
        return self.intensity * torch.exp(-inside) * (1 + (inside - x))

    def _slope(self, x: Tensor) -> Tensor:
        return -self.intensity * torch.exp(-x.to(self.domain.dtype).clamp_min(self.tangent_below))

    def vjp(self, x: Tensor, v: Tensor) -> Tensor:
        """Return ``-I0 exp(-x) v``, with the slope of the tangent below ``tangent_below``."""
        return self._slope(x) * v

    def jvp(self, x: Tensor, dx: Tensor) -> Tensor:
        """Return ``-I0 exp(-x) dx``, with the slope of the tangent below ``tangent_below``."""
        return self._slope(x) * dx
