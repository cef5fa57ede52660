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
# # Your own operator in ten lines
#
# Your measurement is rarely in anyone's library. This notebook writes a forward operator from scratch (sums of an
# image over parallel strips at six angles: a coarse tomography), checks it, and draws from the posterior.
# The prior is a Gaussian random field, for which the exact posterior is known, so that every answer can be
# compared with the right one. It runs in under a minute on a laptop.

# %%
import matplotlib.pyplot as plt
import numpy as np
import torch

import invdiff
from invdiff import Space, likelihoods, priors, reference, samplers
from invdiff.operator import LinearOperator, Operator
from invdiff.testing import check_operator

plt.rcParams.update({"figure.dpi": 80, "image.cmap": "gray"})

# %% [markdown]
# ## The operator
#
# An operator says what goes in (`domain`), what comes out (`range`), and how. Tensors carry a leading axis of
# rows. A linear operator also gives its adjoint: here, smearing each detector value back over its strip.


# %%
class Projections(LinearOperator):
    """Sums of an image over parallel strips, one row of detector values per angle."""

    def __init__(self, n, angles):
        width = int(1.5 * n)
        self.domain = Space((1, n, n), torch.float64)
        self.range = Space((len(angles), width), torch.float64, ("angle", "detector"))
        y, x = torch.meshgrid(*[torch.arange(n) - (n - 1) / 2] * 2, indexing="ij")
        offset = torch.stack([x * np.cos(a) + y * np.sin(a) for a in angles]).flatten(1)
        self.strip = (offset + width / 2).long()

    def _forward(self, x):
        values = x.flatten(1)[:, None].expand(-1, *self.strip.shape)
        sums = torch.zeros(len(x), *self.range.shape, dtype=x.dtype)
        return sums.scatter_add(2, self.strip.expand_as(values), values)

    def _adjoint(self, y):
        return y.gather(2, self.strip.expand(len(y), -1, -1)).sum(1).reshape(len(y), *self.domain.shape)


n = 24
degrees = np.array([10, 40, 70, 100, 130, 160])
A = Projections(n, np.deg2rad(degrees))
A

# %% [markdown]
# ## Check it before you use it
#
# `check_operator` runs the same checks as every operator of the library: the adjoint identity, linearity,
# derivatives against autograd and finite differences, rows that do not mix, and (at this size) dense matrices.

# %%
report = check_operator(A).raise_if_failed()
print(f"{len(report.checks)} checks, all passed: {report.ok}")
for check in report.checks[-9:]:
    print(f"{check.name:30} error {check.error:.1e}  bound {check.bound:.1e}")

# %% [markdown]
# ## A problem with a known answer
#
# The truth is one draw of the prior; `Problem.simulate` applies the operator and adds noise of the level that the
# likelihood states.

# %%
prior = priors.StationaryGaussian((n, n), correlation_length=3.0)
x_true = prior.denoiser.sample(1, seed=1)
problem = invdiff.Problem.simulate(A, likelihoods.Gaussian(1.0), x_true, seed=0)
exact = reference.posterior(problem, prior)

figure, axes = plt.subplots(1, 2, figsize=(8.5, 3.4), layout="constrained")
picture = axes[0].imshow(x_true[0, 0])
axes[0].set(title="truth (one draw of the prior)", xlabel="x [pixel]", ylabel="y [pixel]")
figure.colorbar(picture, ax=axes[0], label="value")
picture = axes[1].imshow(problem.y[0], aspect="auto")
axes[1].set(title="measurement y, noise level 1.0", xlabel="detector [pixel]", ylabel="angle [degrees]")
axes[1].set_yticks(range(len(degrees)), degrees)
figure.colorbar(picture, ax=axes[1], label="strip sum")
plt.show()

# %% [markdown]
# ## Draws
#
# Diffusion posterior sampling (DPS) asks for nothing but derivatives, so it runs with any operator that can be
# differentiated. `TMPD` also uses that the operator is linear and the noise Gaussian; for a Gaussian prior it is
# exact but for the size of its steps.

