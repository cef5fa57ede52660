"""The groups of the posterior store as labelled xarray datasets (schema ``invdiff.posterior/1``).

Images that are real are called ``image``: a netCDF group cannot hold a variable ``x`` beside a coordinate ``x``.
Complex ones are two variables ``x_re`` and ``x_im`` whose attribute ``complex_pair`` names the pair. Data
dimensions called ``z``, ``y``, ``x`` become ``data_z``, ``data_y``, ``data_x`` for the same reason.
"""

from __future__ import annotations

import contextlib
import json
import re
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import numpy as np

from invdiff.run import STATUSES, Run
from invdiff.spaces import Space

if TYPE_CHECKING:
    import xarray as xr

SCHEMA = "invdiff.posterior/1"
#: Provenance that cannot be an attribute name goes into one JSON attribute of this name.
_MORE = "more"
_LONG_NAMES = {
    "mean": "posterior mean",
    "median": "posterior median",
    "std": "posterior standard deviation",
    "mean_re": "posterior mean, real part",
    "mean_im": "posterior mean, imaginary part",
    "std_complex": "root mean square deviation of the complex value",
    "q05": "posterior quantile 0.05",
    "q25": "posterior quantile 0.25",
    "q75": "posterior quantile 0.75",
    "q95": "posterior quantile 0.95",
}
_STATS = {
    "nfe": ("network evaluations", "1"),
    "vjp": ("reverse passes through the network", "1"),
    "noe": ("operator evaluations", "1"),
    "wall_s": ("wall time", "s"),
    "log_likelihood": ("log-likelihood of the data given the draw", "1"),
    "residual_norm": ("norm of the data minus the operator's prediction", "1"),
    "log_weight": ("log weight of the draw", "1"),
    "accepted": ("share of Metropolis moves that were accepted", "1"),
    "trail": ("facts about the draw at the beginning, half-way through and at the end of its chain", "1"),
    "ess": ("smallest effective sample size of the case's particles along the run", "1"),
    "ess_run": ("effective sample size of the case's particles over all resamplings", "1"),
}


@dataclass(frozen=True)
class Layout:
    """How draws lie in ``/posterior``: variable names, dims, shape, dtype, attributes, coordinates."""

    names: tuple[str, ...]
    dims: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: np.dtype
    attrs: dict[str, dict[str, Any]]
    coords: xr.Dataset

    @property
    def chunks(self) -> tuple[int, ...]:
        """One draw per chunk."""
        lead = self.dims.index("draw") + 1
        return (1,) * lead + self.shape[lead:]

    def index(self, case: int, draw: int) -> tuple[int, ...]:
        """Index of a draw in the stored arrays."""
        return (case, 0, draw) if self.dims[0] == "case" else (0, draw)


def names_of(space: Space) -> tuple[str, ...]:
    """Variable names of an image in the store."""
    return ("x_re", "x_im") if space.is_complex else ("image",)


def parts_of(x: np.ndarray) -> tuple[np.ndarray, ...]:
    """Arrays that go under `names_of`."""
    return (x.real, x.imag) if np.iscomplexobj(x) else (x,)


def image_coords(space: Space) -> dict[str, Any]:
    """Dimension coordinates of an image: distances where the spacing is known, else indices."""
    coords = {}
    for dim, n in zip(space.dims, space.shape):
        step = space.spacing.get(dim)
        values = np.arange(n) if step is None else np.arange(n) * step
        units = "1" if step is None else space.spacing_units
        kind = "index" if dim in ("channel", "index") or step is not None else "pixel index"
        attrs = {"long_name": dim if step is not None else f"{dim} {kind}".replace("index index", "index")}
        coords[dim] = (dim, values, {**attrs, "units": units})
    return coords


