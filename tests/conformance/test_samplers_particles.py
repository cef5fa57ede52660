"""Samplers whose draws are weighted particles: exact where they claim to be, and open about collapse."""

import functools
import warnings
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch

import invdiff
from invdiff import anchors, likelihoods, operators, reference, samplers
from invdiff.codec import ComplexChannels, Pad, Scale
from invdiff.errors import CapabilityError, InvdiffError
from invdiff.prior import Prior
from invdiff.sampler import Sampler
from invdiff.spaces import Space
from tests.conformance.toys import SPACE, Keep, NormalDenoiser, Square, normal_prior, toy_problem


@functools.lru_cache
def field(operator, size=16):
    problem, prior = anchors.gaussian_field(size, operator, 0)
    return problem, prior, reference.posterior(problem, prior)


@functools.lru_cache
def mixture(d, m, seed):
    problem, prior = anchors.mcgdiff_mixture(d, m, seed)
    return problem, prior, reference.posterior(problem, prior)


def grade(target, sampler, draws=256, seed=0):
    """Figures of the draws, and the smallest effective sample size; collapse is judged by the caller."""
    problem, prior, exact = target
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*collapsed")
        made = invdiff.sample(problem, prior, sampler, draws=draws, seed=seed, max_batch=draws)
    x = torch.from_numpy(np.asarray(made.draws)).reshape(draws, *problem.operator.domain.shape)
    return anchors.grade(x, exact) | ({"ess": float(made.stats["ess"].min())} if "ess" in made.stats else {})


@dataclass(frozen=True, kw_only=True)
class _Weigh(Sampler):
    """A toy ensemble that reports a given effective sample size."""

    name: ClassVar[str] = "weigh"
    title: ClassVar[str] = "toy weights"
    reference: ClassVar[str] = "-"
    kind: ClassVar = "ensemble"
    steps: int = 1
    least: float = 1.5

    def step(self, k, state, ctx, rng):
        w = torch.linspace(0, 1, len(rng.keys), dtype=torch.float64)
        return {"x": state["x"] * 0.01, "log_weight": w, "ess": torch.full_like(w, self.least)}


@pytest.mark.parametrize("name", ["mcgdiff", "tds", "fpssmc", "ddsmc", "afdps"])
def test_one_particle_is_refused_in_one_sentence(name):
    with pytest.raises(CapabilityError, match="at least 2") as caught:
        invdiff.sample(toy_problem(), normal_prior(), name, draws=1)
    assert "\n" not in str(caught.value)


def test_collapse_is_stored_and_warned_of_once_with_the_figure(tmp_path):
    with pytest.warns(UserWarning, match=r"collapsed.* case 0 fell to 1.50 of 5") as caught:
        made = invdiff.sample(toy_problem(), normal_prior(), _Weigh(), draws=5, seed=0, store=tmp_path / "w.nc")
    assert len(caught) == 1
    assert float(made.stats["ess"].max()) == 1.5 and made.stats["ess"].shape == (2, 5)
    assert made.stats["ess"].attrs["long_name"]
    again = invdiff.open_posterior(tmp_path / "w.nc")
    assert np.array_equal(np.asarray(again.stats["log_weight"]), np.asarray(made.stats["log_weight"]))


def test_healthy_weights_are_not_warned_of():
    made = invdiff.sample(toy_problem(), normal_prior(), _Weigh(least=2.5), draws=5, seed=0)
    assert float(made.stats["ess"].min()) == 2.5
    invdiff.sample(toy_problem(), normal_prior(), _Weigh(), draws=3, seed=0)  # three particles say nothing


def test_summaries_follow_the_weights():
    made = invdiff.sample(toy_problem(cases=1), normal_prior(), _Weigh(least=3.0), draws=4, seed=0)
    w = np.exp(np.asarray(made.stats["log_weight"]).reshape(-1))
    x = np.asarray(made.draws).reshape(4, *SPACE.shape)
    expected = (w[:, None, None, None] * x).sum(0) / w.sum()
    assert np.allclose(np.asarray(made.mean()), expected, atol=1e-12)
    assert not np.allclose(x.mean(0), expected, atol=1e-6)


# What is right in the limit of many particles must be right on a mixture, mode weights included; controls below.
MIXTURE = [
    ("mcgdiff", {}, 0.30, (0.9, 1.1)),
    ("tds", {}, 0.35, (0.93, 1.07)),
    ("tds", {"twist": "pigdm"}, 0.35, (0.93, 1.07)),
    ("ddsmc", {}, 0.30, (0.93, 1.07)),
    ("afdps", {"steps": 100}, 0.40, (0.9, 1.1)),
]


