"""Priors around priors: tiles of large images, conditions with guidance, coloured noise made white."""

import pytest
import torch

import invdiff
from invdiff import likelihoods, operators, priors, samplers
from invdiff.errors import InvdiffError
from invdiff.prior import Denoiser, FunctionDenoiser, Prior
from invdiff.priors.tiles import TiledDenoiser

KERNEL = torch.randn(2, 2, 5, 5, generator=torch.Generator().manual_seed(0)) / 7


class Local(Denoiser):
    """A network that sees eight pixels around each, zeros beyond the image; it records what it was given."""

    space, channels, sigma_min, sigma_max = None, 2, 0.01, 10.0

    def __init__(self):
        self.seen = []

    def __call__(self, x, sigma, cond=None):
        self.seen.append(tuple(x.shape))
        kernel = KERNEL.to(x.dtype)
        out = torch.tanh(torch.nn.functional.conv2d(x, kernel, padding=2))
        out = torch.tanh(torch.nn.functional.conv2d(out, kernel, padding=2))
        shift = 0 if cond is None else cond["label"].reshape(-1, 1, 1, 1)
        return out / (1 + sigma.reshape(-1, 1, 1, 1)) + shift


@pytest.mark.parametrize("shape", [(1024, 1024), (256, 648), (600, 128), (128, 96)])
def test_tiles_leave_a_local_network_as_it_is(shape):
    base = Local()
    tiled = TiledDenoiser(base, tile=256, overlap=64, max_tiles=3)
    x = torch.randn(1, 2, *shape, generator=torch.Generator().manual_seed(1))
    sigma = torch.tensor([0.7])
    out = tiled(x, sigma)
    assert max(n * h * w for n, _, h, w in base.seen) <= 3 * 256 * 256  # what bounds the memory
    torch.testing.assert_close(out, base(x, sigma), atol=2e-6, rtol=0)


def test_tiles_have_rows_conditions_and_gradients():
    base = Local()
    tiled = TiledDenoiser(base, tile=64, overlap=32, max_tiles=3)
    x = torch.randn(3, 2, 96, 136, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    sigma, cond = torch.tensor([0.1, 1.0, 5.0], dtype=torch.float64), {"label": torch.tensor([1.0, 2.0, 3.0])}
    whole, parts = x.clone().requires_grad_(True), x.clone().requires_grad_(True)
    a, b = base(whole, sigma, cond), tiled(parts, sigma, cond)
    torch.testing.assert_close(b, a, atol=1e-12, rtol=0)
    v = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(3))
    g = torch.autograd.grad(a, whole, v)[0], torch.autograd.grad(b, parts, v)[0]
    torch.testing.assert_close(g[1], g[0], atol=1e-12, rtol=0)


def test_a_network_that_sees_further_than_the_margin_has_no_seams():
    """Where tiles disagree the blend moves smoothly from one to the other: no step at a tile's edge."""

    class Mean(Local):
        def __call__(self, x, sigma, cond=None):
            return x.mean((-2, -1), keepdim=True).expand_as(x)

    x = torch.zeros(1, 2, 64, 256)
    x[..., 128:] = 1
    out = TiledDenoiser(Mean(), tile=64, overlap=32)(x, torch.ones(1))
    assert float(out.diff(dim=-1).abs().max()) < 0.15 and float(out.max()) == 1


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"tile": 60}, "multiples of 8"),
        ({"tile": 64, "overlap": 40}, "at most half"),
        ({"tile": 64, "overlap": 32, "margin": 16}, "less than half the overlap"),
    ],
)
def test_bad_tiles_are_refused(options, sentence):
    with pytest.raises(InvdiffError, match=sentence):
        TiledDenoiser(Local(), **options)


def test_sizes_that_tiles_cannot_take_are_refused():
    with pytest.raises(InvdiffError, match="multiple of 8 pixels, got 300"):
        TiledDenoiser(Local(), tile=64, overlap=32)(torch.zeros(1, 2, 300, 64), torch.ones(1))


