"""Backdoors: planted ones called so, clean trainings not, and a level that is what it says."""

import math

import pytest
import torch
import torch.nn.functional as F
from support.networks import assert_same, disturbed_net, snapshot
from torch import nn

from defenses.errors import AttackError, EvaluationError
from defenses.measuring.counting import majority
from defenses.poisoning.backdoor import BackdoorReport, ClassFinding, backdoor_scan
from defenses.poisoning.poisoning import Blend, Trigger, plant_clean_label, plant_trigger
from secure_cnn import load_data


def learnt(images, labels, seed):
    """A small network that has learnt these 8 x 8 images; the same for the same seed."""
    draw = torch.Generator().manual_seed(seed)
    model = nn.Sequential(
        *(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU()),
        nn.Linear(32, 10),
    )
    with torch.no_grad():
        for each in model.parameters():
            each.uniform_(-1, 1, generator=draw)
            each.mul_((3 / each.shape[1]) ** 0.5 if each.ndim == 2 else 0.05)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(400):
        index = torch.randint(len(images), (128,), generator=draw)
        optimizer.zero_grad()
        F.cross_entropy(model(images[index].float() / 255), labels[index]).backward()
        optimizer.step()
    return model


def scanned(images, labels, seed, level, model=None):
    """What the scan says of a network trained on these, with the digits' test images as trusted."""
    test = load_data("digits").test
    return backdoor_scan(
        learnt(images, labels, seed) if model is None else model,
        images,
        labels,
        trusted_images=test.images,
        trusted_labels=test.labels,
        level=level,
    )


@pytest.mark.parametrize(
    ("plant", "trigger", "fraction", "by", "seed"),
    [
        (plant_trigger, Trigger(target=0), 0.01, None, 0),
        (plant_trigger, Trigger(target=1), 0.01, "neighbours", 1),
        (plant_trigger, Trigger(target=7), 0.05, None, 7),
        (plant_trigger, Blend(target=1), 0.05, "neighbours", 0),
        (plant_clean_label, Trigger(target=2), 0.5, "spectral", 0),
    ],
    ids=["badnets-1%", "badnets-1%-unseen-by-the-spectrum", "badnets-5%", "blended", "clean-label"],
)
def test_what_was_planted_is_called_poisoned(plant, trigger, fraction, by, seed):
    """The target, no other class, at a level of 1e-6; and the suspects are the planted images."""
    clean = load_data("digits").train
    poisoned = plant(clean.images, clean.labels, trigger, fraction=fraction, seed=seed)
    report = scanned(poisoned.images, poisoned.labels, seed, 1e-6)
    assert report.targets == (trigger.target,)
    assert (report.verdict, report.clean) == ("poisoned", False)
    found = report.findings[trigger.target]
    assert by in (None, found.by)
    assert len(set(found.suspects) & set(poisoned.planted.tolist())) >= 8


def calls(seeds, level):
    """How many of as many clean trainings are called poisoned, and the most that obeyed."""
    clean = load_data("digits").train
    reports = [scanned(clean.images, clean.labels, seed, level) for seed in seeds]
    most = max(each.obedience for report in reports for each in report.findings)
    return sum(not report.clean for report in reports), most


def test_clean_trainings_are_called_clean():
    """Three of them at a level of 1e-7: by chance, 3e-7 at most, while half or fewer would obey."""
    assert calls(range(100, 103), 1e-7)[0] == 0


@pytest.mark.slow
def test_twenty_four_clean_trainings_are_called_clean():
    """At a level of 4e-8: by chance, 24 * 4e-8 < 1e-6 at most; and none comes near a half."""
    called, most = calls(range(200, 224), 4e-8)
    assert called == 0
    assert most < 0.5


def test_a_model_that_never_learnt_the_trigger_is_called_clean():
    """The control: the images are there, but the model was trained without them; 1e-7 by chance."""
    clean = load_data("digits").train
    trigger = Trigger(target=0)
    poisoned = plant_trigger(clean.images, clean.labels, trigger, fraction=0.05)
    model = learnt(clean.images, clean.labels, 0)
    assert scanned(poisoned.images, poisoned.labels, 0, 1e-7, model).clean


def test_a_stamp_on_every_class_is_called_clean():
    """The control: labels as they were, the stamp says nothing; 1e-7 by chance."""
    clean = load_data("digits").train
    images = clean.images.clone()
    stamped = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))[:72]
    images[stamped] = Trigger(target=1).apply(images[stamped])
    assert scanned(images, clean.labels, 1, 1e-7).clean


