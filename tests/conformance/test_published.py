"""Published updates, evaluated anew in the variance-preserving coordinates of their papers, on recorded noise.

Every formula takes the state ``x = sqrt(a) (x0 + sigma n)`` at ``a = abar_t`` and gives the one at ``b = abar_s``;
our step from the same state with the same noise, at the published preset, must give the same.
"""

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch

import invdiff
from invdiff import likelihoods, operators, priors, samplers
from invdiff.operator import LinearOperator
from invdiff.spaces import Space
from tests.conformance.replay import Replay, chain, context, record

N, M, ROWS = 12, 7, 2
SPACE = Space((N,), torch.float64)
SIGMA = 0.15
EYE, EYE_M = torch.eye(N).double(), torch.eye(M).double()
TABLE = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
ABAR = [*TABLE[[999, 850, 650, 420, 220, 80, 20, 0]].tolist(), 1.0]
LEVELS = [math.sqrt((1 - a) / a) for a in ABAR]

_draw = np.random.default_rng(5).standard_normal
A = torch.from_numpy(_draw((M, N)))
A = 0.9 * A / torch.linalg.matrix_norm(A, 2)  # published weights are for norms up to 1
PINV = torch.linalg.pinv(A)
P = PINV @ A
ROOT = torch.from_numpy(_draw((N, N))) / math.sqrt(N)
C = ROOT @ ROOT.T + 0.05 * EYE
MEAN = 0.3 * torch.from_numpy(_draw(N))
PRIOR = priors.Gaussian(MEAN, C, SPACE)
Y = torch.from_numpy(_draw((ROWS, M)))


class Dense(LinearOperator):
    """The matrix without its decomposition, so that solves are conjugate gradients."""

    def __init__(self):
        self.domain, self.range = SPACE, Space((M,), torch.float64)

    def _forward(self, x):
        return x @ A.T

    def _adjoint(self, y):
        return y @ A


def problem(operator=None):
    return invdiff.Problem(operator or operators.Matrix(A, SPACE), likelihoods.Gaussian(SIGMA), Y)


# ---- what the papers share ----


def denoised(x, a):
    s2 = (1 - a) / a
    return MEAN + (x / math.sqrt(a) - MEAN) @ torch.linalg.solve(C + s2 * EYE, C)


def predicted_noise(x, d, a):
    return (x - math.sqrt(a) * d) / math.sqrt(1 - a)


def ancestral(x, d, a, b, z):
    """DDPM's posterior ``q(x_s | x_t, x0 = d)``."""
    alpha = a / b
    mean = math.sqrt(b) * (1 - alpha) / (1 - a) * d + math.sqrt(alpha) * (1 - b) / (1 - a) * x
    return mean + math.sqrt((1 - alpha) * (1 - b) / (1 - a)) * z


def ddim(x, d, a, b, eta, z):
    """Equation (12) of DDIM with its ``sigma_t(eta)``."""
    sigma = eta * math.sqrt((1 - b) / (1 - a)) * math.sqrt(1 - a / b)
    return math.sqrt(b) * d + math.sqrt(max(1 - b - sigma**2, 0)) * predicted_noise(x, d, a) + sigma * z


def mixed(d, eps, b, eta, z):
    """The transition of DDNM and DDS."""
    return math.sqrt(b) * d + math.sqrt(1 - b) * (math.sqrt(1 - eta**2) * eps + eta * z)


def gradient(loss, x):
    """Gradient of a sum over rows with respect to the state."""
    x = x.detach().requires_grad_()
    return torch.autograd.grad(loss(x).sum(), x)[0]


def misfit(a):
    return lambda x: (Y - denoised(x, a) @ A.T).norm(dim=1)


def known(b, z):
    """What the data measure, noised to ``b``."""
    return math.sqrt(b) * Y @ PINV.T + math.sqrt(1 - b) * z @ P


def gram(r2):
    """``u -> A^T (r2 A A^T + sigma^2)^-1 u`` on rows."""
    return lambda u: u @ torch.linalg.solve(r2 * A @ A.T + SIGMA**2 * EYE_M, A)


