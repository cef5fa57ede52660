"""Training: data sources, exact resume, cards, loading, the synthesiser."""

import dataclasses
import json
import pickle
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from invdiff.priors import learned
from invdiff.priors.held_out import count, held_out_slice
from invdiff.training.config import TrainConfig
from invdiff.training.data import read_images
from invdiff.training.train import train
from invdiff.training.validation import denoising_curve


def waves(n: int = 12, size: int = 24) -> np.ndarray:
    rng = np.random.default_rng(0)
    t = np.arange(size) / size
    out = [
        np.exp(2j * np.pi * (rng.integers(1, 3) * t[:, None] + rng.integers(1, 3) * t[None] + rng.random()))
        for _ in range(n)
    ]
    return np.stack(out).astype(np.complex64)


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    np.save(tmp_path / "waves.npy", waves())
    return TrainConfig(
        data=str(tmp_path / "waves.npy"),
        output=str(tmp_path / "out"),
        name="tiny",
        widths=(8, 12),
        blocks=1,
        embedding=16,
        sigma_data=0.7,
        p_mean=-0.5,
        steps=12,
        batch=4,
        crop=16,
        late_crop=24,
        late_batch=2,
        warmup=2,
        learning_rate=3e-3,
        ema=0.9,
        validation_images=2,
        checkpoint_every=4,
        validate_every=100,
        device="cpu",
    )


def test_training_reduces_the_error(config: TrainConfig) -> None:
    config = dataclasses.replace(config, steps=60, late_fraction=0.1)
    losses = []
    result = train(config, lambda e: losses.append(e["loss"]) if e["event"] == "step" else None)
    assert len(losses) == 60 and not result.interrupted and result.curve is not None
    # An untrained network is the Wiener estimate for white data.
    sigma = np.array(result.curve["sigma"])
    wiener = sigma * 0.7 / np.sqrt(sigma**2 + 0.49)
    middle = (sigma > 0.4) & (sigma < 3)
    assert (np.array(result.curve["rmse"]) < 0.9 * wiener)[middle].all()
    out = Path(config.output)
    assert (out / "tiny_denoising.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((out / "tiny_denoising.json").read_text())["step"] == 60
    assert not [p for p in out.iterdir() if "tmp" in p.name or p.name.startswith(".")]


def test_resume_gives_identical_bits(config: TrainConfig, tmp_path: Path) -> None:
    whole = train(config)
    halves = dataclasses.replace(config, output=str(tmp_path / "halves"))
    for stop in (3, 7):
        part = train(halves, stop_at=stop)
        assert part.interrupted and part.step == stop and part.weights is None
    rest = train(halves)
    assert whole.weights is not None and rest.weights is not None
    assert whole.weights.read_bytes() == rest.weights.read_bytes()
    a, b = (load_file(Path(o) / "checkpoint.safetensors") for o in (config.output, halves.output))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_signal_saves_and_returns(config: TrainConfig) -> None:
    import os
    import signal

    before = signal.getsignal(signal.SIGTERM)

    def interrupt(event: dict) -> None:
        if event["event"] == "step" and event["step"] == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    result = train(config, interrupt)
    assert result.interrupted and result.step == 5
    assert signal.getsignal(signal.SIGTERM) is before
    assert train(config).step == config.steps


def test_torch_state_is_left_alone(config: TrainConfig) -> None:
    state, threads = torch.random.get_rng_state(), torch.get_num_threads()
    train(dataclasses.replace(config, threads=1), stop_at=1)
    assert torch.equal(state, torch.random.get_rng_state()) and threads == torch.get_num_threads()


def test_card_and_loading(config: TrainConfig) -> None:
    result = train(dataclasses.replace(config, export_dtype="float16"))
    assert result.weights is not None and result.card is not None
    card = json.loads(result.card.read_text())
    assert card["sha256"] == learned.sha256_file(result.weights)
    assert card["config"]["widths"] == [8, 12] and card["channels"] == ["real", "imag"]
    assert card["normalisation"] == {"statistic": "p99_magnitude", "value": 1.0}
    assert str(config.output) not in result.card.read_text()
    network, loaded = learned.load_network(result.weights)
    assert loaded == card and not network.training
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in network.parameters())
    assert learned.self_test(network, card)["largest_deviation"] < 1e-3
    next(network.parameters()).data.mul_(-3)
    network.outlet.weight.data.add_(0.05)
    with pytest.raises(ValueError, match="fails its self-test"):
        learned.self_test(network, card)


