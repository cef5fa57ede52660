"""Convolution with a boundary: extend the image, then keep what the kernel reaches without leaving it.

With the kernel's origin at ``c = K // 2``, an axis of ``n`` pixels is extended by ``K - 1 - c`` in front and ``c``
behind, and the valid part of the convolution has ``n`` pixels again (``n - K + 1`` for the boundary "valid",
which extends nothing). Folding is the adjoint of extending.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from invdiff.operators._fft import AXES

BOUNDARIES = ("circular", "reflect", "zero", "valid")
#: Elements transformed at a time on a CPU, so that spectra stay in its cache.
_BLOCK = 1 << 18


def margins(size: int, boundary: str) -> tuple[int, int]:
    """Return by how much an axis is extended in front and behind, for a kernel of ``size``."""
    return (0, 0) if boundary == "valid" else (size - 1 - size // 2, size // 2)


def extend(x: Tensor, sizes: tuple[int, int], boundary: str) -> Tensor:
    """Return ``(..., y, x)`` extended for a kernel of ``sizes``; "reflect" does not repeat the edge."""
    for dim, size in zip(AXES, sizes):
        (front, back), n = margins(size, boundary), x.shape[dim]
        if boundary == "circular":
            x = torch.cat([x.narrow(dim, n - front, front), x, x.narrow(dim, 0, back)], dim)
        elif boundary == "reflect":
            left, right = x.narrow(dim, 1, front), x.narrow(dim, n - 1 - back, back)
            x = torch.cat([left.flip(dim), x, right.flip(dim)], dim)
    if boundary == "zero":
        (top, bottom), (left_, right_) = (margins(size, boundary) for size in sizes)
        x = torch.nn.functional.pad(x, (left_, right_, top, bottom))
    return x


def fold(x: Tensor, sizes: tuple[int, int], boundary: str) -> Tensor:
    """Return the adjoint of `extend`."""
    for dim, size in zip(AXES, sizes):
        front, back = margins(size, boundary)
        n = x.shape[dim] - front - back
        core = x.narrow(dim, front, n)
        if boundary in ("circular", "reflect"):
            core = core.clone()
            left, right = x.narrow(dim, 0, front), x.narrow(dim, front + n, back)
            if boundary == "circular":
                core.narrow(dim, n - front, front).add_(left)
                core.narrow(dim, 0, back).add_(right)
            else:
                core.narrow(dim, 1, front).add_(left.flip(dim))
                core.narrow(dim, n - 1 - back, back).add_(right.flip(dim))
        x = core
    return x


def fast_length(n: int) -> int:
    """Return the smallest length of at least ``n`` whose only prime factors are 2, 3 and 5."""
    best = 1 << (n - 1).bit_length()
    five = 1
    while five < best:
        three = five
        while three < best:
            two = three
            while two < n:
                two *= 2
            best = min(best, two)
            three *= 3
        five *= 5
    return best


def multiply_spectrum(x: Tensor, h: Tensor, lengths: tuple[int, int]) -> Tensor:
    """Return ``F^-1 h F x`` for images ``(B, ..., y, x)``, filled up with zeros to ``lengths``.

    Args:
        x: Images; real ones take half a spectrum.
        h: Multiplier ``(1 or B, ..., y, x or x // 2 + 1)``, broadcasting over images.
        lengths: Size of the transform.
    """
    if not x.numel():  # some builds of torch refuse to transform no rows
        return x.new_zeros(*x.shape[:-2], *lengths)
    if x.is_complex():
        return torch.fft.ifft2(torch.fft.fft2(x, s=lengths).mul_(h))
    return torch.fft.irfft2(torch.fft.rfft2(x, s=lengths).mul_(h), s=lengths)


def row_blocks(x: Tensor, numbers: int) -> list[slice]:
    """Return slices of the rows of ``x``, of ``numbers`` each while at work, that keep to the cache of a CPU."""
    step = max(1, len(x) if x.is_cuda else _BLOCK // max(1, numbers))
    return [slice(i, i + step) for i in range(0, max(1, len(x)), step)]


def in_blocks(function: Callable[..., Tensor], rows: Sequence[Tensor], cases: Sequence[Tensor]) -> Tensor:
    """Return ``function(*rows, *cases)``, a few rows at a time where that keeps them in the cache.

    Args:
        function: Maps tensors of some rows to a tensor of as many.
        rows: Tensors ``(B, ...)``; the size of the first decides.
        cases: Tensors ``(1 or B, ...)``.
    """
    x = rows[0]
    blocks = row_blocks(x, x[:1].numel())
    if len(blocks) == 1:
        return function(*rows, *cases)
    out = None
    for b in blocks:
        part = function(*(r[b] for r in rows), *(c if len(c) == 1 else c[b] for c in cases))
        if out is None:
            out = part.new_empty(len(x), *part.shape[1:])
        out[b] = part
    assert out is not None
    return out


def direct(x: Tensor, kernel: Tensor) -> Tensor:
    """Return the valid convolution of extended images ``(B, ..., y, x)`` with kernels ``(1 or B, ky, kx)``."""
    if not x.numel():
        return x[..., : x.shape[-2] - kernel.shape[-2] + 1, : x.shape[-1] - kernel.shape[-1] + 1]
    parts = torch.view_as_real(x).movedim(-1, 1) if x.is_complex() else x[:, None]
    rows, flat = len(x), parts.flatten(1, -3)
    weight = kernel.flip(AXES)[:, None]
    if len(kernel) == 1:
        out = torch.nn.functional.conv2d(flat.flatten(0, 1)[:, None], weight)[:, 0]
        out = out.reshape(rows, flat.shape[1], *out.shape[-2:])
    else:
        out = torch.nn.functional.conv2d(flat.transpose(0, 1), weight, groups=rows).transpose(0, 1)
    out = out.reshape(*parts.shape[:-2], *out.shape[-2:])
    return torch.view_as_complex(out.movedim(1, -1).contiguous()) if x.is_complex() else out[:, 0]


def banded(kernel: Tensor, n: int, boundary: str) -> Tensor:
    """Return the matrices ``(N, m, n)`` of the convolution of an axis of ``n`` with kernels ``(N, K)``."""
    cases, size = kernel.shape
    front, back = margins(size, boundary)
    m = n + front + back - size + 1
    out = kernel.new_zeros(cases, m, n + front + back)
    row = torch.arange(m, device=kernel.device)
    for j in range(size):
        out[:, row, row + size - 1 - j] = kernel[:, j, None]
    return fold(out, (1, size), boundary)