def test_the_embedded_prior_runs_in_tiles():
    prior = priors.Tiled(priors.load("brain-mri"), tile=64, overlap=32)
    x = torch.zeros(1, 2, 96, 128)
    assert prior.denoiser.base.multiple == prior.denoiser.multiple
    assert prior.denoiser(x, torch.ones(1)).shape == x.shape and "in tiles" in prior.name


SPACE = invdiff.Space((1, 4, 4), torch.float64)


class Classes(Denoiser):
    """Unit Gaussians about ``m``: label 0 has mean 0, which stands for no label."""

    space, channels, sigma_min, sigma_max, dtype = SPACE, 1, 0.01, 50.0, torch.float64

    def __init__(self):
        self.calls = []

    def __call__(self, x, sigma, cond=None):
        self.calls.append(len(x))
        m, s2 = cond["label"].reshape(-1, 1, 1, 1), sigma.reshape(-1, 1, 1, 1) ** 2
        return (x + s2 * m) / (1 + s2)


def test_guidance_is_linear_in_its_weight_and_asks_once():
    base, null = Classes(), {"label": torch.zeros(1, dtype=torch.float64)}
    x, s = SPACE.randn(3, seed=0), torch.tensor([0.2, 1.0, 4.0], dtype=torch.float64)
    label = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    for weight in (0.0, 1.0, 3.5):
        base.calls.clear()
        out = priors.Guided(Prior(base), {"label": label}, null, weight).denoiser(x, s)
        assert base.calls == [3 if weight in (0.0, 1.0) else 6]
        free, full = base(x, s, {"label": torch.zeros(3)}), base(x, s, {"label": label.expand(3)})
        torch.testing.assert_close(out, free + weight * (full - free))
    (slope,) = torch.autograd.grad(out.sum(), label)  # conditions can be optimised
    assert float(slope) == pytest.approx(float(3.5 * 16 * (s**2 / (1 + s**2)).sum()))


def test_draws_of_a_conditional_prior_follow_its_label():
    prior = priors.Guided(Prior(Classes()), {"label": torch.tensor([3.0], dtype=torch.float64)})
    draws = torch.from_numpy(prior.sample(200, seed=1, sampler=samplers.DDIM(steps=60)).draws.values)
    assert float(draws.mean()) == pytest.approx(3, abs=0.1) and float(draws.std()) == pytest.approx(1, abs=0.06)


