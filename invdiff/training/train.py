"""Training of a diffusion prior by denoising.

    loss = E_{x, sigma, eps}  lambda(sigma) || D(x + sigma eps, sigma) - x ||^2,
    lambda(sigma) = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2

with log(sigma) normal (mean ``p_mean``, standard deviation ``p_std``) for most images and uniform
over [sigma_min, sigma_max] for the rest (Karras et al., NeurIPS 2022, section 5; lambda gives every
noise level a unit-variance regression target).

Everything random at step n depends on (seed, n) only, so a resumed run needs no random state: it
repeats the very batches of an uninterrupted one and, on the same machine and number of threads,
ends with identical bits.
"""

from __future__ import annotations

import contextlib
import json
import math
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from invdiff.io.atomic import whole_file
from invdiff.training import card as cards
from invdiff.training.batches import Batches
from invdiff.training.config import TrainConfig
from invdiff.training.history import History, plot_history
from invdiff.training.processes import Processes, launched, process_group
from invdiff.training.source import Images, Report, Source
from invdiff.training.state import TrainState, learning_rate
from invdiff.training.validation import denoising_curve, plot_curve

__all__ = ["TrainResult", "train"]


@dataclass(frozen=True)
class TrainResult:
    """What a run left behind: ``interrupted`` runs have a checkpoint and continue on the next call."""

    weights: Path | None
    card: Path | None
    step: int
    interrupted: bool
    curve: dict[str, Any] | None


def train(
    config: TrainConfig,
    progress: Report | None = None,
    *,
    resume: bool = True,
    stop_at: int | None = None,
) -> TrainResult:
    """Train a prior; formula in the module docstring.

    Leaves in ``config.output``: ``checkpoint.safetensors`` (everything a resumed run needs),
    ``<name>.safetensors`` (averaged weights), ``<name>.json`` (card), ``<name>_denoising.json`` and
    ``.png`` (denoising curve on held-out images), ``<name>_history.jsonl`` and ``.png`` (that curve at every
    validation, with the running mean of the loss). Files appear by renaming, never half-written. On
    SIGINT or SIGTERM the current step ends, a checkpoint is written and the call returns.

    Started by torch's launcher (``torchrun --nproc-per-node 2 -m invdiff train ...``), several processes train
    together: `invdiff.training.processes`. A signal to one of them stops all after the same step. The first writes
    and reports; what the others return holds no files. Give a cache with synthetic images, or each draws its own.

    Args:
        config: all settings.
        progress: called with a dict whose ``event`` is ``"images"`` (done, count), ``"step"`` (step,
            steps, loss, learning_rate, seconds), ``"validated"`` (step, curve) or ``"exported"``
            (weights).
        resume: continue from the checkpoint in the output folder where there is one.
        stop_at: return after this step, as if interrupted.

    Returns:
        Where the weights and card are, the step reached, and whether the run was interrupted.

    Raises:
        ValueError: the settings or the data cannot be used.
        FloatingPointError: the loss is not finite.

    Reference:
        Karras, Aittala, Aila, Laine, NeurIPS 2022 (arXiv:2206.00364).
    """
    device = _device(config)
    threads = torch.get_num_threads()
    if config.threads > 0:
        torch.set_num_threads(config.threads)
    try:
        with process_group(device) as processes:
            report = progress if progress is not None and processes.first else lambda _: None
            source = Source(config, report)
            state = TrainState(config, device, source.classes, processes)
            run = _Run(config, state, Path(config.output), report)
            if resume and run.checkpoint.exists():
                state.load(run.checkpoint)
            elif processes.first:
                run.history.unlink(missing_ok=True)
            training, held_out = _split(source, processes)
            batches = Batches(training.images, config, training.labels, len(source.classes))
            with _stop_flag() as stop:
                return run.loop(batches, held_out, stop, stop_at)
    finally:
        torch.set_num_threads(threads)


