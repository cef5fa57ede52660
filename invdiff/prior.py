"""The prior contract: a denoiser in the variance-exploding frame, a codec, and a card."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from invdiff.codec import Codec, Grey, Identity
from invdiff.errors import InvdiffError
from invdiff.problem import Problem
from invdiff.spaces import Space
from invdiff.tensors import Movable


class Denoiser(Movable, ABC):
    """``D(x, sigma) = E[x0 | x0 + sigma * eps = x]`` in prior coordinates, whatever the network was trained as.

    Attributes:
        space: Real prior coordinates; None where any spatial size is served (``channels`` then counts).
        sigma_min, sigma_max: Range of noise levels where the denoiser can be trusted.
        sigma_data: Standard deviation of one component of an image in prior units, the width that samplers
            take for ``p(x0 | x)`` at high noise where they do not know better.
        noise: ``"white"``, or the name of a covariance for function spaces.
        differentiable: How many times it can be differentiated (0, 1 or 2).
        dtype: Precision it computes in; the state of a sampler may be finer.
    """

    space: Space | None
    channels: int
    sigma_min: float
    sigma_max: float
    sigma_data: float = 1.0
    noise: str = "white"
    differentiable: int = 2
    dtype: torch.dtype = torch.float32

    @abstractmethod
    def __call__(self, x: Tensor, sigma: Tensor, cond: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return ``E[x0 | x]`` for ``x`` ``(B, *shape)`` and ``sigma`` ``(B,)``."""

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Any:
        """Return a copy on another device or in another precision."""
        new = super().to(device, dtype)
        if dtype is not None:
            new.dtype = dtype
        return new


