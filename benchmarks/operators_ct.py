"""Ray transforms for `operators.py`: deepinv, sparse matrices, scikit-image and the ASTRA toolbox beside ours."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from interleaved import Group, Make, Runs

from invdiff import operators

#: Makes an operator of a given method.
Rays = Callable[[str], Any]


def parallel(n: int, views: int) -> Callable[[], dict[str, Make]]:
    angles = np.linspace(0, np.pi, views, endpoint=False)
    rays = functools.partial(_parallel, n, views)

    def skimage(batch: int) -> Runs:
        from skimage.transform import radon

        x = rays("matrix-free").domain.randn(batch, 1)[:, 0].numpy()
        return {"forward": lambda: [radon(image, theta=np.rad2deg(angles), circle=False) for image in x]}

    def candidates() -> dict[str, Make]:
        made = {"deepinv Tomography": deepinv(rays, angles), **common(rays)}
        if find_spec("skimage"):
            made["scikit-image radon"] = skimage
        return made | astra(rays, "parallel", 1.0, rays("matrix-free").range.shape[-1], -angles)

    return candidates


def fan() -> dict[str, Make]:
    rays: Rays = _fan
    op = rays("matrix-free")
    detectors, spacing = op.range.shape[-1], op.detector_spacing
    parameters = {
        "pixel_spacing": 1.0,
        "source_radius": op.source_distance,
        "detector_radius": op.detector_distance,
        "n_detector_pixels": detectors,
        "detector_spacing": spacing,
    }
    made = {
        "deepinv Tomography": deepinv(rays, op.angles, fan_beam=True, fan_parameters=parameters),
        **common(rays),
    }
    distances = op.source_distance, op.detector_distance
    return made | astra(rays, "fanflat", spacing, detectors, -op.angles, *distances)


def cone() -> dict[str, Make]:
    op = _cone("matrix-free")
    distances = op.source_distance, op.detector_distance
    made = common(_cone)
    if torch.cuda.is_available():  # ASTRA has no cones on the CPU
        made |= astra(_cone, "cone", *op.detector_spacing[::-1], *op.range.shape[-2:], -op.angles, *distances)
    return made


@functools.cache
def _parallel(n: int, views: int, method: str) -> Any:
    return operators.ParallelBeamCT((1, n, n), np.linspace(0, np.pi, views, endpoint=False), method=method)


@functools.cache
def _fan(method: str) -> Any:
    angles = np.linspace(0, 2 * np.pi, 180, endpoint=False)
    return operators.FanBeamCT(
        (1, 256, 256), angles, source_distance=512.0, detector_distance=256.0, method=method
    )


@functools.cache
def _cone(method: str) -> Any:
    angles = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    return operators.ConeBeamCT(
        (1, 48, 48, 48), angles, source_distance=144.0, detector_distance=72.0, method=method
    )


def common(rays: Rays) -> dict[str, Make]:
    """Return our own methods and sparse matrices of the same weights."""
    return {
        "invdiff, matrix-free": lambda batch: _runs(rays("matrix-free"), batch),
        "invdiff, table": lambda batch: _runs(rays("table"), batch),
        "scipy CSR": functools.partial(_scipy, rays),
        "torch CSR": functools.partial(_torch, rays),
    }


def _runs(op: Any, batch: int) -> Runs:
    x, y = op.domain.randn(batch, 1), op.range.randn(batch, 2)
    return {"forward": lambda: op(x), "adjoint": lambda: op.adjoint(y), "normal": lambda: op.normal(x)}


@functools.cache
def _matrices(rays: Rays) -> tuple[Any, Any]:
    """Return the weights of all rays and their transpose, in scipy's CSR with 32-bit positions."""
    from scipy import sparse

    transpose = rays("table")._table().transpose
    parts = tuple(t.numpy() for t in (transpose.values(), transpose.col_indices(), transpose.crow_indices()))
    back = sparse.csr_matrix(parts, transpose.shape)
    return back.T.tocsr(), back


