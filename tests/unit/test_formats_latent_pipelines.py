"""Latent pipelines of diffusers: denoiser and codec against the library's own networks, and refusals."""

import json
import sys

import numpy as np
import pytest
import torch

import invdiff
from invdiff import InvdiffError, likelihoods, operators, priors, samplers

diffusers = pytest.importorskip("diffusers")

KL = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
    "latent_channels": 4,
}
UNET = {
    "sample_size": 16,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 8,
}
TEXT = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 12,
}
XL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 10,
}
MM = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 10,
    "pos_embed_max_size": 12,
}
TABLE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
IMAGE = invdiff.Space((3, 32, 32))


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(cls, **config):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        network = cls(**config).eval().requires_grad_(False)
    g = torch.Generator().manual_seed(5)
    # Layers that start at zero would hide what reaches them.
    for key, value in network.state_dict().items():
        if value.ndim > 1 and float(value.abs().max()) == 0:
            value.copy_(0.1 * torch.randn(value.shape, generator=g))
        assert value.numel() < 10**6, key
    return network


def write(folder, pipeline, **parts):
    """A pipeline's folder; parts without a class of diffusers' are left out."""
    index = {"_class_name": pipeline, "_diffusers_version": diffusers.__version__}
    for name, part in parts.items():
        part.save_pretrained(folder / name)
        index[name] = ["diffusers", type(part).__name__]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def edit(path, drop=(), **changes):
    found = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in found.items() if k not in drop}))


def load(folder, **declared):
    return priors.load(folder, check=False, **declared)


def sd(folder, scheduler=None, **changes):
    parts = {
        "unet": make(diffusers.UNet2DConditionModel, **UNET, **TEXT, **changes),
        "vae": make(diffusers.AutoencoderKL, **KL, scaling_factor=0.4),
        "scheduler": scheduler or diffusers.PNDMScheduler(**TABLE, skip_prk_steps=True),
    }
    return write(folder, "StableDiffusionPipeline", **parts), parts


def xl(folder):
    parts = {
        "unet": make(diffusers.UNet2DConditionModel, **UNET, **TEXT, **XL),
        "vae": make(diffusers.AutoencoderKL, **KL, scaling_factor=0.13025),
        "scheduler": diffusers.EulerDiscreteScheduler(**TABLE),
    }
    return write(folder, "StableDiffusionXLPipeline", **parts), parts


def sd3(folder, **scaling):
    scaling = {"scaling_factor": 1.5305, "shift_factor": 0.0609, **scaling}
    free = {"use_quant_conv": False, "use_post_quant_conv": False}
    parts = {
        "transformer": make(diffusers.SD3Transformer2DModel, **MM),
        "vae": make(diffusers.AutoencoderKL, **KL, **free, **scaling),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    }
    return write(folder, "StableDiffusion3Pipeline", **parts), parts


def ldm(folder):
    blocks = {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    stage = {**KL, "latent_channels": 3, "num_vq_embeddings": 16, "scaling_factor": 1.0}
    parts = {
        "unet": make(diffusers.UNet2DModel, **UNET, **blocks, in_channels=3, out_channels=3),
        "vqvae": make(diffusers.VQModel, **stage),
        "scheduler": diffusers.DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.0015, beta_end=0.0195),
    }
    return write(folder, "LDMPipeline", **parts), parts


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return sd(tmp_path_factory.mktemp("sd"))


EMBEDDINGS, POOLED = noise(1, 5, 12, seed=7), noise(1, 10, seed=8)


def levels(scheduler):
    """Every hundredth step of the scheduler's own table, and its level."""
    abar = scheduler.alphas_cumprod.double()
    return [(i, float(((1 - abar[i]) / abar[i]).sqrt())) for i in range(0, 1000, 100)]