def root_attrs(run: Run) -> dict[str, Any]:
    """Attributes of the root group."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {
        "schema": SCHEMA,
        "title": encode_attr(run.title or "invdiff run"),
        "created_at": now,
        "status": run.status,
        "kind": run.kind,
        "Conventions": "CF-1.10",
    }


def draw_layout(run: Run) -> Layout:
    """Layout of the draws of a run."""
    import xarray as xr

    lead = {"case": run.draws.n_cases} if run.draws.n_cases > 1 else {}
    lead |= {"chain": 1, "draw": run.draws.n_draws}
    coords: dict[str, Any] = {k: (k, np.arange(n), {"long_name": k, "units": "1"}) for k, n in lead.items()}
    names = names_of(run.space)
    return Layout(
        names=names,
        dims=(*lead, *run.space.dims),
        shape=(*lead.values(), *run.space.shape),
        dtype=np.dtype(str(run.space.real_dtype).removeprefix("torch.")),
        attrs={n: image_attrs(run.space, "posterior draws", n) for n in names},
        coords=xr.Dataset(coords={**coords, **image_coords(run.space)}),
    )


def image_attrs(space: Space, long_name: str, name: str = "") -> dict[str, Any]:
    """Attributes of an image variable; ``..._re`` and ``..._im`` name their pair."""
    attrs = {"long_name": long_name, "units": space.units}
    part = {"_re": ", real part", "_im": ", imaginary part"}.get(name[-3:])
    if part:
        attrs |= {"long_name": long_name + part, "complex_pair": name[:-3]}
    return attrs


def groups(run: Run, values: dict[str, np.ndarray], status: np.ndarray) -> dict[str, xr.Dataset]:
    """Return every group but ``/posterior``, given the summaries and the final status of the draws."""
    import xarray as xr

    out = {}
    if run.kind == "point":
        out["estimate"] = _estimate(run)
    out["sample_stats"] = _stats(run, status)
    if run.observed:
        out["observed_data"] = _observed(run)
    if run.x_true is not None:
        out["constant_data"] = _images(run, {"x_true": np.asarray(run.x_true)}, "true image")
    if run.kind != "point" and values:
        out["summary"] = _summary(run, values)
    out["diagnostics"] = _diagnostics(run, status)
    out["provenance"] = xr.Dataset(attrs=encode_attrs(run.provenance))
    return out


def _images(run: Run, arrays: dict[str, np.ndarray], long_name: str, extra: str = "") -> xr.Dataset:
    """Label arrays ``(N, *image)``, or ``(N, S, *image)`` where ``extra`` names the second axis."""
    import xarray as xr

    lead = ("case",) if run.draws.n_cases > 1 else ()
    coords = image_coords(run.space)
    if lead:
        coords["case"] = ("case", np.arange(run.draws.n_cases), {"long_name": "case", "units": "1"})
    data = {}
    for name, array in arrays.items():
        array = array if lead else array[0]
        dims = (*lead, *((extra,) if extra else ()), *run.space.dims)
        parts = (f"{name}_re", f"{name}_im") if np.iscomplexobj(array) else (name,)
        for part, numbers in zip(parts, parts_of(array)):
            data[part] = (dims, numbers, image_attrs(run.space, long_name, part if len(parts) > 1 else ""))
    return xr.Dataset(data, coords=coords)


def _estimate(run: Run) -> xr.Dataset:
    """Point estimates; several per case (restarts) get a dimension ``restart``, never ``draw``."""
    n = run.draws.n_draws
    arrays = np.stack([[run.draws.get(c, s) for s in range(n)] for c in range(run.draws.n_cases)])
    name = names_of(run.space)[0].removesuffix("_re")
    if n == 1:
        return _images(run, {name: arrays[:, 0]}, "point estimate")
    return _images(run, {name: arrays}, "point estimate", extra="restart")


def _summary(run: Run, values: dict[str, np.ndarray]) -> xr.Dataset:
    out = _images(run, values, "")
    for name in values:
        of = ""
        if run.space.is_complex and name not in ("mean_re", "mean_im", "std_complex"):
            of = " of the magnitude"
        attrs = image_attrs(run.space, _LONG_NAMES.get(name, name) + of)
        if name in ("mean_re", "mean_im"):
            attrs["complex_pair"] = "mean"
        out[name].attrs.update(attrs)
    out.attrs["quantile_method"] = "order statistics at k / (n + 1), ends clipped"
    if "log_weight" in run.stats:
        out.attrs["weights"] = "exp(log_weight)"
    return out


def _stats(run: Run, status: np.ndarray) -> xr.Dataset:
    import xarray as xr

    lead = ("case",) if run.draws.n_cases > 1 else ()
    dims = (*lead, "chain", "draw")

    def shaped(values: np.ndarray) -> np.ndarray:
        return values[:, None] if lead else values[0][None]

    data = {}
    for name, values in run.stats.items():
        if name != "status":
            long_name, units = _STATS.get(name, (name.replace("_", " "), "1"))
            own = tuple(f"{name}_{i}" for i in range(np.ndim(values) - 2))
            data[name] = ((*dims, *own), shaped(np.asarray(values)), {"long_name": long_name, "units": units})
    codes = np.array([[STATUSES.index(s) for s in row] for row in status], dtype=np.int8)
    meaning: dict[str, Any] = {
        "flag_values": np.arange(len(STATUSES), dtype=np.int8),
        "flag_meanings": " ".join(STATUSES),
    }
    data["status"] = (dims, shaped(codes), {**meaning, "long_name": "status of the draw"})
    sizes = {"case": run.draws.n_cases, "chain": 1, "draw": run.draws.n_draws}
    coords = {d: (d, np.arange(sizes[d]), {"long_name": d, "units": "1"}) for d in dims}
    return xr.Dataset(data, coords=coords)


def _diagnostics(run: Run, status: np.ndarray) -> xr.Dataset:
    import xarray as xr

    dims = ("case",) if run.draws.n_cases > 1 else ()
    data = {}
    for name in STATUSES:
        count = (status == name).sum(axis=1).astype(np.int64)
        data[f"draws_{name}"] = (dims, count if dims else count[0], {"long_name": f"draws with status {name}"})
    return xr.Dataset(data)


def _observed(run: Run) -> xr.Dataset:
    """Data, mask and noise level; axes of length one that only broadcast are dropped."""
    import xarray as xr

    space = run.range_space
    n = run.draws.n_cases
    data: dict[str, Any] = {}
    for name, values in run.observed.items():
        array = np.asarray(values)
        dims, array = _data_dims(array, space, n, name)
        attrs = {"long_name": _DATA_NAMES.get(name, name), "units": _data_units(name, space)}
        if not np.iscomplexobj(array):
            data[name] = (dims, array, attrs)
            continue
        for part, numbers in (("re", array.real), ("im", array.imag)):
            long_name = f"{attrs['long_name']}, {'real' if part == 're' else 'imaginary'} part"
            pair = {**attrs, "long_name": long_name, "complex_pair": name}
            data[f"{name}_{part}"] = (dims, numbers, pair)
    return xr.Dataset(data)


_DATA_NAMES = {"y": "measurement", "mask": "sampled positions", "sigma": "noise level per real component"}


def _data_units(name: str, space: Space | None) -> str:
    return "1" if name == "mask" or space is None else space.units


def _data_dims(array: np.ndarray, space: Space | None, n: int, name: str) -> tuple[tuple[str, ...], np.ndarray]:
    """Name the axes of an array that broadcasts over ``(N, *range)``."""
    dims = () if space is None else tuple(f"data_{d}" if d in ("z", "y", "x") else d for d in space.dims)
    rank = len(dims)
    full = ("case", *dims)
    if space is not None and array.ndim == rank + 1:
        names, sizes = full, (n, *space.shape)
    elif space is not None and array.ndim == rank:
        names, sizes = dims, space.shape
    elif array.shape == (n,):
        names, sizes = ("case",), (n,)
    else:
        return tuple(f"{name}_axis_{i}" for i in range(array.ndim)), array
    if any(a not in (1, s) for a, s in zip(array.shape, sizes)):
        return tuple(f"{name}_axis_{i}" for i in range(array.ndim)), array
    drop = tuple(
        i
        for i, (a, s) in enumerate(zip(array.shape, sizes))
        if (a == 1 and s > 1) or (names[i] == "case" and a == 1)
    )
    return tuple(d for i, d in enumerate(names) if i not in drop), array.squeeze(axis=drop)


def encode_attrs(values: dict[str, Any]) -> dict[str, Any]:
    """Return attributes that any netCDF reader takes and `decode_attrs` turns back exactly."""
    good = {k: v for k, v in values.items() if re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", k) and k != _MORE}
    rest = {str(k): v for k, v in values.items() if k not in good}
    out = {k: encode_attr(v) for k, v in good.items()}
    return {**out, _MORE: json.dumps(rest, default=_plain)} if rest else out


def encode_attr(value: Any) -> str | int | float:
    """Text and numbers stand as they are, everything else (and text that looks like JSON) as JSON."""
    value = _plain(value) if isinstance(value, np.generic) else value
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return json.dumps(value, default=_plain)
    if isinstance(value, int):
        return value if abs(value) < 2**63 else json.dumps(value)
    if isinstance(value, float):
        return value
    try:
        json.loads(value)
    except ValueError:
        safe = value and "\x00" not in value and not re.search("[\ud800-\udfff]", value)
        return value if safe else json.dumps(value)
    return json.dumps(value)


def decode_attrs(attrs: dict[Any, Any]) -> dict[str, Any]:
    """Inverse of `encode_attrs`."""
    out: dict[str, Any] = {}
    for key, value in attrs.items():
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                value = json.loads(value)
        elif isinstance(value, np.generic):
            value = value.item()
        if key == _MORE and isinstance(value, dict):
            out.update(value)
        else:
            out[str(key)] = value
    return out


def _plain(value: Any) -> Any:
    """Turn what JSON does not know into what it does."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=str)
    if isinstance(value, tuple):
        return list(value)
    try:
        return dict(value)
    except (TypeError, ValueError):
        return str(value)
