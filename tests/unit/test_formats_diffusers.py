"""Folders of diffusers: the denoiser against the library's own scheduler, and refusals."""

import json
import pickle
import sys

import pytest
import torch

import invdiff
from invdiff import InvdiffError, priors

diffusers = pytest.importorskip("diffusers")

SMALL = {
    "sample_size": 16,
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 8,
}
CASES = {
    "epsilon": ({}, {}),
    "ddpm-cifar": ({"flip_sin_to_cos": False, "freq_shift": 1, "downsample_padding": 0}, {}),
    "v": (
        {},
        {"prediction_type": "v_prediction", "beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True},
    ),
    "sample": ({}, {"prediction_type": "sample", "beta_schedule": "squaredcos_cap_v2"}),
    "trained_betas": ({}, {"trained_betas": torch.linspace(1e-3, 0.05, 300).tolist(), "num_train_timesteps": 300}),
    "sigmoid": ({}, {"beta_schedule": "sigmoid", "beta_end": 0.01}),
    "learned variance": ({"out_channels": 6, "resnet_time_scale_shift": "scale_shift"}, {}),
    "one channel": ({"in_channels": 1, "out_channels": 1}, {}),
    "learned times": ({"time_embedding_type": "learned", "num_train_timesteps": 1000}, {}),
}


def network(**changes):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return diffusers.UNet2DModel(**{**SMALL, **changes}).eval()


def write(folder, unet, scheduler=None, safe=True):
    unet.save_pretrained(folder / "unet", safe_serialization=safe)
    if scheduler is not None:
        scheduler.save_pretrained(folder / "scheduler")
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    unet = network()
    write(folder, unet, diffusers.DDPMScheduler())
    return folder, unet


def load(folder, **declared):
    return priors.load(folder, check=False, **declared)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# diffusers' DDIM knows no sigmoid schedule
KINDS = [(kind, case) for kind in (diffusers.DDPMScheduler, diffusers.DDIMScheduler) for case in CASES]
KINDS = [(kind, case) for kind, case in KINDS if kind is diffusers.DDPMScheduler or "sigmoid" not in case]


@pytest.mark.parametrize("kind, case", KINDS)
def test_denoiser_is_the_schedulers_prediction(tmp_path, case, kind):
    """``D`` is ``pred_original_sample`` of the library's own step, at ten times of its own table."""
    about, said = CASES[case]
    unet, scheduler = network(**about), kind(clip_sample=False, **said)
    denoiser = load(write(tmp_path, unet, scheduler)).denoiser
    channels = unet.config.in_channels
    table = 1 / (1 + (2 * denoiser.frame._log_sigma).exp())
    assert len(scheduler.betas) - len(table) == bool(said.get("rescale_betas_zero_snr"))
    assert (table - scheduler.alphas_cumprod[: len(table)]).abs().max() < 5e-6
    # The library's table is in float32; where 1 - abar is small, that is too little for a comparison to 1e-5.
    scheduler.alphas_cumprod = table
    if kind is diffusers.DDIMScheduler:
        scheduler.set_timesteps(10)
    for i in torch.linspace(0, len(table) - 1, 10).long().tolist():
        sigma = ((1 - table[i]) / table[i]).sqrt()
        x = (noise(2, channels, 16, 16) * (1 + sigma)).float()
        z = (x / (1 + sigma**2).sqrt()).float()
        with torch.no_grad(), torch.random.fork_rng():
            out = unet(z, i).sample[:, :channels]
            wanted = scheduler.step(out, i, z).pred_original_sample
            assert (denoiser(x, sigma) - wanted).abs().max() <= 1e-5 * (1 + sigma), (i, float(sigma))


def test_score_sde_ve(tmp_path):
    """``D = x + sigma^2 score``; the class divides its output by the level, and means images in [0, 1]."""
    about = {
        "time_embedding_type": "fourier",
        "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
        "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
        "block_out_channels": (32, 32),
        "center_input_sample": True,
    }
    unet = network(**about)
    prior = load(write(tmp_path, unet, diffusers.ScoreSdeVeScheduler(sigma_min=0.02, sigma_max=50.0)))
    assert (prior.denoiser.sigma_min, prior.denoiser.sigma_max) == (0.02, 50.0)
    assert prior.card["network_range"] == [0.0, 1.0] and prior.denoiser.sigma_data == 0.25
    for sigma in torch.logspace(-1.65, 1.65, 10):
        x = 0.5 + sigma * noise(2, 3, 16, 16)
        with torch.no_grad():
            wanted = x + sigma**2 * unet(x, sigma).sample
            assert (prior.denoiser(x, sigma) - wanted).abs().max() <= 1e-5 * (1 + sigma)


def test_images_are_in_the_unit_interval_and_of_any_size(plain):
    prior = load(plain[0])
    bound = prior.bind(invdiff.Space((3, 11, 18)))
    assert bound.codec.prior.shape == (3, 12, 18)
    ends = torch.stack([torch.zeros(3, 11, 18), torch.ones(3, 11, 18)])
    u = bound.codec.encode(ends)
    assert u[0].eq(-1).all() and u[1].eq(1).all() and torch.equal(bound.codec.decode(u), ends)
    other = load(plain[0], image_range=(0, 255)).bind(invdiff.Space((3, 16, 16))).codec
    assert float(other.decode(torch.ones(1, 3, 16, 16)).max()) == 255
    with torch.no_grad():
        assert prior.sample(
            1, shape=invdiff.Space((3, 11, 18)), sampler=invdiff.samplers.DDIM(steps=2)
        ).draws.shape


def test_images_that_do_not_fit(plain):
    prior = load(plain[0])
    with pytest.raises(InvdiffError, match="for_grey"):
        prior.bind(invdiff.Space((1, 16, 16)))
    with pytest.raises(InvdiffError, match="choose a prior"):
        prior.bind(invdiff.Space((1, 16, 16), torch.complex64))
    with pytest.raises(InvdiffError, match=r"channel, y, x"):
        prior.bind(invdiff.Space((3, 4, 16, 16)))


def test_bin_bare_folder_and_flat_repository(plain, tmp_path):
    """The same network as .bin, as the bare unet folder, and with all files at the top as in old repositories."""
    folder, unet = plain
    x = noise(2, 3, 16, 16)
    wanted = load(folder).denoiser(x, 0.7)
    write(tmp_path / "bin", unet, diffusers.DDPMScheduler(), safe=False)
    assert torch.equal(load(tmp_path / "bin").denoiser(x, 0.7), wanted)
    assert torch.equal(load(folder / "unet").denoiser(x, 0.7), wanted)
    flat = tmp_path / "flat"
    unet.save_pretrained(flat)
    with pytest.raises(InvdiffError, match="no scheduler_config"):
        load(flat)
    assert torch.equal(load(flat, schedule="linear", predicts="epsilon").denoiser(x, 0.7), wanted)
    diffusers.DDPMScheduler().save_config(flat)
    assert torch.equal(load(flat).denoiser(x, 0.7), wanted)
    with pytest.raises(InvdiffError, match="leave them out"):
        load(flat, schedule="linear")


def test_old_names_of_attention_weights(plain, tmp_path):
    folder, unet = plain
    write(tmp_path, unet, diffusers.DDPMScheduler(), safe=False)
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    state = {}
    for key, value in unet.state_dict().items():
        for new, before in old.items():
            key = key.replace(new, before)
        state[key] = value
    assert set(state) != set(unet.state_dict())
    torch.save(state, tmp_path / "unet" / "diffusion_pytorch_model.bin")
    x = noise(2, 3, 16, 16)
    assert torch.equal(load(tmp_path).denoiser(x, 0.7), load(folder).denoiser(x, 0.7))


def test_classes(tmp_path):
    unet = network(num_class_embeds=5)
    write(tmp_path, unet, diffusers.DDPMScheduler(clip_sample=False))
    free = load(tmp_path).denoiser
    x, label = noise(2, 3, 16, 16), torch.tensor([4, 0])
    with pytest.raises(InvdiffError, match="label"):
        free(x, 1.0)
    with torch.no_grad():
        sigma = free.frame._log_sigma[500].exp()
        z = x / (1 + sigma**2).sqrt().float()
        wanted = x - sigma.float() * unet(z, 500, class_labels=label).sample
    assert torch.allclose(free(x, sigma, cond={"label": label}), wanted, atol=1e-5)
    bound = load(tmp_path, label=4).denoiser
    assert torch.allclose(bound(x, sigma)[0], wanted[0], atol=1e-5)
    with pytest.raises(InvdiffError, match="from 0 to 4"):
        free(x, sigma, cond={"label": torch.tensor([5, 0])})
    with pytest.raises(InvdiffError, match="one whole number"):
        load(tmp_path, label=label)
    with pytest.raises(InvdiffError, match="no condition 'class'"):
        bound(x, sigma, cond={"class": label})
    unet.register_to_config(class_embed_type="identity")
    unet.save_config(tmp_path / "unet")
    with pytest.raises(InvdiffError, match="identity"):
        load(tmp_path)


def test_second_derivatives(plain):
    denoiser = load(plain[0]).to(dtype=torch.float64).denoiser
    assert denoiser.differentiable == 2
    x = noise(1, 3, 4, 4).double().requires_grad_()
    sigma = torch.tensor([0.8], dtype=torch.float64)
    v = noise(1, 3, 4, 4, seed=1).double()

    def gradient(x):
        return torch.autograd.grad((denoiser(x, sigma) * v).sum(), x, create_graph=True)[0]

    (second,) = torch.autograd.grad(gradient(x).sin().sum(), x)
    step = 1e-3 * v  # diffusers takes its softmax in float32
    with torch.enable_grad():
        up, down = gradient(x + step).sin().sum().detach(), gradient(x - step).sin().sum().detach()
    assert float((up - down) / 2e-3) == pytest.approx(float((second * v).sum()), rel=1e-3)


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("file", "changes", "match"),
    [
        ("unet/config.json", {"down_block_types": ["DownBlock2D", "Magic2D"]}, "no network that can be built"),
        ("unet/config.json", {"telepathy": 1}, "'telepathy', which the installed"),
        ("unet/config.json", {"block_out_channels": [32, 64]}, "has shape"),
        ("unet/config.json", {"block_out_channels": [2**20, 2**22]}, "has shape"),
        ("unet/config.json", {"layers_per_block": 2}, "lacks the weights"),
        ("unet/config.json", {"add_attention": False}, "holds the weights"),
        ("unet/config.json", {"out_channels": 4}, "output channels"),
        ("unet/config.json", {"_class_name": "UNet3DModel"}, "no checkpoint that is known"),
        ("scheduler/scheduler_config.json", {"prediction_type": "magic"}, "prediction_type 'magic'"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "magic"}, "beta_schedule 'magic'"),
        ("scheduler/scheduler_config.json", {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "known are"),
        ("scheduler/scheduler_config.json", {"_class_name": "ScoreSdeVeScheduler"}, "expected 'fourier'"),
        ("scheduler/scheduler_config.json", {"trained_betas": [0.1, 2.0]}, "between 0 and 1"),
    ],
)
def test_wrong_configurations_are_refused(tmp_path, plain, file, changes, match):
    write(tmp_path, plain[1], diffusers.DDPMScheduler())
    edit(tmp_path / file, **changes)
    with pytest.raises(InvdiffError, match=match):
        load(tmp_path)


