"""Checks that any operator must pass; public, so that your own operators can be tested the same way.

>>> from invdiff import operators
>>> from invdiff.testing import check_operator
>>> print(check_operator(operators.Identity((1, 4, 4))))  # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from invdiff.errors import InvdiffError
from invdiff.operator import LinearOperator, Operator
from invdiff.spaces import Space, norm, per_row, real_inner
from invdiff.tensors import tensor_digest

#: Largest number of real components for which dense matrices are formed.
DENSE_LIMIT = 1024


@dataclass(frozen=True)
class Check:
    """One property of an operator: its error, the bound on it, and a remark."""

    name: str
    error: float
    bound: float
    note: str = ""

    @property
    def ok(self) -> bool:
        """Whether the error is within its bound (NaN is not)."""
        return self.error <= self.bound


@dataclass(frozen=True)
class Report:
    """What :func:`check_operator` found; prints as a table.

    Args:
        title: Name of the operator.
        checks: All checks that apply to it.
    """

    title: str
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return all(c.ok for c in self.checks)

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the checks that failed."""
        return tuple(c.name for c in self.checks if not c.ok)

    def raise_if_failed(self) -> Report:
        """Return self, or raise ``InvdiffError`` with the table where a check failed."""
        if not self.ok:
            raise InvdiffError(f"{self.title} fails {', '.join(self.failed)}.\n{self}")
        return self

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        width = max(len(c.name) for c in self.checks)
        lines = [
            f"{self.title}: {'pass' if self.ok else 'FAIL'}",
            f"  {'check':{width}}  {'error':>9}  {'bound':>9}",
        ]
        for c in self.checks:
            verdict = "pass" if c.ok else "FAIL"
            lines.append(f"  {c.name:{width}}  {c.error:9.1e}  {c.bound:9.1e}  {verdict}  {c.note}".rstrip())
        return "\n".join(lines)

    __repr__ = __str__


def check_operator(op: Operator, seed: int = 0, tol: float | None = None) -> Report:
    """Check what the operator contract promises, on random inputs.

    Every operator: shapes, dtype, repeatability, purity, independent rows, empty and strided batches, ``jvp``
    against finite differences, ``vjp`` and ``jvp`` against autograd. Linear ones: linearity, adjoint, normal,
    second derivatives, dense matrices of both directions. Declared closed forms: prox, svd, pinv and
    conditional against their defining equations.

    Args:
        op: The operator; with per-case parameters, one row per case is used.
        seed: Seed of the inputs.
        tol: Bound on relative errors; by default 1e-10 in float64 and 1e-4 in float32.

    Returns:
        A report; ``report.ok`` is the verdict and ``print(report)`` shows every figure.
    """
    double = op.domain.real_dtype == torch.float64
    bound = tol if tol is not None else 1e-10 if double else 1e-4
    context = _Context(op, seed, bound, double)
    checks: list[Check] = []
    digest = tensor_digest(op)
    for suite in _suites(op):
        try:
            checks.extend(suite(context))
        except Exception as error:  # any failure of the operator under test is a finding, not a crash
            note = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            checks.append(Check(suite.__name__.strip("_").replace("_", " "), float("inf"), bound, note[:100]))
    changed = float(tensor_digest(op) != digest)
    checks.append(Check("unchanged by use", changed, 0.0, "digest of all parameters"))
    return Report(op.name, tuple(checks))


class _Context:
    """The operator under test with inputs for it."""

    def __init__(self, op: Operator, seed: int, bound: float, double: bool) -> None:
        self.op, self.seed, self.bound, self.double = op, seed, bound, double
        self.batch = 3 if op.n_cases is None else op.n_cases
        self.x, self.x2, self.z = (self._draw(op.domain, i) for i in range(3))
        self.y, self.y2 = (self._draw(op.range, i) for i in (3, 4))

    def _draw(self, space: Space, offset: int) -> Tensor:
        return space.randn(self.batch, seed=1000 * self.seed + offset, device=device_of(self.op))

    @property
    def linear(self) -> LinearOperator:
        return cast(LinearOperator, self.op)

    def check(self, name: str, a: Tensor, b: Tensor, bound: float | None = None, note: str = "") -> Check:
        return Check(name, _gap(a, b), self.bound if bound is None else bound, note)


def _suites(op: Operator) -> list[Callable[[_Context], Iterator[Check]]]:
    suites: list[Callable[[_Context], Iterator[Check]]] = [
        _shape_and_dtype,
        _repeatable,
        _rows,
        _batches,
        _derivatives,
    ]
    if not isinstance(op, LinearOperator):
        return suites
    suites += [_linearity, _adjoint, _normal, _second_derivative]
    if max(op.domain.real_size, op.range.real_size) <= DENSE_LIMIT:
        suites.append(_dense)
    for name, suite in (("prox", _prox), ("svd", _svd), ("pinv", _pinv), ("conditional", _conditional)):
        if name in op.capabilities:
            suites.append(suite)
    return suites


