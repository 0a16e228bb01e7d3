"""Random models: attacked through their expectation, and judged on more than one answer."""

import functools
import json
import random
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from defenses import (
    AttackError,
    EvaluationError,
    RobustnessReport,
    ThreatModel,
    attack,
    attack_names,
    evaluate,
    rerun,
)
from defenses.attacks.oracle import Expectation, Oracle
from defenses.measuring.counting import draws_interval, share, wilson_interval

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


def noisy_data(count=60):
    """Images on which `Noisy` is right with probability 0.76: a lead of 1, a deviation of 1.41."""
    images = torch.tensor([0.55, 0.45]).expand(count, 1, 1, 2).clone()
    return SimpleNamespace(images=images, labels=torch.zeros(count, dtype=torch.int64))


def test_images_count_with_the_share_of_draws_that_are_right():
    """Clean and found: 1200 draws at 0.760 stray by more than 0.065 with probability 1e-7.

    The ball is next to nothing, so that found images are as clean ones; the smaller of two shares
    is taken, which costs less than 0.13 with the same probability and more.
    """
    threat = ThreatModel(norm="linf", eps=1e-6)
    few = attack("pgd", threat, steps=1)
    report = evaluate(Noisy(), noisy_data(), threat, attacks=[few], progress=False)
    assert abs(report.clean_accuracy - 0.760) < 0.065
    assert 0.76 - 0.195 < report.worst_case_accuracy < report.clean_accuracy
    assert {len(row) for rows in report.repeats.values() for row in rows} == {20}
    low, high = report.clean_interval
    assert low < 0.76 < high
    many = attack("pgd", threat, steps=1, draws=33)
    report = evaluate(Noisy(), noisy_data(8), threat, attacks=[many], progress=False)
    assert {len(row) for rows in report.repeats.values() for row in rows} == {33}


def test_a_random_models_report_goes_to_json_runs_again_and_resumes(tmp_path):
    """With its draws; a state whose draws do not fit is refused."""
    threat, state = ThreatModel(norm="linf", eps=0.05), tmp_path / "state"
    how = {"attacks": ["fgsm", "pgd"], "progress": False, "state": state, "batch_size": 7}
    report = evaluate(Noisy(), noisy_data(20), threat, **how)
    assert RobustnessReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    assert rerun(report, Noisy(), noisy_data(20), progress=False) == report
    assert evaluate(Noisy(), noisy_data(20), threat, **how) == report
    held = json.loads(state.read_text())

    def forge(value):
        if isinstance(value, dict):
            return {k: [] if k == "draws" else forge(v) for k, v in value.items()}
        return value

    state.write_text(json.dumps(forge(held)))
    with pytest.raises(EvaluationError, match="give another path"):
        evaluate(Noisy(), noisy_data(20), threat, **how)
    broken = report.to_dict()
    broken["repeats"]["pgd"][0] += "1"
    with pytest.raises(EvaluationError, match="repeats"):
        RobustnessReport.from_dict(broken)


def test_a_deterministic_model_is_asked_once():
    """But about the clean images, about which it is asked twice to see that it is one."""
    threat, model = ThreatModel(norm="linf", eps=0.05), Noisy(size=0.0)
    once = attack("fgsm", threat)
    report = evaluate(model, noisy_data(20), threat, attacks=[once], batch_size=10, progress=False)
    assert report.repeats == {}
    assert model.calls == (2 + 2) + 2 * (1 + 1)  # clean; then a gradient and a verdict a batch


def test_an_interval_holds_the_variance_of_draws_that_images_share():
    """One coin for all images: twenty tosses say little, however many images there are.

    Seeded, so that nothing is left to chance; the interval of the images alone is the control.
    """
    draw, held, alone = random.Random(0), 0, 0
    for _ in range(300):
        coins = "".join(draw.choice("01") for _ in range(20))
        low, high = draws_interval((coins,) * 200)
        held += low <= 0.5 <= high
        low, high = wilson_interval(round(200 * share(coins)), 200)
        alone += low <= 0.5 <= high
    assert held > 270
    assert alone < 200


def test_the_name_of_the_clean_images_is_taken():
    """An attack of one's own that is called so would be counted as them."""

    def clean(model, images, labels):
        return images

    with pytest.raises(EvaluationError, match="clean"):
        evaluate(Noisy(), noisy_data(2), LINF, attacks=[clean], progress=False)


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


class RandomWhereBright(nn.Module):
    """Random about images whose mean is large, and about no others; of one class else."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, images):
        self.calls += 1
        lead = images[:, 0, 0, 0] - images[:, 0, 0, 1]
        noise = torch.randn(len(images)) * (images.mean(dim=(1, 2, 3)) > 0.6)
        return torch.stack([20 * lead + noise, torch.zeros(len(images))], dim=1)


def bright_data(dark=9, bright=1):
    """Images that are dark, and behind them some that are bright."""
    images = torch.tensor([0.35, 0.25]).expand(dark + bright, 1, 1, 2).clone()
    images[dark:] += 0.5
    return SimpleNamespace(images=images, labels=torch.zeros(len(images), dtype=torch.int64))


@pytest.mark.parametrize("bright", [0, 1])
def test_randomness_is_looked_for_in_every_image(bright):
    """One image of ten, in the last batch, makes a model one that answers at random."""
    threat = ThreatModel(norm="linf", eps=1e-3)
    report = evaluate(
        RandomWhereBright(),
        bright_data(bright=bright),
        threat,
        attacks=["fgsm"],
        batch_size=3,
        progress=False,
    )
    assert bool(report.repeats) == bool(bright)
    assert report.undrawn == ("fgsm",) * bright
    if bright:
        assert {len(row) for row in report.repeats["clean"]} == {20}


@pytest.mark.parametrize("bright", [0, 1])
def test_the_default_attacks_on_a_random_model_have_draws(bright):
    """As the advice is; on others they have none, and cost what they did."""
    threat = ThreatModel(norm="linf", eps=1e-3)
    report = evaluate(RandomWhereBright(), bright_data(2, bright), threat, progress=False)
    assert [each.get("draws") for each in report.settings.values()] == [20 if bright else None] * 2
    assert report.undrawn == ()
    again = rerun(report, RandomWhereBright(), bright_data(2, bright), progress=False)
    assert again == report
