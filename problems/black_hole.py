"""Imaging of a compact radio source from closure quantities alone, as of M87 by the Event Horizon Telescope.

    y = (P arg V, L log |V|) + noise,    V(u, v) = sum I(l, m) exp(-2 pi i (u l + v m))

Nothing that stations do wrong enters: gains and phases cancel. What also cancels is the total flux and the place
of the source, so that draws float, and scale by the flux that is known otherwise. Angles of the noise turn.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from invdiff import likelihoods, operators
from invdiff.errors import InvdiffError
from invdiff.interferometry import ClosureData, Visibilities
from invdiff.problem import Problem

__all__ = ["MICROARCSECOND", "chi_squared", "closure_problem", "crescent", "observe", "prepare"]

#: Radians.
MICROARCSECOND = float(np.pi / 180 / 3600e6)


def prepare(
    visibilities: Visibilities,
    *,
    seconds: float = 600.0,
    shortest: float = 1e8,
    snr: float = 3.0,
    systematic: float = 0.02,
) -> Visibilities:
    """Return what closures are made of: averages within scans, of long baselines, well above the noise.

    Args:
        visibilities: As they are read.
        seconds: Longest time to average over.
        shortest: Wavelengths; shorter baselines see structure larger than the image.
        snr: Least ratio of amplitude to noise.
        systematic: Share of the amplitude that is added to the noise in squares, for errors that do not close.
    """
    return visibilities.average(seconds).beyond(shortest).above(snr).with_systematics(systematic)


def closure_problem(
    visibilities: Visibilities, size: int = 64, pixel: float = 2 * MICROARCSECOND, dark: float = 1e-3
) -> Problem:
    """Return the problem of closure phases and log closure amplitudes of visibilities.

    Images ``(1, size, size)`` have north up and east to the left and any scale: give the prior one
    (``prior.with_scale(1.0)``).

    Args:
        visibilities: After `prepare`.
        size: Pixels in both directions.
        pixel: Size of a pixel in radians.
        dark: Amplitude, as a share of that of a tenth of the field filled with ones, that counts as nothing.

    Returns:
        Problem whose ``meta`` names source, stations and pixel size.
    """
    data = visibilities.closures()
    sky = operators.RadioInterferometry(visibilities.uv, (size, size), pixel, units="1/pixel")
    floor = dark * 0.1 * size**2
    operator = operators.Closures(sky.range, data.phases, data.amplitudes, floor=floor) @ sky
    angles = torch.arange(operator.range.size) < len(data.phases)
    likelihood = likelihoods.WrappedGaussian(torch.from_numpy(data.covariance), operator.range, angles)
    meta = {
        "title": f"{visibilities.source or 'a compact source'}: {data!r}",
        "pixel_uas": pixel / MICROARCSECOND,
        "stations": list(visibilities.names),
    }
    return Problem(operator, likelihood, torch.from_numpy(data.values).float()[None], meta=meta)


def chi_squared(problem: Problem, data: ClosureData, images: NDArray[Any]) -> dict[str, float]:
    """Return the mean chi-squared per closure phase and per log closure amplitude of images ``(n, y, x)``."""
    x = torch.from_numpy(np.ascontiguousarray(images, np.float32))[:, None]
    return data.chi_squared(problem.operator(x).double().numpy())


def observe(
    image: NDArray[Any],
    template: Visibilities,
    pixel: float = 2 * MICROARCSECOND,
    *,
    flux: float = 0.6,
    gain: float = 0.1,
    seed: int = 0,
) -> Visibilities:
    """Return visibilities of an image on the baselines, times and noise of another observation.

    Args:
        image: ``(y, x)``, north up and east to the left.
        template: Whose stations, baselines and noise, before averaging; its values are not used.
        pixel: Size of a pixel in radians.
        flux: Total flux in Jy.
        gain: Standard deviation of the log-amplitudes of station errors; their phases are uniform. Both are
            constant within a scan, as far as a correlator aligns them.
        seed: Seed of errors and noise.
    """
    total = float(np.sum(image))
    if image.ndim != 2 or not total > 0:
        raise InvdiffError(f"A source is one image (y, x) with a positive sum, got shape {image.shape}.")
    rng = np.random.default_rng(seed)
    sky = operators.RadioInterferometry(template.uv, image.shape, pixel, dtype=torch.float64, accuracy=1e-6)
    value = sky(torch.from_numpy(np.asarray(image, np.float64) * (flux / total))[None, None])[0].numpy()
    scan = template.scans
    shape = (int(template.stations.max()) + 1, int(scan.max()) + 1)
    error = np.exp(gain * rng.normal(size=shape) + 2j * np.pi * rng.random(shape))
    value = value * error[template.stations[:, 0], scan] * error[template.stations[:, 1], scan].conj()
    noise = template.sigma * (rng.normal(size=len(value)) + 1j * rng.normal(size=len(value)))
    return dataclasses.replace(template, value=value + noise)


def crescent(
    diameter: float,
    *,
    width: float = 12.0,
    position_angle: float = -160.0,
    asymmetry: float = 0.5,
    size: int = 64,
    pixel: float = 2.0,
) -> NDArray[np.float64]:
    """Return a Gaussian ring that is brighter towards one side, ``(size, size)``, lengths in micro-arcseconds.

    ``exp(-(r - diameter / 2)^2 / (2 s^2)) (1 + asymmetry cos(angle - position_angle))`` with the full width at
    half maximum ``width = 2.355 s``, angles in degrees from north through east.
    """
    y, x = (np.mgrid[:size, :size] - (size - 1) / 2) * pixel
    r, angle = np.hypot(y, x), np.arctan2(-x, -y)
    ring = np.exp(-0.5 * ((r - diameter / 2) / (width / 2.3548)) ** 2)
    return np.asarray(ring * (1 + asymmetry * np.cos(angle - np.deg2rad(position_angle))))
