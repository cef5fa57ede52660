"""What is measured about a sampler: its figures against exact posteriors, found by its configuration.

The figures are made by ``benchmarks/exact_posteriors.py`` and lie in ``samplers/measured.json``.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from invdiff.sampler import Sampler

FILE = Path(__file__).parent / "samplers" / "measured.json"
#: The three Gaussian fields, 32x32, and what they are called.
FIELDS = {"mask-32": "mask", "fourier-32": "Fourier", "blur-32": "blur"}
#: How far from 1 a ratio of widths may be before a result says so.
TOLERANCE = 0.25


@dataclass(frozen=True)
class Measured:
    """Figures of one sampler at one setting.

    Attributes:
        sampler: Name.
        setting: Name of the setting that was measured (``default``, ``published``, ``tuned`` ...).
        matches: Whether that is the configuration in use, or the nearest there is.
        figures: Problem to figure to value, e.g. ``figures["mask-32"]["std_ratio"]``.
    """

    sampler: str
    setting: str
    matches: bool
    figures: dict[str, dict[str, float]]

    def on_fields(self, figure: str) -> dict[str, float]:
        """Return a figure on the Gaussian fields, by their names for people; only where it was measured."""
        out = {}
        for key, name in FIELDS.items():
            value = self.figures.get(key, {}).get(figure)
            if value is not None and math.isfinite(value):
                out[name] = value
        return out

    @property
    def width(self) -> float | None:
        """Ratio of standard deviations on measured directions, of the field where it is furthest from 1."""
        ratios = self.on_fields("std_ratio_measured").values()
        return max(ratios, key=lambda r: abs(math.log(max(r, 1e-9))), default=None)

    @property
    def bias(self) -> float | None:
        """Largest mean error over the fields, in exact posterior standard deviations."""
        return max(self.on_fields("mean_error").values(), default=None)

    @property
    def wrong_width(self) -> bool:
        """Whether the width on measured directions is off by more than a quarter somewhere."""
        return self.width is not None and abs(self.width - 1) > TOLERANCE

    def sentence(self) -> str:
        """Return the measured width in one sentence."""
        ratios = self.on_fields("std_ratio_measured")
        if not ratios:
            return f"{self.sampler} has not been measured against exact posteriors."
        listed = ", ".join(f"{r:.2f} ({name})" for name, r in ratios.items())
        other = "" if self.matches else "; these settings have not been measured themselves"
        return (
            f"Against exact posteriors the draws of {self.sampler} ({self.setting}) had these shares of the right "
            f"width on measured directions: {listed}{other}."
        )

    def warning(self) -> str:
        """Return in one short sentence that the width is wrong; meant for where `wrong_width` says so."""
        ratios = self.on_fields("std_ratio_measured")
        where = next(name for name, ratio in ratios.items() if ratio == self.width)
        what = "narrow" if ratios[where] < 1 else "wide"
        other = "" if self.matches else "; the nearest settings measured"
        return (
            f"The spread is likely too {what} along measured directions: on exact posteriors draws had "
            f"{ratios[where]:.2f} of the right width there ({self.sampler} {self.setting}, {where} field{other})."
        )


def facts(sampler: Sampler) -> dict[str, str]:
    """Return what a result says of its sampler: ``measured``, and ``width_warning`` where the width is wrong.

    A point estimate has no width to speak of, and draws from the prior have nothing measured.
    """
    if sampler.kind == "point" or not sampler.conditional:
        return {}
    found = measured(sampler)
    if found is None:
        return {"measured": Measured(sampler.name, "", False, {}).sentence()}
    return {"measured": found.sentence(), **({"width_warning": found.warning()} if found.wrong_width else {})}


@functools.cache
def _table() -> dict[str, Any]:
    return json.loads(FILE.read_text()) if FILE.exists() else {}


def measured(sampler: Sampler) -> Measured | None:
    """Return the figures of a sampler at its configuration, else at the nearest one measured; None without any.

    Nearest is the one with the most settings in common, the first of several. The number of draws, the seed and
    the device do not matter; every setting does.
    """
    rows: dict[str, Any] = _table().get(sampler.name, {})
    config = json.loads(json.dumps(dataclasses.asdict(sampler)))

    def common(setting: str) -> int:
        return sum(config.get(key) == value for key, value in rows[setting]["config"].items())

    if not rows:
        return None
    best = max(rows, key=common)
    return Measured(sampler.name, best, rows[best]["config"] == config, rows[best]["figures"])
