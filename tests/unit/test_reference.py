"""Exact posteriors against textbook formulas, quadrature and their own draws; grading of exact draws."""

import math

import pytest
import torch

from invdiff import anchors, conditioning, likelihoods, operators, priors, reference
from invdiff.codec import AffineChain, Chain, ComplexChannels, Pad, Scale
from invdiff.directions import singular_directions
from invdiff.errors import InvdiffError
from invdiff.problem import Problem
from invdiff.spaces import Space


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=gen(seed))


def spd(n, seed=0):
    a = randn(n, n, seed=seed)
    return a @ a.T / n + 0.1 * torch.eye(n, dtype=torch.float64)


def textbook(a, noise, y, m, c):
    """Mean and covariance of ``x | y`` for ``y = a x + N(0, noise)``, by the plain formula."""
    s = a @ c @ a.T + noise
    k = c @ a.T @ torch.linalg.inv(s)
    return m + k @ (y - a @ m), c - k @ a @ c


def dense_problem(m, n, sigma, seed=0):
    problem = Problem.simulate(
        operators.Matrix(randn(m, n, seed=seed)), likelihoods.Gaussian(sigma), randn(1, n, seed=seed + 1), seed
    )
    return problem, priors.Gaussian(randn(n, seed=seed + 2), spd(n, seed + 3))


def test_one_dimension_is_the_conjugate_formula():
    problem = Problem(
        operators.Matrix(torch.tensor([[2.0]]).double()), likelihoods.Gaussian(0.5), torch.tensor([[3.0]])
    )
    exact = reference.posterior(problem, priors.Gaussian([1.0], [[4.0]]))
    precision = 1 / 4 + 4 / 0.25
    assert float(exact.mean()) == pytest.approx((1 / 4 + 2 * 3 / 0.25) / precision)
    assert float(exact.std()) == pytest.approx(precision**-0.5)
    want = torch.distributions.Normal(exact.mean()[0], exact.std()[0])
    x = torch.tensor([[0.7], [2.0]], dtype=torch.float64)
    torch.testing.assert_close(exact.log_prob(x), want.log_prob(x)[:, 0])
    evidence = torch.distributions.Normal(2.0, math.sqrt(4 * 4 + 0.25)).log_prob(torch.tensor(3.0).double())
    assert float(exact.log_evidence()) == pytest.approx(float(evidence))


@pytest.mark.parametrize("m, n, factor", [(3, 7, "DataFactor"), (9, 4, "PrecisionFactor")])
@pytest.mark.parametrize("sigma", ["number", "array"])
def test_dense_against_the_textbook(m, n, factor, sigma):
    level = torch.full((1, m), 0.3).double() if sigma == "number" else torch.linspace(0.1, 2, m).double()[None]
    problem, prior = dense_problem(m, n, 0.3 if sigma == "number" else level)
    exact = reference.posterior(problem, prior)
    assert type(exact.cases[0][0].factor).__name__ == factor
    d = prior.denoiser
    mean, cov = textbook(
        problem.operator.matrix[0], torch.diag(level[0] ** 2), problem.y[0], d.mean, d.covariance_matrix()
    )
    torch.testing.assert_close(exact.mean()[0], mean)
    torch.testing.assert_close(exact.covariance()[0], cov)
    torch.testing.assert_close(exact.std()[0], cov.diagonal().sqrt())
    x = randn(5, n, seed=8)
    torch.testing.assert_close(exact.log_prob(x), torch.distributions.MultivariateNormal(mean, cov).log_prob(x))
    v = randn(2, n, seed=9)
    _, means, stds = exact.marginals(v)
    torch.testing.assert_close(means[0], v @ mean)
    torch.testing.assert_close(stds[0], (v @ cov @ v.T).diagonal().sqrt())


@pytest.mark.parametrize("m", [3, 9])
def test_all_factors_agree(m):
    problem, prior = dense_problem(m, 6, 0.2)
    exact = reference.posterior(problem, prior)
    frame = exact.cases[0][0].factor.frame
    r = randn(1, m, seed=3)
    factors = [
        f(frame) for f in (conditioning.DataFactor, conditioning.PrecisionFactor, conditioning.IterativeFactor)
    ]
    for f in factors[1:]:
        torch.testing.assert_close(f.mean(r), factors[0].mean(r), rtol=1e-7, atol=1e-8)
        torch.testing.assert_close(f.covariance(), factors[0].covariance(), rtol=1e-6, atol=1e-8)
    assert factors[0].logdet == pytest.approx(factors[1].logdet)
    torch.testing.assert_close(factors[0].variance(), factors[1].variance())
    assert float((factors[2].variance() / factors[0].variance() - 1).abs().max()) < 0.3
    assert factors[2].variance_error == pytest.approx(1 / 32)


