"""Architectures: our own, and clean implementations of those whose published weights the field uses."""

from invdiff.networks.edm_unet import EDMUNet
from invdiff.networks.trained import BACKBONES, TrainedNetwork

__all__ = ["BACKBONES", "EDMUNet", "TrainedNetwork"]
