"""DeqIR: deep equilibrium diffusion restoration, all levels solved at once (Cao, Shi, Zhang, Zhang, CVPR 2024).

A chain from ``x_0`` at ``s_0`` down to the image ``x_K`` is a fixed point of the map that takes the denoised
images ``D_k = D(x_k, s_k)`` of all levels from the old chain, in one call of the network, and then runs from
``x_0`` again

    x0_k = argmin_u ||A u - y||^2 / sigma^2 + ||u - D_k||^2 / r^2,      x_{k+1} = step from x_k towards x0_k

``eps="denoised"`` (published): ``x0 + t (sqrt(1 - eta^2) (x - D)/s + eta z_k)``; ``eps="corrected"``: the DDIM
step from ``x`` to ``x0`` with ``eta``. The noises ``z_k`` are drawn once, before. ``hard`` (published):
``r = inf``, which fits the data exactly, noise included; else ``r^2 = r0^2 s^2 / (r0^2 + s^2)``.

One step of the driver is one iteration: Anderson's next chain from the last ``memory`` ones. A draw stops when
its chain moves by less than ``tol``. The fixed point is what the sequential sampler gives, and ``steps``
iterations always reach it: each makes one more level exact, which is kept out of the mixing. It pays where one
call with ``steps`` rows is faster than ``steps`` calls in a row; the evaluations are counted in full.

Differences from the published code: ``D_k`` is held in an iteration, not ``eps_k``, with which noisy chains do
not converge; residuals and stops are per draw, level by level in units of ``sqrt(r0^2 + s^2)``; every level has
its own ``z_k`` (the code repeats one); the wrong square of ``abar`` is gone; ``x_0`` is not optimised through
the equilibrium.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from invdiff.primitives import ddim, extrapolate, gaussian_prox, mix_noise
from invdiff.primitives.anderson import History
from invdiff.rng import Streams
from invdiff.sampler import Context, Sampler, State
from invdiff.spaces import norm, per_row


@dataclass(frozen=True, kw_only=True)
class DeqIR(Sampler):
    """Fixed point over the chain; ``steps`` evaluations per iteration in one batch, no network gradient.

    The state holds ``2 memory + 2`` chains of ``steps`` images per draw: lower ``max_batch`` for large images.

    Args:
        steps: Levels of the chain, and most iterations.
        hard: Whether every level fits the data exactly (published, for data without noise).
        eps: ``denoised`` (published) or ``corrected``.
        eta: Stochasticity of the step; 0 is published.
        spread: ``r0`` in prior units; None takes the prior's.
        order: 1 (published) or 2.
        memory: Chains that Anderson acceleration combines; 1 is plain iteration.
        tol: Relative change of the chain at which a draw stops.
        cg_iterations: Most iterations of a proximal step without closed form.
    """

    name: ClassVar[str] = "deqir"
    title: ClassVar[str] = "Deep equilibrium restoration (all levels at once)"
    reference: ClassVar[str] = "Cao et al., CVPR 2024, arXiv:2311.11600"
    requires: ClassVar[frozenset[str]] = frozenset({"linear", "quadratic"})
    _published = {"schedule": "vp", "sigma_min": None, "hard": True, "eps": "denoised", "eta": 0.0, "order": 1}
    presets: ClassVar = {"published": {**_published, "steps": 25}, "tuned": {"steps": 100}}

    steps: int = 50
    schedule: Literal["edm", "geometric", "vp", "vp-quadratic"] = "geometric"
    sigma_min: float | None = 0.01
    hard: bool = False
    eps: Literal["denoised", "corrected"] = "corrected"
    eta: float = 1.0
    spread: float | None = None
    order: Literal[1, 2] = 2
    memory: int = 5
    tol: float = 1e-3
    cg_iterations: int = 30

    def init(self, ctx: Context, rows: int, rng: Streams) -> State:
        """Draw the start and all noises; the first chain is the start, falling with the level."""
        start = ctx.noise(rng, rows) * float(ctx.sigmas[0])
        chain = torch.stack([start * float(t / ctx.sigmas[0]) for t in ctx.sigmas[1:]], 1)
        noise = torch.zeros_like(chain)
        if self.eta:
            noise = torch.stack([ctx.noise(rng, rows) for _ in ctx.sigmas[1:]], 1)
        none = torch.stack([torch.zeros_like(chain)] * self.memory, 1)
        moving = torch.ones(rows, dtype=ctx.dtype, device=ctx.device)
        state = {"x": chain[:, -1].clone(), "start": start, "noise": noise, "chain": chain, "moving": moving}
        return {**state, "points": none, "images": none.clone()}

    def step(self, k: int, state: State, ctx: Context, rng: Streams) -> State:
        """One iteration over all levels, for the draws that still move."""
        if not bool(state["moving"].any()):
            return state
        chain, moving = state["chain"], state["moving"]
        image = self._sweep(state, ctx)
        unit = (ctx.spread(self.spread) ** 2 + ctx.sigmas[1:] ** 2).sqrt().to(chain.device, ctx.dtype)
        unit = unit.reshape(1, -1, *[1] * (chain.ndim - 2))
        history = History(state["points"], state["images"], unit)
        new = history.next(k, chain, image)
        new[:, : k + 1] = image[:, : k + 1]  # exact by now, as in plain iteration: k + 1 levels after k + 1 sweeps
        far = norm((image - chain) / unit) > self.tol * norm(image / unit)
        new = torch.where(per_row(moving * far, chain) > 0, new, image)
        live = per_row(moving, chain) > 0
        x, kept = torch.where(live[:, 0], image[:, -1], state["x"]), torch.where(live, new, chain)
        out = {**state, "x": x, "chain": kept, "moving": moving * far}
        return {**out, "points": history.points, "images": history.images}

    def finish(self, state: State, ctx: Context) -> Tensor:
        """Return the images at level 0; a chain that is not finite at some level has none."""
        sound = torch.isfinite(state["chain"]).flatten(1).all(1)
        return torch.where(per_row(sound, state["x"]) > 0, state["x"], torch.nan)

    def _sweep(self, state: State, ctx: Context) -> Tensor:
        """Denoise all levels of the old chain at once and run the recursion."""
        x, chain = state["start"], state["chain"]
        rows, count = chain.shape[:2]
        old = torch.cat([x[:, None], chain[:, :-1]], 1)
        levels = ctx.sigmas[:-1].to(chain.device).repeat(rows)
        d = ctx.denoise(old.flatten(0, 1), levels).reshape(old.shape)
        ctx.denoise.counts.nfe += count - 1
        out, last = [], None
        for k in range(count):
            s, t = ctx.level(k)
            r2 = torch.inf if self.hard else 1 / (1 / s**2 + 1 / ctx.spread(self.spread) ** 2)
            x0 = gaussian_prox(ctx.measured, d[:, k], r2, max_iter=self.cg_iterations)
            ahead = extrapolate(x0, last if self.order == 2 else None, ctx.sigmas, k)
            last, z = x0, state["noise"][:, k]
            if self.eps == "denoised":
                x = mix_noise(ahead, (x - d[:, k]) / s, t, self.eta**2, z)
            else:
                x = ddim(x, ahead, s, t, self.eta, z)
            out.append(x)
        return torch.stack(out, 1)
