"""What comes out of comparing samplers: a table, a figure, the posteriors, and files of them."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from invdiff import tables
from invdiff.errors import StoreError
from invdiff.honesty import measured
from invdiff.io.atomic import whole_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from invdiff.posterior import Posterior
    from invdiff.problem import Problem
    from invdiff.sampler import Sampler
    from invdiff.scoring import Scores
    from invdiff.withholding import Withheld


@dataclass(frozen=True, eq=False, repr=False)
class Entry:
    """One sampler of a comparison.

    Attributes:
        label: Name in the table.
        sampler: With its settings.
        posterior: What it made; None where it did not run.
        scores: Figures by name, see `invdiff.scoring`.
        asked: Draws asked for, per case.
        seconds: Wall time of all draws.
        note: Why it did not run, or what was warned of.
    """

    label: str
    sampler: Sampler
    posterior: Posterior | None
    scores: Scores
    asked: int
    seconds: float | None
    note: str

    def row(self) -> dict[str, Any]:
        """Return plain values; None where a figure does not exist."""
        known = None if self.sampler.kind == "point" else measured(self.sampler)
        stats = {} if self.posterior is None else _per_draw(self.posterior)
        return {
            "sampler": self.label,
            "name": self.sampler.name,
            "kind": self.sampler.kind,
            "settings": _settings(self.sampler),
            "ran": self.posterior is not None,
            "draws": stats.get("draws"),
            "asked": self.asked,
            **{key: self.scores.get(key) for key in SCORES},
            "nfe": stats.get("nfe"),
            "vjp": stats.get("vjp"),
            "seconds": self.seconds,
            "measured_bias": None if known is None else known.bias,
            "measured_width": None if known is None else known.width,
            "caution": None if known is None or not known.wrong_width else known.warning(),
            "note": self.note,
        }


#: Figures in the order of the table.
SCORES = (
    "prediction_error",
    "prediction_coverage",
    "prediction_level",
    "prediction_crps",
    "misfit",
    "width",
    "psnr",
    "nrmse",
    "coverage",
    "coverage_level",
    "crps",
)


@dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """Samplers side by side on one problem.

    Attributes:
        entries: One per sampler, in the order asked for.
        problem: The problem with all data.
        prior: Name of the prior.
        seed: Of everything random.
        withheld: What was set aside; None where all data were used.
        time_budget_s: Seconds allowed, if limited.
        remarks: What holds for all of them.
    """

    entries: tuple[Entry, ...]
    problem: Problem
    prior: str
    seed: int
    withheld: Withheld | None
    time_budget_s: float | None = None
    remarks: tuple[str, ...] = ()

    @property
    def posteriors(self) -> dict[str, Posterior]:
        """What each sampler made, by label; from the data that were not withheld."""
        return {e.label: e.posterior for e in self.entries if e.posterior is not None}

    def rows(self) -> list[dict[str, Any]]:
        """Return plain values, one dictionary per sampler; see `invdiff.scoring` for what the figures mean."""
        return [entry.row() for entry in self.entries]

    def __repr__(self) -> str:
        notes = [f"  {note}" for note in self.notes()]
        return "\n".join([self._title, "", tables.text(*self.table()), "", *notes]).rstrip()

    def _repr_html_(self) -> str:
        return tables.to_html(*self.table(), self.notes())

    def markdown(self) -> str:
        """Return title, table and notes as Markdown."""
        notes = "\n".join(f"* {note}" for note in self.notes())
        return f"# {self._title}\n\n{tables.markdown(*self.table())}\n\n{notes}\n"

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Return headers and cells; columns that no sampler has a figure for are left out."""
        rows = self.rows()
        shown = [(name, cell) for name, _, cell in COLUMNS if any(cell(r) != tables.NONE for r in rows)]
        cells = [[r["sampler"], *(cell(r) for _, cell in shown)] for r in rows]
        return ["sampler", *(name for name, _ in shown)], cells

    def notes(self) -> list[str]:
        """Return what stands below the table: remarks, notes on samplers, and what the columns mean."""
        rows = self.rows()
        out = [*self._about_data(), *self.remarks]
        out += [f"{r['sampler']}: {r['note']}" for r in rows if r["note"]]
        out += [f"{r['sampler']}: {r['caution']}" for r in rows if r["caution"] and r["ran"]]
        headers = self.table()[0]
        return out + [f"{name}: {about}." for name, about, _ in COLUMNS if name in headers and about]

    def figure(self, case: int = 0) -> Figure:
        """Return a figure with one row per sampler: mean, one draw, spread, and error where the truth is known."""
        from invdiff.comparing_figure import comparison_figure

        return comparison_figure(self, case)

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the images as plain values that JSON knows."""
        held = self.withheld
        return _plain(
            {
                "title": self._title,
                "prior": self.prior,
                "seed": self.seed,
                "time_budget_s": self.time_budget_s,
                "withheld": 0 if held is None else held.count,
                "withheld_share": 0.0 if held is None else held.share,
                "withheld_noise_share": None if held is None else self.noise_share,
                "remarks": list(self.remarks),
                "rows": self.rows(),
                "samplers": {e.label: e.sampler.describe() for e in self.entries},
                "columns": {name: about for name, about, _ in COLUMNS if about},
            }
        )

    def save(self, folder: str | Path, stem: str = "compare") -> list[Path]:
        """Write table and figure as ``.md``, ``.csv``, ``.json`` and ``.png``, each whole or not at all.

        Everything is made before the first file is written; the folder is made where its parent exists.

        Raises:
            StoreError: If the folder cannot be made or written to.
        """
        from invdiff.figures import png_bytes

        folder = Path(folder)
        contents = {
            ".md": self.markdown().encode(),
            ".csv": self._csv().encode(),
            ".json": (json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n").encode(),
            ".png": png_bytes(self.figure()),
        }
        paths = []
        try:
            folder.mkdir(exist_ok=True)
            for suffix, content in contents.items():
                paths.append(folder / f"{stem}{suffix}")
                with whole_file(paths[-1]) as temporary:
                    temporary.write_bytes(content)
        except OSError as error:
            raise StoreError(
                f"{folder} cannot be written to ({error.strerror}); choose another folder."
            ) from error
        return paths

    @property
    def noise_share(self) -> float:
        """``||noise|| / ||y||`` of the data withheld, as the likelihood expects it: the floor of prediction."""
        assert self.withheld is not None
        level = self.problem.likelihood.gaussian_sigma(self.problem.y)
        y, where = self.problem.y, self.withheld.where
        if level is None:
            whitener = self.problem.likelihood.whiten()
            level, y = y.abs().new_ones(()), y if whitener is None else whitener(y)
        where = where.expand(y.shape)
        power = (level.expand(y.shape) ** 2)[where].sum() * (2 if y.is_complex() else 1)
        return float((power / (y[where].abs() ** 2).sum().clamp_min(1e-300)).sqrt())

    @property
    def _title(self) -> str:
        what = self.problem.meta.get("title") or self.problem.operator.name
        return f"Samplers compared: {what}, prior {self.prior}, seed {self.seed}"

    def _about_data(self) -> list[str]:
        if self.withheld is None:
            return []
        return [
            f"Withheld: {self.withheld.count} of the data ({self.withheld.share:.1%}); noise alone makes a "
            f"prediction error of {self.noise_share:.3g}."
        ]

    def _csv(self) -> str:
        rows = self.rows()
        out = io.StringIO()
        writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: "" if v is None else v for k, v in row.items()} for row in _plain(rows))
        return out.getvalue()


Cell = Callable[[dict[str, Any]], str]


def _number(key: str, spec: str) -> Cell:
    return lambda row: tables.NONE if row[key] is None or not math.isfinite(row[key]) else format(row[key], spec)


def _covered(key: str, level: str) -> Cell:
    return lambda row: tables.NONE if row[key] is None else f"{row[key]:.0%} of {row[level]:.0%}"


def _made(row: dict[str, Any]) -> str:
    return "not run" if not row["ran"] else "estimate" if row["kind"] == "point" else f"{row['draws']}"


#: Header, meaning, cell.
COLUMNS: tuple[tuple[str, str, Cell], ...] = (
    ("draws", "", _made),
    (
        "predicted",
        "relative error of the mean's prediction of the withheld data",
        _number("prediction_error", ".3f"),
    ),
    (
        "covered",
        "withheld data inside the intervals of draws plus noise, and the share that is right for so many draws",
        _covered("prediction_coverage", "prediction_level"),
    ),
    (
        "CRPS",
        "fair score of the predictions in noise levels, smaller is better, 0.564 if the truth were known",
        _number("prediction_crps", ".3f"),
    ),
    ("misfit", "squared residual of the data used over noise variance; near 1 is right", _number("misfit", ".3g")),
    ("width", "median width of the 90 % intervals in image units", _number("width", ".3g")),
    ("PSNR", "of the mean against the truth, in decibels", _number("psnr", ".1f")),
    ("NRMSE", "relative error of the mean", _number("nrmse", ".3f")),
    (
        "x covered",
        "pixels whose truth lies inside the intervals, and the share that is right for so many draws",
        _covered("coverage", "coverage_level"),
    ),
    ("x CRPS", "fair score of the draws against the truth, in image units", _number("crps", ".3g")),
    ("NFE", "network evaluations per draw", _number("nfe", ".0f")),
    ("VJP", "reverse passes through the network per draw", _number("vjp", ".0f")),
    ("seconds", "for all draws", _number("seconds", ".1f")),
)


def _per_draw(posterior: Posterior) -> dict[str, Any]:
    """Return the draws that count per case, and evaluations per draw."""
    stats = posterior.stats
    ok = stats["status"].values == "ok"
    out: dict[str, Any] = {"draws": int(ok.sum()) // posterior.n_cases}
    for key in ("nfe", "vjp"):
        if key in stats:
            out[key] = float(np.median(stats[key].values[ok]))
    return out


def _settings(sampler: Sampler) -> str:
    """Return the settings that are not the defaults."""
    changed = ((f.name, getattr(sampler, f.name), f.default) for f in dataclasses.fields(sampler))
    return ", ".join(f"{name}={value}" for name, value, default in changed if value != default)


def _plain(value: Any) -> Any:
    """Return only what JSON has: numbers that are not finite become None."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int, bool)) else str(value)
