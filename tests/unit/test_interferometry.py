"""Visibilities of many telescopes: files, averages, closures, and the problem that they make."""

import itertools

import numpy as np
import pytest
import torch

import invdiff
from invdiff import likelihoods, operators
from invdiff.errors import InvdiffError
from invdiff.interferometry import Visibilities
from invdiff.io.uvfits import read_uvfits
from invdiff.rng import Streams
from invdiff.spaces import Space


def observation(stations=5, times=3, sigma=0.01, seed=0):
    """Point-symmetric nonsense of amplitude one, all baselines at every time."""
    rng = np.random.default_rng(seed)
    pairs = np.array(list(itertools.combinations(range(stations), 2)))
    n = len(pairs) * times
    return Visibilities(
        np.repeat(1000.0 * np.arange(times), len(pairs)),
        np.tile(pairs, (times, 1)),
        rng.normal(size=(n, 2)) * 3e9,
        np.exp(1j * rng.uniform(0, 2 * np.pi, n)) * rng.uniform(0.5, 2, n),
        sigma * rng.uniform(0.5, 2, n),
        tuple("ABCDEFGH"[:stations]),
        "3C 0",
        230e9,
    )


def test_there_are_as_many_closures_as_stations_leave():
    """(n - 1)(n - 2) / 2 phases and n (n - 3) / 2 amplitudes per time are independent of station errors."""
    for n in (3, 4, 5, 7):
        data = observation(n, times=2).closures()
        assert len(data.phases) == 2 * (n - 1) * (n - 2) // 2
        assert len(data.amplitudes) == 2 * n * (n - 3) // 2
        for matrix in (data.phases, data.amplitudes):
            assert not len(matrix) or np.linalg.matrix_rank(matrix) == len(matrix)


def test_closures_do_not_see_errors_of_stations():
    seen = observation()
    rng = np.random.default_rng(1)
    gain = rng.uniform(0.3, 3, (5, 3)) * np.exp(1j * rng.uniform(0, 2 * np.pi, (5, 3)))
    moment = (seen.time / 1000).astype(int)
    factor = gain[seen.stations[:, 0], moment] * gain[seen.stations[:, 1], moment].conj()
    data = seen.closures()
    wrong = Visibilities(seen.time, seen.stations, seen.uv, seen.value * factor, seen.sigma * np.abs(factor))
    off = wrong.closures().values - data.values if np.array_equal(wrong.closures().phases, data.phases) else None
    space = Space((len(seen),), torch.complex128, ("baseline",))
    op = operators.Closures(space, data.phases, data.amplitudes)
    a, b = (op(torch.from_numpy(v)[None])[0].numpy() for v in (seen.value, wrong.value))
    turn = (a - b + np.pi) % (2 * np.pi) - np.pi
    assert np.abs(turn).max() < 1e-10 and np.abs(wrong.value - seen.value).max() > 1
    assert off is None or np.abs((off + np.pi) % (2 * np.pi) - np.pi).max() < 1e-10


def test_the_covariance_is_that_of_noise():
    seen = observation(sigma=0.005)
    data, rng = seen.closures(), np.random.default_rng(3)
    op = operators.Closures(Space((len(seen),), torch.complex128), data.phases, data.amplitudes)
    noise = rng.normal(size=(4000, len(seen), 2)) @ np.array([1, 1j]) * seen.sigma
    z = op(torch.from_numpy(seen.value + noise)).numpy()
    rest = z - op(torch.from_numpy(seen.value)[None]).numpy()
    rest = (rest + np.pi) % (2 * np.pi) - np.pi
    whitened = np.linalg.solve(np.linalg.cholesky(data.covariance), rest.T)
    assert np.abs(np.cov(whitened) - np.eye(len(whitened))).max() < 0.12  # sqrt(2 / 4000) is 0.022
    assert data.chi_squared(z) == pytest.approx({"phases": 1, "amplitudes": 1}, abs=0.05)


def test_averages_are_those_of_independent_noise():
    rng, n = np.random.default_rng(0), 60
    value = 1 + 0.5j + 0.2 * (rng.normal(size=n) + 1j * rng.normal(size=n))
    time = np.concatenate([10.0 * np.arange(30), 3000 + 10.0 * np.arange(30)])
    seen = Visibilities(time, np.tile([0, 1], (n, 1)), np.ones((n, 2)), value, np.full(n, 0.2))
    mean = seen.average(1e9)
    assert len(mean) == 2, "a gap ends a scan"
    assert mean.sigma == pytest.approx(0.2 / 30**0.5) and mean.value[0] == pytest.approx(value[:30].mean())
    assert len(seen.average(100.0)) == 6
    with pytest.raises(InvdiffError, match="must be positive"):
        seen.average(0.0)


