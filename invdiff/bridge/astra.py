"""Projectors of the ASTRA toolbox as operators.

```python
volume = astra.create_vol_geom(256, 256)
views = astra.create_proj_geom("parallel", 1.0, 384, angles)
A = bridge.astra.from_projector((volume, views))     # or the id of a projector that you made
```

ASTRA keeps its own conventions: rows of a slice run from large to small ``Y``, so that its parallel beams at
``angles`` are ``ParallelBeamCT`` at ``-angles``. It computes in single precision, on one image at a time.

The adjoint is ASTRA's back-projection as it is. On the CPU it is the transpose; ASTRA's CUDA projectors
interpolate otherwise backwards, and ``invdiff.testing.check_operator`` shows by how much.
"""

from __future__ import annotations

import hashlib
import operator
import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from invdiff.bridge.scipy import ArrayLinear
from invdiff.errors import InvdiffError
from invdiff.operator import LinearOperator
from invdiff.spaces import Space

#: ASTRA's projectors on the CPU for fans; the one for parallel rays is "linear".
_KINDS = {"fanflat": "line_fanflat", "fanflat_vec": "line_fanflat"}


def from_projector(
    projector: int | tuple[Mapping[str, Any], Mapping[str, Any]],
    kind: str | None = None,
    *,
    image: Space | None = None,
    data: Space | None = None,
) -> LinearOperator:
    """Return a projector as an operator, ``(B, 1, y, x)`` to ``(B, 1, view, detector)``.

    Volumes are ``(B, 1, z, y, x)`` to ``(B, 1, row, view, detector)``.

    Args:
        projector: The id of a projector, which must outlive the operator, or the geometries
            ``(vol_geom, proj_geom)``, of which a projector is made.
        kind: ASTRA's name of the projector made of geometries, such as ``"strip"`` or ``"cuda"``; by default
            ``"linear"`` for parallel beams, ``"line_fanflat"`` for fans, ``"cuda3d"`` for volumes.
        image: Space of the image, where its units or spacing are not those of the geometry.
        data: Space of the data likewise.

    Raises:
        InvdiffError: If ASTRA is not installed, it refuses the geometries or the id, or a space has another size.
    """
    astra = _astra()
    if isinstance(projector, (tuple, list)):
        if len(projector) != 2:
            raise InvdiffError(f"Give the pair (vol_geom, proj_geom), not {len(projector)} geometries.")
        number, delete = _create(astra, *projector, kind)
    else:
        if kind is not None:
            raise InvdiffError(f"The kind {kind!r} is for geometries; this projector is already made.")
        number, delete = _as_id(projector), None
    try:
        tomograph = astra.OpTomo(number)
    except Exception as error:
        raise InvdiffError(
            f"ASTRA has no projector with the id {number}; make one with create_projector."
        ) from error
    if delete is not None:
        weakref.finalize(tomograph, delete, number)
    domain = image or _image_space(tomograph.vshape, tomograph.vg)
    range_ = data or _data_space(tomograph.sshape, tomograph.pg)
    for what, space, shape in (("image", domain, tomograph.vshape), ("data", range_, tomograph.sshape)):
        if space.size != np.prod(shape):
            raise InvdiffError(f"The {what} space {space} does not have the size of ASTRA's {tuple(shape)}.")
    return ArrayLinear(
        lambda x: np.reshape(tomograph.FP(x.reshape(tomograph.vshape)), range_.shape),
        lambda y: np.reshape(tomograph.BP(y.reshape(tomograph.sshape)), domain.shape),
        domain,
        range_,
        f"ASTRA {tomograph.pg['type']}",
        _digest(kind, tomograph.vg, tomograph.pg),
    )


def _astra() -> Any:
    try:
        import astra
    except ImportError as error:
        raise InvdiffError(
            "The bridge to ASTRA needs the package astra-toolbox, which is not installed; get it from conda "
            "(channel astra-toolbox), as it is not on PyPI."
        ) from error
    return astra


def _as_id(projector: Any) -> int:
    try:
        return operator.index(projector)
    except TypeError as error:
        raise InvdiffError(
            f"A projector's id or the pair (vol_geom, proj_geom) is needed, not {type(projector).__name__}."
        ) from error


def _create(astra: Any, volume: Mapping[str, Any], views: Mapping[str, Any], kind: str | None) -> tuple[int, Any]:
    """Return the id of a new projector, and what deletes it."""
    if not (isinstance(volume, Mapping) and "GridRowCount" in volume):
        raise InvdiffError("The first of the pair is no volume geometry; make it with astra.create_vol_geom.")
    if not (isinstance(views, Mapping) and "type" in views):
        raise InvdiffError(
            "The second of the pair is no projection geometry; make it with astra.create_proj_geom."
        )
    solid = "GridSliceCount" in volume
    kind = kind or ("cuda3d" if solid else _KINDS.get(views["type"], "linear"))
    try:
        number = astra.create_projector(kind, views, volume)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise InvdiffError(f"ASTRA makes no {kind!r} projector of these geometries: {reason}") from error
    return number, (astra.projector3d if solid else astra.projector).delete


def _image_space(shape: tuple[int, ...], geometry: Mapping[str, Any]) -> Space:
    dims, window = ("z", "y", "x")[-len(shape) :], geometry.get("option", {})
    lengths = {d: window.get(f"WindowMax{d.upper()}", 0) - window.get(f"WindowMin{d.upper()}", 0) for d in dims}
    spacing = {d: lengths[d] / n for d, n in zip(dims, shape) if lengths[d] > 0}
    return Space((1, *shape), torch.float32, ("channel", *dims), spacing=spacing)


def _data_space(shape: tuple[int, ...], geometry: Mapping[str, Any]) -> Space:
    dims = ("row", "view", "detector")[-len(shape) :]
    names = {"detector": ("DetectorWidth", "DetectorSpacingX"), "row": ("DetectorSpacingY",)}
    spacing = {d: geometry[n] for d in dims for n in names.get(d, ()) if n in geometry}
    return Space((1, *shape), torch.float32, ("channel", *dims), spacing=spacing)


def _digest(kind: str | None, *geometries: Mapping[str, Any]) -> str:
    """Return a digest of what tells projectors apart, as far as the geometries do."""
    known = hashlib.sha256(str(kind).encode())
    for geometry in geometries:
        for name, value in sorted(geometry.items()):
            known.update(name.encode())
            known.update(value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode())
    return known.hexdigest()
