"""A prior of slices as a prior of volumes, and total variation along one axis."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

import invdiff
from invdiff import likelihoods, operators, priors, samplers
from invdiff.codec import ComplexChannels, Pad, Scale
from invdiff.errors import InvdiffError
from invdiff.primitives.total_variation import difference, difference_adjoint, tv_step
from invdiff.prior import Prior
from invdiff.priors.slices import AffineSliceCodec, rows_to_slices, slices_to_rows
from invdiff.spaces import Space
from invdiff.testing import check_operator

VOLUME = Space((1, 5, 6, 8), torch.float64, spacing={"z": 3.0, "y": 1.0, "x": 1.0})


def flat(prior=None, **options):
    return priors.SlicePrior(prior or priors.StationaryGaussian((6, 8), mean=0.5), **options)


def test_slices_and_rows_undo_each_other():
    x = Space((3, 4, 5, 6)).randn(2)
    rows = slices_to_rows(x)
    assert torch.equal(rows[4 + 1], x[1, :, 1])
    assert torch.equal(rows_to_slices(rows, 4), x)


@pytest.mark.parametrize("most", [None, 1, 3])
def test_every_slice_is_denoised_by_itself(most):
    prior, one = flat(max_slices=most), priors.StationaryGaussian((6, 8), mean=0.5)
    x, sigma = VOLUME.randn(2), torch.tensor([0.3, 2.0], dtype=torch.float64)
    seen = []
    inner = prior.denoiser.base
    prior.denoiser.base = lambda u, s, cond=None: seen.append(len(u)) or inner(u, s, cond)
    out = prior.denoiser(x, sigma)
    for z in range(5):
        torch.testing.assert_close(out[:, :, z], one.denoiser(x[:, :, z], sigma))
    assert max(seen) <= (most or 10) and sum(seen) == 10


def test_codec_of_slices_keeps_the_contract():
    image = Space((1, 3, 5, 7), torch.complex128)
    plane = Space((1, 5, 7), torch.complex128)
    for scale in (2.0, torch.tensor([0.5, 2.0, 4.0], dtype=torch.float64)):
        channels = ComplexChannels(plane)
        base = Scale(plane, scale, 0.3) @ channels @ Pad(channels.prior, 4)
        codec = AffineSliceCodec(base, image)
        assert codec.prior.shape == (2, 3, 8, 8)
        x = image.randn(3)
        torch.testing.assert_close(codec.decode(codec.encode(x)), x)
        check_operator(codec.linear_operator()).raise_if_failed()
        u = codec.prior.randn(3)
        torch.testing.assert_close(codec.decode(u), codec.linear(u) + codec.offset)
        torch.testing.assert_close(codec.rows(torch.tensor([1])).decode(u[1:2]), codec.decode(u)[1:2])
        for row in range(3):
            one = base.rows(torch.tensor([row])).decode(u[row : row + 1, :, 2])
            torch.testing.assert_close(codec.decode(u)[row : row + 1, :, 2], one)


def test_a_learned_prior_of_slices_meets_a_volume():
    image = Space((1, 3, 20, 20), torch.complex64, spacing={"z": 2.0, "y": 1.0, "x": 1.0})
    mask = torch.rand(3, 20, 20, generator=torch.Generator().manual_seed(0)) < 0.5
    problem = invdiff.Problem.simulate(operators.Mask(mask, image), likelihoods.Gaussian(0.1), 50 * image.randn(1))
    prior = priors.SlicePrior(priors.load("brain-mri"))
    made = invdiff.sample(problem, prior, samplers.DDS(steps=3), draws=2, seed=0)
    assert made.draws.dims[-4:] == ("channel", "z", "y", "x") and float(made.draws["z"][1]) == 2.0
    codec = made.provenance["prior"]["codec"]
    assert codec["name"] == "Slices" and codec["slices"] == 3
    scale = codec["slice"]["parts"][0]["scale"]
    assert np.all(np.asarray(scale) > 10), "the scale is estimated from the whole volume"
    with_scale = invdiff.sample(problem, prior.with_scale(7.0), samplers.DDS(steps=1), draws=1, seed=0)
    assert with_scale.provenance["prior"]["codec"]["slice"]["parts"][0]["scale"] == 7.0


def test_a_prior_with_its_own_codec_meets_a_volume():
    plane = Space((1, 6, 8), torch.float64)
    prior = flat(dataclasses.replace(priors.StationaryGaussian((6, 8)), codec=Scale(plane, 3.0)))
    problem = invdiff.Problem(operators.Identity(VOLUME), likelihoods.Gaussian(1e-3), VOLUME.randn(1))
    made = invdiff.sample(problem, prior, samplers.DDS(steps=20), draws=1, seed=0)
    np.testing.assert_allclose(np.asarray(made.mean()), problem.y[0].numpy(), atol=0.05)


def test_volumes_are_asked_for_in_one_sentence():
    plane = Space((1, 6, 8), torch.float64)
    problem = invdiff.Problem(operators.Identity(plane), likelihoods.Gaussian(0.1), plane.randn(1))
    with pytest.raises(InvdiffError, match=r"makes volumes \(channel, z, y, x\)"):
        invdiff.sample(problem, flat(), samplers.DDS(steps=1))
    with pytest.raises(InvdiffError, match="max_slices"):
        flat(max_slices=0)
    assert isinstance(flat(), Prior)


# ---- total variation ----


def test_differences_have_an_exact_adjoint():
    x, v = VOLUME.randn(2, 1), VOLUME.randn(2, 2)
    for axis in (2, 3, 4):
        left, right = (difference(x, axis) * v).sum(), (x * difference_adjoint(v, axis)).sum()
        torch.testing.assert_close(left, right)
    assert torch.equal(difference(x, 2)[:, :, :-1], x[:, :, 1:] - x[:, :, :-1])
    assert not difference(x, 2)[:, :, -1].any() and not difference(x, None).any()


def solve(lam, rho=1.0, rounds=250, precision=2.0):
    mask = torch.rand(5, 6, 8, generator=torch.Generator().manual_seed(0)) < 0.5
    sigma = 0.4
    problem = invdiff.Problem(operators.Mask(mask, VOLUME), likelihoods.Gaussian(sigma), VOLUME.randn(2, 4))
    weight = torch.tensor(1 / sigma**2, dtype=torch.float64)
    x, zero = VOLUME.randn(2, 5), torch.zeros(2, *VOLUME.shape, dtype=torch.float64)
    u, _, _ = tv_step(problem, x, precision, weight, zero, zero, 2, lam, rho, rounds, 50, 1e-12)

    def objective(v):
        misfit = 0.5 * weight * problem.residual(v).mul(mask).square().flatten(1).sum(1)
        near = 0.5 * precision * (v - x).square().flatten(1).sum(1)
        return misfit + near + lam * difference(v, 2).abs().flatten(1).sum(1)

    return u, objective


@pytest.mark.parametrize("rho", [0.5, 3.0])
def test_admm_reaches_the_minimum(rho):
    """A convex objective: no small change may lower it, and the point does not depend on the splitting."""
    u, objective = solve(1.0, rho)
    best = objective(u)
    generator = torch.Generator().manual_seed(1)
    for size in (1e-3, 1e-2, 0.1):
        for _ in range(20):
            step = torch.randn(u.shape, generator=generator, dtype=torch.float64)
            assert bool((objective(u + size * step) >= best - 1e-9).all())
    torch.testing.assert_close(u, solve(1.0, 1.0)[0], atol=1e-5, rtol=0)
    assert (difference(u, 2)[:, :, :-1].abs() < 1e-6).double().mean() > 0.1, "total variation makes slices equal"


def test_large_total_variation_makes_all_slices_equal():
    u, _ = solve(50.0, rho=5.0, rounds=300)
    torch.testing.assert_close(u, u[:, :, :1].expand_as(u), atol=1e-3, rtol=0)


def test_noise_that_varies_over_the_data_is_weighed_elementwise():
    problem = invdiff.Problem(operators.Identity(VOLUME), likelihoods.Gaussian(0.4), VOLUME.randn(2, 4))
    x, zero = VOLUME.randn(2, 5), torch.zeros(2, *VOLUME.shape, dtype=torch.float64)
    weight = 0.5 + VOLUME.randn(2, 6).abs()
    u, _, _ = tv_step(problem, x, 2.0, weight, zero, zero, None, 1.0, 1.0, 1, 60, 1e-12)
    torch.testing.assert_close(u, (weight * problem.y + 2.0 * x) / (weight + 2.0))