def draws_have_the_moments(exact, n=4000, case=0):
    x = conditioning.stack_real(exact.sample(n, 1)[case])
    mean = conditioning.stack_real(exact.mean()[case : case + 1])[0]
    cov = exact.covariance()[case]
    scale = cov.diagonal().sqrt()
    assert float(((x.mean(0) - mean) / scale).abs().max()) < 4.5 / math.sqrt(n)
    z = (x - mean) / scale
    products = z[:, :, None] * z[:, None]
    error = products.mean(0) - cov / torch.outer(scale, scale)
    assert float((error / products.std(0)).abs().max()) < 4.5 / math.sqrt(n)


@pytest.mark.parametrize("m", [2, 8])
def test_moments_of_exact_draws(m):
    draws_have_the_moments(reference.posterior(*dense_problem(m, 5, 0.4)))


def test_draws_belong_to_case_and_draw():
    problem, prior = dense_problem(2, 5, 0.4)
    two = Problem(problem.operator, problem.likelihood, torch.cat([problem.y, problem.y + 1]))
    exact = reference.posterior(two, prior)
    assert exact.cases[0][0].factor is exact.cases[1][0].factor
    torch.testing.assert_close(exact.sample(9, 3)[:, :4], exact.sample(4, 3))
    torch.testing.assert_close(exact.mean()[:1], reference.posterior(problem, prior).mean())
    assert not torch.allclose(exact.sample(3, 3), exact.sample(3, 4))
    x = exact.sample(3)
    torch.testing.assert_close(exact.log_prob(x)[1], exact.log_prob(x[1], case=1))


def test_cases_with_their_own_operators():
    masks = (torch.rand(2, 1, 4, 4, generator=gen()) < 0.5).double()
    space = Space((1, 4, 4), torch.float64)
    prior = priors.StationaryGaussian((4, 4), correlation_length=1.0)
    x = prior.denoiser.sample(2, 1)
    problem = Problem.simulate(operators.Mask(masks, space), likelihoods.Gaussian(0.1), x)
    exact = reference.posterior(problem, prior)
    for i in range(2):
        a = torch.diag(masks[i].flatten())
        mean, cov = textbook(
            a,
            0.01 * torch.eye(16).double(),
            problem.y[i].flatten(),
            torch.zeros(16).double(),
            prior.denoiser.covariance_matrix(),
        )
        torch.testing.assert_close(exact.mean()[i].flatten(), mean)
        torch.testing.assert_close(exact.covariance()[i], cov)


COMPLEX = Space((1, 3, 4), torch.complex128)


def complex_setting(likelihood=None, mask=None):
    mask = (torch.rand(3, 4, generator=gen(2)) < 0.6) if mask is None else mask
    a = operators.SubsampledFourier(mask, COMPLEX)
    codec = ComplexChannels(COMPLEX)
    prior = priors.StationaryGaussian((2, 3, 4), correlation_length=1.0, mean=0.2)
    from dataclasses import replace

    prior = replace(prior, codec=codec)
    x = codec.decode(prior.denoiser.sample(1, 4))
    return Problem.simulate(a, likelihood or likelihoods.Gaussian(0.3), x, 1), prior


def real_matrix(operator):
    n = operator.domain.real_size
    eye = conditioning.unstack_real(torch.eye(n, dtype=torch.float64), operator.domain)
    return conditioning.stack_real(operator(eye)).T


def complex_prior(prior):
    """Mean and covariance over interleaved real components of the image."""
    order = torch.arange(24).reshape(2, 12).T.flatten()
    d = prior.denoiser
    return d.mean.flatten()[order], d.covariance_matrix()[order][:, order]


def test_complex_data_with_sigma_per_real_component():
    problem, prior = complex_setting()
    exact = reference.posterior(problem, prior)
    m, c = complex_prior(prior)
    y = conditioning.stack_real(problem.y)[0]
    mean, cov = textbook(real_matrix(problem.operator), 0.09 * torch.eye(24).double(), y, m, c)
    torch.testing.assert_close(conditioning.stack_real(exact.mean())[0], mean)
    torch.testing.assert_close(exact.covariance()[0], cov)
    var = cov.diagonal().reshape(-1, 2).sum(1)
    torch.testing.assert_close(exact.std().flatten(), var.sqrt())
    x = conditioning.unstack_real(randn(3, 24), COMPLEX)
    want = torch.distributions.MultivariateNormal(mean, cov).log_prob(conditioning.stack_real(x))
    torch.testing.assert_close(exact.log_prob(x), want)
    draws_have_the_moments(exact)


