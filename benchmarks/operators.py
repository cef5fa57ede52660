"""Time every group of operators against deepinv and the best other package, and write the page.

All candidates of a group run in turn, round after round. Groups are cached in a JSON file, so that a run can be
interrupted and continued; a group measured with the same settings is not measured again.

    python benchmarks/operators.py run [--only blur ct-fan] [--threads 2] [--rounds 7] [--again]
    python benchmarks/operators.py write      # write docs/operators_speed.md
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import operators_ct
import operators_imaging
import operators_mri
import torch
from interleaved import Group, measure

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "operators_speed.json"
GROUPS: dict[str, Group] = operators_ct.GROUPS | operators_mri.GROUPS | operators_imaging.GROUPS
PACKAGES = ("torch", "numba", "scipy", "deepinv", "sigpy", "finufft", "scikit-image", "astra-toolbox")


# --- measuring -------------------------------------------------------------------------------------------------


def settings(rounds: int) -> dict[str, Any]:
    """Return what a measurement depends on besides the code."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {"threads": torch.get_num_threads(), "rounds": rounds, "machine": machine(), "versions": versions}


def machine() -> str:
    """Return the processor's name and its number of cores."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def run(only: list[str], rounds: int, again: bool) -> None:
    """Measure the groups that the cache does not have with these settings."""
    chosen = settings(rounds)
    # Freed at once: from then on glibc keeps memory between calls, as it does once any network has run, instead of
    # giving it back or not by what happened to be allocated before.
    torch.empty(31 << 20, dtype=torch.uint8)
    for name in only or GROUPS:
        done = load()
        if again or done.get(name, {}).get("settings") != chosen:
            found = {"settings": chosen, "load": round(os.getloadavg()[0], 1), **measure_group(name, rounds)}
            save({**load(), name: found})
            print(table(found), flush=True)


def measure_group(name: str, rounds: int) -> dict[str, Any]:
    """Return times by batch, direction and candidate, and errors and peaks of memory where they are asked for."""
    group, times, errors = GROUPS[name], {}, {}
    made = group.candidates()
    for batch in group.batches:
        runs = {
            f"{batch}/{direction}/{candidate}": run
            for candidate, make in made.items()
            for direction, run in make(batch).items()
        }
        for candidate in made if group.error and batch == 1 else ():
            if forward := runs.get(f"1/forward/{candidate}"):
                errors[candidate] = float(f"{group.error(forward()):.2g}")
        for key, pair in measure(runs, rounds).items():
            times[key] = [[float(f"{v:.4g}") for v in values] for values in pair]
    peaks = {f"{b}/{c}": peak_apart(name, b, c) for b in group.batches for c in group.memory}
    return {"times": times, "errors": errors, "peaks": peaks}


def peak_apart(group: str, batch: int, candidate: str) -> int:
    """Return the peak memory of a candidate in MB, in a process of its own."""
    command = [sys.executable, __file__, "peak", "--only", group, candidate, str(batch)]
    command += ["--threads", str(torch.get_num_threads())]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return round(float(out.split()[-1]))


def peak(group: str, candidate: str, batch: str) -> None:
    """Print by how many MB one call each way raises the resident set, everything built on the way included."""
    for package in ("scipy.sparse", "deepinv", "numba"):  # their own weight is not counted
        if find_spec(package.partition(".")[0]):
            importlib.import_module(package)
    before = resident("VmRSS")
    runs = GROUPS[group].candidates()[candidate](int(batch))
    for direction in ("forward", "adjoint"):
        runs[direction]()
    print(resident("VmHWM") - before)


def resident(field: str) -> float:
    """Return a figure of Linux's account of this process, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def load() -> dict[str, Any]:
    """Read the cache."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def save(done: dict[str, Any]) -> None:
    """Write the cache atomically, one line per candidate and direction."""
    groups = []
    for name in sorted(done):
        parts = [f'"{k}":{json.dumps(v)}' for k, v in done[name].items() if k != "times"]
        times = [
            f"  {json.dumps(k)}:{json.dumps(v, separators=(',', ':'))}" for k, v in done[name]["times"].items()
        ]
        groups.append(f'"{name}":{{' + ",\n ".join([*parts, '"times":{\n' + ",\n".join(times) + "}}"]))
    temporary = RESULTS.with_suffix(".tmp")
    temporary.write_text("{\n" + ",\n".join(groups) + "\n}\n")
    temporary.replace(RESULTS)


# --- the page --------------------------------------------------------------------------------------------------

TEXT = """\
# Speed of operators

