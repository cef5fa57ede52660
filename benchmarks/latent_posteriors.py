"""Grade samplers on latent priors against known posteriors and write their table.

The decoder is linear without any sampler being told (orthogonal or skewed columns, behind a mask or a blur), so
that the posterior of the latents is a Gaussian in closed form; or it bends two latents, whose posterior is summed
on a grid. Rows are cached in a JSON file, so that the run can be interrupted and continued.

    python benchmarks/latent_posteriors.py run      # grade what is not graded yet (minutes on one core)
    python benchmarks/latent_posteriors.py write    # write docs/samplers/latent_posteriors.md
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import time
import warnings
from pathlib import Path

import numpy as np
import torch

import invdiff
from invdiff import anchors_latent, samplers

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "samplers" / "latent_posteriors.json"
DRAWS = 128
PROBLEMS = {
    "orthogonal-mask": "Orthogonal decoder, 30 % of the pixels",
    "orthogonal-blur": "Orthogonal decoder, Gaussian blur",
    "skewed-mask": "Skewed decoder, 30 % of the pixels",
    "skewed-blur": "Skewed decoder, Gaussian blur",
    "bent": "Bent decoder, two latents, one datum",
}
#: Sampler, name of the setting, and what differs from the default.
ROWS = [
    ("flowdps", "default", {}),
    ("flowdps", "flow-clock", {"preset": "flow-clock"}),
    ("flowdps", "published", {"preset": "published"}),
    ("resample", "default", {}),
    ("resample", "published", {"preset": "published"}),
    ("psld", "default", {}),
    ("psld", "published", {"preset": "published"}),
    ("flowchef", "default", {}),
    ("flowchef", "published", {"preset": "published"}),
    ("dps", "default", {}),
    ("dps", "tuned", {"preset": "tuned"}),
    ("daps", "default", {}),
    ("daps", "latent-super-resolution", {"preset": "latent-super-resolution"}),
    ("eventguided", "default", {}),
    ("pnpdm", "default", {}),
    ("pnpdm", "rho_min=0.03", {"rho_min": 0.03}),
    ("sitcom", "default", {}),
    ("reddiff", "default", {}),
    ("reddiff", "tuned", {"preset": "tuned"}),
]
FIGURES = (
    ("mean_error", "mean error"),
    ("std_ratio", "std ratio"),
    ("std_ratio_measured", "measured"),
    ("std_ratio_null", "null"),
    ("coverage", "coverage"),
    ("chi2_ratio", "residual"),
    ("sliced_wasserstein", "sliced W1"),
    ("failed", "failed"),
    ("nfe", "NFE"),
    ("vjp", "VJP"),
    ("noe", "operator"),
)
EXPLANATION = """\
# Latent samplers against known posteriors

Made by `benchmarks/latent_posteriors.py`. The decoder is linear (128 latents, 256 pixels), but samplers meet it as
they meet any autoencoder, through its derivatives; so the posterior of the latents is known in closed form. Draws
are encoded again from the images that were stored. Singular values of a *skewed* decoder differ by a factor of 4.
The *bent* decoder is `(z1, z2 + 0.6 (z1^2 - 1), tanh(z1 + z2))`; its posterior is a banana, summed on a grid.

* **mean error**: root mean square over latents of (mean of the draws - exact mean) / exact std; 0.088 is the floor
  for these 128 draws. **std ratio**: std of the draws over the exact std, also on **measured** and **null**
  directions. **coverage** of central 90 % intervals. **residual**: squared residual over that of exact draws;
  below 1 the draws fit the noise.
* **NFE**, **VJP**, **operator**: per draw, evaluations of the network, reverse passes through it, and applications
  or derivatives of the operator, decoder inside (a derivative counts as two).
* *published* weights are constants found for 16 thousand latents and more; what they do on 128, or on 2, is no
  judgement of the papers, only of taking numbers along.
"""


def main() -> None:
    """Run or write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "write"])
    parser.add_argument("--only", nargs="*", default=[], help="samplers to run")
    options = parser.parse_args()
    if options.what == "run":
        torch.set_num_threads(1)
        run(options.only)
    write()