# %%
dps = invdiff.sample(problem, prior, samplers.DPS(steps=200), draws=24, seed=0)
tmpd = invdiff.sample(problem, prior, samplers.TMPD(steps=30, tol=1e-3), draws=24, seed=0)
dps

# %% [markdown]
# Mean and standard deviation of each beside the exact ones, on one scale per column (values have no unit).

# %%
rows = {
    "exact": (exact.mean()[0, 0].numpy(), exact.std()[0, 0].numpy()),
    "DPS, 24 draws": (dps.mean()[0].values, dps.std()[0].values),
    "TMPD, 24 draws": (tmpd.mean()[0].values, tmpd.std()[0].values),
}
truth = x_true[0, 0].numpy()
limit, widest = np.abs(truth).max(), max(std.max() for _, std in rows.values())
figure, axes = plt.subplots(3, 3, figsize=(9.5, 8.2), layout="constrained", sharex=True, sharey=True)
for line, (label, (mean, std)) in zip(axes, rows.items()):
    panels = [
        (f"{label}: mean", mean, {"vmin": -limit, "vmax": limit}),
        (f"{label}: standard deviation", std, {"vmin": 0, "vmax": widest, "cmap": "viridis"}),
        (f"{label}: |mean - truth|", np.abs(mean - truth), {"vmin": 0, "vmax": 3 * widest, "cmap": "viridis"}),
    ]
    for axis, (title, values, style) in zip(line, panels):
        figure.colorbar(axis.imshow(values, **style), ax=axis, shrink=0.85)
        axis.set_title(title, fontsize=9)
for axis in axes[-1]:
    axis.set_xlabel("x [pixel]")
for axis in axes[:, 0]:
    axis.set_ylabel("y [pixel]")
plt.show()

# %% [markdown]
# The same in numbers. *Mean error* is the root mean square of (mean - exact mean) / exact standard deviation; 24
# exact draws would give 0.20 by chance alone. *Width* is the average standard deviation over the exact one: 1 is
# right, below 1 claims too much certainty. *Coverage* is the share of pixels whose true value lies in the 90 %
# interval.

# %%
mean, std = rows["exact"]
for label, posterior in {"DPS": dps, "TMPD": tmpd}.items():
    error = np.sqrt(np.mean(((posterior.mean()[0].values - mean) / std) ** 2))
    width = posterior.std()[0].values.mean() / std.mean()
    print(f"{label:5} mean error {error:.2f}   width {width:.2f}   coverage {float(posterior.coverage(0.9)):.2f}")

# %% [markdown]
# DPS is a heuristic: it takes no notice of the noise level, and its width depends on its guidance weight `zeta`.
# That is why the samplers' documentation states measured bias and width.
#
# ## A nonlinear operator needs only the forward map
#
# A detector that saturates is not linear. Derivatives then come from autograd, and operators compose with `@`.


# %%
class Saturation(Operator):
    """A detector that flattens out: y = c tanh(s / c)."""

    def __init__(self, space, ceiling):
        self.domain = self.range = space
        self.ceiling = ceiling

    def _forward(self, x):
        return self.ceiling * torch.tanh(x / self.ceiling)


B = Saturation(A.range, ceiling=20.0) @ A
print("checks passed:", check_operator(B).ok)
saturated = invdiff.Problem.simulate(B, likelihoods.Gaussian(1.0), x_true, seed=0)
draws = invdiff.sample(saturated, prior, samplers.DPS(steps=200), draws=24, seed=0)
draws.plot()

# %% [markdown]
# A sampler that needs more than the problem has refuses at once, and says which samplers would do.

# %%
try:
    invdiff.sample(saturated, prior, samplers.TMPD(), draws=4, seed=0)
except invdiff.InvdiffError as error:
    print(error)
