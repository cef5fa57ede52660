"""Conversion of pickled checkpoints: the right weights, the right names, a true card, and nothing executed."""

import collections
import json
import os
import sys
import types

import pytest
import torch
from safetensors.torch import load_file

import invdiff
from invdiff import InvdiffError, priors
from invdiff.networks.adm import ADM, ADMConfig
from invdiff.networks.dhariwal import DhariwalUNet
from invdiff.networks.ncsnpp import FlatNCSNpp
from invdiff.networks.songunet import SongUNet
from invdiff.priors.converting import convert
from tests.unit.test_cli import refuse, run


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


SIZES = {"inputs": 1, "outputs": 1, "resolution": 8, "inlet": 8, "widths": [8, 12], "blocks": 1, "attention": [4]}
SIZES |= {"embedding": 16, "noise": 8}


def network(kind):
    with torch.random.fork_rng():
        if kind == "ADM":
            net = DhariwalUNet(**SIZES | {"outputs": 2})
        else:
            song = {"fourier": True, "residual": True, "taps": (1, 3, 3, 1)} if kind == "NCSN++" else {}
            net = SongUNet(**SIZES, **{"fourier": False, "residual": False, "taps": (1, 1)} | song)
        g = torch.Generator().manual_seed(7)
        for value in net.parameters():
            value.data.add_(torch.randn(value.shape, generator=g) * 0.05)
        return net.eval().requires_grad_(False)


class EasyDict(dict):
    """Of a package that is not installed."""

    def __getattr__(self, name):
        return self[name]


def _reconstruct_persistent_obj(meta):
    raise AssertionError("the source of a class was run")


@pytest.fixture
def their_packages(monkeypatch):
    """The packages that the pickles of EDM name, as far as writing needs them."""
    for name, member in (("dnnlib.util", EasyDict), ("torch_utils.persistence", _reconstruct_persistent_obj)):
        module = types.ModuleType(name)
        setattr(module, member.__name__, member)
        monkeypatch.setattr(member, "__module__", name)
        monkeypatch.setitem(sys.modules, name.split(".")[0], types.ModuleType(name.split(".")[0]))
        monkeypatch.setitem(sys.modules, name, module)


class Reduced:
    """Pickles as a call."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


def persistent(name, modules=(), parameters=(), buffers=(), **attributes):
    """An object whose class travels as source text, as EDM pickles its modules."""
    state = {"training": False, "_parameters": collections.OrderedDict(parameters)}
    state |= {"_buffers": collections.OrderedDict(buffers), "_modules": collections.OrderedDict(modules)}
    state |= {"_init_args": (), "_init_kwargs": EasyDict(attributes)} | attributes
    source = "open('flag', 'w').close()"
    meta = EasyDict(type="class", version=6, module_src=source, class_name=name, state=state)
    return Reduced(_reconstruct_persistent_obj, (meta,))


def pickled_module(module, name):
    """A network of ours as EDM would have written it; containers are torch's own."""
    children = {n: pickled_module(m, type(m).__name__) for n, m in module.named_children()}
    own = {n: torch.nn.Parameter(p) for n, p in module.named_parameters(recurse=False)}
    buffers = dict(module.named_buffers(recurse=False))
    if isinstance(module, torch.nn.ModuleDict):
        state = {"_parameters": {}, "_buffers": {}, "_modules": collections.OrderedDict(children)}
        return Reduced(torch.nn.ModuleDict, (), state)
    return persistent(name, children, own, buffers)


NUMBERS = {
    "EDMPrecond": ("DDPM++", {"sigma_min": 0, "sigma_max": float("inf"), "sigma_data": 0.4}),
    "VPPrecond": ("DDPM++", {"beta_d": 19.1, "beta_min": 0.2, "M": 500, "epsilon_t": 1e-4, "sigma_max": 1.0}),
    "VEPrecond": ("NCSN++", {"sigma_min": 0.03, "sigma_max": 90.0}),
    "iDDPMPrecond": ("ADM", {"C_1": 0.001, "C_2": 0.008, "M": 1000}),
}


