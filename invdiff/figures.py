"""Pictures of a posterior: one figure that says what is known and how well.

Everything is drawn on `matplotlib.figure.Figure` objects, without pyplot and its global state. Complex images are
shown as magnitudes. Maps are grey for images and viridis for spreads, both readable without colour vision.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from invdiff.errors import InvdiffError, StoreError
from invdiff.html import operator_html, posterior_html, prior_html, problem_html
from invdiff.io.atomic import whole_file

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from invdiff.posterior import Posterior

__all__ = [
    "operator_html",
    "png_bytes",
    "posterior_html",
    "prior_html",
    "problem_html",
    "save_png",
    "summary_figure",
]

_MAX_ROWS = 4
_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#555555"


@dataclass(frozen=True)
class Panel:
    """One quantity to show: an image, a spread, or an error, with dims ``(*image)``."""

    title: str
    values: xr.DataArray
    role: Literal["image", "spread", "width"]


@dataclass(frozen=True)
class Row:
    """One view of the image: a channel or a plane, by name."""

    label: str
    at: dict[str, int]


def summary_figure(posterior: Posterior, case: int = 0) -> Figure:
    """Return mean, standard deviation, width of the 90 % interval, two draws, and truth and error where known.

    Images share one grey scale per row. Several channels get a row each (at most four); volumes get their three
    middle planes; signals get lines with a band.

    Args:
        posterior: What to show; a point estimate is shown without any spread.
        case: Which case, where there are several.

    Raises:
        InvdiffError: If there is no such case.
    """
    if not 0 <= case < posterior.n_cases:
        raise InvdiffError(f"There is no case {case}; the posterior has cases 0 to {posterior.n_cases - 1}.")
    panels = panels_of(posterior, case)
    first = panels[0].values
    space = [str(d) for d in first.dims if d != "channel"]
    figure = _new_figure()
    if len(space) < 2:
        _draw_lines(figure, panels, posterior, case)
    else:
        _draw_images(figure, panels, _rows(first, space))
    title = posterior.title + (f" (case {case})" if posterior.n_cases > 1 else "")
    caption = _caption(posterior, case)
    if posterior.width_warning:
        letters = int(13 * figure.get_figwidth())  # that fit into a line of this size
        caption += "\n" + textwrap.fill(f"Caution: {posterior.width_warning}", max(letters, 40))
    figure.suptitle(f"{title}\n{caption}", fontsize=10, parse_math=False)
    return figure


def save_png(figure: Figure, path: str | Path, dpi: int = 150) -> Path:
    """Write a figure as PNG, atomically: the whole file or nothing.

    Raises:
        StoreError: If the file cannot be written.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise StoreError(f"The folder {path.parent} does not exist; create it first.")
    try:
        with whole_file(path) as temporary:
            temporary.write_bytes(png_bytes(figure, dpi))
    except OSError as error:
        raise StoreError(f"{path} could not be written ({error.strerror}); nothing was left behind.") from error
    return path


def png_bytes(figure: Figure, dpi: int = 150) -> bytes:
    """Render a figure as PNG."""
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def _new_figure() -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    return Figure(layout=ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06))


def panels_of(posterior: Posterior, case: int) -> list[Panel]:
    """Collect what there is to show, in magnitudes for complex images."""
    of = " of |x|" if posterior.is_complex else ""
    truth = None if posterior.x_true is None else _view(posterior.x_true, case)
    if posterior.kind == "point":
        centre = _view(posterior.estimate, case)
        panels = [Panel("point estimate", centre, "image")]
    else:
        centre = _view(posterior.mean(magnitude=True), case)
        panels = [Panel(f"mean{of}", centre, "image")]
        panels += _spreads(posterior, case, of)
    if truth is not None:
        panels.append(Panel("|mean - truth|" if len(panels) > 1 else "|error|", abs(centre - truth), "spread"))
    if posterior.kind != "point":
        panels += [Panel(f"draw {s}", _draw(posterior, case, s), "image") for s in _usable(posterior, case)[:2]]
    if truth is not None:
        panels.append(Panel("truth", truth, "image"))
    return panels


