"""The operator contract: a pure, batched map between two spaces that knows no noise.

``Operator`` has ``domain``, ``range``, ``__call__``, ``vjp``, ``jvp``. ``LinearOperator`` adds
``adjoint``, ``.H``, ``normal`` and the algebra (``@``, ``+``, scaling, ``stack``), whose classes are in
`invdiff.algebra`. The inner product is ``Re sum conj(a) b`` throughout, so the adjoint of a map from real
images to complex data ends in a real part.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from invdiff.errors import InvdiffError
from invdiff.spaces import Space
from invdiff.tensors import Movable, take_rows, tensor_digest


@dataclass(frozen=True)
class SVD:
    """Singular value decomposition ``A = U diag(s) V^H`` in at most as many coordinates as the domain has.

    Args:
        s: Singular values, shape ``(1 or N, *coordinates)``, zero on the null space.
        vh: ``(B, *domain) -> (B, *coordinates)`` with ``vh v = I``; unitary where there are as many coordinates as
            the domain has, else without the part of the null space that ``v vh`` takes away.
        v: ``(B, *coordinates) -> (B, *domain)``.
        uh: ``(B, *range) -> (B, *coordinates)``: ``U^H y``, zero where ``s`` is zero.
        u: ``(B, *coordinates) -> (B, *range)``: ``U c``, which ignores coordinates where ``s`` is zero.
    """

    s: Tensor
    vh: Callable[[Tensor], Tensor]
    v: Callable[[Tensor], Tensor]
    uh: Callable[[Tensor], Tensor]
    u: Callable[[Tensor], Tensor]


class Operator(Movable, ABC):
    """A pure map from ``domain`` to ``range``, batched over rows; calling never changes it.

    Subclasses set ``domain`` and ``range`` and implement ``_forward``. Tensors kept as attributes move with
    ``to``. Parameters that differ from case to case have a leading axis of length ``n_cases``; ``rows``
    picks them for a batch.
    """

    domain: Space
    range: Space
    #: Names of the optional abilities of this class; instances may narrow or widen them in ``capabilities``.
    provides: ClassVar[frozenset[str]] = frozenset({"vjp"})

    @abstractmethod
    def _forward(self, x: Tensor) -> Tensor:
        """Map ``(B, *domain.shape)`` to ``(B, *range.shape)``; inputs are checked already."""

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the operator, ``(B, *domain.shape) -> (B, *range.shape)``, differentiably."""
        self.domain.check(x, f"Input of {self.name}")
        return self._forward(x)

    def vjp(self, x: Tensor, v: Tensor) -> Tensor:
        """Return ``J(x)^H v``, ``(B, *range.shape) -> (B, *domain.shape)``."""
        if not len(x):  # nothing to differentiate, and not every operator of others keeps the graph of nothing
            return torch.zeros_like(x)
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            (out,) = torch.autograd.grad(self(x), x, v)
        return out

    def jvp(self, x: Tensor, dx: Tensor) -> Tensor:
        """Return ``J(x) dx``, ``(B, *domain.shape) -> (B, *range.shape)``, by two reverse passes."""
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            y = self(x)
            v = torch.zeros_like(y, requires_grad=True)
            (back,) = torch.autograd.grad(y, x, v, create_graph=True)
            (out,) = torch.autograd.grad(back, v, dx)
        return out

    @property
    def name(self) -> str:
        """Name used in messages and provenance."""
        return type(self).__name__

    @property
    def capabilities(self) -> frozenset[str]:
        """Abilities of this object, among ``linear vjp normal svd pinv prox conditional``."""
        return self.provides

    @property
    def n_cases(self) -> int | None:
        """Number of cases that the parameters are given for, or None where all cases share them."""
        return None

    @property
    def support(self) -> Tensor | None:
        """Zeros and ones over the range, ``(1 or N, ...)`` broadcastable: where data exist at all.

        None means everywhere. Elsewhere data are zero by convention, and simulated data carry no noise.
        """
        return None

    def rows(self, index: Tensor) -> Operator:
        """Return the operator whose row ``r`` has the parameters of case ``index[r]``."""
        return self

    def describe(self) -> dict[str, Any]:
        """Return what provenance records: name, spaces and a digest of the parameter arrays."""
        return {
            "name": self.name,
            "domain": str(self.domain),
            "range": str(self.range),
            "sha256": tensor_digest(self.__dict__),
        }

    def __matmul__(self, other: Operator) -> Operator:
        """Compose: ``(self @ other)(x) = self(other(x))``."""
        return compose(self, other)

    def _repr_html_(self) -> str:
        from invdiff.html import operator_html

        return operator_html(self)

    def __repr__(self) -> str:
        abilities = ", ".join(sorted(self.capabilities))
        return f"{self.name}\n  domain {self.domain}\n  range  {self.range}\n  can    {abilities}"


