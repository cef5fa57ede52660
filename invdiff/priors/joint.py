"""Several priors on one stacked unknown, for data that are made of several images.

For ``x = (x_1, ..., x_n)`` with independent parts, ``p(x) = p_1(x_1) ... p_n(x_n)``, the denoiser acts on each
part alone: ``D(u, s) = (D_1(u_1, s), ..., D_n(u_n, s))``. Every part keeps its own codec and so its own units;
``s`` is the noise level in those. The data couple the parts: `invdiff.operators.SumOf` adds them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from invdiff.codec import AffineCodec, Codec
from invdiff.errors import InvdiffError
from invdiff.prior import Denoiser, Prior
from invdiff.priors.covariance import Covariance
from invdiff.priors.exact import ExactDenoiser
from invdiff.problem import Problem
from invdiff.spaces import Space, per_row

_CLOSED_FORMS = frozenset({"prox", "svd", "pinv", "conditional"})


class JointDenoiser(Denoiser):
    """``D(u, s) = (D_1(u_1, s), ..., D_n(u_n, s))`` on flat coordinates ``(B, n_1 + ... + n_n)``.

    Where ``s`` lies above the range of a part, that part sees its state shrunk to its highest level, and below its
    range the state at its lowest level; parts in closed form have no limits.

    Args:
        parts: Denoisers of the components.
        shapes: Their coordinates; empty where they are not known before the prior is bound to an image.
    """

    def __init__(self, parts: Sequence[Denoiser], shapes: Sequence[tuple[int, ...]] = ()) -> None:
        self.parts, self.shapes = tuple(parts), tuple(shapes)
        sizes = [torch.Size(s).numel() for s in shapes] or [1] * len(parts)
        self.dtype = _widest(d.dtype for d in parts)
        self.space = Space((sum(sizes),), self.dtype) if shapes else None
        self.channels = sum(d.channels for d in parts)
        self.sigma_min, self.sigma_max = min(d.sigma_min for d in parts), max(d.sigma_max for d in parts)
        self.sigma_data = (sum(n * d.sigma_data**2 for n, d in zip(sizes, parts)) / sum(sizes)) ** 0.5
        self.differentiable = min(d.differentiable for d in parts)

    def __call__(self, x: Tensor, sigma: Tensor, cond: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return every part's ``E[x0 | x]``, flat."""
        return self._each(lambda d, part: _within(d, part, sigma, cond), x)

    def _each(self, function: Callable[..., Tensor], *flat: Tensor) -> Tensor:
        """Apply ``function(denoiser, *parts)`` to every component of flat tensors and flatten the results."""
        split = zip(*(split_parts(v, self.shapes) for v in flat))
        return join_parts([function(d, *parts) for d, parts in zip(self.parts, split)]).to(flat[0].dtype)