def test_selection_and_systematic_errors():
    seen = observation()
    assert len(seen.above(1e9)) == 0 and len(seen.above(3)) == len(seen)
    assert (np.hypot(*seen.beyond(3e9).uv.T) > 3e9).all()
    assert seen.with_systematics(0.1).sigma == pytest.approx(np.hypot(seen.sigma, 0.1 * np.abs(seen.value)))
    assert "10 baselines among 5 stations at 3 times" in repr(seen) and "18 closure phases" in repr(
        seen.closures()
    )
    with pytest.raises(InvdiffError, match="no three stations"):
        observation(2).closures()
    with pytest.raises(InvdiffError, match="leave flagged rows out"):
        Visibilities(np.zeros(1), np.zeros((1, 2), int), np.zeros((1, 2)), np.array([np.nan]), np.ones(1))
    with pytest.raises(InvdiffError, match="uv has shape"):
        Visibilities(np.zeros(1), np.zeros((1, 2), int), np.zeros((2, 2)), np.ones(1), np.ones(1))


def test_a_floor_bounds_the_derivative_where_nothing_is_seen():
    space = Space((3,), torch.complex128)
    op = operators.Closures(space, [[1, 1, -1]], [[1, 1, -1]], floor=0.1)
    v = torch.tensor([[1e-9, 1.0, 1.0]], dtype=torch.complex128)
    assert float(op.vjp(v, torch.ones(1, 2, dtype=torch.float64)).abs().max()) < 2
    assert torch.isfinite(op(torch.zeros_like(v))).all()


def test_angles_turn():
    space = Space((2,), torch.float64)
    law = likelihoods.WrappedGaussian(0.01 * torch.eye(2), space, torch.tensor([True, False]))
    z = torch.tensor([[3.1, 3.1]], dtype=torch.float64)
    turned = z - torch.tensor([2 * np.pi, 0.0])
    torch.testing.assert_close(law.log_prob(z, z), law.log_prob(z, turned))
    assert float(law.log_prob(z, z - 2 * np.pi)) < -1000
    drawn = law.sample(z.expand(500, 2), Streams(0, [(0, r) for r in range(500)]))
    assert float(drawn[:, 0].abs().max()) <= np.pi and float(drawn[:, 0].min()) < -3 < 3 < float(drawn[:, 0].max())
    with pytest.raises(InvdiffError, match="uncertain by 2 radians"):
        likelihoods.WrappedGaussian(4 * torch.eye(2), space, torch.tensor([True, False]))


def test_bad_closures_get_one_sentence():
    space = Space((3,), torch.complex64)
    for make, words in (
        (lambda: operators.Closures(Space((3,)), [[1, 1, -1]]), "complex visibilities"),
        (lambda: operators.Closures(space, [[1, 1]]), r"expected \(any, 3\)"),
        (lambda: operators.Closures(space, [[1, 1, -1]], floor=-1.0), "must be finite and not negative"),
    ):
        with pytest.raises(InvdiffError, match=words):
            make()


def write_uvfits(path, codes=(-1, -2), weight=400.0, drop=()):
    """One channel of four groups as AIPS writes them, baselines in seconds."""
    fits = pytest.importorskip("astropy.io.fits")
    data = np.zeros((4, 1, 1, 1, 1, len(codes), 3), np.float32)
    data[..., 0], data[..., 1], data[..., 2] = 1.5, -0.5, weight
    data[1, ..., 2] = -1  # flagged
    if len(codes) > 1:
        data[2, ..., 1, 2] = 0  # one hand is missing
    parameters = {
        "UU---SIN": [0.01, 0.01, 0.01, -0.02],
        "VV---SIN": [0.02, 0.02, 0.02, 0.01],
        "BASELINE": [258, 258, 259, 513],
        "DATE": [2457854.5, 2457854.5, 2457854.5, 2457854.5],
        "_DATE": [0.25, 0.25, 0.25, 0.2501],
    }
    names = [name for name in parameters if name not in drop]
    groups = fits.GroupData(
        data, bitpix=-32, parnames=[n.strip("_") for n in names], pardata=[np.array(parameters[n]) for n in names]
    )
    hdu = fits.GroupsHDU(groups)
    step = codes[1] - codes[0] if len(codes) > 1 else 1
    for k, (kind, start, by) in enumerate(
        (("COMPLEX", 1, 1), ("STOKES", codes[0], step), ("FREQ", 230e9, 2e9), ("IF", 1, 1)), 2
    ):
        hdu.header[f"CTYPE{k}"], hdu.header[f"CRVAL{k}"] = kind, start
        hdu.header[f"CDELT{k}"], hdu.header[f"CRPIX{k}"] = by, 1
    hdu.header["OBJECT"] = "M87"
    table = fits.BinTableHDU.from_columns([fits.Column("ANNAME", "8A", array=["AA", "AZ", "PV"])], name="AIPS AN")
    fits.HDUList([hdu, table]).writeto(path)
    return path


