"""Plane-wave ultrasound: closed-form echoes, delay-and-sum, the stated error, blocks and tables, refusals."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
import torch
from scipy import signal

from invdiff import operators
from invdiff.errors import InvdiffError
from invdiff.operators import _delays, _table, envelope, ultrasound
from invdiff.spaces import Space
from invdiff.tensors import tensor_digest

C, F0 = 1540.0, 5e6
ELEMENTS = (np.arange(12) - 5.5) * 3e-4
ANGLES = np.deg2rad([-10.0, 0.0, 15.0])
WAVELENGTH = C / F0


def make(shape=(1, 20, 16), angles=ANGLES, elements=ELEMENTS, **options) -> operators.PlaneWaveUltrasound:
    given = {"sampling_frequency": 25e6, "centre_frequency": F0, "spacing": 2e-4, "depth": 3e-3}
    return operators.PlaneWaveUltrasound(shape, angles, elements, **{**given, "dtype": torch.float64, **options})


def delays(op: operators.PlaneWaveUltrasound, extra: np.ndarray | float = 0.0) -> np.ndarray:
    """``tau[a, e, z, x]`` from the pixels' coordinates, written out once more."""
    nz, nx = op.domain.shape[-2:]
    step = [op.domain.spacing[n] for n in op.domain.dims[-2:]]
    z = (3e-3 + step[0] * np.arange(nz))[:, None]
    x = (step[1] * (np.arange(nx) - (nx - 1) / 2))[None]
    a, e = op.angles[:, None, None, None], op.elements[None, :, None, None]
    sent = (z * np.cos(a) + x * np.sin(a)) / C + np.reshape(extra, (-1, 1, 1, 1))
    return sent + np.sqrt(z**2 + (x - e) ** 2) / C


def exact(op: operators.PlaneWaveUltrasound, x: torch.Tensor, bandwidth: float = 0.6) -> np.ndarray:
    """The sum of pulses, as scipy draws them."""
    tau, out = delays(op), np.zeros(op.range.shape[1:])
    for i, j in np.argwhere(x[0, 0].numpy()):
        lag = op.times - tau[:, :, i, j, None]
        out += float(x[0, 0, i, j]) * signal.gausspulse(lag, fc=F0, bw=bandwidth, bwr=-6)
    return out


@pytest.mark.parametrize("delay", [0.0, np.array([1e-6, 0.0, -2e-7])], ids=["origin", "own"])
def test_a_point_arrives_at_the_closed_form_time_everywhere(delay):
    """On each angle and element, to 1/50 of a sample by a parabola through the logarithm of the envelope."""
    op = make(data="iq", transmit_delays=delay)
    x = op.domain.zeros(1)
    x[0, 0, 13, 3] = 1.0
    found = op(x)[0, 0].abs().log().numpy()
    k = np.clip(found.argmax(-1), 1, found.shape[-1] - 2)[..., None]
    left, top, right = (np.take_along_axis(found, k + o, -1)[..., 0] for o in (-1, 0, 1))
    peak = op.start + (k[..., 0] + 0.5 * (left - right) / (left - 2 * top + right)) / 25e6
    np.testing.assert_allclose(peak, delays(op, delay)[:, :, 13, 3], atol=0.02 / 25e6)
    assert np.ptp(peak) > 10 / 25e6


@pytest.mark.parametrize("rate", [15e6, 25e6, 50e6])
def test_interpolation_error_is_the_stated_one(rate):
    """Random scatterers against exact delays: within 30 % of ``0.032 / (s fs)^2`` at every rate."""
    op = make(sampling_frequency=rate, samples=round(12e-6 * rate))
    x = op.domain.randn(1)
    sum_of_pulses = exact(op, x)
    error = np.linalg.norm(op(x)[0, 0].numpy() - sum_of_pulses) / np.linalg.norm(sum_of_pulses)
    assert error == pytest.approx(op.interpolation_error, rel=0.3)
    assert op.interpolation_error == pytest.approx(0.0323 / (op.pulse_std * rate) ** 2, rel=1e-2)


def test_the_window_cuts_pulses_and_loses_none():
    """Samples that start and stop amid echoes hold what the same samples of a longer record hold."""
    whole = make(bandwidth=0.4)
    part = make(bandwidth=0.4, start=120 / 25e6, samples=50)
    x = whole.domain.randn(2)
    torch.testing.assert_close(part(x), whole(x)[..., 120:170], atol=1e-6, rtol=0)
    assert part(x).abs().max() > 1


def test_rf_is_the_real_part_of_modulated_iq():
    rf, iq = make(), make(data="iq")
    x = rf.domain.randn(2)
    carrier = torch.from_numpy(np.exp(2j * np.pi * F0 * rf.times))
    torch.testing.assert_close((iq(x) * carrier).real, rf(x))
    complex_ = make(data="iq", dtype=torch.complex128)
    torch.testing.assert_close(complex_(torch.complex(x, 2 * x)), (1 + 2j) * iq(x))