def test_damaged_weights_are_refused(config: TrainConfig) -> None:
    path = train(dataclasses.replace(config, steps=2)).weights
    assert path is not None
    card = path.with_suffix(".json")
    good, text = path.read_bytes(), card.read_text()

    def resign(**changes: object) -> None:
        new = {**json.loads(text), "sha256": learned.sha256_file(path), **changes}
        card.write_text(json.dumps(new))

    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(ValueError, match="SHA-256"):
        learned.load_network(path)
    path.write_bytes(good[: len(good) // 2])
    resign()
    with pytest.raises(ValueError, match="not a readable safetensors"):
        learned.load_network(path)
    path.write_bytes(pickle.dumps({"network": 1}))
    resign()
    with pytest.raises(ValueError, match="not a readable safetensors"):
        learned.load_network(path)
    path.write_bytes(good)
    tensors = load_file(path)
    name = next(iter(tensors))
    for change, word in (
        ({k: v for k, v in tensors.items() if k != name}, "lacks the weights"),
        ({**tensors, "extra": torch.zeros(1)}, "does not have"),
        ({**tensors, name: torch.zeros(3)}, "has shape"),
        ({**tensors, name: torch.full_like(tensors[name], torch.nan)}, "NaN"),
    ):
        save_file(change, path)
        resign()
        with pytest.raises(ValueError, match=word):
            learned.load_network(path)
    path.write_bytes(good)
    for changes, word in (
        ({"format": "other"}, "format"),
        ({"config": {"widths": [8], "depth": 1}}, "unknown keys"),
        ({"config": {"widths": [10**9, 10**9], "channels": 2}}, "has shape|lacks|no network"),
        ({"sigma_min": 0}, "sigma_min"),
        ({"sigma_max": "80"}, "sigma_max"),
    ):
        resign(**changes)
        with pytest.raises(ValueError, match=word):
            learned.load_network(path)
    card.write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        learned.load_network(path)
    card.unlink()
    with pytest.raises(ValueError, match="no card"):
        learned.load_network(path)
    with pytest.raises(ValueError, match="no weights"):
        learned.load_network(path.with_name("absent.safetensors"))


def test_the_embedded_prior() -> None:
    path = learned.bundled("brain-mri")
    assert path.stat().st_size <= 16 * 2**20
    network, card = learned.load_network(path)
    assert card["parameters"] == sum(p.numel() for p in network.parameters())
    learned.self_test(network, card)
    recipe = TrainConfig.from_file(Path(learned.__file__).parents[1] / "training" / "brain_mri.toml")
    assert {k: v for k, v in recipe.to_dict().items() if k in card["recipe"]} == card["recipe"]
    x = held_out_slice(1)
    curve = denoising_curve(network, [np.stack([x.real, x.imag])], (0.05, 0.2))
    assert curve["relative"][0] < 0.6 and curve["relative"][1] < 0.3
    with pytest.raises(ValueError, match="brain-mri"):
        learned.bundled("brain-mr")


def test_held_out_slices() -> None:
    assert count() >= 8
    x = held_out_slice(0)
    assert x.dtype == np.complex64 and x.shape == (192, 160)
    assert abs(np.percentile(np.abs(x), 99) - 1) < 2e-3
    with pytest.raises(ValueError, match="index must be"):
        held_out_slice(count())


def test_config_files(config: TrainConfig, tmp_path: Path) -> None:
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    (tmp_path / "c.json").write_text(json.dumps(config.to_dict()))
    assert TrainConfig.from_file(tmp_path / "c.json") == config
    assert all(f.metadata["help"] for f in dataclasses.fields(TrainConfig))
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "list.json").write_text("[]")
    for name, word in (
        ("bad.json", "not a readable config"),
        ("list.json", "one table"),
        ("no.toml", "no config"),
    ):
        with pytest.raises(ValueError, match=word):
            TrainConfig.from_file(tmp_path / name)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"step": 3}, "unknown key 'step'"),
        ({"steps": "many"}, "steps must be like"),
        ({"steps": 0}, "steps must be positive"),
        ({"augment": 1}, "augment must be like"),
        ({"crop": 30}, "multiple of 8"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"sigma_max": 0.001}, "sigma_max"),
        ({"ema": 1.5}, "ema"),
        ({"name": "../x"}, "plain file name"),
        ({"export_dtype": "int8"}, "export_dtype"),
        ({"widths": ["a"]}, "widths"),
    ],
)
def test_bad_settings(change: dict, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        TrainConfig.from_dict(change)


def test_bad_runs(config: TrainConfig, tmp_path: Path) -> None:
    train(config, stop_at=1)
    with pytest.raises(ValueError, match="choose another output"):
        train(dataclasses.replace(config, widths=(8, 16)))
    checkpoint = Path(config.output) / "checkpoint.safetensors"
    checkpoint.write_bytes(b"junk")
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        train(config)
    with pytest.raises(ValueError, match="no training data"):
        train(dataclasses.replace(config, data=str(tmp_path / "absent"), output=str(tmp_path / "o2")))
    with pytest.raises(ValueError, match="channels must be 2"):
        train(dataclasses.replace(config, data="brain", channels=1, output=str(tmp_path / "o3")))
    np.save(tmp_path / "one.npy", waves(1))
    with pytest.raises(ValueError, match="at least 2"):
        train(dataclasses.replace(config, data=str(tmp_path / "one.npy"), output=str(tmp_path / "o4")))


def test_sources_agree(tmp_path: Path) -> None:
    x = waves(3)
    np.save(tmp_path / "x.npy", x)
    np.savez(tmp_path / "x.npz", a=x[:1], b=x[1:])
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["group/images"] = x
        file["note"] = "not an image"
    zarr = pytest.importorskip("zarr")
    zarr.save_array(str(tmp_path / "x.zarr"), x)
    expected = read_images(tmp_path / "x.npy", 2)
    assert len(expected) == 3 and expected[0].shape == (2, 24, 24) and expected[0].dtype == np.float32
    assert np.percentile(np.hypot(*expected[0]), 99) == pytest.approx(1, abs=1e-5)
    for name in ("x.npz", "x.h5", "x.zarr"):
        found = read_images(tmp_path / name, 2)
        assert len(found) == 3 and all(np.array_equal(a, b) for a, b in zip(found, expected))


def test_a_folder_of_pictures(tmp_path: Path) -> None:
    from PIL import Image

    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    Image.fromarray(np.stack([ramp] * 3, -1)).save(tmp_path / "b.tif")
    found = read_images(tmp_path, 1, "none")
    assert len(found) == 2 and all(np.allclose(f[0], ramp / 255, atol=1e-6) for f in found)
    (tmp_path / "c.png").write_bytes(b"\x89PNG broken")
    with pytest.raises(ValueError, match=r"c\.png is not a readable picture"):
        read_images(tmp_path, 1)


class Hostile:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("/tmp/invdiff-hostile"),))


