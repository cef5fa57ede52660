"""Singular coordinates, replacement of the measured part, Anderson acceleration."""

import numpy as np
import pytest
import torch

from invdiff import likelihoods, operators
from invdiff.errors import InvdiffError
from invdiff.primitives.anderson import anderson
from invdiff.primitives.replacement import replace_measured
from invdiff.primitives.spectral import spectrum
from invdiff.problem import Problem
from invdiff.rng import Streams


def matrix_problem(rows=1, sigma=0.4, seed=0, cases=1):
    rng = np.random.default_rng(seed)
    m = torch.from_numpy(rng.standard_normal((4, 6)) * np.array([[3.0], [1.0], [0.3], [0.0]]))
    y = torch.from_numpy(rng.standard_normal((cases, 4)))
    return m, Problem(operators.Matrix(m), likelihoods.Gaussian(sigma), y).rows(torch.arange(rows) % cases)


def test_pseudo_data_and_their_levels_are_those_of_least_squares():
    m, problem = matrix_problem()
    svd, ybar, level = spectrum(problem)
    torch.testing.assert_close(svd.v(ybar), (torch.linalg.pinv(m) @ problem.y.mT).mT)
    seen = svd.s > 0
    assert int(seen.sum()) == 3 and torch.isinf(level[~seen]).all() and (ybar[~seen] == 0).all()
    torch.testing.assert_close((level * svd.s)[seen], torch.full((3,), 0.4, dtype=torch.float64))
    noise = torch.randn(4000, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noisy = Problem(problem.operator, problem.likelihood, 0.4 * noise)
    spread = spectrum(noisy)[1].std(0)
    assert (spread[seen[0]] / level[seen] - 1).abs().max() < 0.05


def test_every_case_has_its_own_level_and_noise_that_varies_within_one_is_refused():
    sigma = torch.tensor([0.1, 0.4], dtype=torch.float64)[:, None]
    _, problem = matrix_problem(2, sigma, cases=2)
    svd, _, level = spectrum(problem)
    seen = svd.s[0] > 0
    torch.testing.assert_close(level[1, seen], 4 * level[0, seen])
    _, problem = matrix_problem(sigma=torch.tensor([[0.1, 0.2, 0.3, 0.4]], dtype=torch.float64))
    with pytest.raises(InvdiffError, match="one noise level per case"):
        spectrum(problem)


@pytest.mark.parametrize("t", [0.02, 0.3, 5.0])
def test_replacement_keeps_the_level_of_the_noise(t):
    """Over noise of state and data the result of a state at level t is at level t, in every direction."""
    n = 6000
    m, problem = matrix_problem()
    rng = Streams(0, [(0, i) for i in range(n)]).at(0)
    x0 = torch.randn(1, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    noise = [rng.normal(torch.empty(n, 6, dtype=torch.float64)) for _ in range(2)]
    y = x0 @ m.T + 0.4 * rng.normal(torch.empty(n, 4, dtype=torch.float64))
    many = Problem(problem.operator, problem.likelihood, y)
    out = replace_measured(many, x0 + t * noise[0], t, noise[1], rng)
    covariance = torch.cov((out - x0).T)
    assert (covariance / t**2 - torch.eye(6, dtype=torch.float64)).abs().max() < 0.08
    # in each coordinate the share w = t^2 / (t^2 + level^2) is replaced, and nothing in the null space
    svd, _, level = spectrum(problem)
    old, new = svd.vh(t * noise[0]), svd.vh(out - x0)
    kept = (old * new).mean(0) / (old * old).mean(0)
    assert (kept - (1 - t**2 / (t**2 + level[0] ** 2))).abs().max() < 0.05


def test_hard_replacement_meets_the_data_and_so_does_the_other_without_noise():
    rng = Streams(0, [(0, 0)]).at(0)
    x = rng.normal(torch.empty(1, 6, dtype=torch.float64))
    for sigma, hard in ((0.4, True), (0.0, False)):
        m, problem = matrix_problem(sigma=sigma)
        out = replace_measured(problem, x, 0.0, torch.zeros_like(x), rng, hard)
        seen = (m @ torch.linalg.pinv(m) @ problem.y.mT).mT  # the part of the data that any image can meet
        torch.testing.assert_close(out @ m.T, seen, atol=1e-9, rtol=0)
    m, problem = matrix_problem()
    torch.testing.assert_close(replace_measured(problem, x, 0.0, torch.zeros_like(x), rng), x, atol=1e-9, rtol=0)


def _contraction(n, seed, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=dtype))
    return (q * torch.linspace(-0.5, 0.99, n, dtype=torch.float64)) @ q.mH, torch.randn(
        n, generator=g, dtype=dtype
    )


def _iterate(a, b, count, memory):
    x = torch.zeros(a.shape[0], a.shape[-1], dtype=a.dtype)
    points, images = [], []
    for _ in range(count):
        points.append(x)
        images.append((a @ x[..., None])[..., 0] + b)
        x = anderson(torch.stack(points[-memory:], 1), torch.stack(images[-memory:], 1), ridge=1e-12)
    return x


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_anderson_solves_a_linear_fixed_point_in_as_many_steps_as_dimensions(dtype):
    pairs = [_contraction(6, seed, dtype) for seed in (0, 1)]
    a, b = torch.stack([p[0] for p in pairs]), torch.stack([p[1] for p in pairs])
    exact = torch.linalg.solve(torch.eye(6, dtype=dtype) - a, b[..., None])[..., 0]
    fast, slow = _iterate(a, b, 8, 8), _iterate(a, b, 8, 1)
    assert (fast - exact).norm() < 1e-4 * exact.norm() < (slow - exact).norm()
    # rows do not see each other
    torch.testing.assert_close(fast[:1], _iterate(a[:1], b[:1], 8, 8), rtol=1e-9, atol=1e-9)


def test_anderson_at_the_fixed_point_stays_there():
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    same = x[:, :1].expand(2, 3, 4)
    torch.testing.assert_close(anderson(same, same), x[:, 0])