def test_adjoint_is_delay_and_sum_with_the_matched_pulse():
    op = make(sampling_frequency=100e6)
    y = torch.zeros(1, *op.range.shape, dtype=torch.float64)
    y[0, 0, 1, 4] = torch.from_numpy(np.random.default_rng(0).standard_normal(op.range.shape[-1]))
    lag = op.times - delays(op)[1, 4][..., None]
    expected = (signal.gausspulse(lag, fc=F0, bw=0.6, bwr=-6) * y[0, 0, 1, 4].numpy()).sum(-1)
    found = op.adjoint(y)[0, 0].numpy()
    assert np.linalg.norm(found - expected) < 3 * op.interpolation_error * np.linalg.norm(expected)


@pytest.mark.parametrize("data", ["rf", "iq"])
def test_images_of_a_point(data):
    """Delay-and-sum peaks there; widths at -6 dB are 1.21 lambda F across and that of the pulse in depth."""
    dtype = torch.float64 if data == "rf" else torch.complex128
    elements = (np.arange(128) - 63.5) * 1.5e-4
    op = make(
        (1, 64, 65),
        [0.0],
        elements,
        data=data,
        dtype=dtype,
        spacing={"z": 4e-5, "x": 4e-5},
        depth=1e-2,
        f_number=1.5,
    )
    x = op.domain.zeros(1)
    x[0, 0, 32, 32] = 1.0
    image = envelope(op.adjoint(op(x)))[0, 0].numpy()
    assert np.unravel_index(image.argmax(), image.shape) == (32, 32)

    def width(profile):
        above = np.flatnonzero(profile >= profile.max() / 2)
        first, last = above[0], above[-1]
        left = (profile[first] - profile.max() / 2) / (profile[first] - profile[first - 1])
        right = (profile[last] - profile.max() / 2) / (profile[last] - profile[last + 1])
        return (last - first + left + right) * 4e-5

    pulse = math.sqrt(8 * math.log(2)) * math.sqrt(2) * op.pulse_std * C / 2  # its autocorrelation, there and back
    assert width(image[32]) == pytest.approx(1.21 * WAVELENGTH * 1.5, rel=0.1)
    assert width(image[:, 32]) == pytest.approx(pulse, rel=0.1)


def test_weights_of_the_aperture_and_of_wide_elements():
    plain, op = make(), make(f_number=1.0, element_width=2.5e-4)
    x = plain.domain.zeros(1)
    x[0, 0, 5, 3] = 1.0
    z, across = 3e-3 + 5 * 2e-4, (3 - 7.5) * 2e-4 - ELEMENTS
    sine = across / np.hypot(z, across)
    weights = np.sinc(2.5e-4 / WAVELENGTH * sine) * np.sqrt(1 - sine**2) * (np.abs(across) <= z / 2)
    assert 0 < (weights == 0).sum() < 12
    expected = plain(x)[0, 0] * torch.from_numpy(weights)[:, None]
    torch.testing.assert_close(op(x)[0, 0], expected, atol=1e-12, rtol=1e-12)
    touching = make(depth=0.0, element_width=2e-4, elements=[1e-4], spacing=2e-4)  # a pixel on the element
    assert torch.isfinite(touching(touching.domain.randn(1))).all()


def test_space_of_other_units_and_names():
    space = Space((1, 20, 16), torch.float64, spacing={"y": 0.2, "x": 0.2}, spacing_units="mm")
    op = make(space, spacing=None)
    x = op.domain.randn(1)
    torch.testing.assert_close(op(x), make()(x))
    torch.testing.assert_close(make(space, spacing={"y": 2e-4})(x), make()(x))
    assert op.range.dims == ("channel", "angle", "element", "time")
    assert op.range.spacing["time"] == 1 / 25e6 and op.range.spacing_units == "s"


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("implementation", ["table", "compiled", "plain"])
def test_implementations_and_blocks_change_nothing(monkeypatch, dtype, implementation):
    """A table built at once against tables and sums on the fly, five elements and two rows at a time."""
    given = {"data": "iq", "dtype": dtype, "f_number": 0.7, "start": 4e-6, "samples": 60}
    op = make(method="table", **given)
    x, y = op.domain.randn(5), op.range.randn(5)
    forward, back = op(x), op.adjoint(y)
    assert torch.count_nonzero(forward) > 1000
    monkeypatch.setattr(_delays, "_ENTRIES", 5 * 320)
    monkeypatch.setattr(ultrasound, "_AT_WORK", 2 * 12 * op._padded)
    monkeypatch.setattr(ultrasound, "is_compiled", lambda device: implementation == "compiled")
    other = make(method="table" if implementation == "table" else "matrix-free", **given)
    if implementation == "table":
        monkeypatch.setattr(_table, "TABLES", _table.TableCache())
    torch.testing.assert_close(other(x), forward)
    torch.testing.assert_close(other.adjoint(y), back)


