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

    ``(B, *shape)`` to the same shape, element by element. Composed with a ray transform it is the model of X-ray
    counts: ``BeerLambert(A.range, I0) @ A`` with ``likelihoods.Poisson(background=b)``.

    Args:
        shape: The Space of the line integrals, ``A.range``, or a bare shape.
        intensity: Expected counts without an object: a number, an array that broadcasts over one element of the
            space, or one with a further leading axis of 1 or N cases.
        dtype: Precision; that of the Space, or float32.

    Raises:
        InvdiffError: If the intensity is not positive everywhere or does not fit the space, or the space is
            complex.
    """

    provides: ClassVar[frozenset[str]] = frozenset({"vjp"})

    def __init__(self, shape: Space | Sequence[int], intensity: Any, *, dtype: torch.dtype | None = None) -> None:
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
        return self.intensity * torch.exp(-x.to(self.domain.dtype))

    def vjp(self, x: Tensor, v: Tensor) -> Tensor:
        """Return ``-I0 exp(-x) v``."""
        return -self(x) * v

    def jvp(self, x: Tensor, dx: Tensor) -> Tensor:
        """Return ``-I0 exp(-x) dx``."""
        return -self(x) * dx
