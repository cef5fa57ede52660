"""A training run of seconds on images of white noise."""

from pathlib import Path
from typing import Any

import numpy as np

from invdiff.training.config import TrainConfig


def recipe(folder: Path, size: int, **settings: Any) -> TrainConfig:
    """Write twelve images to ``x.npy`` in a folder, and return settings for them."""
    rng = np.random.default_rng(0)
    np.save(folder / "x.npy", rng.standard_normal((12, size, size)).astype(np.float32))
    tiny: dict[str, Any] = {
        "data": str(folder / "x.npy"),
        "output": str(folder / "out"),
        "name": "tiny",
        "channels": 1,
        "normalise": "none",
        "widths": (8, 12),
        "blocks": 1,
        "embedding": 16,
        "sigma_data": 1.0,
        "crop": 16,
        "late_crop": 16,
        "warmup": 2,
        "ema": 0.9,
        "validation_images": 1,
        "device": "cpu",
        "threads": 1,
    }
    return TrainConfig(**(tiny | settings))
