"""Priors of three colours on grey images: exact for a Gaussian, in any range and size; the cost of an answer."""

import pytest
import torch

import invdiff
from invdiff import InvdiffError, likelihoods, operators, priors, reference, samplers
from invdiff.codec import Grey, Pad, Scale
from invdiff.prior import Prior

COLOUR, GREY = invdiff.Space((3, 2, 3), torch.float64), invdiff.Space((1, 2, 3), torch.float64)


@pytest.fixture(scope="module")
def gaussian():
    g = torch.Generator().manual_seed(2)
    root = torch.randn(18, 18, generator=g, dtype=torch.float64) / 4
    mean = torch.randn(18, generator=g, dtype=torch.float64)
    return priors.Gaussian(mean, root @ root.T + 0.05 * torch.eye(18, dtype=torch.float64), COLOUR)


def averaged(gaussian):
    """Mean and covariance of the grey image, by the matrix that averages three colours."""
    mix = torch.cat([torch.eye(6, dtype=torch.float64)] * 3, dim=1) / 3
    return mix @ gaussian.denoiser.mean.flatten(), mix @ gaussian.denoiser.covariance_matrix() @ mix.T


def test_posterior_is_that_of_the_averaged_gaussian(gaussian):
    mean, cov = averaged(gaussian)
    a = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.tensor([[0.3, -0.2, 0.9, 0.1]], dtype=torch.float64)
    problem = invdiff.Problem(operators.Matrix(a, GREY), likelihoods.Gaussian(0.2), y)
    found = reference.posterior(problem, gaussian.for_grey())
    gain = cov @ a.T @ torch.linalg.inv(a @ cov @ a.T + 0.04 * torch.eye(4, dtype=torch.float64))
    wanted = mean + gain @ (y[0] - a @ mean)
    torch.testing.assert_close(found.mean().flatten(), wanted)
    variance = (cov - gain @ a @ cov).diagonal()
    torch.testing.assert_close(found.std().flatten(), variance.sqrt())


def test_draws_have_the_moments(gaussian):
    mean, cov = averaged(gaussian)
    draws = gaussian.for_grey().sample(800, seed=1, shape=GREY, sampler=samplers.DDIM(steps=60)).draws
    x = torch.as_tensor(draws.values.copy()).reshape(800, 6)
    assert ((x.mean(0) - mean).abs() < 4 * cov.diagonal().sqrt() / 800**0.5 + 0.02).all()
    assert (x.std(0) / cov.diagonal().sqrt() - 1).abs().max() < 0.12


def flexible():
    """A prior of three channels that makes its codec for every image: network units are twice the image's."""
    denoiser = priors.Gaussian(
        torch.zeros(3 * 16).double(), torch.eye(48).double(), invdiff.Space((3, 4, 4), torch.float64)
    ).denoiser

    def make(image, scale):
        return Scale(image, 0.5 * scale, 0.5) @ Pad(image, 4)

    return Prior(denoiser, make_codec=make, scale=1.0)


def test_codec_made_for_every_image():
    prior = flexible().for_grey()
    codec = prior.bind(invdiff.Space((1, 3, 4), torch.float64)).codec
    assert codec.image.shape == (1, 3, 4) and codec.prior.shape == (3, 4, 4)
    x = codec.image.randn(2)
    u = codec.encode(x)
    torch.testing.assert_close(u[:, 0], u[:, 2])
    torch.testing.assert_close(codec.decode(u), x)
    assert float(codec.gain) == pytest.approx(0.5 / 3**0.5)
    assert prior.card["grey"]


def test_scale_is_estimated_where_it_was():
    loose = flexible().with_scale(None)
    assert loose.for_grey().scale is None and flexible().for_grey().scale == 1.0


def test_refusals(gaussian):
    with pytest.raises(InvdiffError, match="1 channel"):
        priors.Gaussian(
            torch.zeros(4).double(), torch.eye(4).double(), invdiff.Space((1, 2, 2), torch.float64)
        ).for_grey()
    with pytest.raises(InvdiffError, match="one real channel"):
        Grey(COLOUR)
    with pytest.raises(InvdiffError, match="one real channel"):
        Grey(invdiff.Space((1, 2, 2), torch.complex64))


def test_cost_is_measured(gaussian):
    import time

    calls = []

    class Slow(type(gaussian.denoiser)):
        def __call__(self, x, sigma, cond=None):
            calls.append(len(x))
            time.sleep(0.01)
            return super().__call__(x, sigma, cond)

    slow = Slow.__new__(Slow)
    slow.__dict__.update(gaussian.denoiser.__dict__)
    found = Prior(slow, gaussian.codec).cost(batch=3, repeats=2)
    assert found["batch"] == 3 and set(calls) == {3} and len(calls) == 6
    assert found["evaluation_s"] >= 0.01 and found["vjp_s"] >= 0.01
    with pytest.raises(InvdiffError, match="any size"):
        Prior(_Anywhere()).cost()


class _Anywhere(invdiff.prior.Denoiser):
    """A denoiser of any size that cannot be differentiated."""

    space, channels, sigma_min, sigma_max, differentiable = None, 3, 0.01, 10.0, 0

    def __call__(self, x, sigma, cond=None):
        return x


def test_cost_without_derivatives():
    prior = Prior(_Anywhere(), make_codec=lambda image, scale: Scale(image, scale))
    assert "vjp_s" not in prior.cost(invdiff.Space((3, 4, 4)))