@pytest.mark.parametrize(("name", "fields", "distance", "measured"), MIXTURE)
def test_mode_weights_of_a_mixture(name, fields, distance, measured):
    figures = [grade(mixture(8, 1, seed), samplers.get(name, **fields), draws=1000) for seed in (5, 8)]
    assert np.mean([f["sliced_wasserstein"] for f in figures]) < distance
    assert measured[0] < np.mean([f["std_ratio_measured"] for f in figures]) < measured[1]
    assert min(f["ess"] for f in figures) > 100


def test_guidance_without_weights_misses_modes():
    """The control of the test above."""
    figures = [grade(mixture(8, 1, seed), samplers.PiGDM(), draws=1000) for seed in (5, 8)]
    assert np.mean([f["sliced_wasserstein"] for f in figures]) > 1


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("mcgdiff", {}),
        ("tds", {}),
        ("tds", {"twist": "pigdm", "spread": 0.7, "line_search": False}),
        ("tds", {"twist": "pigdm", "spread": 5.0}),
        ("tds", {"twist": "pigdm", "order": 1}),
        ("ddsmc", {}),
        ("ddsmc", {"spread": 3.0}),
        ("afdps", {}),
    ],
)
def test_weights_make_up_for_the_twist(name, fields):
    """A twist that is too narrow or too wide must cost particles, not accuracy.

    The median of five runs, because one heavy weight in some hundred steps can move a single run far.
    """
    space = Space((1, 1, 2), torch.float64)
    operator = operators.Matrix([[[1.0, 0.5]]], space, Space((1,), torch.float64))
    problem = invdiff.Problem(operator, likelihoods.Gaussian(0.4), torch.tensor([[1.5]], dtype=torch.float64))
    a = np.array([1.0, 0.5])
    covariance = np.eye(2) - np.outer(a, a) / (a @ a + 0.16)
    mean = a * 1.5 / (a @ a + 0.16)
    off = []
    for seed in range(5):
        made = invdiff.sample(problem, normal_prior(space), samplers.get(name, **fields), draws=2000, seed=seed)
        x = np.asarray(made.draws).reshape(2000, 2)
        off.append((np.abs(x.mean(0) - mean).max(), np.abs(np.cov(x.T) - covariance).max()))
    assert (np.median(off, axis=0) < 0.08).all(), off


def test_tds_keeps_its_particles_on_a_gaussian_field():
    """The Tweedie covariance is the right twist there, and Metropolis moves bring the draws to the floor."""
    figures = grade(field("mask"), samplers.get("tds", preset="tuned"))
    assert figures["ess"] > 50
    assert figures["mean_error"] < 1.5 / np.sqrt(256)
    assert 0.97 < figures["std_ratio"] < 1.03 and 0.97 < figures["std_ratio_measured"] < 1.03


def test_tds_with_the_published_twist_collapses_on_an_image():
    """The control of the test above."""
    problem, prior, _ = field("mask")
    with pytest.warns(UserWarning, match="collapsed"):
        made = invdiff.sample(problem, prior, samplers.get("tds", preset="published"), draws=64, seed=0)
    assert float(made.stats["ess"].min()) < 2


def test_afdps_follows_a_nonlinear_likelihood():
    """``y = x + x^2 / 10`` in each pixel of a standard normal prior, against quadrature."""
    space = Space((1, 1, 2), torch.float64)
    y = torch.tensor([[[[1.2, -1.0]]]], dtype=torch.float64)
    problem = invdiff.Problem(Square(space), likelihoods.Gaussian(0.4), y)
    x = np.asarray(invdiff.sample(problem, normal_prior(space), "afdps", draws=2000, seed=0).draws).reshape(
        2000, 2
    )
    grid = np.linspace(-6, 6, 4001)
    for i, datum in enumerate((1.2, -1.0)):
        density = np.exp(-0.5 * grid**2 - 0.5 * ((datum - grid - 0.1 * grid**2) / 0.4) ** 2)
        mean = (grid * density).sum() / density.sum()
        std = np.sqrt(((grid - mean) ** 2 * density).sum() / density.sum())
        assert abs(x[:, i].mean() - mean) < 0.2 * std
        assert 0.9 < x[:, i].std() / std < 1.1


