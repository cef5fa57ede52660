"""Our samplers and deepinv's classes on the same noise: the same states at all levels, to 1e-5.

Two cases differ in truth and noise; images live on [0, 1] and states on [-1, 1], as deepinv has it. What has to
be undone for the comparison stands in the tests, and in the lists of differences of the samplers' files.
"""

import math
from dataclasses import dataclass
from typing import Any
from unittest import mock

import deepinv
import pytest
import torch

import invdiff
from invdiff import likelihoods, operators, priors, samplers
from invdiff.codec import Scale
from invdiff.primitives.misfit import misfit_unit
from invdiff.prior import Prior
from invdiff.spaces import Space
from tests.conformance.replay import Replay, chain, context, record

SPACE = Space((1, 8, 8), torch.float64)
SIGMA = 0.0625  # a float32 number: deepinv keeps noise levels in that precision
STEPS = 20
TOL = 1e-5


@pytest.fixture(scope="module")
def prior():
    """A Gaussian on [-1, 1], narrow enough that no denoised image leaves that range (deepinv clamps some)."""
    at = torch.cartesian_prod(torch.arange(8), torch.arange(8)).double()
    covariance = 0.03 * torch.exp(-0.5 * (torch.cdist(at, at) / 1.5) ** 2) + 0.003 * torch.eye(64).double()
    mean = 0.2 * torch.sin(at[:, 0] / 2).reshape(SPACE.shape)
    made = priors.Gaussian(mean, covariance, SPACE, sigma_min=1e-3, sigma_max=1e3)
    return Prior(made.denoiser, codec=Scale(SPACE, 0.5, 0.5), card=made.card)


class Theirs(deepinv.models.Denoiser):
    """The same denoiser in deepinv's frame, images on [0, 1]."""

    def __init__(self, prior):
        super().__init__()
        self.denoiser = prior.denoiser

    def forward(self, x, sigma, **_):
        level = torch.as_tensor(sigma, dtype=torch.float64).reshape(-1).expand(len(x))
        return (self.denoiser(2 * x.double() - 1, 2 * level) + 1) / 2


class Asked(Theirs):
    """It keeps what it was asked: the states of samplers that show none."""

    def __init__(self, prior):
        super().__init__(prior)
        self.states = []

    def forward(self, x, sigma, **_):
        self.states.append(x.clone())
        return super().forward(x, sigma)


@dataclass
class Pair:
    """One problem in both packages."""

    problem: invdiff.Problem
    physics: Any

    @property
    def data(self):
        return self.problem.y, self.physics


def pair(kind, prior, unit=1.0):
    """Return a problem with data in units of ``1 / unit``."""
    noise = deepinv.physics.GaussianNoise(SIGMA * unit)
    generator = torch.Generator().manual_seed(1)
    if kind == "mask":
        mask = (torch.rand(SPACE.shape, generator=generator) < 0.4).double()
        ours = operators.Mask(mask, SPACE)
        theirs = deepinv.physics.Inpainting(img_size=SPACE.shape, mask=mask, noise_model=noise)
    elif kind == "blur":
        kernel = torch.rand(3, 3, generator=generator, dtype=torch.float64)
        kernel[1, 1] += 6
        kernel = kernel / kernel.sum()
        ours = operators.Blur(kernel, SPACE)
        theirs = deepinv.physics.BlurFFT(img_size=SPACE.shape, filter=kernel[None, None], noise_model=noise)
    else:  # a dense matrix with singular values from 0.1 to 2, and a null space
        u, v = (torch.linalg.qr(torch.randn(64, 64, generator=generator).double())[0] for _ in range(2))
        s = torch.cat([torch.logspace(math.log10(0.1), math.log10(2), 40), torch.zeros(24)]).double() * unit
        ours = operators.Matrix(u @ torch.diag(s) @ v.T, SPACE)
        theirs = deepinv.physics.DecomposablePhysics(
            U=lambda c: c.double() @ u.T,
            U_adjoint=lambda y: y @ u,
            V=lambda c: (c @ v.T).reshape(-1, *SPACE.shape),
            V_adjoint=lambda x: x.flatten(1).double() @ v,
            mask=s[None],
            noise_model=noise,
        )
    x = (prior.denoiser.sample(2, seed=3) + 1) / 2
    torch.testing.assert_close(ours(x), theirs.A(x))
    return Pair(invdiff.Problem.simulate(ours, likelihoods.Gaussian(SIGMA * unit), x, seed=4), theirs)


