"""Noise models: Gaussian, correlated and wrapped Gaussian, Poisson, Poisson-Gaussian, Rician; events."""

from __future__ import annotations

from invdiff.likelihoods_counts import Poisson, PoissonGaussian
from invdiff.likelihoods_event import Event, EventProbability, event_probability
from invdiff.likelihoods_gaussian import CorrelatedGaussian, Gaussian, Whitening
from invdiff.likelihoods_magnitude import Rician
from invdiff.likelihoods_wrapped import WrappedGaussian

__all__ = [
    "CorrelatedGaussian",
    "Event",
    "EventProbability",
    "Gaussian",
    "Poisson",
    "PoissonGaussian",
    "Rician",
    "Whitening",
    "WrappedGaussian",
    "event_probability",
]
