"""Positron emission tomography: expected counts of coincidences, with attenuation, normalisation and blur."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from invdiff.errors import InvdiffError
from invdiff.operators._parameters import ParametricOperator, as_parameter
from invdiff.operators._ray_transform import (
    MAX_TABLE_BYTES,
    as_count,
    as_image_space,
    as_length,
    stacklevel_outside,
    warn_if_truncated,
)
from invdiff.operators.blur import GaussianBlur
from invdiff.operators.ct import ParallelBeamCT
from invdiff.spaces import Space

#: Full width at half maximum of a Gaussian, in standard deviations.
_FWHM = math.sqrt(8 * math.log(2))
#: Attenuation factors below this draw a warning: about 1.4 m of water at 511 keV.
_OPAQUE = 1e-6


class PET(ParametricOperator):
    """``(A x)[v, k] = T n[v, k] a[v, k] (P B x)[v, k]``: expected true coincidences of an activity ``x``.

    ``(B, ..., y, x)`` to ``(B, ..., view, bin)``; axes before ``(y, x)`` are slices, projected one by one. ``P``
    are the line integrals of `ParallelBeamCT`, with its geometry and its methods, ``B`` the blur of the scanner as
    a Gaussian (zero outside the image), ``a = exp(-P mu)`` the share of photon pairs that leave the object, ``n``
    the sensitivity, and ``T`` the duration of the scan.

    Scatter and randoms are added counts: they belong to the likelihood, ``invdiff.pet.noise``, so that the
    operator stays linear. There is no time of flight and no depth of interaction, and slices do not mix.

    Bins are ``bin_width`` apart: in the distance from the axis, ``s_k = (k - centre) bin_width``, after arc
    correction, or with ``ring_radius`` along the ring, ``s_k = R sin((k - centre) bin_width / R)``, as a ring of
    crystals measures them.

    Units: with ``x`` in Bq/mL on pixels in mm, ``P x`` is in Bq/mL mm; the sensitivity is the counts per second
    for one such unit, and ``A x`` is in counts.

    Args:
        shape: Shape of one image of activity concentration, or its whole Space.
        angles: Angle of every view, in radians.
        sensitivity: Counts per second and per unit of a line integral (normalisation): a number, an array that
            broadcasts over one element of the range, or one with a further leading axis of 1 or N cases. Zero
            where detectors are missing; such bins hold no data.
        duration: Duration of the scan in seconds.
        attenuation: Share of photon pairs that leave the object, between 0 and 1, in the shapes of
            ``sensitivity``. Published correction factors are its reciprocals.
        attenuation_map: Instead, linear attenuation coefficients at 511 keV in 1 / the unit of the spacing (water
            has 0.0096 / mm), in the shapes of an image, with or without cases.
        resolution: Full width at half maximum of the scanner's blur, in the unit of the spacing; none by default.
        bins: Number of bins; enough to cover the diagonal of the image by default.
        bin_width: Distance between bins; the smaller spacing of the pixels by default.
        centre: Bin, counted from 0 and with a fraction, that the axis falls on; the middle by default.
        ring_radius: Radius of the ring, where bins are not arc-corrected.
        truncated: Whether bins that miss part of the circle inscribed in the image are meant to.
        method: Which implementation of the line integrals.
        max_table_bytes: Largest table that ``"auto"`` builds.
        dtype: Precision; that of the Space, or float32.
        units: Units of the activity, e.g. ``"Bq/mL"``.
        spacing: Size of the pixels: a number, or one per named dimension; that of the Space, or 1.

    Raises:
        InvdiffError: If sensitivity, duration, attenuation or a length is out of range or does not fit, both kinds
            of attenuation are given, or the sensitivity is zero everywhere.

    Reference: Ollinger and Fessler, Positron-emission tomography, IEEE Signal Processing Magazine 14(1), 1997.
    """

    _per_case = ("weights",)

    def __init__(
        self,
        shape: Space | Sequence[int],
        angles: Any,
        *,
        sensitivity: Any = 1.0,
        duration: float = 1.0,
        attenuation: Any = None,
        attenuation_map: Any = None,
        resolution: float = 0.0,
        bins: int | None = None,
        bin_width: float | None = None,
        centre: float | None = None,
        ring_radius: float | None = None,
        truncated: bool = False,
        method: str = "auto",
        max_table_bytes: int = MAX_TABLE_BYTES,
        dtype: torch.dtype | None = None,
        units: str | None = None,
        spacing: float | Mapping[str, float] | None = None,
    ) -> None:
        self.domain, grid = as_image_space(shape, ("y", "x"), dtype, units, spacing)
        options: dict[str, Any] = {"centre": centre, "method": method, "max_table_bytes": max_table_bytes}
        width = as_length(min(grid.spacing) if bin_width is None else bin_width, "The width of the bins")
        options["detector_spacing"] = width
        if ring_radius is None:
            self.rays = ParallelBeamCT(self.domain, angles, detectors=bins, truncated=truncated, **options)
        else:
            self.rays = RingRays(self.domain, angles, ring_radius, bins, truncated, options)
        self.range = _sinogram(self.rays.range)
        self.blur: GaussianBlur | None = None
        if as_length(resolution, "The resolution of the scanner", zero=True):
            std = [resolution / _FWHM / h for h in grid.spacing]
            self.blur = GaussianBlur(std, self.domain, boundary="zero")
        self.weights = self._weights(sensitivity, duration, attenuation, attenuation_map)
        super().__init__()

    def _weights(self, sensitivity: Any, duration: float, attenuation: Any, attenuation_map: Any) -> Tensor:
        """Return ``T n a``, ``(1 or N, ...)``, broadcasting over the range."""
        factors = {"sensitivity": fit_to(sensitivity, "The sensitivity", self.range)}
        if bool((factors["sensitivity"] == 0).flatten(1).all(1).any()):
            raise InvdiffError("The sensitivity is zero in all bins; a scan needs at least one that counts.")
        if attenuation is not None and attenuation_map is not None:
            raise InvdiffError("Give the attenuation factors or the attenuation map, not both.")
        if attenuation is not None:
            factors["attenuation"] = fit_to(attenuation, "The attenuation", self.range)
            if bool((factors["attenuation"] > 1).any()):
                raise InvdiffError(
                    f"The attenuation reaches {float(factors['attenuation'].max()):g}; expected the share of "
                    "photon pairs that leave the object, at most 1: for correction factors give their reciprocals."
                )
        elif attenuation_map is not None:
            factors["attenuation"] = self._attenuation_of(attenuation_map)
        counts = {name: len(values) for name, values in factors.items()}
        if len(set(counts.values()) - {1}) > 1:
            shown = " and ".join(f"{name} for {n}" for name, n in counts.items())
            raise InvdiffError(f"{self.name} has {shown} cases; give each for one case or for the same number.")
        out = as_length(duration, "The duration of the scan in seconds") * factors["sensitivity"]
        return (out * factors.get("attenuation", 1.0)).to(self.domain.dtype)

    def _attenuation_of(self, mu: Any) -> Tensor:
        """Return ``exp(-P mu)``, ``(1 or N, *range)``."""
        values = fit_to(mu, "The attenuation map", self.domain)
        integrals = self.rays(values.expand(len(values), *self.domain.shape).to(self.domain.dtype)).double()
        if float(integrals.max()) > -math.log(_OPAQUE):
            warnings.warn(
                f"The attenuation map stops all but {math.exp(-float(integrals.max())):.0e} of the photon pairs "
                f"on one line; it is taken in 1/{self.domain.spacing_units}, and water has 0.0096/mm at 511 keV.",
                stacklevel=stacklevel_outside(),
            )
        return torch.exp(-integrals)

    @property
    def support(self) -> Tensor | None:
        """Zeros where the sensitivity is zero, which hold no data; None where every bin counts."""
        counting = self.weights > 0
        return None if bool(counting.all()) else counting.to(self.weights.dtype)

    @property
    def positions(self) -> np.ndarray:
        """Distance of every bin from the axis, ``(bins,)``."""
        return self.rays.positions

    def describe(self) -> dict[str, Any]:
        """Return what provenance records, with the geometry."""
        own = super().describe()
        rays = {k: v for k, v in self.rays.describe().items() if k not in own}
        return {**own, "bin_width": rays.pop("detector_spacing"), **rays}

    def _forward(self, x: Tensor) -> Tensor:
        x = self._enter(x, self.domain)
        return self.weights * self.rays._forward(x if self.blur is None else self.blur._forward(x))

    def _adjoint(self, y: Tensor) -> Tensor:
        x = self.rays._adjoint(self.weights * self._enter(y, self.range))
        return x if self.blur is None else self.blur._adjoint(x)


class RingRays(ParallelBeamCT):
    """Parallel rays at ``s_k = R sin((k - centre) w / R)``, the distances that a ring of crystals measures.

    Args:
        domain: Space of the image.
        angles: Angle of every view, in radians.
        radius: Radius ``R`` of the ring.
        bins: Number of bins, or None for enough to cover the diagonal of the image.
        truncated: Whether bins that miss part of the circle inscribed in the image are meant to.
        options: Further arguments of `ParallelBeamCT`, among them ``detector_spacing``, the width ``w``.

    Raises:
        InvdiffError: If the image reaches beyond the ring, or the bins beyond its diameter.
    """

    def __init__(
        self,
        domain: Space,
        angles: Any,
        radius: float,
        bins: int | None,
        truncated: bool,
        options: Mapping[str, Any],
    ) -> None:
        _, grid = as_image_space(domain, ("y", "x"), None, None, None)
        self.radius = as_length(radius, "The radius of the ring")
        corner, width = 0.5 * math.hypot(*grid.extent), options["detector_spacing"]
        if corner >= self.radius:
            raise InvdiffError(
                f"The corners of the image are {corner:g} from the axis, outside the ring of radius "
                f"{self.radius:g}; check that both have the same units."
            )
        if bins is None:
            bins = math.ceil(2 * self.radius * math.asin(corner / self.radius) / width)
        super().__init__(domain, angles, detectors=as_count(bins, "The number of bins"), truncated=True, **options)
        ends = np.array([-self.centre - 0.5, self.range.shape[-1] - 0.5 - self.centre]) * width / self.radius
        if np.abs(ends).max() > np.pi / 2:
            raise InvdiffError(
                f"The bins reach {np.abs(ends).max() * self.radius:g} along a ring of radius {self.radius:g}; a "
                f"quarter of it is {np.pi / 2 * self.radius:g}."
            )
        reach = self.radius * float(np.sin(np.abs(ends)).min())
        warn_if_truncated((0.5 * min(grid.extent) - reach) / width, truncated)

    def _geometry(self) -> Mapping[str, Any]:
        return {**super()._geometry(), "ring_radius": self.radius}

    def _implementation(self, device: torch.device) -> str:
        how = super()._implementation(device)
        return "reference" if how == "triton" else how  # whose kernels look for bins at even distances

    def fbp(self, y: Tensor, filter: str = "ram-lak") -> Tensor:
        """Refuse: the filters are for bins at even distances."""
        raise InvdiffError("Filtered back-projection needs bins at even distances; correct the data for the arc.")

    @property
    def positions(self) -> np.ndarray:
        """Distance of every bin from the axis, ``(bins,)``."""
        return self.radius * np.sin(super().positions / self.radius)


def _sinogram(space: Space) -> Space:
    """Return the range of the rays in counts, its last dimension named after the bins."""
    spacing = {("bin" if d == "detector" else d): h for d, h in space.spacing.items()}
    return space.replace(dims=(*space.dims[:-1], "bin"), spacing=spacing, units="counts")


def fit_to(value: Any, what: str, space: Space) -> Tensor:
    """Return an array ``(1 or N, ...)`` that broadcasts over ``(N, *space.shape)``, real and not negative."""
    values = as_parameter(value, what)
    if values.is_complex() or bool((values < 0).any()):
        found = "complex" if values.is_complex() else f"as low as {float(values.min()):g}"
        raise InvdiffError(f"{what} must be real and not negative, and it is {found}.")
    rank = len(space.shape) + 1
    full = values.reshape(*[1] * (rank - values.ndim), *values.shape)
    if full.ndim != rank or any(m not in (1, n) for m, n in zip(full.shape[1:], space.shape)):
        raise InvdiffError(
            f"{what} has shape {tuple(values.shape)}, which fits neither {space.shape} nor one more leading axis "
            "of cases."
        )
    return full.double()
