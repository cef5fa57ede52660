"""Any network with a declared parametrisation as a denoiser ``D(x, sigma) = E[x0 | x0 + sigma eps = x]``.

Every parametrisation is affine in the network's output ``f = network(c x, time)``: ``D = a x + b f``.

| name | the network gives | ``a`` | ``b`` |
|---|---|---|---|
| ``x0`` | the denoised image | 0 | 1 |
| ``epsilon`` | the noise ``eps`` | 1 | ``-sigma`` |
| ``score`` | the gradient of the log density at its own input ``c x`` | 1 | ``sigma^2 c`` |
| ``v`` | ``(eps - sigma x0) / sqrt(1 + sigma^2)`` | ``1 / (1 + sigma^2)`` | ``-sigma / sqrt(1 + sigma^2)`` |
| ``edm`` | ``F``, ``d`` the ``sigma_data`` | ``d^2 / (sigma^2 + d^2)`` | ``sigma d / sqrt(sigma^2 + d^2)`` |
| ``flow`` | ``eps - x0`` (noise at time 1) | ``1 / (1 + sigma)`` | ``-sigma / (1 + sigma)`` |

The scale ``c``, the time and the range of ``sigma`` are the frame's: `invdiff.priors.frames`. v: Salimans, Ho,
ICLR 2022, arXiv:2202.00512.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from invdiff.codec import Codec, ComplexChannels, Scale
from invdiff.errors import InvdiffError
from invdiff.prior import Denoiser, Prior
from invdiff.priors.frames import EDM, Flow, Frame
from invdiff.spaces import Space, per_row
from invdiff.tensors import move, tensor_digest

__all__ = ["PARAMETRISATIONS", "ParametrisedDenoiser", "from_network"]

PARAMETRISATIONS = ("x0", "epsilon", "score", "v", "edm", "flow")
# Levels pass through float32, which moves the ends of a range by 6e-8 of themselves.
_ROUNDING = 1e-6


def _coefficients(name: str, sigma: Tensor, frame: Frame) -> tuple[Tensor, Tensor]:
    """Return ``a`` and ``b`` of ``D = a x + b f``, float64 ``(B,)``."""
    one = torch.ones_like(sigma)
    if name == "x0":
        return torch.zeros_like(sigma), one
    if name == "epsilon":
        return one, -sigma
    if name == "score":
        return one, sigma**2 * frame.scale(sigma)
    if name == "v":
        return 1 / (1 + sigma**2), -sigma * (1 + sigma**2).rsqrt()
    if name == "edm":
        assert isinstance(frame, EDM)
        total = sigma**2 + frame.sigma_data**2
        return frame.sigma_data**2 / total, sigma * frame.sigma_data * total.rsqrt()
    assert isinstance(frame, Flow)
    return 1 / (1 + sigma), (-1 if frame.noise_at else 1) * sigma / (1 + sigma)


class ParametrisedDenoiser(Denoiser):
    """``D = a x + b network(c x, time)``; see the table of the module.

    Coefficients and time are computed in float64, the sum in ``dtype``, the network in ``network_dtype``. Time
    reaches the network as int64 where the frame says ``whole``, else in ``network_dtype`` but at least float32.

    Args:
        space: Prior coordinates, or the number of channels of a float32 network that takes images of any size.
        conditions: Names of what else the network takes, as keywords; each must come in ``cond`` or ``given``.
        given: Conditions that hold for every row.
    """

    def __init__(
        self,
        network: Callable[[Tensor, Tensor], Tensor],
        parametrisation: str,
        frame: Frame,
        space: Space | int,
        *,
        learned_variance: bool = False,
        outside: str = "error",
        network_dtype: torch.dtype | None = None,
        differentiable: int = 2,
        sigma_data: float | None = None,
        conditions: Sequence[str] = (),
        given: Mapping[str, Tensor] | None = None,
    ) -> None:
        if parametrisation not in PARAMETRISATIONS:
            raise InvdiffError(
                f"Unknown parametrisation {parametrisation!r}; there are {', '.join(PARAMETRISATIONS)}."
            )
        if parametrisation not in frame.serves:
            raise InvdiffError(
                f"The frame {type(frame).__name__} knows {', '.join(frame.serves)}, and the network is declared "
                f"as {parametrisation!r}; choose the frame it was trained in."
            )
        if outside not in ("error", "clamp"):
            raise InvdiffError(f"outside must be 'error' or 'clamp', got {outside!r}.")
        self.network, self.parametrisation, self.frame = network, parametrisation, frame
        self.space = None if isinstance(space, int) else space
        self.learned_variance, self.outside, self.differentiable = learned_variance, outside, differentiable
        self.sigma_min, self.sigma_max = frame.sigma_min, frame.sigma_max
        self.channels, self.dtype = (
            (space, torch.float32) if isinstance(space, int) else (space.shape[0], space.dtype)
        )
        known = frame.sigma_data if isinstance(frame, EDM) else 1.0
        self.sigma_data = known if sigma_data is None else float(sigma_data)
        #: None where the network follows the denoiser's precision.
        self.network_dtype = network_dtype
        self.conditions, self.given = tuple(conditions), dict(given or {})

    def __call__(self, x: Tensor, sigma: Tensor, cond: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return ``E[x0 | x]``, ``(B, *shape)``; ``sigma`` is ``(B,)`` or a number.

        Raises:
            InvdiffError: If a level is outside the network's range and ``outside`` is ``"error"``, the output
                has the wrong shape, or a condition is missing or unknown.
        """
        level = torch.as_tensor(sigma).detach().to("cpu", torch.float64).reshape(-1).expand(x.shape[0])
        low, high = self.sigma_min, self.sigma_max
        beyond = (level < low * (1 - _ROUNDING)) | (level > high * (1 + _ROUNDING)) | level.isnan()
        if self.outside == "error" and bool(beyond.any()):
            raise InvdiffError(
                f"The network was trained for sigma from {low:.4g} to {high:.4g}, and sigma "
                f"{float(level[beyond][0]):.4g} is asked for; stay inside, or declare outside='clamp'."
            )
        time = self.frame.time(level.clamp(low, high))
        inner = self.network_dtype or self.dtype
        clock = torch.int64 if self.frame.whole else torch.promote_types(inner, torch.float32)
        scaled = x * per_row(self.frame.scale(level), x)
        out = self.network(scaled.to(inner), time.to(clock).to(x.device), **self._conditions(cond, x))
        a, b = _coefficients(self.parametrisation, level, self.frame)
        return per_row(a, x) * x + per_row(b, x) * self._prediction(out, x).to(x.dtype)

    def _conditions(self, cond: Mapping[str, Tensor] | None, x: Tensor) -> dict[str, Tensor]:
        """Conditions of every row; a scalar holds for all of them."""
        known = {**self.given, **(cond or {})}
        for name in self.conditions:
            if name not in known:
                raise InvdiffError(
                    f"The network was trained with a {name} for every image and none is given; call the denoiser "
                    f"with cond={{{name!r}: tensor (B,)}}, or load the prior with {name}=... for all images."
                )
        for name in known:
            if name not in self.conditions:
                listed = ", ".join(self.conditions) or "none"
                raise InvdiffError(f"The network takes no condition {name!r}; it takes {listed}.")
        tensors = {k: torch.as_tensor(v, device=x.device) for k, v in known.items()}
        return {k: v.expand(len(x)) if v.ndim == 0 else v for k, v in tensors.items()}

    def _prediction(self, out: Any, x: Tensor) -> Tensor:
        """Check the output's shape and drop the channels of a learned variance."""
        if not isinstance(out, Tensor):
            raise InvdiffError(
                f"The network returned {type(out).__name__}, not a tensor; wrap it in a function that returns the "
                "prediction alone."
            )
        full = (len(x), 2 * self.channels, *x.shape[2:]) if self.learned_variance else tuple(x.shape)
        if tuple(out.shape) != full:
            hint = "check the space and learned_variance"
            if not self.learned_variance and tuple(out.shape) == (len(x), 2 * self.channels, *x.shape[2:]):
                hint = "if the second half is a learned variance, declare learned_variance=True"
            raise InvdiffError(f"The network returned shape {tuple(out.shape)}, expected {full}; {hint}.")
        return out[:, : self.channels]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Any:
        """Return a copy on another device or in another precision; a declared ``network_dtype`` stays."""
        new = super().to(device, dtype)
        if isinstance(self.network, nn.Module):
            inner = dtype if self.network_dtype is None else None
            new.network = _placed(self.network, device, inner)
        return new