def run(only: list[str]) -> None:
    """Grade every row that the cache does not hold yet."""
    for problem in PROBLEMS:
        grade_once("exact draws", {}, problem, functools.partial(grade_exact, problem))
        for name, setting, changes in ROWS:
            if only and name not in only:
                continue
            sampler = samplers.get(name, **changes)
            config = json.loads(json.dumps(dataclasses.asdict(sampler)))
            grade_once(f"{name}, {setting}", config, problem, functools.partial(grade_sampler, problem, sampler))


def grade_once(row: str, config: dict, problem: str, grade) -> None:
    """Grade one row unless the cache has it with this configuration."""
    done, key = load(), f"{row}/{problem}"
    if done.get(key, {}).get("config") == config:
        return
    start = time.time()
    figures = {k: round(v, 4) if math.isfinite(v) else None for k, v in grade().items()}
    done = load()
    done[key] = {"config": config, "figures": {k: figures.get(k) for k, _ in FIGURES}}
    save(done)
    print(f"{key} {time.time() - start:.0f} s {done[key]['figures']}", flush=True)


@functools.cache
def build(name: str):
    """Return (problem, prior, known posterior, function that grades images)."""
    if name == "bent":
        problem, prior = anchors_latent.bent_decoder()
        exact = anchors_latent.grid_posterior(problem, prior)
        return problem, prior, exact, lambda x: exact.grade(prior.codec.encode(x))
    problem, prior = anchors_latent.linear_decoder(*name.split("-"))
    exact = anchors_latent.latent_posterior(problem, prior)
    return problem, prior, exact, lambda x: anchors_latent.grade(x, prior, exact)


def grade_exact(name: str) -> dict[str, float]:
    """Grade exact draws: the floor."""
    _, prior, exact, grade = build(name)
    z = exact.sample(DRAWS, 1)
    return {**grade(prior.codec.decode(z if z.ndim == 2 else z[0])), "nfe": 0, "vjp": 0, "noe": 0, "failed": 0}


def grade_sampler(name: str, sampler: samplers.Sampler) -> dict[str, float]:
    """Draw and grade; draws that failed are left out and counted."""
    problem, prior, _, grade = build(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # failed draws are counted below
        try:
            made = invdiff.sample(problem, prior, sampler, draws=DRAWS, seed=0, max_batch=DRAWS, progress=False)
        except invdiff.InvdiffError:
            return {"failed": 1.0}
    array = made.estimate if made.kind == "point" else made.draws
    draws = torch.from_numpy(np.asarray(array).reshape(DRAWS, *problem.operator.domain.shape))
    good = torch.isfinite(draws).flatten(1).all(1) & (draws.flatten(1).abs().amax(1) < 1e6)
    counts = {k: float(np.asarray(made.stats[k]).ravel()[0]) for k in ("nfe", "vjp", "noe")}
    figures = grade(draws[good]) if int(good.sum()) > 1 else {}
    return {**figures, **counts, "failed": 1 - float(good.double().mean())}


def load() -> dict:
    """Read the cache."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def save(done: dict) -> None:
    """Write the cache atomically."""
    temporary = RESULTS.with_suffix(".tmp")
    text = json.dumps(dict(sorted(done.items())), separators=(",", ":"))
    temporary.write_text(text.replace('"config"', '\n "config"') + "\n")
    temporary.replace(RESULTS)


def write() -> None:
    """Write the page."""
    done = load()
    parts = [EXPLANATION]
    for problem, title in PROBLEMS.items():
        rows = [
            (row, done[f"{row}/{problem}"]["figures"])
            for row in ("exact draws", *(f"{n}, {s}" for n, s, _ in ROWS))
            if f"{row}/{problem}" in done
        ]
        shown = [(k, t) for k, t in FIGURES if any(f.get(k) is not None for _, f in rows)]
        lines = ["| sampler | " + " | ".join(t for _, t in shown) + " |", "|---" * (len(shown) + 1) + "|"]
        lines += [f"| {row} | " + " | ".join(cell(k, f.get(k)) for k, _ in shown) + " |" for row, f in rows]
        parts.append(f"## {title}\n\n" + "\n".join(lines) + "\n")
    RESULTS.with_suffix(".md").write_text("\n".join(parts))


def cell(key: str, value: float | None) -> str:
    """Format one figure."""
    if value is None:
        return "–"
    return (
        f"{value:.0f}" if key in ("nfe", "vjp", "noe") else f"{value:.3f}" if abs(value) < 10 else f"{value:.2g}"
    )


if __name__ == "__main__":
    main()
