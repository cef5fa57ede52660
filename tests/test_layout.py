"""The shape of the tree: package list, layering, import time, no copies between samplers."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib

ROOT = Path(__file__).resolve().parents[1]
HOMES = {"operators": ROOT / "operators", "problems": ROOT / "problems"}


def modules():
    """Yield (dotted name, path) of every module of the package, links not followed."""
    for base, dotted in [(ROOT / "invdiff", "invdiff"), *((p, f"invdiff.{n}") for n, p in HOMES.items())]:
        for path in sorted(base.rglob("*.py")):
            inside = path.relative_to(base)
            if base.name == "invdiff" and inside.parts[0] in HOMES:
                continue
            parts = [dotted, *inside.with_suffix("").parts]
            yield ".".join(p for p in parts if p != "__init__"), path


def imports(path, runtime_only=True):
    """Names of invdiff modules that a file imports, leaving out TYPE_CHECKING blocks."""
    tree = ast.parse(path.read_text())
    skipped = set()
    for node in ast.walk(tree):
        if runtime_only and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            skipped |= {id(n) for n in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("invdiff"):
            yield node.module
            if node.module == "invdiff":
                yield from (f"invdiff.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.startswith("invdiff"))


def test_every_package_is_listed():
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {name for name, path in modules() if path.name == "__init__.py"}
    assert found == listed


def test_relative_imports_are_not_used():
    for _, path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path} imports relatively"


CONTRACTS = (
    "errors",
    "spaces",
    "tensors",
    "operator",
    "algebra",
    "likelihood",
    "codec",
    "codec_latent",
    "pulled",
    "problem",
    "prior",
    "rng",
    "schedule",
)
DRIVER = ("driver", "plan", "loop", "finish")


@pytest.mark.parametrize(
    ("layer", "banned"),
    [
        (
            "invdiff.operators",
            ("samplers", "sampler", "priors", "prior", "problems", "cli", "posterior", *DRIVER),
        ),
        *(
            (part, ("samplers", "cli", "posterior", "operators", "priors", "problems", "io", *DRIVER))
            for part in ("invdiff.samplers", "invdiff.primitives")
        ),
        *(
            (f"invdiff.{c}", ("samplers", "operators", "priors", "problems", "cli", "posterior"))
            for c in CONTRACTS
        ),
    ],
)
def test_dependencies_point_one_way(layer, banned):
    for name, path in modules():
        if name != layer and not name.startswith(layer + "."):
            continue
        for target in imports(path):
            for wrong in banned:
                hit = target == f"invdiff.{wrong}" or target.startswith(f"invdiff.{wrong}.")
                assert not hit, f"{name} imports {target}"


def test_every_sampler_is_a_small_file_and_registered():
    from invdiff import samplers

    files = {p.stem for p in (ROOT / "invdiff" / "samplers").glob("*.py")} - {"__init__"}
    assert files == set(samplers.REGISTRY)
    for stem in files:
        assert len((ROOT / "invdiff" / "samplers" / f"{stem}.py").read_text().splitlines()) <= 150


def test_importing_is_light():
    """No slow package is imported with invdiff: the reason why it costs hardly more than torch."""
    heavy = (
        "deepinv",
        "sigpy",
        "xarray",
        "matplotlib",
        "scipy",
        "torchvision",
        "zarr",
        "h5netcdf",
        "typer",
        "rich",
    )
    program = f"import sys, invdiff; invdiff.sample; print([m for m in {heavy!r} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_import_time_is_near_that_of_torch():
    """``import invdiff`` takes at most 1.3 times ``import torch`` (best of interleaved runs)."""

    def once(what):
        program = f"import time; t = time.perf_counter(); import {what}; print(time.perf_counter() - t)"
        out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        return float(out.stdout)

    once("torch")
    ours, torchs = [], []
    for _ in range(5):
        torchs.append(once("torch"))
        ours.append(once("torch, invdiff"))
        if min(ours) <= 1.3 * min(torchs):
            return
    assert min(ours) <= 1.3 * min(torchs), f"{min(ours):.2f} s against {min(torchs):.2f} s"


def test_no_pickle_and_no_unsafe_loading():
    for name, path in modules():
        text = path.read_text()
        assert "weights_only=False" not in text and "allow_pickle=True" not in text, name
        names = {a.name for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Import) for a in n.names}
        assert not names & {"pickle", "dill", "cloudpickle", "joblib"}, f"{name} imports a pickler"
