"""What samplers share: transitions, Gaussian solves, Markov chain moves, particles, Kalman increments, Adam."""

from invdiff.primitives.ensemble import kalman_increment
from invdiff.primitives.event import event_update
from invdiff.primitives.mcmc import hmc, langevin, mala, posterior_score
from invdiff.primitives.optim import adam
from invdiff.primitives.smc import (
    conditioned,
    ess,
    groups,
    log_normal,
    normalise,
    particles,
    resample,
    select,
    shared,
)
from invdiff.primitives.solve import cg, gaussian_draw, gaussian_prox
from invdiff.primitives.transitions import ddim, extrapolate, log_path_ratio, mix_noise, probability_flow, renoise
from invdiff.primitives.tweedie import guidance_length, nonlinear_rest, tweedie_update, tweedie_weights

__all__ = [
    "adam",
    "cg",
    "conditioned",
    "ddim",
    "ess",
    "event_update",
    "extrapolate",
    "gaussian_draw",
    "gaussian_prox",
    "groups",
    "guidance_length",
    "hmc",
    "kalman_increment",
    "langevin",
    "log_normal",
    "log_path_ratio",
    "mala",
    "mix_noise",
    "nonlinear_rest",
    "normalise",
    "particles",
    "posterior_score",
    "probability_flow",
    "renoise",
    "resample",
    "select",
    "shared",
    "tweedie_update",
    "tweedie_weights",
]
