"""Frames and volumes: against slices one by one, and a 3-D Fourier transform written out."""

import pytest
import torch

from invdiff import operators
from invdiff.errors import InvdiffError
from tests.conformance.operators_mri import MRI


def test_frames_are_slices_one_by_one():
    op = MRI["frames"](torch.float64)
    x, y = op.domain.randn(2), op.range.randn(2, 1)
    assert op.range.dims == ("frame", "coil", "ky", "kx")
    for t in range(3):
        one = operators.MultiCoilMRI(op.frames.mask[t, 0], op.frames.coil_maps[0])
        torch.testing.assert_close(op(x)[:, t], one(x[:, :, t]))
        torch.testing.assert_close(op.adjoint(y)[:, :, t], one.adjoint(y[:, t]))
    assert op.support.shape == (1, 3, 1, 4, 5)
    assert MRI["frames-per-case"](torch.float64).support.shape == (3, 2, 1, 4, 5)


def test_closed_forms_where_lines_are_left_out():
    for name, make in MRI.items():
        assert ("prox" in make(torch.float64).capabilities) == ("lines" in name), name


def test_a_volume_is_its_definition():
    op = MRI["volume"](torch.float64)
    x = op.domain.randn(1)
    k = op.coil_maps[0] * x[0]
    for axis, n in ((1, 3), (2, 4), (3, 5)):
        i = torch.arange(n, dtype=torch.float64) - n // 2
        f = torch.exp(-2j * torch.pi * i[:, None] * i / n) / n**0.5
        k = torch.tensordot(k, f, dims=([axis], [1])).movedim(-1, axis)
    torch.testing.assert_close(op(x)[0], k * op.mask[0], atol=1e-12, rtol=0)


def test_a_volume_fully_sampled_along_kz_is_its_slices():
    mask = (torch.rand(4, 5, generator=torch.Generator().manual_seed(0)) < 0.6).expand(3, 4, 5)
    maps = MRI["volume"](torch.float64).coil_maps[0]
    volume, slices = operators.VolumeMRI(mask, maps), operators.FramesMRI(mask, maps.movedim(0, 1), frame="z")
    x = volume.domain.randn(2)
    torch.testing.assert_close(volume.normal(x), slices.normal(x))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: operators.FramesMRI(torch.ones(4, 5), torch.ones(2, 4, 5)), r"expected \(frame, ky, kx\)"),
        (
            lambda: operators.FramesMRI(torch.ones(3, 4, 5), torch.ones(2, 1, 4, 5)),
            "masks for 3 frames and",
        ),
        (lambda: operators.FramesMRI(torch.ones(2, 3, 4, 5), torch.ones(3, 3, 1, 4, 5)), "masks for 2 cases"),
        (lambda: operators.FramesMRI(torch.zeros(3, 4, 5), torch.ones(2, 4, 5)), "no sampled positions"),
        (lambda: operators.VolumeMRI(torch.ones(4, 5), torch.ones(2, 3, 4, 5)), r"expected \(3, 4, 5\)"),
        (lambda: operators.VolumeMRI(torch.ones(3, 4, 5), torch.ones(3, 4, 5)), r"expected \(coil, z, y, x\)"),
        (
            lambda: MRI["frames-per-case"](torch.float64)(torch.zeros(2, 1, 2, 4, 5, dtype=torch.complex128)),
            "for 3 cases and got 2 rows",
        ),
        (
            lambda: MRI["volume"](torch.float64).conditional(None, None, None, None, None),
            "no closed-form",
        ),
    ],
)
def test_bad_input_gets_one_sentence(make, words):
    with pytest.raises(InvdiffError, match=words) as caught:
        make()
    assert "\n" not in str(caught.value)
