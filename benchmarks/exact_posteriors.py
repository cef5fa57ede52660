"""Grade every sampler against exact posteriors and write the tables of the documentation.

Stationary Gaussian field (32x32 and 64x64) behind a mask, subsampled Fourier rows and a blur; the 25-component
mixture of the MCGDiff paper (d = 8, 80 and 800, one to four data). Each row is one sampler at its default, at the
published setting or at its best preset. Rows are cached in a JSON file, so that the run can be interrupted and
continued.

    python benchmarks/exact_posteriors.py run      # grade what is not graded yet
    python benchmarks/exact_posteriors.py write    # write docs/samplers and the table of the README
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import fcntl
import json
import math
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch

import invdiff
from invdiff import anchors, honesty, reference, samplers

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "samplers" / "exact_posteriors.json"
FIELDS = [("mask", 32), ("fourier", 32), ("blur", 32), ("mask", 64), ("fourier", 64), ("blur", 64)]
MIXTURES = [(d, m) for d in (8, 80, 800) for m in (1, 2, 4)]
MIXTURE_SEEDS = range(10)
FIELD_DRAWS = 256
#: Draws by dimension of the mixture; at d = 800 every row, the exact draws too, has a quarter of them.
MIXTURE_DRAWS = {8: 2000, 80: 2000, 800: 500}
#: Rows too expensive for two cores beyond the first field: thousands of moves, VJPs or candidates a draw.
EXPENSIVE = {
    ("daps", "published"),
    ("eventguided", "published"),
    ("lgd", "default"),
    ("scoreald", "published"),
    ("tmpd", "published"),
}
#: Rows too expensive for two cores at all: hundreds of candidates at each of 1000 steps.
TOO_EXPENSIVE = {("scg", "published"), ("dpg", "published")}
#: Samplers that mixtures leave out: the chain keeps the mode weights of its start (see ``tds`` for mixtures).
FIELDS_ONLY = {"certified"}
#: Samplers of volumes, which have no such problem here.
VOLUMES = {"dds3d", "mbir"}
#: Presets that are the published setting under another name.
PUBLISHED = {"tmpd": "first-order"}


def settings_of(name: str) -> dict[str, str | None]:
    """The rows of a sampler: its default, the published setting and the tuned one, as far as they differ."""
    cls = samplers.REGISTRY[name]
    wanted = {"published": PUBLISHED.get(name, "published"), "tuned": "tuned"}
    rows: dict[str, str | None] = {}
    for setting, preset in wanted.items():
        if preset in cls.presets:
            rows[setting] = preset
    if all(samplers.get(name, preset=preset) != cls() for preset in rows.values()):
        rows = {"default": None, **rows}
    return rows


def default_of(name: str, settings: dict[str, str | None]) -> str:
    """The row that is what ``SAMPLER()`` gives."""
    cls = samplers.REGISTRY[name]
    return next(s for s, preset in settings.items() if samplers.get(name, preset=preset) == cls())


#: Sampler to setting to preset.
ROWS = {
    name: settings_of(name) for name, cls in samplers.REGISTRY.items() if cls.conditional and name not in VOLUMES
}
FIGURES = (
    ("mean_error", "mean error"),
    ("std_ratio", "std ratio"),
    ("std_ratio_measured", "std ratio, measured"),
    ("std_ratio_null", "std ratio, null"),
    ("coverage", "coverage"),
    ("coverage_measured", "coverage, measured"),
    ("sliced_wasserstein", "sliced W1"),
)


def main() -> None:
    """Run or write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "write"])
    parser.add_argument("--only", nargs="*", default=[], help="samplers to run")
    parser.add_argument("--threads", type=int, default=0, help="threads to use")
    parser.add_argument("--problems", nargs="*", default=[], help="problems to run, e.g. mask-32 mixture-8-1")
    parser.add_argument("--seeds", type=int, default=len(MIXTURE_SEEDS), help="mixtures per dimension")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.what == "run":
        run(options.only, options.problems, options.seeds)
    write()


def problems() -> list[str]:
    """Names of all problems, cheap ones first."""
    small = [f"{op}-{size}" for op, size in FIELDS if size == 32]
    large = [f"{op}-{size}" for op, size in FIELDS if size == 64]
    return [*small, *(f"mixture-{d}-{m}" for d, m in MIXTURES), *large]


def configuration(name: str, preset: str | None) -> samplers.Sampler:
    """Return a sampler at its defaults or at a preset."""
    return samplers.get(name, preset=preset)


