"""Exact priors: the denoiser against the density, the Jacobian, quadrature, and their limits."""

import math
import pickle

import numpy as np
import pytest
import torch

from invdiff import priors
from invdiff.errors import InvdiffError
from invdiff.priors.exact import ExactDenoiser
from invdiff.spaces import Space

G = torch.Generator().manual_seed(0)


def spd(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(n, n, dtype=torch.float64, generator=g)
    return a @ a.T / n + 0.05 * torch.eye(n, dtype=torch.float64)


def means(k, *shape):
    return 3 * torch.randn(k, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


W = [0.2, 0.5, 0.1]
MAKE = {
    "gaussian": lambda: priors.Gaussian(means(1, 5)[0], spd(5)),
    "gaussian-image": lambda: priors.Gaussian(means(1, 6)[0], spd(6), Space((1, 2, 3), torch.float64)),
    "field": lambda: priors.StationaryGaussian((6, 8), mean=0.5),
    "field-odd-two-channels": lambda: priors.StationaryGaussian((2, 5, 7), correlation_length=1.5, white=0.1),
    "field-volume": lambda: priors.StationaryGaussian((1, 3, 4, 4), correlation_length=1.0),
    "field-line": lambda: priors.StationaryGaussian((9,), correlation_length=1.0),
    "mixture-shared": lambda: priors.GaussianMixture(W, means(3, 4), 0.7),
    "mixture-isotropic": lambda: priors.GaussianMixture(W, means(3, 4), [0.3, 1.0, 2.0]),
    "mixture-diagonal": lambda: priors.GaussianMixture(W, means(3, 4), means(3, 4) ** 2 + 0.1),
    "mixture-dense": lambda: priors.GaussianMixture(W, means(3, 4), torch.stack([spd(4, s) for s in range(3)])),
    "mixture-image": lambda: priors.GaussianMixture(W, means(3, 1, 2, 3), 1.0),
}
each = pytest.mark.parametrize("name", MAKE)
SIGMA = torch.tensor([0.03, 0.4, 1.0, 7.0], dtype=torch.float64)


def setting(name):
    d = MAKE[name]().denoiser
    assert isinstance(d, ExactDenoiser)
    eps = torch.randn(4, *d.space.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    x = d.sample(4, seed=2) + SIGMA.reshape(-1, *[1] * len(d.space.shape)) * eps
    return d, x, torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def column(sigma, x):
    return sigma.reshape(-1, *[1] * (x.ndim - 1))


@each
def test_denoiser_follows_from_the_density(name):
    d, x, _ = setting(name)
    z = x.clone().requires_grad_(True)
    (grad,) = torch.autograd.grad(d.log_prob(z, SIGMA).sum(), z)
    torch.testing.assert_close(d.score(x, SIGMA), grad, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(d(x, SIGMA), x + column(SIGMA, x) ** 2 * grad, rtol=1e-9, atol=1e-10)


@each
def test_jacobian_product_is_that_of_autograd(name):
    d, x, v = setting(name)
    z = x.clone().requires_grad_(True)
    (back,) = torch.autograd.grad(d(z, SIGMA), z, v)
    torch.testing.assert_close(d.jacobian_product(x, SIGMA, v), back, rtol=1e-9, atol=1e-10)


@each
def test_can_be_differentiated_twice(name):
    d, x, v = setting(name)
    z = x.clone().requires_grad_(True)
    (back,) = torch.autograd.grad((d(z, SIGMA) ** 2).sum(), z, create_graph=True)
    (second,) = torch.autograd.grad((back * v).sum(), z)
    assert bool(torch.isfinite(second).all())


@each
def test_rows_are_independent_and_sigma_may_be_a_number(name):
    d, x, _ = setting(name)
    torch.testing.assert_close(d(x[2:3], SIGMA[2:3])[0], d(x, SIGMA)[2], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(d(x, torch.tensor(0.4)), d(x, torch.full((4,), 0.4)))


@each
def test_limits(name):
    d, x, _ = setting(name)
    mean = d.mean
    torch.testing.assert_close(d(x, torch.full((4,), 1e-9)), x, rtol=0, atol=1e-9)
    far = d(mean + 0 * x, torch.full((4,), 1e7, dtype=torch.float64))
    torch.testing.assert_close(far, mean.expand_as(far), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(d.log_prob(x, 1e-7), d.log_prob(x, 0.0), rtol=1e-6, atol=1e-6)
    assert 0 < d.sigma_min < 1 < d.sigma_max


@each
def test_denoiser_is_the_conditional_mean_by_monte_carlo(name):
    """``E (x0 - D(x, s)) g(x) = 0`` for every function ``g`` defines the conditional mean."""
    d, _, _ = setting(name)
    n = 10_000
    x0 = d.sample(n, seed=9)
    for sigma in (0.3, 2.0):
        x = x0 + sigma * torch.randn(x0.shape, dtype=torch.float64, generator=G)
        e = (x0 - d(x, torch.tensor(sigma))).flatten(1)
        z = x.flatten(1)
        for g in (torch.ones_like(z), z, torch.tanh(z.flip(1)), z**2):
            value = (e * g).mean(0) / ((e * g).std(0) / math.sqrt(n))
            assert float(value.abs().max()) < 5


@each
def test_sample_moments(name):
    d, _, _ = setting(name)
    n = 20_000
    x = d.sample(n, seed=3).flatten(1)
    mean = sum(math.exp(w) * m.flatten() for w, m, _ in d.components())
    cov = sum(
        math.exp(w) * (c.matrix() + torch.outer(m.flatten() - mean, m.flatten() - mean))
        for w, m, c in d.components()
    )
    scale = cov.diagonal().sqrt()
    assert float(((x.mean(0) - mean) / scale).abs().max()) < 5 / math.sqrt(n)
    have = torch.cov(x.T) / torch.outer(scale, scale)
    assert float((have - cov / torch.outer(scale, scale)).abs().max()) < 6 / math.sqrt(n)
    assert torch.equal(d.sample(3, 1), d.sample(3, 1)) and not torch.equal(d.sample(3, 1), d.sample(3, 2))


@each
def test_copies_in_another_precision_and_pickles(name):
    d, x, _ = setting(name)
    single = d.to(dtype=torch.float32)
    assert single.dtype == torch.float32 and single(x.float(), SIGMA.float()).dtype == torch.float32
    torch.testing.assert_close(single(x.float(), SIGMA.float()).double(), d(x, SIGMA), rtol=2e-4, atol=2e-4)
    torch.testing.assert_close(pickle.loads(pickle.dumps(d))(x, SIGMA), d(x, SIGMA))


@each
def test_covariance_functions(name):
    d, _, _ = setting(name)
    for _, _, cov in d.components():
        dense, n = cov.matrix(), d.space.size
        v = torch.randn(3, *d.space.shape, dtype=torch.float64, generator=G)
        torch.testing.assert_close(cov.product(v).flatten(1), v.flatten(1) @ dense)
        torch.testing.assert_close(cov.root(cov.root(v)), cov.product(v))
        torch.testing.assert_close(cov.from_basis(cov.to_basis(v)), v)
        torch.testing.assert_close(cov.from_basis(cov.eigenvalues * cov.to_basis(v)), cov.product(v))
        torch.testing.assert_close(cov.variances().flatten(), dense.diagonal())
        assert dense.shape == (n, n)


def test_gaussian_density_is_that_of_torch():
    d = MAKE["gaussian"]().denoiser
    x = d.sample(6, 0)
    for sigma in (0.0, 0.5):
        cov = spd(5) + sigma**2 * torch.eye(5, dtype=torch.float64)
        want = torch.distributions.MultivariateNormal(means(1, 5)[0], cov).log_prob(x)
        torch.testing.assert_close(d.log_prob(x, sigma), want)


def test_field_is_the_dense_gaussian_with_its_covariance():
    field = priors.StationaryGaussian((4, 5), correlation_length=1.0, mean=0.3)
    d = field.denoiser
    dense = priors.Gaussian(d.mean, d.covariance_matrix(), d.space).denoiser
    x = d.sample(4, 0)
    torch.testing.assert_close(d(x, SIGMA), dense(x, SIGMA))
    torch.testing.assert_close(d.log_prob(x, SIGMA), dense.log_prob(x, SIGMA))


def test_field_covariance_falls_with_periodic_distance():
    c = priors.StationaryGaussian((16, 16)).denoiser.covariance_matrix()[0].reshape(16, 16)
    assert float(c[0, 0]) == pytest.approx(1)
    assert float(c[0, 3]) == pytest.approx(float(c[0, 13])) and float(c[0, 1]) > float(c[0, 4]) > float(c[0, 8])


def test_mixture_of_one_is_the_gaussian():
    one = priors.GaussianMixture([1.0], means(1, 5), spd(5)[None]).denoiser
    x = one.sample(4, 0)
    torch.testing.assert_close(one(x, SIGMA), MAKE["gaussian"]().denoiser(x, SIGMA))


def test_mixture_denoiser_by_quadrature():
    d = priors.GaussianMixture([0.3, 0.7], [[-2.0], [1.5]], [0.2, 0.9]).denoiser
    u = torch.linspace(-12, 12, 24_001, dtype=torch.float64)[:, None]
    prior = d.log_prob(u).exp()
    assert float(prior.sum() * 1e-3) == pytest.approx(1, abs=1e-9)
    for x in (-3.0, 0.0, 0.4, 2.0):
        weight = prior * torch.exp(-0.5 * ((x - u[:, 0]) / 0.8) ** 2)
        want = float((weight * u[:, 0]).sum() / weight.sum())
        assert float(d(torch.full((1, 1), x, dtype=torch.float64), SIGMA.new_tensor(0.8))) == pytest.approx(
            want, abs=1e-9
        )


def test_mixture_labels_and_responsibilities():
    d = priors.GaussianMixture([1.0, 3.0], [[-9.0, 0.0], [9.0, 0.0]]).denoiser
    x, labels = d.sample(8000, 1, labels=True)
    assert float(labels.double().mean()) == pytest.approx(0.75, abs=0.02)
    torch.testing.assert_close(d.responsibilities(x)[:, 1], labels.double(), atol=1e-6, rtol=0)
    assert torch.equal(x, d.sample(8000, 1))


def test_mixture_is_stable_far_away_and_large():
    rng = np.random.default_rng(0)
    d = priors.GaussianMixture(rng.chisquare(1, 25) + 1e-6, 8 * rng.standard_normal((25, 800))).denoiser
    x = 1e4 * torch.randn(1000, 800, dtype=torch.float64, generator=G)
    for sigma in (1e-3, 1.0, 3e3):
        assert bool(torch.isfinite(d(x, torch.tensor(sigma))).all() & torch.isfinite(d.log_prob(x, sigma)).all())


@pytest.mark.parametrize("size", [(33, 20), (64, 64)])
def test_power_law_spectrum(size):
    s = priors.power_law_spectrum(size)
    assert float(s.mean()) == pytest.approx(1) and float(s.min()) > 0
    k0, ratio = 1 / (2 * math.pi * 4), float((s[0, 0] - 1e-3 / 1.001) / (s[0, 1] - 1e-3 / 1.001))
    assert ratio == pytest.approx(((k0**2 + size[1] ** -2) / k0**2) ** 3, rel=1e-6)


def test_noise_range_can_be_given():
    d = priors.StationaryGaussian((4, 4), sigma_min=0.01, sigma_max=50).denoiser
    assert (d.sigma_min, d.sigma_max) == (0.01, 50)


def test_singular_covariance_denoises_but_has_no_density():
    d = priors.Gaussian(torch.zeros(2).double(), torch.diag(torch.tensor([1.0, 0.0]))).denoiser
    x = torch.ones(1, 2, dtype=torch.float64)
    torch.testing.assert_close(d(x, torch.tensor(0.0)), torch.tensor([[1.0, 0.0]], dtype=torch.float64))
    assert bool(torch.isfinite(d.log_prob(x, 0.1)).all())
    with pytest.raises(InvdiffError, match="no density"):
        d.log_prob(x)


BAD = torch.eye(3, dtype=torch.float64)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: priors.Gaussian(torch.zeros(3), torch.eye(4)), r"expected \(3, 3\)"),
        (lambda: priors.Gaussian(torch.zeros(3), -BAD), "negative eigenvalue"),
        (lambda: priors.Gaussian(torch.zeros(3), BAD + torch.ones(3, 3).triu(1)), "symmetric"),
        (lambda: priors.Gaussian(torch.zeros(3), 0 * BAD), "zero everywhere"),
        (lambda: priors.Gaussian(torch.zeros(3), BAD, Space((4,))), "expected 4"),
        (lambda: priors.Gaussian(torch.zeros(3), BAD, Space((3,), torch.complex64)), "real"),
        (lambda: priors.StationaryGaussian((4, 4), -torch.ones(4, 4)), "not negative"),
        (lambda: priors.StationaryGaussian((4, 4), torch.ones(4, 5)), "expected the grid"),
        (lambda: priors.StationaryGaussian((4, 4), torch.arange(16.0).reshape(4, 4)), "even"),
        (lambda: priors.StationaryGaussian((4, 4), mean=torch.ones(3)), "does not broadcast"),
        (lambda: priors.power_law_spectrum((4, 4), correlation=0), "correlation > 0"),
        (lambda: priors.GaussianMixture([1, -1], torch.zeros(2, 3)), "positive numbers"),
        (lambda: priors.GaussianMixture([1, 1], torch.zeros(2)), r"expected \(K, d\)"),
        (lambda: priors.GaussianMixture([1, 1], torch.zeros(2, 3), torch.ones(2, 4)), "covariances have shape"),
        (lambda: priors.GaussianMixture([1, 1], torch.zeros(2, 3), -1.0), "not negative"),
        (lambda: priors.StationaryGaussian((128, 128)).denoiser.covariance_matrix(), "too large"),
    ],
)
def test_bad_input_gets_one_sentence(make, words):
    with pytest.raises(InvdiffError, match=words):
        make()


def test_names_load_lazily_and_unknown_ones_fail():
    assert {"Gaussian", "load", "card", "available"} <= set(dir(priors))
    with pytest.raises(AttributeError, match="no attribute 'Gausian'"):
        priors.Gausian  # noqa: B018
