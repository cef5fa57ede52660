"""Training images from NIfTI and DICOM files, which the tests write themselves."""

import gzip
import struct
import sys
from pathlib import Path

import numpy as np
import pytest

from invdiff.training.config import TrainConfig
from invdiff.training.data import read_images


def volume() -> np.ndarray:
    """Whole numbers ``(6, 5, 4)``, all different, none of its slices dark."""
    return np.random.default_rng(0).permutation(np.arange(100, 220)).reshape(6, 5, 4).astype(np.int16)


class TestNifti:
    @pytest.fixture(autouse=True)
    def _needs_nibabel(self) -> None:
        pytest.importorskip("nibabel")

    @staticmethod
    def write(path: Path, values: np.ndarray, slope: float = 1.0, offset: float = 0.0) -> Path:
        import nibabel

        image = nibabel.Nifti1Image(values, np.eye(4))
        image.header.set_slope_inter(slope, offset)
        nibabel.save(image, path)
        return path

    @pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
    @pytest.mark.parametrize("axis", [0, 1, 2])
    def test_slices_and_slope(self, tmp_path: Path, suffix: str, axis: int) -> None:
        path = self.write(tmp_path / f"head{suffix}", volume(), 0.5, -3)
        found = read_images(path, 1, "none", axis)
        expected = np.moveaxis(volume(), axis, 0)
        assert len(found) == volume().shape[axis]
        for x, y in zip(found, expected):
            np.testing.assert_array_equal(x[0], 0.5 * y.T - 3)

    def test_series_complex_and_folders(self, tmp_path: Path) -> None:
        self.write(tmp_path / "b.nii.gz", np.stack([volume(), 2 * volume()], -1))
        self.write(tmp_path / "a.nii", (volume()[..., :1] * (1 + 2j)).astype(np.complex64))
        found = read_images(tmp_path, 2, "none")
        assert len(found) == 1 + 8 and found[0].shape == (2, 5, 6)
        np.testing.assert_allclose(found[0][1], 2 * found[0][0])
        np.testing.assert_allclose(found[5][0], 2 * found[1][0])

    def test_dark_slices_are_left_out(self, tmp_path: Path) -> None:
        x = volume()
        x[..., 0] = 0
        x[..., 3] = x[..., 3] // 100
        assert len(read_images(self.write(tmp_path / "x.nii", x), 1)) == 2

    def test_what_is_refused(self, tmp_path: Path) -> None:
        good = self.write(tmp_path / "good.nii", volume()).read_bytes()
        huge = bytearray(good)
        huge[40:56] = struct.pack("<8h", 3, 32000, 32000, 32000, 1, 1, 1, 1)
        for name, content, word in (
            ("cut.nii", good[:-50], "not a readable NIfTI"),
            ("cut.nii.gz", gzip.compress(good)[:-20], "not a readable NIfTI"),
            ("junk.nii", b"junk" * 200, "not a readable NIfTI"),
            ("empty.nii.gz", b"", "not a readable NIfTI"),
            ("huge.nii", bytes(huge), "declares 32768000000000 values"),
            ("huge.nii.gz", gzip.compress(bytes(huge)), "declares 32768000000000 values"),
        ):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(ValueError, match=word):
                read_images(tmp_path / name, 1)
        colour = np.zeros((4, 4, 4), [("R", "u1"), ("G", "u1"), ("B", "u1")])
        for name, values, word in (
            ("colour.nii", colour, "expected numbers"),
            ("rank.nii", np.ones((2, 2, 2, 2, 2), np.float32), "expected numbers"),
            ("nan.nii", np.full((4, 4, 4), np.nan, np.float32), "NaN"),
            ("complex.nii", np.ones((4, 4, 4), np.complex64), "complex"),
        ):
            with pytest.raises(ValueError, match=word):
                read_images(self.write(tmp_path / name, values), 1)

    def test_nibabel_is_named_where_it_is_missing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = self.write(tmp_path / "x.nii", volume())
        monkeypatch.setitem(sys.modules, "nibabel", None)
        with pytest.raises(ValueError, match=r"invdiff\[train\]"):
            read_images(path, 1)


