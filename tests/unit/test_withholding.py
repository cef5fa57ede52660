"""Data set aside: whole positions, never the centre, closed forms kept; exact draws predict them rightly."""

import dataclasses

import pytest
import torch

from invdiff import anchors, likelihoods, operators, reference
from invdiff.errors import InvdiffError
from invdiff.operators._fft import reflect
from invdiff.posterior import Posterior
from invdiff.problem import Problem
from invdiff.run import MemoryDraws, Run
from invdiff.scoring import data_scores, image_scores
from invdiff.spaces import Space
from invdiff.withholding import CENTRE, measured, withhold
from tests.conformance.toys import Keep, Square

N = 32
COMPLEX = Space((1, N, N), torch.complex128)
REAL = Space((1, N, N), torch.float64)


def random_mask(share=0.4, seed=0, size=N):
    return (torch.rand(size, size, generator=torch.Generator().manual_seed(seed)) < share).double()


def line_mask():
    mask = torch.zeros(N, N, dtype=torch.float64)
    mask[:, ::2] = 1
    mask[:, 12:20] = 1
    return mask


def maps(coils=3):
    return Space((coils, N, N), torch.complex128).randn(1, 1)[0]


OPERATORS = {
    "mask": lambda: operators.Mask(random_mask()[None], REAL),
    "fourier": lambda: operators.SubsampledFourier(random_mask(), COMPLEX),
    "fourier of real images": lambda: operators.SubsampledFourier(random_mask(), REAL),
    "mri": lambda: operators.MultiCoilMRI(random_mask(), maps()),
    "mri lines": lambda: operators.MultiCoilMRI(line_mask(), maps()),
    "mri cases": lambda: operators.MultiCoilMRI(torch.stack([random_mask(), random_mask(0.2, 1)]), maps()),
    "blur": lambda: operators.GaussianBlur(1.0, REAL),
    "own": lambda: Keep(),
}


def problem_of(operator, noise=0.1):
    cases = operator.n_cases or 1
    return Problem.simulate(operator, likelihoods.Gaussian(noise), operator.domain.randn(cases, 3))


@pytest.mark.parametrize("name", OPERATORS)
def test_what_is_set_aside_and_what_is_left_make_up_the_data(name):
    problem = problem_of(OPERATORS[name]())
    held = withhold(problem, 0.25, seed=1)
    left, all_of_it = measured(held.problem), measured(problem)
    if name == "own":  # it does not say where it has data
        assert held.problem.operator.support is not None
    assert not bool((left & held.where).any()) and bool(((left | held.where) == all_of_it).all())
    assert bool((held.problem.y[held.where.expand(problem.y.shape)] == 0).all())
    assert bool((held.problem.y == torch.where(held.where, 0, problem.y)).all())
    x = problem.operator.domain.randn(problem.n_cases, 9)
    z, reduced = problem.operator(x), held.problem.operator(x)
    torch.testing.assert_close(reduced, torch.where(held.where, torch.zeros_like(z), z))
    for case in range(problem.n_cases):
        assert held.data(case).shape == (int(held.at(case).sum()),)
        seen = held.predict(problem.x_true[case][None], case)[0] - held.data(case)
        assert 0.05 < float(seen.abs().std()) < 0.25, "predictions of the truth are off by the noise alone"
    again = withhold(problem, 0.25, seed=1)
    assert bool((again.where == held.where).all())
    assert bool((withhold(problem, 0.25, seed=2).where != held.where).any())


@pytest.mark.parametrize("name", ["mask", "fourier", "fourier of real images", "mri", "mri lines", "mri cases"])
def test_closed_forms_are_kept(name):
    operator = OPERATORS[name]()
    reduced = withhold(problem_of(operator)).problem.operator
    assert type(reduced) is type(operator) and reduced.capabilities == operator.capabilities
    assert reduced.domain == operator.domain and reduced.range == operator.range


