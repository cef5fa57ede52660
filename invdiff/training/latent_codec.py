"""Training of the autoencoder of a latent prior.

    loss = mean |e| + edges mean |grad e| + (pull / 2) mean E(x)^2,     e = G(E(x) + noise n) - x,   n ~ N(0, I)

for images ``x`` in network units (-1 to 1). This is a variational autoencoder whose posterior has one fixed width,
``noise``: its Kullback-Leibler term is the last one. The noise makes the decoder smooth at that scale, so that a
small error of a latent is a small error of the image; without it a decoder may be as rough as it likes between
the latents of its training.

Everything random at step n depends on (seed, n) only, as in `invdiff.training.train`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from invdiff.networks.compact_autoencoder import CompactAutoencoder
from invdiff.training import checkpoints
from invdiff.training.config import TrainConfig
from invdiff.training.state import learning_rate

__all__ = ["AutoencoderConfig", "CodecState", "reconstruction", "to_network", "update"]

_FORMAT = "invdiff-codec-training/1"


@dataclass(frozen=True)
class AutoencoderConfig:
    """Autoencoder and its loss; formula in the module docstring.

    Args:
        latent: Channels of the latents.
        widths: Feature channels at 1/2, 1/4, ... of the resolution.
        blocks: Residual blocks per level of the encoder; the decoder has one more.
        noise: Standard deviation of the noise on latents.
        pull: Weight of the squares of the latents, which keeps them near the unit of ``noise``.
        edges: Weight of the gradient of the error.

    Raises:
        ValueError: A value is out of range.
    """

    latent: int = 3
    widths: tuple[int, ...] = (32, 64)
    blocks: int = 1
    noise: float = 0.05
    pull: float = 1e-3
    edges: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(self.widths))
        if min(self.latent, self.blocks, *self.widths) < 1 or min(self.noise, self.pull, self.edges) < 0:
            raise ValueError(f"Sizes of an autoencoder are positive and weights not negative; got {self}.")

    def build(self, channels: int, seed: int) -> CompactAutoencoder:
        """Return the network with the initial weights of a seed."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return CompactAutoencoder(channels, self.latent, self.widths, self.blocks)


def to_network(x: Tensor) -> Tensor:
    """From images of unit scale (0 to 1 and a little above) to network units (-1 to 1)."""
    return 2 * x - 1


class CodecState:
    """Network, averaged weights and optimiser, which are saved and restored as one file."""

    def __init__(self, config: TrainConfig, about: AutoencoderConfig, device: torch.device) -> None:
        self.config, self.about, self.device = config, about, device
        self.network = about.build(config.channels, config.seed).to(device)
        self.average = {k: v.detach().clone() for k, v in self.network.named_parameters()}
        self.optimiser = torch.optim.Adam(self.network.parameters(), lr=config.learning_rate, betas=(0.9, 0.99))
        self.half = config.precision == "bfloat16" or (config.precision == "auto" and device.type == "cuda")
        self.step, self.seconds = 0, 0.0

    def averaged(self) -> CompactAutoencoder:
        """Copy of the network with averaged weights."""
        out = self.about.build(self.config.channels, 0).to(self.device)
        out.load_state_dict(self.average, strict=True)
        return out.eval().requires_grad_(False)

    def save(self, path: Path) -> None:
        """Write the checkpoint."""
        about = {"step": self.step, "seconds": self.seconds, "config": self.network.config()}
        checkpoints.write(path, about, _FORMAT, self.network, self.average, self.optimiser)

    def load(self, path: Path) -> None:
        """Take up the state of a checkpoint.

        Raises:
            ValueError: It is unreadable or belongs to another network.
        """
        state, tensors = checkpoints.read(path, _FORMAT)
        if state["config"] != self.network.config():
            raise ValueError(
                f"{path} is the checkpoint of {state['config']}, not of {self.network.config()}; choose another "
                "output folder."
            )
        checkpoints.restore(tensors, self.network, self.average, self.optimiser)
        self.step, self.seconds = int(state["step"]), float(state["seconds"])


def update(state: CodecState, crops: Tensor) -> float:
    """Take one optimiser step on crops of unit scale ``(B, C, n, n)``; return the loss."""
    config, about = state.config, state.about
    x = to_network(crops.to(state.device))
    factor = state.network.factor
    rng = np.random.default_rng([config.seed, 3, state.step])
    shape = (len(x), about.latent, x.shape[2] // factor, x.shape[3] // factor)
    noise = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)).to(state.device)
    with torch.autocast(state.device.type, torch.bfloat16, enabled=state.half):
        z = state.network.encode(x).float()
        e = state.network.decode(z + about.noise * noise).float() - x
    loss = e.abs().mean() + about.edges * (e.diff(dim=-1).abs().mean() + e.diff(dim=-2).abs().mean())
    loss = loss + about.pull / 2 * z.square().mean()
    for group in state.optimiser.param_groups:
        group["lr"] = learning_rate(config, state.step)
    state.optimiser.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(state.network.parameters(), config.clip)
    state.optimiser.step()
    # A short horizon at first, or the average would remember the initial weights.
    decay = min(config.ema, (1 + state.step) / (10 + state.step))
    for name, parameter in state.network.named_parameters():
        state.average[name].lerp_(parameter.detach(), 1 - decay)
    state.step += 1
    return float(loss.detach())


@torch.no_grad()
def reconstruction(codec: CompactAutoencoder, images: list[NDArray[Any]], multiple: int) -> dict[str, Any]:
    """How near an image is to what its latent decodes to.

        rmse = sqrt(mean (G(E(x)) - x)^2),      psnr = -20 log10 rmse,      in images of unit scale

    Args:
        codec: The autoencoder.
        images: Real ``(C, ny, nx)`` arrays of unit scale; cropped at the end to multiples of ``multiple``.
        multiple: What height and width must be multiples of.

    Returns:
        ``rmse`` and ``psnr`` over all pixels, ``worst_psnr`` of a single image, and the number of images.
    """
    parameter = next(codec.parameters())
    squares = []
    for image in images:
        ny, nx = (n - n % multiple for n in image.shape[1:])
        x = torch.from_numpy(image[None, :, :ny, :nx].astype(np.float32)).to(parameter)
        out = (codec.decode(codec.encode(to_network(x))) + 1) / 2
        squares.append((float((out - x).double().square().mean()), x.numel()))
    total = sum(s * n for s, n in squares) / sum(n for _, n in squares)
    worst = max(s for s, _ in squares)
    return {
        "rmse": float(f"{math.sqrt(total):.4g}"),
        "psnr": round(-10 * math.log10(total), 2),
        "worst_psnr": round(-10 * math.log10(worst), 2),
        "images": len(images),
    }
