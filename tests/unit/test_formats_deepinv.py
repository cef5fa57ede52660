"""deepinv's saved networks: the denoiser against the library's own call, and refusals."""

import pickle

import pytest
import torch
from safetensors.torch import save_file

import invdiff
from invdiff import InvdiffError, priors
from invdiff.networks.adm import ADM, infer_config
from tests.unit.test_formats_adm import SMALL, weights


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def drunet(channels=3):
    from deepinv.models import DRUNet

    with torch.random.fork_rng():
        torch.manual_seed(1)
        return DRUNet(channels, channels, nc=(8, 12, 16, 24), nb=2, pretrained=None).eval()


@pytest.fixture(scope="module")
def network():
    return drunet()


@pytest.fixture(scope="module")
def file(tmp_path_factory, network):
    path = tmp_path_factory.mktemp("deepinv") / "drunet.pth"
    torch.save(network.state_dict(), path)
    return path


def load(path, **declared):
    return priors.load(path, check=False, **declared)


@pytest.mark.parametrize("channels", [1, 3])
def test_drunet_is_the_librarys_call(tmp_path, channels):
    net = drunet(channels)
    torch.save(net.state_dict(), tmp_path / "a.pth")
    prior = load(tmp_path / "a.pth")
    assert (prior.denoiser.sigma_min, prior.denoiser.sigma_max) == pytest.approx((1 / 255, 50 / 255))
    assert prior.card["note"] and prior.denoiser.differentiable == 1 and prior.denoiser.sigma_data == 0.25
    bound = prior.bind(invdiff.Space((channels, 32, 40)))
    x = noise(2, channels, 32, 40)
    with torch.no_grad():
        for sigma in torch.linspace(1 / 255, 50 / 255, 10):
            ours = bound.codec.decode(bound.denoiser(bound.codec.encode(x), sigma))
            assert (ours - net(x, sigma)).abs().max() <= 1e-5


def test_levels_beyond_the_training(file, network):
    x = noise(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(load(file).denoiser(x, 1.0), network(x, 50 / 255), atol=1e-6)
        assert torch.allclose(load(file, sigma_max=2.0).denoiser(x, 1.0), network(x, 1.0), atol=1e-5)
    with pytest.raises(InvdiffError, match="outside='clamp'"):
        load(file, outside="error").denoiser(x, 1.0)


def test_wrapped_and_safetensors(tmp_path, network, file):
    x = noise(1, 3, 32, 32)
    wanted = load(file).denoiser(x, 0.1)
    save_file(network.state_dict(), tmp_path / "a.safetensors")
    assert torch.equal(load(tmp_path / "a.safetensors").denoiser(x, 0.1), wanted)
    torch.save({"epoch": 3, "state_dict": network.state_dict(), "loss": [0.1]}, tmp_path / "ckp_3.pth.tar")
    (tmp_path / "ckp_3.pth.tar").rename(tmp_path / "ckp_3.pth")
    assert torch.equal(load(tmp_path / "ckp_3.pth").denoiser(x, 0.1), wanted)


def tables():
    abar = (1 - torch.linspace(1e-4, 0.02, 1000)).cumprod(0)
    return {"sqrt_1m_alphas_cumprod": (1 - abar).sqrt(), "sqrt_alphas_cumprod": abar.sqrt()}


@pytest.mark.touches_global_rng
def test_diffunet_has_our_names_and_two_tables():
    from deepinv.models import DiffUNet

    with torch.device("meta"):
        theirs = {k: tuple(v.shape) for k, v in DiffUNet(pretrained=None).state_dict().items()}
        assert {k for k in theirs if k.startswith("sqrt")} == set(tables())
        shapes = {k: v for k, v in theirs.items() if not k.startswith("sqrt")}
        ours = ADM(infer_config(shapes)).state_dict()
    assert shapes == {k: tuple(v.shape) for k, v in ours.items()}


def test_diffunet_as_deepinv_saves_it(tmp_path):
    state = weights(SMALL)
    torch.save(state, tmp_path / "plain.pt")
    torch.save({**state, **tables()}, tmp_path / "saved.pt")
    x = noise(1, 3, 8, 8)
    saved = load(tmp_path / "saved.pt", head_channels=16)
    assert torch.equal(saved.denoiser(x, 1.0), load(tmp_path / "plain.pt", head_channels=16).denoiser(x, 1.0))
    assert "DiffUNet" in saved.card["recognised"]
    with pytest.raises(InvdiffError, match="leave out sigma_max"):
        load(tmp_path / "saved.pt", head_channels=16, sigma_max=2.0)
    wrong = tables()
    wrong["sqrt_alphas_cumprod"] = wrong["sqrt_alphas_cumprod"].sqrt()
    torch.save({**state, **wrong}, tmp_path / "wrong.pt")
    with pytest.raises(InvdiffError, match="sqrt_alphas_cumprod is not that of the linear schedule"):
        load(tmp_path / "wrong.pt", head_channels=16)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda s: s.pop("m_up2.1.res.0.weight"), r"lacks the weights m_up2\.1"),
        (lambda s: s.pop("m_body.0.res.0.weight"), r"lacks the weights m_body\.0"),
        (lambda s: s.update(extra=torch.ones(1)), "holds the weights extra"),
        (lambda s: s.update({"m_up3.0.weight": torch.ones(3, 3)}), r"m_up3\.0\.weight has shape"),
        (lambda s: s["m_tail.weight"].fill_(torch.nan), "NaN or infinite"),
        (lambda s: s.update({"m_tail.weight": torch.ones(1, 8, 3, 3)}), "takes 3 channels and gives 1"),
    ],
    ids=["missing", "missing body", "extra", "shape", "nan", "channels"],
)
def test_wrong_weights_are_refused(tmp_path, network, change, match):
    state = {k: v.clone() for k, v in network.state_dict().items()}
    change(state)
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(InvdiffError, match=match):
        load(tmp_path / "a.pth")


def test_options_of_the_other_network(file):
    with pytest.raises(InvdiffError, match="which has no qkv"):
        load(file, qkv="new")
    with pytest.raises(InvdiffError, match="0 < sigma_min < sigma_max"):
        load(file, sigma_min=1.0)


class Hostile:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return exec, (f"open({str(self.mark)!r}, 'w').close()",)


def test_damaged_and_hostile_files_are_refused(tmp_path, file, network):
    path, mark = tmp_path / "a.pth", tmp_path / "mark"
    path.write_bytes(file.read_bytes()[:-2000])
    with pytest.raises(InvdiffError, match="fetch it again"):
        load(path)
    torch.save({**network.state_dict(), "more": Hostile(mark)}, path)
    with pytest.raises(InvdiffError, match="more than weights"):
        load(path)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Hostile(mark)))
    assert mark.exists(), "the trap itself must work"