def _rows(rays: Rays, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images and data as rows, as every operator gets them, or as vectors."""
    op = rays("table")
    pair = (v.flatten(1) for v in (op.domain.randn(batch, 1), op.range.randn(batch, 2)))
    x, y = (v[0] if batch == 1 else v for v in pair)
    return x, y


def _products(a: Any, b: Any, x: Any, y: Any) -> Runs:
    """Rows are turned for the product, which wants columns, and left as columns afterwards."""
    if x.ndim == 1:
        return {"forward": lambda: a @ x, "adjoint": lambda: b @ y, "normal": lambda: b @ (a @ x)}
    return {"forward": lambda: a @ x.T, "adjoint": lambda: b @ y.T, "normal": lambda: b @ (a @ x.T)}


def _scipy(rays: Rays, batch: int) -> Runs:
    x, y = (v.numpy() for v in _rows(rays, batch))
    forward, back = _matrices(rays)
    op = rays("matrix-free")
    ours = op(op.domain.randn(batch, 1)).flatten(1).numpy().reshape(-1)
    runs = _products(forward, back, x, y)
    assert np.abs(runs["forward"]().T.reshape(-1) - ours).max() < 1e-4 * np.abs(ours).max()
    return runs


def _torch(rays: Rays, batch: int) -> Runs:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sparse rows are a beta feature
        forward, back = (
            torch.sparse_csr_tensor(*(torch.from_numpy(v) for v in (m.indptr, m.indices, m.data)), m.shape)
            for m in _matrices(rays)
        )
    return _products(forward, back, *_rows(rays, batch))


def deepinv(rays: Rays, angles: np.ndarray, **options: Any) -> Make:
    def make(batch: int) -> Runs:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from deepinv.physics import Tomography

        n = rays("matrix-free").domain.shape[-1]
        degrees = torch.from_numpy(np.rad2deg(angles)).float()
        physics = Tomography(angles=degrees, img_width=n, circle=False, normalize=False, **options)
        x = torch.randn(batch, 1, n, n, generator=torch.Generator().manual_seed(1))
        y = torch.randn_like(physics.A(x))
        return {
            "forward": lambda: physics.A(x),
            "adjoint": lambda: physics.A_adjoint(y),
            "normal": lambda: physics.A_adjoint_A(x),
        }

    return make


def astra(rays: Rays, *geometry: Any) -> dict[str, Make]:
    """Return ASTRA's default projector where the toolbox is installed."""

    def make(batch: int) -> Runs:
        import astra

        from invdiff.bridge.astra import from_projector

        volume = astra.create_vol_geom(*rays("matrix-free").domain.shape[1:])
        return _runs(from_projector((volume, astra.create_proj_geom(*geometry))), batch)

    return {"ASTRA": make} if find_spec("astra") else {}


_TEXT = (
    "The sparse matrices hold the weights of `invdiff`. All get a batch as rows, as samplers hold it; the "
    "products with matrices want columns and give columns, which are left so. deepinv interpolates a rotated "
    "image, with its exact adjoint."
)
_MEMORY = ("deepinv Tomography", "invdiff, matrix-free", "invdiff, table")
GROUPS = {
    "ct-parallel": Group("Parallel beam, 256 x 256, 180 views", _TEXT, parallel(256, 180), memory=_MEMORY),
    "ct-parallel-512": Group("Parallel beam, 512 x 512, 60 views", _TEXT, parallel(512, 60), (1,)),
    "ct-fan": Group("Fan beam, 256 x 256, 180 views, flat detector", _TEXT, fan),
    "ct-cone": Group(
        "Cone beam, 48 x 48 x 48, 40 views",
        "The sparse matrices hold the weights of `invdiff`; deepinv has cones through ASTRA on a GPU alone.",
        cone,
        (1, 4),
    ),
}
