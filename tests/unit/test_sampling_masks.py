"""Sampling patterns: what they reach, what they promise, and what is refused."""

import numpy as np
import pytest
import torch

from invdiff import operators
from invdiff.errors import InvdiffError
from invdiff.operators import sampling_masks as masks

MAKE = {
    "equispaced": (lambda: masks.equispaced((64, 48), 4), 4.0),
    "equispaced with centre": (lambda: masks.equispaced((64, 48), 4, centre=9), 64 / 22),
    "random": (lambda: masks.random_lines((64, 48), 4, centre=8), 4.0),
    "partial": (lambda: masks.partial_fourier((64, 48), 0.75), 4 / 3),
    "caipi": (lambda: masks.caipi((32, 48), (2, 3)), 6.0),
    "shifted": (lambda: masks.shifted_frames((6, 64, 48), 4), 4.0),
    "random frames": (lambda: masks.random_frames((3, 64, 48), 4, centre=8), 4.0),
}


@pytest.mark.parametrize("name", MAKE)
def test_acceleration_is_the_one_stated(name):
    make, expected = MAKE[name]
    m = make()
    assert m.acceleration == pytest.approx(expected, rel=1e-9)
    assert m.acceleration == pytest.approx(m.mask.numel() / np.asarray(m).sum())
    assert f"acceleration {expected:.2f}" in str(m) and set(m.mask.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(m.mask, make().mask)


def test_the_centre_is_sampled_and_the_zero_frequency_is_in_it():
    for m in (
        masks.equispaced((20, 8), 5, 6, 1),
        masks.random_lines((20, 8), 2, 6),
        masks.caipi((20, 9), (4, 3), 1, 6),
    ):
        assert bool(m.mask[7:13, 4].all())
    assert bool(masks.partial_fourier((9, 4), 0.51).mask[9 // 2].all())


def test_shifted_frames_together_sample_everything():
    m = masks.shifted_frames((7, 13, 5), 4).mask
    for t in range(4):
        assert bool(m[t : t + 4].sum(0).eq(1).all())
    assert not torch.equal(*masks.random_frames((2, 32, 4), 4).mask)


def test_lattices_are_sheared():
    m = masks.caipi((8, 12), (2, 4), shift=2).mask
    assert bool(m[4, 6]) and bool(m[6, 8]) and not bool(m[6, 6]) and bool(m[8 - 8, 6])


def test_seeds_differ_and_repeat():
    a, b = (masks.random_lines((64, 4), 4, seed=s).mask for s in (0, 1))
    assert not torch.equal(a, b)


def test_operators_take_them_and_find_the_exact_prox():
    op = operators.MultiCoilMRI(masks.random_lines((8, 6), 2), torch.ones(2, 8, 6))
    assert "prox" in op.capabilities
    assert "prox" in operators.FramesMRI(masks.shifted_frames((3, 8, 6), 2), torch.ones(2, 8, 6)).capabilities


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: masks.equispaced((8, 8), 9), "from 1 to 8, got 9"),
        (lambda: masks.equispaced((8, 8, 8), 2), "needs 2 positive sizes"),
        (lambda: masks.equispaced((8, 8), 2, centre=9), "from 0 to 8 lines"),
        (lambda: masks.random_lines((32, 8), 8, centre=9), "leaves 4 of 32 lines, and the centre takes 9"),
        (lambda: masks.random_lines((32, 8), 0.5), "from 1 to the 32 lines"),
        (lambda: masks.partial_fourier((8, 8), 0.5), "more than half"),
        (lambda: masks.caipi((8, 8), (2, 0)), "from 1 to 8, got 0"),
    ],
)
def test_bad_input(make, words):
    with pytest.raises(InvdiffError, match=words):
        make()
