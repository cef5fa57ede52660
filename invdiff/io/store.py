"""Posterior files: netCDF-4 (h5netcdf) or Zarr, written atomically, draws streamed one at a time.

A file appears under its name only when it is whole: it is written under a temporary name beside it, flushed to
disk and renamed. Whatever goes wrong before that, nothing is left behind and an older file of that name stays.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from invdiff.errors import StoreError
from invdiff.io.hdf5_safe import open_h5
from invdiff.io.labels import SCHEMA, Layout, draw_layout, groups, parts_of, root_attrs
from invdiff.run import DrawSource, MemoryDraws, Run, missing_value
from invdiff.summaries import Summary, summarise

if TYPE_CHECKING:
    import xarray as xr

_COMPRESSION = {"zlib": True, "complevel": 1, "shuffle": True}


def write_run(run: Run, path: str | Path) -> Path:
    """Write a run; at no time does more than one draw, or one block of rows, lie in memory.

    Args:
        run: The run.
        path: Target, ``.nc`` or ``.zarr``.

    Returns:
        The path.

    Raises:
        StoreError: If the target cannot be written, in one sentence; nothing is left behind.
    """
    with _writer(path) as writer:
        writer.root(root_attrs(run))
        if run.kind == "point":
            summary = Summary({}, _status(run))
        else:
            layout = draw_layout(run)
            writer.start(layout)

            def put(case: int, draw: int, x: np.ndarray) -> None:
                writer.put(layout, case, draw, x)

            summary = _summarise(run, put)
        for name, dataset in groups(run, summary.values, summary.status).items():
            writer.group(name, dataset)
    return Path(path)


def build_tree(run: Run) -> xr.DataTree:
    """Return the DataTree of a run in memory, the same numbers as `write_run` writes."""
    import xarray as xr

    parts: dict[str, xr.Dataset] = {"/": xr.Dataset(attrs=root_attrs(run))}
    if run.kind == "point":
        summary = Summary({}, _status(run))
    else:
        summary = _summarise(run)
        layout = draw_layout(run)
        data = {
            name: (layout.dims, part.reshape(layout.shape), layout.attrs[name])
            for name, part in zip(layout.names, parts_of(_all_draws(run)))
        }
        parts["posterior"] = layout.coords.assign(data)
    parts |= groups(run, summary.values, summary.status)
    return xr.DataTree.from_dict(parts)


def write_tree(tree: xr.DataTree, draws: DrawSource | None, path: str | Path) -> Path:
    """Write a tree, its draws one at a time from ``draws`` (None where it has no ``/posterior``)."""
    with _writer(path) as writer:
        writer.root({str(k): v for k, v in tree.attrs.items()})
        if draws is not None:
            layout = _layout_of(tree)
            writer.start(layout)
            for case in range(draws.n_cases):
                for draw in range(draws.n_draws):
                    writer.put(layout, case, draw, draws.get(case, draw))
        for name, node in tree.children.items():
            if name != "posterior" or draws is None:
                writer.group(name, node.to_dataset(inherit=False))
    return Path(path)


def open_tree(path: str | Path) -> xr.DataTree:
    """Open a posterior file lazily, after checking that it is whole, self-contained and one of ours.

    Raises:
        StoreError: If it is missing, damaged, unsafe, or not a posterior.
    """
    import xarray as xr

    path = Path(path)
    if path.is_dir():
        from invdiff.io.zarr_safe import check_zarr

        check_zarr(path)
        _zarr()
        tree = xr.open_datatree(path, engine="zarr", consolidated=False, chunks=None)
    else:
        with open_h5(path, max_bytes=1 << 50) as file:
            _check_schema(path, file.attrs.get("schema"))
        tree = xr.open_datatree(path, engine="h5netcdf")
    try:
        _check_schema(path, tree.attrs.get("schema"))
        _check_groups(path, tree)
    except StoreError:
        tree.close()
        raise
    return tree


def _summarise(run: Run, visit: Any = None) -> Summary:
    dtype = np.dtype(str(run.space.dtype).removeprefix("torch."))
    return summarise(run.draws, run.space.shape, dtype, _status(run), run.stats.get("log_weight"), visit)


def _status(run: Run) -> np.ndarray:
    shape = (run.draws.n_cases, run.draws.n_draws)
    return np.asarray(run.stats.get("status", np.full(shape, "ok")), dtype="U7")


def _all_draws(run: Run) -> np.ndarray:
    dtype = np.dtype(str(run.space.dtype).removeprefix("torch."))
    missing = _status(run) == "missing"
    if isinstance(run.draws, MemoryDraws):
        array = run.draws.array.astype(dtype, copy=False)
        if missing.any():
            array = array.copy()
            array[missing] = missing_value(dtype)
        return array
    out = np.empty((run.draws.n_cases, run.draws.n_draws, *run.space.shape), dtype)
    for case in range(run.draws.n_cases):
        for draw in range(run.draws.n_draws):
            out[case, draw] = missing_value(dtype) if missing[case, draw] else run.draws.get(case, draw)
    return out


def _layout_of(tree: xr.DataTree) -> Layout:
    dataset = tree.children["posterior"].to_dataset(inherit=False)
    # A store lists its arrays in any order (Zarr: that of the folder), so the order comes from the names.
    names = ("x_re", "x_im") if "x_re" in dataset else tuple(str(n) for n in dataset.data_vars)
    first = dataset[names[0]]
    return Layout(
        names=names,
        dims=tuple(str(d) for d in first.dims),
        shape=first.shape,
        dtype=first.dtype,
        attrs={n: dict(dataset[n].attrs) for n in names},
        coords=dataset.drop_vars(names),
    )


def _check_schema(path: Path, schema: Any) -> None:
    schema = schema.decode() if isinstance(schema, bytes) else schema
    if schema == SCHEMA:
        return
    if isinstance(schema, str) and schema.startswith("invdiff.posterior/"):
        raise StoreError(f"{path} has schema {schema}, and this version reads {SCHEMA}; update invdiff.")
    raise StoreError(f"{path} is not a posterior file: its root has no attribute schema = {SCHEMA!r}.")


def _check_groups(path: Path, tree: xr.DataTree) -> None:
    home = "estimate" if tree.attrs.get("kind") == "point" else "posterior"
    names = set(tree.children[home].data_vars) if home in tree.children else set()
    if not ({"image"} <= names or {"x_re", "x_im"} <= names):
        raise StoreError(
            f"{path} is incomplete: /{home} holds neither image nor x_re and x_im; write it again with invdiff."
        )


class _Writer(Protocol):
    def root(self, attrs: dict[str, Any]) -> None: ...
    def start(self, layout: Layout) -> None: ...
    def put(self, layout: Layout, case: int, draw: int, x: np.ndarray) -> None: ...
    def group(self, name: str, dataset: xr.Dataset) -> None: ...
    def close(self) -> None: ...
    def done(self) -> None: ...


class _NetCDF:
    """netCDF-4 through h5netcdf: small groups by xarray, draws straight into chunks."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: Any = None

    def root(self, attrs: dict[str, Any]) -> None:
        import xarray as xr

        xr.Dataset(attrs=attrs).to_netcdf(self.path, mode="w", engine="h5netcdf")

    def start(self, layout: Layout) -> None:
        import h5netcdf

        layout.coords.to_netcdf(self.path, mode="a", group="posterior", engine="h5netcdf")
        self.file = h5netcdf.File(self.path, "a")
        for name in layout.names:
            variable = self.file["posterior"].create_variable(
                name,
                layout.dims,
                layout.dtype,
                fillvalue=layout.dtype.type(np.nan),
                chunks=layout.chunks,
                compression="gzip",
                compression_opts=1,
                shuffle=True,
            )
            variable.attrs.update(layout.attrs[name])

    def put(self, layout: Layout, case: int, draw: int, x: np.ndarray) -> None:
        for name, part in zip(layout.names, parts_of(x)):
            self.file["posterior"][name][layout.index(case, draw)] = part

    def group(self, name: str, dataset: xr.Dataset) -> None:
        self.close()
        encoding = {k: dict(_COMPRESSION) for k, v in dataset.data_vars.items() if v.ndim > 1}
        _fresh(dataset).to_netcdf(self.path, mode="a", group=name, engine="h5netcdf", encoding=encoding)

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None

    def done(self) -> None:
        self.close()


