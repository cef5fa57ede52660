"""The command line: help, JSON, one sentence and exit code 2 for every bad input, nothing half-written."""

import json
import os
import signal
import subprocess
import sys
import time

import h5py
import numpy as np
import pytest
from typer.testing import CliRunner

from invdiff import mri_simulation
from invdiff.cli.app import app
from invdiff.posterior import Posterior

N = 48


@pytest.fixture(scope="module")
def scan():
    y, x = np.mgrid[-1 : 1 : N * 1j, -1 : 1 : N * 1j]
    image = (np.hypot(x / 0.7, y / 0.85) < 1) * (0.6 + 0.4 * (np.hypot(x, y) < 0.3)) * np.exp(1j * x)
    kspace, _ = mri_simulation.simulate_scan(image, coils=4, acceleration=3, centre=14, snr=40)
    return kspace.kspace


@pytest.fixture
def folder(tmp_path, monkeypatch, scan):
    """A working folder that holds ``scan.npy``."""
    monkeypatch.chdir(tmp_path)
    np.save("scan.npy", scan)
    return tmp_path


def run(*words, code=0):
    result = CliRunner().invoke(app, [str(w) for w in words])
    if result.exit_code != code:
        raise AssertionError(f"{result.exit_code} instead of {code}:\n{result.output}\n{result.stderr}") from (
            result.exception
        )
    return result


def refuse(folder, *words) -> str:
    """Run a command that must fail with one sentence and leave nothing behind; return the sentence."""
    before = sorted(p.name for p in folder.iterdir())
    result = run(*words, code=2)
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("Error: ") and "Traceback" not in result.stderr, result.stderr
    assert sorted(p.name for p in folder.iterdir()) == before, "something half-written stays behind"
    assert "Error" not in result.stdout
    return lines[0]


def fast(*words):
    return ("reconstruct", "scan.npy", "--steps", 2, "--draws", 2, "--device", "cpu", *words)


class TestHelp:
    @pytest.mark.parametrize("command", ["demo", "reconstruct", "show", "samplers", "priors", "train"])
    def test_of_every_command(self, command):
        assert "Usage" in run(command, "--help").stdout

    def test_of_the_program(self):
        text = run("--help").stdout
        for command in ("demo", "reconstruct", "show", "samplers", "priors", "train"):
            assert command in text

    def test_version(self):
        from invdiff import __version__

        assert run("--version").stdout.strip() == f"invdiff {__version__}"


