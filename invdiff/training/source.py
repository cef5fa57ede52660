"""Where a run takes its images from: training and held-out ones, with classes where the prior has some."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from invdiff.training.config import TrainConfig
from invdiff.training.data import class_folders, read_images, read_labelled, synthetic_images
from invdiff.training.synthesisers import SYNTHESISERS

__all__ = ["Images", "Source"]

#: Called with a dict whose ``event`` says what happened.
Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Images:
    """Images ``(channels, ny, nx)``, and the class of each where the prior has classes."""

    images: list[NDArray[Any]]
    labels: list[int] | None = None

    def __len__(self) -> int:
        return len(self.images)


class Source:
    """Images of a configuration, read or drawn when they are first asked for.

    Args:
        config: Settings.
        report: Told of every fiftieth synthetic image.

    Raises:
        ValueError: the settings do not fit the synthesiser.
    """

    def __init__(self, config: TrainConfig, report: Report) -> None:
        self.config, self.report = config, report
        self.made = SYNTHESISERS.get(config.data)
        if self.made is not None and config.channels != self.made.channels:
            raise ValueError(
                f"The synthesiser {config.data!r} makes images of {self.made.channels} real channel(s): channels "
                f"must be {self.made.channels}, not {config.channels}."
            )
        if self.made is not None and config.condition and not self.made.classes:
            raise ValueError(
                f"The images of the synthesiser {config.data!r} have no classes; leave out condition."
            )

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; empty for a prior without. Found without reading images where that is possible."""
        if not self.config.condition:
            return ()
        if self.made is not None:
            return self.made.classes
        folders = class_folders(Path(self.config.data))
        return tuple(f.name for f in folders) if folders else tuple(self._labelled[2])

    @cached_property
    def _labelled(self) -> tuple[list[NDArray[Any]], list[int], list[str]]:
        c = self.config
        return read_labelled(c.data, c.channels, c.normalise, c.slice_axis)

    def split(self) -> tuple[Images, Images]:
        """Return training and held-out images.

        Raises:
            ValueError: there are fewer than two, or they cannot be read.
        """
        c = self.config
        if self.made is not None:
            held = self._synthetic(c.validation_images, True)
            return self._synthetic(c.images, False), held
        labels = None
        if c.condition:
            images, labels, _ = self._labelled
        else:
            images = read_images(c.data, c.channels, c.normalise, c.slice_axis)
        if len(images) < 2:
            raise ValueError(f"{c.data} holds {len(images)} image; at least 2 are needed, one to validate on.")
        count = min(c.validation_images, max(1, len(images) // 10))
        if labels is None:
            return Images(images[:-count]), Images(images[-count:])
        # Sorted by class and evenly spaced, so that held-out images are of every class in its share.
        order = sorted(range(len(images)), key=labels.__getitem__)
        held_out = {order[int((n + 0.5) * len(order) / count)] for n in range(count)}
        rest = [n for n in range(len(images)) if n not in held_out]
        return (
            Images([images[n] for n in rest], [labels[n] for n in rest]),
            Images([images[n] for n in sorted(held_out)], [labels[n] for n in sorted(held_out)]),
        )

    def _synthetic(self, count: int, held_out: bool) -> Images:
        assert self.made is not None

        def notify(done: int, total: int) -> None:
            if not held_out and (done % 50 == 0 or done == total):
                self.report({"event": "images", "done": done, "count": total})

        cache = self.config.cache or None
        images = synthetic_images(self.config.data, count, held_out=held_out, cache=cache, notify=notify)
        if not self.config.condition:
            return Images(images)
        return Images(images, [self.made.class_of(seed, held_out) for seed in range(count)])
