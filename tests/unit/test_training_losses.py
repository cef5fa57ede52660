"""Losses of training: both learn the denoiser of a Gaussian field, whose exact one is a Wiener filter."""

import dataclasses
import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from invdiff import Space, priors
from invdiff.networks import EDMUNet
from invdiff.priors.learned import denoiser_of
from invdiff.priors.parametrisation import ParametrisedDenoiser
from invdiff.training.batches import Batches
from invdiff.training.config import TrainConfig
from invdiff.training.state import TrainState
from invdiff.training.train import train

SIZE = 16


def spectrum() -> np.ndarray:
    """Variance of every Fourier mode of a periodic field with variance 0.25 per pixel."""
    k = np.fft.fftfreq(SIZE) * SIZE
    power = np.exp(-(k[:, None] ** 2 + k[None] ** 2) / 8) + 0.01
    return 0.25 * power / power.mean()


def field(n: int, seed: int) -> np.ndarray:
    white = np.random.default_rng(seed).standard_normal((n, SIZE, SIZE))
    return np.fft.ifft2(np.fft.fft2(white) * np.sqrt(spectrum())).real.astype(np.float32)


def wiener(x: torch.Tensor, sigma: float) -> torch.Tensor:
    power = torch.from_numpy(spectrum())
    return torch.fft.ifft2(torch.fft.fft2(x.double()) * power / (power + sigma**2)).real.float()


