"""Weights that deepinv saves: its diffusion network ``DiffUNet``, and its denoiser ``DRUNet``.

``DiffUNet`` is the network of guided diffusion with two tables beside it, which must be those of its schedule.
``DRUNet`` takes the noise level as a further channel and gives the denoised image, ``D = network(x, sigma)``, for
images in [0, 1]. It has met noise up to 50 / 255 only: good where the data leave little noise, but no model of
images by itself, as nothing can be drawn from it.

Zhang et al., TPAMI 44, 2022, arXiv:2008.13751; Tachella et al., 2025, arXiv:2505.20160.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from invdiff.errors import InvdiffError
from invdiff.prior import Prior
from invdiff.priors.assemble import IMAGE_OPTIONS, assemble, fill
from invdiff.priors.formats import guided_diffusion
from invdiff.priors.frames import VE, VP
from invdiff.priors.source import Source

__all__ = ["OPTIONS", "TITLE", "build", "recognise"]

TITLE = "deepinv's DiffUNet and DRUNet"
OPTIONS = {
    "sigma_min": "DRUNet: lowest level to use, 1 / 255 of the range",
    "sigma_max": "DRUNet: highest level of the training, 50 / 255 of the range",
    **guided_diffusion.OPTIONS,
}
_TABLES = ("sqrt_1m_alphas_cumprod", "sqrt_alphas_cumprod")
_BLOCK = "m_down1.{}.res.0.weight"
_LEVELS = (1 / 255, 50 / 255)


def recognise(source: Source) -> str | None:
    """Return the network, where the names are those of either."""
    state = _state(source)
    if all(k in state for k in _TABLES):
        found = guided_diffusion.recognise_state(_without_tables(state), str(source.path))
        return None if found is None else f"deepinv DiffUNet: {found}"
    if _BLOCK.format(0) in state and "m_tail.weight" in state and state["m_tail.weight"].ndim == 4:
        return f"deepinv DRUNet, {len(state['m_tail.weight'])} channels"
    return None


def build(source: Source, **declared: Any) -> Prior:
    """Make the prior; see `invdiff.priors.formats`.

    Raises:
        InvdiffError: If the weights or tables are not those of the network, or an option is that of the other one.
    """
    state, where = _state(source), str(source.path)
    about = {"sha256": source.sha256()}
    if _TABLES[0] in state:
        for name in ("sigma_min", "sigma_max"):
            if name in declared:
                raise InvdiffError(f"{where} is a DiffUNet, whose levels are its schedule's; leave out {name}.")
        _check_tables(state, where)
        return guided_diffusion.prior_of(_without_tables(state), where, about, **declared)
    for name in guided_diffusion.OPTIONS.keys() - IMAGE_OPTIONS.keys() - {"size"}:
        if name in declared:
            raise InvdiffError(f"{where} is a DRUNet, which has no {name}; leave it out.")
    low, high = declared.pop("sigma_min", _LEVELS[0]), declared.pop("sigma_max", _LEVELS[1])
    size = declared.pop("size", None)
    channels = len(state["m_tail.weight"])
    card = {
        "name": "DRUNet",
        "format": TITLE,
        "licence": "BSD-3-Clause (weights of deepinv)",
        "training": "photographs",
        "images": "natural",
        "size": size,
        "note": "denoises up to sigma_max only; nothing can be drawn from it alone",
        **about,
    }
    if declared.get("image_range") is None:
        declared["image_range"] = (0.0, 1.0)
    return assemble(
        _drunet(state, where),
        "x0",
        VE(float(low), float(high)),
        channels,
        card=card,
        multiple=8,
        native_range=(0.0, 1.0),
        differentiable=1,
        **declared,
    )


def _state(source: Source) -> Mapping[str, Tensor]:
    """The flat list of weights, also where a training of deepinv wrapped it."""
    if source.folder:
        return {}
    if source.state:
        return source.state
    content = source.content
    inner = content.get("state_dict") if isinstance(content, Mapping) else None
    flat = isinstance(inner, Mapping) and all(isinstance(v, Tensor) for v in inner.values())
    return inner if flat and inner is not None else {}


def _without_tables(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in state.items() if k not in _TABLES}


def _check_tables(state: Mapping[str, Tensor], where: str) -> None:
    """Compare the tables beside the weights with the linear schedule."""
    log = VP.from_betas()._log_sigma
    abar = 1 / (1 + (2 * log).exp())
    for name, wanted in zip(_TABLES, ((1 - abar).sqrt(), abar.sqrt())):
        found = state[name].double()
        if found.shape != wanted.shape or not bool(((found - wanted).abs() < 1e-4).all()):
            raise InvdiffError(
                f"{where}: the table {name} is not that of the linear schedule of deepinv's DiffUNet; declare the "
                "network's own by priors.from_network."
            )


def _drunet(state: Mapping[str, Tensor], where: str) -> nn.Module:
    from deepinv.models import DRUNet

    firsts = [f"m_{name}.0.res.0.weight" for name in ("down1", "down2", "down3", "body")]
    for key in (*firsts, "m_head.weight"):
        if key not in state:
            raise InvdiffError(f"{where} lacks the weights {key}; fetch the checkpoint again.")
    widths = [state[key].shape[0] for key in firsts]
    blocks = 0
    while _BLOCK.format(blocks) in state:
        blocks += 1
    inputs, outputs = state["m_head.weight"].shape[1] - 1, len(state["m_tail.weight"])
    if inputs != outputs:
        raise InvdiffError(f"{where} takes {inputs} channels and gives {outputs}; it is no denoiser of images.")

    def make() -> nn.Module:
        net: nn.Module = DRUNet(inputs, outputs, nc=tuple(widths), nb=blocks, pretrained=None)
        return net

    return _Levelled(fill(make, state, where))


class _Levelled(nn.Module):
    """The network, called with levels ``(B,)`` of its own precision."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        out: Tensor = self.network(x, sigma.to(x.dtype))
        return out