def test_cfg_plus_plus_takes_its_steps():
    """Against its own recursion: the guided image, and the noise of the unconditional one."""
    base, lam = Classes(), 0.6
    sampler = samplers.DDIM(steps=12)
    sigmas = sampler.sigmas(Prior(base))
    weight = priors.cfg_plus_plus(lam, sigmas)
    null, cond = (
        {"label": torch.zeros(1, dtype=torch.float64)},
        {"label": torch.full((1,), 2.0, dtype=torch.float64)},
    )
    denoiser = priors.Guided(Prior(base), cond, null, weight).denoiser
    x = ours = 50 * torch.randn(2, *SPACE.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for s, t in zip(sigmas[:-1].tolist(), sigmas[1:].tolist()):
        level = torch.full((2,), s, dtype=torch.float64)
        free, full = (base(x, level, {"label": c["label"].expand(2)}) for c in (null, cond))
        x = free + lam * (full - free) + t / s * (x - free)
        d = denoiser(ours, level)
        ours = d + t / s * (ours - d)
        torch.testing.assert_close(ours, x)


@pytest.mark.parametrize(
    "make, sentence",
    [
        (lambda: priors.Guided(Prior(Classes()), {"label": torch.ones(1)}, None, 2.0), "unconditional input too"),
        (lambda: priors.Guided(Prior(Classes()), {"label": torch.ones(1)}, {"text": torch.ones(1)}), "same names"),
        (
            lambda: priors.Guided(Prior(Classes()), {"label": torch.ones(2)}).denoiser(
                SPACE.zeros(3), torch.ones(3)
            ),
            "has 2 rows, and the batch has 3",
        ),
        (lambda: priors.cfg_plus_plus(1.5, torch.tensor([1.0, 0.0])), "between 0 and 1"),
        (lambda: priors.cfg_plus_plus(0.5, torch.tensor([0.0, 1.0])), "falling grid"),
    ],
)
def test_bad_guidance_is_refused(make, sentence):
    with pytest.raises(InvdiffError, match=sentence):
        make()


GRID = invdiff.Space((1, 8, 8), torch.float64)


def laws():
    """Prior covariance ``P`` and noise covariance ``C`` as spectra, and the exact network for coloured noise."""
    k = torch.fft.fftfreq(8, dtype=torch.float64)
    r = (k[:, None] ** 2 + k**2).sqrt()
    p, c = 1 / (0.05 + r**2) / 10, torch.exp(-20 * r**2) + 0.05

    def network(x, sigma):
        s2 = sigma.reshape(-1, 1, 1, 1).double() ** 2
        return torch.fft.ifft2(torch.fft.fft2(x.double()) * (p / (p + s2 * c))).real.to(x.dtype)

    return p, c, Prior(FunctionDenoiser(network, GRID, 1e-3, 50.0))


def dense(spectrum):
    """The covariance with that spectrum as a matrix."""
    eye = torch.eye(64, dtype=torch.float64).reshape(64, 1, 8, 8)
    return torch.fft.ifft2(torch.fft.fft2(eye) * spectrum).real.reshape(64, 64).T


@pytest.mark.parametrize("kind", ["symmetric", "cholesky"])
def test_coloured_noise_gives_the_posterior_of_the_prior(kind):
    p, c, base = laws()
    if kind == "symmetric":
        prior = priors.Coloured(base, priors.StationaryRoot(GRID, c))
    else:
        root = operators.Matrix(torch.linalg.cholesky(dense(c)), domain=GRID, range=GRID)
        prior = priors.Coloured(base, root)
    a = torch.randn(20, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(4)) / 8
    operator = operators.Matrix(a, domain=GRID)
    truth = GRID.zeros(1) + 0.5
    problem = invdiff.Problem.simulate(operator, likelihoods.Gaussian(0.1), truth, seed=0)
    assert "linear" in problem.pullback(prior.codec).operator.capabilities
    made = invdiff.sample(problem, prior, samplers.TMPD(steps=60), draws=400, seed=0, progress=False)
    draws = torch.from_numpy(made.draws.values).reshape(400, 64)
    gain = dense(p) @ a.T @ torch.linalg.inv(a @ dense(p) @ a.T + 0.01 * torch.eye(20, dtype=torch.float64))
    mean, covariance = gain @ problem.y[0].reshape(-1), dense(p) - gain @ a @ dense(p)
    width = covariance.diagonal().sqrt()
    assert float((((draws.mean(0) - mean) / width) ** 2).mean().sqrt()) < 0.08  # 0.05 is the floor of 400 draws
    assert float((draws.std(0) / width).mean()) == pytest.approx(1, abs=0.03)


def test_the_root_of_a_spectrum_keeps_the_contract_of_operators():
    _, c, _ = laws()
    root = priors.StationaryRoot(GRID, c)
    report = invdiff.testing.check_operator(root)
    assert report.ok, report
    x = GRID.randn(2, seed=1)
    torch.testing.assert_close(root.solve(root(x)), x)
    torch.testing.assert_close(root(root.adjoint(x)).reshape(2, 64), x.reshape(2, 64) @ dense(c).T)


def test_bad_coloured_priors_are_refused():
    _, c, base = laws()
    with pytest.raises(InvdiffError, match="positive and of shape"):
        priors.StationaryRoot(GRID, -c)
    with pytest.raises(InvdiffError, match="without a codec"):
        priors.Coloured(base.bind(GRID), priors.StationaryRoot(GRID, c))
    with pytest.raises(InvdiffError, match="is square"):
        priors.Coloured(base, operators.Matrix(torch.ones(3, 64, dtype=torch.float64), domain=GRID))
