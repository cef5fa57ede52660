"""What the driver hands to the result side: draws, statistics per draw, data and provenance, as plain data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from invdiff.errors import InvdiffError, StoreError
from invdiff.spaces import Space

#: States of a draw, in the order of their codes in a stored file.
STATUSES = ("ok", "nan", "missing")


@runtime_checkable
class DrawSource(Protocol):
    """Draws in image space, read one at a time or one block of image rows at a time."""

    n_cases: int
    n_draws: int

    def get(self, case: int, draw: int) -> np.ndarray:
        """Return one draw, ``(*image)``; NaN where it is missing."""

    def block(self, case: int, start: int, stop: int) -> np.ndarray:
        """Return rows ``[start, stop)`` of the second-to-last image axis of all draws of a case.

        The shape is ``(draws, ..., stop - start, nx)``; images with one axis count as one row, so
        ``block(case, 0, 1)`` gives ``(draws, nx)``.
        """


class MemoryDraws:
    """Draws in one array.

    Args:
        array: ``(N cases, S draws, *image)``, float or complex.
    """

    def __init__(self, array: np.ndarray) -> None:
        self.array = np.asarray(array)
        self.n_cases, self.n_draws = self.array.shape[:2]

    def get(self, case: int, draw: int) -> np.ndarray:
        """Return one draw, ``(*image)``."""
        return self.array[case, draw]

    def block(self, case: int, start: int, stop: int) -> np.ndarray:
        """Return rows ``[start, stop)`` of all draws of a case."""
        draws = self.array[case]
        return draws if draws.ndim < 3 else draws[..., start:stop, :]


class FileDraws:
    """Draws in safetensors files, each with a tensor ``x`` ``(rows, *image)`` of consecutive flattened rows.

    Row ``case * n_draws + draw`` of the run is row ``case * n_draws + draw - first_row`` of its file. Complex
    images may be stored as complex64, or (the format has no complex128) as ``(rows, *image, 2)`` real numbers.
    Files are opened for the length of one read only, and only the slice asked for is read. Rows that no file
    holds come back as NaN.

    Args:
        chunks: ``(first_row, path)`` of each file.
        n_cases: Number of cases.
        n_draws: Number of draws per case, as asked for.
        space: Image space.

    Raises:
        StoreError: If a file is unreadable or does not hold images of that space.
    """

    def __init__(self, chunks: Sequence[tuple[int, str | Path]], n_cases: int, n_draws: int, space: Space) -> None:
        self.n_cases, self.n_draws = n_cases, n_draws
        self.space = space
        self._chunks = sorted(((int(first), Path(path)) for first, path in chunks), key=lambda c: c[0])
        self._dtype = _numpy_dtype(space)
        self._nan = missing_value(self._dtype)
        self._paired = False
        self._where: dict[int, tuple[Path, int]] = {}
        for first, path in self._chunks:
            rows, self._paired = self._inspect(path)
            self._where.update({first + r: (path, r) for r in range(rows)})

    def get(self, case: int, draw: int) -> np.ndarray:
        """Return one draw, ``(*image)``."""
        place = self._where.get(case * self.n_draws + draw)
        if place is None:
            return np.full(self.space.shape, self._nan, dtype=self._dtype)
        return self._read(place[0], place[1], place[1] + 1, None)[0]

    def block(self, case: int, start: int, stop: int) -> np.ndarray:
        """Return rows ``[start, stop)`` of all draws of a case."""
        shape = self.space.shape
        cut = None if len(shape) < 2 else (start, stop)
        part = shape if cut is None else (*shape[:-2], stop - start, shape[-1])
        out = np.full((self.n_draws, *part), self._nan, dtype=self._dtype)
        for path, first, last, at in self._runs(case):
            out[at : at + last - first] = self._read(path, first, last, cut)
        return out

    def _runs(self, case: int) -> Iterator[tuple[Path, int, int, int]]:
        """Yield ``(path, first, last, draw)`` for stretches of draws that lie together in one file."""
        draw = 0
        while draw < self.n_draws:
            place = self._where.get(case * self.n_draws + draw)
            if place is None:
                draw += 1
                continue
            n = 1
            while draw + n < self.n_draws and self._where.get(case * self.n_draws + draw + n) == (
                place[0],
                place[1] + n,
            ):
                n += 1
            yield place[0], place[1], place[1] + n, draw
            draw += n

    def _inspect(self, path: Path) -> tuple[int, bool]:
        with _open_tensors(path) as file:
            if "x" not in file.keys():  # noqa: SIM118 (not a mapping)
                raise StoreError(f"{path.name} holds no tensor 'x'; it is not a chunk of draws.")
            shape = tuple(file.get_slice("x").get_shape())
        image = self.space.shape
        paired = self.space.is_complex and shape[1:] == (*image, 2)
        if shape[1:] != image and not paired:
            raise StoreError(f"{path.name} holds draws of shape {shape[1:]}, expected {image}.")
        return shape[0], paired

    def _read(self, path: Path, first: int, last: int, cut: tuple[int, int] | None) -> np.ndarray:
        index: list[slice] = [slice(first, last)]
        if cut is not None:
            index += [slice(None)] * (len(self.space.shape) - 2) + [slice(*cut)]
        with _open_tensors(path) as file:
            values = file.get_slice("x")[tuple(index)]
        if self._paired:
            values = np.ascontiguousarray(values)
            values = values.view(np.complex64 if values.dtype == np.float32 else np.complex128)[..., 0]
        return np.asarray(values, dtype=self._dtype)


@dataclass
class Run:
    """Everything a finished (or stopped) run leaves behind.

    Attributes:
        space: Image space, e.g. ``(channel 1, y, x)``.
        kind: Whether the draws are posterior draws, a point estimate, or an ensemble.
        draws: The draws, in image space.
        stats: Arrays ``(N, S)``: ``nfe``, ``vjp``, ``noe``, ``wall_s``, ``log_likelihood``,
            ``residual_norm``, ``status`` (of `STATUSES`) and optionally ``log_weight``, ``ess``, ``ess_run``,
            ``accepted`` and ``trail`` (with axes of its own after the first two).
        observed: ``y`` ``(N, *range)`` and optionally ``mask``, ``sigma``.
        range_space: Space of one measurement.
        x_true: Truth where simulated, ``(N, *image)``.
        provenance: Nested, JSON-able.
        title: One line for people.
        status: ``"complete"``, or ``"stopped"`` where there are fewer draws than asked for.
    """

    space: Space
    kind: Literal["posterior", "point", "ensemble"]
    draws: DrawSource
    stats: dict[str, np.ndarray] = field(default_factory=dict)
    observed: dict[str, np.ndarray] = field(default_factory=dict)
    range_space: Space | None = None
    x_true: np.ndarray | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    title: str = ""
    status: str = "complete"

    def __post_init__(self) -> None:
        if self.kind not in ("posterior", "point", "ensemble"):
            raise InvdiffError(f"The kind of a run is posterior, point or ensemble, not {self.kind!r}.")
        expected = (self.draws.n_cases, self.draws.n_draws)
        for name, values in self.stats.items():
            if np.shape(values)[:2] != expected:
                raise InvdiffError(
                    f"Statistic {name} has shape {np.shape(values)}, expected (cases, draws) = {expected}."
                )
        if min(expected) < 1:
            raise InvdiffError(f"A run needs at least one case and one draw, got (cases, draws) = {expected}.")


def missing_value(dtype: np.dtype) -> complex | float:
    """Value of a draw that is not there: NaN, in both parts of complex numbers."""
    return complex(np.nan, np.nan) if np.issubdtype(dtype, np.complexfloating) else np.nan


def _open_tensors(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="np")
    except FileNotFoundError:
        raise StoreError(f"The chunk of draws {path} is missing; run again without resuming.") from None
    except (SafetensorError, OSError) as error:
        raise StoreError(f"The chunk of draws {path} cannot be read ({error}).") from None


def _numpy_dtype(space: Space) -> np.dtype:
    return np.dtype(str(space.dtype).removeprefix("torch."))
