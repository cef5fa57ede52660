"""Fourier measurements off the grid: parallel MRI along any trajectory, and radio interferometry."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from invdiff.errors import InvdiffError
from invdiff.operator import apply_linear
from invdiff.operators._coils import as_coil_maps
from invdiff.operators._parameters import ParametricOperator, as_parameter
from invdiff.operators.nufft import Nufft, fast_even
from invdiff.operators.off_resonance import OffResonance
from invdiff.operators.trajectories import pipe_menon
from invdiff.spaces import Space

NORMALS = ("exact", "toeplitz")
#: Coil images that one pass on a CPU takes at a time: more of them leave the caches (measured at 256 x 256).
_BLOCK = 8
_AXES = {1: ("x",), 2: ("y", "x"), 3: ("z", "y", "x")}


class FourierSums(ParametricOperator):
    """``y_cj = s sum_n w_c[n] x[n] exp(-2 pi i k_j (n - c) / N)`` for image weights ``w_c`` and a number ``s``.

    Base of the operators below; subclasses set the spaces and ``weights``, ``(1 or N, channel, *image)`` complex.
    """

    weights: Tensor
    _per_case = ("weights",)

    def __init__(
        self,
        trajectory: Tensor,
        scale: float,
        method: str,
        accuracy: float,
        normal: str,
        off_resonance: OffResonance | None = None,
    ) -> None:
        if normal not in NORMALS:
            raise InvdiffError(f"There is no normal operator {normal!r}; choose one of {', '.join(NORMALS)}.")
        if normal == "toeplitz" and off_resonance is not None:
            raise InvdiffError("With off-resonance the normal operator is no convolution; use normal='exact'.")
        image, self._scale, self._normal_by = tuple(self.weights.shape[2:]), scale, normal
        self._nufft = Nufft(trajectory.reshape(-1, len(image)), image, accuracy, method)
        self._sample_shape = tuple(trajectory.shape[:-1])
        self._segments: _Segments | None = None
        # Digests do not look into the transform, so what it was made with is kept as text.
        self._made_with = f"{self._nufft.digest} {self._nufft.method} {accuracy}"
        if off_resonance is not None:
            self._segments = _Segments(off_resonance, image, self._sample_shape, accuracy)
            self._made_with += f" {self._segments.digest}"
        super().__init__()

    @property
    def trajectory(self) -> Tensor:
        """Frequencies in cycles per field of view, float64, ``(..., axes)`` in the order of the image's axes."""
        return self._nufft.points.reshape(*self._sample_shape, -1)

    @property
    def method(self) -> str:
        """What computes the sums: ``gridding``, ``finufft`` or ``reference``."""
        return self._nufft.method

    def _forward(self, x: Tensor) -> Tensor:
        folded, _ = self._derived(_folded)
        return _in_blocks(self._samples_of, self._enter(x, self.domain), folded, self.range)

    def _adjoint(self, y: Tensor) -> Tensor:
        _, conj = self._derived(_folded)
        return _in_blocks(self._image_of, self._enter(y, self.range), conj, self.domain)

    def normal(self, x: Tensor) -> Tensor:
        """Return ``A^H A x``: forward and adjoint, or with ``normal="toeplitz"`` one convolution by FFT.

        The convolution is that of the exact sums, so it differs from ``adjoint(forward(x))`` by their accuracy.
        """
        if self._normal_by == "exact":
            return super().normal(x)
        self.domain.check(x, f"Input of the normal operator of {self.name}")
        return apply_linear(x, self._convolve, self._convolve)

    def _convolve(self, x: Tensor) -> Tensor:
        (multiplier,) = self._derived(_multiplier)
        crop = tuple(slice(n) for n in self.domain.shape[1:])

        def apply(rows: Tensor, weights: Tensor) -> Tensor:
            axes, out = tuple(range(1, rows.ndim - 1)), torch.zeros_like(rows[:, 0], dtype=weights.dtype)
            for w in weights.unbind(1):  # coil by coil, in the caches
                k = torch.fft.fftn(rows[:, 0] * w, s=multiplier.shape[1:], dim=axes).mul_(multiplier)
                out += torch.fft.ifftn(k, dim=axes)[(slice(None), *crop)] * w.conj()
            return self._into_domain(out[:, None])

        return _in_blocks(apply, self._enter(x, self.domain), self.weights, self.domain, width=1)

    def _samples_of(self, x: Tensor, weights: Tensor) -> Tensor:
        images = x * weights  # (B, channel, *image)
        many = images.shape[:2]
        if self._segments is not None:
            phases, b = self._derived(_segment_factors)
            images = images[:, :, None] * phases
            samples = self._nufft.to_samples(images.flatten(0, 2))
            return (samples.reshape(*many, *b.shape[1:]) * b).sum(2).reshape(*many, *self._sample_shape)
        return self._nufft.to_samples(images.flatten(0, 1)).reshape(*many, *self._sample_shape)

    def _image_of(self, y: Tensor, conj: Tensor) -> Tensor:
        many, samples = y.shape[:2], y.flatten(2)
        if self._segments is not None:
            phases, b = self._derived(_segment_factors)
            images = self._nufft.to_images((samples[:, :, None] * b.conj()).flatten(0, 2))
            images = (images.reshape(*many, *phases.shape[1:]) * phases.conj()).sum(2)
        else:
            images = self._nufft.to_images(samples.flatten(0, 1)).reshape(*many, *conj.shape[2:])
        return self._into_domain((images * conj).sum(1, keepdim=True))

    def _into_domain(self, x: Tensor) -> Tensor:
        return x if self.domain.is_complex else x.real.contiguous()