def same(ours, theirs, levels, tol=TOL):
    """Compare states level by level, relative to what they hold: an image of order one and noise."""
    assert len(ours) == len(theirs) == len(levels)
    for a, b, level in zip(ours, theirs, levels):
        assert (a - b).abs().max() <= tol * max(1.0, float(level)), f"they differ at level {float(level):.3g}"


def feed(noise):
    """Return a stand-in for ``randn_like`` that gives recorded numbers."""
    rng = Replay(noise)
    return lambda like, **_: rng.normal(like)


def run(model, noise, *data):
    """Run a deepinv sampler of their differential equations; return levels and states in our frame, on [-1, 1]."""
    sde = getattr(model, "sde", model)
    times = model.solver.timesteps
    levels, scales = (torch.stack([f(t) for t in times]) for f in (sde.sigma_t, sde.scale_t))
    model.solver.randn_like = feed(noise[1:])
    start = noise[0] * levels[0] * scales[0]
    _, path = model(*data, x_init=start, get_trajectory=True)
    return levels, [(2 * x - 1) / scale for x, scale in zip(path, scales)]


def times(eta):
    grid = torch.linspace(1, 0, STEPS + 1, dtype=torch.float64)
    return deepinv.sampling.DDIMSolver(timesteps=grid, eta=eta)


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_ddim_and_ddpm(prior, eta):
    noise = record(STEPS + 1, 2, SPACE.shape)
    sde = deepinv.sampling.VariancePreservingDiffusion(denoiser=Theirs(prior), solver=times(eta))
    levels, theirs = run(sde, noise)
    same(chain(samplers.DDIM(eta=eta), None, prior, levels, noise), theirs, levels)


@pytest.mark.parametrize("kind", ["mask", "blur", "dense"])
def test_dps(prior, kind):
    """Their weight is that of a score: undone by ``zeta = weight (s^2 - t^2) / 2`` (2 is the width of [-1, 1]).

    Ours is in units of the operator's norm where that is above 1.
    """
    noise, p, weight = record(STEPS + 1, 2, SPACE.shape), pair(kind, prior), 3.0
    beyond = float(misfit_unit(p.problem, SPACE.zeros(1).double())[0])
    assert (beyond > 1) == (kind == "dense")
    model = deepinv.sampling.DPS(Theirs(prior), num_steps=STEPS + 1, weight=weight)
    levels, theirs = run(model, noise, *p.data)

    def ours(s, t):
        return samplers.DPS(order=1, frame="ve", zeta=beyond * weight * (s * s - t * t) / 2)

    same(chain(ours, p.problem, prior, levels, noise), theirs, levels)


def posterior(fidelity, prior, eta):
    sde = deepinv.sampling.VariancePreservingDiffusion()
    return deepinv.sampling.PosteriorDiffusion(fidelity, Theirs(prior), sde, times(eta))


@pytest.mark.parametrize(("kind", "eta"), [("mask", 1.0), ("blur", 1.0), ("dense", 0.3)])
def test_pigdm(prior, kind, eta):
    """Their guidance enters the score: ``weight="tweedie"``. Their ``r0 = 1`` on [0, 1] is 2 on [-1, 1]."""
    noise, p = record(STEPS + 1, 2, SPACE.shape), pair(kind, prior)
    levels, theirs = run(posterior(deepinv.sampling.PiGDMDataFidelity(), prior, eta), noise, *p.data)
    ours = samplers.PiGDM(weight="tweedie", line_search=False, order=1, eta=eta, spread=2.0)
    same(chain(ours, p.problem, prior, levels, noise), theirs, levels)


def test_tmpd_is_their_moment_matching(prior):
    """In small units, because their conjugate gradients add 1e-8 to every denominator."""
    noise, p = record(STEPS + 1, 2, SPACE.shape), pair("dense", prior, unit=1e3)
    fidelity = deepinv.sampling.MomentMatchingDataFidelity(cg_max_iter=200, cg_tol=1e-8)
    levels, theirs = run(posterior(fidelity, prior, 1.0), noise, *p.data)
    ours = samplers.TMPD(order=1, tol=1e-10, cg_iterations=200)
    same(chain(ours, p.problem, prior, levels, noise), theirs, levels)


