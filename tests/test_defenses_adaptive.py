"""Adaptive attacks: a loss and a backward pass of one's own, where the truth is planted."""

import pytest
import torch
from support.searched import linear, right
from torch import nn

from defenses import AttackError, EvaluationError, ThreatModel, attack, evaluate, rerun
from defenses.attacks.adaptive import BackwardOf

LINF = ThreatModel(norm="linf", eps=0.08)
STEP = 1 / 16


class Quantised(nn.Module):
    """A defence that rounds pixels: of the same accuracy, without a slope."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return self.model(torch.round(images / STEP) * STEP)


class Saturated(nn.Module):
    """Logits so large that their cross-entropy is exactly flat."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return 1e5 * self.model(images)


def task():
    """A linear model, images that it gets right, and their labels."""
    draw = torch.Generator().manual_seed(0)
    model = linear(torch.randn(64, generator=draw))
    images = torch.rand(80, 1, 8, 8, generator=draw) * 0.5 + 0.25
    with torch.no_grad():
        return model, images, model(images).argmax(1)


def worst(model, images, labels):
    """Where rounding keeps the order of pixels, the worst image is a corner of the ball."""
    weight = model[1].weight[0] - model[1].weight[1]
    way = torch.where(labels == 0, -1.0, 1.0)[:, None] * weight.sign()
    return images + LINF.eps * way.view_as(images)


def margin(logits, labels):
    """By how much the wrong one of two classes is ahead."""
    own = logits.gather(1, labels[:, None])[:, 0]
    return logits.sum(1) - 2 * own


@pytest.mark.parametrize("name", ["pgd", "apgd", "apgdt"])
def test_a_shattered_gradient_withstands_until_its_backward_pass_is_replaced(name):
    """Everything that can be fooled is, and the default finds less than half of it."""
    model, images, labels = task()
    defended = Quantised(model)
    kept = right(defended, images, labels)
    truth = kept & ~right(defended, worst(model, images, labels), labels)
    assert 20 < truth.sum() < 75
    usual = attack(name, LINF, steps=20)(defended, images, labels, seed=0)
    assert (kept & ~right(defended, usual, labels)).sum() < truth.sum() / 2
    adaptive = attack(name, LINF, steps=20, surrogate=model)
    found = kept & ~right(defended, adaptive(defended, images, labels, seed=0), labels)
    assert torch.equal(found, truth)
    assert adaptive.settings["surrogate"] == "own: Sequential"


@pytest.mark.parametrize("name", ["pgd", "apgd"])
def test_a_saturated_loss_withstands_until_another_is_climbed(name):
    """As above; with targets the loss is gone down."""
    model, images, labels = task()
    defended = Saturated(model)
    truth = ~right(model, worst(model, images, labels), labels)
    assert 20 < truth.sum() < 75
    usual = attack(name, LINF, steps=20)(defended, images, labels, seed=0)
    assert (~right(model, usual, labels)).sum() < truth.sum() / 2
    adaptive = attack(name, LINF, steps=20, loss=margin)
    assert torch.equal(~right(model, adaptive(defended, images, labels, seed=0), labels), truth)
    sought = adaptive(defended, images, labels, targets=1 - labels, seed=0)
    assert torch.equal(~right(model, sought, labels), truth)
    assert adaptive.settings["loss"] == "own: margin"


def test_an_evaluation_takes_them():
    """The report names what was brought, and everything that is foolable is fooled."""
    model, images, labels = task()
    defended = Quantised(model)
    data = [(image, int(label)) for image, label in zip(images, labels, strict=True)]
    brought = attack("pgd", LINF, steps=10, surrogate=model, loss=margin)
    report = evaluate(defended, data, LINF, attacks=[brought], progress=False)
    alone = right(defended, images, labels) & right(defended, worst(model, images, labels), labels)
    assert report.worst_case == tuple(alone.tolist())
    assert report.settings["pgd"]["loss"] == "own: margin"


def test_a_report_runs_again_only_with_what_was_brought(tmp_path):
    """A name is no function; a state of another surrogate is another evaluation."""
    model, images, labels = task()
    data = [(image, int(label)) for image, label in zip(images, labels, strict=True)]
    brought = attack("pgd", LINF, steps=2, surrogate=model, loss=margin)
    state = tmp_path / "state"
    report = evaluate(Quantised(model), data, LINF, attacks=[brought], progress=False, state=state)
    with pytest.raises(EvaluationError, match="loss of your own; give it as own="):
        rerun(report, Quantised(model), data, progress=False)
    again = rerun(report, Quantised(model), data, own={"pgd": brought}, progress=False)
    assert again == report
    other = attack("pgd", LINF, steps=2, surrogate=linear(torch.ones(64)), loss=margin)
    with pytest.raises(EvaluationError, match="attacks"):
        evaluate(Quantised(model), data, LINF, attacks=[other], progress=False, state=state)


def test_model_and_surrogate_are_left_as_they_were():
    """Modes and gradients of both; the surrogate is asked in evaluation mode."""
    model, images, labels = task()
    surrogate = nn.Sequential(model, nn.Dropout(0.9)).train()
    found = [
        attack("pgd", LINF, steps=5, surrogate=each)(Quantised(model), images, labels, seed=0)
        for each in (surrogate, model)
    ]
    assert torch.equal(*found)
    assert all(module.training for module in surrogate.modules())
    assert all(each.requires_grad and each.grad is None for each in surrogate.parameters())


def test_the_answers_are_the_models_to_the_last_bit():
    """Also where the surrogate's are of another size."""
    model, images, _ = task()
    both = BackwardOf(Saturated(model), model)
    assert torch.equal(both(images), model(images))


@pytest.mark.parametrize(
    ("name", "given", "word"),
    [
        ("fab", {"loss": margin}, "fab takes no loss of your own; pgd and apgd do"),
        ("square", {"surrogate": nn.Flatten()}, "square takes no surrogate"),
        ("bim", {"loss": margin}, "bim takes no loss of your own"),
        ("apgdt", {"loss": margin}, "apgdt takes no loss of your own"),
        ("pgd", {"loss": 3}, "expected a function, got int"),
        ("pgd", {"loss": "ce"}, "pgd: loss: expected a function from logits.*got 'ce'"),
        ("apgd", {"loss": "own: margin"}, "give the function"),
        ("pgd", {"surrogate": "net"}, "expected a torch.nn.Module, got str"),
    ],
)
def test_what_cannot_be_brought_is_refused(name, given, word):
    """Before anything runs."""
    with pytest.raises(AttackError, match=word):
        attack(name, LINF, **given)


@pytest.mark.parametrize(
    ("loss", "word"),
    [
        (nn.CrossEntropyLoss(), "expected 80 losses, one an image, got a tensor of shape"),
        (lambda logits, labels: 1.0, "got float"),
        (lambda logits, labels: margin(logits, labels).detach(), "no gradient"),
        (lambda logits, labels: margin(logits, labels) * float("nan"), "NaN"),
    ],
)
@pytest.mark.parametrize("name", ["pgd", "apgd"])
def test_a_loss_that_is_none_is_refused(name, loss, word):
    """In the words of this package."""
    model, images, labels = task()
    with pytest.raises(AttackError, match=word):
        attack(name, LINF, steps=1, loss=loss)(model, images, labels)


def test_a_surrogate_that_does_not_fit_is_refused():
    """By the shape of its logits."""
    model, images, labels = task()
    attacker = attack("pgd", LINF, steps=1, surrogate=nn.Flatten())
    with pytest.raises(AttackError, match=r"expected logits of shape \[80, 2\], got \[80, 64\]"):
        attacker(model, images, labels)
