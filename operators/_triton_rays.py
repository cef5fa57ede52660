"""Ray transforms on a GPU, as Triton kernels. Imported only where triton is there, and used for CUDA tensors.

The weights are those of :mod:`invdiff.operators._rays`, computed on the fly from the same table of rays, in double
precision whatever the data are in: one multiplication and addition per step cost little beside what they fetch,
and positions in single precision would be wrong by 1e-4 of a pixel in an image of 1000.

Both directions gather, and nothing is added atomically, so results repeat to the last bit. Forward, every ray sums
what it meets. Backward, every pixel visits each view, projects its neighbours onto the detector, and sums the few
rays that fall between them: a ray that touches the pixel passes between two of its neighbours. The projection need
not be exact, since rays that fall there and miss the pixel have weight zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from invdiff.operators._rays import Cameras, Grid, TraceViews, blocks, bounds

#: Rays or pixels, and rows of a batch, that one program of a kernel handles.
_LANES, _ROWS = 64, 8
#: How kernels are compiled; fused multiplication and addition is said because versions differ in its default.
OPTIONS = {"num_warps": _LANES // 32, "enable_fp_fusion": True}
#: Rays whose steps are traced and sent to the device at once.
_RAYS = 1 << 22

#: Arguments of the kernels that need no kernel of their own for 1 or for multiples of 16.
_COUNTS = ["batch", "columns", "data", "lines", "nx", "ny", "nz", "pixels", "rays", "start", "views"]

#: Gives the cameras of the views from ``start`` to ``stop``.
CamerasOf = Callable[[int, int], Cameras]


@dataclass(frozen=True)
class Part:
    """Consecutive views on a device: the rays of :class:`Rays`, and cameras that find those near a pixel.

    Args:
        start: First data value, counted over all views.
        axis: Axis that each ray is stepped along, ``(R,)``, int8.
        low: First step that meets the grid, ``(R,)``, int32; beyond the last step for rays that miss it.
        high: One past the last such step, ``(R,)``, int32.
        length: Length of one step, ``(R,)``, float64, as all that follows.
        p: Index on the other axes at step 0, ``(d - 1, R)``.
        q: Change of that index per step, ``(d - 1, R)``.
        cameras: Coefficients of across, depth and (in volumes) rise per view, ``(V, 2 or 3, d + 1)``.
        columns: Detectors per row.
        centre: Row and column of the central ray.
        per_radian: Detectors per radian on an arc, 0 on a line.
        guard: Detectors by which a projection in single precision may be wrong.
        axes: Which axes rays are stepped along.
    """

    start: int
    axis: Tensor
    low: Tensor
    high: Tensor
    length: Tensor
    p: Tensor
    q: Tensor
    cameras: Tensor
    columns: int
    centre: tuple[float, float]
    per_radian: float
    guard: float
    axes: frozenset[int]

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        held = (self.axis, self.low, self.high, self.length, self.p, self.q, self.cameras)
        return sum(t.numel() * t.element_size() for t in held)


class DeviceRays:
    """All rays of an operator on a device.

    Args:
        grid: The grid of the image.
        data: Data values per image.
        parts: The rays, in parts; an iterator serves for one call.
    """

    def __init__(self, grid: Grid, data: int, parts: Iterable[Part]) -> None:
        self.grid, self.data, self.parts = grid, data, parts

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return sum(part.nbytes for part in self.parts)

    def project(self, x: Tensor) -> Tensor:
        """Sum images along rays, ``(B, pixels) -> (B, data)``."""
        out = x.new_empty(len(x), self.data)
        sizes, last = self.grid.sizes, len(self.grid.sizes) - 1
        copies = x.contiguous()[None]
        kernel: Any = _forward_2d if last == 1 else _forward_3d
        for part in self.parts:
            if last in part.axes and len(copies) == 1:
                copies = _with_swapped(x, sizes)
            rays = (part.axis, part.low, part.high, part.length, part.p, part.q, len(part.axis))
            with torch.cuda.device_of(x):
                kernel[_programs(len(part.axis), x)](
                    copies, out, *rays, len(x), self.data, part.start, *sizes, **_block(x)
                )
        return out

    def back_project(self, y: Tensor) -> Tensor:
        """Return the transpose of :meth:`project`, ``(B, data) -> (B, pixels)``."""
        y = y.contiguous()
        pixels, dims = math.prod(self.grid.sizes), len(self.grid.sizes)
        out = y.new_zeros(len(y), pixels)
        for part in self.parts:
            views = len(part.cameras)
            rays = (part.axis, part.length, part.p, part.q, part.cameras, views, part.columns)
            detector = (part.centre[1], part.per_radian, part.guard)
            where = (pixels, len(y), self.data, part.start)
            with torch.cuda.device_of(y):
                if dims == 2:
                    _backward_2d[_programs(pixels, y)](
                        y, out, *rays, *detector, *where, self.grid.sizes[1], ARC=part.per_radian > 0, **_block(y)
                    )
                else:
                    rows = len(part.axis) // (views * part.columns)
                    _backward_3d[_programs(pixels, y)](
                        *(y, out, *rays, rows, *detector, part.centre[0], *where, *self.grid.sizes[1:]),
                        STEEP=0 in part.axes,
                        **_block(y),
                    )
        return out


def ray_bytes(dims: int) -> int:
    """Return the bytes of one ray on a device."""
    return 1 + 2 * 4 + 8 + 2 * 8 * (dims - 1)


def trace_parts(
    grid: Grid, rays_of: TraceViews, cameras_of: CamerasOf, views: int, bins: int, device: torch.device
) -> Iterator[Part]:
    """Yield all views in parts on a device."""

    def send(values: np.ndarray, dtype: type) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values, dtype=dtype)).to(device)

    for start, stop in blocks(views, bins, 1, _RAYS):
        rays, cameras = rays_of(start, stop), cameras_of(start, stop)
        low, high = bounds(rays, grid)
        low = np.where(low < high, low, max(grid.sizes))

        affine = [cameras.across, cameras.depth] + ([cameras.rise] if cameras.rise is not None else [])
        largest = cameras.columns + abs(cameras.centre[0]) + abs(cameras.centre[1]) + cameras.per_radian
        yield Part(
            start * bins,
            send(rays.axis, np.int8),
            send(low, np.int32),
            send(high, np.int32),
            send(rays.length, np.float64),
            send(rays.p.T, np.float64),
            send(rays.q.T, np.float64),
            send(np.stack(affine, 1), np.float64),
            cameras.columns,
            cameras.centre,
            cameras.per_radian,
            1e-3 + 1e-6 * (largest + bins // cameras.columns),
            frozenset(np.unique(rays.axis).tolist()),
        )


def _with_swapped(x: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Return images ``(B, pixels)`` beside copies whose last two axes are swapped, ``(2, B, pixels)``.

    Rays stepped along the last axis read the copy: neighbouring rays then find their pixels side by side.
    """
    out = x.new_empty(2, *x.shape)
    out[0] = x
    images = x.reshape(len(x), *sizes).mT
    out[1].view(images.shape).copy_(images)
    return out


