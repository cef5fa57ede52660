"""The codec of a latent prior: an autoencoder between images and latents.

    z = scale (E(n(x)) - shift),      x = n^-1(G(z / scale + shift)),

with encoder ``E``, decoder ``G``, and ``n`` from image units to the values that the networks know. ``G`` is not
linear, so `Problem.pullback` composes it with the operator: the problem keeps derivatives and nothing else.

Source: Rombach et al., "High-resolution image synthesis with latent diffusion models", CVPR 2022.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn

from invdiff.codec import Codec
from invdiff.errors import InvdiffError
from invdiff.spaces import Space
from invdiff.tensors import tensor_digest

__all__ = ["Latent"]

_HALF = (torch.float16, torch.bfloat16)


class Latent(Codec):
    """``z = scale (E(n(x)) - shift)`` and back.

    Networks are copied, put into evaluation mode, and the gradients of their weights turned off; a method of a
    module (``vae.encode``) brings its module along. They may return a tensor, a distribution with ``mode()``, or
    an object that holds one of these as ``latent_dist``, ``latents`` or ``sample``. Encoding must be repeatable,
    for a draw depends on its seed alone.

    Args:
        encoder: ``(B, *image) -> (B, *latent)``, a module, a method of one, or a function.
        decoder: ``(B, *latent) -> (B, *image)``.
        image: Real image space, of a size that the networks give back (else ``Pad(image, 8) @ Latent(...)``).
        scale: Factor that brings latents to the spread the prior was trained on; a number, or one per channel
            ``(C,)``. There is no default: it belongs to the checkpoint.
        shift: Subtracted before; a number, or one per channel.
        network_range: Values that the networks know, e.g. (-1, 1); goes with ``image_range``.
        image_range: The image values that these stand for, e.g. (0, 1). Without the two, images are in network
            units.
        codebook: ``(K, C)``: decode snaps every latent vector (before scale and shift) to the nearest entry, and
            its derivative is that of the identity (straight through).
        network_dtype: Precision of the networks; None follows the image's. Rows that overflow in half precision
            are computed again in float32, which is said once.

    Raises:
        InvdiffError: If the scale is missing, ranges are not pairs ``low < high`` given together, the encoder
            gives two answers for one image, or a shape does not come back.
    """

    def __init__(
        self,
        encoder: Callable[[Tensor], Any],
        decoder: Callable[[Tensor], Any],
        image: Space,
        *,
        scale: float | Tensor | None = None,
        shift: float | Tensor = 0.0,
        network_range: tuple[float, float] | None = None,
        image_range: tuple[float, float] | None = None,
        codebook: Tensor | None = None,
        network_dtype: torch.dtype | None = None,
    ) -> None:
        if image.is_complex:
            raise InvdiffError(
                f"An autoencoder takes real images, and these are complex ({image}); use ComplexChannels(image) @ "
                "Latent(...), whose channels are real and imaginary part."
            )
        self.image, self.network_dtype = image, network_dtype
        self.scale, self.shift = _factor(scale, image), torch.as_tensor(shift, dtype=image.dtype)
        self.low, self.floor, self.unit = _units(network_range, image_range)
        self.codebook = None if codebook is None else torch.as_tensor(codebook, dtype=image.dtype)
        memo: dict[int, Any] = {}  # encoder and decoder of one module go on sharing it
        self.encoder, self.decoder = _Network(encoder, memo), _Network(decoder, memo)
        self._place(None, self._inner)
        self.prior = self._try()
        self.sha256 = tensor_digest([self.encoder.weights(), self.decoder.weights(), self.codebook])

    @property
    def image_unit(self) -> Tensor:
        """Image units per unit of the networks' images."""
        return torch.tensor(self.unit, dtype=self.image.dtype)

    def encode(self, x: Tensor) -> Tensor:
        """Return ``scale (E(n(x)) - shift)``, ``(B, *image) -> (B, *latent)``; differentiable."""
        z = self._run(self.encoder, (x - self.floor) / self.unit + self.low, "encoder")
        return (_channels(self.scale, z) * (z - _channels(self.shift, z))).to(x.dtype)

    def decode(self, u: Tensor) -> Tensor:
        """Return ``n^-1(G(u / scale + shift))``, ``(B, *latent) -> (B, *image)``; differentiable."""
        z = u / _channels(self.scale, u) + _channels(self.shift, u)
        z = z if self.codebook is None else _snap(z, self.codebook.to(z))
        return ((self._run(self.decoder, z, "decoder") - self.low) * self.unit + self.floor).to(u.dtype)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Latent:
        """Return a copy on another device or in another precision; a declared ``network_dtype`` stays."""
        new = super().to(device, dtype)
        new._place(device, new._inner)
        return new

    def describe(self) -> dict[str, Any]:
        """Return scale, shift, ranges and a digest of the weights."""
        return {
            "name": "Latent",
            "scale": self.scale.tolist(),
            "shift": self.shift.tolist(),
            "image_unit": self.unit,
            "image_at_network_low": [self.floor, self.low],
            "network_dtype": str(self.network_dtype),
            "sha256": self.sha256,
        }

    @property
    def _inner(self) -> torch.dtype:
        return self.network_dtype or self.image.dtype

    def _place(self, device: torch.device | str | None, dtype: torch.dtype) -> None:
        """Move the networks; one module with both parts stays one."""
        shared = self.encoder.module is self.decoder.module
        self.encoder = self.encoder.to(device, dtype)
        self.decoder = self.decoder.of(self.encoder.module) if shared else self.decoder.to(device, dtype)

    def _run(self, network: _Network, x: Tensor, which: str) -> Tensor:
        """Run a network in its precision, rows that overflow in half precision again in float32."""
        out = network(x.to(self._inner), which)
        if self._inner not in _HALF:
            return out.to(x.dtype)
        over = ~torch.isfinite(out).flatten(1).all(1) & torch.isfinite(x).flatten(1).all(1)
        if not bool(over.any()):
            return out.to(x.dtype)
        if not network.said:
            network.said = True
            warnings.warn(
                f"The {which} overflowed in {self._inner}; such rows are computed in float32. Declare "
                "network_dtype=torch.float32 (or bfloat16) to have all of them so.",
                stacklevel=3,
            )
        # Rows apart: a NaN in the graph of its neighbours would reach their gradients.
        parts = [network.wide(x[over].float(), which).to(x.dtype)]
        if not bool(over.all()):
            parts.append(network(x[~over].to(self._inner), which).to(x.dtype))
        order = torch.cat([over.nonzero()[:, 0], (~over).nonzero()[:, 0]]).argsort()
        return torch.cat(parts)[order]

    @torch.no_grad()
    def _try(self) -> Space:
        """Encode one image twice and decode it; return the space of the latents."""
        x = 0.5 * self.image.randn(1, 0, self.encoder.device).tanh()
        with torch.random.fork_rng(devices=[]):  # a random encoder may not move the global generator
            once, twice = (_attempt(lambda: self._run(self.encoder, x, "encoder"), "encoder", x) for _ in "ab")
        self._check_latents(once, twice)
        z = _channels(self.scale, once) * (once - _channels(self.shift, once))
        back = _attempt(lambda: self.decode(z), "decoder", z)
        if tuple(back.shape) != (1, *self.image.shape):
            raise InvdiffError(
                f"The decoder returned shape {tuple(back.shape)} for one image, expected "
                f"{(1, *self.image.shape)}; use images of a size that comes back, e.g. Pad(image, 8) @ "
                "Latent(...) for a factor of 8."
            )
        if not bool(torch.isfinite(back).all()):
            raise InvdiffError(
                "The autoencoder made NaN or infinite values of an ordinary image; check weights and precision."
            )
        spatial = once.ndim == len(self.image.shape) + 1
        return Space(tuple(once.shape[1:]), self.image.dtype, dims=self.image.dims if spatial else ())

    def _check_latents(self, once: Tensor, twice: Tensor) -> None:
        """Refuse an encoder that answers at random, and numbers that do not fit its latents."""
        if len(once) != 1 or once.ndim < 2 or twice.shape != once.shape:
            raise InvdiffError(
                f"The encoder returned shape {tuple(once.shape)} for one image, expected (1, channels, ...)."
            )
        gap = float((once - twice).abs().max())
        if gap > (1e-3 if self._inner in _HALF else 1e-6) * float(once.abs().max()):
            raise InvdiffError(
                f"The encoder gives two answers for one image (they differ by {gap:.2g}); give the mean of its "
                "distribution, e.g. lambda x: vae.encode(x).latent_dist.mean, and turn dropout off."
            )
        c = once.shape[1]
        for name, value in (("scale", self.scale), ("shift", self.shift)):
            if value.ndim and value.shape != (c,):
                raise InvdiffError(
                    f"The latent {name} has shape {tuple(value.shape)}, and the latents have {c} channels; give "
                    "one number, or one per channel."
                )
        if self.codebook is not None and (self.codebook.ndim != 2 or self.codebook.shape[1] != c):
            raise InvdiffError(
                f"The codebook has shape {tuple(self.codebook.shape)}, expected (K, {c}) for these latents."
            )


