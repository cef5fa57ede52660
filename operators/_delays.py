"""Pixels sent to samples of channels by their delays, with linear interpolation: tables, and sums on the fly.

A channel is an angle of transmission and an element that listens. Pixel ``p`` with the delay ``k + f`` in samples
and the complex weight ``w`` gives ``w (1 - f) x[p]`` to sample ``k`` and ``w f x[p]`` to sample ``k + 1``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from invdiff.operators._table import _as_csr, _multiply

#: Largest number of pairs of pixels and elements, times rows, that are at work at once.
_ENTRIES = 1 << 21

#: Gives, for one angle and the elements from ``start`` to ``stop``, the earlier sample of every pixel, int64, and
#: the complex weights on it and on the next one, ``(elements, pixels)`` each.
EchoesOf = Callable[[int, int, int], tuple[Tensor, Tensor, Tensor]]


class DelayTable:
    """The weights of all channels as real sparse matrices, one and its transpose per angle.

    The data of a matrix are ``(element, real or imaginary part, sample)``.

    Args:
        echoes: The weights.
        angles: Number of angles.
        elements: Number of elements.
        samples: Number of samples of a channel.
        pixels: Number of pixels.
        dtype: Real precision.
        device: Where the matrices are kept.
    """

    def __init__(
        self,
        echoes: EchoesOf,
        angles: int,
        elements: int,
        samples: int,
        pixels: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.shape = (elements, 2, samples)
        self.matrices = [_matrices(echoes, a, self.shape, pixels, dtype, device) for a in range(angles)]

    @property
    def nbytes(self) -> int:
        """Bytes of all matrices."""
        parts = [
            t for pair in self.matrices for m in pair for t in (m.crow_indices(), m.col_indices(), m.values())
        ]
        return sum(t.numel() * t.element_size() for t in parts)

    def scatter(self, x: Tensor, angle: int) -> Tensor:
        """Return the samples of all elements, ``(R, pixels) -> (R, element, sample)``, complex."""
        forward, rows = self.matrices[angle][0], len(x)
        if not x.is_complex():
            return torch.complex(*_multiply(forward, x.mT.contiguous()).mT.reshape(rows, *self.shape).unbind(2))
        both = torch.cat([x.real, x.imag]).mT.contiguous()
        real, imag = _multiply(forward, both).mT.reshape(2, rows, *self.shape)
        return torch.complex(real[:, :, 0] - imag[:, :, 1], real[:, :, 1] + imag[:, :, 0])

    def gather(self, u: Tensor, angle: int, real: bool) -> Tensor:
        """Return the adjoint of `scatter`, ``(R, element, sample) -> (R, pixels)``."""
        transpose, rows = self.matrices[angle][1], len(u)
        parts = torch.stack([u.real, u.imag], 2).reshape(rows, -1)
        if real:
            return _multiply(transpose, parts.mT.contiguous()).mT
        turned = torch.stack([u.imag, -u.real], 2).reshape(rows, -1)
        both = _multiply(transpose, torch.cat([parts, turned]).mT.contiguous()).mT
        return torch.complex(both[:rows], both[rows:])


def table_bytes(angles: int, elements: int, pixels: int, itemsize: int) -> int:
    """Return how many bytes a table takes at most."""
    return 2 * 4 * angles * elements * pixels * (itemsize + 4)


def _matrices(
    echoes: EchoesOf,
    angle: int,
    shape: tuple[int, int, int],
    pixels: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    from scipy import sparse

    elements, _, samples = shape
    parts = []
    for start, stop in _blocks(elements, pixels):
        first, near, far = echoes(angle, start, stop)
        row = first + 2 * samples * torch.arange(stop - start, device=first.device)[:, None]
        column = torch.arange(pixels, device=first.device).expand_as(row)
        keep = (near != 0) | (far != 0)
        row, column, near, far = row[keep], column[keep], near[keep], far[keep]
        values = torch.cat([near.real, far.real, near.imag, far.imag]).to("cpu", dtype).numpy()
        where = torch.cat([row, row + 1, row + samples, row + samples + 1]).int().cpu().numpy()
        found = (values, (where, np.tile(column.int().cpu().numpy(), 4)))
        parts.append(sparse.csr_matrix(found, (2 * samples * (stop - start), pixels)))
    forward = sparse.vstack(parts, "csr")
    forward.sort_indices()  # which torch's format asks for
    transpose = forward.T.tocsr()
    transpose.sort_indices()
    return _as_csr(forward, device), _as_csr(transpose, device)


def _blocks(elements: int, width: int) -> Iterator[tuple[int, int]]:
    step = max(1, _ENTRIES // max(1, width))
    for start in range(0, elements, step):
        yield start, min(elements, start + step)


def scatter(x: Tensor, echoes: EchoesOf, angle: int, elements: int, samples: int) -> Tensor:
    """Do as `DelayTable.scatter`, a few elements at a time and without a table."""
    columns = x.mT.to(x.dtype.to_complex())
    out = columns.new_zeros(elements, samples, len(x))
    for start, stop in _blocks(elements, x.numel()):
        first, near, far = echoes(angle, start, stop)
        place = first + samples * torch.arange(stop - start, device=x.device)[:, None]
        flat = out[start:stop].view(-1, len(x))
        flat.index_add_(0, place.flatten(), (near[..., None] * columns).flatten(0, 1))
        flat.index_add_(0, place.flatten() + 1, (far[..., None] * columns).flatten(0, 1))
    return out.permute(2, 0, 1)


def gather(u: Tensor, echoes: EchoesOf, angle: int, pixels: int, real: bool) -> Tensor:
    """Do as `DelayTable.gather`, a few elements at a time and without a table."""
    rows, elements, samples = u.shape
    columns = u.permute(1, 2, 0).contiguous()
    out = columns.new_zeros(pixels, rows)
    for start, stop in _blocks(elements, pixels * rows):
        first, near, far = echoes(angle, start, stop)
        place = first + samples * torch.arange(stop - start, device=u.device)[:, None]
        flat = columns[start:stop].view(-1, rows)
        out += (near.conj()[..., None] * flat[place]).sum(0) + (far.conj()[..., None] * flat[place + 1]).sum(0)
    return out.mT.real if real else out.mT
