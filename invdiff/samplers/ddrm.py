"""DDRM: denoising diffusion restoration models (Kawar, Elad, Ermon, Song, NeurIPS 2022).

In singular coordinates the data are ``ybar_i = (V^H x)_i + level_i n`` with ``level = sigma / s``. With ``D`` the
denoised image, ``eps = (x - D) / s_k`` and ``t = s_{k+1}``, coordinate by coordinate,

    not measured:     x' = D + sqrt(1 - eta^2) t eps + eta t z
    t < level:        x' = D + sqrt(1 - eta_a^2) t (ybar - D) / level + eta_a t z
    t >= level:       x' = (1 - eta_b) D + eta_b ybar + sqrt(t^2 - eta_b^2 level^2) z

and the chain starts from ``N(ybar, s_0^2 - level^2)`` on the coordinates with ``level < s_0``. The step to 0
returns ``D`` where the data have noise: let the last level lie below it.

Differences from the published code: works with every decomposition, complex ones and paddings included (nothing
is padded with zero singular values); the square roots are clamped at 0, where they could turn NaN at
``t = level``; ``sigma = 0`` needs no guard; the coordinates with ``t = level`` are no longer left out of both
cases; no factor 2 on ``sigma``. There is no second-order variant: a step that draws most of its noise anew
follows no differential equation to extrapolate along, and with it the draws come out twice too wide. The same
holds for many levels: 50 to 100 do best.

The states of deepinv 0.5's ``DDRM`` on the same noise and levels (``eps=0``), once its noise, which is divided
by ``sqrt(2)``, is scaled up again; it takes coordinates with ``s <= sigma`` for not measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from invdiff.errors import InvdiffError
from invdiff.primitives.spectral import spectrum
from invdiff.rng import Streams
from invdiff.sampler import Context, Sampler, State


@dataclass(frozen=True, kw_only=True)
class DDRM(Sampler):
    """DDRM; one evaluation per step, no network gradient; needs a singular value decomposition.

    Args:
        eta: Share of fresh noise where nothing is measured (``sqrt`` of the variance drawn anew).
        eta_a: The same where the data are noisier than the next level; None takes ``eta``.
        eta_b: Weight of the data where they are less noisy than the next level.
    """

    name: ClassVar[str] = "ddrm"
    title: ClassVar[str] = "Denoising diffusion restoration"
    reference: ClassVar[str] = "Kawar, Elad, Ermon, Song, NeurIPS 2022, arXiv:2201.11793"
    requires: ClassVar[frozenset[str]] = frozenset({"linear", "quadratic", "svd"})
    _published = {"eta": 0.85, "eta_b": 1.0, "schedule": "vp", "sigma_min": None}
    presets: ClassVar = {
        "published": {**_published, "steps": 20},
        "published-100": {**_published, "steps": 100},
        "inversebench": {"eta": 0.85, "eta_b": 1.0, "steps": 100, "sigma_max": 100.0},
        "tuned": {},  # the defaults
    }

    steps: int = 70
    schedule: Literal["edm", "geometric", "vp", "vp-quadratic"] = "geometric"
    sigma_min: float | None = 0.01
    eta: float = 1.0
    eta_a: float | None = None
    eta_b: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(0 <= e <= 1 for e in (self.eta, self.eta_a or 0.0)):
            raise InvdiffError("ddrm: eta and eta_a are shares of noise and must be between 0 and 1.")

    def init(self, ctx: Context, rows: int, rng: Streams) -> State:
        """Start from the data where they are less noisy than the first level."""
        start = float(ctx.sigmas[0])
        x = start * ctx.noise(rng, rows)
        svd, ybar, level = spectrum(ctx.measured)
        known = level < start
        width = (start**2 - torch.where(known, level, 0) ** 2).sqrt() / start
        return {"x": x + svd.v(known * (ybar + (width - 1) * svd.vh(x)))}

    def step(self, k: int, state: State, ctx: Context, rng: Streams) -> State:
        """Denoise and move every coordinate by its own case."""
        x, (s, t) = state["x"], ctx.level(k)
        d = ctx.denoise(x, s)
        z = ctx.noise(rng, x.shape[0])
        free = d + (math.sqrt(1 - self.eta**2) * t / s) * (x - d) + (self.eta * t) * z
        svd, ybar, level = spectrum(ctx.measured)
        dbar, zbar = svd.vh(d), svd.vh(z)
        eta_a = self.eta if self.eta_a is None else self.eta_a
        noisy = level > t
        pull = torch.where(noisy, math.sqrt(1 - eta_a**2) * t / torch.where(noisy, level, 1), self.eta_b)
        width = (t * t - (self.eta_b * torch.where(noisy, 0, level)) ** 2).clamp_min(0).sqrt()
        fixed = dbar + pull * (ybar - dbar) + torch.where(noisy, eta_a * t, width) * zbar
        return {"x": free + svd.v((svd.s > 0) * (fixed - svd.vh(free)))}
