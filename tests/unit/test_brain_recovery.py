"""The brain benchmark: deepinv is given the problem that we have, and rows give finite figures in a sane order."""

import importlib
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from invdiff import samplers
from invdiff.plan import missing_capabilities

ROOT = Path(__file__).resolve().parents[2]
DRAWS, EVALUATIONS = 2, 6


@pytest.fixture(scope="module")
def bench():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield importlib.import_module("brain_recovery")
        for name in ("brain_recovery", "deepinv_peers"):
            del sys.modules[name]


@pytest.fixture(scope="module", params=[8, 1], ids=["8 coils", "1 coil"])
def case(request, bench):
    return bench.simulate(bench.image_of(1)[60:92, 60:92], request.param, seed=0, acceleration=2.0, centre=8)


def test_deepinv_sees_our_problem(bench, case):
    """The truth explains deepinv's data to the noise; the adjoint is one; the decomposition is the operator's."""
    bridge = bench.deepinv_peers.Bridge(case.problem, case.prior, DRAWS)
    reach = bridge.reach
    v = case.prior.codec.encode(torch.from_numpy(case.truth)[None, None])
    u = 0.5 + v / (2 * reach)
    assert float(u.min()) > 0 and float(u.max()) < 1
    physics = bridge.physics()
    rest = (bridge.y[:1] - physics.A(u)) / bridge.sigma
    inside = case.problem.operator.mask[0, 0] > 0
    count = rest[..., inside, :].numel()
    assert float(rest[..., inside, :].square().mean()) == pytest.approx(1, abs=5 * math.sqrt(2 / count))
    assert float(rest[..., ~inside, :].abs().max()) < 1e-4 / bridge.sigma
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(u.shape, generator=generator), torch.randn(bridge.y[:1].shape, generator=generator)
    assert float((physics.A(a) * b).sum()) == pytest.approx(float((a * physics.A_adjoint(b)).sum()), rel=1e-3)
    torch.testing.assert_close(physics.A_adjoint_A(a), physics.A_adjoint(physics.A(a)), atol=1e-4, rtol=1e-3)
    if "svd" in case.pulled.capabilities:
        torch.testing.assert_close(bridge.physics(spectral=True).A(a), physics.A(a), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(torch.from_numpy(bridge.images(u).x[0]), torch.from_numpy(case.truth))


def test_denoiser_for_deepinv_is_ours(bench, case):
    bridge = bench.deepinv_peers.Bridge(case.problem, case.prior, 1)
    reach = bridge.reach
    u = torch.rand(1, 2, 32, 32, generator=torch.Generator().manual_seed(0))
    v = 2 * reach * (u - 0.5)
    ours = case.prior.denoiser(v, torch.full((1,), 2 * reach * 0.1))
    torch.testing.assert_close(bridge.denoise(u, 0.1), 0.5 + ours / (2 * reach))
    assert bool(torch.isfinite(bridge.denoise(1e3 * u, 500.0)).all())  # beyond the prior's largest level
    assert (bridge.nfe, bridge.vjp) == (2, 0)


def test_every_row_that_applies_has_what_it_needs(bench, case):
    coils = case.problem.operator.range.shape[0]
    rows = [r for r in bench.rows("1 coil") if r.group == "ours"]
    lacking = {
        r.label: missing_capabilities(samplers.REGISTRY[r.config["sampler"]](), case.pulled, case.prior)
        for r in rows
    }
    assert not any(lacking[r.label] for r in rows if r.applies(coils))
    assert all(lacking[r.label] or r.label == "lanpaint" for r in rows if not r.applies(coils))


def test_rows_are_finite_and_ordered(bench, case):
    rows = [
        bench.sampler_row("dds", draws=DRAWS, steps=EVALUATIONS),
        bench.sampler_row("dps", draws=DRAWS, steps=EVALUATIONS),
        *(bench.peer_row(n, {}, "x", DRAWS, EVALUATIONS) for n in ("DPS", "DiffPIR", "DDRM")),
        *(r for r in bench.rows("8 coils") if r.label in ("zero-filled", "SENSE")),
    ]
    coils = case.problem.operator.range.shape[0]
    found = {r.label: bench.measure(r, case, 0) for r in rows if r.applies(coils)}
    assert ("deepinv DDRM, x" in found) == ("svd" in case.pulled.capabilities)
    for label, figures in found.items():
        classical = label in ("zero-filled", "SENSE")
        assert figures["nfe"] == (0 if classical else EVALUATIONS), label
        spread = {k for k in ("psnr_draw", "coverage", "crps", "level") if math.isnan(figures[k])}
        assert len(spread) == (4 if classical else 0), label
        rest = [v for k, v in figures.items() if k not in ("psnr_draw", "coverage", "crps", "level")]
        assert np.isfinite(rest).all(), label
    for label in ("dds", "deepinv DiffPIR, x"):  # the mean of draws is nearer to the truth than they are
        assert found[label]["psnr"] > found[label]["psnr_draw"], label
    assert found["dps"]["vjp"] == found["deepinv DPS, x"]["vjp"] == EVALUATIONS
    assert found["dds"]["psnr"] > found["zero-filled"]["psnr"]
    assert found["dds"]["psnr"] > max(f["psnr"] for n, f in found.items() if n.startswith("deepinv"))


def test_cache_and_page(bench, case, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "RESULTS", tmp_path / "brain_recovery.json")
    monkeypatch.setattr(bench, "case_of", lambda problem, index: case)
    bench.run(bench.rows, ["zero-filled"], ["8 coils"], [0, 1])
    first = bench.RESULTS.read_text()
    monkeypatch.setattr(bench, "measure", lambda *a: pytest.fail("measured again"))
    bench.run(bench.rows, ["zero-filled"], ["8 coils"], [0, 1])
    assert bench.RESULTS.read_text() == first
    bench.write()
    lines = bench.RESULTS.with_suffix(".md").read_text().splitlines()
    (line,) = [x for x in lines if x.startswith("| zero-filled")]
    assert line.endswith("| 2 |") and "nan" not in line
