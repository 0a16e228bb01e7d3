"""Random models: attacked through their expectation, and judged on more than one answer."""

import functools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from defenses import AttackError, ThreatModel, attack, attack_names, evaluate
from defenses.attacks.expectation import Expectation
from defenses.attacks.oracle import Oracle

LINF = ThreatModel(norm="linf", eps=0.1)


class Noisy(nn.Module):
    """The first pixel against the second, under noise that drowns the difference."""

    def __init__(self, size=1.0):
        super().__init__()
        self.size, self.calls = size, 0

    def forward(self, images):
        self.calls += 1
        logits = 10 * images.flatten(1)[:, :2]
        logits = torch.cat([logits, logits.new_full((len(logits), 1), -50.0)], dim=1)
        return logits + self.size * torch.randn_like(logits) if self.size else logits


@pytest.mark.parametrize("name", ["pgd", "apgd", "fab", "square", "bim", "deepfool"])
def test_draws_are_taken_for_each_question_and_none_without(name):
    """A deterministic model gives the same images, for so many times the calls."""
    counts, found = [], []
    images, labels = torch.tensor([[[[0.9, 0.1]]]]), torch.tensor([0])
    settings = {"queries": 5} if name == "square" else {"steps": 3}
    for draws in (1, 4):
        model = Noisy(size=0.0)
        each = attack(name, LINF, draws=draws, **settings)
        found.append(each(model, images, labels, seed=0))
        counts.append(model.calls)
    assert 4 * counts[0] <= counts[1] <= 4 * (counts[0] + 3)  # some look once more at the end
    torch.testing.assert_close(found[0], found[1])
    assert "draws" not in attack(name, LINF).settings


@pytest.mark.parametrize("draws", [0, -1, 1.5, True])
def test_draws_that_cannot_be_are_refused(draws):
    """By name."""
    with pytest.raises(AttackError, match="draws"):
        attack("pgd", LINF, draws=draws)


def test_found_images_are_judged_by_the_majority():
    """One answer says little of an image; twenty-one say what the model mostly sees.

    The clean logits lead by 1 under noise whose difference has a deviation of 1.41: one answer is
    right with probability 0.76. The majority of 101 is wrong with less than 1e-8, one of 60 with
    less than 1e-6; that one answer each is right 60 times has the probability 7e-8.
    """
    images = torch.tensor([0.55, 0.45]).expand(60, 1, 1, 2).clone()
    data = SimpleNamespace(images=images, labels=torch.zeros(60, dtype=torch.int64))
    threat = ThreatModel(norm="linf", eps=1e-6)
    many = attack("pgd", threat, steps=1, draws=101)
    report = evaluate(Noisy(), data, threat, attacks=[many], progress=False)
    assert report.clean_accuracy == report.worst_case_accuracy == 1.0
    once = attack("pgd", threat, steps=1)
    assert evaluate(Noisy(), data, threat, attacks=[once], progress=False).clean_accuracy < 1.0


class Scripted(nn.Module):
    """One of four linear models after the other."""

    def __init__(self):
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.weights, self.calls = torch.randn(4, 5, 3, generator=draw) * 2, 0

    def forward(self, images):
        self.calls += 1
        return images.flatten(1) @ self.weights[(self.calls - 1) % 4]


def test_gradients_are_the_mean_of_each_draws_loss():
    """Not of the loss of the mean of the logits, which has another gradient."""
    draw = torch.Generator().manual_seed(1)
    images, labels = torch.rand(6, 1, 1, 5, generator=draw), torch.arange(6) % 3
    loss = functools.partial(F.cross_entropy, target=labels, reduction="none")
    logits, values, gradient = Oracle(Scripted(), images, labels, draws=4).gradient(images, loss)
    model, leaf = Scripted(), images.clone().requires_grad_()
    answers = [model(leaf) for _ in range(4)]
    losses = torch.stack([loss(answer) for answer in answers])
    (expected,) = torch.autograd.grad(losses.mean(0).sum(), leaf, retain_graph=True)
    torch.testing.assert_close(gradient, expected)
    torch.testing.assert_close(values, losses.mean(0))
    torch.testing.assert_close(logits, torch.stack(answers)[losses.argmin(0), torch.arange(6)])
    (other,) = torch.autograd.grad(loss(torch.stack(answers).mean(0)).sum(), leaf)
    assert not torch.allclose(other, expected, rtol=0.05)


def test_projected_gradient_climbs_the_mean_of_each_draws_loss():
    """One step in l2 is along the mean gradient."""
    images, labels = torch.full((6, 1, 1, 5), 0.5), torch.arange(6) % 3
    l2 = ThreatModel(norm="l2", eps=0.1)
    _, _, gradient = Oracle(Scripted(), images, labels, draws=4).gradient(
        images, functools.partial(F.cross_entropy, target=labels, reduction="none")
    )
    step = attack("pgd", l2, steps=1, step_size=0.1, random_start=False, draws=4)
    found = step(Scripted(), images, labels, seed=0) - images
    torch.testing.assert_close(
        found, 0.1 * gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    )


class Coin(nn.Module):
    """Wrong where the first pixel is above a threshold drawn anew, uniform in [0, 1]."""

    def forward(self, images):
        height = images.flatten(1)[:, :1]
        ahead = torch.rand(len(images), 1) - height
        return torch.cat([ahead, -ahead, torch.full_like(ahead, -9.0)], dim=1) * 4


@pytest.mark.parametrize("name", ["pgd", "apgd", "apgdt"])
def test_a_search_goes_on_while_any_draw_is_right(name):
    """An image that fools one time in two is not the best there is: the ball's end fools in 0.8.

    Left at the first draw that is fooled, most images would stay near 0.5. That twenty draws are
    all wrong by chance below 0.6 has the probability 4e-5 for a point, and a search looks at few.
    """
    images, labels = torch.full((40, 1, 1, 2), 0.5), torch.zeros(40, dtype=torch.int64)
    threat = ThreatModel(norm="linf", eps=0.3)
    settings = {"early_stop": True} if name == "pgd" else {}
    found = attack(name, threat, steps=10, draws=20, **settings)(Coin(), images, labels, seed=0)
    assert found.flatten(1)[:, 0].mean() > 0.7
    hasty = attack(name, threat, steps=10, **settings)(Coin(), images, labels, seed=0)
    assert hasty.flatten(1)[:, 0].mean() < 0.7


def test_the_expectation_is_the_mean():
    """Of the logits, and so of their gradients; every attack takes draws."""
    model = Expectation(Noisy(), 400)
    assert (model(torch.tensor([[[[0.6, 0.4]]]]))[0, 0] - 6).abs() < 0.35  # seven deviations
    assert all(attack(name, LINF, draws=2).draws == 2 for name in attack_names("linf"))
