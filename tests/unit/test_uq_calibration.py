"""Parts of the diagnostics: p-values of uniformity, multiplicity, ranks, residuals, classifiers, regression."""

import numpy as np
import pytest
import torch

from invdiff import likelihoods, operators
from invdiff.errors import InvdiffError
from invdiff.problem import Problem
from invdiff.spaces import Space
from invdiff.uq import band, c2st, controls, ecdf, local_c2st, ranks, sbc, uniform_p_value
from invdiff.uq.draws import read_draws
from invdiff.uq.predictive import predictive_chi_squared, residual_whiteness
from invdiff.uq.regression import Ridge
from invdiff.uq.uniformity import holm


@pytest.mark.parametrize("n", [2, 7, 50, 400])
def test_p_values_of_uniform_numbers_are_uniform(n):
    """Rejection rates of 4,000 samples at four levels; discrete counts may only make them smaller."""
    rng = np.random.default_rng(n)
    p = np.array([uniform_p_value(rng.random(n)) for _ in range(2000)])
    for level in (0.5, 0.1, 0.05, 0.01):
        rate, error = (p <= level).mean(), np.sqrt(level * (1 - level) / 2000)
        assert rate <= level + 4 * error
        if n >= 50:
            assert rate >= 0.7 * level - 4 * error


def test_p_value_of_two_numbers_is_exact():
    """One comparison, at 1/2: counts 0, 1, 2 have probabilities 1/4, 1/2, 1/4."""
    assert uniform_p_value([0.1, 0.2]) == pytest.approx(0.5, abs=1e-9)
    assert uniform_p_value([0.1, 0.7]) == pytest.approx(1.0, abs=1e-9)


def test_p_values_reach_far_into_the_tail():
    """The whole sample below 1/2 has probability 2^-100: reported as the floor."""
    u = np.random.default_rng(0).random(100)
    assert uniform_p_value(0.5 * u) == 1e-12
    assert 1e-9 < uniform_p_value(u**1.7) < 1e-2


def test_band_holds_whole_functions_with_its_level():
    rng = np.random.default_rng(1)
    for level in (0.9, 0.99):
        found = band(80, level)
        paths = np.stack([ecdf(rng.random(80), found.z) for _ in range(3000)])
        held = ((paths >= found.lower - 1e-12) & (paths <= found.upper + 1e-12)).all(1).mean()
        assert level - 4 * np.sqrt(level * (1 - level) / 3000) <= held <= level + 0.02


def test_holm_is_the_step_down_of_bonferroni():
    assert holm([0.01, 0.04, 0.03]).tolist() == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9, 1e-4]).tolist() == pytest.approx([1.0, 1.0, 3e-4])


def test_ranks_are_uniform_for_any_quantity_ties_included():
    """400 cases of 5 draws: p-values above 0.1 % for each of five quantities, of one point and of all points."""
    rng = np.random.default_rng(2)
    points = rng.standard_normal((400, 6, 10))
    for quantity in (
        ranks.random_projection(3),
        lambda x, _: np.round(x[:, 0]),
        lambda x, _: np.abs(x - np.median(x, axis=0)).sum(1),
        ranks.band_energy(0.5, 2),
        ranks.principal_distance,
    ):
        u = sbc(points[:, 1:], points[:, 0], quantity)
        assert uniform_p_value(u) > 1e-3
    assert uniform_p_value(sbc(0.3 * points[:, 1:], points[:, 0], ranks.mean_distance)) < 1e-9


