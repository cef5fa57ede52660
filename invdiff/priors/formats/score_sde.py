"""Checkpoints of score_sde: NCSN++ (variance exploding) and DDPM++ (variance preserving), continuous in time.

| | the network gives | time | levels | data |
|---|---|---|---|---|
| ``ve`` | the score, ``D = x + sigma^2 s`` | ``sigma`` | from the stored table | [0, 1], mapped inside |
| ``vp`` | the noise | ``999 t(sigma)`` | 0.001 to 152 | [-1, 1] |

Averaged weights come without names, in the order of the parameters that were trained; the frequencies of time were
not, and come with the raw weights.

Song et al., ICLR 2021, arXiv:2011.13456.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from invdiff.errors import InvdiffError
from invdiff.networks.ncsnpp import FlatNCSNpp
from invdiff.prior import Prior
from invdiff.priors.assemble import IMAGE_OPTIONS, assemble, fill
from invdiff.priors.frames import VE, Frame
from invdiff.priors.frames_sde import SDEVP
from invdiff.priors.source import Source

__all__ = ["OPTIONS", "TITLE", "averaged", "build", "recognise"]

TITLE = "networks of score_sde (NCSN++, DDPM++)"
OPTIONS = {
    "weights": "'ema' or 'raw', where the file holds both",
    "sigma_min": "lowest level of a 've' network, where the file has no table",
    "sigma_max": "highest level of a 've' network, where the file has no table",
    "smooth": "whether resolutions change by the filter (1, 3, 3, 1); that is so in NCSN++",
    "centred": "whether data were in [-1, 1]; that is so for 'vp'",
    "sde": "'ve' or 'vp'; networks with random frequencies are 've', others must be declared 'vp'",
    **IMAGE_OPTIONS,
}
_FIRST = "all_modules.0."
_FREQUENCIES, _TABLE = "all_modules.0.W", "sigmas"


def averaged(content: Mapping[Any, Any], weights: str, where: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return the weights of a checkpoint by name, and the keys of the checkpoint that they come from.

    Args:
        content: The checkpoint, with ``model`` and ``ema``.
        weights: ``"ema"`` or ``"raw"``.
        where: The file, for messages.

    Raises:
        InvdiffError: If a part is missing, or the averaged weights do not fit the raw ones one by one.
    """
    model = content.get("model")
    if not isinstance(model, Mapping) or not all(isinstance(v, Tensor) for v in model.values()):
        raise InvdiffError(f"{where} has no weights under 'model', whose names the averaged ones need.")
    named = {str(k).removeprefix("module."): v for k, v in model.items()}
    if weights == "raw":
        return named, ("model",)
    ema = content.get("ema")
    listed = ema.get("shadow_params") if isinstance(ema, Mapping) else None
    if not isinstance(listed, list) or not all(isinstance(v, Tensor) for v in listed):
        raise InvdiffError(f"{where} has no averaged weights (ema, shadow_params); take the raw ones.")
    trained = [k for k in named if k not in (_TABLE, _FREQUENCIES)]
    if len(trained) != len(listed):
        raise InvdiffError(
            f"{where} has {len(listed)} averaged weights for {len(trained)} trained ones; their order cannot be "
            "told."
        )
    for key, value in zip(trained, listed):
        if named[key].shape != value.shape:
            raise InvdiffError(
                f"{where} has an averaged weight of shape {tuple(value.shape)} in the place of {key}, which has "
                f"{tuple(named[key].shape)}; their order is another one."
            )
    return named | dict(zip(trained, listed)), ("model", "ema")


def recognise(source: Source) -> str | None:
    """Return architecture and size where the names are a flat list of modules."""
    named = _named(source)
    if named is None:
        return None
    try:
        layout = FlatNCSNpp.layout({k: tuple(v.shape) for k, v in named.items()})
    except InvdiffError:
        # What is missing is said when it is built.
        return "a network of score_sde that is not known"
    kind = "NCSN++" if layout["fourier"] else "DDPM++"
    return f"score_sde {kind}, {layout['channels']} channel(s), {len(layout['widths'])} levels"


