"""Which samplers can run on a problem, what they cost, and how honest they were measured to be."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from invdiff import tables
from invdiff.errors import InvdiffError
from invdiff.honesty import Measured, measured

if TYPE_CHECKING:
    from invdiff.prior import Prior
    from invdiff.problem import Problem
    from invdiff.sampler import Sampler


@dataclass(frozen=True)
class Choice:
    """One sampler on one problem.

    Attributes:
        sampler: At its default settings.
        missing: Capabilities it needs and the problem or the prior lacks; empty where it can run.
        measured: Its figures against exact posteriors, or None.
    """

    sampler: Sampler
    missing: tuple[str, ...]
    measured: Measured | None

    @property
    def runs(self) -> bool:
        """Whether it can run."""
        return not self.missing

    @property
    def cost(self) -> float:
        """Network passes per draw, a reverse pass counting as two; NaN where that was not measured."""
        figures = self.measured.figures if self.measured else {}
        counts = [f["nfe"] + 2 * f.get("vjp", 0.0) for f in figures.values() if f.get("nfe") is not None]
        return counts[0] if counts else math.nan

    @property
    def bias(self) -> float | None:
        """Largest mean error over the exact fields, in posterior standard deviations, where it was measured."""
        return None if self.measured is None else self.measured.bias

    @property
    def width(self) -> float | None:
        """Ratio of standard deviations on measured directions, where measured; a point estimate has none."""
        return None if self.measured is None or self.sampler.kind == "point" else self.measured.width

    @property
    def note(self) -> str:
        """What it lacks, or that nothing is known of it."""
        if self.missing:
            return "needs " + ", ".join(self.missing)
        if self.bias is None:
            return "not measured"
        if self.sampler.kind == "point":
            return "no spread"
        assert self.measured is not None
        return "width is wrong" if self.measured.wrong_width else ""

    @property
    def penalty(self) -> float:
        """Larger of bias and |log width| on the worst field, which sorts the list; infinite if unmeasured."""
        if self.bias is None:
            return math.inf
        return max(self.bias, 0.0 if self.width is None else abs(math.log(max(self.width, 1e-9))))


class Suggestion(list[Choice]):
    """Choices, best first: those that can run, by measured honesty; then those that cannot."""

    def rows(self) -> list[dict[str, Any]]:
        """Return plain values, one dictionary per sampler; None where nothing was measured."""
        return [
            {
                "name": c.sampler.name,
                "title": c.sampler.title,
                "kind": c.sampler.kind,
                "exactness": c.sampler.exactness,
                "runs": c.runs,
                "missing": list(c.missing),
                "network_passes_per_draw": None if math.isnan(c.cost) else c.cost,
                "bias": c.bias,
                "width_on_measured_directions": c.width,
                "measured_setting": None if c.measured is None else c.measured.setting,
                "note": c.note,
            }
            for c in self
        ]

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Return headers and cells."""
        cells = [
            [
                c.sampler.name,
                c.sampler.kind,
                "yes" if c.runs else "no",
                _cell(c.cost, ".0f"),
                _cell(c.bias, ".2f"),
                _cell(c.width, ".2f"),
                c.note,
            ]
            for c in self
        ]
        return ["sampler", "kind", "runs", "passes", "bias", "width", "note"], cells

    def __repr__(self) -> str:
        return tables.text(*self.table())

    def _repr_html_(self) -> str:
        return tables.to_html(*self.table(), [LEGEND])


#: What the columns of a suggestion mean.
LEGEND = (
    "passes: network passes per draw, a reverse pass counting as two; bias: mean error in exact posterior "
    "standard deviations; width: share of the right standard deviation on measured directions, where it is worst. "
    "Both were measured on exact posteriors, not on this problem."
)


def _cell(value: float | None, spec: str) -> str:
    return tables.NONE if value is None or math.isnan(value) else format(value, spec)


def suggest(problem: Problem, prior: Prior) -> Suggestion:
    """Return every sampler with whether it can run on ``problem``, its cost and its measured honesty, best first.

    *Bias* is the largest mean error over three exact Gaussian fields in posterior standard deviations; *width* the
    ratio of standard deviations on measured directions where it is furthest from 1. They are measured on those
    problems and not on yours: `invdiff.certify` compares on yours.

    Args:
        problem: Operator, likelihood and data.
        prior: Prior; its codec and differentiability decide too.
    """
    from invdiff import samplers
    from invdiff.plan import missing_capabilities

    bound = prior.adapt(problem)
    if bound.codec is None:
        raise InvdiffError(f"Prior {prior.name} has no codec for this problem; give one whose images fit.")
    pulled = problem.whiten().pullback(bound.codec)
    choices = []
    for cls in samplers.REGISTRY.values():
        if not cls.conditional:
            continue
        sampler = cls()
        choices.append(Choice(sampler, tuple(missing_capabilities(sampler, pulled, bound)), measured(sampler)))
    return Suggestion(sorted(choices, key=lambda c: (not c.runs, c.sampler.kind == "point", c.penalty)))
