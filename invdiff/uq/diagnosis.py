"""One call that asks of draws of simulated cases whether they can be exact posterior draws."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from invdiff import tables
from invdiff.errors import InvdiffError
from invdiff.uq import ranks
from invdiff.uq.draws import Draws, read_data, read_truth, to_numpy, vectors
from invdiff.uq.learned import Simulated, classifier, learned_ranks, predictable_error, tarp_references
from invdiff.uq.predictive import predictive_chi_squared, residual_whiteness
from invdiff.uq.uniformity import holm, uniform_p_value

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure

    from invdiff.likelihood import Likelihood
    from invdiff.operator import Operator

#: Cases from which on a verdict says something: with fewer not even a gross error reaches the level of 1 %.
LEAST_CASES = 20

#: What uneven numbers mean, by kind of test: low; high; and, where that says more, at both ends; in the middle.
_MEANING = {
    "value": ("draws too high", "draws too low", "draws too narrow", "draws too wide"),
    "distance": ("draws too wide", "draws too narrow, or a mode missing"),
    "nearest": ("draws too wide", "draws repeat, or are too narrow"),
    "likelihood": ("draws fit the noise", "draws miss the data", "draws too narrow", "draws too wide"),
    "fit": ("draws fit the noise", "draws miss the data"),
    "residual": ("residuals alternate", "structure left in the residuals"),
    "reference": (
        "draws too far from what the data say",
        "draws too near to it",
        "draws too narrow",
        "draws too wide",
    ),
    "error": ("error predictable from y", "error predictable from y", "draws too narrow", "draws too wide"),
    "classifier": ("truth and draws can be told apart",) * 2,
}


@dataclass(frozen=True)
class Check:
    """One test.

    Attributes:
        name: What is looked at.
        kind: Key of the meanings of uneven numbers.
        u: One number per case, uniform for exact draws; empty for a test of another kind.
        p_value: Probability that exact draws look at least as bad, by this test alone.
        adjusted: The same for all tests together, by Holm's method.
        rejected: Whether the adjusted p-value is at most the level.
        finding: What is wrong, where it is rejected.
    """

    name: str
    kind: str
    u: np.ndarray
    p_value: float
    adjusted: float
    rejected: bool
    finding: str


@dataclass(frozen=True)
class Diagnosis:
    """Verdicts about draws of simulated cases.

    Attributes:
        checks: All tests.
        level: Probability of rejecting exact draws by any of them, at most.
        n_cases: Number of cases.
        n_draws: Fewest usable draws of a case.
        n_excluded: Draws left out over all cases.
        coverage: Share of pixels inside equal-tailed intervals, mean over cases and its standard error, by level;
            levels are those near 50, 80, 90 and 95 % at which so many exact draws cover exactly.
    """

    checks: tuple[Check, ...]
    level: float
    n_cases: int
    n_draws: int
    n_excluded: int
    coverage: dict[float, tuple[float, float]]

    @property
    def accepted(self) -> bool:
        """Whether nothing speaks against the draws; not a proof that they are exact."""
        return not any(c.rejected for c in self.checks)

    @property
    def rejected(self) -> tuple[str, ...]:
        """Names of the tests that speak against the draws."""
        return tuple(c.name for c in self.checks if c.rejected)

    def __getitem__(self, name: str) -> Check:
        found = [c for c in self.checks if c.name == name]
        if not found:
            raise InvdiffError(f"There is no test {name!r}; there are {', '.join(c.name for c in self.checks)}.")
        return found[0]

    def __repr__(self) -> str:
        word = "nothing speaks against these draws" if self.accepted else "these are NOT exact posterior draws"
        excluded = f", {self.n_excluded} draws left out" if self.n_excluded else ""
        rows = [
            [c.name, _p(c.p_value), _p(c.adjusted), "REJECTED" if c.rejected else "passed", c.finding]
            for c in self.checks
        ]
        table = tables.text(["test", "p", "adjusted", "verdict", "finding"], rows)
        covered = ", ".join(f"{k:.0%}: {m:.1%} +- {s:.1%}" for k, (m, s) in self.coverage.items())
        return (
            f"{word} ({self.n_cases} cases of {self.n_draws} draws{excluded}; level {self.level:.0%} for all "
            f"tests together, by Holm)\n{table}\ncoverage of pixelwise intervals: {covered}"
        )

    def plot(self) -> Figure:
        """Return a figure: distance of every test's distribution function from the uniform one, with its band."""
        from invdiff.uq.figure import diagnosis_figure

        return diagnosis_figure(self)

    def to_xarray(self) -> xr.Dataset:
        """Return p-values, verdicts and the uniform numbers ``u`` (NaN where a test has none)."""
        import xarray as xr

        u = np.full((len(self.checks), self.n_cases), np.nan)
        for row, check in zip(u, self.checks):
            row[self.n_cases - len(check.u) :] = check.u
        names = ("p_value", "adjusted", "rejected", "finding")
        data = {k: ("test", [getattr(c, k) for c in self.checks]) for k in names}
        covered = ("level", [m for m, _ in self.coverage.values()])
        coords = {"test": [c.name for c in self.checks], "level": list(self.coverage)}
        attrs = {"significance": self.level, "n_draws": self.n_draws, "n_excluded": self.n_excluded}
        return xr.Dataset({**data, "u": (("test", "case"), u), "coverage": covered}, coords, attrs)


