"""Joint priors: two unknowns behind one measurement, against the closed form of their joint Gaussian."""

from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import pytest
import torch

import invdiff
from invdiff import anchors, likelihoods, operators, priors, reference, samplers
from invdiff.codec import ComplexChannels, Scale
from invdiff.errors import InvdiffError
from invdiff.prior import FunctionDenoiser, Prior
from invdiff.spaces import Space
from invdiff.testing import check_operator

N, SIGMA, DRAWS = 8, 0.1, 128
SPACE = Space((1, N, N), torch.float64, spacing={"y": 0.5, "x": 0.5})


def smooth():
    return priors.StationaryGaussian((N, N), correlation_length=3.0)


def rough(scale=0.5):
    """Nearly white haze of another unit."""
    prior = priors.StationaryGaussian((N, N), correlation_length=0.5, mean=0.3)
    return dataclasses.replace(prior, codec=Scale(SPACE, scale))


def keep():
    return operators.Mask(torch.rand(N, N, generator=torch.Generator().manual_seed(0)) < 0.6, SPACE)


def setting():
    joint = priors.Joint(smooth(), rough())
    identity = operators.Identity(SPACE)
    operator = keep() @ operators.SumOf(identity, identity)
    truth = joint.codec.decode(joint.denoiser.sample(1, 5))
    return invdiff.Problem.simulate(operator, likelihoods.Gaussian(SIGMA), truth, seed=0), joint


def closed_form(problem):
    """Posterior moments of the stacked Gaussian by dense algebra that shares no code with the package."""

    def covariance(prior, scale):
        spectrum = prior.denoiser.covariance.spectrum.numpy()
        first = np.fft.ifft2(spectrum).real
        y, x = (v.reshape(-1) for v in np.meshgrid(range(N), range(N), indexing="ij"))
        return scale**2 * first[(y[:, None] - y) % N, (x[:, None] - x) % N]

    zero = np.zeros((N * N, N * N))
    c = np.block([[covariance(smooth(), 1.0), zero], [zero, covariance(rough(), 0.5)]])
    m = np.concatenate([np.zeros(N * N), np.full(N * N, 0.15)])
    seen = keep().mask.flatten().numpy() > 0
    a = np.tile(np.eye(N * N)[seen], 2)
    gain = c @ a.T @ np.linalg.inv(a @ c @ a.T + SIGMA**2 * np.eye(seen.sum()))
    mean = m + gain @ (problem.y.numpy().reshape(-1)[seen] - a @ m)
    return mean, np.sqrt(np.diag(c - gain @ a @ c))


def test_the_reference_is_the_stacked_gaussian():
    problem, joint = setting()
    exact = reference.posterior(problem, joint)
    mean, std = closed_form(problem)
    np.testing.assert_allclose(exact.mean().reshape(-1), mean, atol=1e-10)
    np.testing.assert_allclose(exact.std().reshape(-1), std, atol=1e-10)


def test_tweedie_covariance_is_exact_on_two_priors():
    """Over three runs, because smooth images have few independent pixels to average over."""
    problem, joint = setting()
    exact, (mean, std), errors = reference.posterior(problem, joint), closed_form(problem), []
    for seed in (1, 2, 3):
        sampler = samplers.TMPD(steps=50, tol=1e-3)
        made = invdiff.sample(problem, joint, sampler, draws=DRAWS, seed=seed, max_batch=DRAWS)
        draws = torch.from_numpy(np.asarray(made.draws)).reshape(DRAWS, 2, 1, N, N)
        figures = anchors.grade(draws, exact)
        assert 0.96 < figures["std_ratio"] < 1.04 and 0.96 < figures["std_ratio_measured"] < 1.04
        z = (np.asarray(made.mean()).reshape(-1) - mean) / std
        assert np.sqrt((z**2).mean()) == pytest.approx(figures["mean_error"], rel=1e-3)
        errors.append(figures["mean_error"])
    assert np.sqrt(np.mean(np.square(errors))) < 1.5 / DRAWS**0.5


