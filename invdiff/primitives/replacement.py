"""Replacing what the data measure in a noisy image by the data, noised to the level of the image."""

from __future__ import annotations

import torch
from torch import Tensor

from invdiff.primitives.solve import gaussian_prox
from invdiff.problem import Problem
from invdiff.rng import Streams


def replace_measured(
    problem: Problem, x: Tensor, t: float, z: Tensor, rng: Streams, hard: bool = False, max_iter: int = 30
) -> Tensor:
    """Return ``x`` at noise level ``t`` with its measured part taken from the data.

    ``hard``: ``x + A^+ (y + t A z - A x)``, which gives the measured part the data's own noise on top of
    ``t z``. Else ``x + t^2 A^H (t^2 A A^H + sigma^2 I)^-1 (y + t A z + sigma n - A x)``: data noisier than ``t``
    count little, and the noise in the result keeps the variance ``t^2`` in every direction if that in ``x`` has
    it. The two are one where ``sigma`` is 0.

    Args:
        problem: Linear problem with a quadratic surrogate likelihood.
        x: Rows at level ``t``, ``(B, *domain)``.
        t: Noise level; 0 leaves ``x`` alone unless ``hard`` or noiseless.
        z: Standard normal numbers shaped as ``x``.
        rng: Streams of the rows.
        hard: Whether the data are taken as exact.
        max_iter: Most conjugate-gradient iterations where there is no closed form.
    """
    y = problem.y + t * problem.operator(z)
    if hard:
        return gaussian_prox(problem, x, torch.inf, y, max_iter)
    y = y + problem.sigma(x) * rng.normal(problem.y)
    return gaussian_prox(problem, x, max(t, 1e-8) ** 2, y, max_iter)  # 1e-8: t = 0 with sigma = 0 is the hard case
