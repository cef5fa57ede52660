"""Recover brain slices from 8-fold undersampled scans with every sampler that applies, and with deepinv's.

Twelve held-out slices of 192x160, two scans of each: eight coils as ``invdiff demo`` simulates them, and one coil
of unit modulus, whose operator has a singular value decomposition. Four draws per slice at 100 network evaluations
each, and the classical reconstructions. Rows are cached in a JSON file, slice by slice, so that the run can be
interrupted and continued, and a table of a few slices is a table.

    python benchmarks/brain_recovery.py run --threads 1    # measure what is not measured yet
    python benchmarks/brain_recovery.py tune --threads 1   # settings of deepinv's samplers, on other slices
    python benchmarks/brain_recovery.py write              # write docs/samplers/brain_recovery.md
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import functools
import importlib
import json
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepinv_peers
import numpy as np
import torch

import invdiff
from invdiff import baselines, metrics, mri, mri_simulation, priors, samplers
from invdiff.priors import held_out
from invdiff.scoring import FLOOR, Draws, usable

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "samplers" / "brain_recovery.json"
#: Name to coils; 8-fold Poisson disc with a 24 x 24 centre, the 99th percentile of the image 60 noise levels.
PROBLEMS = {"8 coils": 8, "1 coil": 1}
SLICES, DRAWS, BUDGET = range(12), 4, 100
#: Slices that settings are chosen on, with two draws.
TUNING = range(12, 13)
ACCELERATION, CENTRE, SNR = 8.0, 24, 60.0


# --- the problems ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One scan of one slice.

    Attributes:
        problem: The scan.
        truth: ``(y, x)`` complex.
        prior: The prior with a codec that fits.
    """

    problem: invdiff.Problem
    truth: np.ndarray
    prior: invdiff.Prior

    @functools.cached_property
    def pulled(self) -> invdiff.Problem:
        """The problem in prior coordinates."""
        return self.problem.pullback(self.prior.codec)


def image_of(index: int) -> np.ndarray:
    """Return a slice that the prior has not seen, ``(192, 160)`` complex; drawn anew beyond the stored ones."""
    if index < held_out.count():
        return held_out.held_out_slice(index)
    from invdiff.training.synthetic_brain import brain_slice

    return brain_slice(2000 + index, (192, 160), orientation="axial", held_out=True)


def simulate(
    image: np.ndarray, coils: int, seed: int, acceleration: float = ACCELERATION, centre: int = CENTRE
) -> Case:
    """Return the simulated scan of an image, as ``invdiff demo`` makes it."""
    scan, sigma = mri_simulation.simulate_scan(image, coils, acceleration, centre, SNR, seed)
    maps = mri_simulation.birdcage_maps(coils, (image.shape[0], image.shape[1]))
    problem = mri.problem_from_kspace(scan, coil_maps=maps, sigma=sigma)
    problem = dataclasses.replace(problem, x_true=torch.from_numpy(image)[None, None])
    return Case(problem, image, priors.load("brain-mri").adapt(problem))


@functools.lru_cache(maxsize=4)
def case_of(problem: str, index: int) -> Case:
    """Return a case of the table; the slice's number is the seed of mask and noise."""
    return simulate(image_of(index), PROBLEMS[problem], index)