class NonCartesianMRI(FourierSums):
    """``y_cj = N^(-1/2) sum_n S_c[n] x[n] exp(-2 pi i k_j (n - N // 2) / N)`` for coils ``c``, samples ``j``.

    ``(B, 1, y, x)`` complex to ``(B, coil, *samples)`` complex, or the same with ``(z, y, x)``. On a Cartesian
    trajectory of ``k = -N // 2, ...`` it is `MultiCoilMRI`. With ``off_resonance`` every term also turns by
    ``exp(-2 pi i f[n] t_j)``.

    The data carry no density compensation: their noise is what the likelihood says, and weights would correlate
    it. ``gridded`` applies it to look at data or to start from.

    Args:
        trajectory: ``(..., axes)``, e.g. ``(spoke, sample, 2)``, columns in the order of the image's axes
            (``ky, kx``); see `invdiff.operators.trajectories`.
        coil_maps: Coil sensitivities ``(coil, y, x)`` or ``(coil, z, y, x)``, or with one more leading axis for
            one set per case. Their precision is that of the operator.
        trajectory_units: ``"cycles"`` per field of view, from ``-N / 2`` to ``N / 2``, or ``"radians"`` per
            pixel, from ``-pi`` to ``pi``.
        density: Weights of the samples for ``gridded``, in k-space cells; found by iteration where left out.
        accuracy: Relative error of the sums.
        off_resonance: Frequency offsets and sample times.
        method: ``"gridding"``, ``"finufft"``, ``"reference"`` (exact and slow), or ``"auto"``.
        normal: ``"exact"``: forward and adjoint. ``"toeplitz"``: one convolution, exact sums, twice the grid.
        units: Units of the image.
        spacing: Distance between neighbours, per named dimension.

    Raises:
        InvdiffError: If shapes do not fit, the trajectory leaves what the pixels resolve, or the method cannot
            be had.
    """

    def __init__(
        self,
        trajectory: Any,
        coil_maps: Any,
        *,
        trajectory_units: str = "cycles",
        density: Any = None,
        accuracy: float = 1e-3,
        off_resonance: OffResonance | None = None,
        method: str = "auto",
        normal: str = "exact",
        units: str = "1",
        spacing: Mapping[str, float] | None = None,
    ) -> None:
        points = _as_trajectory(trajectory)
        axes = points.shape[-1]
        self.weights = as_coil_maps(coil_maps, _AXES[axes])
        coils, *image = self.weights.shape[1:]
        points = in_cycles(points, image, trajectory_units)
        dtype = self.weights.dtype
        self.domain = Space((1, *image), dtype, ("channel", *_AXES[axes]), units, spacing or {})
        samples = tuple(points.shape[:-1])
        names = ("interleaf", "sample") if len(samples) == 2 else tuple(f"sample_{i}" for i in range(len(samples)))
        self.range = Space(
            (coils, *samples), dtype, ("coil", *(names if len(samples) > 1 else ("sample",))), units
        )
        self.density = None if density is None else _as_density(density, samples)
        super().__init__(points, 1 / math.sqrt(math.prod(image)), method, accuracy, normal, off_resonance)

    @property
    def coil_maps(self) -> Tensor:
        """Coil sensitivities, ``(1 or N, coil, *image)``."""
        return self.weights

    def gridded(self, y: Tensor) -> Tensor:
        """Return ``A^H (w y)`` with the density ``w``: the image up to undersampling and coil shading."""
        self.range.check(y, f"Data of {self.name}")
        density = self.density
        if density is None:
            density = pipe_menon(self.trajectory, self.domain.shape[1:])
        return self.adjoint(y * density.to(y.device, self.domain.real_dtype))


