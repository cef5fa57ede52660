"""DDNM and DDNM+: denoising diffusion null-space model (Wang, Yu, Zhang, ICLR 2023).

In singular coordinates the data are ``ybar_i = (V^H x)_i + level_i n`` with ``level = sigma / s``. With ``D`` the
denoised image, ``eps = (x - D) / s_k``, ``t = s_{k+1}`` and ``b = eta t``, on the measured coordinates

    x0 = D + lam (ybar - D),      x' = x0 + sqrt(1 - eta^2) t eps + phi z

    DDNM:    lam = 1,                       phi = b
    DDNM+:   lam = min(1, b / level_i),     phi^2 = b^2 - lam^2 level_i^2

and ``x' = D + sqrt(1 - eta^2) t eps + b z`` on the others. DDNM+ takes as much of the data as brings no more
noise than the fresh noise ``b``, and lowers that by the same amount. Time travel: after every ``travel_length``
levels the state is noised back over them and brought down again, ``travel_repeat`` times in all; it lets the
unmeasured coordinates agree with the measured ones.

DDNM fits the data exactly, noise included, and an operator with small singular values then amplifies it without
bound. DDNM+ meets the same noise of the data at every level as if it were new, so that the draws get too narrow
along measured directions the more levels there are: few levels, small ``eta`` and time travel are the setting to
use.

Differences from the published code: ``eps`` is kept on measured coordinates (DDNM+'s code for decompositions
drops it there, and is then DDRM with ``eta_b = 1``) and ``lam`` follows from the noise budget with it; time
travel noises the state, as in the paper, not the uncorrected ``D``; ``order=2`` extrapolates ``x0``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from invdiff.errors import InvdiffError
from invdiff.primitives import extrapolate
from invdiff.primitives.spectral import spectrum
from invdiff.rng import Streams
from invdiff.sampler import Context, Sampler, State


@dataclass(frozen=True, kw_only=True)
class DDNM(Sampler):
    """DDNM+; ``travel_repeat`` evaluations per level, no network gradient; needs a singular value decomposition.

    Args:
        eta: Share of fresh noise, ``sqrt`` of the variance drawn anew.
        plus: Whether the noise of the data counts (DDNM+) or is ignored (DDNM).
        travel_length: Levels to travel back.
        travel_repeat: How often each stretch of levels is run; 1 is no time travel.
        order: 1 (published) or 2.
    """

    name: ClassVar[str] = "ddnm"
    title: ClassVar[str] = "Denoising diffusion null-space model"
    reference: ClassVar[str] = "Wang, Yu, Zhang, ICLR 2023, arXiv:2212.00490"
    requires: ClassVar[frozenset[str]] = frozenset({"linear", "quadratic", "svd"})
    _published = {"steps": 100, "schedule": "vp", "sigma_min": None, "eta": 0.85, "travel_repeat": 1, "order": 1}
    presets: ClassVar = {
        "published": _published,
        "published-noiseless": {**_published, "plus": False},
        "inversebench": {**_published, "schedule": "geometric", "sigma_max": 100.0, "sigma_min": 0.01},
        "tuned": {},  # the defaults
    }

    steps: int = 20
    schedule: Literal["edm", "geometric", "vp", "vp-quadratic"] = "geometric"
    sigma_min: float | None = 0.01
    eta: float = 0.2
    plus: bool = True
    travel_length: int = 1
    travel_repeat: int = 6
    order: Literal[1, 2] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.plus and not 0 < self.eta <= 1:
            raise InvdiffError(
                f"ddnm: the data enter in place of fresh noise, so eta must be in (0, 1], got {self.eta}."
            )
        if min(self.travel_length, self.travel_repeat) < 1:
            raise InvdiffError("ddnm: travel_length and travel_repeat must be at least 1.")

    def step(self, k: int, state: State, ctx: Context, rng: Streams) -> State:
        """Go down one level; at the end of a stretch, travel back and go down again."""
        state = self._descend(k, state, ctx, rng)
        first, low = k + 1 - self.travel_length, float(ctx.sigmas[k + 1])
        if low and (k + 1) % self.travel_length == 0:
            for _ in range(self.travel_repeat - 1):
                jump = math.sqrt(float(ctx.sigmas[first]) ** 2 - low**2)
                state = {"x": state["x"] + jump * ctx.noise(rng, state["x"].shape[0])}
                for j in range(first, k + 1):
                    state = self._descend(j, state, ctx, rng)
        return state

    def _descend(self, k: int, state: State, ctx: Context, rng: Streams) -> State:
        """Denoise, correct by the data, renoise."""
        x, (s, t) = state["x"], ctx.level(k)
        d = ctx.denoise(x, s)
        z = ctx.noise(rng, x.shape[0])
        svd, ybar, level = spectrum(ctx.measured)
        b = self.eta * t
        seen = svd.s > 0
        noise = torch.where(seen & self.plus, level, 0)
        lam = torch.where(noise > b, b / torch.where(noise > 0, noise, 1), 1) * seen
        phi = (b * b - (lam * noise) ** 2).clamp_min(0).sqrt()
        x0 = d + svd.v(lam * (ybar - svd.vh(d)))
        ahead = extrapolate(x0, state.get("d") if self.order == 2 else None, ctx.sigmas, k)
        kept = math.sqrt(1 - self.eta**2) * t / s
        return {"x": ahead + kept * (x - d) + b * z + svd.v((phi - b) * seen * svd.vh(z)), "d": x0}
