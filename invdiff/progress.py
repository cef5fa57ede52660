"""Progress: a rich bar in a terminal, one quiet line in a notebook, silence in pipes."""

from __future__ import annotations

import sys
import time
from typing import Any

from invdiff.callbacks import Callback, RunInfo, StepInfo


def auto(progress: bool | None) -> Callback | None:
    """Return the bar that fits where the program runs, or None for silence.

    Args:
        progress: None decides by the output, False is silence, True asks for a bar even in a pipe.
    """
    if progress is False:
        return None
    if _in_notebook():
        return NotebookProgress()
    if progress or sys.stderr.isatty():
        return TerminalProgress()
    return None


class TerminalProgress(Callback):
    """A rich bar on standard error: draws done, step, noise level, time left."""

    def on_start(self, run: RunInfo) -> None:
        """Open the bar."""
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self.run = run
        self.finished = run.done_rows
        self.bar = Progress(
            TextColumn(f"[bold]{run.sampler}"),
            BarColumn(),
            TextColumn("{task.fields[draws]}  sigma {task.fields[sigma]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self.task = self.bar.add_task(
            "", total=run.rows * run.steps, completed=run.done_rows * run.steps, draws=self._draws(), sigma="-"
        )
        self.bar.start()

    def on_step(self, info: StepInfo) -> bool | None:
        """Advance."""
        done = self.finished * info.steps + (info.k + 1) * len(info.rows)
        self.bar.update(self.task, completed=done, draws=self._draws(), sigma=f"{info.sigma:.3g}")
        return None

    def on_chunk(self, rows: int, restarted: bool = False) -> None:
        """Count finished draws."""
        self.finished += 0 if restarted else rows
        self.bar.update(self.task, completed=self.finished * self.run.steps, draws=self._draws())

    def on_end(self) -> None:
        """Close the bar."""
        self.bar.stop()

    def _draws(self) -> str:
        return f"{self.finished}/{self.run.rows} draws"


class NotebookProgress(Callback):
    """One line that is updated in place at most twice a second, and removed at the end."""

    def on_start(self, run: RunInfo) -> None:
        """Show the line."""
        self.run, self.finished, self.last = run, run.done_rows, 0.0
        self.handle = self._display("starting")

    def on_step(self, info: StepInfo) -> bool | None:
        """Update the line."""
        if time.monotonic() - self.last > 0.5:
            self.last = time.monotonic()
            text = f"{self.finished}/{self.run.rows} draws, step {info.k + 1}/{info.steps}, {info.elapsed:.0f} s"
            self.handle.update({"text/plain": f"{self.run.sampler}: {text}"}, raw=True)
        return None

    def on_chunk(self, rows: int, restarted: bool = False) -> None:
        """Count finished draws."""
        self.finished += 0 if restarted else rows

    def on_end(self) -> None:
        """Leave a short record."""
        text = f"{self.run.sampler}: {self.finished}/{self.run.rows} draws"
        self.handle.update({"text/plain": text}, raw=True)

    def _display(self, text: str) -> Any:
        from IPython.display import display

        return display({"text/plain": f"{self.run.sampler}: {text}"}, raw=True, display_id=True)


def _in_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    if ipython is None:
        return False
    shell = ipython.get_ipython()
    return shell is not None and type(shell).__name__ == "ZMQInteractiveShell"
