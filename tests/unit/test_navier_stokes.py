"""The flow operator: exact vortices, order of convergence, invariants, rows that keep to themselves, gradients."""

import itertools
import math

import pytest
import torch

import invdiff
from invdiff import operators
from invdiff.errors import InvdiffError

TWO_PI = 2 * math.pi


def grid(n):
    s = torch.arange(n, dtype=torch.float64) * TWO_PI / n
    return torch.meshgrid(s, s, indexing="ij")


def rough(n, rows, seed=0, speed=1.0):
    """Random vorticity of a few large waves, ``(rows, 1, n, n)``."""
    y, x = grid(n)
    g = torch.Generator().manual_seed(seed)
    out = torch.zeros(rows, 1, n, n, dtype=torch.float64)
    for ky in range(-3, 4):
        for kx in range(1, 4):
            a, phase = torch.randn(2, rows, 1, 1, 1, generator=g, dtype=torch.float64)
            out += speed * a * torch.cos(ky * y + kx * x + 6 * phase)
    return out


def flow(n=32, **options):
    return operators.NavierStokes((1, n, n), dtype=torch.float64, **options)


def test_a_taylor_green_vortex_decays_and_does_nothing_else():
    y, x = grid(32)
    w = (2 * torch.cos(3 * x) * torch.cos(3 * y))[None, None]
    out = flow(viscosity=0.05, time=0.7)(w)
    torch.testing.assert_close(out, math.exp(-18 * 0.05 * 0.7) * w, atol=1e-12, rtol=0)


def test_a_steady_flow_is_held_by_its_forcing():
    """Shear ``w = cos(k y)`` advects nothing: it grows towards ``f / (nu k^2)`` and is held there."""
    y, _ = grid(32)
    wave = torch.cos(4 * y)
    op = flow(viscosity=0.02, time=3.0, forcing=-4 * wave)
    limit = -4 / (0.02 * 16)
    expected = limit * (1 - math.exp(-0.02 * 16 * 3))
    torch.testing.assert_close(op(torch.zeros(1, 1, 32, 32).double())[0, 0], expected * wave, atol=1e-8, rtol=0)


def test_an_euler_flow_stands_still():
    """``w = cos x + cos y`` is a function of its own stream function: advection vanishes, and both terms must."""
    y, x = grid(64)
    # u = d psi / dy = -sin y, v = -d psi / dx = sin x for psi = cos x + cos y, so that u . grad w = 0
    w = (torch.cos(x) + torch.cos(y))[None, None]
    torch.testing.assert_close(flow(64, viscosity=0.0, time=2.0)(w), w, atol=1e-11, rtol=0)


def test_the_order_in_time_is_four():
    """The steps follow the Courant number; errors against much finer ones fall as its fourth power."""
    w = rough(32, 1, seed=1)
    made = {c: flow(viscosity=1e-3, time=0.5, courant=c, segments=1)(w) for c in (1.0, 0.5, 0.25, 0.03125)}
    exact = made.pop(0.03125)
    errors = [float((v - exact).norm()) for v in made.values()]
    rates = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert all(3.7 < r < 4.6 for r in rates), rates


def test_energy_and_enstrophy_are_kept_without_viscosity():
    w = rough(48, 2, seed=2)
    op = flow(48, viscosity=0.0, time=1.0, courant=0.25)
    start, out = op(1e-9 * w) * 1e9, op(w)  # the first is the truncated start: it hardly moves

    def energy(w):
        u, v = torch.fft.irfft2(op.velocity[:, None] * torch.fft.rfft2(w[:, 0]), s=(48, 48))
        return (u**2 + v**2).flatten(1).mean(1)

    torch.testing.assert_close(energy(out), energy(start), rtol=1e-5, atol=0)
    torch.testing.assert_close(out.square().mean((1, 2, 3)), start.square().mean((1, 2, 3)), rtol=1e-4, atol=0)
    assert float((out - start).norm() / start.norm()) > 0.3  # and it did move


def test_the_truncated_modes_do_not_alias():
    """A grid twice as fine moves the same waves alike, as long as smaller ones than the coarse grid's are few."""
    coarse, fine = rough(48, 1, seed=3), rough(96, 1, seed=3)
    options = {"viscosity": 0.05, "time": 0.3, "courant": 0.2}
    a, b = flow(48, **options)(coarse), flow(96, **options)(fine)[..., ::2, ::2]
    assert float((a - b).norm() / b.norm()) < 5e-4


def test_rows_do_not_know_each_other():
    """A fast row takes more steps, and leaves the slow one as it is alone."""
    slow, fast = rough(32, 1, seed=4, speed=0.1), rough(32, 1, seed=5, speed=30.0)
    op = flow(time=0.3, viscosity=0.01)
    together = op(torch.cat([slow, fast, slow]))
    torch.testing.assert_close(together[::2], op(slow).expand(2, 1, 32, 32), atol=1e-13, rtol=0)
    assert int(op._steps(torch.fft.rfft2(fast[:, 0]))[0]) > int(op._steps(torch.fft.rfft2(slow[:, 0]))[0])


def test_gradients_are_those_of_the_map_and_take_little_memory():
    w = rough(32, 2, seed=6)
    op = flow(time=0.4, viscosity=0.01, segments=4)
    g = torch.Generator().manual_seed(7)
    v, dw = (torch.randn(w.shape, generator=g, dtype=torch.float64) for _ in range(2))
    slope = (op(w + 1e-6 * dw) - op(w - 1e-6 * dw)) / 2e-6
    torch.testing.assert_close((slope * v).sum(), (op.vjp(w, v) * dw).sum(), rtol=1e-6, atol=0)
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t.numel()) or t, lambda t: t):
        op(w.clone().requires_grad_(True))
    once = sum(held)
    held.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t.numel()) or t, lambda t: t):
        flow(time=1.6, viscosity=0.01, segments=4)(w.clone().requires_grad_(True))
    assert sum(held) < 1.5 * once  # four times the time in as many segments


def test_the_contract_of_operators():
    report = invdiff.testing.check_operator(flow(8, time=0.2, viscosity=0.05, forcing=torch.ones(8, 8)))
    assert report.ok, report


def test_moving_keeps_precision_and_parameters():
    op = flow(16, time=0.2).to(dtype=torch.float32)
    w = rough(16, 1).float()
    out = op(w)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), flow(16, time=0.2)(w.double()), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "make, sentence",
    [
        (lambda: operators.NavierStokes((1, 16, 24)), "real square"),
        (lambda: operators.NavierStokes((2, 16, 16)), "real square"),
        (lambda: operators.NavierStokes((1, 16, 16), time=0.0), "time > 0"),
        (lambda: operators.NavierStokes((1, 16, 16), courant=2.0), "courant <= 1"),
        (lambda: operators.NavierStokes((1, 16, 16), forcing=torch.ones(3, 16, 16)), "fits one image"),
        (lambda: flow(16)(1e9 * rough(16, 1)), "blows up"),
    ],
)
def test_bad_flows_are_refused(make, sentence):
    with pytest.raises(InvdiffError, match=sentence):
        make()