def test_sums_do_not_depend_on_threads(in_threads):
    op = make(method="matrix-free", dtype=torch.float32)
    x, y = op.domain.randn(2), op.range.randn(2)
    one, three = (in_threads(count, lambda: (op(x), op.adjoint(y))) for count in (1, 3))
    assert torch.equal(one[0], three[0]) and torch.equal(one[1], three[1])


def test_tables_are_shared_bounded_and_no_state():
    op, same, other = make(), make(), make(elements=ELEMENTS + 1e-5)
    before, pickled = tensor_digest(op), pickle.dumps(op)
    table = op._table()
    assert same._table() is table and other._table() is not table
    assert tensor_digest(op) == before and len(pickle.dumps(op)) == len(pickled)
    assert op.describe()["sha256"] != other.describe()["sha256"]
    pixels = 20 * 16
    bound = _delays.table_bytes(3, 12, pixels, 8)
    assert 0.5 * bound < table.nbytes < 1.1 * bound
    assert (
        make(max_table_bytes=bound).method == "table" and make(max_table_bytes=bound - 1).method == "matrix-free"
    )


def test_single_precision_keeps_the_phase():
    """Delays of a hundred carrier periods are reckoned in double precision."""
    fine, coarse = make(depth=3e-2), make(depth=3e-2, dtype=torch.float32)
    x = fine.domain.randn(1)
    assert float((coarse(x) - fine(x)).norm() / fine(x).norm()) < 2e-6


@pytest.mark.parametrize("n", [31, 32])
def test_envelope_against_scipy(n):
    image = torch.randn(2, 1, n, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    np.testing.assert_allclose(envelope(image), np.abs(signal.hilbert(image.numpy(), axis=-2)), atol=1e-12)
    assert envelope(image[:0]).shape == (0, 1, n, 5)


BAD = {
    "angles-degrees": ({"angles": [-10.0, 10.0]}, "numpy.deg2rad"),
    "angles-none": ({"angles": []}, "at least one angle"),
    "elements-empty": ({"elements": []}, "give at least one, in metres"),
    "elements-rank": ({"elements": np.zeros((3, 2))}, "positions of the elements"),
    "elements-nan": ({"elements": [0.0, float("nan")]}, "NaN"),
    "rate-slow": ({"sampling_frequency": 12e6}, "below the 1.3e"),
    "rate-of-iq": ({"sampling_frequency": 5e6, "data": "iq"}, "below the 6e"),
    "rate-zero": ({"sampling_frequency": 0.0}, "sampling frequency"),
    "frequency": ({"centre_frequency": -1.0}, "centre frequency"),
    "bandwidth": ({"bandwidth": 60.0}, "fraction of the centre frequency"),
    "speed": ({"sound_speed": 0.0}, "speed of sound"),
    "samples": ({"samples": 0}, "number of samples"),
    "millimetres": ({"spacing": 0.2, "depth": 3e3}, "lengths are in metres"),
    "late": ({"start": 1.0, "samples": 100}, "Echoes arrive from"),
    "early": ({"start": -1.0, "samples": 100}, "Echoes arrive from"),
    "start": ({"start": float("nan")}, "time of the first sample"),
    "delays": ({"transmit_delays": [0.0, 1.0]}, "one for 3 angles"),
    "depth": ({"depth": -1e-3}, "depth of the first row"),
    "lateral": ({"lateral": float("inf")}, "lateral position"),
    "spacing": ({"spacing": 0.0}, "spacing along z"),
    "spacing-missing": ({"spacing": {"z": 1e-4}}, "size of the pixels along x is missing"),
    "spacing-units": ({"shape": Space((4, 4), spacing={"y": 1, "x": 1}, spacing_units="px")}, "in 'px'"),
    "axes": ({"shape": (5,)}, "at least the axes"),
    "data": ({"data": "raw"}, "'rf', 'iq'"),
    "complex-rf": ({"dtype": torch.complex64}, "give a real dtype, or data='iq'"),
    "f-number": ({"f_number": 0.0}, "f-number"),
    "width": ({"element_width": -1.0}, "width of the elements"),
    "method": ({"method": "fast"}, "matrix-free"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name):
    options, message = BAD[name]
    with pytest.raises(InvdiffError, match=message):
        make(**options)


def test_steep_angles_draw_a_warning():
    with pytest.warns(UserWarning, match="taken in radians"):
        make(angles=[0.0, 1.0])
