"""Latent and flow samplers: published updates, known posteriors, fits that stop at the noise, flows as priors."""

import functools
import math

import numpy as np
import pytest
import torch

import invdiff
from invdiff import anchors_latent, likelihoods, operators, priors, reference, samplers, schedule
from invdiff.codec_latent import Latent
from invdiff.errors import InvdiffError
from invdiff.operator import Operator
from invdiff.primitives.consistency import fit_to_noise, seen_data
from invdiff.prior import Prior
from invdiff.spaces import Space, per_row
from tests.conformance.replay import Replay, context, record

DRAWS = 64
FLOOR = 1 / math.sqrt(DRAWS)


@functools.lru_cache
def linear(columns, operator):
    problem, prior = anchors_latent.linear_decoder(columns, operator)
    return problem, prior, anchors_latent.latent_posterior(problem, prior)


def draws_of(problem, prior, sampler, draws=DRAWS, seed=0):
    made = invdiff.sample(problem, prior, sampler, draws=draws, seed=seed, max_batch=draws, progress=False)
    return torch.from_numpy(np.asarray(made.draws)).reshape(draws, *problem.operator.domain.shape)


def grade(columns, operator, sampler, problem=None):
    own, prior, exact = linear(columns, operator)
    return anchors_latent.grade(draws_of(problem or own, prior, sampler), prior, exact)


# ---- against known posteriors ----


@pytest.mark.parametrize("columns", ["orthogonal", "skewed"])
def test_exact_draws_reach_the_floor(columns):
    _, prior, exact = linear(columns, "mask")
    figures = anchors_latent.grade(prior.codec.decode(exact.sample(DRAWS, 5)[0]), prior, exact)
    assert figures["mean_error"] < 1.3 * FLOOR and figures["off_range"] < 1e-12
    assert 0.97 < figures["std_ratio"] < 1.03 and 0.88 < figures["coverage"] < 0.92


