"""A tooth from every sixth view of a synchrotron scan: FBP, total variation, and draws under "ct-phantom".

The scan is Data Exchange HDF5 with ``exchange/{data,data_dark,data_white,theta}``; flat-field, logarithm and axis
are `invdiff.ct`'s. FBP and total variation are at the setting that is best against the reference itself, which no
user has; the draws have no setting chosen on it. Reported are the PSNR to the reference (FBP of all views), inside
the field of view, and the relative error on the views that were withheld.

    python benchmarks/tooth_recovery.py tooth.h5 [--prior FILE] [--draws 8] [--picture tooth.png]
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import invdiff
from invdiff import ct, likelihoods, operators, priors, samplers
from invdiff.variational import total_variation

SIZE, EVERY = 560, 6
FILTERS = ("ram-lak", "shepp-logan", "cosine", "hamming", "hann")
WEIGHTS = (300.0, 1000.0, 2000.0, 3000.0, 5000.0)
TABLE = Path(__file__).resolve().parents[1] / "docs" / "operators_ct_tooth.json"


class Scan:
    """The scan, all views and a sixth of them."""

    def __init__(self, path: Path) -> None:
        scan = ct.read_scan(path)
        lines = ct.line_integrals(scan, air=20)[:, 0]
        self.angles, self.centre = scan.angles, ct.find_centre(lines, scan.angles)
        self.y = torch.from_numpy(lines)[None, None].float()
        # neighbouring detectors see almost the same: their differences are noise
        steps = self.y.diff(dim=-1, n=2).abs().median()
        self.sigma = float(steps) / 0.6745 / math.sqrt(6)
        self.reference = self.operator(1).fbp(self.y, "hann")
        self.inside = torch.from_numpy(np.hypot(*(np.mgrid[:SIZE, :SIZE] - (SIZE - 1) / 2)) < SIZE / 2 - 4)
        self.withheld = torch.ones(len(self.angles), dtype=torch.bool)
        self.withheld[::EVERY] = False

    def operator(self, every: int) -> operators.ParallelBeamCT:
        """The scan of every so many views."""
        return operators.ParallelBeamCT(
            (1, SIZE, SIZE), self.angles[::every], detectors=self.y.shape[-1], centre=self.centre
        )

    def problem(self) -> invdiff.Problem:
        """A sixth of the views."""
        return invdiff.Problem(
            self.operator(EVERY), likelihoods.Gaussian(self.sigma), self.y[:, :, ::EVERY].contiguous()
        )

    def score(self, x: Tensor) -> dict[str, float]:
        """PSNR to the reference and error on the withheld views."""
        a, b = x[0, 0][self.inside], self.reference[0, 0][self.inside]
        rest = (self.operator(1)(x) - self.y)[:, :, self.withheld]
        peak = float(b.quantile(0.999))
        return {
            "psnr": 20 * math.log10(peak / float((a - b).square().mean().sqrt())),
            "withheld": float(rest.norm() / self.y[:, :, self.withheld].norm()),
        }


def main() -> None:
    """Print one table, and keep figures and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scan", type=Path)
    parser.add_argument("--prior", default="ct-phantom")
    parser.add_argument("--draws", type=int, default=8)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--sampler", default="dds")
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    scan = Scan(options.scan)
    problem = scan.problem()
    print(f"axis {scan.centre:.2f}, noise {scan.sigma:.4f}, {problem.y.shape[2]} of {len(scan.angles)} views")
    made: dict[str, Tensor] = {}
    rows: dict[str, dict[str, float]] = {}

    def keep(label: str, x: Tensor, seconds: float) -> None:
        rows[label] = {**scan.score(x), "seconds": seconds}
        made[label] = x
        print(label, {k: round(v, 4) for k, v in rows[label].items()}, flush=True)

    for name in FILTERS:
        start = time.process_time()
        keep(f"FBP, {name}", problem.operator.fbp(problem.y, name), time.process_time() - start)
    for weight in WEIGHTS:
        start = time.process_time()
        x = total_variation(problem, weight, iterations=200, nonnegative=True)
        keep(f"total variation, weight {weight:g}", x, time.process_time() - start)
    start = time.process_time()
    sampler = samplers.get(options.sampler, steps=options.steps)
    posterior = invdiff.sample(problem, priors.load(options.prior), sampler, draws=options.draws, seed=0)
    draws = torch.from_numpy(np.asarray(posterior.draws)).reshape(-1, 1, 1, SIZE, SIZE)
    keep(f"{options.sampler}, mean of {options.draws}", draws.mean(0), time.process_time() - start)
    rows[f"{options.sampler}, one draw"] = scan.score(draws[0])
    std = draws.std(0)
    error = (draws.mean(0) - scan.reference)[0, 0][scan.inside]
    print(
        "one draw",
        rows[f"{options.sampler}, one draw"],
        "rms std",
        float(std[0, 0][scan.inside].square().mean().sqrt()),
        "rms error",
        float(error.square().mean().sqrt()),
    )
    TABLE.write_text(
        json.dumps({k: {f: round(v, 4) for f, v in r.items()} for k, r in rows.items()}, indent=1) + "\n"
    )
    if options.picture:
        picture(scan, made, draws, rows, options.picture)


def picture(
    scan: Scan, made: dict[str, Tensor], draws: Tensor, rows: dict[str, dict[str, float]], path: Path
) -> None:
    """Reference, the best of each kind, a draw and the standard deviation."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    kinds = ("FBP", "total variation", "d")
    best = [max((k for k in made if k.startswith(kind)), key=lambda k: rows[k]["psnr"]) for kind in kinds]
    panels = [("FBP of all views", scan.reference), *((k, made[k]) for k in best), ("one draw", draws[0])]
    top = float(scan.reference.quantile(0.999))
    figure, axes = plt.subplots(2, 3, figsize=(13, 9), layout="constrained")
    for ax, (title, x) in zip(axes.flat, panels):
        shown = ax.imshow(x[0, 0], cmap="gray", vmin=0, vmax=top)
        about = f"\nPSNR {rows[title]['psnr']:.1f} dB" if title in rows else ""
        ax.set_title(title + about)
        figure.colorbar(shown, ax=ax, shrink=0.8)
    shown = axes.flat[5].imshow(draws.std(0)[0, 0], cmap="viridis")
    axes.flat[5].set_title("standard deviation of the draws")
    figure.colorbar(shown, ax=axes.flat[5], shrink=0.8)
    for ax in axes.flat:
        ax.set_xticks([])
        ax.set_yticks([])
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    main()
