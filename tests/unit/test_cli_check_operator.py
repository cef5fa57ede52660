"""``invdiff check-operator``: verdicts, exit codes, JSON, and what is said of modules that cannot be had."""

import json
import sys

import pytest
from typer.testing import CliRunner

from invdiff.cli.app import app

SOURCE = """
import torch
from invdiff import Space
from invdiff.operator import LinearOperator

class Shift(LinearOperator):
    def __init__(self, back=1):
        self.domain = self.range = Space((6,), torch.float64)
        self.back = back
    def _forward(self, x):
        return x.to(self.domain.dtype).roll(1, -1)
    def _adjoint(self, y):
        return y.to(self.domain.dtype).roll(-self.back, -1)

good = Shift()
def wrong():
    return Shift(back=2)
class Home:
    inside = good
number = 3
def broken():
    raise RuntimeError("no [data]\\nhere")
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shifts_of_mine.py").write_text(SOURCE)
    yield "shifts_of_mine"
    sys.modules.pop("shifts_of_mine", None)


def run(*words, code=0):
    result = CliRunner().invoke(app, ["check-operator", *map(str, words)])
    assert result.exit_code == code, f"{result.output}\n{result.stderr}"
    return result


@pytest.mark.parametrize("name", ["good", "Home.inside"])
def test_a_sound_operator(module, name):
    path = list(sys.path)
    out = run(f"{module}:{name}").stdout
    assert "Shift" in out and "adjoint, aligned data" in out and "rows do not mix" in out and "pass: all" in out
    assert "FAIL" not in out and sys.path == path


def test_a_wrong_one_has_its_own_exit_code(module):
    out = run(f"{module}:wrong", code=3).stdout
    assert "FAIL" in out and "adjoint, random data" in out
    found = json.loads(run(f"{module}:wrong", "--json", code=3).stdout)
    assert not found["ok"] and "adjoint, random data" in found["failed"]
    assert found["operator"] == "Shift" and {"name", "error", "bound", "ok", "note"} <= set(found["checks"][0])


def test_bound_and_seed(module):
    assert json.loads(run(f"{module}:wrong", "--tol", 10, "--seed", 3, "--json").stdout)["ok"] is True


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("shifts_of_mine", "MODULE:OBJECT"),
        ("shifts_of_mine:other", "AttributeError"),
        ("no_such_module_here:x", "ModuleNotFoundError"),
        ("shifts_of_mine:number", "is a int; expected an operator"),
        ("shifts_of_mine:broken", r"RuntimeError: no [data] here"),
    ],
)
def test_bad_targets_get_one_sentence(module, target, words):
    result = run(target, code=2)
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("Error: ") and words in lines[0], result.stderr
    assert run(f"{module}:good", "--tol", 0, code=2).stderr.startswith("Error: The bound")
