"""Frames: how a network meets a noise level - the scale of its input, its time, and the levels it was trained on.

A network trained on ``z = c(sigma) (x0 + sigma eps)`` sees ``c(sigma) x`` and ``time(sigma)``. All tables are in
float64 and hold the network's own schedule; between their levels time is linear in ``log sigma``.

DDPM: Ho, Jain, Abbeel, NeurIPS 2020, arXiv:2006.11239; VP and VE: Song et al., ICLR 2021, arXiv:2011.13456;
EDM: Karras et al., NeurIPS 2022, arXiv:2206.00364; flow: Liu, Gong, Liu, ICLR 2023, arXiv:2209.03003.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from invdiff.errors import InvdiffError

__all__ = ["EDM", "VE", "VP", "Flow", "Frame"]


class Frame(ABC):
    """What a network's training fixes about noise; immutable, and apart from any device.

    Attributes:
        sigma_min, sigma_max: Levels that the network was trained on.
        serves: Parametrisations that make sense in the frame.
        whole: Whether the network takes whole numbers (int64) as time.
    """

    serves: ClassVar[tuple[str, ...]]
    sigma_min: float
    sigma_max: float
    whole: bool = False

    @abstractmethod
    def scale(self, sigma: Tensor) -> Tensor:
        """Return ``c(sigma)``, the factor between ``x`` and the network's input; float64 ``(B,)``."""

    @abstractmethod
    def time(self, sigma: Tensor) -> Tensor:
        """Return the network's time for levels inside the range; float64 ``(B,)``."""

    def _limits(self, sigma_min: float, sigma_max: float) -> None:
        if not 0 < sigma_min < sigma_max < math.inf:
            raise InvdiffError(
                f"Noise levels must satisfy 0 < sigma_min < sigma_max, got {sigma_min:g}, {sigma_max:g}."
            )
        self.sigma_min, self.sigma_max = float(sigma_min), float(sigma_max)

    def __repr__(self) -> str:
        return f"{type(self).__name__} from sigma {self.sigma_min:.4g} to {self.sigma_max:.4g}"


_BETAS = ("linear", "scaled_linear", "cosine")


def betas(schedule: str, steps: int, start: float, end: float) -> Tensor:
    """Return ``beta`` of every step of a schedule that `VP.from_betas` names, ``(steps,)`` float64."""
    if schedule == "linear":
        return torch.linspace(start, end, steps, dtype=torch.float64)
    if schedule == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
    assert schedule == "cosine"
    t = torch.arange(steps + 1, dtype=torch.float64) / steps
    abar = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - abar[1:] / abar[:-1]).clamp(max=0.999)


class VP(Frame):
    """Variance preserving: ``z = sqrt(abar) x0 + sqrt(1 - abar) eps``, a table of ``abar``, whole steps.

    ``sigma_i = sqrt((1 - abar_i) / abar_i)`` and ``c = 1 / sqrt(1 + sigma^2)``. Levels between two steps get a
    fraction of a step. A network trained on whole steps has not met fractions: one that embeds its time by sines
    and cosines interpolates smoothly, one that looks it up in a list needs ``whole=True``, which rounds to the
    nearest step. The network then believes in a level up to half a step away; input and output are still scaled by
    the level itself.

    Args:
        alphas_cumprod: ``abar`` of every step, from little noise to much; above 0 and below 1, decreasing.
        times: What the network calls these steps, increasing; by default 0, 1, 2, ...
        whole: Round to the nearest step, and give ``times`` (whole numbers then) as int64.

    Raises:
        InvdiffError: If the table does not decrease between 1 and 0, or ``times`` does not fit it.
    """

    serves = ("epsilon", "v", "x0", "score")

    def __init__(
        self,
        alphas_cumprod: Tensor | Sequence[float],
        times: Tensor | Sequence[float] | None = None,
        *,
        whole: bool = False,
    ) -> None:
        abar = torch.as_tensor(alphas_cumprod, dtype=torch.float64, device="cpu").clone()
        decreasing = abar.ndim == 1 and len(abar) > 1 and bool((abar[1:] < abar[:-1]).all())
        if not decreasing or not bool((abar > 0).all() and (abar < 1).all()):
            raise InvdiffError(
                "alphas_cumprod must be a list of at least two numbers between 1 and 0 that decrease from the "
                "first step to the last; leave out a last step of exactly 0, where nothing but noise is left."
            )
        n = len(abar)
        t = torch.arange(n, dtype=torch.float64)
        if times is not None:
            t = torch.as_tensor(times, dtype=torch.float64, device="cpu").clone()
        if t.shape != (n,) or not bool((t[1:] > t[:-1]).all()) or (whole and not bool((t == t.round()).all())):
            raise InvdiffError(
                f"times must be {n} increasing numbers, one per step of alphas_cumprod, and whole ones where "
                "whole=True."
            )
        self._log_sigma, self._times, self.whole = ((1 - abar) / abar).sqrt().log(), t, whole
        self._limits(float(self._log_sigma[0].exp()), float(self._log_sigma[-1].exp()))

    @classmethod
    def from_betas(
        cls,
        schedule: str = "linear",
        steps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        *,
        whole: bool = False,
    ) -> VP:
        """Return the frame of a named schedule, ``abar_i = prod_(j <= i) (1 - beta_j)``.

        ``linear``: ``beta`` in equal steps (DDPM, ADM). ``scaled_linear``: its square root in equal steps (latent
        diffusion; the CompVis code calls this one ``linear``, and the former ``sqrt_linear``). ``cosine``:
        ``abar = cos^2(pi/2 (t + 0.008) / 1.008)`` with ``beta`` at most 0.999 (improved DDPM); it takes no ends.

        Raises:
            InvdiffError: If the schedule is unknown, or ``0 < beta_start <= beta_end < 1`` does not hold.
        """
        if steps < 2 or not 0 < beta_start <= beta_end < 1:
            raise InvdiffError(
                f"A schedule needs steps >= 2 and 0 < beta_start <= beta_end < 1, "
                f"got {steps}, {beta_start:g}, {beta_end:g}."
            )
        if schedule not in _BETAS:
            raise InvdiffError(f"Unknown schedule {schedule!r}; there are linear, scaled_linear and cosine.")
        return cls((1 - betas(schedule, steps, beta_start, beta_end)).cumprod(0), whole=whole)

    def scale(self, sigma: Tensor) -> Tensor:
        """Return ``1 / sqrt(1 + sigma^2)``."""
        return (1 + sigma**2).rsqrt()

    def time(self, sigma: Tensor) -> Tensor:
        """Return the step of the table, between two steps linear in ``log sigma``, or the nearest one."""
        log = sigma.log().clamp(self._log_sigma[0], self._log_sigma[-1])
        above = torch.searchsorted(self._log_sigma, log).clamp(1, len(self._times) - 1)
        low, high = self._log_sigma[above - 1], self._log_sigma[above]
        part = (log - low) / (high - low)
        part = part.round() if self.whole else part
        return self._times[above - 1] + part * (self._times[above] - self._times[above - 1])


