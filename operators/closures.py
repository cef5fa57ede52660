"""Closure phases and log closure amplitudes of visibilities."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from invdiff.errors import InvdiffError
from invdiff.operator import Operator
from invdiff.spaces import Space


class Closures(Operator):
    """``V -> (P arg V, L log |V|)``, ``(B, visibility)`` complex to ``(B, phase + amplitude)`` real.

    Rows of ``P`` and ``L`` are sums around triangles and quadrangles of stations, with entries of -1, 0 and 1, so
    that factors of stations do not matter. Phases come in (-pi, pi]; `likelihoods.WrappedGaussian` knows that they
    turn.

    Args:
        visibilities: Range of the operator before, one complex axis.
        phases: ``P``, ``(phase, visibility)``.
        amplitudes: ``L``, ``(amplitude, visibility)``; none where left out.
        floor: Amplitude ``f``, in units of ``V``, below which a visibility is as good as 0: amplitudes are
            ``log(|V|^2 + f^2) / 2``, and derivatives of phases, ``i V / |V|^2``, are bounded as
            ``i V / (|V|^2 + f^2)``, which is their derivative as long as ``|V|`` is well above ``f``.

    Raises:
        InvdiffError: If the matrices do not fit, or the visibilities are not complex.
    """

    def __init__(self, visibilities: Space, phases: Any, amplitudes: Any = None, *, floor: float = 0.0) -> None:
        if len(visibilities.shape) != 1 or not visibilities.is_complex:
            raise InvdiffError(f"Closures are of one axis of complex visibilities, got {visibilities}.")
        if not 0 <= floor < float("inf"):
            raise InvdiffError(f"The floor of amplitudes must be finite and not negative, got {floor:g}.")
        n, real = visibilities.shape[0], visibilities.real_dtype
        amplitudes = torch.zeros(0, n) if amplitudes is None else amplitudes
        self.phases, self.amplitudes = (torch.as_tensor(m).to(real) for m in (phases, amplitudes))
        for name, matrix in (("phases", self.phases), ("amplitudes", self.amplitudes)):
            if matrix.ndim != 2 or matrix.shape[1] != n:
                raise InvdiffError(f"The matrix of closure {name} is {tuple(matrix.shape)}, expected (any, {n}).")
        self.floor = float(floor)
        self.domain = visibilities
        count = len(self.phases) + len(self.amplitudes)
        self.range = Space((count,), real, ("closure",))

    def _forward(self, x: Tensor) -> Tensor:
        x = x.to(self.domain.dtype)
        phase = x.angle() @ self.phases.mT
        amplitude = 0.5 * self._power(x).log() @ self.amplitudes.mT
        return torch.cat([torch.remainder(phase + torch.pi, 2 * torch.pi) - torch.pi, amplitude], -1)

    def _power(self, x: Tensor) -> Tensor:
        return x.real.square() + x.imag.square() + self.floor**2

    def vjp(self, x: Tensor, v: Tensor) -> Tensor:
        """Return ``V / |V|^2 (L^T v_amplitude + i P^T v_phase)``."""
        self.domain.check(x, f"Point of the vjp of {self.name}")
        self.range.check(v, f"Input of the vjp of {self.name}")
        x = x.to(self.domain.dtype)
        phase, amplitude = v.to(self.range.dtype).split([len(self.phases), len(self.amplitudes)], -1)
        return x / self._power(x) * torch.complex(amplitude @ self.amplitudes, phase @ self.phases)

    def jvp(self, x: Tensor, dx: Tensor) -> Tensor:
        """Return ``(P Im(conj(V) dV) / |V|^2, L Re(conj(V) dV) / |V|^2)``."""
        self.domain.check(x, f"Point of the jvp of {self.name}")
        self.domain.check(dx, f"Direction of the jvp of {self.name}")
        x = x.to(self.domain.dtype)
        change = x.conj() * dx.to(x.dtype) / self._power(x)
        return torch.cat([change.imag @ self.phases.mT, change.real @ self.amplitudes.mT], -1)
