"""The public entry to sampling: check and plan, run the loop, hand over the posterior."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from invdiff import memory
from invdiff import progress as bars
from invdiff.callbacks import Callback
from invdiff.checkpoint import Checkpoint
from invdiff.errors import InvdiffError
from invdiff.finish import finish
from invdiff.loop import Loop
from invdiff.plan import Plan, bind, check_capabilities, check_particles, choose_sampler, find_device
from invdiff.prior import Prior
from invdiff.problem import Problem
from invdiff.rng import resolve_seed
from invdiff.sampler import Sampler
from invdiff.spaces import Space

if TYPE_CHECKING:
    from invdiff.posterior import Posterior


def sample(
    problem: Problem | None,
    prior: Prior,
    sampler: Sampler | str | None = None,
    *,
    draws: int = 1,
    seed: int | None = None,
    shape: Sequence[int] | Space | None = None,
    max_batch: int | None = None,
    device: torch.device | str | None = None,
    state_dtype: torch.dtype = torch.float64,
    on_nonfinite: Literal["mark", "raise"] = "mark",
    store: str | Path | None = None,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    checkpoint_every_s: float = 20.0,
    progress: bool | None = None,
    callbacks: Sequence[Callback] = (),
    time_budget_s: float | None = None,
    title: str = "",
) -> Posterior:
    """Draw from the posterior of ``problem`` under ``prior`` with ``sampler``.

    The random numbers of draw ``s`` of case ``i`` depend on ``(seed, i, s)`` alone, never on batch size, order,
    memory back-off or resume. A draw is finite or flagged.

    Args:
        problem: Operator, likelihood and data; None draws from the prior.
        prior: Denoiser and codec; its scale is estimated from the data where it is not given.
        sampler: A sampler or the name of one; by default ``dds`` (``dpmpp`` without a problem).
        draws: Draws per case.
        seed: Any integer from 0; None draws one. It is recorded either way.
        shape: Image shape or space of unconditional draws.
        max_batch: Most rows at once; by default what fits, halved whenever memory runs out.
        device: Where to compute; by default a CUDA device if there is one, else the CPU.
        state_dtype: Precision of the state (the network keeps its own).
        on_nonfinite: ``mark`` flags a draw that turns NaN or infinite and goes on; ``raise`` stops.
        store: ``.nc`` or ``.zarr`` file to stream the posterior to; draws are then not kept in memory.
        checkpoint: Folder for resuming; ``<store>.partial`` where a store is given.
        resume: Continue an interrupted run; bit-exact at the same chunking.
        checkpoint_every_s: Seconds between checkpoints of the chunk in progress (0: every step).
        progress: None shows one in terminals and notebooks only; True and False decide.
        callbacks: Further callbacks.
        time_budget_s: Start no further chunk after this many seconds; finished draws are kept.
        title: One line for people, kept in the store.

    Returns:
        Labelled draws with statistics and provenance.

    Raises:
        InvdiffError: For input that does not fit together, before any work, in one sentence.
    """
    _check_options(draws, max_batch, on_nonfinite)
    chosen = choose_sampler(sampler, problem)
    check_particles(chosen, draws)
    target = bind(problem, prior, shape, find_device(device))
    if target.pulled is not None:
        check_capabilities(chosen, target.pulled, target.prior)
    plan = Plan(target, chosen, draws, resolve_seed(seed), state_dtype, on_nonfinite)
    memory.check_fits(target.image, plan.rows, streamed=store is not None)
    folder = Path(checkpoint) if checkpoint else Path(f"{store}.partial") if store else None
    if resume and folder is None:
        raise InvdiffError(
            "Nothing to resume from: give the store or the checkpoint folder of the interrupted run."
        )
    keep = Checkpoint(folder, plan.config(), resume) if folder else None
    bar = bars.auto(progress)
    loop = Loop(plan, keep, [*callbacks, *([bar] if bar else [])], max_batch, checkpoint_every_s, time_budget_s)
    status = loop.run()
    posterior = finish(loop, status, store, title)
    if keep is not None and status == "complete" and not checkpoint:
        keep.remove()
    return posterior


def _check_options(draws: int, max_batch: int | None, on_nonfinite: str) -> None:
    """Refuse settings that no problem and no prior can make good."""
    if isinstance(draws, bool) or not isinstance(draws, int) or draws < 1:
        raise InvdiffError(f"The number of draws must be an integer of at least 1, got {draws!r}.")
    if max_batch is not None and max_batch < 1:
        raise InvdiffError(f"max_batch must be at least 1, got {max_batch}.")
    if on_nonfinite not in ("mark", "raise"):
        raise InvdiffError(f"on_nonfinite is 'mark' or 'raise', not {on_nonfinite!r}.")