class ExactJoint(JointDenoiser, ExactDenoiser):
    """Joint denoiser of parts in closed form, in closed form itself."""

    space: Space
    parts: tuple[ExactDenoiser, ...]

    def log_prob(self, x: Tensor, sigma: Tensor | float = 0.0) -> Tensor:
        """Return the sum of the parts' log-densities."""
        logs = [d.log_prob(u, sigma) for d, u in zip(self.parts, split_parts(x, self.shapes))]
        return torch.stack(logs).sum(0)

    def score(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """Return the parts' scores."""
        return self._each(lambda d, u: d.score(u, sigma), x)

    def jacobian_product(self, x: Tensor, sigma: Tensor | float, v: Tensor) -> Tensor:
        """Return the parts' Jacobian products."""
        return self._each(lambda d, u, w: d.jacobian_product(u, sigma, w), x, v)

    def sample(self, n: int, seed: int = 0) -> Tensor:
        """Return ``n`` exact draws, parts independent."""
        seeds = np.random.SeedSequence(seed).generate_state(len(self.parts)).tolist()
        return join_parts([d.sample(n, own) for d, own in zip(self.parts, seeds)])

    def components(self) -> list[tuple[float, Tensor, Covariance]]:
        """Return every combination of the parts' components."""
        out: list[tuple[float, Tensor, Covariance]] = []
        for chosen in itertools.product(*(d.components() for d in self.parts)):
            mean = join_parts([m[None] for _, m, _ in chosen])[0]
            out.append((sum(w for w, _, _ in chosen), mean, Blocks([c for _, _, c in chosen])))
        return out


class Blocks(Covariance):
    """Independent blocks: ``C = diag(C_1, ..., C_n)`` on flat coordinates."""

    def __init__(self, parts: Sequence[Covariance]) -> None:
        self.parts = list(parts)
        self.eigenvalues = join_parts([c.eigenvalues[None] for c in parts])[0]
        self.shape = tuple(self.eigenvalues.shape)

    def to_basis(self, v: Tensor) -> Tensor:
        """Return ``Q_i^T v_i`` for every block."""
        return self._each(v, "to_basis")

    def from_basis(self, c: Tensor) -> Tensor:
        """Return ``Q_i c_i`` for every block."""
        return self._each(c, "from_basis")

    def variances(self) -> Tensor:
        """Return the diagonals of the blocks."""
        return join_parts([c.variances()[None] for c in self.parts])[0]

    def _each(self, v: Tensor, method: str) -> Tensor:
        split = split_parts(v, [c.shape for c in self.parts])
        return join_parts([getattr(c, method)(part) for c, part in zip(self.parts, split)])


class JointCodec(Codec):
    """Every component's own codec: ``(B, n_1 + ... + n_n)`` to ``(B, n, *image)``.

    Args:
        parts: Codecs with images of one shape.
        image: Space of the stacked image, a leading axis for the components.
    """

    def __init__(self, parts: Sequence[Codec], image: Space) -> None:
        self.parts = tuple(parts)
        self.image = image.with_precision(_widest(c.image.real_dtype for c in parts))
        self.shapes = tuple(c.prior.shape for c in parts)
        size = sum(c.prior.size for c in parts)
        self.prior = Space((size,), _widest(c.prior.dtype for c in parts))

    def decode(self, u: Tensor) -> Tensor:
        """Decode every component."""
        return self._down(u, "decode")

    def encode(self, x: Tensor) -> Tensor:
        """Encode every component."""
        return self._up(x, "encode")

    def rows(self, index: Tensor) -> Codec:
        """Pick the parameters of the given cases."""
        return type(self)([c.rows(index) for c in self.parts], self.image)

    def describe(self) -> dict[str, Any]:
        """Describe every component."""
        return {"name": "Joint", "parts": [c.describe() for c in self.parts]}

    def _down(self, u: Tensor, method: str) -> Tensor:
        split = zip(self.parts, split_parts(u, self.shapes))
        return torch.stack([getattr(c, method)(v.to(c.prior.dtype)).to(self.image.dtype) for c, v in split], 1)

    def _up(self, x: Tensor, method: str) -> Tensor:
        split = zip(self.parts, x.unbind(1))
        return join_parts([getattr(c, method)(v.to(c.image.dtype)).to(self.prior.dtype) for c, v in split])


class AffineJointCodec(JointCodec, AffineCodec):
    """Joint codec of affine ones: ``L = diag(L_1, ..., L_n)``, ``L_i L_i^H = g_i^2``.

    ``L L^H = gain^2 I`` holds where the parts have one gain; elsewhere ``gain`` is their geometric mean, right for
    volumes and for units, and closed forms of an operator do not survive the change of coordinates.
    """

    is_affine = True
    parts: tuple[AffineCodec, ...]

    @property
    def gain(self) -> Tensor:
        """Geometric mean of the parts' gains."""
        logs = [c.gain.to(self.image.real_dtype).log() for c in self.parts]
        return torch.stack(torch.broadcast_tensors(*logs)).mean(0).exp()

    @property
    def tight(self) -> bool:
        """Whether all parts have one gain."""
        gains = [c.gain.to(self.image.real_dtype) for c in self.parts]
        return all(bool(torch.isclose(g, self.gain).all()) for g in gains)

    @property
    def offset(self) -> Tensor | None:
        """The image of prior zero, where any part has an offset."""
        if all(c.offset is None for c in self.parts):
            return None
        rows = self.gain.shape[0] if self.gain.ndim else 1
        return self.decode(self.prior.zeros(rows, self.gain.device))

    def linear(self, u: Tensor) -> Tensor:
        """Apply the parts' linear maps."""
        return self._down(u, "linear")

    def linear_adjoint(self, x: Tensor) -> Tensor:
        """Apply their adjoints."""
        return self._up(x, "linear_adjoint")

    decode = JointCodec.decode
    encode = JointCodec.encode


@dataclass(frozen=True, eq=False, repr=False)
class JointPrior(Prior):
    """Independent priors on the components of a stacked image; made by `Joint`.

    Attributes:
        parts: The priors.
    """

    parts: tuple[Prior, ...] = ()

    def with_scale(self, scale: float | Tensor | None) -> Prior:
        """Refuse: each part has its own scale."""
        raise InvdiffError("A joint prior has no scale of its own; give each part its own with with_scale.")

    def bind(self, image: Space, scale: float | Tensor = 1.0) -> Prior:
        """Return the prior bound to stacked images ``(n, *image)``.

        Raises:
            InvdiffError: If the number of components, a channel or a shape does not fit, or a part has no scale.
        """
        if isinstance(self.codec, JointCodec):
            super().bind(image)
            return replace(self, codec=type(self.codec)(self.codec.parts, image))  # spacing and units of the image
        if len(image.shape) < 2 or image.shape[0] != len(self.parts):
            raise InvdiffError(
                f"Joint prior {self.name} has {len(self.parts)} components, and the problem's images are {image}; "
                "its operator must take as many along the leading axis (operators.SumOf)."
            )
        spacing = {k: v for k, v in image.spacing.items() if k != image.dims[0]}
        one = image.replace(shape=image.shape[1:], dims=image.dims[1:], spacing=spacing)
        bound = [_bind_part(p, one) for p in self.parts]
        codecs = [p.codec for p in bound if p.codec is not None]
        affine = all(c.is_affine for c in codecs)
        codec = (AffineJointCodec if affine else JointCodec)(codecs, image)
        denoiser = _denoiser([p.denoiser for p in bound], [c.prior.shape for c in codecs])
        return replace(self, denoiser=denoiser, codec=codec, parts=tuple(bound))

    def adapt(self, problem: Problem) -> Prior:
        """Return the prior bound to the stacked images of ``problem``."""
        bound = self.bind(problem.operator.domain)
        closed = problem.operator.capabilities & _CLOSED_FORMS
        if closed and isinstance(bound.codec, AffineJointCodec) and not bound.codec.tight:
            raise InvdiffError(
                f"{problem.operator.name} acts on all components at once in closed form, which holds only where "
                "the parts of a joint prior have one scale; write it as a composition with operators.SumOf."
            )
        return bound

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Prior:
        """Return a copy on another device or in another precision."""
        moved = super().to(device, dtype)
        if self.codec is not None:
            return moved
        return replace(self, denoiser=moved.denoiser, parts=tuple(p.to(device, dtype) for p in self.parts))

    def describe(self) -> dict[str, Any]:
        """Return what provenance records, part by part."""
        return {**super().describe(), "parts": [p.describe() for p in self.parts]}


def Joint(*parts: Prior) -> JointPrior:
    """Independent priors on the components of one stacked image ``(n, *image)``, dims ``("component", ...)``.

    A prior that estimates its scale from data must be given it (``prior.with_scale``): the data cannot tell how
    much of the sum belongs to which component. One evaluation of the joint denoiser asks every part once.

    Args:
        parts: Two or more priors for images of one shape.

    Returns:
        A prior for problems whose operator takes stacked images; see `invdiff.operators.SumOf`. It is in closed
        form, with an exact posterior in `invdiff.reference`, where every part is.

    Raises:
        InvdiffError: If there are fewer than two parts, or one whose noise is not white.
    """
    if len(parts) < 2:
        raise InvdiffError(f"A joint prior needs at least two parts, got {len(parts)}.")
    for p in parts:
        if p.denoiser.noise != "white":
            raise InvdiffError(f"Prior {p.name} has {p.denoiser.noise} noise; a joint prior needs white noise.")
    card = {
        "name": " + ".join(p.name for p in parts),
        "licence": "; ".join(dict.fromkeys(str(p.card.get("licence", "")) for p in parts)),
        "sha256": " + ".join(str(p.card.get("sha256", "")) for p in parts).strip(" +"),
    }
    joint = JointPrior(JointDenoiser([p.denoiser for p in parts]), card=card, parts=parts)
    images = [p.codec.image if p.codec else None if p.make_codec else p.denoiser.space for p in parts]
    one = images[0]
    if one is None or any(i is None or i.shape != one.shape for i in images):
        return joint
    stacked = joint.bind(one.replace(shape=(len(parts), *one.shape), dims=("component", *one.dims)))
    assert isinstance(stacked, JointPrior)
    return stacked


def split_parts(flat: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Cut ``(B, n_1 + ... + n_n)`` into ``(B, *shape_i)``."""
    sizes = [torch.Size(s).numel() for s in shapes]
    return [v.reshape(-1, *s) for v, s in zip(flat.split(sizes, 1), shapes)]


def join_parts(parts: Sequence[Tensor]) -> Tensor:
    """Undo `split_parts`."""
    return torch.cat([p.flatten(1) for p in parts], 1)


def _within(d: Denoiser, x: Tensor, sigma: Tensor, cond: Mapping[str, Tensor] | None) -> Tensor:
    """Ask a denoiser at ``sigma`` ``(B,)``, or at the end of its range where ``sigma`` lies beyond."""
    if not isinstance(d, ExactDenoiser):
        level = sigma.clamp(d.sigma_min, d.sigma_max)
        x, sigma = x * per_row((level / sigma).clamp_max(1.0), x), level
    return d(x.to(d.dtype), sigma.to(d.dtype), cond)


def _denoiser(parts: Sequence[Denoiser], shapes: Sequence[tuple[int, ...]]) -> JointDenoiser:
    exact = all(isinstance(d, ExactDenoiser) for d in parts)
    return (ExactJoint if exact else JointDenoiser)(parts, shapes)


def _bind_part(part: Prior, image: Space) -> Prior:
    if part.codec is None and part.make_codec is not None and part.scale is None:
        raise InvdiffError(
            f"Prior {part.name} would estimate its scale from the data, which cannot tell what share belongs "
            "to which component; give it with prior.with_scale(image units per prior unit)."
        )
    return part.bind(image, 1.0 if part.scale is None else part.scale)


def _widest(dtypes: Any) -> torch.dtype:
    """Return the finest of some real dtypes."""
    return torch.float64 if torch.float64 in set(dtypes) else torch.float32
