"""DiffPIR: plug-and-play restoration with a diffusion denoiser (Zhu et al., CVPR workshops 2023).

    D = D(x, s);   x0 = argmin ||A u - y||^2 / sigma^2 + (lam / s^2) ||u - D||^2
    eps = (x - x0) / s;   x' = x0 + t ( sqrt(1 - zeta) eps + sqrt(zeta) z )

Differences from the published code: ``sigma`` is the likelihood's, in the units of the data (the code mixes
[0, 1] and [-1, 1], which makes its ``lam`` worth 4 in consistent units); it starts from noise alone instead of
noise on an upsampled ``y``; no clamp of ``D``; the last step returns ``x0`` instead of throwing the last
evaluation away; ``order=2`` extrapolates ``x0``. The default draws nine tenths of the noise anew on a geometric
grid, which brings the width near the posterior's; published values are the presets.

The states of deepinv 0.5's ``DiffPIR`` on the same noise and levels, with ``order=1``, ``lam = lambda_ / 2`` (its
proximal step has another factor of 2) and its start, noise on ``A^T y``; it returns the state at the last level.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from invdiff.primitives import extrapolate, gaussian_prox, mix_noise
from invdiff.rng import Streams
from invdiff.sampler import Context, Sampler, State


@dataclass(frozen=True, kw_only=True)
class DiffPIR(Sampler):
    """DiffPIR; one evaluation and one proximal step per level, no network gradient.

    Args:
        lam: Weight of the prior in the proximal step (1 is the noise-consistent value where ``s`` is small).
        zeta: Share of the noise that is drawn anew.
        spread: ``r0``: the proximal variance is ``r0^2 s^2 / (r0^2 + s^2) / lam``; infinity is published.
        order: 1 (published) or 2.
        cg_iterations: Most iterations of a proximal step without closed form.
    """

    name: ClassVar[str] = "diffpir"
    title: ClassVar[str] = "Plug-and-play restoration with a diffusion denoiser"
    reference: ClassVar[str] = "Zhu et al., CVPRW 2023, arXiv:2305.08995"
    requires: ClassVar[frozenset[str]] = frozenset({"linear", "quadratic"})
    _published = {"schedule": "vp-quadratic", "sigma_min": None, "order": 1}
    presets: ClassVar = {
        "published": {**_published, "lam": 7.0 / 4, "zeta": 0.3},
        "tuned": {"steps": 200},
        "deblur": {**_published, "lam": 7.0 / 4, "zeta": 0.3},
        "super-resolution": {**_published, "lam": 6.0 / 4, "zeta": 0.25},
        "inpainting": {**_published, "lam": 1.0 / 4, "zeta": 1.0, "steps": 20},
        "inversebench": {**_published, "lam": 8.0, "zeta": 1.0, "schedule": "edm"},
    }

    steps: int = 100
    schedule: Literal["edm", "geometric", "vp", "vp-quadratic"] = "geometric"
    sigma_min: float | None = 0.01
    lam: float = 1.0
    zeta: float = 0.9
    spread: float = float("inf")
    order: Literal[1, 2] = 2
    cg_iterations: int = 30

    def step(self, k: int, state: State, ctx: Context, rng: Streams) -> State:
        """Denoise, proximal step, partial renoising."""
        x, (s, t) = state["x"], ctx.level(k)
        r2 = 1 / (1 / s**2 + 1 / self.spread**2) / self.lam
        d = gaussian_prox(ctx.measured, ctx.denoise(x, s), r2, max_iter=self.cg_iterations)
        ahead = extrapolate(d, state.get("d") if self.order == 2 else None, ctx.sigmas, k)
        noise = ctx.noise(rng, x.shape[0]) if self.zeta else None
        return {"x": mix_noise(ahead, (x - ahead) / s, t, self.zeta, noise), "d": d}
