"""M87 from closure quantities under "black-hole": size, width and brightest side of its ring, with 90 % intervals.

Beside the observation, rings of 30 and 50 micro-arcseconds are observed on the same baselines with the same noise
and with errors of stations, and measured in the same way: an answer that is the prior's would not follow them.

    python benchmarks/m87.py FILE.uvfits [--draws 64] [--only M87 ring-30 ring-50] [--picture m87.png]
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import invdiff
from invdiff import priors, samplers
from invdiff.interferometry import Visibilities
from invdiff.io.uvfits import read_uvfits
from invdiff.problems import black_hole
from invdiff.problems.rings import Rings, measure_rings

PIXEL = 2.0
TABLE = Path(__file__).resolve().parents[1] / "docs" / "black_hole.json"


def sources(observed: Visibilities) -> dict[str, Visibilities]:
    """The observation, and rings of known size seen by the same telescopes."""
    rings = {f"ring-{d}": black_hole.observe(black_hole.crescent(d), observed, seed=d) for d in (30, 50)}
    return {"M87": observed, **rings}


def main() -> None:
    """Draw, measure, and keep figures and pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--prior", default="black-hole")
    parser.add_argument("--draws", type=int, default=64)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--moves", type=int, default=150)
    parser.add_argument("--only", nargs="*", default=["M87", "ring-30", "ring-50"])
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    prior = priors.load(options.prior).with_scale(1.0)
    rows = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    draws: dict[str, np.ndarray] = {}
    for name, seen in sources(read_uvfits(options.file)).items():
        if name not in options.only:
            continue
        kept = black_hole.prepare(seen)
        problem = black_hole.closure_problem(kept)
        sampler = samplers.DAPS(steps=options.steps, inner="hmc", moves=options.moves, momentum=0.95)
        start = time.process_time()
        posterior = invdiff.sample(problem, prior, sampler, draws=options.draws, seed=0, max_batch=16)
        x = np.asarray(posterior.draws).reshape(-1, *problem.operator.domain.shape[-2:])
        rows[name] = {
            **summary(measure_rings(x.clip(0), PIXEL)),
            **{f"chi2 {k}": round(v, 3) for k, v in black_hole.chi_squared(problem, kept.closures(), x).items()},
            "closures": repr(kept.closures()),
            "draws": len(x),
            "seconds": round(time.process_time() - start),
        }
        draws[name] = x
        print(name, rows[name], flush=True)
        TABLE.write_text(json.dumps(rows, indent=1) + "\n")
    if options.picture:
        picture(draws, rows, options.picture)


def summary(rings: Rings) -> dict[str, Any]:
    """Mean and central 90 % interval of each quantity; angles about their circular mean."""
    found: dict[str, Any] = {}
    for name in ("diameter", "width", "position_angle", "asymmetry", "roundness"):
        values = getattr(rings, name)
        middle = np.rad2deg(np.angle(np.exp(1j * np.deg2rad(values)).mean())) if name == "position_angle" else 0.0
        if name == "position_angle":
            values = (values - middle + 180) % 360 - 180
        low, high = np.quantile(values, [0.05, 0.95])
        found[name] = [round(float(middle + v), 3) for v in (values.mean(), low, high)]
    return found


def picture(draws: dict[str, np.ndarray], rows: dict[str, Any], path: Path) -> None:
    """Mean, standard deviation and six draws of each source, moved to their centres."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(len(draws), 8, figsize=(16, 2.3 * len(draws)), layout="constrained", squeeze=False)
    half = PIXEL * 32
    for line, (name, x) in zip(axes, draws.items()):
        x = centred(x)
        x = x / x.sum((1, 2), keepdims=True)
        panels = [("mean", x.mean(0)), ("standard deviation", x.std(0)), *((f"draw {i}", x[i]) for i in range(6))]
        for ax, (title, image) in zip(line, panels):
            ax.imshow(image, cmap="afmhot", vmin=0, extent=(half, -half, -half, half))
            ax.set_title(title, fontsize=9)
            ax.tick_params(labelsize=6)
        low, high = rows[name]["diameter"][1:]
        line[0].set_ylabel(f"{name}\n{low:.1f} to {high:.1f} uas", fontsize=9)
    figure.supxlabel("east of the centre, micro-arcseconds (north is up)", fontsize=9)
    figure.savefig(path, dpi=110)


def centred(x: np.ndarray) -> np.ndarray:
    """Move the centre of every ring to the middle."""
    from scipy import ndimage

    middle = (np.array(x.shape[1:]) - 1) / 2
    places = measure_rings(x.clip(0)).centre
    return np.stack([ndimage.shift(image, middle - place, order=1) for image, place in zip(x, places)])


if __name__ == "__main__":
    main()
