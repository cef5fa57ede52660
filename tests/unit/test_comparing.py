"""Samplers side by side: scores, rows for those that fail, one budget of time, table, figure and files."""

import csv
import dataclasses
import json
import math
import time

import numpy as np
import pytest
import torch
from scipy.stats import norm
from typer.testing import CliRunner

import invdiff
from invdiff import anchors, likelihoods, mri_simulation, operators, samplers
from invdiff.cli.app import app
from invdiff.comparing import name_samplers
from invdiff.errors import InvdiffError, NonFiniteError, StoreError
from invdiff.figures import png_bytes
from invdiff.metrics import crps
from invdiff.prior import FunctionDenoiser, Prior
from invdiff.problem import Problem
from invdiff.samplers import DDS, TMPD, PiGDM
from invdiff.spaces import Space
from tests.conformance.toys import Square, normal_prior


class TestCRPS:
    @pytest.mark.parametrize("n", [2, 5, 50])
    def test_is_unbiased_for_the_normal_law(self, n):
        rng = np.random.default_rng(n)
        for mean, std, y in ((0.0, 1.0, 0.7), (2.0, 0.3, 1.5)):
            z = (y - mean) / std
            exact = std * (z * (2 * norm.cdf(z) - 1) + 2 * norm.pdf(z) - 1 / math.sqrt(math.pi))
            found = crps(mean + std * rng.standard_normal((n, 100_000)), np.full(100_000, y))
            assert found.mean() == pytest.approx(exact, abs=5 * found.std() / math.sqrt(100_000))

    def test_is_the_double_sum(self):
        rng = np.random.default_rng(0)
        x, y, w = rng.standard_normal((7, 3)), rng.standard_normal(3), rng.random(7)
        w = w / w.sum()
        pairs = np.abs(x[:, None] - x[None])
        plain = np.abs(x - y).mean(0) - pairs.sum((0, 1)) / (2 * 7 * 6)
        np.testing.assert_allclose(crps(x, y), plain, rtol=1e-12)
        weighted = (w[:, None] * np.abs(x - y)).sum(0)
        weighted = weighted - (w[:, None, None] * w[None, :, None] * pairs).sum((0, 1)) / (2 * (1 - (w**2).sum()))
        np.testing.assert_allclose(crps(x, y, w), weighted, rtol=1e-12)
        np.testing.assert_allclose(crps(x, y, np.full(7, 3.0)), plain, rtol=1e-12)

    def test_refuses_what_has_no_spread(self):
        for bad in (np.zeros((1, 3)), np.zeros((4, 2)), np.zeros((4, 3), complex)):
            with pytest.raises(InvdiffError, match="at least two real draws"):
                crps(bad, np.zeros(3))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Breaking(DDS):
    """Turns NaN, or raises."""

    steps: int = 3
    how: str = "nan"

    def step(self, k, state, ctx, rng):
        state = super().step(k, state, ctx, rng)
        if self.how == "raise":
            raise RuntimeError("a fault")
        return {key: v * float("nan") for key, v in state.items()} if self.how == "nan" else state


@pytest.fixture(scope="module")
def field():
    return anchors.gaussian_field(16, "mask")


@pytest.fixture(scope="module")
def comparison(field):
    chosen = [
        TMPD(steps=8),
        ("dds", "published"),
        ("narrow", DDS(steps=6, eta=0.0)),
        ("estimate", samplers.get("reddiff", steps=20)),
        Breaking(),
        ("fault", Breaking(how="raise")),
    ]
    return invdiff.compare(*field, chosen, draws=6, seed=3)


