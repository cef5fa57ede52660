"""NCSN++ and DDPM++ of score_sde against diffusers' UNet2DModel, and against formulas written here."""

import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional

import invdiff
from invdiff import InvdiffError
from invdiff.networks.ncsnpp import FlatNCSNpp, _change, _Shrink, _sines
from invdiff.priors.formats import build


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def scrambled(network, seed=0):
    """Fill a network with numbers that keep its output near one."""
    g = torch.Generator().manual_seed(seed)
    for key, value in network.state_dict().items():
        size = 0.5 * value[0].numel() ** -0.5 if value.ndim > 1 else 0.1
        value.copy_(torch.randn(value.shape, generator=g) * size)
        if "norm" in key.lower() and key.endswith("weight"):
            value.add_(1)
    return network.eval().requires_grad_(False)


def small(**changes):
    config = {"channels": 1, "width": 8, "widths": [8, 12], "blocks": 2, "attention": [1], "fourier": True}
    config |= {"smooth": True, "image": "residual"} | changes
    with torch.random.fork_rng():
        return scrambled(FlatNCSNpp(**config))


# Attention at every level but the last, at none, at the last alone; pyramids and not; one level.
LAYOUTS = [
    {},
    {"image": "sum", "pyramid": True, "channels": 3, "widths": [8, 8, 12], "attention": [1]},
    {"image": "", "fourier": False, "smooth": False, "attention": [], "blocks": 1},
    {"attention": [0, 2], "widths": [8, 12, 12], "blocks": 1},
    {"attention": [0], "image": "", "widths": [12], "blocks": 3, "width": 12},
]


@pytest.mark.parametrize("changes", LAYOUTS)
def test_layout_is_read_off_the_shapes(changes):
    network = small(**changes)
    layout = FlatNCSNpp.layout({k: tuple(v.shape) for k, v in network.state_dict().items()})
    expected = {"channels": 1, "width": 8, "widths": [8, 12], "blocks": 2, "attention": [1], "fourier": True}
    expected |= {"image": "residual", "pyramid": False} | changes
    expected.pop("smooth", None)
    assert layout == expected


def as_diffusers(state, theirs):
    """Weights by diffusers' names, module by module in the order of the layers."""
    taken = {}
    place = 0

    def parts():
        nonlocal place
        found = {k.split(".", 2)[2]: v for k, v in state.items() if k.startswith(f"all_modules.{place}.")}
        place += 1
        return found

    def plain(name):
        taken.update({f"{name}.{k}": v for k, v in parts().items()})

    def residual(name):
        names = {"GroupNorm_0": "norm1", "Conv_0": "conv1", "Dense_0": "time_emb_proj", "GroupNorm_1": "norm2"}
        names |= {"Conv_1": "conv2", "Conv_2": "conv_shortcut"}
        for key, value in parts().items():
            module, kind = key.split(".")
            taken[f"{name}.{names[module]}.{kind}"] = value

    def attention(name):
        names = {"NIN_0": "to_q", "NIN_1": "to_k", "NIN_2": "to_v", "NIN_3": "to_out.0"}
        for key, value in parts().items():
            module, kind = key.split(".")
            if module == "GroupNorm_0":
                taken[f"{name}.group_norm.{kind}"] = value
            else:
                taken[f"{name}.{names[module]}.{'weight' if kind == 'W' else 'bias'}"] = value.t()

    def merge(name):
        taken.update({f"{name}.{k.removeprefix('Conv_0.')}": v for k, v in parts().items()})

    taken["time_proj.weight"] = parts()["W"]
    for name in ("time_embedding.linear_1", "time_embedding.linear_2", "conv_in"):
        plain(name)
    for i, block in enumerate(theirs.down_blocks):
        for j in range(len(block.resnets)):
            residual(f"down_blocks.{i}.resnets.{j}")
            if hasattr(block, "attentions"):
                attention(f"down_blocks.{i}.attentions.{j}")
        if block.resnet_down is not None:
            residual(f"down_blocks.{i}.resnet_down")
            merge(f"down_blocks.{i}.skip_conv")
    residual("mid_block.resnets.0")
    attention("mid_block.attentions.0")
    residual("mid_block.resnets.1")
    for i, block in enumerate(theirs.up_blocks):
        for j in range(len(block.resnets)):
            residual(f"up_blocks.{i}.resnets.{j}")
        if hasattr(block, "attentions"):
            attention(f"up_blocks.{i}.attentions.0")
        if block.resnet_up is not None:
            plain(f"up_blocks.{i}.skip_norm")
            plain(f"up_blocks.{i}.skip_conv")
            residual(f"up_blocks.{i}.resnet_up")
    plain("conv_norm_out")
    plain("conv_out")
    assert not parts(), "modules are left over"
    return taken


