"""Compiled sum of filters ``V (start + g_1 V^H x_1 + ...)`` of a few rows, which reads every matrix once.

Imported only where numba is there. Complex numbers lie as pairs of reals, and every product of a matrix and a
complex number is two products with reals, which vectorise; the turn of the pairs is put off to vectors. Positions
are spread over plain threads, and every number is summed in the same order for any number of threads.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import torch
from numba import njit
from torch import Tensor

from invdiff.operators._compiled import in_threads

Array: TypeAlias = np.ndarray


@njit(nogil=True, cache=True, fastmath={"reassoc", "contract"})
def _filter(matrices: Array, start: Array, x: Array, gains: Array, out: Array, first: int, last: int) -> None:
    """``matrices (R, n, 2n)``, ``start (R, B, 2n)``, ``x (R, B, K, n, 2)``, ``gains (R, B, K, n)``."""
    n = matrices.shape[1]
    by_real, by_imag = np.empty(2 * n, matrices.dtype), np.empty(2 * n, matrices.dtype)
    c, turned = np.empty(2 * n, matrices.dtype), np.empty(2 * n, matrices.dtype)
    for r in range(first, last):
        v = matrices[r]
        for b in range(x.shape[1]):
            c[:] = start[r, b]
            for k in range(x.shape[2]):
                by_real[:] = 0
                by_imag[:] = 0
                whole = n - n % 4
                for i in range(0, whole, 4):  # four rows at a time, so that the sums are read and written less
                    u = x[r, b, k, i : i + 4]
                    for j in range(2 * n):
                        v0, v1, v2, v3 = v[i, j], v[i + 1, j], v[i + 2, j], v[i + 3, j]
                        by_real[j] += v0 * u[0, 0] + v1 * u[1, 0] + v2 * u[2, 0] + v3 * u[3, 0]
                        by_imag[j] += v0 * u[0, 1] + v1 * u[1, 1] + v2 * u[2, 1] + v3 * u[3, 1]
                for i in range(whole, n):
                    for j in range(2 * n):
                        by_real[j] += v[i, j] * x[r, b, k, i, 0]
                        by_imag[j] += v[i, j] * x[r, b, k, i, 1]
                for j in range(n):  # conj(v) u
                    gain = gains[r, b, k, j]
                    c[2 * j] += gain * (by_real[2 * j] + by_imag[2 * j + 1])
                    c[2 * j + 1] += gain * (by_imag[2 * j] - by_real[2 * j + 1])
            for j in range(n):
                turned[2 * j], turned[2 * j + 1] = c[2 * j + 1], c[2 * j]
                c[2 * j + 1] = -c[2 * j + 1]
            for i in range(n):  # v c
                real = imag = matrices.dtype.type(0)
                for j in range(2 * n):
                    real += v[i, j] * c[j]
                    imag += v[i, j] * turned[j]
                out[r, b, i, 0], out[r, b, i, 1] = real, imag


def filtered(vectors: Tensor, start: Tensor, x: Tensor, gains: Tensor) -> Tensor:
    """Return ``V_r (start + sum_k g_k V_r^H x_k)``, ``(B, R, n)``.

    Args:
        vectors: ``(R, n, n)``, complex, on the CPU.
        start: ``(B, R, n)``, complex.
        x: ``(B, K, R, n)``, complex.
        gains: ``(B, K, R, n)``, real.
    """
    rows, filters, count, n = x.shape
    out = x.new_empty(count, rows, n)
    arrays = [
        _pairs(vectors).flatten(-2).numpy(),
        _pairs(start.transpose(0, 1)).flatten(-2).numpy(),
        _pairs(x.permute(2, 0, 1, 3)).numpy(),
        gains.permute(2, 0, 1, 3).contiguous().numpy(),
        torch.view_as_real(out).numpy(),
    ]
    in_threads(_filter, arrays, count, (filters + 1) * rows * vectors.numel())
    return out.transpose(0, 1)


def _pairs(x: Tensor) -> Tensor:
    return torch.view_as_real(x.resolve_conj().contiguous())