def _shape_and_dtype(c: _Context) -> Iterator[Check]:
    out = c.op(c.x)
    wrong = tuple(out.shape) != (c.batch, *c.op.range.shape)
    yield Check("shape of the output", float(wrong), 0.0, f"{tuple(out.shape)}")
    yield Check("dtype of the output", float(out.dtype != c.op.range.dtype), 0.0, f"{out.dtype}")
    other = c.x.to(c.op.domain.with_precision(torch.float32 if c.double else torch.float64).dtype)
    loose = max(c.bound, 1e-4)
    yield c.check("input of other precision", c.op(other).to(out.dtype), out, loose)
    if isinstance(c.op, LinearOperator):
        back = c.op.adjoint(c.y)
        wrong = back.dtype != c.op.domain.dtype or tuple(back.shape) != (c.batch, *c.op.domain.shape)
        yield Check("shape and dtype of the adjoint", float(wrong), 0.0, f"{tuple(back.shape)} {back.dtype}")


def _repeatable(c: _Context) -> Iterator[Check]:
    x, y = c.x.clone(), c.y.clone()
    first = c.op(x)
    c.op(c.x2)
    yield c.check("same input, same output", c.op(x), first)
    if isinstance(c.op, LinearOperator):
        back = c.op.adjoint(y)
        c.op.adjoint(c.y2)
        yield c.check("same input, same adjoint", c.op.adjoint(y), back)
    touched = not (torch.equal(x, c.x) and torch.equal(y, c.y))
    yield Check("inputs left alone", float(touched), 0.0)


def _rows(c: _Context) -> Iterator[Check]:
    one = [torch.tensor([i]) for i in range(c.batch)]
    apart = torch.cat([c.op.rows(i)(c.x[i]) for i in one])
    yield c.check("rows do not mix", apart, c.op(c.x))
    flip = torch.arange(c.batch - 1, -1, -1)
    twice = torch.cat([flip, flip[:1]])
    yield c.check("rows follow their case", c.op.rows(twice)(c.x[twice]), c.op(c.x)[twice])
    if isinstance(c.op, LinearOperator):
        linear = c.op
        apart = torch.cat([linear.rows(i).adjoint(c.y[i]) for i in one])
        yield c.check("rows do not mix in the adjoint", apart, linear.adjoint(c.y))
        yield c.check(
            "rows of the normal operator", linear.rows(twice).normal(c.x[twice]), linear.normal(c.x)[twice]
        )


def _batches(c: _Context) -> Iterator[Check]:
    strided = torch.stack([c.x, c.x2], dim=-1)[..., 0]
    yield c.check("strided input", c.op(strided), c.op(c.x))
    expanded = c.x[:1].expand(c.batch, *c.op.domain.shape)
    yield c.check("expanded input", c.op(expanded), c.op(expanded.contiguous()))
    none = c.op.rows(torch.zeros(0, dtype=torch.long))
    try:
        found = [(none(c.x[:0]), c.op.range), (none.vjp(c.x[:0], c.y[:0]), c.op.domain)]
        if isinstance(none, LinearOperator):
            found += [(none.adjoint(c.y[:0]), c.op.domain), (none.normal(c.x[:0]), c.op.domain)]
        wrong = sum(tuple(out.shape) != (0, *space.shape) for out, space in found)
        note = "gives an empty result"
    except InvdiffError:
        wrong, note = 0, "is refused"
    yield Check("empty batch", float(wrong), 0.0, note)


def _derivatives(c: _Context) -> Iterator[Check]:
    x = c.x.clone().requires_grad_(True)
    (auto,) = torch.autograd.grad(c.op(x), x, c.y)
    yield c.check("vjp against autograd", c.op.vjp(c.x, c.y), auto)
    _, forward = torch.autograd.functional.jvp(c.op, (c.x,), (c.x2,))
    dx = c.op.jvp(c.x, c.x2)
    yield c.check("jvp against autograd", dx, forward)
    # A linear map may take any step; a nonlinear one loses half the digits or more to cancellation.
    linear = isinstance(c.op, LinearOperator)
    step = 1.0 if linear else 1e-5 if c.double else 1e-2
    difference = (c.op(c.x + step * c.x2) - c.op(c.x - step * c.x2)) / (2 * step)
    loose = c.bound if linear else max(c.bound, 1e-7 if c.double else 2e-2)
    yield c.check("jvp against finite differences", dx, difference, loose)
    left, right = real_inner(c.y, dx), real_inner(c.op.vjp(c.x, c.y), c.x2)
    yield Check("vjp against jvp", _worst(left - right, norm(c.y) * norm(dx)), c.bound)


