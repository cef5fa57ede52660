"""What ray transforms of all geometries share: the choice of implementation, spaces, and validation."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import math
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor

from invdiff.errors import InvdiffError
from invdiff.operator import apply_linear
from invdiff.operators import _rays
from invdiff.operators._parameters import ParametricOperator, as_space
from invdiff.operators._rays import Cameras, Grid, Rays
from invdiff.operators._table import CACHE_BYTES, Sized, Table, TableHolder, build_table, table_bytes
from invdiff.spaces import Space

if TYPE_CHECKING:
    from invdiff.operators._joseph import HostRays
    from invdiff.operators._triton_rays import DeviceRays

T = TypeVar("T", bound=Sized)

METHODS = ("auto", "table", "matrix-free", "reference")
#: Largest size of a table and its transpose that ``method="auto"`` builds.
MAX_TABLE_BYTES = 1 << 30


class RayTransform(ParametricOperator):
    """Line integrals over the trailing axes of an image; further axes in front are transformed one by one.

    Subclasses set ``angles`` and what else they need, implement ``_trace`` and ``_cameras``, and call ``_finish``
    last.
    """

    provides: ClassVar[frozenset[str]] = frozenset({"linear", "vjp", "normal"})
    angles: np.ndarray
    grid: Grid
    asked: str

    @abstractmethod
    def _trace(self, start: int, stop: int) -> Rays:
        """Return the rays of the views from ``start`` to ``stop``, in the order of the data."""

    @abstractmethod
    def _cameras(self, start: int, stop: int) -> Cameras:
        """Return where points fall on the detector in the same views."""

    @abstractmethod
    def _geometry(self) -> Mapping[str, Any]:
        """Return the numbers that describe the geometry, besides the angles and the grid."""

    def _finish(self, domain: Space, measured: Mapping[str, tuple[int, float]], method: str, limit: int) -> None:
        """Set spaces and method; ``measured`` gives size and spacing per dimension of one view."""
        lead = len(domain.shape) - len(self.grid.sizes)
        dims = (*domain.dims[:lead], "view", *measured)
        unit = domain.spacing_units
        self.domain = domain
        self.range = Space(
            (*domain.shape[:lead], len(self.angles), *(n for n, _ in measured.values())),
            domain.dtype,
            dims,
            "1" if domain.units == f"1/{unit}" else unit if domain.units == "1" else f"{domain.units} {unit}",
            {d: domain.spacing[d] for d in domain.dims[:lead] if d in domain.spacing}
            | {d: h for d, (_, h) in measured.items()},
            unit,
        )
        self.bins = math.prod(n for n, _ in measured.values())
        # The only tensor here; it tells on which device the operator works.
        self.place = torch.zeros((), dtype=domain.dtype)
        text = f"{self.name} {self.grid} {sorted(self._geometry().items())} {sorted(measured.items())}"
        self.geometry_digest = hashlib.sha256(text.encode() + self.angles.tobytes()).hexdigest()
        super().__init__()
        self._holder = TableHolder()
        self.asked = method
        self._fits = self._table_fits(limit)

    def _table_fits(self, limit: int) -> bool:
        """Whether a table may be built where that is asked, or else takes at most ``limit`` bytes."""
        if self.asked not in METHODS:
            raise InvdiffError(f"The method {self.asked!r} is unknown; choose one of {', '.join(METHODS)}.")
        if self.asked not in ("auto", "table"):
            return False
        hard = _ADDRESSABLE if self.asked == "table" else limit
        size = table_bytes(self.grid, self._trace, len(self.angles), self.bins, self.domain.dtype.itemsize, hard)
        if size > hard and self.asked == "table":
            raise InvdiffError(
                f"A table for {self.name} would hold more than 2^31 numbers; use method='matrix-free'."
            )
        return size <= hard

    @property
    def method(self) -> str:
        """What computes: as asked, or for "auto" what is fastest on the device that the operator is on."""
        if self.asked != "auto":
            return self.asked
        flat, host = len(self.grid.sizes) == 2, self.place.device.type == "cpu"
        walks = flat and host and importlib.util.find_spec("numba") is not None
        return "table" if self._fits and not walks else "matrix-free"

    def describe(self) -> dict[str, Any]:
        """Return what provenance records, with the geometry."""
        first, last = float(self.angles[0]), float(self.angles[-1])
        views = {"views": len(self.angles), "first_angle": first, "last_angle": last}
        return {**super().describe(), "method": self.method, **views, **self._geometry()}

    # ---- the two directions ----

    def _forward(self, x: Tensor) -> Tensor:
        x = self._enter(x, self.domain)
        return self._apply(x.reshape(-1, math.prod(self.grid.sizes)), False).reshape(len(x), *self.range.shape)

    def _adjoint(self, y: Tensor) -> Tensor:
        y = self._enter(y, self.range)
        size = len(self.angles) * self.bins
        return self._apply(y.reshape(-1, size), True).reshape(len(y), *self.domain.shape)

    def normal(self, x: Tensor) -> Tensor:
        """Return ``A^H A x``, ``(B, *domain.shape)``; with a table, without reordering the data in between."""
        self.domain.check(x, f"Input of the normal operator of {self.name}")
        return apply_linear(x, self._normal, self._normal)

    def _normal(self, x: Tensor) -> Tensor:
        if self.method != "table" or not x.numel():
            return self._adjoint(self._forward(x))
        x = self._enter(x, self.domain)
        return self._table().normal(x.reshape(-1, math.prod(self.grid.sizes))).reshape(x.shape)

    def _apply(self, rows: Tensor, transposed: bool) -> Tensor:
        if not len(rows):
            return rows.new_zeros(0, math.prod(self.grid.sizes) if transposed else len(self.angles) * self.bins)
        how = self._implementation(rows.device)
        if how == "reference":
            views = (self.grid, self._trace, len(self.angles), self.bins)
            return (_rays.back_project if transposed else _rays.project)(rows, *views)
        rays = self._table() if how == "table" else self._host_rays() if how == "numba" else self._device_rays()
        return rays.back_project(rows) if transposed else rays.project(rows)

    def _implementation(self, device: torch.device) -> str:
        """Return what computes on a device: "table", "numba", "triton" or "reference"."""
        if self.method != "matrix-free":
            return self.method
        package = {"cpu": "numba", "cuda": "triton"}.get(device.type)
        return package if package and importlib.util.find_spec(package) else "reference"

    def _table(self) -> Table:
        """Return the weights, from this operator, another one of the same geometry, or computed now."""
        device, dtype = self.place.device, self.domain.dtype
        key = (self.geometry_digest, str(dtype), str(device))
        views = (self.grid, self._trace, len(self.angles), self.bins)
        return self._holder.get(key, lambda: build_table(*views, dtype, device))

    def _device_rays(self) -> DeviceRays:
        """Return the rays on a GPU."""
        from invdiff.operators._triton_rays import DeviceRays, ray_bytes, trace_parts

        views, device = len(self.angles), self.place.device
        make = functools.partial(DeviceRays, self.grid, views * self.bins)
        parts = trace_parts(self.grid, self._trace, self._cameras, views, self.bins, device)
        return self._kept(make, parts, ray_bytes(len(self.grid.sizes)), str(device))

    def _host_rays(self) -> HostRays:
        """Return the rays in memory."""
        from invdiff.operators._joseph import HostRays, ray_bytes, trace_parts

        views = len(self.angles)
        make = functools.partial(HostRays, self.grid, views * self.bins)
        parts = trace_parts(self.grid, self._trace, views, self.bins)
        return self._kept(make, parts, ray_bytes(len(self.grid.sizes)), "host")

    def _kept(self, make: Callable[[Iterable[Any]], T], parts: Iterable[Any], each: int, where: str) -> T:
        """Return rays of ``each`` bytes made of parts, kept from call to call unless they are too many."""
        if len(self.angles) * self.bins * each > CACHE_BYTES:
            return make(parts)
        return self._holder.get((self.geometry_digest, "rays", where), lambda: make(list(parts)))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Any:
        """Return a copy on another device or in another precision; the geometry stays in double precision."""
        new = super().to(device, dtype)
        new._holder = TableHolder()
        return new


#: Bytes that 32-bit positions of 8-byte numbers can address, twice.
_ADDRESSABLE = 2 * 8 * ((1 << 31) - 1)


def as_angles(angles: Any, turns: bool = False) -> np.ndarray:
    """Return the angles of the views in radians, ``(views,)``, warning where they look like degrees.

    Many ``turns`` are natural on a helix; elsewhere angles modulo ``2 pi`` say the same.
    """
    values = np.array(angles.detach().cpu() if isinstance(angles, Tensor) else angles, dtype=np.float64)
    if values.ndim != 1 or not values.size:
        raise InvdiffError(f"The angles have shape {values.shape}; give a list of at least one angle, in radians.")
    if not np.isfinite(values).all():
        raise InvdiffError("The angles hold NaN or infinite values; leave those views out.")
    if np.abs(values).max() > 4 * np.pi and not turns:
        warnings.warn(
            f"The angles reach {np.abs(values).max():g} and are taken in radians; for degrees give "
            "numpy.deg2rad(angles), and for many turns in radians numpy.mod(angles, 2 * numpy.pi).",
            stacklevel=stacklevel_outside(),
        )
    values.flags.writeable = False
    return values


def as_image_space(
    shape: Space | Sequence[int],
    axes: tuple[str, ...],
    dtype: torch.dtype | None,
    units: str | None,
    spacing: float | Mapping[str, float] | None,
) -> tuple[Space, Grid]:
    """Return the domain and the grid of its trailing axes; spacing is 1 where nothing gives it."""
    d = len(axes)
    space = shape if isinstance(shape, Space) else Space(tuple(shape), dims=axes if len(shape) == d else ())
    if len(space.shape) < d:
        raise InvdiffError(f"The image has shape {space.shape}; expected at least the axes ({', '.join(axes)}).")
    if isinstance(spacing, (int, float)):
        spacing = dict.fromkeys(space.dims[-d:], float(spacing))
    found = dict.fromkeys(space.dims[-d:], 1.0) | dict(space.spacing) | dict(spacing or {})
    space = as_space(space, dtype, units, found)
    if space.is_complex:
        raise InvdiffError(f"Line integrals are of real images, and the space is {space}; give a real dtype.")
    steps = tuple(space.spacing[name] for name in space.dims[-d:])
    for name, h in zip(space.dims[-d:], steps):
        as_length(h, f"The spacing along {name}")
    return space, Grid(space.shape[-d:], steps)


def as_length(value: float, what: str, zero: bool = False) -> float:
    """Return a length as a float, refusing what is not finite and positive (or zero where allowed)."""
    number = float(value)
    if not math.isfinite(number) or number < 0 or (number == 0 and not zero):
        raise InvdiffError(f"{what} must be finite and {'at least' if zero else 'above'} 0, got {value}.")
    return number


def as_count(value: int, what: str) -> int:
    """Return a number of detectors as an int of at least 1."""
    if int(value) != value or value < 1:
        raise InvdiffError(f"{what} must be a whole number of at least 1, got {value}.")
    return int(value)


def warn_if_truncated(missing: float, truncated: bool) -> None:
    """Warn where the detector is narrower than the circle inscribed in the image, by ``missing`` detectors."""
    if missing > 1 and not truncated:
        warnings.warn(
            f"The detector misses up to {missing:.1f} detector widths of the circle inscribed in the image; data "
            "are truncated where the object reaches that far. Widen the detector or shrink the image, or give "
            "truncated=True where it is meant to be so.",
            stacklevel=stacklevel_outside(),
        )


def stacklevel_outside() -> int:
    """Return the level of the first caller outside this package, so that a warning names the user's line."""
    import sys

    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and ".operators" in frame.f_globals.get("__name__", ""):
        frame, level = frame.f_back, level + 1
    return level


def as_distances(source: float, detector: float, grid: Grid) -> tuple[float, float]:
    """Return the distances of source and detector from the axis, refusing a source inside the image."""
    source, detector = (
        as_length(source, "The distance of the source from the axis"),
        as_length(detector, "The distance of the detector from the axis", zero=True),
    )
    corner = 0.5 * math.hypot(*grid.extent[-2:])
    if source <= corner:
        raise InvdiffError(
            f"The source is {source:g} from the axis, inside the image, whose corners are at {corner:g}; "
            "check that distances and spacing have the same units."
        )
    return source, detector
