"""Conformal intervals: corrected on cases with known truth, so that they cover whatever the sampler got wrong.

With scores ``s_i`` of ``N`` cases, e.g. ``|x - mean| / std`` at one pixel, the ``ceil((N + 1) level)``-th smallest
of them is the factor with which ``mean +- factor std`` holds the truth of a further case with probability
``level`` or more. `invdiff.uq.risk` controls whole images instead.

This needs that the new case and those of the calibration are exchangeable: the same population, operator, noise,
prior and sampler. The guarantee is an average over the population. It does not hold for every patient, nor for
subgroups.

Sources: Romano, Patterson, Candes, "Conformalized quantile regression", NeurIPS 2019; Angelopoulos et al.,
"Image-to-image regression with distribution-free uncertainty quantification and applications in imaging", ICML
2022.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from invdiff.errors import InvdiffError
from invdiff.summaries import quantile
from invdiff.uq.draws import ordered, read_draws, read_truth, to_numpy
from invdiff.uq.regions import region_means

if TYPE_CHECKING:
    from invdiff.posterior import Posterior

Score = Literal["scaled", "quantile"]

_SCHEMA = "invdiff.conformal/1"


@dataclass(frozen=True)
class Conformal:
    """A calibrated correction of intervals.

    Attributes:
        score: ``scaled``: ``mean +- factor std``; ``quantile``: ``[q_low - factor, q_high + factor]``.
        level: Nominal coverage.
        factor: One per pixel ``(*image)``, one per region ``(r,)``, or one for all.
        labels: Label map of the regions, None for pixels.
        confidence: Of risk control, over the choice of the calibration cases; None for split-conformal intervals.
        n_cases: Cases of the calibration.
        population: What they were, in words.
        fingerprint: Hash of problem, prior and sampler that they were made with (`fingerprint_of`).
    """

    score: Score
    level: float
    factor: np.ndarray
    labels: np.ndarray | None
    confidence: float | None
    n_cases: int
    population: str
    fingerprint: str

    @property
    def guarantee(self) -> str:
        """What the intervals promise, in one sentence."""
        over = f"cases drawn like the {self.n_cases} of the calibration ({self.population})"
        if self.confidence is not None:
            return (
                f"With confidence {self.confidence:.0%} over the choice of the calibration cases, at least "
                f"{self.level:.0%} of the pixels are inside on average over {over}; not for every case."
            )
        what = "pixel" if self.labels is None else "region"
        return (
            f"Each {what}'s interval holds the truth with probability at least {self.level:.0%} on average over "
            f"{over} and over calibrations; not for every case."
        )

    def apply(self, draws: Any, fingerprint: str | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return the corrected ends, ``(case, *image)`` or ``(case, region)`` each.

        Args:
            draws: ``(case, draw, ...)`` or a `Posterior`; magnitudes, where complex.
            fingerprint: Of how they were made; a `Posterior` knows its own.

        Raises:
            InvdiffError: If they were made with another problem, prior or sampler, or have another shape.
        """
        self._check_origin(draws, fingerprint)
        ends = [
            uncorrected(values, w, self.score, self.level) for values, w in interval_values(draws, self.labels)
        ]
        if self.factor.ndim and self.factor.shape != ends[0][0].shape:
            raise InvdiffError(
                f"The calibration was for images {self.factor.shape}, and these are {ends[0][0].shape}."
            )
        low, high, unit = (np.stack(part) for part in zip(*ends))
        # A pixel without spread keeps its value even where no finite factor was enough.
        width = np.where(unit > 0, self.factor, 0.0) * unit
        return low - width, high + width

    def attach(self, posterior: Posterior) -> Posterior:
        """Return the posterior with ``conformal_lo`` and ``conformal_hi`` in its summary, to be saved with it.

        Raises:
            InvdiffError: If the calibration is for regions, or for draws made in another way.
        """
        import xarray as xr

        from invdiff.posterior import Posterior

        if self.labels is not None:
            raise InvdiffError("A calibration of regions has no intervals of pixels to attach; use apply.")
        ends = self.apply(posterior)
        summary = posterior.tree.children["summary"].to_dataset(inherit=False)
        like = summary["q05"]
        for name, which, values in zip(("conformal_lo", "conformal_hi"), ("lower", "upper"), ends):
            attrs = {"long_name": f"{which} end of the conformal {self.level:.0%} interval"}
            attrs["guarantee"] = self.guarantee
            summary[name] = like.copy(data=values.reshape(like.shape).astype(like.dtype)).assign_attrs(attrs)
        tree = posterior.tree.copy()
        tree["summary"] = xr.DataTree(summary)
        return Posterior(tree)

    def save(self, path: str | Path) -> Path:
        """Write a JSON file."""
        from invdiff.io.atomic import whole_file

        facts = {
            "schema": _SCHEMA,
            "guarantee": self.guarantee,
            "score": self.score,
            "level": self.level,
            "confidence": self.confidence,
            "n_cases": self.n_cases,
            "population": self.population,
            "fingerprint": self.fingerprint,
            "factor": _pack(np.nextafter(self.factor.astype(np.float32), np.float32(np.inf))),
            "labels": None if self.labels is None else _pack(self.labels.astype(np.int32)),
        }
        with whole_file(Path(path)) as partial:
            partial.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Conformal:
        """Read a file that `save` wrote.

        Raises:
            InvdiffError: If it is missing, damaged or of another kind.
        """
        name = Path(path).name
        try:
            facts = json.loads(Path(path).read_text(encoding="utf-8"))
            if not isinstance(facts, dict) or facts.get("schema") != _SCHEMA:
                raise InvdiffError(f"{name} is no calibration of schema {_SCHEMA}; write one with Conformal.save.")
            return cls(
                score=check_score(facts["score"]),
                level=float(facts["level"]),
                factor=_unpack(facts["factor"], np.float32).astype(float),
                labels=None if facts["labels"] is None else _unpack(facts["labels"], np.int32),
                confidence=None if facts["confidence"] is None else float(facts["confidence"]),
                n_cases=int(facts["n_cases"]),
                population=str(facts["population"]),
                fingerprint=str(facts["fingerprint"]),
            )
        except OSError as error:
            raise InvdiffError(f"The calibration {name} cannot be read: {error.strerror}.") from error
        except InvdiffError:
            raise
        except (KeyError, TypeError, ValueError, zlib.error) as error:
            raise InvdiffError(f"{name} is damaged and holds no calibration; write it again.") from error

    def _check_origin(self, draws: Any, fingerprint: str | None) -> None:
        from invdiff.posterior import Posterior

        if fingerprint is None and isinstance(draws, Posterior):
            fingerprint = fingerprint_of(draws)
        if fingerprint is None:
            raise InvdiffError(
                "Give the fingerprint of how these draws were made; a calibration holds only for the problem, "
                "prior and sampler that it was made with."
            )
        if fingerprint != self.fingerprint:
            raise InvdiffError(
                "These draws were made with another problem, prior or sampler configuration than the calibration "
                f"({fingerprint[:12]} against {self.fingerprint[:12]}); calibrate anew."
            )


