"""Guided diffusion: the network against two others of the same mathematics, and everything that is refused."""

import pickle

import pytest
import torch
from safetensors.torch import save_file

import invdiff
from invdiff import InvdiffError, priors
from invdiff.networks.adm import ADM, ADMConfig, infer_config
from invdiff.priors.formats import guided_diffusion
from invdiff.priors.frames import VP

SMALL = ADMConfig(
    inputs=3,
    outputs=6,
    width=32,
    multipliers=(1.0, 2.0),
    blocks=1,
    attention=(1,),
    head_channels=16,
)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weights(config, seed=1):
    """Random weights without the zeros of a start, which would hide everything."""
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in ADM(config).state_dict().items()}
    g = torch.Generator().manual_seed(seed)
    state = {}
    for key, shape in shapes.items():
        draw = torch.randn(shape, generator=g)
        fan = shape[1:].numel() if len(shape) > 1 else 25
        state[key] = (1 if key.endswith("0.weight") and len(shape) == 1 else 0) + draw / fan**0.5
    return state


def network(config, seed=1):
    with torch.random.fork_rng():
        net = ADM(config).eval().requires_grad_(False)
    net.load_state_dict(weights(config, seed))
    return net


def changed(**changes):
    return ADMConfig(**{**SMALL.__dict__, **changes})


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("adm") / "model.pt"
    torch.save(weights(SMALL), path)
    return path


def load(path, **declared):
    return priors.load(path, check=False, **{"head_channels": 16, **declared})


@pytest.mark.touches_global_rng
def test_equals_deepinv():
    """deepinv's DiffUNet has the names of the published weights: outputs agree at ten times."""
    import deepinv

    theirs = deepinv.models.DiffUNet(pretrained=None).eval()
    state = {k: v for k, v in theirs.state_dict().items() if not k.startswith("sqrt")}
    g = torch.Generator().manual_seed(0)
    for value in state.values():
        if not value.any():
            value.copy_(0.02 * torch.randn(value.shape, generator=g))
    config = infer_config({k: tuple(v.shape) for k, v in state.items()})
    assert (config.blocks, config.attention, config.multipliers) == (1, (4,), (1, 1, 2, 2, 4, 4))
    assert guided_diffusion._preset(config).title.startswith("FFHQ")
    with torch.device("meta"):
        ours = ADM(config)
    ours = ours.eval().requires_grad_(False)
    ours.load_state_dict(state, strict=True, assign=True)
    x = torch.randn(1, 3, 32, 32, generator=g)
    with torch.no_grad():
        for t in torch.linspace(0, 999, 10):
            wanted = theirs.forward_diffusion(x, t[None])
            assert (ours(x, t[None]) - wanted).abs().max() <= 1e-5, t


