"""Samplers of volumes: slices that are correlated, a prior that does not know it, and the exact answer."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest
import torch

import invdiff
from invdiff import likelihoods, operators, priors, reference, samplers
from invdiff.callbacks import Callback
from invdiff.codec import Scale
from invdiff.errors import InvdiffError
from invdiff.spaces import Space

Z, N, DRAWS = 6, 12, 8
VOLUME = Space((1, Z, N, N), torch.float64)


@functools.lru_cache
def setting(seed=0, sigma=0.05, share=0.3):
    """Half of a periodic volume with 3 pixels of correlation along every axis, so that its ends are no neighbours.

    Returns problem, prior of slices (the exact marginal), and posterior mean and width under the prior of volumes.
    """
    spectrum = priors.power_law_spectrum((2 * Z, N, N), 3.0)
    whole = priors.StationaryGaussian((1, 2 * Z, N, N), spectrum)
    prior = priors.SlicePrior(priors.StationaryGaussian((N, N), spectrum.mean(0)))
    x = whole.denoiser.sample(1, seed)[:, :, :Z]
    mask = torch.rand(Z, N, N, generator=torch.Generator().manual_seed(seed)) < share
    problem = invdiff.Problem.simulate(operators.Mask(mask, VOLUME), likelihoods.Gaussian(sigma), x, seed=seed)
    both = Space((1, 2 * Z, N, N), torch.float64)
    pad = (0, 0, 0, 0, 0, Z)
    larger = invdiff.Problem(
        operators.Mask(torch.nn.functional.pad(mask.double(), pad), both),
        likelihoods.Gaussian(sigma),
        torch.nn.functional.pad(problem.y, pad),
    )
    exact = reference.posterior(larger, whole)
    width = exact.sample(64, 1)[0, :, :, :Z].std(0)
    return problem, prior, exact.mean()[0, :, :Z], width


def draw(sampler, seed=0, **options):
    problem, prior, _, _ = setting(seed)
    made = invdiff.sample(problem, prior, sampler, draws=options.pop("draws", DRAWS), seed=0, **options)
    return torch.from_numpy(np.asarray(made.draws)).reshape(-1, *VOLUME.shape)


def error(sampler, seed=0):
    """Root mean square error of the mean of the draws against the truth."""
    return float((draw(sampler, seed).mean(0) - setting(seed)[0].x_true[0]).square().mean().sqrt())


def test_without_total_variation_it_is_dds():
    options = {"steps": 10, "eta": 0.5}
    alone = draw(samplers.DDS3D(lam=0.0, **options), draws=2)
    assert torch.equal(alone, draw(samplers.DDS(**options), draws=2))
    assert not torch.allclose(alone, draw(samplers.DDS3D(**options), draws=2), atol=1e-2)


def test_without_total_variation_a_slice_is_an_image():
    """The first slice reads the first numbers of the stream, as an image of its own does."""
    problem = setting()[0]
    sampler = samplers.DDS3D(lam=0.0, eta=0.0, steps=10)
    plane = Space((1, N, N), torch.float64)
    image = invdiff.Problem(
        operators.Mask(problem.operator.mask[:, :, 0], plane), problem.likelihood, problem.y[:, :, 0]
    )
    spectrum = priors.power_law_spectrum((2 * Z, N, N), 3.0).mean(0)
    one = invdiff.sample(image, priors.StationaryGaussian((N, N), spectrum), sampler, draws=2, seed=0)
    first = draw(sampler, draws=2)[:, :, 0]
    np.testing.assert_allclose(np.asarray(one.draws).reshape(first.shape), first, atol=1e-10)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_total_variation_lowers_the_error_of_slicewise_dds(seed):
    slicewise, linked = error(samplers.DDS(), seed), error(samplers.DDS3D(), seed)
    assert linked < 0.96 * slicewise
    problem, _, mean, _ = setting(seed)
    assert linked < 1.6 * float((mean - problem.x_true[0]).square().mean().sqrt())


def test_total_variation_lowers_the_error_of_slicewise_mbir():
    slicewise = error(samplers.DiffusionMBIR(steps=60, lam=0.0))
    assert error(samplers.DiffusionMBIR(steps=60)) < 0.85 * slicewise


def test_too_much_total_variation_harms():
    """The control: the gain is not that of any smoothing."""
    assert error(samplers.DDS3D(lam=8.0)) > 1.2 * error(samplers.DDS())


def test_width_of_the_draws_stays_where_it_is():
    """Heuristic; bounds a little wider than what they reach, so that a change is seen."""
    width = setting()[3]
    ratio = draw(samplers.DDS3D()).std(0) / width
    assert 1.0 < float(ratio.mean()) < 1.4
    assert 0.8 < float(draw(samplers.DiffusionMBIR(steps=60)).std(0).mean() / width.mean()) < 1.15


def test_published_steps_run():
    assert error(samplers.DDS3D.preset("published")) < 0.35
    assert error(samplers.DiffusionMBIR.preset("published-mri", steps=100)) < 0.18


class _Interrupt(Callback):
    count = 0

    def on_step(self, info):
        self.count += 1
        if self.count == 5:
            raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["dds3d", "mbir"])
def test_draws_belong_to_their_streams_and_resume(name, tmp_path):
    sampler = samplers.get(name, steps=4)
    whole = draw(sampler, draws=3)
    assert (draw(sampler, draws=3, max_batch=1) - whole).abs().max() < 1e-10
    assert (draw(sampler, draws=2) - whole[:2]).abs().max() < 1e-10
    kept = draw(sampler, draws=3, max_batch=2, checkpoint=tmp_path / "whole")
    options = {"draws": 3, "max_batch": 2, "checkpoint": tmp_path / "broken"}
    with pytest.raises(KeyboardInterrupt):
        draw(sampler, checkpoint_every_s=0, callbacks=[_Interrupt()], **options)
    assert torch.equal(draw(sampler, resume=True, **options), kept)


@pytest.mark.parametrize("options", [{}, {"consistency": "fixed"}], ids=["noise", "fixed"])
@pytest.mark.parametrize("name", ["dds3d", "mbir"])
def test_the_scale_of_the_volume_changes_nothing(name, options):
    problem = setting()[0]
    one = priors.StationaryGaussian((N, N), priors.power_law_spectrum((2 * Z, N, N), 3.0).mean(0))
    scaled = priors.SlicePrior(dataclasses.replace(one, codec=Scale(Space((1, N, N), torch.float64), 37.0)))
    larger = invdiff.Problem(problem.operator, likelihoods.Gaussian(37.0 * 0.05), 37.0 * problem.y)
    sampler = samplers.get(name, steps=4, **options)
    made = invdiff.sample(larger, scaled, sampler, draws=1, seed=0)
    expected = draw(sampler, draws=1)
    assert np.abs(np.asarray(made.draws) / 37.0 - expected.numpy()).max() < 1e-6 * float(expected.abs().max())


def test_cases_have_their_own_link():
    first, second = setting(0)[0], setting(1)[0]
    masks = torch.cat([p.operator.mask for p in (first, second)])
    both = invdiff.Problem(
        operators.Mask(masks, VOLUME), likelihoods.Gaussian(0.05), torch.cat([first.y, second.y])
    )
    made = invdiff.sample(both, setting()[1], samplers.DDS3D(steps=4), draws=2, seed=0)
    together = np.asarray(made.draws).reshape(2, 2, *VOLUME.shape)
    assert np.abs(together[0] - draw(samplers.DDS3D(steps=4), draws=2).numpy()).max() < 1e-10


@pytest.mark.parametrize("name", ["dds3d", "mbir"])
def test_total_variation_needs_a_noise_level_to_be_weighed_against(name):
    problem, prior, _, _ = setting()
    exact = invdiff.Problem(problem.operator, likelihoods.Gaussian(0.0), problem.y)
    with pytest.raises(InvdiffError, match="noise level"):
        invdiff.sample(exact, prior, samplers.get(name, steps=2), draws=1, seed=0)
    fixed = samplers.get(name, steps=2, consistency="fixed")
    assert np.isfinite(np.asarray(invdiff.sample(exact, prior, fixed, draws=1, seed=0).draws)).all()
