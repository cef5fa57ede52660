"""Small exact problems and priors for the conformance suites."""

import torch

from invdiff import likelihoods
from invdiff.codec import ComplexChannels, Scale
from invdiff.operator import SVD, LinearOperator, Operator
from invdiff.prior import Denoiser, Prior
from invdiff.problem import Problem
from invdiff.spaces import Space

SPACE = Space((1, 6, 5), torch.float64)


class Keep(LinearOperator):
    """Keep some pixels (zeros elsewhere), with a weight; it has a decomposition but no closed-form prox."""

    provides = LinearOperator.provides | {"svd", "pinv"}

    def __init__(self, space=SPACE, seed=0, share=0.5, weight=1.0):
        generator = torch.Generator().manual_seed(seed)
        self.domain = self.range = space
        self.mask = (torch.rand(space.shape, generator=generator) < share).to(space.real_dtype) * weight

    def _forward(self, x):
        return x * self.mask

    def _adjoint(self, y):
        return y * self.mask

    def svd(self):
        def same(x):
            return x

        def keep(x):
            return x * (self.mask > 0)

        return SVD(self.mask[None], vh=same, v=same, uh=keep, u=keep)

    def pinv(self, y):
        return torch.where(self.mask > 0, y / self.mask.clamp_min(1e-30), torch.zeros_like(y))


class Square(Operator):
    """A nonlinear operator: ``x + x^2 / 10``."""

    def __init__(self, space=SPACE):
        self.domain = self.range = space

    def _forward(self, x):
        return x + 0.1 * x * x


class BlackBox(Operator):
    """An operator without derivatives."""

    provides = frozenset()

    def __init__(self, space=SPACE):
        self.domain = self.range = space

    def _forward(self, x):
        return torch.from_numpy(x.detach().numpy().copy())


class NormalDenoiser(Denoiser):
    """The exact denoiser of a standard normal prior."""

    def __init__(self, space=SPACE, differentiable=2):
        self.space, self.channels, self.dtype = space, space.shape[0], space.dtype
        self.sigma_min, self.sigma_max, self.differentiable = 1e-3, 50.0, differentiable

    def __call__(self, x, sigma, cond=None):
        return x / (1 + sigma.reshape(-1, *([1] * (x.ndim - 1))) ** 2)


def normal_prior(space=SPACE, **options):
    return Prior(NormalDenoiser(space, **options), card={"name": "normal"})


def scaled_prior(image, scale=None):
    """A standard normal prior on two channels for complex images of any scale."""
    channels = ComplexChannels(image).prior
    return Prior(
        NormalDenoiser(channels),
        card={"name": "normal-complex"},
        make_codec=lambda space, s: Scale(space, s) @ ComplexChannels(space),
        scale=scale,
    )


def toy_problem(cases=2, sigma=0.1, seed=3, space=SPACE, operator=None):
    operator = operator or Keep(space)
    return Problem.simulate(operator, likelihoods.Gaussian(sigma), space.randn(cases, seed), seed=seed)