def diffusers_twin(config, state):
    """The same network as diffusers' class: names and layouts translated."""
    diffusers = pytest.importorskip("diffusers")
    levels = range(len(config.multipliers))
    attends = [level in config.attention for level in levels]
    how = "resnet" if config.resample == "block" else "conv"
    plain = (
        ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if how == "resnet" else ("DownBlock2D", "UpBlock2D")
    )
    twin = diffusers.UNet2DModel(
        in_channels=config.inputs,
        out_channels=config.outputs,
        block_out_channels=[int(m * config.width) for m in config.multipliers],
        down_block_types=["AttnDownBlock2D" if a else plain[0] for a in attends],
        up_block_types=["AttnUpBlock2D" if a else plain[1] for a in reversed(attends)],
        layers_per_block=config.blocks,
        downsample_type=how,
        upsample_type=how,
        resnet_time_scale_shift="scale_shift" if config.scale_shift else "default",
        attention_head_dim=config.head_channels,
        num_class_embeds=config.classes,
        attn_norm_num_groups=32,
        freq_shift=0,
        flip_sin_to_cos=True,
    ).eval()
    out = {}

    def residual(place, name):
        pairs = {"in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj"}
        pairs |= {"out_layers.0": "norm2", "out_layers.3": "conv2", "skip_connection": "conv_shortcut"}
        for old, new in pairs.items():
            for kind in ("weight", "bias"):
                if f"{place}.{old}.{kind}" in state:
                    out[f"{name}.{new}.{kind}"] = state[f"{place}.{old}.{kind}"]

    def attention(place, name):
        for kind in ("weight", "bias"):
            out[f"{name}.group_norm.{kind}"] = state[f"{place}.norm.{kind}"]
            out[f"{name}.to_out.0.{kind}"] = state[f"{place}.proj_out.{kind}"].squeeze(-1)
            rows = state[f"{place}.qkv.{kind}"].squeeze(-1)
            channels = len(rows) // 3
            each = config.head_channels
            if config.qkv == "legacy":
                parts = rows.reshape(channels // each, 3, each, *rows.shape[1:]).transpose(0, 1)
            else:
                parts = rows.reshape(3, channels // each, each, *rows.shape[1:])
            for part, new in zip(parts, ("to_q", "to_k", "to_v")):
                out[f"{name}.{new}.{kind}"] = part.reshape(channels, *rows.shape[1:])

    def resampled(place, name, conv):
        if config.resample == "block":
            residual(place, name)
        else:
            for kind in ("weight", "bias"):
                out[f"{name}.conv.{kind}"] = state[f"{place}.{conv}.{kind}"]

    for kind in ("weight", "bias"):
        for old, new in {"input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out"}.items():
            out[f"{new}.{kind}"] = state[f"{old}.{kind}"]
        for old, new in {"0": "linear_1", "2": "linear_2"}.items():
            out[f"time_embedding.{new}.{kind}"] = state[f"time_embed.{old}.{kind}"]
    if config.classes is not None:
        out["class_embedding.weight"] = state["label_emb.weight"]
    each = config.blocks + 1
    for level in levels:
        for i in range(config.blocks):
            place = f"input_blocks.{1 + level * each + i}"
            residual(f"{place}.0", f"down_blocks.{level}.resnets.{i}")
            if attends[level]:
                attention(f"{place}.1", f"down_blocks.{level}.attentions.{i}")
        if level < levels[-1]:
            place = f"input_blocks.{(level + 1) * each}.0"
            resampled(place, f"down_blocks.{level}.downsamplers.0", "op")
        up = levels[-1] - level
        for i in range(each):
            place = f"output_blocks.{up * each + i}"
            residual(f"{place}.0", f"up_blocks.{up}.resnets.{i}")
            if attends[level]:
                attention(f"{place}.1", f"up_blocks.{up}.attentions.{i}")
        if level:
            place = f"output_blocks.{(up + 1) * each - 1}.{1 + attends[level]}"
            resampled(place, f"up_blocks.{up}.upsamplers.0", "conv")
    residual("middle_block.0", "mid_block.resnets.0")
    attention("middle_block.1", "mid_block.attentions.0")
    residual("middle_block.2", "mid_block.resnets.1")
    twin.load_state_dict(out, strict=True)
    return twin


@pytest.mark.touches_global_rng
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"qkv": "new"},
        {"multipliers": (1.0, 2.0, 3.0), "attention": (0, 2), "blocks": 2, "outputs": 3},
        {"scale_shift": False, "resample": "conv"},
        {"classes": 7},
        {"inputs": 1, "outputs": 2},
    ],
    ids=["legacy", "new", "deep", "conv", "classes", "one channel"],
)
def test_equals_diffusers(changes):
    config = changed(**changes)
    state = weights(config)
    shapes = {k: tuple(v.shape) for k, v in state.items()}
    assert infer_config(shapes, head_channels=config.head_channels, qkv=config.qkv) == config
    ours, twin = network(config), diffusers_twin(config, state)
    x = noise(2, config.inputs, 12, 8)
    label = None if config.classes is None else torch.tensor([3, 6])
    with torch.no_grad():
        for t in torch.linspace(0, 999, 10):
            time = t.expand(2)
            wanted = twin(x, time, class_labels=label).sample
            assert (ours(x, time, label) - wanted).abs().max() <= 1e-5 * wanted.abs().max().clamp(1), t
    other = network(changed(**{**changes, "qkv": "legacy" if config.qkv == "new" else "new"}))
    with torch.no_grad():
        assert (other(x, time, label) - wanted).abs().max() > 1e-2, "the order of attention weights must matter"


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_denoiser_is_the_formula(file, schedule):
    """``D = x - sigma eps(x / sqrt(1 + sigma^2), i)``, ``eps`` the first half of the channels, at ten steps."""
    if schedule == "linear":
        beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
        abar = (1 - beta).cumprod(0)
    else:
        steps = torch.arange(1001, dtype=torch.float64) / 1000
        f = torch.cos((steps + 0.008) / 1.008 * torch.pi / 2) ** 2
        abar = (1 - (1 - f[1:] / f[:-1]).clamp(max=0.999)).cumprod(0)
    net, denoiser = network(SMALL), load(file, schedule=schedule).denoiser
    for i in torch.linspace(0, 999, 10).long():
        sigma = ((1 - abar[i]) / abar[i]).sqrt()
        x = (noise(2, 3, 8, 8) * (1 + sigma)).float()
        eps = net((x / (1 + sigma**2).sqrt()).float(), i.expand(2))[:, :3]
        assert (denoiser(x, sigma) - (x - sigma.float() * eps)).abs().max() <= 1e-5 * (1 + sigma), i


