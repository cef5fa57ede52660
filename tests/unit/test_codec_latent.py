"""Latent codecs: units, precision, what is refused, and problems and posteriors through a decoder."""

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import invdiff
from invdiff import likelihoods, operators, priors, samplers
from invdiff.codec import Chain, ComplexChannels, Pad, Scale
from invdiff.codec_latent import Latent
from invdiff.errors import CapabilityError, InvdiffError
from invdiff.prior import Prior
from invdiff.pulled import DecodeOperator
from invdiff.spaces import Space, real_inner
from invdiff.testing import check_operator

IMAGE = Space((1, 8, 8), torch.float64)


class Encoder(nn.Module):
    def __init__(self, channels=1, latents=3):
        super().__init__()
        self.body = nn.Conv2d(channels, latents, 2, stride=2)

    def forward(self, x):
        return self.body(x).tanh()


class Decoder(nn.Module):
    def __init__(self, channels=1, latents=3):
        super().__init__()
        self.body = nn.ConvTranspose2d(latents, channels, 2, stride=2)

    def forward(self, z):
        return (1.5 * self.body(z)).tanh()


class VAE(nn.Module):
    """An autoencoder as the field has it: a distribution comes out of ``encode``, an object out of ``decode``."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = Encoder(), Decoder()

    def encode(self, x):
        return Holder(latent_dist=Normal(self.encoder(x)))

    def decode(self, z):
        return Holder(sample=self.decoder(z))


class Holder:
    def __init__(self, **fields):
        self.__dict__.update(fields)


class Normal:
    def __init__(self, mean):
        self.mean = mean

    def mode(self):
        return self.mean

    def sample(self):
        return self.mean + 0.1 * torch.randn_like(self.mean)


def made(*builds, seed=0):
    """Random networks, the same each time; the global generator stays where it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return [build() for build in builds]


@pytest.fixture
def networks():
    return made(Encoder, Decoder)


def latent(networks, image=IMAGE, **options):
    return Latent(*networks, image, **{"scale": 1.3, **options})


def test_the_formula(networks):
    code = latent(networks, scale=torch.tensor([1.0, 2.0, 0.5]), shift=0.2)
    x = 0.5 * IMAGE.randn(2)
    e, d = (copy.deepcopy(n).double() for n in networks)
    z = torch.tensor([1.0, 2.0, 0.5]).reshape(3, 1, 1) * (e(x) - 0.2)
    torch.testing.assert_close(code.encode(x), z)
    torch.testing.assert_close(code.decode(z), d(z / torch.tensor([1.0, 2.0, 0.5]).reshape(3, 1, 1) + 0.2))
    assert code.prior == Space((3, 4, 4), torch.float64) and not code.is_affine


def test_ranges_are_units(networks):
    plain = latent(networks)
    units = latent(networks, network_range=(-1, 1), image_range=(0, 255))
    x = IMAGE.randn(2).tanh()
    torch.testing.assert_close(units.encode((x + 1) * 127.5), plain.encode(x))
    z = plain.prior.randn(2)
    torch.testing.assert_close(units.decode(z), (plain.decode(z) + 1) * 127.5)
    assert float(units.image_unit) == 127.5 and float(plain.image_unit) == 1


def test_the_networks_are_copies_in_evaluation_mode(networks):
    code = latent(networks)
    assert networks[0].body.weight.dtype == torch.float32 and networks[0].training
    x = IMAGE.randn(1)
    before = code.encode(x)
    with torch.no_grad():
        networks[0].body.weight.zero_()
    assert torch.equal(code.encode(x), before) and not before.requires_grad


def test_methods_of_one_module_share_it_and_the_mean_is_taken():
    (vae,) = made(VAE)
    code = Latent(vae.encode, vae.decode, IMAGE, scale=1.0)
    x = 0.5 * IMAGE.randn(2)
    torch.testing.assert_close(code.encode(x), copy.deepcopy(vae).double().encoder(x))
    assert code.encoder.module is code.decoder.module
    moved = code.to(dtype=torch.float32)
    assert moved.encoder.module is moved.decoder.module
    assert moved.decode(moved.prior.randn(1)).dtype == torch.float32