@pytest.mark.parametrize("safe", [True, False])
def test_damaged_weights_are_refused(tmp_path, plain, safe):
    write(tmp_path, plain[1], diffusers.DDPMScheduler(), safe=safe)
    path = tmp_path / "unet" / f"diffusion_pytorch_model.{'safetensors' if safe else 'bin'}"
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(InvdiffError, match="fetch it again"):
        load(tmp_path)
    path.unlink()
    with pytest.raises(InvdiffError, match="has no weights"):
        load(tmp_path)


class Hostile:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return exec, (f"open({str(self.mark)!r}, 'w').close()",)


def test_a_hostile_pickle_does_not_run(tmp_path, plain):
    write(tmp_path, plain[1], diffusers.DDPMScheduler(), safe=False)
    mark = tmp_path / "mark"
    torch.save({"conv_in.weight": Hostile(mark)}, tmp_path / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(InvdiffError, match="more than weights"):
        load(tmp_path)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Hostile(mark)))
    assert mark.exists(), "the trap itself must work"


def test_nan_and_unknown_options(tmp_path, plain):
    unet = network()
    unet.conv_out.bias.data[0] = torch.nan
    write(tmp_path, unet, diffusers.DDPMScheduler())
    with pytest.raises(InvdiffError, match=r"NaN or infinite values in conv_out\.bias"):
        load(tmp_path)
    with pytest.raises(InvdiffError, match="'heads' is no option"):
        load(plain[0], heads=4)
    with pytest.raises(InvdiffError, match="low < high"):
        load(plain[0], image_range=(1, 0))
    with pytest.raises(InvdiffError, match="not conditional"):
        load(plain[0], label=3)


def test_the_self_test_is_run(plain, tmp_path):
    """Random weights do not denoise; networks of one channel are taken at their word, and the card says so."""
    with pytest.raises(InvdiffError, match="does not denoise as it should"):
        priors.load(plain[0])
    write(tmp_path, network(in_channels=1, out_channels=1), diffusers.DDPMScheduler())
    assert priors.load(tmp_path).card["check"]["verdict"].startswith("format and shapes verified")


def test_missing_library(plain, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(InvdiffError, match=r"pip install 'invdiff\[hub\]'"):
        load(plain[0])
