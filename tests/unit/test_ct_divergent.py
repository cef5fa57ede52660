"""Fan and cone beams: against exact line integrals, far sources, the reference, and objects they reconstruct."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from invdiff import operators
from invdiff.errors import InvdiffError
from invdiff.operators._filtered import redundancy
from tests.unit import phantoms

FAN = {"source_distance": 100.0, "detector_distance": 60.0}
CONE = {"source_distance": 150.0, "detector_distance": 100.0}


def fan_rays(op: operators.FanBeamCT, offset: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Source and direction of every ray as (X, Y), from detector positions ``offset`` of a detector further."""
    s = (np.arange(op.range.shape[-1]) - op.centre + offset)[None] * op.detector_spacing
    whole, t = op.source_distance + op.detector_distance, op.angles[:, None]
    d, u = np.stack([-np.sin(t), np.cos(t)], -1), np.stack([np.cos(t), np.sin(t)], -1)
    a, b = (np.cos(s / whole), np.sin(s / whole)) if op.curved else (np.ones_like(s), s / whole)
    along = a[..., None] * d + b[..., None] * u
    return np.broadcast_to(-op.source_distance * d, along.shape), along


@pytest.mark.parametrize("curved", [False, True])
def test_line_integrals_of_shepp_logan(curved):
    n = 256
    op = operators.FanBeamCT(
        (1, n, n),
        np.linspace(0, 2 * np.pi, 50, endpoint=False),
        source_distance=3.0,
        detector_distance=1.5,
        curved=curved,
        spacing=2 / n,
    )
    exact = np.zeros(op.range.shape[1:])
    for offset in (-0.375, -0.125, 0.125, 0.375):
        points, along = fan_rays(op, offset)
        exact += phantoms.ellipse_integrals(points, along / np.linalg.norm(along, axis=-1, keepdims=True)) / 4
    found = op(torch.from_numpy(phantoms.shepp_logan(n))[None, None])[0, 0].numpy()
    assert np.linalg.norm(found - exact) < 0.01 * np.linalg.norm(exact)


@pytest.mark.parametrize("curved", [False, True])
@pytest.mark.parametrize("cover", [2 * math.pi, 4.5, None], ids=["whole", "overscan", "short"])
def test_fbp_returns_the_attenuation_of_a_disc(curved, cover):
    n, mu, radius, (x0, y0) = 101, 0.02, 14.0, (1.5, -3.0)
    cover = cover or math.pi + 2 * math.asin(0.25 * n * math.sqrt(2) / 100)
    angles = np.linspace(0.3, 0.3 + cover, 181, endpoint=False)
    op = operators.FanBeamCT((1, n, n), angles, curved=curved, spacing=0.5, units="1/mm", **FAN)
    points, along = fan_rays(op)
    along = along / np.linalg.norm(along, axis=-1, keepdims=True)
    exact = mu * radius * phantoms.chord((points - np.array([x0, y0])) / radius, along)
    found = op.fbp(torch.from_numpy(exact)[None, None])[0, 0].numpy()
    y, x = (op.grid.coordinates(a) for a in (0, 1))
    distance = np.hypot(y[:, None] - y0, x[None] - x0)
    inside = found[distance < 0.85 * radius]
    assert abs(inside.mean() / mu - 1) < 0.005 and inside.std() < 0.01 * mu
    mass = np.where(distance < 1.2 * radius, found, 0)
    assert abs((mass * x[None]).sum() / mass.sum() - x0) < 0.02
    assert abs((mass * y[:, None]).sum() / mass.sum() - y0) < 0.02


def test_every_line_counts_once():
    """A ray and the same line from the other side have weights that add to one."""
    half = 0.2
    angles = np.linspace(0, math.pi + 2 * half + 0.3, 4001)
    fan = np.linspace(-half, half, 41)
    weights = redundancy(angles, fan, half)
    assert weights.min() >= 0 and weights.max() <= 1
    for k, g in enumerate(fan):
        twin = angles + math.pi - 2 * g
        seen = twin < angles[-1]
        other = np.interp(twin[seen], angles, weights[:, -1 - k])
        np.testing.assert_allclose(weights[seen, k] + other, 1, atol=3e-3)
    middle = (angles > 0.8) & (angles < math.pi - 0.1)
    assert weights[middle].max() == 1
    assert (redundancy(np.linspace(0, 2 * np.pi, 60, endpoint=False), fan, half) == 0.5).all()
    with pytest.raises(InvdiffError, match="conjugate gradients"):
        redundancy(np.linspace(0, math.pi, 60), fan, half)


