"""From counts to line integrals: flat fields, dead pixels, rings, axis of rotation; counts as they are."""

from __future__ import annotations

import dataclasses
import math

import h5py
import numpy as np
import pytest
import torch

import invdiff
from invdiff import ct, likelihoods, operators, priors, reference
from invdiff.errors import InvdiffError
from invdiff.rng import Streams
from tests.unit import phantoms

ANGLES = np.linspace(0, np.pi, 90, endpoint=False)


def sinogram(centre: float, detectors: int = 96) -> np.ndarray:
    """Line integrals of three discs; the largest is off the axis."""
    s = (np.arange(detectors) - centre)[None]
    out = 0.0
    for x, y, radius, value in ((6, -9, 18.0, 0.02), (-14, 10, 8.0, 0.05), (16, 12, 4.0, 0.1)):
        t = s - (x * np.cos(ANGLES) + y * np.sin(ANGLES))[:, None]
        out = out + 2 * value * np.sqrt(np.maximum(radius**2 - t**2, 0))
    return out


def scan(z: np.ndarray, seed: int = 0) -> ct.Scan:
    rng = np.random.default_rng(seed)
    detectors = z.shape[1]
    gain, dark = rng.uniform(2e4, 4e4, (1, detectors)), rng.uniform(50, 150, (1, detectors))
    data = gain[None] * np.exp(-z[:, None]) + dark
    white, darks = (np.broadcast_to(v, (5, 1, detectors)) for v in (gain + dark, dark))
    return ct.Scan(data, white, darks, ANGLES)


def test_line_integrals_undo_the_detector():
    z = sinogram(46.3)
    np.testing.assert_allclose(ct.line_integrals(scan(z))[:, 0], z, atol=1e-5)


def test_dead_pixels_leave_no_rings():
    z = sinogram(46.3)
    s = scan(z)
    data, white = s.data.copy(), s.white.copy()
    white[:, :, 40] = data[:, :, 40] = s.dark[0, 0, 40]
    data[7, 0, 55] = np.nan
    found = ct.line_integrals(dataclasses.replace(s, data=data, white=white))[:, 0]
    gap = np.abs(found - z)
    assert gap.max() < 0.2 * z.max() and gap[:, 40].mean() < 0.05 * z[:, 40].mean()  # edges, and all else
    assert np.delete(gap, [40, 55], 1).max() < 1e-5
    with pytest.raises(InvdiffError, match="swapped"):
        ct.line_integrals(dataclasses.replace(s, white=s.dark, dark=s.white))
    with pytest.raises(InvdiffError, match="View 3 holds no finite"):
        ct.transmission(dataclasses.replace(s, data=np.where(np.arange(90)[:, None, None] == 3, np.nan, s.data)))


def test_drifts_of_the_source_are_taken_out():
    z = sinogram(46.3)
    s = scan(z)
    drift = (1 + 0.1 * np.sin(ANGLES))[:, None, None] * np.linspace(0.95, 1.05, z.shape[1])
    moved = dataclasses.replace(s, data=(s.data - s.dark[0]) * drift + s.dark[0])
    assert np.abs(ct.line_integrals(moved)[:, 0] - z).max() > 0.05
    assert np.abs(ct.line_integrals(moved, air=8)[:, 0] - z).max() < 0.006
    with pytest.raises(InvdiffError, match="air = 48"):
        ct.line_integrals(s, air=48)


def test_opaque_objects_are_clipped():
    s = scan(sinogram(46.3) * 20)
    assert ct.line_integrals(s, floor=1e-3).max() == pytest.approx(-math.log(1e-3))
    with pytest.raises(InvdiffError, match="between 0 and 1"):
        ct.line_integrals(s, floor=0)


def test_rings():
    s = np.arange(96) - 46.3 - 2 * np.cos(ANGLES)[:, None]
    z = 0.04 * np.sqrt(np.maximum(35.0**2 - s**2, 0))
    stripes = np.zeros(96)
    stripes[[5, 33, 60]] = 0.05, -0.08, 0.1
    found = ct.suppress_rings(z + stripes)
    left = np.abs(found - z).max(0)
    assert left[[5, 33, 60]].max() < 0.025
    assert np.linalg.norm(found - z) < 0.6 * np.linalg.norm(np.broadcast_to(stripes, z.shape))
    with pytest.raises(InvdiffError, match="odd"):
        ct.suppress_rings(z, 8)


