"""Triton kernels of the ray transforms: run by its interpreter on the CPU, compiled for GPUs, and run on one.

Triton decides when it is imported whether kernels are interpreted, so that a process of its own interprets them:
``python -m tests.unit.test_triton_rays FILE`` writes what they give, and the tests compare.
"""

import importlib.util
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from invdiff import operators as O
from invdiff.operators import _ray_transform, _rays

ROOT = Path(__file__).resolve().parents[2]
ANGLES = (0.0, 0.5, math.pi / 4, 1.5, 2.2, 4.0)
NEAR = {"source_distance": 9.0, "detector_distance": 6.0}
#: The source is almost at the corner of the image, so that some neighbours of pixels are behind it.
AT_THE_CORNER = {"source_distance": 5.4, "detector_distance": 1.0}
#: Rays that are steeper in z than across.
STEEP = {"source_distance": 2.0, "detector_distance": 0.5, "detector_spacing": (2.0, 1.0)}
SIDES = {"spacing": {"y": 1.3, "x": 0.8}, "truncated": True}
PRECISIONS = (torch.float32, torch.float64)

CASES = {
    "parallel": lambda d: O.ParallelBeamCT((1, 11, 9), ANGLES, dtype=d),
    "parallel, narrow": lambda d: O.ParallelBeamCT((5, 8), ANGLES, detectors=5, centre=1.3, dtype=d, **SIDES),
    "parallel, fine": lambda d: O.ParallelBeamCT((6, 7), ANGLES[:4], detector_spacing=0.3, dtype=d),
    "one column": lambda d: O.ParallelBeamCT((1, 4, 1), [0.2], dtype=d),
    "fan": lambda d: O.FanBeamCT((1, 7, 8), ANGLES, dtype=d, **NEAR),
    "fan, close": lambda d: O.FanBeamCT((1, 7, 8), ANGLES, dtype=d, **AT_THE_CORNER),
    "curved": lambda d: O.FanBeamCT((1, 7, 5), ANGLES, curved=True, dtype=d, **SIDES, **NEAR),
    "curved, backwards": lambda d: O.FanBeamCT(
        (1, 4, 5), ANGLES[:3], curved=True, detectors=31, detector_spacing=2.0, dtype=d, **NEAR
    ),
    "cone": lambda d: O.ConeBeamCT((1, 4, 5, 6), ANGLES[:5], method="matrix-free", dtype=d, **NEAR),
    "cone, steep": lambda d: O.ConeBeamCT(
        (12, 2, 3), ANGLES[:3], detectors=(9, 4), method="matrix-free", dtype=d, **STEEP
    ),
    "helix": lambda d: O.ConeBeamCT(
        (5, 4, 5), ANGLES, pitch=3.0, detectors=(3, 7), method="matrix-free", dtype=d, **NEAR
    ),
}
#: Both precisions and batches everywhere, and all four pairs of them once in two and in three dimensions.
PAIRS = [(torch.float32, 5), (torch.float64, 1)]
CROSSED = [(name, dtype, batch, None) for name in ("curved", "cone") for dtype, batch in zip(PRECISIONS, (1, 5))]
#: More rows than a program takes, and rays in several parts.
EXTRA = [("fan", torch.float32, 9, 40), ("cone", torch.float64, 1, 130), ("helix", torch.float64, 2, 1)]
RUNS = [(name, *pair, None) for name in CASES for pair in PAIRS] + CROSSED + EXTRA

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not here; on Linux, pip install 'invdiff[gpu]'"
)
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


def label(run):
    name, dtype, batch, rays = run
    return f"{name}-{str(dtype)[-7:]}-{batch}" + (f"-{rays} rays at once" if rays else "")


def vectors(op, batch):
    return op.domain.randn(batch, seed=1).flatten(1), op.range.randn(batch, seed=2).flatten(1)


def reference(op, x, y):
    views = (op.grid, op._trace, len(op.angles), op.bins)
    x, y = x.reshape(-1, math.prod(op.grid.sizes)), y.reshape(-1, len(op.angles) * op.bins)
    return _rays.project(x, *views), _rays.back_project(y, *views)


def on_device(op, device):
    """Return the rays of an operator on a device, in as many parts as they take."""
    from invdiff.operators._triton_rays import DeviceRays, trace_parts

    views = len(op.angles)
    parts = trace_parts(op.grid, op._trace, op._cameras, views, op.bins, torch.device(device))
    return DeviceRays(op.grid, views * op.bins, list(parts))