def calibrate(
    draws: Any,
    truth: Any,
    level: float = 0.9,
    score: Score = "scaled",
    labels: Any = None,
    *,
    population: str,
    fingerprint: str | None = None,
    weights: Any = None,
) -> Conformal:
    """Calibrate an interval per pixel, or per mean over labelled regions, by split-conformal prediction.

    Args:
        draws: ``(case, draw, ...)`` or a `Posterior`; magnitudes, where complex.
        truth: ``(case, ...)``.
        level: Coverage, at most ``N / (N + 1)`` for ``N`` cases.
        score: ``scaled``: ``|x - mean| / std``; ``quantile``: distance outside the equal-tailed interval of the
            draws (negative inside), which keeps its asymmetry.
        labels: Whole numbers over the last axes of the images, 0 for no region; None calibrates pixels.
        population: What the cases are, in words: whoever uses the intervals reads it.
        fingerprint: Of problem, prior and sampler (`fingerprint`); a `Posterior` knows its own.
        weights: ``(case, draw)``, where draws are weighted.
    """
    origin = origin_of(draws, fingerprint, population)
    check_score(score)
    found = read_draws(draws, weights)
    target = ordered(read_truth(truth, found))
    n = len(target)
    k = math.ceil((n + 1) * level - 1e-9)
    if not 0 < level < 1 or k > n:
        raise InvdiffError(
            f"{n} cases calibrate levels above 0 up to {n / (n + 1):.3f}, and {level!r} was asked for; use more."
        )
    where = None if labels is None else to_numpy(labels)
    scores = []
    for (values, w), t in zip(interval_values(draws, where, weights), target):
        low, high, unit = uncorrected(values, w, score, level)
        scores.append(conformal_score(t if where is None else region_means(t[None], where)[0], low, high, unit))
    factor = np.sort(np.stack(scores), axis=0)[k - 1]
    return Conformal(score, level, factor, where, None, n, population, origin)


