"""Calibration on simulated cases: exact draws pass, wrong widths do not, work is kept, bad input is refused."""

import dataclasses
import json
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import invdiff
from invdiff import anchors, likelihoods, mri_simulation, operators, priors, uq
from invdiff.calibrating import calibrate
from invdiff.calibrating_cases import Blocks, derived
from invdiff.callbacks import Callback
from invdiff.cli.app import app
from invdiff.cli.calibrate import read_budget
from invdiff.driver import sample
from invdiff.errors import CapabilityError, InvdiffError, ResumeError, StoreError
from invdiff.posterior import Posterior
from invdiff.samplers import DDS, DPS, TMPD
from invdiff.spaces import Space
from tests.conformance.toys import Square

PROBLEM, PRIOR = anchors.gaussian_field(8, "mask")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spread(TMPD):
    """Exact draws of a Gaussian problem, with ``width`` times the right spread about the exact mean."""

    name: ClassVar[str] = "spread"
    steps: int = 20
    width: float = 1.0

    def finish(self, state, ctx):
        x = super().finish(state, ctx)
        mean = invdiff.reference.posterior(ctx.problem, PRIOR).mean()
        return mean + self.width * (x - mean)


def quick(sampler=None, **options):
    settings = {"cases": 60, "draws": 12, "seed": 0, "progress": False, "device": "cpu", **options}
    return calibrate(PROBLEM, PRIOR, sampler or TMPD(steps=20), **settings)


@pytest.fixture(scope="module")
def passed():
    return quick(cases=100)


class TestVerdict:
    def test_exact_draws_pass(self, passed):
        assert passed.accepted and passed.diagnosis.n_cases == 100 and passed.from_prior
        # 20 steps of tmpd have spreads up to a few per cent too wide, and the standard errors are below 1 %.
        for level, (share, error) in passed.coverage.items():
            assert abs(share - level) < 0.03 + 4 * error
        assert abs(passed.spread_skill.ratio - 1) < 0.08 and passed.coverage_error < 0.03
        # The score of exact draws is half their mean distance: 1/sqrt(pi) of a standard deviation for normal ones.
        assert passed.crps[0] < 0.03 and passed.psnr[0] > 34
        assert "nothing speaks against" in repr(passed) and "drawn from the prior stationary-gaussian" in repr(
            passed
        )

    @pytest.mark.parametrize(("width", "word", "low", "high"), [(0.6, "narrow", 0.6, 0.8), (1.6, "wide", 0.96, 1)])
    def test_a_wrong_width_is_rejected_and_named(self, width, word, low, high):
        found = quick(Spread(width=width), cases=40)
        assert not found.accepted and f"too {word}" in found.diagnosis["distance to the draws"].finding
        assert "NOT exact" in repr(found) and f"too {word}" in repr(found)
        assert low < found.coverage[0.9][0] < high
        assert found.spread_skill.ratio == pytest.approx(width, rel=0.12)
        # 20 cases calibrate; what they cover varies by a few per cent.
        assert found.conformal_coverage[0] == pytest.approx(0.9, abs=0.06)

    def test_of_a_mixture(self):
        prior = priors.GaussianMixture([0.6, 0.4], np.array([[2.0, 0.0], [-2.0, 0.0]]), 1.0)
        operator = operators.Matrix(torch.tensor([[0.5, 1.0]], dtype=torch.float64))
        problem = invdiff.Problem(operator, likelihoods.Gaussian(0.5), torch.zeros(1, 1, dtype=torch.float64))
        found = calibrate(problem, prior, DPS(steps=20), cases=60, draws=12, progress=False, device="cpu")
        assert not found.accepted

    def test_images_of_ones_own_bring_the_error_of_the_prior(self):
        images = 3 * PRIOR.denoiser.sample(90, 5)
        found = quick(cases=20, images=images, population="fields of three times the size")
        assert not found.accepted and not found.from_prior and "prior's error or the sampler's" in repr(found)
        assert "three times the size" in found.conformal.population
        again = quick(cases=20, images=images.numpy(), population="fields of three times the size")
        assert again.to_dict() == found.to_dict()
        order = np.random.default_rng(derived(0, 0, 0)).permutation(90)
        same = quick(cases=20, images=lambda i: images[order[i]], population="fields of three times the size")
        assert same.to_dict() == found.to_dict()


