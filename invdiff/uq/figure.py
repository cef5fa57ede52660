"""Picture of a diagnosis: how far each test's distribution function is from that of uniform numbers."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

import numpy as np

from invdiff.uq.uniformity import band, ecdf

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from invdiff.uq.diagnosis import Diagnosis

_COLUMNS = 4
_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#555555"


def diagnosis_figure(diagnosis: Diagnosis) -> Figure:
    """Return one panel per test: empirical distribution function minus the diagonal, and its simultaneous band.

    The band has the level of the first step of Holm's method: a line that leaves it rejects, and one that stays
    inside rejects only where others do too.
    """
    from matplotlib.figure import Figure

    checks = [c for c in diagnosis.checks if len(c.u)]
    rows = -(-len(checks) // _COLUMNS)
    figure = Figure(figsize=(3.1 * _COLUMNS, 2.1 * rows + 0.6), layout="constrained")
    word = "nothing speaks against these draws" if diagnosis.accepted else "these are NOT exact posterior draws"
    figure.suptitle(f"{word}: {diagnosis.n_cases} cases of {diagnosis.n_draws} draws, level {diagnosis.level:.0%}")
    panels = figure.subplots(rows, _COLUMNS, sharex=True, squeeze=False)
    for axes, check in zip(panels.flat, checks):
        held = band(len(check.u), 1 - diagnosis.level / len(diagnosis.checks))
        z = np.concatenate([[0], held.z, [1]])
        lower, upper, found = (
            np.concatenate([[0], v - held.z, [0]]) for v in (held.lower, held.upper, ecdf(check.u, held.z))
        )
        axes.fill_between(z, lower, upper, color=_GREY, alpha=0.2, linewidth=0)
        axes.axhline(0, color=_GREY, linewidth=0.6)
        axes.plot(z, found, color=_ORANGE if check.rejected else _BLUE, linewidth=1.3)
        title = f"{check.name}: {check.finding}" if check.rejected else check.name
        axes.set_title("\n".join(textwrap.wrap(title, 36)), fontsize=8)
        axes.tick_params(labelsize=7)
    for axes in panels.flat[len(checks) :]:
        axes.set_visible(False)
    figure.supxlabel("place of the truth (or of the data) among exact ones", fontsize=8)
    figure.supylabel("share below, minus that of uniform ones", fontsize=8)
    return figure
