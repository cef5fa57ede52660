"""scipy's linear operators as operators and the reverse; PyLops and much else speak the same language.

```python
A = bridge.scipy.from_linop(pylops.FirstDerivative(64), (64,))   # any scipy LinearOperator or (sparse) matrix
x = scipy.sparse.linalg.lsqr(bridge.scipy.to_linop(A), y.numpy())[0]
```

scipy's operators map flat vectors; here they are flattened in C order, row by row. Between complex numbers both
sides agree on the adjoint. Where the image is real and the data are complex, the adjoint here is the real part of
theirs, and `to_linop` gives data as real parts followed by imaginary parts, so that scipy's solvers see real
numbers throughout.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from invdiff.errors import InvdiffError
from invdiff.operator import LinearOperator
from invdiff.spaces import Space
from invdiff.testing import device_of

Apply = Callable[[np.ndarray], Any]


class ArrayLinear(LinearOperator):
    """A linear map given as two functions on numpy arrays, one row at a time, on the CPU.

    Args:
        forward: Maps an array of ``domain.shape`` to one of ``range.shape``.
        adjoint: The reverse, for the inner product ``sum conj(a) b`` (its real part is taken where needed).
        domain: Space of the image.
        range: Space of the data.
        title: Name in messages.
        digest: What provenance tells operators apart by.
    """

    def __init__(
        self, forward: Apply, adjoint: Apply, domain: Space, range: Space, title: str, digest: str = ""
    ) -> None:
        self.forward_function, self.adjoint_function = forward, adjoint
        self.domain, self.range, self.title, self.digest = domain, range, title, digest

    @property
    def name(self) -> str:
        """Name of what was wrapped."""
        return self.title

    def _forward(self, x: Tensor) -> Tensor:
        return _by_row(self.forward_function, x, self.domain, self.range, self.title)

    def _adjoint(self, y: Tensor) -> Tensor:
        return _by_row(self.adjoint_function, y, self.range, self.domain, f"{self.title}.H")


def from_linop(
    linop: Any, shape: Space | Sequence[int], range: Space | Sequence[int] | None = None
) -> LinearOperator:
    """Return a scipy ``LinearOperator``, a matrix or a sparse matrix as an operator.

    Args:
        linop: What ``scipy.sparse.linalg.aslinearoperator`` takes; PyLops operators are such.
        shape: Shape of the image (in the dtype of the operator), or its whole space.
        range: Shape or space of the data; one flat axis where left out.

    Raises:
        InvdiffError: If it is no linear operator, or the sizes do not fit.
    """
    from scipy.sparse.linalg import aslinearoperator

    try:
        op = aslinearoperator(linop)
    except (TypeError, ValueError) as error:
        raise InvdiffError(f"{type(linop).__name__} is no scipy LinearOperator and no matrix.") from error
    given = np.result_type(op.dtype if op.dtype is not None else np.float64, np.float32)
    dtype = torch.from_numpy(np.empty(0, dtype=given)).dtype
    domain = _space(shape, dtype)
    data = Space((op.shape[0],), dtype, ("data",)) if range is None else _space(range, dtype)
    if (data.size, domain.size) != tuple(op.shape):
        raise InvdiffError(
            f"The operator has shape {tuple(op.shape)}, and the spaces have sizes {data.size} and {domain.size}."
        )
    if np.issubdtype(given, np.complexfloating) and not data.is_complex:
        raise InvdiffError(f"The operator is complex ({given}), and its range {data} is real.")
    title = f"scipy {type(linop).__name__}"
    return ArrayLinear(
        lambda x: op.matvec(x.reshape(-1)).reshape(data.shape),
        lambda y: op.rmatvec(y.reshape(-1)).reshape(domain.shape),
        domain,
        data,
        title,
        _digest(linop),
    )


def to_linop(operator: LinearOperator) -> Any:
    """Return an operator for one case as a ``scipy.sparse.linalg.LinearOperator``.

    Real images with complex data, and the reverse: the complex side is real parts followed by imaginary parts.

    Raises:
        InvdiffError: If it is not linear, or has parameters for several cases.
    """
    from scipy.sparse.linalg import LinearOperator as Linop

    one_case(operator)
    split = operator.domain.is_complex != operator.range.is_complex
    halves = (split and operator.domain.is_complex, split and operator.range.is_complex)
    dtype = operator.domain.dtype if not split else operator.domain.real_dtype

    def into(v: np.ndarray, space: Space, half: bool) -> Tensor:
        v = np.asarray(v).reshape(-1)
        v = v[: space.size] + 1j * v[space.size :] if half else v
        return torch.from_numpy(np.array(v)).to(space.dtype).reshape(1, *space.shape)

    def out(x: Tensor, half: bool) -> np.ndarray:
        v = x.detach().cpu().resolve_conj().reshape(-1)
        return np.asarray((torch.cat([v.real, v.imag]) if half else v).numpy())

    device = device_of(operator)
    return Linop(
        shape=(
            operator.range.size * (2 if halves[1] else 1),
            operator.domain.size * (2 if halves[0] else 1),
        ),
        matvec=lambda v: out(operator(into(v, operator.domain, halves[0]).to(device)), halves[1]),
        rmatvec=lambda v: out(operator.adjoint(into(v, operator.range, halves[1]).to(device)), halves[0]),
        dtype=torch.empty(0, dtype=dtype).numpy().dtype,
    )


def _by_row(f: Apply, x: Tensor, source: Space, target: Space, title: str) -> Tensor:
    rows = x.detach().to("cpu", source.dtype).resolve_conj().resolve_neg().numpy()
    kind = torch.empty(0, dtype=target.dtype).numpy().dtype
    out = np.empty((len(rows), *target.shape), dtype=kind)
    for r, row in enumerate(rows):
        y = np.asarray(f(row.copy()))
        if y.shape != target.shape:
            raise InvdiffError(f"{title} gave shape {y.shape}, expected {target.shape}.")
        out[r] = y if target.is_complex else y.real
    return torch.from_numpy(out).to(x.device)


def one_case(operator: Any) -> None:
    """Refuse what is no linear operator, or is one per case."""
    if not isinstance(operator, LinearOperator):
        raise InvdiffError(f"A linear operator is needed, and {type(operator).__name__} is none.")
    if operator.n_cases not in (None, 1):
        raise InvdiffError(
            f"{operator.name} has parameters for {operator.n_cases} cases; pick one with rows(torch.tensor([i]))."
        )


def _space(given: Space | Sequence[int], dtype: torch.dtype) -> Space:
    return given if isinstance(given, Space) else Space(tuple(given), dtype)


def _digest(linop: Any) -> str:
    """Return a digest of a matrix; of anything else its text, which does not see what it closes over."""
    data = getattr(linop, "data", None)
    if isinstance(linop, np.ndarray):
        return hashlib.sha256(np.ascontiguousarray(linop).tobytes()).hexdigest()
    if isinstance(data, np.ndarray):
        return hashlib.sha256(data.tobytes() + str(linop.shape).encode()).hexdigest()
    return str(type(linop))
