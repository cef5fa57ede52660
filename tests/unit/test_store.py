import subprocess
import sys

import h5py
import numpy as np
import pytest
import torch
import xarray as xr
from safetensors.numpy import save_file

from invdiff.errors import StoreError
from invdiff.io import store
from invdiff.io.labels import decode_attrs, encode_attrs
from invdiff.io.store import build_tree, open_tree, write_run
from invdiff.posterior import Posterior, open_posterior
from invdiff.run import DrawSource, FileDraws, MemoryDraws
from invdiff.spaces import Space
from tests.unit.runs import COMPLEX, LINE, REAL, make_run

pytest.importorskip("zarr")
SUFFIXES = (".nc", ".zarr")
SPACES = {"complex": COMPLEX, "real": REAL, "line": LINE, "double": COMPLEX.with_precision(torch.float64)}


def same(a, b):
    """Whether two trees hold the same groups, values, dims and attributes."""
    assert set(a.children) == set(b.children)
    for name in a.children:
        xr.testing.assert_identical(a.children[name].to_dataset(), b.children[name].to_dataset())
    skip = {"created_at"}
    assert {k: v for k, v in a.attrs.items() if k not in skip} == {
        k: v for k, v in b.attrs.items() if k not in skip
    }


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("space", SPACES)
def test_streaming_equals_memory_and_round_trips(tmp_path, space, suffix):
    run = make_run(SPACES[space], draws=7, bad=[(0, 2)], missing=[(0, 6)], status="stopped")
    path = write_run(run, tmp_path / f"run{suffix}")
    memory = build_tree(run)
    with open_posterior(path) as p:
        same(p.tree, memory)
        assert p.provenance == run.provenance and p.status == "stopped"
        # Saved again in the other format it is still the same.
        other = p.save(tmp_path / f"other{'.nc' if suffix == '.zarr' else '.zarr'}")
    if space in ("complex", "line"):
        with open_posterior(other) as q:
            same(q.tree, memory)


def test_order_of_a_listing_does_not_swap_real_and_imaginary_parts(tmp_path):
    run = make_run(COMPLEX, draws=3)
    memory = build_tree(run)
    posterior = memory["posterior"].to_dataset()
    listed = xr.DataTree.from_dict(
        {"/": memory.to_dataset(), **{k: v.to_dataset() for k, v in memory.children.items()}}
        | {"posterior": posterior[["x_im", "x_re"]]}
    )
    path = store.write_tree(listed, run.draws, tmp_path / "a.nc")
    with open_posterior(path) as p:
        same(p.tree, memory)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_cases_points_and_ensembles(tmp_path, suffix):
    for i, run in enumerate(
        [
            make_run(REAL, cases=3, draws=4),
            make_run(kind="point", draws=1),
            make_run(REAL, kind="point", draws=2, cases=2),
            make_run(kind="ensemble", draws=5, stats={"log_weight": np.linspace(-3, 0, 5)[None]}),
            make_run(draws=1, truth=False),
        ]
    ):
        path = write_run(run, tmp_path / f"{i}{suffix}")
        with open_posterior(path) as p:
            same(p.tree, build_tree(run))
            assert p.kind == run.kind


def test_netcdf_opens_elsewhere(tmp_path):
    run = make_run(draws=4)
    path = write_run(run, tmp_path / "a.nc")
    with xr.open_datatree(path, engine="h5netcdf") as tree:
        assert {"posterior", "sample_stats", "observed_data", "summary", "provenance"} <= set(tree.children)
        assert tree["posterior"]["x_re"].dims == ("chain", "draw", "channel", "y", "x")
    with h5py.File(path) as file:
        x = file["posterior/x_re"]
        assert x.chunks == (1, 1, 1, 9, 7) and x.compression == "gzip" and x.shuffle and x.dtype == np.float32
        assert file.attrs["schema"] == "invdiff.posterior/1"
    netCDF4 = pytest.importorskip("netCDF4")
    with netCDF4.Dataset(path) as data:
        x = data["posterior/x_re"]
        np.testing.assert_array_equal(x[0], run.draws.array[0].real)
        assert x.complex_pair == "x" and data["posterior/y"].units == "mm"
        assert data["provenance"].note == run.provenance["note"]


def test_zarr_opens_elsewhere(tmp_path):
    path = write_run(make_run(draws=4), tmp_path / "a.zarr")
    with xr.open_datatree(path, engine="zarr") as tree:
        assert tree["posterior"]["x_re"].shape == (1, 4, 1, 9, 7)


