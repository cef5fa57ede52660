"""The figure of a comparison: one row per sampler, one grey scale, one scale for spreads and errors."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

import numpy as np

from invdiff import figures
from invdiff.errors import InvdiffError
from invdiff.figures import Panel

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from invdiff.comparison import Comparison
    from invdiff.posterior import Posterior

_TITLES = {"mean": "mean", "draw": "one draw", "std": "standard deviation", "error": "|mean - truth|"}
_GREY = ("mean", "draw")
#: How many times the usual largest value the scale reaches.
_BEYOND = 1.5


def comparison_figure(comparison: Comparison, case: int = 0) -> Figure:
    """Return mean, one draw, standard deviation and (with a truth) error of every sampler that ran.

    Grey values are the same for all means and draws, colours for all spreads and errors. Volumes show their middle
    plane, images of several channels their first, signals lines with a band.

    Raises:
        InvdiffError: If there is no such case.
    """
    posteriors = comparison.posteriors
    cases = next(iter(posteriors.values())).n_cases
    if not 0 <= case < cases:
        raise InvdiffError(f"There is no case {case}; the comparison has cases 0 to {cases - 1}.")
    truth = next(iter(posteriors.values())).x_true
    true = None if truth is None else figures._view(truth, case)
    shown = {label: _quantities(p, true, case) for label, p in posteriors.items()}
    first = next(iter(shown.values()))["mean"]
    space = [str(d) for d in first.dims if d != "channel"]
    figure = figures._new_figure()
    if len(space) < 2:
        _lines(figure, posteriors, true, case)
    else:
        at = figures._rows(first, space)[0].at
        _images(figure, {k: {n: v.isel(at) for n, v in q.items()} for k, q in shown.items()}, true, at)
    title = comparison._title + (f" (case {case})" if cases > 1 else "")
    width = int(13 * figure.get_figwidth())
    figure.suptitle(textwrap.fill(title, width), fontsize=10, parse_math=False)
    return figure


def _quantities(posterior: Posterior, true: xr.DataArray | None, case: int) -> dict[str, xr.DataArray]:
    """Return what there is to show, in magnitudes for complex images."""
    usable = [] if posterior.kind == "point" else figures._usable(posterior, case)
    if posterior.kind == "point":
        out = {"mean": figures._view(posterior.estimate, case)}
    else:
        out = {"mean": figures._view(posterior.mean(magnitude=True), case)}
    if usable:
        out["draw"] = figures._draw(posterior, case, usable[0])
    if len(usable) > 1:
        out["std"] = figures._view(posterior.std(magnitude=True), case)
    if true is not None:
        out["error"] = abs(out["mean"] - true)
    return out


def _images(
    figure: Figure, shown: dict[str, dict[str, xr.DataArray]], true: xr.DataArray | None, at: dict[str, int]
) -> None:
    """Draw a grid of images; the truth, where known, in a row above the samplers."""
    names = [n for n in _TITLES if any(n in q for q in shown.values())]
    rows = {**({} if true is None else {"truth": {"mean": true.isel(at)}}), **shown}
    plane = next(iter(shown.values()))["mean"]
    ratio = min(max(figures._height(plane), 0.4), 2.0)
    figure.set_size_inches(1.9 * len(names) + 0.5, 1.75 * ratio * len(rows) + 1.3)
    grid = figure.subplots(len(rows), len(names), squeeze=False)
    limits = {True: _limits(rows, _GREY, zero=False), False: _limits(rows, ("std", "error"), zero=True)}
    drawn: dict[bool, object] = {}
    for i, (label, quantities) in enumerate(rows.items()):
        is_truth = true is not None and i == 0
        for j, name in enumerate(names):
            axes: Axes = grid[i, j]
            axes.set_xticks([])
            axes.set_yticks([])
            if name not in quantities:
                axes.set_axis_off()
                axes.text(
                    0.5, 0.5, "" if is_truth else "none", ha="center", va="center", fontsize=8, color="#555555"
                )
                continue
            grey = name in _GREY
            low, high, _ = limits[grey]
            drawn[grey] = axes.imshow(
                quantities[name].values,
                cmap="gray" if grey else "viridis",
                vmin=low,
                vmax=high,
                aspect="equal" if figures._same_units(plane) else "auto",
                extent=figures._extent(quantities[name]),
                interpolation="nearest",
            )
            if j == 0 and not is_truth:
                axes.set_ylabel(textwrap.fill(label, 16), fontsize=9)
    for j, name in enumerate(names):
        grid[0 if true is None else 1, j].set_title(_TITLES[name], fontsize=9)
    if true is not None:
        grid[0, 0].set_title("truth", fontsize=9)
    above = {grey: limit[2] for grey, limit in limits.items()}
    _bars(figure, grid, names, drawn, above, str(plane.attrs.get("units", "1")))


def _bars(
    figure: Figure,
    grid: np.ndarray,
    names: list[str],
    drawn: dict[bool, object],
    above: dict[bool, bool],
    units: str,
) -> None:
    """Put one colour bar below the grey columns and one below the others."""
    of = "" if units == "1" else f" ({units})"
    spread = " and ".join(word for name, word in (("std", "spread"), ("error", "error")) if name in names)
    for grey, label in ((True, f"image{of}"), (False, f"{spread}{of}")):
        if grey in drawn:
            columns = [j for j, n in enumerate(names) if (n in _GREY) == grey]
            bar = figure.colorbar(
                drawn[grey],  # type: ignore[arg-type]
                ax=list(grid[:, columns].ravel()),
                location="bottom",
                extend="max" if above[grey] else "neither",
                fraction=0.02,
                pad=0.01,
                aspect=18 * len(columns),
            )
            bar.ax.tick_params(labelsize=7, length=2)
            bar.set_label(label, fontsize=8)


def _limits(
    rows: dict[str, dict[str, xr.DataArray]], names: tuple[str, ...], zero: bool
) -> tuple[float, float, bool]:
    """Return common limits, and whether values lie above them: one that broke down must not hide all others."""
    one = figures.Row("", {})
    panels = [Panel(n, q[n], "image") for q in rows.values() for n in names if n in q]
    low, high = figures._limits(panels, one, zero=zero)
    tops = [figures._limits([p], one, zero=zero)[1] for p in panels]
    usual = low + _BEYOND * (float(np.median(tops)) - low) if tops else high
    return low, min(high, usual), high > usual


def _lines(figure: Figure, posteriors: dict[str, Posterior], true: xr.DataArray | None, case: int) -> None:
    """Draw signals: one axes per sampler with mean, band, one draw and truth."""
    figure.set_size_inches(7.0, 1.7 * len(posteriors) + 0.9)
    grid = figure.subplots(len(posteriors), 1, sharex=True, sharey=True, squeeze=False)
    for axes, (label, posterior) in zip(grid[:, 0], posteriors.items()):
        quantities = _quantities(posterior, true, case)
        at = {"channel": 0} if "channel" in quantities["mean"].dims else {}
        panels = [Panel("mean" if posterior.kind != "point" else "estimate", quantities["mean"], "image")]
        if "draw" in quantities:
            panels.append(Panel("one draw", quantities["draw"], "image"))
        if true is not None:
            panels.append(Panel("truth", true, "image"))
        figures._signal(axes, panels, at, figures._band(posterior, case))
        axes.set_title(label, fontsize=9, loc="left")
        axes.tick_params(labelsize=7)
        axes.margins(x=0)
    grid[-1, 0].set_xlabel(figures._signal_axis(quantities["mean"], str(quantities["mean"].dims[-1])), fontsize=8)
