"""Pixels sent to samples of channels by their delays, with linear interpolation: tables, and sums on the fly.

A channel is an angle of transmission and an element that listens; the delays of both add, and their weights
multiply. Pixel ``p`` with the delay ``k + f`` in samples and the weight ``w`` gives ``w (1 - f) x[p]`` to sample
``k`` and ``w f x[p]`` to sample ``k + 1``, where the channel has both.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from invdiff.operators._table import as_csr, multiply

#: Largest number of pairs of pixels and elements, times rows in plain torch, that are at work at once.
_ENTRIES = 1 << 21


class Path(NamedTuple):
    """One way of the echoes, to pixels ``(pixels,)`` or from them to elements ``(elements, pixels)``.

    Args:
        delay: In samples, float64.
        weight: Complex, in the precision of the data.
    """

    delay: Tensor
    weight: Tensor


#: Gives the way to the pixels of an angle.
SentBy = Callable[[int], Path]
#: Gives the way to the elements from ``start`` to ``stop``.
HeardBy = Callable[[int, int], Path]


class Part(Protocol):
    """One angle and some elements."""

    @abstractmethod
    def scatter(self, x: Tensor) -> Tensor:
        """Return the samples, ``(R, pixels) -> (R, element, sample)``, complex."""

    @abstractmethod
    def gather(self, u: Tensor, real: bool) -> Tensor:
        """Return the adjoint, ``(R, element, sample) -> (R, pixels)``."""


def echoes(sent: Path, heard: Path, samples: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the earlier sample and the weights on it and on the next one, ``(elements, pixels)`` each."""
    delay = sent.delay + heard.delay
    first = delay.floor()
    inside = (first >= 0) & (first <= samples - 2)
    share = (delay - first).to(sent.weight.real.dtype)
    weight = torch.where(inside, sent.weight * heard.weight, 0)
    return first.clamp(0, samples - 2).long(), weight * (1 - share), weight * share


