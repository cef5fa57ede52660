"""Every likelihood: score, moments, normalisation, independence of rows, conventions for complex data."""

import math

import numpy as np
import pytest
import torch

from invdiff import likelihoods, operators
from invdiff.errors import InvdiffError
from invdiff.problem import Problem
from invdiff.rng import Streams
from invdiff.spaces import Space, real_inner

REAL = Space((3, 4), torch.float64, ("coil", "x"))
COMPLEX = Space((3, 4), torch.complex128, ("coil", "x"))
CLOSURES = Space((6,), torch.float64, ("closure",))


def hermitian(k, seed=0, complex_=False):
    g = torch.Generator().manual_seed(seed)
    dtype = torch.complex128 if complex_ else torch.float64
    a = torch.randn(k, k, dtype=dtype, generator=g)
    return a @ a.mH / k + 0.3 * torch.eye(k, dtype=dtype)


def per_element():
    return torch.linspace(0.3, 2.0, 12, dtype=torch.float64).reshape(1, 3, 4)


CASES = {
    "gaussian": (likelihoods.Gaussian(0.7), REAL),
    "gaussian-per-element": (likelihoods.Gaussian(per_element()), REAL),
    "gaussian-complex": (likelihoods.Gaussian(0.7), COMPLEX),
    "gaussian-complex-per-element": (likelihoods.Gaussian(per_element()), COMPLEX),
    "correlated-all": (likelihoods.CorrelatedGaussian(hermitian(12), REAL), REAL),
    "correlated-coil": (likelihoods.CorrelatedGaussian(hermitian(3), REAL, "coil"), REAL),
    "correlated-last-axis": (likelihoods.CorrelatedGaussian(hermitian(4), REAL, -1), REAL),
    "correlated-complex-coil": (
        likelihoods.CorrelatedGaussian(hermitian(3, 1, True), COMPLEX, "coil"),
        COMPLEX,
    ),
    "correlated-complex-all": (likelihoods.CorrelatedGaussian(hermitian(12, 1, True), COMPLEX), COMPLEX),
    "correlated-real-matrix-complex-data": (
        likelihoods.CorrelatedGaussian(hermitian(3), COMPLEX, 0),
        COMPLEX,
    ),
    "poisson": (likelihoods.Poisson(0.5), REAL),
    "poisson-background": (likelihoods.Poisson(2.0, background=1.5), REAL),
    "poisson-gaussian": (likelihoods.PoissonGaussian(0.5, 0.4), REAL),
    "rician": (likelihoods.Rician(0.8), REAL),
    "wrapped": (
        likelihoods.WrappedGaussian(0.1 * hermitian(6), CLOSURES, torch.arange(6) < 4),
        CLOSURES,
    ),
}
each = pytest.mark.parametrize("name", CASES)


def setting(name, rows=2):
    likelihood, space = CASES[name]
    z = space.randn(rows, seed=3)
    if space is CLOSURES:
        z = 0.3 * z  # angles that noise does not turn around
    elif not space.is_complex:
        z = z.abs() * 3 + 0.2
    y = likelihood.sample(z, Streams(5, [(0, r) for r in range(rows)]))
    return likelihood, z, y


@each
def test_score_is_the_gradient(name):
    likelihood, z, y = setting(name)
    x = z.clone().requires_grad_(True)
    (grad,) = torch.autograd.grad(likelihood.log_prob(x, y).sum(), x)
    torch.testing.assert_close(likelihood.score(z, y), grad, rtol=1e-9, atol=1e-9)


@each
def test_score_along_a_direction_by_finite_differences(name):
    likelihood, z, y = setting(name)
    dz = torch.ones_like(z) * (1 if not z.is_complex() else 0.6 - 0.8j)
    h = 1e-5
    slope = (likelihood.log_prob(z + h * dz, y) - likelihood.log_prob(z - h * dz, y)) / (2 * h)
    torch.testing.assert_close(real_inner(likelihood.score(z, y), dz), slope, rtol=1e-6, atol=1e-6)


@each
def test_rows_do_not_meet(name):
    likelihood, z, y = setting(name, rows=3)
    for f in (likelihood.log_prob, likelihood.score):
        torch.testing.assert_close(f(z[1:2], y[1:2])[0], f(z, y)[1], rtol=1e-12, atol=1e-12)
    alone = likelihood.sample(z[2:], Streams(5, [(0, 2)]))
    torch.testing.assert_close(alone[0], y[2], rtol=0, atol=1e-12)


