"""Two-dimensional incompressible flow on a periodic square: vorticity now, vorticity later.

    dw/dt = -u . grad w + nu Lap w + f,     u = (psi_y, -psi_x),   -Lap psi = w

Pseudo-spectral, truncated at two thirds of the largest wavenumber, so that products of two modes do not alias.
With ``u`` the velocity along x and ``v`` along y, the nonlinear term is ``(d_xx - d_yy)(u v) + d_xy (v^2 - u^2)``,
which takes four transforms instead of five. In time the viscous part is exact (integrating factor) and the rest is
Runge-Kutta of fourth order.

Source: Canuto, Hussaini, Quarteroni, Zang, "Spectral methods in fluid dynamics", 1988.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from invdiff.errors import InvdiffError
from invdiff.operator import Operator
from invdiff.operators._parameters import as_parameter, as_space
from invdiff.spaces import Space

#: Steps per segment beyond which a flow counts as blown up.
_MOST = 1 << 14


class NavierStokes(Operator):
    """Vorticity after some time, ``(B, 1, y, x) -> (B, 1, y, x)``, both in 1/time.

    Time goes in segments. At the start of each, every row takes as many equal steps as its own speed asks for,
    rounded up to a power of two: no row's steps depend on another's, and derivatives, which hold the steps fixed,
    are those of the map. Reverse passes recompute segment by segment: their memory does not grow with time.

    Args:
        shape: Real space ``(1, n, n)``, or its shape.
        time: Duration, positive.
        viscosity: ``nu``, not negative.
        forcing: ``f``, broadcastable to ``(n, n)``, or None.
        side: Length of the square's side, ``2 pi`` unless said otherwise.
        courant: Step times speed over grid spacing, at most; above 1 the scheme is unstable.
        segments: Segments of time; more follow changes of speed better and save memory.
        dtype: Precision; that of the Space, or float32.

    Raises:
        InvdiffError: If the grid is not a square of at least 8 pixels with one channel, or a number is out of
            range; on a call, if the flow blows up.
    """

    provides: ClassVar[frozenset[str]] = frozenset({"vjp"})

    def __init__(
        self,
        shape: Space | Sequence[int],
        time: float = 1.0,
        viscosity: float = 1 / 200,
        forcing: Any = None,
        *,
        side: float = 2 * math.pi,
        courant: float = 0.5,
        segments: int = 8,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.domain = self.range = as_space(shape, dtype)
        channels, *grid = self.domain.shape
        if self.domain.is_complex or channels != 1 or len(grid) != 2 or grid[0] != grid[1] or grid[0] < 8:
            raise InvdiffError(f"A flow lives on a real square (1, n, n) of at least 8 pixels, got {self.domain}.")
        if not (time > 0 and viscosity >= 0 and side > 0 and 0 < courant <= 1 and segments >= 1):
            raise InvdiffError(
                "A flow needs time > 0, viscosity >= 0, side > 0, 0 < courant <= 1 and segments >= 1, got "
                f"{time:g}, {viscosity:g}, {side:g}, {courant:g} and {segments}."
            )
        self.time, self.viscosity, self.side = float(time), float(viscosity), float(side)
        self.courant, self.segments = float(courant), int(segments)
        n, real = grid[0], self.domain.dtype
        unit = 2 * math.pi / side
        ky = torch.fft.fftfreq(n, 1 / n, dtype=torch.float64)[:, None] * unit
        kx = torch.fft.rfftfreq(n, 1 / n, dtype=torch.float64) * unit
        k2 = ky**2 + kx**2
        inverse = torch.where(k2 > 0, 1 / k2.clamp_min(1e-300), torch.zeros_like(k2))
        kept = (torch.maximum(ky.abs(), kx.expand(n, -1)) < unit * n / 3).double()
        #: From vorticity to both velocities, and from their products to the nonlinear term, in Fourier space.
        self.velocity = torch.stack([1j * ky * inverse, -1j * kx * inverse]).to(real.to_complex())
        self.products = (kept * torch.stack([kx**2 - ky**2, kx * ky])).to(real)
        self.kept, self.decay = kept.to(real), (viscosity * k2).to(real)
        f = torch.zeros(n, n) if forcing is None else as_parameter(forcing, "The forcing")
        if f.ndim > 2 or f.is_complex():
            raise InvdiffError(f"The forcing is real and fits one image ({n}, {n}), got shape {tuple(f.shape)}.")
        self.force = (torch.fft.rfft2(f.to(torch.float64).expand(n, n)) * kept).to(real.to_complex())
        super().__init__()

    def _forward(self, x: Tensor) -> Tensor:
        if not len(x):  # transforms of nothing are refused
            return x
        w = torch.fft.rfft2(x[:, 0].to(self.domain.dtype)) * self.kept
        for _ in range(self.segments):
            count = self._steps(w.detach())
            parts, order = [], []
            for n in count.unique().tolist():  # rows with the same number of steps go together
                rows = (count == n).nonzero()[:, 0]
                parts.append(self._segment(w[rows], int(n)))
                order.append(rows)
            w = torch.cat(parts)[torch.cat(order).argsort()]
        return torch.fft.irfft2(w, s=self.domain.shape[1:])[:, None]

    def _steps(self, w: Tensor) -> Tensor:
        """Return how many steps each row takes in a segment, powers of two, ``(B,)``."""
        span, spacing = self.time / self.segments, self.side / self.domain.shape[-1]
        fastest = self._fastest(w) + span * self._fastest(self.force[None])  # what the forcing adds on the way
        wanted = span * fastest / (self.courant * spacing)
        if not bool((wanted < _MOST).all()):
            worst = int(torch.nan_to_num(wanted, nan=torch.inf).argmax())
            raise InvdiffError(
                f"The flow of row {worst} blows up (speed {float(fastest[worst]):.3g}); give vorticity in units "
                "of 1/time, or lower courant."
            )
        return 2 ** wanted.clamp_min(1).log2().ceil().long()

    def _fastest(self, w: Tensor) -> Tensor:
        """Largest speed of each row."""
        speed = torch.fft.irfft2(self.velocity[:, None] * w, s=self.domain.shape[1:]).square().sum(0)
        return speed.flatten(1).amax(1).sqrt().to(torch.float64)

    def _segment(self, w: Tensor, count: int) -> Tensor:
        if torch.is_grad_enabled() and w.requires_grad:
            out = checkpoint(self._advance, w, count, use_reentrant=False)
            assert isinstance(out, Tensor)
            return out
        return self._advance(w, count)

    def _advance(self, w: Tensor, count: int) -> Tensor:
        """Take ``count`` equal steps through a segment."""
        h = self.time / self.segments / count
        half = torch.exp(-0.5 * h * self.decay)
        whole = half * half
        for _ in range(count):
            a = self._rate(w)
            b = self._rate(half * (w + 0.5 * h * a))
            c = self._rate(half * w + 0.5 * h * b)
            d = self._rate(whole * w + h * half * c)
            w = whole * w + h / 6 * (whole * a + 2 * half * (b + c) + d)
        return w

    def _rate(self, w: Tensor) -> Tensor:
        """Advection and forcing in Fourier space."""
        u, v = torch.fft.irfft2(self.velocity[:, None] * w, s=self.domain.shape[1:])
        both = torch.fft.rfft2(torch.stack([u * v, v * v - u * u]))
        return self.force + (self.products[:, None] * both).sum(0)