def build(source: Source, **declared: Any) -> Prior:
    """Make the prior; see `invdiff.priors.formats`.

    Raises:
        InvdiffError: If the weights are not those of the architecture, or the frame must be declared.
    """
    state, weights = _chosen(source, declared.pop("weights", None))
    table = state.pop(_TABLE, None)
    layout = FlatNCSNpp.layout({k: tuple(v.shape) for k, v in state.items()})
    sde = _sde(declared.pop("sde", None), layout["fourier"], source)
    smooth = declared.pop("smooth", layout["fourier"] or layout["image"] == "residual")
    centred = declared.pop("centred", sde == "vp")
    ends = declared.pop("sigma_min", None), declared.pop("sigma_max", None)
    frame = SDEVP() if sde == "vp" else _levels(table, *ends, source)
    if sde == "vp" and ends != (None, None):
        raise InvdiffError(
            "The levels of a 'vp' network are those of its training; leave out sigma_min, sigma_max."
        )
    layout |= {"smooth": bool(smooth), "centred": bool(centred)}
    network = fill(lambda: FlatNCSNpp(**layout), state, str(source.path))
    assert isinstance(network, FlatNCSNpp)
    card = source.json() or {}
    about = {
        "name": card.get("name") or source.path.stem,
        "format": f"score_sde {'NCSN++' if layout['fourier'] else 'DDPM++'}",
        "architecture": layout,
        "sde": sde,
        "weights": weights,
        "sha256": source.sha256(),
        "licence": card.get("licence", "not stated in the checkpoint"),
        "images": "natural" if layout["channels"] == 3 else "unknown",
    }
    return assemble(
        network,
        "epsilon" if sde == "vp" else "score",
        frame,
        layout["channels"],
        card=about,
        multiple=network.multiple,
        native_range=(-1.0, 1.0) if centred else (0.0, 1.0),
        **declared,
    )


def _named(source: Source) -> dict[str, Tensor] | None:
    """Weights by name, raw ones where there are others; None where these are no names of ours."""
    if source.folder or not isinstance(content := source.content, Mapping):
        return None
    nested = content.get("model")
    named = nested if isinstance(nested, Mapping) else content
    plain = {str(k).removeprefix("module."): v for k, v in named.items()}
    ours = any(k.startswith(_FIRST) for k in plain) and all(isinstance(v, Tensor) for v in plain.values())
    return plain if ours else None


def _chosen(source: Source, wanted: str | None) -> tuple[dict[str, Tensor], str]:
    """The weights that are asked for, and which ones they are."""
    content = source.content
    if isinstance(content.get("model"), Mapping):
        if wanted not in (None, "ema", "raw"):
            raise InvdiffError(f"weights must be 'ema' or 'raw', got {wanted!r}.")
        return averaged(content, wanted or "ema", str(source.path))[0], wanted or "ema"
    if wanted is not None:
        raise InvdiffError(f"{source.path} holds one list of weights; leave out weights={wanted!r}.")
    return _named(source) or {}, str((source.json() or {}).get("weights", "not stated in the checkpoint"))


def _sde(declared: str | None, fourier: bool, source: Source) -> str:
    if declared not in (None, "ve", "vp"):
        raise InvdiffError(f"Unknown sde {declared!r}; there are 've' and 'vp'.")
    if (declared or "ve") == "ve" and not fourier:
        raise InvdiffError(
            f"{source.path} embeds whole or scaled times, not the level; declare sde='vp' if it was trained so "
            "(discrete 've' and 'subvp' networks are not read)."
        )
    return declared or "ve"


def _levels(table: Tensor | None, low: float | None, high: float | None, source: Source) -> Frame:
    """Levels of the training: the ends of the stored table, or what is declared."""
    if table is not None and table.numel() > 1:
        low, high = low or float(table.min()), high or float(table.max())
    if low is None or high is None:
        raise InvdiffError(
            f"{source.path} has no table of levels (sigmas); declare sigma_min= and sigma_max= of its training."
        )
    return VE(low, high)
