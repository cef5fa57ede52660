"""Memory: how much is free, what a run needs, and which errors mean that it was not enough."""

from __future__ import annotations

import ctypes
import gc
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from invdiff.errors import InvdiffError
from invdiff.spaces import Space

#: Copies of the draws that exist at once while a posterior is built in memory.
_COPIES = 4


#: Parameters of glibc's ``mallopt``, the largest size that it takes for the second, and the trim threshold that
#: its own adjustment reaches for blocks of that size.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MOST, _TRIM_USUAL = -1, -3, 32 << 20, 64 << 20
#: Most free memory that the heap keeps at its top while a run lasts.
_KEPT = 1 << 30


@contextmanager
def kept_heap() -> Iterator[None]:
    """Let the heap keep what a step frees, for the next one, while a run lasts (glibc; nothing elsewhere).

    Each network pass frees tens of megabytes. By default glibc gives them back to the system, which fills the same
    pages with zeros again a moment later: measured, 6 % of the time of a guided step on a CPU. Afterwards the free
    memory is given back, and the thresholds stay where glibc's own adjustment takes them in the end.
    """
    libc = _glibc()
    if libc is None:
        yield
        return
    libc.mallopt(_MMAP_THRESHOLD, _MMAP_MOST)
    libc.mallopt(_TRIM_THRESHOLD, _KEPT)
    try:
        yield
    finally:
        libc.mallopt(_TRIM_THRESHOLD, _TRIM_USUAL)
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    if platform.libc_ver()[0] != "glibc":
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None


def available(device: torch.device) -> int:
    """Free bytes on the device (of the machine, for the CPU)."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    info = Path("/proc/meminfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 8 << 30


def check_fits(image: Space, rows: int, streamed: bool) -> None:
    """Refuse, before any work, a run whose draws cannot be held.

    Raises:
        InvdiffError: With what is needed, what is free, and what to do.
    """
    one = image.size * image.dtype.itemsize
    need = one * _COPIES * (1 if streamed else rows)
    free = available(torch.device("cpu"))
    if need > free:
        advice = (
            "use smaller images" if streamed else "stream them to a file (store=, --output) or ask for fewer draws"
        )
        raise InvdiffError(
            f"{rows} draws of {image} need about {readable_size(need)} of memory "
            f"and {readable_size(free)} is free; {advice}."
        )


def start_batch(image: Space, rows: int, device: torch.device) -> int:
    """Rows to start with: about a million numbers on a CPU, what 80 % of free memory may hold elsewhere.

    A U-Net keeps activations of the order of 400 floats per pixel of the finest grid; the back-off halves the
    guess where it is wrong.
    """
    guess = 0.8 * available(device) / (1600 * image.size)
    most = max(1, (1 << 20) // image.size) if device.type == "cpu" else 256
    return int(max(1, min(rows, most, guess)))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on any device."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "not enough memory" in text)


def release(device: torch.device) -> None:
    """Give cached memory back after an out-of-memory error."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def readable_size(n: float) -> str:
    """Return a number of bytes in words, ``3.2 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024:
            return f"{n:.3g} {unit}"
        n /= 1024
    return f"{n:.3g} TiB"