def blocks(elements: int, width: int) -> Iterator[tuple[int, int]]:
    """Yield ranges of elements with ``width`` numbers each, of a bounded sum."""
    step = max(1, _ENTRIES // max(1, width))
    for start in range(0, elements, step):
        yield start, min(elements, start + step)


class Sparse(Part):
    """One angle and all elements as a real sparse matrix and its transpose.

    Data of the matrix are ``(element, real or imaginary part, sample)``.
    """

    def __init__(
        self, sent: Path, heard: HeardBy, elements: int, samples: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        from scipy import sparse

        self.shape = (elements, 2, samples)
        pixels, parts = len(sent.delay), []
        for start, stop in blocks(elements, pixels):
            first, near, far = echoes(sent, heard(start, stop), samples)
            row = first + 2 * samples * torch.arange(stop - start, device=first.device)[:, None]
            column = torch.arange(pixels, device=first.device).expand_as(row)
            keep = (near != 0) | (far != 0)
            row, column, near, far = row[keep], column[keep], near[keep], far[keep]
            values = torch.cat([near.real, far.real, near.imag, far.imag]).to("cpu", dtype).numpy()
            where = torch.cat([row, row + 1, row + samples, row + samples + 1]).int().cpu().numpy()
            found = (values, (where, np.tile(column.int().cpu().numpy(), 4)))
            parts.append(sparse.csr_matrix(found, (2 * samples * (stop - start), pixels)))
        forward = sparse.vstack(parts, "csr")
        transpose = forward.T.tocsr()
        for matrix in (forward, transpose):
            matrix.sort_indices()  # which torch's format asks for
        self.forward, self.transpose = as_csr(forward, device), as_csr(transpose, device)

    def scatter(self, x: Tensor) -> Tensor:
        """Return the samples, ``(R, pixels) -> (R, element, sample)``, complex."""
        rows = len(x)
        if not x.is_complex():
            parts = multiply(self.forward, x.mT.contiguous()).mT.reshape(rows, *self.shape)
            return torch.complex(parts[:, :, 0], parts[:, :, 1])
        both = torch.cat([x.real, x.imag]).mT.contiguous()
        real, imag = multiply(self.forward, both).mT.reshape(2, rows, *self.shape)
        return torch.complex(real[:, :, 0] - imag[:, :, 1], real[:, :, 1] + imag[:, :, 0])

    def gather(self, u: Tensor, real: bool) -> Tensor:
        """Return the adjoint, ``(R, element, sample) -> (R, pixels)``."""
        rows = len(u)
        parts = torch.stack([u.real, u.imag], 2).reshape(rows, -1)
        if real:
            return multiply(self.transpose, parts.mT.contiguous()).mT
        turned = torch.stack([u.imag, -u.real], 2).reshape(rows, -1)
        both = multiply(self.transpose, torch.cat([parts, turned]).mT.contiguous()).mT
        return torch.complex(both[:rows], both[rows:])


class DelayTable:
    """The matrices of all angles.

    Args:
        sent: The way to the pixels.
        heard: The way to the elements.
        angles: Number of angles.
        elements: Number of elements.
        samples: Number of samples of a channel.
        dtype: Real precision.
        device: Where the matrices are kept.
    """

    def __init__(
        self,
        sent: SentBy,
        heard: HeardBy,
        angles: int,
        elements: int,
        samples: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.parts = [Sparse(sent(a), heard, elements, samples, dtype, device) for a in range(angles)]

    @property
    def nbytes(self) -> int:
        """Bytes of all matrices."""
        matrices = [m for p in self.parts for m in (p.forward, p.transpose)]
        tensors = [t for m in matrices for t in (m.crow_indices(), m.col_indices(), m.values())]
        return sum(t.numel() * t.element_size() for t in tensors)


def table_bytes(angles: int, elements: int, pixels: int, itemsize: int) -> int:
    """Return how many bytes a table takes at most."""
    return 2 * 4 * angles * elements * pixels * (itemsize + 4)


class Direct(Part):
    """One angle and some elements without a table, in plain torch."""

    def __init__(self, sent: Path, heard: Path, samples: int) -> None:
        self.sent, self.heard, self.samples = sent, heard, samples

    def _where(self) -> tuple[Tensor, Tensor, Tensor]:
        first, near, far = echoes(self.sent, self.heard, self.samples)
        return first + self.samples * torch.arange(len(first), device=first.device)[:, None], near, far

    def scatter(self, x: Tensor) -> Tensor:
        """Return the samples, ``(R, pixels) -> (R, element, sample)``, complex."""
        place, near, far = self._where()
        columns = x.mT.to(near.dtype)
        out = columns.new_zeros(len(near) * self.samples, len(x))
        out.index_add_(0, place.flatten(), (near[..., None] * columns).flatten(0, 1))
        out.index_add_(0, place.flatten() + 1, (far[..., None] * columns).flatten(0, 1))
        return out.mT.reshape(len(x), len(near), self.samples)

    def gather(self, u: Tensor, real: bool) -> Tensor:
        """Return the adjoint, ``(R, element, sample) -> (R, pixels)``."""
        place, near, far = self._where()
        flat = u.flatten(1).mT.contiguous()
        out = (near.conj()[..., None] * flat[place]).sum(0) + (far.conj()[..., None] * flat[place + 1]).sum(0)
        return out.mT.real if real else out.mT


def direct(
    sent: SentBy, heard: HeardBy, angles: int, elements: int, samples: int, width: int, compiled: bool
) -> Iterator[tuple[int, int, int, Part]]:
    """Yield angle, first and last element and their part, elements in blocks of ``width`` numbers each."""
    kind: Callable[[Path, Path, int], Part] = Direct
    if compiled:
        from invdiff.operators._delays_compiled import Compiled

        kind = Compiled
    for start, stop in blocks(elements, width):
        back = heard(start, stop)
        for a in range(angles):
            yield a, start, stop, kind(sent(a), back, samples)