class TestCompare:
    def test_every_sampler_has_a_row_in_the_order_asked_for(self, comparison):
        rows = comparison.rows()
        assert [r["sampler"] for r in rows] == ["tmpd", "dds published", "narrow", "estimate", "dds", "fault"]
        assert [r["ran"] for r in rows] == [True, True, True, True, False, False]
        assert "None of the draws is usable" in rows[4]["note"]
        assert rows[5]["note"] == "It failed with RuntimeError: a fault"
        assert list(comparison.posteriors) == ["tmpd", "dds published", "narrow", "estimate"]
        assert rows[2]["settings"] == "steps=6, eta=0.0"

    def test_figures(self, comparison):
        first = comparison.rows()[0]
        assert first["draws"] == 6 and first["nfe"] == 8 and first["vjp"] > 8 and first["seconds"] > 0
        assert first["prediction_level"] == first["coverage_level"] == pytest.approx(5 / 7)
        assert 0.5 < first["misfit"] < 2 and 0 < first["width"] < 1 and first["psnr"] > 15
        assert 0.3 < first["prediction_coverage"] <= 1 and 0.3 < first["coverage"] < 0.95
        truth, mean = (
            v.values for v in (comparison.posteriors["tmpd"].x_true, comparison.posteriors["tmpd"].mean())
        )
        assert first["nrmse"] == pytest.approx(np.linalg.norm(mean - truth) / np.linalg.norm(truth))
        held = comparison.withheld
        predicted = held.predict(torch.from_numpy(mean)[None])[0] - held.data()
        assert first["prediction_error"] == pytest.approx(float(predicted.norm() / held.data().norm()))

    def test_point_estimates_claim_no_spread(self, comparison):
        row = comparison.rows()[3]
        assert row["kind"] == "point" and row["draws"] == 1
        for key in ("width", "coverage", "crps", "prediction_coverage", "prediction_crps", "measured_width"):
            assert row[key] is None
        assert row["prediction_error"] > 0 and row["nrmse"] > 0

    def test_all_see_the_same_reduced_data(self, comparison, field):
        held = comparison.withheld
        assert held.count == round(0.1 * int(field[0].operator.mask.sum()))
        for posterior in comparison.posteriors.values():
            y = posterior.observed["y"].values
            assert (y[held.at(0).numpy()] == 0).all() and posterior.provenance["seed"] == 3
        assert 0.02 < comparison.noise_share < 0.2

    def test_same_seed_same_figures(self, comparison, field):
        again = invdiff.compare(*field, [TMPD(steps=8)], draws=6, seed=3).rows()[0]
        for key in ("prediction_crps", "coverage", "width", "psnr"):
            assert again[key] == pytest.approx(comparison.rows()[0][key], rel=1e-9)

    def test_without_truth_and_with_all_data(self, field):
        problem = dataclasses.replace(field[0], x_true=None)
        found = invdiff.compare(problem, field[1], ["pigdm"], draws=2, withhold=0)
        row = found.rows()[0]
        assert row["psnr"] is None and row["prediction_error"] is None and row["misfit"] > 0
        headers = found.table()[0]
        assert "PSNR" not in headers and "predicted" not in headers and "misfit" in headers
        assert found.withheld is None and "No data were withheld." in repr(found)
        assert found.figure() is not None

    def test_several_cases_are_averaged(self, field):
        x = field[1].denoiser.sample(3, 1)
        problem = Problem.simulate(field[0].operator, likelihoods.Gaussian(0.05), x)
        found = invdiff.compare(problem, field[1], [TMPD(steps=4)], draws=3, time_budget_s=60)
        assert found.rows()[0]["draws"] == 3 and found.rows()[0]["coverage"] > 0
        assert "case 2" in found.figure(2).get_suptitle()
        with pytest.raises(InvdiffError, match="no case 3"):
            found.figure(3)

    def test_nonlinear_problems_are_compared_on_all_data(self):
        problem = Problem.simulate(Square(), likelihoods.Gaussian(0.1), torch.zeros(1, 1, 6, 5).double())
        found = invdiff.compare(problem, normal_prior(), [samplers.get("daps", steps=3), "dds"], draws=2)
        assert "No data were withheld: measurements are withheld from linear operators" in repr(found)
        assert "needs a linear operator" in found.rows()[1]["note"] and found.rows()[0]["ran"]

    def test_by_default_those_suggested_first(self, field, monkeypatch):
        class Choice:
            runs, sampler = True, TMPD(steps=2)

        monkeypatch.setattr("invdiff.comparing.suggest", lambda *_: [Choice] * 5)
        assert [r["sampler"] for r in invdiff.compare(*field, draws=2).rows()] == ["tmpd", "tmpd (2)", "tmpd (3)"]

    def test_warnings_become_notes(self, field):
        @dataclasses.dataclass(frozen=True, kw_only=True)
        class Half(DDS):
            steps: int = 2

            def finish(self, state, ctx):
                return torch.where(torch.arange(len(state["x"]))[:, None, None, None] == 0, torch.nan, state["x"])

        found = invdiff.compare(*field, [Half()], draws=3)
        assert found.rows()[0]["draws"] == 2 and "1 of 3 draws became NaN" in found.rows()[0]["note"]

    def test_refusals(self, field):
        with pytest.raises(InvdiffError, match="did you mean dds"):
            invdiff.compare(*field, ["ddss"])
        with pytest.raises(InvdiffError, match="at least one sampler"):
            invdiff.compare(*field, [])
        with pytest.raises(InvdiffError, match="ignores data"):
            invdiff.compare(*field, ["heun"])
        with pytest.raises(InvdiffError, match="between 0 and 1"):
            invdiff.compare(*field, ["dds"], withhold=1.5)
        with pytest.raises(InvdiffError, match="positive number of seconds"):
            invdiff.compare(*field, ["dds"], time_budget_s=0)
        with pytest.raises(InvdiffError, match="None of the samplers could run: dds: None of the draws"):
            invdiff.compare(*field, [Breaking()], draws=2)
        assert issubclass(NonFiniteError, InvdiffError)

    def test_names(self):
        labels = [n for n, _ in name_samplers(["dds", DDS(steps=3), ("dds", "tuned"), ("mine", PiGDM())])]
        assert labels == ["dds", "dds (2)", "dds tuned", "mine"]


