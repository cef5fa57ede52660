"""Forward operators: pure, batched maps between spaces, imported by name on first use.

====================  ===========================================================================
``Identity``          ``x -> x``
``Matrix``            dense matrix on flattened elements, shared or one per case
``Mask``              inpainting: zeros where nothing was sampled
``SubsampledFourier`` centred orthonormal FFT over (y, x), then a k-space mask
``MultiCoilMRI``      Cartesian parallel MRI: coil maps, centred FFT, k-space mask
``FramesMRI``         the same of several images: frames in time, slices, diffusion directions
``VolumeMRI``         the same of a volume, with a 3-D FFT
``NonCartesianMRI``   parallel MRI along any trajectory, with off-resonance
``RadioInterferometry``  visibilities of a small field of the sky
``Closures``             closure phases and log closure amplitudes of visibilities
``NavierStokes``         vorticity of a flow on a periodic square after some time
``Blur``              circular convolution with a kernel
``GaussianBlur``      circular convolution with a periodised Gaussian
``Downsampling``      super-resolution: bicubic, average, or blur and decimation
``ParallelBeamCT``    line integrals, parallel rays; limited angle and sparse view are angles
``Grayscale``         colourisation: a weighted mean of the channels
``RandomSensing``     compressed sensing with Gaussian or orthonormal rows
``Hadamard``          single-pixel camera: patterns of +1 and -1
``FourierMagnitude``  phase retrieval on a larger canvas
``CodedDiffraction``  phase retrieval behind known masks
``BeerLambert``       expected counts ``I0 exp(-z)`` behind line integrals ``z``
``FreeSpace``         a wave after free propagation
``InlineHologram``    intensity of a wave behind an object
``Ptychography``      diffraction patterns of a probe at many positions
``FourierPtychography``  images under oblique light from many LEDs
``Clip``, ``Quantise``  sensors of limited range and few levels
``JPEG``              compression, exact or as a smooth surrogate
``FanBeamCT``         line integrals, rays from a point to a flat or curved line
``ConeBeamCT``        line integrals of volumes, on a circle or a helix
``PET``               expected counts of an emitting object, with attenuation
``PlaneWaveUltrasound``  echoes of plane waves on a linear array; ``envelope`` shows images of them
``SpaceVaryingBlur``  product-convolution: a kernel for every window
``NonlinearBlur``     blur in linear light, seen through a camera's response
``SumOf``             data of several unknowns at once, for joint priors
``compose``, ``stack``  the algebra, besides ``@``, ``+``, ``-``, ``*`` and ``.H``
====================  ===========================================================================
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from invdiff.operator import compose, stack
    from invdiff.operators.basic import Identity, Matrix
    from invdiff.operators.beer_lambert import BeerLambert
    from invdiff.operators.blur import Blur, GaussianBlur
    from invdiff.operators.closures import Closures
    from invdiff.operators.colour import Grayscale
    from invdiff.operators.components import SumOf
    from invdiff.operators.ct import ParallelBeamCT
    from invdiff.operators.ct_cone import ConeBeamCT
    from invdiff.operators.ct_fan import FanBeamCT
    from invdiff.operators.fourier import SubsampledFourier
    from invdiff.operators.jpeg import JPEG
    from invdiff.operators.mask import Mask
    from invdiff.operators.mri import MultiCoilMRI
    from invdiff.operators.mri_frames import FramesMRI
    from invdiff.operators.mri_volume import VolumeMRI
    from invdiff.operators.navier_stokes import NavierStokes
    from invdiff.operators.noncartesian import NonCartesianMRI, RadioInterferometry
    from invdiff.operators.off_resonance import OffResonance
    from invdiff.operators.pet import PET
    from invdiff.operators.phase import CodedDiffraction, FourierMagnitude
    from invdiff.operators.pointwise import Clip, Quantise
    from invdiff.operators.propagation import FreeSpace, InlineHologram
    from invdiff.operators.ptychography import FourierPtychography, Ptychography, circular_pupil
    from invdiff.operators.sensing import Hadamard, RandomSensing
    from invdiff.operators.superresolution import Downsampling
    from invdiff.operators.ultrasound import PlaneWaveUltrasound, envelope
    from invdiff.operators.varying import NonlinearBlur, SpaceVaryingBlur

_HOMES = {
    "BeerLambert": "invdiff.operators.beer_lambert",
    "Blur": "invdiff.operators.blur",
    "Clip": "invdiff.operators.pointwise",
    "Closures": "invdiff.operators.closures",
    "CodedDiffraction": "invdiff.operators.phase",
    "ConeBeamCT": "invdiff.operators.ct_cone",
    "Downsampling": "invdiff.operators.superresolution",
    "FanBeamCT": "invdiff.operators.ct_fan",
    "FourierMagnitude": "invdiff.operators.phase",
    "FourierPtychography": "invdiff.operators.ptychography",
    "FramesMRI": "invdiff.operators.mri_frames",
    "FreeSpace": "invdiff.operators.propagation",
    "GaussianBlur": "invdiff.operators.blur",
    "Grayscale": "invdiff.operators.colour",
    "Hadamard": "invdiff.operators.sensing",
    "Identity": "invdiff.operators.basic",
    "InlineHologram": "invdiff.operators.propagation",
    "JPEG": "invdiff.operators.jpeg",
    "Mask": "invdiff.operators.mask",
    "Matrix": "invdiff.operators.basic",
    "MultiCoilMRI": "invdiff.operators.mri",
    "NavierStokes": "invdiff.operators.navier_stokes",
    "NonCartesianMRI": "invdiff.operators.noncartesian",
    "NonlinearBlur": "invdiff.operators.varying",
    "OffResonance": "invdiff.operators.off_resonance",
    "PET": "invdiff.operators.pet",
    "ParallelBeamCT": "invdiff.operators.ct",
    "PlaneWaveUltrasound": "invdiff.operators.ultrasound",
    "Ptychography": "invdiff.operators.ptychography",
    "Quantise": "invdiff.operators.pointwise",
    "RadioInterferometry": "invdiff.operators.noncartesian",
    "RandomSensing": "invdiff.operators.sensing",
    "SpaceVaryingBlur": "invdiff.operators.varying",
    "SubsampledFourier": "invdiff.operators.fourier",
    "SumOf": "invdiff.operators.components",
    "VolumeMRI": "invdiff.operators.mri_volume",
    "circular_pupil": "invdiff.operators.ptychography",
    "compose": "invdiff.operator",
    "envelope": "invdiff.operators.ultrasound",
    "stack": "invdiff.operator",
}

__all__ = [
    "JPEG",
    "PET",
    "BeerLambert",
    "Blur",
    "Clip",
    "Closures",
    "CodedDiffraction",
    "ConeBeamCT",
    "Downsampling",
    "FanBeamCT",
    "FourierMagnitude",
    "FourierPtychography",
    "FramesMRI",
    "FreeSpace",
    "GaussianBlur",
    "Grayscale",
    "Hadamard",
    "Identity",
    "InlineHologram",
    "Mask",
    "Matrix",
    "MultiCoilMRI",
    "NavierStokes",
    "NonCartesianMRI",
    "NonlinearBlur",
    "OffResonance",
    "ParallelBeamCT",
    "PlaneWaveUltrasound",
    "Ptychography",
    "Quantise",
    "RadioInterferometry",
    "RandomSensing",
    "SpaceVaryingBlur",
    "SubsampledFourier",
    "SumOf",
    "VolumeMRI",
    "circular_pupil",
    "compose",
    "envelope",
    "stack",
]


_MODULES = ("kernels", "masks")


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name in _MODULES:
        return importlib.import_module(f"invdiff.operators.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """List the public names without importing them."""
    return sorted(__all__)
