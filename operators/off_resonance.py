"""Off-resonance during a readout, as a short sum of Fourier transforms (time segmentation)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from invdiff.errors import InvdiffError
from invdiff.operators._parameters import as_parameter

#: Bins of the field histogram that the interpolators are fitted to.
_BINS = 512
#: More segments than this are refused: the field map or the times have other units than stated.
MAX_SEGMENTS = 64


class OffResonance:
    """The phase ``exp(-2 pi i f(r) t_j)`` of spins at a frequency offset ``f``, sample by sample.

    It is approximated by ``sum_l b_l(t_j) exp(-2 pi i f(r) tau_l)`` with segments ``tau_l`` evenly spaced over the
    readout and ``b`` by least squares over the histogram of the field (Sutton, Noll and Fessler 2003).

    Args:
        field: Frequency offset in hertz, ``(y, x)`` or ``(z, y, x)``; positive precesses as the transform does.
        times: Time of every sample after the excitation (or echo) where the phase is zero, in seconds, of the
            trajectory's shape without its last axis, or its last one alone (``(sample,)`` for every readout).
        segments: Number of segments; as many as the accuracy asked needs where left out.
    """

    def __init__(self, field: Any, times: Any, segments: int | None = None) -> None:
        self.field = as_parameter(field, "The off-resonance field").double().cpu()
        self.times = as_parameter(times, "The array of sample times").double().cpu()
        if segments is not None and segments < 1:
            raise InvdiffError(f"The number of segments must be at least 1, got {segments}.")
        self.segments = segments

    def sample_times(self, samples: tuple[int, ...]) -> Tensor:
        """Return the time of every sample, flattened; refuse times that do not fit ``samples``."""
        if tuple(self.times.shape) not in (samples, samples[-1:]):
            raise InvdiffError(
                f"The sample times have shape {tuple(self.times.shape)}, expected {samples} or {samples[-1:]}."
            )
        return self.times.expand(samples).reshape(-1)

    def fit(self, times: Tensor, accuracy: float) -> tuple[Tensor, Tensor]:
        """Return the segments ``tau`` ``(L,)`` and the interpolators ``b`` ``(L, samples)``, complex128.

        Raises:
            InvdiffError: If more than `MAX_SEGMENTS` segments would be needed.
        """
        values, weights = self._histogram()
        unique, index = times.unique(return_inverse=True)
        wanted = _phase(values, unique)  # (bins, times)
        root = weights.sqrt()[:, None]
        first, last = float(unique[0]), float(unique[-1])
        for count in [self.segments] if self.segments else range(1, MAX_SEGMENTS + 1):
            tau = torch.linspace(first, last, count, dtype=torch.float64) if count > 1 else unique.mean()[None]
            basis = _phase(values, tau) * root
            b = torch.linalg.pinv(basis, rtol=1e-13) @ (wanted * root)
            error = float((basis @ b - wanted * root).norm(dim=0).max())
            if self.segments or error <= accuracy:
                return tau, b[:, index]
        turns = float(values.max() - values.min()) * (last - first)
        raise InvdiffError(
            f"The field turns the phase by {turns:.0f} turns over the readout, which takes more than "
            f"{MAX_SEGMENTS} segments; the field is in hertz and the times are in seconds."
        )

    def _histogram(self) -> tuple[Tensor, Tensor]:
        """Return field values and their shares."""
        values, counts = self.field.flatten().unique(return_counts=True)
        if len(values) > _BINS:
            low, high = float(values[0]), float(values[-1])
            step = (high - low) / _BINS
            bins = ((self.field.flatten() - low) / step).long().clamp(max=_BINS - 1)
            counts = torch.bincount(bins, minlength=_BINS)
            values = low + step * (torch.arange(_BINS, dtype=torch.float64) + 0.5)
            values, counts = values[counts > 0], counts[counts > 0]
        return values, counts.double() / counts.sum()


def _phase(field: Tensor, times: Tensor) -> Tensor:
    turns = field[:, None] * times
    return torch.polar(torch.ones_like(turns), -2 * math.pi * turns)