@torch.no_grad()
def agrees(prior, wanted, grid, channels=4):
    assert len(grid) == 10
    for time, sigma in grid:
        x = (1 + sigma) * noise(2, channels, 16, 16)
        found = prior.denoiser(x, torch.tensor([sigma, sigma], dtype=torch.float64))
        assert float((found - wanted(x, sigma, time)).abs().max()) <= 1e-5 * (1 + sigma)


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction"])
def test_stable_diffusion(tmp_path, predicts):
    scheduler = diffusers.DDIMScheduler(**TABLE, prediction_type=predicts)
    folder, parts = sd(tmp_path, scheduler)
    prior = load(folder, embeddings=EMBEDDINGS[0])

    def wanted(x, sigma, time):
        c = (1 + sigma**2) ** -0.5
        out = parts["unet"](c * x, time, encoder_hidden_states=EMBEDDINGS.expand(2, -1, -1)).sample
        return x - sigma * out if predicts == "epsilon" else c**2 * x - sigma * c * out

    agrees(prior, wanted, levels(scheduler))
    assert prior.denoiser.sigma_max == pytest.approx(14.61, abs=0.01)
    assert prior.card["recognised"] == (
        "diffusers StableDiffusionPipeline: UNet2DConditionModel and AutoencoderKL"
    )


@pytest.mark.parametrize("ids", [None, (64, 48, 3, 4, 32, 32)])
def test_sdxl(tmp_path, ids):
    folder, parts = xl(tmp_path)
    prior = load(folder, embeddings=EMBEDDINGS, pooled=POOLED, time_ids=ids)
    numbers = torch.tensor(ids or (32, 32, 0, 0, 32, 32), dtype=torch.float32)
    added = {"text_embeds": POOLED.expand(2, -1), "time_ids": numbers.expand(2, -1)}

    def wanted(x, sigma, time):
        z = x / (1 + sigma**2) ** 0.5
        text = EMBEDDINGS.expand(2, -1, -1)
        return x - sigma * parts["unet"](z, time, encoder_hidden_states=text, added_cond_kwargs=added).sample

    agrees(prior, wanted, levels(parts["scheduler"]))


def test_sd3(tmp_path):
    folder, parts = sd3(tmp_path)
    prior = load(folder, embeddings=EMBEDDINGS, pooled=POOLED)

    def wanted(x, sigma, time):
        t = sigma / (1 + sigma)
        z, text = x / (1 + sigma), EMBEDDINGS.expand(2, -1, -1)
        at = torch.full((2,), 1000 * t)
        return z - t * parts["transformer"](z, text, POOLED.expand(2, -1), at).sample

    agrees(prior, wanted, [(None, float(s)) for s in torch.logspace(-2, 1.5, 10)])
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    codec = prior.bind(IMAGE).codec
    mean = parts["vae"].encode(2 * x - 1).latent_dist.mean
    torch.testing.assert_close(codec.encode(x), 1.5305 * (mean - 0.0609))
    z = noise(1, 4, 16, 16)
    torch.testing.assert_close(codec.decode(z), (parts["vae"].decode(z / 1.5305 + 0.0609).sample + 1) / 2)
    with pytest.raises(InvdiffError, match="at most 48 x 48"):
        prior.bind(invdiff.Space((3, 52, 32)))


def test_unconditional_latents_of_a_codebook(tmp_path):
    folder, parts = ldm(tmp_path)
    prior = load(folder)

    def wanted(x, sigma, time):
        return x - sigma * parts["unet"](x / (1 + sigma**2) ** 0.5, time).sample

    agrees(prior, wanted, levels(parts["scheduler"]), 3)
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    vae, z = parts["vqvae"], 0.1 * noise(1, 3, 16, 16)
    snapped, free = prior.bind(IMAGE).codec, load(folder, snap=False).bind(IMAGE).codec
    torch.testing.assert_close(snapped.encode(x), vae.encode(2 * x - 1).latents)
    torch.testing.assert_close(snapped.decode(z), (vae.decode(z).sample + 1) / 2)
    torch.testing.assert_close(free.decode(z), (vae.decode(z, force_not_quantize=True).sample + 1) / 2)
    assert float((snapped.decode(z) - free.decode(z)).abs().max()) > 1e-3
    with pytest.raises(InvdiffError, match="takes no embeddings"):
        load(folder, embeddings=EMBEDDINGS)


