"""Makes ``tiny_adm.safetensors``: a guided-diffusion U-Net of 176 thousand weights, trained on dead leaves.

Run from the root, half an hour on one core: ``python -m tests.unit.tiny_adm``. The groups of 32 channels of its
norms allow no smaller one, so that weights are kept in 8 bits.
"""

import copy
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from invdiff.networks.adm import ADM, ADMConfig
from invdiff.priors.dead_leaves import dead_leaves
from invdiff.priors.frames import VP

PATH = Path(__file__).with_suffix(".safetensors")
#: Heads of 8 channels, in the legacy order; images of 8 x 8 pixels, where attention sees everything at once.
SIZES = ADMConfig(
    inputs=3,
    outputs=3,
    width=32,
    multipliers=(1.0,),
    blocks=1,
    attention=(0,),
    scale_shift=False,
    head_channels=8,
)
SIZE, STEPS, PLAIN, BATCH = 8, 10700, 4800, 64


def train():
    """Train on the noise, later with weight on high levels, and save the average of the last weights."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = 2 * dead_leaves(2048, 3, SIZE, seed=100) - 1
    levels = VP.from_betas()._log_sigma.exp().float()
    network = ADM(SIZES)
    average = copy.deepcopy(network)
    optimiser = torch.optim.Adam(network.parameters(), 2e-3, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, STEPS)
    for step in range(STEPS):
        x0 = data[torch.randint(len(data), (BATCH,))]
        x0 = x0.flip(-1) if torch.rand(()) < 0.5 else x0
        x0 = x0.transpose(-1, -2) if torch.rand(()) < 0.5 else x0
        time = torch.randint(len(levels), (BATCH,))
        sigma, noise = levels[time].reshape(-1, 1, 1, 1), torch.randn_like(x0)
        error = network((x0 + sigma * noise) / (1 + sigma**2).sqrt(), time) - noise
        # The image at high noise is the small difference of two large numbers; next to none is hard to see.
        weight = (1 + sigma**2 / 4).clamp(max=200) + 10 * (sigma < 0.1) if step >= PLAIN else 1
        loss = (weight * error**2).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        with torch.no_grad():
            for kept, new in zip(average.parameters(), network.parameters()):
                kept.lerp_(new, 1 - min(0.998, 1 - 10 / (step + 10)))
    save(average.state_dict())


def save(state):
    """Write 8 bits per weight of a matrix and one scale per row, half precision for the rest."""
    packed = {}
    for name, value in state.items():
        if value.ndim < 2:
            packed[name] = value.half()
            continue
        scale = value.flatten(1).abs().amax(1).clamp_min(1e-8) / 127
        packed[name] = (value / scale.reshape(-1, *[1] * (value.ndim - 1))).round().to(torch.int8)
        packed[f"{name}/scale"] = scale
    save_file(packed, PATH)
    print(PATH.stat().st_size)


def weights():
    """Return the weights by the names of guided diffusion."""
    packed = load_file(PATH)
    state = {}
    for name, value in packed.items():
        if name.endswith("/scale"):
            continue
        state[name] = value.float()
        if value.dtype == torch.int8:
            state[name] *= packed[f"{name}/scale"].reshape(-1, *[1] * (value.ndim - 1))
    return state


if __name__ == "__main__":
    train()
