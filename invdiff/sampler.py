"""The sampler contract: frozen hyper-parameters with ``init``, ``step``, ``finish``, and nothing else.

Loops, devices, batches, progress, NaN policy, checkpoints, units and files belong to the driver.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from invdiff import schedule as schedules
from invdiff.codec import Codec
from invdiff.counting import CountedDenoiser
from invdiff.errors import InvdiffError
from invdiff.prior import Prior
from invdiff.problem import Problem
from invdiff.rng import Streams
from invdiff.spaces import Space

#: A flat dictionary of tensors, each with a leading row axis; nothing else is state.
State = dict[str, Tensor]
#: Entries of the last state kept with the draw's statistics: log-weight and effective sample sizes of ensembles
#: (the smallest, and over all resamplings); accepted share of Metropolis moves; facts along a chain, to tell
#: whether it still drifts; network calls one after another where steps are solved in parallel.
RECORDED = ("log_weight", "ess", "ess_run", "accepted", "trail", "rounds")


@dataclass(frozen=True)
class Context:
    """Everything a step may read; all of it in prior coordinates, but for ``image``.

    Attributes:
        denoise: ``D(x, sigma)``, counting; ``denoise.vjp`` gives the Jacobian product too.
        problem: The rows of this chunk, pulled back; None for unconditional sampling.
        sigmas: The noise grid, ``(K + 1,)``, float64, decreasing, ending in 0.
        space: Space of the state.
        codec: Between states and images, for the rows of this chunk.
        dtype: Precision of the state.
        device: Where everything lives.
        make_image: Makes ``image``; few samplers ask for it.
    """

    denoise: CountedDenoiser
    problem: Problem | None
    sigmas: Tensor
    space: Space
    codec: Codec
    dtype: torch.dtype = torch.float64
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    make_image: Callable[[], Problem] | None = None

    @cached_property
    def image(self) -> Problem:
        """The rows of this chunk in image space, for samplers that fit images before they encode them."""
        if self.make_image is None:
            raise InvdiffError(
                "This sampler needs a problem and the codec of the prior; run it by invdiff.sample."
            )
        return self.make_image()

    @property
    def measured(self) -> Problem:
        """The problem, for samplers that cannot do without."""
        if self.problem is None:
            raise InvdiffError("This sampler needs a problem; use heun, ddim or dpmpp to draw from the prior.")
        return self.problem

    def spread(self, given: float | None) -> float:
        """Return the width ``r0`` of the prior in its own units: the one given, or the denoiser's."""
        return self.denoise.denoiser.sigma_data if given is None else given

    def noise(self, rng: Streams, rows: int) -> Tensor:
        """Return standard normal numbers shaped as the state."""
        return rng.normal(torch.empty(rows, *self.space.shape, dtype=self.dtype, device=self.device))

    def level(self, k: int) -> tuple[float, float]:
        """Return ``(sigma_k, sigma_{k+1})``."""
        return float(self.sigmas[k]), float(self.sigmas[k + 1])


@dataclass(frozen=True, kw_only=True)
class Sampler(ABC):
    """Base of all samplers: hyper-parameters, and pure functions of (state, context, random numbers).

    Attributes:
        steps: Number of steps of the noise grid.
        schedule: ``edm`` (polynomial, exponent 7), ``geometric``, ``vp``, ``vp-quadratic`` or ``flow`` (equal
            steps of ``sigma / (1 + sigma)``).
        sigma_max, sigma_min: Ends of the grid; None takes the prior's.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    reference: ClassVar[str]
    kind: ClassVar[Literal["posterior", "point", "ensemble"]] = "posterior"
    exactness: ClassVar[Literal["asymptotic", "gaussian", "heuristic"]] = "heuristic"
    #: Capabilities asked of the pulled-back problem (``linear quadratic vjp prox svd ...``) and of the prior
    #: (``denoiser-vjp``); checked after pullback and before any work.
    requires: ClassVar[frozenset[str]] = frozenset()
    #: Whether a problem is needed at all.
    conditional: ClassVar[bool] = True
    #: Published defaults per task and our own recommended settings, by name.
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    #: Shift of the flow's clock; samplers of flows make it a setting.
    shift = 1.0

    steps: int = 100
    schedule: Literal["edm", "geometric", "vp", "vp-quadratic", "flow"] = "edm"
    sigma_max: float | None = None
    sigma_min: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.steps, int) or self.steps < 1:
            raise InvdiffError(f"{self.name}: steps must be an integer of at least 1, got {self.steps!r}.")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Any:
        """Return the sampler with a named preset, e.g. ``DPS.preset("super-resolution")``."""
        if name not in cls.presets:
            raise InvdiffError(f"{cls.name} has no preset {name!r}; there are {sorted(cls.presets)}.")
        return cls(**{**cls.presets[name], **changes})

    def sigmas(self, prior: Prior) -> Tensor:
        """Return the noise grid for a prior, ``(K + 1,)``, decreasing, ending in 0."""
        low, high = self.ends(prior)
        if self.schedule == "edm":
            return schedules.edm(self.steps, low, high)
        if self.schedule == "geometric":
            return schedules.geometric(self.steps, low, high)
        if self.schedule == "flow":
            return schedules.flow(self.steps, low, high, self.shift)
        return schedules.vp_linear(self.steps, low, high, quadratic=self.schedule == "vp-quadratic")

    def ends(self, prior: Prior) -> tuple[float, float]:
        """Return the lowest positive level of the grid and the highest, inside the prior's range."""
        low = max(self.sigma_min or prior.denoiser.sigma_min, prior.denoiser.sigma_min)
        return low, min(self.sigma_max or prior.denoiser.sigma_max, prior.denoiser.sigma_max)

    def init(self, ctx: Context, rows: int, rng: Streams) -> State:
        """Return the state before the first step; by default ``x = sigma_0 * noise``."""
        return {"x": ctx.noise(rng, rows) * float(ctx.sigmas[0])}

    @abstractmethod
    def step(self, k: int, state: State, ctx: Context, rng: Streams) -> State:
        """Return the state at ``sigmas[k + 1]`` from the one at ``sigmas[k]``; pure given ``rng``."""

    def finish(self, state: State, ctx: Context) -> Tensor:
        """Return the draws in prior coordinates, ``(B, *space)``."""
        return state["x"]

    def describe(self) -> dict[str, Any]:
        """Return name, kind, exactness and the full configuration, for provenance."""
        config = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {"name": self.name, "kind": self.kind, "exactness": self.exactness, "config": config}
