"""Classical reconstructions and image metrics."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from invdiff import baselines, metrics, mri, mri_simulation, operators
from invdiff.errors import InvdiffError
from invdiff.io.kspace import read_kspace
from invdiff.primitives.solve import cg

DATA = Path(os.environ.get("INVDIFF_DATA", Path(__file__).parents[3] / "shared" / "data"))
SCAN = DATA / "brain_8coil_kspace.npy"


@pytest.fixture(scope="module")
def scan():
    y, x = np.mgrid[-1:1:48j, -1:1:44j]
    image = ((np.hypot(x, y) < 0.8) * 0.6 + (np.hypot(x - 0.1, y) < 0.3) * 0.4) * np.exp(1j * x)
    image = image.astype(np.complex64)
    kspace, _ = mri_simulation.simulate_scan(image, coils=4, acceleration=3, centre=12, snr=100, seed=1)
    return kspace.kspace, mri_simulation.birdcage_maps(4, (48, 44)), image


def operator(kspace, maps):
    return operators.MultiCoilMRI(torch.from_numpy((kspace != 0).any(0)), torch.from_numpy(maps))


def test_zero_filled_is_the_adjoint(scan):
    kspace, maps, _ = scan
    expected = operator(kspace, maps).adjoint(torch.from_numpy(kspace)[None])[0, 0]
    np.testing.assert_allclose(baselines.zero_filled(kspace, maps), expected, atol=1e-5)


def test_cg_sense_solves_the_normal_equations(scan):
    kspace, maps, _ = scan
    a, lam = operator(kspace, maps), 0.1
    y = torch.from_numpy(kspace)[None]
    expected = cg(lambda x: a.normal(x) + lam * x, a.adjoint(y), tol=1e-7, max_iter=200)[0, 0]
    image = baselines.cg_sense(kspace, maps, lam, 200)
    np.testing.assert_allclose(image, expected, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("method", ["cg_sense", "l1_wavelet", "total_variation"])
def test_better_than_zero_filled(scan, method, capfd):
    kspace, maps, image = scan
    found = getattr(baselines, method)(kspace, maps, 0.03, 60)
    assert found.shape == image.shape and found.dtype == np.complex64
    assert metrics.nrmse(found, image) < 0.9 * metrics.nrmse(baselines.zero_filled(kspace, maps), image)
    assert capfd.readouterr() == ("", "")


def test_best_of_several_weights(scan):
    kspace, maps, image = scan
    weights = [1e-3, 1e-2, 10.0]

    def error(x):
        return metrics.nrmse(x, image)

    best = baselines.l1_wavelet(kspace, maps, weights, 40, error=error)
    assert error(best) == min(error(baselines.l1_wavelet(kspace, maps, w, 40)) for w in weights)
    with pytest.raises(InvdiffError, match="error function"):
        baselines.l1_wavelet(kspace, maps, weights)


def test_bad_input(scan):
    kspace, maps, _ = scan
    with pytest.raises(InvdiffError, match="of one shape"):
        baselines.zero_filled(kspace, maps[:2])
    with pytest.raises(InvdiffError, match="at least 0"):
        baselines.cg_sense(kspace, maps, -1.0)
    with pytest.raises(InvdiffError, match="at least 0"):
        baselines.l1_wavelet(kspace, maps, 0.1, 0)


def noisy_pair():
    rng = np.random.default_rng(0)
    reference = rng.random((40, 37))
    return reference + 0.1 * rng.standard_normal((40, 37)), reference


def test_ssim_against_torchmetrics():
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchmetrics.functional.image import structural_similarity_index_measure

    x, r = (np.abs(a) for a in noisy_pair())
    tensors = (torch.from_numpy(a)[None, None] for a in (x, r))
    _, full = structural_similarity_index_measure(*tensors, data_range=1.0, return_full_image=True)
    assert metrics.ssim(x, r, 1.0) == pytest.approx(float(full[..., 5:-5, 5:-5].mean()), abs=1e-6)


def test_metrics_by_hand():
    x, r = noisy_pair()
    assert metrics.psnr(r, r, 1.0) == math.inf and metrics.ssim(r, r, 1.0) == pytest.approx(1)
    assert metrics.psnr(r + 0.1, r, 2.0) == pytest.approx(20 * math.log10(2 / 0.1))
    assert metrics.nrmse(r * 1.1, r) == pytest.approx(0.1)
    assert metrics.nrmse(1j * r, r) == pytest.approx(0)
    assert metrics.psnr(torch.from_numpy(x), r, 1.0) == metrics.psnr(x, r, 1.0)


def test_metrics_refuse():
    x, r = noisy_pair()
    with pytest.raises(InvdiffError, match="must be the same"):
        metrics.nrmse(x[1:], r)
    with pytest.raises(InvdiffError, match="must be positive"):
        metrics.psnr(x, r, 0.0)
    with pytest.raises(InvdiffError, match="at least 11 x 11"):
        metrics.ssim(x[:5], r[:5], 1.0)
    with pytest.raises(InvdiffError, match="zero everywhere"):
        metrics.nrmse(x, 0 * r)


@pytest.mark.slow
@pytest.mark.skipif(not SCAN.is_file(), reason="the real scan is not there; set INVDIFF_DATA to its folder")
def test_real_scan_withheld_samples():
    kspace = read_kspace(SCAN).kspace
    maps = mri.estimate_coil_maps(kspace, 24)
    outside = (kspace != 0).any(0)
    outside[115 - 12 : 115 + 12, 90 - 12 : 90 + 12] = False
    candidates = np.flatnonzero(outside)
    withheld = np.zeros(outside.size, bool)
    # The split that the figures below were measured on.
    pick = np.random.RandomState(0)
    withheld[pick.choice(candidates, round(0.1 * len(candidates)), replace=False)] = True
    withheld = withheld.reshape(outside.shape)
    a, kept = operator(kspace, maps), np.where(withheld, 0, kspace)
    full = operators.MultiCoilMRI(torch.ones(outside.shape), a.coil_maps[0])

    def error(x):
        predicted = full(torch.from_numpy(x)[None, None])[0].numpy()
        return np.linalg.norm((predicted - kspace)[:, withheld]) / np.linalg.norm(kspace[:, withheld])

    assert error(baselines.zero_filled(kept, maps)) == pytest.approx(0.753, abs=0.01)
    assert error(baselines.cg_sense(kept, maps, 0, 30)) == pytest.approx(0.525, abs=0.01)
    assert error(baselines.cg_sense(kept, maps, 1e-3, 30)) == pytest.approx(0.407, abs=0.01)
    assert error(baselines.l1_wavelet(kept, maps, [1e-3, 2e-3, 5e-3, 1e-2], error=error)) < 0.26