def diagnose(
    draws: Any,
    truth: Any,
    y: Any = None,
    operator: Operator | None = None,
    likelihood: Likelihood | None = None,
    labels: Any = None,
    level: float = 0.01,
    seed: int = 0,
) -> Diagnosis:
    """Test whether draws of simulated cases can be exact posterior draws.

    Every test turns each case into one number that is exactly uniform for exact draws (ranks of the truth among
    the draws, and places of residuals in the law of the noise) and compares their distribution function with exact
    simultaneous bands. Holm's method holds the probability that exact draws are rejected by any test at ``level``,
    whatever the tests have to do with each other. The outcome depends on inputs and seed only, not on which
    packages are installed.

    Args:
        draws: ``(case, draw, ...)`` or a `Posterior`, independent draws of equal weight.
        truth: ``(case, ...)``, drawn from the prior that the draws are meant for.
        y: ``(case, ...)``; without it a sampler that ignores the data passes.
        operator: Forward operator; with ``likelihood`` and ``y`` the log-likelihood and the residuals are tested.
        likelihood: Noise model.
        labels: Whole numbers over the last axes of an image: means over labelled regions are tested too.
        level: Of all tests together.
        seed: Of projections and of the breaking of ties.

    Raises:
        InvdiffError: If there are fewer than 20 cases, or inputs do not fit.
    """
    found = ranks.read_equal(draws)
    target = read_truth(truth, found)
    if found.n_cases < LEAST_CASES:
        raise InvdiffError(f"A diagnosis needs at least {LEAST_CASES} cases, got {found.n_cases}; 200 tell most.")
    if not 0 < level < 1:
        raise InvdiffError(f"The level of the tests lies between 0 and 1, got {level!r}.")
    if (operator is None) != (likelihood is None) or (operator is not None and y is None):
        raise InvdiffError("Tests of the residuals need operator, likelihood and y together; give all three.")
    rows: list[tuple[str, str, np.ndarray]] = []
    for name, kind, quantity in _quantities(found, labels, seed):
        rows.append((name, kind, ranks.sbc(found, target, quantity, seed)))
    if y is not None:
        rows += _learned(found, target, y, seed)
    if operator is not None and likelihood is not None:
        rows += _residuals(found, target, y, operator, likelihood, seed)
    rows = [(n, k, u) for n, k, u in rows if len(u) >= 2]
    repeats = _repeats(found)
    p = np.array([uniform_p_value(u) for *_, u in rows] + [1e-12 if repeats else 1.0])
    adjusted = holm(p)
    checks = [
        Check(n, k, u, float(p[i]), float(a), bool(a <= level), _finding(k, u) if a <= level else "")
        for i, ((n, k, u), a) in enumerate(zip(rows, adjusted))
    ]
    said = f"{repeats} draws repeat others" if repeats else ""
    checks.append(Check("repeated draws", "nearest", np.zeros(0), p[-1], adjusted[-1], bool(repeats), said))
    fewest = min(len(x) for x, _ in found)
    return Diagnosis(
        tuple(checks), level, found.n_cases, fewest, found.n_excluded, _coverage(found, target, fewest)
    )


