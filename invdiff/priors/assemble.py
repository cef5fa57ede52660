"""What readers of checkpoints share: fill an architecture strictly, make a prior for images of any size."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from invdiff.codec import Codec, ComplexChannels, Pad, Scale
from invdiff.errors import InvdiffError
from invdiff.prior import Prior
from invdiff.priors.frames import Frame
from invdiff.priors.parametrisation import ParametrisedDenoiser
from invdiff.spaces import Space

__all__ = ["IMAGE_OPTIONS", "assemble", "fill", "image_codec"]

#: What every format of pixel networks takes, beside what its files leave open.
IMAGE_OPTIONS: dict[str, str] = {
    "network_range": "values that the network was trained on, e.g. (-1, 1)",
    "image_range": "image values that these stand for; (0, 1) for three channels, network units otherwise",
    "sigma_data": "standard deviation of one component of an image in network units",
    "outside": "levels outside the range of the training: 'clamp' or 'error'",
    "network_dtype": "precision of the network alone, e.g. torch.bfloat16",
    "label": "class of all images, where the network is conditional on one",
}
# Natural images on [-1, 1] have a standard deviation of about 0.5, a quarter of the interval.
_SPREAD = 0.25


def fill(
    build: Callable[[], nn.Module],
    state: Mapping[str, Tensor],
    where: str,
    dtype: torch.dtype | None = torch.float32,
) -> nn.Module:
    """Build a network and load weights whose names and shapes must be exactly its own.

    The network is first built without memory, so that a hostile configuration costs none.

    Args:
        build: Makes the network.
        state: The weights.
        where: The file, for messages.
        dtype: Precision of the weights; None keeps that of the file.

    Raises:
        InvdiffError: If a name is missing or too many, a shape differs, or a value is not finite.
    """
    try:
        with torch.device("meta"):
            wanted = {k: tuple(v.shape) for k, v in build().state_dict().items()}
    except InvdiffError:
        raise
    except Exception as error:  # whatever an architecture makes of its configuration
        reason = re.sub(r"\s+", " ", str(error))[:200]
        raise InvdiffError(f"{where} describes no network that can be built: {reason}.") from None
    for key, shape in wanted.items():
        if key not in state:
            raise InvdiffError(f"{where} lacks the weights {key}; fetch the checkpoint again.")
        if tuple(state[key].shape) != shape:
            raise InvdiffError(
                f"{where}: {key} has shape {tuple(state[key].shape)}, and the architecture needs {shape}; the "
                "weights belong to another configuration."
            )
    for key, value in state.items():
        if key not in wanted:
            raise InvdiffError(
                f"{where} holds the weights {key}, which the architecture does not have; they belong to another "
                "configuration."
            )
        if not bool(torch.isfinite(value).all()):
            raise InvdiffError(f"{where} holds NaN or infinite values in {key}; fetch the checkpoint again.")
    # Initial weights are drawn and thrown away; that must not move the caller's random numbers.
    with torch.random.fork_rng(devices=[]):
        network = build()
    held = {k: v.to(dtype) if dtype is not None and v.is_floating_point() else v for k, v in state.items()}
    if dtype is not None and any(
        v.is_floating_point() and v.dtype != dtype for v in network.state_dict().values()
    ):
        network = network.to(dtype)
    network.load_state_dict(held, strict=True)
    return network.eval().requires_grad_(False)


def image_codec(
    image: Space,
    scale: Tensor,
    channels: int,
    multiple: int = 1,
    gain: float = 1.0,
    offset: float = 0.0,
) -> Codec:
    """Codec of a network of ``channels`` channels for images ``(channels, y, x)`` of any size.

    ``decode(u) = scale (gain crop(u) + offset)``; two channels also serve complex images ``(1, y, x)``.

    Raises:
        InvdiffError: If the network cannot take such images.
    """
    if len(image.shape) != 3:
        raise InvdiffError(f"This prior makes images (channel, y, x), and the problem's are {image}.")
    pairs = channels == 2 and image.shape[0] == 1
    if pairs and offset:
        raise InvdiffError("Complex images have no range with an offset; declare ranges symmetric about zero.")
    if not pairs and (image.is_complex or image.shape[0] != channels):
        hint = "choose a prior that fits"
        if channels == 3 and image.shape[0] == 1 and not image.is_complex:
            hint = "prior.for_grey() serves images of one channel"
        raise InvdiffError(
            f"This prior has {channels} real channel(s), and the problem's images are {image}; {hint}."
        )
    parts: list[Codec] = []
    if scale.ndim or float(scale) != 1:
        parts.append(Scale(image, scale))
    if gain != 1 or offset:
        parts.append(Scale(image, gain, offset))
    if pairs:
        parts.append(ComplexChannels(image))
    parts.append(Pad(parts[-1].prior if parts else image, multiple))
    codec = parts[0]
    for part in parts[1:]:
        codec = codec @ part
    return codec


def assemble(
    network: nn.Module,
    parametrisation: str,
    frame: Frame,
    channels: int,
    *,
    card: Mapping[str, Any],
    multiple: int = 1,
    learned_variance: bool = False,
    conditions: Sequence[str] = (),
    native_range: tuple[float, float] = (-1.0, 1.0),
    differentiable: int = 2,
    network_range: tuple[float, float] | None = None,
    image_range: tuple[float, float] | None = None,
    sigma_data: float | None = None,
    outside: str = "clamp",
    network_dtype: torch.dtype | None = None,
    label: int | Tensor | None = None,
) -> Prior:
    """Return a filled network as a prior; see `IMAGE_OPTIONS` for what users declare.

    Networks of three channels make images in ``image_range``, (0, 1) unless declared. Others make images in
    network units unless a range is declared; where they have two channels, the scale of complex images is read off
    the data.

    Args:
        network: Called as ``network(z, time)``, with the conditions as keywords.
        parametrisation: What it predicts; see `invdiff.priors.parametrisation`.
        frame: Its levels and times.
        channels: Channels of an image.
        card: What the format knows of the checkpoint.
        multiple: Height and width are padded to multiples of this.
        learned_variance: The second half of the output's channels is dropped.
        conditions: What it is conditional on.
        native_range: Range of values of the format, which ``network_range`` overrides.
        differentiable: How many times it can be differentiated.
        network_range: Values that the network was trained on.
        image_range: The image values that these stand for.
        sigma_data: Standard deviation of one component of an image in network units.
        outside: ``"clamp"`` or ``"error"``.
        network_dtype: Precision of the network alone.
        label: Class of all images.

    Raises:
        InvdiffError: If something declared is out of its range.
    """
    low, high = network_range or native_range
    declared = image_range if image_range is not None else (0.0, 1.0) if channels == 3 else None
    floor, top = declared or (low, high)
    if not (low < high and floor < top):
        raise InvdiffError(f"Ranges must be (low, high) with low < high, got {(low, high)} and {(floor, top)}.")
    if sigma_data is not None and not 0 < sigma_data < float("inf"):
        raise InvdiffError(f"sigma_data must be positive, got {sigma_data:g}.")
    if network_dtype is not None:
        network = network.to(network_dtype)
    if label is not None and "label" not in conditions:
        raise InvdiffError("This network is not conditional on a class; leave out label.")
    given = {} if label is None else {"label": torch.as_tensor(label)}
    if given and (given["label"].ndim or given["label"].is_floating_point()):
        raise InvdiffError(f"label is the class of all images, one whole number, got {label!r:.60}.")
    gain = (top - floor) / (high - low)
    offset = floor - gain * low
    denoiser = ParametrisedDenoiser(
        network,
        parametrisation,
        frame,
        channels,
        learned_variance=learned_variance,
        outside=outside,
        network_dtype=network_dtype,
        differentiable=differentiable,
        sigma_data=_SPREAD * (high - low) if sigma_data is None else sigma_data,
        conditions=conditions,
        given=given,
    )
    about = {
        **card,
        "channels": channels,
        "predicts": parametrisation,
        "sigma_min": frame.sigma_min,
        "sigma_max": frame.sigma_max,
        "sigma_data": denoiser.sigma_data,
        "outside": outside,
        "network_range": [low, high],
        "image_range": [floor, top],
        "multiple": multiple,
    }
    if conditions:
        about["conditions"] = list(conditions)
    absolute = channels != 2 or declared is not None
    return Prior(
        denoiser,
        card=about,
        make_codec=lambda image, scale: image_codec(image, scale, channels, multiple, gain, offset),
        scale=1.0 if absolute else None,
    )