@each
def test_score_has_mean_zero_over_the_data(name):
    likelihood, z, _ = setting(name, rows=1)
    n = 1000
    many = z.expand(n, *z.shape[1:])
    score = torch.cat(
        [likelihood.score(many, likelihood.sample(many, Streams(s, [(0, r) for r in range(n)]))) for s in range(2)]
    )
    score = torch.view_as_real(score) if score.is_complex() else score
    z_score = score.mean(0) / (score.std(0) / math.sqrt(len(score)))
    assert float(z_score.abs().max()) < 4.5


@each
def test_precision_and_device_follow(name):
    likelihood, z, y = setting(name)
    single = likelihood.to(dtype=torch.float32)
    z32, y32 = (v.to(torch.complex64 if v.is_complex() else torch.float32) for v in (z, y))
    assert single.score(z32, y32).dtype == z32.dtype
    assert single.sample(z32, Streams(0, [(0, 0), (0, 1)])).dtype == z32.dtype
    assert single.log_prob(z32, y32).dtype == torch.float32
    torch.testing.assert_close(likelihood.log_prob(z, y), single.log_prob(z32, y32).double(), rtol=1e-3, atol=1e-3)


@each
def test_shift_invariance_is_declared_truly(name):
    likelihood, z, y = setting(name)
    b = 0.75
    same = torch.allclose(likelihood.log_prob(z + b, y + b), likelihood.log_prob(z, y))
    assert same == likelihood.shift_invariant


@each
def test_describe_and_repr(name):
    likelihood, _, _ = setting(name)
    assert likelihood.describe()["name"] == likelihood.name
    assert likelihood.name in repr(likelihood)


def one(likelihood, z, y):
    """log_prob for scalars, vectorised over ``y``."""
    y = torch.as_tensor(y, dtype=torch.float64).reshape(-1, 1)
    return likelihood.log_prob(torch.full_like(y, z), y).numpy()


@pytest.mark.parametrize(
    "likelihood, z, low, high",
    [
        (likelihoods.Gaussian(0.7), 0.4, -8, 8),
        (likelihoods.Rician(0.8), 0.0, 1e-9, 9),
        (likelihoods.Rician(0.8), 3.0, 1e-9, 12),
        (likelihoods.PoissonGaussian(0.5, 0.4), 2.0, -6, 16),
        (likelihoods.PoissonGaussian(1.0, 0.05), 2.0, -2, 30),
        (likelihoods.PoissonGaussian(0.01, 30.0), 200.0, -100, 500),
        (likelihoods.PoissonGaussian(1.0, 3.0), 900.0, 600, 1200),
        (likelihoods.PoissonGaussian(0.3, 0.4), 0.0, -4, 4),
    ],
)
def test_densities_integrate_to_one_with_the_right_moments(likelihood, z, low, high):
    y = np.linspace(low, high, 40_001)
    p = np.exp(one(likelihood, z, y))

    def integral(values, y):
        return values.sum() * (y[1] - y[0])

    floor = 0.0 if z > 0 or not isinstance(likelihood, likelihoods.PoissonGaussian) else 1e-3
    assert integral(p, y) == pytest.approx(1, abs=1e-6)
    if isinstance(likelihood, likelihoods.PoissonGaussian):
        gain, sigma = float(likelihood.gain), float(likelihood.sigma)
        rate = max(z / gain, floor)
        mean, var = integral(p * y, y), integral(p * y**2, y) - integral(p * y, y) ** 2
        assert mean == pytest.approx(gain * rate, rel=1e-5, abs=1e-6)
        assert var == pytest.approx(gain**2 * rate + sigma**2, rel=1e-4)
        matched = float(likelihood.gaussian_sigma(torch.full((1, 1), z, dtype=torch.float64)))
        assert matched**2 == pytest.approx(gain**2 * rate + sigma**2)


@pytest.mark.parametrize("gain, background, z", [(1.0, 0.0, 4.2), (0.25, 0.5, 2.0), (3.0, 0.0, 0.001)])
def test_poisson_probabilities_sum_to_one(gain, background, z):
    likelihood = likelihoods.Poisson(gain, background)
    k = np.arange(200)
    p = np.exp(one(likelihood, z, gain * k))
    dark = (z + background) / gain < 0.2  # one count is a surprise there
    assert p.sum() == pytest.approx(1, abs=0.012 if dark else 1e-7)
    assert dark or (p * gain * k).sum() == pytest.approx(z + background, rel=1e-6)


@pytest.mark.parametrize("likelihood", [likelihoods.Poisson(2.0, 0.5), likelihoods.PoissonGaussian(2.0, 0.4)])
def test_counts_draw_back_iterates_that_expect_less_than_nothing(likelihood):
    """The law has no value there; the score must point back, be finite, and not fall as one goes further out."""
    z = torch.linspace(-50, -1, 200, dtype=torch.float64)[:, None]
    for y in (0.0, 2.0, 200.0):
        score = likelihood.score(z, torch.full_like(z, y))
        assert bool((score > 0).all()) and bool(torch.isfinite(score).all())
        assert bool((score.diff(dim=0) <= 0).all())