@pytest.mark.parametrize("centre", [44.0, 46.3, 47.5, 52.81])
@pytest.mark.parametrize("turn", ["half", "with its end", "whole", "shuffled"])
def test_axis_of_rotation(centre, turn):
    angles, z = ANGLES, sinogram(centre)
    if turn != "half":
        angles, z = np.concatenate([ANGLES, ANGLES + np.pi]), np.concatenate([z, sinogram_turned(centre)])
    if turn == "with its end":
        angles, z = angles[:91], z[:91]
    if turn == "shuffled":
        order = np.random.default_rng(0).permutation(90)
        angles, z = ANGLES[order], sinogram(centre)[order]
    z = z + 0.01 * np.random.default_rng(1).standard_normal(z.shape)
    assert abs(ct.find_centre(z, angles) - centre) < 0.25


def sinogram_turned(centre: float) -> np.ndarray:
    """The same object half a turn later: its mirror image about the axis."""
    return sinogram(95 - centre)[:, ::-1]


def test_axis_of_rotation_needs_half_a_turn():
    with pytest.raises(InvdiffError, match="cover 88 degrees"):
        ct.find_centre(sinogram(46.3)[:45], ANGLES[:45])
    with pytest.raises(InvdiffError, match=r"expected \(view, detector\)"):
        ct.find_centre(sinogram(46.3)[None], ANGLES)


# ---- files ----


def write(path, **changes):
    s = scan(sinogram(46.3))
    arrays = {"data": s.data, "data_white": s.white, "data_dark": s.dark, "theta": np.rad2deg(s.angles)} | changes
    with h5py.File(path, "w") as h5:
        for name, values in arrays.items():
            if values is not None:
                h5.create_dataset(f"exchange/{name}", data=values)
    return path


def test_reading_a_scan(tmp_path):
    s = ct.read_scan(write(tmp_path / "scan.h5"))
    np.testing.assert_allclose(s.angles, ANGLES)
    assert s.data.shape == (90, 1, 96) and s.white.shape == (5, 1, 96) and "90 views" in s.source
    with h5py.File(tmp_path / "scan.h5", "a") as h5:
        h5["exchange/theta"][...] = ANGLES
        h5["exchange/theta"].attrs["units"] = "radians"
    np.testing.assert_allclose(ct.read_scan(tmp_path / "scan.h5", row=0).angles, ANGLES)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"data_white": None}, "holds no 'exchange/data_white'"),
        ({"theta": np.zeros(7)}, "90 views and 7 angles"),
        ({"data_dark": np.zeros((5, 1, 95))}, "another size"),
        ({"data": np.zeros((90, 96))}, r"expected \(view, row, detector\)"),
        ({"data": np.zeros((90, 1, 96), dtype=complex)}, "expected real numbers"),
    ],
)
def test_incomplete_scans_are_refused(tmp_path, changes, match):
    with pytest.raises(InvdiffError, match=match):
        ct.read_scan(write(tmp_path / "scan.h5", **changes))


def test_rows_that_are_not_there_and_unsafe_files(tmp_path):
    path = write(tmp_path / "scan.h5")
    with pytest.raises(InvdiffError, match="has 1 detector rows, and row 1"):
        ct.read_scan(path, row=1)
    with h5py.File(path, "a") as h5:
        del h5["exchange/theta"]
        h5["exchange/theta"] = h5py.ExternalLink("/etc/passwd", "theta")
    with pytest.raises(InvdiffError, match="external link"):
        ct.read_scan(path)


# ---- the real scan ----


def test_axis_of_the_tooth(tooth):
    """The published position is 295.7."""
    assert abs(ct.find_centre(ct.line_integrals(tooth)[:, 0], tooth.angles) - 295.7) < 0.5


def test_the_tooth_is_sharp_and_consistent_with_its_data_about_its_axis(tooth):
    y = torch.from_numpy(ct.line_integrals(tooth, air=20)[None, :, 0])[None]
    error = {}
    for centre in (295.7, 298.7):
        op = operators.ParallelBeamCT(
            (1, 560, 560), tooth.angles, detectors=640, centre=centre, method="matrix-free"
        )
        error[centre] = float((op(op.fbp(y, "hann")) - y).norm() / y.norm())
    assert error[295.7] < 0.02 and error[298.7] > 1.2 * error[295.7]


# ---- counts ----