def edm_pickle(path, precond, dataset=None):
    import pickle

    kind, numbers = NUMBERS[precond]
    net = network(kind)
    buffers = {"u": torch.tensor([70.0, 3.0, 0.5, 0.01, 0.0])} if precond == "iDDPMPrecond" else {}
    name = "DhariwalUNet" if kind == "ADM" else "SongUNet"
    ema = persistent(precond, {"model": pickled_module(net, name)}, (), buffers, img_resolution=8, **numbers)
    content = {"ema": ema, "loss_fn": persistent("EDMLoss", P_mean=-1.2), "augment_pipe": None}
    content |= {"dataset_kwargs": EasyDict(dataset or {})}
    path.write_bytes(pickle.dumps(content))
    return net


@pytest.mark.usefixtures("their_packages")
@pytest.mark.parametrize("precond", NUMBERS)
def test_edm(tmp_path, monkeypatch, precond):
    monkeypatch.chdir(tmp_path)
    net = edm_pickle(tmp_path / "mine.pkl", precond)
    with pytest.raises(InvdiffError, match=r"invdiff priors convert mine\.pkl"):
        priors.load(tmp_path / "mine.pkl")
    done = convert(tmp_path / "mine.pkl")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.json", "mine.pkl", "mine.safetensors"]
    held = {k.removeprefix("model."): v for k, v in load_file(done.files[0]).items()}
    held.pop("u", None)
    torch.testing.assert_close(held, dict(net.state_dict()))
    prior = priors.load(done.files[0])
    d = prior.denoiser.to(dtype=torch.float64)
    net = net.double()
    sigma = torch.tensor([0.05, 0.5, 3.0, 60.0], dtype=torch.float64)
    s, x = sigma.reshape(-1, 1, 1, 1), noise(4, 1, 8, 8).double()
    x = x * (1 + s**2).sqrt()
    if precond == "EDMPrecond":
        v, w = s**2 + 0.16, sigma.log() / 4
        expected = 0.16 / v * x + 0.4 * s / v.sqrt() * net(x / v.sqrt(), w)
        assert d.sigma_data == 0.4
    elif precond == "VPPrecond":
        t = ((0.04 + 38.2 * (1 + sigma**2).log()).sqrt() - 0.2) / 19.1
        expected = x - s * net(x / (1 + s**2).sqrt(), 499 * t)
    elif precond == "VEPrecond":
        expected = x + s * net(x, (sigma / 2).log())
        assert (d.sigma_min, d.sigma_max) == (0.03, 90.0)
    else:
        sigma = torch.tensor([0.01, 0.5, 3.0, 70.0], dtype=torch.float64)
        s = sigma.reshape(-1, 1, 1, 1)
        expected = x - s * net(x / (1 + s**2).sqrt(), torch.arange(4.0).double())[:, :1]
    assert float(((d(x, sigma) - expected) / s.clamp_min(1)).abs().max()) < 1e-5
    card = json.loads((tmp_path / "mine.json").read_text())
    assert card["classes"]["preconditioning"] == precond
    assert card["kind"] == "EDM"
    assert card["weights"] == "ema"
    assert "augment_pipe" in card["left_out"]
    assert card["original"]["bytes"] == (tmp_path / "mine.pkl").stat().st_size
    assert prior.card["sha256"] == card["sha256"]


@pytest.mark.usefixtures("their_packages")
def test_edm_pictures_and_raw_weights(tmp_path):
    data = {"class_name": "training.dataset.ImageFolderDataset", "path": "/secret/place.zip", "resolution": 8}
    edm_pickle(tmp_path / "mine.pkl", "EDMPrecond", data)
    card = convert(tmp_path / "mine.pkl", tmp_path / "other.safetensors").cards[0]
    assert card["data"] == {"resolution": 8, "network_range": [-1.0, 1.0]}
    assert card["attributes"]["sigma_max"] == "inf"
    with pytest.raises(InvdiffError, match="none that are raw; convert it with --weights ema"):
        convert(tmp_path / "mine.pkl", tmp_path / "raw.safetensors", weights="raw")


class Callback:
    """Of Lightning, by its class."""


