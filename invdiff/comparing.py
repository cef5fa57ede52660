"""Run several samplers on one problem within one budget of time, and compare what comes out."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from invdiff import samplers as registry
from invdiff.budget import Cost, estimate
from invdiff.choosing import suggest
from invdiff.comparison import Comparison, Entry
from invdiff.driver import sample
from invdiff.errors import InvdiffError
from invdiff.plan import Plan, Target, bind, check_capabilities, check_particles, find_device
from invdiff.rng import resolve_seed
from invdiff.sampler import Sampler
from invdiff.scoring import Scores, data_scores, image_scores
from invdiff.withholding import Withheld, measured
from invdiff.withholding import withhold as set_aside

if TYPE_CHECKING:
    from invdiff.posterior import Posterior
    from invdiff.prior import Prior
    from invdiff.problem import Problem

#: What may stand for a sampler: the sampler, its name, its name and a preset, or a label and the sampler.
Named = Sampler | str | tuple[str, str | Sampler]
#: How many samplers are compared where none is named.
_SUGGESTED = 3


def compare(
    problem: Problem,
    prior: Prior,
    samplers: Sequence[Named] | None = None,
    draws: int = 16,
    seed: int = 0,
    time_budget_s: float | None = None,
    withhold: float = 0.1,
    *,
    device: torch.device | str | None = None,
    max_batch: int | None = None,
    progress: bool | None = None,
) -> Comparison:
    """Run samplers side by side on one problem and score them, with or without a known truth.

    Every sampler gets the same data, from which a share is withheld, and the same seed. Without a truth they are
    scored by how well draws plus noise predict what was withheld, how well they explain the rest, how wide their
    intervals are and what they cost; with ``x_true`` also by error and coverage of the image. A sampler that
    cannot run, or breaks down, gets a row that says why.

    With a budget, the cost of a draw of each is estimated first, from one network evaluation and one step; then
    they run from the cheapest to the dearest, each with an equal part of the time that is left, which may mean
    fewer draws than asked for. One that cannot make a single draw in what is left is not run.

    Args:
        problem: Operator, likelihood, data; several cases are averaged.
        prior: Prior.
        samplers: Samplers, names, pairs of name and preset, or pairs of a label of your own and a sampler; by
            default the three that `invdiff.suggest` puts first.
        draws: Draws of each; point estimates are made once.
        seed: Of the draws, of the choice of what to withhold, and of the predicted noise.
        time_budget_s: Seconds for all samplers together.
        withhold: Share of the measurements to withhold (see `invdiff.withholding.withhold`); 0 uses all. Where
            nothing can be withheld, all are used and the comparison says so.
        device: See `invdiff.sample`.
        max_batch: See `invdiff.sample`.
        progress: See `invdiff.sample`.

    Raises:
        InvdiffError: If a sampler is unknown, none can run, or no draw of any fits into the budget.
    """
    seed = resolve_seed(seed)
    if time_budget_s is not None and not time_budget_s > 0:
        raise InvdiffError(f"The time budget must be a positive number of seconds, got {time_budget_s:g}.")
    chosen = name_samplers(_suggested(problem, prior) if samplers is None else samplers)
    held, notes = _set_aside(problem, withhold, seed)
    target = bind(problem if held is None else held.problem, prior, None, find_device(device))
    runs = [_Run(label, sampler, _plan(target, sampler, draws, seed)) for label, sampler in chosen]
    for run in runs:
        run.check()
    _sample_all(runs, _Clock(time_budget_s), max_batch, progress)
    if all(run.posterior is None for run in runs):
        raise InvdiffError(_none_ran(runs, time_budget_s))
    entries = _score(runs, problem, held, seed)
    return Comparison(entries, problem, prior.name, seed, held, time_budget_s, tuple(notes))


def name_samplers(samplers: Sequence[Named]) -> list[tuple[str, Sampler]]:
    """Return samplers with labels that tell them apart: name, preset where one was named, number where needed.

    Raises:
        InvdiffError: If there are none, or one is unknown.
    """
    if isinstance(samplers, (str, Sampler)):
        samplers = [samplers]
    found: list[tuple[str, Sampler]] = []
    for item in samplers:
        if isinstance(item, tuple):
            label, other = item
            if isinstance(other, Sampler):
                sampler = other
            else:
                label, sampler = f"{label} {other}", registry.get(label, other)
        else:
            sampler = registry.get(item) if isinstance(item, str) else item
            label = sampler.name
        if not sampler.conditional:
            raise InvdiffError(f"{sampler.name} draws from the prior alone and ignores data; leave it out.")
        taken = {name for name, _ in found}
        again = (f"{label} ({i})" for i in range(2, len(found) + 3))
        found.append((label if label not in taken else next(a for a in again if a not in taken), sampler))
    if not found:
        raise InvdiffError("A comparison needs at least one sampler; `invdiff samplers` lists them.")
    return found


@dataclass
class _Clock:
    """Seconds that are left of a budget, if there is one."""

    total: float | None
    start: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        return float("inf") if self.total is None else self.total - (time.monotonic() - self.start)


@dataclass
class _Run:
    """One sampler, from its plan to its draws or the reason why there are none."""

    label: str
    sampler: Sampler
    plan: Plan
    cost: Cost | None = None
    posterior: Posterior | None = None
    seconds: float | None = None
    note: str = ""
    too_dear: bool = False

    def check(self) -> None:
        """Say what is missing, if anything is."""
        target = self.plan.target
        assert target.pulled is not None
        try:
            check_particles(self.sampler, self.plan.draws)
            check_capabilities(self.sampler, target.pulled, target.prior)
        except InvdiffError as error:
            self.note = str(error)

    def estimate(self, clock: _Clock, max_batch: int | None) -> None:
        """Find out what a draw costs, or why there will be none."""
        try:
            self.cost = estimate(self.plan, max_batch, clock.left)
        except Exception as error:
            self.note = _sentence(error)
            return
        if self.cost.least_s > clock.left:
            self._decline(clock)

    def draw(self, clock: _Clock, others: int, max_batch: int | None, progress: bool | None) -> None:
        """Draw as much as fits, with ``others`` waiting for their turn."""
        draws, budget = self.plan.draws, None
        if self.cost is not None:
            if self.cost.affordable(clock.left) < 1:
                self._decline(clock)
                return
            draws, max_batch, budget = self._part(self.cost, clock, others, max_batch)
        start = time.monotonic()
        try:
            self.posterior, said = _quietly(self, draws, max_batch, budget, progress)
        except Exception as error:
            self.note = _sentence(error)
            return
        self.seconds = time.monotonic() - start
        made = int((self.posterior.stats["status"].values != "missing").sum()) // self.posterior.n_cases
        if made < self.plan.draws:
            said.insert(0, f"{made} of {self.plan.draws} draws fitted into its part of the time.")
        self.note = " ".join(said)

    def _part(
        self, cost: Cost, clock: _Clock, others: int, max_batch: int | None
    ) -> tuple[int, int | None, float | None]:
        """Return draws to ask for, rows at once, and after how many seconds to begin no further batch."""
        draws, cases, share = self.plan.draws, self.plan.target.cases, clock.left / (1 + others)
        least = min(2, draws, cost.affordable(clock.left))  # a spread needs two
        expected = min(draws, max(cost.affordable(share), least))
        if cases > 1:  # they run one after another: stopping early would leave the last ones without any draw
            return expected, max_batch, None
        rows = round(cost.draws)
        if self.plan.target.device.type == "cpu" and not cost.ensemble:
            # Several smaller batches cost no more than a large one there, and let the budget be kept.
            rows = min(-(-expected // 4), max_batch or expected)
        batch_s = cost.chunk_s * rows / cost.draws
        return draws, rows, max(share, expected * cost.least_s) - batch_s

    def _decline(self, clock: _Clock) -> None:
        assert self.cost is not None
        what = f"{self.plan.draws} draws" if self.cost.ensemble else "one draw"
        self.too_dear = True
        self.note = (
            f"Not run: {what} would take about {self.cost.least_s:.2g} s ({self.plan.steps} steps, "
            f"{self.cost.evaluation_s:.2g} s per network evaluation), and {max(clock.left, 0):.2g} s are left."
        )


def _plan(target: Target, sampler: Sampler, draws: int, seed: int) -> Plan:
    return Plan(target, sampler, 1 if sampler.kind == "point" else draws, seed, torch.float64, "mark")


def _sample_all(runs: list[_Run], clock: _Clock, max_batch: int | None, progress: bool | None) -> None:
    """Run all that can, in the order given, or from the cheapest to the dearest where time is short."""
    import xarray  # noqa: F401 (slow to import, and no sampler's fault)

    ready = [run for run in runs if not run.note]
    if clock.total is not None:
        for run in ready:
            run.estimate(clock, max_batch)
        ready = sorted((run for run in ready if run.cost and not run.note), key=lambda r: r.cost.least_s)  # type: ignore[union-attr]
    for i, run in enumerate(ready):
        run.draw(clock, len(ready) - i - 1, max_batch, progress)


def _quietly(
    run: _Run, draws: int, max_batch: int | None, budget_s: float | None, progress: bool | None
) -> tuple[Posterior, list[str]]:
    """Sample, and return what was warned of as sentences."""
    target = run.plan.target
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", category=UserWarning)
        posterior = sample(
            target.problem,
            target.prior,
            run.sampler,
            draws=draws,
            seed=run.plan.seed,
            max_batch=max_batch,
            device=target.device,
            time_budget_s=budget_s,
            progress=progress,
            title=run.label,
        )
    return posterior, [" ".join(str(w.message).split()) for w in caught]


def _sentence(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, InvdiffError) else f"It failed with {type(error).__name__}: {text[:200]}"


def _suggested(problem: Problem, prior: Prior) -> list[Sampler]:
    found = [c.sampler for c in suggest(problem, prior) if c.runs and c.sampler.kind == "posterior"]
    if not found:
        raise InvdiffError("No sampler can run on this problem; `invdiff.suggest` says what each of them lacks.")
    return found[:_SUGGESTED]


def _set_aside(problem: Problem, share: float, seed: int) -> tuple[Withheld | None, list[str]]:
    if share == 0:
        return None, ["No data were withheld."]
    if not 0 < share < 1:
        raise InvdiffError(f"The share of the measurements to withhold lies between 0 and 1, got {share:g}.")
    try:
        return set_aside(problem, share, seed), []
    except InvdiffError as error:
        return None, [f"No data were withheld: {str(error)[0].lower()}{str(error)[1:]}"]


def _score(runs: list[_Run], problem: Problem, held: Withheld | None, seed: int) -> tuple[Entry, ...]:
    """Score all that ran; what they have in common says where in the image there is something."""
    made = {run.label: run.posterior for run in runs if run.posterior is not None}
    used = measured(problem) if held is None else measured(held.problem)
    centres = [np.abs(np.asarray(p.estimate if p.kind == "point" else p.mean())) for p in made.values()]
    image = (problem.n_cases, *problem.operator.domain.shape)
    reference = np.median([np.nan_to_num(c.reshape(image)) for c in centres], axis=0)
    entries = []
    for run in runs:
        scores: Scores = {}
        if run.posterior is not None:
            scores = {
                **data_scores(run.posterior, problem, used, held, seed),
                **image_scores(run.posterior, problem.x_true, reference),
            }
        entries.append(Entry(run.label, run.sampler, run.posterior, scores, run.plan.draws, run.seconds, run.note))
    return tuple(entries)


def _none_ran(runs: list[_Run], budget: float | None) -> str:
    dear = [run for run in runs if run.too_dear and run.cost is not None]
    if not dear or budget is None:
        return "None of the samplers could run: " + " ".join(f"{run.label}: {run.note}" for run in runs)
    costs = {run.label: run.cost.least_s for run in dear if run.cost is not None}
    best = min(costs, key=lambda label: costs[label])
    return (
        f"No sampler fits into {budget:g} s: the cheapest, {best}, would take about {costs[best]:.2g} s for the "
        f"least it can make; allow {_round_up(2.5 * costs[best])} s or more for it alone, or take fewer steps."
    )


def _round_up(seconds: float) -> str:
    """Return seconds with two digits, rounded up."""
    digits = 10.0 ** (np.floor(np.log10(seconds)) - 1)
    return f"{np.ceil(seconds / digits) * digits:g}"