def test_the_codec_pads_and_scales(plain):
    folder, parts = plain
    prior = load(folder, embeddings=EMBEDDINGS)
    codec = prior.bind(invdiff.Space((3, 30, 26))).codec
    assert codec.prior.shape == (4, 16, 14)
    z, vae = noise(1, 4, 16, 14), parts["vae"]
    torch.testing.assert_close(codec.decode(z), ((vae.decode(z / 0.4).sample + 1) / 2)[:, :, 1:31, 1:27])
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    other = load(folder, image_range=(0, 255), latent_scale=0.5).bind(IMAGE).codec
    wanted = 0.5 * vae.encode(2 * x - 1).latent_dist.mean
    torch.testing.assert_close(other.encode(255 * x), wanted, rtol=1e-4, atol=1e-5)
    for space in (invdiff.Space((1, 32, 32)), invdiff.Space((3, 32, 32), torch.complex64), invdiff.Space((3, 32))):
        with pytest.raises(InvdiffError, match="real images"):
            prior.bind(space)


def test_latents_with_a_mean_and_a_spread(tmp_path):
    folder, parts = sd(tmp_path)
    mean, std = [0.1, 0.2, -0.3, 0.4], [1.0, 2.0, 3.0, 4.0]
    edit(folder / "vae" / "config.json", latents_mean=mean, latents_std=std)
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    shift, spread = (torch.tensor(v).reshape(4, 1, 1) for v in (mean, std))
    wanted = 0.4 * (parts["vae"].encode(2 * x - 1).latent_dist.mean - shift) / spread
    torch.testing.assert_close(load(folder).bind(IMAGE).codec.encode(x), wanted)
    edit(folder / "vae" / "config.json", drop=["latents_std"])
    with pytest.raises(InvdiffError, match="in part"):
        load(folder)


def test_guidance_and_gradients_of_the_prompt(plain):
    """``D_0 + w (D_c - D_0)``, and embeddings can be optimised, as a condition of all images or of a call."""
    folder, _ = plain
    null = noise(1, 5, 12, seed=9)
    free, x, sigma = load(folder).denoiser, noise(2, 4, 16, 16), torch.tensor([0.7, 2.0])
    with torch.no_grad():
        d, d0 = (free(x, sigma, cond={"embeddings": e}) for e in (EMBEDDINGS, null))
        guided = load(folder, embeddings=EMBEDDINGS, negative=null, guidance=7.5).denoiser(x, sigma)
    assert float((d - d0).abs().max()) > 1e-3
    torch.testing.assert_close(guided, d0 + 7.5 * (d - d0), rtol=1e-4, atol=1e-4)
    leaf = EMBEDDINGS.clone().requires_grad_()
    (once,) = torch.autograd.grad(load(folder, embeddings=leaf).denoiser(x, sigma).square().sum(), leaf)
    (again,) = torch.autograd.grad(free(x, sigma, cond={"embeddings": leaf}).square().sum(), leaf)
    torch.testing.assert_close(once, again)
    assert once.abs().max() > 0


@pytest.mark.parametrize("family", [sd, sd3])
def test_second_derivatives_by_plain_attention(tmp_path, family):
    folder, _ = family(tmp_path)
    given = {"embeddings": EMBEDDINGS} | ({"pooled": POOLED} if family is sd3 else {})
    fused, math = (load(folder, **given, attention=a).denoiser for a in ("fused", "math"))
    assert (fused.differentiable, math.differentiable) == (1, 2)
    x, sigma = noise(1, 4, 8, 8).requires_grad_(), torch.tensor([0.8])
    torch.testing.assert_close(fused(x, sigma), math(x, sigma), rtol=1e-4, atol=1e-5)
    (first,) = torch.autograd.grad(math(x, sigma).sin().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sin().sum(), x)
    assert torch.isfinite(second).all() and second.abs().max() > 0