def latent_checkpoint(path, change=lambda state: None):
    raw = {"model.diffusion_model.time_embed.0.weight": noise(4, 2), "model.diffusion_model.out.2.bias": noise(3)}
    ema = {"model_ema." + k.removeprefix("model.").replace(".", ""): v + 1 for k, v in raw.items()}
    state = raw | ema | {"model_ema.decay": torch.tensor(0.9), "model_ema.num_updates": torch.tensor(3)}
    state |= {
        "first_stage_model.decoder.conv.weight": noise(2, 2),
        "cond_stage_model.embedding.weight": noise(5, 2),
    }
    state |= {"betas": torch.linspace(0.1, 0.2, 4), "scale_factor": torch.tensor(0.25), "logvar": noise(4)}
    change(state)
    content = {
        "state_dict": collections.OrderedDict(state),
        "epoch": 3,
        "callbacks": {Callback: {"best": Callback()}},
    }
    torch.save(content | {"pytorch-lightning_version": "1.4.2", "optimizer_states": [{}]}, path)
    return raw


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_lightning(tmp_path, weights):
    raw = latent_checkpoint(tmp_path / "model.ckpt")
    with pytest.raises(InvdiffError, match="invdiff priors convert"):
        priors.load(tmp_path / "model.ckpt")
    done = convert(tmp_path / "model.ckpt", weights=weights)
    assert [f.name for f in done.files] == [
        "model.unet.safetensors",
        "model.first_stage.safetensors",
        "model.cond_stage.safetensors",
    ]
    unet, first, cond = map(load_file, done.files)
    shift = 1 if weights == "ema" else 0
    prefix = "model.diffusion_model."
    torch.testing.assert_close(unet, {k.removeprefix(prefix): v + shift for k, v in raw.items()})
    assert set(first) == {"decoder.conv.weight"}
    assert set(cond) == {"embedding.weight"}
    card = json.loads((tmp_path / "model.unet.json").read_text())
    assert card["weights"] == weights
    assert card["schedule"]["betas"] == pytest.approx([0.1, 0.4 / 3, 0.5 / 3, 0.2])
    assert card["schedule"]["scale_factor"] == 0.25
    assert f"{__name__}.Callback" in card["left_out"]
    assert "state_dict: logvar" in card["left_out"]


def test_lightning_without_averaged_weights(tmp_path):
    def none(state):
        for key in [k for k in state if k.startswith("model_ema.")]:
            del state[key]

    def one(state):
        del state["model_ema.diffusion_modelout2bias"]

    def shape(state):
        state["model_ema.diffusion_modelout2bias"] = noise(4)

    def dots(state):
        state["model.diffusion_model.out2.bias"] = noise(3)

    for change, match in (
        (none, "model_ema"),
        (one, "out.2.bias"),
        (shape, "right shape"),
        (dots, "by dots alone"),
    ):
        latent_checkpoint(tmp_path / "model.ckpt", change)
        with pytest.raises(InvdiffError, match=match):
            convert(tmp_path / "model.ckpt")
        assert "model.unet.safetensors" not in {p.name for p in tmp_path.iterdir()}
        convert(tmp_path / "model.ckpt", tmp_path / "raw" / "m.safetensors", weights="raw", force=True)


def test_score_sde(tmp_path):
    with torch.random.fork_rng():
        net = FlatNCSNpp(
            channels=1,
            width=8,
            widths=[8, 8],
            blocks=1,
            attention=[1],
            fourier=True,
            smooth=True,
            image="residual",
        )
    model = {f"module.{k}": v for k, v in net.state_dict().items()}
    shadow = [v + 0.1 for k, v in model.items() if k != "module.all_modules.0.W"]
    content = {"model": model | {"module.sigmas": torch.tensor([50.0, 1.0, 0.01])}, "step": 5, "optimizer": {}}
    content["ema"] = {"decay": 0.999, "num_updates": 4, "shadow_params": shadow}
    # As old versions of torch wrote it, with a number of numpy's.
    import numpy as np

    content["optimizer"] = {"lr": np.float64(2e-4)}
    torch.save(content, tmp_path / "c.pth", _use_new_zipfile_serialization=False)
    done = convert(tmp_path / "c.pth")
    assert done.cards[0]["weights"] == "ema"
    assert done.cards[0]["step"] == 5
    assert done.left_out == ("optimizer", "step")
    prior = priors.load(done.files[0])
    held = prior.denoiser.network.state_dict()
    for key, value in net.state_dict().items():
        torch.testing.assert_close(held[key], value if key == "all_modules.0.W" else value + 0.1)
    assert prior.card["weights"] == "ema"
    assert prior.denoiser.sigma_max == 50