def run(only: list[str], chosen: list[str], seeds: int) -> None:
    """Grade every (sampler, setting, problem, seed) that is not in the cache yet."""
    for problem in chosen or problems():
        for seed in seeds_of(problem, seeds):
            grade_once("exact/-", {}, problem, seed, lambda p, s: grade_exact(p, s))
            for name, settings in ROWS.items():
                for setting, preset in settings.items():
                    costly = (name, setting) in EXPENSIVE and problem != "mask-32"
                    unfit = name in FIELDS_ONLY and problem.startswith("mixture")
                    never = (name, setting) in TOO_EXPENSIVE
                    if costly or never or unfit or (only and name not in only):
                        continue
                    sampler = configuration(name, preset)
                    config = json.loads(json.dumps(dataclasses.asdict(sampler)))
                    grade_once(
                        f"{name}/{setting}", config, problem, seed, lambda p, i, s=sampler: grade_sampler(p, s, i)
                    )


def seeds_of(problem: str, seeds: int) -> range:
    """Seeds of a problem: several for mixtures, whose figures vary a lot, one for fields."""
    return range(seeds) if problem.startswith("mixture") else range(1)


def grade_once(row: str, config: dict, problem: str, seed: int, grade) -> None:
    """Grade one row unless the cache has it; the cache is read again, so that several runs may share it."""
    key = f"{row}/{problem}"
    entry = load().get(key, {})
    if entry.get("config") == config and str(seed) in entry["seeds"]:
        return
    start = time.time()
    figures = grade(problem, seed)
    with lock():
        done = load()
        if done.get(key, {}).get("config") != config:
            done[key] = {"config": config, "seeds": {}}
        done[key]["seeds"][str(seed)] = figures
        save(done)
    shown = {k: round(v, 3) for k, v in figures.items()}
    print(f"{key} seed {seed} {time.time() - start:.0f} s {shown}", flush=True)


