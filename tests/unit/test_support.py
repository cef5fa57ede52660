"""Images restricted to a region."""

import dataclasses

import numpy as np
import pytest
import torch

import invdiff
from invdiff import likelihoods, operators, priors, samplers
from invdiff.codec import Scale
from invdiff.errors import InvdiffError
from invdiff.spaces import Space
from invdiff.support import Support, restrict

REGION = torch.zeros(8, 8, dtype=torch.bool)
REGION[2:6, 1:7] = True


def test_codec():
    space = Space((1, 8, 8), torch.complex64)
    codec = Support(space, REGION) @ Scale(space, 3.0)
    u = space.randn(2)
    x = codec.decode(u)
    assert (x[:, :, ~REGION] == 0).all()
    torch.testing.assert_close(x[:, :, REGION], 3 * u[:, :, REGION])
    torch.testing.assert_close(codec.decode(codec.encode(x)), x)
    assert codec.describe()["parts"][0]["share"] == pytest.approx(24 / 64)


def test_draws_inside_are_unchanged():
    space = Space((1, 8, 8), torch.float64)
    prior = priors.Gaussian(torch.zeros(64, dtype=torch.float64), torch.eye(64, dtype=torch.float64), space)
    problem = invdiff.Problem.simulate(
        operators.Mask(REGION[None], space), likelihoods.Gaussian(0.1), space.randn(1)
    )
    prior = prior.bind(space)
    plain = invdiff.sample(problem, prior, samplers.DDS(steps=5), draws=2, seed=0, progress=False)
    kept = invdiff.sample(problem, restrict(prior, REGION), samplers.DDS(steps=5), draws=2, seed=0, progress=False)
    a, b = (np.asarray(p.draws).reshape(2, 8, 8) for p in (plain, kept))
    np.testing.assert_allclose(a[:, REGION], b[:, REGION], atol=1e-12)
    assert (b[:, ~REGION.numpy()] == 0).all() and (a[:, ~REGION.numpy()] != 0).all()


def test_made_for_each_problem():
    space = Space((1, 8, 8))
    prior = priors.Gaussian(torch.zeros(64), torch.eye(64), space)
    loose = dataclasses.replace(prior, codec=None, make_codec=lambda image, scale: Scale(image, scale))
    assert restrict(loose, REGION).bind(space).codec.parts[0].region is not None


@pytest.mark.parametrize(("region", "words"), [(REGION[:4], "has shape"), (~REGION & REGION, "is empty")])
def test_bad_region(region, words):
    with pytest.raises(InvdiffError, match=words):
        Support(Space((1, 8, 8)), region)
