"""Several processes train one network: the same result as one, one stop for all, exact resume."""

import dataclasses
import json
import os
import runpy
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from invdiff.training.batches import Batch
from invdiff.training.config import TrainConfig
from invdiff.training.processes import Processes, process_group
from invdiff.training.train import _device, train
from tests.unit import tiny_training

#: Three runs in one pair of processes: whole, stopped by a signal to the second process alone, resumed.
SCRIPT = """
import dataclasses, json, os, signal, sys
import torch
torch.set_num_threads(1)
from invdiff.training.batches import Batches
from invdiff.training.config import TrainConfig
from invdiff.training import train as runs

# Pictures take longer than all the rest.
runs.plot_curve = runs.plot_history = lambda *_: None
train = runs.train
config = TrainConfig.from_file(sys.argv[1])
rank, events = int(os.environ["RANK"]), []
torch.distributed.init_process_group("gloo")
whole = train(config, events.append)
assert (whole.weights is None) == (rank == 1) == (not events)

draw = Batches.batch

def interrupted(self, step):
    if rank == 1 and step == 3:
        os.kill(os.getpid(), signal.SIGTERM)
    return draw(self, step)

halves = dataclasses.replace(config, output=config.output + "-halves")
Batches.batch = interrupted
part = train(halves)
Batches.batch = draw
rest = train(halves)
with open(f"{config.output}-{rank}.json", "w") as file:
    json.dump([part.interrupted, part.step, rest.interrupted, rest.step], file)
torch.distributed.destroy_process_group()
"""


def recipe(folder: Path) -> TrainConfig:
    output = str(folder / "pair")
    run = {"steps": 6, "batch": 5, "late_fraction": 0.4, "late_batch": 2, "checkpoint_every": 100}
    return tiny_training.recipe(folder, 24, output=output, **run)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def pair(arguments: list[str]) -> None:
    """Run two processes as the launcher would."""
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    common |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    started = [
        subprocess.Popen(
            [sys.executable, *arguments],
            env={**common, "RANK": str(n), "LOCAL_RANK": str(n)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for n in range(2)
    ]
    try:
        said = [process.communicate(timeout=100)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [p.returncode for p in started] == [0, 0], "\n".join(said)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without processes")
def test_two_processes_train_as_one_and_stop_together(tmp_path: Path) -> None:
    config = recipe(tmp_path)
    (tmp_path / "c.json").write_text(json.dumps(config.to_dict()))
    (tmp_path / "run.py").write_text(textwrap.dedent(SCRIPT))
    pair([str(tmp_path / "run.py"), str(tmp_path / "c.json")])
    for rank in range(2):
        # Step 3 was under way in both when the signal came to one.
        assert json.loads((tmp_path / f"pair-{rank}.json").read_text()) == [True, 4, False, 6]
    together, halves = ((tmp_path / n / "tiny.safetensors").read_bytes() for n in ("pair", "pair-halves"))
    assert together == halves
    alone = train(dataclasses.replace(config, output=str(tmp_path / "alone")))
    assert alone.weights is not None
    one, two = load_file(alone.weights), load_file(tmp_path / "pair" / "tiny.safetensors")
    # Sums in another order move a weight by 7e-7 here, a wrong share of a batch by a tenth of a step of 1e-3.
    moved = max(float((one[k] - two[k]).abs().max()) for k in one)
    assert moved < 2e-5


@pytest.mark.slow
def test_the_launcher_of_torch(tmp_path: Path) -> None:
    config = recipe(tmp_path)
    (tmp_path / "c.json").write_text(json.dumps(config.to_dict()))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "invdiff", "train", str(tmp_path / "c.json"), "--json"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["step"] == 6
    assert load_file(tmp_path / "pair" / "tiny.safetensors")


def test_the_package_is_a_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["invdiff", "train", "--settings"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("invdiff", run_name="__main__")
    assert not stopped.value.code and "--condition-dropout" in capsys.readouterr().out


def test_parts_of_a_batch() -> None:
    rows = torch.arange(5.0)
    batch = Batch(rows[:, None, None, None], rows, rows[:, None, None, None], rows.long())
    found = [Processes(n, 3).part(batch) for n in range(3)]
    assert torch.equal(torch.cat([p.sigma for p, _ in found]), rows) and sum(s for _, s in found) == pytest.approx(
        1
    )
    assert all(p.label is not None and torch.equal(p.label, p.sigma.long()) for p, _ in found)
    with pytest.raises(ValueError, match="batch of 5 cannot be split over 6 processes"):
        Processes(0, 6).part(batch)


def test_alone_there_is_nothing_to_add(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with process_group(torch.device("cpu")) as processes:
        x = torch.ones(3)
        processes.add([x])
        assert processes.first and processes.total(2.5) == 2.5 and torch.equal(x, torch.ones(3))


def test_one_device_for_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "1"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config = dataclasses.replace(recipe(tmp_path), device="auto")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert _device(config) == torch.device("cuda:1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="1 CUDA devices here, too few"):
        _device(config)