def interpret(path):
    """Write what the interpreted kernels give for all runs."""
    from invdiff.operators import _triton_rays

    at_once, found = _triton_rays._RAYS, {}
    for run in RUNS:
        name, dtype, batch, rays = run
        op = CASES[name](dtype)
        _triton_rays._RAYS = rays or at_once
        x, y = vectors(op, batch)
        kernels = on_device(op, "cpu")
        found[label(run)] = (kernels.project(x), kernels.back_project(y), len(kernels.parts))
    torch.save(found, path)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    path = tmp_path_factory.mktemp("triton") / "found.pt"
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.unit.test_triton_rays", str(path)]
    out = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    return torch.load(path, weights_only=True)


@needs_triton
@pytest.mark.parametrize("run", RUNS, ids=label)
def test_interpreted_kernels_equal_the_reference(interpreted, run):
    """Forward, adjoint, and the one the transpose of the other; the largest error here was 2e-7 and 4e-16."""
    name, dtype, batch, rays = run
    op = CASES[name](dtype)
    x, y = vectors(op, batch)
    forward, adjoint, parts = interpreted[label(run)]
    bound = 1e-5 if dtype == torch.float32 else 1e-12
    for found, expected in zip((forward, adjoint), reference(op, x, y)):
        assert found.dtype == dtype and found.shape == expected.shape and float(expected.abs().max()) > 0
        assert float((found - expected).abs().max()) < bound * float(expected.abs().max())
    assert abs(float((forward * y).sum() - (x * adjoint).sum())) < bound * float(forward.norm() * y.norm())
    assert (parts > 1) == (rays is not None)


@pytest.mark.parametrize("name", CASES)
def test_cameras_see_every_point_of_a_ray_on_its_own_detector(name):
    op = CASES[name](torch.float64)
    views, dims = len(op.angles), len(op.grid.sizes)
    rays, cameras = op._trace(0, views), op._cameras(0, views)
    if name == "curved, backwards":  # where cameras say that they see nothing
        assert not cameras.depth.any()
        return
    view, detector = np.divmod(np.arange(views * op.bins), op.bins)
    for step in (0.0, 2.5):
        point = np.ones((len(rays), dims + 1))
        for a in range(dims):
            mine = rays.axis == a
            point[mine, a] = step
            point[np.ix_(mine, _rays.others(a, dims))] = rays.p[mine] + rays.q[mine] * step
        across, depth, rise = (
            0 if c is None else (c[view] * point).sum(1) for c in (cameras.across, cameras.depth, cameras.rise)
        )
        seen = depth > 1e-3
        turned = cameras.per_radian * np.arctan(across / depth) if cameras.per_radian else across / depth
        row, column = np.divmod(detector, cameras.columns)
        assert seen.any()
        np.testing.assert_allclose((cameras.centre[1] + turned)[seen], column[seen], atol=1e-9)
        if cameras.rise is not None:
            np.testing.assert_allclose((cameras.centre[0] + rise / depth)[seen], row[seen], atol=1e-9)


