"""Bad input to operators: one clear sentence each; odd but valid input: right answers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from invdiff import operators as O
from invdiff.errors import InvdiffError
from invdiff.likelihoods import Gaussian
from invdiff.problem import Problem
from invdiff.spaces import Space

MAPS = torch.ones(2, 4, 6, dtype=torch.complex64)
ONES = torch.ones(4, 6)
NAN = torch.full((4, 6), float("nan"))
ONE_EMPTY = torch.stack([ONES, 0 * ONES])

BAD: dict[str, tuple[Callable[[], object], str]] = {
    "mask-half": (lambda: O.Mask(0.5 * ONES), "values such as 0.5"),
    "mask-two": (lambda: O.MultiCoilMRI(2 * ONES, MAPS), "only 0 .* and 1"),
    "mask-nan": (lambda: O.Mask(NAN), "24 NaN or infinite values"),
    "mask-complex": (lambda: O.Mask(ONES + 0j), "mask is complex"),
    "mask-empty": (lambda: O.Mask(0 * ONES), "no sampled positions"),
    "mask-empty-case": (lambda: O.MultiCoilMRI(ONE_EMPTY, MAPS), "mask of case 1 has no sampled"),
    "mask-fits-not": (lambda: O.Mask(ONES, (1, 4, 5)), "fits neither"),
    "mask-of-strings": (lambda: O.Mask(np.array(["a"])), "must hold numbers"),
    "fourier-mask-1d": (lambda: O.SubsampledFourier(torch.ones(4)), "at least"),
    "fourier-image-2d": (lambda: O.SubsampledFourier(ONES, (4, 6)), "channel, y, x"),
    "mri-mask-1d": (lambda: O.MultiCoilMRI(torch.ones(6), MAPS), r"expected \(4, 6\)"),
    "mri-mask-size": (lambda: O.MultiCoilMRI(torch.ones(4, 5), MAPS), r"expected \(4, 6\)"),
    "mri-maps-rank": (lambda: O.MultiCoilMRI(ONES, MAPS[0]), "coil, y, x"),
    "mri-maps-nan": (lambda: O.MultiCoilMRI(ONES, MAPS * float("inf")), "coil maps holds"),
    "mri-maps-zero": (lambda: O.MultiCoilMRI(ONES, 0 * MAPS), "zero everywhere"),
    "mri-cases": (
        lambda: O.MultiCoilMRI(ONES.expand(3, 4, 6), MAPS.expand(2, 2, 4, 6)),
        "mask for 3 and coil_maps for 2",
    ),
    "compose-number": (lambda: O.Mask(ONES) @ 3, "Cannot compose Mask @ int"),
    "compose-tensor": (lambda: O.Mask(ONES) @ ONES, "call the operator to apply it"),
    "sum-number": (lambda: O.Mask(ONES) + 3, "sum takes linear operators, and int"),
    "scale-operator": (lambda: O.Mask(ONES) * O.Mask(ONES), "compose with @"),
    "stack-number": (lambda: O.stack([O.Mask(ONES), 3]), "stack takes linear"),
    "matrix-rank": (lambda: O.Matrix(torch.ones(3)), r"expected \(m, n\)"),
    "matrix-nan": (lambda: O.Matrix(NAN), "NaN"),
    "matrix-domain": (lambda: O.Matrix(torch.ones(3, 4), (1, 5)), "needs 4"),
    "matrix-range": (lambda: O.Matrix(torch.ones(3, 4), range=(2,)), "needs 3"),
    "matrix-range-dtype": (lambda: O.Matrix(torch.ones(3, 4), range=Space((3,), torch.complex64)), "The range is"),
    "blur-rank": (lambda: O.Blur(torch.ones(3), (1, 4, 6)), "expected real"),
    "blur-complex": (lambda: O.Blur(ONES + 0j, (1, 4, 6)), "expected real"),
    "blur-large": (lambda: O.Blur(torch.ones(5, 3), (1, 4, 6)), "larger than the image"),
    "blur-zero": (lambda: O.Blur(torch.zeros(3, 3), (1, 4, 6)), "zero everywhere"),
    "blur-1d": (lambda: O.Blur(ONES, (6,)), "two axes"),
    "std-zero": (lambda: O.GaussianBlur(0, (1, 4, 6)), "positive"),
    "std-negative": (lambda: O.GaussianBlur((1, -1), (1, 4, 6)), "positive"),
    "std-nan": (lambda: O.GaussianBlur(float("nan"), (1, 4, 6)), "NaN"),
    "std-three": (lambda: O.GaussianBlur((1, 1, 1), (1, 4, 6)), "one or two"),
    "units-of-empty": (lambda: O.Identity((0, 3)), "positive sizes"),
    "spacing": (lambda: O.Identity((1, 3, 3), spacing={"z": 1.0}), "Spacing names"),
    "stack-of-none": (lambda: O.stack([]), "at least one"),
    "stack-of-two-kinds": (lambda: O.stack([O.Identity((3,)), O.Identity((4,))]), "differ"),
    "compose": (lambda: O.compose(O.Identity((3,)), O.Identity((4,))), "Cannot compose"),
    "factor": (lambda: O.Identity((3,)) * float("nan"), "finite"),
    "complex-factor": (lambda: O.Identity((3,)) * 1j, "complex spaces"),
    "input-shape": (lambda: O.Mask(ONES)(torch.ones(4, 6)), r"expected \(B, 4, 6\)"),
    "input-real": (lambda: O.MultiCoilMRI(ONES, MAPS)(torch.ones(1, 1, 4, 6)), "is real"),
    "adjoint-shape": (lambda: O.MultiCoilMRI(ONES, MAPS).adjoint(MAPS), "Input of the adjoint"),
    "rows": (lambda: O.Matrix(torch.ones(3, 2, 2))(torch.ones(2, 2)), r"pick them with rows\(index\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_one_sentence(name: str) -> None:
    make, message = BAD[name]
    with pytest.raises(InvdiffError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_scaling_by_zero_declares_no_closed_form() -> None:
    assert not {"prox", "pinv", "svd"} & (0 * O.Identity((3,))).capabilities


@pytest.mark.parametrize("kind", [bool, np.uint8, np.int64, np.float16, np.float64, ">f4"])
def test_masks_of_every_kind(kind: object) -> None:
    mask = np.zeros((4, 6), dtype=kind)  # type: ignore[call-overload]
    mask[::2] = 1
    x = torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(O.Mask(mask)(x), x * torch.from_numpy(mask.astype(np.float32)))


def test_parameters_are_copied_from_read_only_and_reversed_arrays() -> None:
    mask = np.ones((4, 6))
    mask[0] = 0
    op = O.Mask(mask[::-1])
    mask[:] = 0
    read_only = np.broadcast_to(np.ones((1, 6)), (4, 6))
    assert float(op.mask.sum()) == 18 and float(O.Mask(read_only).mask.sum()) == 24


def test_expanded_parameters_and_real_maps() -> None:
    op = O.MultiCoilMRI(ONES.expand(3, 4, 6), torch.ones(2, 4, 6, dtype=torch.float64))
    assert op.n_cases == 3 and op.domain.dtype == torch.complex128


def test_units_and_spacing_reach_the_domain() -> None:
    op = O.MultiCoilMRI(ONES, MAPS, units="a.u.", spacing={"y": 0.9, "x": 1.1})
    assert op.domain.units == "a.u." and dict(op.domain.spacing) == {"y": 0.9, "x": 1.1}
    assert op.range.dims == ("coil", "ky", "kx")
    assert O.GaussianBlur(1.0, (1, 4, 6), units="HU").domain.units == "HU"


def test_public_names_load_lazily() -> None:
    import invdiff.operators as package

    assert set(package.__all__) <= set(dir(package))
    for name in package.__all__:
        assert callable(getattr(package, name))
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = package.Nothing


def test_a_problem_prints_its_operator_one_level_in() -> None:
    a = O.Mask(ONES)
    problem = Problem.simulate(a, Gaussian(0.1), a.domain.randn(1), seed=0)
    assert str(problem).splitlines()[4:] == [f"  {line}" for line in str(a).splitlines()]
