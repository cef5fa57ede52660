"""Fourier sums off the grid: accuracy, units, trajectories and densities, off-resonance, other people's code."""

import math
import warnings

import numpy as np
import pytest
import torch

from invdiff import operators
from invdiff.errors import InvdiffError
from invdiff.operators import nufft, trajectories
from invdiff.operators.nufft import Nufft
from invdiff.testing import dense_matrix

C = torch.complex128


def points(shape, count, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (torch.rand(count, len(shape), generator=g, dtype=torch.float64) - 0.5) * torch.tensor(shape)


def randn(*shape, seed=0, dtype=C):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def relative(a, b):
    return float((a - b).norm() / b.norm())


def maps(*shape, seed=1):
    return randn(*shape, seed=seed)


# ---- the sums ----


def test_reference_is_the_definition():
    k, x = points((5, 4), 7), randn(2, 5, 4)
    y = torch.zeros(2, 7, dtype=C)
    for j in range(7):
        for a in range(5):
            for b in range(4):
                turns = k[j, 0] * (a - 2) / 5 + k[j, 1] * (b - 2) / 4
                y[:, j] += x[:, a, b] * torch.exp(-2j * math.pi * turns)
    torch.testing.assert_close(Nufft(k, (5, 4), method="reference").forward(x), y, atol=1e-12, rtol=0)


@pytest.mark.parametrize("accuracy", [1e-1, 1e-2, 1e-3, 1e-4, 1e-6, 1e-9, 1e-12])
@pytest.mark.parametrize("shape", [(24,), (16, 15), (8, 7, 6), (1, 5)])
@pytest.mark.parametrize("method", ["gridding", "finufft"])
def test_accuracy_is_kept(method, shape, accuracy):
    if method == "finufft":
        pytest.importorskip("finufft")
    k = points(shape, 200)
    exact, fast = Nufft(k, shape, method="reference"), Nufft(k, shape, accuracy, method)
    x, y = randn(3, *shape), randn(3, 200, seed=1)
    # finufft promises its tolerance up to a factor that it calls typical
    bound = (2 if method == "gridding" else 4) * accuracy
    assert relative(fast.forward(x), exact.forward(x)) < bound
    assert relative(fast.adjoint(y), exact.adjoint(y)) < bound
    left, right = (fast.forward(x).conj() * y).sum(), (x.conj() * fast.adjoint(y)).sum()
    assert abs(left - right) < 1e-10 * abs(left)


def test_single_precision_reaches_its_rounding():
    k, x = points((16, 15), 100), randn(2, 16, 15)
    out = Nufft(k, (16, 15), 1e-6, "gridding").forward(x.to(torch.complex64))
    assert out.dtype == torch.complex64 and relative(out, Nufft(k, (16, 15), method="reference").forward(x)) < 3e-6


def test_the_kernel_narrows_where_less_accuracy_is_asked():
    widths = [Nufft(points((64, 64), 5000), (64, 64), a).grid.width for a in (1e-1, 1e-3, 1e-6)]
    assert widths == sorted(widths) and widths[0] < widths[2]


def test_tables_are_shared_by_content_and_bounded(monkeypatch):
    nufft.TABLES.clear()
    k, x = points((8, 8), 50), randn(1, 8, 8)
    first = Nufft(k, (8, 8), method="gridding")
    first.forward(x)
    Nufft(k.clone(), (8, 8), method="gridding").adjoint(randn(1, 50))
    assert len(nufft.TABLES) == 1
    size = nufft.table_bytes(50, first.grid, C)
    monkeypatch.setattr(nufft, "TABLE_BYTES", int(2.5 * size))
    for seed in range(1, 5):
        Nufft(points((8, 8), 50, seed), (8, 8), method="gridding").forward(x)
    assert len(nufft.TABLES) == 2
    before = first.forward(x)
    monkeypatch.setattr(nufft, "TABLE_BYTES", 10)
    with pytest.raises(InvdiffError, match="gridding table"):
        Nufft(k, (8, 8), method="gridding")
    torch.testing.assert_close(first.forward(x), before)  # too large to keep, and still right
    nufft.TABLES.clear()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Nufft(points((8, 8), 5), (8,)), r"expected \(samples, 1\)"),
        (lambda: Nufft(points((8, 8), 5), (8, 8), method="magic"), "choose one of auto, gridding"),
        (lambda: Nufft(points((8, 8), 5), (8, 8), accuracy=0.0), "between 1e-13 and 1"),
    ],
)
def test_bad_transforms(make, words):
    with pytest.raises(InvdiffError, match=words):
        make()


