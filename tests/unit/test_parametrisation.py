"""Networks of every parametrisation, written from a Gaussian's closed forms, against its exact denoiser."""

import math

import pytest
import torch

import invdiff
from invdiff import InvdiffError, priors, samplers
from invdiff.counting import CountedDenoiser, Counts
from invdiff.priors.frames import EDM, VE, VP, Flow
from invdiff.priors.parametrisation import from_network

SPACE = invdiff.Space((1, 3, 4), torch.float64)
LOW, HIGH = 0.01, 40.0


@pytest.fixture(scope="module")
def gaussian():
    g = torch.Generator().manual_seed(5)
    root = torch.randn(12, 12, generator=g, dtype=torch.float64) / 4
    mean = torch.randn(12, generator=g, dtype=torch.float64)
    return priors.Gaussian(mean, root @ root.T + 0.05 * torch.eye(12), SPACE, sigma_min=LOW, sigma_max=HIGH)


def expectations(gaussian, z, a, b):
    """``E[x0 | z]``, ``E[eps | z]`` and ``grad log p(z)`` of ``z = a x0 + b eps``, row by row, by dense solves."""
    mean, cov = gaussian.denoiser.mean.flatten(), gaussian.denoiser.covariance_matrix()
    x0, eps, score = [], [], []
    for row, s, n in zip(z.flatten(1), a, b):
        whitened = torch.linalg.solve(s**2 * cov + n**2 * torch.eye(12, dtype=z.dtype), row - s * mean)
        x0.append(mean + s * cov @ whitened)
        eps.append(n * whitened)
        score.append(-whitened)
    return [torch.stack(v).reshape(z.shape) for v in (x0, eps, score)]


def column(t):
    return t.reshape(-1, 1, 1, 1)


ABAR = {
    "linear": (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0),
    "scaled": (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0),
}


def vp_network(gaussian, table, what):
    """A network that turns its time into ``abar`` by its own schedule: ``log sigma`` linear between two steps."""
    log_sigma = ((1 - ABAR[table]) / ABAR[table]).sqrt().log()

    def network(z, t):
        below = t.floor().long().clamp(max=998)
        sigma = (log_sigma[below] + (t - below) * (log_sigma[below + 1] - log_sigma[below])).exp()
        a, b = (1 + sigma**2) ** -0.5, sigma * (1 + sigma**2) ** -0.5
        x0, eps, score = expectations(gaussian, z, a, b)
        return {"x0": x0, "epsilon": eps, "score": score, "v": column(a) * eps - column(b) * x0}[what]

    return network


def ve_network(gaussian, what, log=False):
    def network(z, t):
        sigma = t.exp() if log else t
        x0, eps, score = expectations(gaussian, z, torch.ones_like(t), sigma)
        return {"x0": x0, "epsilon": eps, "score": score}[what]

    return network


def edm_network(gaussian, d):
    def network(z, t):
        sigma = (4 * t).exp()
        total = (sigma**2 + d**2).sqrt()
        x0 = expectations(gaussian, z, 1 / total, sigma / total)[0]
        return (x0 - column(d**2 / total) * z) / column(sigma * d / total)

    return network


def flow_network(gaussian, noise_at, what="flow", time_scale=1.0):
    def network(z, t):
        share = t / time_scale if noise_at else 1 - t / time_scale
        x0, eps, _ = expectations(gaussian, z, 1 - share, share)
        return {"flow": eps - x0 if noise_at else x0 - eps, "x0": x0, "epsilon": eps}[what]

    return network


CASES = {
    **{
        f"vp-{table}-{what}": (
            what,
            VP.from_betas() if table == "linear" else VP.from_betas("scaled_linear", 1000, 0.00085, 0.012),
            lambda g, t=table, w=what: vp_network(g, t, w),
        )
        for table in ABAR
        for what in ("x0", "epsilon", "score", "v")
    },
    **{f"ve-{w}": (w, VE(LOW, HIGH), lambda g, w=w: ve_network(g, w)) for w in ("x0", "epsilon", "score")},
    "ve-log": ("score", VE(LOW, HIGH, time="log_sigma"), lambda g: ve_network(g, "score", log=True)),
    "edm": ("edm", EDM(0.7, LOW, HIGH), lambda g: edm_network(g, 0.7)),
    **{f"flow-{n}": ("flow", Flow(n, LOW, HIGH), lambda g, n=n: flow_network(g, n)) for n in (0, 1)},
    "flow-1000": ("flow", Flow(1, LOW, HIGH, time_scale=1e3), lambda g: flow_network(g, 1, time_scale=1e3)),
    **{f"flow-{w}": (w, Flow(1, LOW, HIGH), lambda g, w=w: flow_network(g, 1, w)) for w in ("x0", "epsilon")},
}


