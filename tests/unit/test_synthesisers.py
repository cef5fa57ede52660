"""Synthetic training images: reproducible, disjoint from the held-out ones, in the units that cards state."""

import dataclasses

import numpy as np
import pytest

from invdiff.training.config import TrainConfig
from invdiff.training.data import synthetic_images
from invdiff.training.synthesisers import SYNTHESISERS
from invdiff.training.train import train

DRAWN = [name for name in SYNTHESISERS if name != "brain"]  # the brain has tests of its own


@pytest.mark.parametrize("name", DRAWN)
def test_images_follow_from_the_seed_alone(name):
    made = SYNTHESISERS[name]
    first, again, other, held = made.image(3), made.image(3), made.image(4), made.image(3, held_out=True)
    assert np.array_equal(first, again)
    assert first.dtype == np.float32 and first.shape[0] == made.channels and first.ndim == 3
    for different in (other, held):
        assert different.shape != first.shape or not np.allclose(different, first)


@pytest.mark.parametrize("name", [name for name in DRAWN if name != "natural"])  # has its own white and black
def test_images_have_unit_scale_and_differ_from_noise(name):
    largest = {"ct": 2.5, "black-hole": 5.0, "digits": 1.0, "vorticity": 3.0}
    for image in (SYNTHESISERS[name].image(seed) for seed in range(40 if name != "vorticity" else 5)):
        assert np.isfinite(image).all() and (image.min() >= 0 or name == "vorticity")
        level, top = np.percentile(np.abs(image), 99), image.max()
        assert 0.5 < level <= 1.001 or top == pytest.approx(largest[name], rel=1e-3)
        assert name == "digits" or level == pytest.approx(1, rel=1e-3) or top > 0.999 * largest[name]
        assert top <= 1.001 * largest[name]
        steps = np.abs(np.diff(image[0], axis=0)).mean()
        shuffled = np.random.default_rng(0).permutation(image[0].ravel()).reshape(image[0].shape)
        assert steps < 0.5 * np.abs(np.diff(shuffled, axis=0)).mean()


@pytest.mark.parametrize("name", DRAWN)
def test_a_prior_trains_on_them_and_its_card_says_so(name, tmp_path):
    channels = SYNTHESISERS[name].channels
    recipe = TrainConfig(
        data=name, channels=channels, output=str(tmp_path), images=3, validation_images=1, steps=2
    )
    recipe = dataclasses.replace(recipe, widths=(8, 8), blocks=1, batch=2, crop=16, late_crop=16, late_batch=1)
    result = train(recipe)
    assert result.card is not None and SYNTHESISERS[name].function in result.card.read_text()
    with pytest.raises(ValueError, match=f"makes images of {channels} real channel"):
        train(dataclasses.replace(recipe, channels=2, output=str(tmp_path / "other")))


def test_photographs_of_validation_are_never_seen_in_training(monkeypatch):
    from invdiff.training import natural_images

    opened = []
    photograph = natural_images._photograph
    monkeypatch.setattr(natural_images, "_photograph", lambda name: opened.append(name) or photograph(name))
    monkeypatch.setattr(natural_images, "LEAVES", 0.0)
    images = [SYNTHESISERS["natural"].image(seed) for seed in range(20)]
    assert all(x.shape == (3, 96, 96) and x.min() >= 0 and x.max() <= 1 for x in images)
    assert len(set(opened)) > 5 and not set(opened) & set(natural_images.HELD_OUT)
    opened.clear()
    assert not np.allclose(*(SYNTHESISERS["natural"].image(seed, held_out=True) for seed in (0, 1)))
    assert set(opened) == set(natural_images.HELD_OUT)
    # neighbours are alike, as in photographs: half of the variance is gone between pixels next to each other
    steps = np.mean([np.diff(x, axis=1).var() for x in images])
    assert steps < np.mean([x.var() for x in images])


@pytest.mark.parametrize("name", DRAWN)
def test_bad_seeds_are_refused(name):
    with pytest.raises(ValueError, match="non-negative integer"):
        SYNTHESISERS[name].image(-1)


def test_unknown_synthesisers_are_refused():
    with pytest.raises(ValueError, match="there are brain, ct"):
        synthetic_images("cat", 1)