class Failing(MemoryDraws):
    """Draws that break in the middle."""

    def __init__(self, array, error):
        super().__init__(array)
        self.error = error

    def get(self, case, draw):
        if draw == 3:
            raise self.error
        return super().get(case, draw)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    "error", [RuntimeError("boom"), KeyboardInterrupt(), OSError(28, "No space left on device")]
)
def test_nothing_half_written_stays(tmp_path, suffix, error):
    run = make_run(draws=6)
    run.draws = Failing(run.draws.array, error)
    with pytest.raises(StoreError if isinstance(error, OSError) else type(error)):
        write_run(run, tmp_path / f"a{suffix}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_failure_keeps_the_older_file(tmp_path, suffix, monkeypatch):
    path = write_run(make_run(draws=3, title="old"), tmp_path / f"a{suffix}")

    def broken(*_):
        raise RuntimeError("boom")

    monkeypatch.setattr(store, "groups", broken)
    with pytest.raises(RuntimeError):
        write_run(make_run(draws=3, title="new"), path)
    monkeypatch.undo()
    with open_posterior(path) as p:
        assert p.title == "old"
    write_run(make_run(draws=3, title="new"), path)
    with open_posterior(path) as p:
        assert p.title == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_bad_targets(tmp_path):
    with pytest.raises(StoreError, match="should end in"):
        write_run(make_run(), tmp_path / "a.h5x")
    with pytest.raises(StoreError, match="does not exist"):
        write_run(make_run(), tmp_path / "no" / "a.nc")
    (tmp_path / "b.nc").mkdir()
    with pytest.raises(StoreError, match="another kind"):
        write_run(make_run(), tmp_path / "b.nc")


def test_opening_what_is_no_posterior(tmp_path):
    with pytest.raises(StoreError, match="does not exist"):
        open_posterior(tmp_path / "no.nc")
    xr.Dataset({"t": 1.0}).to_netcdf(tmp_path / "climate.nc", engine="h5netcdf")
    with pytest.raises(StoreError, match="not a posterior file"):
        open_posterior(tmp_path / "climate.nc")
    xr.Dataset(attrs={"schema": "invdiff.posterior/9"}).to_netcdf(tmp_path / "new.nc", engine="h5netcdf")
    with pytest.raises(StoreError, match="update invdiff"):
        open_posterior(tmp_path / "new.nc")
    xr.Dataset(attrs={"schema": "invdiff.posterior/1"}).to_netcdf(tmp_path / "empty.nc", engine="h5netcdf")
    with pytest.raises(StoreError, match="incomplete"):
        open_posterior(tmp_path / "empty.nc")
    (tmp_path / "folder").mkdir()
    with pytest.raises(StoreError, match=r"no zarr\.json"):
        open_posterior(tmp_path / "folder")


def test_hostile_zarr(tmp_path):
    path = write_run(make_run(draws=2), tmp_path / "a.zarr")
    meta = path / "posterior" / "x_re" / "zarr.json"
    text = meta.read_text()
    meta.write_text(text.replace('"blosc"', '"numcodecs.pickle"'))
    with pytest.raises(StoreError, match=r"codec 'numcodecs\.pickle'"):
        open_tree(path)
    meta.write_text(text[: len(text) // 2])
    with pytest.raises(StoreError, match="damaged"):
        open_tree(path)
    meta.write_text(text)
    (path / ".zarray").write_text("{}")
    with pytest.raises(StoreError, match="format 2"):
        open_tree(path)
    (path / ".zarray").unlink()
    (path / "link").symlink_to("/etc/passwd")
    with pytest.raises(StoreError, match="link"):
        open_tree(path)


def test_provenance_survives_exactly():
    values = {
        "text": "plain", "looks_like_json": "123", "empty": "", "nul": "a\x00b", "surrogate": "\udc80",
        "list": [1, "a"],
        "true": True, "none": None, "big": 2**80, "float": 0.1, "nested": {"a": {"b": [None, 1.5]}}, "nan": "NaN",
        "long": "x" * 100_000, "odd name/with slash": 1, "more": {"x": 1},
    }  # fmt: skip
    assert decode_attrs(encode_attrs(values)) == values


def test_provenance_survives_a_file(tmp_path):
    provenance = {
        "text": "é\n",
        "digits": "123",
        "empty": "",
        "nul": "a\x00",
        "long": "x" * 100_000,
        "odd/name": [1],
    }
    for suffix in SUFFIXES:
        path = write_run(make_run(draws=2, provenance=provenance), tmp_path / f"a{suffix}")
        with open_posterior(path) as p:
            assert p.provenance == provenance


def chunks(tmp_path, array, sizes, dtype=None):
    """Write flattened rows in chunk files of the given sizes; a negative size leaves a gap."""
    flat = array.reshape(-1, *array.shape[2:])
    first, out = 0, []
    for size in sizes:
        if size > 0:
            rows = np.ascontiguousarray(flat[first : first + size])
            if rows.dtype == np.complex128:
                rows = np.stack([rows.real, rows.imag], axis=-1)
            save_file({"x": rows}, tmp_path / f"chunk-{first}.safetensors")
            out.append((first, tmp_path / f"chunk-{first}.safetensors"))
        first += abs(size)
    return out


@pytest.mark.parametrize("space", SPACES)
def test_draws_from_files_equal_draws_in_memory(tmp_path, space):
    space = SPACES[space]
    run = make_run(space, cases=2, draws=5)
    array = run.draws.array
    files = FileDraws(chunks(tmp_path, array, [3, 4, -2, 1]), 2, 5, space)
    want = array.copy()
    want[1, 2:4] = np.nan
    memory = MemoryDraws(want)
    assert isinstance(files, DrawSource) and isinstance(memory, DrawSource)
    rows = space.shape[-2] if len(space.shape) > 1 else 1
    for case in range(2):
        for draw in range(5):
            np.testing.assert_array_equal(files.get(case, draw), memory.get(case, draw))
        for start, stop in ((0, rows), (rows - 1, rows)):
            block = files.block(case, start, stop)
            np.testing.assert_array_equal(block, memory.block(case, start, stop))
            assert block.dtype == array.dtype
    run.stats["status"][1, 2:4] = "missing"
    from_memory = build_tree(run)
    run.draws = files
    write_run(run, tmp_path / "a.nc")
    with open_posterior(tmp_path / "a.nc") as p:
        xr.testing.assert_identical(p.tree["summary"].to_dataset(), from_memory["summary"].to_dataset())
        np.testing.assert_array_equal(p.draws, want)


def test_broken_chunks_are_sentences(tmp_path):
    with pytest.raises(StoreError, match="missing"):
        FileDraws([(0, tmp_path / "no.safetensors")], 1, 2, REAL)
    (tmp_path / "bad.safetensors").write_bytes(b"not at all")
    with pytest.raises(StoreError, match="cannot be read"):
        FileDraws([(0, tmp_path / "bad.safetensors")], 1, 2, REAL)
    save_file({"x": np.zeros((2, 3))}, tmp_path / "shape.safetensors")
    with pytest.raises(StoreError, match="expected"):
        FileDraws([(0, tmp_path / "shape.safetensors")], 1, 2, REAL)


#: Prints what `import` of the result side drags in, then the growth of memory while a run is written.
CHILD = """
import sys, threading, time
import invdiff, invdiff.run, invdiff.posterior, invdiff.io.store, invdiff.figures
print([m for m in ("xarray", "matplotlib", "h5netcdf", "h5py", "zarr", "pandas") if m in sys.modules])
import numpy as np, xarray, h5netcdf
from invdiff.io.store import write_run
from invdiff.run import FileDraws, MemoryDraws, Run
from invdiff.spaces import Space
folder = sys.argv[1]
write_run(Run(Space((4, 4)), "posterior", MemoryDraws(np.ones((1, 3, 4, 4)))), folder + "/warm.nc")
space = Space((1, 32, 96, 96))
files = [(8 * i, f"{folder}/chunk-{8 * i}.safetensors") for i in range(8)]
run = Run(space, "posterior", FileDraws(files, 1, 64, space))
def anonymous():
    with open("/proc/self/status") as status:
        return int(next(l for l in status if l.startswith("RssAnon")).split()[1]) / 1024
before = peak = anonymous()
done = False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.005)
thread = threading.Thread(target=watch)
thread.start()
write_run(run, folder + "/big.nc")
done = True
thread.join()
print(peak - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_import_is_light_and_writing_takes_much_less_memory_than_all_draws(tmp_path):
    rng = np.random.default_rng(0)
    for first in range(0, 64, 8):  # few distinct values, so that compressing them is quick
        x = rng.integers(0, 4, (8, 1, 32, 96, 96)).astype(np.float32)
        save_file({"x": x}, tmp_path / f"chunk-{first}.safetensors")
    done = subprocess.run([sys.executable, "-c", CHILD, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    imported, growth = done.stdout.splitlines()
    assert imported == "[]"
    assert float(growth) < 0.6 * (64 * 32 * 96 * 96 * 4 / 2**20)
    with open_posterior(tmp_path / "big.nc") as p:
        assert p.n_draws == 64 and np.isfinite(p.std()).all()


def test_lazy_opening_reads_no_draws(tmp_path):
    path = write_run(make_run(REAL, draws=5), tmp_path / "a.nc")
    with Posterior.open(path) as p:
        assert not p.tree["posterior"]["image"].variable._in_memory
        p.mean()
        p.interval()
        assert not p.tree["posterior"]["image"].variable._in_memory


def test_space_of_any_spacing(tmp_path):
    space = Space((1, 4, 4), spacing={"y": 0.1}, spacing_units="m")
    with open_posterior(write_run(make_run(space, draws=3), tmp_path / "a.nc")) as p:
        assert p.mean()["y"].attrs["units"] == "m" and p.mean()["x"].attrs["units"] == "1"