@pytest.mark.parametrize("family", [sd, xl, sd3, ldm])
def test_half_precision_of_the_network(tmp_path, family):
    folder, _ = family(tmp_path)
    given = {} if family is ldm else {"embeddings": EMBEDDINGS}
    given |= {"pooled": POOLED} if family in (xl, sd3) else {}
    x, sigma = noise(2, 3 if family is ldm else 4, 16, 16), torch.tensor([0.7, 2.0])
    with torch.no_grad():
        whole, half = (load(folder, **given, network_dtype=d).denoiser(x, sigma) for d in (None, torch.bfloat16))
    assert half.dtype == torch.float32
    # bfloat16 keeps eight bits: a few of its steps of the noise's size.
    assert 0 < float((half - whole).abs().max()) < 0.1 * 2.0


def test_the_self_test(plain):
    """Of a pipeline's images nothing is known; samples are denoised, which random weights do not do."""
    prior = priors.load(plain[0], embeddings=EMBEDDINGS)
    assert prior.card["check"]["verdict"].startswith("format and shapes verified")
    samples = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with pytest.raises(InvdiffError, match="does not denoise as it should"):
        priors.load(plain[0], embeddings=EMBEDDINGS, samples=samples)
    with pytest.raises(InvdiffError, match=r"with embeddings=\.\.\."):
        priors.load(plain[0], samples=samples)


@pytest.mark.parametrize("sampler", [samplers.DPS(steps=3), samplers.ReSample(steps=3)])
def test_a_run(plain, sampler):
    prior = load(plain[0], embeddings=EMBEDDINGS, negative=0 * EMBEDDINGS, guidance=2.0)
    mask = (torch.rand(32, 32, generator=torch.Generator().manual_seed(0)) < 0.5).float()
    truth = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    A = operators.Mask(mask.expand(3, 32, 32), IMAGE)
    problem = invdiff.Problem.simulate(A, likelihoods.Gaussian(0.05), truth)
    draws = invdiff.sample(problem, prior, sampler, draws=2, seed=0).draws
    assert draws.shape[-3:] == (3, 32, 32) and bool(np.isfinite(draws.values).all())


def test_shards(plain, tmp_path):
    _, parts = plain
    folder = write(tmp_path, "StableDiffusionPipeline", **parts)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    parts["unet"].save_pretrained(folder / "unet", max_shard_size="60KB")
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    assert len(set(names.values())) > 1
    x = noise(1, 4, 16, 16)
    wanted, found = (load(f, embeddings=EMBEDDINGS).denoiser(x, 0.7) for f in (plain[0], folder))
    assert torch.equal(wanted, found)
    for name in ("../../secret.safetensors", "/etc/passwd", "a/b.safetensors", ".hidden.safetensors", 3):
        edit(index, weight_map={**names, "conv_in.weight": name})
        with pytest.raises(InvdiffError, match="no file beside it"):
            load(folder)


def refused(match, folder, **declared):
    with pytest.raises(InvdiffError, match=match) as caught:
        load(folder, **declared)
    said = str(caught.value).replace(str(folder), "")
    assert "\n" not in said and len(said) < 500


def test_a_missing_scale_is_not_guessed(tmp_path):
    kl, vq, flow = (tmp_path / name for name in ("kl", "vq", "flow"))
    edit(sd(kl)[0] / "vae" / "config.json", drop=["scaling_factor"])
    edit(ldm(vq)[0] / "vqvae" / "config.json", drop=["scaling_factor"])
    edit(sd3(flow)[0] / "vae" / "config.json", drop=["shift_factor"])
    refused("states no scaling_factor", kl)
    refused("states no scaling_factor", vq)
    refused("states no shift_factor", flow)
    assert load(kl, latent_scale=0.18215).card["latent_scale"] == pytest.approx(0.18215)
    assert load(vq, latent_scale=1.0).card["latent_scale"] == 1.0
    assert load(flow, latent_shift=0.0609).card["latent_shift"] == pytest.approx(0.0609)