# --- the rows --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """What a row makes of a case: draws ``(n, y, x)`` complex and evaluations per draw."""

    draws: Draws
    nfe: float = 0.0
    vjp: float = 0.0


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        label: Its name.
        group: ``ours``, ``deepinv`` or ``classical``.
        config: Everything that determines the result besides the case, JSON-able.
        make: Case and seed to draws.
        one_coil: Whether it needs the structure that only one coil of unit modulus has.
    """

    label: str
    group: str
    config: dict[str, Any]
    make: Callable[[Case, int], Found]
    one_coil: bool = False

    def applies(self, coils: int) -> bool:
        """Return whether it can run on scans of so many coils."""
        return coils == 1 or not self.one_coil


#: What brings samplers to the budget where it is not the number of steps alone.
AT_BUDGET: dict[str, dict[str, Any]] = {
    "dps": {"steps": 107},  # 100 of these levels are within the prior's range
    "reddiff": {"steps": 107},
    "pnpdm": {"steps": 7},  # sweeps of 12 evaluations, and 12 for the start
    "sitcom": {"steps": 10, "iterations": 9},
    "scoreald": {"steps": 11},  # 9 evaluations per level
    "lanpaint": {"steps": 9},  # 11 evaluations per level
    "deqir": {"steps": 10},  # as many iterations as levels
    "ddnm": {"steps": 17},  # 6 evaluations per level
    "ensemblescore": {"steps": 60, "prior_steps": 40},
    "scg": {"steps": 31, "candidates": 4},
    "enkg": {"steps": 16, "members": DRAWS},  # 6 evaluations per level
    "certified": {"steps": 20, "sweeps": 4, "moves": 8},
    "tmpd": {"cg_iterations": 4},
    "tds": {"twist": "pigdm"},
}
#: Most important first; the rest of the registry follows.
FIRST = ("dds", "diffpir", "daps", "pigdm", "dps", "reddiff")
#: Sampler to why it has no row.
LEFT_OUT = {
    "dds3d": "reconstructs volumes",
    "mbir": "reconstructs volumes",
    "eventguided": "with data it is the update of tmpd, with up to 60 network VJPs per step",
}
#: What only one coil of unit modulus gives; lanpaint wants `A^H A` to be a projection.
CLOSED_FORMS, PROJECTION = frozenset({"svd", "prox", "pinv", "conditional"}), {"lanpaint"}


def sampler_row(name: str, draws: int = DRAWS, label: str = "", **settings: Any) -> Row:
    """Return the row of one of our samplers."""
    sampler = samplers.get(name, **settings)

    def make(case: Case, seed: int) -> Found:
        made = invdiff.sample(
            case.problem, case.prior, sampler, draws=draws, seed=seed, max_batch=draws, progress=False
        )
        found = usable(made, 0)
        nfe, vjp = (float(np.asarray(made.stats[k]).ravel()[0]) for k in ("nfe", "vjp"))
        return Found(dataclasses.replace(found, x=found.x[:, 0]), nfe, vjp)

    config = {**dataclasses.asdict(sampler), "sampler": name, "draws": draws}
    return Row(label or name, "ours", config, make, bool(sampler.requires & CLOSED_FORMS) or name in PROJECTION)


def rows(problem: str) -> list[Row]:
    """Return all rows of a problem, most important first."""
    conditional = [n for n, c in samplers.REGISTRY.items() if c.conditional and n not in LEFT_OUT]
    names = [*FIRST, *(n for n in conditional if n not in FIRST)]
    ours = {n: sampler_row(n, **{"steps": BUDGET, **AT_BUDGET.get(n, {})}) for n in names}
    few = [
        sampler_row("dds", label="dds, 40 steps (default)"),
        sampler_row("dds", draws=10, label="dds, 40 steps, 10 draws"),
        sampler_row("dps", label="dps, preset 100-steps", **{**samplers.DPS.presets["100-steps"], "steps": 107}),
    ]
    classical = [Row(n, "classical", {"best of": list(lam)}, make) for n, lam, make in CLASSICAL]
    first, rest = [ours.pop(n) for n in FIRST], list(ours.values())
    default = [peer_row(name, {}, "default") for name in PEERS]
    return [*first, *few, *peer_rows(problem), *classical, *rest, *default]


def classical(lams: tuple[float, ...], make: Callable[[np.ndarray, np.ndarray, float], np.ndarray]) -> Any:
    """Return the maker of a classical reconstruction at the weight with the smallest true error."""

    def best(case: Case, seed: int) -> Found:
        kspace, maps = case.problem.y[0].numpy(), mri.coil_maps_of(case.problem)[0].numpy()
        images = [make(kspace, maps, lam) for lam in lams]
        image = min(images, key=lambda x: metrics.nrmse(x, case.truth))
        return Found(Draws(image[None], np.ones(1), point=True))

    return best


_SENSE, _WAVELET = (1e-3, 1e-2, 3e-2, 0.1), (3e-3, 1e-2, 2e-2)
CLASSICAL = (
    ("zero-filled", (0.0,), classical((0.0,), lambda k, m, lam: baselines.zero_filled(k, m))),
    ("SENSE", _SENSE, classical(_SENSE, baselines.cg_sense)),
    ("l1-wavelet", _WAVELET, classical(_WAVELET, lambda k, m, lam: baselines.l1_wavelet(k, m, lam, 50))),
)


# --- deepinv ---------------------------------------------------------------------------------------------------

#: The best of `GRIDS` by problem; every sampler also has a row at its own default.
PEERS: dict[str, dict[str, dict[str, Any]]] = {
    "DPS": {
        "8 coils": {"weight": 3.0, "guidance": "annealed"},
        "1 coil": {"weight": 3.0, "guidance": "annealed"},
    },
    "DiffPIR": {"8 coils": {"lambda_": 4.0, "zeta": 1.0}, "1 coil": {"lambda_": 2.0, "zeta": 1.0}},
    "DDRM": {"1 coil": {"eta": 1.0, "etab": 1.0}},
}
GRIDS: dict[str, list[dict[str, Any]]] = {
    "DPS": [
        *({"weight": w} for w in (1.0, 10.0, 100.0, 1000.0, 3000.0, 10000.0)),
        *({"weight": w, "guidance": "annealed"} for w in (1.0, 3.0, 5.0)),
    ],
    "DiffPIR": [{"lambda_": lam, "zeta": z} for lam in (2.0, 4.0, 7.0, 25.0) for z in (0.1, 0.4, 1.0)],
    "DDRM": [{"eta": e, "etab": b} for e in (0.85, 1.0) for b in (0.5, 1.0)],
}


def peer_row(
    name: str, settings: dict[str, Any], label: str = "", draws: int = DRAWS, evaluations: int = BUDGET
) -> Row:
    """Return the row of a sampler of deepinv."""
    label = label or ", ".join(f"{k} {v}" for k, v in settings.items())

    def make(case: Case, seed: int) -> Found:
        return Found(*deepinv_peers.draw(name, settings, case.problem, case.prior, seed, draws, evaluations))

    return Row(
        f"deepinv {name}, {label}",
        "deepinv",
        {**settings, "draws": draws, "evaluations": evaluations},
        make,
        one_coil=name == "DDRM",
    )


def peer_rows(problem: str) -> list[Row]:
    """Return the rows of deepinv's samplers at the best setting for a problem."""
    return [peer_row(name, best[problem], "tuned") for name, best in PEERS.items() if problem in best]


