"""What training changes: weights, their average, the optimiser; one step of it, and its checkpoint."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from invdiff.networks import BACKBONES, EDMUNet, TrainedNetwork
from invdiff.priors.learned import Network, denoiser_of
from invdiff.training import checkpoints
from invdiff.training.batches import Batch
from invdiff.training.config import TrainConfig
from invdiff.training.processes import Processes

_FORMAT = "invdiff-training/1"
#: Settings that fix the network; a checkpoint belongs to one choice of them.
_NETWORK = ("channels", "loss", "backbone", "widths", "blocks", "embedding", "sigma_data", "condition")


def make_network(config: TrainConfig, classes: int = 0) -> Network:
    """Return an untrained network; the default loss and backbone make an `EDMUNet`, the denoiser itself."""
    sizes = (config.channels, config.widths, config.blocks, config.embedding, config.sigma_data)
    if config.loss == "edm" and config.backbone == "unet" and not classes:
        return EDMUNet(*sizes)
    return TrainedNetwork(
        backbone=config.backbone,
        parametrisation=config.loss,
        channels=config.channels,
        size=config.crop,
        widths=config.widths,
        blocks=config.blocks,
        embedding=config.embedding,
        sigma_data=config.sigma_data,
        sigma_min=config.sigma_min,
        sigma_max=config.sigma_max,
        classes=classes,
        **{name: getattr(config, name) for name in BACKBONES[config.backbone]},
    )


def loss_weight(config: TrainConfig, sigma: Tensor) -> Tensor:
    """Weight of ``||D - x||^2`` at each noise level, ``(B,)``.

    ``edm``: ``(sigma^2 + d^2) / (sigma d)^2``, so that the network's own target has unit variance. ``flow``:
    ``((1 + sigma) / sigma)^2``, which makes the sum ``||v - (eps - x)||^2``, as ``D = z - t v``.
    """
    if config.loss == "flow":
        return ((1 + sigma) / sigma) ** 2
    return (sigma**2 + config.sigma_data**2) / (sigma * config.sigma_data) ** 2


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, plateau, cosine decay over the last ``decay_fraction`` of the steps."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    start = config.steps * (1 - config.decay_fraction)
    if step <= start:
        return config.learning_rate
    done = min(1.0, (step - start) / max(1.0, config.steps - start))
    cosine = 0.5 + 0.5 * math.cos(math.pi * done)
    return config.final_learning_rate + (config.learning_rate - config.final_learning_rate) * cosine


class TrainState:
    """Network, averaged weights and optimiser, which are saved and restored as one file.

    Args:
        config: Settings.
        device: Where to train.
        classes: Names of the classes, for a prior with classes.
        processes: Those that train together.
    """

    def __init__(
        self,
        config: TrainConfig,
        device: torch.device,
        classes: Sequence[str] = (),
        processes: Processes | None = None,
    ) -> None:
        self.classes, self.processes = tuple(classes), processes or Processes()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(config.seed)
            self.network = make_network(config, len(classes)).to(device)
        if config.channels_last:
            by_channels: dict[str, Any] = {"memory_format": torch.channels_last}  # torch's stubs differ by version
            self.network.to(**by_channels)
        self.denoise = denoiser_of(self.network, torch.compile(self.network) if config.compile else None)
        self.average = {k: v.detach().clone() for k, v in self.network.named_parameters()}
        self.optimiser = torch.optim.Adam(
            self.network.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), foreach=True
        )
        self.config, self.device = config, device
        self.half = config.precision == "bfloat16" or (config.precision == "auto" and device.type == "cuda")
        self.step = 0
        self.seconds = 0.0
        #: Running mean of the loss.
        self.smooth: float | None = None

    def save(self, path: Path) -> None:
        """Write the checkpoint."""
        about = {"step": self.step, "seconds": self.seconds, "config": self.config.to_dict()}
        about |= {"classes": list(self.classes), "smooth": self.smooth}
        checkpoints.write(path, about, _FORMAT, self.network, self.average, self.optimiser)

    def load(self, path: Path) -> None:
        """Take up the state of a checkpoint.

        Raises:
            ValueError: it is unreadable or belongs to another network.
        """
        state, tensors = checkpoints.read(path, _FORMAT)
        asked, defaults = self.config.to_dict(), TrainConfig().to_dict()
        own = BACKBONES[self.config.backbone]
        if "attention" in own:
            own = (*own, "crop")
        for key in _NETWORK + own:
            # Older checkpoints know the defaults alone.
            trained = state["config"].get(key, defaults[key])
            if trained != asked[key]:
                raise ValueError(
                    f"{path} was trained with {key} = {trained}, not {asked[key]}; choose another output folder."
                )
        if (trained := state.get("classes", [])) != list(self.classes):
            raise ValueError(
                f"{path} was trained with the classes {trained}, not {list(self.classes)}; choose another output "
                "folder."
            )
        checkpoints.restore(tensors, self.network, self.average, self.optimiser)
        self.step, self.seconds = int(state["step"]), float(state["seconds"])
        self.smooth = state.get("smooth")

    def averaged(self) -> Network:
        """Copy of the network with averaged weights, for validation and export."""
        with torch.random.fork_rng(devices=[]):
            out = make_network(self.config, len(self.classes)).to(self.device)
        out.load_state_dict({**out.state_dict(), **self.average}, strict=True)
        return out.eval()

    def update(self, batch: Batch) -> float:
        """One optimiser step on the batch of all processes; returns the weighted loss per value."""
        config = self.config
        batch, share = self.processes.part(batch)
        clean, sigma, noise = (t.to(self.device, non_blocking=True) for t in batch[:3])
        noisy = clean + sigma[:, None, None, None] * noise
        if config.channels_last:
            noisy = noisy.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            # A level on the host costs a parametrised network no wait for the device.
            if isinstance(self.network, EDMUNet):
                denoised = self.denoise(noisy, sigma)
            else:
                denoised = self.denoise(
                    noisy, batch.sigma, None if batch.label is None else {"label": batch.label}
                )
        weight = loss_weight(config, sigma)
        loss = share * (weight[:, None, None, None] * (denoised.float() - clean).square()).mean()
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(config, self.step)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.processes.add([p.grad for p in self.network.parameters() if p.grad is not None])
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), config.clip)
        self.optimiser.step()
        # A short horizon at first, or the average would remember the initial weights.
        decay = min(config.ema, (1 + self.step) / (10 + self.step))
        parameters = [p.detach() for p in self.network.parameters()]
        torch._foreach_lerp_(list(self.average.values()), parameters, 1 - decay)
        self.step += 1
        found = self.processes.total(float(loss.detach()))
        self.smooth = found if self.smooth is None else 0.98 * self.smooth + 0.02 * found
        return found
