"""The synthesisers of training images by name, and what each says of itself on a prior's card."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["SYNTHESISERS", "Synthesiser"]


@dataclass(frozen=True)
class Synthesiser:
    """One source of synthetic images.

    Args:
        module: Home of ``function`` and of ``describe()``, which gives facts for the card.
        function: ``(seed, held_out=) -> image``: real ``(ny, nx)`` or ``(channels, ny, nx)``, or complex
            ``(ny, nx)``.
        channels: Real channels of an image; 2 for complex ones.
        limits: Sentences for the card: what the prior is not good for.
        classes: Names of the classes of its images, where they have some.
        label: ``(seed, held_out=) -> class``, counted from 0.
    """

    module: str
    function: str
    channels: int
    limits: tuple[str, ...]
    classes: tuple[str, ...] = ()
    label: str = ""

    def image(self, seed: int, held_out: bool = False) -> NDArray[Any]:
        """Return one image, ``(channels, ny, nx)``."""
        draw: Callable[..., NDArray[Any]] = getattr(import_module(self.module), self.function)
        x = draw(seed, held_out=held_out)
        return np.stack([x.real, x.imag]) if x.dtype.kind == "c" else x.reshape(self.channels, *x.shape[-2:])

    def class_of(self, seed: int, held_out: bool = False) -> int:
        """Return the class of the image of this seed, an index into ``classes``."""
        return getattr(import_module(self.module), self.label)(seed, held_out=held_out)

    def describe(self) -> dict[str, Any]:
        """Return facts for a card."""
        return import_module(self.module).describe()


SYNTHESISERS = {
    "brain": Synthesiser(
        "invdiff.training.synthetic_brain",
        "brain_slice",
        2,
        (
            "Research only; not a medical device.",
            "Trained on synthetic heads: anatomy of one template, few lesions, no implants, no motion.",
            "Complex two-dimensional slices of heads, mostly axial and T1-like, 0.8 to 2.2 mm pixels.",
        ),
    ),
    "ct": Synthesiser(
        "invdiff.training.synthetic_ct",
        "attenuation_map",
        1,
        (
            "Research only; not a medical device.",
            "Trained on drawn shapes alone: sections of bodies, teeth and bones, and made things, in air.",
            "Attenuation that is not negative, 160 to 480 pixels across; no artefacts of reconstruction.",
            "Learned from crops of 64 to 128 pixels: right locally, and draws without data are no anatomy.",
        ),
    ),
    "black-hole": Synthesiser(
        "invdiff.training.synthetic_black_hole",
        "source_image",
        1,
        (
            "Trained on drawn sources alone: rings, crescents, accretion flows, discs, blobs and jets.",
            "Compact sources of one brightness scale, well inside a field of about 64 pixels.",
        ),
    ),
    "digits": Synthesiser(
        "invdiff.training.synthetic_digits",
        "digit_image",
        1,
        ("For teaching: one upright digit from 0 to 9 on 32 x 32 pixels, drawn from strokes.",),
        tuple("0123456789"),
        "digit_of",
    ),
    "vorticity": Synthesiser(
        "invdiff.training.synthetic_vorticity",
        "vorticity_field",
        1,
        (
            "Trained on simulated flows alone: decaying and forced turbulence on a periodic square of 128 pixels.",
            "Viscosities from 1/500 to 1/80 at a side of 2 pi; the network does not know that the square repeats.",
        ),
    ),
    "natural": Synthesiser(
        "invdiff.training.natural_images",
        "natural_image",
        3,
        (
            "Trained on crops of thirteen photographs and dead leaves: edges, textures and shading, no objects.",
            "A denoiser for images of any content; its draws without data are blotches, not scenes.",
        ),
    ),
}
