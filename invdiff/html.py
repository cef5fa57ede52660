"""What notebooks show for a posterior, problem, operator or prior: small pictures beside a table of facts.

Every text is escaped, and a picture that cannot be drawn is left out: looking at an object never fails.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from invdiff.operator import Operator
    from invdiff.posterior import Posterior
    from invdiff.prior import Prior
    from invdiff.problem import Problem

#: Title, values, colour map.
Picture = tuple[str, np.ndarray, str]
_MAX_PICTURES = 4
_SHOWN_ON_CARD = (
    "licence",
    "description",
    "training",
    "training_data",
    "limits",
    "sha256",
    "reference",
    "parameters",
)


def posterior_html(posterior: Posterior) -> str:
    """Return mean and spread of the first case beside the facts."""
    return _frame(f"Posterior: {posterior.title}", posterior.facts(), _safe(_posterior_pictures, posterior))


def problem_html(problem: Problem) -> str:
    """Return the measurement, the operator's parameters and the truth beside the facts."""
    facts = {
        "cases": str(problem.n_cases),
        "operator": problem.operator.name,
        "x": str(problem.operator.domain),
        "y": str(problem.operator.range),
        "noise": repr(problem.likelihood),
        **{str(k): str(v) for k, v in list(problem.meta.items())[:6]},
    }
    return _frame("Problem", facts, _safe(_problem_pictures, problem))


def operator_html(operator: Operator) -> str:
    """Return masks and maps beside spaces and abilities."""
    facts = {
        "domain": str(operator.domain),
        "range": str(operator.range),
        "can": ", ".join(sorted(operator.capabilities)),
    }
    if operator.n_cases not in (None, 1):
        facts["cases"] = str(operator.n_cases)
    return _frame(operator.name, facts, _safe(_operator_pictures, operator))


def prior_html(prior: Prior) -> str:
    """Return the card of a prior, with its denoising error over the noise level where that was measured."""
    denoiser = prior.denoiser
    facts = {
        "coordinates": str(denoiser.space or f"{denoiser.channels} channel(s), any size"),
        "sigma": f"{denoiser.sigma_min:g} to {denoiser.sigma_max:g}",
    }
    facts |= {k: _short(prior.card[k]) for k in _SHOWN_ON_CARD if prior.card.get(k)}
    curve = prior.card.get("denoising_error")
    try:
        picture = _curve_tag(curve) if isinstance(curve, Mapping) else ""
    except Exception:
        picture = ""
    return _frame(f"Prior: {prior.name}", facts, picture)


def _posterior_pictures(posterior: Posterior) -> list[Picture]:
    from invdiff.figures import panels_of

    panels = [p for p in panels_of(posterior, 0) if p.role != "width"][:2]
    return [(p.title, p.values.values, "gray" if p.role == "image" else "viridis") for p in panels]


def _problem_pictures(problem: Problem) -> list[Picture]:
    y = _numpy(problem.y[0])
    if np.iscomplexobj(y) and y.ndim > 1:
        size = np.sqrt((np.abs(y) ** 2).sum(axis=tuple(range(y.ndim - 2))))
        floor = size[size > 0].min(initial=np.inf)
        pictures = [("log10 |y|", np.log10(np.maximum(size, floor)), "gray")] if np.isfinite(floor) else []
    else:
        pictures = [("y", y, "gray")]
    pictures += _operator_pictures(problem.operator)
    if problem.x_true is not None:
        pictures.insert(1, ("x_true", _numpy(problem.x_true[0]), "gray"))
    return pictures


def _operator_pictures(operator: Operator) -> list[Picture]:
    """Masks and maps of an operator and of the parts it is made of; first case, first four coils."""
    pictures: list[Picture] = []
    for part in _parts(operator):
        for name, value in vars(part).items():
            if not isinstance(value, Tensor) or value.ndim < 2 or name.startswith("_") or value.numel() < 4:
                continue
            array = _numpy(value[0] if value.ndim > 2 else value)
            if np.iscomplexobj(array) and array.ndim > 2:
                array = _mosaic(np.abs(array[:4]))
            pictures.append((name.replace("_", " "), array, "gray"))
    return pictures


