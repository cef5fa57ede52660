"""Computed tomography with parallel rays."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from invdiff.operators._filtered import interpolate, ramp_filter, view_weights
from invdiff.operators._ray_transform import (
    MAX_TABLE_BYTES,
    RayTransform,
    as_angles,
    as_count,
    as_image_space,
    as_length,
    warn_if_truncated,
)
from invdiff.operators._rays import Cameras, Rays, affine, trace
from invdiff.spaces import Space


class ParallelBeamCT(RayTransform):
    """``(A x)[v, k]``: the integral of ``x`` along the line ``X cos t_v + Y sin t_v = s_k``.

    ``(B, ..., y, x)`` to ``(B, ..., view, detector)``; axes before ``(y, x)`` are slices, projected one by one.
    ``X`` grows with the column and ``Y`` with the row; the axis of rotation is the centre of the image,
    ``((nx - 1) / 2, (ny - 1) / 2)``. Detector ``k`` lies at ``s_k = (k - centre) detector_spacing``. Limited
    angles and sparse views are lists of angles.

    Joseph's method, with an exact adjoint. There is no ``pinv``: :meth:`fbp` is an approximation.

    Implementations (``method``), which agree to rounding:

    * ``"table"``: all weights as a sparse matrix and its transpose, built on first use and shared between
      operators of the same geometry; the rows of a batch are its right-hand sides. The fastest.
    * ``"matrix-free"``: compiled loops that compute weights on the fly (numba on the CPU, Triton on CUDA; where
      they are missing, as below).
    * ``"reference"``: plain torch, in blocks of views.
    * ``"auto"``: a table where it takes at most ``max_table_bytes``, else matrix-free.

    Args:
        shape: Shape of one image or its whole Space.
        angles: Angle of every view, in radians.
        detectors: Number of detectors; enough to cover the diagonal of the image by default.
        detector_spacing: Distance between detectors; the smaller spacing of the pixels by default.
        centre: Detector, counted from 0 and with a fraction, that the axis of rotation falls on; the middle
            ``(detectors - 1) / 2`` by default.
        truncated: Whether a detector narrower than the circle inscribed in the image is meant to be so; without
            it, construction warns.
        method: Which implementation.
        max_table_bytes: Largest table that ``"auto"`` builds.
        dtype: Precision; that of the Space, or float32.
        units: Units of the image, e.g. ``"1/mm"``, which makes line integrals dimensionless.
        spacing: Size of the pixels: a number, or one per named dimension; that of the Space, or 1.

    Raises:
        InvdiffError: If there are no views, lengths are not positive, or the image is complex.

    Reference: Joseph, IEEE TMI 1(3), 1982.
    """

    def __init__(
        self,
        shape: Space | Sequence[int],
        angles: Any,
        *,
        detectors: int | None = None,
        detector_spacing: float | None = None,
        centre: float | None = None,
        truncated: bool = False,
        method: str = "auto",
        max_table_bytes: int = MAX_TABLE_BYTES,
        dtype: torch.dtype | None = None,
        units: str | None = None,
        spacing: float | Mapping[str, float] | None = None,
    ) -> None:
        domain, self.grid = as_image_space(shape, ("y", "x"), dtype, units, spacing)
        self.angles = as_angles(angles)
        ds = min(self.grid.spacing) if detector_spacing is None else detector_spacing
        self.detector_spacing = as_length(ds, "The detector spacing")
        if detectors is None:
            detectors = math.ceil(math.hypot(*self.grid.extent) / self.detector_spacing)
        count = as_count(detectors, "The number of detectors")
        self.centre = (count - 1) / 2 if centre is None else float(centre)
        radius = 0.5 * min(self.grid.extent) / self.detector_spacing
        reach = min(self.centre + 0.5, count - 0.5 - self.centre)
        warn_if_truncated(radius - reach, truncated)
        self._finish(domain, {"detector": (count, self.detector_spacing)}, method, max_table_bytes)

    def _geometry(self) -> Mapping[str, Any]:
        return {"centre": self.centre, "detector_spacing": self.detector_spacing}

    @property
    def positions(self) -> np.ndarray:
        """Distance of every detector from the axis of rotation, ``(detectors,)``."""
        return (np.arange(self.range.shape[-1]) - self.centre) * self.detector_spacing

    def _trace(self, start: int, stop: int) -> Rays:
        t, s = self.angles[start:stop, None], self.positions[None]
        points = np.stack([s * np.sin(t), s * np.cos(t)], -1)
        along = np.broadcast_to(np.stack([np.cos(t), -np.sin(t)], -1), points.shape)
        return trace(self.grid, points.reshape(-1, 2), along.reshape(-1, 2))

    def _cameras(self, start: int, stop: int) -> Cameras:
        t, ds = self.angles[start:stop], self.detector_spacing
        across = affine(self.grid, [np.sin(t) / ds, np.cos(t) / ds], 0.0)
        depth = affine(self.grid, [0 * t, 0 * t], 1.0)
        return Cameras(across, depth, None, self.bins, (0.0, self.centre))

    def fbp(self, y: Tensor, filter: str = "ram-lak") -> Tensor:
        """Reconstruct by filtered back-projection, ``(B, *range) -> (B, *domain)``.

        Every view is convolved with a ramp, weighted by the angle it stands for, and spread back with linear
        interpolation between detectors. It approximates an inverse where views are many and cover half a turn; a
        missing wedge stays missing.

        Args:
            y: Line integrals.
            filter: ``"ram-lak"`` (no window), ``"shepp-logan"``, ``"cosine"``, ``"hamming"`` or ``"hann"``.
        """
        self.range.check(y, f"Data of the filtered back-projection of {self.name}")
        y = self._enter(y, self.range)
        q = ramp_filter(y.reshape(-1, *y.shape[-2:]), self.detector_spacing, filter)
        rows, columns = (torch.from_numpy(self.grid.coordinates(a)).to(y.device) for a in (0, 1))
        out = q.new_zeros(len(q), math.prod(self.grid.sizes))
        for v, (angle, weight) in enumerate(zip(self.angles, view_weights(self.angles, math.pi))):
            s = rows[:, None] * math.sin(angle) + columns[None] * math.cos(angle)
            out += weight * interpolate(q[:, v], (s / self.detector_spacing + self.centre).flatten())
        return out.reshape(len(y), *self.domain.shape)