def recipe(folder: Path, **changes: object) -> TrainConfig:
    np.save(folder / "field.npy", field(2000, 0))
    settings: dict = {
        "data": str(folder / "field.npy"),
        "output": str(folder / "out"),
        "name": "field",
        "normalise": "none",
        "channels": 1,
        "widths": (24, 32),
        "blocks": 1,
        "embedding": 32,
        "sigma_data": 0.5,
        "sigma_min": 0.01,
        "sigma_max": 20.0,
        "p_mean": -0.5,
        "steps": 250,
        "batch": 32,
        "crop": SIZE,
        "late_fraction": 0.0,
        "late_crop": SIZE,
        "learning_rate": 3e-3,
        "warmup": 20,
        "ema": 0.99,
        "scale_jitter": 0.0,
        "device": "cpu",
        "threads": 1,
        "validation_images": 4,
    }
    return TrainConfig(**{**settings, **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("losses")


@cache
def errors(folder: Path, loss: str) -> dict[float, float]:
    """RMSE of the trained prior over that of the exact denoiser, on 64 fields that training never saw."""
    result = train(recipe(folder, loss=loss, output=str(folder / loss)))
    denoiser = priors.load(result.weights).denoiser
    clean = torch.from_numpy(field(64, 1))[:, None]
    rng = torch.Generator().manual_seed(0)
    out = {}
    for sigma in (0.1, 0.3, 1.0, 3.0):
        noisy = clean + sigma * torch.randn(clean.shape, generator=rng)
        found = (denoiser(noisy, torch.full((64,), sigma)) - clean).square().mean().sqrt()
        exact = (wiener(noisy, sigma) - clean).square().mean().sqrt()
        out[sigma] = float(found / exact)
    return out


@pytest.mark.parametrize("loss", ["edm", "flow"])
def test_a_trained_prior_denoises_like_the_exact_one(folder: Path, loss: str) -> None:
    # Measured 1.007 to 1.043; a network that takes the pixels for independent has 1.09, 1.28, 1.20, 1.04.
    assert max(errors(folder, loss).values()) < 1.07


def test_the_card_of_a_flow(folder: Path) -> None:
    config = recipe(folder, loss="flow", output=str(folder / "card"), steps=3)
    result = train(config)
    assert result.weights is not None and result.card is not None
    card = json.loads(result.card.read_text())
    assert card["format"] == "invdiff-trained/1" and card["config"]["parametrisation"] == "flow"
    prior = priors.load(result.weights)
    denoiser = prior.denoiser
    assert isinstance(denoiser, ParametrisedDenoiser) and denoiser.parametrisation == "flow"
    assert (denoiser.sigma_min, denoiser.sigma_max, denoiser.sigma_data) == (0.01, 20.0, 0.5)
    assert prior.card["check"]["verdict"] == "passed"
    # What was trained is what is loaded.
    state = TrainState(config, torch.device("cpu"))
    state.load(Path(config.output) / "checkpoint.safetensors")
    x, sigma = torch.randn(3, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(0)), torch.tensor([0.1, 1, 9])
    assert torch.equal(denoiser_of(state.averaged())(x, sigma), denoiser(x, sigma))
    posterior = prior.sample(2, shape=Space((1, 19, 13)))
    assert posterior.draws.shape[-2:] == (19, 13) and np.isfinite(posterior.draws.values).all()


def test_the_loss_of_a_flow_is_that_of_its_velocity(folder: Path) -> None:
    state = TrainState(recipe(folder, loss="flow"), torch.device("cpu"))
    for parameter in state.network.parameters():
        parameter.data.add_(0.05)
    batch = Batches(list(field(50, 0)[:, None]), state.config).batch(0)
    clean, sigma, noise, _ = batch
    t = sigma / (1 + sigma)
    share = t[:, None, None, None]
    velocity = state.network((1 - share) * clean + share * noise, t)
    expected = (velocity - (noise - clean)).square().mean()
    assert state.update(batch) == pytest.approx(expected.item(), rel=1e-4)


def test_the_default_update_is_weighted_denoising_by_adam(folder: Path) -> None:
    config = recipe(folder)
    state = TrainState(config, torch.device("cpu"))
    assert isinstance(state.network, EDMUNet)
    with torch.random.fork_rng(devices=[]):
        twin = EDMUNet(1, (24, 32), 1, 32, 0.5)
    twin.load_state_dict(state.network.state_dict())
    optimiser = torch.optim.Adam(twin.parameters(), lr=3e-3 / 20, betas=(0.9, 0.99), foreach=True)
    batch = Batches(list(field(50, 0)[:, None]), config).batch(0)
    clean, sigma, noise, _ = batch
    denoised = twin(clean + sigma[:, None, None, None] * noise, sigma)
    weight = (sigma**2 + 0.5**2) / (sigma * 0.5) ** 2
    loss = (weight[:, None, None, None] * (denoised - clean).square()).mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(twin.parameters(), config.clip)
    optimiser.step()
    assert state.update(batch) == loss.item()
    assert all(torch.equal(a, b) for a, b in zip(twin.state_dict().values(), state.network.state_dict().values()))


def test_a_run_resumes_with_its_own_loss_only(folder: Path) -> None:
    config = recipe(folder, loss="flow", output=str(folder / "resumed"), steps=4)
    whole = train(dataclasses.replace(config, output=str(folder / "whole")))
    assert train(config, stop_at=2).interrupted
    with pytest.raises(ValueError, match="loss = flow"):
        train(dataclasses.replace(config, loss="edm"))
    rest = train(config)
    assert whole.weights is not None and rest.weights is not None
    assert whole.weights.read_bytes() == rest.weights.read_bytes()


def test_a_prior_of_drawn_images_is_checked_on_such(folder: Path) -> None:
    from typer.testing import CliRunner

    from invdiff.cli.app import app

    sizes = {"crop": 32, "late_crop": 32, "batch": 4, "images": 8, "normalise": "p99", "validation_images": 2}
    weights = train(
        recipe(folder, data="digits", loss="flow", steps=2, output=str(folder / "digits"), **sizes)
    ).weights
    found = CliRunner().invoke(app, ["priors", "check", str(weights), "--json"])
    # Two steps teach nothing, which the check must find.
    assert found.exit_code == 3 and any("error at sigma" in name for name in json.loads(found.stdout)["failed"])
    assert CliRunner().invoke(app, ["priors", "verify", str(weights)]).exit_code == 0