def _linearity(c: _Context) -> Iterator[Check]:
    a, b = 0.7, -1.9
    yield c.check("linear", c.op(a * c.x + b * c.x2), a * c.op(c.x) + b * c.op(c.x2))
    back = a * c.linear.adjoint(c.y) + b * c.linear.adjoint(c.y2)
    yield c.check("linear adjoint", c.linear.adjoint(a * c.y + b * c.y2), back)
    zero = norm(c.op(torch.zeros_like(c.x))).max()
    yield Check("zero to zero", float(zero), 0.0)


def _adjoint(c: _Context) -> Iterator[Check]:
    ax, back = c.op(c.x), c.linear.adjoint(c.y)
    gap = real_inner(ax, c.y) - real_inner(c.x, back)
    yield Check("adjoint, random data", _worst(gap, norm(ax) * norm(c.y)), c.bound, "<A x, y> = <x, A^H y>")
    # Random data are nearly orthogonal to A x, which hides a wrong factor; data A x' with x' near x do not.
    data = c.op(c.x + 0.1 * c.x2)
    gap = real_inner(ax, data) - real_inner(c.x, c.linear.adjoint(data))
    yield Check("adjoint, aligned data", _worst(gap, norm(ax) * norm(data)), c.bound)


def _normal(c: _Context) -> Iterator[Check]:
    out = c.linear.normal(c.x)
    yield c.check("normal = adjoint of forward", out, c.linear.adjoint(c.op(c.x)))
    yield Check("dtype of the normal", float(out.dtype != c.op.domain.dtype), 0.0)
    x = c.x.clone().requires_grad_(True)
    (auto,) = torch.autograd.grad(c.linear.normal(x), x, c.x2)
    yield c.check("normal under autograd", auto, c.linear.normal(c.x2))


def _second_derivative(c: _Context) -> Iterator[Check]:
    """The Hessian of half the squared norm of A x is the normal operator."""
    x = c.x.clone().requires_grad_(True)
    ax = c.op(x)
    (grad,) = torch.autograd.grad(0.5 * real_inner(ax, ax).sum(), x, create_graph=True)
    (hessian,) = torch.autograd.grad(real_inner(grad, c.x2).sum(), x)
    yield c.check("double backward", hessian, c.linear.normal(c.x2))


def _dense(c: _Context) -> Iterator[Check]:
    for case in sorted({0, c.batch - 1} if c.op.n_cases else {0}):
        forward, back = dense_matrix(c.linear, case), dense_matrix(c.linear.H, case)
        suffix = f", case {case}" if c.op.n_cases else ""
        # one norm for the whole matrix, because single rows may be zero up to rounding
        transposed = forward.mT.reshape(1, -1)
        yield c.check(f"dense adjoint = transpose{suffix}", back.reshape(1, -1), transposed)
        columns = _to_real(c.x[case : case + 1])[0]
        yield c.check(f"dense matrix{suffix}", (forward @ columns)[None], _to_real(c.op(c.x))[case : case + 1])


def _prox(c: _Context) -> Iterator[Check]:
    for value in (1e-2, 1.0, 30.0):
        rho = torch.linspace(value, 2 * value, c.batch, dtype=c.op.domain.real_dtype, device=c.x.device)
        p = c.linear.prox(c.z, c.y, rho)
        pull = per_row(rho, p) * (p - c.z)
        grad = c.linear.normal(p) - c.linear.adjoint(c.y) + pull
        size = norm(c.linear.adjoint(c.y)) + norm(per_row(rho, p) * c.z) + norm(c.linear.normal(p))
        yield Check(f"prox optimal, rho {value:g}", _worst(norm(grad), size), c.bound, "gradient is zero")
        if p.dtype != c.op.domain.dtype:
            yield Check("dtype of the prox", 1.0, 0.0, f"{p.dtype}")
    twice = torch.tensor([c.batch - 1, 0, c.batch - 1])
    picked = c.linear.rows(twice).prox(c.z[twice], c.y[twice], rho[twice])
    yield c.check("rows of the prox", picked, p[twice])


def _real_size(x: Tensor) -> int:
    return x[0].numel() * (2 if x.is_complex() else 1)


