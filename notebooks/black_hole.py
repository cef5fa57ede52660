# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # The size of a black hole
#
# In April 2017 eight telescopes from Hawaii to Spain looked at the centre of the galaxy M87, and saw a ring.
# Their clocks and amplifiers are known badly, so this notebook uses only what does not depend on them: phases
# summed around triangles of stations, and ratios of amplitudes around quadrangles. A diffusion prior of compact
# radio sources (rings, discs, jets, blobs: all drawn, none measured) turns them into images that fit, and the
# spread of these images says how well the size is known.
#
# Set `INVDIFF_UVFITS` to the path of an observation (the one of M87 is public) to use it; without it, a ring of
# 42 micro-arcseconds is observed by simulated telescopes at the same places. It runs for about a minute.

# %%
import os

import matplotlib.pyplot as plt
import numpy as np

import invdiff
from invdiff import priors, samplers
from invdiff.io.uvfits import read_uvfits
from invdiff.problems import black_hole
from invdiff.problems.event_horizon import event_horizon_telescope
from invdiff.problems.rings import measure_rings

plt.rcParams.update({"figure.dpi": 80, "image.cmap": "afmhot"})

# %% [markdown]
# ## What the telescopes saw
#
# A visibility is one number of the Fourier transform of the sky: which one follows from the line between two
# stations as the source sees it, and the Earth's rotation moves it along. Simulated stations err as real ones do:
# amplitudes by 20 %, phases completely.

# %%
path = os.environ.get("INVDIFF_UVFITS")
truth = None
if path:
    seen = read_uvfits(path)
else:
    truth = black_hole.crescent(42.0, width=12.0, position_angle=-160.0)
    seen = black_hole.observe(truth, event_horizon_telescope(), flux=0.6, gain=0.2, seed=0)
kept = black_hole.prepare(seen)  # averages of scans, without short baselines and weak signals
print(kept)

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
both = np.concatenate([kept.uv, -kept.uv]) / 1e9
left.plot(*both.T, ".", markersize=3)
left.set(xlabel="u (gigawavelengths)", ylabel="v", aspect="equal", title="sampled frequencies")
left.invert_xaxis()
right.errorbar(np.hypot(*kept.uv.T) / 1e9, np.abs(kept.value), kept.sigma, fmt=".", markersize=4, linewidth=0.8)
right.set(
    xlabel="baseline (gigawavelengths)", ylabel="amplitude (Jy)", yscale="log", title="with errors of stations"
)
plt.show()

# %% [markdown]
# ## The problem
#
# Of all triangles and quadrangles of a moment only some are independent; the problem takes those of least noise,
# with the covariance that they share. Phases know no full turns, and neither does the likelihood.

# %%
closures = kept.closures()
problem = black_hole.closure_problem(kept)
print(closures)
print(problem)

# %% [markdown]
# ## Draws
#
# Total flux and place of the source cancel in closures, so draws float a little and have a scale of their own.
# The fit is stiff: Hamiltonian moves get there, and chi-squared per datum tells whether they did (1 is what noise
# alone leaves).

# %%
prior = priors.load("black-hole").with_scale(1.0)
sampler = samplers.DAPS(steps=50, inner="hmc", moves=80, momentum=0.95)
posterior = invdiff.sample(problem, prior, sampler, draws=12, seed=0)
draws = np.asarray(posterior.draws).reshape(-1, 64, 64)
print({k: round(v, 2) for k, v in black_hole.chi_squared(problem, closures, draws).items()})

half = 64.0
figure, axes = plt.subplots(2, 6, figsize=(11, 4), layout="constrained")
for ax, draw in zip(axes.flat, draws):
    ax.imshow(draw, vmin=0, extent=(half, -half, -half, half))
    ax.set_xticks([-40, 0, 40])
    ax.set_yticks([-40, 0, 40])
    ax.tick_params(labelsize=6)
figure.supxlabel("east (micro-arcseconds), north is up", fontsize=9)
plt.show()

# %% [markdown]
# ## The ring
#
# Diameter, width and brightest side are measured in every draw, so their spread is their uncertainty. Draws whose
# brightness is not a ring would show as a large `roundness`.

# %%
rings = measure_rings(draws.clip(0), pixel=2.0)
low, middle, high = np.quantile(rings.diameter, [0.05, 0.5, 0.95])
print(f"diameter {middle:.1f} micro-arcseconds, 90 % between {low:.1f} and {high:.1f}")
print("draws whose radius varies by more than a tenth:", int((rings.roundness > 0.1).sum()), "of", len(draws))

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
left.hist(rings.diameter, bins=np.arange(20, 62, 2), color="tab:orange")
left.axvspan(39, 45, color="0.85", zorder=0, label="published for M87: 42 +- 3")
left.set(xlabel="diameter (micro-arcseconds)", ylabel="draws", yticks=[])
left.legend(fontsize=8)
angle = np.deg2rad(rings.position_angle)
right.remove()
right = figure.add_subplot(1, 2, 2, projection="polar")
right.set_theta_zero_location("N")
right.plot(angle, rings.asymmetry, "o", color="tab:orange")
right.set_title("brightest side: north up, east left; radius: asymmetry", fontsize=9)
plt.show()