@pytest.mark.parametrize("name", ["fourier", "mri", "mri lines", "mri cases"])
def test_the_centre_of_kspace_stays_and_the_share_is_met_outside(name):
    problem = problem_of(OPERATORS[name]())
    held = withhold(problem, 0.25)
    n = min(CENTRE, N // 4)
    block = torch.zeros(N, N, dtype=torch.bool)
    block[N // 2 - n // 2 : N // 2 + n // 2, N // 2 - n // 2 : N // 2 + n // 2] = True
    if name == "mri lines":
        block = block.any(0).expand(N, N)
    assert not bool((held.where & block).any())
    outside = measured(problem) & ~block
    share = held.where.flatten(1).sum(1) / outside.flatten(1).sum(1)
    assert bool(((share - 0.25).abs() < 0.05).all())


def test_a_large_grid_keeps_a_centre_of_24():
    operator = operators.SubsampledFourier(torch.ones(160, 160), Space((1, 160, 160), torch.complex64))
    held = withhold(Problem(operator, likelihoods.Gaussian(0.1), operator.range.randn(1)), 0.9)
    (columns,) = torch.nonzero(~held.where[0, 0].any(1)).T  # a full mask is one of lines
    assert set(range(80 - 12, 80 + 12)) <= set(columns.tolist()) and held.where[0, 0, 3].float().mean() in (
        0.0,
        1.0,
    )


def test_whole_positions_lines_and_mirror_images_go():
    coils = withhold(problem_of(OPERATORS["mri"]())).where
    assert bool((coils == coils[:, :1]).all())
    lines = withhold(problem_of(OPERATORS["mri lines"]())).where
    assert bool((lines == lines[..., :1, :]).all())
    problem = problem_of(OPERATORS["fourier of real images"]())
    where, there = withhold(problem).where[0, 0], measured(problem)[0, 0]
    assert not bool((reflect(where) & there & ~where).any()), "a mirror image that is measured goes too"
    assert bool((reflect(where) & where).any())


def test_noise_correlated_between_coils_stays_independent_of_what_is_left():
    operator = OPERATORS["mri"]()
    root = Space((3, 3), torch.complex128).randn(1, 5)[0]
    likelihood = likelihoods.CorrelatedGaussian(root @ root.mH + torch.eye(3), operator.range, "coil")
    problem = Problem.simulate(operator, likelihood, operator.domain.randn(1))
    assert bool((withhold(problem).where == withhold(problem).where[:, :1]).all())
    space = Space((1, 3, 3), torch.float64)
    whole = likelihoods.CorrelatedGaussian(torch.eye(9, dtype=torch.float64) + 0.1, space)
    with pytest.raises(InvdiffError, match="correlated between positions"):
        withhold(Problem.simulate(operators.Identity(space), whole, space.randn(1)))


def test_refusals():
    space = Space((1, 6, 5), torch.float64)
    gaussian = likelihoods.Gaussian(0.1)
    problem = Problem.simulate(operators.Mask(torch.ones(1, 6, 5), space), gaussian, space.randn(1))
    for share in (0, 1, -0.1, float("nan")):
        with pytest.raises(InvdiffError, match="between 0 and 1"):
            withhold(problem, share)
    with pytest.raises(InvdiffError, match="not linear"):
        withhold(Problem.simulate(Square(), gaussian, space.randn(1)))
    with pytest.raises(InvdiffError, match="Gaussian noise"):
        withhold(dataclasses.replace(problem, likelihood=likelihoods.Poisson(10.0)))
    one = torch.zeros(1, 6, 5)
    one[0, 0, 0] = 1
    with pytest.raises(InvdiffError, match="Nothing would be left"):
        withhold(Problem.simulate(operators.Mask(one, space), gaussian, space.randn(1)))
    centre = torch.zeros(N, N)
    centre[15:17, 15:17] = 1
    with pytest.raises(InvdiffError, match="outside the centre"):
        withhold(problem_of(operators.SubsampledFourier(centre, COMPLEX)))


CASES, DRAWS = 24, 19


@pytest.fixture(scope="module")
def exact():
    """Many cases of one problem, some data set aside, with exact draws given the others."""
    problem, prior = anchors.gaussian_field(16, "mask")
    x = prior.denoiser.sample(CASES, 5)
    problem = Problem.simulate(problem.operator, likelihoods.Gaussian(0.1), x, seed=3)
    held = withhold(problem, 0.3)
    return held, reference.posterior(held.problem, prior).sample(DRAWS, 1)


def scores(held, draws):
    stats = {"nfe": torch.ones(draws.shape[:2]).numpy(), "status": [["ok"] * DRAWS] * CASES}
    run = Run(held.full.operator.domain, "posterior", MemoryDraws(draws.numpy()), stats, x_true=held.full.x_true)
    run.x_true = held.full.x_true.numpy()
    posterior = Posterior.from_run(run)
    found = data_scores(posterior, held.full, measured(held.problem), held, seed=0)
    return {**found, **image_scores(posterior, held.full.x_true, draws.mean(1).numpy())}


def test_exact_draws_predict_what_was_set_aside(exact):
    held, draws = exact
    found = scores(held, draws)
    assert found["prediction_level"] == found["coverage_level"] == pytest.approx(0.9)
    assert found["prediction_coverage"] == pytest.approx(0.9, abs=0.035)
    assert found["coverage"] == pytest.approx(0.9, abs=0.03)
    # chi-squared of exact draws exceeds 1 by what the data do not pin down
    assert 0.9 < found["misfit"] < 1.4
    assert 1 / 3**0.5 < found["prediction_crps"] < 3


@pytest.mark.parametrize(("factor", "shift"), [(0.3, 0.0), (3.0, 0.0), (1.0, 0.5)])
def test_impostors_score_worse(exact, factor, shift):
    """Too narrow, too wide, and biased draws: their coverage is wrong and both scores are larger."""
    held, draws = exact
    mean, std = draws.mean(1, keepdim=True), draws.std()
    right, wrong = scores(held, draws), scores(held, mean + factor * (draws - mean) + shift * std)
    assert wrong["prediction_crps"] > right["prediction_crps"] and wrong["crps"] > right["crps"]
    if shift:
        assert wrong["prediction_error"] > right["prediction_error"] and wrong["psnr"] < right["psnr"]
    else:
        assert abs(wrong["coverage"] - 0.9) > 0.05 and abs(wrong["prediction_coverage"] - 0.9) > 0.03
        assert wrong["prediction_error"] == pytest.approx(right["prediction_error"])
        assert wrong["width"] == pytest.approx(factor * right["width"])
