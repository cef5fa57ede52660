"""The operator contract: a pure, batched map between two spaces that knows no noise.

``Operator`` has ``domain``, ``range``, ``__call__``, ``vjp``, ``jvp``. ``LinearOperator`` adds
``adjoint``, ``.H``, ``normal`` and the algebra (``@``, ``+``, scaling, ``stack``). The inner product is
``Re sum conj(a) b`` throughout, so the adjoint of a map from real images to complex data ends in a real part.
"""

from __future__ import annotations

import copy
import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from invdiff.errors import InvdiffError
from invdiff.spaces import Space


@dataclass(frozen=True)
class SVD:
    """Singular value decomposition ``A = U diag(s) V^H`` in as many coordinates as the domain has.

    Args:
        s: Singular values, shape ``(1 or N, *coordinates)``, zero on the null space.
        vh: ``(B, *domain) -> (B, *coordinates)``, unitary; ``v`` is its inverse.
        v: ``(B, *coordinates) -> (B, *domain)``.
        uh: ``(B, *range) -> (B, *coordinates)``: ``U^H y``, zero where ``s`` is zero.
        u: ``(B, *coordinates) -> (B, *range)``: ``U c``, which ignores coordinates where ``s`` is zero.
    """

    s: Tensor
    vh: Callable[[Tensor], Tensor]
    v: Callable[[Tensor], Tensor]
    uh: Callable[[Tensor], Tensor]
    u: Callable[[Tensor], Tensor]


class Operator(ABC):
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

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Any:
        """Return a copy on another device or in the precision of ``dtype`` (complex stays complex)."""
        new = copy.copy(self)
        for key, value in self.__dict__.items():
            new.__dict__[key] = _move(value, device, dtype)
        return new

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
        return _linear(x, self._forward, self._adjoint)

    def adjoint(self, y: Tensor) -> Tensor:
        """Return ``A^H y``, ``(B, *range.shape) -> (B, *domain.shape)``."""
        self.range.check(y, f"Input of the adjoint of {self.name}")
        return _linear(y, self._adjoint, self._forward)

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
        return Adjoint(self)

    def __add__(self, other: LinearOperator) -> LinearOperator:
        """Sum of two maps with the same spaces."""
        return Sum((self, other))

    def __mul__(self, factor: complex) -> LinearOperator:
        """Scale by a number."""
        return Scaled(self, factor)

    __rmul__ = __mul__

    def __neg__(self) -> LinearOperator:
        """Scale by -1."""
        return Scaled(self, -1.0)

    def __sub__(self, other: LinearOperator) -> LinearOperator:
        """Difference of two maps with the same spaces."""
        return Sum((self, -other))


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


def _linear(x: Tensor, apply: Callable[[Tensor], Tensor], transpose: Callable[[Tensor], Tensor]) -> Tensor:
    if torch.is_grad_enabled() and x.requires_grad:
        return _Linear.apply(x, apply, transpose)
    return apply(x)


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
        self.parts = tuple(parts)
        self.domain, self.range = parts[0].domain, parts[0].range
        for p in self.parts[1:]:
            _same(p.domain, self.domain, "domains of a sum")
            _same(p.range, self.range, "ranges of a sum")

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
        self.parts = tuple(parts)
        first = parts[0]
        for p in self.parts[1:]:
            _same(p.domain, first.domain, "domains of a stack")
            _same(p.range, first.range, "ranges of a stack")
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
        if isinstance(factor, complex) and factor.imag and not (base.domain.is_complex and base.range.is_complex):
            raise InvdiffError(f"A complex factor needs complex spaces, and {base.name} has a real one.")
        if not math.isfinite(abs(factor)):
            raise InvdiffError(f"The factor of {base.name} must be finite, got {factor}.")
        self.parts = (base,)
        self.factor = factor if isinstance(factor, complex) and factor.imag else float(factor.real)
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
        InvdiffError: If the range of ``inner`` is not the domain of ``outer``.
    """
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
    if not parts:
        raise InvdiffError("A stack needs at least one operator, and the list is empty.")
    return Stack(parts)


def take_rows(values: Tensor, index: Tensor) -> Tensor:
    """Pick rows of a per-case parameter ``(N, ...)``; one shared by all cases ``(1, ...)`` stays as it is."""
    return values if values.shape[0] == 1 else values[index.to(values.device)]


def tensor_digest(values: Any) -> str:
    """Return the SHA-256 of all tensors inside ``values`` (nested containers and operators), with shapes."""
    digest = hashlib.sha256()

    def visit(value: Any) -> None:
        if isinstance(value, Tensor):
            digest.update(f"{tuple(value.shape)}{value.dtype}".encode())
            digest.update(value.detach().cpu().contiguous().resolve_conj().numpy().tobytes())
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                digest.update(str(key).encode())
                visit(value[key])
        elif isinstance(value, (list, tuple)):
            for item in value:
                visit(item)
        elif isinstance(value, Operator) or hasattr(value, "is_affine"):  # operators and codecs
            visit(value.__dict__)
        elif isinstance(value, (str, int, float, complex, bool, Space)):
            digest.update(str(value).encode())

    visit(values)
    return digest.hexdigest()


def _same(a: Space, b: Space, what: str) -> None:
    if a.shape != b.shape or a.is_complex != b.is_complex:
        raise InvdiffError(f"The {what} differ: {a} and {b}.")


def _move(value: Any, device: torch.device | str | None, dtype: torch.dtype | None) -> Any:
    if isinstance(value, Tensor):
        target = None
        if dtype is not None and (value.is_floating_point() or value.is_complex()):
            target = dtype.to_complex() if value.is_complex() else dtype.to_real()
        return value.to(device=device, dtype=target)
    if isinstance(value, Space) and dtype is not None:
        return value.with_precision(dtype)
    if isinstance(value, Operator):
        return value.to(device, dtype)
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(_move(v, device, dtype) for v in value)
    if isinstance(value, list):
        return [_move(v, device, dtype) for v in value]
    if isinstance(value, dict):
        return {k: _move(v, device, dtype) for k, v in value.items()}
    return value