def _spreads(posterior: Posterior, case: int, of: str) -> list[Panel]:
    if len(_usable(posterior, case)) < 2:
        return []
    interval = posterior.interval(0.9)
    width = (interval["upper"] - interval["lower"]).assign_attrs(interval["upper"].attrs)
    return [
        Panel(f"standard deviation{of}", _view(posterior.std(magnitude=True), case), "spread"),
        Panel(f"width of the 90 % interval{of}", _view(width, case), "width"),
    ]


def _usable(posterior: Posterior, case: int) -> list[int]:
    status = posterior.stats["status"]
    status = status.isel(case=case) if "case" in status.dims else status
    return [int(s) for s in np.flatnonzero(status.values == "ok")]


def _draw(posterior: Posterior, case: int, draw: int) -> xr.DataArray:
    """Read one draw only, whatever the size of the rest."""
    from invdiff.posterior import TreeDraws

    x = TreeDraws(posterior).get(case, draw)
    like = _view(posterior.mean(magnitude=True), case)
    return like.copy(data=np.abs(x) if posterior.is_complex else x)


def _view(values: xr.DataArray, case: int) -> xr.DataArray:
    """One case, first restart, magnitude of complex numbers."""
    for dim, index in (("case", case), ("restart", 0)):
        if dim in values.dims:
            values = values.isel({dim: index}, drop=True)
    return abs(values).assign_attrs(values.attrs) if np.iscomplexobj(values) else values