class FunctionDenoiser(Denoiser):
    """A plain function ``f(x, sigma)`` as a denoiser."""

    def __init__(
        self, function: Callable[[Tensor, Tensor], Tensor], space: Space, sigma_min: float, sigma_max: float
    ) -> None:
        self.function, self.space, self.channels = function, space, space.shape[0]
        self.sigma_min, self.sigma_max, self.dtype = sigma_min, sigma_max, space.dtype

    def __call__(self, x: Tensor, sigma: Tensor, cond: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return ``f(x, sigma)``."""
        return self.function(x, sigma)


@dataclass(frozen=True, eq=False)
class Prior:
    """Denoiser + codec + card.

    Args:
        denoiser: ``D(x, sigma)`` in prior coordinates.
        codec: Image space against prior coordinates; None where it is made to fit each problem.
        card: Licence, training data, sha256, measured denoising error.
        make_codec: ``(image space, scale) -> Codec`` for priors that serve any image size.
        scale: Image units per prior unit for ``make_codec``; None estimates it from the data.
    """

    denoiser: Denoiser
    codec: Codec | None = None
    card: Mapping[str, Any] = field(default_factory=dict)
    make_codec: Callable[[Space, Tensor], Codec] | None = None
    scale: float | Tensor | None = None

    @property
    def name(self) -> str:
        """Name on the card."""
        return str(self.card.get("name", type(self.denoiser).__name__))

    def with_scale(self, scale: float | Tensor | None) -> Prior:
        """Return a prior that takes ``scale`` image units for one prior unit (None: estimate from data)."""
        return replace(self, scale=scale)

    def for_grey(self) -> Prior:
        """Return a prior of grey images ``(1, y, x)``, the means of this one's three colours; see `Grey`.

        Raises:
            InvdiffError: If the prior has not three channels.
        """
        if self.denoiser.channels != 3:
            raise InvdiffError(
                f"Prior {self.name} has {self.denoiser.channels} channel(s); grey images are the means of three."
            )
        card = {**self.card, "grey": "mean of three colours"}
        if self.codec is not None:
            grey = Grey(self.codec.image.replace(shape=(1, *self.codec.image.shape[1:])))
            return replace(self, codec=grey @ self.codec, card=card)

        def make_codec(image: Space, scale: Tensor) -> Codec:
            grey = Grey(image)
            colour = self.bind(grey.prior, scale).codec
            assert colour is not None
            return grey @ colour

        scale = 1.0 if self.make_codec is None else self.scale
        return replace(self, make_codec=make_codec, card=card, scale=scale)

    def cost(
        self,
        image: Space | None = None,
        batch: int = 1,
        device: torch.device | str | None = None,
        repeats: int = 3,
    ) -> dict[str, float]:
        """Measure the denoiser here: seconds per evaluation and per product with its Jacobian, for a whole batch.

        Args:
            image: Space of the image, where the prior serves any size.
            batch: Rows at once.
            device: Where; the prior's own place where left out.
            repeats: Timed runs after one that warms up; the fastest counts.

        Returns:
            ``batch``, ``evaluation_s`` and, where the denoiser can be differentiated, ``vjp_s``, which holds an
            evaluation too.

        Raises:
            InvdiffError: If the prior serves any size and no space is given.
        """
        prior = self if device is None else self.to(device)
        bound = prior if image is None else prior.bind(image, 1.0 if self.scale is None else self.scale)
        space = bound.codec.prior if bound.codec is not None else bound.denoiser.space
        if space is None:
            raise InvdiffError(f"Prior {self.name} serves any size; give the space of the image.")
        denoiser = bound.denoiser
        level = math.sqrt(denoiser.sigma_min * denoiser.sigma_max)
        x = (level * space.randn(batch, 0)).to(device or "cpu", denoiser.dtype)
        sigma = torch.full((batch,), level, device=x.device, dtype=x.dtype)

        def vjp() -> None:
            with torch.enable_grad():
                leaf = x.clone().requires_grad_()
                torch.autograd.grad(denoiser(leaf, sigma), leaf, x)

        def evaluate() -> None:
            with torch.no_grad():
                denoiser(x, sigma)

        found = {"batch": float(batch), "evaluation_s": _fastest(evaluate, repeats, x.device)}
        if denoiser.differentiable:
            found["vjp_s"] = _fastest(vjp, repeats, x.device)
        return found

    def bind(self, image: Space, scale: float | Tensor = 1.0) -> Prior:
        """Return the prior with a codec for images of space ``image``.

        Raises:
            InvdiffError: If channels or shape do not fit.
        """
        if self.codec is not None:
            if self.codec.image.shape != image.shape or self.codec.image.is_complex != image.is_complex:
                raise InvdiffError(
                    f"Prior {self.name} makes images {self.codec.image}, and the problem asks for {image}; "
                    "choose a prior for that space."
                )
            return self
        if self.make_codec is not None:
            return replace(self, codec=self.make_codec(image, torch.as_tensor(scale)))
        own = self.denoiser.space
        if own is None or own.shape != image.shape or image.is_complex:
            raise InvdiffError(
                f"Prior {self.name} lives on {own or f'{self.denoiser.channels} channel(s)'}, "
                f"and the problem's images are {image}; choose a prior (or give it a codec) for that space."
            )
        return replace(self, codec=Identity(image))

    def adapt(self, problem: Problem) -> Prior:
        """Return the prior bound to the images of ``problem``, with the scale given or estimated from data."""
        if self.codec is not None:
            return self.bind(problem.operator.domain)
        scale = self.scale
        if scale is None and self.make_codec is not None:
            from invdiff.scaling import estimate_scale

            scale = estimate_scale(problem)
        return self.bind(problem.operator.domain, 1.0 if scale is None else scale)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Prior:
        """Return a copy on another device or in another precision."""
        codec = None if self.codec is None else self.codec.to(device, dtype)
        return replace(self, denoiser=self.denoiser.to(device, dtype), codec=codec)

    def sample(self, draws: int = 1, seed: int = 0, **options: Any) -> Any:
        """Draw images from the prior itself; see `invdiff.sample`."""
        from invdiff.driver import sample

        return sample(None, self, draws=draws, seed=seed, **options)

    def describe(self) -> dict[str, Any]:
        """Return what provenance records: identity, hash, codec."""
        return {
            "id": self.name,
            "sha256": self.card.get("sha256", ""),
            "licence": self.card.get("licence", ""),
            "codec": None if self.codec is None else self.codec.describe(),
        }

    def _repr_html_(self) -> str:
        from invdiff.html import prior_html

        return prior_html(self)

    def __repr__(self) -> str:
        space = self.denoiser.space or f"{self.denoiser.channels} channel(s), any size"
        lines = [f"Prior {self.name}", f"  coordinates  {space}"]
        lines.append(f"  sigma        {self.denoiser.sigma_min:g} to {self.denoiser.sigma_max:g}")
        for key in ("licence", "training", "sha256"):
            if key in self.card:
                lines.append(f"  {key:<12} {str(self.card[key])[:80]}")
        return "\n".join(lines)


def _fastest(run: Callable[[], None], repeats: int, device: torch.device) -> float:
    """Seconds of the fastest of a few runs, after one that is not timed."""
    found = []
    for _ in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - start)
    return min(found[1:])
