"""How often `invdiff.uq.diagnose` rejects exact draws, and how often six impostors, all tests and each by itself.

200 cases of 32 draws of the two controls of `invdiff.uq.controls`, level 1 %. The p-values of every repetition
are cached in a JSON file, so that the run can be interrupted and continued.

    python benchmarks/diagnostic_power.py run [--seconds 170]   # run what is missing
    python benchmarks/diagnostic_power.py write                 # write the tables into docs/uncertainty.md
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from invdiff import likelihoods, operators, tables
from invdiff.uq import controls, diagnose
from invdiff.uq.controls import Control
from invdiff.uq.uniformity import holm

DOCS = Path(__file__).resolve().parents[1] / "docs"
RESULTS = DOCS / "diagnostic_power.json"
CASES, DRAWS, LEVEL = 200, 32, 0.01
PROBLEMS = {"gaussian": controls.gaussian, "mixture": controls.mixture}
NULLS, REPETITIONS, GENTLE = 320, 100, 40
#: Tests that need operator and likelihood.
OF_THE_DATA = ("log-likelihood", "predictive chi-squared", "residual whiteness")


def scaled(factor: float) -> Callable[[Control, int], np.ndarray]:
    def make(control: Control, seed: int) -> np.ndarray:
        return control.mean[:, None] + factor * (control.draws - control.mean[:, None])

    return make


def moved(share: float) -> Callable[[Control, int], np.ndarray]:
    def make(control: Control, seed: int) -> np.ndarray:
        return control.draws + share * control.std[:, None]

    return make


def exact(control: Control, seed: int) -> np.ndarray:
    return control.draws


#: p-values by problem, sampler, repetition and test.
Results = dict[str, dict[str, dict[str, dict[str, float]]]]

WAYS: dict[str, Callable[[Control, int], np.ndarray]] = {
    "exact": exact,
    **controls.IMPOSTORS,
    "nearly duplicated": controls.nearly_duplicated,
    **{f"width x{f:g}": scaled(f) for f in (0.8, 0.9, 1.1, 1.25)},
    **{f"shift {s:g} std": moved(s) for s in (0.1, 0.25)},
}


def wanted() -> list[tuple[str, str, int]]:
    """Problem, sampler and repetition of everything to be run, the exact draws last."""
    out = []
    for problem in PROBLEMS:
        for way in WAYS:
            if way == "mode missing" and problem == "gaussian":
                continue
            count = NULLS if way == "exact" else REPETITIONS if way in controls.IMPOSTORS else GENTLE
            out += [(problem, way, r) for r in range(count)]
    return sorted(out, key=lambda job: (job[2], job[1] == "exact"))


def p_values(problem: str, way: str, repetition: int) -> dict[str, float]:
    """Return the p-value of every test of one repetition; no two share cases."""
    control = PROBLEMS[problem](CASES, DRAWS, seed=repetition * 100 + list(WAYS).index(way))
    operator = operators.Matrix(torch.from_numpy(control.matrix))
    noise = likelihoods.Gaussian(control.sigma)
    found = diagnose(WAYS[way](control, repetition), control.truth, control.y, operator, noise, seed=repetition)
    return {c.name: c.p_value for c in found.checks}


def run(seconds: float) -> None:
    """Run what is not cached until the time is up."""
    done, start = load(), time.monotonic()
    for problem, way, repetition in wanted():
        rows = done.setdefault(problem, {}).setdefault(way, {})
        if str(repetition) in rows:
            continue
        if time.monotonic() - start > seconds:
            break
        rows[str(repetition)] = p_values(problem, way, repetition)
    save(done)
    left = sum(str(r) not in done.get(p, {}).get(w, {}) for p, w, r in wanted())
    print(f"{left} of {len(wanted())} left")


def load() -> Results:
    """Read the cache."""
    if not RESULTS.exists():
        return {}
    stored = json.loads(RESULTS.read_text())
    tests = stored.pop("tests")
    return {
        p: {w: {r: dict(zip(tests, v)) for r, v in rows.items()} for w, rows in ways.items()}
        for p, ways in stored.items()
    }


def save(done: Results) -> None:
    """Write the cache, names of tests once and two digits of every p-value."""
    first = next(iter(next(iter(next(iter(done.values())).values())).values()))
    lines = [f'"tests":{json.dumps(list(first))}']
    for problem, ways in done.items():
        inner = []
        for way, rows in ways.items():
            numbers = (f'"{r}":[{",".join(f"{p:.2g}" for p in v.values())}]' for r, v in rows.items())
            inner.append(f"{json.dumps(way)}:{{{','.join(numbers)}}}")
        lines.append(f"{json.dumps(problem)}:{{\n" + ",\n".join(inner) + "}")
    RESULTS.write_text("{" + ",\n".join(lines) + "}\n")


def rejected(rows: list[dict[str, float]], without: tuple[str, ...] = (), level: float = LEVEL) -> float:
    """Share of repetitions in which any test, by Holm, rejects."""
    return float(np.mean([holm([p for k, p in r.items() if k not in without]).min() <= level for r in rows]))


def shown(done: Results) -> str:
    """Return both tables."""
    lines = []
    for problem, ways in done.items():
        every = {way: list(rows.values()) for way, rows in ways.items()}
        names = [w for w in ("exact", *controls.IMPOSTORS) if w in every]
        headers = [f"{problem}: share rejected", *names]
        rows = [
            ["repetitions", *(str(len(every[w])) for w in names)],
            ["**all tests, by Holm**", *(f"{rejected(every[w]):.3f}" for w in names)],
            ["the same at 10 %", *(f"{rejected(every[w], level=0.1):.3f}" for w in names)],
            ["without operator and noise", *(f"{rejected(every[w], OF_THE_DATA):.3f}" for w in names)],
        ]
        for test in every["exact"][0]:
            rows.append([test, *(f"{np.mean([r[test] <= LEVEL for r in every[w]]):.2f}" for w in names)])
        lines += [tables.markdown(headers, rows), ""]
    gentle = [w for w in WAYS if w != "exact" and w not in controls.IMPOSTORS]
    rows = [[p, *(f"{rejected(list(done[p][w].values())):.2f}" for w in gentle)] for p in done]
    lines.append(tables.markdown(["smaller errors: share rejected", *gentle], rows))
    return "\n".join(lines) + "\n"


def write() -> None:
    """Write the tables between their markers."""
    page = DOCS / "uncertainty.md"
    marks = re.compile(r"(<!-- diagnostic-power:begin -->\n).*(<!-- diagnostic-power:end -->)", re.DOTALL)
    page.write_text(marks.sub(lambda m: m.group(1) + shown(load()) + m.group(2), page.read_text()))


def main() -> None:
    """Run or write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "write"])
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after this time")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.what == "run":
        run(options.seconds)
    else:
        write()


if __name__ == "__main__":
    main()