class LinearOperator(Operator):
    """A linear map with an exact adjoint for ``<a, b> = Re sum conj(a) b``, wired as autograd backward.

    Subclasses implement ``_forward`` and ``_adjoint``; ``normal``, ``svd``, ``pinv`` and ``prox`` where the
    structure gives a fast or closed form (and then name it in ``provides``).
    """

    provides: ClassVar[frozenset[str]] = frozenset({"linear", "vjp", "normal"})

    @abstractmethod
    def _adjoint(self, y: Tensor) -> Tensor:
        """Map ``(B, *range.shape)`` to ``(B, *domain.shape)``; inputs are checked already."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return ``A x``, ``(B, *domain.shape) -> (B, *range.shape)``."""
        self.domain.check(x, f"Input of {self.name}")
        return apply_linear(x, self._forward, self._adjoint)

    def adjoint(self, y: Tensor) -> Tensor:
        """Return ``A^H y``, ``(B, *range.shape) -> (B, *domain.shape)``."""
        self.range.check(y, f"Input of the adjoint of {self.name}")
        return apply_linear(y, self._adjoint, self._forward)

    def normal(self, x: Tensor) -> Tensor:
        """Return ``A^H A x``, ``(B, *domain.shape)``."""
        return self.adjoint(self(x))

    def vjp(self, x: Tensor, v: Tensor) -> Tensor:
        """Return ``A^H v`` (the Jacobian does not depend on ``x``)."""
        return self.adjoint(v)

    def jvp(self, x: Tensor, dx: Tensor) -> Tensor:
        """Return ``A dx`` (the Jacobian does not depend on ``x``)."""
        return self(dx)

    def prox(self, z: Tensor, y: Tensor, rho: Tensor) -> Tensor:
        """Return ``argmin_x ||A x - y||^2 + rho ||x - z||^2`` in closed form; ``rho`` has shape ``(B,)``."""
        raise InvdiffError(f"{self.name} has no closed-form prox; solve by conjugate gradients instead.")

    def svd(self) -> SVD:
        """Return the singular value decomposition where the structure gives one."""
        raise InvdiffError(f"{self.name} has no singular value decomposition.")

    def pinv(self, y: Tensor) -> Tensor:
        """Return the pseudo-inverse ``A^+ y`` where the structure gives one."""
        raise InvdiffError(f"{self.name} has no closed-form pseudo-inverse.")

    def rows(self, index: Tensor) -> LinearOperator:
        """Return the operator whose row ``r`` has the parameters of case ``index[r]``."""
        return self

    @property
    def H(self) -> LinearOperator:
        """The adjoint as an operator."""
        from invdiff.algebra import Adjoint

        return Adjoint(self)

    def __add__(self, other: LinearOperator) -> LinearOperator:
        """Sum of two maps with the same spaces."""
        from invdiff.algebra import Sum

        return Sum((self, other))

    def __mul__(self, factor: complex) -> LinearOperator:
        """Scale by a number."""
        from invdiff.algebra import Scaled

        return Scaled(self, factor)

    __rmul__ = __mul__

    def __neg__(self) -> LinearOperator:
        """Scale by -1."""
        return self * -1.0

    def __sub__(self, other: LinearOperator) -> LinearOperator:
        """Difference of two maps with the same spaces."""
        return self + (-other)


class _Linear(torch.autograd.Function):
    """Autograd node of a linear map: backward is the exact adjoint, forward mode is the map itself."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, apply: Callable[[Tensor], Tensor], transpose: Callable[[Tensor], Tensor]
    ) -> Tensor:
        ctx.map, ctx.transpose, ctx.dtype = apply, transpose, x.dtype
        return apply(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Linear.apply(grad, ctx.transpose, ctx.map).to(ctx.dtype), None, None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, _apply: None, _transpose: None) -> Tensor:
        return ctx.map(dx)


def apply_linear(x: Tensor, apply: Callable[[Tensor], Tensor], transpose: Callable[[Tensor], Tensor]) -> Tensor:
    """Return ``apply(x)`` of a linear map, differentiated by its adjoint ``transpose`` instead of its graph."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _Linear.apply(x, apply, transpose)
    return apply(x)


class Affine(Operator):
    """``x -> A x + b`` with a linear ``A`` and a constant ``b`` of shape ``(1 or N, *range.shape)``."""

    def __init__(self, linear: LinearOperator, offset: Tensor) -> None:
        self.linear, self.offset = linear, offset
        self.domain, self.range = linear.domain, linear.range

    @property
    def name(self) -> str:
        """Name of the linear part with a constant."""
        return f"{self.linear.name} + b"

    @property
    def n_cases(self) -> int | None:
        """Cases of the linear part or of the constant."""
        return self.offset.shape[0] if self.offset.shape[0] > 1 else self.linear.n_cases

    def _forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.offset

    def vjp(self, x: Tensor, v: Tensor) -> Tensor:
        """Return ``A^H v``."""
        return self.linear.adjoint(v)

    def jvp(self, x: Tensor, dx: Tensor) -> Tensor:
        """Return ``A dx``."""
        return self.linear(dx)

    def rows(self, index: Tensor) -> Operator:
        """Pick the parameters of the given cases."""
        return Affine(self.linear.rows(index), take_rows(self.offset, index))


def compose(outer: Operator, inner: Operator) -> Operator:
    """Return ``x -> outer(inner(x))``, linear where both parts are.

    Raises:
        InvdiffError: If ``inner`` is no operator, or its range is not the domain of ``outer``.
    """
    from invdiff.algebra import Composed, ComposedLinear

    if not isinstance(inner, Operator):
        raise InvdiffError(
            f"Cannot compose {outer.name} @ {type(inner).__name__}: @ joins two operators; "
            "call the operator to apply it to a tensor, and scale it with *."
        )
    if outer.domain.shape != inner.range.shape or outer.domain.is_complex != inner.range.is_complex:
        raise InvdiffError(
            f"Cannot compose {outer.name} @ {inner.name}: {inner.name} gives {inner.range}, "
            f"and {outer.name} takes {outer.domain}."
        )
    if isinstance(outer, LinearOperator) and isinstance(inner, LinearOperator):
        return ComposedLinear(outer, inner)
    return Composed(outer, inner)


def stack(parts: Sequence[LinearOperator]) -> LinearOperator:
    """Return ``x -> (A x, B x, ...)`` for operators with equal spaces."""
    from invdiff.algebra import Stack

    if not parts:
        raise InvdiffError("A stack needs at least one operator, and the list is empty.")
    return Stack(parts)
