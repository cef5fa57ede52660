"""The steps from X-ray counts to line integrals: flat fields, logarithm, dead pixels, rings, axis of rotation.

Conventions: arrays are ``(view, row, detector)``, angles are in radians, and line integrals are dimensionless,
``-log(transmission)``.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from invdiff.errors import InvdiffError

if TYPE_CHECKING:
    import torch

    from invdiff.likelihoods import Gaussian

#: A detector whose flat field is below this share of the median counts as dead.
_DEAD = 0.05
#: Two views count as opposite when their angles differ from half a turn by less than this, in radians.
_OPPOSITE = np.deg2rad(5)


@dataclass(frozen=True, eq=False)
class Scan:
    """A scan as it was measured.

    Attributes:
        data: Counts ``(view, row, detector)``.
        white: Flat fields without an object, ``(field, row, detector)``.
        dark: Dark fields without radiation, ``(field, row, detector)``.
        angles: Angle of every view in radians, ``(view,)``.
        source: What was read, in words.
    """

    data: np.ndarray
    white: np.ndarray
    dark: np.ndarray
    angles: np.ndarray
    source: str = ""


def read_scan(path: str | os.PathLike[str], row: int | None = None) -> Scan:
    """Read a scan in the layout Data Exchange: ``exchange/data``, ``data_white``, ``data_dark`` and ``theta``.

    ``theta`` is in degrees unless its attribute ``units`` says radians. Links out of the file, external storage
    and absurd sizes are refused before they are followed.

    Args:
        path: An HDF5 file.
        row: Which detector row to read; all of them where left out.

    Raises:
        InvdiffError: If the file is missing, no HDF5, unsafe or incomplete, or shapes do not fit each other.
    """
    from invdiff.io import arrays
    from invdiff.io.hdf5_safe import open_h5

    file = arrays.existing(path)
    names = {"data": "exchange/data", "white": "exchange/data_white", "dark": "exchange/data_dark"}
    with open_h5(file) as h5:
        for name in (*names.values(), "exchange/theta"):
            if name not in h5:
                raise InvdiffError(f"{file} holds no {name!r}; expected a scan in the layout Data Exchange.")
        rows = h5[names["data"]].shape[1] if h5[names["data"]].ndim == 3 else 0
        if row is not None and not -rows <= row < rows:
            raise InvdiffError(f"{file} has {rows} detector rows, and row {row} is not among them.")
        part = slice(None) if row is None else slice(row % rows, row % rows + 1)
        found = {}
        for key, name in names.items():
            if h5[name].ndim != 3:
                raise InvdiffError(
                    f"{name!r} of {file} has shape {h5[name].shape}; expected (view, row, detector)."
                )
            found[key] = _numbers(arrays.read_dataset(h5[name], (slice(None), part), f"{name!r} of {file}"), name)
        theta = _numbers(arrays.read_dataset(h5["exchange/theta"], (), f"theta of {file}"), "theta").astype(float)
        unit = h5["exchange/theta"].attrs.get("units", "deg")
    unit = unit.decode() if isinstance(unit, bytes) else str(unit)
    angles = theta.reshape(-1) if unit.startswith("rad") else np.deg2rad(theta.reshape(-1))
    views, *frame = found["data"].shape
    if len(angles) != views:
        raise InvdiffError(f"{file} has {views} views and {len(angles)} angles; expected one angle per view.")
    if any(list(found[k].shape[1:]) != frame or not len(found[k]) for k in ("white", "dark")):
        raise InvdiffError(f"{file} has views of {frame} and flat or dark fields of another size, or none.")
    return Scan(**found, angles=angles, source=f"{file}, {views} views of {frame[0]} x {frame[1]}")


def _numbers(values: np.ndarray, name: str) -> np.ndarray:
    if values.dtype.kind not in "iuf":
        raise InvdiffError(f"{name!r} holds {values.dtype}; expected real numbers.")
    return values


def transmission(scan: Scan, air: int = 0) -> np.ndarray:
    """Return ``(data - dark) / (white - dark)`` with the means of the fields, ``(view, row, detector)``.

    Detectors that see next to nothing in the flat field, and values that are not finite, are interpolated from
    their neighbours in the row, so that they leave no rings.

    Args:
        scan: Counts with their flat and dark fields.
        air: Number of detectors at each end of the rows that see only air; where given, every view is divided
            by the straight line through their two means, which takes out drifts of the source.

    Raises:
        InvdiffError: If more than half of a row is dead, or ``air`` leaves nothing in between.
    """
    dark = scan.dark.mean(0, dtype=np.float64)
    open_beam = scan.white.mean(0, dtype=np.float64) - dark
    with np.errstate(invalid="ignore"):
        dead = ~(open_beam > _DEAD * np.nanmedian(open_beam))
    if dead.mean(1).max() > 0.5:
        raise InvdiffError(
            "More than half of a detector row is dead in the flat field; are white and dark swapped?"
        )
    out = (scan.data - dark) / np.where(dead, 1.0, open_beam)
    broken = dead | ~np.isfinite(out)
    places = np.arange(out.shape[2])
    for v, r in np.argwhere(broken.any(2)):
        bad = broken[v, r]
        if bad.all():
            raise InvdiffError(f"View {v} holds no finite value in row {r}; leave it out.")
        out[v, r, bad] = np.interp(places[bad], places[~bad], out[v, r, ~bad])
    if air:
        if not 0 < 2 * air < out.shape[2]:
            raise InvdiffError(f"air = {air} detectors at each end do not fit rows of {out.shape[2]} detectors.")
        left, right = out[..., :air].mean(2, keepdims=True), out[..., -air:].mean(2, keepdims=True)
        share = np.clip((places - (air - 1) / 2) / (out.shape[2] - air), 0, 1)
        out /= left + (right - left) * share
    return out


def line_integrals(scan: Scan, floor: float = 1e-3, air: int = 0) -> np.ndarray:
    """Return ``-log(max(transmission, floor))``, ``(view, row, detector)`` in float32.

    Args:
        scan: Counts with their flat and dark fields.
        floor: Smallest transmission that is believed; noise can make it zero or negative.
        air: As for :func:`transmission`.
    """
    if not 0 < floor < 1:
        raise InvdiffError(f"The floor of the transmission must lie between 0 and 1, got {floor}.")
    return (-np.log(np.maximum(transmission(scan, air), floor))).astype(np.float32)


def suppress_rings(sinogram: np.ndarray, width: int = 9) -> np.ndarray:
    """Subtract from every detector by how much its mean over views stands out from its neighbours.

    An error of one detector that is the same in all views draws a ring. Its size is estimated as the mean over
    views minus the running median of these means over ``width`` detectors; structures of the object as narrow as
    that, and centred on the axis, are taken for rings too.

    Args:
        sinogram: Line integrals, views first and detectors last.
        width: Odd number of detectors.
    """
    from scipy import ndimage

    if width < 3 or width % 2 == 0:
        raise InvdiffError(f"The width of the ring filter must be odd and at least 3, got {width}.")
    mean = sinogram.mean(0, keepdims=True)
    smooth = ndimage.median_filter(mean, size=(*[1] * (mean.ndim - 1), width), mode="nearest")
    return sinogram - (mean - smooth)


def find_centre(sinogram: np.ndarray, angles: np.ndarray, reach: int = 8) -> float:
    """Return the detector, with a fraction, on which the axis of rotation falls.

    Two opposite views are mirror images of each other, which gives a first guess by correlation. Around it, the
    half turn is completed to a whole one by mirroring at each candidate. The Fourier transform of a true whole
    turn (angle, detector) vanishes outside a double wedge, and the candidate with the least amplitude there wins.

    Args:
        sinogram: Line integrals ``(view, detector)``, parallel beam.
        angles: Their angles in radians, evenly spaced over half a turn.
        reach: Search that many detectors on both sides of the first guess.

    Raises:
        InvdiffError: If shapes do not fit, or no two views are opposite.

    Reference: Vo et al., "Reliable method for calculating the center of rotation in parallel-beam tomography",
    Optics Express 22(16), 2014.
    """
    s, t = np.asarray(sinogram, dtype=np.float64), np.asarray(angles, dtype=np.float64)
    if s.ndim != 2 or t.shape != s.shape[:1]:
        raise InvdiffError(
            f"The sinogram has shape {s.shape} and the angles {t.shape}; expected (view, detector)."
        )
    order = np.argsort(t)
    s, t = s[order], t[order]
    last = int(np.argmin(np.abs(t - t[0] - np.pi)))
    if abs(t[last] - t[0] - np.pi) > _OPPOSITE:
        raise InvdiffError(f"The views cover {np.rad2deg(np.ptp(t)):.0f} degrees; the axis needs half a turn.")
    s = s[: last + 1] if t[last] - t[0] < np.pi * (1 - 0.5 / last) else s[:last]
    guess = _mirror_axis(s[0], s[-1])
    for step in (1.0, 0.1):
        candidates = (
            guess + step * np.arange(-reach, reach + 1) if step == 1 else guess + np.arange(-10, 11) * step
        )
        half = int(min(candidates.min(), s.shape[1] - 1 - candidates.max()))
        if half < 4:
            raise InvdiffError("The axis of rotation lies at the edge of the detector; give it by hand.")
        guess = float(candidates[np.argmin([_outside_wedge(s, c, half) for c in candidates])])
    return guess


def _mirror_axis(a: np.ndarray, b: np.ndarray) -> float:
    """Return the detector about which ``b`` is most nearly the mirror image of ``a``, in steps of one half."""
    n = len(a)
    a, b = a - a.mean(), b - b.mean()
    # sum over k of a[k] b[m - k]: largest where m is twice the axis
    return int(np.argmax(np.convolve(a, b))) / 2 if n else 0.0


def _outside_wedge(s: np.ndarray, centre: float, half: int) -> float:
    from scipy import ndimage

    views = len(s)
    places = centre + np.arange(-half, half + 1)
    rows = np.broadcast_to(np.arange(views)[:, None], (views, len(places)))
    sampled = ndimage.map_coordinates(s, [rows, np.broadcast_to(places, rows.shape)], order=3, mode="nearest")
    whole = np.concatenate([sampled, sampled[:, ::-1]])
    amplitude = np.abs(np.fft.fft2(whole))
    turns = np.abs(np.fft.fftfreq(len(whole), 1 / len(whole)))[:, None]
    waves = np.abs(np.fft.fftfreq(whole.shape[1]))[None]
    outside = (turns > 2 * np.pi * half * waves + 4) & (waves > 0)
    return float(amplitude[outside].mean()) if outside.any() else 0.0


def log_data(
    counts: Any, intensity: Any, background: Any = 0.0, floor: float = 1.0
) -> tuple[torch.Tensor, Gaussian]:
    """Return line integrals ``log(I0 / (k - b))`` of counts ``k``, and their Gaussian likelihood.

    For ``k ~ Poisson(I0 exp(-z) + b)`` the quadratic surrogate of the log-likelihood in ``z`` has the level
    ``sigma = sqrt(k) / (k - b)``. Its bias is about ``sigma^2 / 2``: where that matters, keep the counts and use
    ``BeerLambert(A.range, I0) @ A`` with ``likelihoods.Poisson(background=b)``.

    Args:
        counts: ``(B, *range)``.
        intensity: Expected counts without an object, ``I0``: a number, or what broadcasts over the counts.
        background: Expected counts that did not pass the object, ``b``; likewise.
        floor: Smallest ``k - b`` and ``k`` that are believed, in counts.

    Raises:
        InvdiffError: If counts or background are negative, or the intensity is not positive.
    """
    import torch

    from invdiff.likelihoods import Gaussian

    k = torch.as_tensor(counts)
    k = k if k.is_floating_point() else k.to(torch.float32)
    i0, b = (torch.as_tensor(v).to(k) for v in (intensity, background))
    if bool((k < 0).any()) or bool((b < 0).any()):
        raise InvdiffError("Counts and background cannot be negative; give raw counts, nothing subtracted.")
    if not bool((i0 > 0).all()):
        raise InvdiffError("The intensity without an object must be above 0 everywhere.")
    net = (k - b).clamp_min(floor)
    return torch.log(i0 / net), Gaussian(k.clamp_min(floor).sqrt() / net)
