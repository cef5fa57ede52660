"""Steps solved in parallel: the draws of the base sampler, in fewer network calls one after another."""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch

import invdiff
from invdiff import anchors, samplers
from invdiff.errors import InvdiffError
from invdiff.prior import FunctionDenoiser, Prior
from invdiff.sampler import Sampler
from invdiff.spaces import Space

BASES = {
    "ddim": samplers.DDIM(steps=40),
    "dpmpp": samplers.DPMpp(steps=30, eta=0.0),
    "dpmpp-sde": samplers.DPMpp(steps=20, eta=1.0),
    "dds": samplers.DDS(steps=20, eta=0.0),
    "dds-stochastic": samplers.DDS(steps=20),
    "diffpir": samplers.DiffPIR(steps=20),
    "dds3d": samplers.DDS3D(steps=12, eta=0.0),
    "flow": None,
}


@functools.lru_cache
def field():
    return anchors.gaussian_field(16, "mask", 0)


def run(sampler, draws=3, **options):
    problem, prior = field()
    return invdiff.sample(problem if sampler.conditional else None, prior, sampler, draws=draws, seed=0, **options)


def values(posterior):
    return np.asarray(posterior.draws).reshape(-1, 256)


@pytest.mark.parametrize("name", BASES)
def test_a_tight_tolerance_gives_the_draws_of_the_base(name):
    base = BASES[name]
    alone = run(base or samplers.DPMpp(steps=30, eta=0.0))
    options = {"base": base} if base else {"steps": 30}
    made = run(samplers.Parallel(window=6, tol=1e-9, **options))
    assert np.abs(values(made) - values(alone)).max() < 1e-6
    steps = int(np.asarray(alone.stats["nfe"]).max())
    rounds = np.asarray(made.stats["rounds"])
    assert rounds.max() <= steps - (name in ("ddim", "dpmpp", "dpmpp-sde", "dds", "flow")), "fewer calls in series"
    assert np.asarray(made.stats["nfe"]).max() >= steps, "and every evaluation is counted"
    assert made.kind == alone.kind


def test_a_loose_tolerance_costs_little_and_saves_much():
    base = samplers.DDIM(steps=60)
    alone, made = run(base), run(samplers.Parallel(base=base, window=10, tol=1e-3))
    assert np.asarray(made.stats["rounds"]).max() <= 15
    assert np.asarray(made.stats["nfe"]).max() <= 130
    error = np.abs(values(made) - values(alone)).max()
    assert 1e-7 < error < 0.02, "an error of the order of the tolerance, and not none"
    tighter = run(samplers.Parallel(base=base, window=10, tol=1e-5))
    assert np.abs(values(tighter) - values(alone)).max() < 0.1 * error


def test_a_window_of_one_is_the_base():
    base = samplers.DDS(steps=10)
    made = run(samplers.Parallel(base=base, window=1))
    assert np.abs(values(made) - values(run(base))).max() < 1e-12
    assert (np.asarray(made.stats["rounds"]) == 10).all() and (np.asarray(made.stats["nfe"]) == 10).all()


def test_a_window_longer_than_the_chain():
    base = samplers.DDIM(steps=5)
    made = run(samplers.Parallel(base=base, window=50, tol=0.0))
    assert np.abs(values(made) - values(run(base))).max() < 1e-12
    assert np.asarray(made.stats["rounds"]).max() <= 5


@pytest.mark.parametrize("name", ["ddim", "dds-stochastic"])
def test_draws_belong_to_their_streams(name):
    """Each draw has its own window, so that neighbours in the batch cannot hold it up or hurry it."""
    sampler = samplers.Parallel(base=BASES[name], window=4, tol=1e-2)
    whole = run(sampler, draws=4)
    alone = run(sampler, draws=4, max_batch=1)
    assert np.abs(values(whole) - values(alone)).max() < 1e-10
    assert np.array_equal(np.asarray(whole.stats["rounds"]), np.asarray(alone.stats["rounds"]))


def test_the_network_sees_rows_times_window():
    seen = []

    def denoise(x, sigma):
        seen.append((len(x), len(set(sigma.tolist()))))
        return x / (1 + sigma.reshape(-1, 1, 1, 1) ** 2)

    space = Space((1, 4, 4), torch.float64)
    prior = Prior(FunctionDenoiser(denoise, space, 1e-3, 50.0))
    sampler = samplers.Parallel(base=samplers.DDIM(steps=30), window=5)
    made = invdiff.sample(None, prior, sampler, draws=3, seed=0, max_batch=3)
    assert max(n for n, _ in seen) == 15 and seen[0] == (15, 5)
    assert len(seen) == np.asarray(made.stats["rounds"]).max()


def test_a_failed_draw_does_not_hold_up_the_others():
    space = Space((1, 4, 4), torch.float64)

    def denoise(x, sigma):
        out = x / (1 + sigma.reshape(-1, 1, 1, 1) ** 2)
        return torch.where(x[:, :1, :1, :1] > 30.0, torch.full_like(out, float("nan")), out)

    def drawn(function):
        prior = Prior(FunctionDenoiser(function, space, 1e-3, 50.0))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return invdiff.sample(None, prior, samplers.Parallel(steps=12), draws=8, seed=0)

    clean = drawn(lambda x, sigma: x / (1 + sigma.reshape(-1, 1, 1, 1) ** 2))
    dirty = drawn(denoise)
    good = np.asarray(dirty.stats["status"] == "ok").reshape(-1)
    assert 0 < good.sum() < 8
    one, two = (np.asarray(p.draws).reshape(8, -1)[good] for p in (clean, dirty))
    assert np.abs(one - two).max() < 1e-10


@dataclass(frozen=True, kw_only=True)
class _Twice(Sampler):
    name: ClassVar[str] = "twice"
    conditional: ClassVar[bool] = False

    def step(self, k, state, ctx, rng):
        return {"x": ctx.denoise(ctx.denoise(state["x"], 1.0), 1.0)}


def test_what_cannot_run_in_parallel_is_refused():
    with pytest.raises(InvdiffError, match="no gradient"):
        samplers.Parallel(base=samplers.PiGDM())
    with pytest.raises(InvdiffError, match="once each"):
        run(samplers.Parallel(base=samplers.Heun(steps=3)))
    with pytest.raises(InvdiffError, match="once each"):
        run(samplers.Parallel(base=_Twice(steps=3)))
    for bad in ({"window": 0}, {"window": 2.5}, {"tol": -1.0}, {"tol": float("nan")}):
        with pytest.raises(InvdiffError, match="window >= 1 and tol >= 0"):
            samplers.Parallel(**bad)


def test_it_says_what_it_runs():
    made = run(samplers.Parallel(base=samplers.DDS(steps=4, eta=0.3)))
    config = made.provenance["sampler"]["config"]
    assert config["base"]["name"] == "dds" and config["base"]["config"]["eta"] == 0.3
    assert config["steps"] == 4 and config["window"] == 8
    assert samplers.Parallel(base=samplers.DDS()).requires == samplers.DDS.requires