# ---- operators ----


def test_on_the_grid_it_is_cartesian():
    mask = torch.rand(6, 5, generator=torch.Generator().manual_seed(0)) < 0.6
    on, off = (
        operators.MultiCoilMRI(mask, maps(3, 6, 5)),
        operators.NonCartesianMRI(trajectories.cartesian(mask), maps(3, 6, 5), accuracy=1e-12),
    )
    x = on.domain.randn(2)
    torch.testing.assert_close(off(x), on(x)[:, :, mask], atol=1e-11, rtol=0)


def test_against_sigpy():
    import sigpy.mri

    k, s = trajectories.radial(24, 11), maps(3, 24, 24)
    op = operators.NonCartesianMRI(k, s, accuracy=1e-6)
    theirs = sigpy.mri.linop.Sense(s.numpy(), coord=k.numpy())
    x, y = op.domain.randn(1), op.range.randn(1, 1)
    assert op.range.dims == ("coil", "interleaf", "sample")
    # their kernel has an error of 7e-3
    assert relative(op(x)[0], torch.from_numpy(theirs(x[0, 0].numpy()))) < 1e-2
    assert relative(op.adjoint(y)[0, 0], torch.from_numpy(theirs.H(y[0].numpy()))) < 1e-2


def test_methods_agree_and_radians_are_cycles():
    k, s = trajectories.spiral(17, 3, 60), maps(2, 17, 17)
    ops = [operators.NonCartesianMRI(k, s, method=m, accuracy=1e-9) for m in ("gridding", "reference")]
    ops.append(
        operators.NonCartesianMRI(
            k * (2 * math.pi / 17), s, trajectory_units="radians", accuracy=1e-9, normal="toeplitz"
        )
    )
    x = ops[0].domain.randn(2)
    for op in ops[1:]:
        assert relative(op(x), ops[0](x)) < 1e-8
        assert relative(op.normal(x), ops[0].normal(x)) < 1e-8


def test_toeplitz_is_the_exact_sum_where_the_pair_is_not():
    k, s = trajectories.radial(20, 9), maps(2, 20, 20)
    exact = operators.NonCartesianMRI(k, s, method="reference")
    x = exact.domain.randn(1)
    loose = {"accuracy": 1e-2, "method": "gridding"}
    assert relative(operators.NonCartesianMRI(k, s, normal="toeplitz", **loose).normal(x), exact.normal(x)) < 1e-11
    assert 1e-4 < relative(operators.NonCartesianMRI(k, s, **loose).normal(x), exact.normal(x)) < 2e-2