def test_surrogate_of_counts_in_the_log_domain():
    """Mean and spread of many draws are those of the surrogate."""
    i0, b, z = 5000.0, 40.0, torch.linspace(0, 3, 7).double()
    k = likelihoods.Poisson(background=b).sample(
        (i0 * torch.exp(-z)).repeat(4000, 1), Streams(0, [(0, i) for i in range(4000)])
    )
    found, noise = ct.log_data(k, i0, b)
    sigma = noise.gaussian_sigma(found)
    assert sigma is not None
    torch.testing.assert_close(found.mean(0), z, atol=0.006, rtol=0)
    torch.testing.assert_close(found.std(0), sigma.mean(0), rtol=0.06, atol=0)
    assert bool(torch.isfinite(ct.log_data(torch.zeros(1, 3), 10.0, 1.0)[0]).all())
    with pytest.raises(InvdiffError, match="negative"):
        ct.log_data(-torch.ones(1, 3), 10.0)
    with pytest.raises(InvdiffError, match="above 0"):
        ct.log_data(torch.ones(1, 3), 0.0)


def test_bad_intensities():
    for wrong in (0.0, -1.0, torch.ones(5), torch.ones(2, 2, 3, 4)):
        with pytest.raises(InvdiffError, match="intensity"):
            operators.BeerLambert((3, 4), wrong)
    assert operators.BeerLambert((3, 4), torch.ones(4) * 7)(torch.zeros(1, 3, 4)).max() == 7


def counted_scan(i0):
    prior = dataclasses.replace(priors.StationaryGaussian((12, 12), correlation_length=3.0), scale=0.02)
    image = 0.02 * phantoms.ball((12, 12), (1, 1), (0, 1), 4.0)[None, None]
    op = operators.ParallelBeamCT((1, 12, 12), ANGLES[::9], dtype=torch.float64)
    counts = likelihoods.Poisson().sample(i0 * torch.exp(-op(torch.from_numpy(image))), Streams(0, [(0, 0)]))
    problem = invdiff.Problem(operators.BeerLambert(op.range, i0) @ op, likelihoods.Poisson(), counts)
    y, noise = ct.log_data(counts, i0)
    return prior, torch.from_numpy(image), problem, invdiff.Problem(op, noise, y)


def test_counts_and_their_surrogate_have_the_same_score():
    """Same scan, as counts (nonlinear) and as weighted line integrals (linear)."""
    _, image, problem, linear = counted_scan(1e5)
    x = image + 0.002
    score = problem.operator.vjp(x, problem.likelihood.score(problem.operator(x), problem.y))
    surrogate = linear.operator.adjoint(linear.likelihood.score(linear.operator(x), linear.y))
    assert float((score - surrogate).norm() / score.norm()) < 0.1


@pytest.mark.parametrize(("name", "bias", "width"), [("eventguided", 0.3, (0.9, 1.4)), ("daps", 0.8, (0.8, 1.2))])
def test_samplers_of_nonlinear_problems_come_near_the_posterior_of_the_surrogate(name, bias, width):
    """With the plain exponential every one of them diverges, because iterates go where no object is."""
    prior, _, problem, linear = counted_scan(1e5)
    exact = reference.posterior(linear, prior)
    made = invdiff.sample(problem, prior, name, draws=32, seed=0, max_batch=32)
    mean, std = exact.mean()[0], exact.std()[0]
    off = (torch.from_numpy(np.asarray(made.mean())).reshape(mean.shape) - mean) / std
    assert float(off.square().mean().sqrt()) < bias
    assert width[0] < float(np.asarray(made.std()).mean() / std.mean()) < width[1]


def test_the_tangent_goes_on_smoothly_where_no_object_is():
    op = operators.BeerLambert((3,), 10.0, dtype=torch.float64)
    z = torch.tensor([[-1 - 1e-7, -1 + 1e-7, -3.0]], dtype=torch.float64)
    assert op(z)[0].tolist() == pytest.approx([10 * np.e, 10 * np.e, 30 * np.e], rel=1e-6)
    plain = operators.BeerLambert((3,), 10.0, dtype=torch.float64, tangent_below=-np.inf)
    assert plain(z)[0, 2] == pytest.approx(10 * np.exp(3))
    with pytest.raises(InvdiffError, match="at most 0"):
        operators.BeerLambert((3,), 10.0, tangent_below=1.0)
