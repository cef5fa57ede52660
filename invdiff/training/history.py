"""How the error on held-out images fell in the course of training: a file of lines, continued by a resumed run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from invdiff.io.atomic import whole_file

__all__ = ["History", "plot_history"]


class History:
    """Entries of one JSON object per line, each with its ``step``.

    Args:
        path: The file, read where it exists.
        until: Steps beyond this one are forgotten, as a run that resumes there takes them again.

    Raises:
        ValueError: the file holds something else.
    """

    def __init__(self, path: Path, until: int) -> None:
        self.path = path
        self.entries: list[dict[str, Any]] = []
        if until and path.exists():
            try:
                found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
                self.entries = [entry for entry in found if int(entry["step"]) <= until]
            except (ValueError, TypeError, KeyError):
                raise ValueError(f"{path} is not a readable history of training; move it away.") from None

    def add(self, entry: dict[str, Any]) -> None:
        """Put an entry behind the others, in the place of one of the same step."""
        self.entries = [*(e for e in self.entries if e["step"] != entry["step"]), entry]
        with whole_file(self.path) as temporary:
            temporary.write_text("".join(json.dumps(e) + "\n" for e in self.entries), encoding="utf-8")


def plot_history(entries: list[dict[str, Any]], path: Path) -> None:
    """Write a PNG of the error at a few noise levels, relative to the level, against the step."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    levels = entries[-1]["sigma"]
    steps = [e["step"] for e in entries]
    for k in range(0, len(levels), 2):
        relative = [e["rmse"][k] / levels[k] for e in entries]
        axes.semilogy(steps, relative, "o-", markersize=3, label=f"sigma {levels[k]:g}")
    axes.set_xlabel("step")
    axes.set_ylabel("RMSE / sigma on held-out images")
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3, which="both")
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