def test_off_resonance_against_the_exact_phase():
    k = trajectories.spiral(9, 2, 40)
    field, times = 150 * randn(9, 8, dtype=torch.float64), torch.linspace(0, 5e-3, 40)
    k = k * 8 / 9
    for accuracy in (1e-2, 1e-4):
        op = operators.NonCartesianMRI(
            k, maps(2, 9, 8), off_resonance=operators.OffResonance(field, times), accuracy=accuracy
        )
        x = op.domain.randn(1)
        yy, xx = (torch.arange(n, dtype=torch.float64) - n // 2 for n in (9, 8))
        turns = k[..., 0, None, None] * yy[:, None] / 9 + k[..., 1, None, None] * xx / 8
        turns = turns + field * times.double()[:, None, None]
        exact = torch.einsum("cyx,lsyx->cls", maps(2, 9, 8) * x[0, 0], torch.exp(-2j * math.pi * turns))
        assert relative(op(x)[0], exact / math.sqrt(72)) < 2 * accuracy
    assert torch.equal(op.to(dtype=torch.float32)(x).isfinite(), torch.ones_like(op(x), dtype=torch.bool))


def test_visibilities_are_their_definition():
    uv = 400 * randn(30, 2, dtype=torch.float64).tanh()
    op = operators.RadioInterferometry(uv, (6, 5), 1e-3, dtype=torch.float64, accuracy=1e-10)
    x = op.domain.randn(1)
    l, m = (torch.arange(5) - 2) * 1e-3, (torch.arange(6) - 3) * 1e-3
    turns = uv[:, 0, None, None] * l + uv[:, 1, None, None] * m[:, None]
    expected = (x[0, 0] * torch.exp(-2j * math.pi * turns)).sum((1, 2))
    assert relative(op(x)[0], expected) < 1e-6  # l and m above are in single precision
    assert op.range.units == "Jy" and dense_matrix(op).shape == (60, 30)


def test_what_is_derived_is_no_state():
    import pickle

    op = operators.NonCartesianMRI(trajectories.radial(8, 3), maps(2, 8, 8), normal="toeplitz")
    x, pickled, described = op.domain.randn(1), pickle.dumps(op), op.describe()
    out = op.normal(x), op(x)
    assert len(pickle.dumps(op)) == len(pickled) and op.describe() == described
    torch.testing.assert_close(pickle.loads(pickled)(x), out[1])
    assert operators.NonCartesianMRI(trajectories.radial(8, 4), maps(2, 8, 8)).describe() != described


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: operators.NonCartesianMRI(torch.zeros(5), maps(1, 8, 8)), "expected real"),
        (lambda: operators.NonCartesianMRI(points((8, 8), 5), maps(8, 8)), r"expected \(coil, y, x\)"),
        (lambda: operators.NonCartesianMRI(points((8, 8), 5), 0 * maps(1, 8, 8)), "zero everywhere"),
        (
            lambda: operators.NonCartesianMRI(points((9, 12), 50), maps(1, 9, 10)),
            r"reaches 5\.\d+ cycles per field of view along x, and 10 pixels resolve 5; use at least 1[12] pixels",
        ),
        (lambda: operators.NonCartesianMRI(points((8, 8), 5), maps(1, 8, 8), trajectory_units="1/m"), "not '1/m'"),
        (lambda: operators.NonCartesianMRI(points((8, 8), 5), maps(1, 8, 8), normal="fast"), "'fast'; choose"),
        (lambda: operators.NonCartesianMRI(points((8, 8), 5), maps(1, 8, 8), density=torch.ones(4)), "density"),
        (
            lambda: operators.NonCartesianMRI(
                points((8, 8), 5), maps(1, 8, 8), off_resonance=operators.OffResonance(torch.ones(8, 7), [0.0] * 5)
            ),
            r"field has shape \(8, 7\)",
        ),
        (
            lambda: operators.NonCartesianMRI(
                points((8, 8), 5), maps(1, 8, 8), off_resonance=operators.OffResonance(torch.ones(8, 8), [0.0] * 4)
            ),
            r"times have shape \(4,\)",
        ),
        (
            lambda: operators.NonCartesianMRI(
                points((8, 8), 200),
                maps(1, 12, 12),
                off_resonance=operators.OffResonance(1e6 * randn(12, 12).real, torch.arange(200.0)),
            ),
            "seconds",
        ),
        (lambda: operators.RadioInterferometry(points((8, 8), 5), (8, 8), 1.0), "use pixels of at most"),
        (lambda: operators.RadioInterferometry(points((8, 8), 5), (8, 8), 0.0), "must be positive"),
    ],
)
def test_bad_input_gets_one_sentence(make, words):
    with pytest.raises(InvdiffError, match=words) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_radians_taken_for_cycles_are_noticed():
    k = trajectories.radial(32, 5) * (2 * math.pi / 32)
    with pytest.warns(UserWarning, match=r"reaches 3.14 of 16 cycles.*radians"):
        operators.NonCartesianMRI(k, maps(1, 32, 32))


