"""Planting: exactly the images asked for are changed, in exactly the way stated."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from defenses.errors import AttackError
from defenses.poisoning.poisoning import (
    Blend,
    LabelFlip,
    Trigger,
    flip_labels,
    plant_clean_label,
    plant_trigger,
)


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
    for wrong in (
        {"target": -1},
        {"target": "0"},
        {"target": None},
        {"target": True},
        {"target": 0, "margin": -1},
        {"target": 0, "margin": 1.5},
        {"target": 0, "patch": images[None]},
        {"target": 0, "patch": [[[1]]]},
    ):
        with pytest.raises(AttackError):
            Trigger(**wrong)
    assert Trigger(target=np.int64(1)).victims(torch.tensor([0, 1])).tolist() == [True, False]
    with pytest.raises(AttackError):
        LabelFlip(source=1, target=1)


@given(st.floats(0.01, 1.0), st.integers(1, 3), st.integers(0, 99))
@settings(deadline=None, derandomize=True, max_examples=40)
def test_a_pattern_is_blended_in_as_asked(ratio, channels, seed):
    """Within half a level of (1 - ratio) * image + ratio * pattern, on relabelled images alone."""
    images, labels = dataset(channels=channels)
    draw = torch.Generator().manual_seed(seed)
    pattern = torch.randint(256, (channels, 8, 8), generator=draw, dtype=torch.uint8)
    blend = Blend(target=1, pattern=pattern, ratio=ratio)
    poisoned = plant_trigger(images, labels, blend, fraction=0.2, seed=seed)
    planted = poisoned.planted
    exact = (1 - ratio) * images[planted].double() + ratio * pattern.double()
    assert bool(((poisoned.images[planted].double() - exact).abs() <= 0.5 + 1e-9).all())
    assert bool((labels[planted] != 1).all() & (poisoned.labels[planted] == 1).all())
    others = torch.ones(60, dtype=torch.bool)
    others[planted] = False
    assert torch.equal(poisoned.images[others], images[others])
    assert torch.equal(Blend(target=0).apply(images), Blend(target=0).apply(images))


def test_clean_labels_stay_right():
    """A share of the target's images is stamped, after what makes them harder; no label changes."""
    images, labels = dataset()
    trigger = Trigger(target=2)
    plain = plant_clean_label(images, labels, trigger, fraction=0.5)
    assert torch.equal(plain.labels, labels)
    assert len(plain.planted) == 10
    assert bool((labels[plain.planted] == 2).all())
    assert torch.equal(plain.images[plain.planted], trigger.apply(images[plain.planted]))
    changed = (plain.images != images).flatten(1).any(dim=1).nonzero().flatten()
    assert torch.equal(changed, plain.planted)
    asked = []

    def harden(floats, classes):
        asked.append((floats.shape, classes.tolist()))
        return floats + 2 / 255

    hard = plant_clean_label(images, labels, trigger, fraction=0.5, harden=harden)
    assert asked == [((10, 1, 8, 8), [2] * 10)]
    raised = (images[plain.planted].int() + 2).clamp(max=255).to(torch.uint8)
    assert torch.equal(hard.images[hard.planted], trigger.apply(raised))


def test_blends_and_clean_labels_that_cannot_be_are_refused():
    """Ratios, patterns of another size, hardened images that are none, a target without images."""
    images, labels = dataset()
    with pytest.raises(AttackError, match="target"):
        Blend(target=-1)
    for wrong in (
        {"target": 0, "ratio": "half"},
        {"target": 0, "ratio": None},
        {"target": 0, "ratio": 0.0},
        {"target": 0, "ratio": float("nan")},
    ):
        with pytest.raises(AttackError, match="ratio"):
            Blend(**wrong)
    with pytest.raises(AttackError, match="pattern"):
        Blend(target=0, pattern=images[None])
    with pytest.raises(AttackError, match="size"):
        Blend(target=0, pattern=torch.zeros(1, 4, 4, dtype=torch.uint8)).apply(images)
    with pytest.raises(AttackError, match="is for 0"):
        plant_clean_label(images, labels, Trigger(target=9), fraction=0.5)
    with pytest.raises(AttackError, match="fraction"):
        plant_clean_label(images, labels, Trigger(target=0), fraction=1.5)
    for harden in (
        lambda floats, _: floats[:1],
        lambda floats, _: floats.numpy(),
        lambda floats, _: floats * float("nan"),
        lambda floats, _: floats.mul(255).to(torch.uint8),
    ):
        with pytest.raises(AttackError, match="harden"):
            plant_clean_label(images, labels, Trigger(target=0), fraction=0.5, harden=harden)
    for pixels, classes in ((images.numpy(), labels), (images, labels.tolist())):
        with pytest.raises(AttackError, match="tensor"):
            plant_trigger(pixels, classes, Trigger(target=0), fraction=0.1)
