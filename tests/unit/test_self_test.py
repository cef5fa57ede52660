"""The self-test of loaded checkpoints: passes a trained network, refuses it under every wrong declaration."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import invdiff
from invdiff import InvdiffError, likelihoods, operators, priors
from invdiff.cli.app import app
from invdiff.prior import FunctionDenoiser, Prior
from invdiff.priors import self_test as self_test_module
from invdiff.priors.checks import check_denoiser
from invdiff.priors.dead_leaves import dead_leaves
from invdiff.priors.self_test import COUNT, examine, self_test
from tests.unit import tiny_adm

TINY = {"head_channels": 8, "size": tiny_adm.SIZE}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A small network trained on dead leaves, with four attention heads in the legacy order."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.pt"
    torch.save(tiny_adm.weights(), path)
    return path


@pytest.fixture(scope="module")
def samples():
    return dead_leaves(64, 3, tiny_adm.SIZE, seed=5)


def load(path, **declared):
    return priors.load(path, **{**TINY, **declared})


def test_dead_leaves():
    images = dead_leaves(8, 3, 64, seed=1)
    assert images.shape == (8, 3, 64, 64) and images.dtype == torch.float32
    assert float(images.min()) >= 0 and float(images.max()) <= 1
    assert abs(float(images.mean()) - 0.5) < 0.1 and 0.15 < float(images.std()) < 0.35
    assert torch.equal(images, dead_leaves(8, 3, 64, seed=1))
    assert not torch.equal(images, dead_leaves(8, 3, 64, seed=2))
    power = torch.fft.rfft2(images - images.mean((-1, -2), keepdim=True)).abs().square().mean((0, 1))
    low, high = float(power[0, 2:4].mean()), float(power[0, 8:16].mean())
    # Power near 1 / f^2: two octaves apart, a factor near 16.
    assert 6 < low / high < 60
    edges = (images.diff(dim=-1).abs() > 0.2).float().mean()
    assert 0.02 < float(edges) < 0.4, "flat discs with sharp edges"


def test_a_trained_network_passes(file, samples):
    prior = load(file)
    assert prior.card["check"]["verdict"] == "passed"
    assert prior.card["check"]["images"] == f"{COUNT} images of 3 x 8 x 8, dead leaves"
    json.dumps(prior.card)
    given = load(file, samples=samples).card["check"]
    assert given["images"] == "64 images of 3 x 8 x 8, given"
    assert all(line["error"] <= line["bound"] for line in given["lines"].values())
    assert {"mean of draws", "spread of draws"} <= set(given["lines"])


WRONG = {
    "order of the heads": {"qkv": "new"},
    "larger heads": {"head_channels": 16},
    "one head": {"head_channels": None, "heads": 1},
    "schedule": {"schedule": "cosine"},
    "range of the network": {"network_range": (0, 1)},
    "range of the images": {"image_range": (0, 255)},
}


@pytest.mark.parametrize("declared", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("own", [False, True], ids=["dead leaves", "samples"])
def test_a_wrong_declaration_is_refused(file, samples, declared, own):
    # Dead leaves follow the declared range of the images, so that they cannot tell that one.
    if "image_range" in declared and not own:
        assert load(file, **declared).card["check"]["verdict"] == "passed"
        return
    with pytest.raises(InvdiffError, match=r"does not denoise as it should .* it fails '[a-z ]+.*'"):
        load(file, **declared, samples=samples if own else None)


def test_random_weights_are_refused(tmp_path):
    g = torch.Generator().manual_seed(0)
    state = {k: torch.randn(v.shape, generator=g) * v.std() + v.mean() for k, v in tiny_adm.weights().items()}
    torch.save(state, tmp_path / "random.pt")
    with pytest.raises(InvdiffError, match="does not denoise"):
        load(tmp_path / "random.pt")


def test_without_the_check(file):
    assert load(file, check=False, qkv="new").card["check"] == {"verdict": "not checked"}


def one_channel(path):
    """Write a network of one channel: nothing says what its images are."""
    state = tiny_adm.weights()
    state["input_blocks.0.0.weight"] = state["input_blocks.0.0.weight"].sum(1, keepdim=True)
    for name in ("out.2.weight", "out.2.bias"):
        state[name] = state[name][:1]
    save_file({k: v.contiguous() for k, v in state.items()}, path)


def test_a_network_of_unknown_images(tmp_path):
    one_channel(tmp_path / "grey.safetensors")
    check = load(tmp_path / "grey.safetensors").card["check"]
    assert check == {"verdict": "format and shapes verified, denoising not: give samples="}


def test_samples_that_do_not_fit(file, samples):
    with pytest.raises(InvdiffError, match="for_grey"):
        load(file, samples=samples[:, :1])
    with pytest.raises(InvdiffError, match="floating-point"):
        load(file, samples=(255 * samples).byte())
    with pytest.raises(InvdiffError, match="at least two"):
        load(file, samples=samples[:1])


def test_exact_priors_pass_with_draws():
    prior = priors.StationaryGaussian((8, 8), correlation_length=1.5, mean=0.5)
    report, _ = examine(prior, prior.denoiser.sample(50, seed=1))
    assert report.ok, report
    assert {"mean of draws", "spread of draws"} <= {c.name for c in report.checks}


def test_draws_tell_a_wrong_width():
    """A denoiser of images twice as wide: each level alone looks plausible, the draws do not."""
    prior = priors.StationaryGaussian((8, 8), correlation_length=1.5)
    wide = prior.denoiser

    def half(x, sigma):
        return wide(2 * x, 2 * sigma) / 2

    space = invdiff.Space((1, 8, 8), torch.float64)
    narrow = Prior(FunctionDenoiser(half, space, wide.sigma_min, wide.sigma_max / 2))
    report, _ = examine(narrow, wide.sample(50, seed=1))
    assert "spread of draws" in report.failed


def test_the_verdict_is_on_a_new_card(file):
    prior = load(file, check=False)
    again = self_test(dataclasses.replace(prior, card={**prior.card}), check=True)
    assert again.card["check"]["verdict"] == "passed" and prior.card["check"]["verdict"] == "not checked"


def test_embedded_prior_repeats_its_figures():
    check = priors.load("brain-mri").card["check"]
    assert check["verdict"] == "passed" and check["largest_deviation"] < 0.03


def cli(*words, code=0):
    done = CliRunner().invoke(app, [str(w) for w in words])
    assert done.exit_code == code, f"{done.output}\n{done.stderr}"
    return done


def test_command_line(file, samples, tmp_path):
    """Card and check of a checkpoint of another format, and the list of formats."""
    own = ("--set", "head_channels=8", "--set", f"size={tiny_adm.SIZE}")
    shown = cli("priors", "card", file, *own).stdout
    assert "guided diffusion U-Net" in shown and "Denoising of held-out" not in shown
    card = json.loads(cli("priors", "card", file, *own, "--json").stdout)
    assert card["sigma_max"] == pytest.approx(157.4, rel=1e-3) and "check" not in card
    assert "tiny.pt: pass" in cli("priors", "check", file, *own).stdout
    np.save(tmp_path / "clean.npy", samples.numpy())
    assert json.loads(cli("priors", "check", file, *own, "--samples", tmp_path / "clean.npy", "--json").stdout)[
        "ok"
    ]
    wrong = cli("priors", "check", file, *own, "--set", "qkv=new", "--json", code=3)
    assert json.loads(wrong.stdout)["failed"]
    assert "takes NAME=VALUE" in cli("priors", "card", file, "--set", "qkv", code=2).stderr
    listed = json.loads(cli("priors", "formats", "--json").stdout)["formats"]
    assert "head_channels" in listed["guided diffusion (ADM) state dicts"]
    assert "deepinv" in cli("priors", "formats").stdout


def test_command_line_asks_for_samples(tmp_path):
    grey = tmp_path / "grey.safetensors"
    one_channel(grey)
    own = ("--set", "head_channels=8")
    assert "give clean ones of their kind with --samples" in cli("priors", "check", grey, *own, code=2).stderr


@pytest.mark.parametrize("channels", [3, 1], ids=["colour", "grey"])
def test_a_loaded_prior_fills_gaps(file, channels):
    """End to end: 40 % of the pixels are missing, and their error falls well below that of the mean."""
    prior = load(file, check=False)
    prior = prior if channels == 3 else prior.for_grey()
    x = dead_leaves(1, 3, 8, seed=77)[:, :, :7]
    x = x if channels == 3 else x.mean(1, keepdim=True)
    seen = torch.rand(1, 7, 8, generator=torch.Generator().manual_seed(1)) < 0.6
    operator = operators.Mask(seen.expand(channels, 7, 8), invdiff.Space((channels, 7, 8)))
    problem = invdiff.Problem.simulate(operator, likelihoods.Gaussian(0.05), x, seed=0)
    posterior = invdiff.sample(problem, prior, "dds", draws=8, seed=0)
    mean = torch.as_tensor(posterior.mean().values.copy()).reshape(x.shape)
    hidden = ~seen.expand(x.shape)
    error, naive = (float((guess - x)[hidden].square().mean().sqrt()) for guess in (mean, x.mean()))
    # Measured: 0.62 and 0.67 of the mean's error; 0.035 and 0.047 where pixels are seen.
    assert error < 0.8 * naive
    assert float((mean - x)[~hidden].square().mean().sqrt()) < 0.06


def test_images_smaller_than_those_of_the_training(file, monkeypatch):
    """High levels of a sound network look wrong there, and are left out; mistaken heads are still found."""
    monkeypatch.setattr(self_test_module, "LARGEST", 4)
    check = load(file).card["check"]
    assert check["images"].endswith(
        "dead leaves, perhaps smaller than in training, so that high levels are not judged"
    )
    assert not any("draws" in line for line in check["lines"])
    assert max(float(line.split()[-1]) for line in check["lines"] if line.startswith("error at")) < 3
    for wrong in ({"qkv": "new"}, {"head_channels": 16}):
        with pytest.raises(InvdiffError, match="does not denoise as it should"):
            load(file, **wrong)
    bound = load(file, check=False).bind(invdiff.Space((3, 4, 4)))
    assert not check_denoiser(bound, dead_leaves(4, 3, 4), similar=True).ok, (
        "or there would be nothing to leave out"
    )
