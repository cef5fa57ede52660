"""Operators made of functions on numpy arrays: a simulator, compiled code, another program.

```python
A = invdiff.bridge.numpy.from_function(simulate, domain=(1, 64, 64), range=(120,))
posterior = invdiff.sample(invdiff.Problem(A, likelihoods.Gaussian(0.1), y), prior, "enkg", draws=128)
```

Such an operator has no derivatives; ``invdiff samplers`` and the message of a sampler that needs them name those
that do without.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from invdiff.errors import InvdiffError
from invdiff.operator import Operator
from invdiff.spaces import Space

Function = Callable[[np.ndarray], Any]


class FunctionOperator(Operator):
    """``x -> f(x)`` for a function on numpy arrays, row by row or on whole batches; no derivatives.

    The function gets its own copy of every input, in the precision of ``domain``, on the CPU.
    """

    provides = frozenset()

    def __init__(self, f: Function, domain: Space, range: Space, batched: bool) -> None:
        self.function, self.domain, self.range, self.batched = f, domain, range, batched

    @property
    def name(self) -> str:
        """Name of the function."""
        return str(getattr(self.function, "__name__", type(self.function).__name__))

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the function; refuse to be differentiated rather than pass a gradient of zero."""
        if torch.is_grad_enabled() and x.requires_grad:
            raise self._no_derivative()
        return super().__call__(x)

    def _forward(self, x: Tensor) -> Tensor:
        rows = x.detach().to("cpu", self.domain.dtype).resolve_conj().resolve_neg().numpy()
        out = np.empty((len(rows), *self.range.shape), dtype=torch.empty(0, dtype=self.range.dtype).numpy().dtype)
        if self.batched:
            out[:] = self._evaluate(rows, out.shape, "")
        else:
            for r, row in enumerate(rows):
                out[r] = self._evaluate(row, out.shape[1:], f" on row {r}")
        return torch.from_numpy(out).to(x.device)

    def _evaluate(self, x: np.ndarray, shape: tuple[int, ...], where: str) -> np.ndarray:
        """Return ``f(x)``, checked; ``where`` says which row it is in messages."""
        try:
            y = np.asarray(self.function(x.copy()))
        except MemoryError:  # the driver halves its batch and tries again
            raise
        except Exception as error:
            text = " ".join(str(error).split())
            raise InvdiffError(
                f"The function {self.name} failed{where} with {type(error).__name__}{': ' if text else ''}{text}"
            ) from error
        if y.shape != shape:
            hint = "(B, ...)" if self.batched else "one row, without a batch axis"
            raise InvdiffError(
                f"The function {self.name} gave shape {y.shape}{where}, expected {shape} for the range "
                f"{self.range} (it was called on {hint})."
            )
        if y.dtype.kind not in "buifc" or (y.dtype.kind == "c") != self.range.is_complex:
            raise InvdiffError(
                f"The function {self.name} gave {y.dtype} values{where}, expected "
                f"{'complex' if self.range.is_complex else 'real'} numbers for the range {self.range}."
            )
        return y

    def vjp(self, x: Tensor, v: Tensor) -> Tensor:
        """Refuse: there are no derivatives."""
        raise self._no_derivative()

    def jvp(self, x: Tensor, dx: Tensor) -> Tensor:
        """Refuse: there are no derivatives."""
        raise self._no_derivative()

    def _no_derivative(self) -> InvdiffError:
        return InvdiffError(
            f"{self.name} is a numpy function and has no derivatives; use a sampler that needs forward "
            "evaluations alone, e.g. enkg."
        )

    def describe(self) -> dict[str, Any]:
        """Describe the spaces, and the source of the function where it can be read.

        What the function closes over or reads elsewhere is not seen, so a changed constant is not noticed.
        """
        try:
            source = inspect.getsource(self.function)
        except (OSError, TypeError):
            source = self.name
        return {**super().describe(), "source_sha256": hashlib.sha256(source.encode()).hexdigest()}


def from_function(
    f: Function, domain: Space | Sequence[int], range: Space | Sequence[int], batched: bool = False
) -> Operator:
    """Return an operator ``x -> f(x)`` for a function on numpy arrays.

    Args:
        f: Maps an array of ``domain``'s shape to one of ``range``'s; the same input must give the same output.
            It may return NaN for an input that its simulation cannot do: that draw is then flagged.
        domain: Space of ``x`` without the row axis, or its shape alone (float64).
        range: Space of the data, or its shape alone (float64).
        batched: Whether ``f`` takes and returns whole batches ``(B, ...)``, whose rows must not mix.

    Raises:
        InvdiffError: If ``f`` cannot be called; when the operator is applied, if ``f`` fails or returns another
            shape, or complex numbers for real ones or the reverse.
    """
    if not callable(f):
        raise InvdiffError(f"from_function needs a function on numpy arrays, got {type(f).__name__}.")
    return FunctionOperator(f, _space(domain), _space(range), batched)


def _space(given: Space | Sequence[int]) -> Space:
    return given if isinstance(given, Space) else Space(tuple(given), torch.float64)