# ---- trajectories and densities ----


def phantom(n):
    y, x = torch.meshgrid(torch.arange(n) - n / 2, torch.arange(n) - n / 2, indexing="ij")
    image = ((y**2 + x**2) < (0.3 * n) ** 2).double() + 0.5 * (((y - 5) ** 2 + x**2) < 60)
    smooth = torch.fft.ifftshift(torch.exp(-(y**2 + x**2) / (0.3 * n) ** 2))
    return torch.fft.ifft2(torch.fft.fft2(image) * smooth).real.to(C)


@pytest.mark.parametrize(
    ("k", "density", "bound"),
    [
        (trajectories.radial(64, 101, 128), trajectories.ramp, 0.05),
        (trajectories.radial(64, 101, 128, golden=True), trajectories.ramp, 0.05),
        (trajectories.radial(64, 101, 128), None, 0.05),
        (trajectories.spiral(64, 16, 400), None, 0.03),
        (trajectories.epi((64, 64), shots=4), lambda k: torch.ones(k.shape[:-1]), 1e-3),
    ],
    ids=["radial-ramp", "golden-ramp", "radial", "spiral", "epi"],
)
def test_full_sampling_with_its_density_gives_the_image(k, density, bound):
    weights = None if density is None else density(k)
    op = operators.NonCartesianMRI(k, torch.ones(1, 64, 64, dtype=C), density=weights)
    image = phantom(64)
    assert relative(op.gridded(op(image[None, None]))[0, 0], image) < bound
    if density is trajectories.ramp:
        assert float(weights.sum()) == pytest.approx(math.pi * 32**2, rel=1e-3)
        found = trajectories.pipe_menon(k, (64, 64))
        assert float((found - weights)[:, 8:-8].abs().mean() / weights.mean()) < 0.12


def test_trajectories_are_what_they_say():
    k = trajectories.radial(10, 3)
    assert k.shape == (3, 20, 2) and torch.equal(k[:, 10], torch.zeros(3, 2).double())
    np.testing.assert_allclose(k[0, 0], [0, -5])
    angles = torch.atan2(*trajectories.radial(10, 3, golden=True)[:, -1].unbind(-1)).rad2deg() % 180
    np.testing.assert_allclose((angles[1] - angles[0]) % 180, 111.246, atol=1e-3)
    s = trajectories.spiral(64, 16, 400)
    steps = (s[:, 1:] - s[:, :-1]).norm(dim=-1)
    assert float(s.norm(dim=-1).max()) == pytest.approx(32) and float(steps.max() / steps.min()) < 1.1
    e = trajectories.epi((6, 4), shots=2, acceleration=1)
    assert e.shape == (2, 12, 2) and e[0, :5, 0].tolist() == [-3, -3, -3, -3, -1]
    assert e[0, :8, 1].tolist() == [-2, -1, 0, 1, 1, 0, -1, -2]
    for wrong in (lambda: trajectories.radial(0, 3), lambda: trajectories.epi((2, 2), shots=3)):
        with pytest.raises(InvdiffError):
            wrong()
    with pytest.raises(InvdiffError, match="needs spokes"):
        trajectories.ramp(torch.zeros(4, 2))


def test_nothing_warns_on_import():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Nufft(points((4, 4), 3), (4, 4), method="gridding").forward(randn(1, 4, 4))
