"""Cartesian MRI of several images at once: frames in time, slices, or diffusion directions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from invdiff.errors import InvdiffError
from invdiff.operator import LinearOperator
from invdiff.operators._parameters import as_parameter
from invdiff.operators.mri import MultiCoilMRI
from invdiff.spaces import Space


class FramesMRI(LinearOperator):
    """``A x_t = m_t F (S_c x_t)`` for frames ``t``: `MultiCoilMRI` with a mask of its own for every frame.

    ``(B, 1, frame, y, x)`` complex to ``(B, frame, coil, ky, kx)`` complex. The coil maps are shared by all
    frames, or given per frame (slices). ``normal`` is fused; where every mask is constant along ky or along kx,
    ``prox`` and ``conditional`` are exact, frame by frame.

    Args:
        mask: Zeros and ones in centred order, ``(frame, ky, kx)``, or ``(N, frame, ky, kx)`` per case.
        coil_maps: ``(coil, y, x)``, ``(frame, coil, y, x)``, or ``(N, frame, coil, y, x)`` per case.
        units: Units of the image.
        spacing: Distance between neighbours, per named dimension (``frame``, ``y``, ``x``).
        frame: Name of the axis: ``"frame"``, ``"z"``, ``"direction"``.

    Raises:
        InvdiffError: If ranks or sizes do not fit, or a frame samples nothing.
    """

    provides: ClassVar[frozenset[str]] = frozenset({"linear", "vjp", "normal"})

    def __init__(
        self,
        mask: Any,
        coil_maps: Any,
        *,
        units: str = "1",
        spacing: Mapping[str, float] | None = None,
        frame: str = "frame",
    ) -> None:
        masks, maps = as_parameter(mask, "The mask"), as_parameter(coil_maps, "The array of coil maps")
        if masks.ndim not in (3, 4) or maps.ndim not in (3, 4, 5):
            raise InvdiffError(
                f"The masks have shape {tuple(masks.shape)} and the coil maps {tuple(maps.shape)}; expected "
                "(frame, ky, kx) and (coil, y, x), with further leading axes for cases and maps per frame."
            )
        masks = masks if masks.ndim == 4 else masks[None]
        frames = masks.shape[1]
        if maps.ndim > 3:
            maps = maps if maps.ndim == 5 else maps[None]
            if maps.shape[1] != frames:
                raise InvdiffError(f"There are masks for {frames} frames and coil maps for {maps.shape[1]}.")
        counts = {len(masks), len(maps) if maps.ndim == 5 else 1} - {1}
        if len(counts) > 1:
            raise InvdiffError(f"There are masks for {len(masks)} cases and coil maps for {len(maps)}.")
        self._cases = counts.pop() if counts else None
        if self._cases is not None:
            masks = masks.expand(self._cases, *masks.shape[1:])
            maps = maps.expand(self._cases, *maps.shape[1:]) if maps.ndim == 5 else maps
        self.frames = MultiCoilMRI(masks.flatten(0, 1), maps.flatten(0, 1) if maps.ndim == 5 else maps)
        image, data = self.frames.domain.shape[1:], self.frames.range.shape
        dtype = self.frames.domain.dtype
        self.domain = Space((1, frames, *image), dtype, ("channel", frame, "y", "x"), units, spacing or {})
        self.range = Space((frames, *data), dtype, (frame, "coil", "ky", "kx"), units)

    @property
    def n_cases(self) -> int | None:
        """Number of cases the parameters are given for, or None where all cases share them."""
        return self._cases

    @property
    def capabilities(self) -> frozenset[str]:
        """What the masks and maps of all frames allow in closed form."""
        return self.provides | (self.frames.capabilities & {"prox", "conditional"})

    @property
    def support(self) -> Tensor:
        """The masks: data exist where they are 1."""
        mask = self.frames.mask
        count = self.range.shape[0]
        return (mask if len(mask) > 1 else mask.expand(count, *mask.shape[1:])).unflatten(0, (-1, count))

    def rows(self, index: Tensor) -> LinearOperator:
        """Return the operator whose row ``r`` has the parameters of case ``index[r]``."""
        if self._cases is None:
            return self
        index, count = torch.as_tensor(index, dtype=torch.long), self.domain.shape[1]
        new = FramesMRI.__new__(FramesMRI)
        new.domain, new.range, new._cases = self.domain, self.range, len(index)
        new.frames = self.frames.rows((index[:, None] * count + torch.arange(count)).flatten())
        return new

    def _forward(self, x: Tensor) -> Tensor:
        return self._framewise(self.frames, self.range, x)

    def _adjoint(self, y: Tensor) -> Tensor:
        return self._framewise(self.frames.adjoint, self.domain, y)

    def normal(self, x: Tensor) -> Tensor:
        """Return ``A^H A x``, two bare FFTs per coil and frame."""
        self.domain.check(x, f"Input of the normal operator of {self.name}")
        return self._framewise(self.frames.normal, self.domain, x)

    def prox(self, z: Tensor, y: Tensor, rho: Tensor) -> Tensor:
        """Return ``argmin_x ||A x - y||^2 + rho ||x - z||^2``; ``rho`` is ``(B,)``."""
        if "prox" not in self.capabilities:
            return super().prox(z, y, rho)
        return self._framewise(self.frames.prox, self.domain, z, y, rho)

    def conditional(self, z: Tensor, y: Tensor, sigma: Tensor, tau: Tensor, noise: Tensor) -> Tensor:
        """Return an exact draw of ``x`` given ``y = A x + sigma n`` and ``x ~ N(z, tau^2 I)``."""
        if "conditional" not in self.capabilities:
            raise InvdiffError(f"{self.name} has no closed-form Gaussian draw; solve by conjugate gradients.")
        order = (self.domain, z), (self.range, y), (self.domain, noise)
        for space, value in order:
            space.check(value, f"Input of the conditional draw of {self.name}")
        return self._framewise(self.frames.conditional, self.domain, z, y, sigma, tau, noise)

    def _framewise(self, apply: Callable[..., Tensor], out: Space, *inputs: Tensor | float) -> Tensor:
        """Apply a method of the frames' operator, with frames as its rows and numbers repeated for each."""
        count, rows = self.domain.shape[1], _rows_of(inputs)
        if self._cases is not None and rows != self._cases:
            raise InvdiffError(
                f"{self.name} has parameters for {self._cases} cases and got {rows} rows; pick them with "
                "rows(index)."
            )
        if not rows:
            return out.zeros(0, self.frames.mask.device)
        flat = [self._flat(v, count, rows) for v in inputs]
        if self._cases is not None or self.frames.n_cases is None:
            return apply(*flat).reshape(rows, *out.shape)
        parts = [apply(*(v[r * count : (r + 1) * count] for v in flat)) for r in range(rows)]
        return torch.cat(parts).reshape(rows, *out.shape)

    def _flat(self, value: Tensor | float, count: int, rows: int) -> Tensor:
        if isinstance(value, Tensor) and value.ndim > 1:
            image = value.shape[1] == 1 and tuple(value.shape[1:]) == self.domain.shape
            return value[:, 0].flatten(0, 1)[:, None] if image else value.flatten(0, 1)
        numbers = torch.as_tensor(value, device=self.frames.mask.device).reshape(-1)
        return numbers.expand(rows).repeat_interleave(count)


def _rows_of(inputs: tuple[Tensor | float, ...]) -> int:
    first = inputs[0]
    assert isinstance(first, Tensor)
    return first.shape[0]
