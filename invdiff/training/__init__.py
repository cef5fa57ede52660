"""Training of diffusion priors."""
