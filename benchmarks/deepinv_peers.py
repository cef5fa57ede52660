"""deepinv's samplers on our problems, with our prior and our operator in deepinv's terms."""

from __future__ import annotations

import functools
import math
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from invdiff.prior import Prior
from invdiff.problem import Problem
from invdiff.scoring import Draws

#: deepinv's images are in [0, 1]: prior coordinates in [-reach, reach] are mapped there. Its samplers clip to that
#: range, so no pixel of the truth may lie outside: the reach is this, or more where the truth needs it.
REACH = 1.75


class Bridge:
    """Our prior and operator in deepinv's terms.

    With prior coordinates ``v`` (two channels, in units where the operator is ``A v``, ``c`` image units per prior
    unit) and ``u = 1/2 + v / 2 reach`` in [0, 1], the data become ``y / (2 reach c) + B 1/2 = B u + noise`` with
    ``B = A / c``, of about unit norm, and the noise level ``sigma / (2 reach c)``; complex data are pairs of real
    numbers. The denoiser is ``D`` between the same two maps; above the prior's largest level, where next to
    nothing is left of the image, its input is scaled down to that level.
    """

    def __init__(self, problem: Problem, prior: Prior, draws: int) -> None:
        self.prior, self.pulled, self.draws = prior, problem.pullback(prior.codec), draws
        gain = torch.ones(()) if self.pulled.gain is None else self.pulled.gain.reshape(-1)[0]
        self.gain, self.operator = float(gain), self.pulled.operator
        peak = 0.0 if self.pulled.x_true is None else float(self.pulled.x_true.abs().max())
        self.reach = max(REACH, (math.floor(4 * peak) + 1) / 4)
        self.unit = 2 * self.reach * self.gain
        self.shape = (draws, *prior.codec.prior.shape)
        self.nfe = self.vjp = 0

    @functools.cached_property
    def y(self) -> Tensor:
        """Data, ``(draws, *range, 2)`` real."""
        half = self.forward(torch.full((1, *self.shape[1:]), 0.5))
        y = torch.view_as_real(self.pulled.y) / self.unit + half
        return y.expand(self.draws, *y.shape[1:]).contiguous()

    @functools.cached_property
    def sigma(self) -> float:
        """Noise level per real component in units of `y`."""
        return float(self.pulled.sigma(self.pulled.y).reshape(-1)[0]) / self.unit

    def forward(self, u: Tensor) -> Tensor:
        """Return ``B u``."""
        return torch.view_as_real(self.operator(u) / self.gain)

    def adjoint(self, y: Tensor) -> Tensor:
        """Return ``B^T y``."""
        return self.operator.adjoint(torch.view_as_complex(y.contiguous()) / self.gain)

    def normal(self, u: Tensor) -> Tensor:
        """Return ``B^T B u``."""
        return self.operator.normal(u) / self.gain**2

    def denoise(self, u: Tensor, sigma: Tensor | float) -> Tensor:
        """Return ``E[u0 | u]``, counting."""
        self.nfe += 1
        self.vjp += int(torch.is_grad_enabled() and u.requires_grad)
        denoiser = self.prior.denoiser
        level = 2 * self.reach * torch.as_tensor(sigma, dtype=torch.float32).reshape(-1).expand(len(u))
        known = level.clamp(denoiser.sigma_min, denoiser.sigma_max)
        shrink = (known / level).clamp(max=1).reshape(-1, 1, 1, 1)
        v = 2 * self.reach * (u.to(torch.float32) - 0.5)
        return 0.5 + denoiser(v * shrink, known) / (2 * self.reach)

    def images(self, u: Tensor) -> Draws:
        """Return the finite draws as images of the case."""
        v = 2 * self.reach * (u.detach().to(torch.float32) - 0.5)
        x = self.prior.codec.decode(v)[:, 0].numpy()
        x = x[np.isfinite(x).all(axis=(1, 2))]
        return Draws(x, np.full(len(x), 1 / max(len(x), 1)), point=False)

    def physics(self, spectral: bool = False) -> Any:
        """Return the operator as a deepinv physics, with its singular value decomposition where asked."""
        import deepinv

        noise, bridge = deepinv.physics.GaussianNoise(self.sigma), self
        if spectral:
            svd = self.operator.svd()

            def pair(c: Tensor) -> Tensor:
                return torch.cat([c.real, c.imag], 1)

            def whole(c: Tensor) -> Tensor:
                return torch.complex(*(p.contiguous() for p in c.chunk(2, 1)))

            def to_data(c: Tensor) -> Tensor:
                return torch.view_as_real(svd.u(whole(c)))

            def from_data(y: Tensor) -> Tensor:
                return pair(svd.uh(torch.view_as_complex(y.contiguous())))

            s = (svd.s / self.gain).to(torch.float32)
            return deepinv.physics.DecomposablePhysics(
                U=to_data,
                U_adjoint=from_data,
                V=lambda c: svd.v(whole(c)),
                V_adjoint=lambda u: pair(svd.vh(u)),
                mask=torch.cat([s, s], 1),
                noise_model=noise,
            )

        class Operator(deepinv.physics.LinearPhysics):
            def A_adjoint_A(self, x: Tensor, **kwargs: Any) -> Tensor:
                return bridge.normal(x)

        return Operator(
            A=lambda u, **_: self.forward(u), A_adjoint=lambda y, **_: self.adjoint(y), noise_model=noise
        )

    def denoiser(self) -> Any:
        """Return the prior as a deepinv denoiser."""
        import deepinv

        bridge = self

        class Denoiser(deepinv.models.Denoiser):
            def forward(self, x: Tensor, sigma: Tensor | float, **_: Any) -> Tensor:
                return bridge.denoise(x, sigma)

        return Denoiser()


def draw(
    name: str, settings: dict[str, Any], problem: Problem, prior: Prior, seed: int, draws: int, evaluations: int
) -> tuple[Draws, int, int]:
    """Draw with a sampler of deepinv, ``DPS``, ``DiffPIR`` or ``DDRM``.

    Args:
        name: The sampler.
        settings: Its settings.
        problem: One case that knows its truth.
        prior: With a codec that fits.
        seed: Of its random numbers.
        draws: Draws, all at once.
        evaluations: Network evaluations per draw.

    Returns:
        The draws, and network evaluations and VJPs per draw.
    """
    import deepinv

    bridge = Bridge(problem, prior, draws)
    denoiser, generator = bridge.denoiser(), torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        if name == "DPS":  # one evaluation between two time steps
            model = deepinv.sampling.DPS(denoiser, num_steps=evaluations + 1, rng=generator, **settings)
            u = model(bridge.y, bridge.physics(), x_init=bridge.shape)
        elif name == "DiffPIR":
            fidelity = deepinv.optim.data_fidelity.L2()
            model = deepinv.sampling.DiffPIR(denoiser, fidelity, bridge.sigma, evaluations, **settings)
            u = model(bridge.y, bridge.physics())
        else:
            model = deepinv.sampling.DDRM(denoiser, np.linspace(1, 0, evaluations), **settings)
            u = model(bridge.y, bridge.physics(spectral=True))
    return bridge.images(u), bridge.nfe, bridge.vjp
