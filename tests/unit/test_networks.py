"""The denoiser network: preconditioning, shapes, locality, configuration."""

import json
from collections.abc import Iterator

import pytest
import torch

from invdiff.networks import EDMUNet


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        yield


def small(seed: int = 0) -> EDMUNet:
    generator = torch.Generator().manual_seed(seed)
    network = EDMUNet(channels=2, widths=(8, 12), blocks=1, embedding=16, sigma_data=0.5)
    for parameter in network.parameters():
        parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return network.eval()


@torch.no_grad()
def test_a_fresh_network_is_the_best_linear_denoiser() -> None:
    # F starts at zero, so D = c_skip x, the Wiener estimate for white data of variance sigma_data^2.
    network = EDMUNet(widths=(8,), blocks=1, embedding=8, sigma_data=0.5)
    x = torch.randn(3, 2, 8, 8)
    sigma = torch.tensor([0.1, 0.5, 3.0])
    expected = x * (0.25 / (0.25 + sigma.square()))[:, None, None, None]
    torch.testing.assert_close(network(x, sigma), expected)


@torch.no_grad()
def test_preconditioning_formula() -> None:
    network = small()
    x, sigma = torch.randn(1, 2, 16, 8), torch.tensor([0.7])
    total = 0.7**2 + 0.5**2
    raw = network.raw(x / total**0.5, sigma.log() / 4)
    expected = 0.5**2 / total * x + 0.7 * 0.5 / total**0.5 * raw
    torch.testing.assert_close(network(x, sigma), expected)


@torch.no_grad()
@pytest.mark.parametrize("size", [(4, 4), (8, 20), (36, 28)])
def test_any_multiple(size: tuple[int, int]) -> None:
    out = small()(torch.randn(2, 2, *size), torch.ones(2))
    assert out.shape == (2, 2, *size)


@torch.no_grad()
def test_rows_do_not_see_each_other() -> None:
    network, x, sigma = small().double(), torch.randn(3, 2, 8, 8).double(), torch.tensor([0.1, 1.0, 5.0]).double()
    together = network(x, sigma)
    alone = torch.cat([network(x[n : n + 1], sigma[n : n + 1]) for n in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_a_crop_sees_what_the_whole_image_sees() -> None:
    # No statistic runs over the image, so far from the crop's border nothing changes.
    network = small().double()
    x, sigma = torch.randn(1, 2, 128, 128).double(), torch.tensor([0.4]).double()
    whole = network(x, sigma)[..., 60:68, 60:68]
    crop = network(x[..., 24:104, 24:104], sigma)[..., 36:44, 36:44]
    torch.testing.assert_close(whole, crop, rtol=1e-9, atol=1e-9)


def test_config_round_trip_through_json() -> None:
    network = small()
    twin = EDMUNet.from_config(json.loads(json.dumps(network.config())))
    twin.load_state_dict(network.state_dict(), strict=True)
    x = torch.randn(1, 2, 8, 8)
    with torch.no_grad():
        assert torch.equal(network(x, torch.ones(1)), twin(x, torch.ones(1)))


def test_gradients_reach_input_and_weights() -> None:
    network = small()
    x = torch.randn(1, 2, 8, 8, requires_grad=True)
    network(x, torch.ones(1)).square().sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    assert all(p.grad is not None for p in network.parameters())


@pytest.mark.parametrize(
    ("shape", "sigma", "word"),
    [
        ((1, 2, 9, 8), (1,), "multiples of 4"),
        ((1, 3, 8, 8), (1,), "real images"),
        ((2, 8, 8), (1,), "real images"),
        ((2, 2, 8, 8), (1,), "sigma must be"),
    ],
)
def test_wrong_shapes_are_named(shape: tuple[int, ...], sigma: tuple[int, ...], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        small()(torch.zeros(shape), torch.ones(sigma))


@pytest.mark.parametrize(
    "config", [{"channels": 0}, {"widths": []}, {"sigma_data": 0.0}, {"depth": 3}, {"widths": 3}]
)
def test_bad_config(config: dict) -> None:
    with pytest.raises(ValueError):
        EDMUNet.from_config(config)