@pytest.mark.parametrize("name", ["dds", "pigdm", "dps", "daps"])
def test_other_samplers_serve_and_separate(name):
    """Heuristic, but nearer to both components than the data, and labelled."""
    problem, joint = setting()
    sampler = samplers.get(name, steps=80) if name == "dps" else samplers.get(name)
    made = invdiff.sample(problem, joint, sampler, draws=8, seed=0)
    assert made.draws.dims[-4:] == ("component", "channel", "y", "x")
    assert float(made.draws["x"][1]) == 0.5, "the spacing of the image is kept"
    mean, std = closed_form(problem)
    error = np.abs(np.asarray(made.mean()).reshape(2, -1) - mean.reshape(2, -1)) / std.reshape(2, -1)
    assert np.sqrt((error**2).mean()) < 0.9


def test_the_scale_of_the_image_changes_nothing():
    problem, joint = setting()
    parts = [dataclasses.replace(p, codec=Scale(SPACE, 37.0 * float(p.codec.gain))) for p in joint.parts]
    larger = invdiff.Problem(problem.operator, likelihoods.Gaussian(37.0 * SIGMA), 37.0 * problem.y)
    for sampler in (samplers.DDS(steps=8), samplers.DPS(steps=8)):
        one = invdiff.sample(problem, joint, sampler, draws=2, seed=1)
        two = invdiff.sample(larger, priors.Joint(*parts), sampler, draws=2, seed=1)
        assert np.abs(np.asarray(two.draws) / 37.0 - np.asarray(one.draws)).max() < 1e-8


def test_closed_forms_of_the_joint_denoiser():
    joint = priors.Joint(
        smooth(), rough(), priors.GaussianMixture([0.3, 0.7], torch.zeros(2, 1, N, N).double(), 1.0)
    )
    d = joint.denoiser
    sigma = torch.tensor([0.1, 3.0], dtype=torch.float64)
    x = d.sample(2, seed=1)
    z = x.clone().requires_grad_(True)
    (grad,) = torch.autograd.grad(d.log_prob(z, sigma).sum(), z)
    torch.testing.assert_close(d.score(x, sigma), grad)
    torch.testing.assert_close(d(x, sigma), x + sigma[:, None] ** 2 * grad)
    (back,) = torch.autograd.grad(d(z, sigma), z, x)
    torch.testing.assert_close(d.jacobian_product(x, sigma, x), back)
    assert len(d.components()) == 2
    _, _, covariance = d.components()[0]
    torch.testing.assert_close(covariance.from_basis(covariance.to_basis(x)), x)
    torch.testing.assert_close(covariance.matrix().diagonal(), covariance.variances().flatten())
    assert not torch.equal(*joint.codec.decode(x)[:, :2].unbind(1)), "components are independent draws"


def test_the_prior_itself_can_be_drawn_from():
    made = invdiff.sample(None, priors.Joint(smooth(), rough(2.0)), samplers.DPMpp(steps=30), draws=256, seed=0)
    stds = np.asarray(made.draws).reshape(256, 2, -1).std(axis=(0, 2))
    assert 0.85 < stds[0] < 1.15 and 1.7 < stds[1] < 2.3


def test_a_part_beyond_its_range_is_asked_at_its_end():
    seen = []

    def denoiser(low, high):
        def function(x, sigma):
            seen.append((sigma.clone(), x.abs().max().item()))
            return torch.zeros_like(x)

        return Prior(FunctionDenoiser(function, SPACE, low, high))

    joint = priors.Joint(denoiser(0.1, 10.0), denoiser(0.01, 50.0))
    assert (joint.denoiser.sigma_min, joint.denoiser.sigma_max) == (0.01, 50.0)
    joint.denoiser(torch.full((2, 2 * N * N), 40.0).double(), torch.tensor([0.02, 40.0], dtype=torch.float64))
    (first, largest), (second, _) = seen
    assert first.tolist() == [0.1, 10.0] and second.tolist() == [0.02, 40.0]
    assert largest == 40.0, "a row within the range is not shrunk"