def slow_prior(seconds):
    """A standard normal prior whose every evaluation takes a while."""
    space = Space((1, 6, 5), torch.float64)

    def denoise(x, sigma):
        time.sleep(seconds)
        return x / (1 + sigma.reshape(-1, 1, 1, 1) ** 2)

    return Prior(FunctionDenoiser(denoise, space, 1e-3, 50.0), card={"name": "slow"})


class TestBudget:
    @pytest.fixture
    def problem(self):
        space = Space((1, 6, 5), torch.float64)
        mask = operators.Mask(torch.arange(30).reshape(1, 6, 5) % 2, space)
        return Problem.simulate(mask, likelihoods.Gaussian(0.1), space.randn(1))

    def test_what_does_not_fit_is_not_run(self, problem):
        chosen = [("long", DDS(steps=5000)), ("short", DDS(steps=5))]
        start = time.monotonic()
        found = invdiff.compare(problem, slow_prior(0.02), chosen, draws=2, time_budget_s=10)
        assert time.monotonic() - start < 30
        long, short = found.rows()
        assert short["ran"] and short["draws"] == 2 and not long["ran"]
        assert long["note"].startswith("Not run: one draw would take about") and "5000 steps" in long["note"]
        assert found.table()[1][0][1] == "not run"

    def test_fewer_draws_where_time_is_short(self, problem):
        found = invdiff.compare(problem, slow_prior(0.05), [DDS(steps=10)], draws=400, time_budget_s=6)
        # batches of a quarter cost no more than a single draw here, but time is up before all are made
        row = found.rows()[0]
        assert 2 <= row["draws"] < 400 and "draws fitted into its part of the time" in row["note"]
        assert row["seconds"] < 12

    def test_none_fits(self, problem):
        with pytest.raises(
            InvdiffError, match=r"No sampler fits into 0.5 s: the cheapest, short, .* allow .* s or more"
        ):
            chosen = [("long", DDS(steps=5000)), ("short", DDS(steps=500))]
            invdiff.compare(problem, slow_prior(0.02), chosen, draws=2, time_budget_s=0.5)