def test_residuals_leave_out_a_background():
    problem = Problem(
        operators.Identity(Space((1, 2, 2), torch.float64)),
        likelihoods.Poisson(background=3.0),
        torch.full((1, 1, 2, 2), 10.0, dtype=torch.float64),
    )
    assert float(problem.residual(torch.full((1, 1, 2, 2), 7.0, dtype=torch.float64)).abs().max()) == 0


def test_poisson_gaussian_against_a_plain_sum():
    likelihood = likelihoods.PoissonGaussian(0.5, 2.0)
    k = torch.arange(2000, dtype=torch.float64)
    for z, y in ((3.0, 2.0), (300.0, 310.0), (300.0, 200.0), (0.1, 9.0), (2.0, -5.0), (900.0, 905.0)):
        terms = k * math.log(z / 0.5) - z / 0.5 - torch.lgamma(k + 1) - 0.5 * ((y - 0.5 * k) / 2.0) ** 2
        want = float(torch.logsumexp(terms, 0)) - math.log(2.0 * math.sqrt(2 * math.pi))
        assert one(likelihood, z, y)[0] == pytest.approx(want, abs=1e-9)


def test_poisson_gaussian_becomes_gaussian_for_many_counts():
    likelihood, z = likelihoods.PoissonGaussian(1.0, 50.0), torch.full((1, 1), 1e6, dtype=torch.float64)
    y = z + 300.0
    sigma = likelihood.gaussian_sigma(z)
    torch.testing.assert_close(
        likelihood.log_prob(z, y), likelihoods.Gaussian(sigma).log_prob(z, y), rtol=0, atol=2e-3
    )


@pytest.mark.parametrize("name", [n for n in CASES if "rician" not in n])
def test_moments_of_samples(name):
    likelihood, z, _ = setting(name, rows=1)
    n = 3000
    y = likelihood.sample(z.expand(n, *z.shape[1:]), Streams(11, [(0, r) for r in range(n)]))
    mean = z[0] + getattr(likelihood, "background", torch.zeros(()))
    e = y - mean
    e = torch.view_as_real(e) if e.is_complex() else e
    assert float((e.mean(0) / (e.std(0) / math.sqrt(n))).abs().max()) < 4.5
    sigma = likelihood.gaussian_sigma(z)
    if sigma is not None and not isinstance(likelihood, likelihoods.Poisson):
        sigma = sigma.expand(z.shape)[0]
        want = sigma[..., None] if y.is_complex() else sigma
        assert float((e.std(0) / want - 1).abs().max()) < 0.1
    if isinstance(likelihood, likelihoods.Poisson):
        want = (float(likelihood.gain) * mean).sqrt()
        assert float((e.std(0) / want - 1).abs().max()) < 0.1


def test_rician_second_moment():
    z = torch.full((4000, 1), 1.5, dtype=torch.float64)
    y = likelihoods.Rician(0.8).sample(z, Streams(2, [(0, r) for r in range(4000)]))
    assert float((y**2).mean()) == pytest.approx(1.5**2 + 2 * 0.8**2, rel=0.05)


@pytest.mark.parametrize("name", [n for n in CASES if n.startswith("correlated")])
def test_whitening_gives_independent_unit_noise(name):
    likelihood, z, y = setting(name, rows=2)
    w = likelihood.whiten()
    n = 3000
    noise = likelihood.sample(torch.zeros(n, *z.shape[1:], dtype=z.dtype), Streams(1, [(0, r) for r in range(n)]))
    e = w(noise)
    e = (torch.view_as_real(e) if e.is_complex() else e).flatten(1)
    cov = e.T @ e / n
    assert float((cov - torch.eye(len(cov))).abs().max()) < 0.12
    a, b = CASES[name][1].randn(2, 7), CASES[name][1].randn(2, 8)
    torch.testing.assert_close(real_inner(w(a), b), real_inner(a, w.adjoint(b)))
    torch.testing.assert_close(likelihood.score(z, y), w.adjoint(w(y - z)))
    white = likelihoods.Gaussian(1.0)
    log_prob = [likelihood.log_prob(v, y) - white.log_prob(w(v), w(y)) for v in (z, 0.3 * z)]
    torch.testing.assert_close(log_prob[0], log_prob[1])