def test_a_far_source_gives_parallel_rays():
    angles = np.linspace(0.1, 3.0, 7)
    parallel = operators.ParallelBeamCT((1, 9, 11), angles, dtype=torch.float64)
    x = parallel.domain.randn(1)
    options = {"detectors": parallel.range.shape[-1], "detector_spacing": 1.0, "dtype": torch.float64}
    for curved in (False, True):
        fan = operators.FanBeamCT(
            (1, 9, 11), angles, source_distance=1e7, detector_distance=0, curved=curved, **options
        )
        torch.testing.assert_close(fan(x), parallel(x), atol=1e-4, rtol=0)
    options["detectors"] = (3, parallel.range.shape[-1])
    cone = operators.ConeBeamCT((1, 3, 9, 11), angles, source_distance=1e7, detector_distance=0, **options)
    volume = torch.stack([x, 2 * x, 3 * x], 2)
    expected = torch.stack([parallel(x), 2 * parallel(x), 3 * parallel(x)], 3)
    torch.testing.assert_close(cone(volume), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", ["table", "matrix-free"])
@pytest.mark.parametrize("pitch", [0.0, 4.0])
def test_fast_paths_equal_the_reference_in_volumes(method, pitch):
    options = {
        "detectors": (7, 13),
        "pitch": pitch,
        "spacing": {"z": 0.7, "y": 1.1, "x": 0.9},
        "centre": (2.6, 5.7),
    }
    common = options | {
        "source_distance": 8.0,
        "detector_distance": 3.0,
        "dtype": torch.float64,
        "truncated": True,
    }
    reference, fast = (
        operators.ConeBeamCT((6, 7, 5), np.arange(9), method=m, **common) for m in ("reference", method)
    )
    x, y = fast.domain.randn(2), fast.range.randn(2)
    torch.testing.assert_close(fast(x), reference(x), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(fast.adjoint(y), reference.adjoint(y), atol=1e-12, rtol=1e-12)


def bowl(op: operators.ConeBeamCT, centre: tuple[float, ...], radius: float) -> tuple[np.ndarray, np.ndarray]:
    """Density ``1 - r^2 / radius^2`` in a ball, and its integrals, ``4 h^3 / 3 radius^2`` half chords ``h``."""
    z, y, x = (op.grid.coordinates(a) for a in range(3))
    square = (z[:, None, None] - centre[0]) ** 2 + (y[:, None] - centre[1]) ** 2 + (x - centre[2]) ** 2
    rows, columns = op.panel
    t, whole = op.angles[:, None, None], op.source_distance + op.detector_distance
    zero = 0 * t + 0 * rows[:, None] + 0 * columns
    source = np.stack([op.heights[:, None, None] + zero, -op.source_distance * np.cos(t) + zero,
                       op.source_distance * np.sin(t) + zero], -1)  # fmt: skip
    along = np.stack([rows[:, None] + zero, whole * np.cos(t) + columns * np.sin(t) + zero,
                      columns * np.cos(t) - whole * np.sin(t) + zero], -1)  # fmt: skip
    along = along / np.linalg.norm(along, axis=-1, keepdims=True)
    half = 0.5 * radius * phantoms.chord((source - np.array(centre)) / radius, along)
    return np.maximum(1 - square / radius**2, 0), 4 * half**3 / (3 * radius**2)


@pytest.mark.parametrize("pitch", [0.0, 12.0])
def test_line_integrals_of_a_volume(pitch):
    angles = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    op = operators.ConeBeamCT((1, 33, 41, 41), angles, spacing=0.8, pitch=pitch, **CONE)
    density, exact = bowl(op, (2.0, -3.0, 1.5), 10.0)
    found = op(torch.from_numpy(density)[None, None])[0, 0].numpy()
    assert np.linalg.norm(found - exact) < 0.01 * np.linalg.norm(exact)


@pytest.mark.parametrize("cover", [2 * math.pi, 4.2])
def test_feldkamp_returns_the_density_of_a_ball(cover):
    angles = np.linspace(0, cover, 90, endpoint=False)
    op = operators.ConeBeamCT((1, 21, 41, 41), angles, spacing=0.8, **CONE)
    density, exact = bowl(op, (1.0, -3.0, 1.5), 7.0)
    found = op.fbp(torch.from_numpy(exact)[None, None])[0, 0].numpy()
    inside = density > 0.3
    assert np.abs(found[inside] - density[inside]).mean() < 0.01
    assert abs(found[inside].sum() / density[inside].sum() - 1) < 0.01


def test_a_helix_has_no_fbp():
    op = operators.ConeBeamCT((3, 4, 4), [0.0, 1.0], pitch=1.0, **CONE)
    with pytest.raises(InvdiffError, match="helix"):
        op.fbp(op.range.zeros(1))


def test_bad_geometries():
    with pytest.raises(InvdiffError, match="inside the image"):
        operators.FanBeamCT((1, 64, 64), [0.0], source_distance=40, detector_distance=10)
    with pytest.raises(InvdiffError, match="at least 0"):
        operators.FanBeamCT((1, 64, 64), [0.0], source_distance=100, detector_distance=-1)
    with pytest.raises(InvdiffError, match=r"at least the axes \(z, y, x\)"):
        operators.ConeBeamCT((64, 64), [0.0], **CONE)
    with pytest.raises(InvdiffError, match="pitch"):
        operators.ConeBeamCT((3, 4, 4), [0.0], pitch=math.nan, **CONE)
    with pytest.warns(UserWarning, match="truncated=True"):
        operators.FanBeamCT((1, 64, 64), [0.0], detectors=40, **FAN)
    with pytest.warns(UserWarning, match="truncated=True"):
        operators.ConeBeamCT((4, 64, 64), [0.0], detectors=(4, 40), **CONE)


def test_volumes_are_matrix_free_unless_small(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # no numba
    assert operators.ConeBeamCT((96, 96, 96), np.linspace(0, 6, 90), **CONE).method == "matrix-free"
    assert operators.ConeBeamCT((4, 5, 6), np.arange(6), **CONE).method == "table"
