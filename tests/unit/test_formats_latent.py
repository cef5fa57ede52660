"""Autoencoders of latent diffusion against diffusers' classes, and latent priors from one converted checkpoint."""

import json

import pytest
import torch

import invdiff
from invdiff import InvdiffError, likelihoods, operators, priors, samplers
from invdiff.networks.adm import ADM, ADMConfig
from invdiff.networks.autoencoder import Autoencoder
from invdiff.priors.converting import convert


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def scrambled(network, seed=0):
    g = torch.Generator().manual_seed(seed)
    for key, value in network.state_dict().items():
        size = 0.7 * value[0].numel() ** -0.5 if value.ndim > 1 else 0.1
        value.copy_(torch.randn(value.shape, generator=g) * size + ("norm" in key and key.endswith("weight")))
    return network.eval().requires_grad_(False)


def autoencoder(codes=0, **changes):
    config = {
        "channels": 3,
        "inner": 4,
        "latent": 4,
        "inlet": 32,
        "widths": [32, 64],
        "blocks": 1,
        "attention": [],
    }
    with torch.random.fork_rng():
        return scrambled(Autoencoder(**config | {"codes": codes} | changes))


@pytest.mark.parametrize("changes", [{}, {"codes": 16, "inner": 3, "latent": 3}, {"attention": [1], "blocks": 2}])
def test_layout_is_read_off_the_shapes(changes):
    shapes = {k: tuple(v.shape) for k, v in autoencoder(**changes).state_dict().items()}
    expected = {"channels": 3, "inner": 4, "latent": 4, "inlet": 32, "widths": [32, 64], "blocks": 1}
    assert Autoencoder.layout(shapes) == expected | {"attention": [], "codes": 0} | changes


def as_diffusers(state):
    """Weights by diffusers' names."""
    names = {"conv_in": "conv_in", "norm_out": "conv_norm_out", "conv_out": "conv_out"}
    inner = {"nin_shortcut": "conv_shortcut", "norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v"}
    inner["proj_out"] = "to_out.0"
    out = {}
    for key, value in state.items():
        side, *parts, kind = key.split(".")
        if side in ("encoder", "decoder") and parts[0] in ("down", "up"):
            level = int(parts[1]) if side == "encoder" else 1 - int(parts[1])
            what = {"block": "resnets", "downsample": "downsamplers.0", "upsample": "upsamplers.0"}[parts[2]]
            rest = [inner.get(p, p) for p in parts[3:]]
            place = [side, f"{parts[0]}_blocks", str(level), what, *rest]
        elif side in ("encoder", "decoder") and parts[0] == "mid":
            what = {"block_1": "resnets.0", "block_2": "resnets.1", "attn_1": "attentions.0"}[parts[1]]
            place = [side, "mid_block", what, inner.get(parts[2], parts[2])]
            value = value[:, :, 0, 0] if what == "attentions.0" and value.ndim == 4 else value
        else:
            place = [side, *(names[p] for p in parts)]
        out[".".join((*place, kind))] = value
    return out


def test_the_network_is_that_of_the_reference():
    diffusers = pytest.importorskip("diffusers")
    ours = autoencoder()
    with torch.random.fork_rng():
        theirs = diffusers.AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 2,
            up_block_types=["UpDecoderBlock2D"] * 2,
            block_out_channels=(32, 64),
            latent_channels=4,
            layers_per_block=1,
        ).eval()
    theirs.load_state_dict(as_diffusers(ours.state_dict()), strict=True)
    x, z = noise(3, 3, 16, 24), noise(3, 4, 8, 12)
    with torch.no_grad():
        mean, image = theirs.encode(x).latent_dist.mean, theirs.decode(z).sample
        assert float(mean.std()) > 0.1
        assert float((ours.encode(x) - mean).abs().max()) < 1e-5
        assert float((ours.decode(z) - image).abs().max()) < 1e-5


