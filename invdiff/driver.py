"""The one loop: rows, seeds, batches, memory back-off, progress, NaN policy, checkpoint and resume, store."""

from __future__ import annotations

import platform
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from invdiff import memory
from invdiff import progress as bars
from invdiff.callbacks import Callback, RunInfo, StepInfo
from invdiff.checkpoint import Checkpoint
from invdiff.codec import Codec
from invdiff.counting import CountedDenoiser, Counts, count_operator
from invdiff.errors import CapabilityError, InvdiffError, NonFiniteError
from invdiff.prior import Prior
from invdiff.problem import Problem
from invdiff.rng import INIT, SCHEME, Streams, resolve_seed
from invdiff.sampler import Context, Sampler, State
from invdiff.spaces import Space, norm

if TYPE_CHECKING:
    from invdiff.posterior import Posterior

_ADVICE = "lower its guidance weight or step size, or check the noise level"


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
    plan = _Plan.make(problem, prior, sampler, draws, seed, shape, device, state_dtype, on_nonfinite)
    memory.check_fits(plan.image, plan.rows, streamed=store is not None)
    if max_batch is not None and max_batch < 1:
        raise InvdiffError(f"max_batch must be at least 1, got {max_batch}.")
    folder = Path(checkpoint) if checkpoint else Path(f"{store}.partial") if store else None
    keep = Checkpoint(folder, plan.config(), resume) if folder else None
    if resume and folder is None:
        raise InvdiffError(
            "Nothing to resume from: give the store or the checkpoint folder of the interrupted run."
        )
    bar = bars.auto(progress)
    loop = _Loop(plan, keep, [*callbacks, *([bar] if bar else [])], max_batch, checkpoint_every_s, time_budget_s)
    with _quiet_numerics():
        status = loop.run()
    posterior = _finish(plan, loop, status, store, title)
    if keep is not None and status == "complete" and not checkpoint:
        keep.remove()
    return posterior


@dataclass
class _Plan:
    """What a run will do, checked."""

    problem: Problem | None
    pulled: Problem | None
    prior: Prior
    sampler: Sampler
    sigmas: Tensor
    image: Space
    cases: int
    draws: int
    seed: int
    device: torch.device
    dtype: torch.dtype
    on_nonfinite: str

    @classmethod
    def make(
        cls,
        problem: Problem | None,
        prior: Prior,
        sampler: Sampler | str | None,
        draws: int,
        seed: int | None,
        shape: Sequence[int] | Space | None,
        device: torch.device | str | None,
        dtype: torch.dtype,
        on_nonfinite: str,
    ) -> _Plan:
        """Resolve and check everything before any work."""
        from invdiff import samplers

        if isinstance(draws, bool) or not isinstance(draws, int) or draws < 1:
            raise InvdiffError(f"The number of draws must be an integer of at least 1, got {draws!r}.")
        if on_nonfinite not in ("mark", "raise"):
            raise InvdiffError(f"on_nonfinite is 'mark' or 'raise', not {on_nonfinite!r}.")
        if sampler is None:
            sampler = "dpmpp" if problem is None else "dds"
        if isinstance(sampler, str):
            sampler = samplers.get(sampler)
        if sampler.conditional and problem is None:
            raise InvdiffError(f"{sampler.name} needs a problem; heun, ddim and dpmpp draw from the prior alone.")
        where = _device(device)
        if problem is not None:
            problem = problem.to(where)
            bound = prior.adapt(problem).to(where)
            assert bound.codec is not None
            image = bound.codec.image
            pulled = problem.whiten().pullback(bound.codec)
            check_capabilities(sampler, pulled, bound)
        else:
            image = _image_space(prior, shape)
            pulled, bound = None, prior.bind(image, 1.0 if prior.scale is None else prior.scale).to(where)
        return cls(
            problem=problem,
            pulled=pulled,
            prior=bound,
            sampler=sampler,
            sigmas=sampler.sigmas(bound).to(torch.float64),
            image=image,
            cases=1 if problem is None else problem.n_cases,
            draws=draws,
            seed=resolve_seed(seed),
            device=where,
            dtype=dtype,
            on_nonfinite=on_nonfinite,
        )

    @property
    def codec(self) -> Codec:
        """The bound prior's codec."""
        assert self.prior.codec is not None
        return self.prior.codec

    @property
    def canvas(self) -> Space:
        """Space of the state, in prior coordinates."""
        return self.codec.prior

    @property
    def rows(self) -> int:
        """Number of draws in all."""
        return self.cases * self.draws

    @property
    def unit(self) -> int:
        """Rows that must stay together: an ensemble is never split."""
        return self.draws if self.sampler.kind == "ensemble" else 1

    def key(self, row: int) -> tuple[int, int]:
        """Return ``(case, draw)`` of a row."""
        return divmod(row, self.draws)

    def config(self) -> dict[str, Any]:
        """Everything that determines the draws, JSON-able."""
        return {
            "sampler": self.sampler.describe(),
            "prior": self.prior.describe(),
            "problem": None if self.problem is None else self.problem.describe(),
            "image": str(self.image),
            "draws": self.draws,
            "cases": self.cases,
            "seed": self.seed,
            "rng": SCHEME,
            "dtype": str(self.dtype),
            "device": self.device.type,
            "torch": str(torch.__version__),
        }

    def context(self, first: int, count: int) -> tuple[Context, Streams, Counts]:
        """Return what rows ``[first, first + count)`` need: context, random streams, counters."""
        counts = Counts()
        keys = [self.key(r) for r in range(first, first + count)]
        index = torch.tensor([c for c, _ in keys])
        problem = None if self.pulled is None else count_operator(self.pulled.rows(index), counts)
        context = Context(
            denoise=CountedDenoiser(self.prior.denoiser, counts),
            problem=problem,
            sigmas=self.sigmas,
            space=self.canvas,
            dtype=self.dtype,
            device=self.device,
        )
        return context, Streams(self.seed, keys), counts