def test_correlated_with_scaled_identity_is_gaussian():
    for space in (REAL, COMPLEX):
        z, y = space.randn(2, 1), space.randn(2, 2)
        plain = likelihoods.Gaussian(0.6)
        for axis, k in ((None, 12), ("coil", 3), (1, 4)):
            other = likelihoods.CorrelatedGaussian(0.36 * torch.eye(k, dtype=torch.float64), space, axis)
            torch.testing.assert_close(other.log_prob(z, y), plain.log_prob(z, y))
            torch.testing.assert_close(other.score(z, y), plain.score(z, y))


def test_complex_covariance_convention():
    c = hermitian(3, 4, True)
    likelihood = likelihoods.CorrelatedGaussian(c, COMPLEX, "coil")
    n = 4000
    e = likelihood.sample(torch.zeros(n, 3, 4, dtype=torch.complex128), Streams(0, [(0, r) for r in range(n)]))
    e = e.movedim(1, 2).reshape(-1, 3)
    assert float((e.T @ e.conj() / len(e) - 2 * c).abs().max()) < 0.1
    assert float((e.T @ e / len(e)).abs().max()) < 0.1


def test_cases_have_their_own_covariance():
    both = torch.stack([hermitian(3, s, True) for s in range(2)])
    likelihood = likelihoods.CorrelatedGaussian(both, COMPLEX, "coil")
    assert likelihood.n_cases == 2 and likelihood.whiten().n_cases == 2
    z, y = COMPLEX.randn(2, 1), COMPLEX.randn(2, 2)
    one_case = likelihoods.CorrelatedGaussian(both[1], COMPLEX, "coil")
    torch.testing.assert_close(likelihood.log_prob(z, y)[1:], one_case.log_prob(z[1:], y[1:]))
    picked = likelihood.rows(torch.tensor([1, 1]))
    torch.testing.assert_close(picked.score(z, y)[1], one_case.score(z[1:], y[1:])[0])


def test_whitened_problem_has_the_same_gradient():
    from invdiff.operator import LinearOperator

    class Double(LinearOperator):
        domain = range = COMPLEX

        def _forward(self, x):
            return (1 + 2j) * x

        def _adjoint(self, y):
            return (1 - 2j) * y

    x = COMPLEX.randn(1, 1)
    likelihood = likelihoods.CorrelatedGaussian(hermitian(3, 1, True), COMPLEX, "coil")
    problem = Problem.simulate(Double(), likelihood, x, seed=1)
    torch.testing.assert_close(problem.whiten().grad_log_likelihood(0 * x), problem.grad_log_likelihood(0 * x))


def test_high_snr_rician_does_not_overflow():
    z = torch.full((1, 1), 5.0, dtype=torch.float64)
    likelihood = likelihoods.Rician(1e-3)
    assert bool(torch.isfinite(likelihood.log_prob(z, z + 1e-3)).all())
    torch.testing.assert_close(
        likelihood.score(z, z + 1e-3), torch.full((1, 1), 1e3, dtype=torch.float64), rtol=1e-3, atol=0
    )


Y = torch.full((1, 3, 4), -1.0, dtype=torch.float64)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: likelihoods.Gaussian(-1.0), "sigma must be finite and not negative"),
        (lambda: likelihoods.Poisson(-2.0), "gain must be finite and not negative"),
        (lambda: likelihoods.Poisson(0.0), "gain must be above 0"),
        (lambda: likelihoods.Poisson(1.0, -1.0), "background"),
        (lambda: likelihoods.PoissonGaussian(1.0, 0.0), "sigma must be above 0"),
        (lambda: likelihoods.Rician(0.0), "sigma must be above 0"),
        (lambda: likelihoods.Poisson().log_prob(Y.abs(), Y), "cannot be negative"),
        (lambda: likelihoods.Rician(1.0).score(Y.abs(), Y), "cannot be negative"),
        (lambda: likelihoods.Rician(1.0).score(Y + 0j, -Y), "real amplitudes"),
        (lambda: likelihoods.Poisson().score(Y + 0j, -Y), "needs real data"),
        (lambda: likelihoods.CorrelatedGaussian(torch.eye(3), REAL), r"expected \(12, 12\)"),
        (lambda: likelihoods.CorrelatedGaussian(torch.eye(3), REAL, "slice"), "no axis 'slice'"),
        (lambda: likelihoods.CorrelatedGaussian(torch.eye(3), REAL, 2), "axis 2"),
        (lambda: likelihoods.CorrelatedGaussian(hermitian(3, 0, True), REAL, 0), "data are real"),
        (lambda: likelihoods.CorrelatedGaussian(-torch.eye(3), REAL, 0), "positive definite"),
        (lambda: likelihoods.CorrelatedGaussian(torch.ones(3, 3).triu(), REAL, 0), "Hermitian"),
    ],
)
def test_bad_input_gets_one_sentence(make, words):
    with pytest.raises(InvdiffError, match=words):
        make()
