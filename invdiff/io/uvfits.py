"""UVFITS: visibilities of radio interferometers as random groups of FITS."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from invdiff.errors import InvdiffError
from invdiff.interferometry import Visibilities

__all__ = ["read_uvfits"]

#: Visibilities that one file may declare.
_MOST = 1 << 24


def read_uvfits(path: str | Path) -> Visibilities:
    """Read the total intensity of a UVFITS file.

    ``I`` is the mean of the parallel hands (RR and LL, or XX and YY) that are there, weighted equally where both
    are, as polarisation demands; spectral channels and intermediate frequencies are averaged by weight. Rows
    without a positive weight are flagged ones and left out, and so are correlations of a station with itself.

    Args:
        path: File; baselines in seconds (``UU``, ``VV``) and ``BASELINE = 256 a + b``, stations from 1.

    Raises:
        InvdiffError: If the file is no UVFITS, lacks what is needed, or every row is flagged.

    Reference:
        Greisen, "AIPS FITS file format", AIPS memo 117.
    """
    path = Path(path)
    try:
        from astropy.io import fits
    except ImportError:
        raise InvdiffError("Reading UVFITS needs astropy: pip install 'invdiff[astro]'.") from None
    if not path.is_file():
        raise InvdiffError(f"There is no file {path}.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with fits.open(path, memmap=False) as file:
                return _visibilities(file, path)
        except (OSError, TypeError, ValueError, KeyError, IndexError) as error:
            raise InvdiffError(f"{path} is not a readable UVFITS file: {error}.") from None


def _visibilities(file: Any, path: Path) -> Visibilities:
    header = file[0].header
    if not header.get("GROUPS"):
        raise InvdiffError(
            f"{path} holds no random groups, so it is no UVFITS file; give visibilities, not images."
        )
    if header["GCOUNT"] > _MOST:
        raise InvdiffError(f"{path} declares {header['GCOUNT']} visibilities, more than {_MOST}; split the file.")
    data = file[0].data
    names = [name.upper() for name in data.parnames]

    def parameter(start: str) -> np.ndarray:
        found = [i for i, name in enumerate(names) if name.startswith(start)]
        if not found:
            raise InvdiffError(f"{path} has no parameter {start}; it has {', '.join(names)}.")
        # a quantity given twice, as dates are, is the sum of both
        return np.sum([np.asarray(data.par(i), np.float64) for i in found], 0)

    axes = {str(header.get(f"CTYPE{k}", "")).strip(): k for k in range(2, header["NAXIS"] + 1)}
    for needed in ("COMPLEX", "STOKES", "FREQ"):
        if needed not in axes:
            raise InvdiffError(f"{path} has no axis {needed}; it has {', '.join(a for a in axes if a)}.")
    frequency = float(header[f"CRVAL{axes['FREQ']}"])
    value, sigma = _intensity(np.asarray(data["DATA"]), header, axes, path)
    stations = np.stack(np.divmod(np.floor(parameter("BASELINE")).astype(int), 256), 1) - 1
    time = parameter("DATE")
    uv = frequency * np.stack([parameter("UU"), parameter("VV")], 1)
    keep = np.isfinite(value) & np.isfinite(sigma) & (sigma > 0) & (stations[:, 0] != stations[:, 1])
    if not keep.any():
        raise InvdiffError(f"All {len(keep)} visibilities of {path} are flagged.")
    swapped = stations[:, 0] > stations[:, 1]
    value, uv = np.where(swapped, value.conj(), value), np.where(swapped[:, None], -uv, uv)
    antennas = [table for table in file[1:] if table.name.startswith("AIPS AN")]
    titles = tuple(str(name).strip() for name in antennas[0].data["ANNAME"]) if antennas else ()
    seconds = np.round((time - np.floor(time.min())) * 86400, 3)
    return Visibilities(
        seconds[keep],
        np.sort(stations, 1)[keep],
        uv[keep],
        value[keep],
        sigma[keep],
        names=titles,
        source=str(header.get("OBJECT", "")).strip(),
        frequency=frequency,
    )


def _intensity(data: np.ndarray, header: Any, axes: dict[str, int], path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return total intensity and noise per real component from data ``(group, ..., stokes, complex)``."""
    rank = data.ndim  # FITS counts axes from the last, and its first (empty) one is that of the groups
    data = np.moveaxis(data, [rank + 1 - axes["STOKES"], rank + 1 - axes["COMPLEX"]], [-2, -1])
    k = axes["STOKES"]
    codes = np.round(
        header[f"CRVAL{k}"] + (np.arange(1, data.shape[-2] + 1) - header[f"CRPIX{k}"]) * header[f"CDELT{k}"]
    ).astype(int)
    pair = next((p for p in ((1,), (-1, -2), (-5, -6)) if set(p) & set(codes.tolist())), None)
    if pair is None:
        raise InvdiffError(f"{path} has the Stokes codes {codes.tolist()}, none of which is total intensity.")
    hands = [
        data[..., i, :].reshape(len(data), -1, 3).astype(np.float64) for i in np.flatnonzero(np.isin(codes, pair))
    ]
    means, variances = [], []
    for hand in hands:
        w = np.where(np.isfinite(hand[..., 2]) & (hand[..., 2] > 0), hand[..., 2], 0)
        total = w.sum(1)
        with np.errstate(divide="ignore", invalid="ignore"):
            means.append((w * np.where(w > 0, hand[..., 0] + 1j * hand[..., 1], 0)).sum(1) / total)
            variances.append(1 / total)
    mean, variance = np.stack(means), np.stack(variances)
    there = np.isfinite(variance)
    count = there.sum(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        value = np.where(there, mean, 0).sum(0) / count
        sigma = np.sqrt(np.where(there, variance, 0).sum(0)) / count
    return value, np.where(count > 0, sigma, 0.0)
