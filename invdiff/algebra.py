"""What ``@``, ``+``, scaling, ``.H`` and `stack` make of operators: compositions, sums, and their like."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from invdiff.errors import InvdiffError
from invdiff.operator import LinearOperator, Operator


class Adjoint(LinearOperator):
    """The adjoint of a linear operator, ``A^H``."""

    def __init__(self, base: LinearOperator) -> None:
        self.base = base
        self.domain, self.range = base.range, base.domain

    @property
    def name(self) -> str:
        """Name of the base operator with ``.H``."""
        return f"{self.base.name}.H"

    @property
    def n_cases(self) -> int | None:
        """Cases of the base operator."""
        return self.base.n_cases

    @property
    def H(self) -> LinearOperator:
        """The base operator."""
        return self.base

    def _forward(self, x: Tensor) -> Tensor:
        return self.base._adjoint(x)

    def _adjoint(self, y: Tensor) -> Tensor:
        return self.base._forward(y)

    def rows(self, index: Tensor) -> LinearOperator:
        """Pick the parameters of the base operator."""
        return Adjoint(self.base.rows(index))


class _Compound(Operator):
    """What sums, stacks and compositions share: a tuple of parts and their per-case parameters."""

    parts: tuple[Any, ...]

    @property
    def n_cases(self) -> int | None:
        """Number of cases the parts agree on."""
        counts = {p.n_cases for p in self.parts if p.n_cases is not None}
        if len(counts - {1}) > 1:
            raise InvdiffError(f"{self.name} joins operators for different numbers of cases {sorted(counts)}.")
        return max(counts) if counts else None

    def rows(self, index: Tensor) -> Any:
        """Pick the parameters of every part."""
        new = copy.copy(self)
        new.parts = tuple(p.rows(index) for p in self.parts)
        return new

    def describe(self) -> dict[str, Any]:
        """Describe every part."""
        return {**super().describe(), "parts": [p.describe() for p in self.parts]}


class Composed(_Compound):
    """``x -> A(B(x))`` for operators of any kind; vjp and jvp follow the chain rule."""

    def __init__(self, outer: Operator, inner: Operator) -> None:
        self.parts = (outer, inner)
        self.domain, self.range = inner.domain, outer.range

    @property
    def name(self) -> str:
        """Names of both parts."""
        return f"{self.parts[0].name} @ {self.parts[1].name}"

    @property
    def capabilities(self) -> frozenset[str]:
        """A composition can be differentiated where both parts can."""
        return frozenset({"vjp"}) & self.parts[0].capabilities & self.parts[1].capabilities

    def _forward(self, x: Tensor) -> Tensor:
        return self.parts[0](self.parts[1](x))

    def vjp(self, x: Tensor, v: Tensor) -> Tensor:
        """Return ``J_B(x)^H J_A(B x)^H v``."""
        outer, inner = self.parts
        return inner.vjp(x, outer.vjp(inner(x), v))

    def jvp(self, x: Tensor, dx: Tensor) -> Tensor:
        """Return ``J_A(B x) J_B(x) dx``."""
        outer, inner = self.parts
        return outer.jvp(inner(x), inner.jvp(x, dx))


class ComposedLinear(Composed, LinearOperator):
    """``A B`` of two linear operators; ``normal`` uses the fast path of ``A``."""

    @property
    def capabilities(self) -> frozenset[str]:
        """A product of linear maps is linear; closed forms do not survive in general."""
        return frozenset({"linear", "vjp", "normal"})

    __call__ = LinearOperator.__call__
    vjp = LinearOperator.vjp
    jvp = LinearOperator.jvp

    def _adjoint(self, y: Tensor) -> Tensor:
        return self.parts[1].adjoint(self.parts[0].adjoint(y))

    def normal(self, x: Tensor) -> Tensor:
        """Return ``B^H (A^H A) B x``."""
        outer, inner = self.parts
        return inner.adjoint(outer.normal(inner(x)))


class Sum(_Compound, LinearOperator):
    """``A + B + ...`` of linear operators with the same spaces."""

    def __init__(self, parts: Sequence[LinearOperator]) -> None:
        self.parts = _alike(parts, "sum")
        self.domain, self.range = parts[0].domain, parts[0].range

    @property
    def name(self) -> str:
        """Names of the terms."""
        return "(" + " + ".join(p.name for p in self.parts) + ")"

    def _forward(self, x: Tensor) -> Tensor:
        return sum((p(x) for p in self.parts[1:]), self.parts[0](x))

    def _adjoint(self, y: Tensor) -> Tensor:
        return sum((p.adjoint(y) for p in self.parts[1:]), self.parts[0].adjoint(y))


class Stack(_Compound, LinearOperator):
    """``x -> (A x, B x, ...)`` along a new leading axis ``stack`` of the range."""

    def __init__(self, parts: Sequence[LinearOperator]) -> None:
        self.parts, first = _alike(parts, "stack"), parts[0]
        self.domain = first.domain
        depth = sum(d.startswith("stack") for d in first.range.dims)  # stacks of stacks need distinct names
        name = f"stack_{depth}" if depth else "stack"
        self.range = first.range.replace(
            shape=(len(self.parts), *first.range.shape), dims=(name, *first.range.dims)
        )

    @property
    def name(self) -> str:
        """Names of the parts."""
        return "Stack(" + ", ".join(p.name for p in self.parts) + ")"

    def _forward(self, x: Tensor) -> Tensor:
        return torch.stack([p(x) for p in self.parts], dim=1)

    def _adjoint(self, y: Tensor) -> Tensor:
        back = [p.adjoint(y[:, i]) for i, p in enumerate(self.parts)]
        return sum(back[1:], back[0])

    def normal(self, x: Tensor) -> Tensor:
        """Return the sum of the parts' normal operators."""
        return sum((p.normal(x) for p in self.parts[1:]), self.parts[0].normal(x))