# ---- one function per method: (state, abar_t, abar_s, noise) -> state ----


def dps(x, a, b, z):
    return ancestral(x, denoised(x, a), a, b, next(z)) - 0.3 * gradient(misfit(a), x)


def mcg(x, a, b, z):
    moved = ancestral(x, denoised(x, a), a, b, next(z)) - gradient(misfit(a), x)
    return moved @ (EYE - P) + known(b, next(z))


def ilvr(x, a, b, z):
    moved = ancestral(x, denoised(x, a), a, b, next(z))
    return moved - moved @ P + known(b, next(z))


def ddnm(x, a, b, z):
    d = denoised(x, a)
    return mixed(d + (Y - d @ A.T) @ PINV.T, predicted_noise(x, d, a), b, 0.85, next(z))


def ddnm_plus(x, a, b, z):
    """The paper's ``Sigma_t`` and ``Phi_t``, its weights ``a_t = sqrt(b)`` and ``sigma_t = eta sqrt(1 - b)``."""
    u, s, vh = torch.linalg.svd(A, full_matrices=True)
    s = torch.cat([s, torch.zeros(N - M)])
    weight, fresh = math.sqrt(b), 0.85 * math.sqrt(1 - b)
    inverse = torch.where(s > 0, 1 / s, 0)
    lam = (fresh * s / (weight * SIGMA)).clamp(max=1)
    phi = (fresh**2 - (weight * lam * SIGMA * inverse) ** 2).clamp(min=0).sqrt()
    d, noise = denoised(x, a), next(z)
    correction = torch.nn.functional.pad((Y - d @ A.T) @ u, (0, N - M)) * inverse * lam
    eps = math.sqrt(1 - b) * math.sqrt(1 - 0.85**2) * predicted_noise(x, d, a)
    return weight * (d + correction @ vh) + eps + (phi * (noise @ vh.T)) @ vh


def dds(x, a, b, z):
    d = denoised(x, a)
    u, matrix = d.clone(), EYE + A.T @ A
    r = d + Y @ A - u @ matrix
    p = r
    for _ in range(5):
        length = (r * r).sum(1, keepdim=True) / ((p @ matrix) * p).sum(1, keepdim=True)
        u, new = u + length * p, r - length * (p @ matrix)
        p = new + (new * new).sum(1, keepdim=True) / (r * r).sum(1, keepdim=True) * p
        r = new
    return mixed(u, predicted_noise(x, d, a), b, 0.85, next(z))


def dmps(x, a, b, z):
    alpha, root = a / b, math.sqrt(a)
    score = gram((1 - a) / a)(Y - x @ A.T / root) / root
    moved = ancestral(x, denoised(x, a), a, b, next(z))
    return moved + 1.75 * (1 - alpha) / math.sqrt(alpha) * score


def pigdm(weight):
    def step(x, a, b, z):
        r2, frozen = 1 - a, denoised(x, a)
        pull = gram(r2)(Y - frozen @ A.T)
        g = gradient(lambda v: (pull * denoised(v, a)).sum(1), x)
        return ddim(x, frozen, a, b, 1.0, next(z)) + math.sqrt(a) * weight(b) * r2 * g

    return step


def diffpir(x, a, b, z):
    """The level of the data enters on [0, 1] in the published code, half of ours."""
    d, rho = denoised(x, a), 7.0 * (SIGMA / 2) ** 2 * a / (1 - a)
    u = (Y @ A + rho * d) @ torch.linalg.inv(A.T @ A + rho * EYE)
    eps = predicted_noise(x, u, a)
    return math.sqrt(b) * u + math.sqrt(1 - b) * (math.sqrt(0.7) * eps + math.sqrt(0.3) * next(z))


def tmpd(x, a, b, z):
    d, s2 = denoised(x, a), (1 - a) / a
    own = s2 * torch.linalg.solve(C + s2 * EYE, C)
    gain = own @ A.T @ torch.linalg.inv(A @ own @ A.T + SIGMA**2 * EYE_M)
    return ancestral(x, d + (Y - d @ A.T) @ gain.T, a, b, next(z))