@pytest.mark.parametrize(
    ("file", "changes", "match"),
    [
        ("model_index.json", {"_class_name": "MagicPipeline"}, "class 'MagicPipeline'; known are"),
        ("model_index.json", {"_class_name": ["mine", "MyPipeline"]}, "known are"),
        ("model_index.json", {"unet": ["diffusers", "UNet3DConditionModel"]}, "UNet3DConditionModel.* as unet"),
        ("model_index.json", {"unet": ["os", "system"]}, "known are UNet2DConditionModel"),
        ("model_index.json", {"unet": ["../evil", "UNet2DConditionModel"]}, "as unet; known are"),
        ("model_index.json", {"vae": "../../AutoencoderKL"}, "as vae; known are"),
        ("model_index.json", {"vae": ["diffusers", {"a": 1}]}, "as vae; known are"),
        ("model_index.json", {"unet": None}, "names no denoiser"),
        ("unet/config.json", {"_class_name": "UNet2DModel"}, "different checkpoints"),
        ("unet/config.json", {"telepathy": 1}, "'telepathy', which the installed"),
        ("unet/config.json", {"block_out_channels": [2**20, 2**22]}, "has shape"),
        ("unet/config.json", {"in_channels": 9}, "no inpainting"),
        ("unet/config.json", {"class_embed_type": "projection"}, "more than text"),
        ("unet/config.json", {"addition_embed_type": "image"}, "more than text"),
        ("unet/config.json", {"cross_attention_dim": [12, 12]}, "several widths"),
        ("unet/config.json", {"block_out_channels": 5}, "expected the channels of"),
        ("unet/config.json", {"block_out_channels": [8] * 50}, "at most 12 levels"),
        ("vae/config.json", {"block_out_channels": None}, "expected the channels of"),
        ("vae/config.json", {"latent_channels": 8}, "latents of 8 channels"),
        ("vae/config.json", {"layers_per_block": 2}, "lacks the weights"),
        ("vae/config.json", {"scaling_factor": "much"}, "are no numbers"),
        ("vae/config.json", {"scaling_factor": -1.0}, "positive"),
        ("scheduler/scheduler_config.json", {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "known are"),
        ("scheduler/scheduler_config.json", {"prediction_type": "magic"}, "prediction_type 'magic'"),
    ],
)
def test_wrong_configurations_are_refused(tmp_path, plain, file, changes, match):
    folder = write(tmp_path, "StableDiffusionPipeline", **plain[1])
    edit(folder / file, **changes)
    refused(match, folder)


@pytest.mark.parametrize("place", ["unet", "vae"])
def test_damaged_weights_are_refused(tmp_path, plain, place):
    folder = write(tmp_path, "StableDiffusionPipeline", **plain[1])
    path = folder / place / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-2000])
    refused("fetch it again", folder)
    path.unlink()
    refused(f"no weights in {place}/", folder)
    (folder / place / "config.json").unlink()
    refused(f"lacks {place}/config.json", folder)


@pytest.mark.parametrize(
    ("declared", "match"),
    [
        ({"embeddings": noise(1, 5, 13)}, r"network takes \(rows, tokens, 12\)"),
        ({"embeddings": noise(12)}, r"network takes \(rows, tokens, 12\)"),
        ({"embeddings": torch.ones(1, 5, 12, dtype=torch.int64)}, "floating point"),
        ({"embeddings": EMBEDDINGS, "pooled": POOLED}, "takes no pooled"),
        ({"embeddings": EMBEDDINGS, "negative": noise(1, 4, 12)}, "5 tokens, and the negative ones 4"),
        ({"embeddings": EMBEDDINGS, "guidance": 2.0}, "unconditional input too"),
        ({"guidance": 2.0}, "needs the prompt itself"),
        ({"negative": EMBEDDINGS}, "needs the prompt itself"),
        ({"time_ids": (1, 2, 3, 4, 5, 6)}, "takes no time_ids"),
        ({"attention": "flash"}, "'fused' or 'math'"),
        ({"prompt": "a photograph"}, "no CLIP text encoder"),
        ({"prompt": "a photograph", "embeddings": EMBEDDINGS}, "not parts of each"),
        ({"negative_prompt": "a photograph"}, "not parts of each"),
    ],
)
def test_wrong_conditions_are_refused(plain, declared, match):
    refused(match, plain[0], **declared)


