"""The plan of a run, checked before any work: problem and prior bound to each other, sampler, settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from invdiff.codec import Codec
from invdiff.counting import CountedDenoiser, Counts, count_operator
from invdiff.errors import CapabilityError, InvdiffError
from invdiff.prior import Prior
from invdiff.problem import Problem
from invdiff.rng import SCHEME, Streams
from invdiff.sampler import Context, Sampler
from invdiff.spaces import Space


@dataclass(frozen=True)
class Target:
    """What to draw from, on the device of the run.

    Attributes:
        prior: The prior, with a codec that fits the images.
        image: Space of the draws.
        device: Where everything lives.
        problem: The problem in image space; None for draws from the prior.
        pulled: The whitened problem in prior coordinates.
    """

    prior: Prior
    image: Space
    device: torch.device
    problem: Problem | None = None
    pulled: Problem | None = None

    @property
    def codec(self) -> Codec:
        """The prior's codec."""
        assert self.prior.codec is not None
        return self.prior.codec

    @property
    def cases(self) -> int:
        """Number of cases."""
        return 1 if self.problem is None else self.problem.n_cases


def bind(
    problem: Problem | None, prior: Prior, shape: Sequence[int] | Space | None, device: torch.device
) -> Target:
    """Fit prior and problem to each other on a device; ``shape`` counts where there is no problem."""
    if problem is None:
        image = _image_space(prior, shape)
        return Target(prior.bind(image, 1.0 if prior.scale is None else prior.scale).to(device), image, device)
    problem = problem.to(device)
    bound = prior.adapt(problem).to(device)
    assert bound.codec is not None
    return Target(bound, bound.codec.image, device, problem, problem.whiten().pullback(bound.codec))


def choose_sampler(sampler: Sampler | str | None, problem: Problem | None) -> Sampler:
    """Return the sampler given, named, or right by default.

    Raises:
        InvdiffError: If there is none of that name, or it needs a problem and there is none.
    """
    from invdiff import samplers

    if sampler is None:
        sampler = "dpmpp" if problem is None else "dds"
    if isinstance(sampler, str):
        sampler = samplers.get(sampler)
    if sampler.conditional and problem is None:
        raise InvdiffError(f"{sampler.name} needs a problem; heun, ddim and dpmpp draw from the prior alone.")
    return sampler


@dataclass
class Plan:
    """What a run will do: ``draws`` draws per case of the target with a sampler."""

    target: Target
    sampler: Sampler
    draws: int
    seed: int
    dtype: torch.dtype
    on_nonfinite: Literal["mark", "raise"]
    sigmas: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.sigmas = self.sampler.sigmas(self.target.prior).to(torch.float64)

    @property
    def steps(self) -> int:
        """Number of steps of the noise grid."""
        return len(self.sigmas) - 1

    @property
    def canvas(self) -> Space:
        """Space of the state, in prior coordinates."""
        return self.target.codec.prior

    @property
    def rows(self) -> int:
        """Number of draws in all."""
        return self.target.cases * self.draws

    @property
    def unit(self) -> int:
        """Rows that must stay together: an ensemble is never split."""
        return self.draws if self.sampler.kind == "ensemble" else 1

    def key(self, row: int) -> tuple[int, int]:
        """Return ``(case, draw)`` of a row."""
        return divmod(row, self.draws)

    def config(self) -> dict[str, Any]:
        """Everything that determines the draws, JSON-able."""
        target = self.target
        return {
            "sampler": self.sampler.describe(),
            "prior": target.prior.describe(),
            "problem": None if target.problem is None else target.problem.describe(),
            "image": str(target.image),
            "draws": self.draws,
            "cases": target.cases,
            "seed": self.seed,
            "rng": SCHEME,
            "dtype": str(self.dtype),
            "device": target.device.type,
            "torch": str(torch.__version__),
        }

    def context(self, first: int, count: int) -> tuple[Context, Streams, Counts]:
        """Return what rows ``[first, first + count)`` need: context, random streams, counters."""
        counts, target = Counts(), self.target
        keys = [self.key(r) for r in range(first, first + count)]
        index = torch.tensor([c for c, _ in keys])
        problem = None if target.pulled is None else count_operator(target.pulled.rows(index), counts)

        def image() -> Problem:
            assert target.problem is not None
            return count_operator(target.problem.whiten().rows(index), counts)

        context = Context(
            denoise=CountedDenoiser(target.prior.denoiser, counts),
            problem=problem,
            sigmas=self.sigmas,
            space=self.canvas,
            codec=target.codec.rows(index),
            dtype=self.dtype,
            device=target.device,
            make_image=None if problem is None else image,
        )
        return context, Streams(self.seed, keys), counts


