import pickle

import h5py
import numpy as np
import pytest

from invdiff.errors import StoreError
from invdiff.io.hdf5_safe import open_h5


@pytest.fixture
def make(tmp_path):
    """Write an HDF5 file with a function of the open file; return its path."""

    def write(fill, name="a.h5"):
        with h5py.File(tmp_path / name, "w") as file:
            fill(file)
        return tmp_path / name

    return write


def refused(path, match, **options):
    with pytest.raises(StoreError, match=match) as caught:
        open_h5(path, **options)
    text = str(caught.value)
    assert "\n" not in text and text.endswith(".")


def test_an_ordinary_file_opens(make):
    def fill(file):
        file.create_dataset("kspace", data=np.ones((3, 4), complex), compression="gzip", shuffle=True)
        file["deep/er/still"] = np.arange(3)
        file["text"] = "ismrmrd header"
        file["flag"] = np.array([True, False])
        file["same"] = file["deep"]  # a second hard link
        file["deep/cycle"] = file["/"]
        file["soft"] = h5py.SoftLink("/deep/er")
        file.attrs["note"] = "fine"

    with open_h5(make(fill)) as file:
        assert file["kspace"].shape == (3, 4) and file["text"][()] == b"ismrmrd header"


def test_missing_folder_and_foreign_files(tmp_path):
    refused(tmp_path / "no.h5", "does not exist")
    refused(tmp_path, "not a file")
    (tmp_path / "text.nc").write_text("hello")
    refused(tmp_path / "text.nc", "not an HDF5 file")
    (tmp_path / "empty.nc").write_bytes(b"")
    refused(tmp_path / "empty.nc", "not an HDF5 file")


def test_truncated_and_damaged(make, tmp_path):
    path = make(lambda f: f.create_dataset("x", data=np.random.default_rng(0).random(10_000)))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    refused(path, "truncated")
    rng = np.random.default_rng(0)
    for _ in range(40):  # flipped bytes: either it opens or it is one sentence
        broken = bytearray(data)
        for i in rng.integers(8, 4096, 20):
            broken[i] = rng.integers(256)
        path.write_bytes(broken)
        try:
            open_h5(path).close()
        except StoreError as error:
            assert str(error).endswith(".")


@pytest.mark.parametrize("at", ["/", "/a/b"])
def test_external_link(make, tmp_path, at):
    make(lambda f: f.create_dataset("secret", data=[1, 2]), "other.h5")

    def fill(file):
        file.require_group(at)["x"] = h5py.ExternalLink("other.h5", "/secret")

    refused(make(fill), "external link 'x' to 'other.h5'")


def test_external_storage(make, tmp_path):
    (tmp_path / "raw.bin").write_bytes(bytes(800))
    path = make(lambda f: f.create_dataset("x", (100,), "f8", external=[(str(tmp_path / "raw.bin"), 0, 800)]))
    refused(path, "external storage")


def test_virtual_dataset(make):
    make(lambda f: f.create_dataset("secret", data=np.arange(4)), "other.h5")

    def fill(file):
        layout = h5py.VirtualLayout(shape=(4,), dtype="i8")
        layout[:] = h5py.VirtualSource("other.h5", "secret", shape=(4,))
        file.create_virtual_dataset("x", layout)

    refused(make(fill), "virtual dataset")


def test_soft_links_that_lead_nowhere(make):
    def fill(file):
        file["x"] = h5py.SoftLink("/not/here")

    refused(make(fill), "leads nowhere")


def test_pickles_and_references(make):
    def opaque(file):
        file["x"] = np.void(pickle.dumps({"a": 1}))

    refused(make(opaque), "pickled objects")

    def vlen(file):
        x = file.create_dataset("x", (1,), dtype=h5py.vlen_dtype(np.uint8))
        x[0] = np.frombuffer(pickle.dumps([1]), np.uint8)

    refused(make(vlen), "pickled objects")
    refused(make(lambda f: f.create_dataset("x", (2,), dtype=h5py.ref_dtype)), "pickled objects")


def test_declared_sizes(make):
    huge = make(lambda f: f.create_dataset("x", (1 << 20, 1 << 20), "f8", chunks=(1, 1024)))
    refused(huge, r"8 TiB .*limit of 64 GiB")
    refused(huge, "far more than its", max_bytes=1 << 60)
    open_h5(huge, max_bytes=1 << 60, max_ratio=1e12).close()
    many = make(lambda f: [f.create_dataset(f"x{i}", (1 << 20,), "f8", chunks=(1024,)) for i in range(10)])
    refused(many, "limit of 8 MiB", max_bytes=8 << 20)


def test_nesting_and_filters(make):
    refused(make(lambda f: f.create_group("/".join("abcdefghijklmnopqrst"))), "deeper than 16")

    def plugin(file):
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plist.set_chunk((4,))
        plist.set_filter(32015, h5py.h5z.FLAG_OPTIONAL, ())
        h5py.h5d.create(file.id, b"x", h5py.h5t.NATIVE_DOUBLE, h5py.h5s.create_simple((4,)), plist)

    refused(make(plugin), "filter 32015")


def test_too_many_objects(make, monkeypatch):
    monkeypatch.setattr("invdiff.io.hdf5_safe.MAX_OBJECTS", 50)
    refused(make(lambda f: [f.create_group(f"g{i}") for i in range(60)]), "more than 50 objects")