@dataclass
class _Run:
    """The training loop, and what it leaves in the output folder."""

    config: TrainConfig
    state: TrainState
    output: Path
    report: Report

    @property
    def checkpoint(self) -> Path:
        """File of everything a resumed run needs."""
        return self.output / "checkpoint.safetensors"

    @property
    def history(self) -> Path:
        """File of the curves of all validations."""
        return self.output / f"{self.config.name}_history.jsonl"

    def loop(self, source: Batches, held_out: Images, stop: threading.Event, stop_at: int | None) -> TrainResult:
        """Take steps to the last one, or until told to stop."""
        config, state = self.config, self.state
        self.output.mkdir(parents=True, exist_ok=True)
        started = time.monotonic() - state.seconds
        curve = None
        while state.step < config.steps:
            # Asked of all, as a signal may reach one process only.
            if state.processes.total(stop.is_set()) or (stop_at is not None and state.step >= stop_at):
                self._save()
                return TrainResult(None, None, state.step, True, curve)
            loss = state.update(source.batch(state.step))
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"The loss is {loss} at step {state.step}; lower learning_rate (now {config.learning_rate})."
                )
            state.seconds = time.monotonic() - started
            self._report_step(loss)
            if state.step % config.checkpoint_every == 0:
                self._save()
            if state.step % config.validate_every == 0 and state.step < config.steps:
                curve = self._export(held_out, len(source.images)).curve
        self._save()
        return self._export(held_out, len(source.images))

    def _save(self) -> None:
        """Write the checkpoint; no process goes on, or ends, before it is there."""
        if self.state.processes.first:
            self.state.save(self.checkpoint)
        self.state.processes.total(0)

    def _report_step(self, loss: float) -> None:
        self.report(
            {
                "event": "step",
                "step": self.state.step,
                "steps": self.config.steps,
                "loss": loss,
                "smooth_loss": self.state.smooth,
                "learning_rate": learning_rate(self.config, self.state.step - 1),
                "seconds": self.state.seconds,
            }
        )

    def _export(self, held_out: Images, images: int) -> TrainResult:
        """Validate the averaged weights as they will be stored, and write weights, card and curve."""
        config, state = self.config, self.state
        if not state.processes.first:
            state.processes.total(0)
            return TrainResult(None, None, state.step, False, None)
        network = state.averaged()
        dtype = getattr(torch, config.export_dtype)
        stored = {k: v.to(dtype).cpu().contiguous() for k, v in network.state_dict().items()}
        network.load_state_dict(stored, strict=True)
        curve = denoising_curve(network, held_out.images, labels=held_out.labels)
        self.report({"event": "validated", "step": state.step, "curve": curve})
        weights, card = cards.write(
            self.output / f"{config.name}.safetensors",
            stored,
            cards.make(config.to_dict(), network, curve, state.step, state.seconds, images, state.classes),
        )
        with whole_file(self.output / f"{config.name}_denoising.json") as temporary:
            temporary.write_text(json.dumps({"step": state.step, **curve}, indent=1) + "\n", encoding="utf-8")
        plot_curve(curve, self.output / f"{config.name}_denoising.png")
        history = History(self.history, state.step)
        history.add({"step": state.step, "seconds": round(state.seconds), "loss": state.smooth, **curve})
        plot_history(history.entries, self.output / f"{config.name}_history.png")
        self.report({"event": "exported", "weights": str(weights)})
        state.processes.total(0)
        return TrainResult(weights, card, state.step, False, curve)


@contextlib.contextmanager
def _stop_flag() -> Iterator[threading.Event]:
    """Event that SIGINT or SIGTERM sets; signal handlers exist in the main thread only."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = {s: signal.signal(s, lambda *_: stop.set()) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _split(source: Source, processes: Processes) -> tuple[Images, Images]:
    """Training and held-out images; with a cache of synthetic ones, the first process draws for all."""
    if source.config.cache and not processes.first:
        processes.total(0)
    found = source.split()
    if source.config.cache and processes.first:
        processes.total(0)
    return found


def _device(config: TrainConfig) -> torch.device:
    wanted = config.device
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    _, count, local = launched()
    if wanted == "cuda" and count > 1:
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"There are {torch.cuda.device_count()} CUDA devices here, too few for the processes that were "
                "started; start one process per device, or use device = 'cpu'."
            )
        wanted = f"cuda:{local}"
    if wanted.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("device is 'cuda' but no CUDA device is available; use 'auto' or 'cpu'.")
    try:
        return torch.device(wanted)
    except RuntimeError:
        raise ValueError(f"device must be 'auto', 'cpu' or 'cuda'; got {config.device!r}.") from None