def test_conditions_of_a_call_are_checked(plain, tmp_path):
    free, x = load(plain[0]).denoiser, noise(2, 4, 16, 16)
    with pytest.raises(InvdiffError, match="embeddings"):
        free(x, 1.0)
    with pytest.raises(InvdiffError, match=r"\(rows, tokens, 12\)"):
        free(x, 1.0, cond={"embeddings": noise(2, 5, 11)})
    with pytest.raises(InvdiffError, match="3 rows, and the batch has 2"):
        free(x, 1.0, cond={"embeddings": noise(3, 5, 12)})
    folder, _ = xl(tmp_path)
    refused("embeddings and pooled together", folder, embeddings=EMBEDDINGS)
    refused("no room for 9", folder, time_ids=range(9))
    refused("six numbers", folder, time_ids="large")
    refused("one CLIP encoder", folder, prompt="a photograph")


def test_a_transformer_of_no_size(tmp_path):
    folder, _ = sd3(tmp_path)
    edit(folder / "scheduler" / "scheduler_config.json", num_train_timesteps="many")
    refused("of 'many' steps", folder)
    edit(folder / "scheduler" / "scheduler_config.json", num_train_timesteps=1000)
    for key, value in (("pos_embed_max_size", None), ("patch_size", "2"), ("patch_size", 0)):
        before = json.loads((folder / "transformer" / "config.json").read_text())[key]
        edit(folder / "transformer" / "config.json", **{key: value})
        refused(f"{key} = ", folder)
        edit(folder / "transformer" / "config.json", **{key: before})


def test_prompts(plain, tmp_path):
    """The folder's own encoder, under the names of its weights in every published checkpoint."""
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import save_file

    folder = write(tmp_path, "StableDiffusionPipeline", **plain[1])
    edit(
        folder / "model_index.json",
        tokenizer=["transformers", "CLIPTokenizer"],
        text_encoder=["transformers", "CLIPTextModel"],
    )
    letters = [chr(97 + i) for i in range(26)]
    tokens = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    ends = {"bos_token": tokens[52], "eos_token": tokens[53], "unk_token": tokens[53], "pad_token": tokens[53]}
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps({c: i for i, c in enumerate(tokens)}))
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps({**ends, "model_max_length": 7}))
    sizes = {"hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"vocab_size": 54, "max_position_embeddings": 7, "bos_token_id": 52, "eos_token_id": 53}
    config = transformers.CLIPTextConfig(**sizes)
    encoder = make(lambda: transformers.CLIPTextModel(config))
    config.save_pretrained(folder / "text_encoder")
    state = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in encoder.state_dict().items()}
    state["text_model.embeddings.position_ids"] = torch.arange(7)[None]
    weights = folder / "text_encoder" / "model.safetensors"
    save_file(state, weights)

    given = load(folder, prompt="a cat", negative_prompt="b", guidance=3.0).denoiser
    ids = torch.tensor([[52, 26, 2, 0, 45, 53, 53], [52, 27, 53, 53, 53, 53, 53]])
    wanted = encoder(ids).last_hidden_state
    torch.testing.assert_close(given.condition["embeddings"], wanted[:1])
    torch.testing.assert_close(given.unconditional["embeddings"], wanted[1:])
    refused("are texts", folder, prompt=["a", "b"])
    (folder / "tokenizer" / "vocab.json").write_text("nonsense")
    refused("tokenizer cannot be read", folder, prompt="a cat")
    weights.write_bytes(weights.read_bytes()[:-100])
    refused("not a readable safetensors", folder, prompt="a cat")


def test_missing_libraries(plain, monkeypatch, tmp_path):
    folder = write(tmp_path, "StableDiffusionPipeline", **plain[1])
    edit(
        folder / "model_index.json",
        tokenizer=["transformers", "CLIPTokenizer"],
        text_encoder=["transformers", "CLIPTextModel"],
    )
    (folder / "text_encoder").mkdir()
    (folder / "text_encoder" / "config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "transformers", None)
    refused("needs the transformers library", folder, prompt="a photograph")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    refused(r"pip install 'invdiff\[hub\]'", folder)
