"""Latent problems with known posteriors: a decoder that is linear, though no sampler is told so, and a bent one.

With ``x = W z + b``, ``z`` Gaussian and ``y = A x + noise`` the posterior of ``z`` is Gaussian. Its codec is a
`Latent` like any other: samplers take the path of nonlinear decoders, and are graded on the latents of what they
stored as images. The bent decoder has two latents, whose posterior is summed on a grid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from invdiff import anchors, likelihoods, operators, priors, reference
from invdiff.codec_latent import Latent
from invdiff.errors import InvdiffError
from invdiff.operator import LinearOperator
from invdiff.prior import Prior
from invdiff.priors.exact import ExactDenoiser
from invdiff.problem import Problem
from invdiff.reference import ExactPosterior
from invdiff.spaces import Space

IMAGE = Space((1, 16, 16), torch.float64)
LATENT = (2, 8, 8)


def linear_decoder(
    columns: Literal["orthogonal", "skewed"] = "orthogonal",
    operator: Literal["mask", "blur"] = "mask",
    seed: int = 0,
) -> tuple[Problem, Prior]:
    """128 latents behind 256 pixels, of which 30 % (``mask``) or a blurred whole are measured with sigma 0.05.

    The latents are two stationary Gaussian fields of unit variance and a correlation of 2; pixels have unit
    variance before the range ``(-1, 1)`` is mapped to ``(0, 1)``, sigma too.

    Args:
        columns: Of ``W``: ``orthogonal`` and of one length, or ``skewed``, with singular values from 0.4 to 1.6
            times their root mean square.
        operator: ``mask``, or ``blur``, a circular Gaussian of standard deviation 1 pixel.
        seed: Of decoder, mask, truth and noise.

    Returns:
        Problem (float64, with ``x_true``) and prior, whose encoder is the pseudo-inverse of ``W``.
    """
    if columns not in ("orthogonal", "skewed") or operator not in ("mask", "blur"):
        raise InvdiffError(
            f"Linear decoders are orthogonal or skewed, behind a mask or a blur; not {columns!r}, {operator!r}."
        )
    rng = np.random.default_rng([seed, 2])
    m, n = math.prod(LATENT), IMAGE.size
    u, _, vt = np.linalg.svd(rng.standard_normal((n, m)), full_matrices=False)
    s = np.ones(m) if columns == "orthogonal" else np.geomspace(0.25, 1.0, m)
    weight = torch.from_numpy((u * s * math.sqrt(n / (s**2).sum())) @ vt)
    codec = Latent(
        _Dense(torch.linalg.pinv(weight), LATENT),
        _Dense(weight, IMAGE.shape),
        IMAGE,
        scale=1.0,
        network_range=(-1.0, 1.0),
        image_range=(0.0, 1.0),
    )
    field = priors.StationaryGaussian(LATENT, correlation_length=2.0)
    prior = Prior(field.denoiser, codec, {"name": f"{columns} decoder", "licence": "BSD-3-Clause"})
    a: LinearOperator = operators.GaussianBlur(1.0, IMAGE)
    if operator == "mask":
        mask = torch.zeros(n, dtype=torch.float64)
        mask[torch.from_numpy(rng.permutation(n)[: round(0.3 * n)])] = 1
        a = operators.Mask(mask.reshape(IMAGE.shape), IMAGE)
    assert isinstance(field.denoiser, ExactDenoiser)
    truth = codec.decode(field.denoiser.sample(1, int(rng.integers(1 << 31))))
    meta = {"title": f"{columns} decoder, {operator}"}
    return Problem.simulate(a, likelihoods.Gaussian(0.025), truth, seed, meta), prior


def latent_posterior(problem: Problem, prior: Prior) -> ExactPosterior:
    """Return the exact posterior of the latents, where the decoder is linear after all.

    Args:
        problem: Linear operator between real spaces, Gaussian noise of one level.
        prior: In closed form, with a codec that decodes to ``W z + b``.

    Raises:
        InvdiffError: If the decoder bends, or the problem is another.
    """
    codec, a, law = prior.codec, problem.operator, problem.likelihood
    if codec is None or not isinstance(a, LinearOperator) or a.range.is_complex:
        raise InvdiffError("The exact latent posterior needs a codec and a linear operator between real spaces.")
    if not isinstance(law, likelihoods.Gaussian) or law.sigma.numel() != 1:
        raise InvdiffError(f"The exact latent posterior needs Gaussian noise of one level, not {law!r}.")
    space = codec.prior
    zero = codec.decode(space.zeros(1))
    unit = torch.eye(space.size, dtype=space.dtype).reshape(-1, *space.shape)
    columns = codec.decode(unit) - zero
    z = space.randn(1)
    flat = (z.flatten(1) @ columns.flatten(1)).reshape(zero.shape)
    if not torch.allclose(codec.decode(z), flat + zero, rtol=1e-6, atol=1e-9):
        raise InvdiffError("The decoder is not linear, and the posterior of its latents has no closed form.")
    matrix = operators.Matrix(a(columns).flatten(1).T.contiguous(), space)
    return reference.posterior(
        Problem(matrix, law, (problem.y - a(zero)).flatten(1)), Prior(prior.denoiser, card=prior.card)
    )


def grade(draws: Tensor, prior: Prior, exact: ExactPosterior, seed: int = 0) -> dict[str, float]:
    """Grade images ``(n, *image)`` by their latents; the figures of `anchors.grade`, and ``off_range``.

    ``off_range`` is the largest distance of a draw from what it decodes to when it is encoded, over its length: 0
    where draws are images of latents.
    """
    assert prior.codec is not None
    z = prior.codec.encode(draws)
    off = (prior.codec.decode(z) - draws).flatten(1).norm(dim=1) / draws.flatten(1).norm(dim=1)
    return {**anchors.grade(z, exact, seed), "off_range": float(off.max())}


@dataclass(frozen=True)
class GridPosterior:
    """A posterior of two latents on a fine grid.

    Attributes:
        points: Latents, ``(n, 2)``.
        weights: Their masses, ``(n,)``, which add up to 1.
    """

    points: Tensor
    weights: Tensor

    @property
    def mean(self) -> Tensor:
        """``E[z | y]``, ``(2,)``."""
        return self.weights @ self.points

    @property
    def std(self) -> Tensor:
        """Standard deviations, ``(2,)``."""
        return (self.weights @ (self.points - self.mean) ** 2).sqrt()

    def sample(self, n: int, seed: int = 0) -> Tensor:
        """Return independent draws, ``(n, 2)``."""
        generator = torch.Generator().manual_seed(seed)
        return self.points[torch.multinomial(self.weights, n, replacement=True, generator=generator)]

    def grade(self, z: Tensor, seed: int = 0) -> dict[str, float]:
        """Return ``mean_error``, ``std_ratio`` and ``sliced_wasserstein`` of draws ``(n, 2)``."""
        fresh = self.sample(len(z), seed + 7919)
        return {
            "mean_error": float((((z.mean(0) - self.mean) / self.std) ** 2).mean().sqrt()),
            "std_ratio": float((z.std(0) / self.std).mean()),
            "sliced_wasserstein": anchors.sliced_wasserstein(z, fresh, seed=seed),
        }


def bent_decoder(seed: int = 0, bend: float = 0.6) -> tuple[Problem, Prior]:
    """Two latents behind ``x = (z1, z2 + bend (z1^2 - 1), tanh(z1 + z2))``, the second measured with sigma 0.3.

    The latents are standard normal and their posterior is a banana; the encoder is exact.
    """
    image = Space((3,), torch.float64)

    def decoder(z: Tensor) -> Tensor:
        z1, z2 = z[:, 0], z[:, 1]
        return torch.stack([z1, z2 + bend * (z1**2 - 1), (z1 + z2).tanh()], 1)

    def encoder(x: Tensor) -> Tensor:
        return torch.stack([x[:, 0], x[:, 1] - bend * (x[:, 0] ** 2 - 1)], 1)

    codec = Latent(encoder, decoder, image, scale=1.0)
    normal = priors.Gaussian(torch.zeros(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64), codec.prior)
    prior = Prior(normal.denoiser, codec, {"name": "bent decoder", "licence": "BSD-3-Clause"})
    a = operators.Matrix(torch.tensor([[0.0, 1.0, 0.0]], dtype=torch.float64), image)
    truth = codec.decode(codec.prior.randn(1, seed))
    return Problem.simulate(a, likelihoods.Gaussian(0.3), truth, seed, {"title": "bent decoder"}), prior


def grid_posterior(problem: Problem, prior: Prior, reach: float = 6.0, side: int = 601) -> GridPosterior:
    """Return the posterior of two standard normal latents, whatever the decoder, on ``[-reach, reach]^2``."""
    if prior.codec is None or prior.codec.prior.shape != (2,):
        raise InvdiffError("A grid holds the posterior of two latents, no more.")
    axis = torch.linspace(-reach, reach, side, dtype=torch.float64)
    z = torch.cartesian_prod(axis, axis)
    rows = problem.rows(torch.zeros(len(z), dtype=torch.long))
    log = rows.log_likelihood(prior.codec.decode(z)) - 0.5 * (z**2).sum(1)
    return GridPosterior(z, torch.softmax(log, 0))


class _Dense(nn.Module):
    """A matrix over flattened elements."""

    def __init__(self, weight: Tensor, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.weight, self.shape = nn.Parameter(weight), shape

    def forward(self, x: Tensor) -> Tensor:
        """Return ``W x``."""
        return (x.flatten(1) @ self.weight.T).reshape(-1, *self.shape)
