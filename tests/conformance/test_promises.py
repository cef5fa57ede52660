"""The driver's promises: streams, rows, resume, flags, one sentence for bad input."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

import invdiff
from invdiff import likelihoods, samplers
from invdiff.callbacks import Callback, StopWhen, Trace
from invdiff.errors import CapabilityError, InvdiffError, NonFiniteError, ResumeError
from invdiff.sampler import Sampler
from invdiff.spaces import Space
from tests.conformance.toys import SPACE, BlackBox, Keep, Square, normal_prior, scaled_prior, toy_problem

FEW = {"heun": 4, "ddim": 4, "dpmpp": 4, "reddiff": 4}
ALL = list(samplers.REGISTRY)
CONDITIONAL = [n for n in ALL if samplers.REGISTRY[n].conditional]


def small(name, **fields):
    fields = {"steps": FEW.get(name, 6), **fields}
    if name == "daps":
        fields = {"moves": 3, "ode_steps": 2, **fields}
    if name == "resample":
        fields = {"period": 1, **fields}
    return samplers.get(name, **fields)


def run(name, problem=None, prior=None, draws=3, seed=0, **options):
    sampler = small(name) if isinstance(name, str) else name
    problem = (problem or toy_problem()) if sampler.conditional else None
    return invdiff.sample(problem, prior or normal_prior(), sampler, draws=draws, seed=seed, **options)


def values(posterior):
    """All draws as (cases, draws, image)."""
    array = posterior.estimate if posterior.kind == "point" else posterior.draws
    return np.asarray(array).reshape(-1, *SPACE.shape)


def rows_of(posterior, cases, draws):
    return values(posterior).reshape(cases, -1, *SPACE.shape)[:, :draws]


@pytest.mark.parametrize("name", ALL)
def test_draws_do_not_depend_on_the_batch(name):
    whole = values(run(name, max_batch=64))
    for batch in (1, 2, 5):
        assert np.abs(values(run(name, max_batch=batch)) - whole).max() < 1e-10


@pytest.mark.parametrize("name", [n for n in ALL if samplers.REGISTRY[n].kind == "posterior"])
def test_a_draw_does_not_depend_on_how_many_are_asked(name):
    cases = 2 if samplers.REGISTRY[name].conditional else 1
    few, many = run(name, draws=2), run(name, draws=4)
    assert np.abs(rows_of(few, cases, 2) - rows_of(many, cases, 2)).max() < 1e-10


@pytest.mark.parametrize("name", CONDITIONAL)
def test_a_case_does_not_see_its_neighbours(name):
    both = toy_problem(cases=2)
    first = both.rows(torch.tensor([0]))
    alone = values(run(name, problem=first))
    together = values(run(name, problem=both))[: len(alone)]
    assert np.abs(alone - together).max() < 1e-10


def test_seeds_are_recorded_and_zero_is_one_of_them():
    zero, again, one = run("dds", seed=0), run("dds", seed=0), run("dds", seed=1)
    assert zero.provenance["seed"] == 0
    assert np.array_equal(values(zero), values(again))
    assert not np.allclose(values(zero), values(one))
    unseeded = run("dds", seed=None)
    assert np.array_equal(values(run("dds", seed=unseeded.provenance["seed"])), values(unseeded))


class _Interrupt(Callback):
    def __init__(self, at):
        self.at, self.count = at, 0

    def on_step(self, info):
        self.count += 1
        if self.count == self.at:
            raise KeyboardInterrupt


@pytest.mark.parametrize("name", ALL)
def test_resume_is_bit_exact(name, tmp_path):
    expected = values(run(name, max_batch=2, checkpoint=tmp_path / "a"))
    with pytest.raises(KeyboardInterrupt):
        run(name, max_batch=2, checkpoint=tmp_path / "b", checkpoint_every_s=0, callbacks=[_Interrupt(6)])
    resumed = run(name, max_batch=2, checkpoint=tmp_path / "b", resume=True)
    assert np.array_equal(values(resumed), expected)


def test_kill_and_resume_is_bit_exact(tmp_path):
    program = textwrap.dedent(
        """
        import sys, time
        import invdiff
        from invdiff.callbacks import Callback
        from tests.conformance.toys import normal_prior, toy_problem

        class Slow(Callback):
            def on_step(self, info):
                print("step", flush=True)
                time.sleep(0.02)

        store, resume, slow = sys.argv[1], sys.argv[2] == "resume", sys.argv[3] == "slow"
        invdiff.sample(toy_problem(), normal_prior(), "dds", draws=8, seed=5, max_batch=4, store=store,
                       resume=resume, checkpoint_every_s=0, callbacks=[Slow()] if slow else [])
        """
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}

    def start(store, resume, slow):
        return subprocess.Popen(
            [sys.executable, "-c", program, str(store), resume, slow],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            text=True,
        )

    whole, killed = tmp_path / "whole.nc", tmp_path / "killed.nc"
    process = start(whole, "fresh", "fast")
    _, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    process = start(killed, "fresh", "slow")
    for _ in range(60):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert not killed.exists() and Path(f"{killed}.partial").is_dir()
    process = start(killed, "resume", "fast")
    _, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert not Path(f"{killed}.partial").exists()
    one, two = invdiff.open_posterior(whole), invdiff.open_posterior(killed)
    assert np.array_equal(np.asarray(one.draws), np.asarray(two.draws))


def test_resume_refuses_another_run(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run("dds", checkpoint=tmp_path / "c", checkpoint_every_s=0, callbacks=[_Interrupt(2)])
    with pytest.raises(ResumeError, match="unfinished run"):
        run("dds", checkpoint=tmp_path / "c")
    with pytest.raises(ResumeError, match="different seed"):
        run("dds", checkpoint=tmp_path / "c", seed=9, resume=True)
    (tmp_path / "c" / "run.json").write_text("{")
    with pytest.raises(ResumeError, match="cannot be read"):
        run("dds", checkpoint=tmp_path / "c", resume=True)


class _Poisoned:
    """Mixin: the denoiser turns rows NaN whose pixel 0 is largest in the batch of three."""


def _poisoned_prior(bad_draws):
    prior = normal_prior()
    inner = type(prior.denoiser)

    class Poisoned(inner):
        def __call__(self, x, sigma, cond=None):
            out = super().__call__(x, sigma)
            return torch.where(x[:, :1, :1, :1] > bad_draws, torch.full_like(out, float("nan")), out)

    prior.denoiser.__class__ = Poisoned
    return prior


@pytest.mark.parametrize("name", [n for n in CONDITIONAL if samplers.REGISTRY[n].kind == "posterior"])
def test_a_nan_is_flagged_and_harms_no_other_row(name):
    clean = values(run(name, draws=6))
    with pytest.warns(UserWarning, match="flagged"):
        dirty = run(name, draws=6, prior=_poisoned_prior(40.0))
    status = np.asarray(dirty.stats["status"]).reshape(-1)
    good = np.asarray(status == "ok")
    assert 0 < good.sum() < good.size
    out = values(dirty)
    assert np.abs(out[good] - clean[good]).max() < 1e-10
    assert np.isnan(out[~good]).any(axis=(1, 2, 3)).all(), "a failed draw must not hold made-up numbers"


def test_nan_can_be_an_error_and_no_usable_draw_is_one():
    with pytest.raises(NonFiniteError, match="became NaN or infinite at step"):
        run("dds", draws=6, prior=_poisoned_prior(40.0), on_nonfinite="raise")
    with pytest.warns(UserWarning), pytest.raises(NonFiniteError, match="None of the draws"):
        run("dds", prior=_poisoned_prior(-1e9))


def test_memory_back_off_changes_nothing():
    prior = normal_prior()
    seen = []

    class Small(type(prior.denoiser)):
        def __call__(self, x, sigma, cond=None):
            seen.append(x.shape[0])
            if x.shape[0] > 2:
                raise torch.OutOfMemoryError("not enough")
            return super().__call__(x, sigma)

    expected = values(run("dds"))
    prior.denoiser.__class__ = Small
    posterior = run("dds", prior=prior, max_batch=6)
    assert max(seen) > 2 and np.abs(values(posterior) - expected).max() < 1e-10
    assert posterior.provenance["max_batch"] <= 2

    class Never(type(prior.denoiser)):
        def __call__(self, x, sigma, cond=None):
            raise torch.OutOfMemoryError("not enough")

    prior.denoiser.__class__ = Never
    with pytest.raises(InvdiffError, match="Not enough memory"):
        run("dds", prior=prior)


def test_other_errors_are_not_swallowed():
    prior = normal_prior()

    class Broken(type(prior.denoiser)):
        def __call__(self, x, sigma, cond=None):
            raise RuntimeError("a bug")

    prior.denoiser.__class__ = Broken
    with pytest.raises(RuntimeError, match="a bug"):
        run("dds", prior=prior)


def test_a_point_estimate_is_never_uncertainty():
    posterior = run("reddiff")
    assert posterior.kind == "point"
    assert "posterior" not in posterior.tree.children and "estimate" in posterior.tree.children
    with pytest.raises(InvdiffError, match="point estimate"):
        posterior.std()


@pytest.mark.parametrize("name", CONDITIONAL)
def test_the_scale_of_the_image_changes_nothing(name):
    image = Space((1, 6, 5), torch.complex128)
    operator = Keep(image, share=0.9)
    problem = toy_problem(space=image, operator=operator, cases=1)
    factor = 37.0
    scaled = invdiff.Problem(operator, likelihoods.Gaussian(0.1 * factor), problem.y * factor)
    sampler = small(name)
    one = np.asarray(_any(invdiff.sample(problem, scaled_prior(image), sampler, draws=2, seed=1)))
    two = np.asarray(_any(invdiff.sample(scaled, scaled_prior(image), sampler, draws=2, seed=1)))
    assert np.abs(two / factor - one).max() < 1e-6 * np.abs(one).max()


def _any(posterior):
    return posterior.estimate if posterior.kind == "point" else posterior.draws


@dataclass(frozen=True, kw_only=True)
class _Pack(Sampler):
    """A toy ensemble: rows of a case are moved towards their common mean."""

    name: ClassVar[str] = "pack"
    title: ClassVar[str] = "toy ensemble"
    reference: ClassVar[str] = "-"
    kind: ClassVar = "ensemble"
    steps: int = 3

    def step(self, k, state, ctx, rng):
        x = state["x"]
        cases = [c for c, _ in rng.keys]
        assert all(cases.count(c) == 4 for c in cases), "an ensemble was split"
        grouped = x.reshape(-1, 4, *x.shape[1:])
        return {"x": (0.5 * grouped + 0.5 * grouped.mean(1, keepdim=True)).reshape(x.shape)}


def test_ensembles_are_never_split():
    for batch in (1, 3, 5, 64):
        run(_Pack(), draws=4, max_batch=batch)


def test_callbacks_trace_and_stop():
    trace = Trace()
    run("dds", callbacks=[trace], max_batch=3)
    assert len(trace.records) == 2 * 6 and trace.records[0]["value"].shape == (3,)
    calls = []
    stop = StopWhen(lambda info: calls.append(info.k) or len(calls) == 8)
    posterior = run("dds", callbacks=[stop], max_batch=3)
    status = np.asarray(posterior.stats["status"])
    assert (status == "ok").sum() == 3 and (status == "missing").sum() == 3
    assert posterior.tree.attrs["status"] == "stopped"


def test_time_budget_keeps_what_is_finished():
    class Slow(Callback):
        def on_step(self, info):
            time.sleep(0.02)

    posterior = run("dds", callbacks=[Slow()], max_batch=1, time_budget_s=0.05)
    assert 1 <= (np.asarray(posterior.stats["status"]) == "ok").sum() < 6


@pytest.mark.parametrize(
    ("name", "operator", "words"),
    [
        ("dds", Square(), "linear operator"),
        ("tmpd", Square(), "linear operator"),
        ("dps", BlackBox(), "operator with derivatives"),
    ],
)
def test_missing_structure_is_refused_before_any_work(name, operator, words):
    problem = invdiff.Problem(operator, likelihoods.Gaussian(0.1), SPACE.randn(1))
    with pytest.raises(CapabilityError, match=words):
        run(name, problem=problem)


def test_refusal_names_samplers_that_would_do():
    problem = invdiff.Problem(Square(), likelihoods.Gaussian(0.1), SPACE.randn(1))
    with pytest.raises(CapabilityError, match=r"would do: .*dps"):
        run("dds", problem=problem)
    with pytest.raises(CapabilityError, match="can be differentiated"):
        run("dps", prior=normal_prior(differentiable=0))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"draws": 0}, "at least 1, got 0"),
        ({"draws": 2.5}, "at least 1"),
        ({"seed": -1}, "at least 0"),
        ({"max_batch": 0}, "max_batch"),
        ({"device": "warp"}, "cannot be used"),
        ({"on_nonfinite": "zero"}, "on_nonfinite"),
        ({"resume": True}, "Nothing to resume"),
        ({"draws": 10**12}, "fewer draws"),
    ],
)
def test_bad_requests_are_one_sentence(change, words):
    with pytest.raises(InvdiffError, match=words) as caught:
        run("dds", **change)
    assert "\n" not in str(caught.value)


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(InvdiffError, match="did you mean diffpir"):
        samplers.get("difpir")
    with pytest.raises(InvdiffError, match="did you mean 'zeta'"):
        samplers.get("dps", zetta=1.0)
    with pytest.raises(InvdiffError, match="no preset"):
        samplers.get("dps", preset="nope")


def test_provenance_is_complete(tmp_path):
    posterior = run("dds", store=tmp_path / "x.nc")
    about = posterior.provenance
    assert about["sampler"]["config"]["steps"] == 6 and about["prior"]["id"] == "normal"
    assert about["problem"]["likelihood"]["sigma"] == 0.1 and len(about["problem"]["data_sha256"]) == 64
    json.dumps(about)


@pytest.mark.parametrize("name", ALL)
def test_presets_are_valid(name):
    cls = samplers.REGISTRY[name]
    for preset in cls.presets:
        assert isinstance(cls.preset(preset), cls)
    assert cls.name == name and cls.__doc__ and cls.reference and cls.title
