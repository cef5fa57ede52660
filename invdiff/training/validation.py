"""How well a network denoises held-out images, against the noise level."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from invdiff.io.atomic import whole_file
from invdiff.priors.learned import Network, denoiser_of

__all__ = ["denoising_curve", "plot_curve"]

SIGMA_GRID = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 20.0)


def _pad(image: NDArray[Any], multiple: int) -> NDArray[np.float32]:
    ny, nx = image.shape[1:]
    return np.pad(image.astype(np.float32), ((0, 0), (0, -ny % multiple), (0, -nx % multiple)))


@torch.no_grad()
def denoising_curve(
    network: Network,
    images: list[NDArray[Any]],
    sigmas: tuple[float, ...] = SIGMA_GRID,
    seed: int = 0,
    labels: list[int] | None = None,
) -> dict[str, Any]:
    """Error of the denoiser on whole images against the noise level.

        rmse(sigma) = sqrt( mean || D(x + sigma eps, sigma) - x ||^2 / number of values )

    Args:
        network: the denoiser; evaluated on its own device in its own precision.
        images: real ``(channels, ny, nx)`` arrays; padded with zeros as needed.
        sigmas: noise levels, in the units of the images.
        seed: of the noise.
        labels: class of every image, for a network with classes.

    Returns:
        Lists ``sigma``, ``rmse`` (per real component) and ``relative`` (rmse / sigma); for a network with classes,
        which is told them, ``rmse_no_class`` is what it makes of the same images untold.
    """
    parameter = next(network.parameters())
    denoise = denoiser_of(network)
    total = np.zeros((2, len(sigmas)))
    count = 0
    for index, image in enumerate(images):
        padded = torch.from_numpy(_pad(image, network.multiple))
        rng = np.random.default_rng([seed, 2, index])
        count += image.size
        ny, nx = image.shape[1:]
        told = [{}, {"label": torch.tensor(labels[index])}] if labels is not None else [{}]
        for n, sigma in enumerate(sigmas):
            noise = torch.from_numpy(rng.standard_normal(padded.shape, dtype=np.float32))
            noisy = (padded + sigma * noise)[None].to(parameter.device, parameter.dtype)
            level = torch.full((1,), sigma, device=parameter.device, dtype=parameter.dtype)
            for k, cond in enumerate(told):
                error = denoise(noisy, level, **({"cond": cond} if cond else {}))[0].float().cpu() - padded
                total[k, n] += float(error[:, :ny, :nx].double().square().sum())
    untold, rmse = np.sqrt(total / max(count, 1))
    untold, rmse = (untold, rmse) if labels is not None else (None, untold)
    curve = {
        "sigma": [float(s) for s in sigmas],
        "rmse": [float(f"{r:.5g}") for r in rmse],
        "relative": [float(f"{r / s:.4g}") for r, s in zip(rmse, sigmas)],
        "images": len(images),
    }
    return curve if untold is None else {**curve, "rmse_no_class": [float(f"{r:.5g}") for r in untold]}


def plot_curve(curve: dict[str, Any], path: Path) -> None:
    """Write a PNG of a denoising curve."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.loglog(curve["sigma"], curve["rmse"], "o-", label="denoised")
    axes.loglog(curve["sigma"], curve["sigma"], ":", color="grey", label="noisy input")
    axes.set_xlabel("noise level sigma (units of the images)")
    axes.set_ylabel("RMSE per real component")
    axes.set_ylim(min(curve["rmse"]) / 2, max(curve["rmse"]) * 4)
    axes.legend()
    axes.grid(alpha=0.3)
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