def test_precision_moves_and_a_declared_one_stays(networks):
    code = latent(networks).to(dtype=torch.float32)
    assert code.image.dtype == code.prior.dtype == torch.float32
    assert code.encoder.module.body.weight.dtype == torch.float32
    half = latent(networks, network_dtype=torch.bfloat16).to(dtype=torch.float32)
    assert half.encoder.module.body.weight.dtype == torch.bfloat16
    full = latent(networks)
    x = 0.5 * IMAGE.randn(2)
    assert (half.encode(x) - full.encode(x)).abs().max() < 0.05


def test_describe_knows_the_weights(networks):
    one, same = latent(networks), latent(networks)
    assert one.describe() == same.describe()
    assert one.describe() != latent((made(Encoder, seed=1)[0], networks[1])).describe()
    assert one.describe() != latent(networks, scale=1.0).describe()


def test_copies_and_pickles(networks):
    code = latent(networks)
    x = IMAGE.randn(1)
    for other in (copy.deepcopy(code), pickle.loads(pickle.dumps(code)), code.rows(torch.tensor([0, 0]))):
        assert torch.equal(other.encode(x), code.encode(x))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scale": None}, "needs the scale factor.*vae.config.scaling_factor"),
        ({"scale": 0.0}, "positive number"),
        ({"scale": float("nan")}, "positive number"),
        ({"scale": torch.ones(2)}, "latents have 3 channels"),
        ({"shift": torch.ones(4)}, "latents have 3 channels"),
        ({"network_range": (-1, 1)}, "give both, or neither"),
        ({"network_range": (1, -1), "image_range": (0, 1)}, "low < high"),
        ({"codebook": torch.ones(5, 2)}, r"expected \(K, 3\)"),
        ({"image": Space((1, 8, 8), torch.complex64)}, "ComplexChannels"),
        ({"image": Space((1, 9, 8), torch.float64)}, r"decoder returned shape \(1, 1, 8, 8\).*Pad\(image, 8\)"),
        ({"image": Space((3, 8, 8), torch.float64)}, "encoder failed on a tensor of shape"),
    ],
)
def test_bad_input_is_one_sentence(networks, options, words):
    with pytest.raises(InvdiffError, match=words) as caught:
        latent(networks, **options)
    assert "\n" not in str(caught.value)


def test_a_random_encoder_is_refused_and_moves_no_random_numbers():
    vae = made(VAE)[0].double()  # the guard of global state sees the random numbers
    with pytest.raises(InvdiffError, match=r"two answers for one image.*latent_dist\.mean"):
        Latent(lambda x: vae.encode(x).latent_dist.sample(), lambda z: vae.decode(z).sample, IMAGE, scale=1.0)


