"""Simulate cases of a problem, sample them, and find out whether the draws of a sampler can be believed.

Cases come in blocks of `BLOCK`: more can be added later, and an interrupted run goes on where it was.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from invdiff import progress as bars
from invdiff import samplers as registry
from invdiff import uq
from invdiff.calibrating_cases import Blocks, Images, Total, Truths
from invdiff.calibration import Calibration
from invdiff.calibration_judge import judge
from invdiff.callbacks import RunInfo
from invdiff.checkpoint import Checkpoint
from invdiff.errors import InvdiffError, StoreError
from invdiff.plan import Target, bind, check_capabilities, find_device
from invdiff.rng import resolve_seed
from invdiff.sampler import Sampler
from invdiff.uq.diagnosis import LEAST_CASES

if TYPE_CHECKING:
    from invdiff.posterior import Posterior
    from invdiff.prior import Prior
    from invdiff.problem import Problem

#: Cases that are simulated and sampled together.
BLOCK = 20
#: Numbers that a batch holds on a CPU: several smaller ones cost no more there, and let a budget be kept.
_BATCH = 1 << 17


def calibrate(
    problem: Problem,
    prior: Prior,
    sampler: Sampler | str = "dds",
    *,
    cases: int = 200,
    draws: int = 16,
    images: Images | None = None,
    population: str = "",
    level: float = 0.9,
    seed: int = 0,
    budget_s: float | None = None,
    output: str | Path | None = None,
    resume: bool = True,
    device: torch.device | str | None = None,
    max_batch: int | None = None,
    progress: bool | None = None,
) -> Calibration:
    """Simulate cases ``x ~ prior``, ``y ~ p(. | A(x))``, sample each, and test the draws against the truths.

    Of the problem operator and noise count, and its data for the scale of the images where the prior takes it from
    there. With images from the prior itself the truth is one more exact draw, so whatever is rejected is the
    sampler's fault (or that of ``heun``, which draws the images of a learned prior). With images of one's own the
    prior's error counts too, and so does the estimate of the scale.

    Args:
        problem: Operator and likelihood of one case.
        prior: Prior.
        sampler: Sampler of independent draws, or its name.
        cases: Simulated cases; 200 tell most, 20 only gross errors.
        draws: Draws of each case.
        images: True images instead of draws from the prior: ``(n, *image)`` in image units, of which ``cases`` are
            chosen at random, or a function that returns the image of case ``i``.
        population: What the images are, in words; needed with ``images``.
        level: Of the conformal intervals.
        seed: Of images, noise, draws and tests.
        budget_s: Begin no further batch of draws after so many seconds; the cases that are finished count.
        output: Folder that keeps what is done, made where its parent exists.
        resume: Go on with what the folder holds; bit-exact at the same ``max_batch``.
        device: See `invdiff.sample`.
        max_batch: See `invdiff.sample`.
        progress: See `invdiff.sample`.

    Returns:
        Tests, curves and scores over all finished cases; conformal intervals from the first half of them, tried on
        the others.

    Raises:
        InvdiffError: For input that does not fit, before any work; or if fewer than 20 cases fitted into the time.
    """
    clock = time.monotonic()
    seed = resolve_seed(seed)
    chosen = registry.get(sampler) if isinstance(sampler, str) else sampler
    _check(chosen, cases, draws, level, budget_s)
    target = bind(_one_case(problem), prior, None, find_device(device))
    assert target.pulled is not None
    check_capabilities(chosen, target.pulled, target.prior)
    truths = Truths(target, images, population, cases, seed)
    origin = uq.fingerprint(problem, prior, chosen)
    folder = None if output is None else Path(output)
    if folder is not None:
        check_folder(folder)
        config = {"problem, prior or sampler": origin, "draws": draws, "seed": seed, "images": truths.identity}
        Checkpoint(folder, config, resume)
    # Images from the prior have the scale that it has here; those of one's own have their own.
    bound = target.prior if images is None else prior
    run = Blocks(target, bound, chosen, draws, seed, folder, _batch(target, draws, max_batch))
    total = Total(bars.auto(progress), RunInfo(chosen.name, cases * draws, chosen.steps, str(target.device), 0))
    done: list[tuple[Problem, Posterior]] = []
    try:
        for first in range(0, cases, BLOCK):
            left = None if budget_s is None else budget_s - (time.monotonic() - clock)
            if left is not None and left <= 0:
                break
            done.append(run.block(first, min(BLOCK, cases - first), truths, left, total))
        kept = [np.flatnonzero((p.stats["status"].values != "missing").reshape(-1, draws).all(1)) for _, p in done]
        made = sum(map(len, kept))
        if made < LEAST_CASES:
            raise InvdiffError(_too_few(made, cases, budget_s, folder))
        return judge(
            [(simulated, posterior, k) for (simulated, posterior), k in zip(done, kept)],
            sampler=chosen,
            prior=prior.name,
            population=f"{truths.population}, simulated data of {problem.operator.name}, {problem.likelihood!r}",
            from_prior=images is None,
            asked=cases,
            level=level,
            seed=seed,
            origin=origin,
        )
    finally:
        total.close()
        for _, posterior in done:
            posterior.close()


def check_folder(folder: Path) -> None:
    """Refuse a folder that could not be written to, before any work."""
    home = folder if folder.is_dir() else folder.absolute().parent
    if folder.exists() and not folder.is_dir():
        raise StoreError(f"The output {folder} is a file; give a folder.")
    if not home.is_dir():
        raise StoreError(f"The output {folder} is in a folder that does not exist; create {folder.parent} first.")
    if not os.access(home, os.W_OK):
        raise StoreError(f"The output {folder} cannot be written to; choose another folder.")


def _check(sampler: Sampler, cases: int, draws: int, level: float, budget_s: float | None) -> None:
    if cases < LEAST_CASES:
        raise InvdiffError(f"A calibration needs at least {LEAST_CASES} cases, got {cases}; 200 tell most.")
    if draws < 4:
        raise InvdiffError(f"A calibration needs at least 4 draws of each case, got {draws}; 16 or more is usual.")
    if budget_s is not None and not budget_s > 0:
        raise InvdiffError(f"The time budget must be a positive number of seconds, got {budget_s:g}.")
    if not 0 < level <= 0.9:
        raise InvdiffError(f"The level of the conformal intervals lies above 0 and up to 0.9, got {level:g}.")
    if not sampler.conditional:
        raise InvdiffError(f"{sampler.name} draws from the prior alone and ignores data; use dds, for example.")
    if sampler.kind != "posterior":
        what = "makes a point estimate" if sampler.kind == "point" else "moves its draws together as an ensemble"
        raise InvdiffError(
            f"{sampler.name} {what}, and calibration tests independent draws; choose such a sampler."
        )


def _one_case(problem: Problem) -> Problem:
    for what, n in (("operator", problem.operator.n_cases), ("likelihood", problem.likelihood.n_cases)):
        if problem.n_cases > 1 and n not in (None, 1):
            raise InvdiffError(
                f"The {what} has parameters for {n} cases; calibrate one of them, problem.rows(torch.tensor([0]))."
            )
    return problem if problem.n_cases == 1 else problem.rows(torch.tensor([0]))


def _batch(target: Target, draws: int, asked: int | None) -> int | None:
    """Return rows at once: what was asked for, on a CPU few whole cases, elsewhere what fits."""
    if asked is not None or target.device.type != "cpu":
        return asked
    return draws * max(1, _BATCH // (draws * target.codec.prior.size))


def _too_few(made: int, cases: int, budget: float | None, folder: Path | None) -> str:
    how = "allow more time or take fewer draws" if folder is None else f"run it again to go on from {folder}"
    return f"{made} of {cases} cases fitted into {budget:g} s, and a verdict needs at least {LEAST_CASES}; {how}."
