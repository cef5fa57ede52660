# ---
# jupyter:
#   jupytext:
#     formats: py:percent,ipynb
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Quick start: a multi-coil MRI scan, and how sure the image is
#
# We simulate an accelerated scan of a synthetic head slice that the embedded prior `brain-mri` was not trained on,
# draw images from the posterior, and look at what is certain and what is not. Research software, not a medical
# device.

# %%
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

import invdiff
from invdiff import likelihoods, operators, priors, samplers
from invdiff.mri_simulation import birdcage_maps, poisson_disc_mask
from invdiff.priors.held_out import held_out_slice

plt.rcParams.update({"figure.dpi": 80, "image.cmap": "gray"})

# %% [markdown]
# ## The measurement
#
# Eight coils, one position of k-space in six, and Gaussian noise. The operator knows no noise; the likelihood owns
# the noise level, given per real component in units of the data.

# %%
image = held_out_slice(0)[20:172, 8:144]
coil_maps = birdcage_maps(8, image.shape)
mask = poisson_disc_mask(image.shape, acceleration=6.0, centre=20)
noise_level = float(np.percentile(np.abs(image), 99)) / 60

A = operators.MultiCoilMRI(mask, coil_maps, units="a.u.", spacing={"y": 1.0, "x": 1.0})
x_true = torch.from_numpy(image)[None]
problem = invdiff.Problem.simulate(A, likelihoods.Gaussian(noise_level), x_true, seed=0)
problem

# %% [markdown]
# ## The draws
#
# Three ingredients, one call. Draw number `s` depends on the seed and on `s` alone, not on batch size or device
# memory. Sixteen noise levels keep this notebook quick; the default is forty.

# %%
prior = priors.load("brain-mri")
posterior = invdiff.sample(problem, prior, samplers.DDS(steps=16), draws=12, seed=0)
posterior

# %% [markdown]
# ## Mean, spread, interval
#
# Summaries are labelled arrays, with units and pixel positions. Complex numbers have no order, so the interval is
# that of the magnitude. Twelve draws support an equal-tailed interval of up to 85 %; we take 80 %.

# %%
mean = posterior.mean(magnitude=True).isel(channel=0)
std = posterior.std(magnitude=True).isel(channel=0)
interval = posterior.interval(0.8).isel(channel=0)
width = (interval["upper"] - interval["lower"]).assign_attrs(units="a.u.", long_name="interval width")

figure, axes = plt.subplots(1, 3, figsize=(13, 4.3), layout="constrained")
mean.plot.imshow(ax=axes[0], cmap="gray", vmin=0, vmax=1.2, yincrease=False)
std.plot.imshow(ax=axes[1], cmap="viridis", vmin=0, robust=True, yincrease=False)
width.plot.imshow(ax=axes[2], cmap="viridis", vmin=0, robust=True, yincrease=False)
titles = ["posterior mean of |x|", "standard deviation of |x|", "width of the 80 % interval of |x|"]
for axis, title in zip(axes, titles):
    axis.set_title(title)
    axis.set_aspect("equal")
plt.show()

# %% [markdown]
# The summary figure puts mean, spread, two draws, and (where the data were simulated) truth and error side by
# side.

# %%
posterior.plot()

# %% [markdown]
# ## Are the intervals honest?
#
# The truth is known here, so we can count how often it lies inside. Coverage below the stated level means
# intervals that are too narrow. Inside the head and in the empty background the answer may differ, so both are
# shown.

# %%
truth = abs(posterior.x_true).isel(channel=0)
inside = (truth >= interval["lower"]) & (truth <= interval["upper"])
head = truth > 0.1
print(f"stated level                 {interval.attrs['level']:.2f}")
print(f"coverage, all pixels         {float(posterior.coverage(0.8)):.2f}")
print(f"coverage, inside the head    {float(inside.where(head).mean()):.2f}")

zero_filled = A.adjoint(problem.y)[0, 0].abs().numpy()
images = {"zero-filled": zero_filled, "posterior mean": abs(posterior.mean().isel(channel=0)).values}
for label, value in images.items():
    error = np.linalg.norm(value - truth.values) / np.linalg.norm(truth.values)
    print(f"relative error, {label:15} {error:.3f}")

# %% [markdown]
# Whatever these figures are, they hold for this slice, this prior and this sampler; see the table of samplers in
# the documentation for figures against exact posteriors.
#
# ## Save, reopen
#
# One file holds draws, summaries, data and provenance (sampler and settings, hash of the prior, seed, versions).

# %%
with tempfile.TemporaryDirectory() as folder:
    path = posterior.save(Path(folder) / "scan.nc")
    print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB")
    with invdiff.open_posterior(path) as again:
        print("same mean:", bool((again.mean() == posterior.mean()).all()))
        print("seed:", again.provenance["seed"], " sampler:", again.provenance["sampler"]["name"])
