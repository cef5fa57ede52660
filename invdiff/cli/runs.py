"""The part that ``reconstruct`` and ``demo`` share: load prior and sampler, draw, say how to continue."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from invdiff.cli.guard import Interrupted
from invdiff.errors import InvdiffError

if TYPE_CHECKING:
    from invdiff.posterior import Posterior
    from invdiff.prior import Prior
    from invdiff.problem import Problem
    from invdiff.sampler import Sampler


def draw(
    problem: Problem, prior: Prior, sampler: Sampler, output: Path, *, progress: bool | None, **options: Any
) -> Posterior:
    """Draw into a file; an interruption says how to continue.

    Args:
        problem: What to solve.
        prior: Prior.
        sampler: Sampler.
        output: ``.nc`` or ``.zarr`` file that the draws are streamed to.
        progress: See `invdiff.sample`.
        options: Further options of `invdiff.sample`.
    """
    from invdiff.driver import sample

    folder = Path(f"{output}.partial")
    resuming = bool(options.get("resume"))
    there = folder.exists()
    try:
        return sample(problem, prior, sampler, store=output, progress=progress, **options)
    except KeyboardInterrupt:
        raise Interrupted(how_to_resume(folder)) from None
    except Exception:
        if not there and not resuming:
            _remove_if_empty(folder)
        raise


def check_prior(prior: Prior, problem: Problem) -> None:
    """Refuse a learned prior whose channels cannot hold the images of a problem.

    Raises:
        InvdiffError: Naming both.
    """
    from invdiff.priors.latent import FORMAT

    image = problem.operator.domain
    needed = image.shape[0] * (2 if image.is_complex else 1)
    # Latents have other channels than their images.
    have = len(prior.card["channels"]) if prior.card.get("format") == FORMAT else prior.denoiser.channels
    if prior.codec is None and have != needed:
        raise InvdiffError(
            f"Prior {prior.name} has {have} channel{'s' if have != 1 else ''}, and {needed} are needed for images "
            f"{image} (real and imaginary part); choose another prior."
        )


def how_to_resume(folder: Path) -> str:
    """Return the sentence shown after an interruption."""
    if not folder.exists():
        return "Interrupted; nothing was written."
    return f"Interrupted; what is done is kept in {folder}: run the same command with --resume to continue."


def misfit(posterior: Posterior, samples: int, sigma: float) -> float | None:
    """Return the median over draws of ``||y - A x||^2 / (2 m sigma^2)`` for ``m`` complex samples.

    At the noise level it is near 1.
    """
    if "residual_norm" not in posterior.stats:
        return None
    import numpy as np

    value = float(np.nanmedian(posterior.stats["residual_norm"].values)) ** 2 / (2 * samples * sigma**2)
    return value if math.isfinite(value) else None


def _remove_if_empty(folder: Path) -> None:
    """Drop a checkpoint folder in which no work was kept."""
    import shutil

    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        shutil.rmtree(folder, ignore_errors=True)
