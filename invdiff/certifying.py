"""Compare a fast sampler with draws that converge to the learned prior's exact posterior, on one's own problem."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from invdiff.errors import InvdiffError
from invdiff.summaries import draw_weights, quantile

if TYPE_CHECKING:
    from invdiff.posterior import Posterior
    from invdiff.prior import Prior
    from invdiff.problem import Problem
    from invdiff.sampler import Sampler

#: Real data up to which particles serve as the reference: they keep mode weights right where there are few data.
FEW_DATA = 16
#: Level of all drift tests of a chain together.
LEVEL = 0.01
#: Correlation with a start that was off up to which a chain has forgotten it.
FORGOTTEN = 0.1


@dataclass(frozen=True)
class Verdict:
    """Whether reference draws may be trusted as far as can be seen, and why not where they may not.

    Attributes:
        certified: No diagnostic speaks against the reference.
        reasons: What speaks against it, or what was checked, in sentences.
        figures: Figures of the diagnostics.
    """

    certified: bool
    reasons: tuple[str, ...]
    figures: dict[str, float]


@dataclass(frozen=True)
class Certificate:
    """A sampler against the reference on one case of a problem.

    Attributes:
        sampler: Name of the sampler under test.
        verdict: About the reference.
        bias: Root mean square over pixels of (mean - reference mean) / reference std; ``floor`` is what the number
            of draws alone would give.
        floor: See ``bias``.
        width: Mean over pixels of std / reference std.
        width_measured: The same for the predicted data ``A x``, over the data that are measured.
        coverage: Share of the reference draws inside the sampler's central 90 % intervals, averaged over pixels;
            ``coverage_level`` is the nominal value that the number of draws supports.
        coverage_level: See ``coverage``.
        posterior: The draws under test.
        reference: The reference draws.
    """

    sampler: str
    verdict: Verdict
    bias: float
    floor: float
    width: float
    width_measured: float
    coverage: float
    coverage_level: float
    posterior: Posterior
    reference: Posterior

    def __repr__(self) -> str:
        head = "certified as far as can be seen" if self.verdict.certified else "NOT certified"
        lines = [
            f"{self.sampler} against reference draws ({head})",
            f"  bias      {self.bias:.3f} posterior std (chance alone: {self.floor:.3f})",
            f"  width     {self.width:.3f} of the reference's; {self.width_measured:.3f} on measured directions",
            f"  coverage  {self.coverage:.1%} by intervals of {self.coverage_level:.0%}",
            *(f"  reference: {r}" for r in self.verdict.reasons),
        ]
        return "\n".join(lines)


def certify(
    problem: Problem,
    prior: Prior,
    sampler: Sampler | str,
    draws: int = 64,
    seed: int = 0,
    reference: Sampler | Posterior | None = None,
    case: int = 0,
    **options: Any,
) -> Certificate:
    """Compare a sampler with draws that converge to the posterior of the learned prior, on your own problem.

    What this cannot see: the learned denoiser's own error, the operator's and the likelihood's.

    Args:
        problem: Linear operator, Gaussian likelihood, data.
        prior: A prior whose denoiser can be differentiated.
        sampler: The sampler under test, or its name.
        draws: Draws of each; 64 tell widths to about 10 % per pixel and far better on average.
        seed: Of both.
        reference: A sampler or a finished posterior to compare with; by default ``tds`` with Metropolis moves for
            at most 16 real data, and ``certified`` for more.
        case: Which case of the problem.
        options: Further options of `invdiff.sample` (``max_batch``, ``device``, ``progress``).

    Raises:
        InvdiffError: If the sampler makes a point estimate, or the problem is not linear with Gaussian noise.
    """
    from invdiff import samplers
    from invdiff.driver import sample
    from invdiff.posterior import Posterior

    tested = samplers.get(sampler) if isinstance(sampler, str) else sampler
    if tested.kind == "point":
        raise InvdiffError(f"{tested.name} makes a point estimate, which has no width to certify; use draws.")
    if draws < 8:
        raise InvdiffError(f"Comparing spreads needs at least 8 draws, got {draws}; 64 or more tell something.")
    problem = problem.rows(torch.tensor([case]))
    if not isinstance(reference, Posterior):
        reference = sample(
            problem, prior, reference or choose_reference(problem), draws=draws, seed=seed, **options
        )
    made = sample(problem, prior, tested, draws=draws, seed=seed + 1, **options)
    return Certificate(
        tested.name, judge(reference), **_figures(problem, made, reference), posterior=made, reference=reference
    )


def choose_reference(problem: Problem) -> Sampler:
    """Return the certified sampler for a problem: particles for few data, a chain for images."""
    from invdiff import samplers

    support = problem.operator.support
    count = problem.y[0].numel() if support is None else int((support[0] != 0).sum())
    if problem.y.is_complex():
        count *= 2
    return samplers.get("tds", preset="certified") if count <= FEW_DATA else samplers.get("certified")


def judge(reference: Posterior, case: int = 0) -> Verdict:
    """Judge reference draws by their own diagnostics: drift along the chain, acceptance, effective sample size."""
    stats = reference.stats
    stats = stats.isel(case=case) if "case" in stats.dims else stats
    stats = stats.isel(draw=np.flatnonzero(np.asarray(stats["status"]) == "ok"))
    against: list[str] = []
    remarks: list[str] = []
    figures: dict[str, float] = {}
    if "ess" in stats:
        least, count = float(stats["ess"].min()), stats.sizes["draw"]
        figures["ess"] = least
        if least < max(2.0, 0.02 * count):
            against.append(
                f"the particles' effective sample size fell to {least:.1f} of {count}; use more draws or steps, "
                "or the chain of `certified` where there are many data."
            )
    if "accepted" in stats:
        accepted = float(stats["accepted"].mean())
        figures["accepted"] = accepted
        if not 0.2 < accepted < 0.999:
            against.append(
                f"{accepted:.0%} of the Metropolis moves were accepted, which says little; 20 to 99 % do."
            )
    if "trail" in stats:
        late, bound = _drift(np.asarray(stats["trail"])[:, 1:])
        early, _ = _drift(np.asarray(stats["trail"])[:, [0, 2]])
        kept, margin = _memory(np.asarray(stats["trail"])[:, [0, 2], 2:])
        figures |= {"drift": late, "drift_from_start": early, "drift_bound": bound, "memory": kept}
        if late > bound:
            against.append(
                f"the chain still drifts in its second half (largest z {late:.1f}, bound {bound:.1f}); "
                "ask for more sweeps."
            )
        elif early > bound and kept + 2 * margin > FORGOTTEN:
            # what is left of a bias decays as the correlation does, and drift too slow to be seen is no proof
            against.append(
                f"the start was off (largest z {early:.1f}) and the draws still remember it (correlation "
                f"{kept:.2f} +- {2 * margin:.2f}, {FORGOTTEN:g} or less is asked); ask for more sweeps or draws."
            )
        elif early > bound:
            remarks.append(
                f"the start was off (largest z {early:.1f}) and the chain has forgotten it (correlation "
                f"{kept:.2f}); it drifts no more."
            )
    if not figures:
        against.append("these draws carry no diagnostic of convergence.")
    found = ", ".join(f"{k} {v:.3g}" for k, v in figures.items())
    remarks.append(f"no diagnostic speaks against them ({found}).")
    return Verdict(not against, tuple(against or remarks), figures)


def _drift(pair: np.ndarray) -> tuple[float, float]:
    """Largest ``|z|`` of paired changes of facts and of their squared deviations, and the bound of the level.

    Args:
        pair: ``(draws, 2, facts)``: each draw's facts before and after.
    """
    from scipy import stats

    before, after = pair[:, 0], pair[:, 1]
    middle = after.mean(0)
    change = np.concatenate([after - before, (after - middle) ** 2 - (before - middle) ** 2], axis=1)
    n = len(change)
    spread = change.std(0, ddof=1) / math.sqrt(n)
    z = np.abs(change.mean(0)) / np.where(spread > 0, spread, np.inf)
    return float(z.max()), float(stats.t.ppf(1 - LEVEL / (2 * z.size), n - 1))


def _memory(pair: np.ndarray) -> tuple[float, float]:
    """Mean correlation over draws between projections at the start and at the end, and its standard error.

    Args:
        pair: ``(draws, 2, projections)``.
    """
    centred = pair - pair.mean(0)
    products = (centred[:, 0] * centred[:, 1]).mean(0)
    correlation = products / np.maximum(centred[:, 0].std(0) * centred[:, 1].std(0), 1e-300)
    return float(correlation.mean()), 1 / math.sqrt(pair[:, 0].size)


def _figures(problem: Problem, made: Posterior, reference: Posterior) -> dict[str, float]:
    """Compare two sets of draws, images and predicted data."""
    (made_draws, w), (reference_draws, v) = _usable(made), _usable(reference)
    x, r = _real(made_draws), _real(reference_draws)
    mean, std = _moments(r, v)
    here, spread = _moments(x, w)
    seen = std > 1e-6 * std.max()
    bias = math.sqrt(float((((here - mean)[seen] / std[seen]) ** 2).mean()))
    floor = math.sqrt(float((w**2).sum() + (v**2).sum()))
    tail = max(0.05, 1 / (len(x) + 1))
    low, high = quantile(x, [tail, 1 - tail], w)
    inside = (r >= low) & (r <= high)
    data = [_moments(_predict(problem, p), k)[1] for p, k in ((made_draws, w), (reference_draws, v))]
    some = data[1] > 1e-6 * data[1].max()
    return {
        "bias": bias,
        "floor": floor,
        "width": float((spread[seen] / std[seen]).mean()),
        "width_measured": float((data[0][some] / data[1][some]).mean()),
        "coverage": float((v[:, None] * inside).sum(0)[seen].mean()),
        "coverage_level": 1 - 2 * tail,
    }


def _usable(posterior: Posterior) -> tuple[np.ndarray, np.ndarray]:
    """Return the draws that are usable, ``(n, *image)``, and their normalised weights."""
    stats = posterior.stats
    weights = draw_weights(
        np.asarray(stats["status"]), np.asarray(stats["log_weight"]) if "log_weight" in stats else None
    )
    keep = np.flatnonzero(weights > 0)
    return np.asarray(posterior.draws)[keep], weights[keep] / weights[keep].sum()


def _predict(problem: Problem, draws: np.ndarray) -> np.ndarray:
    """Return ``A x`` of draws on the data that are measured, as real columns."""
    a = problem.operator
    x = torch.from_numpy(draws).reshape(len(draws), *a.domain.shape).to(a.domain.dtype)
    z = torch.cat([a(row[None]) for row in x]).flatten(1)
    if a.support is not None:
        z = z[:, (a.support[:1].expand(1, *a.range.shape) != 0).flatten()]
    return _real(z.numpy())


def _real(array: np.ndarray) -> np.ndarray:
    flat = array.reshape(len(array), -1)
    return np.concatenate([flat.real, flat.imag], axis=1) if np.iscomplexobj(flat) else flat


def _moments(x: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    mean = (w[:, None] * x).sum(0)
    bessel = 1 - float((w**2).sum())
    return mean, np.sqrt((w[:, None] * (x - mean) ** 2).sum(0) / max(bessel, 1e-12))