def test_fps_counts_the_data_too_often_and_only_its_weights_do():
    """Measured figures of a heuristic, so that a change is seen."""
    smc = grade(field("fourier"), samplers.FPSSMC())
    plain = grade(field("fourier"), samplers.FPSSMC(weigh=False))
    assert smc["std_ratio_measured"] < 0.6 and smc["ess"] < 20
    assert 0.65 < plain["std_ratio_measured"] < 0.9 and plain["ess"] == 256


def test_tds_refuses_noiseless_data_in_one_sentence():
    problem = invdiff.Problem(Keep(), likelihoods.Gaussian(0.0), toy_problem(cases=1).y)
    with pytest.raises(InvdiffError, match="needs a noise level above 0"):
        invdiff.sample(problem, normal_prior(), "tds", draws=4)


@pytest.mark.parametrize("name", ["mcgdiff", "ddsmc", "afdps", "fpssmc"])
def test_weak_twists_collapse_on_an_image_and_say_so(name):
    """The smallest effective sample size alone would miss a slow collapse (afdps)."""
    problem, prior, exact = field("mask")
    with pytest.warns(UserWarning, match="collapsed"):
        made = invdiff.sample(problem, prior, samplers.get(name), draws=128, seed=0)
    assert float(made.stats["ess_run"].min()) < 2 and float(made.stats["ess"].min()) >= float(
        made.stats["ess_run"].min()
    )
    draws = torch.from_numpy(np.asarray(made.draws)).reshape(128, *problem.operator.domain.shape)
    assert anchors.grade(draws, exact)["coverage"] < 0.8


def test_mcgdiff_is_right_on_a_blur():
    figures = grade(field("blur"), samplers.MCGDiff())
    assert figures["mean_error"] < 0.3
    assert 0.9 < figures["std_ratio"] < 1.05 and 0.9 < figures["std_ratio_measured"] < 1.05


@pytest.mark.parametrize("name", ["mcgdiff", "tds", "ddsmc"])
def test_complex_images_on_a_padded_canvas_in_units_of_their_own(name):
    """Three samples of k-space of a standard normal prior, whose posterior is known coefficient by coefficient."""
    image, scale, sigma = Space((1, 3, 5), torch.complex128), 7.0, 0.5
    canvas = Pad(image, 4).prior
    prior = Prior(
        NormalDenoiser(ComplexChannels(canvas).prior),
        card={"name": "normal-padded"},
        make_codec=lambda space, s: Scale(space, s) @ Pad(space, 4) @ ComplexChannels(canvas),
        scale=scale,
    )
    mask = torch.zeros(3, 5)
    mask[[0, 1, 2], [1, 2, 4]] = 1
    y = mask.to(torch.complex128)[None, None] * scale * (2 - 1j)
    problem = invdiff.Problem(operators.SubsampledFourier(mask, image), likelihoods.Gaussian(sigma * scale), y)
    made = invdiff.sample(problem, prior, name, draws=1000, seed=0)
    x = torch.from_numpy(np.asarray(made.draws)).reshape(1000, 1, 3, 5) / scale
    k = operators.SubsampledFourier(torch.ones(3, 5), image)(x)[:, 0]
    seen, free = k[:, mask > 0], k[:, mask == 0]
    assert (seen.mean(0) - (2 - 1j) / (1 + sigma**2)).abs().max() < 0.12
    assert torch.allclose(seen.imag.std(), torch.tensor(sigma / (1 + sigma**2) ** 0.5).double(), atol=0.04)
    assert torch.allclose(free.real.std(), torch.tensor(1.0).double(), atol=0.08)


@pytest.mark.parametrize("name", ["mcgdiff", "fpssmc", "ddsmc"])
def test_noiseless_data_are_met(name):
    operator = Keep(SPACE, share=0.2)
    x = SPACE.randn(1, 4)
    problem = invdiff.Problem(operator, likelihoods.Gaussian(0.0), operator(x))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*collapsed")
        made = invdiff.sample(problem, normal_prior(), samplers.get(name, steps=30), draws=8, seed=0)
    draws = torch.from_numpy(np.asarray(made.draws)).reshape(8, *SPACE.shape)
    assert (operator(draws) - problem.y).abs().max() < 1e-9
    # draws that share an ancestor differ little, but where nothing is measured they differ
    spread = draws.std(0)[operator.mask == 0]
    assert torch.isfinite(draws).all() and spread.min() > 0 and spread.median() > 5e-3
