"""Measurements of whole trainings whose truth is known: what must be found, and what must not."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Subset, TensorDataset

from privacy import DPPlan, attach
from privacy.errors import LeakageError
from privacy.leakage import (
    MEMBERSHIP_ATTACKS,
    AugmentationVotes,
    Promise,
    Question,
    ShadowDesign,
    global_threshold,
    membership,
    oracle_threshold,
    score_tables,
)

CLASSES = 10
KEY = b"sixteen bytes or more"


def noise_images(count, width, seed=0):
    """Images of noise with arbitrary classes: all that can be learnt is each by heart."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 1, 1, width, generator=generator)
    return TensorDataset(images, torch.randint(0, CLASSES, (count,), generator=generator))


def network(*sizes, seed):
    """Linear layers whose first weights are drawn by the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    layers = [nn.Flatten()]
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU()]
        with torch.no_grad():
            drawn = torch.randn(after, before, generator=generator) / before**0.5
            layers[-2].weight.copy_(drawn)
            layers[-2].bias.zero_()
    return nn.Sequential(*layers[:-1])


class HashMemory:
    """Its models are certain of images whose bytes they have seen, and guess of all others."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __call__(self, indices, *, seed):
        seen = {self.dataset[int(i)][0].numpy().tobytes(): self.dataset[int(i)][1] for i in indices}
        generator = torch.Generator().manual_seed(seed % 2**31)

        def answer(images):
            logits = 0.1 * torch.randn(len(images), CLASSES, generator=generator)
            for row, image in enumerate(images):
                own = seen.get(image.numpy().tobytes())
                if own is not None:
                    logits[row] = 40.0 * nn.functional.one_hot(own, CLASSES)
            return logits

        return answer


def test_a_model_that_knows_its_images_gives_them_all_away():
    """TPR 1 at FPR 0: an area of 1 is every member above every other, without a tie.

    But for those whose scores are shares: Attack-P, Attack-R, and RMIA, whose members have twice
    their mean at most, which is no more than it looks for.
    """
    dataset = noise_images(400, 4)
    report = membership(HashMemory(dataset), dataset, shadows=8, key=KEY)
    for each in report.attacks:
        assert each.of_target[0].positives == 180
        if each.name not in ("attack-p", "attack-r", "rmia", "rmia-offline"):
            assert each.area == 1.0, each.name
            assert each.of_target[0].tpr == 1.0
            assert each.oracle[0].tpr == 1.0
        assert each.area > 0.75, each.name
    assert report.verdict.startswith("measured")


def test_a_model_that_knows_nothing_gives_nothing_away():
    """Control: the same models, of other images than those that are asked about."""
    dataset, other = noise_images(400, 4), noise_images(400, 4, seed=1)
    report = membership(HashMemory(other), dataset, shadows=8, key=KEY)
    for each in report.attacks:
        # Five standard errors of an area of one half: a chance of 6e-7.
        assert abs(each.area - 0.5) < 5 * np.sqrt(361 / (12 * 180 * 180)), each.name
        assert each.of_target[0].tpr < 0.35


def by_heart(dataset, *sizes, steps, least=0.99):
    """A training function: full batches, until each example is known."""
    images, labels = dataset.tensors

    def train(indices, *, seed):
        mine = torch.from_numpy(indices)
        model = network(*sizes, seed=seed)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(steps):
            optimizer.zero_grad()
            cross_entropy(model(images[mine]), labels[mine]).backward()
            optimizer.step()
        assert (model(images[mine]).argmax(1) == labels[mine]).float().mean() >= least
        return model.eval()

    return train


@pytest.mark.slow
def test_mislabelled_images_are_found():
    """Fifty of them, learnt by heart among others: at a rate of 1 % nine in ten, or more.

    By every attack that asks how an image is known where it was trained on, and by those that
    divide by how it is known where it was not. One threshold for all finds none: an easy image that
    was not trained on is better known than they are.
    """
    digits = load_digits()
    images = torch.from_numpy(digits.images[:1000, None] / 16).float()
    labels = torch.from_numpy(digits.target[:1000].astype(np.int64))
    labels[:100] = (labels[:100] + 1 + torch.arange(100) % 9) % CLASSES
    mine = np.concatenate([np.arange(50), np.arange(100, 550)])
    rest = np.setdiff1d(np.arange(1000), mine)
    design = ShadowDesign.around(mine, rest, shadows=16, pool=None, seed=0)
    dataset = TensorDataset(images, labels)
    train = by_heart(dataset, 64, 256, CLASSES, steps=100)
    tables = score_tables(train, dataset, design, recipe="r", questions={"": Question()})
    table, pool = tables[""], ~tables[""].population
    members = table.members[:, 0]
    wrong = (design.asked < 100) & members
    assert wrong.sum() > 40
    found = {}
    for name, attack in MEMBERSHIP_ATTACKS.items():
        scores = attack(table)[:, 0]
        limit = oracle_threshold(scores[pool], members[pool], 0.01)
        found[name] = float((scores[wrong] > limit).mean())
    for name in ("lira", "bavaria", "rmia", "rmia-offline", "base", "base-offline"):
        assert found[name] >= 0.9, (name, found)
    assert found["global-threshold"] < 0.1


