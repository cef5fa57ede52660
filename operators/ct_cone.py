"""Computed tomography of volumes with a cone of rays, on a circle or a helix."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from invdiff.errors import InvdiffError
from invdiff.operators._filtered import interpolate_frame, ramp_filter, redundancy, view_weights
from invdiff.operators._ray_transform import (
    MAX_TABLE_BYTES,
    RayTransform,
    as_angles,
    as_count,
    as_distances,
    as_image_space,
    as_length,
    warn_if_truncated,
)
from invdiff.operators._rays import Cameras, Rays, affine, trace
from invdiff.spaces import Space

#: Voxels that back-projection handles at once.
_VOXELS = 1 << 20


class ConeBeamCT(RayTransform):
    """Line integrals of a volume along rays from a point source to a flat panel of detectors.

    ``(B, ..., z, y, x)`` to ``(B, ..., view, row, detector)``. Within a plane of constant ``z`` as
    :class:`FanBeamCT` with a flat detector; rows count along ``z``. On a helix, source and panel rise by ``pitch``
    per turn, and the middle of the angles is at the middle of the volume.

    Joseph's method (bilinear between voxels) with an exact adjoint. Volumes are mostly too large for tables, and
    then weights are computed on the fly; implementations as for :class:`ParallelBeamCT`. There is no ``pinv``:
    :meth:`fbp` is an approximation.

    Args:
        shape: Shape of one volume or its whole Space.
        angles: Angle of every view in radians; on a helix they go on over the turns.
        source_distance: From the source to the axis.
        detector_distance: From the axis to the panel; 0 puts the panel's scale on the axis.
        detectors: Rows and columns of the panel; by default enough columns for the diagonal of a slice, and
            enough rows for the height of the volume on the axis.
        detector_spacing: Distance between rows and between columns on the panel, one number or two; by default
            the spacing of the voxels, magnified.
        centre: Row and column, counted from 0 and with fractions, that the central ray falls on; the middle by
            default.
        pitch: Rise per turn; 0 is a circle.
        truncated: Whether a panel narrower than the circle inscribed in the slices is meant to be so; without it,
            construction warns.
        method: Which implementation.
        max_table_bytes: Largest table that ``"auto"`` builds.
        dtype: Precision; that of the Space, or float32.
        units: Units of the volume, e.g. ``"1/mm"``, which makes line integrals dimensionless.
        spacing: Size of the voxels: a number, or one per named dimension; that of the Space, or 1.

    Raises:
        InvdiffError: If the source is inside the volume, there are no views, or lengths are not positive.

    Reference: Joseph, IEEE TMI 1(3), 1982; Feldkamp, Davis and Kress, JOSA A 1(6), 1984.
    """

    def __init__(
        self,
        shape: Space | Sequence[int],
        angles: Any,
        *,
        source_distance: float,
        detector_distance: float,
        detectors: tuple[int, int] | None = None,
        detector_spacing: float | tuple[float, float] | None = None,
        centre: tuple[float, float] | None = None,
        pitch: float = 0.0,
        truncated: bool = False,
        method: str = "auto",
        max_table_bytes: int = MAX_TABLE_BYTES,
        dtype: torch.dtype | None = None,
        units: str | None = None,
        spacing: float | Mapping[str, float] | None = None,
    ) -> None:
        domain, self.grid = as_image_space(shape, ("z", "y", "x"), dtype, units, spacing)
        self.angles, self.pitch = as_angles(angles, turns=pitch != 0), float(pitch)
        if not math.isfinite(self.pitch):
            raise InvdiffError(f"The pitch must be a finite length per turn, got {pitch}.")
        self.source_distance, self.detector_distance = as_distances(source_distance, detector_distance, self.grid)
        larger = (self.source_distance + self.detector_distance) / self.source_distance
        h = self.grid.spacing
        steps = (h[0] * larger, min(h[1:]) * larger) if detector_spacing is None else detector_spacing
        rise, across = (steps, steps) if isinstance(steps, (int, float)) else steps
        self.detector_spacing = (as_length(rise, "The row spacing"), as_length(across, "The detector spacing"))
        if detectors is None:
            width = 2 * self._reach(0.5 * math.hypot(*self.grid.extent[1:]))
            height = self.grid.extent[0] * larger
            detectors = (math.ceil(height / rise - 1e-9), math.ceil(width / across))
        rows, columns = (as_count(n, "The number of detectors") for n in detectors)
        middle = ((rows - 1) / 2, (columns - 1) / 2) if centre is None else centre
        self.centre = (float(middle[0]), float(middle[1]))
        reach = min(self.centre[1] + 0.5, columns - 0.5 - self.centre[1])
        needed = self._reach(0.5 * min(self.grid.extent[1:])) / self.detector_spacing[1]
        warn_if_truncated(needed - reach, truncated)
        panel = {"row": (rows, self.detector_spacing[0]), "detector": (columns, self.detector_spacing[1])}
        self._finish(domain, panel, method, max_table_bytes)

    def _reach(self, radius: float) -> float:
        """Return how far from the middle of the panel a circle about the axis reaches."""
        angle = math.asin(radius / self.source_distance)
        return (self.source_distance + self.detector_distance) * math.tan(angle)

    def _geometry(self) -> Mapping[str, Any]:
        names = ("centre", "detector_distance", "detector_spacing", "pitch", "source_distance")
        return {name: getattr(self, name) for name in names}

    @property
    def panel(self) -> tuple[np.ndarray, np.ndarray]:
        """Position of every row and of every column on the panel, from the central ray."""
        rows, columns = (
            (np.arange(n) - c) * h for n, c, h in zip(self.range.shape[-2:], self.centre, self.detector_spacing)
        )
        return rows, columns

    @property
    def heights(self) -> np.ndarray:
        """Height of the source at every view, ``(views,)``."""
        middle = 0.5 * (self.angles.min() + self.angles.max())
        return self.pitch * (self.angles - middle) / (2 * math.pi)

    def _trace(self, start: int, stop: int) -> Rays:
        t = self.angles[start:stop, None, None]
        rows, columns = self.panel
        v, s = rows[None, :, None], columns[None, None]
        c, si, whole = np.cos(t), np.sin(t), self.source_distance + self.detector_distance
        size = (stop - start, len(rows), len(columns))

        def vectors(z: Any, y: Any, x: Any) -> np.ndarray:
            return np.stack([np.broadcast_to(part, size) for part in (z, y, x)], -1).reshape(-1, 3)

        points = vectors(
            self.heights[start:stop, None, None], -self.source_distance * c, self.source_distance * si
        )
        return trace(self.grid, points, vectors(v, whole * c + s * si, s * c - whole * si))

    def _cameras(self, start: int, stop: int) -> Cameras:
        t, heights = self.angles[start:stop], self.heights[start:stop]
        c, s = np.cos(t), np.sin(t)
        up, m = ((self.source_distance + self.detector_distance) / h for h in self.detector_spacing)
        return Cameras(
            affine(self.grid, [0.0, m * s, m * c], 0.0),
            affine(self.grid, [0.0, c, -s], self.source_distance),
            affine(self.grid, [up, 0.0, 0 * c], -up * heights),
            self.range.shape[-1],
            self.centre,
        )

    def fbp(self, y: Tensor, filter: str = "ram-lak") -> Tensor:
        """Reconstruct by the method of Feldkamp, Davis and Kress, ``(B, *range) -> (B, *domain)``.

        As good as a fan in the plane of the source, and more approximate away from it. Short scans have Parker's
        weights.

        Args:
            y: Line integrals of a circular scan.
            filter: ``"ram-lak"`` (no window), ``"shepp-logan"``, ``"cosine"``, ``"hamming"`` or ``"hann"``.

        Raises:
            InvdiffError: On a helix, or if the views cover less than half a turn and the fan.
        """
        self.range.check(y, f"Data of the filtered back-projection of {self.name}")
        if self.pitch:
            raise InvdiffError(
                "Filtered back-projection is for circles, and this is a helix; reconstruct by conjugate gradients."
            )
        y, d = self._enter(y, self.range), self.source_distance
        rows, columns = (p * d / (d + self.detector_distance) for p in self.panel)  # scaled down to the axis
        rise, across = (h * d / (d + self.detector_distance) for h in self.detector_spacing)
        half_fan = math.asin(0.5 * min(self.grid.extent[1:]) / d)
        weights = redundancy(self.angles, np.arctan(columns / d), half_fan)[:, None]
        weights = weights * (d / np.sqrt(d**2 + rows[:, None] ** 2 + columns[None] ** 2))
        q = y.reshape(-1, *y.shape[-3:]) * torch.from_numpy(weights).to(y)
        q = ramp_filter(q, across, filter)
        z, py, px = (torch.from_numpy(self.grid.coordinates(a)).to(y.device) for a in range(3))
        out = q.new_zeros(len(q), len(z), len(py) * len(px))
        step = max(1, _VOXELS // out.shape[2])
        for v, (angle, weight) in enumerate(zip(self.angles, view_weights(self.angles, 2 * math.pi))):
            s = (py[:, None] * math.sin(angle) + px[None] * math.cos(angle)).flatten()
            larger = d / (d + (py[:, None] * math.cos(angle) - px[None] * math.sin(angle)).flatten())
            column = s * larger / across + self.centre[1]
            for k in range(0, len(z), step):
                row = z[k : k + step, None] * larger / rise + self.centre[0]
                found = interpolate_frame(q[:, v], row.flatten(), column.expand_as(row).flatten())
                out[:, k : k + step] += weight * found.reshape(len(q), *row.shape) * (larger**2).to(q.dtype)
        return out.reshape(len(y), *self.domain.shape)