def test_correlated_noise_by_whitening():
    a = torch.complex(randn(4, 4, seed=1), randn(4, 4, seed=2))
    c = a @ a.mH / 4 + 0.2 * torch.eye(4)
    likelihood = likelihoods.CorrelatedGaussian(c, Space((1, 3, 4), torch.complex128), -1)
    problem, prior = complex_setting(likelihood, torch.ones(3, 4))
    exact = reference.posterior(problem, prior)
    unit = conditioning.unstack_real(torch.eye(24, dtype=torch.float64), COMPLEX)
    noise = conditioning.stack_real((c @ unit.movedim(-1, 1).flatten(2)).reshape(24, 4, 1, 3).movedim(1, -1)).T
    m, cov = complex_prior(prior)
    y = conditioning.stack_real(problem.y)[0]
    mean, cov = textbook(real_matrix(problem.operator), noise, y, m, cov)
    torch.testing.assert_close(conditioning.stack_real(exact.mean())[0], mean)
    torch.testing.assert_close(exact.covariance()[0], cov)


def test_rescaling_the_image_changes_nothing():
    """The prior of ``x`` itself, and the same law written in other units behind a codec."""
    from dataclasses import replace

    space = Space((1, 2, 3), torch.float64)
    problem = Problem.simulate(
        operators.Matrix(randn(4, 6), space), likelihoods.Gaussian(0.3), randn(1, 1, 2, 3, seed=1)
    )
    mean, cov = randn(6, seed=2), spd(6)
    plain = reference.posterior(problem, priors.Gaussian(mean, cov, space))
    scale, shift = 7.0, -2.0
    for codec in (Scale(space, scale, shift), Chain([Scale(space, 2.0, shift), Scale(space, 3.5)])):
        other = replace(priors.Gaussian((mean - shift) / scale, cov / scale**2, space), codec=codec)
        exact = reference.posterior(problem, other)
        torch.testing.assert_close(exact.mean(), plain.mean())
        torch.testing.assert_close(exact.std(), plain.std())
        x = randn(3, 1, 2, 3, seed=5)
        torch.testing.assert_close(exact.log_prob(x), plain.log_prob(x))
        torch.testing.assert_close(exact.log_evidence(), plain.log_evidence())


def test_cropping_codec_gives_the_marginal():
    from dataclasses import replace

    space = Space((1, 3, 3), torch.float64)
    codec = Pad(space, 4)
    prior = replace(priors.StationaryGaussian((4, 4), correlation_length=1.0), codec=codec)
    problem = Problem.simulate(
        operators.Identity(space), likelihoods.Gaussian(0.5), codec.decode(prior.denoiser.sample(1))
    )
    exact = reference.posterior(problem, prior)
    keep = codec.decode(torch.arange(16.0).reshape(1, 1, 4, 4)).flatten().long()
    c = prior.denoiser.covariance_matrix()[keep][:, keep]
    eye = torch.eye(9, dtype=torch.float64)
    mean, cov = textbook(eye, 0.25 * eye, problem.y.flatten(), torch.zeros(9).double(), c)
    torch.testing.assert_close(exact.mean().flatten(), mean)
    torch.testing.assert_close(exact.covariance()[0], cov)
    torch.testing.assert_close(exact.std().flatten(), cov.diagonal().sqrt())
    with pytest.raises(InvdiffError, match="drops some"):
        exact.log_prob(exact.mean())
    assert isinstance(Chain([codec, Scale(codec.prior)]), AffineChain)