def test_uvfits_reads_what_was_written(tmp_path):
    seen = read_uvfits(write_uvfits(tmp_path / "a.uvfits"))
    assert len(seen) == 3 and seen.names == ("AA", "AZ", "PV") and seen.source == "M87"
    assert seen.value == pytest.approx([1.5 - 0.5j, 1.5 - 0.5j, 1.5 + 0.5j], rel=1e-6), "2-1 is 1-2, conjugated"
    assert seen.sigma == pytest.approx([0.05 / 2**0.5, 0.05, 0.05 / 2**0.5]), "two hands, one, two"
    assert seen.uv == pytest.approx(np.array([[2.3, 4.6], [2.3, 4.6], [4.6, -2.3]]) * 1e9, rel=1e-6)
    assert seen.stations.tolist() == [[0, 1], [0, 2], [0, 1]]
    assert np.diff(seen.time) == pytest.approx([0, 8.64], abs=2e-3)
    intensity = read_uvfits(write_uvfits(tmp_path / "i.uvfits", codes=(1,)))
    assert intensity.sigma == pytest.approx(0.05)


def test_files_that_cannot_be_read_get_one_sentence(tmp_path):
    fits = pytest.importorskip("astropy.io.fits")
    image = tmp_path / "image.fits"
    fits.PrimaryHDU(np.zeros((4, 4))).writeto(image)
    (tmp_path / "text.uvfits").write_text("no data")
    whole = write_uvfits(tmp_path / "whole.uvfits").read_bytes()
    (tmp_path / "short.uvfits").write_bytes(whole[:3000])
    for make, words in (
        (lambda: tmp_path / "absent.uvfits", "There is no file"),
        (lambda: image, "no random groups"),
        (lambda: tmp_path / "text.uvfits", "not a readable UVFITS"),
        (lambda: tmp_path / "short.uvfits", "not a readable UVFITS"),
        (lambda: write_uvfits(tmp_path / "f.uvfits", weight=-1.0), "All 4 visibilities"),
        (lambda: write_uvfits(tmp_path / "u.uvfits", drop=("UU---SIN",)), "no parameter UU"),
        (lambda: write_uvfits(tmp_path / "q.uvfits", codes=(2, 3)), "none of which is total intensity"),
    ):
        with pytest.raises(InvdiffError, match=words):
            read_uvfits(make())


def test_the_real_observation(m87):
    seen = m87
    assert len(seen) == 7447 and seen.source == "M87" and seen.frequency == pytest.approx(227.07e9, rel=1e-4)
    longest = np.hypot(*seen.uv.T).max()
    assert 8.0e9 < longest < 8.6e9
    short = seen.select(np.hypot(*seen.uv.T) < 1e8)
    assert 1.0 < np.abs(short.value).mean() < 1.3  # Jy, jet included
    # noise told by the weights is that of neighbours in time, where signals are weak
    pair = (seen.stations == [2, 3]).all(1)
    steps = np.diff(seen.value[pair]) / np.hypot(seen.sigma[pair][1:], seen.sigma[pair][:-1])
    assert 0.7 < np.median(np.abs(steps.real)) / 0.6745 < 1.2
    data = seen.average(600.0).beyond(1e8).above(3).closures()
    assert len(data.phases) > 80 and len(data.amplitudes) > 60


def test_a_problem_of_closures_pulls_towards_the_truth():
    seen = observation(sigma=0.02)
    cell, n = 2e-11, 16
    image = torch.rand(1, 1, n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sky = operators.RadioInterferometry(seen.uv, (n, n), cell, dtype=torch.float64, method="reference")
    data = seen.closures()
    op = operators.Closures(sky.range, data.phases, data.amplitudes) @ sky
    count = len(data.phases)
    law = likelihoods.WrappedGaussian(
        torch.from_numpy(data.covariance), op.range, torch.arange(op.range.size) < count
    )
    problem = invdiff.Problem.simulate(op, law, image)
    assert problem.capabilities >= {"vjp"} and "linear" not in problem.capabilities
    x = image + 0.01 * torch.randn(image.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    slope = problem.grad_log_likelihood(x)
    h = 1e-6 * slope / slope.norm()
    rise = problem.log_likelihood(x + h) - problem.log_likelihood(x - h)
    assert float(rise) == pytest.approx(2e-6 * float(slope.norm()), rel=1e-4)
