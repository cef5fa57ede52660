"""Which samplers can run on a problem, what they cost, and how honest they were measured to be."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
    def penalty(self) -> float:
        """Larger of bias and |log width| on the worst field, which sorts the list; infinite if unmeasured."""
        if self.measured is None or self.measured.width is None or self.measured.bias is None:
            return math.inf
        return max(self.measured.bias, abs(math.log(max(self.measured.width, 1e-9))))


class Suggestion(list[Choice]):
    """Choices, best first: those that can run, by measured honesty; then those that cannot."""

    def rows(self) -> list[dict[str, Any]]:
        """Return plain values, one dictionary per sampler."""
        out = []
        for c in self:
            m = c.measured
            out.append(
                {
                    "name": c.sampler.name,
                    "title": c.sampler.title,
                    "kind": c.sampler.kind,
                    "exactness": c.sampler.exactness,
                    "runs": c.runs,
                    "missing": list(c.missing),
                    "network_passes_per_draw": c.cost,
                    "bias": None if m is None else m.bias,
                    "width_on_measured_directions": None if m is None else m.width,
                    "measured_setting": None if m is None else m.setting,
                }
            )
        return out

    def __repr__(self) -> str:
        lines = [f"{'sampler':<14}{'kind':<11}{'passes':>7}{'bias':>8}{'width':>8}  note"]
        for r in self.rows():
            note = "" if r["runs"] else "needs " + ", ".join(r["missing"])
            if r["runs"] and (r["measured_setting"] is None or r["bias"] is None):
                note = "not measured"
            passes = "–" if math.isnan(r["network_passes_per_draw"]) else f"{r['network_passes_per_draw']:.0f}"
            bias = "–" if r["bias"] is None else f"{r['bias']:.2f}"
            width = (
                "–" if r["width_on_measured_directions"] is None else f"{r['width_on_measured_directions']:.2f}"
            )
            lines.append(f"{r['name']:<14}{r['kind']:<11}{passes:>7}{bias:>8}{width:>8}  {note}".rstrip())
        return "\n".join(lines)


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
