"""Total variation for any linear operator: closed forms, convergence, a real scan from few views."""

import numpy as np
import pytest
import torch

import invdiff
from invdiff import ct, likelihoods, operators
from invdiff.errors import CapabilityError, InvdiffError
from invdiff.spaces import Space
from invdiff.variational import total_variation


def test_denoising_of_an_edge_is_the_closed_form():
    """Both sides move towards each other by ``weight sigma^2`` over the columns of the side."""
    y = torch.zeros(1, 1, 6, 10, dtype=torch.float64)
    y[..., 4:] = 2.0
    problem = invdiff.Problem(operators.Identity(Space((1, 6, 10), torch.float64)), likelihoods.Gaussian(0.5), y)
    x = total_variation(problem, 3.0, iterations=2000)
    low, high = 3.0 * 0.25 / 4, 2.0 - 3.0 * 0.25 / 6
    expected = torch.where(y > 0, torch.tensor(high).double(), torch.tensor(low).double())
    torch.testing.assert_close(x, expected, atol=2e-4, rtol=0)


def test_without_a_weight_it_is_least_squares():
    g = torch.Generator().manual_seed(0)
    a = torch.randn(40, 12, generator=g, dtype=torch.float64)
    space = Space((1, 3, 4), torch.float64)
    problem = invdiff.Problem(
        operators.Matrix(a, space), likelihoods.Gaussian(0.1), torch.randn(2, 40, generator=g).double()
    )
    x = total_variation(problem, 0.0, iterations=2000)
    expected = torch.linalg.lstsq(a, problem.y.T).solution.T.reshape(2, 1, 3, 4)
    torch.testing.assert_close(x, expected, atol=1e-6, rtol=0)


def test_units_and_batches_do_not_matter():
    """A scaled image with the weight scaled the other way is the same problem; rows do not know each other."""
    g = torch.Generator().manual_seed(1)
    y = torch.randn(3, 1, 8, 9, generator=g, dtype=torch.float64)
    made = {
        c: invdiff.Problem(
            operators.Identity(Space((1, 8, 9), torch.float64)), likelihoods.Gaussian(0.3 * c), c * y
        )
        for c in (1.0, 1e3)
    }
    first = total_variation(made[1.0], 2.0, iterations=50, nonnegative=True)
    torch.testing.assert_close(total_variation(made[1e3], 2e-3, iterations=50, nonnegative=True), 1e3 * first)
    alone = invdiff.Problem(made[1.0].operator, likelihoods.Gaussian(0.3), y[1:2])
    torch.testing.assert_close(total_variation(alone, 2.0, iterations=50, nonnegative=True), first[1:2])
    assert float(first.min()) == 0


def test_complex_images():
    space = Space((1, 6, 6), torch.complex128)
    y = space.randn(1, 3)
    problem = invdiff.Problem(operators.Identity(space), likelihoods.Gaussian(0.3), y)
    turned = invdiff.Problem(operators.Identity(space), likelihoods.Gaussian(0.3), 1j * y)
    torch.testing.assert_close(total_variation(turned, 1.0), 1j * total_variation(problem, 1.0))
    with pytest.raises(InvdiffError, match="no sign"):
        total_variation(problem, 1.0, nonnegative=True)


def test_refusals():
    space = Space((1, 4, 4), torch.float64)
    y = torch.ones(1, 1, 4, 4).double()
    with pytest.raises(CapabilityError, match="linear operator behind Gaussian"):
        total_variation(invdiff.Problem(operators.Clip(space), likelihoods.Gaussian(0.1), y), 1.0)
    with pytest.raises(CapabilityError, match="linear operator behind Gaussian"):
        total_variation(invdiff.Problem(operators.Identity(space), likelihoods.Poisson(), y), 1.0)
    with pytest.raises(InvdiffError, match="level is 0"):
        total_variation(invdiff.Problem(operators.Identity(space), likelihoods.Gaussian(0.0), y), 1.0)
    for wrong in ({"weight": -1.0}, {"weight": 1.0, "iterations": 0}):
        with pytest.raises(InvdiffError, match="at least 0 and 1"):
            total_variation(invdiff.Problem(operators.Identity(space), likelihoods.Gaussian(0.1), y), **wrong)


def test_a_tooth_from_a_sixth_of_its_views(tooth):
    """Real data: half of the pixels, so that it takes seconds; the streaks of few views go, and the edges stay."""
    lines = ct.line_integrals(tooth, air=20)[:, 0]
    centre = ct.find_centre(lines, tooth.angles)
    y = torch.from_numpy(lines.reshape(181, 320, 2).mean(2))[None, None].float()

    def operator(step: int) -> operators.ParallelBeamCT:
        return operators.ParallelBeamCT(
            (1, 280, 280), tooth.angles[::step], detectors=320, centre=(centre - 0.5) / 2
        )

    reference, few = operator(1).fbp(y, "hann"), y[:, :, ::6]
    problem = invdiff.Problem(operator(6), likelihoods.Gaussian(0.01), few)
    made = {"fbp": operator(6).fbp(few, "hann"), "tv": total_variation(problem, 500.0, nonnegative=True)}
    inside = torch.from_numpy(np.hypot(*(np.mgrid[:280, :280] - 139.5)) < 137)
    error = {
        k: float((v - reference)[0, 0][inside].norm() / reference[0, 0][inside].norm()) for k, v in made.items()
    }
    assert error["tv"] < 0.12 and error["fbp"] > 0.25
    # views that it has not seen are predicted
    assert float((operator(1)(made["tv"]) - y).norm() / y.norm()) < 0.04
