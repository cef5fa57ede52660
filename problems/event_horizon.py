"""What the Event Horizon Telescope of April 2017 sees of a source: baselines, times and noise."""

from __future__ import annotations

import itertools

import numpy as np

from invdiff.errors import InvdiffError
from invdiff.interferometry import Visibilities

__all__ = ["STATIONS", "event_horizon_telescope"]

#: Geocentric places in metres and system-equivalent flux densities in Jy at 1.3 mm, medians over the campaign.
STATIONS: dict[str, tuple[tuple[float, float, float], float]] = {
    "ALMA": ((2225061.2, -5440057.4, -2481681.2), 74.0),
    "APEX": ((2225039.5, -5441197.6, -2479303.4), 4700.0),
    "SMT": ((-1828796.2, -5054406.8, 3427865.2), 17100.0),
    "JCMT": ((-5464584.7, -2493001.2, 2150654.0), 10500.0),
    "LMT": ((-768715.6, -5988507.1, 2063354.9), 4500.0),
    "IRAM 30 m": ((5088967.7, -301681.2, 3825012.2), 1900.0),
    "SMA": ((-5464555.5, -2492928.0, 2150797.2), 6200.0),
}
_LIGHT = 299792458.0
#: What two-bit sampling leaves of the sensitivity.
_SAMPLING = 0.88


def event_horizon_telescope(
    declination: float = 12.391,
    start: float = 1.3,
    stop: float = 8.2,
    *,
    every: float = 1200.0,
    seconds: float = 600.0,
    frequency: float = 227.07e9,
    bandwidth: float = 1.856e9,
    lowest: float = 10.0,
) -> Visibilities:
    """Return the rows of an observation with visibilities of 0, for `black_hole.observe` to fill.

    ``u = sin H b_x + cos H b_y`` and ``v = cos d b_z - sin d (cos H b_x - sin H b_y)`` for a baseline ``b`` in
    wavelengths and the hour angle ``H`` at Greenwich; the noise per real component is
    ``sqrt(S_a S_b / (2 bandwidth seconds)) / 0.88``.

    Args:
        declination: Of the source, in degrees; that of M87 by default.
        start: First hour angle at Greenwich, in hours; the night of 11 April 2017 by default.
        stop: Last one.
        every: Seconds from one scan to the next.
        seconds: Length of a scan, which gives one row per baseline.
        frequency: In Hz.
        bandwidth: In Hz.
        lowest: Elevation in degrees below which a station does not see the source.

    Raises:
        InvdiffError: If no two stations see the source at any time.

    Source: Event Horizon Telescope Collaboration, "First M87 results II", ApJL 875, L2, 2019, table 2.
    """
    place = np.array([where for where, _ in STATIONS.values()])
    sefd = np.array([flux for _, flux in STATIONS.values()])
    d = np.deg2rad(declination)
    up = place / np.linalg.norm(place, axis=1, keepdims=True)
    rows = []
    for time in np.arange(0.0, (stop - start) * 3600 + 1, every):
        h = (start + time / 3600) * np.pi / 12
        source = np.array([np.cos(d) * np.cos(h), -np.cos(d) * np.sin(h), np.sin(d)])
        seen = np.flatnonzero(up @ source > np.sin(np.deg2rad(lowest))).tolist()
        for a, b in itertools.combinations(seen, 2):
            x, y, z = (place[a] - place[b]) * (frequency / _LIGHT)
            u = np.sin(h) * x + np.cos(h) * y
            v = np.cos(d) * z - np.sin(d) * (np.cos(h) * x - np.sin(h) * y)
            noise = np.sqrt(sefd[a] * sefd[b] / (2 * bandwidth * seconds)) / _SAMPLING
            rows.append((time, (a, b), (u, v), noise))
    if not rows:
        raise InvdiffError(f"No two stations see a source at declination {declination:g} between these hours.")
    times, stations, uv, sigma = (np.array(column) for column in zip(*rows))
    return Visibilities(
        times, stations, uv, np.zeros(len(times), complex), sigma, tuple(STATIONS), "simulated", frequency
    )
