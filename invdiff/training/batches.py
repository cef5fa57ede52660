"""Training batches: random crops of images, augmented, with noise levels and noise, and classes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from invdiff.training.config import TrainConfig


class Batch(NamedTuple):
    """Clean crops ``(B, C, n, n)``, sigma ``(B,)`` and unit noise, all float32 on the CPU.

    ``label``: class of every image, ``(B,)`` int64, of which the number of classes means none; None where the
    prior has no classes.
    """

    clean: Tensor
    sigma: Tensor
    noise: Tensor
    label: Tensor | None = None


class Batches:
    """Batches of crops; the batch of step n depends on (seed, n) only.

    Args:
        images: Training images, ``(C, ny, nx)``.
        config: Settings.
        labels: Class of every image, for a prior with classes.
        classes: Number of classes.
    """

    def __init__(
        self,
        images: list[NDArray[Any]],
        config: TrainConfig,
        labels: Sequence[int] | None = None,
        classes: int = 0,
    ) -> None:
        self.images, self.config, self.classes = images, config, classes
        self.labels = None if labels is None else np.asarray(labels, np.int64)

    def batch(self, step: int) -> Batch:
        """Return the batch of a step."""
        c = self.config
        rng = np.random.default_rng([c.seed, 1, step])
        late = step >= c.steps * (1 - c.late_fraction)
        count, size = (c.late_batch, c.late_crop) if late else (c.batch, c.crop)
        crops = np.zeros((count, c.channels, size, size), np.float32)
        chosen = np.zeros(count, np.int64)
        for n in range(count):
            chosen[n] = rng.integers(len(self.images))
            crops[n] = self._crop(rng, self.images[chosen[n]], size)
        normal = c.p_mean + c.p_std * rng.standard_normal(count)
        low, high = math.log(c.sigma_min), math.log(c.sigma_max)
        uniform = rng.uniform(low, high, count)
        log_sigma = np.where(rng.random(count) < c.uniform_fraction, uniform, normal).clip(low, high)
        noise = rng.standard_normal(crops.shape, dtype=np.float32)
        sigma = np.exp(log_sigma).astype(np.float32)
        label = None
        if self.labels is not None:
            # Numbers of their own, so that a prior with classes sees the crops and noise of one without.
            hidden = np.random.default_rng([c.seed, 3, step]).random(count) < c.condition_dropout
            label = torch.from_numpy(np.where(hidden, self.classes, self.labels[chosen]))
        return Batch(torch.from_numpy(crops), torch.from_numpy(sigma), torch.from_numpy(noise), label)

    def _crop(self, rng: np.random.Generator, image: NDArray[Any], size: int) -> NDArray[np.float32]:
        """Return one crop ``(C, size, size)``, padded with zeros where the image is smaller."""
        c = self.config
        ny, nx = image.shape[1:]
        y, x = int(rng.integers(max(ny - size, 0) + 1)), int(rng.integers(max(nx - size, 0) + 1))
        part = image[:, y : y + size, x : x + size].astype(np.float32)
        part *= np.float32(1 + c.scale_jitter * rng.uniform(-1, 1))
        if c.augment:
            part = _augment(rng, part)
        out = np.zeros((c.channels, size, size), np.float32)
        top, left = (size - part.shape[1]) // 2, (size - part.shape[2]) // 2
        out[:, top : top + part.shape[1], left : left + part.shape[2]] = part
        return out


def _augment(rng: np.random.Generator, part: NDArray[np.float32]) -> NDArray[np.float32]:
    """Random flips and transposition; for complex images also a random phase and conjugation."""
    if rng.random() < 0.5:
        part = part[:, :, ::-1]
    if rng.random() < 0.5:
        part = part[:, ::-1]
    if rng.random() < 0.5:
        part = part.transpose(0, 2, 1)
    if len(part) != 2:
        return part
    angle = rng.uniform(-math.pi, math.pi)
    re, im = part[0], part[1] if rng.random() < 0.5 else -part[1]
    return np.stack([re * math.cos(angle) - im * math.sin(angle), re * math.sin(angle) + im * math.cos(angle)])