def test_learned_priors_of_other_coordinates_join():
    """A padded two-channel network beside a closed form on complex images."""
    image = Space((1, 20, 20), torch.complex64)
    haze = dataclasses.replace(priors.StationaryGaussian((2, 20, 20)), codec=ComplexChannels(image))
    joint = priors.Joint(priors.load("brain-mri").with_scale(1.0), haze)
    identity = operators.Identity(image)
    operator = operators.SumOf(0.5 * identity, 2.0 * identity)
    problem = invdiff.Problem(operator, likelihoods.Gaussian(0.1), image.randn(1))
    made = invdiff.sample(problem, joint, samplers.DDS(steps=3), draws=2, seed=0)
    assert made.draws.dtype == np.complex64 or np.iscomplexobj(made.draws)
    assert made.draws.shape[-4:] == (2, 1, 20, 20)
    assert made.provenance["prior"]["parts"][0]["id"] == "brain-mri"


def test_sum_of_is_an_operator():
    blur = operators.GaussianBlur(0.7, SPACE)
    check_operator(operators.SumOf(keep(), 0.5 * keep(), operators.Identity(SPACE))).raise_if_failed()
    cases = torch.rand(3, 1, N, N, generator=torch.Generator().manual_seed(1)) < 0.5
    check_operator(operators.SumOf(operators.Mask(cases, SPACE), keep())).raise_if_failed()
    x = operators.SumOf(keep(), blur).domain.randn(1)
    expected = keep()(x[:, 0]) + blur(x[:, 1])
    torch.testing.assert_close(operators.SumOf(keep(), blur)(x), expected)
    assert operators.SumOf(keep(), blur).domain.dims == ("component", "channel", "y", "x")


def test_copies_keep_their_results():
    problem, joint = setting()
    for copy in (pickle.loads(pickle.dumps(joint)), joint.to(dtype=torch.float64)):
        one = invdiff.sample(problem, joint, samplers.DDS(steps=3), draws=1, seed=0)
        two = invdiff.sample(problem, copy, samplers.DDS(steps=3), draws=1, seed=0)
        assert np.array_equal(np.asarray(one.draws), np.asarray(two.draws))
    assert joint.to(dtype=torch.float32).denoiser.dtype == torch.float32


def test_what_cannot_be_joined_is_refused_in_one_sentence():
    problem, joint = setting()
    with pytest.raises(InvdiffError, match="at least two parts, got 1"):
        priors.Joint(smooth())
    with pytest.raises(InvdiffError, match="give each part its own"):
        joint.with_scale(2.0)
    with pytest.raises(InvdiffError, match="cannot tell what share"):
        image = Space((1, 16, 16), torch.complex64)
        operator = operators.SumOf(*[operators.Identity(image)] * 2)
        network = priors.load("brain-mri")
        invdiff.sample(
            invdiff.Problem(operator, likelihoods.Gaussian(0.1), image.randn(1)),
            priors.Joint(network, network),
            samplers.DDS(steps=1),
        )
    with pytest.raises(InvdiffError, match="asks for"):
        invdiff.sample(invdiff.Problem(keep(), likelihoods.Gaussian(0.1), problem.y), joint, samplers.DDS(steps=1))
    stacked = problem.operator.domain
    both = invdiff.Problem(operators.Identity(stacked), likelihoods.Gaussian(0.1), stacked.randn(1))
    with pytest.raises(InvdiffError, match="one scale"):
        invdiff.sample(both, joint, samplers.DDS(steps=1))
    alike = priors.Joint(smooth(), rough(1.0))
    invdiff.sample(both, alike, samplers.DDS(steps=1))
