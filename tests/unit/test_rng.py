"""Random streams belong to (seed, case, draw, step) and to nothing else."""

import itertools

import numpy as np
import pytest
import torch

from invdiff.errors import InvdiffError
from invdiff.rng import INIT, Streams, resolve_seed

LIKE = torch.empty(3, 5, dtype=torch.float64)
KEYS = [(0, 0), (0, 1), (2, 7)]


def test_a_row_does_not_depend_on_its_batch():
    together = Streams(3, KEYS).normal(LIKE)
    for r, key in enumerate(KEYS):
        assert torch.equal(Streams(3, [key]).normal(LIKE[:1])[0], together[r])
    assert torch.equal(Streams(3, KEYS[::-1]).normal(LIKE), together.flip(0))


def test_at_starts_a_block_again():
    rng = Streams(3, KEYS)
    first = rng.at(4).normal(LIKE)
    again = rng.normal(LIKE)
    assert not torch.equal(first, again)
    assert torch.equal(rng.at(4).normal(LIKE), first)
    rng.at(2).uniform(torch.empty(3, 1000))
    assert torch.equal(rng.at(4).normal(LIKE), first)
    assert torch.equal(Streams(3, KEYS).normal(LIKE), Streams(3, KEYS).at(INIT).normal(LIKE))


def test_every_coordinate_of_the_key_matters():
    seen = {}
    for seed, case, draw, step in itertools.product((0, 1), (0, 1), (0, 1, 5), (INIT, 0, 1)):
        value = Streams(seed, [(case, draw)]).at(step).normal(LIKE[:1])[0, 0].item()
        assert value not in seen, (seen.get(value), (seed, case, draw, step))
        seen[value] = (seed, case, draw, step)


def test_neighbouring_streams_are_uncorrelated():
    n = 20_000
    rng = Streams(0, [(0, 0), (0, 1), (1, 0), (1, 1)])
    rows = torch.cat([rng.at(k).normal(torch.empty(4, n, dtype=torch.float64)) for k in (0, 1)])
    c = torch.corrcoef(rows) - torch.eye(8)
    assert float(c.abs().max()) < 5 / n**0.5


def test_normal_moments():
    x = Streams(1, [(0, i) for i in range(64)]).normal(torch.empty(64, 2000, dtype=torch.float64))
    n = x.numel()
    assert abs(float(x.mean())) < 4 / n**0.5
    assert abs(float(x.var()) - 1) < 4 * (2 / n) ** 0.5
    assert abs(float((x**3).mean())) < 4 * (15 / n) ** 0.5
    assert abs(float((x**4).mean()) - 3) < 4 * (96 / n) ** 0.5


def test_complex_numbers_have_unit_variance_per_component():
    x = Streams(1, [(0, 0)]).normal(torch.empty(1, 40_000, dtype=torch.complex128))
    assert x.dtype == torch.complex128
    assert float(x.real.var()) == pytest.approx(1, abs=0.03) and float(x.imag.var()) == pytest.approx(1, abs=0.03)
    assert abs(float((x.real * x.imag).mean())) < 0.03


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
def test_dtype_and_shape_follow(dtype):
    like = torch.empty(2, 3, 4, dtype=dtype)
    out = Streams(0, [(0, 0), (0, 1)]).normal(like)
    assert out.dtype == dtype and out.shape == like.shape


def test_one_number_per_row():
    rng = Streams(0, KEYS)
    x = rng.normal(torch.empty(3, dtype=torch.float64))
    assert x.shape == (3,) and len(set(x.tolist())) == 3
    assert torch.equal(Streams(0, KEYS[1:2]).normal(torch.empty(1, dtype=torch.float64))[0], x[1])


def test_uniform_numbers():
    x = Streams(0, KEYS).uniform(torch.empty(3, 20_000, dtype=torch.float64))
    assert float(x.min()) >= 0 and float(x.max()) < 1
    assert float(x.mean()) == pytest.approx(0.5, abs=0.01) and float(x.var()) == pytest.approx(1 / 12, abs=0.003)
    assert torch.equal(Streams(0, KEYS[2:]).uniform(torch.empty(1, 20_000, dtype=torch.float64))[0], x[2])


def test_numpy_generators_are_the_rows_own():
    a = Streams(0, KEYS).numpy(2).poisson(3.0, 50)
    b = Streams(0, KEYS[2:]).numpy(0).poisson(3.0, 50)
    np.testing.assert_array_equal(a, b)


def test_numbers_of_a_case_are_not_those_of_a_draw():
    rng = Streams(0, KEYS)
    shared = rng.case_uniform(0, 100)
    np.testing.assert_array_equal(shared, Streams(0, [(0, 9)]).case_uniform(0, 100))
    own = rng.at(INIT).uniform(torch.empty(3, 100, dtype=torch.float64)).numpy()
    assert not any(np.allclose(shared, row) for row in own)
    assert not np.allclose(shared, Streams(0, KEYS).case_uniform(2, 100))


def test_seeds():
    assert resolve_seed(0) == 0 and resolve_seed(np.int64(7)) == 7
    assert resolve_seed(None) != resolve_seed(None)
    for bad in (-1, True, 1.5, "3"):
        with pytest.raises(InvdiffError, match="at least 0"):
            resolve_seed(bad)
    with pytest.raises(InvdiffError, match="2 rows asked of 3 streams"):
        Streams(0, KEYS).normal(LIKE[:2])