def test_hostile_files(tmp_path: Path) -> None:
    np.save(tmp_path / "o.npy", np.array([Hostile()], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "o.npz", a=np.array([Hostile()], dtype=object))
    (tmp_path / "p.npy").write_bytes(pickle.dumps(Hostile()))
    for name in ("o.npy", "o.npz", "p.npy"):
        with pytest.raises(ValueError, match="never unpickled"):
            read_images(tmp_path / name, 2)
    assert not Path("/tmp/invdiff-hostile").exists()
    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file["x"] = waves(1)
    with h5py.File(tmp_path / "external.h5", "w") as file:
        file["x"] = h5py.ExternalLink(str(tmp_path / "secret.h5"), "x")
    with h5py.File(tmp_path / "soft.h5", "w") as file:
        file["y"] = h5py.SoftLink("/x")
    with h5py.File(tmp_path / "raw.h5", "w") as file:
        file.create_dataset("x", (4, 4), "f4", external=[(str(tmp_path / "secret.h5"), 0, 64)])
    layout = h5py.VirtualLayout((1, 24, 24), "c8")
    layout[:] = h5py.VirtualSource(str(tmp_path / "secret.h5"), "x", (1, 24, 24))
    with h5py.File(tmp_path / "virtual.h5", "w") as file:
        file.create_virtual_dataset("x", layout)
    with h5py.File(tmp_path / "cycle.h5", "w") as file:
        file.create_group("a")["back"] = file["/"]
    with h5py.File(tmp_path / "huge.h5", "w") as file:
        file.create_dataset("x", (10**6, 10**6), "f4", chunks=(64, 64))
    for name, word in (
        ("external", "link"),
        ("soft", "link"),
        ("raw", "other files"),
        ("virtual", "other files"),
        ("cycle", "16 deep"),
        ("huge", "declares"),
    ):
        with pytest.raises(ValueError, match=word):
            read_images(tmp_path / f"{name}.h5", 2)


@pytest.mark.parametrize(
    ("array", "channels", "word"),
    [
        (np.zeros(5), 1, "expected"),
        (np.zeros((2, 2, 3, 8, 8)), 1, "expected"),
        (np.full((8, 8), np.nan), 1, "NaN"),
        (np.zeros((8, 8), np.complex64), 1, "complex"),
        (np.zeros((4, 3, 8, 8)), 2, "expected"),
        (np.array([["a", "b"]]), 1, "numbers"),
    ],
)
def test_bad_arrays(tmp_path: Path, array: np.ndarray, channels: int, word: str) -> None:
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(ValueError, match=word):
        read_images(tmp_path / "x.npy", channels)


def test_bad_sources(tmp_path: Path) -> None:
    (tmp_path / "x.npy").write_bytes(b"")
    (tmp_path / "x.npz").write_bytes(b"PK\x03\x04junk")
    (tmp_path / "x.h5").write_bytes(b"\x89HDF\r\n\x1a\n")
    (tmp_path / "x.doc").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    for name in ("x.npy", "x.npz", "x.h5", "x.doc", "empty", "absent"):
        with pytest.raises(ValueError, match=str(name)):
            read_images(tmp_path / name, 2)


def test_synthesiser() -> None:
    pytest.importorskip("nilearn")
    from invdiff.training.synthetic_brain import brain_slice

    x = brain_slice(3, (96, 80))
    assert x.dtype == np.complex64 and x.shape == (96, 80) and np.isfinite(x).all()
    assert np.percentile(np.abs(x), 99) == pytest.approx(1, abs=1e-3)
    assert np.array_equal(x, brain_slice(3, (96, 80)))
    assert not np.array_equal(x, brain_slice(4, (96, 80)))
    assert not np.array_equal(x, brain_slice(3, (96, 80), held_out=True))
    for orientation in ("axial", "coronal", "sagittal"):
        head = np.abs(brain_slice(5, (96, 96), orientation=orientation))
        assert 0.15 < (head > 0.05).mean() < 0.98
    for bad in ({"seed": -1}, {"seed": 0, "shape": (8, 8)}, {"seed": 0, "orientation": "oblique"}):
        with pytest.raises(ValueError):
            brain_slice(**bad)


def test_stored_slices_come_from_the_held_out_stream() -> None:
    pytest.importorskip("nilearn")
    from invdiff.training.synthetic_brain import brain_slice

    x = brain_slice(1018, (192, 160), orientation="axial", held_out=True)
    assert np.abs(x - held_out_slice(0)).max() < 2e-3
