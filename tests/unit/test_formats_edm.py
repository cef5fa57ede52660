"""EDM's networks and preconditionings against deepinv's classes and against formulas written here."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from deepinv.models import ADMUNet, NCSNpp
from safetensors.torch import load_file, save_file

import invdiff
from invdiff import InvdiffError, likelihoods, operators, priors
from invdiff.networks.adm import ADM, ADMConfig
from invdiff.networks.dhariwal import DhariwalUNet
from invdiff.networks.ncsnpp import FlatNCSNpp
from invdiff.networks.songunet import SongUNet
from invdiff.priors.dead_leaves import dead_leaves
from invdiff.priors.formats import build, edm, guided_diffusion
from invdiff.priors.frames_sde import SDEVP, LogVE

SIZES = {"img_resolution": 16, "in_channels": 2, "out_channels": 2, "channel_mult": (1, 2), "num_blocks": 1}
# Below 128 channels deepinv counts the groups of its norms otherwise than the published code.
SIZES |= {"model_channels": 128, "attn_resolutions": (8,), "augment_dim": 9, "pretrained": None, "pixel_std": 0.5}
REFERENCES = {
    "NCSN++": (NCSNpp, {"model_type": "ncsn"}, SongUNet),
    "DDPM++": (NCSNpp, {"model_type": "ddpm", "label_dim": 5}, SongUNet),
    "ADM": (ADMUNet, {"label_dim": 5}, DhariwalUNet),
}


def scrambled(network, seed=0):
    """Fill a network with numbers, norms too, that keep its output near one; filters stay."""
    g = torch.Generator().manual_seed(seed)
    for key, value in network.state_dict().items():
        if "resample_filter" in key:
            continue
        size = 0.5 * value[0].numel() ** -0.5 if value.ndim > 1 else 0.1
        value.copy_(torch.randn(value.shape, generator=g) * size + ("norm" in key and key.endswith("weight")))
    return network.eval().requires_grad_(False)


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=REFERENCES)
def reference(request):
    cls, more, ours = REFERENCES[request.param]
    with torch.random.fork_rng():
        return request.param, scrambled(cls(**SIZES, **more)), ours


def test_raw_outputs_are_those_of_the_reference(reference):
    _, theirs, ours = reference
    state = theirs.state_dict()
    with torch.random.fork_rng():
        network = ours(**ours.layout({k: tuple(v.shape) for k, v in state.items()}))
    network.load_state_dict(state, strict=True)
    x, time = noise(10, 2, 8, 16), torch.logspace(-2.7, 1.9, 10).log() / 4
    label = None if theirs.map_label is None else torch.arange(10) % 5
    hot = None if label is None else torch.nn.functional.one_hot(label, 5).float()
    with torch.no_grad():
        expected = theirs.forward_unet(x, time, class_labels=hot)
        found = network(x, time, label)
        # The reference network is no constant: rows and levels differ far beyond the bound.
        assert float((expected[0] - expected[1]).abs().max()) > 0.1
        assert float((found - expected).abs().max()) < 1e-5
        if label is not None:
            assert float((network(x, time, label.flip(0)) - expected).abs().max()) > 1e-3


def test_denoisers_are_those_of_the_reference(reference, tmp_path):
    name, theirs, _ = reference
    torch.save(theirs.state_dict(), tmp_path / "mine.pt")
    label = {} if name == "NCSN++" else {"label": 3}
    prior = build(tmp_path / "mine.pt", preconditioning="edm", **label)
    assert prior.card["format"] == f"EDM {name}"
    assert (prior.denoiser.sigma_min, prior.denoiser.sigma_max, prior.denoiser.sigma_data) == (0.002, 80, 0.5)
    sigma = torch.logspace(math.log10(0.0021), math.log10(79), 10)
    x = noise(10, 2, 8, 8) * (0.25 + sigma**2).sqrt().reshape(-1, 1, 1, 1)
    hot = torch.eye(5)[[3] * 10] if label else None
    with torch.no_grad():
        expected = theirs(x, sigma, class_labels=hot, input_in_minus_one_one=True)
        assert float((prior.denoiser(x, sigma) - expected).abs().max()) < 1e-5


def small(kind="DDPM++", channels=1, resolution=8, outputs=None, label=0):
    """A network of a few thousand weights."""
    sizes = {"inputs": channels, "outputs": outputs or channels, "resolution": resolution, "inlet": 8}
    sizes |= {"widths": [8, 12], "blocks": 1, "attention": [resolution // 2], "embedding": 16, "label": label}
    with torch.random.fork_rng():
        if kind == "ADM":
            return scrambled(DhariwalUNet(**sizes, noise=8))
        fourier = kind == "NCSN++"
        taps = (1, 3, 3, 1) if fourier else (1, 1)
        return scrambled(SongUNet(**sizes, noise=8, fourier=fourier, residual=fourier, taps=taps))


def written(path, network, extra=()):
    """Save weights under the names they have inside a preconditioned network."""
    state = {f"model.{k}": v.contiguous() for k, v in network.state_dict().items()} | dict(extra)
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


def tenfold(prior, low, high):
    sigma = torch.logspace(math.log10(low), math.log10(high), 10, dtype=torch.float64)
    x = noise(10, prior.denoiser.channels, 8, 8).double() * (1 + sigma**2).sqrt().reshape(-1, 1, 1, 1)
    return sigma, x, (10, 1, 1, 1)


def test_vp(tmp_path):
    net = small().double()
    prior = build(written(tmp_path / "n.safetensors", net), preconditioning="vp")
    d = prior.denoiser.to(dtype=torch.float64)
    assert d.sigma_min == pytest.approx(math.sqrt(math.expm1(1e-6 + 19.9e-10 / 2)), rel=1e-12)
    assert d.sigma_max == pytest.approx(math.sqrt(math.exp(19.9 / 2 + 0.1) - 1), rel=1e-12)
    sigma, x, rows = tenfold(prior, 1.1e-3, 150)
    t = 999 * ((0.01 + 39.8 * (1 + sigma**2).log()).sqrt() - 0.1) / 19.9
    s = sigma.reshape(rows)
    expected = x - s * net(x / (1 + s**2).sqrt(), t)
    assert float((d(x, sigma) - expected).abs().max()) < 1e-5


def test_ve(tmp_path):
    net = small("NCSN++").double()
    prior = build(written(tmp_path / "n.safetensors", net), preconditioning="ve")
    d = prior.denoiser.to(dtype=torch.float64)
    assert (d.sigma_min, d.sigma_max) == (0.02, 100)
    sigma, x, rows = tenfold(prior, 0.021, 99)
    s = sigma.reshape(rows)
    assert float((d(x, sigma) - (x + s * net(x, (0.5 * sigma).log()))).abs().max()) < 1e-5


def table():
    """Levels from the largest to zero, as the code of EDM makes them."""
    u = [0.0] * 1001

    def alpha(j):
        return math.sin(0.5 * math.pi * j / 1000 / 1.008) ** 2

    for j in range(1000, 0, -1):
        u[j - 1] = math.sqrt((u[j] ** 2 + 1) / max(alpha(j - 1) / alpha(j), 0.001) - 1)
    return torch.tensor(u, dtype=torch.float64)


@pytest.mark.parametrize("stored", [True, False])
def test_iddpm(tmp_path, stored):
    net, u = small("ADM", outputs=2).double(), table()
    extra, declared = ({"u": u.float()}, {}) if stored else ({}, {"preconditioning": "iddpm"})
    prior = build(written(tmp_path / "n.safetensors", net, extra), **declared)
    d = prior.denoiser.to(dtype=torch.float64)
    index = torch.tensor([1, 2, 100, 250, 400, 550, 700, 850, 998, 999])
    sigma = u[index]
    _, x, rows = tenfold(prior, 1, 2)
    x = x * sigma.reshape(rows)
    s = sigma.reshape(rows)
    expected = x - s * net(x / (1 + s**2).sqrt(), 999.0 - index.double())[:, :1]
    assert float(((d(x, sigma) - expected) / s.clamp_min(1)).abs().max()) < 1e-5
    assert d.sigma_max == pytest.approx(20291.17, rel=1e-5)


def test_frames_refuse_what_makes_no_levels():
    with pytest.raises(InvdiffError, match="positive beta_d"):
        SDEVP(beta_d=0)
    with pytest.raises(InvdiffError, match="0 < sigma_min < sigma_max"):
        LogVE(2.0, 1.0)


# kind, preconditioning, network value to image value
UNITS = {
    "fwi-5m": ("ADM", 1, 128, 1.0, 3.0),
    "in-scatter-5m": ("ADM", 1, 128, 0.5, 0.5),
    "ns-5m": ("ADM", 1, 128, 10.0, 0.0),
    "blackhole": ("DDPM++", 1, 64, 0.5, 0.5),
}


@pytest.mark.parametrize("name", UNITS)
def test_inversebench_units(tmp_path, name):
    kind, channels, resolution, gain, offset = UNITS[name]
    state = {f"model.{k}": v for k, v in small(kind, channels, resolution).state_dict().items()}
    torch.save({"ema": state, "net": {k: v + 1 for k, v in state.items()}}, tmp_path / f"{name}.pt")
    prior = build(tmp_path / f"{name}.pt")
    assert prior.card["weights"] == "ema"
    assert prior.card["preconditioning"] == ("vp" if name == "blackhole" else "edm")
    image = invdiff.Space((1, 8, 8))
    u = noise(1, 1, 8, 8)
    torch.testing.assert_close(prior.bind(image).codec.decode(u), gain * u + offset)
    # The scale is that of the physical units, never estimated.
    problem = invdiff.Problem.simulate(
        operators.Identity(image), likelihoods.Gaussian(0.1), 40 * noise(1, 1, 8, 8)
    )
    torch.testing.assert_close(prior.adapt(problem).codec.decode(u), gain * u + offset)
    raw = build(tmp_path / f"{name}.pt", weights="raw")
    assert not torch.equal(raw.denoiser(u, torch.ones(1)), prior.denoiser(u, torch.ones(1)))


def test_inversebench_mri_takes_its_scale_from_the_data(tmp_path):
    torch.save({"ema": small("ADM", 2, 320).state_dict()}, tmp_path / "mri-knee.pt")
    prior = build(tmp_path / "mri-knee.pt")
    image = invdiff.Space((1, 20, 20), torch.complex64)
    truth = 40 * torch.view_as_complex(noise(1, 1, 20, 20, 2))
    problem = invdiff.Problem.simulate(operators.Identity(image), likelihoods.Gaussian(1e-3), truth)
    unit = prior.adapt(problem).codec.encode(truth)
    assert unit.shape == (1, 2, 20, 20)
    magnitude = unit.square().sum(1).sqrt().flatten()
    assert float(magnitude.quantile(0.99)) == pytest.approx(1, rel=0.02)


def test_pictures_are_in_zero_one(tmp_path):
    prior = build(written(tmp_path / "n.pt", small("NCSN++", 3)), preconditioning="edm", check=False)
    codec = prior.bind(invdiff.Space((3, 7, 9))).codec
    assert codec.prior.shape == (3, 8, 10)
    low = codec.decode(torch.full((1, 3, 8, 10), -1.0))
    assert low.shape == (1, 3, 7, 9)
    assert float(low.abs().max()) == 0


def test_labels(tmp_path):
    path = written(tmp_path / "n.pt", small("ADM", 3, label=4))
    x, one = noise(2, 3, 8, 8), torch.ones(2)
    prior = build(path, preconditioning="edm", check=False)
    with pytest.raises(InvdiffError, match="label"):
        prior.denoiser(x, one)
    given = prior.denoiser(x, one, {"label": torch.tensor([2, 2])})
    torch.testing.assert_close(build(path, preconditioning="edm", label=2, check=False).denoiser(x, one), given)
    with pytest.raises(InvdiffError, match="from 0 to 3"):
        build(path, preconditioning="edm", label=4, check=False).denoiser(x, one)
    # No class at all is all weights zero.
    none = prior.denoiser(x, one, {"label": torch.zeros(2, 4)})
    assert float((none - given).abs().max()) > 1e-3


@pytest.mark.parametrize("kind", ["DDPM++", "NCSN++", "ADM"])
def test_networks_can_be_differentiated_twice(tmp_path, kind):
    d = build(written(tmp_path / "n.pt", small(kind)), preconditioning="edm").denoiser.to(dtype=torch.float64)
    assert d.differentiable == 2
    x, sigma = noise(1, 1, 8, 8).double(), torch.ones(1, dtype=torch.float64)
    with torch.random.fork_rng():
        assert torch.autograd.gradcheck(lambda x: d(x, sigma), x.requires_grad_(), fast_mode=True)
        assert torch.autograd.gradgradcheck(lambda x: d(x, sigma), x, fast_mode=True)


def test_frequencies_survive_half_precision(tmp_path):
    """Angles of hundreds of radians leave nothing of frequencies with three digits."""
    time = torch.linspace(-1.5, 1.1, 10)
    with torch.random.fork_rng():
        flat = FlatNCSNpp(channels=1, width=8, widths=[8], blocks=1, attention=[], fourier=True, smooth=True)
    for net, place in ((small("NCSN++"), "map_noise"), (flat, "all_modules.0")):
        before = net.get_submodule(place)(time)
        half = copy.deepcopy(net).to(torch.bfloat16)
        assert torch.bfloat16 in {p.dtype for p in half.parameters()}
        torch.testing.assert_close(half.get_submodule(place)(time), before)
    path = written(tmp_path / "n.pt", small("NCSN++"))
    d, fine = (build(path, preconditioning="edm", network_dtype=t).denoiser for t in (torch.bfloat16, None))
    x, sigma = noise(4, 1, 8, 8), torch.logspace(-2, 1, 4)
    assert d(x, sigma).dtype == torch.float32
    assert float((d(x, sigma) - fine(x, sigma)).abs().max()) < 0.05


# Counts of the published configurations, in millions.
COUNTS = {
    "scattering": (26.8, "ADM", 1, 128, [128, 128, 128, 256, 256], 1, [16]),
    "mri": (26.0, "ADM", 2, 320, [128, 128, 128, 256, 256], 1, []),
    "black hole": (20.0, "DDPM++", 1, 64, [128, 256, 256], 1, [16]),
}


@pytest.mark.parametrize("name", COUNTS)
def test_published_sizes(name):
    count, kind, channels, resolution, widths, blocks, attention = COUNTS[name]
    sizes = {"inputs": channels, "outputs": channels, "resolution": resolution, "inlet": 128, "widths": widths}
    sizes |= {"blocks": blocks, "attention": attention, "embedding": 512, "noise": 128}
    with torch.device("meta"):
        song = {"fourier": False, "residual": False, "taps": (1, 1)}
        net = DhariwalUNet(**sizes) if kind == "ADM" else SongUNet(**sizes, **song)
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(count, abs=0.05)


TINY = Path(__file__).with_name("tiny_edm.safetensors")


def test_a_trained_network_passes_the_test_of_loading_and_a_mistaken_one_does_not(tmp_path):
    """The network knows dead leaves on [-1, 1] in the preconditioning ``edm`` with sigma_data 0.5."""
    prior = priors.load(TINY, preconditioning="edm")
    assert prior.card["check"]["verdict"] == "passed"
    samples = dead_leaves(6, 3, 16, seed=5)
    assert build(TINY, preconditioning="edm", samples=samples).card["check"]["verdict"] == "passed"
    for mistaken in ({"preconditioning": "vp"}, {"preconditioning": "ve"}):
        refused(TINY, "does not denoise as it should", **mistaken)
    for mistaken in ({"sigma_data": 2.0}, {"sigma_data": 0.1}):
        refused(TINY, "does not denoise as it should", preconditioning="edm", samples=samples, **mistaken)
    # A plane of every frequency but the right one: the embedding of time out of order.
    state = load_file(TINY)
    state["model.map_layer0.weight"] = state["model.map_layer0.weight"].roll(8, dims=1)
    save_file(state, tmp_path / "mixed.safetensors")
    refused(
        tmp_path / "mixed.safetensors", "does not denoise as it should", preconditioning="edm", samples=samples
    )


def test_sigma_data_is_that_of_the_preconditioning(tmp_path):
    net = small()
    d = build(written(tmp_path / "n.safetensors", net), preconditioning="edm", sigma_data=0.3).denoiser
    x, s = noise(1, 1, 8, 8), torch.tensor([0.7])
    total = 0.3**2 + 0.7**2
    expected = 0.09 / total * x + 0.21 / total**0.5 * net(x / total**0.5, s.log() / 4)
    torch.testing.assert_close(d(x, s), expected)
    (tmp_path / "n.json").write_text(json.dumps({"attributes": {"sigma_data": 0.5}}))
    refused(tmp_path / "n.safetensors", "card says sigma_data 0.5", preconditioning="edm", sigma_data=0.3)


def refused(path, match, **declared):
    with pytest.raises(InvdiffError, match=match) as caught:
        build(path, **declared)
    assert "\n" not in str(caught.value)


def test_what_the_file_does_not_say_is_asked_for(tmp_path):
    path = written(tmp_path / "n.pt", small())
    refused(path, "declare preconditioning=")
    refused(path, "there are edm, vp, ve, iddpm", preconditioning="flow")
    refused(path, "Unknown preset", preset="fwi")
    refused(path, "a ADM of 1 channel", preset="fwi-5m")
    refused(path, "is no option", schedule="linear", preconditioning="edm")
    refused(path, "not conditional on a class", preconditioning="edm", label=1)
    refused(path, "output channels", preconditioning="iddpm")
    torch.save({"net": small().state_dict()}, tmp_path / "raw.pt")
    refused(tmp_path / "raw.pt", "declare weights=raw", preconditioning="edm")
    refused(tmp_path / "raw.pt", "must be 'ema' or 'raw'", preconditioning="edm", weights="net")
    assert build(tmp_path / "raw.pt", preconditioning="edm", weights="raw").card["weights"] == "raw"
    refused(path, "leave out weights", preconditioning="edm", weights="ema")


def test_damaged_weights_are_refused(tmp_path):
    state = small("NCSN++").state_dict()
    key = "enc.4x4_block0.conv1.weight"
    path = tmp_path / "n.pt"

    def save(changed):
        torch.save(changed, path)
        return path

    refused(save({k: v for k, v in state.items() if k != key}), f"lacks the weights {key}", preconditioning="edm")
    refused(
        save({k: v for k, v in state.items() if k != "map_layer0.weight"}), "map_layer0", preconditioning="edm"
    )
    refused(save(state | {"more": torch.zeros(1)}), "more", preconditioning="edm")
    refused(save(state | {key: torch.zeros(12, 12, 1, 1)}), "has shape", preconditioning="edm")
    refused(save(state | {key: state[key] * math.nan}), "NaN", preconditioning="edm")
    save(state)
    path.write_bytes(path.read_bytes()[:-2000])
    refused(path, "truncated", preconditioning="edm")
    save_file(state, tmp_path / "n.safetensors")
    (tmp_path / "n.json").write_text(json.dumps({"sha256": "0" * 64}))
    refused(tmp_path / "n.safetensors", "belong to another card", preconditioning="edm")


def test_load_finds_the_format(tmp_path):
    path = written(tmp_path / "n.pt", small("NCSN++"))
    assert priors.load(path, preconditioning="ve").card["preconditioning"] == "ve"
    assert edm.recognise(invdiff.priors.source.Source(path)) == "EDM NCSN++, 1 channel(s), 8 x 8 pixels"


def test_inversebench_faces_are_a_network_of_guided_diffusion(tmp_path, monkeypatch):
    config = ADMConfig(inputs=3, outputs=6, width=32, multipliers=(1.0, 2.0), blocks=1, attention=(1,))
    with torch.random.fork_rng():
        net = scrambled(ADM(config))
    torch.save({"ema": {f"model.{k}": v for k, v in net.state_dict().items()}}, tmp_path / "ffhq256.pt")
    refused(tmp_path / "ffhq256.pt", "sizes of no published network")
    sizes = guided_diffusion._sizes(config)
    preset = guided_diffusion.Preset(title="faces", sizes=sizes, size=16)
    monkeypatch.setattr(guided_diffusion, "PRESETS", (preset,))
    prior = build(tmp_path / "ffhq256.pt", check=False)
    d = prior.denoiser.to(dtype=torch.float64)
    abar = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    steps = torch.tensor([0, 10, 500, 999])
    sigma = ((1 - abar) / abar).sqrt()[steps]
    s = sigma.reshape(-1, 1, 1, 1)
    x = noise(4, 3, 8, 8).double() * (1 + s**2).sqrt()
    expected = x - s * net.double()(x / (1 + s**2).sqrt(), steps.double())[:, :3]
    assert float(((d(x, sigma) - expected) / s.clamp_min(1)).abs().max()) < 1e-5
    assert prior.card["weights"] == "ema"