class RadioInterferometry(FourierSums):
    """Visibilities ``V(u, v) = sum_n I[n] a[n] exp(-2 pi i (u l_n + v m_n))`` of a small field of the sky.

    ``(B, 1, y, x)`` real to ``(B, baseline)`` complex, with direction cosines ``l = (column - nx // 2) cell`` and
    ``m = (row - ny // 2) cell``. Where right ascension grows to the left, flip the image. The w-term is left out,
    which is right for small fields alone. Visibility weights belong to the likelihood:
    ``likelihoods.Gaussian(sigma)`` with an array over baselines.

    Args:
        uv: Baselines in wavelengths, ``(baseline, 2)`` with columns ``u, v``.
        shape: Image size ``(y, x)``.
        cell_size: Size of a pixel in radians.
        beam: Primary beam ``a``, ``(y, x)`` real; ones where left out.
        dtype: float32 or float64 of the image.
        accuracy, method, normal: As of `NonCartesianMRI`.
        units: Units of the image, e.g. ``"Jy/pixel"``.

    Raises:
        InvdiffError: If shapes do not fit, or the pixels are too large for the longest baseline.
    """

    def __init__(
        self,
        uv: Any,
        shape: Sequence[int],
        cell_size: float,
        *,
        beam: Any = None,
        dtype: torch.dtype = torch.float32,
        accuracy: float = 1e-4,
        method: str = "auto",
        normal: str = "exact",
        units: str = "Jy/pixel",
    ) -> None:
        baselines = _as_trajectory(uv)
        ny, nx = (int(n) for n in shape)
        if baselines.ndim != 2 or baselines.shape[1] != 2:
            raise InvdiffError(f"The baselines have shape {tuple(baselines.shape)}, expected (baseline, 2).")
        if not (math.isfinite(cell_size) and cell_size > 0):
            raise InvdiffError(f"The cell size is in radians and must be positive, got {cell_size:g}.")
        self.domain = Space((1, ny, nx), dtype, units=units)
        self.range = Space((len(baselines),), dtype.to_complex(), ("baseline",), units.removesuffix("/pixel"))
        points = baselines.flip(-1) * cell_size * torch.tensor([ny, nx], dtype=torch.float64)
        longest = float(baselines.abs().max())
        if longest * cell_size > 0.5 * (1 + 1e-6):
            raise InvdiffError(
                f"The longest baseline is {longest:.4g} wavelengths, and pixels of {cell_size:.3g} rad resolve "
                f"{0.5 / cell_size:.4g}; use pixels of at most {0.5 / longest:.3g} rad."
            )
        ones = torch.ones(ny, nx, dtype=torch.float64)
        sky = ones if beam is None else as_parameter(beam, "The primary beam").double()
        if tuple(sky.shape) != (ny, nx):
            raise InvdiffError(f"The primary beam has shape {tuple(sky.shape)}, expected {(ny, nx)}.")
        self.weights = sky.to(dtype.to_complex())[None, None]
        super().__init__(points, 1.0, method, accuracy, normal)

    def _samples_of(self, x: Tensor, weights: Tensor) -> Tensor:
        return super()._samples_of(x, weights)[:, 0]

    def _image_of(self, y: Tensor, conj: Tensor) -> Tensor:
        return super()._image_of(y[:, None], conj)


class _Segments:
    """The fitted time segments of an operator, in float64 on the CPU."""

    def __init__(
        self, off: OffResonance, image: tuple[int, ...], samples: tuple[int, ...], accuracy: float
    ) -> None:
        if tuple(off.field.shape) != image:
            raise InvdiffError(f"The off-resonance field has shape {tuple(off.field.shape)}, expected {image}.")
        times = off.sample_times(samples)
        self.tau, self.b = off.fit(times, accuracy)
        turns = off.field * self.tau.reshape(-1, *[1] * len(image))
        self.phases = torch.polar(torch.ones_like(turns), -2 * math.pi * turns)
        text = hashlib.sha256(off.field.numpy().tobytes() + times.numpy().tobytes()).hexdigest()
        self.digest = f"{text} {len(self.tau)} segments"


