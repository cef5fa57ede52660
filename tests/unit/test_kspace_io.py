"""Reading of k-space and what comes with it: every layout, and one sentence for every bad file."""

import io
import os
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest

from invdiff.errors import InvdiffError
from invdiff.io import arrays, sampling
from invdiff.io.kspace import check_kspace, read_coil_maps, read_kspace, read_noise

DATA = Path(os.environ.get("INVDIFF_DATA", Path(__file__).parents[3] / "shared" / "data"))
SCAN = DATA / "brain_8coil_kspace.npy"


def make(shape=(3, 16, 12), seed=0, dtype=np.complex64):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) + 1j * rng.standard_normal(shape)).astype(dtype)


def write_cfl(stem, array):
    """BART's layout is column-major, so ``array`` is given in BART's order of dimensions."""
    stem.with_suffix(".hdr").write_text("# Dimensions\n" + " ".join(map(str, array.shape)) + " 1 1\n")
    array.astype("<c8").ravel(order="F").tofile(stem.with_suffix(".cfl"))


def sentence(error) -> str:
    """The message, checked to be one sentence on one line."""
    text = str(error.value)
    assert "\n" not in text and text.endswith((".", "?")) and len(text) < 400, text
    return text


class TestLayouts:
    @pytest.mark.parametrize("dtype", [np.complex64, np.complex128])
    def test_npy(self, tmp_path, dtype):
        k = make(dtype=dtype)
        np.save(tmp_path / "a.npy", k)
        scan = read_kspace(tmp_path / "a.npy")
        assert scan.kspace.dtype == np.complex64 and scan.slices == 1
        np.testing.assert_allclose(scan.kspace, k, rtol=1e-6)
        assert "3 coils, 16 x 12" in scan.source

    def test_npy_in_fortran_order_and_later_format(self, tmp_path):
        k = np.asfortranarray(make())
        with (tmp_path / "a.npy").open("wb") as f:
            np.lib.format.write_array(f, k, version=(2, 0))
        np.testing.assert_array_equal(read_kspace(tmp_path / "a.npy").kspace, k)

    def test_npy_single_coil_and_volume(self, tmp_path):
        k = make((5, 2, 16, 12))
        np.save(tmp_path / "one.npy", k[0, 0])
        np.save(tmp_path / "volume.npy", k)
        assert read_kspace(tmp_path / "one.npy").kspace.shape == (1, 16, 12)
        middle = read_kspace(tmp_path / "volume.npy")
        assert middle.slice == 2 and "slice 2 of 5, the middle one" in middle.source
        np.testing.assert_array_equal(read_kspace(tmp_path / "volume.npy", slice=4).kspace, k[4])

    def test_npz_brings_everything(self, tmp_path):
        k, maps, noise = make(), make(seed=1), make((3, 100), seed=2)
        mask = np.ones((16, 12))
        np.savez_compressed(tmp_path / "a.npz", kspace=k, mask=mask, coil_maps=maps, noise=noise)
        scan = read_kspace(tmp_path / "a.npz")
        np.testing.assert_array_equal(scan.kspace, k)
        np.testing.assert_array_equal(scan.coil_maps, maps)
        np.testing.assert_array_equal(scan.mask, mask)
        np.testing.assert_array_equal(scan.noise, noise)

    def test_npz_by_key(self, tmp_path):
        k = make()
        np.savez(tmp_path / "a.npz", first=k, second=k * 2)
        np.testing.assert_array_equal(read_kspace(tmp_path / "a.npz", key="second").kspace, k * 2)
        with pytest.raises(InvdiffError, match=r"first, second; say which one"):
            read_kspace(tmp_path / "a.npz")
        with pytest.raises(InvdiffError, match=r"no array 'third'; it holds first, second"):
            read_kspace(tmp_path / "a.npz", key="third")

    def test_fastmri(self, tmp_path):
        k = make((4, 3, 16, 12))
        header = (
            "<ismrmrdHeader><encoding><encodedSpace><matrixSize><x>16</x><y>12</y><z>1</z></matrixSize>"
            "<fieldOfView_mm><x>32</x><y>18</y><z>5</z></fieldOfView_mm></encodedSpace></encoding></ismrmrdHeader>"
        )
        with h5py.File(tmp_path / "a.h5", "w") as f:
            f["kspace"] = k
            f["mask"] = np.ones(12, bool)
            f["ismrmrd_header"] = header
            f.attrs["padding_left"], f.attrs["padding_right"] = 1, 11
        scan = read_kspace(tmp_path / "a.h5", slice=1)
        np.testing.assert_array_equal(scan.kspace, k[1])
        assert scan.spacing == {"y": 2.0, "x": 1.5} and scan.slices == 4
        np.testing.assert_array_equal(scan.mask, [False] + [True] * 10 + [False])

    def test_fastmri_single_coil(self, tmp_path):
        k = make((4, 16, 12))
        with h5py.File(tmp_path / "a.h5", "w") as f:
            f["kspace"] = k
        scan = read_kspace(tmp_path / "a.h5")
        np.testing.assert_array_equal(scan.kspace, k[2][None])
        assert "1 coil," in scan.source and scan.mask is None

    @pytest.mark.parametrize("shape", [(12, 16, 1, 3), (1, 12, 16, 3), (12, 1, 16, 3)])
    @pytest.mark.parametrize("suffix", [".cfl", ".hdr"])
    def test_bart(self, tmp_path, shape, suffix):
        k = make((3, 16, 12))
        write_cfl(tmp_path / "a", k.transpose(2, 1, 0).reshape(shape))
        np.testing.assert_array_equal(read_kspace(tmp_path / f"a{suffix}").kspace, k)

    def test_bart_slices(self, tmp_path):
        k = make((4, 3, 16, 12))
        full = k.transpose(3, 2, 1, 0).reshape(12, 16, 1, 3, *[1] * 9, 4)
        write_cfl(tmp_path / "a", full)
        np.testing.assert_array_equal(read_kspace(tmp_path / "a.cfl", slice=3).kspace, k[3])

    def test_companions(self, tmp_path):
        maps, noise = make(), make((3, 50))
        np.save(tmp_path / "maps.npy", maps)
        write_cfl(tmp_path / "maps", maps.transpose(2, 1, 0).reshape(12, 16, 1, 3))
        write_cfl(tmp_path / "noise", noise.T.reshape(50, 1, 1, 3))
        np.testing.assert_array_equal(read_coil_maps(tmp_path / "maps.npy"), maps)
        np.testing.assert_array_equal(read_coil_maps(tmp_path / "maps.cfl"), maps)
        assert read_noise(tmp_path / "noise.cfl").reshape(3, -1).shape == (3, 50)
        write_cfl(tmp_path / "mask", np.ones((12, 16, 1, 1)))
        assert arrays.read_array(tmp_path / "mask.cfl").shape == (16, 12)
        with h5py.File(tmp_path / "maps.h5", "w") as f:
            f["anything"] = maps
        np.testing.assert_array_equal(read_coil_maps(tmp_path / "maps.h5"), maps)