class TestReconstruct:
    def test_writes_and_reports(self, folder):
        text = run(*fast("--output", "out.nc", "--report", "out.html")).stdout
        assert "acceleration" in text and "ESPIRiT" in text and "estimated from the outermost samples" in text
        assert "2 of 2" in text and "out.nc" in text
        with Posterior.open("out.nc") as posterior:
            assert posterior.n_draws == 2 and posterior.provenance["seed"] == 0
            assert posterior.provenance["problem"]["meta"]["sigma_source"]
        page = (folder / "out.html").read_text()
        assert "data:image/png;base64," in page and "data_sha256" in page and "<script" not in page
        assert sorted(p.name for p in folder.iterdir()) == ["out.html", "out.nc", "scan.npy"]

    def test_json(self, folder):
        result = run(*fast("--json", "--seed", 3, "--report", "out.png"))
        found = json.loads(result.stdout)
        assert found["output"] == "scan.nc" and found["seed"] == 3 and found["draws"] == 2
        assert found["status"] == "complete" and found["network_evaluations"] == 4
        assert found["scan"]["mask_source"] == "found from the data"
        assert (folder / "out.png").read_bytes().startswith(b"\x89PNG")
        assert result.stderr == ""

    def test_given_files(self, folder, scan):
        np.save("mask.npy", (scan != 0).any(0))
        np.save("maps.npy", mri_simulation.birdcage_maps(4, (N, N)))
        rng = np.random.default_rng(0)
        np.save("noise.npy", 0.02 * (rng.standard_normal((4, 500)) + 1j * rng.standard_normal((4, 500))))
        given = ("--mask", "mask.npy", "--coil-maps", "maps.npy", "--noise-scan", "noise.npy")
        found = json.loads(run(*fast(*given, "--json")).stdout)
        assert found["scan"]["mask_source"] == found["scan"]["coil_maps_source"] == "given"
        assert found["scan"]["sigma"] == pytest.approx(0.02, rel=0.1)
        found = json.loads(run(*fast("--sigma", 0.5, "--json")).stdout)
        assert found["scan"]["sigma"] == 0.5 and found["scan"]["sigma_source"] == "given"

    def test_settings_reach_the_sampler(self, folder):
        found = json.loads(run(*fast("--set", "eta=0.5", "--set", "cg_iterations=3", "--json")).stdout)
        assert found["sampler"]["config"]["eta"] == 0.5
        assert found["sampler"]["config"]["cg_iterations"] == 3
        found = json.loads(run(*fast("--sampler", "diffpir", "--json")).stdout)
        assert found["sampler"]["name"] == "diffpir"

    def test_point_estimate(self, folder):
        found = json.loads(run(*fast("--sampler", "reddiff", "--json", "--report", "out.png")).stdout)
        assert found["kind"] == "point"

    def test_same_seed_same_draws(self, folder):
        run(*fast("--output", "a.nc"))
        run(*fast("--output", "b.nc", "--batch", 1))
        with Posterior.open("a.nc") as a, Posterior.open("b.nc") as b:
            np.testing.assert_allclose(a.draws, b.draws, atol=1e-4)

    def test_every_format(self, folder, scan):
        np.savez("scan.npz", kspace=scan)
        with h5py.File("scan.h5", "w") as f:
            f["kspace"] = scan[None]
        for name in ("scan.npz", "scan.h5"):
            words = ("reconstruct", name, "--steps", 1, "--draws", 1, "--output", f"{name}.nc", "--json")
            assert json.loads(run(*words).stdout)["draws"] == 1


