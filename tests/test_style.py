"""Lint, format, types and the state of the tree, so that one command proves all."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SKIPPED = {".git", ".venv", "build", "dist", "runs", "__pycache__"}
LARGEST = 16 << 20


def run(*command):
    """Run a tool of this environment from the root; fail with what it printed."""
    if importlib.util.find_spec(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed; use pip install -e '.[test]'")
    out = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 0, f"{' '.join(command)}\n{out.stdout}{out.stderr}"


def test_lint():
    run("ruff", "check", ".")


def test_format():
    run("ruff", "format", "--check", ".")


def test_types():
    run("mypy")


def files():
    for path in sorted(ROOT.rglob("*")):
        inside = path.relative_to(ROOT)
        hidden = any(p in SKIPPED or p.endswith((".egg-info", "_cache", ".partial")) for p in inside.parts)
        through_link = any((ROOT / p).is_symlink() for p in [inside, *inside.parents])
        if path.is_file() and not hidden and not through_link:
            yield path


TEXT = {".py", ".md", ".toml", ".yaml", ".yml", ".json", ".cff", ".ipynb", ".txt", ""}


def test_tree_has_no_large_files():
    large = [f"{p.relative_to(ROOT)} ({p.stat().st_size} bytes)" for p in files() if p.stat().st_size > LARGEST]
    assert not large


def test_tree_has_clean_text():
    marks = re.compile(r"^(<{7} |={7}$|>{7} )", re.MULTILINE)
    for path in files():
        if path.suffix not in TEXT:
            continue
        text = path.read_text(encoding="utf-8")
        name = path.relative_to(ROOT)
        assert not marks.search(text), f"{name} holds a conflict marker"
        assert "\r" not in text or path.suffix == ".ipynb", f"{name} has carriage returns"
        assert not text or text.endswith("\n"), f"{name} does not end with a newline"
        if path.suffix != ".ipynb":
            assert not re.search(r"[ \t]+$", text, re.MULTILINE), f"{name} has trailing space"