class TestBadFiles:
    def test_missing_file_suggests_near_names(self, tmp_path):
        np.save(tmp_path / "brain_scan.npy", make())
        with pytest.raises(InvdiffError, match=r"did you mean brain_scan.npy") as error:
            read_kspace(tmp_path / "brain_scam.npy")
        sentence(error)
        with pytest.raises(InvdiffError, match=r"neither does its folder"):
            read_kspace(tmp_path / "nowhere" / "a.npy")
        with pytest.raises(InvdiffError, match=r"is a folder"):
            read_kspace(tmp_path)

    def test_unknown_suffix(self, tmp_path):
        (tmp_path / "a.dat").write_bytes(b"1234")
        with pytest.raises(InvdiffError, match=r"unknown suffix '.dat'; expected one of .npy, .npz, .h5, .cfl"):
            read_kspace(tmp_path / "a.dat")

    @pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"not an array at all", b"\x93NUMPY\x09\x00zz"])
    def test_npy_that_is_none(self, tmp_path, content):
        (tmp_path / "a.npy").write_bytes(content)
        with pytest.raises(InvdiffError, match=r"not a readable .npy array") as error:
            read_kspace(tmp_path / "a.npy")
        sentence(error)

    def test_truncated_npy(self, tmp_path):
        np.save(tmp_path / "a.npy", make())
        whole = (tmp_path / "a.npy").read_bytes()
        (tmp_path / "a.npy").write_bytes(whole[:-100])
        with pytest.raises(InvdiffError, match=r"cut short") as error:
            read_kspace(tmp_path / "a.npy")
        sentence(error)

    def test_npy_with_objects(self, tmp_path):
        class Bomb:
            def __reduce__(self):
                return (Path.touch, (tmp_path / "ran",))

        np.save(tmp_path / "a.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
        with pytest.raises(InvdiffError, match=r"holds Python objects") as error:
            read_kspace(tmp_path / "a.npy")
        sentence(error)
        np.savez(tmp_path / "a.npz", kspace=np.array([Bomb()], dtype=object))
        with pytest.raises(InvdiffError, match=r"holds Python objects"):
            read_kspace(tmp_path / "a.npz")
        assert not (tmp_path / "ran").exists()

    def test_npy_larger_than_memory(self, tmp_path, monkeypatch):
        np.save(tmp_path / "a.npy", make())
        monkeypatch.setattr(arrays, "available_memory", lambda: 1000)
        monkeypatch.setattr(arrays, "SMALL", 1000)
        with pytest.raises(InvdiffError, match=r"memory are free") as error:
            read_kspace(tmp_path / "a.npy")
        sentence(error)

    def test_npy_declaring_more_than_it_holds_reads_nothing(self, tmp_path):
        header = np.lib.format.header_data_from_array_1_0(make())
        header["shape"] = (10**6, 10**6, 10**6)
        stream = io.BytesIO()
        np.lib.format.write_array_header_1_0(stream, header)
        (tmp_path / "a.npy").write_bytes(stream.getvalue())
        with pytest.raises(InvdiffError, match=r"cut short"):
            read_kspace(tmp_path / "a.npy")

    def test_damaged_npz(self, tmp_path):
        np.savez(tmp_path / "a.npz", kspace=make())
        whole = (tmp_path / "a.npz").read_bytes()
        (tmp_path / "a.npz").write_bytes(whole[:-60])
        with pytest.raises(InvdiffError, match=r"not a readable .npz") as error:
            read_kspace(tmp_path / "a.npz")
        sentence(error)
        spoilt = bytearray(whole)
        spoilt[400] ^= 255
        (tmp_path / "a.npz").write_bytes(bytes(spoilt))
        with pytest.raises(InvdiffError, match=r"damaged or cut short"):
            read_kspace(tmp_path / "a.npz")

    def test_empty_npz(self, tmp_path):
        with zipfile.ZipFile(tmp_path / "a.npz", "w"):
            pass
        with pytest.raises(InvdiffError, match=r"no arrays at all"):
            read_kspace(tmp_path / "a.npz")

    def test_truncated_hdf5(self, tmp_path):
        with h5py.File(tmp_path / "a.h5", "w") as f:
            f["kspace"] = make((4, 3, 16, 12))
        whole = (tmp_path / "a.h5").read_bytes()
        (tmp_path / "a.h5").write_bytes(whole[: len(whole) // 2])
        with pytest.raises(InvdiffError, match=r"truncated"):
            read_kspace(tmp_path / "a.h5")

    def test_hdf5_with_external_link(self, tmp_path):
        with h5py.File(tmp_path / "secret.h5", "w") as f:
            f["kspace"] = make((4, 3, 16, 12))
        with h5py.File(tmp_path / "a.h5", "w") as f:
            f["kspace"] = h5py.ExternalLink(str(tmp_path / "secret.h5"), "/kspace")
        with pytest.raises(InvdiffError, match=r"external link"):
            read_kspace(tmp_path / "a.h5")

    def test_hdf5_without_the_dataset(self, tmp_path):
        with h5py.File(tmp_path / "a.h5", "w") as f:
            f["reconstruction"] = np.ones((4, 4))
            f.create_group("group")
        with pytest.raises(InvdiffError, match=r"no array 'kspace'; it holds reconstruction"):
            read_kspace(tmp_path / "a.h5")
        with pytest.raises(InvdiffError, match=r"is a group"):
            read_kspace(tmp_path / "a.h5", key="group")

    def test_hdf5_of_text(self, tmp_path):
        with h5py.File(tmp_path / "a.h5", "w") as f:
            f["kspace"] = np.array([[[b"x"]]])
        with pytest.raises(InvdiffError, match=r"not numbers"):
            read_kspace(tmp_path / "a.h5")

    def test_bart_without_its_half(self, tmp_path):
        write_cfl(tmp_path / "a", make((12, 16, 1, 3)))
        (tmp_path / "a.hdr").unlink()
        with pytest.raises(InvdiffError, match=r"BART header .*a.hdr does not exist"):
            read_kspace(tmp_path / "a.cfl")

    def test_bart_sizes(self, tmp_path):
        write_cfl(tmp_path / "a", make((12, 16, 1, 3)))
        (tmp_path / "a.cfl").write_bytes((tmp_path / "a.cfl").read_bytes()[:-8])
        with pytest.raises(InvdiffError, match=r"declares"):
            read_kspace(tmp_path / "a.cfl")
        (tmp_path / "a.hdr").write_text("# Dimensions\n12 -16\n")
        with pytest.raises(InvdiffError, match=r"no usable '# Dimensions'"):
            read_kspace(tmp_path / "a.cfl")

    def test_bart_dimensions_that_do_not_fit(self, tmp_path):
        write_cfl(tmp_path / "a", make((12, 16, 4, 3)))
        with pytest.raises(InvdiffError, match=r"bart fft -u -i 1"):
            read_kspace(tmp_path / "a.cfl")
        write_cfl(tmp_path / "b", make((12, 16, 1, 3, 2)))
        with pytest.raises(InvdiffError, match=r"dimension 4"):
            read_kspace(tmp_path / "b.cfl")


class TestBadKSpace:
    @pytest.mark.parametrize("shape", [(12,), (2, 2, 2, 8, 8)])
    def test_rank(self, tmp_path, shape):
        np.save(tmp_path / "a.npy", make(shape))
        with pytest.raises(InvdiffError, match=r"expected \(coil, ky, kx\)") as error:
            read_kspace(tmp_path / "a.npy")
        sentence(error)

    def test_real(self, tmp_path):
        np.save(tmp_path / "a.npy", make().real)
        with pytest.raises(InvdiffError, match=r"real numbers .float32. and k-space is complex") as error:
            read_kspace(tmp_path / "a.npy")
        sentence(error)

    def test_not_finite(self, tmp_path):
        k = make()
        k[0, 0, 0], k[1, 2, 3] = np.nan, np.inf
        np.save(tmp_path / "a.npy", k)
        with pytest.raises(InvdiffError, match=r"2 NaN or infinite values of 576") as error:
            read_kspace(tmp_path / "a.npy")
        sentence(error)

    def test_no_samples(self, tmp_path):
        np.save(tmp_path / "a.npy", 0 * make())
        with pytest.raises(InvdiffError, match=r"zero everywhere, so no position was sampled") as error:
            read_kspace(tmp_path / "a.npy")
        sentence(error)

    def test_too_small(self):
        with pytest.raises(InvdiffError, match=r"at least 8 x 8"):
            check_kspace(make((3, 16, 2)))

    @pytest.mark.parametrize("wanted", [5, -1])
    def test_no_such_slice(self, tmp_path, wanted):
        np.save(tmp_path / "a.npy", make((5, 2, 16, 12)))
        with pytest.raises(InvdiffError, match=r"5 slice.s., and slice .* use 0 to 4"):
            read_kspace(tmp_path / "a.npy", slice=wanted)

    def test_no_slices(self, tmp_path):
        np.save(tmp_path / "a.npy", make((0, 2, 16, 12)))
        with pytest.raises(InvdiffError, match=r"holds no slices"):
            read_kspace(tmp_path / "a.npy")


class TestMask:
    def test_found(self):
        k = make()
        k[:, :, ::2] = 0
        k[0, 3, 3] = 0
        mask = sampling.find_mask(k)
        assert mask.sum() == 16 * 6 and sampling.acceleration(mask) == 2

    @pytest.mark.parametrize("given", [np.s_[:], np.s_[:1], np.s_[0]])
    def test_lines_spread(self, given):
        k = make()
        k[:, :, ::2] = 0
        mask = (np.arange(12) % 2)[None].repeat(16, 0)
        np.testing.assert_array_equal(sampling.check_mask(mask[given], k), mask.astype(bool))

    def test_batched_and_complex_masks(self):
        k = make()
        assert sampling.check_mask(np.ones((1, 1, 16, 12), np.complex64), k).all()
        assert sampling.check_mask(np.ones((16, 1)), k).shape == (16, 12)

    def test_shape(self):
        with pytest.raises(InvdiffError, match=r"mask has shape \(12, 16\)") as error:
            sampling.check_mask(np.ones((12, 16)), make())
        sentence(error)

    @pytest.mark.parametrize("value", [0.5, 2, np.nan, -1])
    def test_values(self, value):
        with pytest.raises(InvdiffError, match=r"only 0 .* and 1"):
            sampling.check_mask(np.full((16, 12), value), make())

    def test_no_sampled_position(self):
        with pytest.raises(InvdiffError, match=r"no sampled position"):
            sampling.check_mask(np.zeros((16, 12)), make())

    def test_data_outside(self):
        mask = np.ones((16, 12))
        mask[3] = 0
        with pytest.raises(InvdiffError, match=r"contradicts the data: 12 of 192 positions") as error:
            sampling.check_mask(mask, make())
        sentence(error)

    def test_no_data_inside(self):
        k = make()
        k[:, 5] = 0
        with pytest.raises(InvdiffError, match=r"12 of the 192 positions it calls sampled are zero") as error:
            sampling.check_mask(np.ones((16, 12)), k)
        sentence(error)

    def test_centre(self):
        mask = np.zeros((32, 30), bool)
        mask[::3, ::3] = True
        mask[16 - 4 : 16 + 4, 15 - 6 : 15 + 6] = True
        assert sampling.centre_square(mask) == 8
        assert sampling.centre_width(mask) == (8, 12)
        lines = np.zeros((32, 30), bool)
        lines[:, 15 - 3 : 15 + 3] = True
        assert sampling.centre_width(lines) == (32, 6)
        assert sampling.centre_width(np.zeros((8, 8), bool)) == (0, 0)


@pytest.mark.skipif(not SCAN.is_file(), reason="the real scan is not there; set INVDIFF_DATA to its folder")
def test_real_scan():
    scan = read_kspace(SCAN)
    mask = sampling.find_mask(scan.kspace)
    assert scan.kspace.shape == (8, 230, 180)
    assert mask.sum() == 5148 and sampling.centre_width(mask) == (24, 24)
    assert sampling.acceleration(mask) == pytest.approx(8.04, abs=0.01)