def test_other_numbers_of_steps_keep_the_levels(file):
    short, long = load(file, steps=250).denoiser, load(file).denoiser
    assert short.sigma_max == pytest.approx(long.sigma_max, rel=0.15)
    assert short.sigma_min == pytest.approx(2 * long.sigma_min, rel=0.01)


def test_levels_outside_are_clamped_or_refused(file):
    denoiser, strict = load(file).denoiser, load(file, outside="error").denoiser
    low = denoiser.sigma_min
    x = noise(1, 3, 8, 8)
    with pytest.raises(InvdiffError, match=r"outside='clamp'"):
        strict(x, 0.5 * low)
    eps = network(SMALL)(x / (1 + (0.5 * low) ** 2) ** 0.5, torch.zeros(1))[:, :3]
    assert torch.allclose(denoiser(x, 0.5 * low), x - 0.5 * low * eps, atol=1e-6)
    assert load(file).card["outside"] == "clamp"


def test_safetensors_and_half_precision(file, tmp_path):
    state = weights(SMALL)
    save_file(state, tmp_path / "a.safetensors")
    x = noise(1, 3, 8, 8)
    assert torch.equal(load(tmp_path / "a.safetensors").denoiser(x, 1.0), load(file).denoiser(x, 1.0))
    torch.save({k: v.half() for k, v in state.items()}, tmp_path / "half.pt")
    half = load(tmp_path / "half.pt").denoiser
    assert next(half.network.parameters()).dtype == torch.float32
    assert torch.allclose(half(x, 1.0), load(file).denoiser(x, 1.0), atol=0.02)
    low = load(file, network_dtype=torch.bfloat16).denoiser(x, 1.0)
    assert low.dtype == torch.float32 and torch.allclose(low, load(file).denoiser(x, 1.0), atol=0.2)


def test_classes(tmp_path):
    config = changed(classes=5)
    torch.save(weights(config), tmp_path / "model.pt")
    denoiser = load(tmp_path / "model.pt").denoiser
    x, label = noise(2, 3, 8, 8), torch.tensor([4, 0])
    with pytest.raises(InvdiffError, match="trained with a label for every image"):
        denoiser(x, 1.0)
    with pytest.raises(InvdiffError, match="from 0 to 4"):
        denoiser(x, 1.0, cond={"label": torch.tensor([5, 0])})
    both = denoiser(x, 1.0, cond={"label": label})
    assert torch.allclose(load(tmp_path / "model.pt", label=4).denoiser(x, 1.0)[0], both[0], atol=1e-6)
    assert not torch.allclose(load(tmp_path / "model.pt", label=0).denoiser(x, 1.0)[0], both[0], atol=1e-3)
    with pytest.raises(InvdiffError, match="label"):
        network(config)(x, torch.ones(2))


def test_second_derivatives(file):
    denoiser = load(file).to(dtype=torch.float64).denoiser
    x, v = noise(1, 3, 4, 4).double().requires_grad_(), noise(1, 3, 4, 4, seed=1).double()
    sigma = torch.tensor([0.8], dtype=torch.float64)

    def gradient(x):
        return torch.autograd.grad((denoiser(x, sigma) * v).sum(), x, create_graph=True)[0]

    (second,) = torch.autograd.grad(gradient(x).sin().sum(), x)
    up, down = (gradient(x + h * v).sin().sum().detach() for h in (1e-5, -1e-5))
    assert float((up - down) / 2e-5) == pytest.approx(float((second * v).sum()), rel=1e-6)


# Millions of weights as published, channels per head, order of attention weights, largest level.
PUBLISHED = {
    "FFHQ 256 (ffhq_10m)": (94, 64, "legacy", 157.4),
    "ImageNet 256 unconditional, or LSUN": (553, 64, "legacy", 157.4),
    "ImageNet 256 conditional": (554, 64, "legacy", 157.4),
    "ImageNet 512 conditional": (559, 64, "legacy", 157.4),
    "ImageNet 128 conditional": (422, None, "legacy", 157.4),
    "ImageNet 64 conditional": (296, 64, "new", 20291),
    "AAPM CT 256 of DDS": (None, 64, "legacy", 157.4),
    "fastMRI knee 320 of DDS": (None, 64, "legacy", 157.4),
}


