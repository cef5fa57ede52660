"""Grade the particle reference, ``tds`` at its preset ``certified``, on the mixtures of the MCGDiff paper.

4,000 particles on each of 20 problems with one datum, in 8 and 80 dimensions, against the exact posterior; beside
it what as many exact draws give. Problems are cached in a JSON file, so that the run can be interrupted and
continued.

    python benchmarks/certified_mixtures.py run [--threads 1]   # grade what is not graded, about a minute each
    python benchmarks/certified_mixtures.py write               # write docs/samplers/certified_mixtures.md
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch

import invdiff
from invdiff import anchors, reference, samplers

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "samplers" / "certified_mixtures.json"
DIMENSIONS, SEEDS, PARTICLES = (8, 80), range(20), 4000
FIGURES = {
    "sliced_wasserstein": "sliced W1",
    "floor_w1": "of exact draws",
    "mean_error": "mean error",
    "std_ratio": "std ratio",
    "std_ratio_measured": "measured",
    "coverage": "coverage",
    "coverage_measured": "measured",
    "mode_tv": "mode TV",
}


def main() -> None:
    """Run or write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "write"])
    parser.add_argument("--threads", type=int, default=0, help="threads to use")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.what == "run":
        run()
    write()


def run() -> None:
    """Grade every problem that is not in the cache yet."""
    done = load()
    for seed in SEEDS:
        for d in DIMENSIONS:
            key = f"{d}-1-{seed}"
            if key not in done:
                done[key] = {k: round(v, 4) for k, v in grade(d, seed).items()}
                RESULTS.write_text(json.dumps(done, indent=0) + "\n")
                print(key, done[key], flush=True)


def grade(d: int, seed: int) -> dict[str, float]:
    """Grade every second particle of one problem, and as many exact draws."""
    problem, prior = anchors.mcgdiff_mixture(d, 1, seed)
    exact = reference.posterior(problem, prior)
    sampler = samplers.get("tds", preset="certified")
    made = invdiff.sample(
        problem, prior, sampler, draws=PARTICLES, seed=1000 + seed, max_batch=PARTICLES, progress=False
    )
    draws = torch.from_numpy(np.asarray(made.draws).reshape(PARTICLES, *problem.operator.domain.shape))[::2]
    figures = anchors.grade(draws, exact)
    floor = anchors.grade(exact.sample(len(draws), 1)[0], exact)["sliced_wasserstein"]
    return {k: v for k, v in figures.items() if k in FIGURES} | {"floor_w1": floor}


def load() -> dict[str, dict[str, float]]:
    """Read the cache."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def write() -> None:
    """Write the table."""
    done = load()
    lines = [
        "# The particle reference against exact posteriors\n",
        "Made by `benchmarks/certified_mixtures.py`: `samplers.get('tds', preset='certified')` with 4,000 "
        "particles on mixtures of 25 Gaussians with one datum (the problems of the MCGDiff paper), half of them "
        "graded. *of exact draws* is the sliced W1 of as many exact draws against as many others: no sampler can "
        "be expected below it. *mode TV*: total variation between the weights of the modes, and the largest over "
        "problems.\n",
        "| d | problems | " + " | ".join(FIGURES.values()) + " | largest |",
        "|---" * (len(FIGURES) + 3) + "|",
    ]
    for d in DIMENSIONS:
        rows = [v for k, v in done.items() if k.startswith(f"{d}-")]
        if rows:
            cells = [f"{np.mean([r[k] for r in rows]):.3f}" for k in FIGURES]
            lines.append(
                f"| {d} | {len(rows)} | " + " | ".join(cells) + f" | {max(r['mode_tv'] for r in rows):.3f} |"
            )
    RESULTS.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
