"""Tensors kept as attributes: move them between devices and precisions, pick rows, digest."""

from __future__ import annotations

import copy
import hashlib
from typing import Any, TypeVar

import torch
from torch import Tensor

from invdiff.spaces import Space

M = TypeVar("M", bound="Movable")


class Movable:
    """Base of objects whose attributes are tensors, spaces, containers of them, and further such objects."""

    def to(self: M, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> M:
        """Return a copy on another device or in the precision of ``dtype`` (complex stays complex)."""
        new = copy.copy(self)
        for key, value in self.__dict__.items():
            new.__dict__[key] = move(value, device, dtype)
        return new


def move(value: Any, device: torch.device | str | None, dtype: torch.dtype | None) -> Any:
    """Return a copy of ``value`` with all tensors inside moved; what holds none comes back as it is."""
    if isinstance(value, Tensor):
        target = None
        if dtype is not None and (value.is_floating_point() or value.is_complex()):
            target = dtype.to_complex() if value.is_complex() else dtype.to_real()
        return value.to(device=device, dtype=target)
    if isinstance(value, Space) and dtype is not None:
        return value.with_precision(dtype)
    if isinstance(value, Movable):
        return value.to(device, dtype)
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(move(v, device, dtype) for v in value)
    if isinstance(value, list):
        return [move(v, device, dtype) for v in value]
    if isinstance(value, dict):
        return {k: move(v, device, dtype) for k, v in value.items()}
    return value


def take_rows(values: Tensor, index: Tensor) -> Tensor:
    """Pick rows of a per-case parameter ``(N, ...)``; one shared by all cases ``(1, ...)`` stays as it is."""
    return values if values.shape[0] == 1 else values[index.to(values.device)]


def tensor_digest(values: Any) -> str:
    """Return the SHA-256 of all tensors inside ``values`` (containers and `Movable` objects), with shapes."""
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
        elif isinstance(value, Movable):
            visit(value.__dict__)
        elif isinstance(value, (str, int, float, complex, bool, Space)):
            digest.update(str(value).encode())

    visit(values)
    return digest.hexdigest()