def test_inversebench(tmp_path):
    with torch.random.fork_rng():
        net = SongUNet(**SIZES | {"resolution": 64}, fourier=False, residual=False, taps=(1, 1))
    state = {f"model.{k}": v for k, v in net.state_dict().items()}
    torch.save({"ema": state, "net": {k: v + 1 for k, v in state.items()}, "epoch": 2}, tmp_path / "blackhole.pt")
    done = convert(tmp_path / "blackhole.pt", tmp_path / "mine.safetensors")
    prior = priors.load(done.files[0])
    # The preset is known by the name of the original.
    assert prior.card["preconditioning"] == "vp"
    assert prior.card["image_range"] == [0.0, 1.0]
    torch.testing.assert_close(prior.denoiser.network.state_dict(), dict(net.state_dict()))
    raw = convert(tmp_path / "blackhole.pt", tmp_path / "raw.safetensors", weights="raw")
    torch.testing.assert_close(load_file(raw.files[0]), {k: v + 1 for k, v in state.items()})


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("their_packages")
def test_command(folder):
    edm_pickle(folder / "mine.pkl", "EDMPrecond")
    out = run("priors", "convert", "mine.pkl").stdout
    assert "SongUNet of EDMPrecond" in out.replace("\n", " ")
    assert "EDM DDPM++, 1 channel(s), 8 x 8 pixels" in out.replace("\n", " ")
    assert "Left out: augment_pipe, dataset_kwargs, loss_fn" in out
    before = (folder / "mine.safetensors").read_bytes()
    assert "--force" in refuse(folder, "priors", "convert", "mine.pkl")
    (folder / "mine.safetensors").write_bytes(b"other")
    assert "mine.safetensors is there already" in refuse(folder, "priors", "convert", "mine.pkl")
    found = json.loads(run("priors", "convert", "mine.pkl", "--force", "--json").stdout)
    assert found["files"][0]["card"]["sha256"]
    # The same file every time.
    assert (folder / "mine.safetensors").read_bytes() == before
    assert not (folder / "flag").exists()


def test_command_refuses(folder):
    import pickle

    (folder / "bad.pkl").write_bytes(pickle.dumps({"ema": Reduced(os.system, ("touch flag",))}))
    assert "nothing of it was run" in refuse(folder, "priors", "convert", "bad.pkl")
    (folder / "bad.pkl").write_bytes(pickle.dumps({"ema": [1, 2], "more": 3}))
    assert "none of these are weights by name" in refuse(folder, "priors", "convert", "bad.pkl")
    (folder / "bad.pkl").write_bytes(pickle.dumps([1, 2]))
    assert "holds list" in refuse(folder, "priors", "convert", "bad.pkl")
    (folder / "bad.pkl").write_text("not found")
    assert "no pickle" in refuse(folder, "priors", "convert", "bad.pkl")
    assert "no checkpoint at" in refuse(folder, "priors", "convert", "none.pkl")
    torch.save({"net": {"a": noise(3)}}, folder / "raw.pt")
    assert "--weights raw" in refuse(folder, "priors", "convert", "raw.pt")
    assert "must end in .safetensors" in refuse(folder, "priors", "convert", "raw.pt", "-o", "x.pt")
    assert "'ema' or 'raw'" in refuse(folder, "priors", "convert", "raw.pt", "--weights", "net")
    shared = noise(100_000)
    torch.save({"ema": {str(i): shared for i in range(9)}}, folder / "many.pt")
    assert "under many names" in refuse(folder, "priors", "convert", "many.pt")
    assert not (folder / "flag").exists()


def test_a_whole_module_of_torch(folder):
    net = network("NCSN++")
    torch.save(net, "whole.pt")
    done = convert("whole.pt")
    assert done.found == "module"
    assert "invdiff.networks.songunet.SongUNet" in done.left_out
    torch.testing.assert_close(load_file(done.files[0]), dict(net.state_dict()))
    assert priors.load(done.files[0], preconditioning="ve").card["format"] == "EDM NCSN++"