def in_cycles(points: Tensor, image: Sequence[int], units: str) -> Tensor:
    """Return a trajectory in cycles per field of view; refuse what the pixels do not resolve.

    Raises:
        InvdiffError: If the units are unknown, or a frequency is beyond ``N / 2``.
    """
    size = torch.tensor(list(image), dtype=torch.float64)
    if units not in ("cycles", "radians"):
        raise InvdiffError(
            f"Trajectories are in 'cycles' per field of view or 'radians' per pixel, not {units!r}."
        )
    cycles = points if units == "cycles" else points * size / (2 * math.pi)
    reach = cycles.reshape(-1, len(size)).abs().amax(0)
    for axis, (r, n) in enumerate(zip(reach.tolist(), image)):
        if r > n / 2 * (1 + 1e-6):
            raise InvdiffError(
                f"The trajectory reaches {r:.4g} cycles per field of view along {_AXES[len(image)][axis]}, and "
                f"{n} pixels resolve {n / 2:g}; use at least {math.ceil(2 * r)} pixels, or say "
                "trajectory_units='radians' if they are radians per pixel."
            )
    if units == "cycles" and max(image) >= 16 and float(reach.max()) <= math.pi * (1 + 1e-6):
        warnings.warn(
            f"The trajectory reaches {float(reach.max()):.3g} of {max(image) / 2:g} cycles per field of view; "
            "if it is in radians per pixel, say trajectory_units='radians'.",
            stacklevel=3,
        )
    return cycles


def _in_blocks(
    apply: Callable[[Tensor, Tensor], Tensor], x: Tensor, weights: Tensor, out: Space, width: int = _BLOCK
) -> Tensor:
    """Apply a map to blocks of rows that fit the caches of a CPU, with the weights of their cases."""
    if not len(x):
        return out.zeros(0, x.device)
    step = len(x) if x.is_cuda else max(1, width // weights.shape[1])
    if step >= len(x):
        return apply(x, weights)
    whole = torch.empty(len(x), *out.shape, dtype=out.dtype, device=x.device)
    for i in range(0, len(x), step):
        whole[i : i + step] = apply(x[i : i + step], weights if len(weights) == 1 else weights[i : i + step])
    return whole


def _folded(operator: FourierSums) -> tuple[Tensor, Tensor]:
    """Return the image weights with the transform's own, and their conjugate."""
    weights = operator.weights
    folded = weights * (operator._scale * operator._nufft.correction(weights.dtype, weights.device))
    return folded, folded.conj().resolve_conj()


def _segment_factors(operator: FourierSums) -> tuple[Tensor, Tensor]:
    """Return the phases ``(1, segment, *image)`` and the interpolators ``(1, segment, samples)``."""
    assert operator._segments is not None
    like = operator.weights
    return operator._segments.phases[None].to(like), operator._segments.b[None].to(like)


def _multiplier(operator: FourierSums) -> tuple[Tensor]:
    """Return the transform of ``q[d] = s^2 sum_j exp(2 pi i k_j d / N)`` on lags ``-(N - 1) .. N - 1``, real."""
    own, like = operator._nufft, operator.weights
    lags = tuple(fast_even(2 * n - 1) for n in own.shape)
    points = own.points * (torch.tensor(lags, dtype=torch.float64) / torch.tensor(own.shape))
    accuracy = 1e-12 if like.dtype == torch.complex128 else 1e-6
    sums = Nufft(points, lags, accuracy, own.method)
    kernel = sums.adjoint(torch.ones(1, len(points), dtype=torch.complex128))[0]
    multiplier = torch.fft.fftn(torch.fft.ifftshift(kernel)).real * operator._scale**2
    return (multiplier[None].to(like.device, operator.domain.real_dtype),)


def _as_trajectory(value: Any) -> Tensor:
    # as float64 from the start, because a phase of many turns needs the digits
    points = as_parameter(value, "The trajectory")
    if points.is_complex() or points.ndim < 2 or points.shape[-1] not in _AXES or not points.numel():
        raise InvdiffError(
            f"The trajectory has shape {tuple(points.shape)} ({points.dtype}), expected real (..., axes) with 1 "
            "to 3 axes, e.g. (spoke, sample, 2)."
        )
    return points.double().cpu()


def _as_density(value: Any, samples: tuple[int, ...]) -> Tensor:
    density = as_parameter(value, "The sampling density")
    if density.is_complex() or tuple(density.shape) != samples or bool((density < 0).any()):
        raise InvdiffError(
            f"The sampling density has shape {tuple(density.shape)} ({density.dtype}), expected real, not "
            f"negative {samples}."
        )
    return density
