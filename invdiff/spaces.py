"""What a tensor is, without its batch axis: shape, dtype, dimension names, units, spacing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from invdiff.errors import InvdiffError

_COMPLEX_OF = {torch.float32: torch.complex64, torch.float64: torch.complex128}
_REAL_OF = {torch.complex64: torch.float32, torch.complex128: torch.float64}
_DEFAULT_DIMS = {1: ("index",), 2: ("y", "x"), 3: ("channel", "y", "x"), 4: ("channel", "z", "y", "x")}


@dataclass(frozen=True)
class Space:
    """Frozen description of a tensor space; the leading row axis of batches is never part of it.

    Args:
        shape: Shape of one element, e.g. ``(1, 320, 320)``.
        dtype: ``float32``, ``float64``, ``complex64`` or ``complex128``.
        dims: One name per axis; defaults to ``("channel", "y", "x")`` and its like.
        units: Units of the values, ``"1"`` where there are none.
        spacing: Distance between neighbours, per named dimension.
        spacing_units: Units of ``spacing``.

    Raises:
        InvdiffError: If sizes are not positive, names do not fit the rank, or the dtype is an integer.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    dims: tuple[str, ...] = ()
    units: str = "1"
    spacing: Mapping[str, float] = field(default_factory=dict, hash=False)
    spacing_units: str = "mm"

    def __post_init__(self) -> None:
        shape = tuple(int(n) for n in self.shape)
        if any(n <= 0 for n in shape):
            raise InvdiffError(f"A space needs positive sizes, and its shape is {shape}; drop empty axes.")
        if not (self.dtype in _COMPLEX_OF or self.dtype in _REAL_OF):
            raise InvdiffError(f"A space holds float or complex numbers (32 or 64 bit), not {self.dtype}.")
        dims = tuple(self.dims) or _DEFAULT_DIMS.get(len(shape), tuple(f"axis_{i}" for i in range(len(shape))))
        if len(dims) != len(shape) or len(set(dims)) != len(dims):
            raise InvdiffError(f"A space of shape {shape} needs {len(shape)} distinct dim names, got {dims}.")
        unknown = set(self.spacing) - set(dims)
        if unknown:
            raise InvdiffError(f"Spacing names {sorted(unknown)}, which are not among the dims {dims}.")
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "dims", dims)
        object.__setattr__(self, "spacing", MappingProxyType({k: float(v) for k, v in self.spacing.items()}))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "spacing": dict(self.spacing)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        object.__setattr__(self, "spacing", MappingProxyType(state["spacing"]))

    @property
    def is_complex(self) -> bool:
        """Whether the elements are complex numbers."""
        return self.dtype in _REAL_OF

    @property
    def real_dtype(self) -> torch.dtype:
        """The real dtype of the same precision."""
        return _REAL_OF.get(self.dtype, self.dtype)

    @property
    def size(self) -> int:
        """Number of elements (a complex element counts once)."""
        return math.prod(self.shape)

    @property
    def real_size(self) -> int:
        """Number of real components."""
        return self.size * (2 if self.is_complex else 1)

    def replace(self, **changes: Any) -> Space:
        """Return a copy with some fields changed."""
        return replace(self, **changes)

    def with_precision(self, dtype: torch.dtype) -> Space:
        """Return this space in the precision of ``dtype`` (real or complex as it was)."""
        real = _REAL_OF.get(dtype, dtype)
        return replace(self, dtype=_COMPLEX_OF[real] if self.is_complex else real)

    def check(self, x: Tensor, what: str) -> None:
        """Raise one clear sentence unless ``x`` is a batch ``(B, *shape)`` of this space.

        Precision is free (a float64 state may meet a float32 operator); real against complex is not.
        """
        if tuple(x.shape[1:]) != self.shape or x.ndim != len(self.shape) + 1:
            raise InvdiffError(
                f"{what} has shape {tuple(x.shape)}, expected (B, {', '.join(map(str, self.shape))}) "
                f"with dims (B, {', '.join(self.dims)})."
            )
        if x.is_complex() != self.is_complex:
            have, want = ("complex", "real") if x.is_complex() else ("real", "complex")
            raise InvdiffError(f"{what} is {have} ({x.dtype}), expected {want} numbers ({self.dtype}).")

    def zeros(self, rows: int, device: torch.device | str | None = None) -> Tensor:
        """Return zeros of shape ``(rows, *shape)``."""
        return torch.zeros(rows, *self.shape, dtype=self.dtype, device=device)

    def randn(self, rows: int, seed: int = 0, device: torch.device | str | None = None) -> Tensor:
        """Return standard normal numbers (unit variance per real component), ``(rows, *shape)``."""
        generator = torch.Generator().manual_seed(seed)
        parts = 2 if self.is_complex else 1
        real = torch.randn(rows, *self.shape, parts, generator=generator, dtype=self.real_dtype)
        out = torch.view_as_complex(real) if self.is_complex else real[..., 0]
        return out.to(device)

    def __str__(self) -> str:
        axes = ", ".join(f"{d} {n}" for d, n in zip(self.dims, self.shape))
        units = "" if self.units == "1" else f" [{self.units}]"
        return f"({axes}) {str(self.dtype).removeprefix('torch.')}{units}"


def real_inner(a: Tensor, b: Tensor) -> Tensor:
    """Inner product per row, ``Re sum conj(a) b``; shape ``(B,)``."""
    if a.is_complex():
        a, b = torch.view_as_real(a.resolve_conj()), torch.view_as_real(b.to(a.dtype).resolve_conj())
    return (a * b).flatten(1).sum(1)


def norm(a: Tensor) -> Tensor:
    """Euclidean norm per row, shape ``(B,)``; never over the batch."""
    return real_inner(a, a).clamp_min(0).sqrt()


def per_row(value: Tensor | float, like: Tensor) -> Tensor:
    """Shape a per-row scalar ``(B,)`` (or a number) so that it broadcasts over ``like`` ``(B, ...)``.

    The result has the real dtype of ``like``, so that no product changes precision.
    """
    real = like.real.dtype if like.is_complex() else like.dtype
    out = torch.as_tensor(value, dtype=real, device=like.device)
    return out.reshape(-1, *([1] * (like.ndim - 1))) if out.ndim else out