class _Hot(nn.Module):
    """It overflows half precision where the input is large."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(100.0))

    def forward(self, x):
        return (self.factor * x) * self.factor / 1e4


@pytest.mark.filterwarnings("error")
def test_overflow_in_half_precision_is_computed_again_and_said_once():
    code = Latent(_Hot(), _Hot(), Space((1, 4, 4)), scale=1.0, network_dtype=torch.float16)
    u = code.prior.randn(3)
    alone = code.decode(u[:1])
    u[1] *= 1e4
    with pytest.warns(UserWarning, match=r"decoder overflowed in torch.float16.*network_dtype=torch.float32"):
        out = code.decode(u)
    assert torch.isfinite(out).all() and torch.equal(out[:1], alone)
    torch.testing.assert_close(out[1], u[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x = u.clone().requires_grad_()
        code.decode(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.ones_like(u), rtol=2e-3, atol=0)


def test_what_is_infinite_anyway_is_refused():
    with pytest.raises(InvdiffError, match="NaN or infinite values of an ordinary image"):
        Latent(_Hot(), lambda z: z / 0, Space((1, 4, 4)), scale=1.0)
    with pytest.raises(InvdiffError, match="returned str, not a tensor"):
        Latent(lambda x: "z", _Hot(), Space((1, 4, 4)), scale=1.0)
    with pytest.raises(InvdiffError, match="module or a function, not int"):
        Latent(3, _Hot(), Space((1, 4, 4)), scale=1.0)


def test_a_codebook_snaps_and_lets_derivatives_through(networks):
    book = torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [-1.0, 0.0, 1.0]])
    code, plain = latent(networks, codebook=book, scale=2.0), latent(networks, scale=2.0)
    nearest = book.double()[torch.tensor([[0, 1], [2, 0]])].movedim(-1, 0)[None].repeat_interleave(2, -1)
    nearest = nearest.repeat_interleave(2, -2)
    u = 2 * nearest + 0.1 * code.prior.randn(1)
    torch.testing.assert_close(code.decode(u), plain.decode(2 * nearest))
    v = IMAGE.randn(1, 3)
    ours = DecodeOperator(code).vjp(u, v)
    torch.testing.assert_close(ours, DecodeOperator(plain).vjp(2 * nearest, v))


def test_autoencoders_of_diffusers():
    """Both kinds: a Gaussian latent is taken at its mean, a quantised one before it is quantised."""
    diffusers = pytest.importorskip("diffusers")
    image = Space((3, 16, 16), torch.float64)
    common = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    common |= {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 3}
    x = 0.5 * image.randn(2)
    for build in (diffusers.AutoencoderKL, diffusers.VQModel):
        (vae,) = made(lambda build=build: build(**common))
        code = Latent(vae.encode, vae.decode, image, scale=0.5)
        twin = copy.deepcopy(vae).double().eval()
        kind = build is diffusers.AutoencoderKL
        with torch.no_grad():
            mean = twin.encode(x).latent_dist.mean if kind else twin.encode(x).latents
            back = twin.decode(mean).sample
        torch.testing.assert_close(code.encode(x), 0.5 * mean)
        torch.testing.assert_close(code.decode(0.5 * mean), back)
        assert code.encoder.module is code.decoder.module and code.prior.shape == (3, 8, 8)
        pull = DecodeOperator(code).vjp(0.5 * mean, torch.ones_like(back))
        assert torch.isfinite(pull).all() and pull.abs().max() > 0


# ---- problems through a decoder ----


def problem(cases=2, sigma=0.1):
    masks = (torch.rand(cases, 1, 8, 8, generator=torch.Generator().manual_seed(1)) < 0.5).double()
    return invdiff.Problem.simulate(
        operators.Mask(masks, IMAGE), likelihoods.Gaussian(sigma), 0.5 * IMAGE.randn(cases, 4), seed=0
    )


def prior_of(code):
    n = code.prior.size
    made = priors.Gaussian(torch.zeros(n).double(), torch.eye(n).double(), code.prior)
    return Prior(made.denoiser, code, {"name": "latent"})


def test_the_pulled_back_operator_keeps_the_contract(networks):
    pulled = problem().pullback(latent(networks)).rows(torch.tensor([1, 0, 1]))
    assert pulled.capabilities >= {"vjp", "quadratic"} and "linear" not in pulled.capabilities
    check_operator(problem(1).pullback(latent(networks)).operator).raise_if_failed()
    u, v = pulled.operator.domain.randn(3), pulled.operator.range.randn(3, 1)
    eps = 1e-6
    du = pulled.operator.domain.randn(3, 2)
    difference = (pulled.operator(u + eps * du) - pulled.operator(u - eps * du)) / (2 * eps)
    torch.testing.assert_close(pulled.operator.jvp(u, du), difference, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(real_inner(v, difference), real_inner(pulled.operator.vjp(u, v), du))
    alone = problem().pullback(latent(networks)).rows(torch.tensor([1])).operator(u[:1])
    torch.testing.assert_close(pulled.operator(u)[:1], alone)


def test_samplers_of_linear_problems_refuse_and_say_which_would_do(networks):
    for name in ("dds", "tmpd", "diffpir", "pigdm", "ddrm"):
        with pytest.raises(CapabilityError, match=r"needs a linear operator.*would do: .*dps") as caught:
            invdiff.sample(problem(), prior_of(latent(networks)), name)
        assert "\n" not in str(caught.value)


def test_draws_are_stored_as_images(networks, tmp_path):
    code = latent(networks, network_range=(-1, 1), image_range=(0, 1))
    made = invdiff.sample(
        problem(), prior_of(code), samplers.DPS(steps=5), draws=2, seed=0, store=tmp_path / "x.nc"
    )
    draws = np.asarray(made.draws).reshape(-1, 1, 8, 8)
    assert draws.shape[0] == 4 and draws.min() >= 0 and draws.max() <= 1, "decoded, on [0, 1]"
    assert made.provenance["prior"]["codec"]["name"] == "Latent"
    residual = np.asarray(made.stats["residual_norm"]).reshape(-1)
    again = problem().rows(torch.tensor([0, 0, 1, 1])).residual(torch.from_numpy(draws)).flatten(1).norm(dim=1)
    np.testing.assert_allclose(residual, again, rtol=1e-6)


def test_codecs_compose(networks):
    wide = Space((1, 10, 13), torch.float64)
    inside = Pad(wide, 8)
    code = Scale(wide, 50.0, 3.0) @ inside @ latent(networks, image=inside.prior)
    assert isinstance(code, Chain) and not code.is_affine and float(code.image_unit) == 50
    u = code.prior.randn(2)
    inner = latent(networks, image=inside.prior).decode(u)
    torch.testing.assert_close(code.decode(u), 50 * inner[..., 3:13, 1:14] + 3)
    field = Space((1, 8, 8), torch.complex128)
    channels = ComplexChannels(field)
    two = channels @ Latent(*made(lambda: Encoder(2), lambda: Decoder(2)), channels.prior, scale=1.0)
    assert two.decode(two.prior.randn(2)).is_complex() and two.encode(field.randn(2)).shape == (2, 3, 4, 4)
    scaled = Scale(wide, torch.tensor([1.0, 2.0])) @ inside @ latent(networks, image=inside.prior)
    torch.testing.assert_close(scaled.rows(torch.tensor([1])).decode(u[:1]), 2 * (code.decode(u[:1]) - 3) / 50)
    assert scaled.image_unit.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("name", ["dps", "daps", "reddiff", "pnpdm", "resample", "psld", "flowdps", "flowchef"])
def test_the_units_of_the_image_change_nothing(networks, name):
    own, factor = problem(1), 1e-3
    scaled = invdiff.Problem(own.operator, likelihoods.Gaussian(0.1 * factor), own.y * factor)
    code = latent(networks)
    few = {"daps": {"moves": 4}, "pnpdm": {"moves": 4}, "resample": {"period": 1}}
    sampler = samplers.get(name, steps=6, **few.get(name, {}))

    def run(which, codec):
        made = invdiff.sample(which, prior_of(codec), sampler, draws=2, seed=1)
        return np.asarray(made.estimate if made.kind == "point" else made.draws)

    one, two = run(own, code), run(scaled, Scale(IMAGE, factor) @ code)
    assert np.abs(two / factor - one).max() < 1e-6 * np.abs(one).max()


def test_batches_are_sized_by_the_image_where_it_is_larger_than_the_latent():
    big = Space((1, 512, 512), torch.float64)
    code = Latent(
        lambda x: nn.functional.avg_pool2d(x, 256),
        lambda z: nn.functional.interpolate(z, scale_factor=256),
        big,
        scale=1.0,
    )
    made = invdiff.sample(None, prior_of(code), samplers.DPMpp(steps=2), draws=8, seed=0)
    assert code.prior.size == 4 and made.provenance["max_batch"] == (1 << 20) // big.size