@pytest.mark.parametrize("preset", guided_diffusion.PRESETS, ids=lambda p: p.title)
def test_published_networks_are_known_by_their_sizes(preset):
    """Built from its entry without memory, a published network is recognised, with its number of weights."""
    width, blocks, multipliers, attention, inputs, outputs, classes, scale_shift, resample = preset.sizes
    config = ADMConfig(
        inputs=inputs,
        outputs=outputs,
        width=width,
        multipliers=multipliers,
        blocks=blocks,
        attention=attention,
        classes=classes,
        scale_shift=scale_shift,
        resample=resample,
        head_channels=preset.head_channels,
        heads=preset.heads,
    )
    with torch.device("meta"):
        net = ADM(config)
    found = infer_config({k: tuple(v.shape) for k, v in net.state_dict().items()})
    assert guided_diffusion._preset(found) is preset
    count, heads, qkv, highest = PUBLISHED[preset.title]
    assert count in (None, round(sum(p.numel() for p in net.parameters()) / 1e6))
    assert (preset.head_channels, preset.qkv) == (heads, qkv)
    assert VP.from_betas(preset.schedule).sigma_max == pytest.approx(highest, rel=1e-3)


def test_one_scale_per_case(file):
    """Images of two cases in [0, 1] and [0, 3]: the offset of the range is scaled with them."""
    prior = load(file)
    codec = prior.bind(invdiff.Space((3, 8, 8)), torch.tensor([1.0, 3.0])).codec
    ends = codec.decode(torch.stack([torch.ones(3, 8, 8), torch.ones(3, 8, 8)]))
    assert ends[0].eq(1).all() and ends[1].eq(3).all()
    assert codec.decode(-torch.ones(2, 3, 8, 8)).abs().max() == 0
    torch.testing.assert_close(codec.encode(ends), torch.ones(2, 3, 8, 8))


def test_images_and_complex_images(tmp_path):
    torch.save(weights(changed(inputs=2, outputs=4)), tmp_path / "two.pt")
    prior = load(tmp_path / "two.pt")
    assert prior.scale is None, "the scale of complex images is read off the data"
    codec = prior.bind(invdiff.Space((1, 9, 8), torch.complex64)).codec
    assert codec.prior.shape == (2, 10, 8)
    with pytest.raises(InvdiffError, match="no range with an offset"):
        ranged = load(tmp_path / "two.pt", network_range=(-1, 1), image_range=(0, 1))
        ranged.bind(invdiff.Space((1, 8, 8), torch.complex64))


def broken(tmp_path, change):
    state = weights(SMALL)
    change(state)
    torch.save(state, tmp_path / "model.pt")
    return tmp_path / "model.pt"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda s: s.pop("input_blocks.1.0.in_layers.0.weight"), "lacks the weights input_blocks"),
        (lambda s: s.update(extra=torch.ones(1)), "holds the weights extra"),
        (lambda s: s.update({"out.0.bias": torch.ones(5)}), r"out\.0\.bias has shape \(5,\)"),
        (lambda s: s["out.0.bias"].fill_(torch.inf), r"infinite values in out\.0\.bias"),
        (lambda s: s.pop("input_blocks.1.0.in_layers.2.weight"), "in part only"),
        (lambda s: s.update({"out.2.weight": torch.ones(4, 32, 3, 3)}), "gives 4"),
    ],
    ids=["missing", "extra", "shape", "infinite", "in part", "outputs"],
)
def test_wrong_weights_are_refused(tmp_path, change, match):
    with pytest.raises(InvdiffError, match=match):
        load(broken(tmp_path, change))


def test_what_must_be_declared(file):
    with pytest.raises(InvdiffError, match=r"declare head_channels="):
        priors.load(file)
    with pytest.raises(InvdiffError, match="exclude each other"):
        load(file, heads=2)
    with pytest.raises(InvdiffError, match="does not divide"):
        load(file, head_channels=48)
    with pytest.raises(InvdiffError, match="'legacy' or 'new'"):
        load(file, qkv="old")
    with pytest.raises(InvdiffError, match="Unknown schedule 'sqrt'"):
        load(file, schedule="sqrt")
    two = priors.load(file, heads=4, check=False).denoiser
    assert torch.equal(two(noise(1, 3, 8, 8), 1.0), load(file).denoiser(noise(1, 3, 8, 8), 1.0))


class Hostile:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return exec, (f"open({str(self.mark)!r}, 'w').close()",)


def test_damaged_and_hostile_files_are_refused(tmp_path, file):
    path, mark = tmp_path / "model.pt", tmp_path / "mark"
    path.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(InvdiffError, match="fetch it again"):
        load(path)
    torch.save({**weights(SMALL), "more": Hostile(mark)}, path)
    with pytest.raises(InvdiffError, match="more than weights"):
        load(path)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Hostile(mark)))
    assert mark.exists(), "the trap itself must work"
