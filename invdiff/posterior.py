"""Posterior draws as an object: a thin, immutable view of a labelled DataTree with honest summaries."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from invdiff.errors import InvdiffError, StoreError
from invdiff.run import STATUSES, Run
from invdiff.summaries import QUANTILES, draw_weights, quantiles

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False, repr=False)
class Posterior:
    """Draws of ``x`` given ``y`` with labels, summaries and provenance.

    Summaries leave out draws that failed (status other than ``ok``) and say so in ``n_failed``. Images that are
    complex have a complex mean; their spread is the root mean square deviation
    ``sqrt(var(re) + var(im))``, and quantiles and intervals are those of the magnitude, because complex numbers
    have no order. ``magnitude=True`` asks for the mean or spread of the magnitude instead.

    Args:
        tree: DataTree of the schema ``invdiff.posterior/1``; do not change it.
    """

    tree: xr.DataTree

    @classmethod
    def from_run(cls, run: Run) -> Posterior:
        """Return the posterior of a run, draws in memory."""
        from invdiff.io.store import build_tree

        return cls(build_tree(run))

    @classmethod
    def open(cls, path: str | Path) -> Posterior:
        """Open a ``.nc`` or ``.zarr`` file; draws are read when asked for.

        Raises:
            StoreError: If the file is missing, damaged, unsafe, or not a posterior.
        """
        from invdiff.io.store import open_tree

        return cls(open_tree(path))

    def close(self) -> None:
        """Close the file behind the draws, if there is one."""
        self.tree.close()

    def __enter__(self) -> Posterior:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def kind(self) -> str:
        """``posterior``, ``ensemble`` or ``point``."""
        return str(self.tree.attrs.get("kind", "posterior"))

    @property
    def status(self) -> str:
        """``complete``, or ``stopped`` where the run ended before all draws were made."""
        return str(self.tree.attrs.get("status", "complete"))

    @property
    def title(self) -> str:
        """One line for people."""
        from invdiff.io.labels import decode_attrs

        return str(decode_attrs({"title": self.tree.attrs.get("title", "")})["title"])

    @property
    def provenance(self) -> dict[str, Any]:
        """Versions, sampler, prior, operator, likelihood, hashes, seed, device: whatever the run recorded."""
        from invdiff.io.labels import decode_attrs

        return decode_attrs(self.tree["provenance"].attrs)

    @property
    def width_warning(self) -> str:
        """What is known to be wrong about the spread, from exact posteriors; empty where nothing is."""
        return "" if self.kind == "point" else str(self.provenance.get("width_warning", ""))

    @property
    def is_complex(self) -> bool:
        """Whether images are complex."""
        return "x_re" in self._home

    @property
    def n_draws(self) -> int:
        """Draws per case, failed and missing ones included."""
        return int(self._group("sample_stats").sizes["draw"])

    @property
    def n_cases(self) -> int:
        """Number of cases."""
        return int(self._home.sizes.get("case", 1))

    @property
    def n_failed(self) -> int:
        """Draws that are not usable, over all cases; summaries leave them out."""
        return int((self._codes() != 0).sum())

    @property
    def stats(self) -> xr.Dataset:
        """Per draw: evaluations, time, status (``ok``, ``nan`` or ``missing``), log-likelihood, residual norm."""
        stats = self._group("sample_stats").isel(chain=0, drop=True)
        words = np.array(STATUSES)[stats["status"].values.astype(int)]
        return stats.assign(status=(stats["status"].dims, words, {"long_name": "status of the draw"}))

    @property
    def draws(self) -> xr.DataArray:
        """The draws, ``([case,] draw, *image)``; failed ones are there too, as NaN or as they came."""
        self._refuse_point("has no draws")
        x = self._combine(self._home, "x" if self.is_complex else "image")
        return x.isel(chain=0, drop=True).rename("draws")

    @property
    def estimate(self) -> xr.DataArray:
        """The point estimate, ``([case, restart,] *image)``."""
        if self.kind != "point":
            raise InvdiffError("These are posterior draws, not a point estimate; use mean() or median().")
        return self._combine(self._home, "x" if self.is_complex else "image").rename("estimate")

    @property
    def x_true(self) -> xr.DataArray | None:
        """The true image where the data were simulated."""
        if "constant_data" not in self.tree.children:
            return None
        constant = self._group("constant_data")
        return self._combine(constant, "x_true") if {"x_true", "x_true_re"} & set(constant.data_vars) else None

    @property
    def observed(self) -> xr.Dataset:
        """Measurement ``y``, ``mask`` and ``sigma``, as far as recorded; complex ones as complex numbers."""
        import xarray as xr

        if "observed_data" not in self.tree.children:
            return xr.Dataset()
        data = self._group("observed_data")
        names = dict.fromkeys(str(v.attrs.get("complex_pair", k)) for k, v in data.data_vars.items())
        return xr.Dataset({n: self._combine(data, n) for n in names})

    def mean(self, magnitude: bool = False) -> xr.DataArray:
        """Return the posterior mean; complex for complex images unless ``magnitude`` asks for the mean of |x|."""
        if self.is_complex and not magnitude:
            return self._combine(self._summary("mean_re", 1), "mean").rename("mean")
        return self._stored("mean", 1)

    def median(self) -> xr.DataArray:
        """Return the pixelwise posterior median (of the magnitude, for complex images)."""
        return self._stored("median", 1)

    def std(self, magnitude: bool = False) -> xr.DataArray:
        """Return the pixelwise posterior standard deviation (divisor n - 1).

        Complex images: the root mean square deviation ``sqrt(var(re) + var(im))``, or the standard deviation
        of the magnitude where ``magnitude`` is set.
        """
        return self._stored("std_complex" if self.is_complex and not magnitude else "std", 2)

    def quantile(self, q: float) -> xr.DataArray:
        """Return the pixelwise quantile ``q`` (of the magnitude, for complex images).

        Order statistic ``k`` of ``n`` draws stands at probability ``k / (n + 1)``.
        """
        if not 0 <= q <= 1:
            raise InvdiffError(f"A quantile needs a probability between 0 and 1, got {q!r}.")
        return self._quantiles([q])[0]

    def interval(self, level: float = 0.9) -> xr.Dataset:
        """Return the equal-tailed pixelwise interval as ``lower`` and ``upper``.

        For complex images it is the interval of the magnitude (attribute ``quantity``). With ``n`` draws a
        level above ``(n - 1) / (n + 1)`` cannot be reached; the interval then ends at the extreme draws and
        the attribute ``supported_level`` says what they stand for.
        """
        import xarray as xr

        if not 0 < level < 1:
            raise InvdiffError(f"An interval needs a level between 0 and 1, got {level!r}.")
        lower, upper = self._quantiles([(1 - level) / 2, (1 + level) / 2])
        n = int((self._codes() == 0).sum(axis=1).min())
        attrs = {
            "level": level,
            "supported_level": min(level, (n - 1) / (n + 1)),
            "quantity": "magnitude" if self.is_complex else "value",
        }
        name = f"{level:.0%} interval"
        return xr.Dataset(
            {
                "lower": lower.assign_attrs(long_name=f"lower end of the {name}"),
                "upper": upper.assign_attrs(long_name=f"upper end of the {name}"),
            },
            attrs=attrs,
        )

    def coverage(self, level: float = 0.9) -> xr.DataArray:
        """Return the fraction of pixels of ``x_true`` inside the interval, one number per case."""
        if self.x_true is None:
            raise InvdiffError("Coverage needs the true image, and this posterior has none; simulate the data.")
        interval = self.interval(level)
        truth = abs(self.x_true) if self.is_complex else self.x_true
        inside = (truth >= interval["lower"]) & (truth <= interval["upper"])
        inside = inside.where(np.isfinite(interval["lower"])).drop_attrs()
        attrs = {"long_name": f"coverage of the {level:.0%} interval", "units": "1"}
        return inside.mean([d for d in inside.dims if d != "case"]).rename("coverage").assign_attrs(attrs)

    def save(self, path: str | Path) -> Path:
        """Write to ``.nc`` (netCDF-4) or ``.zarr``, atomically: the whole file or nothing."""
        from invdiff.io.store import write_tree

        return write_tree(self.tree, None if self.kind == "point" else TreeDraws(self), path)

    def to_netcdf(self, path: str | Path) -> Path:
        """Write netCDF-4 under a name ending in ``.nc``."""
        return self._save_as(path, ".nc")

    def to_zarr(self, path: str | Path) -> Path:
        """Write a Zarr store under a name ending in ``.zarr``."""
        return self._save_as(path, ".zarr")

    def plot(self, case: int = 0) -> Figure:
        """Return a figure: mean, spread, interval width, draws, and truth and error where known."""
        from invdiff.figures import summary_figure

        return summary_figure(self, case)

    def __repr__(self) -> str:
        rows = self.facts()
        width = max(len(k) for k in rows)
        return "\n".join([f"Posterior: {self.title}", *(f"  {k:<{width}}  {v}" for k, v in rows.items())])

    def _repr_html_(self) -> str:
        from invdiff.html import posterior_html

        return posterior_html(self)

    def facts(self) -> dict[str, str]:
        """Return the facts that the reprs show, by name."""
        image = self._home["x_re" if self.is_complex else "image"]
        shape = ", ".join(f"{d} {n}" for d, n in image.sizes.items() if d not in ("case", "chain", "draw"))
        dtype = np.result_type(image.dtype, np.complex64) if self.is_complex else image.dtype
        provenance = self.provenance
        out = {"kind": {"point": "point estimate, no uncertainty"}.get(self.kind, self.kind)}
        if self.kind != "point":
            failed = f", {self.n_failed} failed or missing and left out" if self.n_failed else ""
            per = f" for each of {self.n_cases} cases" if self.n_cases > 1 else ""
            out["draws"] = f"{self.n_draws}{per}{failed}"
        out["image"] = f"({shape}) {dtype}"
        for key, inner in (("sampler", "name"), ("prior", "id"), ("operator", "name"), ("likelihood", "name")):
            value = provenance.get(key)
            value = value.get(inner) if isinstance(value, dict) else value
            if value:
                out[key] = str(value)
        if "seed" in provenance:
            out["seed"] = str(provenance["seed"])
        if self.status != "complete":
            out["status"] = self.status
        if self.width_warning:
            out["caution"] = self.width_warning
        return out

    @property
    def _home(self) -> xr.Dataset:
        return self._group("estimate" if self.kind == "point" else "posterior")

    def _group(self, name: str) -> xr.Dataset:
        return self.tree.children[name].to_dataset(inherit=False)

    def _codes(self) -> np.ndarray:
        """Status codes ``(N, S)``."""
        return self._group("sample_stats")["status"].values.reshape(-1, self.n_draws).astype(int)

    def _save_as(self, path: str | Path, suffix: str) -> Path:
        if Path(path).suffix != suffix:
            raise StoreError(f"{Path(path).name} should end in {suffix}; use save() to choose by suffix.")
        return self.save(path)

    def _refuse_point(self, what: str) -> None:
        if self.kind == "point":
            raise InvdiffError(f"This is a point estimate, which {what}; use .estimate, or a posterior sampler.")

    def _summary(self, name: str, needed: int) -> xr.Dataset:
        """Return ``/summary``, or refuse where it lacks ``name`` for want of draws."""
        self._refuse_point("carries no posterior mean, spread or interval")
        summary = self._group("summary") if "summary" in self.tree.children else None
        if summary is None or name not in summary:
            usable = int((self._codes() == 0).sum(axis=1).max())
            failed = f" ({self.n_failed} failed or missing)" if self.n_failed else ""
            raise InvdiffError(
                f"This needs at least {needed} usable draws, and there {'is' if usable == 1 else 'are'} "
                f"{usable}{failed}; ask for more draws."
            )
        return summary

    def _stored(self, name: str, needed: int) -> xr.DataArray:
        return self._summary(name, needed)[name]

    def _quantiles(self, probs: list[float]) -> list[xr.DataArray]:
        """Quantiles from ``/summary`` where stored there, else from the draws."""
        template = self._stored("q05", 2)
        stored = {round(p, 9): name for name, p in QUANTILES.items()}
        if all(round(p, 9) in stored for p in probs):
            return [self._stored(stored[round(p, 9)], 2) for p in probs]
        source = TreeDraws(self)
        values = [quantiles(source, c, source.shape, source.weights(c), probs) for c in range(self.n_cases)]
        # Cases with too few draws stay NaN, as in the stored summary.
        arrays = np.stack(values, axis=1).astype(template.dtype).reshape(len(probs), *template.shape)
        of = " of the magnitude" if self.is_complex else ""
        return [
            template.copy(data=np.where(np.isnan(template), np.nan, a))
            .rename("quantile")
            .assign_attrs(long_name=f"posterior quantile {p:g}{of}")
            for p, a in zip(probs, arrays)
        ]

    def _combine(self, dataset: xr.Dataset, name: str) -> xr.DataArray:
        """Return ``name``, put together from ``name_re`` and ``name_im`` where it was complex."""
        stored = {"x": ("x_re", "x_im")}.get(name, (f"{name}_re", f"{name}_im"))
        if stored[0] not in dataset:
            return dataset[name]
        re, im = (dataset[part] for part in stored)
        values = np.empty(re.shape, np.result_type(re.dtype, np.complex64))
        values.real, values.imag = re.values, im.values
        long_name = str(re.attrs.get("long_name", name)).removesuffix(", real part")
        attrs = {**re.attrs, "long_name": long_name}
        attrs.pop("complex_pair", None)
        out = re.copy(data=values).rename(name if name not in re.dims else None)
        out.attrs = attrs
        return out


class TreeDraws:
    """The draws of a posterior as a `DrawSource`, read from its tree (and so from its file) piece by piece."""

    def __init__(self, posterior: Posterior) -> None:
        dataset = posterior._group("posterior").isel(chain=0)
        names = ("x_re", "x_im") if posterior.is_complex else ("image",)
        self._parts = [dataset[n] for n in names]
        self._cases = "case" in self._parts[0].dims
        self.n_cases, self.n_draws = posterior.n_cases, posterior.n_draws
        self.shape = self._parts[0].shape[2 if self._cases else 1 :]
        self._codes = posterior._codes()
        stats = posterior._group("sample_stats")
        self._log_weight = stats["log_weight"].values.reshape(self._codes.shape) if "log_weight" in stats else None

    def weights(self, case: int) -> np.ndarray:
        """Weights of the draws of a case, 0 for those that do not count."""
        status = np.array(STATUSES)[self._codes[case]]
        return draw_weights(status, None if self._log_weight is None else self._log_weight[case])

    def get(self, case: int, draw: int) -> np.ndarray:
        """Return one draw, ``(*image)``."""
        return self._read(case, {"draw": draw})

    def block(self, case: int, start: int, stop: int) -> np.ndarray:
        """Return rows ``[start, stop)`` of all draws of a case."""
        rows = {self._parts[0].dims[-2]: slice(start, stop)} if len(self.shape) > 1 else {}
        return self._read(case, rows)

    def _read(self, case: int, at: dict[Any, Any]) -> np.ndarray:
        at = {**at, "case": case} if self._cases else at
        parts = [part.isel(at).values for part in self._parts]
        return parts[0] if len(parts) == 1 else parts[0] + 1j * parts[1]


def open_posterior(path: str | Path) -> Posterior:
    """Open a posterior file; see `Posterior.open`."""
    return Posterior.open(path)
