"""PSLD: posterior sampling with latent diffusion (Rout, Raoof, Daras, Caramanis, Dimakis, Shakkottai, 2023).

With decoder ``G``, encoder ``E``, ``X = G(D(x))`` and ``c`` 1, or the squared norm of the operator where that is
above 1:

    x_g = X + A^H (y - A X) / c                                  the image with what the data know glued in
    x'  = ancestral(x, D) - w grad_x ( omega ||y - A X|| + gamma ||E(x_g) - D|| ),   w = sqrt((1 + s^2)(1 + t^2))

The second term asks the latent to be one that encoder and decoder agree on. ``w`` translates the paper's constant
weights from the variance-preserving chain. Neither noise level nor prior sets the weights: no width of the draws
is right by construction.

Differences from the published code: ``A^H`` is the adjoint (the code has the identity for blurs and unscaled
repetition for super-resolution), divided by ``c``; for a nonlinear operator it is that of the derivative, held
fixed in the gradient; no noise is added to the prediction in the loss; the encoder gives its mean, never a draw;
no truth is pasted into the result; norms per draw, the first in prior units; second-order transitions.

Cost: an evaluation and a network VJP per step, one pass and one reverse pass of decoder and encoder, and five
applications of the operator or its adjoint.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from invdiff.primitives import ddim, extrapolate
from invdiff.primitives.consistency import encode_with_vjp
from invdiff.primitives.curvature import operator_norm
from invdiff.primitives.misfit import inverse_norm, misfit_unit
from invdiff.pulled import DecodeOperator
from invdiff.rng import Streams
from invdiff.sampler import Context, Sampler, State
from invdiff.spaces import per_row


@dataclass(frozen=True, kw_only=True)
class PSLD(Sampler):
    """PSLD; see the module for its cost.

    Args:
        omega: Weight of the misfit.
        gamma: Weight of the gluing.
        eta: Stochasticity of the transition (1: ancestral, 0: deterministic, published).
        order: 1 (published) or 2.
    """

    name: ClassVar[str] = "psld"
    title: ClassVar[str] = "Posterior sampling with latent diffusion"
    reference: ClassVar[str] = "Rout et al., NeurIPS 2023, arXiv:2307.00619"
    requires: ClassVar[frozenset[str]] = frozenset({"vjp", "denoiser-vjp"})
    _published = {"steps": 1000, "eta": 0.0, "order": 1}
    presets: ClassVar = {
        "published": {**_published, "omega": 1.0, "gamma": 0.1},
        "box-inpainting": {**_published, "omega": 0.1, "gamma": 0.01},
        "vq": {**_published, "omega": 0.1, "gamma": 0.1},
        "vq-super-resolution": {**_published, "omega": 0.9, "gamma": 0.1},
    }

    steps: int = 1000
    schedule: Literal["edm", "geometric", "vp", "vp-quadratic", "flow"] = "vp"
    omega: float = 0.1
    gamma: float = 0.01
    eta: float = 1.0
    order: Literal[1, 2] = 2

    def init(self, ctx: Context, rows: int, rng: Streams) -> State:
        """Start from noise; find the unit of the misfit and the norm of the operator."""
        state = super().init(ctx, rows, rng)
        zero = torch.zeros_like(state["x"])
        unit = misfit_unit(ctx.measured, zero)
        top = operator_norm(ctx.image, DecodeOperator(ctx.codec)(zero), 10).to(unit)
        # from below, as the power iteration comes: what is 1 stays 1
        return {**state, "unit": unit, "top": torch.where(top > 1 + 1e-5, top, torch.ones_like(top))}

    def step(self, k: int, state: State, ctx: Context, rng: Streams) -> State:
        """One transition and one gradient of misfit and gluing."""
        x, (s, t), image = state["x"], ctx.level(k), ctx.image
        d, pull = ctx.denoise.vjp(x, s, once=True)
        g = DecodeOperator(ctx.codec)
        whole = g(d)
        rest = image.residual(whole)
        back = image.operator.vjp(whole, rest)
        share = per_row(state["top"] ** -2, whole)
        z, out = encode_with_vjp(ctx.codec, whole + share * back)
        apart = z.to(d.dtype) - d
        apart = apart * per_row(inverse_norm(apart), apart)
        glue = out(apart)
        glue = glue - share * image.operator.vjp(whole, image.operator.jvp(whole, glue))
        misfit = back * per_row(inverse_norm(rest) / state["unit"], back)
        downhill = pull(g.vjp(d, self.omega * misfit - self.gamma * glue) + self.gamma * apart)
        ahead = extrapolate(d, state.get("d") if self.order == 2 else None, ctx.sigmas, k)
        noise = ctx.noise(rng, len(x)) if self.eta else None
        x = ddim(x, ahead, s, t, self.eta, noise) + math.sqrt((1 + s * s) * (1 + t * t)) * downhill
        return {**state, "x": x, "d": d}