def made(gaussian, case, **options):
    what, frame, network = CASES[case]
    return from_network(network(gaussian), what, frame, SPACE, **options)


@pytest.mark.parametrize("case", CASES)
def test_denoiser_score_and_jacobian_are_those_of_the_gaussian(gaussian, case):
    d, exact = made(gaussian, case).denoiser, gaussian.denoiser
    ends = max(LOW, d.sigma_min), min(HIGH, d.sigma_max)
    sigma = torch.logspace(math.log10(ends[0]), math.log10(ends[1]), 10, dtype=torch.float64)
    x = SPACE.randn(10, 1) * (1 + column(sigma))
    v = SPACE.randn(10, 2)
    got, pull = CountedDenoiser(d, Counts()).vjp(x, sigma)
    assert (got - exact(x, sigma)).abs().max() < 1e-6
    score = (got - x) / column(sigma) ** 2
    assert ((score - exact.score(x, sigma)) * column(sigma)).abs().max() < 1e-6
    assert (pull(v) - exact.jacobian_product(x, sigma, v)).abs().max() < 1e-6


def test_parametrisations_give_the_same_draws(gaussian):
    def draws(prior):
        sampler = samplers.DDIM(steps=20, sigma_min=0.05, sigma_max=30.0)
        return torch.as_tensor(prior.sample(3, seed=4, shape=SPACE, sampler=sampler).draws.values)

    expected = draws(gaussian)
    assert expected.std() > 0.1
    for case in ("vp-linear-epsilon", "vp-linear-v", "edm", "flow-0", "flow-1"):
        assert (draws(made(gaussian, case)) - expected).abs().max() < 1e-5, case


def test_cosine_table():
    frame = VP.from_betas("cosine", 100)
    t = torch.arange(1, 90, dtype=torch.float64) / 100
    abar = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    steps = frame.time(((1 - abar) / abar).sqrt())
    assert (steps - torch.arange(89)).abs().max() < 1e-6


def test_whole_steps_go_to_the_nearest_level():
    frame, seen = VP.from_betas(whole=True), []

    def network(z, t):
        seen.append(t)
        return z

    d = from_network(network, "epsilon", frame, SPACE).denoiser
    sigma = ((1 - ABAR["linear"]) / ABAR["linear"]).sqrt()[[0, 10, 11, 999]]
    d(SPACE.randn(5, 0), torch.cat([sigma, (sigma[1:2] * sigma[2:3] ** 2) ** (1 / 3)]))
    assert seen[0].dtype == torch.int64 and seen[0].tolist() == [0, 10, 11, 999, 11]


def test_own_times_of_a_table():
    frame = VP(ABAR["linear"], torch.linspace(0, 1, 1000))
    sigma = ((1 - ABAR["linear"]) / ABAR["linear"]).sqrt()
    assert torch.allclose(frame.time(sigma), torch.linspace(0, 1, 1000).double(), atol=1e-9)


def test_ranges_become_an_affine_codec(gaussian):
    prior = made(gaussian, "edm", network_range=(-1, 1), image_range=(0, 10))
    ends = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64).reshape(3, 1, 1, 1).expand(3, *SPACE.shape)
    image = prior.codec.decode(ends)
    assert image[:, 0, 0, 0].tolist() == [0, 5, 10]
    assert torch.equal(prior.codec.encode(image), ends)


def test_spread_of_the_data():
    def spread(*args, **options):
        return from_network(abs, *args, SPACE, **options).denoiser.sigma_data

    assert spread("edm", EDM(0.7)) == 0.7 and spread("x0", VE(0.1, 1)) == 1
    assert spread("edm", EDM(0.7), sigma_data=0.3) == 0.3


def test_complex_images_are_two_channels():
    space = invdiff.Space((1, 4, 4), torch.complex64)
    prior = from_network(lambda z, t: z, "x0", VE(0.1, 1), space, network_range=(-1, 1), image_range=(-2, 2))
    assert prior.denoiser.channels == 2
    x = space.randn(2, 0)
    assert torch.allclose(prior.codec.decode(prior.codec.encode(x)), x)
    assert torch.allclose(prior.codec.encode(x)[:, 1], x[:, 0].imag / 2)