class VE(Frame):
    """Variance exploding: ``z = x0 + sigma eps``, and time is the level itself or its logarithm.

    Args:
        sigma_min, sigma_max: Levels of the training.
        time: ``"sigma"`` or ``"log_sigma"``.

    Raises:
        InvdiffError: If levels are not ``0 < sigma_min < sigma_max``, or ``time`` is neither name.
    """

    serves = ("epsilon", "x0", "score")

    def __init__(self, sigma_min: float, sigma_max: float, *, time: str = "sigma") -> None:
        self._limits(sigma_min, sigma_max)
        if time not in ("sigma", "log_sigma"):
            raise InvdiffError(f"The time of a VE network is 'sigma' or 'log_sigma', got {time!r}.")
        self._log = time == "log_sigma"

    def scale(self, sigma: Tensor) -> Tensor:
        """Return one."""
        return torch.ones_like(sigma)

    def time(self, sigma: Tensor) -> Tensor:
        """Return ``sigma`` or ``log sigma``."""
        return sigma.log() if self._log else sigma


class EDM(Frame):
    """Preconditioned: ``c = 1 / sqrt(sigma^2 + sigma_data^2)``, time ``log(sigma) / 4``.

    This is for the bare network ``F`` inside EDM's preconditioning. The preconditioned whole, called with ``x``
    and ``sigma``, is ``x0`` in the frame `VE`.

    Args:
        sigma_data: Standard deviation of the data that the preconditioning assumes.
        sigma_min, sigma_max: Levels of the training.

    Raises:
        InvdiffError: If levels are not ``0 < sigma_min < sigma_max``, or ``sigma_data`` is not positive.
    """

    serves = ("edm",)

    def __init__(self, sigma_data: float = 0.5, sigma_min: float = 0.002, sigma_max: float = 80.0) -> None:
        self._limits(sigma_min, sigma_max)
        if not 0 < sigma_data < math.inf:
            raise InvdiffError(f"sigma_data must be positive, got {sigma_data:g}.")
        self.sigma_data = float(sigma_data)

    def scale(self, sigma: Tensor) -> Tensor:
        """Return ``1 / sqrt(sigma^2 + sigma_data^2)``."""
        return (sigma**2 + self.sigma_data**2).rsqrt()

    def time(self, sigma: Tensor) -> Tensor:
        """Return ``log(sigma) / 4``."""
        return sigma.log() / 4


class Flow(Frame):
    """Rectified flow on the straight line between data and noise; ``z = (x0 + sigma eps) / (1 + sigma)``.

    The share of noise is ``sigma / (1 + sigma)``, which is the time where ``noise_at`` is 1 (the velocity is then
    ``eps - x0``), and one minus the time where it is 0 (the velocity is then ``x0 - eps``).

    Args:
        noise_at: Time of pure noise, 1 or 0.
        sigma_min, sigma_max: Levels to use; shares of noise ``sigma / (1 + sigma)``.
        time_scale: Factor on the time that the network takes (1000 for networks that count to 1000).

    Raises:
        InvdiffError: If ``noise_at`` is neither 0 nor 1, or levels are not ``0 < sigma_min < sigma_max``.
    """

    serves = ("flow", "epsilon", "x0")

    def __init__(
        self, noise_at: int, sigma_min: float = 0.002, sigma_max: float = 80.0, *, time_scale: float = 1.0
    ) -> None:
        self._limits(sigma_min, sigma_max)
        if noise_at not in (0, 1):
            raise InvdiffError(f"noise_at is the time of pure noise, 0 or 1, got {noise_at!r}.")
        self.noise_at, self.time_scale = int(noise_at), float(time_scale)

    def scale(self, sigma: Tensor) -> Tensor:
        """Return ``1 / (1 + sigma)``."""
        return 1 / (1 + sigma)

    def time(self, sigma: Tensor) -> Tensor:
        """Return ``sigma / (1 + sigma)`` or ``1 / (1 + sigma)``, times ``time_scale``."""
        return self.time_scale * (sigma if self.noise_at else torch.ones_like(sigma)) / (1 + sigma)