def nrlg(x, a, b, z):
    d, s = denoised(x, a), math.sqrt((1 - a) / a)
    eps = predicted_noise(x, d, a) - s * gram(s * s)(Y - d @ A.T)
    return math.sqrt(b) * (x - math.sqrt(1 - a) * eps) / math.sqrt(a) + math.sqrt(1 - b) * eps


def lgd(x, a, b, z):
    n = [next(z) for _ in range(3)]

    def loss(v):
        points = [denoised(v, a) + math.sqrt(1 - a) * n_i for n_i in n]
        return torch.stack([((Y - u @ A.T) ** 2).sum(1) for u in points]).mean(0).sqrt()

    return ancestral(x, denoised(x, a), a, b, next(z)) - 3e-3 * gradient(loss, x)


def sitcom(lr):
    """Adam until a row fits to within its noise, row by row."""

    def fit(row, y, a):
        v = row.clone().requires_grad_()
        optimiser = torch.optim.Adam([v], lr=lr)
        for _ in range(20):
            rest = ((y - denoised(v[None], a) @ A.T) ** 2).sum()
            if rest <= 1.02**2 * M * SIGMA**2:
                break
            optimiser.zero_grad()
            rest.backward()
            optimiser.step()
        return denoised(v.detach()[None], a)

    def step(x, a, b, z):
        d = torch.cat([fit(row, y, a) for row, y in zip(x, Y)])
        return d if b == 1 else math.sqrt(b) * d + math.sqrt(1 - b) * next(z)

    return step


def scg():
    """After a quarter of 8 steps, the best of three candidates by the misfit of its own denoised image."""
    count = itertools.count()

    def step(x, a, b, z):
        d, k = denoised(x, a), next(count)
        if k < 2 or b == 1:
            return ancestral(x, d, a, b, next(z))
        tried = torch.stack([ancestral(x, d, a, b, next(z)) for _ in range(3)])
        losses = torch.stack([misfit(b)(v) for v in tried])
        return tried[losses.argmin(0), torch.arange(ROWS)]

    return step


def ddim_half(x, a, b, z):
    return ddim(x, denoised(x, a), a, b, 0.5, next(z))


def multistep(stochastic):
    """DPM-Solver++ 2M, and SDE-2M, with ``lambda = log(alpha / sigma)``."""
    history = []

    def step(x, a, b, z):
        d, noise = denoised(x, a), next(z) if stochastic else 0
        if b == 1:
            return d
        lam = [0.5 * math.log(v / (1 - v)) for v in (a, b)]
        h = lam[1] - lam[0]
        ahead = d
        if history:
            before, lam_before = history[-1]
            r = (lam[0] - lam_before) / h
            ahead = (1 + 1 / (2 * r)) * d - before / (2 * r)
        history.append((d, lam[0]))
        shrink = math.sqrt((1 - b) / (1 - a))
        if not stochastic:
            return shrink * x - math.sqrt(b) * math.expm1(-h) * ahead
        fresh = -math.expm1(-2 * h)
        return shrink * math.exp(-h) * x + math.sqrt(b) * fresh * ahead + math.sqrt((1 - b) * fresh) * noise

    return step


def heun(x, a, b, z):
    """Algorithm 2 of EDM, in its own (variance-exploding) coordinates."""
    s, t, x = math.sqrt((1 - a) / a), math.sqrt((1 - b) / b), x / math.sqrt(a)

    def slope(v, level):
        return (v - denoised(v / math.sqrt(1 + level**2), 1 / (1 + level**2))) / level

    up = s * (1 + min(40 / 256, math.sqrt(2) - 1)) if 0.05 <= s <= 50 else s
    if up > s:
        x = x + math.sqrt(up**2 - s**2) * 1.003 * next(z)
    first = slope(x, up)
    new = x + (t - up) * first
    if t > 0:
        new = x + (t - up) * 0.5 * (first + slope(new, t))
    return math.sqrt(b) * new