class TestDicom:
    @pytest.fixture(autouse=True)
    def _needs_pydicom(self) -> None:
        pytest.importorskip("pydicom")

    @staticmethod
    def write(path: Path, stored: np.ndarray, syntax: str = "1.2.840.10008.1.2.1", **tags: object) -> Path:
        from pydicom.dataset import FileDataset, FileMetaDataset
        from pydicom.uid import UID, generate_uid

        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = UID("1.2.840.10008.5.1.4.1.1.7")
        meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[path.name])
        meta.TransferSyntaxUID = UID(syntax)
        data = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
        data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
        data.Rows, data.Columns = stored.shape[-2:]
        if stored.ndim == 3:
            data.NumberOfFrames = len(stored)
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        bits = 8 * stored.dtype.itemsize
        data.BitsAllocated, data.BitsStored, data.HighBit = bits, bits, bits - 1
        data.PixelRepresentation = int(stored.dtype.kind == "i")
        data.SeriesInstanceUID = "1.2.3"
        data.PixelData = stored.tobytes()
        for name, value in tags.items():
            setattr(data, name, value)
        data.save_as(path, enforce_file_format=True)
        return path

    def test_a_series_in_the_order_of_its_numbers(self, tmp_path: Path) -> None:
        x = np.arange(3 * 20, dtype=np.int16).reshape(3, 4, 5) - 10
        for name, n in (("c.dcm", 0), ("IM000001", 1), ("1.2.840.77", 2)):
            self.write(tmp_path / name, x[n], InstanceNumber=n + 1, RescaleSlope=2.5, RescaleIntercept=-1024)
        (tmp_path / "notes").write_text("no image")
        found = read_images(tmp_path, 1, "none")
        assert len(found) == 3
        for n in range(3):
            np.testing.assert_array_equal(found[n][0], 2.5 * x[n].astype(np.float32) - 1024)
        np.testing.assert_array_equal(read_images(tmp_path / "c.dcm", 1, "none")[0], found[0])

    def test_series_are_kept_together(self, tmp_path: Path) -> None:
        x = np.ones((4, 4), np.uint16)
        for n, (series, number) in enumerate((("1.2.9", 1), ("1.2.3", 2), ("1.2.9", 2), ("1.2.3", 1))):
            self.write(tmp_path / f"{n}.dcm", (n + 1) * x, SeriesInstanceUID=series, InstanceNumber=number)
        assert [int(i[0, 0, 0]) for i in read_images(tmp_path, 1, "none")] == [4, 2, 1, 3]

    def test_where_the_largest_value_is_black(self, tmp_path: Path) -> None:
        x = np.array([[0, 100], [4000, 4095]], np.uint16)
        tags = {"PhotometricInterpretation": "MONOCHROME1", "BitsStored": 12, "HighBit": 11}
        path = self.write(tmp_path / "x.dcm", x, RescaleSlope=2, RescaleIntercept=1, **tags)
        np.testing.assert_array_equal(read_images(path, 1, "none")[0][0], 2 * (4095.0 - x) + 1)
        path = self.write(tmp_path / "y.dcm", x.astype(np.int16) - 2000, PhotometricInterpretation="MONOCHROME1")
        np.testing.assert_array_equal(read_images(path, 1, "none")[0][0], -1 - (x.astype(np.float32) - 2000))

    def test_frames_with_slopes_of_their_own(self, tmp_path: Path) -> None:
        from pydicom.dataset import Dataset

        def group(slope: float) -> Dataset:
            inner, outer = Dataset(), Dataset()
            inner.RescaleSlope, inner.RescaleIntercept, inner.RescaleType = slope, 1, "US"
            outer.PixelValueTransformationSequence = [inner]
            return outer

        x = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
        path = self.write(tmp_path / "x.dcm", x, PerFrameFunctionalGroupsSequence=[group(2), group(3)])
        found = read_images(path, 1, "none")
        np.testing.assert_array_equal(found[1][0], 3.0 * x[1] + 1)
        path = self.write(tmp_path / "y.dcm", x, SharedFunctionalGroupsSequence=[group(4)])
        np.testing.assert_array_equal(read_images(path, 1, "none")[0][0], 4.0 * x[0] + 1)

    def test_run_lengths_are_read(self, tmp_path: Path) -> None:
        import pydicom
        from pydicom.uid import RLELossless

        x = np.arange(64, dtype=np.uint16).reshape(8, 8)
        data = pydicom.dcmread(self.write(tmp_path / "x.dcm", x))
        data.compress(RLELossless, generate_instance_uid=False)
        data.save_as(tmp_path / "y.dcm")
        np.testing.assert_array_equal(read_images(tmp_path / "y.dcm", 1, "none")[0][0], x)

    def test_what_is_refused(self, tmp_path: Path) -> None:
        x = np.ones((4, 4), np.uint8)
        colour = {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0}
        self.write(tmp_path / "colour.dcm", np.ones((4, 12), np.uint8), Columns=4, **colour)
        self.write(tmp_path / "palette.dcm", x, PhotometricInterpretation="PALETTE COLOR")
        self.write(tmp_path / "huge.dcm", x, Rows=65535, Columns=65535, NumberOfFrames=9)
        self.write(tmp_path / "short.dcm", x, Rows=400)
        whole = self.write(tmp_path / "none.dcm", x)
        raw = whole.read_bytes()
        # The same file under the names of compressions: JPEG 2000, and deflated.
        for name, syntax in (("j2k", "1.2.840.10008.1.2.4.90"), ("deflated", "1.2.840.10008.1.2.1.99")):
            old, new = b"1.2.840.10008.1.2.1\x00", syntax.encode() + b"\x00" * (len(syntax) % 2)
            changed = raw.replace(struct.pack("<H", len(old)) + old, struct.pack("<H", len(new)) + new)
            length = struct.unpack("<I", changed[140:144])[0] + len(new) - len(old)
            (tmp_path / f"{name}.dcm").write_bytes(changed[:140] + struct.pack("<I", length) + changed[144:])
        (tmp_path / "cut.dcm").write_bytes(raw[:200])
        (tmp_path / "junk.dcm").write_bytes(b"junk" * 100)
        for name, word in (
            ("colour", "photometric interpretation is RGB; grey"),
            ("palette", "PALETTE COLOR; grey"),
            ("huge", "declares 65535 x 65535 pixels in 9 frames"),
            ("short", r"pixels that cannot be read \(transfer syntax Explicit VR Little Endian"),
            ("j2k", r"pixels that cannot be read \(transfer syntax JPEG 2000.*convert it to an uncompressed"),
            ("deflated", "its data set is deflated; convert it"),
            ("cut", "not a DICOM file that can be used"),
            ("junk", "not a DICOM file that can be used"),
        ):
            with pytest.raises(ValueError, match=word) as caught:
                read_images(tmp_path / f"{name}.dcm", 1)
            assert "\n" not in str(caught.value) and name in str(caught.value)

    def test_pydicom_is_named_where_it_is_missing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = self.write(tmp_path / "x.dcm", np.ones((4, 4), np.uint8))
        monkeypatch.setitem(sys.modules, "pydicom", None)
        with pytest.raises(ValueError, match=r"invdiff\[dicom\]"):
            read_images(path, 1)


def test_the_axis_of_slices_is_a_setting() -> None:
    assert TrainConfig(slice_axis=0).slice_axis == 0
    with pytest.raises(ValueError, match="slice_axis must be 0, 1 or 2"):
        TrainConfig(slice_axis=3)