def test_learned_variance_is_dropped(gaussian):
    what, frame, make = CASES["vp-linear-epsilon"]
    plain = make(gaussian)

    def split(z, t):
        return torch.cat([plain(z, t), torch.full_like(z, math.nan)], 1)

    x, sigma = SPACE.randn(3, 0), torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64)
    d = from_network(split, what, frame, SPACE, learned_variance=True).denoiser
    assert (d(x, sigma) - gaussian.denoiser(x, sigma)).abs().max() < 1e-6
    with pytest.raises(InvdiffError, match="declare learned_variance=True"):
        from_network(split, what, frame, SPACE).denoiser(x, sigma)
    with pytest.raises(InvdiffError, match=r"expected \(3, 2, 3, 4\)"):
        from_network(plain, what, frame, SPACE, learned_variance=True).denoiser(x, sigma)


class Recorder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(1, 1, 1)

    def forward(self, z, t):
        assert t.dtype == torch.promote_types(z.dtype, torch.float32)
        return self.layer(z)


def test_precision_of_network_and_state():
    with torch.random.fork_rng(devices=[]):
        recorder = Recorder()
    prior = from_network(recorder, "epsilon", VE(0.1, 1), SPACE, network_dtype=torch.bfloat16)
    sigma = torch.tensor([0.5, 1.0], dtype=torch.float64)
    assert prior.denoiser(SPACE.randn(2, 0), sigma).dtype == torch.float64
    kept = prior.to(dtype=torch.float32).denoiser
    assert kept.network.layer.weight.dtype == torch.bfloat16
    assert kept(SPACE.randn(2, 0).float(), sigma).dtype == torch.float32
    follows = from_network(recorder, "epsilon", VE(0.1, 1), SPACE)
    assert follows.denoiser.network.layer.weight.dtype == torch.float64
    assert follows.to(dtype=torch.float32).denoiser.network.layer.weight.dtype == torch.float32
    assert follows.denoiser.network.layer.weight.dtype == torch.float64
    assert len(prior.card["sha256"]) == 64


def test_levels_outside(gaussian):
    x = SPACE.randn(2, 0)
    strict = made(gaussian, "vp-linear-epsilon").denoiser
    for sigma in (0.001, 200.0, math.nan):
        with pytest.raises(InvdiffError, match=r"trained for sigma from 0\.01 to 157\.4"):
            strict(x, torch.tensor([1.0, sigma], dtype=torch.float64))
    # Passing through float32 is no offence.
    ends = torch.tensor([strict.sigma_min, strict.sigma_max]).float()
    assert strict(x, ends).isfinite().all()
    free = made(gaussian, "vp-linear-epsilon", outside="clamp").denoiser
    assert torch.equal(free(x, torch.zeros(2)), x)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: from_network(abs, "eps", VE(0.1, 1), (1, 4)), "Unknown parametrisation 'eps'"),
        (lambda: from_network(abs, "v", VE(0.1, 1), (1, 4)), "VE knows epsilon, x0, score"),
        (lambda: from_network(abs, "edm", VP.from_betas(), (1, 4)), "VP knows"),
        (lambda: from_network(abs, "x0", VE(0.1, 1), (1, 4), outside="skip"), "'error' or 'clamp'"),
        (lambda: from_network(abs, "x0", VE(0.1, 1), (1, 4), image_range=(0, 1)), "go together"),
        (
            lambda: from_network(abs, "x0", VE(0.1, 1), (1, 4), image_range=(1, 0), network_range=(0, 1)),
            "low < high",
        ),
        (
            lambda: from_network(
                abs,
                "x0",
                VE(0.1, 1),
                invdiff.Space((1, 4), torch.complex64),
                image_range=(0, 1),
                network_range=(-1, 1),
            ),
            "symmetric about zero",
        ),
        (lambda: from_network(abs, "x0", VE(0.1, 1), (1, 4), sigma_data=0.0), "sigma_data must be positive"),
        (lambda: VE(1, 0.1), "0 < sigma_min < sigma_max"),
        (lambda: VE(0.1, 1, time="t"), "'sigma' or 'log_sigma'"),
        (lambda: EDM(0.0), "sigma_data must be positive"),
        (lambda: Flow(2), "0 or 1"),
        (lambda: VP([0.9, 0.95]), "decrease"),
        (lambda: VP([0.9, 0.5, 0.0]), "leave out a last step"),
        (lambda: VP([0.9, 0.5], [1, 0]), "2 increasing numbers"),
        (lambda: VP([0.9, 0.5], [0, 0.5], whole=True), "whole ones"),
        (lambda: VP.from_betas("sqrt_linear"), "Unknown schedule 'sqrt_linear'"),
        (lambda: VP.from_betas(beta_end=2), "beta_end < 1"),
        (
            lambda: from_network(lambda z, t: (z,), "x0", VE(0.1, 1), (1, 4)).denoiser(torch.zeros(1, 1, 4), 0.5),
            "returned tuple",
        ),
    ],
)
def test_mistakes_get_one_sentence(call, message):
    with pytest.raises(InvdiffError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
