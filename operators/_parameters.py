"""Parameters of operators: one leading case axis, values derived from them once, and their validation."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor

from invdiff.errors import InvdiffError
from invdiff.operator import LinearOperator
from invdiff.spaces import Space
from invdiff.tensors import take_rows

Self = TypeVar("Self", bound="ParametricOperator")
Derive = Callable[[Any], tuple[Tensor, ...]]


class Memo:
    """Tensors derived from an operator's parameters, computed on first use.

    They are no part of the operator's state: digests do not look inside, copies and pickles start empty. The
    operator that ``rows`` returns reads its values off the one it came from, so that a decomposition is
    computed once and not once per batch.
    """

    def __init__(self, origin: tuple[ParametricOperator, Tensor] | None = None) -> None:
        self._origin = origin
        self._values: dict[str, tuple[Tensor, ...]] = {}
        self._last: tuple[weakref.ref[Tensor], int, Tensor] | None = None

    def __reduce__(self) -> tuple[type[Memo], tuple[()]]:
        return Memo, ()

    def lookup(self, operator: ParametricOperator, derive: Derive) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """Return the values of all original cases and the index of ours among them (None: in order)."""
        if self._origin is None:
            return self.get(operator, derive), None
        parent, index = self._origin
        values, inner = parent._memo.lookup(parent, derive)
        return values, index if inner is None else inner[index.to(inner.device)]

    def get(self, operator: ParametricOperator, derive: Derive) -> tuple[Tensor, ...]:
        """Return the values of our cases, each with a leading axis of 1 or N."""
        key = derive.__qualname__
        if key not in self._values:
            if self._origin is None:
                values = derive(operator)
            else:
                values, index = self.lookup(operator, derive)
                assert index is not None
                values = tuple(take_rows(v, index) for v in values)
            self._values[key] = values
        return self._values[key]

    def last(self, y: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
        """Return ``make(y)``, kept while the same tensor comes back unchanged, as data do at every step."""
        if y.requires_grad or y.is_inference():
            return make(y)
        if self._last is None or self._last[0]() is not y or self._last[1] != y._version:
            out = make(y)
            if out.requires_grad:
                return out
            self._last = weakref.ref(y), y._version, out
        return self._last[2]


class ParametricOperator(LinearOperator):
    """Linear operator whose parameters, named in ``_per_case``, lead with a case axis of 1 (shared) or N."""

    _per_case: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        self._memo = Memo()
        counts = {name: getattr(self, name).shape[0] for name in self._per_case}
        if len(set(counts.values()) - {1}) > 1:
            shown = " and ".join(f"{name} for {n}" for name, n in counts.items())
            raise InvdiffError(f"{self.name} has {shown} cases; give each for one case or for the same number.")

    @property
    def n_cases(self) -> int | None:
        """Number of cases the parameters are given for, or None where all cases share them."""
        counts = {getattr(self, name).shape[0] for name in self._per_case} - {1}
        return counts.pop() if counts else None

    def rows(self: Self, index: Tensor) -> Self:
        """Return the operator whose row ``r`` has the parameters of case ``index[r]``."""
        if self.n_cases is None:
            return self
        index = torch.as_tensor(index, dtype=torch.long)
        new = copy.copy(self)
        for name in self._per_case:
            setattr(new, name, take_rows(getattr(self, name), index))
        new._memo = Memo((self, index))
        return new

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Any:
        """Return a copy on another device or in the precision of ``dtype`` (complex stays complex)."""
        new = super().to(device, dtype)
        new._memo = Memo()
        return new

    def _derived(self, derive: Derive) -> tuple[Tensor, ...]:
        """Return what ``derive(self)`` computes, from the memo where it is known."""
        return self._memo.get(self, derive)

    def _enter(self, x: Tensor, space: Space) -> Tensor:
        """Cast an input to our own precision, and refuse a batch that does not fit the cases."""
        n = self.n_cases
        if n is not None and x.shape[0] != n:
            raise InvdiffError(
                f"{self.name} has parameters for {n} cases and got {x.shape[0]} rows; pick them with rows(index)."
            )
        return x.to(space.dtype)


def as_parameter(value: Any, what: str) -> Tensor:
    """Return a detached copy of an array as a float or complex tensor of 32 or 64 bit, all values finite."""
    if not isinstance(value, Tensor):
        array = np.asarray(value)
        if array.dtype.kind not in "biufc":
            raise InvdiffError(f"{what} must hold numbers, got an array of {array.dtype}.")
        # A copy, because tensors take neither read-only arrays nor negative strides; native byte order too.
        value = torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))
    out = value.detach().clone()
    if not (out.is_floating_point() or out.is_complex()):
        out = out.to(torch.float32)
    if out.dtype in (torch.float16, torch.bfloat16):
        out = out.to(torch.float32)
    if out.dtype == torch.complex32:
        out = out.to(torch.complex64)
    bad = int((~torch.isfinite(out)).sum())
    if bad:
        raise InvdiffError(f"{what} holds {bad} NaN or infinite values of {out.numel()}; repair them first.")
    return out


def as_mask(value: Any, dtype: torch.dtype) -> Tensor:
    """Return a mask of zeros and ones as a real tensor, refusing every other value.

    Raises:
        InvdiffError: If the mask is complex, holds other values than 0 and 1, or samples nothing at all.
    """
    mask = as_parameter(value, "The mask")
    if mask.is_complex():
        raise InvdiffError("The mask is complex; a mask holds 0 (not sampled) and 1 (sampled).")
    other = mask[(mask != 0) & (mask != 1)]
    if other.numel():
        raise InvdiffError(
            f"The mask holds {other.numel()} values such as {float(other[0]):g}; "
            "a mask holds only 0 (not sampled) and 1 (sampled)."
        )
    return mask.to(dtype)


def require_samples(mask: Tensor) -> None:
    """Refuse masks ``(1 or N, ...)`` with a case that has no sampled position."""
    empty = (~(mask != 0).flatten(1).any(1)).nonzero().flatten().tolist()
    if empty:
        where = f" of case {empty[0]}" if mask.shape[0] > 1 else ""
        raise InvdiffError(f"The mask{where} has no sampled positions; a measurement needs at least one.")


def fit_mask(mask: Tensor, space: Space) -> Tensor:
    """Return a mask for images of a space, with its case axis: ``(1 or N, *shape)`` up to axes of length 1.

    A mask with at most the rank of ``shape`` is shared by all cases; one more leading axis counts cases.
    Every case must have a sampled position.
    """
    shape = space.shape
    full = mask.reshape(*([1] * (len(shape) + 1 - mask.ndim)), *mask.shape)
    fits = full.ndim == len(shape) + 1 and all(m in (1, n) for m, n in zip(full.shape[1:], shape))
    if not fits:
        raise InvdiffError(
            f"The mask has shape {tuple(mask.shape)}, which fits neither {shape} nor (cases, "
            f"{', '.join(map(str, shape))})."
        )
    require_samples(full)
    return full.to(space.real_dtype)


def as_space(
    shape: Space | Sequence[int],
    dtype: torch.dtype | None = None,
    units: str | None = None,
    spacing: Mapping[str, float] | None = None,
) -> Space:
    """Return a Space from a Space or a bare shape, with what else is given replacing its fields."""
    space = shape if isinstance(shape, Space) else Space(tuple(shape))
    if dtype is not None:
        space = space.replace(dtype=dtype)
    if units is not None:
        space = space.replace(units=units)
    if spacing is not None:
        space = space.replace(spacing=spacing)
    return space
