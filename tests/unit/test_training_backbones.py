"""Architectures that training offers: each learns, is exported, and loads strictly; sizes that do not fit."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from invdiff import Space, priors
from invdiff.errors import InvdiffError
from invdiff.networks import BACKBONES, TrainedNetwork
from invdiff.priors.learned import sha256_file
from invdiff.training.config import TrainConfig
from invdiff.training.train import train

SIZES: dict[str, dict] = {
    "unet": {"widths": (16, 24)},
    "adm": {"widths": (16, 32), "attention": (8,), "head_channels": 16},
    "ddpmpp": {"widths": (16, 32), "attention": (8,)},
    "transformer": {"widths": (48,), "head_channels": 24, "blocks": 2},
}


def network(backbone: str, parametrisation: str = "flow", classes: int = 0, seed: int = 0) -> TrainedNetwork:
    sizes = {"blocks": 1, **SIZES[backbone]}
    if backbone == "transformer":
        sizes["patch"] = 4
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        made = TrainedNetwork(
            backbone=backbone,
            parametrisation=parametrisation,
            channels=1,
            size=16,
            embedding=16,
            sigma_data=0.5,
            sigma_min=0.01,
            sigma_max=20.0,
            classes=classes,
            **sizes,
        )
        for parameter in made.parameters():
            parameter.data.add_(0.1 * torch.randn(parameter.shape))
    return made.eval().requires_grad_(False)


def recipe(folder: Path, backbone: str, **changes: object) -> TrainConfig:
    t = np.arange(24) / 24
    rng = np.random.default_rng(0)
    phases = 2 * np.pi * rng.random((40, 1, 1))
    np.save(folder / "waves.npy", np.cos(2 * np.pi * (2 * t[:, None] + t[None]) + phases).astype(np.float32))
    settings: dict = {
        "data": str(folder / "waves.npy"),
        "output": str(folder / "out"),
        "name": "tiny",
        "normalise": "none",
        "channels": 1,
        "backbone": backbone,
        "blocks": 1,
        "embedding": 16,
        "sigma_data": 0.7,
        "p_mean": -0.3,
        "steps": 80,
        "batch": 16,
        "crop": 16,
        "late_crop": 16,
        "late_batch": 16,
        "warmup": 5,
        "learning_rate": 3e-3,
        "ema": 0.95,
        "validation_images": 4,
        "device": "cpu",
        "threads": 1,
        **SIZES[backbone],
    }
    return TrainConfig(**{**settings, **changes})


@pytest.mark.parametrize("backbone", list(BACKBONES))
def test_every_backbone_learns_and_loads(tmp_path: Path, backbone: str) -> None:
    result = train(recipe(tmp_path, backbone, loss="flow" if backbone == "unet" else "edm"))
    assert result.weights is not None and result.card is not None and result.curve is not None
    sigma = np.array(result.curve["sigma"])
    white = sigma * 0.7 / np.sqrt(sigma**2 + 0.49)
    middle = (sigma > 0.15) & (sigma < 3)
    # An untrained network is the Wiener estimate for white data, at 1; measured 0.40 to 0.80.
    assert (np.array(result.curve["rmse"]) / white)[middle].max() < 0.9
    card = json.loads(result.card.read_text())
    assert card["config"]["backbone"] == backbone and card["recipe"]["backbone"] == backbone
    prior = priors.load(result.weights)
    assert prior.card["check"]["verdict"] == "passed"
    # Odd sizes are padded to what the network takes.
    bound = prior.bind(Space((1, 19, 21)))
    assert bound.codec is not None
    x = bound.codec.prior.randn(2, 0)
    y = bound.denoiser(x, torch.tensor([0.3, 2.0]))
    assert y.shape == x.shape and x.shape[-1] % network(backbone).multiple == 0 and bool(y.isfinite().all())


@pytest.mark.parametrize("backbone", list(BACKBONES))
def test_half_precision(tmp_path: Path, backbone: str) -> None:
    changes = {"loss": "flow", "precision": "bfloat16", "export_dtype": "float16", "steps": 3}
    result = train(recipe(tmp_path, backbone, **changes))
    plain = train(recipe(tmp_path, backbone, **{**changes, "precision": "float32", "output": str(tmp_path / "b")}))
    assert result.curve is not None and plain.curve is not None
    assert result.curve["rmse"] == pytest.approx(plain.curve["rmse"], rel=0.02)
    assert priors.load(result.weights).denoiser.dtype == torch.float32


@pytest.mark.parametrize("parametrisation", ["edm", "flow"])
@pytest.mark.parametrize("backbone", list(BACKBONES))
def test_networks(backbone: str, parametrisation: str) -> None:
    made = network(backbone, parametrisation, classes=3)
    with torch.random.fork_rng(devices=[]):
        twin = TrainedNetwork.from_config(json.loads(json.dumps(made.config())))
    twin.load_state_dict(made.state_dict(), strict=True)
    z = torch.randn(3, 1, 16, 24, generator=torch.Generator().manual_seed(1))
    time, label = torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0, 2, 3])
    y = made(z, time, label)
    assert torch.equal(y, twin.eval()(z, time, label))
    # Rows do not mix; class 3 of three is none; the classes and the levels count.
    torch.testing.assert_close(made(z[1:2], time[1:2], label[1:2]), y[1:2])
    assert torch.equal(made(z, time)[2], y[2]) and not torch.allclose(made(z, time)[0], y[0], atol=1e-3)
    assert not torch.allclose(made(z, time.flip(0), label)[0], y[0], atol=1e-3)
    # Twice differentiable, with the same values.
    leaf = z.clone().requires_grad_()
    out = made(leaf, time, label)
    torch.testing.assert_close(out.detach(), y)
    (first,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), leaf)
    assert bool(second.isfinite().all()) and float(second.abs().max()) > 0


def test_a_flow_sees_its_core_at_unit_variance() -> None:
    made = network("unet", "flow")
    x0, eps = torch.randn(2, 400, 1, 16, 16, generator=torch.Generator().manual_seed(0)).unbind(0)
    seen = []
    made.core.register_forward_pre_hook(lambda _, args: seen.append(args))
    for t in (0.01, 0.5, 0.97):
        made((1 - t) * 0.5 * x0[:8] + t * eps[:8], torch.full((8,), t))
        u, c = seen.pop()
        assert float(u.var()) == pytest.approx(1, rel=0.1)
        assert c.tolist() == pytest.approx([np.log(t / (1 - t)) / 4] * 8, abs=1e-5)


def test_the_transformer_knows_differences_of_places_only() -> None:
    made = network("transformer")
    z = torch.zeros(1, 1, 32, 32)
    # Attention over a shifted pattern on an even ground: what is in the middle moves along.
    z[:, :, 12:20, 12:20] = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    y, moved = made(z, torch.tensor([0.5])), made(z.roll(4, -1), torch.tensor([0.5]))
    assert float((y - y.mean()).abs().max()) > 0.1
    torch.testing.assert_close(made(z.mT, torch.tensor([0.5])).shape, y.shape)
    assert float((moved - y.roll(4, -1))[..., 12:20, 12:28].abs().max()) < 0.05 * float(y.abs().max())


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"backbone": "vit"}, "backbone must be"),
        ({"loss": "score"}, "loss must be"),
        ({"crop": 18}, "crop must be a multiple of 4"),
        ({"backbone": "adm", "crop": 17}, "crop must be a multiple of 2"),
        ({"backbone": "transformer", "widths": (48,), "late_crop": 18}, "late_crop must be a multiple of 4"),
        ({"backbone": "transformer"}, "one number for the transformer"),
        ({"attention": (8,)}, "attention is chosen for adm and ddpmpp"),
        ({"widths": ()}, "one or more positive"),
        ({"patch": 0}, "patch must be positive"),
    ],
)
def test_settings_that_no_network_has(tmp_path: Path, change: dict, word: str) -> None:
    base = dataclasses.asdict(recipe(tmp_path, "unet"))
    with pytest.raises(ValueError, match=word):
        TrainConfig.from_dict({**base, **change})


@pytest.mark.parametrize(
    ("backbone", "change", "word"),
    [
        ("adm", {"attention": (7,)}, r"feature maps, which are \[16, 8\] here"),
        ("adm", {"head_channels": 24}, "head_channels must divide"),
        ("adm", {"widths": (16, 50), "head_channels": 50}, "multiples of 32 always fit"),
        ("ddpmpp", {"embedding": 15}, "embedding must be an even number"),
        ("transformer", {"head_channels": 6}, "multiple of 4 that divides the width 48"),
    ],
)
def test_sizes_that_do_not_fit_each_other(tmp_path: Path, backbone: str, change: dict, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        train(recipe(tmp_path, backbone, **change))
    assert not (tmp_path / "out").exists()


def test_images_that_do_not_fit() -> None:
    for backbone, multiple in (("unet", 4), ("adm", 2), ("ddpmpp", 2), ("transformer", 4)):
        made = network(backbone)
        assert made.multiple == multiple
        with pytest.raises(InvdiffError, match=f"multiples of {multiple}"):
            made(torch.zeros(1, 1, 16, 17), torch.tensor([0.5]))
    with pytest.raises(InvdiffError, match="0 to 2, or 3 for no class"):
        network("unet", classes=3)(torch.zeros(1, 1, 16, 16), torch.tensor([0.5]), torch.tensor([4]))


def test_loading_is_strict(tmp_path: Path) -> None:
    path = train(recipe(tmp_path, "adm", steps=1)).weights
    assert path is not None
    card = path.with_suffix(".json")
    good, text = path.read_bytes(), json.loads(card.read_text())
    tensors = load_file(path)
    name = next(iter(tensors))

    def refused(word: str, **changes: object) -> None:
        card.write_text(json.dumps({**text, "sha256": sha256_file(path), **changes}))
        with pytest.raises(InvdiffError, match=word):
            priors.load(path)

    for change, word in (
        ({k: v for k, v in tensors.items() if k != name}, "lacks the weights"),
        ({**tensors, "extra": torch.zeros(1)}, "does not have"),
        ({**tensors, name: torch.full_like(tensors[name], torch.nan)}, "NaN"),
    ):
        save_file(change, path)
        refused(word)
    path.write_bytes(good)
    config = text["config"]
    refused("unknown keys", config={**config, "depth": 3})
    refused("lacks", config={k: v for k, v in config.items() if k != "attention"})
    refused("Unknown backbone|unknown keys", config={**config, "backbone": "vit"})
    refused("1 to 256 blocks", config={**config, "blocks": 10**12})
    refused("wrong type", config={**config, "blocks": "3"})
    refused("'edm' or 'flow'", config={**config, "parametrisation": "v"})
    refused("wrong type|has shape|No adm network", config={**config, "widths": ["a", "b"]})
    # Weights in the other parametrisation denoise wrongly, which the self-test finds.
    damaged = {k: v + 0.05 for k, v in tensors.items()}
    save_file(damaged, path)
    refused("self-test", config={**config, "parametrisation": "flow"})
