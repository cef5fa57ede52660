"""Grade latent samplers on held-out images under the embedded prior "ct-latent", and write their table.

Four images of 64 x 64 pixels that neither network has seen, four tasks, two noise levels. Noise is stated for
images on -1 to 1, as papers do: half of it in images of unit scale, in which PSNR has the range 1. Cells (one
sampler, one task, one image) are cached in a JSON file, so that the run can be interrupted and continued.

    python benchmarks/latent_images.py run [--only resample] [--images 4] [--minutes 30]
    python benchmarks/latent_images.py write                  # the table in docs/samplers/latent_images.md
    python benchmarks/latent_images.py show box 0.05 0        # a picture: truth, data, means, spreads, draws
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import invdiff
from invdiff import likelihoods, metrics, operators, priors, samplers
from invdiff.spaces import Space
from invdiff.training.latent import binned
from invdiff.training.synthesisers import SYNTHESISERS

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "samplers" / "latent_images.json"
SIZE, FIRST = 64, 1000
NOISE = (0.01, 0.05)
TASKS = {
    "random": "Inpainting, 70 % of the pixels missing at random",
    "box": "Inpainting, a box of 16 x 16 missing in the middle",
    "super": "Super-resolution by 4, bicubic",
    "blur": "Gaussian blur, standard deviation 1.5 pixels",
}
#: Sampler, name of the setting, what differs from the default, draws per image, most images.
ROWS = [
    ("resample", "default", {}, 4, 4),
    ("resample", "published", {"preset": "published"}, 1, 2),
    ("flowdps", "default", {}, 4, 2),
    ("dps", "tuned", {"preset": "tuned"}, 4, 2),
    ("daps", "50 steps", {"steps": 50}, 4, 1),
    ("psld", "200 steps", {"steps": 200}, 4, 1),
]
FIGURES = (
    ("psnr_mean", "PSNR of the mean"),
    ("psnr", "of a draw"),
    ("ssim", "SSIM of a draw"),
    ("coverage", "coverage"),
    ("residual", "residual"),
    ("nfe", "NFE"),
    ("noe", "operator"),
    ("seconds", "seconds"),
)


def main() -> None:
    """Run, write or show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "write", "show"])
    parser.add_argument("cell", nargs="*", help="task, noise and image to show")
    parser.add_argument("--only", nargs="*", default=[], help="samplers to run")
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--noise", nargs="*", type=float, default=list(NOISE), choices=NOISE)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no cell after this time")
    parser.add_argument("--prior", default="ct-latent")
    parser.add_argument("--picture", type=Path, default=Path("latent_images.png"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    prior = priors.load(options.prior).with_scale(1.0)
    if options.what == "show":
        task, noise, image = options.cell
        show(prior, task, float(noise), int(image), options.only or ["resample"], options.picture)
        return
    if options.what == "run":
        run(prior, options)
    write(prior)


@functools.cache
def truth(image: int) -> Tensor:
    """The middle of the ``image``-th held-out map that fills at least half of it, ``(1, 1, 64, 64)``."""
    found, seed = -1, FIRST
    while True:
        x = binned(SYNTHESISERS["ct"].image(seed, held_out=True), 2)
        top, left = ((n - SIZE) // 2 for n in x.shape[1:])
        x = x[None, :, top : top + SIZE, left : left + SIZE].astype(np.float32)
        found, seed = found + bool((x > 0.05).mean() > 0.5), seed + 1
        if found == image:
            return torch.from_numpy(x)


def pose(task: str, noise: float, image: int) -> invdiff.Problem:
    """One task on one image; ``noise`` for images on -1 to 1."""
    space = Space((1, SIZE, SIZE))
    a: operators.LinearOperator
    if task == "super":
        a = operators.Downsampling(4, space)
    elif task == "blur":
        a = operators.GaussianBlur(1.5, space, boundary="reflect")
    else:
        mask = torch.ones(1, SIZE, SIZE)
        if task == "box":
            mask[:, 24:40, 24:40] = 0
        else:
            mask = (torch.rand(1, SIZE, SIZE, generator=torch.Generator().manual_seed(image)) < 0.3).float()
        a = operators.Mask(mask, space)
    return invdiff.Problem.simulate(a, likelihoods.Gaussian(noise / 2), truth(image), seed=image)


def draw(prior, problem: invdiff.Problem, sampler, draws: int):
    """Draws as a tensor ``(n, 1, 64, 64)``, and the posterior."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        made = invdiff.sample(problem, prior, sampler, draws=draws, seed=0, max_batch=draws, progress=False)
    return torch.from_numpy(np.asarray(made.draws)).reshape(draws, 1, SIZE, SIZE), made


def grade(x: Tensor, problem: invdiff.Problem, image: int) -> dict[str, float]:
    """PSNR, SSIM, coverage and residual of draws."""
    reference = truth(image)[0, 0].numpy()
    sigma, seen = float(problem.sigma(x[:1]).max()), problem.y.numel()
    if isinstance(problem.operator, operators.Mask):
        seen = int(problem.operator(torch.ones_like(x[:1])).sum())
    rest = (problem.operator(x) - problem.y).flatten(1).square().sum(1)
    found = {
        "psnr_mean": metrics.psnr(x.mean(0)[0].numpy(), reference, 1.0),
        "psnr": float(np.mean([metrics.psnr(d[0].numpy(), reference, 1.0) for d in x])),
        "ssim": float(np.mean([metrics.ssim(d[0].numpy(), reference, 1.0) for d in x])),
        "residual": float((rest / seen).sqrt().mean()) / sigma,
    }
    if len(x) > 2:
        from scipy.stats import t

        reach = float(t.ppf(0.95, len(x) - 1)) * math.sqrt(1 + 1 / len(x)) * x.std(0)[0]
        found["coverage"] = float(((x.mean(0)[0] - torch.from_numpy(reference)).abs() <= reach).float().mean())
    return found


def run(prior, options: argparse.Namespace) -> None:
    """Grade every cell that is asked for and that the cache does not hold yet."""
    end = time.monotonic() + 60 * options.minutes
    sha = str(prior.card["sha256"])[:12]
    settings = [(task, noise) for task in options.tasks for noise in options.noise]
    for image in range(options.images):
        for task, noise in settings:
            keep(f"coded truth/{task}/{noise}/{image}", sha, functools.partial(coded, prior, image))
    for name, setting, changes, draws, most in ROWS:
        if options.only and name not in options.only and f"{name}, {setting}" not in options.only:
            continue
        sampler = samplers.get(name, **changes)
        for image in range(min(most, options.images)):
            for task, noise in settings:
                if time.monotonic() > end:
                    return
                keep(
                    f"{name}, {setting}/{task}/{noise}/{image}",
                    f"{sha} {sampler!r} {draws}",
                    functools.partial(sampled, prior, pose(task, noise, image), sampler, draws),
                )


def coded(prior, image: int) -> tuple[Tensor, dict[str, float]]:
    """The truth as its latents decode it."""
    codec = prior.bind(Space((1, SIZE, SIZE))).codec
    return codec.decode(codec.encode(truth(image))), {}


def sampled(prior, problem: invdiff.Problem, sampler, draws: int) -> tuple[Tensor, dict[str, float]]:
    """Draws, and what they cost each."""
    start = time.process_time()
    x, made = draw(prior, problem, sampler, draws)
    seconds = (time.process_time() - start) / draws
    counts = {k: float(np.asarray(made.stats[k]).mean()) for k in ("nfe", "noe")}
    return x, {**counts, "seconds": seconds}


def keep(key: str, config: str, make) -> None:
    """Grade one cell unless the cache has it with this configuration."""
    done = load()
    if done.get(key, {}).get("config") == config:
        return
    task, noise, image = key.split("/")[1:]
    x, costs = make()
    figures = {**grade(x, pose(task, float(noise), int(image)), int(image)), **costs}
    done = load()
    done[key] = {"config": config, "figures": {k: round(v, 4) for k, v in figures.items()}}
    temporary = RESULTS.with_suffix(".tmp")
    temporary.write_text(json.dumps(dict(sorted(done.items())), indent=0) + "\n")
    temporary.replace(RESULTS)
    print(key, done[key]["figures"], flush=True)


def load() -> dict:
    """Read the cache."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def write(prior) -> None:
    """Write the tables."""
    done = load()
    parts = [EXPLANATION]
    for task, title in TASKS.items():
        for noise in NOISE:
            lines = [
                "| | images, draws | " + " | ".join(t for _, t in FIGURES) + " |",
                "|---" * (len(FIGURES) + 2) + "|",
            ]
            names = {"coded truth": 1, **{f"{n}, {s}": d for n, s, _, d, _ in ROWS}}
            here = {row: graded(done, f"{row}/{task}/{noise}/") for row in names}
            here = {row: found for row, found in here.items() if found}
            # Images differ more than samplers do: a table is of those that all its rows have.
            shared = sorted(set.intersection(*(set(found) for found in here.values())))
            for row, found in here.items():
                cells = [cell(k, [found[i][k] for i in shared if k in found[i]]) for k, _ in FIGURES]
                lines.append(f"| {row} | {len(shared)}, {names[row]} | " + " | ".join(cells) + " |")
            parts.append(f"## {title}; noise {noise:g}\n\n" + "\n".join(lines) + "\n")
    RESULTS.with_suffix(".md").write_text("\n".join(parts))


def graded(done: dict, start: str) -> dict[str, dict[str, float]]:
    """Figures by image of the cells whose key starts so."""
    return {k.removeprefix(start): v["figures"] for k, v in done.items() if k.startswith(start)}


def cell(key: str, values: list[float]) -> str:
    """Format the mean of one figure."""
    if not values:
        return "–"
    value = float(np.mean(values))
    return f"{value:.0f}" if key in ("nfe", "noe", "seconds") else f"{value:.2f}"


def show(prior, task: str, noise: float, image: int, names: list[str], path: Path) -> None:
    """Write a picture of truth, data, and of mean, standard deviation and two draws of each sampler."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    problem, x = pose(task, noise, image), truth(image)
    top = float(x.quantile(0.995))
    figure, axes = plt.subplots(len(names) + 1, 4, figsize=(13, 3.4 * (len(names) + 1)), layout="constrained")
    first = [("truth", x), ("coded truth", coded(prior, image)[0]), ("data", problem.y), ("", None)]
    for ax, (title, shown) in zip(axes[0], first):
        ax.set_title(title)
        if shown is not None:
            ax.imshow(shown[0, 0], cmap="gray", vmin=0, vmax=top)
    rows = {f"{n}, {s}": (n, c, d) for n, s, c, d, _ in ROWS}
    for line, name in zip(axes[1:], names):
        sampler, changes, draws = rows.get(name, (name, {}, 4))
        made, _ = draw(prior, problem, samplers.get(sampler, **changes), max(2, draws))
        panels = [("mean", made.mean(0)), ("draw", made[0]), ("draw", made[1])]
        for ax, (title, shown) in zip(line, panels):
            ax.imshow(shown[0], cmap="gray", vmin=0, vmax=top)
            ax.set_title(f"{name}: {title}, {metrics.psnr(shown[0].numpy(), x[0, 0].numpy(), 1.0):.1f} dB")
        line[3].imshow(made.std(0)[0], cmap="viridis", vmin=0, vmax=0.1)
        line[3].set_title("standard deviation, 0 to 0.1")
    for ax in axes.flat:
        ax.set_axis_off()
    figure.savefig(path, dpi=80)


EXPLANATION = """\
# Latent samplers on held-out images

Made by `benchmarks/latent_images.py` with the embedded prior `ct-latent`: the middle 64 x 64 pixels of
attenuation maps that neither its autoencoder nor its denoiser has seen. Noise is stated for images on -1 to 1.

* *coded truth*: the truth encoded and decoded, which is about the best that any draw can be.
* **PSNR** (range 1) of the mean of the draws and of single draws; **SSIM** of single draws. **coverage**: share of
  pixels whose truth lies in the 90 % interval that Student's t gives the next draw after these.
* **residual**: root mean square of `y - A x` over the noise level. 1 is the noise; what is above it is data that
  no latent was found for, what is below is noise taken for image.
* **NFE**, **operator**, **seconds** (on one processor core): per draw. Operators have the decoder inside, except
  in fits of images.
"""


if __name__ == "__main__":
    main()