class _Network:
    """A module, a method of one, or a function that holds no weights we could move."""

    def __init__(self, function: Callable[[Tensor], Any], memo: dict[int, Any]) -> None:
        method = function if isinstance(function, MethodType) else None
        owner = function if method is None else method.__self__
        self.module: nn.Module | None = None
        self.function: Callable[..., Any] = function
        self.said, self._wide = False, cast("_Network | None", None)
        if isinstance(owner, nn.Module):
            self.module = copy.deepcopy(owner, memo).eval().requires_grad_(False)
            # the method itself, not its name: decorators change names
            self.function = _call if method is None else method.__func__
        elif not callable(function):
            raise InvdiffError(f"An autoencoder's part is a module or a function, not {type(function).__name__}.")

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        held = [] if self.module is None else [*self.module.parameters(), *self.module.buffers()]
        return held[0].device if held else torch.device("cpu")

    def __call__(self, x: Tensor, which: str) -> Tensor:
        return _tensor(self.function(x) if self.module is None else self.function(self.module, x), which)

    def wide(self, x: Tensor, which: str) -> Tensor:
        """Run in float32, on a copy made when it is first needed."""
        self._wide = self._wide or self.to(None, torch.float32)
        return self._wide(x, which)

    def of(self, module: nn.Module | None) -> _Network:
        """Return the same part of another module."""
        new = copy.copy(self)
        new.module, new._wide = module, None
        return new

    def to(self, device: torch.device | str | None, dtype: torch.dtype) -> _Network:
        """Return the part on a device and in a precision; the same module where nothing changes."""
        module = self.module
        if module is None:
            return self
        held = [*module.parameters(), *module.buffers()]
        moves = any(device is not None and t.device != torch.device(device) for t in held)
        turns = any(t.is_floating_point() and t.dtype != dtype for t in held)
        return self.of(copy.deepcopy(module).to(device=device, dtype=dtype)) if moves or turns else self

    def weights(self) -> dict[str, Tensor]:
        """Return the weights for a digest (numpy, which feeds it, has no bfloat16)."""
        state = {} if self.module is None else self.module.state_dict()
        return {k: v.float() if v.dtype == torch.bfloat16 else v for k, v in state.items()}