@needs_triton
@pytest.mark.parametrize("data", ["fp32", "fp64"])
@pytest.mark.parametrize(
    ("kernel", "choice"),
    [
        ("_forward_2d", {}),
        ("_forward_3d", {}),
        ("_backward_2d", {"ARC": False}),
        ("_backward_2d", {"ARC": True}),
        ("_backward_3d", {"STEEP": False}),
        ("_backward_3d", {"STEEP": True}),
    ],
)
def test_kernels_compile_for_a_gpu_and_add_nothing_atomically(kernel, choice, data, tmp_path, monkeypatch):
    """The interpreter accepts more than the compiler does."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    import triton
    from triton.backends.compiler import GPUTarget

    from invdiff.operators import _triton_rays

    types = {"axis": "*i8", "low": "*i32", "high": "*i32", "x": f"*{data}", "y": f"*{data}", "out": f"*{data}"}
    types |= dict.fromkeys(("length", "p", "q", "cameras"), "*fp64")
    types |= dict.fromkeys(_triton_rays._COUNTS, "i32") | {"start": "i64"}
    types |= dict.fromkeys(("centre", "middle", "per_radian", "guard"), "fp32")
    function = getattr(_triton_rays, kernel)
    source = triton.compiler.ASTSource(
        function,
        {name: types.get(name, "constexpr") for name in function.arg_names},
        {"LANES": _triton_rays._LANES, "ROWS": _triton_rays._ROWS, **choice},
    )
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=_triton_rays.OPTIONS).asm
    assert len(code["cubin"]) > 1000 and "st.global" in code["ptx"]
    assert not re.search(r"\b(atom|red)\.", code["ptx"])


@pytest.mark.parametrize("packages", [{"triton", "numba"}, {"numba"}, set()], ids=str)
def test_what_computes_where(monkeypatch, packages):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in packages else None)
    for method in ("table", "reference", "matrix-free"):
        op = O.FanBeamCT((1, 7, 8), ANGLES, method=method, **NEAR)
        for device, package in (("cuda", "triton"), ("cpu", "numba"), ("mps", "")):
            fast = package if package in packages else "reference"
            expected = fast if method == "matrix-free" else method
            assert op._implementation(torch.device(device)) == expected


@needs_triton
def test_rays_on_a_device_are_kept_unless_they_are_too_many(monkeypatch):
    triton_rays = importlib.import_module("invdiff.operators._triton_rays")
    used = []

    def project(self, x):
        used.append((self, sum(part.nbytes for part in self.parts)))
        return x.new_zeros(len(x), self.data)

    monkeypatch.setattr(triton_rays.DeviceRays, "project", project)
    monkeypatch.setattr(_ray_transform.RayTransform, "_implementation", lambda self, device: "triton")
    op, twin = (CASES["cone"](torch.float32) for _ in range(2))
    x, rays = op.domain.randn(2), len(op.angles) * op.bins
    op(x), op(x), twin(x)
    monkeypatch.setattr(_ray_transform, "CACHE_BYTES", 100)
    op(x), op(x)
    kept, again, shared, passing, other = (r for r, _ in used)
    assert kept is again is shared and len({id(r) for r in (kept, passing, other)}) == 3
    cameras = 8 * 12 * len(op.angles)
    assert {size for _, size in used} == {triton_rays.ray_bytes(3) * rays + cameras}


# ---- on a GPU ----


@pytest.mark.gpu
@on_a_gpu
@needs_triton
@pytest.mark.parametrize("run", RUNS, ids=label)
def test_compiled_kernels_equal_the_reference(run, monkeypatch):
    from invdiff.operators import _triton_rays

    name, dtype, batch, rays = run
    op = CASES[name](dtype)
    x, y = vectors(op, batch)
    monkeypatch.setattr(_triton_rays, "_RAYS", rays or _triton_rays._RAYS)
    kernels = on_device(op, "cuda")
    bound = 1e-5 if dtype == torch.float32 else 1e-12
    found = kernels.project(x.cuda()), kernels.back_project(y.cuda())
    for ours, expected in zip(found, reference(op, x, y)):
        assert float((ours.cpu() - expected).abs().max()) < bound * float(expected.abs().max())


LARGE = {
    "parallel": lambda m, d: O.ParallelBeamCT((1, 200, 187), np.linspace(0, 3, 90), method=m, dtype=d),
    "fan": lambda m, d: O.FanBeamCT(
        (1, 187, 200), np.linspace(0, 6, 90), source_distance=400, detector_distance=200, method=m, dtype=d
    ),
    "cone": lambda m, d: O.ConeBeamCT(
        (1, 24, 40, 33), np.linspace(0, 6, 20), source_distance=90, detector_distance=60, method=m, dtype=d
    ),
}


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("name", LARGE)
def test_all_methods_agree_on_a_gpu(name, dtype):
    slow, *fast = (LARGE[name](m, dtype).to("cuda") for m in ("reference", "matrix-free", "table", "auto"))
    x, y = slow.domain.randn(3).cuda(), slow.range.randn(3).cuda()
    close = {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-11}
    for op in fast:
        torch.testing.assert_close(op(x), slow(x), **close)
        torch.testing.assert_close(op.adjoint(y), slow.adjoint(y), **close)
        torch.testing.assert_close(op.normal(x), op.adjoint(op(x)), rtol=1e-4, atol=1e-2)


@pytest.mark.gpu
@on_a_gpu
@needs_triton
@pytest.mark.parametrize("name", LARGE)
def test_kernels_repeat_to_the_last_bit(name):
    op = LARGE[name]("matrix-free", torch.float32).to("cuda")
    assert op._implementation(op.place.device) == "triton"
    x, y = op.domain.randn(5).cuda(), op.range.randn(5).cuda()
    assert torch.equal(op(x), op(x)) and torch.equal(op.adjoint(y), op.adjoint(y))


if __name__ == "__main__":
    interpret(sys.argv[1])