def test_quantities_are_what_they_say():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 1, 6, 8))
    total = np.abs(np.fft.fft2(x)) ** 2
    np.testing.assert_allclose(ranks.band_energy(0, 9)(x, 0), total.sum((1, 2, 3)), rtol=1e-10)
    flat = np.broadcast_to(x.mean((1, 2, 3)) ** 2 * 48**2, 5)
    np.testing.assert_allclose(ranks.band_energy(0, 0.2)(x, 0), flat, rtol=1e-10)
    labels = np.zeros((6, 8), int)
    labels[2:4, 1:5] = 7
    np.testing.assert_allclose(ranks.region_mean(labels, 7)(x, 0), x[:, 0, 2:4, 1:5].mean((1, 2)), rtol=1e-12)
    np.testing.assert_allclose(ranks.mean_value(x + 1j * x, 0), np.sqrt(2) * np.abs(x).mean((1, 2, 3)), rtol=1e-12)
    v = x.reshape(5, -1)
    far = np.linalg.norm(v[:, None] - v, axis=2)
    np.testing.assert_allclose(ranks.mean_distance(x, 0), far.mean(1), rtol=1e-12)
    np.testing.assert_allclose(ranks.nearest_distance(x, 0), (far + 99 * np.eye(5)).min(1), rtol=1e-12)
    c = v - v.mean(0)
    main = np.linalg.svd(c, full_matrices=False)[2][0]
    np.testing.assert_allclose(ranks.principal_distance(x, 0), np.abs(c @ main), rtol=1e-8)

    control = controls.gaussian(20, 4)
    problem = Problem(
        operators.Matrix(torch.from_numpy(control.matrix)), likelihoods.Gaussian(0.4), torch.from_numpy(control.y)
    )
    r = control.y[3] - control.draws[3] @ control.matrix.T
    np.testing.assert_allclose(
        ranks.residual_norm(problem)(control.draws[3], 3), np.linalg.norm(r, axis=1), rtol=1e-10
    )
    found = ranks.log_likelihood(problem)(control.draws[3], 3)
    wanted = -0.5 * (r**2).sum(1) / 0.16 - 6 * np.log(0.4 * np.sqrt(2 * np.pi))
    np.testing.assert_allclose(found, wanted, rtol=1e-10)


def test_outer_tenth_of_thirty_one_points():
    """The two lowest and the two highest ranks lie beyond 0.9 of the way, the others do not."""
    x = np.arange(31.0)[:, None]
    assert ranks.pixels_outside(x, 0).tolist() == [1, 1] + [0] * 27 + [1, 1]
    assert ranks.pixels_outside(np.zeros((31, 2)), 0).tolist() == [0] * 31


@pytest.mark.parametrize("correlated", [False, True])
def test_residuals_of_exact_draws_follow_the_noise(correlated):
    """x ~ N(0, I), y = x + noise; 300 cases. A wrong noise level, and structure in the residual, are seen."""
    rng = np.random.default_rng(1)
    d = 16
    space = Space((d,), torch.float64)
    cov = (
        0.3 * np.exp(-np.abs(np.subtract.outer(np.arange(d), np.arange(d))) / 2) if correlated else 0.3 * np.eye(d)
    )
    x = rng.standard_normal((300, d))
    y = x + rng.standard_normal((300, d)) @ np.linalg.cholesky(cov).T
    gain = np.linalg.inv(np.eye(d) + cov)
    spread = np.linalg.cholesky(np.eye(d) - gain)
    exact = (y @ gain.T)[:, None] + rng.standard_normal((300, 3, d)) @ spread.T

    def problem(scale):
        noise = (
            likelihoods.CorrelatedGaussian(torch.from_numpy(scale**2 * cov), space)
            if correlated
            else likelihoods.Gaussian(scale * 0.3**0.5)
        )
        return Problem(operators.Identity(space), noise, torch.from_numpy(y))

    right, draws = problem(1.0), exact
    assert uniform_p_value(predictive_chi_squared(right, draws)) > 0.01
    assert uniform_p_value(residual_whiteness(right, draws)) > 0.01
    u = predictive_chi_squared(problem(1.3), draws)
    assert u.mean() < 0.3 and uniform_p_value(u) < 1e-6
    smooth = exact + np.cos(np.arange(d) / 3)
    u = residual_whiteness(right, torch.from_numpy(smooth))
    assert u.mean() > 0.6 and uniform_p_value(u) < 1e-6


def test_whiteness_needs_neighbours_and_gaussian_noise():
    rng = np.random.default_rng(1)
    one = Problem(
        operators.Identity(Space((1,), torch.float64)), likelihoods.Gaussian(1.0), torch.zeros(5, 1).double()
    )
    assert residual_whiteness(one, read_draws(rng.random((5, 3, 1)))) is None
    counts = Problem(
        operators.Identity(Space((4,), torch.float64)), likelihoods.Poisson(), torch.ones(5, 4).double()
    )
    assert residual_whiteness(counts, read_draws(rng.random((5, 3, 4)))) is None