class Scaled(_Compound, LinearOperator):
    """``c A`` for a number ``c`` (complex only between complex spaces)."""

    def __init__(self, base: LinearOperator, factor: complex) -> None:
        try:
            number = complex(factor)
        except (TypeError, ValueError, RuntimeError):
            raise InvdiffError(
                f"{base.name} can be scaled by a number, not by {type(factor).__name__}; operators compose with @."
            ) from None
        if number.imag and not (base.domain.is_complex and base.range.is_complex):
            raise InvdiffError(f"A complex factor needs complex spaces, and {base.name} has a real one.")
        if not math.isfinite(abs(number)):
            raise InvdiffError(f"The factor of {base.name} must be finite, got {factor}.")
        self.parts = (base,)
        self.factor = number if number.imag else number.real
        self.domain, self.range = base.domain, base.range

    @property
    def name(self) -> str:
        """Factor and name of the base."""
        return f"{self.factor:g} * {self.parts[0].name}"

    @property
    def capabilities(self) -> frozenset[str]:
        """Scaling keeps every closed form but the decomposition; scaling by zero keeps none."""
        lost = {"svd", "conditional"} | (set() if self.factor else {"pinv", "prox"})
        return self.parts[0].capabilities - lost

    def _forward(self, x: Tensor) -> Tensor:
        return self.factor * self.parts[0](x)

    def _adjoint(self, y: Tensor) -> Tensor:
        return self.factor.conjugate() * self.parts[0].adjoint(y)

    def normal(self, x: Tensor) -> Tensor:
        """Return ``|c|^2 A^H A x``."""
        return abs(self.factor) ** 2 * self.parts[0].normal(x)

    def pinv(self, y: Tensor) -> Tensor:
        """Return ``A^+ y / c``."""
        return self.parts[0].pinv(y / self.factor)

    def prox(self, z: Tensor, y: Tensor, rho: Tensor) -> Tensor:
        """Return the prox of the base at ``y / c`` with ``rho / |c|^2``."""
        return self.parts[0].prox(z, y / self.factor, rho / abs(self.factor) ** 2)


def _alike(parts: Sequence[LinearOperator], what: str) -> tuple[LinearOperator, ...]:
    """Return the parts of a sum or a stack if they are linear and their spaces agree."""
    for p in parts:
        if not isinstance(p, LinearOperator):
            found = p.name if isinstance(p, Operator) else type(p).__name__
            raise InvdiffError(f"A {what} takes linear operators, and {found} is none.")
    for p in parts[1:]:
        for ours, first, name in ((p.domain, parts[0].domain, "domains"), (p.range, parts[0].range, "ranges")):
            if ours.shape != first.shape or ours.is_complex != first.is_complex:
                raise InvdiffError(f"The {name} of a {what} differ: {ours} and {first}.")
    return tuple(parts)