def _placed(network: nn.Module, device: torch.device | str | None, dtype: torch.dtype | None) -> nn.Module:
    """Return the network itself where nothing moves, else a copy; complex weights stay complex."""
    held = [*network.parameters(), *network.buffers()]
    goes = device is not None and any(t.device != torch.device(device) for t in held)
    turns = dtype is not None and any(t.is_floating_point() and t.dtype != dtype for t in held)
    return _cast(copy.deepcopy(network), device, dtype) if goes or turns else network


def _cast(network: nn.Module, device: torch.device | str | None, dtype: torch.dtype | None) -> nn.Module:
    apply: Callable[[Callable[[Tensor], Tensor]], nn.Module] = network._apply
    return apply(lambda t: move(t, device, dtype))


def from_network(
    network: Callable[[Tensor, Tensor], Tensor],
    parametrisation: str,
    frame: Frame,
    image: Space | Sequence[int],
    *,
    network_range: tuple[float, float] | None = None,
    image_range: tuple[float, float] | None = None,
    learned_variance: bool = False,
    outside: str = "error",
    network_dtype: torch.dtype | None = None,
    differentiable: int = 2,
    sigma_data: float | None = None,
    card: Mapping[str, Any] | None = None,
) -> Prior:
    """Return a network as a prior: ``D(x, sigma) = a x + b network(c x, time)``, see the table of this module.

    A module is copied, put into evaluation mode, and its weights' gradients turned off. Complex images
    ``(1, y, x)`` meet the network as two channels, real part first.

    Args:
        network: Called as ``network(z, time)``, ``z`` ``(B, *shape)``, ``time`` ``(B,)``; returns a tensor.
        parametrisation: ``"x0"``, ``"epsilon"``, ``"score"``, ``"v"``, ``"edm"`` or ``"flow"``.
        frame: ``VP``, ``VE``, ``EDM`` or ``Flow`` of `invdiff.priors.frames`, with the levels of the training.
        image: Space of the image, or its shape alone (float32).
        network_range: Values that the network was trained on, e.g. (-1, 1); goes with ``image_range``.
        image_range: The image values that these stand for, e.g. (0, 1). Levels ``sigma`` are in network units.
            Without the two, images are in network units.
        learned_variance: The output has twice the channels, the second half a variance, which is dropped.
        outside: Levels outside the frame's range: ``"error"``, or ``"clamp"``, which gives the network the time of
            the nearest level it knows while input and output are scaled by the level asked for.
        network_dtype: Precision of the network's input, and of its weights where it is a module; None follows the
            image's. Half precision here keeps everything around the network in the image's precision.
        differentiable: How many times the network can be differentiated (0, 1 or 2).
        sigma_data: Standard deviation of one component of an image in network units, which some samplers take for
            the width at high noise; None takes that of the frame ``EDM``, 1 elsewhere.
        card: Name, licence, training data; passed on to provenance.

    Raises:
        InvdiffError: If names are unknown, frame and parametrisation do not go together, ranges are not pairs
            ``low < high`` given together, or ``sigma_data`` is not positive.
    """
    space = image if isinstance(image, Space) else Space(tuple(image))
    codec: Codec | None = ComplexChannels(space) if space.is_complex else None
    if (network_range is None) != (image_range is None):
        raise InvdiffError("network_range and image_range go together; give both, or neither.")
    if network_range is not None and image_range is not None:
        (low, high), (floor, top) = network_range, image_range
        if not (low < high and floor < top):
            raise InvdiffError(f"Ranges must be (low, high) with low < high, got {network_range}, {image_range}.")
        if space.is_complex and low * top != high * floor:
            raise InvdiffError("Complex images have no range with an offset; give ranges symmetric about zero.")
        gain = (top - floor) / (high - low)
        units = Scale(space, gain, floor - gain * low)
        codec = units if codec is None else units @ codec
    about = {"name": getattr(network, "__name__", type(network).__name__)}
    if sigma_data is not None and not 0 < sigma_data < float("inf"):
        raise InvdiffError(f"sigma_data must be positive, got {sigma_data:g}.")
    if isinstance(network, nn.Module):
        network = copy.deepcopy(network).eval().requires_grad_(False)
        network = _cast(network, None, network_dtype or space.real_dtype)
        # numpy, which feeds the digest, has no bfloat16.
        state = {k: v.float() if v.dtype == torch.bfloat16 else v for k, v in network.state_dict().items()}
        about["sha256"] = tensor_digest(state)
    denoiser = ParametrisedDenoiser(
        network,
        parametrisation,
        frame,
        codec.prior if codec else space,
        learned_variance=learned_variance,
        outside=outside,
        network_dtype=network_dtype,
        differentiable=differentiable,
        sigma_data=sigma_data,
    )
    return Prior(denoiser, codec, {**about, **(card or {})})
