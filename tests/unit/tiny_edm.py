"""Makes ``tiny_edm.safetensors``: a DDPM++ of 66 thousand weights, trained by EDM's loss on dead leaves.

Run from the root, two minutes: ``python -m tests.unit.tiny_edm``.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file

from invdiff.networks.songunet import SongUNet
from invdiff.priors.dead_leaves import dead_leaves

PATH = Path(__file__).with_suffix(".safetensors")
SIZES = {
    "inputs": 3,
    "outputs": 3,
    "resolution": 16,
    "inlet": 16,
    "widths": [16, 16],
    "blocks": 1,
    "attention": [],
}
SIZES |= {"embedding": 32, "noise": 16, "fourier": False, "residual": False, "taps": (1, 1)}
STEPS, BATCH, SPREAD = 1500, 32, 0.5


def train():
    """Train and save the average of the last weights, in half precision."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = 2 * dead_leaves(512, 3, 16, seed=1) - 1
    network = SongUNet(**SIZES)
    with torch.no_grad():
        # Small weights where the published code has them keep the start quiet.
        for name, p in network.named_parameters():
            if name.endswith(("conv1.weight", "proj.weight", "aux_conv.weight")):
                p.mul_(0.1)
    average = {k: v.clone() for k, v in network.state_dict().items()}
    optimiser = torch.optim.Adam(network.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, STEPS)
    for step in range(STEPS):
        x0 = data[torch.randint(len(data), (BATCH,))]
        x0 = torch.where(torch.rand(BATCH, 1, 1, 1) < 0.5, x0, x0.flip(-1))
        sigma = torch.exp(torch.empty(BATCH, 1, 1, 1).uniform_(-6.2, 4.4))
        x = x0 + sigma * torch.randn_like(x0)
        total = (sigma**2 + SPREAD**2).sqrt()
        target = (x0 - SPREAD**2 / total**2 * x) * total / (sigma * SPREAD)
        loss = (network(x / total, sigma.flatten().log() / 4) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        for k, v in network.state_dict().items():
            average[k].lerp_(v, 1 - min(0.995, (step + 1) / (step + 10)))
        if step % 250 == 0:
            print(step, loss.item())
    save_file({f"model.{k}": v.half().contiguous() for k, v in average.items()}, PATH)
    print(sum(v.numel() for v in average.values()), PATH.stat().st_size)


if __name__ == "__main__":
    train()
