"""Reading a scan: the options that say what is given, the problem they make, and the prior that goes with it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from invdiff.cli.options import check_disk
from invdiff.cli.runs import check_prior
from invdiff.errors import InvdiffError

if TYPE_CHECKING:
    from invdiff.prior import Prior
    from invdiff.problem import Problem

FILES = "k-space: .npy, .npz, HDF5 in the layout of fastMRI, or BART .cfl/.hdr."
MaskFile = Annotated[Path | None, typer.Option("--mask", help="Sampling mask; found from the data if left out.")]
CoilMaps = Annotated[Path | None, typer.Option("--coil-maps", help="Coil maps (coil, y, x); ESPIRiT if left out.")]
NoiseScan = Annotated[
    Path | None,
    typer.Option("--noise-scan", help="Noise scan (coil, ...): noise level, and whitening of coils."),
]
Sigma = Annotated[
    float | None,
    typer.Option(
        "--sigma", help="Noise level per real component; estimated from the outermost samples if left out."
    ),
]
Slice = Annotated[int | None, typer.Option("--slice", help="Slice of a volume; the middle one if left out.")]
Key = Annotated[str | None, typer.Option("--key", help="Name of the array in .npz or HDF5.")]


def check_sigma(sigma: float | None) -> None:
    """Refuse a noise level that is none."""
    if sigma is not None and not 0 < sigma < float("inf"):
        raise InvdiffError(f"--sigma is the noise level per real component and must be positive, got {sigma:g}.")


def read_problem(
    file: Path,
    mask: Path | None = None,
    coil_maps: Path | None = None,
    noise_scan: Path | None = None,
    sigma: float | None = None,
    slice: int | None = None,
    key: str | None = None,
    draws: tuple[int, Path] | None = None,
) -> Problem:
    """Read what is given, check it, and build the problem; ``draws`` and their file must fit on the disk."""
    from invdiff import mri
    from invdiff.io import arrays
    from invdiff.io.kspace import read_coil_maps, read_kspace, read_noise

    check_sigma(sigma)
    scan = read_kspace(file, key, slice)
    if draws is not None:
        check_disk(draws[1], draws[0] * scan.kspace[0].nbytes, draws[0])
    return mri.problem_from_kspace(
        scan,
        mask=None if mask is None else arrays.read_array(mask, what="The mask file"),
        coil_maps=None if coil_maps is None else read_coil_maps(coil_maps, slice),
        sigma=sigma,
        noise_scan=None if noise_scan is None else read_noise(noise_scan),
    )


def load_prior(name: str, problem: Problem) -> Prior:
    """Load a prior for the images of a scan, restricted to the pixels that some coil sees."""
    from invdiff import mri, support
    from invdiff.priors import library

    loaded = library.load(name)
    check_prior(loaded, problem)
    seen = mri.support(problem)
    return loaded if bool(seen.all()) else support.restrict(loaded, seen)


def scan_facts(problem: Problem) -> dict[str, str]:
    """Return what was read and estimated, in words."""
    meta = problem.meta
    positions = problem.y.shape[-2] * problem.y.shape[-1]
    return {
        "scan": str(meta["source"]),
        "sampling": f"{meta['sampled']} of {positions} positions, acceleration {meta['acceleration']:.3g}, "
        f"mask {meta['mask_source']}",
        "noise": f"{meta['sigma']:.3g} per real component, {meta['sigma_source']}",
        "coil maps": str(meta["coil_maps_source"]),
    }
