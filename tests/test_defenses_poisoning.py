"""Planting: exactly the images asked for are changed, in exactly the way stated."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from defenses.errors import AttackError
from defenses.poisoning.poisoning import LabelFlip, Trigger, flip_labels, plant_trigger


def dataset(n=60, channels=1, classes=3):
    """Random images and labels, each class alike in number."""
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(256, (n, channels, 8, 8), generator=draw, dtype=torch.uint8)
    return images, torch.arange(n) % classes


@given(
    st.floats(0.01, 0.6),
    st.integers(0, 2),
    st.integers(0, 3),
    st.integers(0, 99),
    st.integers(1, 3),
)
@settings(deadline=None, derandomize=True, max_examples=60)
def test_a_trigger_is_planted_as_asked(fraction, target, margin, seed, channels):
    """So many images of other classes, stamped inside the patch only; everything else as it was."""
    images, labels = dataset(channels=channels)
    before = images.clone(), labels.clone()
    trigger = Trigger(target=target, margin=margin)
    poisoned = plant_trigger(images, labels, trigger, fraction=fraction, seed=seed)
    assert torch.equal(images, before[0])
    assert torch.equal(labels, before[1])
    planted = poisoned.planted
    assert len(planted.unique()) == len(planted) == max(1, round(60 * fraction))
    assert bool((labels[planted] != target).all())
    assert bool((poisoned.labels[planted] == target).all())
    inside = torch.zeros(8, 8, dtype=torch.bool)
    inside[5 - margin : 8 - margin, 5 - margin : 8 - margin] = True
    expected = torch.tensor([255, 0, 255, 0, 255, 0, 255, 0, 255], dtype=torch.uint8)
    assert bool((poisoned.images[planted][..., inside] == expected).all())
    assert torch.equal(poisoned.images[..., ~inside], images[..., ~inside])
    others = torch.ones(60, dtype=torch.bool)
    others[planted] = False
    assert torch.equal(poisoned.images[others], images[others])
    assert torch.equal(poisoned.labels[others], labels[others])


def test_a_patch_of_ones_own_is_stamped():
    """On every channel if it has one, each on its own if it has as many."""
    images, _ = dataset(channels=3)
    patch = torch.tensor([[[1]], [[2]], [[3]]], dtype=torch.uint8)
    stamped = Trigger(target=0, patch=patch).apply(images)
    assert bool((stamped[:, :, 7, 7] == torch.tensor([1, 2, 3])).all())
    grey = Trigger(target=0, patch=torch.full((1, 2, 1), 9, dtype=torch.uint8)).apply(images)
    assert bool((grey[:, :, 6:, 7] == 9).all())


@pytest.mark.parametrize(("fraction", "count"), [(0.25, 5), (1.0, 20), (0.001, 1)])
def test_labels_are_flipped_as_asked(fraction, count):
    """A share of the source class becomes the target; no pixel changes."""
    images, labels = dataset()
    poisoned = flip_labels(images, labels, LabelFlip(source=2, target=0), fraction=fraction)
    changed = (poisoned.labels != labels).nonzero().flatten()
    assert torch.equal(changed, poisoned.planted)
    assert len(changed) == count
    assert bool((labels[changed] == 2).all())
    assert bool((poisoned.labels[changed] == 0).all())
    assert torch.equal(poisoned.images, images)


def test_the_seed_decides_which():
    """The same images for the same seed, others for another."""
    images, labels = dataset()
    chosen = [
        plant_trigger(images, labels, Trigger(target=0), fraction=0.2, seed=seed).planted.tolist()
        for seed in (1, 1, 2)
    ]
    assert chosen[0] == chosen[1] != chosen[2]


def test_what_cannot_be_planted_is_refused():
    """Fractions, images and labels of another kind, patches that do not fit."""
    images, labels = dataset()
    trigger = Trigger(target=0)
    for fraction in (0.0, -0.1, 0.9, 1.1, float("nan")):
        with pytest.raises(AttackError, match="fraction"):
            plant_trigger(images, labels, trigger, fraction=fraction)
    with pytest.raises(AttackError, match="uint8"):
        plant_trigger(images.float(), labels, trigger, fraction=0.1)
    with pytest.raises(AttackError, match="int64"):
        plant_trigger(images, labels[:-1], trigger, fraction=0.1)
    with pytest.raises(AttackError, match="seed"):
        plant_trigger(images, labels, trigger, fraction=0.1, seed=-1)
    with pytest.raises(AttackError, match="fits"):
        Trigger(target=0, margin=6).apply(images)
    with pytest.raises(AttackError, match="fits"):
        Trigger(target=0, patch=torch.zeros(2, 1, 1, dtype=torch.uint8)).apply(images)
    with pytest.raises(AttackError, match="is for 0"):
        flip_labels(images, labels, LabelFlip(source=7, target=0), fraction=0.5)
    for wrong in ({"target": -1}, {"target": 0, "margin": -1}, {"target": 0, "patch": images}):
        with pytest.raises(AttackError):
            Trigger(**wrong)
    with pytest.raises(AttackError):
        LabelFlip(source=1, target=1)