class TestShown:
    def test_text(self, comparison):
        text = repr(comparison)
        head = next(line for line in text.splitlines() if line.startswith("sampler"))
        assert "dds published" in text and "not run" in text and "estimate" in text
        row = next(line for line in text.splitlines() if line.startswith("tmpd"))
        assert len(row) == len(head), "columns are aligned"
        assert "noise alone makes a prediction error" in text and "fault: It failed with" in text

    def test_html_and_markdown(self, comparison):
        page = comparison._repr_html_()
        assert page.count("<tr>") == 7 and "<script" not in page
        hostile = dataclasses.replace(
            comparison, entries=(dataclasses.replace(comparison.entries[0], label="<b>|x", note="<i>"),)
        )
        assert "<b>" not in hostile._repr_html_() and "<i>" not in hostile._repr_html_()
        assert "\\|x" in hostile.markdown()
        assert len([line for line in comparison.markdown().splitlines() if line.startswith("|")]) == 8

    def test_caution_for_a_width_known_to_be_wrong(self, comparison, monkeypatch):
        from invdiff.honesty import Measured

        wrong = Measured("x", "default", True, {"mask-32": {"std_ratio_measured": 0.3, "mean_error": 0.1}})
        monkeypatch.setattr("invdiff.comparison.measured", lambda _: wrong)
        rows = {r["sampler"]: r for r in comparison.rows()}
        assert "too narrow" in rows["tmpd"]["caution"] and rows["estimate"]["caution"] is None
        assert "tmpd: The spread is likely too narrow" in repr(comparison)

    def test_figure_has_one_scale_for_images_and_one_for_spreads(self, comparison):
        figure = comparison.figure()
        shown = [a.get_images()[0] for a in figure.axes if a.get_images()]
        grey = {i.get_clim() for i in shown if i.cmap.name == "gray"}
        colour = {i.get_clim() for i in shown if i.cmap.name == "viridis"}
        assert len(grey) == len(colour) == 1 and len(shown) == 1 + 3 * 4 + 2
        titles = [a.get_title() for a in figure.axes if a.get_title()]
        assert sorted(titles) == ["mean", "one draw", "standard deviation", "truth", "|mean - truth|"]
        labels = [a.get_ylabel() for a in figure.axes if a.get_ylabel()]
        assert labels == ["tmpd", "dds published", "narrow", "estimate"]
        assert png_bytes(figure, 40)[:4] == b"\x89PNG"

    def test_one_that_broke_down_does_not_hide_the_others(self, comparison):
        posterior = comparison.posteriors["tmpd"]
        wild = invdiff.Posterior(posterior.tree.copy(deep=True))
        wild.tree["summary"]["std"].values[:] = 1e3
        entries = (*comparison.entries, dataclasses.replace(comparison.entries[0], label="wild", posterior=wild))
        figure = dataclasses.replace(comparison, entries=entries).figure()
        (clim,) = {i.get_clim() for a in figure.axes for i in a.get_images() if i.cmap.name == "viridis"}
        assert clim[1] < 10 * float(posterior.std().max())

    def test_signals(self):
        space = Space((12,), torch.float64)
        mask = operators.Mask(torch.arange(12) % 3 > 0, space)
        problem = Problem.simulate(mask, likelihoods.Gaussian(0.1), space.randn(1))
        prior = Prior(
            FunctionDenoiser(lambda x, s: x / (1 + s.reshape(-1, 1) ** 2), space, 1e-3, 50.0), card={"name": "n"}
        )
        found = invdiff.compare(problem, prior, [DDS(steps=3), samplers.get("reddiff", steps=5)], draws=3)
        assert png_bytes(found.figure(), 40)[:4] == b"\x89PNG"
        labels = [h.get_text() for h in found.figure().axes[0].get_legend().get_texts()]
        assert set(labels) == {"90 % interval", "one draw", "truth", "mean"}

    def test_files(self, comparison, tmp_path, monkeypatch):
        paths = comparison.save(tmp_path / "out")
        assert sorted(p.name for p in paths) == sorted(p.name for p in (tmp_path / "out").iterdir())
        assert {p.suffix for p in paths} == {".md", ".csv", ".json", ".png"}
        found = json.loads((tmp_path / "out" / "compare.json").read_text())
        assert found["rows"][0]["sampler"] == "tmpd" and found["samplers"]["narrow"]["config"]["eta"] == 0.0
        with (tmp_path / "out" / "compare.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == 6 and float(rows[0]["nrmse"]) == found["rows"][0]["nrmse"] and rows[3]["width"] == ""
        with pytest.raises(StoreError, match="choose another folder"):
            comparison.save(tmp_path / "no" / "out")
        with pytest.raises(StoreError, match="choose another folder"):
            comparison.save(tmp_path / "out" / "compare.md")
        monkeypatch.setattr(type(comparison), "figure", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            comparison.save(tmp_path / "other")
        assert not (tmp_path / "other").exists(), "nothing is written before all is made"


class TestCommandLine:
    @pytest.fixture
    def folder(self, tmp_path, monkeypatch):
        n = 48
        y, x = np.mgrid[-1 : 1 : n * 1j, -1 : 1 : n * 1j]
        image = (np.hypot(x / 0.7, y / 0.85) < 1) * (0.6 + 0.4 * (np.hypot(x, y) < 0.3)) * np.exp(1j * x)
        scan, _ = mri_simulation.simulate_scan(image, coils=2, acceleration=3, centre=14, snr=40)
        monkeypatch.chdir(tmp_path)
        np.save("scan.npy", scan.kspace)
        np.save("maps.npy", mri_simulation.birdcage_maps(2, (n, n)))
        return tmp_path

    def invoke(self, *words, code=0):
        result = CliRunner().invoke(app, ["compare", *map(str, words)])
        assert result.exit_code == code, f"{result.output}{result.stderr}"
        return result

    def fast(self, *words):
        given = ("--coil-maps", "maps.npy", "--steps", 2, "--draws", 2, "--device", "cpu")
        return ("scan.npy", *given, *words)

    def test_help(self, folder):
        assert "--samplers" in self.invoke("--help").stdout

    def test_table_and_files(self, folder):
        text = self.invoke(*self.fast("--samplers", "dds,dds:published,mcgdiff", "--output", "out")).stdout
        assert "dds published" in text and "not run" in text and "mcgdiff needs" in text and "predicted" in text
        assert sorted(p.name for p in (folder / "out").iterdir()) == [
            "compare.csv", "compare.json", "compare.md", "compare.png",
        ]  # fmt: skip

    def test_json(self, folder):
        result = self.invoke(*self.fast("--samplers", "dds", "--json", "--time", 300, "--withhold", 0.2))
        found = json.loads(result.stdout)
        assert found["rows"][0]["nfe"] == 2 and found["scan"]["coils"] == 2 and found["withheld"] > 0
        assert found["time_budget_s"] == 300 and found["files"] == [] and result.stderr == ""

    @pytest.mark.parametrize(
        ("words", "expected"),
        [
            ((), "either a file of k-space or --demo"),
            (("scan.npy", "--demo"), "either a file of k-space or --demo"),
            (("--demo", "--mask", "scan.npy"), "brings its own"),
            (("no.npy",), "no.npy"),
            (("scan.npy", "--samplers", "ddss"), "did you mean dds"),
            (("scan.npy", "--samplers", "dds:no"), "has no preset"),
            (("scan.npy", "--samplers", ","), "takes names between commas"),
            (("scan.npy", "--withhold", 1), "--withhold is a share"),
            (("scan.npy", "--time", 0), "time budget must be"),
            (("scan.npy", "--sigma", -1), "must be positive"),
            (("scan.npy", "--output", "there/out"), "does not exist; create"),
            (("scan.npy", "--output", "maps.npy"), "is a file; give a folder"),
        ],
    )
    def test_bad_input_is_one_sentence(self, folder, words, expected):
        before = sorted(p.name for p in folder.iterdir())
        result = self.invoke(*words, code=2)
        lines = result.stderr.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("Error: ") and expected in lines[0]
        assert sorted(p.name for p in folder.iterdir()) == before

    def test_demo_knows_its_truth(self, folder, monkeypatch):
        asked = {}

        def fake(problem, prior, chosen, *_, **__):
            asked.update(problem=problem, chosen=chosen)
            raise InvdiffError("enough")

        monkeypatch.setattr("invdiff.comparing.compare", fake)
        self.invoke("--demo", "--samplers", "dds,dps:published", code=2)
        assert asked["problem"].x_true is not None
        assert [n for n, _ in asked["chosen"]] == ["dds", "dps published"] and asked["chosen"][1][1].steps == 1000