def test_the_exact_posterior_is_that_of_the_pixels():
    """Written out: x = W z + b, y = A x + noise, without the codec or the reference."""
    problem, prior, exact = linear("skewed", "blur")
    codec = prior.codec
    zero = codec.decode(torch.zeros(1, 2, 8, 8).double())
    w = (codec.decode(torch.eye(128).double().reshape(-1, 2, 8, 8)) - zero).flatten(1).T
    a = problem.operator(torch.eye(256).double().reshape(-1, 1, 16, 16)).flatten(1).T
    c = prior.denoiser.covariance_matrix()
    precision = torch.linalg.inv(c) + (a @ w).T @ (a @ w) / 0.025**2
    mean = torch.linalg.solve(precision, (a @ w).T @ (problem.y - problem.operator(zero)).flatten() / 0.025**2)
    torch.testing.assert_close(exact.mean().flatten(), mean, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(
        exact.std().flatten() ** 2, torch.linalg.inv(precision).diagonal(), rtol=1e-6, atol=0
    )


# What is reached (docs/samplers/latent_posteriors.md), with a margin: a change for the worse must be seen.
# Columns: mean error at most, std ratio between, on measured directions between.
BOUNDS = [
    ("eventguided", {"steps": 100}, "orthogonal", "mask", 1.4 * FLOOR, (0.94, 1.04), (0.94, 1.04)),
    ("flowdps", {}, "orthogonal", "mask", 0.16, (1.00, 1.11), (0.92, 1.03)),
    ("flowdps", {}, "skewed", "blur", 0.23, (1.00, 1.11), (0.98, 1.10)),
    ("resample", {}, "orthogonal", "mask", 0.55, (0.88, 1.08), (0.68, 0.90)),
    ("resample", {}, "skewed", "blur", 0.58, (1.05, 1.28), (0.90, 1.12)),
    ("psld", {}, "orthogonal", "mask", 0.36, (0.72, 0.90), (0.25, 0.38)),
    ("flowchef", {}, "orthogonal", "mask", 0.95, (0.83, 1.05), (0.18, 0.30)),
]


@pytest.mark.parametrize(("name", "options", "columns", "operator", "error", "width", "measured"), BOUNDS)
def test_samplers_stay_where_they_are(name, options, columns, operator, error, width, measured):
    figures = grade(columns, operator, samplers.get(name, **options))
    assert figures["off_range"] < 1e-10, "draws are stored as decoded images"
    assert figures["mean_error"] < error
    assert width[0] < figures["std_ratio"] < width[1]
    assert measured[0] < figures["std_ratio_measured"] < measured[1]


def test_a_wrong_noise_level_is_seen():
    """The control of the test above."""
    own = linear("orthogonal", "mask")[0]
    wrong = invdiff.Problem(own.operator, likelihoods.Gaussian(0.075), own.y)
    figures = grade("orthogonal", "mask", samplers.FlowDPS(), wrong)
    assert figures["std_ratio_measured"] > 1.3


@pytest.mark.parametrize(
    ("name", "options", "error", "width"),
    [
        ("daps", {"steps": 50}, 0.12, (0.9, 1.1)),
        ("eventguided", {"steps": 100}, 0.15, (0.95, 1.15)),
        ("flowdps", {}, 0.28, (1.05, 1.30)),
    ],
)
def test_a_banana_is_found(name, options, error, width):
    problem, prior = anchors_latent.bent_decoder()
    exact = anchors_latent.grid_posterior(problem, prior)
    figures = exact.grade(prior.codec.encode(draws_of(problem, prior, samplers.get(name, **options), 400)))
    assert figures["mean_error"] < error and width[0] < figures["std_ratio"] < width[1]


def test_the_grid_is_fine_enough_and_a_gaussian_would_not_do():
    problem, prior = anchors_latent.bent_decoder()
    exact, coarse = (anchors_latent.grid_posterior(problem, prior, side=n) for n in (601, 301))
    torch.testing.assert_close(exact.mean, coarse.mean, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(exact.std, coarse.std, rtol=1e-6, atol=0)
    floor = exact.grade(exact.sample(2000, 3))["sliced_wasserstein"]
    normal = exact.mean + exact.std * torch.randn(2000, 2, generator=torch.Generator().manual_seed(0)).double()
    assert floor < 0.05 and exact.grade(normal)["sliced_wasserstein"] > 2.5 * floor


def test_what_has_no_such_posterior_is_refused():
    problem, prior = anchors_latent.bent_decoder()
    with pytest.raises(InvdiffError, match="not linear"):
        anchors_latent.latent_posterior(problem, prior)
    with pytest.raises(InvdiffError, match="two latents, no more"):
        anchors_latent.grid_posterior(*linear("orthogonal", "mask")[:2])
    with pytest.raises(InvdiffError, match="affine codec"):
        reference.posterior(*linear("orthogonal", "mask")[:2])
    with pytest.raises(InvdiffError, match="orthogonal or skewed"):
        anchors_latent.linear_decoder("oblique")


# ---- published updates, in the coordinates of their papers, by automatic differentiation ----

N, PIXELS, M, ROWS = 6, 9, 5, 2
_draw = np.random.default_rng(3).standard_normal
W = torch.from_numpy(_draw((PIXELS, N))) / 4
V = torch.from_numpy(_draw((N, PIXELS))) / 3
A = torch.from_numpy(_draw((M, PIXELS)))
A = 0.6 * A / torch.linalg.matrix_norm(A, 2)
ROOT = torch.from_numpy(_draw((N, N))) / math.sqrt(N)
C = ROOT @ ROOT.T + 0.1 * torch.eye(N).double()
Y = torch.from_numpy(_draw((ROWS, M)))


def decoder(z):
    return (z @ W.T).tanh()


def encoder(x):
    return (x @ V.T).sin()


def denoised(x, s):
    """For ``z0 ~ N(0, C)``."""
    return x @ torch.linalg.solve(C + s**2 * torch.eye(N).double(), C)


def toy():
    codec = Latent(encoder, decoder, Space((PIXELS,), torch.float64), scale=1.0)
    prior = Prior(priors.Gaussian(torch.zeros(N).double(), C, codec.prior, 1e-3, 1e3).denoiser, codec)
    return invdiff.Problem(operators.Matrix(A), likelihoods.Gaussian(0.1), Y), prior


def step(sampler, levels, x, k=0):
    """One step of ours from state ``x``, and the noise it drew."""
    problem, prior = toy()
    ctx = context(sampler, problem, prior, levels, ROWS)
    noise = record(8, ROWS, (N,))
    state = sampler.init(ctx, ROWS, Replay(noise, ROWS).at(-1))
    return sampler.step(k, {**state, "x": x}, ctx, Replay(noise, ROWS).at(k))["x"], noise


def gradient(loss, z):
    z = z.detach().requires_grad_()
    return torch.autograd.grad(loss(z).sum(), z)[0]


def misfit(z):
    return (Y - decoder(z) @ A.T).norm(dim=1)


S, T = 1.7, 1.2
ABAR, NEXT = 1 / (1 + S * S), 1 / (1 + T * T)
X = record(1, ROWS, (N,), seed=11)[0] * 1.5


def vp_step(loss, weight=1.0):
    """DDIM and a gradient in ``z = sqrt(abar) x``; returns ``x'``."""
    z = math.sqrt(ABAR) * X
    d = denoised(X, S)
    eps = (z - math.sqrt(ABAR) * d) / math.sqrt(1 - ABAR)
    moved = math.sqrt(NEXT) * d + math.sqrt(1 - NEXT) * eps
    return (moved - weight * gradient(loss, z)) / math.sqrt(NEXT)


def test_psld_is_the_published_update():
    omega, gamma = 0.9, 0.1

    def loss(z):
        d = denoised(z / math.sqrt(ABAR), S)
        x = decoder(d)
        glued = Y @ A + x - x @ A.T @ A
        return omega * (Y - x @ A.T).norm(dim=1) + gamma * (encoder(glued) - d).norm(dim=1)

    ours, _ = step(samplers.PSLD.preset("published", omega=omega, gamma=gamma), [S, T, 0.0], X)
    torch.testing.assert_close(ours, vp_step(loss), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("tweedie", ["exact", "published"])
def test_resample_is_the_published_update(tweedie):
    """The gradient with Tweedie's formula or the code's, then the product of two Gaussians at the next level."""

    def loss(z):
        x = z / math.sqrt(ABAR)
        eps = (x - denoised(x, S)) / S
        noise = 1 - ABAR if tweedie == "published" else math.sqrt(1 - ABAR)
        return misfit((z - noise * eps) / math.sqrt(ABAR))

    sampler = samplers.ReSample(tweedie=tweedie, order=1, ahead=1, iterations=0, period=1)
    plain = vp_step(loss, 0.5 * ABAR)
    ours, noise = step(sampler, [S, T, 0.9, 0.5, 0.0], X)
    torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-12)  # the first third of the steps
    ours, noise = step(
        sampler, [3.0, 2.5, S, T, 0.0], X, k=2
    )  # the last third: a fit of latents, here of no steps
    near = denoised(plain, T)
    if tweedie == "published":
        near = plain + math.sqrt(1 - NEXT) * (near - plain)
    z = math.sqrt(NEXT) * plain
    v = 40 * (1 - NEXT) / (1 - ABAR) * (1 - ABAR / NEXT)
    mean = (v * math.sqrt(NEXT) * near + (1 - NEXT) * z) / (v + 1 - NEXT)
    drawn = mean + math.sqrt(1 / (1 / v + 1 / (1 - NEXT))) * noise[0]
    torch.testing.assert_close(ours, drawn / math.sqrt(NEXT), rtol=1e-10, atol=1e-12)


def test_resample_needs_a_period():
    with pytest.raises(InvdiffError, match="period and ahead of at least 1, got 0, 5"):
        samplers.ReSample(period=0)


def test_resample_fits_pixels_before_latents():
    """In the second third of the steps the fit is one of images, which the encoder brings back."""
    problem = toy()[0]
    sampler = samplers.ReSample(order=1, ahead=1, period=1, gamma=1e12)
    x, noise = step(sampler, [2.5, S, T, 0.9, 0.5, 0.4, 0.0], X, k=1)
    plain, _ = step(samplers.ReSample(order=1, ahead=1, period=100), [2.5, S, T, 0.9, 0.5, 0.4, 0.0], X, k=1)
    start = decoder(denoised(plain, T))
    image = fit_to_noise(problem, start, torch.ones_like(Y), 50)
    torch.testing.assert_close(x, encoder(image) + T * noise[0], rtol=1e-6, atol=1e-6)


def test_flowdps_and_flowchef_are_the_published_updates():
    t, u, eta = S / (1 + S), T / (1 + T), 0.3  # the flow's times
    z = (1 - t) * X
    d = denoised(X, S)
    velocity = (z - d) / t
    torch.testing.assert_close(z - t * velocity, d)
    eps = z + (1 - t) * velocity
    chef = (1 - u) * d + u * eps - eta * gradient(misfit, d)
    ours, _ = step(samplers.FlowChef.preset("published", eta=eta), [S, T, 0.0], X)
    torch.testing.assert_close(ours, chef / (1 - u), rtol=1e-10, atol=1e-12)
    fitted = d
    for _ in range(3):
        fitted = fitted - eta * gradient(misfit, fitted)
    ours, noise = step(samplers.FlowDPS.preset("published", eta=eta), [S, T, 0.0], X)
    mixed = math.sqrt(u) * eps + math.sqrt(1 - u) * noise[0]
    theirs = (1 - u) * ((1 - t) * d + t * fitted) + u * mixed
    torch.testing.assert_close(ours, theirs / (1 - u), rtol=1e-10, atol=1e-12)


def test_the_clock_of_flows():
    grid = schedule.flow(28, 0.012, 1e4, 4.0)
    t = grid / (1 + grid)
    assert len(grid) == 29 and grid[-1] == 0 and bool((grid[1:] < grid[:-1]).all())
    u = t[:-1] / (4 - 3 * t[:-1])
    torch.testing.assert_close(u.diff(), u.diff().mean().expand(27), rtol=1e-6, atol=0)
    assert [round(float(v), 2) for v in t[-4:-1]] == [0.25, 0.14, 0.01], "as the flow's own code has them"
    plain = samplers.FlowDPS(schedule="flow", steps=5).sigmas(toy()[1])
    shifted = samplers.FlowDPS(schedule="flow", steps=5, shift=4.0).sigmas(toy()[1])
    assert plain[0] == pytest.approx(1e3) and shifted[0] == pytest.approx(1e3) and shifted[2] > 2 * plain[2]
    torch.testing.assert_close(samplers.DDS(schedule="edm").sigmas(toy()[1])[-1], torch.zeros(()).double())
    with pytest.raises(InvdiffError, match="shift of a flow's clock"):
        schedule.flow(5, 0.1, 1.0, 0.0)


def test_latent_names_lead_to_pixel_samplers():
    assert samplers.get("latent-dps") == samplers.DPS() and samplers.get("latent_daps") == samplers.DAPS()


# ---- fits that stop at the noise ----


class Curved(Operator):
    """``x + x^2 / 10`` behind a matrix."""

    def __init__(self, matrix, domain, range_):
        self.matrix, self.domain, self.range = matrix, domain, range_

    def _forward(self, x):
        return (x + 0.1 * x * x) @ self.matrix.T


def fitted(operator, sigma=0.1, share=1.0, iterations=400):
    """Fit three rows: one far from the data, the truth, one near it; misfits before and after, and the goal."""
    x = operator.domain.randn(3, 2)
    noise = sigma * operator.range.randn(3, 3)
    problem = invdiff.Problem(operator, likelihoods.Gaussian(sigma), operator(x) + noise)
    seen = seen_data(problem, operator.domain.randn(3, 4))
    start = x + torch.tensor([1.0, 0.0, 1e-3]).reshape(-1, *[1] * (x.ndim - 1)) * operator.domain.randn(3, 5)
    out = fit_to_noise(problem, start, seen, iterations, share)
    before, after = (((problem.residual(u) / sigma) * seen).flatten(1).norm(dim=1) for u in (start, out))
    return start, out, before, after, seen.flatten(1).sum(1).sqrt() * (math.sqrt(2) if noise.is_complex() else 1)


@pytest.mark.parametrize("kind", ["mask", "blur", "matrix", "complex", "curved"])
def test_a_fit_ends_at_the_noise_level_and_not_below(kind):
    space = Space((1, 8, 8), torch.float64)
    mask = torch.zeros(1, 8, 8, dtype=torch.float64)
    mask[..., ::2] = 1
    matrix = torch.from_numpy(np.random.default_rng(0).standard_normal((20, 64)))
    operator = {
        "mask": operators.Mask(mask, space),
        "blur": operators.GaussianBlur(1.0, space),
        "matrix": operators.Matrix(matrix),
        "complex": operators.SubsampledFourier(mask[0], space),
        "curved": Curved(matrix, Space((64,), torch.float64), Space((20,), torch.float64)),
    }[kind]
    start, out, before, after, goal = fitted(operator)
    assert before[0] > 2 * goal[0]
    for row in range(3):
        if before[row] <= goal[row]:
            assert torch.equal(out[row], start[row]), "a row that fits as well as the noise allows stays"
        else:
            assert after[row] == pytest.approx(float(goal[row]), rel=0.02)


def test_rows_of_a_fit_do_not_see_each_other():
    space = Space((1, 8, 8), torch.float64)
    blur, y = operators.GaussianBlur(1.0, space), space.randn(3)
    problem = invdiff.Problem(blur, likelihoods.Gaussian(0.1), y)
    start = space.randn(3, 1)
    start[1] = float("nan")
    whole = fit_to_noise(problem, start, torch.ones_like(y), 50)
    alone = fit_to_noise(problem.rows(torch.tensor([0])), start[:1], torch.ones_like(y[:1]), 50)
    # A row stops within 1e-6 of its goal, so that rounding, which depends on the batch, may cost it a last step.
    assert (whole[:1] - alone).abs().max() < 1e-5 * alone.abs().max() and torch.isfinite(whole[2]).all()


def test_a_mask_takes_one_step():
    space = Space((1, 8, 8), torch.float64)
    size, goal = fitted(operators.Mask(torch.ones(1, 8, 8).double(), space), iterations=1)[-2:]
    assert size[0] == pytest.approx(float(goal[0]), rel=1e-9)


def test_a_share_below_one_goes_into_the_noise():
    space = Space((1, 8, 8), torch.float64)
    size, goal = fitted(operators.Mask(torch.ones(1, 8, 8).double(), space), share=0.1)[-2:]
    assert (size / goal).tolist() == pytest.approx([0.1] * 3, rel=1e-6)


# ---- a flow is a prior like any other ----

CLOCK = priors.VP.from_betas("scaled_linear", 1000, 0.00085, 0.012)
TABLE = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
LOG_SIGMA = 0.5 * ((1 - TABLE) / TABLE).log().numpy()
LOW, HIGH = CLOCK.sigma_min, CLOCK.sigma_max


def velocity(z, t):
    s = per_row(t / (1 - t), z)
    x = (1 + s) * z
    d = torch.cat([denoised(x[i : i + 1], float(s[i])) for i in range(len(z))])
    return (x - d) / s - d


def noise_in(z, t):
    s = per_row(torch.from_numpy(np.exp(np.interp(t.numpy(), np.arange(1000.0), LOG_SIGMA))), z)
    x = (1 + s**2).sqrt() * z
    return (x - torch.cat([denoised(x[i : i + 1], float(s[i])) for i in range(len(z))])) / s


def x0_of(z, sigma):
    return torch.cat([denoised(z[i : i + 1], float(sigma[i])) for i in range(len(z))])


FRAMES = {
    "flow": (velocity, "flow", priors.Flow(1, LOW, HIGH)),
    "epsilon": (noise_in, "epsilon", CLOCK),
    "x0": (x0_of, "x0", priors.VE(LOW, HIGH)),
}


@pytest.mark.parametrize(
    "name",
    [
        "dps",
        "daps",
        "dds",
        "diffpir",
        "tmpd",
        "pigdm",
        "pnpdm",
        "reddiff",
        "resample",
        "psld",
        "flowdps",
        "flowchef",
    ],
)
def test_a_flow_and_a_diffusion_of_one_gaussian_give_the_same_draws(name):
    space = Space((N,), torch.float64)
    matrix = torch.from_numpy(np.random.default_rng(1).standard_normal((4, N)))
    problem = invdiff.Problem(operators.Matrix(matrix), likelihoods.Gaussian(0.2), torch.ones(1, 4).double())
    sampler = samplers.get(name, steps=6)
    found = {}
    for frame, (network, kind, levels) in FRAMES.items():
        prior = priors.from_network(network, kind, levels, space)
        made = invdiff.sample(problem, prior, sampler, draws=3, seed=0)
        found[frame] = np.asarray(made.estimate if made.kind == "point" else made.draws)
    size = np.abs(found["x0"]).max()
    assert np.isfinite(size) and size > 0
    for frame in ("flow", "epsilon"):
        assert np.abs(found[frame] - found["x0"]).max() < 1e-5 * size