def check_capabilities(sampler: Sampler, problem: Problem, prior: Prior) -> None:
    """Refuse a sampler that needs structure the pulled-back problem or the prior does not have.

    Raises:
        CapabilityError: Naming what is missing and which samplers would do.
    """
    from invdiff import samplers

    have = problem.capabilities | ({"denoiser-vjp"} if prior.denoiser.differentiable >= 1 else set())
    missing = sorted(sampler.requires - have)
    if not missing:
        return
    words = {
        "linear": "a linear operator",
        "quadratic": "a likelihood with a Gaussian noise level",
        "vjp": "an operator with derivatives",
        "denoiser-vjp": "a prior that can be differentiated",
        "prox": "a closed-form prox",
        "svd": "a singular value decomposition",
        "pinv": "a closed-form pseudo-inverse",
    }
    would = [n for n, c in samplers.REGISTRY.items() if c.conditional and c.requires <= have]
    raise CapabilityError(
        f"{sampler.name} needs {' and '.join(words.get(m, m) for m in missing)}, which this problem "
        f"({problem.operator.name}, {problem.likelihood.name}) does not have; "
        + (f"samplers that would do: {', '.join(would)}." if would else "no sampler here would do.")
    )


@dataclass
class _Loop:
    """Chunks of rows, one after another, each from its first step to its last."""

    plan: _Plan
    keep: Checkpoint | None
    callbacks: list[Callback]
    max_batch: int | None
    every_s: float
    budget_s: float | None
    chunks: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    files: list[tuple[int, Path]] = field(default_factory=list)
    batch: int = 0

    def run(self) -> Literal["complete", "stopped"]:
        """Run all chunks; return whether every draw was made."""
        plan = self.plan
        self.batch = self.max_batch or memory.start_batch(plan.canvas, plan.rows, plan.device)
        self.start = time.monotonic()
        todo = self._restore()
        info = RunInfo(plan.sampler.name, plan.rows, len(plan.sigmas) - 1, str(plan.device), self._done)
        for callback in self.callbacks:
            callback.on_start(info)
        try:
            return self._chunks(todo)
        finally:
            for callback in self.callbacks:
                callback.on_end()

    def _restore(self) -> list[tuple[int, int]]:
        """Read finished chunks; return the stretches of rows still to do."""
        done: set[int] = set()
        for first, count, path in self.keep.finished() if self.keep else []:
            self.files.append((first, path))
            done |= set(range(first, first + count))
        self._done = len(done)
        rest = [r for r in range(self.plan.rows) if r not in done]
        stretches: list[tuple[int, int]] = []
        for r in rest:
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
                if self.budget_s is not None and time.monotonic() - self.start > self.budget_s and self._done:
                    return "stopped"
                size = min(stop - first, max(unit, self.batch // unit * unit))
                pending = self.keep.load_state() if self.keep else None
                if pending and pending[0] == first and pending[1] <= stop - first:
                    size = pending[1]
                finished = self._attempt(first, size, pending)
                if finished is None:
                    return "stopped"
                if finished:
                    first += size
                    self._done += size
                    for callback in self.callbacks:
                        callback.on_chunk(size)
        return "complete"

    def _attempt(self, first: int, count: int, pending: Any) -> bool | None:
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
        memory.release(self.plan.device)
        if count <= self.plan.unit:
            where = self.plan.device
            raise InvdiffError(f"Not enough memory on {where} for {count} row(s) of {self.plan.canvas}: {text}")
        self.batch = max(self.plan.unit, count // 2)
        for callback in self.callbacks:
            callback.on_chunk(0, restarted=True)
        return False

    @torch.no_grad()
    def _chunk(self, first: int, count: int, pending: Any) -> bool | None:
        plan = self.plan
        ctx, rng, counts = plan.context(first, count)
        begun = saved = time.monotonic()
        if pending and pending[:2] == (first, count):
            k0 = pending[2]
            state = {key: v.to(plan.device) for key, v in pending[3].items()}
            extra = pending[4]
            counts.nfe, counts.vjp, counts.noe = int(extra["nfe"]), int(extra["vjp"]), int(extra["noe"])
            begun -= extra["wall"]
        else:
            k0, state = 0, plan.sampler.init(ctx, count, rng.at(INIT))
        for k in range(k0, len(plan.sigmas) - 1):
            if self.keep and (time.monotonic() - saved >= self.every_s):
                saved = time.monotonic()
                extra = {"nfe": counts.nfe, "vjp": counts.vjp, "noe": counts.noe, "wall": saved - begun}
                self.keep.save_state(first, count, k, state, extra)
            state = plan.sampler.step(k, state, ctx, rng.at(k))
            self._guard(state, k, rng)
            if self._report(k, state, ctx, rng):
                return None
        self._store(first, state, ctx, rng, counts, time.monotonic() - begun)
        return True

    def _guard(self, state: State, k: int, rng: Streams) -> None:
        if self.plan.on_nonfinite == "raise":
            bad = ~_finite_rows(state)
            if bool(bad.any()):
                case, draw = rng.keys[int(bad.nonzero()[0])]
                raise NonFiniteError(
                    f"Draw {draw} of case {case} became NaN or infinite at step {k + 1} of "
                    f"{len(self.plan.sigmas) - 1} ({self.plan.sampler.name}); {_ADVICE}."
                )

    def _report(self, k: int, state: State, ctx: Context, rng: Streams) -> bool:
        s, t = ctx.level(k)
        info = StepInfo(k, len(ctx.sigmas) - 1, s, t, rng.keys, state, ctx, time.monotonic() - self.start)
        asked = [callback.on_step(info) for callback in self.callbacks]
        return any(asked)

    def _store(self, first: int, state: State, ctx: Context, rng: Streams, counts: Counts, wall: float) -> None:
        plan = self.plan
        u = plan.sampler.finish(state, ctx)
        finite = _finite_rows({"u": u})
        rows = u.shape[0]
        nan = torch.full((rows,), float("nan"), dtype=torch.float64)
        result = {"log_likelihood": nan, "residual_norm": nan.clone()}
        nfe, vjp, noe = counts.nfe, counts.vjp, counts.noe
        index = torch.tensor([c for c, _ in rng.keys])
        if plan.pulled is not None:
            problem = plan.pulled.rows(index)
            result["log_likelihood"] = problem.log_likelihood(u).double().cpu()
            result["residual_norm"] = norm(problem.residual(u)).double().cpu()
        codec = plan.codec.rows(index)
        x = codec.decode(u.to(codec.prior.dtype)).cpu()
        if bool((~finite).any()):
            warnings.warn(
                f"{int((~finite).sum())} of {rows} draws became NaN or infinite and are flagged.", stacklevel=5
            )
        result |= {
            "x": x,
            "nfe": torch.full((rows,), nfe),
            "vjp": torch.full((rows,), vjp),
            "noe": torch.full((rows,), noe),
            "wall_s": torch.full((rows,), wall / rows, dtype=torch.float64),
            "ok": finite.cpu().to(torch.uint8),
        }
        if "log_weight" in state:
            result["log_weight"] = state["log_weight"].double().cpu()
        if self.keep is not None:
            self.files.append((first, self.keep.save_chunk(first, result)))
        else:
            self.chunks[first] = result


def _finish(plan: _Plan, loop: _Loop, status: Any, store: str | Path | None, title: str) -> Posterior:
    """Gather draws and statistics and hand them to the posterior."""
    from invdiff.io.store import build_tree, write_run
    from invdiff.posterior import Posterior, open_posterior
    from invdiff.run import FileDraws, MemoryDraws, Run

    stats = _stats(plan, loop)
    ok = stats["status"] == "ok"
    if not ok.any():
        made = (stats["status"] == "nan").sum()
        raise NonFiniteError(
            f"None of the draws is usable ({made} became NaN or infinite with {plan.sampler.name}, "
            f"{ok.size - made} were not made); {_ADVICE}."
        )
    shape = (plan.cases, plan.draws, *plan.image.shape)
    source: Any
    if loop.keep is not None:
        source = FileDraws(loop.files, plan.cases, plan.draws, plan.image)
    else:
        like = next(iter(loop.chunks.values()))["x"]
        flat = torch.full((plan.rows, *plan.image.shape), float("nan"), dtype=like.dtype)
        for first, chunk in loop.chunks.items():
            flat[first : first + chunk["x"].shape[0]] = chunk["x"]
        source = MemoryDraws(flat.numpy().reshape(shape))
    problem = plan.problem
    run = Run(
        space=plan.image,
        kind=plan.sampler.kind,
        draws=source,
        stats=stats,
        observed={} if problem is None else _observed(problem),
        range_space=None if problem is None else problem.operator.range,
        x_true=None if problem is None or problem.x_true is None else problem.x_true.cpu().numpy(),
        provenance=_provenance(plan, loop),
        title=title or f"{plan.sampler.title} with prior {plan.prior.name}",
        status=status,
    )
    if store is None:
        return Posterior(build_tree(run))
    write_run(run, store)
    return open_posterior(store)


def _stats(plan: _Plan, loop: _Loop) -> dict[str, np.ndarray]:
    names = ("nfe", "vjp", "noe", "wall_s", "log_likelihood", "residual_norm", "log_weight")
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
                    out[name] = np.full(plan.rows, empty, dtype=values.dtype)
                out[name][first : first + count] = values
    out["status"] = status
    return {k: v.reshape(plan.cases, plan.draws) for k, v in out.items()}


def _read(path: Path, names: Sequence[str]) -> dict[str, Tensor]:
    """Read some tensors of a chunk, leaving the draws on disk."""
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        return {name: file.get_tensor(name) for name in set(names) & set(file.keys())}


def _observed(problem: Problem) -> dict[str, np.ndarray]:
    observed = {"y": problem.y.cpu().numpy()}
    mask = getattr(problem.operator, "mask", None)
    if isinstance(mask, Tensor):
        observed["mask"] = mask.cpu().numpy()
    sigma = getattr(problem.likelihood, "sigma", None)
    if isinstance(sigma, Tensor):
        observed["sigma"] = sigma.cpu().numpy()
    return observed


def _provenance(plan: _Plan, loop: _Loop) -> dict[str, Any]:
    from invdiff import __version__

    config = plan.config()
    return {
        "invdiff_version": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "sampler_kind": plan.sampler.kind,
        "sampler_exactness": plan.sampler.exactness,
        "device_name": torch.cuda.get_device_name(plan.device)
        if plan.device.type == "cuda"
        else platform.processor(),
        "precision": f"state {plan.dtype}, network {plan.prior.denoiser.dtype}",
        "max_batch": loop.batch,
        "command": " ".join(Path(a).name if "/" in a else a for a in sys.argv),
        **{k: v for k, v in config.items() if k not in ("image",)},
    }


def _finite_rows(state: State) -> Tensor:
    ok: Tensor | None = None
    for value in state.values():
        rows = torch.isfinite(value).flatten(1).all(1) if value.ndim > 1 else torch.isfinite(value)
        ok = rows if ok is None else ok & rows
    assert ok is not None
    return ok


def _device(device: torch.device | str | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        where = torch.device(device)
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as error:
        raise InvdiffError(f"Device {str(device)!r} cannot be used here; use 'cpu' or leave it out.") from error
    return where


def _image_space(prior: Prior, shape: Sequence[int] | Space | None) -> Space:
    if isinstance(shape, Space):
        return shape
    if prior.codec is not None:
        return prior.codec.image
    if shape is None:
        if prior.denoiser.space is None:
            raise InvdiffError(f"Prior {prior.name} serves any size; give shape=(height, width) to draw from it.")
        return prior.denoiser.space
    dtype = torch.complex64 if prior.card.get("complex") else torch.float32
    size = tuple(int(n) for n in shape)
    return Space((1, *size) if len(size) == 2 else size, dtype)


@contextmanager
def _quiet_numerics() -> Iterator[None]:
    """Full float32 precision on accelerators while a run lasts (reduced TF32 only where asked for elsewhere)."""
    matmul, conv = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, conv