def test_conformal_intervals_fit_the_posterior_of_a_scan_like_this(passed, tmp_path):
    paths = passed.save(tmp_path / "out")
    assert [p.name for p in paths] == ["calibration.md", "calibration.json", "calibration.png", "conformal.json"]
    facts = json.loads((tmp_path / "out" / "calibration.json").read_text())
    assert facts["accepted"] and facts["cases"] == 100 and len(facts["coverage"]) == 19
    assert (tmp_path / "out" / "calibration.md").read_text().startswith("# tmpd with prior stationary-gaussian")
    loaded = uq.Conformal.load(paths[-1])
    posterior = sample(PROBLEM, PRIOR, TMPD(steps=20), draws=12, seed=9, progress=False, device="cpu")
    low, high = loaded.apply(posterior)
    assert ((low <= PROBLEM.x_true.numpy()) & (PROBLEM.x_true.numpy() <= high)).mean() > 0.7
    assert loaded.n_cases == 50
    other = sample(PROBLEM, PRIOR, TMPD(steps=21), draws=4, seed=9, progress=False, device="cpu")
    with pytest.raises(InvdiffError, match="calibrate anew"):
        loaded.apply(other)


def test_no_random_numbers_are_used_twice():
    keys = {derived(seed, what, block) for seed in range(3) for what in range(3) for block in range(0, 400, 20)}
    assert len(keys) == 3 * 3 * 20


class Stop(Exception):
    """Stands for an interruption."""


class TestFolder:
    def test_resume_gives_the_same_bits(self, tmp_path, monkeypatch):
        options = {"cases": 40, "draws": 6, "max_batch": 60}
        calls, advance = [], Callback.on_chunk

        def interrupted(self, rows, restarted=False):
            calls.append(rows)
            if len(calls) == 3:
                raise Stop
            return advance(self, rows, restarted)

        monkeypatch.setattr("invdiff.calibrating_cases.Total.on_chunk", interrupted)
        with pytest.raises(Stop):
            quick(output=tmp_path / "part", **options)
        monkeypatch.undo()
        there = {p.name for p in (tmp_path / "part").iterdir()}
        assert "cases-000000-000020.nc" in there and "cases-000020-000040.nc.partial" in there
        resumed = quick(output=tmp_path / "part", **options)
        straight = quick(output=tmp_path / "straight", **options)
        assert resumed.to_dict() == straight.to_dict()
        for path in (tmp_path / "straight").glob("cases-*.nc"):
            with Posterior.open(path) as a, Posterior.open(tmp_path / "part" / path.name) as b:
                assert np.array_equal(a.draws.values, b.draws.values)
        # Another batch size changes the last digits at most.
        assert resumed.crps[0] == pytest.approx(quick(cases=40, draws=6).crps[0], rel=1e-8)

    def test_more_cases_go_on_from_what_there_is(self, tmp_path, monkeypatch):
        quick(output=tmp_path / "out", cases=20, draws=8)
        drawn = []
        block = Blocks._stored
        monkeypatch.setattr(
            Blocks,
            "_stored",
            lambda self, name, draw: block(self, name, lambda **o: drawn.append(name) or draw(**o)),
        )
        found = quick(output=tmp_path / "out", cases=40, draws=8)
        assert drawn == ["cases-000020-000040"]
        assert found.to_dict() == quick(cases=40, draws=8).to_dict()

    def test_other_settings_and_fresh_starts_are_refused(self, tmp_path):
        quick(output=tmp_path / "out", cases=20)
        with pytest.raises(ResumeError, match="different seed"):
            quick(output=tmp_path / "out", cases=20, seed=1)
        with pytest.raises(ResumeError, match="different problem, prior or sampler"):
            quick(TMPD(steps=9), output=tmp_path / "out", cases=20)
        with pytest.raises(ResumeError, match="continue it with resume, or delete"):
            quick(output=tmp_path / "out", cases=20, resume=False)

    def test_images_of_a_learned_prior_are_drawn_once_and_kept(self, tmp_path):
        """A prior whose law is not known is drawn from by heun."""
        plain = dataclasses.replace(PRIOR, denoiser=_Hidden(PRIOR.denoiser))
        options = {"cases": 20, "draws": 6, "progress": False, "device": "cpu"}
        found = calibrate(PROBLEM, plain, DDS(steps=4), output=tmp_path / "out", **options)
        assert not list((tmp_path / "out").glob("*.images.nc"))
        again = calibrate(PROBLEM, plain, DDS(steps=4), output=tmp_path / "out", **options)
        assert again.to_dict() == found.to_dict()
        with Posterior.open(tmp_path / "out" / "cases-000000-000020.nc") as posterior:
            truth = posterior.x_true.values
        # The spread of 20 exact draws of this field varies between 0.6 and 1.4: its pixels hang together.
        assert 0.4 < truth.std() < 1.8


