"""What samplers share: transitions between noise levels, Gaussian solves, Markov chain moves, Adam."""

from invdiff.primitives.mcmc import hmc, langevin
from invdiff.primitives.optim import adam
from invdiff.primitives.solve import cg, gaussian_draw, gaussian_prox
from invdiff.primitives.transitions import ddim, extrapolate, mix_noise, probability_flow, renoise

__all__ = [
    "adam",
    "cg",
    "ddim",
    "extrapolate",
    "gaussian_draw",
    "gaussian_prox",
    "hmc",
    "langevin",
    "mix_noise",
    "probability_flow",
    "renoise",
]
