"""The self-test of a loaded checkpoint: what its card says of it, and when the prior is refused.

Names and shapes cannot tell a wrong order of attention heads, a wrong schedule or a wrong range; denoising can.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from invdiff.errors import InvdiffError
from invdiff.prior import Prior
from invdiff.priors.checks import check_denoiser
from invdiff.scaling import magnitude_percentile
from invdiff.spaces import Space
from invdiff.testing import Report

__all__ = ["examine", "is_natural", "self_test"]

#: Synthetic images, and their largest size: large networks take seconds per image on a processor.
COUNT, LARGEST = 4, 64
#: Draws, each of which costs 18 evaluations.
DRAWS = 2
#: Where images are smaller than in training: a network of 8 x 8 pixels, sound there and at 24 x 24, fails
#: at high levels at 4 x 4, as its norms see fewer pixels. Levels up to this many spreads hold.
REACH = 4.0


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
    if samples is None and not is_natural(prior):
        return _with(prior, {"verdict": "format and shapes verified, denoising not: give samples="})
    report, shown = examine(prior, samples, seed)
    if not report.ok:
        raise InvdiffError(_refusal(prior, report.failed, samples is None, shown))
    lines = {c.name: {"error": c.error, "bound": c.bound} for c in report.checks}
    return _with(prior, {"verdict": "passed", "images": shown, "lines": lines})


def is_natural(prior: Prior) -> bool:
    """Whether the card calls the prior one of natural images, which dead leaves can stand for."""
    return prior.card.get("images") == "natural"


def examine(prior: Prior, samples: Tensor | None = None, seed: int = 0) -> tuple[Report, str]:
    """Denoise samples, or dead leaves with wider bounds, and look at two draws.

    Args:
        prior: A prior as its format builds it.
        samples: Clean images in image units; None takes dead leaves.
        seed: Seed of the noise.

    Returns:
        The report, and what was denoised, in words.

    Raises:
        InvdiffError: If the samples are none that the prior takes.
    """
    images = _synthetic(prior) if samples is None else samples
    if images.ndim < 2 or not (images.is_floating_point() or images.is_complex()):
        raise InvdiffError(
            f"samples must be a batch of images of floating-point numbers, got {tuple(images.shape)} of "
            f"{images.dtype}."
        )
    scale: float | Tensor = 1.0
    if prior.scale is not None:
        scale = prior.scale
    elif prior.make_codec is not None:
        # Cases have one scale each; a test has one for all.
        scale = float(magnitude_percentile(images).median())
    bound = prior.bind(Space(tuple(images.shape[1:]), images.dtype), scale)
    whole = samples is not None or 0 < _side(prior) <= LARGEST
    report = check_denoiser(
        _any_class(bound),
        images,
        seed,
        similar=samples is None,
        draws=DRAWS if whole else 0,
        reach=math.inf if whole else REACH,
    )
    size = " x ".join(str(n) for n in images.shape[1:])
    kind = "dead leaves" if samples is None else "given"
    rest = "" if whole else ", perhaps smaller than in training, so that high levels are not judged"
    return report, f"{len(images)} images of {size}, {kind}{rest}"


def _with(prior: Prior, verdict: dict[str, Any]) -> Prior:
    return replace(prior, card={**prior.card, "check": verdict})


def _synthetic(prior: Prior) -> Tensor:
    from invdiff.priors.dead_leaves import dead_leaves

    side = _side(prior) or LARGEST
    floor, top = prior.card.get("image_range", (0.0, 1.0))
    unit = dead_leaves(COUNT, prior.denoiser.channels, min(side, LARGEST))
    return floor + (top - floor) * unit


def _side(prior: Prior) -> int:
    """Smaller side of the images of the training, 0 where the card does not say."""
    size = prior.card.get("size")
    return min(size) if isinstance(size, list | tuple) else size if isinstance(size, int) else 0


def _any_class(prior: Prior) -> Prior:
    """Where the network wants a class and none is declared, take the first: texture hardly depends on it."""
    denoiser: Any = prior.denoiser
    if "label" not in getattr(denoiser, "conditions", ()) or "label" in denoiser.given:
        return prior
    denoiser = copy.copy(denoiser)
    denoiser.given = {"label": torch.tensor(0)}
    return replace(prior, denoiser=denoiser)


def _refusal(prior: Prior, failed: tuple[str, ...], synthetic: bool, shown: str) -> str:
    more = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
    if synthetic:
        way = "if its images are not natural ones, give samples= of their kind, or load it with check=False"
    else:
        way = "if the samples are not of its kind, give others; check=False loads it as it is"
    return (
        f"{prior.name} does not denoise as it should ({shown}): it fails {failed[0]!r}{more}, so that a schedule, "
        f"range, order of attention heads or channels is mistaken; declare them, or {way}."
    )
