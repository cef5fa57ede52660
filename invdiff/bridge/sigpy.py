"""sigpy's linear operators as operators and the reverse.

```python
A = bridge.sigpy.from_linop(sigpy.mri.linop.Sense(maps), torch.complex64)   # (1, y, x) to (coil, ky, kx)
linop = bridge.sigpy.to_linop(operators.MultiCoilMRI(mask, maps))           # for sigpy's apps
```

sigpy's arrays have no channel axis: an image ``(y, x)`` there is ``(1, y, x)`` here. It works on numpy arrays, so
rows are done one by one on the CPU.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch

from invdiff.bridge.scipy import ArrayLinear, one_case
from invdiff.errors import InvdiffError
from invdiff.operator import LinearOperator
from invdiff.spaces import Space
from invdiff.testing import device_of


def from_linop(linop: Any, dtype: torch.dtype = torch.complex64, *, channel: bool | None = None) -> LinearOperator:
    """Return a sigpy ``Linop`` as an operator between spaces of ``dtype``.

    Args:
        linop: The linear operator.
        dtype: complex64 or complex128, or a real dtype for operators that keep real numbers real.
        channel: Whether the image gets a leading channel axis of one; where left out, images of two axes do.

    Raises:
        InvdiffError: If it is no ``Linop``.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sigpy.linop import Linop

    if not isinstance(linop, Linop):
        raise InvdiffError(f"from_linop needs a sigpy Linop, got {type(linop).__name__}.")
    image = tuple(int(n) for n in linop.ishape)
    with_channel = len(image) == 2 if channel is None else channel
    shape = (1, *image) if with_channel else image
    domain = Space(shape, dtype)
    back = linop.H
    data = Space(tuple(linop.oshape), dtype, tuple(f"data_{i}" for i, _ in enumerate(linop.oshape)))
    return ArrayLinear(
        lambda x: linop(x.reshape(image)),
        lambda y: back(y).reshape(shape),
        domain,
        data,
        f"sigpy {linop.repr_str}",
    )


def to_linop(operator: LinearOperator) -> Any:
    """Return an operator for one case as a sigpy ``Linop``; an image's channel of one goes.

    Raises:
        InvdiffError: If it is not linear, has parameters for several cases, or maps real to complex numbers.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sigpy.linop import Linop

    one_case(operator)
    if operator.domain.is_complex != operator.range.is_complex:
        raise InvdiffError(f"sigpy keeps one dtype, and {operator.name} goes between real and complex numbers.")
    image = operator.domain.shape[1:] if operator.domain.shape[0] == 1 else operator.domain.shape

    class OperatorLinop(Linop):
        """An operator, or its adjoint, on numpy arrays."""

        def __init__(self, op: LinearOperator, oshape: tuple[int, ...], ishape: tuple[int, ...]) -> None:
            self.op = op
            super().__init__(oshape, ishape, repr_str=op.name)

        def _apply(self, input: np.ndarray) -> np.ndarray:
            x = torch.from_numpy(np.array(input)).to(device_of(self.op), self.op.domain.dtype)
            y = self.op(x.reshape(1, *self.op.domain.shape))
            return np.asarray(y.detach().cpu().resolve_conj().numpy().reshape(self.oshape))

        def _adjoint_linop(self) -> Any:
            return OperatorLinop(self.op.H, self.ishape, self.oshape)

    return OperatorLinop(operator, operator.range.shape, tuple(image))
