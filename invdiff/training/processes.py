"""Several processes that train one network, as torch's launcher starts them.

Every process knows the whole batch of a step, as its random numbers depend on seed and step only, and takes a part
of it; gradients are added up. The sum is that of one process up to the order of its terms, and after it all
processes hold the same bits. The first alone writes files.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor

from invdiff.training.batches import Batch

__all__ = ["Processes", "launched", "process_group"]

# Others wait while the first validates and writes.
_PATIENCE = timedelta(hours=2)


def launched() -> tuple[int, int, int]:
    """Number of this process, count of all, and number on this machine: what the launcher says."""
    rank, count, local = (os.environ.get(k) for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    return int(rank or 0), int(count or 1), int(local or 0)


@dataclass(frozen=True)
class Processes:
    """This process among those that train together, or alone.

    Args:
        rank: Number of this process, from 0.
        count: Number of processes.
        device: Where tensors must be to be exchanged; None for the host.
    """

    rank: int = 0
    count: int = 1
    device: torch.device | None = None

    @property
    def first(self) -> bool:
        """Whether this process writes files and reports."""
        return self.rank == 0

    def part(self, batch: Batch) -> tuple[Batch, float]:
        """Return this process's rows of a batch, and their share of all rows.

        Raises:
            ValueError: there are fewer rows than processes.
        """
        rows = len(batch.sigma)
        if rows < self.count:
            raise ValueError(f"A batch of {rows} cannot be split over {self.count} processes; raise batch.")
        mine = slice(rows * self.rank // self.count, rows * (self.rank + 1) // self.count)
        label = None if batch.label is None else batch.label[mine]
        part = Batch(batch.clean[mine], batch.sigma[mine], batch.noise[mine], label)
        return part, len(part.sigma) / rows

    def add(self, tensors: list[Tensor]) -> None:
        """Put the sums over all processes in the place of tensors on their devices, in one exchange."""
        if self.count == 1:
            return
        flat = torch.cat([t.reshape(-1) for t in tensors])
        torch.distributed.all_reduce(flat)
        for t, total in zip(tensors, flat.split([t.numel() for t in tensors])):
            t.copy_(total.view_as(t))

    def total(self, value: float) -> float:
        """Return the sum of a number over all processes; every process waits for it."""
        if self.count == 1:
            return value
        held = torch.tensor(value, dtype=torch.float64, device=self.device)
        self.add([held])
        return float(held)


@contextmanager
def process_group(device: torch.device) -> Iterator[Processes]:
    """Join the processes that torch's launcher started with this one; alone where it started none.

    A group that is there already is taken as it is, and left.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        yield Processes(torch.distributed.get_rank(), torch.distributed.get_world_size(), device)
        return
    rank, count, _ = launched()
    if count == 1:
        yield Processes()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE)
    try:
        yield Processes(rank, count, device)
    finally:
        torch.distributed.destroy_process_group()
