"""`defenses.certify_lipschitz`: radii that hold, and heads that are none."""

import math

import pytest
import torch
from torch import nn

import defenses
from defenses import EvaluationError, certify_lipschitz


def linear(weight, bias=None):
    """Flatten and a linear layer of this weight."""
    weight = torch.tensor(weight)
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight.data.copy_(weight)
    layer.bias.data.copy_(torch.zeros(len(weight)) if bias is None else torch.tensor(bias))
    return nn.Sequential(nn.Flatten(), layer)


def images(*rows):
    """A data set of images of one row, all of class 0."""
    return [(torch.tensor([[row]]), 0) for row in rows]


def test_the_radius_is_the_distance_to_the_boundary_of_a_linear_model():
    """Three classes: the nearest of two boundaries, by the formula of a point and a plane."""
    model = linear([[1.0, 0.0], [0.0, 1.0], [-1.0, -2.0]], [0.0, 0.1, 0.3])
    report = certify_lipschitz(model, images([0.9, 0.2], [0.1, 0.8]), head=model[1], constant=1.0)
    first = min((0.9 - 0.3) / math.sqrt(2), (0.9 - (0.3 - 0.9 - 0.4)) / math.hypot(2, 2))
    assert report.selected == (0, 1)
    assert report.radii == (pytest.approx(first, abs=2e-4), 0.0)
    assert first - 2e-4 < report.radii[0] < first  # what rounding can do is taken away
    assert report.class_radii[1] > 0


def test_twice_the_constant_is_half_the_radius():
    """And the accuracy at a radius counts those that reach it and are right."""
    model, data = linear([[1.0, 0.0], [0.0, 1.0]]), images([0.9, 0.2], [0.6, 0.5], [0.1, 0.5])
    one = certify_lipschitz(model, data, head=model[1], constant=1.0)
    two = certify_lipschitz(model, data, head=model[1], constant=2.0)
    assert two.class_radii == pytest.approx([each / 2 for each in one.class_radii])
    assert [one.certified(r).accuracy for r in (0.0, 0.3, 0.6)] == [2 / 3, 1 / 3, 0.0]
    assert "33.3% at 0.25" in repr(one)


def test_equal_weights_have_no_boundary():
    """A class that is always ahead has a radius without an end, and JSON says null."""
    model = linear([[1.0, 0.0], [1.0, 0.0]], [1.0, 0.0])
    report = certify_lipschitz(model, images([0.5, 0.5]), head=model[1], constant=1.0)
    assert report.radii == (math.inf,)
    assert report.to_dict()["class_radii"] == [None]
    level = linear([[1.0, 0.0], [1.0, 0.0]])
    assert certify_lipschitz(level, images([0.5, 0.5]), head=level[1], constant=1.0).radii == (0.0,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: {"head": nn.Linear(2, 2)}, "head: expected the model's own"),
        (lambda model: {"head": model}, "head: expected the model's own"),
        (lambda model: {"constant": 0.0}, "constant: expected a number above 0"),
        (lambda model: {"constant": math.nan}, "constant: expected a number above 0"),
        (lambda model: {"batch_size": 0}, "batch_size >= 1"),
        (lambda model: {"images": 9}, "samples: expected 1 to 1"),
    ],
)
def test_what_cannot_be_certified_is_refused(change, message):
    """By the name of the argument."""
    model = linear([[1.0, 0.0], [0.0, 1.0]])
    arguments = {"head": model[1], "constant": 1.0} | change(model)
    with pytest.raises(EvaluationError, match=message):
        certify_lipschitz(model, images([0.5, 0.2]), **arguments)


def test_what_stands_behind_the_head_is_not_certified():
    """Whoever steepens the logits afterwards is told; and whoever calls the head twice."""

    class Steep(nn.Sequential):
        def forward(self, images):
            return super().forward(images) * 100

    plain = linear([[1.0, 0.0], [0.0, 1.0]])
    twice = nn.Sequential(nn.Flatten(), plain[1], plain[1])
    for model in (Steep(*plain), twice):
        with pytest.raises(EvaluationError, match="head: expected the layer whose output"):
            certify_lipschitz(model, images([0.5, 0.2]), head=plain[1], constant=1.0)
    half = linear([[1.0, 0.0], [0.0, 1.0]]).bfloat16()
    data = [(torch.tensor([[[0.5, 0.25]]], dtype=torch.bfloat16), 0)]
    with pytest.raises(EvaluationError, match="whose rounding is not counted"):
        certify_lipschitz(half, data, head=half[1], constant=1.0)


def test_no_attack_finds_anything_within_the_radius():
    """Of a model with moduli; just beyond what its own constant allows one does."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 2))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, generator=generator)
    constant = float(torch.linalg.matrix_norm(model[1].weight.detach(), 2))
    inputs = torch.rand(64, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    labels = model(inputs).argmax(1)
    data = torch.utils.data.TensorDataset(inputs, labels)
    report = certify_lipschitz(model, data, head=model[3], constant=constant)
    radius = sorted(report.radii)[32]
    assert radius > 0
    threat = defenses.ThreatModel(norm="l2", eps=radius)
    found = defenses.evaluate(model, data, threat, attacks=["pgd"], verdicts=False, progress=False)
    assert found.worst_case_accuracy >= report.certified(radius).accuracy
    far = defenses.ThreatModel(norm="l2", eps=2.0)
    broken = defenses.evaluate(model, data, far, attacks=["pgd"], verdicts=False, progress=False)
    assert broken.worst_case_accuracy < report.certified(radius).accuracy
