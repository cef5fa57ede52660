"""Score-ALD: annealed Langevin dynamics on the posterior (Jalal et al., NeurIPS 2021).

At each level ``s``, ``moves`` times, with ``h = step_size s^2``,

    x <- x + h [ (D(x, s) - x) / s^2 + A^H (y - A x) / (sigma^2 + gamma_s^2) ] + sqrt(2 h) z

The noise level of the data is inflated by ``gamma_s = gamma s ||A||``, about what the noise in ``x`` adds to
``A x``: the likelihood is loose while ``x`` is noisy, and its own at the end. Every level has a density as its
target, ``p_s(x)`` times the inflated likelihood, so that enough small moves at low levels draw from the
posterior; the weights of separate modes are those that the path of levels gave them. With ``momentum`` the moves
are Hamiltonian (one leapfrog step between partial refreshments), which take fewer evaluations.

Differences from the published code: ``sigma`` of the likelihood is in the sum (the code has ``gamma_s = s``
alone); ``||A||``, by power iterations, makes ``gamma`` independent of units; the chain starts from the first
level's noise, not from uniform numbers; the result is denoised by ``D(x, s)``, as usual for NCSN but left out
there; step sizes that cannot be stable are refused.

The score is that of deepinv 0.5's ``ALDDataFidelity`` where ``gamma ||A||`` is 1 in image units.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from invdiff.errors import InvdiffError
from invdiff.primitives import hmc, langevin
from invdiff.primitives.curvature import operator_norm
from invdiff.rng import Streams
from invdiff.sampler import Context, Sampler, State
from invdiff.spaces import per_row


@dataclass(frozen=True, kw_only=True)
class ScoreALD(Sampler):
    """Annealed Langevin dynamics; ``moves`` evaluations per level and 1 more with momentum, no network gradient.

    Args:
        moves: Moves per level.
        step_size: Step over ``s^2``.
        gamma: Inflation of the data's noise level, relative to the level of ``x``.
        momentum: Of the Hamiltonian moves; 0 is Langevin (published).
    """

    name: ClassVar[str] = "scoreald"
    title: ClassVar[str] = "Annealed Langevin dynamics on the posterior"
    reference: ClassVar[str] = "Jalal et al., NeurIPS 2021, arXiv:2108.01368"
    exactness: ClassVar = "asymptotic"
    requires: ClassVar[frozenset[str]] = frozenset({"linear", "quadratic"})
    presets: ClassVar = {
        "published": {  # step 9e-7 at the last of 2311 levels from 232 to 0.0066 is 0.0207 of its square
            "steps": 2311,
            "moves": 3,
            "step_size": 0.0207,
            "gamma": 1.0,
            "momentum": 0.0,
            "sigma_max": 232.0,
            "sigma_min": 0.0066,
        },
        "langevin": {"steps": 200, "moves": 5, "step_size": 0.3, "momentum": 0.0},
        "tuned": {"steps": 100, "moves": 8},
    }

    steps: int = 50
    schedule: Literal["edm", "geometric", "vp", "vp-quadratic"] = "geometric"
    sigma_min: float | None = 0.01
    moves: int = 8
    step_size: float = 0.6
    gamma: float = 0.5
    momentum: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.step_size > 0 and self.gamma > 0 and 0 <= self.momentum < 1):
            raise InvdiffError("scoreald: step_size and gamma must be positive, and momentum in [0, 1).")
        # The target's curvature is at most (1 + 1 / gamma^2) / s^2.
        most = (4 if self.momentum else 2) / (1 + 1 / self.gamma**2)
        if self.step_size >= most:
            raise InvdiffError(
                f"scoreald: steps of {self.step_size:g} s^2 are unstable with gamma {self.gamma:g}; "
                f"take a step_size below {most:.3g} or a larger gamma."
            )

    def init(self, ctx: Context, rows: int, rng: Streams) -> State:
        """Start from noise; find the norm of the operator."""
        x = ctx.noise(rng, rows) * float(ctx.sigmas[0])
        return {"x": x, "norm": operator_norm(ctx.measured, x)}

    def step(self, k: int, state: State, ctx: Context, rng: Streams) -> State:
        """The moves of one level."""
        (s, t), problem = ctx.level(k), ctx.measured

        def score(x: Tensor) -> Tensor:
            variance = problem.sigma(x) ** 2 + per_row((self.gamma * s * state["norm"]) ** 2, problem.y)
            pull = problem.operator.vjp(x, problem.residual(x) / variance)
            return (ctx.denoise(x, s) - x) / (s * s) + pull

        x, h = state["x"], self.step_size * s * s
        if self.momentum:
            x = hmc(x, score, h, self.moves, self.momentum, rng)
        else:
            x = langevin(x, score, h, self.moves, rng)
        return {**state, "x": x if t else ctx.denoise(x, s)}
