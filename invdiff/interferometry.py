"""Visibilities of a very-long-baseline interferometer, and the closure quantities that station errors leave alone.

A station with a wrong complex gain ``g_a`` turns ``V_ab`` into ``g_a conj(g_b) V_ab``. Sums of phases around a
triangle of stations, ``arg V_ab + arg V_bc - arg V_ac``, and ratios of amplitudes around a quadrangle,
``log |V_ab| + log |V_cd| - log |V_ac| - log |V_bd|``, do not change.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from invdiff.errors import InvdiffError

__all__ = ["ClosureData", "Visibilities"]

Array: TypeAlias = NDArray[Any]
#: Seconds without data that end a scan.
_GAP = 120.0


@dataclass(frozen=True, eq=False, repr=False)
class Visibilities:
    """Visibilities ``V(u, v) = sum I(l, m) exp(-2 pi i (u l + v m))``, one row per baseline and time.

    ``l`` counts columns and ``m`` rows of an image with north up and east to the left, as
    :class:`invdiff.operators.RadioInterferometry` has it.

    Args:
        time: Seconds, ``(n,)``.
        stations: Index of both stations of a row, the smaller first, ``(n, 2)``.
        uv: Baselines in wavelengths, ``(n, 2)``.
        value: Visibilities in Jy, ``(n,)`` complex.
        sigma: Thermal noise per real component in Jy, ``(n,)``.
        names: Names of the stations.
        source: Name of the source.
        frequency: Observing frequency in Hz.

    Raises:
        InvdiffError: If shapes disagree, noise is not positive, or numbers are not finite.
    """

    time: Array
    stations: Array
    uv: Array
    value: Array
    sigma: Array
    names: tuple[str, ...] = ()
    source: str = ""
    frequency: float = float("nan")

    def __post_init__(self) -> None:
        n = len(self.time)
        for name, shape in (("stations", (n, 2)), ("uv", (n, 2)), ("value", (n,)), ("sigma", (n,))):
            if np.shape(getattr(self, name)) != shape:
                raise InvdiffError(f"{name} has shape {np.shape(getattr(self, name))}, expected {shape}.")
        if n and not (np.isfinite(self.value).all() and np.isfinite(self.uv).all() and (self.sigma > 0).all()):
            raise InvdiffError("Visibilities must be finite with positive noise; leave flagged rows out.")

    def __len__(self) -> int:
        return len(self.time)

    def __repr__(self) -> str:
        baselines = {tuple(pair) for pair in self.stations.tolist()}
        return (
            f"Visibilities({self.source or 'source'}: {len(self)} of {len(baselines)} baselines among "
            f"{len(set(self.stations.ravel().tolist()))} stations at {len(np.unique(self.time))} times, "
            f"{self.frequency / 1e9:.1f} GHz)"
        )

    def select(self, keep: Array) -> Visibilities:
        """Return the rows where ``keep`` ``(n,)`` is true."""
        arrays = ("time", "stations", "uv", "value", "sigma")
        return replace(self, **{name: getattr(self, name)[keep] for name in arrays})

    def beyond(self, wavelengths: float) -> Visibilities:
        """Return baselines longer than so many wavelengths: shorter ones see what the image leaves out."""
        return self.select(np.hypot(*self.uv.T) > wavelengths)

    def above(self, snr: float) -> Visibilities:
        """Return rows of at least this ratio of amplitude to noise; closures assume that noise is small."""
        return self.select(np.abs(self.value) >= snr * self.sigma)

    def with_systematics(self, fraction: float) -> Visibilities:
        """Return noise with a share of the amplitude added in squares: errors that are not of stations."""
        return replace(self, sigma=np.hypot(self.sigma, fraction * np.abs(self.value)))

    def average(self, seconds: float = 600.0) -> Visibilities:
        """Average coherently within scans, over at most so many seconds, weighted by ``1 / sigma^2``.

        All baselines of a bin get its middle as their time, so that closures find each other.
        """
        if not seconds > 0:
            raise InvdiffError(f"The time to average over must be positive, got {seconds:g} s.")
        rows = []
        for inside in self._bins(seconds):
            middle = float(self.time[inside].min() + self.time[inside].max()) / 2
            for pair in np.unique(self.stations[inside], axis=0):
                mine = inside & (self.stations == pair).all(1)
                w = 1 / self.sigma[mine] ** 2
                mean = [(w[:, None] * self.uv[mine]).sum(0) / w.sum(), (w * self.value[mine]).sum() / w.sum()]
                rows.append((middle, pair, *mean, w.sum() ** -0.5))
        time, stations, uv, value, sigma = (np.array(column) for column in zip(*rows))
        return replace(self, time=time, stations=stations, uv=uv, value=value, sigma=sigma)

    @property
    def scans(self) -> Array:
        """Number of the scan of every row, ``(n,)``; two minutes without data end one."""
        times, place = np.unique(self.time, return_inverse=True)
        return np.concatenate([[0], np.cumsum(np.diff(times) > _GAP)])[place]

    def _bins(self, seconds: float) -> Iterator[Array]:
        scans = self.scans
        for scan in range(scans.max() + 1):
            mine = scans == scan
            first, last = self.time[mine].min(), self.time[mine].max()
            parts = max(1, int(np.ceil((last - first) / seconds - 1e-9)))
            part = np.minimum((self.time - first) / max(last - first, 1e-9) * parts, parts - 1).astype(int)
            for k in range(parts):
                inside = mine & (part == k)
                if inside.any():
                    yield inside

    def closures(self) -> ClosureData:
        """Return as many independent closure phases and log closure amplitudes as there are, the best first.

        Of all triangles (quadrangles) of a time those of least noise are taken as long as they are independent.

        Raises:
            InvdiffError: If there is no triangle of stations at any time.
        """
        triangles, quadrangles = [], []
        relative = self.sigma / np.abs(self.value)
        for moment in np.unique(self.time):
            rows = np.flatnonzero(self.time == moment)
            at = {tuple(pair): row for pair, row in zip(self.stations[rows].tolist(), rows.tolist())}
            triangles += _independent(_triangles(at, len(self)), relative)
            quadrangles += _independent(_quadrangles(at, len(self)), relative)
        if not triangles:
            raise InvdiffError("There are no closure phases: no three stations observed at the same time.")
        return ClosureData(self, np.array(triangles), np.array(quadrangles).reshape(-1, len(self)))


@dataclass(frozen=True, eq=False, repr=False)
class ClosureData:
    """Independent closure phases and log closure amplitudes.

    Args:
        visibilities: What they are of, ``n`` rows.
        phases: Which phases add up, +1 or -1, ``(p, n)``.
        amplitudes: Which log-amplitudes add up, ``(a, n)``.
    """

    visibilities: Visibilities
    phases: Array
    amplitudes: Array

    def __repr__(self) -> str:
        return f"ClosureData({len(self.phases)} closure phases, {len(self.amplitudes)} log closure amplitudes)"

    @property
    def values(self) -> Array:
        """Phases in radians, then log-amplitudes, ``(p + a,)``; amplitudes are freed of their noise bias."""
        v = self.visibilities
        power = np.maximum(np.abs(v.value) ** 2 - v.sigma**2, v.sigma**2 / 4)
        phase = np.angle(np.exp(1j * (self.phases @ np.angle(v.value))))
        return np.concatenate([phase, self.amplitudes @ (0.5 * np.log(power))])

    @property
    def covariance(self) -> Array:
        """Covariance of the values to first order in ``sigma / |V|``, ``(p + a, p + a)``."""
        v = self.visibilities
        each = (v.sigma / np.abs(v.value)) ** 2
        p, a = len(self.phases), len(self.amplitudes)
        out = np.zeros((p + a, p + a))
        out[:p, :p] = (self.phases * each) @ self.phases.T
        out[p:, p:] = (self.amplitudes * each) @ self.amplitudes.T
        return out

    def chi_squared(self, values: Array) -> dict[str, float]:
        """Return ``r^T C^-1 r`` per datum of phases and of amplitudes for modelled values ``(..., p + a)``."""
        p = len(self.phases)
        rest = np.asarray(values, float) - self.values
        rest[..., :p] = np.angle(np.exp(1j * rest[..., :p]))
        parts = {"phases": slice(0, p), "amplitudes": slice(p, None)}
        found = {}
        for name, part in parts.items():
            r = rest[..., part].reshape(-1, rest[..., part].shape[-1])
            if r.shape[1]:
                solved = np.linalg.solve(self.covariance[part, part], r.T).T
                found[name] = float((r * solved).sum(1).mean() / r.shape[1])
        return found


def _triangles(at: dict[tuple[int, ...], int], count: int) -> Iterator[Array]:
    """Yield the rows of all closure phases among baselines ``(a, b) -> row``."""
    stations = sorted({s for pair in at for s in pair})
    for a, b, c in itertools.combinations(stations, 3):
        if {(a, b), (b, c), (a, c)} <= at.keys():
            row = np.zeros(count)
            row[[at[a, b], at[b, c]]], row[at[a, c]] = 1, -1
            yield row


def _quadrangles(at: dict[tuple[int, ...], int], count: int) -> Iterator[Array]:
    """Yield the rows of all log closure amplitudes: two of three pairs of baselines that share no station."""
    stations = sorted({s for pair in at for s in pair})
    for a, b, c, d in itertools.combinations(stations, 4):
        pairings = [((a, b), (c, d)), ((a, c), (b, d)), ((a, d), (b, c))]
        there = [pairs for pairs in pairings if set(pairs) <= at.keys()]
        for over, under in itertools.combinations(there, 2):
            row = np.zeros(count)
            row[[at[pair] for pair in over]], row[[at[pair] for pair in under]] = 1, -1
            yield row


def _independent(rows: Iterator[Array], relative: Array) -> list[Array]:
    """Return the rows of least noise that are linearly independent (greedy, which is best for a matroid)."""
    ordered = sorted(rows, key=lambda row: float((row**2 * relative**2).sum()))
    if not ordered:
        return []
    used = np.flatnonzero(np.abs(ordered).sum(0))
    taken: list[Array] = []
    basis = np.zeros((0, len(used)))
    for row in ordered:
        rest = row[used] - basis.T @ (basis @ row[used])
        if np.linalg.norm(rest) > 1e-6:
            taken.append(row)
            basis = np.vstack([basis, rest / np.linalg.norm(rest)])
    return taken
