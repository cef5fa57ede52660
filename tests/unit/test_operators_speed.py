"""The benchmark of operators: what it counts, what it compares with, and what it does not measure again."""

import importlib
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
PARTS = ("interleaved", "operators_ct", "operators_imaging", "operators_mri")


@pytest.fixture(scope="module")
def bench():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        # under another name, because the root of the repository has a folder "operators"
        spec = importlib.util.spec_from_file_location("operators_speed", BENCHMARKS / "operators.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
        for name in PARTS:
            sys.modules.pop(name, None)


def test_rounds_interleave_and_the_first_does_not_count(bench, monkeypatch):
    monkeypatch.setattr(sys.modules["interleaved"], "_LEAST", 1e-12)
    calls = []
    found = bench.measure({name: lambda name=name: calls.append(name) for name in "ab"}, 3)
    assert [name for i, name in enumerate(calls) if i == 0 or calls[i - 1] != name] == ["a", "b"] * 4
    assert all(len(values) == 3 and min(values) >= 0 for pair in found.values() for values in pair)


def test_ratios_are_to_deepinv_and_to_the_fastest_other_of_the_direction(bench):
    times = {
        "1/forward/deepinv Blur": [[8.0, 80.0, 8.0], [9.0] * 3],
        "1/forward/invdiff Blur": [[2.0, 20.0, 4.0], [3.0] * 3],
        "1/forward/slow": [[6.0, 60.0, 6.0], [6.0] * 3],
        "1/forward/quick": [[1.0, 10.0, 2.0], [2.0] * 3],
        "1/prox/invdiff Blur": [[5.0] * 3, [5.0] * 3],
    }
    lines = bench.table({"times": times, "errors": {}}).splitlines()[2:]
    rows = {
        tuple(cells[1:3]): cells[3:] for cells in ([c.strip() for c in line.split("|")[1:-1]] for line in lines)
    }
    assert rows["forward", "**invdiff Blur**"] == ["4", "3", "4.00", "0.50"]
    assert rows["forward", "deepinv Blur"] == ["8", "9", "1.00", "0.12"]
    assert rows["forward", "slow"][2:] == ["1.33", "0.17"]
    assert rows["prox", "**invdiff Blur**"][2:] == ["–", "–"]


def test_a_group_is_measured_once_for_the_same_settings(bench, monkeypatch, tmp_path):
    calls = []

    def make(batch):
        return {"forward": lambda: calls.append(batch) or torch.zeros(batch)}

    group = bench.Group("Nothing", "", lambda: {"invdiff": make}, (1, 4), error=lambda x: float(len(x)))
    monkeypatch.setattr(bench, "GROUPS", {"nothing": group})
    monkeypatch.setattr(bench, "RESULTS", tmp_path / "speed.json")
    monkeypatch.setattr(sys.modules["interleaved"], "_LEAST", 1e-12)
    bench.run([], 2, False)
    assert set(calls) == {1, 4} and bench.load()["nothing"]["errors"] == {"invdiff": 1.0}
    before = len(calls)
    bench.run([], 2, False)
    assert len(calls) == before
    bench.run([], 3, False)
    assert len(calls) > before and len(bench.load()["nothing"]["times"]["4/forward/invdiff"][0]) == 3
    bench.write()
    assert "## Nothing" in (tmp_path / "speed.md").read_text()


def test_candidates_of_a_group_compute_the_same(bench):
    """Builders check their candidates against ours; the cheap groups are built here."""
    for name in ("super-resolution-blur", "phase-retrieval"):
        for make in bench.GROUPS[name].candidates().values():
            for run in make(1).values():
                run()
