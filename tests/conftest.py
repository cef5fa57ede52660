"""What all tests share: a guard on torch's global state, and the folder of real measurements."""

import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

# Third-party packages that warn when they are imported are imported here once, quietly; everything that
# happens afterwards is held to "warnings are errors".
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import deepinv  # noqa: F401
    import sigpy
    import sigpy.mri  # noqa: F401

from invdiff import ct
from invdiff.interferometry import Visibilities
from invdiff.io.uvfits import read_uvfits
from invdiff.operators import _compiled

# Tests hold small arrays: a second thread gains nothing, and where the cores are busy every parallel region waits
# for a slice of time (measured: 7 ms for the exponential of 32 images of 12 x 12). Tests of threads ask for them.
torch.set_num_threads(1)


def _global_state():
    return (
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cuda.matmul.allow_tf32,
        torch.random.get_rng_state().sum().item(),
        np.random.get_state()[1].sum(),  # noqa: NPY002 (the global state is what is guarded)
    )


@pytest.fixture(autouse=True)
def _guard_global_state(request):
    """Fail any test after which a global switch or a global random state has changed."""
    before = _global_state()
    yield
    if "touches_global_rng" not in request.keywords:
        assert _global_state() == before, "the code under test changed global torch or numpy state"


@pytest.fixture
def in_threads(monkeypatch):
    """Return what calls a function with a number of threads, over which even small loops are spread."""
    monkeypatch.setattr(_compiled, "_STEPS", 1)
    before = torch.get_num_threads()

    def call(count, work):
        torch.set_num_threads(count)
        try:
            out = work()
            assert torch.get_num_threads() == count
        finally:
            torch.set_num_threads(before)
        return out

    return call


@pytest.fixture(scope="session")
def measurements() -> Path:
    """Folder of real measurements; tests that need it skip, saying so, where it is absent."""
    root = Path(__file__).resolve().parents[1]
    folder = Path(os.environ.get("INVDIFF_DATA", root.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("real measurements are not here; set INVDIFF_DATA to their folder")
    return folder


@pytest.fixture(scope="session")
def tooth(measurements: Path) -> ct.Scan:
    """Real scan of a tooth by parallel beams, 181 views of one detector row."""
    if not (measurements / "tooth.h5").is_file():
        pytest.skip("the scan of the tooth is not there; set INVDIFF_DATA to its folder")
    return ct.read_scan(measurements / "tooth.h5")


@pytest.fixture(scope="session")
def m87(measurements: Path) -> Visibilities:
    """Real visibilities of M87, 11 April 2017, low band."""
    pytest.importorskip("astropy")
    path = measurements / "SR1_M87_2017_101_lo_hops_netcal_StokesI.uvfits"
    if not path.is_file():
        pytest.skip("the observation of M87 is not there; set INVDIFF_DATA to its folder")
    return read_uvfits(path)