def _block(x: Tensor) -> dict[str, int]:
    return {"LANES": _LANES, "ROWS": min(_ROWS, triton.next_power_of_2(len(x))), **OPTIONS}


def _programs(lanes: int, x: Tensor) -> tuple[int, int]:
    return triton.cdiv(lanes, _LANES), triton.cdiv(len(x), _block(x)["ROWS"])


# ---- kernels: one program handles LANES rays or pixels of ROWS images ----


@triton.jit(do_not_specialize=_COUNTS)
def _forward_2d(
    x: tl.tensor,
    out: tl.tensor,
    axis: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    length: tl.tensor,
    p: tl.tensor,
    q: tl.tensor,
    rays: tl.tensor,
    batch: tl.tensor,
    data: tl.tensor,
    start: tl.tensor,
    ny: tl.tensor,
    nx: tl.tensor,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    r = tl.program_id(0) * LANES + tl.arange(0, LANES)
    b = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    is_ray = r < rays
    lo = tl.load(low + r, mask=is_ray, other=2147483647)
    hi = tl.load(high + r, mask=is_ray, other=0)
    p0 = tl.load(p + r, mask=is_ray, other=0.0)
    q0 = tl.load(q + r, mask=is_ray, other=0.0)
    a = tl.load(axis + r, mask=is_ray, other=0).to(tl.int64)
    # In the copy that a ray reads, a step leads one line on, and its line is as long as the other axis.
    n = tl.where(a == 0, nx, ny)
    image = x + (a[None, :] * batch + b) * ny * nx
    total = tl.zeros((ROWS, LANES), x.dtype.element_ty)
    for k in range(tl.min(lo), tl.max(hi)):
        t = p0 + q0 * k
        j = tl.floor(t)
        far = t - j
        i = j.to(tl.int64)
        inside = (k >= lo) & (k < hi)
        here = image + (i + n * k)[None, :]
        near_in = (inside & (i >= 0) & (i < n))[None, :] & (b < batch)
        far_in = (inside & (i >= -1) & (i < n - 1))[None, :] & (b < batch)
        total += (1 - far).to(total.dtype)[None, :] * tl.load(here, mask=near_in, other=0.0)
        total += far.to(total.dtype)[None, :] * tl.load(here + 1, mask=far_in, other=0.0)
    step = tl.load(length + r, mask=is_ray, other=0.0).to(total.dtype)
    tl.store(out + b * data + start + r[None, :], total * step[None, :], mask=is_ray[None, :] & (b < batch))


@triton.jit(do_not_specialize=_COUNTS)
def _forward_3d(
    x: tl.tensor,
    out: tl.tensor,
    axis: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    length: tl.tensor,
    p: tl.tensor,
    q: tl.tensor,
    rays: tl.tensor,
    batch: tl.tensor,
    data: tl.tensor,
    start: tl.tensor,
    nz: tl.tensor,
    ny: tl.tensor,
    nx: tl.tensor,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    r = tl.program_id(0) * LANES + tl.arange(0, LANES)
    b = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    is_ray = r < rays
    lo = tl.load(low + r, mask=is_ray, other=2147483647)
    hi = tl.load(high + r, mask=is_ray, other=0)
    p0 = tl.load(p + r, mask=is_ray, other=0.0)
    q0 = tl.load(q + r, mask=is_ray, other=0.0)
    p1 = tl.load(p + rays + r, mask=is_ray, other=0.0)
    q1 = tl.load(q + rays + r, mask=is_ray, other=0.0)
    a = tl.load(axis + r, mask=is_ray, other=0).to(tl.int64)
    # Strides of a step and of the first transverse axis, and sizes of both; the second one has stride 1, because
    # rays stepped along x read the copy with y innermost.
    plane = (ny * nx).to(tl.int64)
    step = tl.where(a == 0, plane, tl.where(a == 1, nx, ny))
    stride = tl.where(a == 0, nx, plane)
    n = tl.where(a == 0, ny, nz)
    m = tl.where(a == 2, ny, nx)
    image = x + (tl.where(a == 2, 1, 0).to(tl.int64)[None, :] * batch + b) * nz * plane
    total = tl.zeros((ROWS, LANES), x.dtype.element_ty)
    for k in range(tl.min(lo), tl.max(hi)):
        t = p0 + q0 * k
        u = p1 + q1 * k
        j = tl.floor(t)
        l = tl.floor(u)
        f = t - j
        g = u - l
        i = j.to(tl.int64)
        o = l.to(tl.int64)
        inside = (k >= lo) & (k < hi)
        here = image + (step * k + stride * i + o)[None, :]
        beyond = here + stride[None, :]
        i_in = inside & (i >= 0) & (i < n)
        i_next = inside & (i >= -1) & (i < n - 1)
        o_in = (o >= 0) & (o < m)
        o_next = (o >= -1) & (o < m - 1)
        w00 = ((1 - f) * (1 - g)).to(total.dtype)[None, :]
        w01 = ((1 - f) * g).to(total.dtype)[None, :]
        w10 = (f * (1 - g)).to(total.dtype)[None, :]
        w11 = (f * g).to(total.dtype)[None, :]
        total += w00 * tl.load(here, mask=(i_in & o_in)[None, :] & (b < batch), other=0.0)
        total += w01 * tl.load(here + 1, mask=(i_in & o_next)[None, :] & (b < batch), other=0.0)
        total += w10 * tl.load(beyond, mask=(i_next & o_in)[None, :] & (b < batch), other=0.0)
        total += w11 * tl.load(beyond + 1, mask=(i_next & o_next)[None, :] & (b < batch), other=0.0)
    size = tl.load(length + r, mask=is_ray, other=0.0).to(total.dtype)
    tl.store(out + b * data + start + r[None, :], total * size[None, :], mask=is_ray[None, :] & (b < batch))


@triton.jit
def _atan(x: tl.tensor) -> tl.tensor:
    """Return the arc tangent to 1e-7; Abramowitz and Stegun 4.4.49."""
    small = tl.minimum(tl.abs(x), 1.0 / tl.maximum(tl.abs(x), 1e-30))
    s = small * small
    series = 0.0028662257
    series = series * s - 0.0161657367
    series = series * s + 0.0429096138
    series = series * s - 0.0752896400
    series = series * s + 0.1065626393
    series = series * s - 0.1420889944
    series = series * s + 0.1999355085
    series = series * s - 0.3333314528
    angle = small + small * s * series
    angle = tl.where(tl.abs(x) > 1, 1.5707963267948966 - angle, angle)
    return tl.where(x < 0, -angle, angle)


@triton.jit
def _shadow(across: tl.tensor, depth: tl.tensor, per_radian: tl.tensor, ARC: tl.constexpr) -> tl.tensor:
    """Return where points fall on the detector, from the central ray; anywhere for those behind the source."""
    x = across.to(tl.float32) / tl.where(depth > 0, depth, 1.0).to(tl.float32)
    if ARC:
        x = per_radian * _atan(x)
    return x


@triton.jit
def _ends(
    across: tl.tensor,
    depth: tl.tensor,
    a0: tl.tensor,
    d0: tl.tensor,
    a1: tl.tensor,
    d1: tl.tensor,
    centre: tl.tensor,
    per_radian: tl.tensor,
    guard: tl.tensor,
    columns: tl.tensor,
    ARC: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Return the first detector between the shadows of four neighbours of a point, and one past the last."""
    s0 = _shadow(across - a0, depth - d0, per_radian, ARC)
    s1 = _shadow(across + a0, depth + d0, per_radian, ARC)
    s2 = _shadow(across - a1, depth - d1, per_radian, ARC)
    s3 = _shadow(across + a1, depth + d1, per_radian, ARC)
    first = tl.ceil(tl.minimum(tl.minimum(s0, s1), tl.minimum(s2, s3)) + centre - guard)
    last = tl.floor(tl.maximum(tl.maximum(s0, s1), tl.maximum(s2, s3)) + centre + guard)
    # Where a neighbour is behind the source, its shadow bounds nothing.
    seen = depth > tl.maximum(tl.abs(d0), tl.abs(d1))
    return _clip(first, last + 1, seen, columns)


@triton.jit
def _clip(first: tl.tensor, end: tl.tensor, seen: tl.tensor, count: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Return a range of detectors as integers within the detector; the whole of it where nothing is seen."""
    first = tl.where(seen, tl.minimum(tl.maximum(first, 0.0), count * 1.0), 0.0)
    end = tl.where(seen, tl.minimum(tl.maximum(end, 0.0), count * 1.0), count * 1.0)
    return first.to(tl.int32), end.to(tl.int32)


@triton.jit(do_not_specialize=_COUNTS)
def _backward_2d(
    y: tl.tensor,
    out: tl.tensor,
    axis: tl.tensor,
    length: tl.tensor,
    p: tl.tensor,
    q: tl.tensor,
    cameras: tl.tensor,
    views: tl.tensor,
    columns: tl.tensor,
    centre: tl.tensor,
    per_radian: tl.tensor,
    guard: tl.tensor,
    pixels: tl.tensor,
    batch: tl.tensor,
    data: tl.tensor,
    start: tl.tensor,
    nx: tl.tensor,
    ARC: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    e = tl.program_id(0) * LANES + tl.arange(0, LANES)
    b = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    i = e // nx
    j = e % nx
    is_pixel = e < pixels
    where = out + b * pixels + e[None, :]
    is_here = is_pixel[None, :] & (b < batch)
    total = tl.load(where, mask=is_here, other=0.0)
    for v in range(0, views):
        c = cameras + v * 6
        a0 = tl.load(c)
        a1 = tl.load(c + 1)
        d0 = tl.load(c + 3)
        d1 = tl.load(c + 4)
        across = a0 * i + a1 * j + tl.load(c + 2)
        depth = d0 * i + d1 * j + tl.load(c + 5)
        first, end = _ends(across, depth, a0, d0, a1, d1, centre, per_radian, guard, columns, ARC)
        for s in range(0, tl.max(tl.where(is_pixel, end - first, 0))):
            hit = is_pixel & (first + s < end)
            r = v * columns + first + s
            along_y = tl.load(axis + r, mask=hit, other=0) == 0
            t = tl.load(p + r, mask=hit, other=0.0) + tl.load(q + r, mask=hit, other=0.0) * tl.where(along_y, i, j)
            w = tl.maximum(1 - tl.abs(t - tl.where(along_y, j, i)), 0.0)
            w = (w * tl.load(length + r, mask=hit, other=0.0)).to(total.dtype)
            value = tl.load(y + b * data + start + r[None, :], mask=hit[None, :] & (b < batch), other=0.0)
            total += w[None, :] * value
    tl.store(where, total, mask=is_here)


@triton.jit(do_not_specialize=_COUNTS)
def _backward_3d(
    y: tl.tensor,
    out: tl.tensor,
    axis: tl.tensor,
    length: tl.tensor,
    p: tl.tensor,
    q: tl.tensor,
    cameras: tl.tensor,
    views: tl.tensor,
    columns: tl.tensor,
    lines: tl.tensor,
    centre: tl.tensor,
    per_radian: tl.tensor,
    guard: tl.tensor,
    middle: tl.tensor,
    pixels: tl.tensor,
    batch: tl.tensor,
    data: tl.tensor,
    start: tl.tensor,
    ny: tl.tensor,
    nx: tl.tensor,
    STEEP: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    e = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    b = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    z = (e // (ny * nx)).to(tl.int32)
    i = (e // nx % ny).to(tl.int32)
    j = (e % nx).to(tl.int32)
    is_pixel = e < pixels
    where = out + b * pixels + e[None, :]
    is_here = is_pixel[None, :] & (b < batch)
    total = tl.load(where, mask=is_here, other=0.0)
    rays = views * columns * lines
    for v in range(0, views):
        c = cameras + v * 12
        a0 = tl.load(c + 1)
        a1 = tl.load(c + 2)
        d0 = tl.load(c + 5)
        d1 = tl.load(c + 6)
        across = a0 * i + a1 * j + tl.load(c + 3)
        depth = d0 * i + d1 * j + tl.load(c + 7)
        rise = tl.load(c + 8) * z + tl.load(c + 11)
        # Rays stepped within the plane touch neighbours along y or x; those stepped along z also diagonal ones.
        if STEEP:
            first, end = _ends(
                across, depth, a0 + a1, d0 + d1, a0 - a1, d0 - d1, centre, per_radian, guard, columns, False
            )
        else:
            first, end = _ends(across, depth, a0, d0, a1, d1, centre, per_radian, guard, columns, False)
        spread = tl.abs(d0) + tl.abs(d1)
        below = rise - tl.abs(tl.load(c + 8))
        above = rise + tl.abs(tl.load(c + 8))
        near = depth - spread
        bottom = tl.minimum(_shadow(below, near, 0.0, False), _shadow(below, depth + spread, 0.0, False))
        top = tl.maximum(_shadow(above, near, 0.0, False), _shadow(above, depth + spread, 0.0, False))
        bottom = tl.ceil(bottom + middle - guard)
        top = tl.floor(top + middle + guard) + 1
        bottom, top = _clip(bottom, top, near > 0, lines)
        width = tl.max(tl.where(is_pixel, end - first, 0))
        for h in range(0, tl.max(tl.where(is_pixel, top - bottom, 0))):
            for s in range(0, width):
                hit = is_pixel & (first + s < end) & (bottom + h < top)
                r = (v * lines + bottom + h) * columns + first + s
                a = tl.load(axis + r, mask=hit, other=0)
                k = tl.where(a == 0, z, tl.where(a == 1, i, j))
                t = tl.load(p + r, mask=hit, other=0.0) + tl.load(q + r, mask=hit, other=0.0) * k
                u = tl.load(p + rays + r, mask=hit, other=0.0) + tl.load(q + rays + r, mask=hit, other=0.0) * k
                w = tl.maximum(1 - tl.abs(t - tl.where(a == 0, i, z)), 0.0)
                w = w * tl.maximum(1 - tl.abs(u - tl.where(a == 2, i, j)), 0.0)
                w = (w * tl.load(length + r, mask=hit, other=0.0)).to(total.dtype)
                value = tl.load(y + b * data + start + r[None, :], mask=hit[None, :] & (b < batch), other=0.0)
                total += w[None, :] * value
    tl.store(where, total, mask=is_here)