class TestBadInput:
    def test_rank(self, folder, scan):
        np.save("bad.npy", scan[None, None])
        assert "expected (coil, ky, kx)" in refuse(folder, "reconstruct", "bad.npy")

    def test_real(self, folder, scan):
        np.save("bad.npy", scan.real)
        assert "k-space is complex" in refuse(folder, "reconstruct", "bad.npy")

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_not_finite(self, folder, scan, value):
        bad = scan.copy()
        bad[0, 3, 3] = value
        np.save("bad.npy", bad)
        assert "1 NaN or infinite values" in refuse(folder, "reconstruct", "bad.npy")

    def test_no_samples(self, folder, scan):
        np.save("bad.npy", 0 * scan)
        assert "no position was sampled" in refuse(folder, "reconstruct", "bad.npy")

    def test_contradicting_mask(self, folder, scan):
        mask = (scan != 0).any(0)
        mask[: N // 2] = False
        np.save("mask.npy", mask)
        assert "mask contradicts the data" in refuse(folder, *fast("--mask", "mask.npy"))
        np.save("mask.npy", np.ones((N, N)))
        assert "mask contradicts the data" in refuse(folder, *fast("--mask", "mask.npy"))

    def test_mask_and_maps_of_another_shape(self, folder):
        np.save("other.npy", np.ones((3, 5)))
        assert "mask has shape (3, 5)" in refuse(folder, *fast("--mask", "other.npy"))
        assert "coil maps have shape (3, 5)" in refuse(folder, *fast("--coil-maps", "other.npy"))
        assert "noise scan has shape (3, 5)" in refuse(folder, *fast("--noise-scan", "other.npy"))

    @pytest.mark.parametrize("sigma", ["-1", "0", "nan"])
    def test_sigma(self, folder, sigma):
        assert "must be positive" in refuse(folder, *fast("--sigma", sigma))

    def test_missing_file(self, folder):
        assert "did you mean scan.npy?" in refuse(folder, "reconstruct", "scn.npy")
        assert "mask file nothing.npy does not exist" in refuse(folder, *fast("--mask", "nothing.npy"))

    def test_truncated_hdf5(self, folder, scan):
        with h5py.File("bad.h5", "w") as f:
            f["kspace"] = scan[None]
        whole = (folder / "bad.h5").read_bytes()
        (folder / "bad.h5").write_bytes(whole[:-1000])
        assert "truncated" in refuse(folder, "reconstruct", "bad.h5")

    def test_external_links(self, folder, scan):
        with h5py.File("target.h5", "w") as f:
            f["kspace"] = scan[None]
        with h5py.File("bad.h5", "w") as f:
            f["kspace"] = h5py.ExternalLink("target.h5", "/kspace")
        assert "external link" in refuse(folder, "reconstruct", "bad.h5")

    def test_objects(self, folder):
        np.save("bad.npy", np.array([{}], dtype=object), allow_pickle=True)
        assert "Python objects" in refuse(folder, "reconstruct", "bad.npy")

    @pytest.mark.parametrize("draws", [0, -3])
    def test_draws(self, folder, draws):
        assert "at least 1" in refuse(folder, "reconstruct", "scan.npy", "--draws", draws)

    def test_batch_seed_budget(self, folder):
        assert "batch must be at least 1" in refuse(folder, *fast("--batch", 0))
        assert "seed must be" in refuse(folder, *fast("--seed", -1))
        assert "time budget" in refuse(folder, *fast("--time-budget", 0))

    def test_unknown_sampler(self, folder):
        assert "did you mean dds" in refuse(folder, *fast("--sampler", "ddss"))
        assert "did you mean diffpir" in refuse(folder, "samplers", "difpir")
        assert "has no preset" in refuse(folder, *fast("--preset", "nonsense"))
        assert "ignores data" in refuse(folder, *fast("--sampler", "heun"))

    @pytest.mark.parametrize(
        ("setting", "words"),
        [
            ("etta=1", "did you mean 'eta'"),
            ("eta", "NAME=VALUE"),
            ("eta=much", "takes a number, got 'much'"),
            ("cg_iterations=2.5", "takes a whole number"),
        ],
    )
    def test_settings(self, folder, setting, words):
        assert words in refuse(folder, *fast("--set", setting))

    def test_steps(self, folder):
        assert "steps" in refuse(folder, "reconstruct", "scan.npy", "--steps", 0)

    def test_unknown_prior(self, folder):
        assert "did you mean 'brain-mri'" in refuse(folder, *fast("--prior", "brain-mra"))
        assert "no prior file" in refuse(folder, *fast("--prior", "other.safetensors"))

    def test_prior_whose_channels_do_not_fit(self, folder, real_prior):
        assert "channel" in refuse(folder, *fast("--prior", real_prior))

    def test_device(self, folder):
        assert "'abacus' cannot be used" in refuse(folder, "reconstruct", "scan.npy", "--device", "abacus")

    def test_more_than_there_is(self, folder):
        assert "GB are free" in refuse(folder, "reconstruct", "scan.npy", "--draws", 10**12)

    def test_outputs(self, folder):
        assert "must end in .nc or .zarr" in refuse(folder, *fast("--output", "out.txt"))
        assert "does not exist; create" in refuse(folder, *fast("--output", "there/out.nc"))
        assert "must end in .png or .html" in refuse(folder, *fast("--report", "out.pdf"))

    def test_no_calibration_centre(self, folder, scan):
        bad = scan.copy()
        bad[:, N // 2] = 0
        np.save("bad.npy", bad)
        assert "give coil maps in a file" in refuse(folder, "reconstruct", "bad.npy")

    def test_debug_shows_the_traceback(self, folder):
        for words in (("--debug", "reconstruct", "no.npy"), ("reconstruct", "no.npy", "--debug")):
            assert "Traceback" in run(*words, code=2).stderr
        assert "Traceback" not in run("reconstruct", "no.npy", code=2).stderr

    def test_a_fault_of_the_program(self, folder, monkeypatch):
        def broken(*_, **__):
            raise ZeroDivisionError("oh")

        monkeypatch.setattr("invdiff.io.kspace.read_kspace", broken)
        assert "fault of the program (ZeroDivisionError: oh)" in run("reconstruct", "scan.npy", code=1).stderr


@pytest.fixture(scope="module")
def real_prior(tmp_path_factory):
    """A tiny untrained prior of one real channel."""
    from safetensors.torch import save_file

    from invdiff.networks import EDMUNet
    from invdiff.priors.learned import FORMAT, reference_errors, sha256_file

    folder = tmp_path_factory.mktemp("prior")
    config = {"channels": 1, "widths": [8, 8], "blocks": 1, "embedding": 8, "sigma_data": 0.5}
    network = EDMUNet.from_config(config)
    path = folder / "grey.safetensors"
    save_file(network.state_dict(), path)
    card = {
        "name": "grey",
        "format": FORMAT,
        "config": config,
        "channels": ["grey"],
        "sigma_min": 0.002,
        "sigma_max": 80.0,
        "normalisation": {"statistic": "p99_magnitude", "value": 1.0},
        "licence": "BSD-3-Clause",
        "sha256": sha256_file(path),
        "self_test": reference_errors(network),
    }
    path.with_suffix(".json").write_text(json.dumps(card))
    return path


class TestShow:
    def test_summary_and_figure(self, folder):
        run(*fast("--output", "out.nc"))
        text = run("show", "out.nc").stdout
        assert "draws" in text and "out.png" in text
        assert (folder / "out.png").read_bytes().startswith(b"\x89PNG")
        found = json.loads(run("show", "out.nc", "--json", "--output", "page.html").stdout)
        assert found["figure"] == "page.html" and "<h1>" in (folder / "page.html").read_text()

    def test_bad_files(self, folder):
        assert "missing.nc" in refuse(folder, "show", "missing.nc")
        (folder / "bad.nc").write_bytes(b"nonsense")
        assert "bad.nc" in refuse(folder, "show", "bad.nc")
        assert "must end in" in refuse(folder, "show", "bad.nc", "--output", "a.pdf")


class TestSamplers:
    def test_table(self):
        from invdiff.samplers import REGISTRY

        text = run("samplers").stdout
        for name in REGISTRY:
            assert name in text

    def test_json(self):
        found = json.loads(run("samplers", "--json").stdout)["samplers"]
        entry = next(e for e in found if e["name"] == "dds")
        assert entry["needs"] == ["linear", "quadratic"] and entry["kind"] == "posterior"

    def test_one(self):
        text = run("samplers", "dds").stdout
        assert "arXiv:2303.05754" in text and "cg_iterations" in text
        assert json.loads(run("samplers", "dds", "--json").stdout)["settings"]["eta"] == 0.85


class TestPriors:
    def test_list(self):
        assert "brain-mri" in run("priors").stdout
        assert json.loads(run("priors", "--json").stdout)["priors"][0]["licence"] == "BSD-3-Clause"

    def test_card(self):
        assert "BSD-3-Clause" in run("priors", "card", "brain-mri").stdout
        assert "sha256" in json.loads(run("priors", "card", "brain-mri", "--json").stdout)

    def test_verify(self, real_prior):
        assert json.loads(run("priors", "verify", "brain-mri", "--json").stdout)["ok"] is True
        assert "as its card says" in run("priors", "verify", real_prior).stdout

    def test_verify_refuses(self, folder, real_prior):
        (folder / "grey.safetensors").write_bytes(real_prior.read_bytes()[:-8])
        (folder / "grey.json").write_text(real_prior.with_suffix(".json").read_text())
        assert "SHA-256" in refuse(folder, "priors", "verify", "grey.safetensors")
        (folder / "grey.json").unlink()
        assert "card" in refuse(folder, "priors", "verify", "grey.safetensors")
        assert "Unknown prior" in refuse(folder, "priors", "card", "nothing")

    def test_check(self, folder):
        assert "brain-mri: pass" in run("priors", "check", "brain-mri").stdout
        images = np.random.default_rng(0).standard_normal((2, 2, 16, 16)).astype(np.float32)
        np.save(folder / "noise.npy", images)
        found = run("priors", "check", "brain-mri", "--samples", folder / "noise.npy", "--json", code=3)
        assert json.loads(found.stdout)["failed"]
        np.save(folder / "flat.npy", images[0])
        assert "expected real images" in refuse(folder, "priors", "check", "brain-mri", "--samples", "flat.npy")


class TestTrain:
    def tiny(self, folder):
        rng = np.random.default_rng(0)
        np.save("images.npy", rng.standard_normal((4, 32, 32)).astype(np.float32))
        config = {"data": "images.npy", "widths": [8, 8], "blocks": 1, "channels": 1, "crop": 16, "late_crop": 16}
        (folder / "c.json").write_text(json.dumps({**config, "batch": 2, "steps": 100, "device": "cpu"}))
        return ("train", "c.json", "--steps", 2, "--validation-images=1", "--no-augment", "--output", "out")

    def test_file_and_flags(self, folder):
        found = json.loads(run(*self.tiny(folder), "--json").stdout)
        assert found["step"] == 2 and not found["interrupted"]
        card = json.loads((folder / "out" / "my-prior.json").read_text())
        assert card["recipe"]["augment"] is False and card["recipe"]["steps"] == 2

    def test_settings_are_listed(self):
        assert "--learning-rate" in run("train", "--settings").stdout
        assert json.loads(run("train", "--settings", "--json").stdout)["steps"]["default"] > 0

    @pytest.mark.parametrize(
        ("words", "sentence"),
        [
            (("--stepps", "3"), "did you mean --steps?"),
            (("--steps", "many"), "takes a whole number, got 'many'"),
            (("--steps",), "needs a value"),
            (("--steps", "-1"), "must be positive"),
            (("--widths", "a,b"), "whole numbers between commas"),
            (("--data", "no-such-file.npy"), "no-such-file.npy"),
            (("a.toml", "b.toml"), "Unexpected argument 'b.toml'"),
            (("a.toml",), "no config file at a.toml"),
        ],
    )
    def test_bad_input(self, folder, words, sentence):
        assert sentence in refuse(folder, "train", *words)


class TestDemo:
    def test_small(self, folder):
        found = json.loads(run("demo", "--draws", 2, "--steps", 2, "--json", "--device", "cpu").stdout)
        assert set(found["scores"]) >= {"zero-filled", "SENSE", "l1-wavelet"}
        assert 0 <= found["coverage"]["covered"] <= 1 and found["network_evaluations"] == 4
        names = sorted(p.name for p in folder.iterdir())
        assert names == ["invdiff-demo.nc", "invdiff-demo.png", "scan.npy"]

    def test_bad_input(self, folder):
        assert "held-out slices" in refuse(folder, "demo", "--index", 99)
        assert "does not exist; create" in refuse(folder, "demo", "--output", "nowhere")


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_interrupt_and_resume(folder):
    command = [sys.executable, "-m", "invdiff.cli", "reconstruct", "scan.npy", "--output", "out.nc"]
    command += ["--coil-maps", "maps.npy", "--steps", "10", "--draws", "12", "--batch", "1", "--device", "cpu"]
    np.save("maps.npy", mri_simulation.birdcage_maps(4, (N, N)))
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(folder.glob("out.nc.partial/chunk-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "--resume to continue" in errors and len(errors.strip().splitlines()) == 1
    assert not (folder / "out.nc").exists()
    assert "unfinished run" in refuse(folder, *command[3:])
    found = json.loads(run(*command[3:], "--resume", "--json").stdout)
    assert found["draws"] == 12 and not (folder / "out.nc.partial").exists()
