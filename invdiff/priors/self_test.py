"""The self-test of a loaded checkpoint: what its card says of it, and when the prior is refused.

Names and shapes cannot tell a wrong order of attention heads, a wrong schedule or a wrong range; denoising can.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from invdiff.errors import InvdiffError
from invdiff.prior import Prior
from invdiff.priors.checks import check_denoiser
from invdiff.spaces import Space

__all__ = ["self_test"]

#: Synthetic images, and their largest size: large networks take seconds per image on a processor.
COUNT, LARGEST = 4, 64


def self_test(prior: Prior, samples: Tensor | None = None, check: bool = True, seed: int = 0) -> Prior:
    """Check a prior and write the verdict on its card, under ``check``.

    With samples, these are denoised. Without, a prior of natural images (``card["images"]``) denoises dead leaves
    with wider bounds; of any other nothing is known, and the card says so.

    Args:
        prior: A prior as its format builds it.
        samples: Clean images ``(B, C, y, x)`` in image units, two or more, of the kind of the training.
        check: Whether to check at all.
        seed: Seed of the noise.

    Raises:
        InvdiffError: If the prior does not denoise as it should, or the samples are none that it takes.
    """
    if not check:
        return _with(prior, {"verdict": "not checked"})
    similar = samples is None
    if samples is None:
        if prior.card.get("images") != "natural":
            return _with(prior, {"verdict": "format and shapes verified, denoising not: give samples="})
        samples, shown = _synthetic(prior), "dead leaves"
    else:
        shown = f"{len(samples)} images given"
    if samples.ndim < 2 or not (samples.is_floating_point() or samples.is_complex()):
        raise InvdiffError(
            f"samples must be a batch of images of floating-point numbers, got {tuple(samples.shape)} of "
            f"{samples.dtype}."
        )
    space = Space(tuple(samples.shape[1:]), samples.dtype)
    scale = prior.scale
    if scale is None:
        from invdiff.scaling import magnitude_percentile

        scale = magnitude_percentile(samples)
    bound = prior.bind(space, scale)
    report = check_denoiser(_any_class(bound), samples, seed, similar=similar)
    if not report.ok:
        raise InvdiffError(_refusal(prior, report.failed, shown))
    lines = {c.name: {"error": c.error, "bound": c.bound} for c in report.checks}
    return _with(prior, {"verdict": "passed", "images": shown, "size": list(space.shape), "lines": lines})


def _with(prior: Prior, verdict: dict[str, Any]) -> Prior:
    return replace(prior, card={**prior.card, "check": verdict})


def _synthetic(prior: Prior) -> Tensor:
    from invdiff.priors.dead_leaves import dead_leaves

    size = prior.card.get("size")
    side = min(size) if isinstance(size, list | tuple) else size if isinstance(size, int) else LARGEST
    floor, top = prior.card.get("image_range", (0.0, 1.0))
    unit = dead_leaves(COUNT, prior.denoiser.channels, min(side, LARGEST))
    return floor + (top - floor) * unit


def _any_class(prior: Prior) -> Prior:
    """Where the network wants a class and none is declared, take the first: texture hardly depends on it."""
    denoiser: Any = prior.denoiser
    if "label" not in getattr(denoiser, "conditions", ()) or "label" in denoiser.given:
        return prior
    denoiser = copy.copy(denoiser)
    denoiser.given = {"label": torch.tensor(0)}
    return replace(prior, denoiser=denoiser)


def _refusal(prior: Prior, failed: tuple[str, ...], shown: str) -> str:
    more = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
    if shown == "dead leaves":
        way = "if its images are not natural ones, give samples= of their kind, or load it with check=False"
    else:
        way = "if the samples are not of its kind, give others; check=False loads it as it is"
    return (
        f"{prior.name} does not denoise as it should ({shown}): it fails {failed[0]!r}{more}, so that a schedule, "
        f"range, order of attention heads or channels is mistaken; declare them, or {way}."
    )