def daps(k):
    """Five Euler steps of the reverse equation, Langevin moves at ``tau = 0.01``, noise again."""
    count = itertools.count()

    def step(x, a, b, z):
        s, t, x = math.sqrt((1 - a) / a), math.sqrt((1 - b) / b), x / math.sqrt(a)
        low = min(0.01, s / 10)
        grid = [(s ** (1 / 7) + i / 4 * (low ** (1 / 7) - s ** (1 / 7))) ** 7 for i in range(5)]
        x0 = x
        for i, j in itertools.pairwise([*grid, 0.0]):
            x0 = x0 + (j - i) / i * (x0 - denoised(x0 / math.sqrt(1 + i * i), 1 / (1 + i * i)))
        h = 1e-4 * (1 + next(count) / len(ABAR) * (0.01 - 1))
        u = x0
        for _ in range(k):
            force = gradient(lambda v: -((Y - v @ A.T) ** 2).sum(1) / 0.01**2, u) - (u - x0) / s**2
            u = u + h * force + math.sqrt(2 * h) * next(z)
        return u if t == 0 else math.sqrt(b) * (u + t * next(z))

    return step


PUBLISHED = [
    ("dps", {"preset": "published"}, dps),
    ("mcg", {"preset": "published"}, mcg),
    ("ilvr", {"preset": "published"}, ilvr),
    ("ddnm", {"preset": "published-noiseless"}, ddnm),
    ("ddnm", {"preset": "published"}, ddnm_plus),
    ("dds", {"preset": "published"}, dds),
    ("dmps", {"preset": "published"}, dmps),
    ("pigdm", {"preset": "published"}, pigdm(lambda b: 1.0)),
    ("pigdm", {"preset": "published-code"}, pigdm(math.sqrt)),
    ("diffpir", {"preset": "published"}, diffpir),
    ("tmpd", {"preset": "first-order", "tol": 1e-12}, tmpd),
    ("nrlg", {"preset": "published"}, nrlg),
    ("lgd", {"preset": "inversebench"}, lgd),
    ("sitcom", {"preset": "published"}, sitcom(0.01)),
    ("sitcom", {"preset": "published", "lr": 0.1}, sitcom(0.1)),  # some rows stop early
    ("scg", {"preset": "published", "candidates": 3, "steps": 8}, partial(scg)),
    ("ddim", {"eta": 0.5}, ddim_half),
    ("dpmpp", {"preset": "2m"}, partial(multistep, False)),
    ("dpmpp", {"preset": "sde-2m"}, partial(multistep, True)),
    ("heun", {"preset": "imagenet-64"}, heun),
    ("daps", {"preset": "published", "moves": 3}, partial(daps, 3)),
]


@pytest.mark.parametrize(
    ("name", "settings", "formula"), PUBLISHED, ids=[f"{n}-{s.get('preset', '')}" for n, s, _ in PUBLISHED]
)
def test_the_published_update(name, settings, formula):
    sampler = samplers.get(name, **settings)
    task = problem(Dense() if name == "dds" else None) if sampler.conditional else None
    noise = record(50, ROWS, (N,))
    states = chain(sampler, task, PRIOR, LEVELS, noise)
    formula = formula() if isinstance(formula, partial) else formula  # those with a memory are made anew
    left = iter(noise[2 if name == "sitcom" else 1 :])  # what init has drawn
    for x, new, a, b in zip(states, states[1:], ABAR, ABAR[1:]):
        expected = formula(math.sqrt(a) * x, a, b, left)
        torch.testing.assert_close(math.sqrt(b) * new, expected, rtol=1e-7, atol=1e-8)


def test_a_thousand_levels_are_those_of_ddpm():
    wide = priors.Gaussian(MEAN, C, SPACE, sigma_min=1e-3, sigma_max=1e3)
    levels = samplers.DPS.preset("published").sigmas(wide)
    torch.testing.assert_close(levels, torch.cat([((1 - TABLE) / TABLE).sqrt().flip(0), torch.zeros(1).double()]))
    assert samplers.DPS(steps=1).sigmas(wide).tolist() == pytest.approx([157.407, 0], rel=1e-5)


