"""What a detector without phase sees of a field that depends linearly on the unknown."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from invdiff.operator import LinearOperator, Operator
from invdiff.operators.blur import require

QUANTITIES = ("amplitude", "intensity")


class Detected(Operator):
    """``y = |L x|`` ("amplitude") or ``|L x|^2`` ("intensity") of a linear field ``L x``, kept as ``field``.

    Derivatives are closed forms: with ``u = L x``, ``J^H v = L^H (v u / |u|)`` or ``L^H (2 v u)``. Where an
    amplitude is 0 its derivative is taken as 0.

    Args:
        field: Linear operator with a complex range.
        quantity: "amplitude" or "intensity".
    """

    def __init__(self, field: LinearOperator, quantity: str) -> None:
        self.field = field
        self.quantity = require("detected quantity", quantity, QUANTITIES)
        units = field.range.units
        if quantity == "intensity" and units != "1":
            units = f"({units})^2"
        self.domain = field.domain
        self.range = field.range.replace(dtype=field.range.real_dtype, units=units)

    @property
    def n_cases(self) -> int | None:
        """Cases of the field."""
        return self.field.n_cases

    def rows(self, index: Tensor) -> Any:
        """Pick the parameters of the field."""
        if self.n_cases is None:
            return self
        new = copy.copy(self)
        new.field = self.field.rows(index)
        return new

    def _forward(self, x: Tensor) -> Tensor:
        u = self.field(x)
        return u.abs() if self.quantity == "amplitude" else u.real.square() + u.imag.square()

    def vjp(self, x: Tensor, v: Tensor) -> Tensor:
        """Return ``J(x)^H v``: one pass forward and one back."""
        self.domain.check(x, f"Point of the vjp of {self.name}")
        self.range.check(v, f"Input of the vjp of {self.name}")
        return self.field.adjoint(self._weight(self.field(x)) * v.to(self.range.dtype))

    def jvp(self, x: Tensor, dx: Tensor) -> Tensor:
        """Return ``J(x) dx = Re conj(weight) L dx`` with the weight of the vjp."""
        return (self._weight(self.field(x)).conj() * self.field(dx)).real

    def _weight(self, u: Tensor) -> Tensor:
        return torch.sgn(u) if self.quantity == "amplitude" else 2 * u