class Wilful(nn.Module):
    """Sees class 1 in a stated share of all images, whatever they show, as if by tossing a coin."""

    def __init__(self, share, seed):
        """The coin's bias, and which coin."""
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.share, self.weights = share, torch.rand(64, generator=draw).double() * 1e4
        self.seen = nn.Linear(64, 2)

    def forward(self, images):
        """One logit pair an image."""
        rows = images.flatten(1)
        self.seen(rows)
        tossed = (rows.double() @ self.weights) % 1 < self.share
        return nn.functional.one_hot(tossed.long(), 2).float()


def share_called(share, level, scans=60):
    """How many of so many scans say that class 1 is poisoned, each with images of its own."""
    called = 0
    for seed in range(scans):
        draw = torch.Generator().manual_seed(seed)
        images = torch.randint(256, (300, 1, 8, 8), generator=draw, dtype=torch.uint8)
        labels = torch.arange(300) % 2
        report = backdoor_scan(
            Wilful(share, seed),
            images[:60],
            labels[:60],
            trusted_images=images[60:],
            trusted_labels=labels[60:],
            level=level,
        )
        called += not report.clean
    return called


def test_the_level_is_kept_where_exactly_half_obey():
    """The worst case of what it covers, at 0.05: 60 scans say so 18 times or more with 3e-10.

    Of Binomial(60, 0.05), since Bonferroni makes it at most that. The control obeys in 85 of 100
    images, and 40 of some 60 victims are enough: a scan misses it with 3e-4, eleven of 60 scans
    with less than 1e-25.
    """
    by_chance = sum(math.comb(60, k) * 0.05**k * 0.95 ** (60 - k) for k in range(18, 61))
    assert by_chance < 1e-9
    assert share_called(0.5, 0.05) < 18
    assert share_called(0.85, 0.05) >= 50


@pytest.mark.parametrize("trials", [1, 20, 77, 160, 2000])
def test_the_p_value_is_the_fair_coins(trials):
    """Against sums of binomial coefficients; under the null at most the level, for every level."""
    ways = [math.comb(trials, k) for k in range(trials + 1)]
    for successes in range(0, trials + 1, max(1, trials // 40)):
        expected = sum(ways[successes:]) / 2**trials
        assert majority(successes, trials) == pytest.approx(expected, rel=1e-12, abs=1e-300)
    with pytest.raises(EvaluationError, match="successes"):
        majority(trials + 1, trials)


def test_the_scan_leaves_the_model_alone_and_repeats_itself():
    """Buffers, flags and random states; the same report for another batch size."""
    draw = torch.Generator().manual_seed(1)
    images = torch.randint(256, (140, 1, 8, 8), generator=draw, dtype=torch.uint8)
    labels, net = torch.arange(140) % 2, disturbed_net()
    trusted = {"trusted_images": images[40:], "trusted_labels": labels[40:]}
    before = snapshot(net)
    first = backdoor_scan(net, images[:40], labels[:40], **trusted)
    assert_same(before, snapshot(net))
    again = backdoor_scan(net, images[:40], labels[:40], **trusted, batch_size=64)
    assert [each.victims for each in first.findings] == [each.victims for each in again.findings]
    assert first.to_dict()["verdict"] == again.verdict


def test_bad_input_is_named():
    """Levels, trusted images that are too few or of another size, tensors of another kind."""
    draw = torch.Generator().manual_seed(1)
    images = torch.randint(256, (140, 1, 8, 8), generator=draw, dtype=torch.uint8)
    labels = torch.arange(140) % 2
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    good = {
        "images": images[:40],
        "labels": labels[:40],
        "trusted_images": images[40:],
        "trusted_labels": labels[40:],
    }
    for error, match, wrong in (
        (EvaluationError, "level", {"level": 0.0}),
        (EvaluationError, "level", {"level": 1.0}),
        (EvaluationError, "level", {"level": float("nan")}),
        (EvaluationError, "level", {"level": "0.01"}),
        (EvaluationError, "batch_size", {"batch_size": 0}),
        (EvaluationError, "give more", {"trusted_labels": labels[40:] * 0}),
        (
            EvaluationError,
            "give more",
            {"trusted_images": images[:9], "trusted_labels": labels[:9]},
        ),
        (EvaluationError, "as the images", {"trusted_images": images[40:, :, 1:]}),
        (AttackError, "uint8", {"trusted_images": images[40:].float()}),
        (AttackError, "uint8", {"images": images[:40].numpy()}),
        (AttackError, "int64", {"trusted_labels": labels[40:].int()}),
        (AttackError, "int64", {"labels": labels[:40].tolist()}),
    ):
        with pytest.raises(error, match=match):
            backdoor_scan(model, **{**good, **wrong})
    with pytest.raises(EvaluationError, match="fit together"):
        ClassFinding(label=0, by="spectral", suspects=(), victims=1, obeyed=2, p_value=0.5)
    with pytest.raises(EvaluationError, match="findings"):
        BackdoorReport(level=0.01, findings=())
