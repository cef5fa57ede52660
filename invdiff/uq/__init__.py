"""Uncertainty quantification."""