def _svd(c: _Context) -> Iterator[Check]:
    d = c.linear.svd()
    coords = d.vh(c.x)
    yield Check("singular values >= 0", float((-d.s).clamp_min(0).max()), 0.0)
    back = d.v(coords)
    whole = _real_size(coords) == _real_size(c.x)
    yield c.check(
        "svd: V V^H = I" if whole else "svd: V V^H projects",
        back if whole else d.v(d.vh(back)),
        c.x if whole else back,
    )
    yield c.check("svd: V^H V = I", d.vh(d.v(coords)), coords)
    yield c.check("svd: V^H keeps norms", norm(coords)[None], norm(back)[None])
    yield c.check("svd: U s V^H = A", d.u(d.s * coords), c.op(c.x))
    yield c.check("svd: V s U^H = A^H", d.v(d.s * d.uh(c.y)), c.linear.adjoint(c.y))
    seen = coords * (d.s > 0)
    yield c.check("svd: U^H U = I where s > 0", d.uh(d.u(coords)), seen)


def _pinv(c: _Context) -> Iterator[Check]:
    def project(x: Tensor) -> Tensor:
        return c.linear.pinv(c.op(x))

    ax, plus = c.op(c.x), c.linear.pinv(c.y)
    yield c.check("pinv: A A+ A = A", c.op(c.linear.pinv(ax)), ax)
    yield c.check("pinv: A+ A A+ = A+", c.linear.pinv(c.op(plus)), plus)
    gap = real_inner(project(c.x), c.x2) - real_inner(c.x, project(c.x2))
    yield Check("pinv: A+ A symmetric", _worst(gap, norm(c.x) * norm(c.x2)), c.bound)
    gap = real_inner(c.op(plus), c.y2) - real_inner(c.y, c.op(c.linear.pinv(c.y2)))
    yield Check("pinv: A A+ symmetric", _worst(gap, norm(c.y) * norm(c.y2)), c.bound)


def _conditional(c: _Context) -> Iterator[Check]:
    """The draw is prox + L noise with a symmetric L, and (A^H A / sigma^2 + I / tau^2) L L = I."""
    draw = cast(Any, c.op).conditional
    sigma = torch.linspace(0.3, 0.6, c.batch, dtype=c.op.domain.real_dtype, device=c.x.device)
    tau = torch.linspace(1.5, 0.8, c.batch, dtype=c.op.domain.real_dtype, device=c.x.device)
    mean = draw(c.z, c.y, sigma, tau, torch.zeros_like(c.z))
    yield c.check("conditional mean = prox", mean, c.linear.prox(c.z, c.y, (sigma / tau) ** 2))

    def spread(noise: Tensor) -> Tensor:
        return draw(torch.zeros_like(c.z), torch.zeros_like(c.y), sigma, tau, noise)

    gap = real_inner(spread(c.x), c.x2) - real_inner(c.x, spread(c.x2))
    yield Check("conditional spread symmetric", _worst(gap, norm(c.x) * norm(c.x2)), c.bound)
    covered = spread(spread(c.x))
    precision = c.linear.normal(covered) / per_row(sigma, covered) ** 2 + covered / per_row(tau, covered) ** 2
    yield c.check("conditional covariance", precision, c.x)


def dense_matrix(op: LinearOperator, case: int = 0) -> Tensor:
    """Return the matrix of ``op`` on real components (real parts, then imaginary parts), ``(m, n)``.

    Args:
        op: A small linear operator.
        case: The case whose parameters are used.
    """
    n = op.domain.real_size
    basis = torch.eye(n, dtype=op.domain.real_dtype, device=device_of(op))
    x = basis.reshape(n, -1, *op.domain.shape)
    batch = torch.complex(x[:, 0], x[:, 1]) if op.domain.is_complex else x[:, 0]
    return _to_real(op.rows(torch.full((n,), case))(batch)).mT


def _to_real(x: Tensor) -> Tensor:
    x = x.flatten(1)
    return torch.cat([x.real, x.imag], 1) if x.is_complex() else x


def _gap(a: Tensor, b: Tensor) -> float:
    """Largest relative difference over rows; infinite where shapes differ."""
    if a.shape != b.shape:
        return float("inf")
    return _worst(norm(a - b), torch.maximum(norm(a), norm(b)))


def _worst(gap: Tensor, size: Tensor) -> float:
    gap = gap.abs()
    relative = torch.where(gap == 0, gap, gap / size)  # 0 / 0 is agreement
    return float(relative.nan_to_num(float("inf")).max()) if relative.numel() else 0.0


def device_of(op: Any) -> torch.device:
    """Device of the first tensor found among the attributes of an operator or codec."""
    for value in getattr(op, "__dict__", {}).values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, Tensor):
                return item.device
            if hasattr(item, "__dict__") and not isinstance(item, Space):
                found = device_of(item)
                if found.type != "cpu":
                    return found
    return torch.device("cpu")
