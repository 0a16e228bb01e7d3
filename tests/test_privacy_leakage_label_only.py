"""Signals of a class alone: views by hand, models that hide all else, ties."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import nn

from privacy.errors import LeakageError
from privacy.leakage import (
    AugmentationVotes,
    NoiseVotes,
    ScoreTable,
    area,
    balanced_halves,
    global_threshold,
    membership_report,
    oracle_threshold,
    point,
    shadow_thresholds,
)

VOTES = [AugmentationVotes(), AugmentationVotes(shift=2, flip=True), NoiseVotes(sigma=0.3)]


@pytest.fixture
def images():
    """Thirty images of two channels, in [0, 1]."""
    return torch.rand(30, 2, 5, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def labels():
    """Of three classes."""
    return torch.arange(30) % 3


@pytest.fixture
def model():
    """Linear, and drawn."""
    made = nn.Sequential(nn.Flatten(), nn.Linear(60, 3)).eval()
    with torch.no_grad():
        made[1].weight.copy_(torch.randn(3, 60, generator=torch.Generator().manual_seed(1)))
    return made


@pytest.mark.parametrize(("shift", "flip"), [(1, False), (2, True), (3, False)])
def test_views_are_those_of_another_library(images, labels, model, shift, flip):
    """Every image moved by so many pixels in all; and how many views that are."""
    right = []
    for down in range(-shift, shift + 1):
        for aside in range(-shift, shift + 1):
            if abs(down) + abs(aside) == shift or down == aside == 0:
                view = ndimage.shift(images.numpy(), (0, 0, down, aside), order=0)
                views = [view, view[..., ::-1].copy()] if flip else [view]
                right += [model(torch.from_numpy(v)).argmax(1) == labels for v in views]
    votes = AugmentationVotes(shift=shift, flip=flip)
    assert votes.queries == len(right)
    with torch.no_grad():
        found = votes(model, images, labels)
    assert found == pytest.approx(torch.stack(right).double().mean(0).numpy())
    assert 0 < found.mean() < 1


@pytest.mark.parametrize("votes", VOTES)
def test_nothing_but_the_class_is_looked_at(images, labels, model, votes):
    """A model that is always certain, and one that is never, say the same."""

    def certain(given):
        return nn.functional.one_hot(model(given).argmax(1), 3) * 1e6

    def vague(given):
        return model(given).double() * 1e-6 + 7

    with torch.no_grad():
        found = votes(model, images, labels)
        assert found.dtype == np.float64
        for other in (certain, vague):
            assert np.array_equal(votes(other, images, labels), found)


@pytest.mark.parametrize("votes", VOTES)
def test_what_is_said_of_an_example_is_of_it_alone(images, labels, model, votes):
    """One at a time, in another order, or all together; and the next call says the same."""
    with torch.no_grad():
        found = votes(model, images, labels)
        alone = [votes(model, images[i : i + 1], labels[i : i + 1])[0] for i in range(30)]
        turned = votes(model, images.flip(0), labels.flip(0))
    assert found.tolist() == alone == turned[::-1].tolist()


@pytest.mark.parametrize("votes", VOTES)
def test_a_model_is_asked_as_often_as_is_said(images, labels, model, votes):
    """About each example."""
    asked = []

    def counting(given):
        asked.append(len(given))
        return model(given)

    with torch.no_grad():
        votes(counting, images, labels)
    assert asked == [30] * votes.queries


def test_noise_is_what_was_asked_for():
    """Mean 0, its deviation, cut to [0, 1]; another seed draws another."""
    seen = []

    def listening(given):
        seen.append(given)
        return torch.zeros(len(given), 2)

    grey = torch.full((1, 1, 20, 20), 0.5)
    NoiseVotes(sigma=0.05, draws=50)(listening, grey, torch.zeros(1, dtype=torch.long))
    noise = torch.stack(seen) - 0.5
    # Five standard errors of 20,000 draws: a chance of 6e-7 each.
    assert abs(noise.mean()) < 5 * 0.05 / 20_000**0.5
    assert abs(noise.std() / 0.05 - 1) < 5 / 40_000**0.5
    assert (seen[0] != seen[1]).any()
    first = seen[0]
    NoiseVotes(sigma=50.0, draws=1, seed=1)(listening, grey, torch.zeros(1, dtype=torch.long))
    assert seen[-1].min() == 0.0
    assert seen[-1].max() == 1.0
    assert ((seen[-1] > 0.5) != (first > 0.5)).any()


def test_a_memory_is_found_by_its_classes():
    """A net that learnt arbitrary classes by heart holds on to those of its own images (planted).

    One that was trained on others than those that are asked about does not (control).
    """
    generator = torch.Generator().manual_seed(0)
    smooth = nn.functional.interpolate(
        torch.rand(300, 1, 3, 3, generator=generator), size=12, mode="bilinear"
    )
    labels = torch.randint(0, 4, (300,), generator=generator)
    members = np.arange(200) < 100
    # Five standard errors of an area of one half: a chance of 6e-7.
    error = 5 * np.sqrt(201 / (12 * 100 * 100))
    for first, told in ((0, True), (200, False)):
        own = slice(first, first + 100)
        model = _learnt_by_heart(smooth[own], labels[own])
        for votes in (AugmentationVotes(), NoiseVotes(sigma=0.05, draws=20)):
            with torch.no_grad():
                found = area(votes(model, smooth[:200], labels[:200]), members)
            assert bool(found > 0.5 + error) is told
            assert told or found > 0.5 - error


def _learnt_by_heart(images, labels):
    model = nn.Sequential(nn.Flatten(), nn.Linear(144, 128), nn.ReLU(), nn.Linear(128, 4))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for each in model.parameters():
            each.copy_(torch.randn(each.shape, generator=generator) / each.shape[-1] ** 0.5)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images - 0.5), labels).backward()
        optimizer.step()
    return lambda given: model(given - 0.5)


def tied(values, *, rows=400, models=5, seed=0):
    """Signals of few values, higher where an example was seen."""
    random = np.random.default_rng(seed)
    members = balanced_halves(rows, models + 1, random)[:, :models]
    signals = (random.integers(0, values, members.shape) + members) / values
    return ScoreTable(
        signals=signals,
        members=members,
        labels=np.zeros(rows, dtype=np.int64),
        recipes=("r",) * models,
        seeds=tuple(range(models)),
    )


@pytest.mark.parametrize("values", [1, 2, 5, 9])
@pytest.mark.parametrize("fpr", [0.0, 0.01, 0.1, 0.3])
def test_ties_count_against_an_attack(values, fpr):
    """No threshold lets more pass than was asked, and no lower one does either."""
    table = tied(values)
    scores, members = global_threshold(table), table.members
    for model in range(5):
        own, mine = scores[:, model], members[:, model]
        others = np.delete(scores, model, 1)[np.delete(~members, model, 1)]
        shadows = shadow_thresholds(scores, members, [fpr])[0, model]
        for limit, pool in ((shadows, others), (oracle_threshold(own, mine, fpr), own[~mine])):
            assert (pool > limit).mean() <= fpr
            assert (pool >= limit).mean() > fpr
            found = point(own[mine], own[~mine], threshold=limit, fpr=fpr)
            assert found.hits == (own[mine] > limit).sum()
            assert found.ties == (own == limit).sum() > 0


def test_a_signal_that_is_the_same_for_all_finds_nobody():
    """Though every member reaches the threshold: all of the scores are tied with it."""
    table = tied(2)
    flat = replace(table, signals=np.ones_like(table.signals))
    report = membership_report(flat, key=bytes(16), attacks={"votes": global_threshold})
    figures = report.attack("votes")
    assert figures.area == 0.5
    for each in (*figures.of_target, *figures.of_all, *figures.oracle):
        assert (each.hits, each.false_alarms) == (0, 0)
        assert each.ties == each.positives + each.negatives


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: AugmentationVotes(shift=0), "shift: expected a whole number, at least 1, got 0"),
        (lambda: NoiseVotes(sigma=0.0), "sigma: expected a finite number > 0"),
        (lambda: NoiseVotes(sigma=float("nan")), "sigma: expected a finite number > 0"),
        (lambda: NoiseVotes(sigma=1.0, draws=0), "draws: expected a whole number, at least 1"),
    ],
)
def test_votes_that_cannot_be_are_refused(make, words):
    """By their number."""
    with pytest.raises(LeakageError, match=words):
        make()


def test_images_that_cannot_be_changed_are_refused(images, labels, model):
    """Flat ones, small ones; and those to which noise is not what it says."""
    for wrong in (images.flatten(1), images[..., :2]):
        with pytest.raises(LeakageError, match="sides above 2, got"):
            AugmentationVotes(shift=2)(model, wrong, labels)
    for wrong in (2 * images, -images, (255 * images).byte(), images * torch.nan):
        with pytest.raises(LeakageError, match=r"expected floats in \[0, 1\]"):
            NoiseVotes(sigma=0.1)(model, wrong, labels)