def _abilities(problem: Problem, prior: Prior) -> frozenset[str]:
    """What the pulled-back problem and the prior can do, in the names that samplers ask for."""
    return problem.capabilities | ({"denoiser-vjp"} if prior.denoiser.differentiable >= 1 else set())


def missing_capabilities(sampler: Sampler, problem: Problem, prior: Prior) -> list[str]:
    """Return what a sampler needs and the pulled-back problem or the prior does not have, sorted."""
    return sorted(sampler.requires - _abilities(problem, prior))


def check_capabilities(sampler: Sampler, problem: Problem, prior: Prior) -> None:
    """Refuse a sampler that needs structure the pulled-back problem or the prior does not have.

    Raises:
        CapabilityError: Naming what is missing and which samplers would do.
    """
    from invdiff import samplers

    have = _abilities(problem, prior)
    missing = missing_capabilities(sampler, problem, prior)
    if not missing:
        return
    words = {
        "linear": "a linear operator",
        "quadratic": "a likelihood with a Gaussian noise level",
        "noise": "a noise level above 0",
        "vjp": "an operator with derivatives",
        "denoiser-vjp": "a prior that can be differentiated",
        "prox": "a closed-form prox",
        "svd": "a singular value decomposition",
        "pinv": "a closed-form pseudo-inverse",
    }
    would = [n for n, c in samplers.REGISTRY.items() if c.conditional and c.requires <= have]
    raise CapabilityError(
        f"{sampler.name} needs {' and '.join(words.get(m, m) for m in missing)}, which this problem "
        f"({problem.operator.name}, {problem.likelihood.name}) does not have; "
        + (f"samplers that would do: {', '.join(would)}." if would else "no sampler here would do.")
    )


def check_particles(sampler: Sampler, draws: int) -> None:
    """Refuse an ensemble of one: the draws of a case are its particles, and one cannot be weighted.

    Raises:
        CapabilityError: With what to ask for instead.
    """
    if sampler.kind == "ensemble" and draws < 2:
        raise CapabilityError(
            f"{sampler.name} moves the draws of a case together as an ensemble and needs at least 2 of them, "
            f"got draws={draws}; ask for as many draws as there should be particles (64 or more, say)."
        )


def find_device(device: torch.device | str | None) -> torch.device:
    """Return the device asked for, or by default a CUDA device if there is one, else the CPU.

    Raises:
        InvdiffError: If it cannot be used.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        where = torch.device(device)
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as error:
        raise InvdiffError(f"Device {str(device)!r} cannot be used here; use 'cpu' or leave it out.") from error
    return where


def _image_space(prior: Prior, shape: Sequence[int] | Space | None) -> Space:
    if isinstance(shape, Space):
        return shape
    if prior.codec is not None:
        return prior.codec.image
    if shape is None:
        if prior.denoiser.space is None:
            raise InvdiffError(f"Prior {prior.name} serves any size; give shape=(height, width) to draw from it.")
        return prior.denoiser.space
    dtype = torch.complex64 if prior.card.get("complex") else torch.float32
    size = tuple(int(n) for n in shape)
    return Space((1, *size) if len(size) == 2 else size, dtype)
