"""The figure of a calibration: coverage by level, ranks with their band, spread against error."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

import numpy as np

from invdiff.uq.uniformity import band, ecdf

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from invdiff.calibration import Calibration

_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#555555"
#: Rejected tests that the panel of ranks names, worst first.
_NAMED = 3


def calibration_figure(found: Calibration) -> Figure:
    """Return three panels: coverage curve, distribution of ranks less the uniform one, spread against error."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.5, 4.0), layout="constrained")
    figure.suptitle(textwrap.fill(found._title, 120), fontsize=10, parse_math=False)
    panels = figure.subplots(1, 3)
    _coverage(panels[0], found)
    _ranks(panels[1], found)
    _spread(panels[2], found)
    for axes in panels:
        axes.tick_params(labelsize=7)
        axes.title.set_fontsize(9)
        for label in (axes.xaxis.label, axes.yaxis.label):
            label.set_fontsize(8)
    return figure


def _coverage(axes: Axes, found: Calibration) -> None:
    levels = np.array(list(found.coverage))
    mean, error = np.array(list(found.coverage.values())).T
    axes.plot([0, 1], [0, 1], color=_GREY, linewidth=0.6)
    axes.fill_between(levels, mean - 2 * error, mean + 2 * error, color=_BLUE, alpha=0.25, linewidth=0)
    axes.plot(levels, mean, color=_BLUE, linewidth=1.3, label="draws")
    at, (value, spread) = found.conformal.level, found.conformal_coverage
    axes.errorbar([at], [value], [2 * spread], color=_ORANGE, marker="o", markersize=4, label="conformal")
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", title="pixels inside central intervals, +- 2 s.e.")
    axes.set(xlabel="level", ylabel="share inside")
    axes.legend(fontsize=7, frameon=False, loc="upper left")


def _ranks(axes: Axes, found: Calibration) -> None:
    """Draw every test's line; each is held against the band of its own number of cases, the narrowest is shown."""
    checks = [c for c in found.diagnosis.checks if len(c.u)]
    held = band(max(len(c.u) for c in checks), 1 - found.diagnosis.level / len(found.diagnosis.checks))
    z = np.concatenate([[0], held.z, [1]])
    lower, upper = (np.concatenate([[0], v - held.z, [0]]) for v in (held.lower, held.upper))
    axes.fill_between(z, lower, upper, color=_GREY, alpha=0.2, linewidth=0)
    axes.axhline(0, color=_GREY, linewidth=0.6)
    worst = sorted((c for c in checks if c.rejected), key=lambda c: c.p_value)[:_NAMED]
    shades = dict(zip((c.name for c in worst), (_ORANGE, "#E69F00", "#CC79A7")))
    for check in checks:
        line = np.concatenate([[0], ecdf(check.u, held.z) - held.z, [0]])
        colour = shades.get(check.name, _ORANGE if check.rejected else _BLUE)
        said = f"{check.name}: {check.finding}" if check.name in shades else None
        axes.plot(z, line, color=colour, linewidth=1.3 if said else 0.6, alpha=1.0 if said else 0.6, label=said)
    axes.set(xlim=(0, 1), title="ranks of all tests, with the band of the level")
    axes.set(xlabel="place of the truth (or of the data)", ylabel="share below, minus uniform")
    if worst:
        axes.legend(fontsize=6, frameon=False)


def _spread(axes: Axes, found: Calibration) -> None:
    s = found.spread_skill
    top = 1.05 * float(max(s.bin_spread.max(), s.bin_error.max()))
    axes.plot([0, top], [0, top], color=_GREY, linewidth=0.6)
    axes.plot(s.bin_spread, s.bin_error, color=_BLUE, marker="o", markersize=3, linewidth=1)
    axes.set(xlim=(0, top), ylim=(0, top), aspect="equal")
    axes.set(title=f"spread over error {s.ratio:.3f}", xlabel="spread of the draws", ylabel="error of their mean")
