"""From a loop that has ended to a posterior: draws and statistics gathered, provenance, the store."""

from __future__ import annotations

import platform
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from invdiff import honesty
from invdiff.errors import NonFiniteError
from invdiff.loop import ADVICE, Loop
from invdiff.problem import Problem
from invdiff.sampler import RECORDED

if TYPE_CHECKING:
    from invdiff.posterior import Posterior
    from invdiff.run import DrawSource


def finish(loop: Loop, status: Literal["complete", "stopped"], store: str | Path | None, title: str) -> Posterior:
    """Gather draws and statistics and hand them to the posterior, streamed where there is a store.

    Raises:
        NonFiniteError: If no draw is usable.
    """
    from invdiff.io.store import build_tree, write_run
    from invdiff.posterior import Posterior, open_posterior
    from invdiff.run import Run

    plan, target = loop.plan, loop.plan.target
    stats = _stats(loop)
    ok = stats["status"] == "ok"
    if not ok.any():
        made = (stats["status"] == "nan").sum()
        raise NonFiniteError(
            f"None of the draws is usable ({made} became NaN or infinite with {plan.sampler.name}, "
            f"{ok.size - made} were not made); {ADVICE}."
        )
    _warn_of_collapse(stats)
    problem = target.problem
    run = Run(
        space=target.image,
        kind=plan.sampler.kind,
        draws=_draws(loop),
        stats=stats,
        observed={} if problem is None else _observed(problem),
        range_space=None if problem is None else problem.operator.range,
        x_true=None if problem is None or problem.x_true is None else problem.x_true.cpu().numpy(),
        provenance=_provenance(loop),
        title=title or f"{plan.sampler.title} with prior {target.prior.name}",
        status=status,
    )
    if store is None:
        return Posterior(build_tree(run))
    write_run(run, store)
    return open_posterior(store)


def _draws(loop: Loop) -> DrawSource:
    """Return the draws of all chunks, left in their files where they have some; NaN where one is missing."""
    from invdiff.run import FileDraws, MemoryDraws

    plan, target = loop.plan, loop.plan.target
    if loop.keep is not None:
        return FileDraws(loop.files, target.cases, plan.draws, target.image)
    like = next(iter(loop.chunks.values()))["x"]
    flat = torch.full((plan.rows, *target.image.shape), float("nan"), dtype=like.dtype)
    for first, chunk in loop.chunks.items():
        flat[first : first + chunk["x"].shape[0]] = chunk["x"]
    return MemoryDraws(flat.numpy().reshape(target.cases, plan.draws, *target.image.shape))


def _stats(loop: Loop) -> dict[str, np.ndarray]:
    """Return the statistics of all draws, each ``(cases, draws)``, facts along a chain with axes of their own."""
    plan = loop.plan
    names = ("nfe", "vjp", "noe", "wall_s", "log_likelihood", "residual_norm", *RECORDED)
    out: dict[str, np.ndarray] = {}
    status = np.full(plan.rows, "missing", dtype="<U7")
    parts = loop.chunks or {first: _read(path, (*names, "ok")) for first, path in loop.files}
    for first, chunk in parts.items():
        count = chunk["nfe"].shape[0]
        status[first : first + count] = np.where(chunk["ok"].numpy() > 0, "ok", "nan")
        for name in names:
            if name in chunk:
                values = chunk[name].numpy()
                if name not in out:
                    empty: Any = 0 if values.dtype.kind in "iu" else np.nan
                    out[name] = np.full((plan.rows, *values.shape[1:]), empty, dtype=values.dtype)
                out[name][first : first + count] = values
    out["status"] = status
    return {k: v.reshape(plan.target.cases, plan.draws, *v.shape[1:]) for k, v in out.items()}


def _warn_of_collapse(stats: dict[str, np.ndarray]) -> None:
    """Warn once, with the figures, where the weights left a case fewer than two effective particles.

    Two or three particles say nothing either way.
    """
    run = stats.get("ess_run", stats.get("ess"))
    if run is None or run.shape[1] < 4 or not np.isfinite(run).any():
        return
    place = np.unravel_index(np.nanargmin(run), run.shape)
    if run[place] < 2:
        warnings.warn(
            f"The particles' weights collapsed: the effective sample size of case {place[0]} fell to "
            f"{stats['ess'][place]:.2f} of {run.shape[1]}, and to {run[place]:.2f} over all resamplings; its "
            "draws may show less uncertainty than there is. Ask for more draws, or use a sampler without weights.",
            stacklevel=4,
        )


def _read(path: Path, names: Sequence[str]) -> dict[str, Tensor]:
    """Read some tensors of a chunk, leaving the draws on disk."""
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        return {name: file.get_tensor(name) for name in set(names) & set(file.keys())}


def _observed(problem: Problem) -> dict[str, np.ndarray]:
    """Return the data, and mask and noise level where operator and likelihood have them."""
    observed = {"y": problem.y.cpu().numpy()}
    mask = getattr(problem.operator, "mask", None)
    if isinstance(mask, Tensor):
        observed["mask"] = mask.cpu().numpy()
    sigma = getattr(problem.likelihood, "sigma", None)
    if isinstance(sigma, Tensor):
        observed["sigma"] = sigma.cpu().numpy()
    return observed


def _provenance(loop: Loop) -> dict[str, Any]:
    """Return how the draws came about, JSON-able."""
    from invdiff import __version__

    plan, device = loop.plan, loop.plan.target.device
    return {
        "invdiff_version": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "sampler_kind": plan.sampler.kind,
        "sampler_exactness": plan.sampler.exactness,
        **honesty.facts(plan.sampler),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor(),
        "precision": f"state {plan.dtype}, network {plan.target.prior.denoiser.dtype}",
        "max_batch": loop.batch,
        "command": " ".join(Path(a).name if "/" in a else a for a in sys.argv),
        **{k: v for k, v in plan.config().items() if k != "image"},
    }