def test_scoreald_takes_their_score(prior):
    """A published move ``x + h score + sqrt(2 h) z``, the score with their annealed data term (``gamma = s``)."""
    noise, p = record(2, 2, SPACE.shape), pair("mask", prior)
    sde = deepinv.sampling.VarianceExplodingDiffusion()
    model = deepinv.sampling.PosteriorDiffusion(deepinv.sampling.ALDDataFidelity(), Theirs(prior), sde, times(1.0))
    one = samplers.ScoreALD.preset("published", moves=1)
    for t in (0.8, 0.6, 0.4):
        s = float(sde.sigma_t(t))
        ctx = context(one, p.problem, prior, [s, s / 2], 2)
        state = {**one.init(ctx, 2, Replay(noise)), "x": s * noise[0] + 0.1}
        h = one.step_size * s * s
        theirs = state["x"] + h * model.score(*p.data, state["x"].clone(), t) + math.sqrt(2 * h) * noise[1]
        same([one.step(0, state, ctx, Replay(noise[1:]))["x"]], [theirs], [s])


@pytest.mark.parametrize(("kind", "zeta"), [("mask", 1.0), ("blur", 0.3), ("dense", 0.3)])
def test_diffpir(prior, kind, zeta):
    """Their data step is ``||A x - y||^2 + 2 rho ||x - D||^2`` on [0, 1] with ``rho = lambda sigma^2 / s^2`` and
    ``s`` of [-1, 1]: ``lam = lambda / 2``. They start from ``A^T y``, and return the state at the last level
    (times the signal level), where we return ``x0``.
    """
    noise, p, net = record(STEPS, 2, SPACE.shape), pair(kind, prior), Asked(prior)
    l2 = deepinv.optim.data_fidelity.L2()
    model = deepinv.sampling.DiffPIR(net, l2, sigma=SIGMA, max_iter=STEPS, zeta=zeta, lambda_=7.0)
    with mock.patch.object(torch, "randn_like", feed(noise)):
        out = model(*p.data)
    levels = model.sigmas[model.seq.long()].double()
    theirs = [2 * x - 1 for x in net.states]
    back = 2 * p.physics.A_adjoint(p.problem.y) - 1
    start = back + (levels[0] ** 2 - 4 * SIGMA**2).sqrt() * noise[0]
    same([start, (2 * out - 1) * (1 + levels[-1] ** 2).sqrt()], [theirs[0], theirs[-1]], [levels[0], 1])
    ours = samplers.DiffPIR.preset("published", lam=7.0 / 2, zeta=zeta, steps=STEPS)
    torch.testing.assert_close(
        ours.sigmas(prior)[:-1], levels, rtol=2e-4, atol=0
    )  # theirs are float32 of 1 - abar
    same(chain(ours, p.problem, prior, levels, noise[1:], theirs[0]), theirs, levels)


@pytest.mark.parametrize(("kind", "eta", "etab"), [("mask", 0.85, 1.0), ("blur", 0.85, 1.0), ("dense", 0.6, 0.9)])
def test_ddrm(prior, kind, eta, etab):
    """Their noise is ``randn / sqrt(2)``, real coordinates included, and is fed ``sqrt(2) V^T z`` here."""
    noise, p, net = record(STEPS + 1, 2, SPACE.shape), pair(kind, prior), Asked(prior)
    levels = torch.logspace(0, -2, STEPS, dtype=torch.float64)
    model = deepinv.sampling.DDRM(net, levels.tolist(), eta=eta, etab=etab, eps=0.0)
    rotated = torch.stack([math.sqrt(2) * p.physics.V_adjoint(z) for z in noise])
    with mock.patch.object(torch, "randn_like", feed(rotated)):
        out = model(*p.data)
    law = prior.denoiser
    unit = priors.Gaussian((law.mean + 1) / 2, law.covariance_matrix() / 4, SPACE)  # on [0, 1], as their levels
    ours = samplers.DDRM(eta=eta, eta_b=etab)
    same(chain(ours, p.problem, unit, [*levels, 0.0], noise), [*net.states, out], [*levels, 0.0], 1e-9)
