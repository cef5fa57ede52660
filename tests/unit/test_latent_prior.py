"""The embedded latent prior: training, loading, sizes, and samplers on it."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import invdiff
from invdiff import likelihoods, metrics, operators, priors, samplers
from invdiff.errors import InvdiffError
from invdiff.networks import EDMUNet
from invdiff.networks.compact_autoencoder import CompactAutoencoder
from invdiff.networks.latent_pair import LatentPair
from invdiff.prior import Prior
from invdiff.priors import library
from invdiff.spaces import Space
from invdiff.training.config import TrainConfig
from invdiff.training.latent import LatentConfig, binned, train_latent
from invdiff.training.latent_codec import AutoencoderConfig, CodecState, reconstruction, update
from invdiff.training.synthesisers import SYNTHESISERS
from invdiff.training.synthetic_ct import attenuation_map

TINY = {
    "batch": 2,
    "checkpoint_every": 2,
    "validate_every": 50,
    "late_fraction": 0.0,
    "warmup": 2,
    "device": "cpu",
}


def tiny(folder: Path) -> LatentConfig:
    rng = np.random.default_rng(0)
    grid = np.arange(48) / 48
    waves = [np.sin(2 * np.pi * (a * grid[:, None] + b * grid[None])) for a, b in rng.uniform(0.5, 3, (12, 2))]
    np.save(folder / "waves.npy", 0.5 + 0.5 * np.asarray(waves, np.float32))
    return LatentConfig(
        name="tiny",
        licence="BSD-3-Clause",
        data=str(folder / "waves.npy"),
        output=str(folder / "out"),
        normalise="none",
        latents=24,
        crop=32,
        autoencoder=AutoencoderConfig(widths=(8, 12)),
        codec=TrainConfig(channels=1, steps=40, crop=32, late_crop=32, learning_rate=5e-3, ema=0.9, **TINY),
        denoiser=TrainConfig(
            channels=3, steps=4, crop=8, late_crop=8, widths=(8,), blocks=1, embedding=8, sigma_data=1.0, **TINY
        ),
    )


def crops_of(count: int) -> torch.Tensor:
    return torch.rand(count, 1, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = train_latent(tiny(tmp_path_factory.mktemp("latent")))
    assert path is not None
    return path


# ---- networks ----


def test_latents_see_their_neighbourhood_alone_whatever_the_size() -> None:
    net = AutoencoderConfig(widths=(8, 12)).build(1, 0).double().requires_grad_(False)
    g = torch.Generator().manual_seed(0)
    for weight in net.parameters():  # blocks start as the identity, which sees nothing
        weight.add_(0.1 * torch.randn(weight.shape, generator=g, dtype=weight.dtype))
    x = torch.randn(1, 1, 128, 96, generator=g, dtype=torch.float64)
    z = net.encode(x)
    torch.testing.assert_close(net.encode(x[..., 32:, :])[..., 8:, :], z[..., 16:, :], rtol=0, atol=1e-12)
    torch.testing.assert_close(
        net.decode(z[..., 8:, :])[..., 32:, :], net.decode(z)[..., 64:, :], rtol=0, atol=1e-12
    )
    assert float((net.encode(x[..., 32:, :])[..., 0, :] - z[..., 8, :]).abs().max()) > 1e-6, "the control"


def test_sizes_that_do_not_fit_are_refused() -> None:
    net = AutoencoderConfig().build(1, 0)
    with pytest.raises(ValueError, match="multiples of 4"):
        net.encode(torch.zeros(1, 1, 30, 32))
    with pytest.raises(ValueError, match="positive"):
        CompactAutoencoder(widths=())
    with pytest.raises(ValueError, match="unknown keys"):
        CompactAutoencoder.from_config({"depth": 3})
    with torch.device("meta"), pytest.raises(ValueError, match="do not belong together"):
        LatentPair(net, EDMUNet(channels=2, widths=(8,), embedding=8))


# ---- training ----


def test_the_loss_is_its_formula(tmp_path: Path) -> None:
    config = tiny(tmp_path)
    state = CodecState(config.codec, dataclasses.replace(config.autoencoder, pull=0.3), torch.device("cpu"))
    x = crops_of(2)
    with torch.no_grad():
        z = state.network.encode(2 * x - 1)
        noise = np.random.default_rng([0, 3, 0]).standard_normal(tuple(z.shape), dtype=np.float32)
        e = (state.network.decode(z + 0.05 * torch.from_numpy(noise)) - (2 * x - 1)).numpy()
    edges = np.abs(np.diff(e, axis=2)).mean() + np.abs(np.diff(e, axis=3)).mean()
    wanted = np.abs(e).mean() + edges + 0.15 * float(z.square().mean())
    assert update(state, x) == pytest.approx(wanted, rel=1e-5)


def test_a_resumed_codec_ends_with_the_same_bits(tmp_path: Path) -> None:
    config = tiny(tmp_path)
    crops = crops_of(8).unflatten(0, (4, 2))
    whole, first, second = (CodecState(config.codec, config.autoencoder, torch.device("cpu")) for _ in range(3))
    for x in crops:
        update(whole, x)
    for x in crops[:2]:
        update(first, x)
    first.save(tmp_path / "c.safetensors")
    second.load(tmp_path / "c.safetensors")
    assert second.step == 2
    for x in crops[2:]:
        update(second, x)
    for name, value in whole.network.state_dict().items():
        assert torch.equal(value, second.network.state_dict()[name])
        assert torch.equal(whole.average[name], second.average[name])
    other = CodecState(config.codec, AutoencoderConfig(widths=(8, 8)), torch.device("cpu"))
    with pytest.raises(ValueError, match="choose another output folder"):
        other.load(tmp_path / "c.safetensors")


def test_training_leaves_a_prior_that_loads(trained: Path) -> None:
    card = json.loads(trained.with_suffix(".json").read_text())
    # A constant image has an RMSE of 0.35 here.
    assert card["reconstruction"]["rmse"] < 0.2
    prior = priors.load(trained)
    assert prior.card["check"]["verdict"] == "passed"
    z = np.load(trained.parent / "latents.npy").astype(np.float64)[:24]
    np.testing.assert_allclose(z.mean((0, 2, 3)), 0, atol=2e-3)
    np.testing.assert_allclose(z.std((0, 2, 3)), 1, atol=5e-3)
    bound = prior.bind(Space((1, 48, 48)))
    assert bound.codec is not None and bound.codec.prior.shape == (3, 12, 12)


def test_recipes_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    def refused(text: str, match: str) -> None:
        (tmp_path / "r.toml").write_text(text)
        with pytest.raises(ValueError, match=match):
            LatentConfig.from_file(tmp_path / "r.toml")

    refused("widths = [3]", "unknown keys")
    refused("crop = 100", "multiple of")
    refused("latents = 0", "at least 1")
    refused("[autoencoder]\ndepth = 1", "wrong kind")
    refused("[codec]\nstepz = 1", "unknown key")
    with pytest.raises(ValueError, match="no config file"):
        LatentConfig.from_file(tmp_path / "none.toml")
    with pytest.raises(ValueError, match="real channel"):
        train_latent(LatentConfig(channels=2, output=str(tmp_path)))


def test_binning_takes_means() -> None:
    x = np.arange(30, dtype=np.float32).reshape(1, 5, 6)
    np.testing.assert_array_equal(binned(x, 2), [[[3.5, 5.5, 7.5], [15.5, 17.5, 19.5]]])


# ---- loading ----


def test_damaged_files_are_refused(trained: Path, tmp_path: Path) -> None:
    for suffix in (".safetensors", ".json"):
        shutil.copy(trained.with_suffix(suffix), tmp_path / f"p{suffix}")
    card = json.loads((tmp_path / "p.json").read_text())

    def refused(changes: dict, match: str) -> None:
        (tmp_path / "p.json").write_text(json.dumps({**card, **changes}))
        library._load.cache_clear()
        with pytest.raises(InvdiffError, match=match):
            priors.load(tmp_path / "p.safetensors")

    refused({"sha256": "0" * 64}, "SHA-256")
    refused({"config": {**card["config"], "codec": {**card["config"]["codec"], "blocks": 2}}}, "lacks the weights")
    refused({"config": {"denoiser": card["config"]["denoiser"]}}, "tables codec and denoiser")
    refused({"self_test": {**card["self_test"], "rmse": [1.0] * 4}}, "self-test")
    refused({"self_test": {**card["self_test"], "reconstruction": 1e-3}}, "self-test")
    refused({"latent_scale": [1.0, 1.0]}, "channels")


# ---- the embedded prior ----


@pytest.fixture(scope="module")
def embedded() -> Prior:
    return priors.load("ct-latent").with_scale(1.0)


def held_out(count: int) -> list[np.ndarray]:
    """Maps that neither network has seen, nor the figures on the card."""
    images = (SYNTHESISERS["ct"].image(seed, held_out=True) for seed in range(500, 500 + count))
    return [binned(x, 2).astype(np.float32) for x in images]


def test_the_embedded_prior_is_small_and_tested(embedded: Prior) -> None:
    assert library.path_of("ct-latent").stat().st_size < 16e6
    assert embedded.card["check"]["verdict"] == "passed"
    assert embedded.denoiser.channels == 3
    assert "ct-latent" in library.available()


def test_the_codec_reconstructs_as_its_card_says(embedded: Prior) -> None:
    pair, _, _ = library.verify(library.path_of("ct-latent"))
    found = reconstruction(pair.codec, held_out(8), 32)
    stated = embedded.card["reconstruction"]
    assert abs(found["psnr"] - stated["psnr"]) < 3, "eight images differ from sixty-four, and no more"
    assert found["worst_psnr"] > stated["worst_psnr"] - 3


def test_latents_are_denoised_as_the_card_says(embedded: Prior) -> None:
    stated = embedded.card["denoising_error"]
    x = torch.from_numpy(np.stack([h[:, :64, :64] for h in held_out(8)]))
    codec = embedded.bind(Space((1, 64, 64))).codec
    z = codec.encode(x)
    for sigma, rmse in zip(stated["sigma"], stated["rmse"]):
        noisy = z + sigma * torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
        error = float((embedded.denoiser(noisy, torch.full((len(z),), sigma)) - z).square().mean().sqrt())
        assert error < 1.05 * sigma and error < 1.7 * rmse + 1e-3


@pytest.mark.parametrize("shape", [(1, 96, 160), (1, 50, 70)])
def test_any_size_is_served(embedded: Prior, shape: tuple[int, int, int]) -> None:
    space = Space(shape)
    codec = embedded.bind(space).codec
    assert all(n % 8 == 0 for n in codec.prior.shape[1:])
    x = torch.from_numpy(attenuation_map(3, 160, held_out=True)[None, None, : shape[1], : shape[2]])
    assert metrics.psnr(codec.decode(codec.encode(x)).numpy(), x.numpy(), 1.0) > 22


def test_other_images_are_refused(embedded: Prior) -> None:
    for space in (Space((1, 32, 32), torch.complex64), Space((3, 32, 32)), Space((1, 4, 32, 32))):
        with pytest.raises(InvdiffError, match="1 real channel"):
            embedded.bind(space)


def test_scale_is_the_images(embedded: Prior) -> None:
    """An image in other units has the same latents."""
    x = torch.from_numpy(held_out(1)[0][None, :, :64, :64])
    one, thousand = (embedded.bind(Space((1, 64, 64)), s).codec for s in (1.0, 1000.0))
    torch.testing.assert_close(thousand.encode(1000 * x), one.encode(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        thousand.decode(one.encode(x)), 1000 * one.decode(one.encode(x)), rtol=1e-4, atol=1e-3
    )


def test_resample_fills_in_what_is_missing(embedded: Prior) -> None:
    x = torch.from_numpy(held_out(3)[2][None, :, :64, :64])
    mask = (torch.rand(1, 64, 64, generator=torch.Generator().manual_seed(0)) < 0.3).float()
    problem = invdiff.Problem.simulate(operators.Mask(mask), likelihoods.Gaussian(0.025), x)
    posterior = invdiff.sample(problem, embedded, samplers.ReSample(steps=20), draws=2, seed=0, progress=False)
    mean = np.asarray(posterior.mean())
    assert np.isfinite(mean).all()
    assert metrics.psnr(mean, x.numpy().reshape(mean.shape), 1.0) > 20