def _mosaic(images: np.ndarray) -> np.ndarray:
    """Up to four images as two rows of two (or one row of fewer)."""
    if len(images) < 4:
        return np.concatenate(list(images), axis=-1)
    return np.concatenate([np.concatenate(list(images[i : i + 2]), axis=-1) for i in (0, 2)], axis=-2)


def _parts(operator: Any) -> Iterable[Any]:
    yield operator
    for name in ("parts", "base", "outer", "inner", "operator", "linear"):
        inner = getattr(operator, name, None)
        for part in inner if isinstance(inner, (tuple, list)) else [inner]:
            if hasattr(part, "domain") and hasattr(part, "range"):
                yield from _parts(part)


def _numpy(values: Tensor) -> np.ndarray:
    return values.detach().cpu().resolve_conj().numpy()


def _safe(pictures: Any, thing: Any) -> str:
    """Render pictures; an object that cannot be drawn (all draws failed, odd shapes) is shown without."""
    try:
        shown = [(title, _plane(values), cmap) for title, values, cmap in pictures(thing)[:_MAX_PICTURES]]
        return _tag(shown) if shown else ""
    except Exception:
        return ""


def _plane(values: np.ndarray) -> np.ndarray:
    """Magnitude, and the middle of every axis before the last two (the first channel or coil)."""
    values = np.abs(values) if np.iscomplexobj(values) else values.astype(float)
    while values.ndim > 2:
        values = values[len(values) // 2 if values.ndim == 3 and len(values) > 8 else 0]
    return values[0] if values.ndim == 2 and values.shape[0] == 1 else values


def _tag(pictures: list[Picture]) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.9 * len(pictures), 2.0), layout="constrained")
    for axes, (title, values, cmap) in zip(np.ravel(figure.subplots(1, len(pictures))), pictures):
        if values.ndim < 2:
            axes.plot(values, linewidth=0.9, color="#0072B2")
            axes.tick_params(labelsize=6)
        else:
            low, high = np.nanpercentile(values, [0.2, 99.8])
            axes.imshow(values, cmap=cmap, vmin=low, vmax=high if high > low else low + 1, interpolation="nearest")
            axes.set_axis_off()
        axes.set_title(title, fontsize=8)
    return _image(figure)


def _curve_tag(curve: Mapping[str, Any]) -> str:
    from matplotlib.figure import Figure

    sigma = curve.get("sigma", curve.get("sigmas"))
    if sigma is None:
        return ""
    figure = Figure(figsize=(3.0, 2.1), layout="constrained")
    axes = figure.add_subplot()
    for name, values in curve.items():
        numbers = np.asarray(values, dtype=float) if isinstance(values, (list, tuple)) else np.zeros(0)
        if values is not sigma and numbers.shape == np.shape(sigma):
            axes.loglog(sigma, numbers, marker=".", linewidth=1.0, label=name)
    axes.set_xlabel("sigma", fontsize=7)
    axes.set_ylabel("denoising error", fontsize=7)
    axes.tick_params(labelsize=6, which="both")
    if axes.lines:
        axes.legend(fontsize=6, frameon=False)
    return _image(figure) if axes.lines else ""


def _image(figure: Any) -> str:
    from invdiff.figures import png_bytes

    data = base64.b64encode(png_bytes(figure, dpi=80)).decode()
    return f'<img alt="" style="max-width:100%" src="data:image/png;base64,{data}">'


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{k}: {_short(v)}" for k, v in value.items())[:300]
    if isinstance(value, (list, tuple)):
        return " ".join(str(v) for v in value)[:300]
    return str(value)[:300]


def _frame(title: str, facts: Mapping[str, str], picture: str) -> str:
    cell = 'style="text-align:left;vertical-align:top;padding:1px 8px"'
    rows = "".join(
        f"<tr><th {cell}>{html.escape(str(k))}</th><td {cell}>{html.escape(str(v))}</td></tr>"
        for k, v in facts.items()
    )
    return (
        '<div style="display:flex;flex-wrap:wrap;gap:16px;align-items:center">'
        f"<div>{picture}</div><div><strong>{html.escape(title)}</strong><table>{rows}</table></div></div>"
    )