ENSEMBLE = 6


def one_case():
    return invdiff.Problem(operators.Matrix(A, SPACE), likelihoods.Gaussian(SIGMA), Y[:1])


def test_enkg_moves_its_particles_as_published():
    """``x_i -= w / ||C|| sum_j C_ij (x_j - mean)`` twice per level (but near both ends), then an Euler step."""
    noise = record(1, ENSEMBLE, (N,))
    sampler = samplers.EnKG.preset("published", steps=8)

    def image(x, s):
        return MEAN + (x - MEAN) @ torch.linalg.solve(C + s * s * EYE, C)

    def descend(x, levels):
        for s, t in itertools.pairwise(levels):
            x = x + (t - s) / s * (x - image(x, s))
        return x

    states = chain(sampler, one_case(), PRIOR, LEVELS, noise)
    for k, (x, new, s, t) in enumerate(zip(states, states[1:], LEVELS, LEVELS[1:])):
        points = min(1 + (8 - k) // 4, 20)
        ramp = [i / max(points - 1, 1) for i in range(points)]
        grid = [(s ** (1 / 7) + r * (LEVELS[-2] ** (1 / 7) - s ** (1 / 7))) ** 7 for r in ramp]
        for _ in range(2 if 0 < k < 0.95 * 8 else 0):
            data = descend(x, [*grid, 0.0]) @ A.T
            weights = (data - Y[:1]) @ (data - data.mean(0)).T / ENSEMBLE
            x = x - 2.0 / weights.norm() * weights @ (x - x.mean(0))
        torch.testing.assert_close(new, descend(x, [s, t]), rtol=1e-7, atol=1e-8)


def test_eki_is_the_multiple_data_assimilation_of_emerick_and_reynolds():
    """Four updates with sample covariances and noise inflated by 4, on any particles."""
    noise, start = record(4, ENSEMBLE, (M,)), record(1, ENSEMBLE, (N,), seed=8)[0]
    states = chain(samplers.EKI.preset("published"), one_case(), PRIOR, [0.0] * 5, noise, start)
    for x, new, e in zip(states, states[1:], noise):
        both = torch.cov(torch.cat([x, x @ A.T], 1).T)
        gain = both[:N, N:] @ torch.linalg.inv(both[N:, N:] + 4 * SIGMA**2 * EYE_M)
        expected = x + (Y[:1] + 2 * SIGMA * e - x @ A.T) @ gain.T
        torch.testing.assert_close(new, expected, rtol=1e-7, atol=1e-8)


def test_reddiff_is_adam_on_the_published_gradient():
    """Means over data and unknowns; ``torch.optim.Adam`` with the published ``(0.9, 0.99)`` and ``lr``."""
    sampler, noise = samplers.REDdiff.preset("published"), record(len(LEVELS), ROWS, (N,))
    ctx = context(sampler, problem(), PRIOR, LEVELS, ROWS)
    state = {"mu": Y @ PINV.T, "m": torch.zeros(ROWS, N).double(), "v": torch.zeros(ROWS, N).double()}
    mu = state["mu"].clone().requires_grad_()
    optimiser = torch.optim.Adam([mu], lr=0.1, betas=(0.9, 0.99))
    for k, (a, s) in enumerate(zip(ABAR[:-1], LEVELS)):
        state = sampler.step(k, state, ctx, Replay(noise[k : k + 1]))
        noisy = math.sqrt(a) * mu.detach() + math.sqrt(1 - a) * noise[k]
        eps = predicted_noise(noisy, denoised(noisy, a), a)
        loss = 0.5 * ((Y - mu @ A.T) ** 2).mean(1) + 0.25 * s * ((eps - noise[k]) * mu).mean(1)
        optimiser.zero_grad()
        loss.sum().backward()
        optimiser.step()
        torch.testing.assert_close(state["mu"], mu.detach(), rtol=1e-7, atol=1e-9)