def test_names_are_fit_for_a_terminal(folder):
    torch.save({"ema": {"a": noise(2)}, "\x1b[2Jgone\n": 1}, "odd.pt")
    out = run("priors", "convert", "odd.pt").stdout
    assert "\x1b" not in out
    assert "Left out: ?[2Jgone?." in out


@pytest.mark.usefixtures("their_packages")
def test_modules_without_end(folder):
    import pickle

    inner = persistent("Net", parameters={"w": noise(2)})
    for _ in range(80):
        inner = persistent("Net", {"a": inner})
    (folder / "deep.pkl").write_bytes(pickle.dumps({"ema": inner}))
    assert "modules without end" in refuse(folder, "priors", "convert", "deep.pkl")
    # A part that cannot be read is not left out in silence.
    for part in (5, Reduced(Callback, ())):
        mixed = persistent("Net", {"a": persistent("Net", parameters={"w": noise(2)}), "b": part})
        (folder / "deep.pkl").write_bytes(pickle.dumps({"ema": mixed}))
        assert "a module b of a kind" in refuse(folder, "priors", "convert", "deep.pkl")
    mixed = persistent("Net", parameters={"w": Reduced(Callback, ())})
    (folder / "deep.pkl").write_bytes(pickle.dumps({"ema": mixed}))
    assert "weights w of a kind" in refuse(folder, "priors", "convert", "deep.pkl")


def latent_diffusion(path, scale=True):
    """A checkpoint whose U-Net is a small network of guided diffusion with its own table."""
    config = ADMConfig(
        inputs=4, outputs=4, width=32, multipliers=(1.0, 2.0), blocks=1, attention=(1,), scale_shift=False,
        resample="conv", head_channels=32,
    )  # fmt: skip
    with torch.random.fork_rng():
        net = ADM(config).eval().requires_grad_(False)
        g = torch.Generator().manual_seed(3)
        for value in net.parameters():
            value.add_(torch.randn(value.shape, generator=g) * 0.02)
    raw = {f"model.diffusion_model.{k}": v + 1 for k, v in net.state_dict().items()}
    ema = {"model_ema.diffusion_model" + k.replace(".", ""): v for k, v in net.state_dict().items()}
    betas = torch.linspace(0.0015**0.5, 0.0155**0.5, 100, dtype=torch.float64) ** 2
    state = raw | ema | {"betas": betas.float(), "first_stage_model.encoder.conv.weight": noise(2, 2)}
    state |= {"scale_factor": torch.tensor(0.22)} if scale else {}
    torch.save({"state_dict": state, "callbacks": {Callback: 1}}, path)
    return net, betas


def test_latent_unet_loads_with_its_own_table(tmp_path):
    net, betas = latent_diffusion(tmp_path / "ldm.ckpt")
    done = convert(tmp_path / "ldm.ckpt")
    prior = priors.load(done.files[0], head_channels=32)
    d = prior.denoiser.to(dtype=torch.float64)
    abar = (1 - betas).cumprod(0)
    steps = torch.tensor([0, 7, 50, 99])
    sigma = ((1 - abar) / abar).sqrt()[steps]
    s = sigma.reshape(-1, 1, 1, 1)
    z = noise(4, 4, 8, 8).double() * (1 + s**2).sqrt()
    expected = z - s * net.double()(z / (1 + s**2).sqrt(), steps.double())
    # The table went through float32.
    assert float((d(z, sigma) - expected).abs().max()) < 1e-5
    assert prior.card["latent_scale"] == pytest.approx(0.22)
    latents = noise(1, 4, 8, 8)
    torch.testing.assert_close(prior.bind(invdiff.Space((4, 8, 8))).codec.decode(latents), latents)

    def refused(match, file=done.files[0], **declared):
        with pytest.raises(InvdiffError, match=match):
            priors.load(file, **declared)

    refused("declare either head_channels= or heads=")
    refused("declare either", head_channels=32, heads=1)
    refused("does not divide", head_channels=48)
    refused("is the first_stage of a latent diffusion", done.files[1])
    card = json.loads(done.files[0].with_suffix(".json").read_text())
    for changed, match in (({"schedule": {}}, "no betas"), ({"sha256": "0"}, "not the file of its card")):
        done.files[0].with_suffix(".json").write_text(json.dumps(card | changed))
        refused(match, head_channels=32)
