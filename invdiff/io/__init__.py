"""Reading and writing of measurements, weights and posteriors."""