@pytest.fixture(scope="module")
def private():
    """A plan of much noise, images to learn by heart, and what trains on half of them."""
    dataset = noise_images(400, 300)
    plan = DPPlan(samples=200, batch_size=200, epochs=10).calibrate(epsilon=0.5, delta=1e-4)

    def training(own):
        def train(indices, *, seed):
            mine = Subset(dataset, indices.tolist())
            model = network(300, CLASSES, seed=seed)
            optimizer = torch.optim.SGD(model.parameters(), lr=4.0)
            private = attach(own, model, optimizer, mine)
            for images, labels in private.batches:
                private.step(cross_entropy(private.model(images), labels, reduction="none"))
            private.detach()
            return model.eval()

        return train

    return plan, dataset, training


@pytest.mark.parametrize("noise", [True, False])
def test_a_private_run_stays_below_its_curve_and_without_its_noise_it_does_not(private, noise):
    """The same training, clipped and sampled in the same way, its noise switched off: planted."""
    plan, dataset, training = private
    promise = Promise.of([plan.event()], 1e-4)
    own = plan if noise else replace(plan, noise_multiplier=1e-6, target_epsilon=None)
    report = membership(training(own), dataset, shadows=4, promise=promise, key=KEY)
    assert (report.passed, report.void) == (noise, False)
    assert bool(report.broken) is not noise


def test_the_same_seed_measures_the_same_and_another_does_not():
    """Who is a member, the models, and by a key that is given, the digests."""
    dataset = noise_images(100, 4)

    def measured(**how):
        train = by_heart(dataset, 4, 8, CLASSES, steps=0, least=0.0)
        attacks = {"threshold": global_threshold}
        return membership(train, dataset, shadows=2, attacks=attacks, **how)

    one, again, other = (measured(seed=seed, key=KEY) for seed in (0, 0, 1))
    assert one.attack("threshold").areas == again.attack("threshold").areas
    assert one.exposed == again.exposed
    assert one.attack("threshold").areas != other.attack("threshold").areas
    unnamed = [{each.digest for each in measured().exposed} for _ in range(2)]
    assert unnamed[0]
    assert not unnamed[0] & unnamed[1]


def test_half_of_the_data_is_the_targets():
    """Of which a tenth is trained on by all models, and a tenth of the others by none."""
    dataset, seen = noise_images(200, 4), []

    def train(indices, seed):
        seen.append(set(indices.tolist()))
        return network(4, CLASSES, seed=seed % 2**31).eval()

    report = membership(train, dataset, shadows=4)
    assert (report.members, report.others, report.shadows) == (90, 90, 4)
    assert [len(each) for each in seen] == [100] * 5
    assert len(set.intersection(*seen)) == 10
    assert len(set.union(*seen)) == 190
    assert len(seen[1] & seen[2]) == 10  # complementary halves of the pool


def test_a_class_alone_is_asked_for():
    """By a question with a signal of its own, and an attack that takes it."""
    dataset = TensorDataset(torch.rand(40, 1, 4, 4), torch.arange(40) % CLASSES)
    votes = AugmentationVotes()
    report = membership(
        lambda _indices, seed: network(16, CLASSES, seed=seed % 2**31).eval(),
        dataset,
        shadows=2,
        question=Question(signal=votes, queries=votes.queries),
        attacks={"votes": lambda table: np.round(5 * table.signals)},
    )
    assert 0 < report.attack("votes").area < 1


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"shadows": 3}, "even number of models"),
        ({"shadows": 0}, "even number of models"),
        ({"pool": 1}, "expected some and some others for a pool"),
        ({"key": b"short"}, "key: expected at least 16 secret bytes"),
    ],
)
def test_a_measurement_that_cannot_be_is_refused(how, words):
    """Before anything is trained."""
    with pytest.raises(LeakageError, match=words):
        membership(_never, noise_images(40, 4), **how)
    with pytest.raises(LeakageError, match="dataset: expected at least 8 examples, got 7"):
        membership(_never, noise_images(7, 4))


def _never(_indices, *, seed):
    raise AssertionError(seed)