Made by `benchmarks/operators.py`. All candidates of a table run in turn, round after round, after a round that is
not counted, so that load on the machine falls on all alike; times are medians over rounds, in milliseconds for the
whole batch. *CPU* is processor time over all threads of the process, by which ratios are taken, because wall time
depends on who else is at work; threads that wait sleep. *To deepinv* is the median over rounds of deepinv's time
over that of the row in the same round: above 1 is faster than deepinv. *To best other* is the same for the fastest
of the other packages in that direction. A dash: there is none. Single precision throughout; what operators build
once (tables, plans, factors) is not timed.
"""


def fast(pair: list[list[float]]) -> float:
    """Return the median processor time."""
    return statistics.median(pair[0])


def ratio(reference: list[list[float]] | None, pair: list[list[float]]) -> str:
    """Return how many times faster than a reference, round by round."""
    if reference is None:
        return "–"
    value = statistics.median(a / b for a, b in zip(reference[0], pair[0]))
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"


def table(found: dict[str, Any]) -> str:
    """Format what was measured of a group as Markdown."""
    errors = found["errors"]
    titles = ["batch", "direction", "candidate", *(["error"] if errors else [])]
    titles += ["CPU ms", "wall ms", "to deepinv", "to best other"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    split = {tuple(key.split("/", 2)): pair for key, pair in found["times"].items()}
    for batch, direction in dict.fromkeys(key[:2] for key in split):
        rows = {key[2]: pair for key, pair in split.items() if key[:2] == (batch, direction)}
        deepinv = next((name for name in rows if name.startswith("deepinv")), None)
        others = [name for name in rows if name != deepinv and not name.startswith("invdiff")]
        best = min(others, key=lambda name: fast(rows[name]), default=None)
        for name, pair in rows.items():
            cells = [batch, direction, f"**{name}**" if name.startswith("invdiff") else name]
            cells += [f"{errors[name]:.1e}" if name in errors else "–"] if errors else []
            cells += [f"{statistics.median(values):.3g}" for values in pair]
            cells += [ratio(rows.get(other), pair) for other in (deepinv, best)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def memory(peaks: dict[str, int]) -> str:
    """Format peaks of memory."""
    if not peaks:
        return ""
    rows = [f"| {' | '.join(key.split('/', 1))} | {value} |" for key, value in peaks.items()]
    head = (
        "One call each way raises the resident set of a new process, all that is built on the way included, by:\n"
    )
    return "\n".join(["", head, "| batch | candidate | MB |", "|---|---|---|", *rows]) + "\n"


def conditions(chosen: dict[str, Any]) -> str:
    """Say what a measurement depended on."""
    versions = ", ".join(f"{k} {v}" for k, v in chosen["versions"].items())
    return f"{chosen['machine']}; threads: {chosen['threads']}, rounds: {chosen['rounds']}; {versions}.\n"


def page(done: dict[str, Any]) -> str:
    """Return the page of the documentation."""
    known = {name: done[name] for name in GROUPS if name in done}
    common = next(iter(known.values()))["settings"] if known else None
    parts = [TEXT, *([conditions(common)] if common else [])]
    for name, found in known.items():
        group = GROUPS[name]
        own = "" if found["settings"] == common else "\n" + conditions(found["settings"])
        about = f"{group.text} Load of the machine before: {found['load']}.".strip()
        parts.append(f"## {group.title}\n\n{about}\n{own}\n{table(found)}{memory(found['peaks'])}")
    return "\n".join(parts)


def write() -> None:
    """Write the page."""
    RESULTS.with_suffix(".md").write_text(page(load()))


def main() -> None:
    """Run or write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "write", "peak"])
    parser.add_argument("--only", nargs="*", default=[], help="groups to run: " + ", ".join(GROUPS))
    parser.add_argument("--threads", type=int, default=2, help="threads to use")
    parser.add_argument("--rounds", type=int, default=7, help="rounds that count")
    parser.add_argument("--again", action="store_true", help="measure anew what the cache has")
    options = parser.parse_args()
    if "OMP_WAIT_POLICY" not in os.environ:  # a thread that spins while it waits would count as work
        os.environ["OMP_WAIT_POLICY"] = "passive"
        os.execv(sys.executable, [sys.executable, *sys.argv])
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    with torch.no_grad():
        if options.what == "peak":
            peak(*options.only)
            return
        if options.what == "run":
            if unknown := set(options.only) - set(GROUPS):
                parser.error(f"no such group: {', '.join(sorted(unknown))}")
            run(options.only, options.rounds, options.again)
    write()


if __name__ == "__main__":
    main()