def fingerprint(problem: Any, prior: Any, sampler: Any) -> str:
    """Return a hash of how draws are made.

    Each part is an object that describes itself (`Problem`, `Prior`, `Sampler`), or words or numbers of your own:
    where the operator differs from case to case (masks, coil maps), name what the cases have in common.
    """
    parts = [_describe(part) for part in (problem, prior, sampler)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def fingerprint_of(posterior: Any) -> str:
    """Return the fingerprint of a posterior from its provenance: operator, noise, prior, configured sampler."""
    known = posterior.provenance
    problem = known.get("problem") or known
    prior = known.get("prior") or {}
    parts = [
        {k: problem.get(k) for k in ("operator", "likelihood")},
        {k: prior.get(k) for k in ("id", "sha256")},
        known.get("sampler"),
    ]
    return fingerprint(*parts)


def _describe(part: Any) -> Any:
    if not hasattr(part, "describe"):
        return part
    found = part.describe()
    if "operator" in found:
        return {k: found[k] for k in ("operator", "likelihood")}
    return {k: found[k] for k in ("id", "sha256")} if "licence" in found else found


def origin_of(draws: Any, given: str | None, population: str) -> str:
    """Return the fingerprint of calibration draws, which their maker gives or a posterior knows."""
    from invdiff.posterior import Posterior

    if not population.strip():
        raise InvdiffError("Say in words what population the cases are from; the guarantee holds for it alone.")
    if given is None and isinstance(draws, Posterior):
        return fingerprint_of(draws)
    if given is None:
        raise InvdiffError("Give a fingerprint of problem, prior and sampler; uq.fingerprint makes one.")
    return given


def interval_values(
    draws: Any, labels: np.ndarray | None, weights: Any = None
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return what intervals are for, ``(n, *image)`` or ``(n, region)``, with weights, case by case."""
    cases = [(ordered(x), w) for x, w in read_draws(draws, weights)]
    return cases if labels is None else [(region_means(x, labels), w) for x, w in cases]


def uncorrected(
    x: np.ndarray, w: np.ndarray, score: str, level: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return lower end, upper end and unit of the interval before correction."""
    if score == "quantile":
        low, high = quantile(x, [(1 - level) / 2, (1 + level) / 2], w)
        return low, high, np.ones_like(low)
    mean = np.tensordot(w, x, axes=1)
    return mean, mean, np.sqrt(np.tensordot(w, (x - mean) ** 2, axes=1) / (1 - (w**2).sum()))


def conformal_score(truth: np.ndarray, low: np.ndarray, high: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """Return by how many units the truth lies outside of the interval before correction; negative inside."""
    outside = np.maximum(low - truth, truth - high)
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled = outside / unit
    # Without spread a pixel is right, or no factor makes it so.
    return np.where(unit > 0, scaled, np.where(outside > 0, np.inf, 0.0))


def check_score(score: str) -> Score:
    """Return the name of a score, or refuse it."""
    if score not in ("scaled", "quantile"):
        raise InvdiffError(f"Conformal scores are 'scaled' and 'quantile', not {score!r}.")
    return "scaled" if score == "scaled" else "quantile"


def _pack(array: np.ndarray) -> dict[str, Any]:
    data = zlib.compress(np.ascontiguousarray(array).tobytes(), 9)
    return {"shape": list(array.shape), "data": base64.b64encode(data).decode()}


def _unpack(packed: dict[str, Any], kind: Any) -> np.ndarray:
    shape = tuple(int(n) for n in packed["shape"])
    size = math.prod(shape) * np.dtype(kind).itemsize
    reader = zlib.decompressobj()
    data = reader.decompress(base64.b64decode(packed["data"], validate=True), size + 1)
    if min(shape, default=1) < 0 or len(data) != size:
        raise TypeError("shape and data do not belong together")
    return np.frombuffer(data, kind).reshape(shape)