def checkpoint(path, codes=0, latent=4, scale=0.3):
    config = ADMConfig(inputs=latent, outputs=latent, width=32, multipliers=(1.0, 2.0), blocks=1, attention=(1,))
    with torch.random.fork_rng():
        unet = scrambled(ADM(config))
    stage = autoencoder(codes, inner=latent, latent=latent)
    state = {f"model.diffusion_model.{k}": v for k, v in unet.state_dict().items()}
    state |= {f"first_stage_model.{k}": v for k, v in stage.state_dict().items()}
    state |= {"betas": torch.linspace(0.0015**0.5, 0.0195**0.5, 1000) ** 2}
    state |= {"first_stage_model.loss.logvar": torch.zeros(1)}
    state |= {} if scale is None else {"scale_factor": torch.tensor(scale)}
    torch.save({"state_dict": state, "callbacks": {}}, path)
    unet_file, stage_file = convert(path, weights="raw").files
    return unet_file, stage_file, stage


def test_a_checkpoint_becomes_a_prior_of_images(tmp_path):
    unet, first, stage = checkpoint(tmp_path / "ldm.ckpt")
    prior = priors.load(unet, head_channels=64, first_stage=first)
    image = invdiff.Space((3, 14, 18))
    bound = prior.bind(image)
    # Two levels of the autoencoder and two of the U-Net: multiples of four.
    assert bound.codec.prior.shape == (4, 8, 10)
    z = noise(1, 4, 8, 10)
    decoded = (stage.decode(z / 0.3) + 1) / 2
    torch.testing.assert_close(bound.codec.decode(z), decoded[:, :, 1:15, 1:19])
    x = torch.rand(1, 3, 16, 20, generator=torch.Generator().manual_seed(0))
    whole = prior.bind(invdiff.Space((3, 16, 20)))
    torch.testing.assert_close(whole.codec.encode(x), 0.3 * stage.encode(2 * x - 1))
    assert prior.card["first_stage"] == json.loads(first.with_suffix(".json").read_text())["sha256"]
    problem = invdiff.Problem.simulate(operators.Identity(image), likelihoods.Gaussian(0.1), x[:, :, 1:15, 1:19])
    draws = invdiff.sample(problem, prior, samplers.DPS(steps=2), draws=1, seed=0)
    assert draws.draws.shape[-3:] == (3, 14, 18)


def test_codebook(tmp_path):
    unet, first, stage = checkpoint(tmp_path / "ldm.ckpt", codes=16, latent=3, scale=None)
    with pytest.raises(InvdiffError, match="declare latent_scale="):
        priors.load(unet, head_channels=64, first_stage=first)
    options = {"head_channels": 64, "first_stage": first, "latent_scale": 1.0}
    image = invdiff.Space((3, 16, 16))
    snapped, free = (priors.load(unet, **options, snap=s).bind(image).codec for s in (True, False))
    codes = stage.codebook[torch.arange(64) % 16].T.reshape(1, 3, 8, 8)
    near = codes + 1e-4 * noise(1, 3, 8, 8)
    torch.testing.assert_close(snapped.decode(near), (stage.decode(codes) + 1) / 2)
    torch.testing.assert_close(free.decode(near), (stage.decode(near) + 1) / 2)
    assert not torch.equal(free.decode(near), snapped.decode(near))


def test_what_does_not_fit_is_refused(tmp_path):
    unet, first, _ = checkpoint(tmp_path / "a.ckpt")
    _, other, _ = checkpoint(tmp_path / "b.ckpt", codes=16, latent=3)

    def refused(match, **declared):
        with pytest.raises(InvdiffError, match=match) as caught:
            priors.load(unet, head_channels=64, **declared)
        assert "\n" not in str(caught.value)

    refused("latents of 3 channels", first_stage=other)
    refused("is no first stage", first_stage=unet)
    refused("no prior at", first_stage=tmp_path / "none.safetensors")
    refused("give first_stage= too", latent_scale=1.0)
    first.write_bytes(first.read_bytes()[:-1] + b"\x01")
    refused("not the file of its card", first_stage=first)
