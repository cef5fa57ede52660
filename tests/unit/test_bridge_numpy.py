"""Functions on numpy arrays as operators: values, precision, purity, and what is said when they misbehave."""

import subprocess
import sys

import numpy as np
import pytest
import torch

import invdiff
from invdiff import Space, likelihoods
from invdiff.errors import CapabilityError, InvdiffError
from tests.conformance.toys import normal_prior

from_function = invdiff.bridge.numpy.from_function
SQUARE = Space((1, 3, 4), torch.float32)


def sums(x):
    return np.stack([x.sum(-1)[0], (x**2).sum(-1)[0]])


def sums_of_all(x):
    return np.stack([x.sum(-1)[:, 0], (x**2).sum(-1)[:, 0]], 1)


@pytest.mark.parametrize(("f", "batched"), [(sums, False), (sums_of_all, True)])
def test_rows_or_batches_give_the_same(f, batched):
    a = from_function(f, SQUARE, (2, 3), batched=batched)
    x = SQUARE.randn(5)
    y = a(x)
    assert y.dtype == torch.float64 and a.range.shape == (2, 3)
    assert torch.allclose(y[:, 0], x.sum(-1)[:, 0].double()) and torch.allclose(
        y[:, 1], (x**2).sum(-1)[:, 0].double()
    )
    assert torch.equal(a(x[2:3]), y[2:3])


def test_precision_is_that_of_the_spaces():
    seen = []

    def f(x):
        seen.append(x.dtype)
        return x[0, 0].astype(np.float64) * 2

    a = from_function(f, SQUARE, Space((4,), torch.float32))
    assert a(SQUARE.randn(1).double()).dtype == torch.float32 and seen == [np.dtype("float32")]
    assert a.to(dtype=torch.float64)(SQUARE.randn(1)).dtype == torch.float64 and seen[-1] == np.dtype("float64")
    assert from_function(lambda x: x.astype(int), (2,), (2,))(torch.ones(1, 2)).dtype == torch.float64


def test_complex_numbers_stay_complex():
    image = Space((1, 4, 4), torch.complex64)
    a = from_function(np.fft.fft2, image, image)
    x = image.randn(2)
    assert torch.allclose(a(x), torch.fft.fft2(x), atol=1e-5)
    assert torch.allclose(a(x.conj()), torch.fft.fft2(x.conj()), atol=1e-5)


def test_a_function_that_writes_into_its_input_or_re_uses_its_output_harms_nothing():
    buffer = np.zeros(2)

    def f(x):
        x *= 2
        buffer[:] = x
        return buffer

    a = from_function(f, (2,), (2,))
    x = torch.arange(4.0, dtype=torch.float64).reshape(2, 2)
    assert torch.equal(a(x), torch.tensor([[0.0, 2], [4, 6]], dtype=torch.float64))
    assert torch.equal(x, torch.arange(4.0, dtype=torch.float64).reshape(2, 2))


def _fails(x):
    raise ValueError("mesh\n  is tangled")


def _memory(x):
    raise MemoryError


@pytest.mark.parametrize(
    ("f", "range", "words"),
    [
        (_fails, (2,), r"_fails failed on row 0 with ValueError: mesh is tangled"),
        (lambda x: x[:1], (2,), r"shape \(1,\) on row 0, expected \(2,\)"),
        (lambda x: x + 1j, (2,), "complex128 values on row 0, expected real"),
        (lambda x: x, Space((2,), torch.complex64), "float64 values on row 0, expected complex"),
        (lambda x: np.array(["a", "b"]), (2,), "expected real numbers"),
    ],
)
def test_a_function_that_misbehaves_is_told_in_one_sentence(f, range, words):
    with pytest.raises(InvdiffError, match=words) as caught:
        from_function(f, (2,), range)(torch.ones(1, 2))
    assert "\n" not in str(caught.value)


def test_other_refusals():
    with pytest.raises(InvdiffError, match="needs a function"):
        from_function(3, (2,), (2,))
    with pytest.raises(MemoryError):  # the driver's business
        from_function(_memory, (2,), (2,))(torch.ones(1, 2))
    with pytest.raises(InvdiffError, match=r"shape \(2, 3\)"):
        from_function(lambda x: x, (2,), (2,))(torch.ones(2, 3))
    with pytest.raises(InvdiffError, match="expected \\(3, 2\\)"):
        from_function(lambda x: x[0], (2,), (2,), batched=True)(torch.ones(3, 2))


def test_there_are_no_derivatives_and_none_are_faked():
    a = from_function(lambda x: x, (2,), (2,))
    x = torch.ones(1, 2, dtype=torch.float64)
    assert a.capabilities == frozenset()
    for attempt in (lambda: a.vjp(x, x), lambda: a.jvp(x, x), lambda: a(x.requires_grad_(True))):
        with pytest.raises(InvdiffError, match="no derivatives"):
            attempt()


def test_provenance_tells_functions_apart():
    one, two = (from_function(f, SQUARE, (2, 3)).describe() for f in (sums, sums_of_all))
    assert one["name"] == "sums" and one["source_sha256"] != two["source_sha256"]
    assert from_function(np.cumsum, (2,), (2,)).describe()["name"] == "cumsum"


def test_samplers_that_need_more_refuse_and_name_those_that_do_not():
    space = Space((1, 3, 4), torch.float64)
    problem = invdiff.Problem(
        from_function(sums, space, (2, 3)), likelihoods.Gaussian(0.1), torch.zeros(2, 3).double()
    )
    for name in ("dps", "dds", "tmpd", "reddiff", "daps"):
        with pytest.raises(CapabilityError, match=r"sums.*would do: .*enkg"):
            invdiff.sample(problem, normal_prior(space), name, draws=2, seed=0)


def test_the_bridge_is_not_imported_with_the_package():
    program = (
        "import sys, invdiff; invdiff.sample; print([m for m in sys.modules if m.startswith('invdiff.bridge')])"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
