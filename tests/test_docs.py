"""The documents: their code runs, their links lead somewhere, and the test command is the one that CI executes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / n for n in ("README.md", "CONTRIBUTING.md")] + sorted((ROOT / "docs").rglob("*.md"))
TEST_COMMAND = (
    "python3 -m venv .venv && .venv/bin/pip install -e '.[test]' && .venv/bin/python -m pytest -q"  # as published
)


def label(path):
    return str(path.relative_to(ROOT))


def blocks(path, language):
    """Return ``(line, code)`` of the fenced blocks in a language."""
    text = path.read_text(encoding="utf-8")
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text[: m.start()].count("\n") + 2, m.group(1)) for m in found]


@pytest.mark.parametrize("path", [p for p in PAGES if blocks(p, "python")], ids=label)
def test_python_blocks_run(path, tmp_path):
    """Blocks of one page share their names, run in order in a fresh interpreter, and may not warn."""
    program = ["import warnings, sys", "sys.path.insert(0, sys.argv[1])"]
    program += ["with warnings.catch_warnings():", "    warnings.simplefilter('ignore')"]
    program += ["    import matplotlib, xarray, sigpy.mri  # their own warnings at import are not ours"]
    program += ["matplotlib.use('Agg')", "warnings.simplefilter('error')", "names = {'__name__': 'page'}"]
    for line, code in blocks(path, "python"):
        # Blank lines in front, so that a traceback names the line of the page.
        program.append(f"exec(compile({chr(10) * (line - 1) + code!r}, {label(path)!r}, 'exec'), names)")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    out = subprocess.run(
        [sys.executable, "-c", "\n".join(program), str(ROOT)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, out.stderr[-3000:]


@pytest.mark.parametrize("path", PAGES, ids=label)
def test_links_lead_somewhere(path):
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target) or target.startswith("#"):
            continue
        name, _, anchor = target.partition("#")
        there = (path.parent / name).resolve()
        assert there.exists(), f"{label(path)} links to {target}, which is not there"
        if anchor and there.suffix == ".md":
            headings = re.findall(r"^#+ +(.+)$", there.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-") for h in headings}
            assert anchor in slugs, f"{label(path)} links to {target}, and there is no such heading"


@pytest.mark.parametrize("path", PAGES, ids=label)
def test_commands_and_options_exist(path):
    """Every ``invdiff ...`` line of a shell block names a command and options that its help knows."""
    import typer

    from invdiff.cli.app import app

    known = typer.main.get_command(app)
    for _, code in blocks(path, "(?:sh|bash)"):
        for line in code.replace("\\\n", " ").splitlines():
            words = line.partition("#")[0].split()
            while words and not words[0].endswith("invdiff"):
                words.pop(0)
            if not words:
                continue
            command, names = known, words[1:]
            while names and hasattr(command, "commands") and names[0] in command.commands:
                command = command.commands[names.pop(0)]
            options = {o for p in command.params for o in (*p.opts, *p.secondary_opts)} | {"--help", "--version"}
            if command.name == "train":
                from invdiff.training.config import TrainConfig

                options |= {f"--{n.replace('_', '-')}" for n in TrainConfig.__dataclass_fields__}
            assert command is not known or not names or names[0].startswith("-"), line
            for word in names:
                if word.startswith("-"):
                    assert word.partition("=")[0] in options, f"{label(path)}: no option {word} in: {line}"


def readme_test_command():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    inside = re.search(r"<!-- test-command:begin -->(.*?)<!-- test-command:end -->", text, re.DOTALL)
    assert inside, "README.md has no test command between its markers"
    (command,) = re.findall(r"^```sh\n(.+)\n```$", inside.group(1), re.MULTILINE)
    return command


def test_ci_executes_the_test_command_of_the_readme():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    text = script.read_text(encoding="utf-8")
    assert "set -euo pipefail" in text
    shown = subprocess.run([str(script), "--print"], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == readme_test_command() == TEST_COMMAND
    # What it prints is what it executes: one variable, set once, and the last line of the script runs it.
    assert len(re.findall(r"^command=", text, re.MULTILINE)) == 1
    assert text.rstrip().splitlines()[-1] == 'bash -euo pipefail -c "$command"'


def test_readme_says_how_to_install_and_run_the_demonstration():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "python3 -m venv .venv && .venv/bin/pip install -e . && .venv/bin/invdiff demo" in text
    assert text.index("<!-- samplers:begin -->") < text.index("<!-- samplers:end -->")


def test_versions_agree():
    import tomllib

    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert re.search(rf"^version: {re.escape(version)}$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()
    assert f'__version__ = "{version}"' in (ROOT / "invdiff" / "__init__.py").read_text()
