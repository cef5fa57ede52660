"""Codecs: round trips, adjoints, the gain, and closed forms carried through a change of coordinates."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch

from invdiff import codec, operators
from invdiff.errors import InvdiffError
from invdiff.pulled import Pulled
from invdiff.spaces import Space, per_row, real_inner
from invdiff.tensors import tensor_digest
from invdiff.testing import check_operator, dense_matrix

REAL = Space((1, 5, 7), torch.float64)
COMPLEX = Space((1, 5, 7), torch.complex128)
CASES = torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64)


def chain(image: Space = COMPLEX, scale: float | torch.Tensor = 2.5, offset: float = 0.0) -> codec.AffineCodec:
    channels = codec.ComplexChannels(image)
    inner = codec.Pad(channels.prior, (4, 8))
    out = codec.Chain([codec.Scale(image, scale), channels, codec.Scale(channels.prior, 0.7, offset), inner])
    assert isinstance(out, codec.AffineChain)
    return out


CODECS: dict[str, Callable[[], codec.AffineCodec]] = {
    "identity": lambda: codec.Identity(COMPLEX),
    "scale": lambda: codec.Scale(REAL, 3.0, -1.0),
    "scale-per-case": lambda: codec.Scale(COMPLEX, CASES, 0.5),
    "channels": lambda: codec.ComplexChannels(COMPLEX),
    "channels-of-real-images": lambda: codec.ComplexChannels(REAL),
    "grey": lambda: codec.Grey(REAL),
    "grey-of-a-range": lambda: codec.Chain([codec.Grey(REAL), codec.Scale(codec.Grey(REAL).prior, 0.5, 0.5)]),
    "pad": lambda: codec.Pad(REAL, 4),
    "pad-complex": lambda: codec.Pad(COMPLEX, 4),
    "pad-without-need": lambda: codec.Pad(REAL, (5, 7)),
    "pad-beyond-reflection": lambda: codec.Pad(REAL, 32),
    "chain": chain,
    "chain-with-offset": lambda: chain(offset=0.4),
    "chain-per-case": lambda: chain(scale=CASES, offset=0.4),
    "chain-real": lambda: chain(REAL),
}


@pytest.fixture(params=CODECS)
def code(request: pytest.FixtureRequest) -> codec.AffineCodec:
    return CODECS[request.param]()


def test_decode_undoes_encode(code: codec.AffineCodec) -> None:
    x = code.image.randn(3)
    torch.testing.assert_close(code.decode(code.encode(x)), x)


def test_linear_part_keeps_the_operator_contract(code: codec.AffineCodec) -> None:
    check_operator(code.linear_operator()).raise_if_failed()


def test_decode_is_linear_part_plus_offset(code: codec.AffineCodec) -> None:
    u = code.prior.randn(3)
    zero = code.decode(torch.zeros_like(u))
    torch.testing.assert_close(code.decode(u), code.linear(u) + zero)


def test_gain_identity(code: codec.AffineCodec) -> None:
    x = code.image.randn(3)
    gain = per_row(code.gain, x)
    torch.testing.assert_close(code.linear(code.linear_adjoint(x)), gain**2 * x)


def test_adjoint_of_linear_part(code: codec.AffineCodec) -> None:
    u, x = code.prior.randn(3, 1), code.image.randn(3, 2)
    torch.testing.assert_close(real_inner(code.linear(u), x), real_inner(u, code.linear_adjoint(x)))


def test_copies_and_pickles(code: codec.AffineCodec) -> None:
    x = code.image.randn(3)
    for other in (copy.deepcopy(code), pickle.loads(pickle.dumps(code))):
        assert type(other) is type(code)
        torch.testing.assert_close(other.encode(x), code.encode(x))


@pytest.mark.parametrize("name", ["scale-per-case", "chain-per-case"])
def test_rows_pick_the_scale_of_their_case(name: str) -> None:
    code = CODECS[name]()
    u, index = code.prior.randn(4), torch.tensor([2, 0, 0, 1])
    for r, case in enumerate(index.tolist()):
        alone = code.rows(torch.tensor([case])).decode(u[r : r + 1])
        torch.testing.assert_close(code.rows(index).decode(u)[r : r + 1], alone)


def test_precision_moves_with_to() -> None:
    code = chain(scale=CASES).to(dtype=torch.float32)
    assert code.image.dtype == torch.complex64 and code.decode(code.prior.randn(3)).dtype == torch.complex64


def test_a_chain_with_a_nonlinear_part_is_not_affine() -> None:
    class Squared(codec.Codec):
        def __init__(self) -> None:
            self.image = self.prior = REAL

        def decode(self, u: torch.Tensor) -> torch.Tensor:
            return u**2

        def encode(self, x: torch.Tensor) -> torch.Tensor:
            return x.sqrt()

    out = codec.Chain([codec.Scale(REAL, 2.0), Squared()])
    assert not out.is_affine and not isinstance(out, codec.AffineCodec)
    assert type(pickle.loads(pickle.dumps(codec.Chain([codec.Scale(REAL)])))) is codec.AffineChain


def scan(n: int = 3) -> operators.MultiCoilMRI:
    g = torch.Generator().manual_seed(0)
    lines = torch.zeros(n, 5, 7)
    for i in range(n):
        lines[i, torch.randperm(5, generator=g)[:3]] = 1
    return operators.MultiCoilMRI(lines, torch.randn(2, 5, 7, generator=g, dtype=torch.complex128))


@pytest.mark.parametrize("scale", [2.5, CASES], ids=["one-scale", "per-case"])
def test_pulled_prox_is_the_dense_solution_in_prior_coordinates(scale: float | torch.Tensor) -> None:
    pulled = Pulled(scan(), chain(scale=scale))
    z, y = pulled.domain.randn(3, 1), pulled.range.randn(3, 2)
    rho = torch.tensor([0.05, 1.0, 20.0], dtype=torch.float64)
    out = pulled.prox(z, y, rho)
    for i in range(3):
        a = dense_matrix(pulled, i)
        data = torch.cat([y[i].real.flatten(), y[i].imag.flatten()])
        lhs = a.mT @ a + rho[i] * torch.eye(a.shape[1], dtype=torch.float64)
        expected = torch.linalg.solve(lhs, a.mT @ data + rho[i] * z[i].flatten())
        torch.testing.assert_close(out[i].flatten(), expected, rtol=1e-9, atol=1e-9)


def test_posterior_mean_does_not_depend_on_the_units_of_the_prior() -> None:
    """With u ~ N(z, tau^2), rescaling prior coordinates rescales the posterior mean and nothing else."""
    op, y = scan(), scan().range.randn(3, 2)
    sigma, tau = 0.3, 0.8
    decoded = []
    for unit in (1.0, 10.0):
        code = chain(scale=2.5 * unit)
        pulled = Pulled(op, code)
        z = pulled.domain.randn(3, 1) / unit
        rho = torch.full((3,), (sigma / (tau / unit)) ** 2, dtype=torch.float64)
        decoded.append(code.linear(pulled.prox(z, y, rho)))
    torch.testing.assert_close(*decoded, rtol=1e-9, atol=1e-9)


def test_digest_of_a_pulled_operator_covers_its_codec() -> None:
    op = scan()
    assert tensor_digest(Pulled(op, chain(scale=2.0))) != tensor_digest(Pulled(op, chain(scale=3.0)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: codec.Scale(REAL, 0.0), "positive"),
        (lambda: codec.Scale(REAL, float("nan")), "positive"),
        (lambda: codec.Scale(REAL, torch.ones(2, 2)), "one positive number"),
        (lambda: codec.ComplexChannels(Space((2, 3, 3), torch.complex64)), "one image channel"),
        (lambda: codec.Pad(REAL, 0), "positive multiples"),
        (lambda: codec.Pad(REAL, (4, 4, 4)), "positive multiples"),
        (lambda: codec.Chain([codec.Scale(REAL), codec.ComplexChannels(COMPLEX)]), "do not chain"),
    ],
)
def test_bad_codecs_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(InvdiffError, match=message):
        make()
