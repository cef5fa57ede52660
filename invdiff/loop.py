"""The one loop: chunks of rows from first step to last, memory back-off, NaN policy, checkpoints, callbacks."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from invdiff import memory
from invdiff.callbacks import Callback, RunInfo, StepInfo
from invdiff.checkpoint import Checkpoint, InProgress
from invdiff.counting import Counts
from invdiff.errors import InvdiffError, NonFiniteError
from invdiff.plan import Plan
from invdiff.rng import INIT, Streams
from invdiff.sampler import RECORDED, Context, State
from invdiff.spaces import norm

#: What to do about a draw that became NaN or infinite.
ADVICE = "lower its guidance weight or step size, or check the noise level"


@contextmanager
def _full_precision() -> Iterator[None]:
    """Full float32 precision on accelerators while a run lasts (reduced TF32 only where asked for elsewhere)."""
    matmul, conv = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, conv


@dataclass
class Loop:
    """Chunks of rows, one after another, each from its first step to its last.

    Attributes:
        plan: What to do.
        keep: Where finished chunks and the one in progress are kept; None keeps finished ones in ``chunks``.
        callbacks: Told of every step and chunk.
        max_batch: Most rows at once; None starts with what should fit.
        every_s: Seconds between checkpoints of the chunk in progress.
        budget_s: Start no further chunk after this many seconds.
        chunks: Finished draws and statistics by first row, in memory.
        files: First row and path of the chunks kept in files.
        batch: Rows at once at present.
    """

    plan: Plan
    keep: Checkpoint | None
    callbacks: list[Callback]
    max_batch: int | None
    every_s: float
    budget_s: float | None
    chunks: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    files: list[tuple[int, Path]] = field(default_factory=list)
    batch: int = 0
    _start: float = field(init=False, default=0.0)
    _done: int = field(init=False, default=0)

    @_full_precision()
    @memory.kept_heap()
    def run(self) -> Literal["complete", "stopped"]:
        """Run all chunks; return whether every draw was made."""
        plan, device = self.plan, self.plan.target.device
        largest = max(plan.canvas, plan.target.image, key=lambda space: space.size)  # latents are decoded
        self.batch = self.max_batch or memory.start_batch(largest, plan.rows, device)
        self._start = time.monotonic()
        todo = self._restore()
        info = RunInfo(plan.sampler.name, plan.rows, plan.steps, str(device), self._done)
        for callback in self.callbacks:
            callback.on_start(info)
        try:
            return self._chunks(todo)
        finally:
            for callback in self.callbacks:
                callback.on_end()

    def _restore(self) -> list[tuple[int, int]]:
        """Read finished chunks; return the stretches ``(first row, number)`` still to do."""
        done: set[int] = set()
        for first, count, path in self.keep.finished() if self.keep else []:
            self.files.append((first, path))
            done |= set(range(first, first + count))
        self._done = len(done)
        stretches: list[tuple[int, int]] = []
        for r in (r for r in range(self.plan.rows) if r not in done):
            if stretches and sum(stretches[-1]) == r:
                stretches[-1] = (stretches[-1][0], stretches[-1][1] + 1)
            else:
                stretches.append((r, 1))
        return stretches

    def _chunks(self, todo: list[tuple[int, int]]) -> Literal["complete", "stopped"]:
        unit = self.plan.unit
        for first, count in todo:
            stop = first + count
            while first < stop:
                if self.budget_s is not None and time.monotonic() - self._start > self.budget_s and self._done:
                    return "stopped"
                size = min(stop - first, max(unit, self.batch // unit * unit))
                pending = self.keep.load_state() if self.keep else None
                if pending and pending.first == first and pending.count <= stop - first:
                    size = pending.count
                finished = self._attempt(first, size, pending)
                if finished is None:
                    return "stopped"
                if finished:
                    first += size
                    self._done += size
                    for callback in self.callbacks:
                        callback.on_chunk(size)
        return "complete"

    def _attempt(self, first: int, count: int, pending: InProgress | None) -> bool | None:
        """Run one chunk; False after halving for want of memory, None when a callback stopped the run."""
        error: BaseException | None = None
        try:
            return self._chunk(first, count, pending)
        except (MemoryError, RuntimeError) as caught:
            if not memory.is_out_of_memory(caught):
                raise
            error = caught
        # Outside the except block: the traceback would keep the tensors of the failed chunk alive.
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        del error
        plan, device = self.plan, self.plan.target.device
        memory.release(device)
        if count <= plan.unit:
            raise InvdiffError(f"Not enough memory on {device} for {count} row(s) of {plan.canvas}: {text}")
        self.batch = max(plan.unit, count // 2)
        for callback in self.callbacks:
            callback.on_chunk(0, restarted=True)
        return False

    @torch.no_grad()
    def _chunk(self, first: int, count: int, pending: InProgress | None) -> bool | None:
        """Take rows ``[first, first + count)`` from their first step, or where they were left, to the last."""
        plan = self.plan
        ctx, rng, counts = plan.context(first, count)
        begun = saved = time.monotonic()
        if pending and (pending.first, pending.count) == (first, count):
            k0, extra = pending.k, pending.extra
            state = {key: v.to(ctx.device) for key, v in pending.state.items()}
            counts.nfe, counts.vjp, counts.noe = int(extra["nfe"]), int(extra["vjp"]), int(extra["noe"])
            begun -= extra["wall"]
        else:
            k0, state = 0, plan.sampler.init(ctx, count, rng.at(INIT))
        for k in range(k0, plan.steps):
            if self.keep and (time.monotonic() - saved >= self.every_s):
                saved = time.monotonic()
                extra = {"nfe": counts.nfe, "vjp": counts.vjp, "noe": counts.noe, "wall": saved - begun}
                self.keep.save_state(InProgress(first, count, k, state, extra))
            state = plan.sampler.step(k, state, ctx, rng.at(k))
            self._guard(state, k, rng)
            if self._report(k, state, ctx, rng):
                return None
        self._store(first, self._results(state, ctx, rng, counts, time.monotonic() - begun))
        return True

    def _guard(self, state: State, k: int, rng: Streams) -> None:
        """Stop at the first draw that is not finite, where that was asked for."""
        if self.plan.on_nonfinite == "raise":
            bad = ~_finite_rows(state)
            if bool(bad.any()):
                case, draw = rng.keys[int(bad.nonzero()[0])]
                raise NonFiniteError(
                    f"Draw {draw} of case {case} became NaN or infinite at step {k + 1} of "
                    f"{self.plan.steps} ({self.plan.sampler.name}); {ADVICE}."
                )

    def _report(self, k: int, state: State, ctx: Context, rng: Streams) -> bool:
        """Tell every callback of a step; return whether one asked to stop."""
        s, t = ctx.level(k)
        info = StepInfo(k, self.plan.steps, s, t, rng.keys, state, ctx, time.monotonic() - self._start)
        asked = [callback.on_step(info) for callback in self.callbacks]
        return any(asked)

    def _results(self, state: State, ctx: Context, rng: Streams, counts: Counts, wall: float) -> dict[str, Tensor]:
        """Return the draws of a chunk in image space and their statistics, one per row."""
        target = self.plan.target
        u = self.plan.sampler.finish(state, ctx)
        rows = u.shape[0]
        index = torch.tensor([c for c, _ in rng.keys])
        codec = target.codec.rows(index)
        result = {
            "x": codec.decode(u.to(codec.prior.dtype)).cpu(),
            "nfe": torch.full((rows,), counts.nfe),
            "vjp": torch.full((rows,), counts.vjp),
            "noe": torch.full((rows,), counts.noe),
            "wall_s": torch.full((rows,), wall / rows, dtype=torch.float64),
            "log_likelihood": torch.full((rows,), float("nan"), dtype=torch.float64),
            "residual_norm": torch.full((rows,), float("nan"), dtype=torch.float64),
            "ok": _finite_rows({"u": u}).cpu().to(torch.uint8),
        }
        if target.pulled is not None:
            problem = target.pulled.rows(index)  # not the counting one of the context: this is no evaluation
            result["log_likelihood"] = problem.log_likelihood(u).double().cpu()
            result["residual_norm"] = norm(problem.residual(u)).double().cpu()
        result.update({name: state[name].double().cpu() for name in RECORDED if name in state})
        return result

    def _store(self, first: int, result: dict[str, Tensor]) -> None:
        """Keep the results of a chunk."""
        bad = int((result["ok"] == 0).sum())
        if bad:
            rows = result["ok"].shape[0]
            warnings.warn(f"{bad} of {rows} draws became NaN or infinite and are flagged.", stacklevel=5)
        if self.keep is not None:
            self.files.append((first, self.keep.save_chunk(first, result)))
        else:
            self.chunks[first] = result


def _finite_rows(state: State) -> Tensor:
    """Return ``(B,)``: which rows are finite in every tensor of the state."""
    ok: Tensor | None = None
    for value in state.values():
        rows = torch.isfinite(value).flatten(1).all(1) if value.ndim > 1 else torch.isfinite(value)
        ok = rows if ok is None else ok & rows
    assert ok is not None
    return ok
