"""What a run keeps of its validations, and how it may run: compiled, channels last; compiled priors."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from invdiff import Space, priors
from invdiff.errors import InvdiffError
from invdiff.training.config import TrainConfig
from invdiff.training.history import History
from invdiff.training.train import train
from tests.unit import tiny_training


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    run = {"steps": 8, "batch": 4, "late_fraction": 0.0, "checkpoint_every": 3, "validate_every": 4}
    return tiny_training.recipe(tmp_path, 16, learning_rate=3e-3, **run)


def entries(config: TrainConfig) -> list[dict]:
    lines = (Path(config.output) / "tiny_history.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def test_history_survives_a_kill_and_is_that_of_a_whole_run(config: TrainConfig, tmp_path: Path) -> None:
    train(config)
    whole = entries(config)
    assert [e["step"] for e in whole] == [4, 8] and len(whole[0]["rmse"]) == len(whole[0]["sigma"]) == 10
    assert (Path(config.output) / "tiny_history.png").read_bytes().startswith(b"\x89PNG")
    card = json.loads((Path(config.output) / "tiny.json").read_text())
    assert card["denoising_error"]["rmse"] == whole[-1]["rmse"]

    class Killed(Exception):
        pass

    def kill(event: dict) -> None:
        if event["event"] == "step" and event["step"] == 5:
            raise Killed

    # The last checkpoint is of step 3, and the entry of step 4 is made again.
    broken = dataclasses.replace(config, output=str(tmp_path / "broken"))
    with pytest.raises(Killed):
        train(broken, kill)
    assert [e["step"] for e in entries(broken)] == [4]
    train(broken)
    assert entries(broken) == whole
    # Anew, nothing is left of the old one.
    train(dataclasses.replace(broken, steps=2), resume=False)
    assert [e["step"] for e in entries(broken)] == [2]


def test_a_damaged_history_is_refused(tmp_path: Path) -> None:
    for text in ("no json\n", "3\n", '{"sigma": 1}\n'):
        (tmp_path / "h.jsonl").write_text(text)
        with pytest.raises(ValueError, match="not a readable history"):
            History(tmp_path / "h.jsonl", 5)
    assert History(tmp_path / "h.jsonl", 0).entries == []


@pytest.mark.parametrize("backbone", ["unet", "adm"])
def test_channels_last_changes_rounding_alone(config: TrainConfig, tmp_path: Path, backbone: str) -> None:
    config = dataclasses.replace(config, backbone=backbone, widths=(16, 32), head_channels=16, steps=3)
    plain = train(config)
    other = train(dataclasses.replace(config, channels_last=True, output=str(tmp_path / "other")))
    assert plain.curve is not None and other.curve is not None
    assert other.curve["rmse"] == pytest.approx(plain.curve["rmse"], rel=1e-3)


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """The compiler's capture of the network, without the minutes of making code."""
    compiled: list[object] = []
    real = torch.compile

    def quick(network: torch.nn.Module) -> object:
        compiled.append(network)
        return real(network, backend="eager")

    monkeypatch.setattr(torch, "compile", quick)
    yield compiled
    torch._dynamo.reset()


@pytest.mark.parametrize("loss", ["edm", "flow"])
def test_a_compiled_run_is_the_same_run(config: TrainConfig, tmp_path: Path, eager: list, loss: str) -> None:
    config = dataclasses.replace(config, loss=loss, steps=3)
    plain = train(config)
    assert not eager
    compiled = train(dataclasses.replace(config, compile=True, output=str(tmp_path / "other")))
    assert len(eager) == 1 and plain.weights is not None and compiled.weights is not None
    assert plain.weights.read_bytes() == compiled.weights.read_bytes()


# The compiler itself looks at the gradients of tensors that are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("loss", ["edm", "flow"])
def test_a_compiled_prior(config: TrainConfig, eager: list, loss: str) -> None:
    path = train(dataclasses.replace(config, loss=loss, steps=1)).weights
    plain, compiled = priors.load(path), priors.load(path, compile=True)
    assert len(eager) == 1 and plain.denoiser.differentiable == 2 and compiled.denoiser.differentiable == 1
    x, sigma = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([0.1, 2.0])
    torch.testing.assert_close(compiled.denoiser(x, sigma), plain.denoiser(x, sigma))
    leaf = x.clone().requires_grad_()
    (vjp,) = torch.autograd.grad(compiled.denoiser(leaf, sigma), leaf, x)
    other = x.clone().requires_grad_()
    torch.testing.assert_close(vjp, torch.autograd.grad(plain.denoiser(other, sigma), other, x)[0])
    found = compiled.cost(Space((1, 16, 16)), batch=2, repeats=1)
    assert found["evaluation_s"] > 0 and found["vjp_s"] > 0
    double = compiled.to(dtype=torch.float64).denoiser
    assert double(x.double(), sigma.double()).dtype == torch.float64


def test_what_cannot_be_compiled() -> None:
    from invdiff.prior import Prior
    from invdiff.priors.library import _compiled

    gaussian = priors.Gaussian(torch.zeros(9).double(), torch.eye(9).double(), Space((9,), torch.float64))
    with pytest.raises(InvdiffError, match="no network that can be compiled"):
        _compiled(gaussian if isinstance(gaussian, Prior) else Prior(gaussian))


# torch's compiler warns of other parts of torch.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.slow
def test_compiled_code_on_this_machine(config: TrainConfig) -> None:
    path = train(dataclasses.replace(config, loss="flow", steps=1)).weights
    plain, compiled = priors.load(path), priors.load(path, compile=True)
    x, sigma = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([0.1, 2.0])
    torch.testing.assert_close(compiled.denoiser(x, sigma), plain.denoiser(x, sigma), atol=1e-4, rtol=1e-4)