def tuning_rows() -> list[Row]:
    """Return the grid that deepinv's settings are chosen from; two draws."""
    return [peer_row(name, settings, draws=2) for name, grid in GRIDS.items() for settings in grid]


# --- figures ---------------------------------------------------------------------------------------------------

#: The row that the others are compared with slice by slice.
YARDSTICK = "dds"
FIGURES = (
    ("nfe", "evaluations", ".0f"),
    ("vjp", "VJPs", ".0f"),
    ("psnr", "PSNR (dB)", ".2f"),
    ("ahead", "to dds", "+.2f"),
    ("psnr_draw", "one draw", ".2f"),
    ("ssim", "SSIM", ".3f"),
    ("nrmse", "NRMSE", ".3f"),
    ("coverage", "coverage", ".3f"),
    ("crps", "CRPS", ".4f"),
    ("seconds", "seconds", ".0f"),
)


def figures(found: Found, truth: np.ndarray) -> dict[str, float]:
    """Score draws ``(n, y, x)`` against the truth, on magnitudes; NaN where a figure does not exist."""
    draws, nan = found.draws, math.nan
    if not len(draws.x):
        scores = ("psnr", "psnr_draw", "ssim", "nrmse", "coverage", "crps", "level")
        return dict.fromkeys(scores, nan) | {"nfe": found.nfe, "vjp": found.vjp}
    size = np.abs(truth)
    peak, region = float(size.max()), size >= FLOOR * size.max()
    mean = np.tensordot(draws.weights, draws.x, axes=1)
    out = {
        "nfe": found.nfe,
        "vjp": found.vjp,
        "psnr": metrics.psnr(mean, truth, peak),
        "psnr_draw": float(np.mean([metrics.psnr(x, truth, peak) for x in draws.x])),
        "ssim": metrics.ssim(mean, truth, peak),
        "nrmse": metrics.nrmse(mean, truth),
    }
    if draws.point:
        return {**out, "psnr_draw": nan, "coverage": nan, "crps": nan, "level": nan}
    if not draws.spread:
        return {**out, "coverage": nan, "crps": nan, "level": nan}
    values, target = np.abs(draws.x)[:, region], size[region]
    low, high = draws.interval(values)
    return {
        **out,
        "coverage": float(((target >= low) & (target <= high)).mean()),
        "crps": float(metrics.crps(values, target, draws.weights).mean()),
        "level": draws.level,
    }


