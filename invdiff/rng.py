"""Random numbers that belong to a draw, not to a batch.

Row ``(case i, draw s)`` at step ``k`` reads the Philox stream with key ``hash(seed, i, s)`` and counter block
``k``. Nothing else enters: batch size, order, memory back-off, resume and number of workers cannot change a
draw, and a resumed run needs only the step index, no generator state.

Normal numbers come from the words of a stream by the Box-Muller transform: no rejection, so a whole row is a few
vector operations (four times faster than a ziggurat at image size).

Sources: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011; Box and Muller, "A note on the
generation of random normal deviates", Ann. Math. Statist. 29, 1958.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from invdiff.errors import InvdiffError

#: Name of this scheme in provenance; a change of it changes every draw.
SCHEME = "philox-seedseq/2"
#: Step index of what happens before the first step.
INIT = -1
_ENSEMBLE = 0xE5E5E5E5
#: Words turned into normal numbers at a time, so that they stay in the cache.
_BLOCK = 1 << 15


def resolve_seed(seed: int | None) -> int:
    """Return ``seed``, or a fresh one where it is None; 0 is a seed like any other."""
    if seed is None:
        return secrets.randbits(32)
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
        raise InvdiffError(f"The seed must be an integer of at least 0, got {seed!r}.")
    return int(seed)


class Streams:
    """One independent stream per row.

    Args:
        seed: Seed of the run.
        keys: ``(case, draw)`` of every row.
    """

    def __init__(self, seed: int, keys: Sequence[tuple[int, int]]) -> None:
        self.seed = seed
        self.keys = tuple((int(c), int(d)) for c, d in keys)
        cases = sorted({c for c, _ in self.keys})
        keyed = [self._key(*k) for k in self.keys] + [self._key(c, _ENSEMBLE, 1) for c in cases]
        self._philox = [(np.random.Philox(key=key), _start(key)) for key in keyed]
        generators = [np.random.Generator(philox) for philox, _ in self._philox]
        self._generators = generators[: len(self.keys)]
        self._case_generators = dict(zip(cases, generators[len(self.keys) :]))
        self.at(INIT)

    def _key(self, *spawn: int) -> np.ndarray:
        sequence = np.random.SeedSequence(self.seed, spawn_key=spawn)
        return sequence.generate_state(2, np.uint64)

    def at(self, step: int) -> Streams:
        """Move every row to the beginning of the block of ``step`` and return self."""
        counter = np.array([0, 0, 0, step - INIT], dtype=np.uint64)
        for philox, start in self._philox:  # setting the state is seven times cheaper than a new generator
            start["state"]["counter"] = counter
            philox.state = start
        return self

    def normal(self, like: Tensor) -> Tensor:
        """Return standard normal numbers shaped as ``like`` ``(B, ...)``, row ``r`` from stream ``r``.

        A complex ``like`` gets unit variance per real component. The numbers have the 24 bits of single precision
        whatever ``like`` has, so runs in single and in double precision see the same noise.
        """
        self._check(like)
        if like.is_complex():
            real = torch.view_as_real(like.resolve_conj())
            return torch.view_as_complex(self.normal(real))
        out = np.empty((like.shape[0], like[0].numel()), np.float32)
        count = (out.shape[1] + 1) // 2
        rows = max(1, _BLOCK // max(count, 1))
        for first in range(0, len(out), rows):
            part = self._philox[: len(self.keys)][first : first + rows]
            words = np.empty((len(part), count), np.uint64)
            for row, (philox, _) in zip(words, part):
                row[:] = philox.random_raw(count)
            _box_muller(words, out[first : first + rows])
        return torch.from_numpy(out.reshape(tuple(like.shape))).to(like.device, like.dtype)

    def uniform(self, like: Tensor) -> Tensor:
        """Return uniform numbers on [0, 1) shaped as ``like`` ``(B, ...)``."""
        self._check(like)
        out = np.stack([g.random(tuple(like.shape[1:])) for g in self._generators])
        return torch.from_numpy(out).to(like.device, like.dtype)

    def case_uniform(self, case: int, n: int) -> np.ndarray:
        """Return ``n`` uniform numbers that belong to a whole case (resampling of ensembles)."""
        return self._case_generators[case].random(n)

    def numpy(self, row: int) -> np.random.Generator:
        """Return the generator of one row, for laws other than normal and uniform."""
        return self._generators[row]

    def _check(self, like: Tensor) -> None:
        if like.shape[0] != len(self.keys):
            raise InvdiffError(f"Random numbers for {like.shape[0]} rows asked of {len(self.keys)} streams.")


def _box_muller(words: np.ndarray, out: np.ndarray) -> None:
    """Fill rows of ``out`` with ``sqrt(-2 log u) (cos t, sin t)``, two neighbours from each word of 64 bits.

    ``u`` is the middle of one of ``2**31`` cells of (0, 1], so no number is infinite and none larger than 6.7.
    """
    # 31 bits, because signed integers convert to floats in vectors where unsigned ones may not
    uniform = (words.view(np.uint32) >> 1).view(np.int32).astype(np.float32)
    radius, angle = np.ascontiguousarray(uniform[:, ::2]), np.ascontiguousarray(uniform[:, 1::2])
    radius += np.float32(0.5)
    radius *= np.float32(2.0**-31)
    np.log(radius, out=radius)
    radius *= np.float32(-2)
    np.sqrt(radius, out=radius)
    angle *= np.float32(math.pi * 2.0**-30)
    np.multiply(np.cos(angle), radius, out=out[:, ::2])
    np.sin(angle, out=angle)
    angle *= radius
    out[:, 1::2] = angle[:, : out.shape[1] // 2]


def _start(key: np.ndarray) -> Any:
    """State of a fresh Philox generator with an empty buffer."""
    return {
        "bit_generator": "Philox",
        "state": {"counter": np.zeros(4, np.uint64), "key": key},
        "buffer": np.zeros(4, np.uint64),
        "buffer_pos": 4,
        "has_uint32": 0,
        "uinteger": 0,
    }