def test_many_data_use_the_normal_law_of_the_correlation():
    rng = np.random.default_rng(3)
    space = Space((1, 48, 48), torch.float64)
    y = rng.standard_normal((60, 1, 48, 48))
    problem = Problem(operators.Identity(space), likelihoods.Gaussian(1.0), torch.from_numpy(y))
    nothing = read_draws(np.stack([np.zeros_like(y), 1e-9 * y], axis=1))
    assert uniform_p_value(residual_whiteness(problem, nothing)) > 0.01
    blurred = y + np.roll(y, 1, axis=-1)
    problem = Problem(operators.Identity(space), likelihoods.Gaussian(2**0.5), torch.from_numpy(blurred))
    assert residual_whiteness(problem, nothing).min() > 0.99


def test_regression_leaves_each_case_out_as_if_it_were():
    rng = np.random.default_rng(0)
    y = rng.standard_normal((30, 4))
    t = y @ rng.standard_normal((4, 3)) + 0.1 * rng.standard_normal((30, 3)) + 7
    ridge = Ridge(y, t)

    def least_squares(rows, new):
        return np.r_[new, 1] @ np.linalg.lstsq(np.c_[y[rows], np.ones(len(rows))], t[rows])[0]

    every = np.arange(30)
    for case in range(30):
        rest = t[case] - least_squares(np.delete(every, case), y[case])
        np.testing.assert_allclose(ridge.left_out[case], rest, atol=0.01)
    new = rng.standard_normal(4)
    np.testing.assert_allclose(ridge(new), least_squares(every, new), atol=0.02)
    nothing = Ridge(np.zeros((30, 4)), t)
    np.testing.assert_allclose(nothing.left_out, (t - t.mean(0)) * 30 / 29, rtol=1e-10)
    np.testing.assert_allclose(nothing(new), t.mean(0), rtol=1e-10)
    assert np.abs(Ridge(y, rng.standard_normal((30, 3)))(new)).max() < 1  # noise is not followed


@pytest.mark.parametrize("classifier", ["quadratic", "neighbours", "boosting"])
def test_classifiers_tell_samples_apart_only_where_they_differ(classifier):
    if classifier == "boosting":
        pytest.importorskip("sklearn")
    rng = np.random.default_rng(4)
    a, b = rng.standard_normal((400, 5)), rng.standard_normal((400, 5))
    same, other = c2st(a, b, classifier), c2st(a, 1.8 * b, classifier)
    assert same.p_value > 0.01 and abs(same.auc - 0.5) < 0.08
    assert other.p_value < 1e-4 and other.auc > 0.65


def test_classifier_p_values_are_valid():
    """100 pairs of equal samples: p-values below 10 % at most 19 times (0.2 % point of the binomial)."""
    rng = np.random.default_rng(5)
    p = [c2st(rng.standard_normal((40, 3)), rng.standard_normal((60, 3)), "quadratic").p_value for _ in range(100)]
    assert 1 <= (np.array(p) <= 0.1).sum() <= 19


def test_local_classifier_judges_draws_at_one_measurement():
    control = controls.gaussian(400, 8, seed=1)
    new = controls.gaussian(1, 64, seed=2)
    _, p = local_c2st(control.draws, control.truth, control.y, new.draws[0], new.y[0], nulls=49)
    assert p > 0.05
    wrong = controls.shifted(control, 0), controls.shifted(new, 0)
    _, p = local_c2st(wrong[0], control.truth, control.y, wrong[1][0], new.y[0], nulls=49)
    assert p == 0.02


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: uniform_p_value([0.5]), "at least two numbers between 0 and 1"),
        (lambda: uniform_p_value([0.5, 1.2]), "at least two numbers between 0 and 1"),
        (lambda: band(1), "at least 2 numbers"),
        (lambda: ranks.region_mean(np.zeros(3, int), 2), "No pixel has the label 2"),
        (lambda: c2st(np.zeros((9, 3)), np.zeros((9, 4))), "Two samples of the same kind"),
        (lambda: c2st(np.zeros((9, 3)), np.ones((9, 3)), "best"), "not 'best'"),
        (
            lambda: local_c2st(
                np.random.default_rng(0).random((5, 4, 3)),
                np.zeros((5, 3)),
                np.zeros((5, 2)),
                np.eye(3),
                np.zeros(4),
            ),
            "another shape",
        ),
    ],
)
def test_bad_input_gets_one_sentence(call, message):
    with pytest.raises(InvdiffError, match=message):
        call()
