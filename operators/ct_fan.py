"""Computed tomography with a fan of rays from a point."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from invdiff.operators._filtered import interpolate, ramp_filter, redundancy, view_weights
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


class FanBeamCT(RayTransform):
    """Line integrals along rays from a point source to a flat or curved line of detectors.

    ``(B, ..., y, x)`` to ``(B, ..., view, detector)``. At the angle ``t`` the central ray travels along
    ``d = (-sin t, cos t)`` as ``(X, Y)``, from the source at ``-source_distance d``, through the axis of rotation
    at the centre of the image, to the detector, ``detector_distance`` behind it. ``s_k = (k - centre)
    detector_spacing`` counts along ``u = (cos t, sin t)`` on a flat detector, and along the arc about the source,
    in the same sense, on a curved one. Far from the source this is :class:`ParallelBeamCT` of the same angles.

    Joseph's method with an exact adjoint; implementations as for :class:`ParallelBeamCT`. There is no ``pinv``:
    :meth:`fbp` is an approximation.

    Args:
        shape: Shape of one image or its whole Space.
        angles: Angle of every view in radians; a short scan covers half a turn and the fan.
        source_distance: From the source to the axis.
        detector_distance: From the axis to the detector; 0 puts the detector's scale on the axis.
        detectors: Number of detectors; enough to cover the diagonal of the image by default.
        detector_spacing: Distance between detectors on the detector; by default the smaller spacing of the pixels,
            magnified.
        centre: Detector, counted from 0 and with a fraction, that the central ray falls on; the middle by default.
        curved: Whether the detector is an arc about the source.
        truncated: Whether a fan narrower than the circle inscribed in the image is meant to be so; without it,
            construction warns.
        method: Which implementation.
        max_table_bytes: Largest table that ``"auto"`` builds.
        dtype: Precision; that of the Space, or float32.
        units: Units of the image, e.g. ``"1/mm"``, which makes line integrals dimensionless.
        spacing: Size of the pixels: a number, or one per named dimension; that of the Space, or 1.

    Raises:
        InvdiffError: If the source is inside the image, there are no views, or lengths are not positive.

    Reference: Joseph, IEEE TMI 1(3), 1982; Kak and Slaney, chapter 3.4, 1988.
    """

    def __init__(
        self,
        shape: Space | Sequence[int],
        angles: Any,
        *,
        source_distance: float,
        detector_distance: float,
        detectors: int | None = None,
        detector_spacing: float | None = None,
        centre: float | None = None,
        curved: bool = False,
        truncated: bool = False,
        method: str = "auto",
        max_table_bytes: int = MAX_TABLE_BYTES,
        dtype: torch.dtype | None = None,
        units: str | None = None,
        spacing: float | Mapping[str, float] | None = None,
    ) -> None:
        domain, self.grid = as_image_space(shape, ("y", "x"), dtype, units, spacing)
        self.angles, self.curved = as_angles(angles), bool(curved)
        self.source_distance, self.detector_distance = as_distances(source_distance, detector_distance, self.grid)
        whole = self.source_distance + self.detector_distance
        ds = (
            min(self.grid.spacing) * whole / self.source_distance if detector_spacing is None else detector_spacing
        )
        self.detector_spacing = as_length(ds, "The detector spacing")
        if detectors is None:
            detectors = math.ceil(2 * self._reach(0.5 * math.hypot(*self.grid.extent)) / self.detector_spacing)
        count = as_count(detectors, "The number of detectors")
        self.centre = (count - 1) / 2 if centre is None else float(centre)
        reach = min(self.centre + 0.5, count - 0.5 - self.centre)
        needed = self._reach(0.5 * min(self.grid.extent)) / self.detector_spacing
        warn_if_truncated(needed - reach, truncated)
        self._finish(domain, {"detector": (count, self.detector_spacing)}, method, max_table_bytes)

    def _reach(self, radius: float) -> float:
        """Return how far on the detector a circle about the axis reaches."""
        angle = math.asin(radius / self.source_distance)
        return (self.source_distance + self.detector_distance) * (angle if self.curved else math.tan(angle))

    def _geometry(self) -> Mapping[str, Any]:
        names = ("centre", "curved", "detector_distance", "detector_spacing", "source_distance")
        return {name: getattr(self, name) for name in names}

    @property
    def fan(self) -> np.ndarray:
        """Angle between the ray to every detector and the central ray, ``(detectors,)``."""
        s = (np.arange(self.range.shape[-1]) - self.centre) * self.detector_spacing
        s = s / (self.source_distance + self.detector_distance)
        return s if self.curved else np.arctan(s)

    def _trace(self, start: int, stop: int) -> Rays:
        t, g = self.angles[start:stop, None], self.fan[None]
        along = np.stack([np.cos(t - g), -np.sin(t - g)], -1)
        source = -self.source_distance * np.stack([np.cos(t), -np.sin(t)], -1)
        return trace(self.grid, np.broadcast_to(source, along.shape).reshape(-1, 2), along.reshape(-1, 2))

    def _cameras(self, start: int, stop: int) -> Cameras:
        t = self.angles[start:stop]
        c, s = np.cos(t), np.sin(t)
        scale = (self.source_distance + self.detector_distance) / self.detector_spacing
        per_radian, m = (scale, 1.0) if self.curved else (0.0, scale)
        depth = affine(self.grid, [c, -s], self.source_distance)
        if abs(self.fan).max() >= math.pi / 2:
            depth = 0 * depth  # rays run backwards through the image too, where no projection finds them
        return Cameras(
            affine(self.grid, [m * s, m * c], 0.0), depth, None, self.bins, (0.0, self.centre), per_radian
        )

    def fbp(self, y: Tensor, filter: str = "ram-lak") -> Tensor:
        """Reconstruct by weighted filtered back-projection, ``(B, *range) -> (B, *domain)``.

        Whole turns count every ray one half, short scans have Parker's weights.

        Args:
            y: Line integrals.
            filter: ``"ram-lak"`` (no window), ``"shepp-logan"``, ``"cosine"``, ``"hamming"`` or ``"hann"``.

        Raises:
            InvdiffError: If the views cover less than half a turn and the fan.
        """
        self.range.check(y, f"Data of the filtered back-projection of {self.name}")
        y, d = self._enter(y, self.range), self.source_distance
        half_fan = math.asin(0.5 * min(self.grid.extent) / d)
        weights = redundancy(self.angles, self.fan, half_fan) * np.cos(self.fan)
        # on the axis: the flat detector is scaled down to it, the curved one is counted in angles
        step = self.detector_spacing / (d + self.detector_distance) * (1 if self.curved else d)
        weights = weights * (d if self.curved else 1)
        q = y.reshape(-1, *y.shape[-2:]) * torch.from_numpy(weights).to(y)
        q = ramp_filter(q, step, filter, equiangular=self.curved)
        rows, columns = (torch.from_numpy(self.grid.coordinates(a)).to(y.device) for a in (0, 1))
        out = q.new_zeros(len(q), math.prod(self.grid.sizes))
        for v, (angle, weight) in enumerate(zip(self.angles, view_weights(self.angles, 2 * math.pi))):
            across = (rows[:, None] * math.sin(angle) + columns[None] * math.cos(angle)).flatten()
            depth = d + (rows[:, None] * math.cos(angle) - columns[None] * math.sin(angle)).flatten()
            if self.curved:
                at, fade = torch.atan2(across, depth), depth**2 + across**2
            else:
                at, fade = d * across / depth, (depth / d) ** 2
            out += weight * interpolate(q[:, v], at / step + self.centre) / fade.to(q.dtype)
        return out.reshape(len(y), *self.domain.shape)