def test_the_network_is_that_of_the_reference(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    names = ["SkipDownBlock2D", "AttnSkipDownBlock2D", "SkipDownBlock2D"]
    with torch.random.fork_rng():
        theirs = diffusers.UNet2DModel(
            sample_size=16,
            center_input_sample=True,
            time_embedding_type="fourier",
            down_block_types=names,
            up_block_types=["SkipUpBlock2D", "AttnSkipUpBlock2D", "SkipUpBlock2D"],
            # At fewer channels diffusers counts the groups of norms in attention otherwise.
            block_out_channels=(64, 128, 128),
            layers_per_block=2,
            mid_block_scale_factor=math.sqrt(2),
            attention_head_dim=None,
            norm_num_groups=None,
            norm_eps=1e-6,
        ).eval()
        ours = FlatNCSNpp(
            channels=3,
            width=64,
            widths=[64, 128, 128],
            blocks=2,
            attention=[1],
            fourier=True,
            smooth=True,
            image="sum",
            pyramid=True,
        )
    scrambled(ours)
    theirs.load_state_dict(as_diffusers(ours.state_dict(), theirs), strict=True)
    sigma = torch.logspace(-2, math.log10(300), 10)
    x = noise(10, 3, 16, 24) * (0.1 + sigma**2).sqrt().reshape(-1, 1, 1, 1)
    with torch.no_grad():
        score = theirs(x, sigma).sample
        assert float(score[0].abs().max()) > 10
        error = ((ours(x, sigma) - score) * sigma.reshape(-1, 1, 1, 1)).abs().amax((1, 2, 3))
        # Raw outputs, before the division by the level: to rounding of the largest value of the input.
        scale = torch.maximum(torch.ones(10), x.abs().amax((1, 2, 3)))
        assert float((error / scale).max()) < 1e-5
    torch.save(
        {"model": checkpoint(ours)["model"] | {"module.sigmas": torch.tensor([378.0, 0.01])}}, tmp_path / "c.pth"
    )
    prior = build(tmp_path / "c.pth", weights="raw", check=False)
    assert (prior.denoiser.sigma_min, prior.denoiser.sigma_max) == pytest.approx((0.01, 378.0))
    with torch.no_grad():
        found = prior.denoiser(x, sigma)
        expected = x + (sigma**2).reshape(-1, 1, 1, 1) * score
        error = (found - expected).abs().amax((1, 2, 3))
        assert float((error / scale / sigma.clamp_min(1)).max()) < 1e-5
    # Data are in [0, 1], and so are the images.
    torch.testing.assert_close(
        prior.bind(invdiff.Space((3, 16, 16))).codec.decode(x[:, :, :, :16]), x[:, :, :, :16]
    )


def upfirdn(x, up, down, before, after):
    """Zeros between pixels, padding, filter, every ``down``-th pixel; one axis at a time, by numpy."""
    taps = np.array([1.0, 3.0, 3.0, 1.0]) / 8
    for axis in (0, 1):
        x = np.moveaxis(x, axis, 0)
        wide = np.zeros((up * x.shape[0], *x.shape[1:]))
        wide[::up] = x
        wide = np.pad(wide, ((before, after), (0, 0)))
        kept = sum(t * wide[k : len(wide) - 3 + k] for k, t in enumerate(taps)) * up
        x = np.moveaxis(kept[::down], 0, axis)
    return x


def test_filters_and_the_residual_pyramid():
    x = noise(1, 1, 6, 8).double()
    np.testing.assert_allclose(
        _change(x, True, True)[0, 0].numpy(), upfirdn(x[0, 0].numpy(), 2, 1, 2, 1), atol=1e-12
    )
    np.testing.assert_allclose(
        _change(x, False, True)[0, 0].numpy(), upfirdn(x[0, 0].numpy(), 1, 2, 1, 1), atol=1e-12
    )
    torch.testing.assert_close(_change(x, True, False), functional.interpolate(x, scale_factor=2))
    torch.testing.assert_close(_change(x, False, False), functional.avg_pool2d(x, 2))
    with torch.random.fork_rng():
        shrink = _Shrink(1, 1).double().requires_grad_(False)
    kernel, bias = shrink.Conv2d_0.weight[0, 0].numpy(), float(shrink.Conv2d_0.bias)
    wide = upfirdn(x[0, 0].numpy(), 1, 1, 2, 2)
    rows, columns = wide.shape[0] - 2, wide.shape[1] - 2
    full = sum(kernel[i, j] * wide[i : i + rows, j : j + columns] for i in range(3) for j in range(3))
    np.testing.assert_allclose(shrink(x)[0, 0].numpy(), full[::2, ::2] + bias, atol=1e-12)


def test_residual_input_pyramid_in_the_encoder():
    """The encoder's trace at the second level, block by block."""
    net = small(blocks=1, attention=[]).double()
    flat = list(net.all_modules)
    x, time = noise(2, 1, 8, 8).double(), torch.tensor([0.5, 20.0], dtype=torch.float64)
    _, traces = net._encode(2 * x - 1, _embedding(net, time), iter(flat[3:]))
    block, down, shrink = flat[4], flat[5], flat[6]
    h = block(flat[3](2 * x - 1), _embedding(net, time))
    expected = (shrink(2 * x - 1) + down(h, _embedding(net, time))) / math.sqrt(2)
    torch.testing.assert_close(traces[2], expected)


def _embedding(net, time):
    first, one, two = list(net.all_modules)[:3]
    angle = time.log()[:, None] * first.W[None, :] * 2 * math.pi
    return functional.silu(two(functional.silu(one(torch.cat([angle.sin(), angle.cos()], dim=1)))))


def test_vp(tmp_path):
    net = small(fourier=False, image="", smooth=False, centred=True).double()
    torch.save({f"module.{k}": v for k, v in net.float().state_dict().items()}, tmp_path / "c.pth")
    with pytest.raises(InvdiffError, match="declare sde='vp'"):
        build(tmp_path / "c.pth")
    d = build(tmp_path / "c.pth", sde="vp").denoiser.to(dtype=torch.float64)
    sigma = torch.logspace(-2.9, 2.1, 10, dtype=torch.float64)
    s = sigma.reshape(-1, 1, 1, 1)
    x = noise(10, 1, 8, 8).double() * (1 + s**2).sqrt()
    # alpha^2 = exp(-9.95 t^2 - 0.1 t): the time by bisection on sigma(t).
    low, high = torch.zeros_like(sigma), torch.ones_like(sigma)
    for _ in range(60):
        t = (low + high) / 2
        above = torch.expm1(9.95 * t**2 + 0.1 * t).sqrt() > sigma
        low, high = torch.where(above, low, t), torch.where(above, t, high)
    expected = x - s * net.double()(x / (1 + s**2).sqrt(), 999 * t)
    assert float((d(x, sigma) - expected).abs().max()) < 1e-5
    # Sines first, from frequency 1 to 1 / 10000.
    w = torch.tensor([10000 ** (-k / 3) for k in range(4)], dtype=torch.float64)
    angle = 999 * t[:, None] * w
    torch.testing.assert_close(_sines(999 * t, 8), torch.cat([angle.sin(), angle.cos()], dim=1))


def checkpoint(net, seed=3):
    """A training state: raw weights under names, averaged ones in a list, frequencies in neither."""
    g = torch.Generator().manual_seed(seed)
    model = {f"module.{k}": v for k, v in net.state_dict().items()}
    shadow = [torch.randn(v.shape, generator=g) / 9 for k, v in model.items() if k != "module.all_modules.0.W"]
    model["module.sigmas"] = torch.logspace(math.log10(378), -2, 50, dtype=torch.float64)
    ema = {"decay": 0.999, "num_updates": 10, "shadow_params": shadow}
    return {"optimizer": {"state": {}}, "model": model, "ema": ema, "step": 10}


def test_averaged_weights_come_in_the_order_of_parameters(tmp_path):
    net = small()
    content = checkpoint(net)
    torch.save(content, tmp_path / "checkpoint_1.pth")
    prior = build(tmp_path / "checkpoint_1.pth")
    held = dict(prior.denoiser.network.named_parameters())
    trained = [k for k in held if k != "all_modules.0.W"]
    # The order of the module's own parameters is the order in which they were averaged.
    for key, value in zip(trained, content["ema"]["shadow_params"], strict=True):
        torch.testing.assert_close(held[key], value)
    torch.testing.assert_close(held["all_modules.0.W"], net.all_modules[0].W)
    assert prior.denoiser.sigma_max == pytest.approx(378)
    raw = build(tmp_path / "checkpoint_1.pth", weights="raw")
    torch.testing.assert_close(raw.denoiser.network.state_dict(), net.state_dict())


def refused(path, match, **declared):
    with pytest.raises(InvdiffError, match=match) as caught:
        build(path, **declared)
    assert "\n" not in str(caught.value)


def test_what_does_not_fit_is_refused(tmp_path):
    path = tmp_path / "c.pth"
    net = small()

    def save(change):
        content = checkpoint(net)
        change(content)
        torch.save(content, path)
        return path

    refused(save(lambda c: c["ema"]["shadow_params"].pop()), "order cannot be told")
    refused(save(lambda c: c["ema"]["shadow_params"].reverse()), "order is another one")
    refused(save(lambda c: c.pop("ema")), "no averaged weights")
    refused(save(lambda c: c["model"].pop("module.sigmas")), "declare sigma_min= and sigma_max=")
    assert build(path, sigma_min=0.01, sigma_max=50).denoiser.sigma_max == 50
    refused(path, "must be 'ema' or 'raw'", weights="net")
    refused(path, "there are 've' and 'vp'", sde="subvp")
    key = "module.all_modules.4.Conv_1.weight"
    refused(save(lambda c: c["model"].pop(key)), "order cannot be told")
    refused(path, "missing|has shape|lacks", weights="raw")
    refused(save(lambda c: c["model"].update({key: torch.zeros(8, 8, 1, 1)})), "has shape", weights="raw")
    refused(save(lambda c: c["model"].update({"module.more": torch.zeros(1)})), "more", weights="raw")
    refused(save(lambda c: c["model"].update({key: math.nan * c["model"][key]})), "NaN", weights="raw")
    save(lambda c: None)
    path.write_bytes(path.read_bytes()[:-3000])
    refused(path, "truncated")
    flat = {k.removeprefix("module."): v.contiguous() for k, v in checkpoint(net)["model"].items()}
    save_file(flat, tmp_path / "c.safetensors")
    assert build(tmp_path / "c.safetensors").card["format"] == "score_sde NCSN++"
    refused(tmp_path / "c.safetensors", "leave out weights", weights="ema")


def test_can_be_differentiated_twice():
    net = small(image="sum", pyramid=True).double()
    x, time = noise(1, 1, 8, 8).double().requires_grad_(), torch.ones(1, dtype=torch.float64)
    with torch.random.fork_rng():
        assert torch.autograd.gradcheck(lambda x: net(x, time), x, fast_mode=True)
        assert torch.autograd.gradgradcheck(lambda x: net(x, time), x, fast_mode=True)