class _Hidden(priors.exact.ExactDenoiser.__mro__[1]):
    """A denoiser that does not know its own law."""

    def __init__(self, inner):
        self.inner, self.space, self.channels, self.dtype = inner, inner.space, inner.channels, inner.dtype
        self.sigma_min, self.sigma_max = inner.sigma_min, inner.sigma_max

    def __call__(self, x, sigma, cond=None):
        return self.inner(x, sigma)


class TestBudget:
    def test_stops_between_cases_and_says_so(self, monkeypatch):
        now = [0.0]

        def later():
            now[0] += 1.0
            return now[0]

        monkeypatch.setattr("invdiff.calibrating.time", SimpleNamespace(monotonic=later))
        found = quick(cases=200, draws=6, budget_s=2.5)
        assert found.diagnosis.n_cases == 40 and found.asked == 200
        assert "40 of 200 cases were finished in time" in repr(found)
        monkeypatch.undo()
        assert found.crps == quick(cases=40, draws=6).crps

    def test_too_little_time_is_a_sentence(self, tmp_path):
        with pytest.raises(InvdiffError, match=r"0 of 60 cases fitted.*run it again"):
            quick(budget_s=1e-9, output=tmp_path / "out")
        with pytest.raises(InvdiffError, match="allow more time or take fewer draws"):
            quick(budget_s=1e-9)


