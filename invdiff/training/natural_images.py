"""Crops of the photographs that ship inside scikit-image, and dead leaves where few photographs are not enough.

Each image is a crop of a photograph, scaled down by up to two, in a random order of colours and with a random
gamma, or, once in four, dead leaves (:mod:`invdiff.priors.dead_leaves`). The photographs are few, so that whole
ones are set aside for validation.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["natural_image"]

Array = NDArray[np.float32]
_TRAINING_KEY, _HELD_OUT_KEY = 0x6E617475, 0x6E617468
#: Photographs of scikit-image (``skimage.data``) that training sees, and those that it never does.
TRAINING = (
    "astronaut",
    "brick",
    "cat",
    "coins",
    "grass",
    "gravel",
    "hubble_deep_field",
    "immunohistochemistry",
    "moon",
    "motorcycle",
    "page",
    "retina",
    "rocket",
)
HELD_OUT = ("camera", "coffee")
#: Share of dead leaves.
LEAVES = 0.25


def natural_image(seed: int, size: int = 96, *, held_out: bool = False) -> Array:
    """Return one image in three colours, red, green, blue where it is not permuted.

    Args:
        seed: Non-negative integer; the same seed gives the same image.
        size: Pixels in both directions, at least 16.
        held_out: A plain crop of a photograph that training never sees.

    Returns:
        float32 ``(3, size, size)``; a white pixel of the photograph is 1, a black one 0.

    Raises:
        ValueError: If the seed or the size is out of range, or scikit-image is not installed.
    """
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise ValueError(f"seed must be a non-negative integer; got {seed!r}.")
    if size < 16:
        raise ValueError(f"size must be at least 16 pixels; got {size}.")
    rng = np.random.default_rng([_HELD_OUT_KEY if held_out else _TRAINING_KEY, int(seed)])
    if held_out:
        return _crop(_photograph(HELD_OUT[seed % len(HELD_OUT)]), size, rng)
    if rng.random() < LEAVES:
        from invdiff.priors.dead_leaves import dead_leaves

        return np.asarray(dead_leaves(1, 3, size, seed).numpy()[0], np.float32)
    sizes = np.array([_photograph(name)[0].size for name in TRAINING], float)
    name = TRAINING[rng.choice(len(TRAINING), p=sizes**0.5 / (sizes**0.5).sum())]
    image = _photograph(name)
    image = _smaller(image, rng.uniform(1, max(1, min(2, min(image.shape[1:]) / size))))
    image = _crop(image, size, rng)[rng.permutation(3)]
    return np.asarray(image ** np.exp(rng.normal(0, 0.2)), np.float32)


def describe() -> dict[str, Any]:
    """Return facts for a card."""
    return {
        "function": "natural_image",
        "photographs": list(TRAINING),
        "held_out": list(HELD_OUT),
        "source": "skimage.data (scikit-image), whose documentation names author and licence of each",
        "share_of_dead_leaves": LEAVES,
    }


@functools.cache
def _photograph(name: str) -> Array:
    """Return a photograph ``(3, ny, nx)`` in [0, 1]."""
    try:
        from skimage import data
    except ImportError:
        raise ValueError("Natural images need scikit-image: pip install 'invdiff[train]'.") from None
    image = data.stereo_motorcycle()[0] if name == "motorcycle" else getattr(data, name)()
    image = image[..., None].repeat(3, -1) if image.ndim == 2 else image[..., :3]
    return np.asarray(image.transpose(2, 0, 1), np.float32) / np.float32(255)


def _smaller(image: Array, factor: float) -> Array:
    """Scale down, with a Gaussian before it as wide as a pixel afterwards asks for."""
    if factor < 1.05:
        return image
    from scipy import ndimage

    smooth = ndimage.gaussian_filter(image, (0, 0.5 * factor**0.5, 0.5 * factor**0.5))
    return np.asarray(ndimage.zoom(smooth, (1, 1 / factor, 1 / factor), order=1).clip(0, 1), np.float32)


def _crop(image: Array, size: int, rng: np.random.Generator) -> Array:
    y, x = (int(rng.integers(max(n - size, 0) + 1)) for n in image.shape[1:])
    return image[:, y : y + size, x : x + size]