@pytest.mark.parametrize("kind", ["blur", "fourier", "identity"])
def test_filters_are_recognised_and_agree_with_the_dense_way(kind):
    space = Space((1, 6, 8), torch.float64)
    mask = torch.zeros(6, 8)
    mask[:, ::3] = 1
    a = {
        "blur": lambda: operators.GaussianBlur(0.8, space),
        "fourier": lambda: operators.SubsampledFourier(mask, space),
        "identity": lambda: operators.Identity(space),
    }[kind]()
    prior = priors.StationaryGaussian((6, 8), correlation_length=1.5, mean=0.4)
    problem = Problem.simulate(a, likelihoods.Gaussian(0.1), prior.denoiser.sample(1, 3))
    exact = reference.posterior(problem, prior)
    factor = exact.cases[0][0].factor
    assert isinstance(factor, conditioning.FilterFactor)
    dense = conditioning.PrecisionFactor(factor.frame)
    torch.testing.assert_close(factor.covariance(), dense.covariance(), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(factor.variance(), dense.variance())
    assert factor.logdet == pytest.approx(dense.logdet)
    r = randn(1, factor.frame.m)
    torch.testing.assert_close(factor.mean(r), dense.mean(r), rtol=1e-7, atol=1e-8)
    draws_have_the_moments(exact, 3000)


def test_large_problems_are_closed_form_or_iterative():
    space = Space((1, 128, 96), torch.float64)
    prior = priors.StationaryGaussian((128, 96))
    x = prior.denoiser.sample(1, 1)
    blur = reference.posterior(
        Problem.simulate(operators.GaussianBlur(1.5, space), likelihoods.Gaussian(0.05), x), prior
    )
    z = ((x - blur.mean()) / blur.std()).flatten()
    assert float((z**2).mean()) == pytest.approx(1, abs=0.15) and blur.std_error == 0
    assert bool(torch.isfinite(blur.log_prob(x)).all())
    mask = (torch.rand(1, 128, 96, generator=gen()) < 0.5).double()
    rest = reference.posterior(Problem.simulate(operators.Mask(mask, space), likelihoods.Gaussian(0.5), x), prior)
    assert isinstance(rest.cases[0][0].factor, conditioning.IterativeFactor)
    assert float((rest.mean() - x).square().mean()) < 0.1 and rest.sample(2).shape == (1, 2, 1, 128, 96)
    assert rest.std_error == pytest.approx(1 / 32)
    with pytest.raises(InvdiffError, match="out of reach"):
        rest.log_prob(x)
    with pytest.raises(InvdiffError, match="too large"):
        rest.covariance()


@pytest.mark.parametrize("kind", ["isotropic", "dense"])
def test_mixture_by_quadrature_on_a_grid(kind):
    cov = [0.5, 1.5, 0.8] if kind == "isotropic" else torch.stack([spd(2, s) for s in range(3)])
    prior = priors.GaussianMixture([0.2, 0.5, 0.3], [[-3.0, 0.0], [2.0, 2.0], [1.0, -3.0]], cov)
    a = torch.tensor([[0.6, 0.4]], dtype=torch.float64)
    problem = Problem(operators.Matrix(a), likelihoods.Gaussian(0.7), torch.tensor([[0.3]], dtype=torch.float64))
    exact = reference.posterior(problem, prior)
    axis = torch.linspace(-12, 12, 601, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    joint = prior.denoiser.log_prob(grid) + problem.likelihood.log_prob(grid @ a.T, problem.y)
    area = float(axis[1] - axis[0]) ** 2
    evidence = float(torch.logsumexp(joint, 0)) + math.log(area)
    assert float(exact.log_evidence()) == pytest.approx(evidence, abs=1e-8)
    p = (joint - evidence).exp() * area
    mean = p @ grid
    torch.testing.assert_close(exact.mean()[0], mean, rtol=1e-7, atol=1e-7)
    cov = (grid - mean).T @ (p[:, None] * (grid - mean))
    torch.testing.assert_close(exact.covariance()[0], cov, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(exact.std()[0], cov.diagonal().sqrt(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(exact.log_prob(grid[:50]), (joint - evidence)[:50], rtol=1e-7, atol=1e-7)
    weights = p @ prior.denoiser.responsibilities(grid)
    torch.testing.assert_close(exact.weights[0], weights, rtol=1e-6, atol=1e-7)
    draws_have_the_moments(exact, 8000)


def test_refusals_say_why():
    problem, prior = dense_problem(2, 3, 0.1)
    from invdiff.operator import Affine
    from invdiff.prior import FunctionDenoiser, Prior

    learned = Prior(FunctionDenoiser(lambda x, s: x, Space((3,), torch.float64), 0.1, 10.0))
    for bad, words in (
        (lambda: reference.posterior(problem, learned), "closed form"),
        (
            lambda: reference.posterior(
                Problem(Affine(problem.operator, torch.ones(1, 2).double()), problem.likelihood, problem.y), prior
            ),
            "linear operator",
        ),
        (
            lambda: reference.posterior(Problem(problem.operator, likelihoods.Poisson(), problem.y.abs()), prior),
            "Gaussian noise",
        ),
        (
            lambda: reference.posterior(Problem(problem.operator, likelihoods.Gaussian(0.0), problem.y), prior),
            "above 0",
        ),
        (lambda: reference.posterior(problem, priors.StationaryGaussian((4, 4))), "choose a prior"),
    ):
        with pytest.raises(InvdiffError, match=words):
            bad()


@pytest.mark.parametrize("operator", ["matrix", "mask", "fourier", "complex"])
def test_directions_are_orthonormal_and_split_the_space(operator):
    space = Space((1, 4, 6), torch.float64)
    mask = (torch.rand(4, 6, generator=gen(3)) < 0.5).double()
    a = {
        "matrix": lambda: operators.Matrix(randn(5, 24), space),
        "mask": lambda: operators.Mask(mask, space),
        "fourier": lambda: operators.SubsampledFourier(mask, space),
        "complex": lambda: operators.SubsampledFourier(mask, Space((1, 4, 6), torch.complex128)),
    }[operator]()
    measured, null = singular_directions(a)
    basis = torch.cat([measured, null])
    torch.testing.assert_close(basis @ basis.T, torch.eye(a.domain.real_size, dtype=torch.float64))
    dense = real_matrix(a)
    assert float((dense @ null.T).abs().max()) < 1e-9
    assert torch.linalg.matrix_rank(dense) == len(measured)
    few, _ = singular_directions(a, limit=3)
    assert len(few) in (3, 6)


@pytest.mark.parametrize("operator", ["mask", "fourier", "blur"])
def test_grading_exact_draws_gives_the_floor(operator):
    problem, prior = anchors.gaussian_field(16, operator, seed=1)
    exact = reference.posterior(problem, prior)
    row = anchors.grade(exact.sample(256, 5), exact)
    assert row["mean_error"] == pytest.approx(1 / 16, abs=0.02)
    for key in ("std_ratio", "std_ratio_measured"):
        assert row[key] == pytest.approx(1, abs=0.02)
    for key in ("coverage", "coverage_measured"):
        assert row[key] == pytest.approx(0.9, abs=0.01)
    assert row["chi2_ratio"] == pytest.approx(1, abs=0.05) and math.isnan(row["mode_tv"])
    assert abs(row["logp_shift"]) < 4


def test_grading_sees_what_is_wrong():
    problem, prior = anchors.gaussian_field(16, "mask")
    exact = reference.posterior(problem, prior)
    x, mean = exact.sample(256, 1)[0], exact.mean()
    assert anchors.grade(mean + 0.5 * (x - mean), exact)["std_ratio"] == pytest.approx(0.5, abs=0.02)
    assert anchors.grade(mean + 0.5 * (x - mean), exact)["coverage"] < 0.65
    assert anchors.grade(x + exact.std(), exact)["mean_error"] == pytest.approx(1, abs=0.1)
    fits_noise = x + problem.operator(problem.y - x)
    row = anchors.grade(fits_noise, exact)
    assert row["std_ratio_measured"] < 0.01 < 0.9 < row["std_ratio_null"] and row["chi2_ratio"] < 1e-3


@pytest.mark.parametrize("d", [8, 80])
def test_mixture_of_the_paper(d):
    floor = []
    for seed in range(3):
        problem, prior = anchors.mcgdiff_mixture(d, 1, seed)
        exact = reference.posterior(problem, prior)
        a, b = (exact.sample(1000, s)[0] for s in (1, 2))
        floor.append(anchors.sliced_wasserstein(a, b, 200))
    assert 0.01 < sum(floor) / 3 < 0.6
    row = anchors.grade(a, exact)
    assert row["mode_tv"] < 0.08 and row["mean_error"] < 0.15
    assert row["coverage"] == pytest.approx(0.9, abs=0.03)
    one_mode = a[prior.denoiser.responsibilities(a).argmax(1) == int(exact.weights[0].argmin())]
    assert len(one_mode) < 500
    assert prior.denoiser.means.shape == (25, d) and float(prior.denoiser.means.abs().max()) == 16


def test_bad_input_to_the_anchors():
    problem, prior = anchors.gaussian_field(8)
    exact = reference.posterior(problem, prior)
    for bad, words in (
        (lambda: anchors.gaussian_field(8, "radon"), "not 'radon'"),
        (lambda: anchors.mcgdiff_mixture(7, 1, 0), "even d"),
        (lambda: anchors.grade(torch.zeros(1, 1, 8, 8), exact), "at least two draws"),
        (lambda: exact.log_prob(torch.zeros(2, 3, 1, 8, 8)), "log_prob got shape"),
    ):
        with pytest.raises(InvdiffError, match=words):
            bad()
