import numpy as np
import pytest
import torch

from invdiff import likelihoods, operators
from invdiff.primitives.curvature import curvature, root_of_rest, stiffness
from invdiff.problem import Problem
from tests.conformance.toys import SPACE, Square


def dense(problem, x):
    """The curvature as a matrix, column by column."""
    eye = torch.eye(x[0].numel(), dtype=x.dtype).reshape(-1, *x.shape[1:])
    return torch.stack([curvature(problem, x, e[None]).flatten() for e in eye], 1)


def matrix_problem(seed=0, sigma=0.3):
    m = torch.from_numpy(np.random.default_rng(seed).standard_normal((7, 5)))
    sigma = torch.linspace(0.2, 0.6, 7, dtype=torch.float64)[None] if sigma is None else sigma
    a = operators.Matrix(m)
    return m, Problem(a, likelihoods.Gaussian(sigma), torch.zeros(1, 7, dtype=torch.float64))


@pytest.mark.parametrize("sigma", [0.3, None])
def test_linear_gaussian_curvature_and_its_norm(sigma):
    m, problem = matrix_problem(sigma=sigma)
    x = torch.zeros(1, 5, dtype=torch.float64)
    weights = 1 / problem.likelihood.sigma.reshape(-1) ** 2
    expected = m.T @ (m * weights[:, None] if weights.numel() > 1 else m * weights)
    torch.testing.assert_close(dense(problem, x), expected)
    top = float(torch.linalg.eigvalsh(expected).max())
    assert float(stiffness(problem, x)) == pytest.approx(top, rel=1e-2)


def test_curvature_where_noise_depends_on_the_data():
    """Minus the derivative of the score, between ``J^H`` and ``J``."""
    x = SPACE.randn(1, 0).abs() + 2
    problem = Problem.simulate(Square(), likelihoods.PoissonGaussian(0.1, 0.3), x, seed=0)
    z, h = Square()(x), 1e-5
    fall = problem.likelihood.score(z - h, problem.y) - problem.likelihood.score(z + h, problem.y)
    weight = fall / (2 * h) * (1 + 0.2 * x) ** 2
    torch.testing.assert_close(dense(problem, x), torch.diag(weight.flatten()), rtol=2e-3, atol=1e-6)


def test_curvature_of_counts_is_a_bound_from_here_to_the_data():
    """``k / rate^2`` vanishes where far more is expected than counted, and steps of its size would run away."""
    k = torch.tensor([0.0, 1.0, 7.0, 400.0], dtype=torch.float64)[:, None]
    z = torch.linspace(-3, 3e3, 20_000, dtype=torch.float64)[None].expand(4, -1)
    for gain in (1.0, 0.1):
        likelihood, h = likelihoods.Poisson(gain), 1e-4 * gain
        y, at = (gain * k).expand_as(z), gain * z
        fall = (likelihood.score(at - h, y) - likelihood.score(at + h, y)) / (2 * h)
        bound = likelihood.curvature(at, y)
        assert bool((bound >= 0.99 * fall).all())
        assert bool((bound >= 0.99 / (gain**2 * y / gain).clamp_min(gain**2)).all())
        assert bool((bound <= 400.01 / gain**2).all())


def test_stiffness_of_a_row_depends_on_no_other_row_and_not_on_the_scale_of_x():
    _, problem = matrix_problem()
    x = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    one = stiffness(problem, x)
    assert torch.equal(one[1:2], stiffness(problem, 100 * x[1:2]))


@pytest.mark.parametrize("top", [0.5, 0.9])
def test_root_of_rest_squares_to_the_rest(top):
    rng = np.random.default_rng(0)
    q, _ = np.linalg.qr(rng.standard_normal((6, 6)))
    m = torch.from_numpy(q @ np.diag(np.linspace(0, top, 6)) @ q.T)
    x = torch.from_numpy(rng.standard_normal((3, 6)))
    twice = root_of_rest(lambda u: u @ m, root_of_rest(lambda u: u @ m, x, top), top)
    torch.testing.assert_close(twice, x - x @ m, rtol=0, atol=2e-6)
    assert (
        float((root_of_rest(lambda u: u @ m, x, top, degree=2) - root_of_rest(lambda u: u @ m, x, top)).norm())
        > 1e-3
    )