def _call(module: nn.Module, x: Tensor) -> Any:
    return module(x)


def _attempt(run: Callable[[], Tensor], which: str, x: Tensor) -> Tensor:
    """Run a network for the first time; what it raises becomes one sentence."""
    try:
        return run()
    except (RuntimeError, TypeError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise InvdiffError(
            f"The {which} failed on a tensor of shape {tuple(x.shape)}: {first:.200}; check the size of the image "
            "and what the networks take."
        ) from error


def _tensor(out: Any, which: str) -> Tensor:
    """Return the tensor in what a network returned: the mean of a distribution, never a draw."""
    for name in ("latent_dist", "latents"):
        out = getattr(out, name, out)
    if isinstance(out, tuple) and len(out) == 1:
        out = out[0]
    if not isinstance(out, Tensor) and callable(getattr(out, "mode", None)):
        out = out.mode()
    if not isinstance(out, Tensor):
        out = getattr(out, "sample", out)
    if not isinstance(out, Tensor):
        raise InvdiffError(
            f"The {which} returned {type(out).__name__}, not a tensor; wrap it in a function that returns the "
            "latents (their mean), or the image."
        )
    return out


def _factor(scale: float | Tensor | None, image: Space) -> Tensor:
    if scale is None:
        raise InvdiffError(
            "A latent prior needs the scale factor of its autoencoder, and there is no safe default: take it from "
            "the checkpoint (vae.config.scaling_factor, or scale_factor in its yaml), scale=1.0 if it has none."
        )
    value = torch.as_tensor(scale, dtype=image.dtype)
    if value.ndim > 1 or not bool(((value > 0) & torch.isfinite(value)).all()):
        raise InvdiffError(
            f"A latent scale is one positive number, or one per channel, got {value.tolist()!r:.60}."
        )
    return value


def _units(network: tuple[float, float] | None, image: tuple[float, float] | None) -> tuple[float, float, float]:
    """Return the networks' low end, the image's low end, and image units per network unit."""
    if (network is None) != (image is None):
        raise InvdiffError("network_range and image_range go together; give both, or neither.")
    if network is None or image is None:
        return 0.0, 0.0, 1.0
    ends = (*network, *image)
    if (
        len(ends) != 4
        or not all(math.isfinite(e) for e in ends)
        or network[0] >= network[1]
        or image[0] >= image[1]
    ):
        raise InvdiffError(f"Ranges must be (low, high) with low < high, got {network}, {image}.")
    return float(network[0]), float(image[0]), (image[1] - image[0]) / (network[1] - network[0])


def _channels(value: Tensor, z: Tensor) -> Tensor:
    """Shape a number, or one per channel, for latents ``(B, C, ...)``."""
    value = value.to(z)
    return value.reshape(-1, *([1] * (z.ndim - 2))) if value.ndim else value


def _snap(z: Tensor, codebook: Tensor) -> Tensor:
    """Return the nearest entries of the codebook, with the derivative of the identity."""
    flat = z.detach().movedim(1, -1)
    rows = [torch.cdist(row.reshape(-1, flat.shape[-1]), codebook).argmin(1) for row in flat]
    near = codebook[torch.stack(rows)].reshape(flat.shape).movedim(-1, 1)
    return z + (near - z).detach()
