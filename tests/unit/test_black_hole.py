"""The black-hole problem: rings are measured as they were drawn, and closures of a simulated one fit it."""

import itertools

import numpy as np
import pytest
import torch

from invdiff.errors import InvdiffError
from invdiff.interferometry import Visibilities
from invdiff.problems import black_hole
from invdiff.problems.event_horizon import event_horizon_telescope
from invdiff.problems.rings import measure_rings


@pytest.mark.parametrize(("diameter", "angle"), [(42.0, -160.0), (30.0, 60.0), (56.0, 0.0)])
@pytest.mark.parametrize("shift", [(0, 0), (4, -7)])
def test_rings_are_measured_as_drawn(diameter, angle, shift):
    image = np.roll(black_hole.crescent(diameter, width=10, position_angle=angle, asymmetry=0.6), shift, (0, 1))
    found = measure_rings(image[None], 2.0)
    assert found.diameter[0] == pytest.approx(diameter, abs=0.6)
    assert found.width[0] == pytest.approx(np.hypot(10, 2.3548 * 2), abs=2)  # smoothed by a pixel
    assert (found.position_angle[0] - angle + 180) % 360 - 180 == pytest.approx(0, abs=1)
    assert found.asymmetry[0] == pytest.approx(0.3, abs=0.01)
    assert found.floor[0] < 0.1 and found.roundness[0] < 0.01
    assert found.centre[0] == pytest.approx(31.5 + np.array(shift), abs=0.2)


def test_a_blob_is_no_ring():
    y, x = np.mgrid[:64, :64] - 31.5
    blob = np.exp(-0.5 * (x**2 + y**2) / 36)
    assert measure_rings(blob[None]).floor[0] > 0.8 or measure_rings(blob[None]).diameter[0] < 4
    for bad in (np.zeros((1, 8, 8)), np.full((1, 8, 8), np.nan), np.ones((8, 8))):
        with pytest.raises(InvdiffError, match="finite, bright images"):
            measure_rings(bad)


def telescopes(times=6, seed=0):
    """Eight telescopes on an Earth that turns, without a source yet."""
    rng = np.random.default_rng(seed)
    place = rng.normal(size=(6, 2)) * 2.5e9
    rows = []
    for k in range(times):
        turn = 0.15 * k
        turned = place @ np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        rows += [(1200.0 * k, (a, b), turned[a] - turned[b]) for a, b in itertools.combinations(range(6), 2)]
    time, stations, uv = (np.array(part) for part in zip(*rows))
    n = len(time)
    return Visibilities(
        time, stations, uv, np.zeros(n, complex), np.full(n, 0.002), tuple("ABCDEF"), "ring", 2.3e11
    )


def test_a_simulated_ring_fits_its_closures_and_others_do_not():
    image = black_hole.crescent(42.0)
    seen = black_hole.observe(image, telescopes(), gain=0.3, seed=1)
    other = black_hole.observe(image, telescopes(), gain=0.3, seed=2)
    assert np.abs(seen.value - other.value).max() > 0.1, "stations err differently"
    kept = black_hole.prepare(seen, systematic=0.0)
    problem, data = black_hole.closure_problem(kept), kept.closures()
    images = np.stack([image / image.max(), np.roll(image, 5, 0), black_hole.crescent(32.0), image[::-1, ::-1]])
    fits = [black_hole.chi_squared(problem, data, x[None]) for x in images]
    for fit in fits[:2]:  # the scale and the place of the source cancel
        assert fit["phases"] == pytest.approx(1, abs=0.6) and fit["amplitudes"] == pytest.approx(1, abs=0.6)
    assert fits[2]["amplitudes"] > 5 and fits[3]["phases"] > 5
    truth = torch.from_numpy(images[:1].astype(np.float32))[:, None]
    assert float(problem.log_likelihood(truth)) > float(problem.log_likelihood(truth.flip(-1)))
    assert problem.meta["pixel_uas"] == pytest.approx(2) and "closure phases" in problem.meta["title"]


def test_a_source_must_shine():
    with pytest.raises(InvdiffError, match="positive sum"):
        black_hole.observe(np.zeros((64, 64)), telescopes())


def test_simulated_telescopes_see_what_the_real_ones_saw(m87):
    real, made = m87, event_horizon_telescope(every=60.0)
    order = {"AA": 0, "AP": 1, "AZ": 2, "JC": 3, "LM": 4, "PV": 5, "SM": 6}
    for a, b in np.unique(real.stations, axis=0):
        pair = (order[real.names[a]], order[real.names[b]])
        ours, theirs = made.uv[(made.stations == pair).all(1)], real.uv[(real.stations == (a, b)).all(1)]
        away = np.abs(theirs[:, None] - ours[None]).max(-1).min(1)  # each real point has a simulated one near it
        assert away.max() < 3e7, "a minute turns the longest baseline by 4e7 wavelengths"


def test_telescopes_below_the_horizon_see_nothing():
    made = event_horizon_telescope()
    assert len(made) > 150 and 7.5e9 < np.hypot(*made.uv.T).max() < 9e9
    closures = black_hole.prepare(black_hole.observe(black_hole.crescent(42.0), made)).closures()
    assert len(closures.phases) > 50 and len(closures.amplitudes) > 40
    with pytest.raises(InvdiffError, match="No two stations"):
        event_horizon_telescope(lowest=80.0)
