"""ASTRA's projectors as operators: a stand-in that holds a real matrix, and the real one where it is there."""

import gc
import importlib.util
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from invdiff import Space, bridge, operators
from invdiff.errors import InvdiffError
from invdiff.testing import check_operator, dense_matrix

ANGLES = np.array([0.1, 0.9, 1.7, 2.6])
VOLUME = {"GridRowCount": 6, "GridColCount": 5, "option": {}}
VOLUME["option"] = {"WindowMinX": -5.0, "WindowMaxX": 5.0, "WindowMinY": -6.0, "WindowMaxY": 6.0}
VIEWS = {"type": "parallel", "DetectorWidth": 1.5, "DetectorCount": 11, "ProjectionAngles": ANGLES}
SOLID = {"GridRowCount": 3, "GridColCount": 4, "GridSliceCount": 2, "option": {}}
CONE = {"type": "cone", "DetectorSpacingX": 1.0, "DetectorSpacingY": 2.0, "DetectorRowCount": 2}
CONE |= {"DetectorColCount": 7, "ProjectionAngles": ANGLES}


class StandIn:
    """What of the package is used, with matrices in place of projectors."""

    def __init__(self):
        self.made, self.deleted = {}, []
        self.projector = self.projector3d = SimpleNamespace(delete=self.deleted.append)
        stand_in = self

        class OpTomo:
            def __init__(self, number):
                self.kind, self.pg, self.vg = stand_in.made[number]
                slices, rows, solid = (), (), "GridSliceCount" in self.vg
                count = self.pg["DetectorColCount" if solid else "DetectorCount"]
                if solid:
                    slices, rows = (self.vg["GridSliceCount"],), (self.pg["DetectorRowCount"],)
                self.vshape = (*slices, self.vg["GridRowCount"], self.vg["GridColCount"])
                self.sshape = (*rows, len(ANGLES), count)
                rng = np.random.default_rng(0)
                self.matrix = rng.standard_normal((np.prod(self.sshape), np.prod(self.vshape))).astype("f4")
                if not solid:
                    op = operators.ParallelBeamCT((6, 5), -ANGLES, detectors=11, detector_spacing=1.5, spacing=2.0)
                    self.matrix = dense_matrix(op).float().numpy()

            def FP(self, x):
                assert x.shape == self.vshape
                return (self.matrix @ x.ravel()).reshape(self.sshape)

            def BP(self, y):
                assert y.shape == self.sshape
                return (self.matrix.T @ y.ravel()).reshape(self.vshape)

        self.OpTomo = OpTomo

    def create_projector(self, kind, views, volume):
        if kind == "wrong":
            raise ValueError("no such\nprojector")
        number = 7 + len(self.made)
        self.made[number] = (kind, views, volume)
        return number


@pytest.fixture
def astra(monkeypatch):
    stand_in = StandIn()
    monkeypatch.setitem(sys.modules, "astra", stand_in)
    return stand_in


def test_slices(astra):
    op = bridge.astra.from_projector((VOLUME, VIEWS))
    assert astra.made[7][0] == "linear"
    assert op.domain == Space((1, 6, 5), torch.float32, spacing={"y": 2.0, "x": 2.0})
    assert op.range == Space((1, 4, 11), torch.float32, ("channel", "view", "detector"), spacing={"detector": 1.5})
    check_operator(op).raise_if_failed()
    ours = operators.ParallelBeamCT((1, 6, 5), -ANGLES, detectors=11, detector_spacing=1.5, spacing=2.0)
    x, y = op.domain.randn(3), op.range.randn(3)
    torch.testing.assert_close(op(x), ours(x))
    torch.testing.assert_close(op.adjoint(y), ours.adjoint(y))


def test_volumes(astra):
    op = bridge.astra.from_projector((SOLID, CONE))
    assert astra.made[7][0] == "cuda3d" and op.domain.dims == ("channel", "z", "y", "x")
    assert op.range.shape == (1, 2, 4, 7) and op.range.dims == ("channel", "row", "view", "detector")
    assert dict(op.range.spacing) == {"detector": 1.0, "row": 2.0} and not op.domain.spacing
    check_operator(op).raise_if_failed()


def test_a_projector_made_here_goes_with_the_operator_and_a_given_one_stays(astra):
    number = astra.create_projector("strip", VIEWS, VOLUME)
    given, made = (bridge.astra.from_projector(p) for p in (np.int64(number), (VOLUME, VIEWS)))
    twin, other = (bridge.astra.from_projector((VOLUME, VIEWS), kind) for kind in (None, "strip"))
    assert made.describe() == twin.describe() != other.describe()
    assert given.domain == made.domain and len(astra.made) == 4
    del given, made
    gc.collect()
    assert astra.deleted == [8]


def test_spaces_of_ones_own(astra):
    image = Space((1, 6, 5), torch.float64, units="1/mm", spacing={"y": 2.0, "x": 2.0})
    op = bridge.astra.from_projector((VOLUME, VIEWS), image=image, data=Space((4, 11), torch.float64))
    assert op.domain == image and op(image.randn(2)).shape == (2, 4, 11)


@pytest.mark.parametrize(
    ("projector", "options", "words"),
    [
        (3, {}, "no projector with the id 3"),
        ("linear", {}, "A projector's id or the pair"),
        ((VOLUME, VIEWS, VIEWS), {}, "not 3 geometries"),
        ((VIEWS, VOLUME), {}, "no volume geometry"),
        ((VOLUME, VOLUME), {}, "no projection geometry"),
        ((VOLUME, VIEWS), {"kind": "wrong"}, "makes no 'wrong' projector of these geometries: no such projector"),
        ((VOLUME, VIEWS), {"image": Space((1, 5, 5))}, r"does not have the size of ASTRA's \(6, 5\)"),
        (3, {"kind": "strip"}, "already made"),
    ],
)
def test_what_is_refused(astra, projector, options, words):
    with pytest.raises(InvdiffError, match=words) as caught:
        bridge.astra.from_projector(projector, **options)
    assert "\n" not in str(caught.value)


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "astra", None)
    with pytest.raises(InvdiffError, match=r"astra-toolbox, which is not installed; get it from conda"):
        bridge.astra.from_projector(0)


@pytest.mark.skipif(importlib.util.find_spec("astra") is None, reason="the ASTRA toolbox is not here")
def test_the_real_one():
    import astra

    volume = astra.create_vol_geom(24, 20)
    views = astra.create_proj_geom("parallel", 1.0, 35, ANGLES)
    op = bridge.astra.from_projector((volume, views))
    ours = operators.ParallelBeamCT((1, 24, 20), -ANGLES, detectors=35)
    check_operator(op).raise_if_failed()
    x = torch.zeros(2, 1, 24, 20)
    x[..., 2:-2, 2:-2] = torch.randn(2, 1, 20, 16, generator=torch.Generator().manual_seed(0))
    assert float((op(x) - ours(x)).norm()) < 1e-4 * float(ours(x).norm())
