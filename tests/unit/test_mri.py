"""From k-space to a problem: noise, whitening, coil maps, and every contradiction in between."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from invdiff import mri, mri_simulation, operators
from invdiff.errors import InvdiffError
from invdiff.io.kspace import KSpace, read_kspace

DATA = Path(os.environ.get("INVDIFF_DATA", Path(__file__).parents[3] / "shared" / "data"))
SCAN = DATA / "brain_8coil_kspace.npy"


def disc(n=64) -> np.ndarray:
    """A head-like complex image ``(n, n)``: two discs with smooth phase."""
    y, x = np.mgrid[-1 : 1 : n * 1j, -1 : 1 : n * 1j]
    magnitude = (np.hypot(x / 0.7, y / 0.85) < 1) * 0.6 + (np.hypot(x - 0.1, y) < 0.3) * 0.4
    return (magnitude * np.exp(1j * (x + 0.5 * y))).astype(np.complex64)


@pytest.fixture(scope="module")
def scan():
    return mri_simulation.simulate_scan(disc(), coils=4, acceleration=3, centre=16, snr=30)


def complex_normal(rng, shape):
    return (rng.standard_normal(shape) + 1j * rng.standard_normal(shape)).astype(np.complex64)


class TestNoise:
    def test_outermost_samples(self):
        rng = np.random.default_rng(0)
        k = 0.3 * complex_normal(rng, (4, 64, 64))
        k[:, 24:40, 24:40] += 100
        assert mri.estimate_noise(k) == pytest.approx(0.3, rel=0.05)

    def test_scales_with_the_data(self, scan):
        kspace, sigma = scan
        level = mri.estimate_noise(kspace.kspace)
        assert mri.estimate_noise(kspace.kspace * 8) == pytest.approx(8 * level, rel=1e-5)
        assert level == pytest.approx(sigma, rel=0.25)

    def test_noise_scan(self):
        rng = np.random.default_rng(1)
        noise = np.array([0.1, 0.2, 0.3])[:, None] * complex_normal(rng, (3, 20000))
        k = complex_normal(rng, (3, 16, 16))
        expected = np.sqrt((0.01 + 0.04 + 0.09) / 3)
        assert mri.estimate_noise(k, noise_scan=noise + 5) == pytest.approx(expected, rel=0.02)

    def test_whitening(self):
        rng = np.random.default_rng(2)
        mix = rng.standard_normal((3, 3)) + 1j * rng.standard_normal((3, 3))
        noise = (mix @ complex_normal(rng, (3, 50000))).astype(np.complex64)
        white = mri.apply_coils(mri.whitening_matrix(noise, 3), noise)
        covariance = mri.noise_covariance(white, 3)
        level = np.trace(mri.noise_covariance(noise, 3)).real / 3
        np.testing.assert_allclose(covariance, level * np.eye(3), atol=0.02 * level)

    @pytest.mark.parametrize(
        ("noise", "words"),
        [
            (np.ones((2, 100), np.complex64), r"expected \(3, ...\)"),
            (np.ones((3, 100)), "real numbers"),
            (np.full((3, 100), np.nan + 0j), "NaN or infinite"),
            (np.zeros((3, 100), np.complex64), "0 samples that are not zero"),
            (np.ones((3, 5), np.complex64), "5 samples"),
            (np.arange(100) * np.ones((3, 1), np.complex64), "dead or identical coils"),
        ],
    )
    def test_bad_noise_scan(self, noise, words):
        with pytest.raises(InvdiffError, match=words):
            mri.whitening_matrix(noise, 3)

    def test_noiseless(self):
        k = np.zeros((2, 64, 64), np.complex64)
        k[:, 24:40, 24:40] = 1
        with pytest.raises(InvdiffError, match="give sigma"):
            mri.estimate_noise(k, np.ones((64, 64), bool))


class TestCoilMaps:
    def test_against_the_truth(self, scan):
        kspace, _ = scan
        maps = mri.estimate_coil_maps(kspace.kspace)
        true = mri_simulation.birdcage_maps(4, (64, 64))
        inside = (np.abs(disc()) > 0) & (np.abs(maps).sum(0) > 0)
        assert inside.sum() > 0.95 * (np.abs(disc()) > 0).sum()
        overlap = np.abs((maps.conj() * true).sum(0))[inside]
        assert np.median(overlap) > 0.99
        np.testing.assert_allclose((np.abs(maps) ** 2).sum(0)[inside], 1, atol=1e-3)

    def test_little_phase_is_left_to_the_image(self, scan):
        maps = mri.estimate_coil_maps(scan[0].kspace)
        true = mri_simulation.birdcage_maps(4, (64, 64))
        image = (maps.conj() * true).sum(0) * disc()
        assert np.percentile(np.abs(np.angle(image[np.abs(image) > 0.1])), 95) < 0.2

    def test_one_coil(self):
        assert (mri.estimate_coil_maps(np.ones((1, 16, 16), np.complex64)) == 1).all()

    def test_no_centre(self):
        k = np.ones((4, 32, 32), np.complex64)
        k[:, ::2] = 0
        with pytest.raises(InvdiffError, match="at least 12 x 12, and the data have 0 x 0; give coil maps"):
            mri.estimate_coil_maps(k)
        with pytest.raises(InvdiffError, match="at least 40 x 40"):
            mri.estimate_coil_maps(np.ones((4, 32, 32), np.complex64), calib_width=40)

    @pytest.mark.parametrize(
        ("maps", "words"),
        [
            (np.ones((3, 8, 8)), "expected the same"),
            (np.full((4, 16, 16), np.inf), "NaN or infinite"),
            (np.zeros((4, 16, 16)), "zero everywhere"),
        ],
    )
    def test_bad_maps(self, maps, words):
        with pytest.raises(InvdiffError, match=words):
            mri.check_coil_maps(maps, np.ones((4, 16, 16), np.complex64))


class TestProblem:
    def test_whole(self, scan):
        kspace, sigma = scan
        problem = mri.problem_from_kspace(kspace, sigma=sigma, spacing={"y": 1.0, "x": 1.0})
        assert problem.y.shape == (1, 4, 64, 64) and problem.operator.domain.shape == (1, 64, 64)
        assert problem.operator.domain.spacing == {"y": 1.0, "x": 1.0}
        assert problem.meta["acceleration"] == pytest.approx(3, abs=0.2)
        assert problem.meta["sigma_source"] == "given" and problem.meta["mask_source"] == "given"
        assert problem.meta["coil_maps_source"] == "ESPIRiT"
        assert float(problem.likelihood.sigma) == pytest.approx(sigma)

    def test_residual_of_the_truth_is_noise(self, scan):
        kspace, sigma = scan
        maps = mri_simulation.birdcage_maps(4, (64, 64))
        problem = mri.problem_from_kspace(kspace, coil_maps=maps, sigma=sigma)
        residual = problem.residual(torch.from_numpy(disc())[None, None])[0, :, torch.from_numpy(kspace.mask)]
        assert float(torch.view_as_real(residual).std()) == pytest.approx(sigma, rel=0.03)

    def test_estimates_are_recorded(self, scan):
        problem = mri.problem_from_kspace(scan[0].kspace)
        assert problem.meta["mask_source"] == "found from the data"
        assert problem.meta["sigma_source"] == "estimated from the outermost samples"
        assert problem.meta["sigma"] == pytest.approx(float(problem.likelihood.sigma))

    def test_noise_scan_whitens_data_and_maps(self, scan):
        kspace, sigma = scan
        rng = np.random.default_rng(3)
        mix = np.eye(4) + 0.4 * np.roll(np.eye(4), 1, axis=0)
        noise = (sigma * mix @ complex_normal(rng, (4, 20000))).astype(np.complex64)
        clean = mri.apply_coils(mix, kspace.kspace)
        maps = mri.apply_coils(mix, mri_simulation.birdcage_maps(4, (64, 64)))
        problem = mri.problem_from_kspace(clean, coil_maps=maps, noise_scan=noise)
        residual = problem.residual(torch.from_numpy(disc())[None, None])[0, :, torch.from_numpy(kspace.mask)]
        covariance = mri.noise_covariance(residual.numpy(), 4)
        assert problem.meta["sigma_source"].startswith("noise scan")
        np.testing.assert_allclose(
            covariance, 2 * problem.meta["sigma"] ** 2 * np.eye(4), atol=0.2 * problem.meta["sigma"] ** 2
        )

    @pytest.mark.parametrize("sigma", [-1.0, 0.0, float("nan"), float("inf")])
    def test_bad_sigma(self, scan, sigma):
        with pytest.raises(InvdiffError, match="must be positive"):
            mri.problem_from_kspace(scan[0], sigma=sigma)

    def test_bad_mask(self, scan):
        mask = scan[0].mask.copy()
        mask[:40] = False
        with pytest.raises(InvdiffError, match="contradicts the data"):
            mri.problem_from_kspace(scan[0], mask=mask)

    @pytest.mark.parametrize(
        ("kspace", "words"),
        [
            (np.ones((16, 16), np.complex64), "expected .coil, ky, kx."),
            (np.ones((2, 16, 16)), "real numbers"),
            (np.full((2, 16, 16), np.nan + 0j), "512 NaN"),
            (np.zeros((2, 16, 16), np.complex64), "zero everywhere"),
        ],
    )
    def test_bad_kspace(self, kspace, words):
        with pytest.raises(InvdiffError, match=words):
            mri.problem_from_kspace(KSpace(kspace))


class TestSimulation:
    def test_reproducible(self):
        first, sigma = mri_simulation.simulate_scan(disc(), coils=2, acceleration=3, centre=16, seed=5)
        second, _ = mri_simulation.simulate_scan(disc(), coils=2, acceleration=3, centre=16, seed=5)
        np.testing.assert_array_equal(first.kspace, second.kspace)
        assert sigma == pytest.approx(np.percentile(np.abs(disc()), 99) / 10)

    def test_a_seed_that_finds_no_pattern_of_its_own(self):
        """On this grid the search of seed 8 for a density fails."""
        mask = mri_simulation.poisson_disc_mask((192, 160), 8.0, centre=24, seed=8)
        assert mask.size / mask.sum() == pytest.approx(8, abs=0.11) and mask[84:108, 68:92].all()

    def test_impossible_acceleration(self):
        with pytest.raises(InvdiffError, match="No Poisson-disc pattern"):
            mri_simulation.poisson_disc_mask((32, 32), 50.0, centre=24)


@pytest.mark.skipif(not SCAN.is_file(), reason="the real scan is not there; set INVDIFF_DATA to its folder")
def test_real_scan():
    scan = read_kspace(SCAN)
    assert mri.estimate_noise(scan.kspace) == pytest.approx(0.0125, rel=0.05)
    problem = mri.problem_from_kspace(scan)
    assert problem.operator.domain.shape == (1, 230, 180)
    assert problem.meta["acceleration"] == pytest.approx(8.04, abs=0.01)


def test_data_that_come_back_are_not_transformed_again(monkeypatch):
    """The prox keeps ``A^H y`` while the same tensor comes back unchanged, and never beyond that."""
    maps = torch.randn(3, 8, 6, dtype=torch.complex128, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(8, 6)
    mask[::2] = 1
    op, calls = operators.MultiCoilMRI(mask, maps), []
    adjoint = type(op).adjoint
    monkeypatch.setattr(type(op), "adjoint", lambda self, y: calls.append(1) or adjoint(self, y))
    y, z, rho = op.range.randn(2, seed=1), op.domain.randn(2, seed=2), torch.tensor([0.1, 2.0])
    first = op.prox(z, y, rho)
    assert torch.equal(op.prox(z, y, rho), first) and len(calls) == 1
    other = y.clone()
    torch.testing.assert_close(op.prox(z, other, rho), first)
    other += 1  # in place: the same tensor with other values
    changed = op.prox(z, other, rho)
    torch.testing.assert_close(changed, operators.MultiCoilMRI(mask, maps).prox(z, other.clone(), rho))
    assert not torch.allclose(changed, first) and len(calls) == 4
    leaf = y.clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(op.prox(z, leaf, rho).abs().sum(), leaf)
    assert float(slope.abs().sum()) > 0


@pytest.mark.parametrize("cases", [1, 2])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_compiled_loops_of_the_exact_prox_are_its_products(dtype, axis, cases, monkeypatch, in_threads):
    """A few rows go through compiled loops, more through torch's products; sizes are no multiples of four."""
    from invdiff.operators import _readout

    mask = torch.zeros(cases, 9, 7)
    mask[:, ::2] = 1
    mask[0, 1] = 1
    mask = mask if axis == 0 else mask.mT
    maps = torch.randn(cases, 3, *mask.shape[1:], dtype=dtype, generator=torch.Generator().manual_seed(0))
    op = operators.MultiCoilMRI(mask, maps)
    op = op.rows(torch.tensor([1, 0, 1])) if cases > 1 else op
    y, z, noise = op.range.randn(3, seed=1), op.domain.randn(3, seed=2), op.domain.randn(3, seed=3)
    rho, sigma, tau = torch.tensor([0.1, 2.0, 1]), torch.tensor([0.3, 1.0, 0.1]), torch.tensor([1.0, 0.2, 1])
    chosen = []

    def both():
        return op.prox(z, y, rho), op.conditional(z, y, sigma, tau, noise)

    monkeypatch.setattr(_readout, "is_compiled", lambda device: False)
    plain = both()
    monkeypatch.setattr(_readout, "is_compiled", lambda device: chosen.append(1) or True)
    compiled = both()
    for a, b, c in zip(compiled, plain, in_threads(3, both)):
        torch.testing.assert_close(a, b, atol=1e-12 if dtype == torch.complex128 else 3e-5, rtol=0)
        assert torch.equal(a, c)
    assert len(chosen) == 4 * cases
    monkeypatch.setattr(_readout, "_FEW", 0)
    assert torch.equal(both()[0], plain[0]) and len(chosen) == 4 * cases
