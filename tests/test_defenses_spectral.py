"""Spectral signatures: scores against a plain computation, planted images found, clean ones not."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_defenses_scope import assert_same, disturbed_net, snapshot
from torch import nn

from defenses.errors import AttackError, EvaluationError
from defenses.poisoning.poisoning import Trigger, plant_trigger
from defenses.poisoning.spectral import SpectralReport, spectral_scan
from secure_cnn import build_model, load_data

SEEDS = (0, 1, 2, 3)


def trained(images, labels, spec, seed):
    """A compact network that has learnt these images."""
    model = build_model("compact", spec, generator_seed=seed).train()
    steps, draw = 170, torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        index = torch.randint(len(images), (128,), generator=draw)
        optimizer.zero_grad()
        F.cross_entropy(model(images[index].float() / 255), labels[index]).backward()
        optimizer.step()
        schedule.step()
    return model


def scanned(fraction, seed):
    """The report on digits of which so many carry a trigger for class 0, and which they are."""
    data = load_data("digits")
    images, labels = data.train.images, data.train.labels
    planted = torch.zeros(len(labels), dtype=torch.bool)
    if fraction:
        poisoned = plant_trigger(images, labels, Trigger(target=0), fraction=fraction, seed=seed)
        images, labels = poisoned.images, poisoned.labels
        planted[poisoned.planted] = True
    report = spectral_scan(trained(images, labels, data.spec, seed), images, labels)
    return report, planted


def test_planted_images_are_found():
    """Of a fiftieth planted in one class 90 %, where 5 % of the clean images are flagged."""
    found = planted_in_all = flagged = clean_in_all = 0
    for seed in SEEDS:
        report, planted = scanned(0.02, seed)
        scores = torch.tensor(report.scores)
        found += int((scores[planted] > torch.quantile(scores[~planted], 0.95)).sum())
        planted_in_all += int(planted.sum())
        # And by the threshold, which does not know which are clean.
        marked = torch.zeros_like(planted)
        marked[list(report.flagged)] = True
        flagged += int((marked & ~planted).sum())
        clean_in_all += int((~planted).sum())
        assert (marked & planted).sum() >= 0.7 * planted.sum()
        assert report.flagged_shares[0] > 2 * 0.05
    assert found >= 0.9 * planted_in_all
    assert flagged <= 0.08 * clean_in_all


def test_clean_images_are_flagged_as_rarely_as_stated():
    """The control: about 5 % of all, and no class wholly; nothing is found that is not there."""
    for seed in SEEDS[:2]:
        report, _ = scanned(0.0, seed)
        assert 0.02 < len(report.flagged) / len(report.scores) < 0.1
        assert max(report.flagged_shares.values()) < 0.35


def test_scores_are_those_of_a_plain_computation():
    """Against numpy's eigenvectors of the covariance, for the default layer and for a named one."""
    draw = torch.Generator().manual_seed(1)
    images = torch.randint(256, (90, 1, 8, 8), generator=draw, dtype=torch.uint8)
    labels = torch.arange(90) % 3
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 3)).eval()
    with torch.no_grad():
        hidden = model[:3](images.float() / 255).double().numpy()
        first = model[:2](images.float() / 255).double().numpy()
    for layer, values, directions in ((None, hidden, 2), ("1", first, 1)):
        report = spectral_scan(model, images, labels, layer=layer, directions=directions)
        for label in range(3):
            rows = values[labels.numpy() == label]
            centred = rows - rows.mean(0)
            _, vectors = np.linalg.eigh(centred.T @ centred)
            total = 0
            for vector in vectors.T[::-1][:directions]:
                away = np.abs(centred @ vector - np.median(centred @ vector))
                total = total + (away / (1.4826 * np.median(away))) ** 2
            scores = np.array(report.scores)[labels.numpy() == label]
            np.testing.assert_allclose(scores, np.sqrt(total), rtol=1e-4)
        assert report.layer == (layer or "3")
        assert all(
            (report.scores[i] > report.threshold) == (i in report.flagged) for i in range(90)
        )


def test_scores_depend_on_nothing_but_the_images():
    """Not on the batch size or the order; the model, its hooks and its buffers are as before."""
    draw = torch.Generator().manual_seed(1)
    images = torch.randint(256, (60, 1, 8, 8), generator=draw, dtype=torch.uint8)
    labels, net = torch.arange(60) % 2, disturbed_net()
    before, hooks = snapshot(net), len(net.head._forward_hooks)
    report = spectral_scan(net, images, labels)
    assert_same(before, snapshot(net))
    assert len(net.head._forward_hooks) == hooks
    order = torch.randperm(60, generator=draw)
    other = spectral_scan(net, images[order], labels[order], batch_size=7)
    expected = torch.tensor(report.scores)[order].tolist()
    assert other.scores == pytest.approx(expected, rel=1e-3)


def test_bad_input_is_named():
    """Layers, classes, representations and settings that cannot be used."""
    draw = torch.Generator().manual_seed(1)
    images = torch.randint(256, (40, 1, 8, 8), generator=draw, dtype=torch.uint8)
    labels = torch.arange(40) % 2
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    for match, wrong in {
        "one of": {"layer": "nowhere"},
        "directions": {"directions": 0},
        "false_alarms": {"false_alarms": 1.0},
        "batch_size": {"batch_size": 0},
    }.items():
        with pytest.raises(EvaluationError, match=match):
            spectral_scan(model, images, labels, **wrong)
    with pytest.raises(EvaluationError, match=r"torch\.nn\.Linear"):
        spectral_scan(nn.Flatten(), images, labels)
    with pytest.raises(EvaluationError, match="at least 10 images"):
        spectral_scan(model, images[:12], labels[:12])
    with pytest.raises(EvaluationError, match="all agree"):
        spectral_scan(model, torch.zeros_like(images), labels)
    same = torch.zeros_like(images)
    same[::9] = 200
    with pytest.raises(EvaluationError, match="most agree"):
        spectral_scan(model, same, labels)
    with pytest.raises(AttackError, match="uint8"):
        spectral_scan(model, images.float(), labels)
    with torch.no_grad():
        model[1].weight.fill_(float("nan"))
    with pytest.raises(EvaluationError, match="finite"):
        spectral_scan(model, images, labels, layer="1")
    with pytest.raises(EvaluationError, match="score for each"):
        SpectralReport(
            layer="1", directions=1, false_alarms=0.1, labels=(0,), scores=(), threshold=1.0
        )