def load() -> dict:
    """Read the cache."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


@contextlib.contextmanager
def lock():
    """Hold the cache, so that runs side by side lose no row of each other's."""
    with RESULTS.with_suffix(".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def averaged(entry: dict) -> dict[str, float]:
    """Average the figures over problem seeds; ``w1_margin`` is 1.96 standard errors of the sliced W1."""
    rows = [{k: math.nan if v is None else v for k, v in r.items()} for r in entry["seeds"].values()]
    out = {k: float(np.nanmean([r[k] for r in rows])) for k in rows[0] if not all(math.isnan(r[k]) for r in rows)}
    out["problems"] = len(rows)
    if len(rows) > 1:
        w1 = [r["sliced_wasserstein"] for r in rows]
        out["w1_margin"] = 1.96 * float(np.nanstd(w1, ddof=1)) / math.sqrt(len(w1))
        out["w1_median"] = float(np.nanmedian(w1))
    return out


def build(problem: str, seed: int):
    """Return (problem, prior, exact posterior, draws)."""
    kind, *numbers = problem.split("-")
    if kind == "mixture":
        made = anchors.mcgdiff_mixture(int(numbers[0]), int(numbers[1]), seed)
        return *made, reference.posterior(*made), MIXTURE_DRAWS[int(numbers[0])]
    made = anchors.gaussian_field(int(numbers[0]), kind, seed)
    return *made, reference.posterior(*made), FIELD_DRAWS


def grade_exact(name: str, seed: int) -> dict[str, float]:
    """Grade exact draws: the floor."""
    *_, exact, n = build(name, seed)
    return {**anchors.grade(exact.sample(n, 1)[0], exact), "nfe": 0.0, "failed": 0.0}


def grade_sampler(name: str, sampler: samplers.Sampler, seed: int) -> dict[str, float]:
    """Draw and grade; draws that failed are left out and counted."""
    problem, prior, exact, n = build(name, seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # failed draws are counted below
        try:
            made = invdiff.sample(problem, prior, sampler, draws=n, seed=1000 + seed, max_batch=n, progress=False)
        except invdiff.InvdiffError:
            return {k: math.nan for k, _ in FIGURES} | {"mode_tv": math.nan, "nfe": math.nan, "failed": 1.0}
    array = made.estimate if made.kind == "point" else made.draws
    draws = torch.from_numpy(np.asarray(array).reshape(n, *problem.operator.domain.shape))
    good = torch.isfinite(draws).flatten(1).all(1) & (draws.flatten(1).abs().amax(1) < 1e6)
    nfe, vjp = (float(np.asarray(made.stats[k]).ravel()[0]) for k in ("nfe", "vjp"))
    if int(good.sum()) < 2:
        return {k: math.nan for k, _ in FIGURES} | {"mode_tv": math.nan, "nfe": nfe, "vjp": vjp, "failed": 1.0}
    return {**anchors.grade(draws[good], exact), "nfe": nfe, "vjp": vjp, "failed": 1 - float(good.double().mean())}


def save(done: dict) -> None:
    """Write the cache atomically."""
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    temporary = RESULTS.with_suffix(".tmp")
    keep = {"mode_tv", "chi2_ratio", "nfe", "vjp", "failed", *(k for k, _ in FIGURES)}

    def slim(figures: dict) -> dict:
        kept = {k: v for k, v in figures.items() if k in keep}
        return {k: round(v, 4) if v is not None and math.isfinite(v) else None for k, v in kept.items()}

    rows = {
        k: {
            "config": v["config"],
            "seeds": {s: slim(f) for s, f in sorted(v["seeds"].items(), key=lambda i: int(i[0]))},
        }
        for k, v in sorted(done.items())
    }
    temporary.write_text(
        json.dumps(rows, indent=None, separators=(",", ":")).replace('"config"', '\n "config"') + "\n"
    )
    temporary.replace(RESULTS)


def write() -> None:
    """Write docs/samplers/exact_posteriors.md, one page per sampler, and the table of the README."""
    done = {k: averaged(v) for k, v in load().items()}
    folder = RESULTS.parent
    (folder / "exact_posteriors.md").write_text(overview(done))
    honesty.FILE.write_text(json.dumps(short(load()), indent=1) + "\n")
    for name in samplers.REGISTRY:
        (folder / f"{name}.md").write_text(page(name, done))
    readme = ROOT / "README.md"
    if readme.exists():
        text = readme.read_text()
        begin, end = "<!-- samplers:begin -->", "<!-- samplers:end -->"
        if begin in text:
            head, rest = text.split(begin)
            readme.write_text(head + begin + "\n\n" + summary(done) + "\n" + end + rest.split(end)[1])


def short(entries: dict) -> dict:
    """What the package carries: per sampler and setting, the configuration and the figures that choosing needs."""
    figures = ("mean_error", "std_ratio", "std_ratio_measured", "coverage", "sliced_wasserstein", "nfe", "vjp")
    out: dict = {}
    for name, settings in ROWS.items():
        for setting in settings:
            rows = {
                p: entries.get(f"{name}/{setting}/{p}") for p in (*honesty.FIELDS, "mixture-8-1", "mixture-80-1")
            }
            found = {p: averaged(e) for p, e in rows.items() if e}
            if found:
                config = next(e["config"] for e in rows.values() if e)
                kept = {p: {k: round(f[k], 3) for k in figures if k in f} for p, f in found.items()}
                out.setdefault(name, {})[setting] = {"config": config, "figures": kept}
    return out


def cell(row: dict, key: str) -> str:
    """Format one figure."""
    value = row.get(key)
    if value is None:
        return "–"
    return f"{value:.0f}" if key in ("nfe", "problems") else f"{value:.3f}" if abs(value) < 10 else f"{value:.2g}"


def table(rows: list[tuple[str, dict]], mixture: bool = False) -> str:
    """Format rows as a Markdown table."""
    extra = (
        [("problems", "problems"), ("w1_margin", "±"), ("w1_median", "median W1"), ("mode_tv", "mode TV")]
        if mixture
        else []
    )
    figures = [*FIGURES, *extra, ("failed", "failed"), ("nfe", "NFE")]
    lines = ["| sampler | " + " | ".join(title for _, title in figures) + " |", "|---" * (len(figures) + 1) + "|"]
    lines += ["| " + label + " | " + " | ".join(cell(row, k) for k, _ in figures) + " |" for label, row in rows]
    return "\n".join(lines) + "\n"


def rows_of(done: dict, problem: str, only: str | None = None) -> list[tuple[str, dict]]:
    """All graded rows of a problem, the exact draws first."""
    out = [("exact draws (floor)", done[f"exact/-/{problem}"])] if f"exact/-/{problem}" in done else []
    for name, settings in ROWS.items():
        for setting in settings:
            key = f"{name}/{setting}/{problem}"
            if key in done and only in (None, name):
                out.append((f"{name}, {setting}", done[key]))
    return out


def title_of(problem: str) -> str:
    """Name of a problem for people."""
    kind, *numbers = problem.split("-")
    if kind == "mixture":
        draws = MIXTURE_DRAWS[int(numbers[0])]
        return f"Mixture of 25 Gaussians, d = {numbers[0]}, {numbers[1]} data ({draws} draws)"
    words = {"mask": "30 % of the pixels", "fourier": "4-fold undersampled Fourier rows", "blur": "Gaussian blur"}
    return f"Gaussian field {numbers[0]}x{numbers[0]}, {words[kind]}"


EXPLANATION = """\
* **mean error**: root mean square over pixels of (mean of the draws - exact mean) / exact std. The floor is
  1/sqrt(number of draws): 0.0625 for 256 draws.
* **std ratio**: std of the draws over the exact std; also on the directions that the data measure and on the null
  space apart, because an overall ratio near 1 can hide a sampler that fits the noise.
* **coverage**: exact posterior mass inside the draws' central 90 % intervals; 0.9 is right.
* **sliced W1**: sliced Wasserstein-1 distance to as many exact draws. **mode TV**: total variation between the
  weights of the 25 modes. **±**: 1.96 standard errors of sliced W1 over problems; the problems differ a lot, so
  its median is given too, and rows of different numbers of **problems** do not compare. **failed**: share of draws
  that became NaN or larger than 1e6.
* **NFE**: network evaluations per draw. *default* is what `SAMPLER()` gives; *published* the paper's own setting;
  *tuned* the preset of that name, chosen on other draws of the field problems.
"""


def overview(done: dict) -> str:
    """The page with all tables."""
    parts = [
        "# Samplers against exact posteriors\n",
        "Made by `benchmarks/exact_posteriors.py`; priors and posteriors are known in closed form, and the "
        "samplers see nothing but the exact denoiser.\n",
        EXPLANATION,
    ]
    for problem in problems():
        if rows := rows_of(done, problem):
            parts.append(f"## {title_of(problem)}\n\n{table(rows, problem.startswith('mixture'))}")
    return "\n".join(parts)


def page(name: str, done: dict) -> str:
    """The page of one sampler: its docstrings, settings, presets and measured figures."""
    cls = samplers.REGISTRY[name]
    doc = ast.get_docstring(ast.parse(Path(sys.modules[cls.__module__].__file__).read_text())) or ""
    needs = ", ".join(sorted(cls.requires)) or "nothing but the prior"
    fields = "\n".join(f"| `{f.name}` | `{f.default!r}` |" for f in dataclasses.fields(cls))
    presets = "\n".join(
        f"| `{k}` | " + ", ".join(f"{a}={b!r}" for a, b in v.items()) + " |" for k, v in cls.presets.items()
    )
    text = (
        f"# {name}: {cls.title}\n\n{doc}\n\nReference: {cls.reference}. Kind: {cls.kind}. "
        f"Exactness: {cls.exactness}. Needs: {needs}.\n\n| setting | default |\n|---|---|\n{fields}\n"
    )
    if presets:
        text += f"\n| preset | settings |\n|---|---|\n{presets}\n"
    for problem in problems():
        rows = rows_of(done, problem, name)
        if len(rows) > 1:
            text += f"\n## {title_of(problem)}\n\n{table(rows, problem.startswith('mixture'))}"
    return text


def summary(done: dict) -> str:
    """The table of the README: each sampler at its default, on the 32x32 field behind a mask and a mixture."""
    lines = [
        "| sampler | kind | mean error | std ratio | on measured directions | 90 % coverage | mixture W1 | NFE "
        "| published: mean error | on measured directions |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    rows = []
    for name, settings in [("exact draws", {}), *ROWS.items()]:
        exact = name == "exact draws"
        key = "exact/-" if exact else f"{name}/{default_of(name, settings)}"
        row, mixture = done.get(f"{key}/mask-32"), done.get(f"{key}/mixture-80-1", {})
        published = done.get(f"{name}/published/mask-32", {})
        if row is None:
            continue
        kind = "–" if exact else samplers.REGISTRY[name].kind
        label = name if exact else f"[{name}](docs/samplers/{name}.md)"
        cells = [cell(row, k) for k in ("mean_error", "std_ratio", "std_ratio_measured", "coverage")]
        whole = mixture.get("problems") == len(MIXTURE_SEEDS)  # means over other problems do not compare
        cells += [cell(mixture if whole else {}, "sliced_wasserstein"), cell(row, "nfe")]
        cells += [cell(published, k) for k in ("mean_error", "std_ratio_measured")]
        ratio, error = row.get("std_ratio_measured"), row.get("mean_error")
        wrong = math.inf if ratio is None or error is None else max(error, abs(math.log(max(ratio, 1e-9))))
        rows.append(((not exact, kind == "point", wrong), f"| {label} | {kind} | " + " | ".join(cells) + " |"))
    return "\n".join([*lines, *(line for _, line in sorted(rows))]) + "\n"


if __name__ == "__main__":
    main()
