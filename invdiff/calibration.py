"""What a calibration on simulated cases found: tests, coverage, spread against error, conformal intervals."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from invdiff import tables
from invdiff.errors import StoreError
from invdiff.io.atomic import whole_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from invdiff.sampler import Sampler
    from invdiff.uq.conformal import Conformal
    from invdiff.uq.diagnosis import Diagnosis
    from invdiff.uq.scores import SpreadSkill

#: Levels of the coverage curve; those of the table are among them.
LEVELS = tuple(round(0.05 * k, 2) for k in range(1, 20))
SHOWN = (0.5, 0.8, 0.9, 0.95)

#: A mean over cases and its standard error.
Estimate = tuple[float, float]


@dataclass(frozen=True, eq=False, repr=False)
class Calibration:
    """A sampler on simulated cases whose truth is known.

    Pixels in which all draws of a case agree (air around an object) count in no share and no mean.

    Attributes:
        sampler: The sampler.
        prior: Name of the prior.
        population: What the cases are, in words.
        from_prior: Whether the true images were drawn from the prior itself.
        diagnosis: Tests whether these can be exact posterior draws.
        coverage: Share of the pixels inside central intervals, by level; magnitudes, where complex. Places of the
            truth among the draws are randomised, so that exact draws have exactly the level.
        spread_skill: Spread of the draws against the error of their mean.
        crps: Fair score, mean over pixels, in image units.
        psnr: Of the mean, in decibels.
        conformal: Intervals calibrated on the first half of the cases, to be saved and applied.
        conformal_coverage: Share of the pixels of the other half inside.
        asked: Cases asked for.
        seed: Of everything random.
    """

    sampler: Sampler
    prior: str
    population: str
    from_prior: bool
    diagnosis: Diagnosis
    coverage: dict[float, Estimate]
    spread_skill: SpreadSkill
    crps: Estimate
    psnr: Estimate
    conformal: Conformal
    conformal_coverage: Estimate
    asked: int
    seed: int

    @property
    def accepted(self) -> bool:
        """Whether nothing speaks against the draws; not a proof that they are exact."""
        return self.diagnosis.accepted

    @property
    def coverage_error(self) -> float:
        """Mean over the levels of |coverage - level|."""
        return float(np.mean([abs(m - k) for k, (m, _) in self.coverage.items()]))

    def __repr__(self) -> str:
        return "\n".join(
            [self._title, "", tables.text(*self._tests()), "", tables.text(*self._figures()), "", *self.notes()]
        )

    def _repr_html_(self) -> str:
        notes = [self._title, *self.notes()]
        return tables.to_html(*self._tests()) + tables.to_html(*self._figures(), notes)

    def markdown(self) -> str:
        """Return title, tables and notes as Markdown."""
        notes = "\n".join(f"* {note}" for note in self.notes())
        parts = (f"# {self._title}", tables.markdown(*self._tests()), tables.markdown(*self._figures()), notes)
        return "\n\n".join(parts) + "\n"

    def notes(self) -> list[str]:
        """Return what the result says of itself, in sentences."""
        d = self.diagnosis
        out = [f"{d.n_cases} of {self.asked} cases were finished in time."] if d.n_cases < self.asked else []
        if d.n_excluded:
            out.append(f"{d.n_excluded} draws are not finite and were left out.")
        out.append(f"Cases: {self.population}.")
        if not self.accepted and not self.from_prior:
            out.append(
                "The images were not drawn from the prior, so this may be the prior's error or the sampler's."
            )
        out.append(f"Tests hold a level of {d.level:.0%} together, by Holm; a pass is no proof.")
        return [*out, self.conformal.guarantee]

    def plot(self) -> Figure:
        """Return a figure: coverage by level, ranks of all tests with their band, spread against error."""
        from invdiff.calibration_figure import calibration_figure

        return calibration_figure(self)

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the pixels as plain values that JSON knows."""
        d, s = self.diagnosis, self.spread_skill
        checks = [
            {"test": c.name, "p": c.p_value, "adjusted": c.adjusted, "rejected": c.rejected, "finding": c.finding}
            for c in d.checks
        ]
        return {
            "accepted": self.accepted,
            "sampler": json.loads(json.dumps(self.sampler.describe(), default=str)),
            "prior": self.prior,
            "population": self.population,
            "images_from_prior": self.from_prior,
            "seed": self.seed,
            "cases": d.n_cases,
            "asked": self.asked,
            "draws": d.n_draws,
            "draws_left_out": d.n_excluded,
            "level_of_the_tests": d.level,
            "tests": checks,
            "coverage": [{"level": k, "mean": m, "error": e} for k, (m, e) in self.coverage.items()],
            "coverage_error": self.coverage_error,
            "spread_over_error": s.ratio if math.isfinite(s.ratio) else None,
            "crps": {"mean": self.crps[0], "error": self.crps[1]},
            "psnr": {"mean": self.psnr[0], "error": self.psnr[1]},
            "conformal": {
                "level": self.conformal.level,
                "cases": self.conformal.n_cases,
                "coverage": self.conformal_coverage[0],
                "error": self.conformal_coverage[1],
                "fingerprint": self.conformal.fingerprint,
                "guarantee": self.conformal.guarantee,
            },
        }

    def save(self, folder: str | Path) -> list[Path]:
        """Write ``calibration.md``, ``.json`` and ``.png``, and ``conformal.json`` for `uq.Conformal.load`.

        Each is whole or not there; the folder is made where its parent exists.

        Raises:
            StoreError: If the folder cannot be made or written to.
        """
        from invdiff.figures import png_bytes

        folder = Path(folder)
        contents = {
            "calibration.md": self.markdown().encode(),
            "calibration.json": (json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n").encode(),
            "calibration.png": png_bytes(self.plot()),
        }
        try:
            folder.mkdir(exist_ok=True)
            for name, content in contents.items():
                with whole_file(folder / name) as temporary:
                    temporary.write_bytes(content)
            return [*(folder / name for name in contents), self.conformal.save(folder / "conformal.json")]
        except OSError as error:
            raise StoreError(
                f"{folder} cannot be written to ({error.strerror}); choose another folder."
            ) from error

    @property
    def _title(self) -> str:
        word = "nothing speaks against its draws" if self.accepted else "its draws are NOT exact posterior draws"
        d = self.diagnosis
        return f"{self.sampler.name} with prior {self.prior}: {word} ({d.n_cases} cases of {d.n_draws} draws)"

    def _tests(self) -> tuple[list[str], list[list[str]]]:
        rows = [
            [c.name, _p(c.p_value), _p(c.adjusted), "REJECTED" if c.rejected else "passed", c.finding]
            for c in self.diagnosis.checks
        ]
        return ["test", "p", "adjusted", "verdict", "finding"], rows

    def _figures(self) -> tuple[list[str], list[list[str]]]:
        rows = [
            [f"pixels inside {k:.0%} intervals", f"{m:.1%} +- {e:.1%}", f"{k:.0%}"]
            for k, (m, e) in self.coverage.items()
            if k in SHOWN
        ]
        level, (m, e) = self.conformal.level, self.conformal_coverage
        rows.append([f"the same, conformal {level:.0%}, other half", f"{m:.1%} +- {e:.1%}", f"{level:.0%}"])
        rows.append(["spread over error", f"{self.spread_skill.ratio:.3f}", "1"])
        rows.append(["CRPS, image units", f"{self.crps[0]:.4g} +- {self.crps[1]:.2g}", tables.NONE])
        rows.append(["PSNR of the mean, dB", f"{self.psnr[0]:.2f} +- {self.psnr[1]:.2f}", tables.NONE])
        return ["figure", "measured", "right"], rows


def _p(value: float) -> str:
    return "< 1e-9" if value < 1e-9 else f"{value:.2g}"
