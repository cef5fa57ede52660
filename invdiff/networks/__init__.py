"""Architectures: our own, and clean implementations of those whose published weights the field uses."""

from invdiff.networks.edm_unet import EDMUNet

__all__ = ["EDMUNet"]