def _rows(first: xr.DataArray, space: list[str]) -> list[Row]:
    """Views to show: planes of volumes (first channel), else channels."""
    middle = {d: first.sizes[d] // 2 for d in space}
    extra = {d: middle[d] for d in space[:-3]}
    if len(space) > 2:
        if "channel" in first.dims:
            extra["channel"] = 0
        return [Row(f"{d} = {_where(first, d, middle[d])}", {**extra, d: middle[d]}) for d in space[-3:]]
    if "channel" not in first.dims:
        return [Row("", {})]
    n = first.sizes["channel"]
    return [Row(f"channel {c}" if n > 1 else "", {"channel": c}) for c in range(min(n, _MAX_ROWS))]


def _where(values: xr.DataArray, dim: str, index: int) -> str:
    units = values[dim].attrs.get("units", "1") if dim in values.coords else "1"
    return f"{float(values[dim][index]):g} {units}" if units != "1" else f"{index}"


def _draw_images(figure: Figure, panels: list[Panel], rows: list[Row]) -> None:
    """Fold the panels of a single view into two lines; otherwise one line per view."""
    if len(rows) == 1 and len(panels) > 3:
        top = [p for p in panels if p.role != "image" or p is panels[0]]
        lines = [(rows[0], top), (rows[0], [p for p in panels if p not in top])]
    else:
        lines = [(row, panels) for row in rows]
    columns = max(len(line) for _, line in lines)
    ratio = float(np.mean([_height(panels[0].values.isel(row.at)) for row, _ in lines]))
    figure.set_size_inches(2.75 * columns + 0.4, (2.1 * min(max(ratio, 0.3), 2.5) + 0.55) * len(lines) + 0.7)
    grid = figure.add_gridspec(len(lines), columns)
    for i, (row, line) in enumerate(lines):
        limits = (
            _limits([p for p in panels if p.role == "image"], row),
            _limits([p for p in panels if p.role == "spread"], row, zero=True),
        )
        for j, panel in enumerate(line):
            axes = figure.add_subplot(grid[i, j])
            low, high = {"image": limits[0], "spread": limits[1]}.get(panel.role, _limits([panel], row, zero=True))
            _show(axes, panel, row, low, high, first=j == 0, last=_is_bottom(lines, i, j))


def _is_bottom(lines: list[tuple[Row, list[Panel]]], i: int, j: int) -> bool:
    """Whether the horizontal axis needs its numbers: nothing below, or something with another axis."""
    if i + 1 == len(lines) or j >= len(lines[i + 1][1]):
        return True
    here, below = (lines[k][1][j].values.isel(lines[k][0].at).dims[-1] for k in (i, i + 1))
    return here != below


def _height(plane: xr.DataArray) -> float:
    left, right, bottom, top = _extent(plane)
    return abs(bottom - top) / abs(right - left) if _same_units(plane) else 1.0


def _limits(panels: list[Panel], row: Row, zero: bool = False) -> tuple[float, float]:
    """Common limits: 0.2 to 99.8 % of all values; from zero for magnitudes and spreads."""
    values = [p.values.isel(row.at).values.ravel() for p in panels]
    joined = np.concatenate([v[np.isfinite(v)] for v in values]) if values else np.zeros(0)
    if not joined.size:
        return 0.0, 1.0
    low, high = (float(q) for q in np.percentile(joined, [0.2, 99.8]))
    low = 0.0 if zero or joined.min() >= 0 else low
    return (low, high) if high > low else (low, low + 1.0)


def _show(axes: Axes, panel: Panel, row: Row, low: float, high: float, first: bool, last: bool) -> None:
    plane = panel.values.isel(row.at)
    image = axes.imshow(
        plane.values,
        cmap="gray" if panel.role == "image" else "viridis",
        vmin=low,
        vmax=high,
        extent=_extent(plane),
        aspect="equal" if _same_units(plane) else "auto",
        interpolation="nearest",
    )
    axes.set_title(panel.title, fontsize=8)
    axes.tick_params(labelsize=6, length=2, labelleft=first, labelbottom=last)
    vertical, horizontal = (_axis_name(plane, str(d)) for d in plane.dims)
    if first:
        axes.set_ylabel(f"{row.label}\n{vertical}" if row.label else vertical, fontsize=7)
    if last:
        axes.set_xlabel(horizontal, fontsize=7)
    bar = axes.figure.colorbar(image, cax=axes.inset_axes((1.03, 0.0, 0.045, 1.0)))
    bar.ax.tick_params(labelsize=6, length=2)
    bar.ax.yaxis.get_offset_text().set_fontsize(6)
    units = str(panel.values.attrs.get("units", "1"))
    if units != "1":
        bar.set_label(units, fontsize=7)


def _axis_name(plane: xr.DataArray, dim: str) -> str:
    units = str(plane[dim].attrs.get("units", "1")) if dim in plane.coords else "1"
    return f"{dim} ({'pixel' if units == '1' else units})"


def _same_units(plane: xr.DataArray) -> bool:
    units = {str(plane[d].attrs.get("units", "1")) if d in plane.coords else "1" for d in plane.dims}
    return len(units) == 1


def _extent(plane: xr.DataArray) -> tuple[float, float, float, float]:
    edges = []
    for dim in plane.dims:
        at = plane[dim].values.astype(float) if dim in plane.coords else np.arange(plane.sizes[dim], dtype=float)
        half = (at[1] - at[0]) / 2 if len(at) > 1 else 0.5
        edges.append((float(at[0] - half), float(at[-1] + half)))
    (top, bottom), (left, right) = edges
    return left, right, bottom, top


def _draw_lines(figure: Figure, panels: list[Panel], posterior: Posterior, case: int) -> None:
    """Signals: mean with a 90 % band and two draws above, spread (and error) below; one column per channel."""
    first = panels[0].values
    views: list[dict[str, int]] = [{}]
    if "channel" in first.dims:
        views = [{"channel": c} for c in range(min(first.sizes["channel"], _MAX_ROWS))]
    _draw_line_views(figure, panels, views, _band(posterior, case))


def _band(posterior: Posterior, case: int) -> tuple[xr.DataArray, xr.DataArray] | None:
    if posterior.kind == "point" or len(_usable(posterior, case)) < 2:
        return None
    interval = posterior.interval(0.9)
    return _view(interval["lower"], case), _view(interval["upper"], case)


def _draw_line_views(
    figure: Figure,
    panels: list[Panel],
    views: list[dict[str, int]],
    band: tuple[xr.DataArray, xr.DataArray] | None,
) -> None:
    spreads = [p for p in panels if p.role == "spread"]
    figure.set_size_inches(6.5 + 2.5 * (len(views) - 1), 4.8 if spreads else 3.4)
    heights = [2.2, 1.0] if spreads else [1.0]
    grid = figure.subplots(len(heights), len(views), sharex=True, squeeze=False, height_ratios=heights)
    for j, at in enumerate(views):
        _signal(grid[0, j], [p for p in panels if p.role == "image"], at, band)
        if spreads:
            for panel, colour in zip(spreads, (_BLUE, _ORANGE)):
                _line(grid[1, j], panel, at, color=colour, linewidth=1.0)
            grid[1, j].set_ylim(0, 1.3 * grid[1, j].get_ylim()[1])
            grid[1, j].legend(fontsize=6, frameon=False, ncols=2, loc="upper right")
        if len(views) > 1:
            grid[0, j].set_title(f"channel {at['channel']}", fontsize=8)
        dim = str(panels[0].values.isel(at).dims[0])
        grid[-1, j].set_xlabel(_signal_axis(panels[0].values, dim), fontsize=8)
    for axes in grid.ravel():
        axes.tick_params(labelsize=7)
        axes.margins(x=0)
    units = str(panels[0].values.attrs.get("units", "1"))
    grid[0, 0].set_ylabel("value" if units == "1" else f"value ({units})", fontsize=8)
    if spreads:
        grid[1, 0].set_ylabel("spread" if units == "1" else f"spread ({units})", fontsize=8)


def _signal_axis(values: xr.DataArray, dim: str) -> str:
    units = str(values[dim].attrs.get("units", "1")) if dim in values.coords else "1"
    return dim if units == "1" else f"{dim} ({units})"


def _signal(
    axes: Axes, images: list[Panel], at: dict[str, int], band: tuple[xr.DataArray, xr.DataArray] | None
) -> None:
    at_x = _positions(images[0].values.isel(at))
    if band is not None:
        lower, upper = (b.isel(at).values for b in band)
        axes.fill_between(at_x, lower, upper, color=_BLUE, alpha=0.22, linewidth=0, label="90 % interval")
    for panel in images[1:]:
        if panel.title == "truth":
            _line(axes, panel, at, color="black", linewidth=1.0, linestyle="--", zorder=4)
        else:
            _line(axes, panel, at, color=_GREY, linewidth=0.6, alpha=0.8)
    _line(axes, images[0], at, color=_BLUE, linewidth=1.6, zorder=3)
    axes.legend(fontsize=6, frameon=False, ncols=3, loc="best")


def _line(axes: Axes, panel: Panel, at: dict[str, int], **style: Any) -> None:
    values = panel.values.isel(at)
    axes.plot(_positions(values), values.values, label=panel.title, **style)


def _positions(values: xr.DataArray) -> np.ndarray:
    dim = values.dims[0]
    return values[dim].values if dim in values.coords else np.arange(values.sizes[dim])


def _caption(posterior: Posterior, case: int) -> str:
    """Sampler, prior, draws and seed in one line."""
    facts = posterior.facts()
    usable = 0
    parts = [facts[k] for k in ("sampler", "prior") if k in facts]
    if posterior.kind == "point":
        parts.append("point estimate, no uncertainty")
    else:
        usable = len(_usable(posterior, case))
        failed = posterior.n_draws - usable
        parts.append(f"{usable} draw{'s' if usable != 1 else ''}" + (f" ({failed} left out)" if failed else ""))
    if "seed" in facts:
        parts.append(f"seed {facts['seed']}")
    if posterior.kind != "point" and 2 <= usable < 19:
        parts.append(f"intervals end at the extreme draws, which stand for {(usable - 1) / (usable + 1):.0%}")
    return " · ".join(parts)