def _quantities(found: Draws, labels: Any, seed: int) -> list[tuple[str, str, ranks.Quantity]]:
    out: list[tuple[str, str, ranks.Quantity]] = [
        ("distance to the draws", "distance", ranks.mean_distance),
        ("nearest draw", "nearest", ranks.nearest_distance),
        ("pixels outside", "distance", ranks.pixels_outside),
        ("main direction", "distance", ranks.principal_distance),
        ("mean value", "value", ranks.mean_value),
        ("random projection 1", "value", ranks.random_projection(seed)),
        ("random projection 2", "value", ranks.random_projection(seed + 1)),
    ]
    if any(n >= 4 for n in found.shape[-2:]):
        out += [
            ("low frequencies", "value", ranks.band_energy(0, 0.3)),
            ("high frequencies", "value", ranks.band_energy(0.5, np.inf)),
        ]
    if labels is not None:
        present = [int(k) for k in np.unique(to_numpy(labels)) if k != 0]
        out += [(f"mean of region {k}", "value", ranks.region_mean(labels, k)) for k in present]
    return out


def _learned(found: Draws, target: np.ndarray, y: Any, seed: int) -> list[tuple[str, str, np.ndarray]]:
    kind = found.case(0)[0].dtype
    data = Simulated(found, vectors(target.astype(kind)), read_data(y, found.n_cases))
    return [
        ("distance from a reference (TARP)", "reference", learned_ranks(data, tarp_references(data, seed), seed)),
        ("error predicted from y", "error", learned_ranks(data, predictable_error(data), seed + 1)),
        ("classifier", "classifier", learned_ranks(data, classifier(data, seed), seed + 2)),
    ]


def _residuals(
    found: Draws, target: np.ndarray, y: Any, operator: Operator, likelihood: Likelihood, seed: int
) -> list[tuple[str, str, np.ndarray]]:
    import torch

    from invdiff.problem import Problem

    values = torch.from_numpy(np.ascontiguousarray(to_numpy(y)))
    problem = Problem(operator, likelihood, values.to(operator.range.dtype))
    # A truth whose likelihood is low among the draws means that these fit the noise, as with chi-squared.
    rank = ranks.sbc(found, target, ranks.log_likelihood(problem), seed)
    out = [
        ("log-likelihood", "likelihood", rank),
        ("predictive chi-squared", "fit", predictive_chi_squared(problem, found, seed)),
    ]
    white = residual_whiteness(problem, found, seed)
    return out if white is None else [*out, ("residual whiteness", "residual", white)]


def _repeats(found: Draws) -> int:
    """Number of draws that equal an earlier one of their case in every pixel."""
    return sum(len(x) - len(np.unique(vectors(x), axis=0)) for x, _ in found)


def _coverage(found: Draws, target: np.ndarray, fewest: int) -> dict[float, tuple[float, float]]:
    """Coverage near the usual levels, at those that intervals between two order statistics have exactly."""
    from invdiff.summaries import quantile

    exact = 1 - 2 * np.arange(1, (fewest + 1) // 2 + 1) / (fewest + 1)
    levels = sorted({float(exact[np.abs(exact - k).argmin()]) for k in (0.5, 0.8, 0.9, 0.95)} - {0.0})
    probs = [p for k in levels for p in ((1 - k) / 2, (1 + k) / 2)]
    inside = []
    for (x, _), t in zip(found, target):
        q, v = quantile(vectors(x), probs), vectors(t[None].astype(x.dtype))[0]
        inside.append([((v >= a) & (v <= b)).mean() for a, b in zip(q[::2], q[1::2])])
    share = np.array(inside)
    error = share.std(0, ddof=1) / np.sqrt(len(share))
    return {k: (float(m), float(s)) for k, m, s in zip(levels, share.mean(0), error)}


def _finding(kind: str, u: np.ndarray) -> str:
    """Say what uneven numbers mean: by their mean, or by their spread where that is farther off and says more."""
    low, high, *ends = _MEANING[kind]
    shift = (u.mean() - 0.5) * np.sqrt(12 * len(u))
    spread = (((u - 0.5) ** 2).mean() - 1 / 12) * np.sqrt(180 * len(u))
    if not ends or abs(shift) >= abs(spread):
        return high if shift > 0 else low
    return ends[0] if spread > 0 else ends[1]


def _p(value: float) -> str:
    return "< 1e-9" if value < 1e-9 else f"{value:.2g}"
