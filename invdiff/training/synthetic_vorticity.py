"""Synthetic vorticity of two-dimensional turbulence, by the library's own flow operator.

Random waves with energy at large scales evolve on a periodic square (`invdiff.operators.NavierStokes`) for a
random time under a random viscosity, at times with a steady shear forcing, and end as vortices and thin sheets
between them. No measured field enters.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["vorticity_field"]

_TRAINING_KEY, _HELD_OUT_KEY = 0x766F7274, 0x766F6865


def vorticity_field(seed: int, size: int = 128, *, held_out: bool = False) -> NDArray[np.float32]:
    """Draw one field; see the module docstring.

    Args:
        seed: Non-negative integer; the same seed gives the same field.
        size: Pixels in both directions, at least 16.
        held_out: Draw from the stream of held-out fields, which training never sees.

    Returns:
        float32 ``(size, size)``, of mean zero; the 99th percentile of its magnitude is 1.
    """
    from invdiff.operators import NavierStokes

    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise ValueError(f"seed must be a non-negative integer; got {seed!r}.")
    if size < 16:
        raise ValueError(f"size must be at least 16 pixels; got {size}.")
    rng = np.random.default_rng([int(seed), _HELD_OUT_KEY if held_out else _TRAINING_KEY])
    k = np.fft.fftfreq(size, 1 / size)
    r = np.hypot(k[:, None], k)
    spectrum = (r**2 + rng.uniform(2, 9) ** 2) ** (-rng.uniform(1.5, 2.5) / 2 - 0.5) * (r > 0)
    start = np.fft.ifft2(np.fft.fft2(rng.standard_normal((size, size))) * spectrum).real
    start *= rng.uniform(2, 5) / start.std()
    y = np.arange(size) * (2 * math.pi / size)
    force = -rng.uniform(0, 4) * (rng.random() < 0.5) * np.cos(rng.integers(1, 6) * y)[:, None]
    time, viscosity = rng.uniform(0.5, 4), math.exp(rng.uniform(math.log(1 / 500), math.log(1 / 80)))
    flow = NavierStokes((1, size, size), time, viscosity, force, courant=0.8, segments=8)
    with torch.no_grad():
        out = flow(torch.from_numpy(start[None, None]).float())[0, 0].numpy()
    out = out - out.mean()
    return np.asarray(out / max(float(np.percentile(np.abs(out), 99)), 1e-9), np.float32)


def describe() -> dict[str, Any]:
    """Facts about the synthesiser for a prior's card."""
    return {"generator": "invdiff.training.synthetic_vorticity.vorticity_field", "measured_images": "none"}