class _Zarr:
    """Zarr format 3, metadata consolidated at the end so that opening reads one file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.arrays: dict[str, Any] = {}
        _zarr()

    def _write(self, dataset: xr.Dataset, mode: Any, group: str | None) -> None:
        dataset.to_zarr(self.path, mode=mode, group=group, consolidated=False, zarr_format=3)

    def root(self, attrs: dict[str, Any]) -> None:
        import xarray as xr

        self._write(xr.Dataset(attrs=attrs), "w", None)

    def start(self, layout: Layout) -> None:
        import zarr
        from zarr.codecs import BloscCodec

        self._write(layout.coords, "a", "posterior")
        group = zarr.open_group(self.path, path="posterior", mode="a", zarr_format=3)
        for name in layout.names:
            self.arrays[name] = group.create_array(
                name,
                shape=layout.shape,
                chunks=layout.chunks,
                dtype=layout.dtype,
                fill_value=np.nan,
                compressors=BloscCodec(cname="zlib", clevel=1, shuffle="shuffle"),
                dimension_names=layout.dims,
                attributes=layout.attrs[name],
            )

    def put(self, layout: Layout, case: int, draw: int, x: np.ndarray) -> None:
        for name, part in zip(layout.names, parts_of(x)):
            self.arrays[name][layout.index(case, draw)] = part

    def group(self, name: str, dataset: xr.Dataset) -> None:
        self._write(_fresh(dataset), "a", name)

    def close(self) -> None:
        self.arrays = {}

    def done(self) -> None:
        import zarr

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # consolidated metadata is young in format 3, and all readers want it
            zarr.consolidate_metadata(self.path, zarr_format=3)


def _fresh(dataset: xr.Dataset) -> xr.Dataset:
    """Drop the encoding another format left behind."""
    return dataset.drop_encoding()


def _zarr() -> None:
    try:
        import zarr  # noqa: F401
    except ImportError:
        raise StoreError("Zarr stores need the package zarr; install invdiff[zarr], or use a .nc file.") from None


@contextmanager
def _writer(path: str | Path) -> Iterator[_Writer]:
    """Yield a writer on a temporary name; rename on success, remove on any failure."""
    path = Path(path)
    kinds = {".nc": _NetCDF, ".nc4": _NetCDF, ".zarr": _Zarr}
    if path.suffix not in kinds:
        raise StoreError(f"{path.name} should end in .nc (netCDF-4) or .zarr, so that its format is known.")
    if not path.parent.is_dir():
        raise StoreError(f"The folder {path.parent} does not exist; create it first.")
    if path.exists() and path.is_dir() != (path.suffix == ".zarr"):
        raise StoreError(f"{path} exists and is of another kind; choose another name.")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    writer: Any = None
    try:
        writer = kinds[path.suffix](temporary)
        yield writer
        writer.done()
        _sync(temporary)
        _replace(temporary, path)
    except OSError as error:
        reason = error.strerror or str(error).splitlines()[0]
        raise StoreError(f"{path} could not be written ({reason}); nothing was left behind.") from error
    finally:
        with contextlib.suppress(Exception):  # a failed flush must not hide the first error
            if writer is not None:
                writer.close()
        _remove(temporary)


def _sync(path: Path) -> None:
    """Flush a file, or every file below a folder, and the folder that names it."""
    files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
    for file in files:
        with file.open("rb") as handle:
            os.fsync(handle.fileno())


def _replace(temporary: Path, path: Path) -> None:
    if path.is_dir():
        old = path.with_name(f".{path.name}.{secrets.token_hex(4)}.old")
        path.replace(old)
        temporary.replace(path)
        shutil.rmtree(old, ignore_errors=True)
    else:
        temporary.replace(path)
    if hasattr(os, "O_DIRECTORY"):
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
