"""The networks that `invdiff train` makes: a choice of architectures behind one call.

    F(u, c),    u = x / sqrt(sigma^2 + sigma_data^2),    c = log(sigma) / 4

is what every architecture computes, of input of unit variance. Trained as ``edm``, the network is ``F`` itself.
Trained as ``flow`` it is the velocity on the line ``z = (1 - t) x0 + t eps``, a function of ``z`` and ``t`` that
gives ``F`` the same input, as ``sigma = t / (1 - t)`` and ``x = z / (1 - t)``:

    v(z, t) = F(z / sqrt((1 - t)^2 sigma_data^2 + t^2), log(t / (1 - t)) / 4)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from invdiff.errors import InvdiffError
from invdiff.networks.dhariwal import DhariwalUNet
from invdiff.networks.edm_blocks import Block
from invdiff.networks.edm_unet import EDMUNet
from invdiff.networks.songunet import SongUNet
from invdiff.networks.transformer import Transformer

__all__ = ["BACKBONES", "TrainedNetwork"]

#: Architectures by name, and the settings that each takes beside those that all share.
BACKBONES: dict[str, tuple[str, ...]] = {
    "unet": (),
    "adm": ("attention", "head_channels"),
    "ddpmpp": ("attention",),
    "transformer": ("head_channels", "patch"),
}

# A card may say anything, and a network of a billion blocks would take for ever to compare with its weights.
_MOST_BLOCKS, _MOST_LEVELS = 256, 12


class _ADM(DhariwalUNet):
    """With heads of attention as wide as asked for."""

    def __init__(self, *, head_channels: int, **sizes: Any) -> None:
        self.head_channels = head_channels
        super().__init__(**sizes)


class TrainedNetwork(nn.Module):
    """A network under the parametrisation it is trained in; formulas in the module docstring.

    Shapes:
        z: real ``(B, channels, H, W)``, sizes multiples of :attr:`multiple`; time ``(B,)``; label ``(B,)``, whole
        numbers, of which ``classes`` stands for no class; returns ``(B, channels, H, W)``.

    Args:
        backbone: A name in `BACKBONES`.
        parametrisation: ``"edm"`` or ``"flow"``.
        channels: Image channels.
        size: Height and width of the training crops, to which sizes with attention refer.
        widths: Features of each resolution: from half of it on for ``unet``, from the full one for ``adm`` and
            ``ddpmpp``; one number for ``transformer``.
        blocks: Residual blocks per resolution, or layers.
        embedding: Features of the noise level.
        sigma_data: Standard deviation of the training images per channel.
        sigma_min, sigma_max: Levels of the training.
        classes: Classes of images; 0 for a network without.
        attention: Sizes of feature maps with attention, for crops of ``size``; the smallest map always has it.
        head_channels: Features of one head of attention.
        patch: Height and width of a patch.

    Raises:
        InvdiffError: If a name is unknown or sizes do not fit each other.
    """

    def __init__(
        self,
        *,
        backbone: str,
        parametrisation: str,
        channels: int,
        size: int,
        widths: Sequence[int],
        blocks: int,
        embedding: int,
        sigma_data: float,
        sigma_min: float,
        sigma_max: float,
        classes: int = 0,
        attention: Sequence[int] = (),
        head_channels: int | None = None,
        patch: int | None = None,
    ) -> None:
        super().__init__()
        if backbone not in BACKBONES:
            raise InvdiffError(f"Unknown backbone {backbone!r}; there are {', '.join(BACKBONES)}.")
        if parametrisation not in ("edm", "flow"):
            raise InvdiffError(f"A trained network is 'edm' or 'flow', got {parametrisation!r}.")
        if not 0 < sigma_data < float("inf"):
            raise InvdiffError(f"sigma_data must be a positive number, got {sigma_data}.")
        if not 1 <= blocks <= _MOST_BLOCKS or not 1 <= len(widths) <= _MOST_LEVELS:
            raise InvdiffError(
                f"A network has 1 to {_MOST_BLOCKS} blocks and 1 to {_MOST_LEVELS} widths, got {blocks} and "
                f"{len(widths)}."
            )
        given = {"attention": list(attention), "head_channels": head_channels, "patch": patch}
        own = {name: given[name] for name in BACKBONES[backbone]}
        self.parametrisation, self.channels, self.size = parametrisation, channels, size
        self.sigma_data, self.classes = float(sigma_data), classes
        self.sigma_min, self.sigma_max = float(sigma_min), float(sigma_max)
        common: dict[str, Any] = {
            "channels": channels,
            "widths": list(widths),
            "blocks": blocks,
            "embedding": embedding,
            "classes": classes,
        }
        self._config = {
            "backbone": backbone,
            "parametrisation": parametrisation,
            "size": size,
            "sigma_data": self.sigma_data,
            "sigma_min": self.sigma_min,
            "sigma_max": self.sigma_max,
            **common,
            **own,
        }
        try:
            core = _MAKE[backbone](size=size, **common, **own)
        except InvdiffError:
            raise
        except (ValueError, TypeError, IndexError, ZeroDivisionError) as error:
            raise InvdiffError(
                f"No {backbone} network has widths {list(widths)} and embedding {embedding} ({error}); "
                "multiples of 32 always fit."
            ) from None
        #: Height and width must be multiples of this.
        self.multiple: int = core.multiple
        self.core: nn.Module = core

    def config(self) -> dict[str, Any]:
        """Plain description from which :meth:`from_config` builds the same network."""
        return dict(self._config)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> TrainedNetwork:
        """Build a network from :meth:`config`.

        Raises:
            InvdiffError: If a key is unknown or missing, or a value does not fit.
        """
        backbone = config.get("backbone")
        known = _SHARED | set(BACKBONES.get(str(backbone), ()))
        if unknown := sorted(set(config) - known):
            raise InvdiffError(f"Network config has unknown keys {unknown}; known are {sorted(known)}.")
        if missing := sorted(known - set(config)):
            raise InvdiffError(f"Network config lacks {missing}.")
        try:
            return cls(**config)
        except TypeError as error:
            raise InvdiffError(f"Network config has a value of the wrong type: {error}.") from None

    def forward(self, z: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        """Return what the parametrisation says; shapes in the class docstring.

        Raises:
            InvdiffError: If sizes are not multiples of :attr:`multiple`, or a label is out of range.
        """
        m = self.multiple
        if z.ndim != 4 or z.shape[1] != self.channels or z.shape[2] % m or z.shape[3] % m:
            raise InvdiffError(
                f"The network takes images (B, {self.channels}, H, W), H and W multiples of {m}, got "
                f"{tuple(z.shape)}."
            )
        if self.parametrisation == "flow":
            rest = 1 - time
            gain = ((rest * self.sigma_data).square() + time.square()).rsqrt()
            z, time = z * gain.to(z.dtype)[:, None, None, None], (time.log() - rest.log()) / 4
        return self.core(z, time, self._weights(label, z)) if self.classes else self.core(z, time)

    def _weights(self, label: Tensor | None, like: Tensor) -> Tensor:
        """One at the class of every image, ``(B, classes)``; zeros for no class."""
        if label is None:
            return like.new_zeros(len(like), self.classes)
        if not torch.compiler.is_compiling() and (
            label.is_floating_point() or bool(((label < 0) | (label > self.classes)).any())
        ):
            raise InvdiffError(
                f"A label is a whole number from 0 to {self.classes - 1}, or {self.classes} for no class, got "
                f"{label.tolist()!r:.60}."
            )
        return functional.one_hot(label.long(), self.classes + 1)[:, : self.classes].to(like)


_SHARED = {"backbone", "parametrisation", "size", "sigma_data", "sigma_min", "sigma_max"} | {
    "channels",
    "widths",
    "blocks",
    "embedding",
    "classes",
}


class _Core(nn.Module):
    """`EDMUNet` without its preconditioning."""

    def __init__(self, network: EDMUNet) -> None:
        super().__init__()
        self.network = network

    @property
    def multiple(self) -> int:
        return self.network.multiple

    def forward(self, u: Tensor, c: Tensor, weights: Tensor | None = None) -> Tensor:
        return self.network.raw(u, c, weights)


def _unet(*, size: int, **sizes: Any) -> nn.Module:
    return _Core(EDMUNet(**sizes))


def _u_sizes(
    channels: int, size: int, widths: list[int], embedding: int, classes: int, attention: list[int]
) -> dict[str, Any]:
    """Arguments that `DhariwalUNet` and `SongUNet` share."""
    maps = [size >> level for level in range(len(widths))]
    if size % (1 << (len(widths) - 1)):
        raise InvdiffError(f"Crops must be multiples of {1 << (len(widths) - 1)} pixels, got {size}.")
    if wrong := [n for n in attention if n not in maps]:
        raise InvdiffError(f"attention names sizes of feature maps, which are {maps} here, got {wrong}.")
    if embedding < 4 or embedding % 2:
        raise InvdiffError(f"embedding must be an even number of at least 4, got {embedding}.")
    return {
        "attention": attention,
        "inputs": channels,
        "outputs": channels,
        "resolution": size,
        "inlet": widths[0],
        "widths": widths,
        "embedding": embedding,
        "noise": embedding,
        "label": classes,
    }


def _adm(
    *,
    channels: int,
    size: int,
    widths: list[int],
    embedding: int,
    classes: int,
    head_channels: int,
    attention: list[int],
    blocks: int,
) -> nn.Module:
    sizes = _u_sizes(channels, size, widths, embedding, classes, attention)
    attending = [w for level, w in enumerate(widths) if size >> level in attention or level == len(widths) - 1]
    if head_channels < 1 or any(w % head_channels for w in attending):
        raise InvdiffError(
            f"head_channels must divide the widths with attention, {attending} here, got {head_channels}."
        )
    network = _ADM(head_channels=head_channels, blocks=blocks, **sizes)
    return _still(network, network.out_conv)


def _ddpmpp(
    *,
    channels: int,
    size: int,
    widths: list[int],
    embedding: int,
    classes: int,
    attention: list[int],
    blocks: int,
) -> nn.Module:
    sizes = _u_sizes(channels, size, widths, embedding, classes, attention)
    network = SongUNet(blocks=blocks, fourier=False, residual=False, taps=(1, 1), **sizes)
    outlet = network.dec[f"{size}x{size}_aux_conv"]
    assert isinstance(outlet, nn.Conv2d)
    return _still(network, outlet)


def _still(network: nn.Module, outlet: nn.Conv2d) -> nn.Module:
    """Start every residual block as its skip alone, and the whole as zero, as their authors do."""
    last = [outlet]
    for module in network.modules():
        if isinstance(module, Block):
            last += [module.conv1, module.proj] if module.heads else [module.conv1]
    for layer in last:
        nn.init.zeros_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    return network


def _transformer(*, size: int, widths: list[int], **sizes: Any) -> nn.Module:
    if len(widths) != 1:
        raise InvdiffError(f"The transformer has one width, e.g. widths = [256], got {widths}.")
    (width,) = widths
    return Transformer(width=width, **sizes)


_MAKE: dict[str, Callable[..., Any]] = {
    "unet": _unet,
    "adm": _adm,
    "ddpmpp": _ddpmpp,
    "transformer": _transformer,
}
