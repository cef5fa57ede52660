"""Spaces: what they accept, what they say, how rows are measured."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from invdiff.errors import InvdiffError
from invdiff.spaces import Space, norm, per_row, real_inner


def test_default_dims_follow_the_rank() -> None:
    assert Space((4,)).dims == ("index",)
    assert Space((1, 4, 5)).dims == ("channel", "y", "x")
    assert Space((1, 2, 4, 5)).dims == ("channel", "z", "y", "x")
    assert Space((1, 1, 2, 4, 5)).dims == tuple(f"axis_{i}" for i in range(5))


def test_sizes_count_complex_elements_once() -> None:
    s = Space((2, 3), torch.complex64)
    assert (s.size, s.real_size, s.real_dtype, s.is_complex) == (6, 12, torch.float32, True)
    assert Space((2, 3)).real_size == 6


def test_precision_keeps_real_and_complex() -> None:
    assert Space((2,), torch.complex64).with_precision(torch.float64).dtype == torch.complex128
    assert Space((2,), torch.float64).with_precision(torch.complex64).dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": (0, 3)}, "positive sizes"),
        ({"shape": (3,), "dtype": torch.int64}, "float or complex"),
        ({"shape": (3,), "dtype": torch.float16}, "float or complex"),
        ({"shape": (3, 4), "dims": ("y",)}, "2 distinct dim names"),
        ({"shape": (3, 4), "dims": ("y", "y")}, "distinct"),
        ({"shape": (3, 4), "spacing": {"z": 1.0}}, "Spacing names"),
    ],
)
def test_bad_spaces_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(InvdiffError, match=message):
        Space(**arguments)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 3, 5), r"shape \(2, 3, 5\), expected \(B, 3, 4\)"),
        (torch.zeros(3, 4), "expected"),
        (torch.zeros(2, 3, 4, dtype=torch.complex64), "is complex"),
    ],
)
def test_check_names_what_is_wrong(x: torch.Tensor, message: str) -> None:
    with pytest.raises(InvdiffError, match=message):
        Space((3, 4)).check(x, "x")


def test_check_accepts_other_precision_and_no_rows() -> None:
    Space((3, 4)).check(torch.zeros(0, 3, 4, dtype=torch.float64), "x")


def test_spaces_are_values() -> None:
    s = Space((1, 4, 5), units="mT", spacing={"y": 1.5})
    for other in (copy.deepcopy(s), pickle.loads(pickle.dumps(s)), s.replace()):
        assert other == s and hash(other) == hash(s)
    assert str(s) == "(channel 1, y 4, x 5) float32 [mT]"
    with pytest.raises(TypeError):
        s.spacing["y"] = 2.0  # type: ignore[index]


def test_randn_has_unit_variance_per_real_component() -> None:
    x = Space((40, 50), torch.complex128).randn(3, seed=1)
    assert abs(float(x.real.var()) - 1) < 0.05 and abs(float(x.imag.var()) - 1) < 0.05
    assert torch.equal(x, Space((40, 50), torch.complex128).randn(3, seed=1))


def test_inner_product_and_norm_are_per_row() -> None:
    s = Space((2, 3), torch.complex128)
    a, b = s.randn(4, 1), s.randn(4, 2)
    expected = torch.stack([(a[i].conj() * b[i]).sum().real for i in range(4)])
    torch.testing.assert_close(real_inner(a, b), expected)
    torch.testing.assert_close(real_inner(a.conj(), b.conj()), expected)
    torch.testing.assert_close(norm(a), torch.stack([a[i].abs().square().sum().sqrt() for i in range(4)]))
    assert norm(a[:0]).shape == (0,)


def test_per_row_never_changes_precision() -> None:
    x = torch.zeros(3, 1, 4, dtype=torch.complex64)
    value = per_row(torch.arange(3.0, dtype=torch.float64), x)
    assert value.shape == (3, 1, 1) and (x * value).dtype == torch.complex64
    assert per_row(2.0, x).ndim == 0
