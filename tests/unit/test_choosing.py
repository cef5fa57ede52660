"""Which samplers run on a problem, and what a result says of the sampler's measured width."""

import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import invdiff
from invdiff import anchors, honesty, likelihoods, operators, samplers
from invdiff.cli.app import app
from invdiff.cli.report import html_page
from invdiff.honesty import measured
from invdiff.problem import Problem
from invdiff.spaces import Space
from tests.conformance.toys import BlackBox, normal_prior


def figures(width, bias=0.1, **more):
    return {"mask-32": {"mean_error": bias, "std_ratio_measured": width, "nfe": 30.0, **more}}


@pytest.fixture
def table(monkeypatch):
    """Figures of our own, so that no new measurement changes what is tested."""
    made = {
        name: {"default": {"config": samplers.get(name).describe()["config"], "figures": figures(*values)}}
        for name, values in {
            "dds": (1.0, 0.3),
            "pigdm": (1.1, 0.05),
            "dps": (0.2,),
            "reddiff": (0.1, 0.01),
        }.items()
    }
    made["pigdm"]["default"]["figures"]["mask-32"]["vjp"] = 30.0
    fine = samplers.get("dds", steps=200, eta=1.0).describe()["config"]
    made["dds"]["fine"] = {"config": fine, "figures": figures(2.0)}
    plain = json.loads(json.dumps(made))
    monkeypatch.setattr(honesty, "_table", lambda: plain)
    return plain


@pytest.fixture
def field():
    return anchors.gaussian_field(16, "mask")


def test_those_that_run_come_first_by_what_was_measured(table, field):
    found = invdiff.suggest(*field)
    assert {c.sampler.name for c in found} == {n for n, c in samplers.REGISTRY.items() if c.conditional}
    posterior = [c.sampler.name for c in found if c.runs and c.sampler.kind == "posterior"]
    assert posterior[:3] == ["pigdm", "dds", "dps"], "sorted by the larger of bias and |log width|"
    rows = {r["name"]: r for r in found.rows()}
    assert rows["pigdm"]["network_passes_per_draw"] == 90, "a reverse pass counts as two"
    assert rows["dds"]["bias"] == 0.3 and rows["dds"]["width_on_measured_directions"] == 1.0
    assert rows["dps"]["note"] == "width is wrong" and rows["tmpd"]["note"] == "not measured"
    assert rows["reddiff"]["width_on_measured_directions"] is None, "a point estimate says nothing about width"
    names = [c.sampler.name for c in found]
    assert names.index("reddiff") > max(names.index(n) for n in posterior)
    json.dumps(found.rows(), allow_nan=False)


def test_what_is_missing(table):
    problem = Problem.simulate(BlackBox(), likelihoods.Gaussian(0.1), torch.zeros(1, 1, 6, 5).double())
    found = {c.sampler.name: c for c in invdiff.suggest(problem, normal_prior(differentiable=0))}
    assert not found["dps"].runs and "denoiser-vjp" in found["dps"].missing and "vjp" in found["dps"].missing
    assert "linear" in found["dds"].missing and found["dds"].note.startswith("needs linear")


def test_representations(table, field):
    found = invdiff.suggest(*field)
    assert "pigdm" in repr(found) and "width is wrong" in repr(found)
    page = found._repr_html_()
    assert page.count("<tr>") == len(found) + 1 and "pigdm" in page and "exact posteriors" in page


def test_measured_takes_the_nearest_setting(table):
    assert measured(samplers.get("dds")).setting == "default" and measured(samplers.get("dds")).matches
    near = measured(samplers.get("dds", steps=200, eta=1.0, lam=2.0))
    assert near.setting == "fine" and not near.matches
    assert "have not been measured themselves" in near.sentence() and "nearest settings" in near.warning()
    assert measured(samplers.get("tmpd")) is None


def run(field, sampler):
    return invdiff.sample(*field, sampler, draws=2, seed=0)