class TestRefused:
    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            ({"cases": 19}, "at least 20 cases, got 19"),
            ({"draws": 3}, "at least 4 draws"),
            ({"budget_s": 0.0}, "positive number of seconds"),
            ({"level": 0.95}, "up to 0.9, got 0.95"),
            ({"seed": -1}, "The seed must be an integer"),
            ({"images": torch.zeros(60, 1, 8, 8)}, "Say in words what the images are"),
            ({"images": torch.zeros(9, 1, 8, 8), "population": "a few"}, "expected 60 or more"),
            ({"images": torch.zeros(60, 1, 8, 9), "population": "odd"}, "crop them"),
            ({"images": lambda i: torch.full((1, 8, 8), np.nan), "population": "holes"}, "NaN or infinite"),
        ],
    )
    def test_settings(self, options, sentence):
        with pytest.raises(InvdiffError, match=sentence):
            quick(**options)

    @pytest.mark.parametrize(
        ("sampler", "sentence"),
        [("heun", "ignores data"), ("reddiff", "point estimate"), ("mcgdiff", "as an ensemble")],
    )
    def test_samplers(self, sampler, sentence):
        with pytest.raises(InvdiffError, match=sentence):
            quick(sampler)

    def test_a_sampler_that_cannot_run_before_any_work(self, tmp_path):
        space = Space((1, 8, 8), torch.float64)
        curved = invdiff.Problem(Square(space), likelihoods.Gaussian(0.1), space.randn(1, 0))
        with pytest.raises(CapabilityError, match="dds needs a linear operator"):
            calibrate(curved, PRIOR, "dds", output=tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_operators_of_several_cases(self):
        masks = torch.ones(2, 1, 8, 8, dtype=torch.float64)
        masks[1, :, 4:] = 0
        operator = operators.Mask(masks, Space((1, 8, 8), torch.float64))
        problem = invdiff.Problem(operator, likelihoods.Gaussian(0.1), torch.zeros(2, 1, 8, 8).double())
        with pytest.raises(InvdiffError, match="parameters for 2 cases"):
            calibrate(problem, PRIOR, "dds")

    def test_folders(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(StoreError, match="is a file"):
            quick(output=tmp_path / "file")
        with pytest.raises(StoreError, match="does not exist"):
            quick(output=tmp_path / "none" / "out")


class TestCommand:
    @pytest.fixture
    def folder(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        y, x = np.mgrid[-1:1:32j, -1:1:32j]
        image = (np.hypot(x / 0.7, y / 0.85) < 1) * (0.6 + 0.4 * (np.hypot(x, y) < 0.3)) * np.exp(1j * x)
        np.save("scan.npy", mri_simulation.simulate_scan(image, 2, 2, 12, snr=40)[0].kspace)
        np.save("maps.npy", mri_simulation.birdcage_maps(2, (32, 32)))
        np.save("images.npy", np.stack([image * (0.5 + 0.05 * i) for i in range(20)]))
        return tmp_path

    words = ("calibrate", "scan.npy", "--coil-maps", "maps.npy", "--steps", "2", "--draws", "4", "--cases", "20")
    own = ("--images", "images.npy", "--population", "discs", "--device", "cpu")

    def test_a_scan(self, folder):
        result = CliRunner().invoke(app, [*self.words, *self.own, "--json", "--budget", "2m", "-o", "out"])
        assert result.exit_code == 0, result.output
        found = json.loads(result.stdout)
        assert found["cases"] == 20 and found["sampler"]["name"] == "dds" and "discs" in found["population"]
        assert sorted(p.name for p in (folder / "out").iterdir()) == [
            "calibration.json",
            "calibration.md",
            "calibration.png",
            "cases-000000-000020.nc",
            "conformal.json",
            "run.json",
        ]
        shown = CliRunner().invoke(app, [*self.words, *self.own, "-o", "out"])
        assert shown.exit_code == 0 and "acceleration" in shown.stdout and "spread over error" in shown.stdout
        # What was calibrated is what reconstruct makes of this scan.
        given = ("scan.npy", "--coil-maps", "maps.npy", "--steps", "2", "--draws", "4", "--device", "cpu")
        assert CliRunner().invoke(app, ["reconstruct", *given, "-o", "scan.nc"]).exit_code == 0
        with Posterior.open("scan.nc") as posterior:
            attached = uq.Conformal.load("out/conformal.json").attach(posterior)
            assert "conformal_lo" in attached.tree["summary"]

    def test_an_interruption_says_how_to_go_on(self, folder, monkeypatch):
        def stop(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.setattr("invdiff.calibrating_cases.sample", stop)
        result = CliRunner().invoke(app, [*self.words, *self.own])
        assert result.exit_code == 130
        assert result.stderr.strip().endswith("kept in calibration: run the same command again to go on.")

    @pytest.mark.parametrize(
        ("words", "sentence"),
        [
            (("--budget", "soon"), "--budget takes a time such as 1800, 30m or 2h"),
            (("--cases", "3"), "at least 20 cases"),
            (("--images", "images.npy"), "Say in words"),
            (("--sampler", "reddiff"), "point estimate"),
            (("-o", "a/b"), "does not exist"),
        ],
    )
    def test_bad_input_is_one_sentence(self, folder, words, sentence):
        before = sorted(p.name for p in folder.iterdir())
        result = CliRunner().invoke(app, [*self.words, *words])
        assert result.exit_code == 2 and sentence in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
        assert sorted(p.name for p in folder.iterdir()) == before

    def test_budgets(self):
        assert [read_budget(t) for t in ("90", "90s", "30m", "1.5h", " 2 H ")] == [90, 90, 1800, 5400, 7200]
        for bad in ("", "0", "-3", "m", "3d", "nan"):
            with pytest.raises(InvdiffError, match="30m or 2h"):
                read_budget(bad)
