"""Conditional priors: classifier-free guidance, and CFG++ as a weight that falls with the step.

    D(x, s) = D_0 + w (D_c - D_0)

with the denoised image ``D_c`` under a condition and ``D_0`` without one: ``w = 1`` is the conditional prior.
Larger weights sharpen it beyond what was learned; the result is the score of no density.

CFG++ takes the noise of a DDIM step from ``s`` to ``t`` from ``D_0`` alone, ``x' = D_l + (t / s)(x - D_0)`` with
``D_l = D_0 + lam (D_c - D_0)``. That is the DDIM step of guidance with ``w = lam / (1 - t / s)``.

Source: Ho, Salimans, arXiv:2207.12598; Chung et al., "CFG++", ICLR 2025, arXiv:2406.08070.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from invdiff.errors import InvdiffError
from invdiff.prior import Denoiser, Prior
from invdiff.spaces import per_row
from invdiff.tensors import move

__all__ = ["Guided", "GuidedDenoiser", "cfg_plus_plus"]

Weight = float | Callable[[Tensor], Tensor]


class GuidedDenoiser(Denoiser):
    """``D_0 + w (D_c - D_0)``, both in one batch of the network.

    Args:
        base: Denoiser that takes ``cond``.
        condition: Conditions by name; tensors of one row ``(1, ...)`` or a number hold for all rows. They may
            require gradients.
        unconditional: The same names without content (the null class, the embedding of an empty text).
        weight: ``w``, or a function of the levels ``(B,)`` that gives ``(B,)``.
    """

    def __init__(
        self,
        base: Denoiser,
        condition: Mapping[str, Tensor],
        unconditional: Mapping[str, Tensor] | None,
        weight: Weight,
    ) -> None:
        if unconditional is None and not (isinstance(weight, int | float) and weight == 1):
            raise InvdiffError(
                "Guidance needs the unconditional input too (the null class, or the embedding of an empty text); "
                "give unconditional=..., or weight=1."
            )
        if unconditional is not None and set(unconditional) != set(condition):
            raise InvdiffError(
                f"Conditions are {sorted(condition)} and the unconditional input has {sorted(unconditional)}; "
                "give the same names."
            )
        self.base, self.weight = base, weight
        self.condition, self.unconditional = dict(condition), dict(unconditional or {})
        self.space, self.channels, self.dtype = base.space, base.channels, base.dtype
        self.sigma_min, self.sigma_max, self.sigma_data = base.sigma_min, base.sigma_max, base.sigma_data
        self.noise, self.differentiable = base.noise, base.differentiable

    def __call__(self, x: Tensor, sigma: Tensor, cond: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the guided image; ``cond`` takes the place of conditions of the same name."""
        n = len(x)
        sigma = torch.as_tensor(sigma, device=x.device).reshape(-1).expand(n)
        chosen = self._rows({**self.condition, **(cond or {})}, n, x)
        w = self.weight(sigma) if callable(self.weight) else torch.full_like(sigma, float(self.weight))
        if not self.unconditional or bool((w == 1).all()):
            return self.base(x, sigma, chosen)
        null = self._rows(self.unconditional, n, x)
        if bool((w == 0).all()):
            return self.base(x, sigma, null)
        both = {k: torch.cat([v, null[k]]) for k, v in chosen.items()}
        guided, free = self.base(torch.cat([x, x]), torch.cat([sigma, sigma]), both).chunk(2)
        return free + per_row(w, x).to(x.dtype) * (guided - free)

    @staticmethod
    def _rows(cond: Mapping[str, Tensor], n: int, x: Tensor) -> dict[str, Tensor]:
        out = {}
        for name, value in cond.items():
            v = torch.as_tensor(value, device=x.device)
            v = v.reshape(1) if v.ndim == 0 else v
            if len(v) not in (1, n):
                raise InvdiffError(
                    f"The condition {name!r} has {len(v)} rows, and the batch has {n}; give one for all, or one "
                    "each."
                )
            out[name] = v.expand(n, *v.shape[1:])
        return out

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Any:
        """Return a copy on another device or in another precision."""
        new = super().to(device, dtype)
        new.base = self.base.to(device, dtype)
        new.condition, new.unconditional = (move(v, device, dtype) for v in (self.condition, self.unconditional))
        return new


def Guided(
    prior: Prior,
    condition: Mapping[str, Tensor],
    unconditional: Mapping[str, Tensor] | None = None,
    weight: Weight = 1.0,
) -> Prior:
    """Return a conditional prior under a condition, guided if ``weight`` is not 1; see `GuidedDenoiser`."""
    denoiser = GuidedDenoiser(prior.denoiser, condition, unconditional, weight)
    return replace(prior, denoiser=denoiser, card={**prior.card, "name": f"{prior.name}, conditional"})


def cfg_plus_plus(lam: float, sigmas: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the weight ``lam / (1 - t / s)`` of CFG++ on a grid of levels ``s_0 > s_1 > ... > 0``.

    Between grid points ``t`` is interpolated in ``s``. A sampler that steps along the grid by DDIM takes the steps
    of CFG++.

    Args:
        lam: Guidance of CFG++, 0 to 1.
        sigmas: The sampler's grid (`Sampler.sigmas`), which may end in 0.

    Raises:
        InvdiffError: If ``lam`` is not in [0, 1] or the grid does not fall.
    """
    grid = torch.as_tensor(sigmas, dtype=torch.float64).cpu()
    if not 0 <= lam <= 1:
        raise InvdiffError(f"The guidance of CFG++ lies between 0 and 1, got {lam:g}.")
    if grid.ndim != 1 or len(grid) < 2 or not bool((grid[:-1] > grid[1:]).all()) or float(grid[-1]) < 0:
        raise InvdiffError("CFG++ needs a falling grid of noise levels; give sampler.sigmas(prior).")
    upper, lower = grid[:-1].flip(0), grid[1:].flip(0)

    def weight(sigma: Tensor) -> Tensor:
        s = sigma.detach().to("cpu", torch.float64).clamp(float(upper[0]), float(upper[-1]))
        k = torch.searchsorted(upper, s * (1 - 1e-6)).clamp(0, len(upper) - 1)
        before = (k - 1).clamp_min(0)
        span = (upper[k] - upper[before]).clamp_min(1e-300)
        share = torch.where(k > before, (s - upper[before]) / span, torch.ones_like(s)).clamp(0, 1)
        t = lower[before] + share * (lower[k] - lower[before])
        return (lam / (1 - t / s)).to(sigma)

    return weight