def test_a_result_warns_of_a_wrong_width(table, field):
    posterior = run(field, samplers.get("dps", steps=3))
    assert "0.20 (mask)" in posterior.provenance["measured"]
    warning = posterior.provenance["width_warning"]
    assert "too narrow" in warning and "0.20" in warning and warning == posterior.width_warning
    assert warning in repr(posterior)
    assert "too narrow" in posterior._repr_html_() and "too narrow" in html_page(posterior, b"", {})
    caption = posterior.plot().get_suptitle().replace("\n", " ")
    assert f"Caution: {warning}" in caption
    assert "too wide" in run(field, samplers.get("dds", steps=200, eta=1.0)).width_warning


def test_a_result_does_not_warn_where_nothing_is_wrong(table, field):
    right = run(field, samplers.get("pigdm", steps=3))
    assert "1.10 (mask)" in right.provenance["measured"]
    unknown = run(field, samplers.get("tmpd", steps=3))
    assert "has not been measured" in unknown.provenance["measured"]
    point = run(field, samplers.get("reddiff", steps=3))
    assert "measured" not in point.provenance
    prior = invdiff.sample(None, field[1], draws=2, seed=0)
    assert "measured" not in prior.provenance
    for posterior in (right, unknown, point, prior):
        assert posterior.width_warning == "" and "width_warning" not in posterior.provenance
        assert "caution" not in repr(posterior) and "Caution" not in posterior.plot().get_suptitle()


def test_the_warning_is_stored(table, field, tmp_path):
    path = run(field, samplers.get("dps", steps=3)).save(tmp_path / "a.nc")
    with invdiff.open_posterior(path) as again:
        assert "too narrow" in again.width_warning and "0.20" in again.provenance["measured"]


def test_the_shipped_figures_are_those_of_samplers_that_exist():
    for name, rows in honesty._table().items():
        for setting, row in rows.items():
            known = set(samplers.REGISTRY[name].__dataclass_fields__)
            assert set(row["config"]) <= known, (name, setting)


class TestCommandLine:
    def invoke(self, *words, code=0):
        result = CliRunner().invoke(app, ["samplers", *map(str, words)])
        assert result.exit_code == code, result.output
        return result

    @pytest.fixture
    def scan(self, tmp_path):
        n = 32
        x = torch.from_numpy(np.hypot(*np.mgrid[-1 : 1 : n * 1j, -1 : 1 : n * 1j]) < 0.7)[None, None]
        maps = Space((2, n, n), torch.complex64).randn(1, 0)[0]
        a = operators.MultiCoilMRI(torch.ones(n, n), maps)
        y = a(x.to(torch.complex64)) + 0.05 * a.range.randn(1, 1)
        np.save(tmp_path / "scan.npy", y[0].numpy())
        np.save(tmp_path / "maps.npy", maps.numpy())
        return tmp_path

    def test_list_has_the_measured_columns(self):
        entry = next(e for e in json.loads(self.invoke("--json").stdout)["samplers"] if e["name"] == "dds")
        assert entry["measured_bias"] == measured(samplers.get("dds")).bias and entry["measured_width"] > 0
        text = self.invoke().stdout
        assert "bias" in text and "width" in text and f"{entry['measured_bias']:.2f}" in text

    def test_for_a_scan(self, scan):
        given = ("--for", scan / "scan.npy", "--coil-maps", scan / "maps.npy", "--sigma", 0.05)
        found = json.loads(self.invoke(*given, "--json").stdout)
        assert found["scan"]["coil_maps_source"] == "given" and found["scan"]["sigma"] == 0.05
        rows = {r["name"]: r for r in found["samplers"]}
        assert rows["dds"]["runs"] and not rows["dds"]["missing"] and not rows["mcgdiff"]["runs"]
        text = self.invoke(*given).stdout
        assert "needs svd" in text and "acceleration" in text

    def test_bad_input_is_one_sentence(self, scan):
        for words in (("dds", "--for", scan / "scan.npy"), ("--for", scan / "no.npy")):
            lines = self.invoke(*words, code=2).stderr.strip().splitlines()
            assert len(lines) == 1 and lines[0].startswith("Error: ")
