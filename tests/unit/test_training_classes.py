"""Priors with classes: what they learn, against exact posterior means; where classes come from; refusals."""

import dataclasses
import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from invdiff import Space, priors
from invdiff.errors import InvdiffError
from invdiff.training.batches import Batches
from invdiff.training.config import TrainConfig
from invdiff.training.data import read_images, read_labelled
from invdiff.training.source import Source
from invdiff.training.state import TrainState
from invdiff.training.synthesisers import SYNTHESISERS
from invdiff.training.train import train

SIZE, SPREAD = 8, 0.2
PATTERN = 0.5 * np.sign(np.linspace(-1, 1, SIZE))[:, None] * np.ones(SIZE)


def two_classes(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Images ``m_k + 0.2 eps``, with ``m_7 = p`` and ``m_2 = -p``."""
    rng = np.random.default_rng(seed)
    labels = rng.choice([2, 7], n)
    means = np.where(labels == 7, 1.0, -1.0)[:, None, None] * PATTERN
    return (means + SPREAD * rng.standard_normal((n, SIZE, SIZE))).astype(np.float32), labels


def exact(x: torch.Tensor, sigma: float, mean: torch.Tensor) -> torch.Tensor:
    return mean + SPREAD**2 / (SPREAD**2 + sigma**2) * (x - mean)


def recipe(folder: Path, **changes: object) -> TrainConfig:
    images, labels = two_classes(1000, 0)
    np.savez(folder / "two.npz", images=images, label=labels)
    settings: dict = {
        "data": str(folder / "two.npz"),
        "output": str(folder / "out"),
        "name": "two",
        "normalise": "none",
        "channels": 1,
        "widths": (24,),
        "blocks": 1,
        "embedding": 32,
        "condition": "label",
        "condition_dropout": 0.3,
        "sigma_data": 0.54,
        "sigma_min": 0.05,
        "sigma_max": 20.0,
        "p_mean": 0.7,
        "p_std": 1.0,
        "steps": 600,
        "batch": 32,
        "crop": SIZE,
        "late_fraction": 0.0,
        "late_crop": SIZE,
        "learning_rate": 5e-3,
        "warmup": 20,
        "ema": 0.99,
        "scale_jitter": 0.0,
        "augment": False,
        "device": "cpu",
        "threads": 1,
        "validation_images": 20,
    }
    return TrainConfig(**{**settings, **changes})


def test_with_and_without_class_it_denoises_like_the_exact_means(tmp_path: Path) -> None:
    result = train(recipe(tmp_path))
    assert result.weights is not None and result.card is not None and result.curve is not None
    card = json.loads(result.card.read_text())
    assert card["classes"] == ["2", "7"] and card["no_class"] == 2
    # At high noise, the class is worth something.
    gain = dict(
        zip(
            card["denoising_error"]["sigma"],
            np.divide(*map(card["denoising_error"].get, ("rmse", "rmse_no_class"))),
        )
    )
    assert gain[5.0] < 0.8 and gain[0.2] == pytest.approx(1, abs=0.1)

    prior = priors.load(result.weights)
    sigma = 4.0
    clean, _ = two_classes(64, 1)
    x = torch.from_numpy(clean)[:, None]
    x = x + sigma * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    level = torch.full((64,), sigma)
    p = torch.from_numpy(PATTERN).float()
    means = {0: exact(x, sigma, -p), 1: exact(x, sigma, p)}
    odds = torch.sigmoid(2 * (x * p).sum((1, 2, 3)) / (SPREAD**2 + sigma**2))[:, None, None, None]
    mixture = odds * means[1] + (1 - odds) * means[0]

    def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
        return float((found - wanted).square().mean().sqrt())

    # Errors measured 0.13 without the class and 0.03 with it, where the two answers are 0.58 apart.
    given = {k: prior.denoiser(x, level, {"label": torch.full((64,), k)}) for k in (0, 1)}
    free = prior.denoiser(x, level)
    assert off(free, mixture) < 0.2 < off(free, given[0])
    assert all(off(given[k], means[k]) < 0.06 for k in (0, 1))
    assert torch.equal(free, prior.denoiser(x, level, {"label": torch.tensor(2)}))

    # Guided, as declared on the card, and loaded for one class by its name.
    guided = priors.Guided(prior, {"label": torch.tensor(1)}, {"label": torch.tensor(card["no_class"])}, 2.5)
    torch.testing.assert_close(guided.denoiser(x, level), free + 2.5 * (given[1] - free), atol=1e-5, rtol=1e-5)
    only = priors.load(result.weights, label="7")
    torch.testing.assert_close(only.denoiser(x, level), given[1])
    draws = only.sample(8, shape=Space((1, SIZE, SIZE))).draws.values.reshape(8, SIZE, SIZE)
    assert ((draws * PATTERN).sum((1, 2)) > 0).all()
    for label in ("3", 5, -1, True, 1.0):
        with pytest.raises(InvdiffError, match="has the classes 2, 7"):
            priors.load(result.weights, label=label)
    with pytest.raises(InvdiffError, match="nothing declared"):
        priors.load(result.weights, schedule="linear")


@pytest.mark.parametrize("backbone", ["adm", "ddpmpp", "transformer"])
def test_every_backbone_takes_classes(tmp_path: Path, backbone: str) -> None:
    sizes = {"widths": (32,), "head_channels": 16}
    config = recipe(tmp_path, backbone=backbone, loss="flow", steps=30, late_batch=4, **sizes)
    result = train(config)
    assert result.weights is not None
    prior = priors.load(result.weights)
    x, level = torch.zeros(2, 1, SIZE, SIZE), torch.full((2,), 3.0)
    one = prior.denoiser(x, level, {"label": torch.tensor([0, 1])})
    assert not torch.allclose(one[0], one[1], atol=1e-3)


def test_dropout_hides_classes_and_changes_nothing_else(tmp_path: Path) -> None:
    images, labels = two_classes(50, 0)
    index = (labels == 7).astype(int).tolist()
    config = recipe(tmp_path, batch=400)
    shown = Batches(list(images[:, None]), config, index, 2).batch(3)
    plain = Batches(list(images[:, None]), config).batch(3)
    assert plain.label is None and shown.label is not None
    assert all(torch.equal(a, b) for a, b in zip(plain[:3], shown[:3]))
    hidden = shown.label == 2
    assert float(hidden.float().mean()) == pytest.approx(0.3, abs=4 * (0.21 / 400) ** 0.5)
    found = torch.from_numpy((shown.clean.numpy()[:, 0] * PATTERN).sum((1, 2)) > 0)
    assert torch.equal(shown.label[~hidden].bool(), found[~hidden])


def test_resume_and_other_classes(tmp_path: Path) -> None:
    config = recipe(tmp_path, steps=4)
    whole = train(dataclasses.replace(config, output=str(tmp_path / "whole")))
    assert train(config, stop_at=2).interrupted
    rest = train(config)
    assert whole.weights is not None and rest.weights is not None
    assert whole.weights.read_bytes() == rest.weights.read_bytes()
    images, _ = two_classes(60, 0)
    np.savez(tmp_path / "two.npz", images=images, label=np.arange(60) % 3)
    with pytest.raises(ValueError, match="trained with the classes"):
        train(config)
    with pytest.raises(ValueError, match="condition = label"):
        train(dataclasses.replace(config, condition=""))


def test_digits_know_their_class() -> None:
    config = TrainConfig(data="digits", channels=1, images=6, validation_images=4, condition="label")
    source = Source(config, lambda _: None)
    assert source.classes == tuple("0123456789")
    training, held = source.split()
    made = SYNTHESISERS["digits"]
    from invdiff.training.synthetic_digits import digit_image

    for images, held_out in ((training, False), (held, True)):
        assert images.labels is not None and len(set(images.labels)) > 1
        for seed, digit in enumerate(images.labels):
            drawn = digit_image(seed, held_out=held_out, digit=digit)
            assert np.array_equal(drawn, made.image(seed, held_out)[0])
    with pytest.raises(ValueError, match="have no classes"):
        Source(TrainConfig(data="ct", channels=1, condition="label"), lambda _: None)
    state = TrainState(
        dataclasses.replace(config, widths=(8,), crop=32, late_crop=32), torch.device("cpu"), source.classes
    )
    assert state.network.classes == 10


def test_sub_folders_are_classes(tmp_path: Path) -> None:
    from PIL import Image

    for n, name in enumerate(("cat", "dog", "dog", "emu", "emu", "emu")):
        (tmp_path / name).mkdir(exist_ok=True)
        Image.fromarray(np.full((4, 4), 40 * n, np.uint8)).save(tmp_path / name / f"{n}.png")
    (tmp_path / ".hidden").mkdir()
    images, labels, names = read_labelled(tmp_path, 1, "none")
    assert names == ["cat", "dog", "emu"] and labels == [0, 1, 1, 2, 2, 2]
    assert [round(float(x.mean() * 255)) for x in images] == [0, 40, 80, 120, 160, 200]
    # Held-out images come from all over the classes, and from nowhere twice.
    config = TrainConfig(data=str(tmp_path), channels=1, condition="label", validation_images=2, normalise="none")
    source = Source(config, lambda _: None)
    training, held = source.split()
    assert source.classes == ("cat", "dog", "emu") and len(training) == 5 and held.labels == [2]
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "stray.png")
    with pytest.raises(ValueError, match=r"stray\.png lies beside the sub-folders"):
        read_labelled(tmp_path, 1)
    (tmp_path / "stray.png").unlink()
    (tmp_path / "fox").mkdir()
    with pytest.raises(ValueError, match="fox holds no images"):
        read_labelled(tmp_path, 1)


def test_lists_of_classes_in_files(tmp_path: Path) -> None:
    x = np.arange(5 * 16, dtype=np.float32).reshape(5, 4, 4)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["one/images"], file["one/label"] = x, np.array([4, 4, 1, 0, 9])
        file["two/images"], file["two/label"] = x[:1], np.array([1])
    images, labels, names = read_labelled(tmp_path / "a.h5", 1, "none")
    assert names == ["0", "1", "4", "9"] and labels == [2, 2, 1, 0, 3, 1] and np.array_equal(images[5][0], x[0])
    assert len(read_images(tmp_path / "a.h5", 1)) == 6
    np.savez(tmp_path / "b.npz", images=x, label=np.arange(5))
    assert len(read_images(tmp_path / "b.npz", 1)) == 5
    for name, bad in (("short", np.arange(4)), ("real", np.arange(5.0)), ("absent", None)):
        np.savez(tmp_path / f"{name}.npz", images=x, **({} if bad is None else {"label": bad}))
        with pytest.raises(ValueError, match="needs a list 'label' of 5 whole numbers beside images"):
            read_labelled(tmp_path / f"{name}.npz", 1)
    from PIL import Image

    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "x.png")
    with pytest.raises(ValueError, match="says no class; put the images"):
        read_labelled(tmp_path / "x.png", 1)


@pytest.mark.parametrize(
    ("change", "word"),
    [({"condition": "text"}, "condition must be"), ({"condition_dropout": 1.5}, "condition_dropout must lie")],
)
def test_bad_settings(change: dict, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        TrainConfig.from_dict(change)