def measure(row: Row, case: Case, seed: int) -> dict[str, float]:
    """Run a row on a case and score it; ``seconds`` are those of the processor, over all threads."""
    start = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # draws that failed are left out
        found = row.make(case, seed)
    return {**figures(found, case.truth), "seconds": time.process_time() - start}


# --- the cache -------------------------------------------------------------------------------------------------


def load() -> dict:
    """Read the cache."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


@contextlib.contextmanager
def lock():
    """Hold the cache, so that runs side by side lose no row of each other's."""
    with RESULTS.with_suffix(".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def save(done: dict) -> None:
    """Write the cache atomically."""

    def slim(found: dict) -> dict:
        return {k: round(v, 5) if v is not None and math.isfinite(v) else None for k, v in found.items()}

    lines = []
    for key, entry in sorted(done.items()):
        slices = {s: slim(entry["slices"][s]) for s in sorted(entry["slices"], key=int)}
        lines.append(json.dumps(key) + ":" + json.dumps({**entry, "slices": slices}, separators=(",", ":")))
    temporary = RESULTS.with_suffix(".tmp")
    temporary.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    temporary.replace(RESULTS)


def measure_once(row: Row, problem: str, index: int) -> None:
    """Measure one row on one slice unless the cache has it or the row does not apply."""
    key, config = f"{problem}/{row.label}", json.loads(json.dumps(row.config))
    entry = load().get(key, {})
    if entry.get("config") == config and str(index) in entry["slices"]:
        return
    if not row.applies(PROBLEMS[problem]):
        return
    case = case_of(problem, index)
    if row.group == "deepinv":
        importlib.import_module("deepinv")  # its import is not the row's time
    found = measure(row, case, 1000 + index)
    with lock():
        done = load()
        if done.get(key, {}).get("config") != config:
            done[key] = {"group": row.group, "config": config, "slices": {}}
        done[key]["slices"][str(index)] = found
        save(done)
    shown = {k: round(v, 3) for k, v in found.items()}
    print(f"{key} slice {index} {shown}", flush=True)


def run(chosen: Callable[[str], list[Row]], only: list[str], problems: list[str], slices: list[int]) -> None:
    """Measure all rows of one slice before the next, so that an interrupted run leaves a table."""
    for problem in problems or PROBLEMS:
        for index in slices:
            for row in chosen(problem):
                if not only or any(row.label.startswith(name) for name in only):
                    measure_once(row, problem, index)


# --- the page --------------------------------------------------------------------------------------------------

TEXT = """\
# Recovering brain slices

Made by `benchmarks/brain_recovery.py`: twelve synthetic head slices (192 x 160) that the prior `brain-mri`
has not seen, 8-fold undersampled on a variable-density Poisson disc with a 24 x 24 centre, 60 noise levels to the
99th percentile of the image. Our samplers (bold) run at their default settings but for the number of steps: each
draw gets 100 network evaluations. deepinv {version} gets the same prior, operator, noise level and number of
evaluations, at its default settings and at the best of a grid, chosen on a slice outside the table.

* **PSNR** (peak: largest magnitude of the truth), **SSIM**, **NRMSE**: magnitude of the mean of four draws against
  the truth, all pixels; *to dds*: difference to the row dds on the slices of both, by which rows are sorted; *one
  draw*: PSNR of a single draw. **±**: 1.96 standard errors over slices.
* **coverage**: share of pixels above 5 % of the peak whose true magnitude lies between the extremes of the four
  draws; right is 0.600 (0.818 for ten draws). **CRPS**: fair score on the same pixels; small is good.
* **evaluations**, **VJPs**: of the network, forward and reverse, per draw; a reverse pass costs about one more.
* **seconds**: processor time of all draws of a slice, one thread of one core.
* A dash: point estimates have no spread, and weights of an ensemble that concentrate on one draw leave none.
"""
TITLES = {
    "8 coils": "Eight coils, as `invdiff demo` simulates them",
    "1 coil": "One coil of unit modulus, for samplers that need a singular value decomposition",
}


def averaged(entry: dict, slices: range) -> dict[str, tuple[float, float]]:
    """Return mean and 1.96 standard errors of every figure over the slices that have it."""
    out = {}
    found = [f for s, f in entry["slices"].items() if int(s) in slices]
    for key in found[0] if found else ():
        values = [f[key] for f in found if f[key] is not None]
        if values:
            spread = np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
            out[key] = (float(np.mean(values)), 1.96 * float(spread))
    return out


#: Label, entry of the cache, averages.
Measured = tuple[str, dict, dict[str, tuple[float, float]]]


def ahead(entry: dict, other: dict, slices: range) -> tuple[float, float]:
    """Return by how many decibels an entry is above another, and 1.96 standard errors, over the slices of both."""
    pairs = [
        (found["psnr"], other["slices"][s]["psnr"])
        for s, found in entry["slices"].items()
        if int(s) in slices and s in other["slices"]
    ]
    gaps = [a - b for a, b in pairs if a is not None and b is not None]
    spread = np.std(gaps, ddof=1) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.nan
    return (float(np.mean(gaps)), 1.96 * float(spread)) if gaps else (math.nan, math.nan)


def of_problem(done: dict, problem: str, slices: range) -> list[Measured]:
    """Return what was measured on a problem, best first: by the mean gap to `YARDSTICK` on common slices."""
    entries = {k.split("/", 1)[1]: e for k, e in done.items() if k.startswith(problem + "/")}
    found = []
    for label, entry in entries.items():
        if average := averaged(entry, slices):
            gap = ahead(entry, entries.get(YARDSTICK, entry), slices)
            found.append((label, entry, {**average, "ahead": gap}))
    return sorted(found, key=lambda row: -math.inf if math.isnan(g := row[2]["ahead"][0]) else g, reverse=True)


def cell(average: dict[str, tuple[float, float]], key: str, spec: str) -> str:
    """Format one figure."""
    if key not in average:
        return "–"
    value, spread = average[key]
    plain = key in ("nfe", "vjp", "seconds") or math.isnan(spread)
    return format(value, spec) + ("" if plain else f" ± {spread:{spec.lstrip('+')}}")


def table(found: list[Measured]) -> str:
    """Format the rows of a problem as a Markdown table."""
    lines = ["| method | " + " | ".join(title for _, title, _ in FIGURES) + " | slices |"]
    lines += ["|---" * (len(FIGURES) + 2) + "|"]
    for label, entry, average in found:
        name = f"**{label}**" if entry["group"] == "ours" else label
        count = sum(int(s) in SLICES for s in entry["slices"])
        lines.append(
            f"| {name} | " + " | ".join(cell(average, k, spec) for k, _, spec in FIGURES) + f" | {count} |"
        )
    return "\n".join(lines) + "\n"


def lead(found: list[Measured]) -> str:
    """One sentence: by how much the best of ours at equal evaluations is ahead of deepinv's, slice by slice."""
    ours = [row for row in found if row[1]["group"] == "ours"]
    if not ours:
        return ""
    most = max(len(entry["slices"]) for _, entry, _ in ours)
    label, best, _ = next(row for row in ours if len(row[1]["slices"]) == most)
    parts = []
    for name in PEERS:
        if peers := [row for row in found if row[0].startswith(f"deepinv {name},")]:
            gap, spread = ahead(best, peers[0][1], SLICES)
            around = "" if math.isnan(spread) else f" ± {spread:.2f}"
            parts.append(f"{gap:.2f}{around} dB above deepinv's {name}")
    return f"The best of ours, {label}, is " + " and ".join(parts) + " at its best setting.\n\n" if parts else ""


def tuning_table(done: dict) -> str:
    """The grid of deepinv's settings."""
    lines = ["| setting | " + " | ".join(PROBLEMS) + " |", "|---" * (len(PROBLEMS) + 1) + "|"]
    for row in tuning_rows():
        entries = [done.get(f"{p}/{row.label}") for p in PROBLEMS]
        cells = [cell({} if e is None else averaged(e, TUNING), "psnr", ".2f").split(" ±")[0] for e in entries]
        lines.append(f"| {row.label} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def page(done: dict) -> str:
    """The page of the documentation."""
    from importlib.metadata import version

    parts = [TEXT.format(version=version("deepinv"))]
    for problem in PROBLEMS:
        if found := of_problem(done, problem, SLICES):
            parts.append(f"## {TITLES[problem]}\n\n{lead(found)}{table(found)}")
    settings = "\n".join(
        f"* {n}: " + ", ".join(f"`{k}={v!r}`" for k, v in s.items()) for n, s in AT_BUDGET.items()
    )
    left = "\n".join(f"* {n}: {why}." for n, why in LEFT_OUT.items())
    parts.append(
        "## Settings\n\n`steps=100`, and where that is not what costs 100 evaluations:\n\n"
        f"{settings}\n\nWithout a row:\n\n{left}\n"
    )
    for problem, coils in PROBLEMS.items():
        if lacking := [r.label for r in rows(problem) if r.applies(coils) and f"{problem}/{r.label}" not in done]:
            parts.append(f"Not measured yet, {problem}: {'; '.join(lacking)}.\n")
    reach = deepinv_peers.REACH
    parts.append(
        f"deepinv works on images in [0, 1]; the prior's coordinates from -{reach} to {reach} are mapped there, "
        "which clips no pixel of the truth. PSNR of the mean of two draws on the slice outside the tables:\n\n"
        + tuning_table(done)
    )
    return "\n".join(parts)


def write() -> None:
    """Write the page."""
    RESULTS.with_suffix(".md").write_text(page(load()))


def main() -> None:
    """Run, tune or write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "tune", "write"])
    parser.add_argument("--only", nargs="*", default=[], help="rows to run, by the beginning of their names")
    parser.add_argument("--problems", nargs="*", default=[], help="problems to run: " + ", ".join(PROBLEMS))
    parser.add_argument("--slices", nargs="*", type=int, default=[], help="slices to run")
    parser.add_argument("--threads", type=int, default=0, help="threads to use")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.what == "run":
        run(rows, options.only, options.problems, options.slices or list(SLICES))
    if options.what == "tune":
        run(lambda problem: tuning_rows(), options.only, options.problems, options.slices or list(TUNING))
    write()


if __name__ == "__main__":
    main()
