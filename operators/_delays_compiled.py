"""Compiled loops over delays, for geometries too large for a table. Imported only where numba is there.

Forward, elements are spread over threads; backward, pixels. Every thread writes to its own part, and each number
is summed in the same order for any number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import torch
from numba import njit
from torch import Tensor

from invdiff.operators._compiled import in_threads
from invdiff.operators._delays import Part, Path

Array: TypeAlias = np.ndarray


@njit(nogil=True, cache=True)
def _scatter(
    x: Array, out: Array, there: Array, turn: Array, back: Array, weights: Array, first: int, last: int
) -> None:
    for e in range(first, last):
        for p in range(x.shape[0]):
            t = there[p] + back[e, p]
            k = math.floor(t)
            w = weights[e, p]
            if w != 0 and 0 <= k <= out.shape[1] - 2:
                w *= turn[p]
                far = w * out.real.dtype.type(t - k)
                near = w - far
                for r in range(x.shape[1]):
                    out[e, k, r] += near * x[p, r]
                    out[e, k + 1, r] += far * x[p, r]


@njit(nogil=True, cache=True)
def _gather(
    u: Array, out: Array, there: Array, turn: Array, back: Array, weights: Array, first: int, last: int
) -> None:
    for e in range(u.shape[0]):
        for p in range(first, last):
            t = there[p] + back[e, p]
            k = math.floor(t)
            w = weights[e, p]
            if w != 0 and 0 <= k <= u.shape[1] - 2:
                w = (w * turn[p]).conjugate()
                far = w * u.real.dtype.type(t - k)
                near = w - far
                for r in range(out.shape[1]):
                    out[p, r] += near * u[e, k, r] + far * u[e, k + 1, r]


class Compiled(Part):
    """One angle and some elements."""

    def __init__(self, sent: Path, heard: Path, samples: int) -> None:
        self.sent, self.heard, self.samples = sent, heard, samples

    def scatter(self, x: Tensor) -> Tensor:
        """Return the samples, ``(R, pixels) -> (R, element, sample)``, complex."""
        columns = x.mT.contiguous()
        out = torch.zeros(len(self.heard.delay), self.samples, len(x), dtype=self.heard.weight.dtype)
        self._run(_scatter, columns, out, len(out))
        return out.permute(2, 0, 1)

    def gather(self, u: Tensor, real: bool) -> Tensor:
        """Return the adjoint, ``(R, element, sample) -> (R, pixels)``."""
        columns = u.permute(1, 2, 0).resolve_conj().contiguous()
        out = torch.zeros(len(self.sent.delay), len(u), dtype=self.heard.weight.dtype)
        self._run(_gather, columns, out, len(out))
        return out.mT.real if real else out.mT

    def _run(self, loop: Callable[..., None], given: Tensor, out: Tensor, count: int) -> None:
        arrays = [given.numpy(), out.numpy()]
        arrays += [t.contiguous().numpy() for path in (self.sent, self.heard) for t in path]
        in_threads(loop, arrays, count, self.heard.delay.numel() * given.shape[-1])
