"""Logits times a factor are the same model: the default attacks find the same, others are told."""

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from defenses import AdversarialTraining, ThreatModel, Trades, attack, evaluate
from defenses.attacks.apgd import scaled_cross_entropy
from defenses.attacks.autoattack import ensemble
from defenses.checks.checks import CheckSettings
from defenses.checks.masking import Rescaled
from secure_cnn import build_model, load_data
from secure_cnn.engine import CrossEntropy

LINF = ThreatModel(norm="linf", eps=0.1)
FACTORS = (1e-12, 0.02, 50.0, 1e6)
RESCALED = "rescaled logits change nothing"
STANDARD = "the standard finds little more"


@functools.cache
def robust():
    """The reviewer's network: one hidden layer, trained on PGD at eps 0.1; all test digits."""
    draw = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.1)
    return trained(model, AdversarialTraining(LINF, "pgd", steps=5), epochs=12, draw=draw)


def trained(model, objective, *, epochs, draw):
    """The model after some epochs of digits, and the test images."""
    data = load_data("digits")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    for _ in range(epochs):
        for rows in torch.randperm(len(data.train.labels), generator=draw).split(64):
            optimizer.zero_grad()
            objective(model, *data.train.batch(rows)).mean().backward()
            optimizer.step()
    return model.eval(), data.test


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_a_factor_changes_nothing_of_the_default(norm):
    """Verdict by verdict, but for an image or two that rounding moves."""
    model, data = robust()
    threat = ThreatModel(norm=norm, eps={"linf": 0.1, "l2": 0.5, "l1": 2.0}[norm])
    report = functools.partial(
        evaluate, data=data, threat=threat, samples=120, seed=3, progress=False
    )
    expected = report(model).worst_case
    assert 10 < sum(expected) < 110
    for factor in FACTORS:
        found = report(Rescaled(model, factor)).worst_case
        assert sum(a != b for a, b in zip(expected, found, strict=True)) <= 2


@pytest.mark.slow
@pytest.mark.parametrize("factor", [0.02, 50.0])
def test_the_cross_entropy_alone_overstates_and_is_told(factor):
    """The control: PGD and APGD on the logits as they are, 100 steps each, miss what is there."""
    model, data = robust()
    checked = CheckSettings(steps=10, queries=20, draws=2, planted=2, spot=359, samples=359)
    rescaled = Rescaled(model, factor)
    weak = evaluate(rescaled, data, LINF, attacks=["pgd", "apgd"], verdicts=checked, progress=False)
    outcomes = {each.name: each.outcome for each in weak.verdicts}
    default = evaluate(rescaled, data, LINF, progress=False)
    assert weak.worst_case_accuracy > default.worst_case_accuracy + 0.04
    assert (outcomes[RESCALED], outcomes[STANDARD]) == ("fail", "fail")


@pytest.mark.slow
def test_the_default_says_how_far_from_the_standard_it_is():
    """On the reviewer's network: its own verdicts say it, with an interval."""
    model, data = robust()
    checked = CheckSettings(steps=10, queries=20, draws=2, planted=2, spot=359, samples=359)
    rescaled = Rescaled(model, 0.02)
    default = evaluate(rescaled, data, LINF, verdicts=checked, progress=False)
    outcomes = {each.name: each.outcome for each in default.verdicts}
    assert (outcomes[RESCALED], outcomes[STANDARD]) == ("pass", "pass")
    (verdict,) = [each for each in default.verdicts if each.name == STANDARD]
    assert 0 <= verdict.figure <= 0.02
    assert "95 % interval" in verdict.sentence
    standard = evaluate(rescaled, data, LINF, attacks=["autoattack"], progress=False)
    assert default.worst_case_accuracy <= standard.worst_case_accuracy + 0.02


OTHERS = {
    "compact, pgd": ("compact", AdversarialTraining(LINF, "pgd", steps=5)),
    "resnet20, pgd": ("resnet20", AdversarialTraining(LINF, "pgd", steps=5)),
    "compact, trades": ("compact", Trades(LINF, steps=5)),
    "compact, n-fgsm": ("compact", AdversarialTraining(LINF, "n-fgsm")),
    "compact, plain": ("compact", CrossEntropy()),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_the_default_is_within_two_points_of_the_standard(name):
    """Of other networks and trainings, and whatever the scale of their logits."""
    network, objective = OTHERS[name]
    model = build_model(network, load_data("digits").spec)
    model, data = trained(model, objective, epochs=4, draw=torch.Generator().manual_seed(0))
    figures = functools.partial(evaluate, data=data, threat=LINF, samples=100, progress=False)
    standard = figures(model, attacks=["autoattack"]).worst_case_accuracy
    for factor in (1.0, 0.02):
        default = figures(Rescaled(model, factor)).worst_case_accuracy
        assert default <= standard + 0.02, (factor, default, standard)


def test_the_standard_needs_no_comparison_with_itself():
    """It is told apart by all its constants."""
    model, data = robust()
    checked = CheckSettings(steps=2, queries=2, draws=1, planted=1, spot=1, samples=1)
    report = evaluate(
        model,
        data,
        LINF,
        attacks=["autoattack"],
        samples=1,
        verdicts=checked,
        progress=False,
    )
    (verdict,) = [each for each in report.verdicts if each.name == STANDARD]
    assert (verdict.outcome, verdict.sentence) == ("pass", "The attacks are the standard's.")


def test_what_another_loss_finds_is_not_discounted():
    """Images that a cross-entropy of its own scale misses count as missed, whatever finds them."""
    model, data = robust()
    saturated = Rescaled(model, 1e4)
    checked = CheckSettings(steps=10, queries=300, draws=5, planted=2, spot=2)
    weak = evaluate(saturated, data, LINF, attacks=["pgd"], verdicts=checked, progress=False)
    assert "black-box does not beat white-box" in {
        each.name for each in weak.verdicts if each.outcome == "fail"
    }


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_the_default_costs_what_it_says(norm):
    """At most 204 forward and backward passes an image that withstands everything."""
    seen = 0

    class Stubborn(nn.Module):
        def forward(self, images):
            nonlocal seen
            seen += len(images) if images.requires_grad else 0
            pixels = images.flatten(1)
            others = 0.01 * pixels[:, :4]
            return torch.cat([10 + others[:, :1], others], dim=1)

    threat = ThreatModel(norm=norm, eps=0.1)
    images, labels = torch.rand(3, 1, 4, 4), torch.zeros(3, dtype=torch.int64)
    for each in ensemble(threat, "quick"):
        each(Stubborn(), images, labels, seed=0)
    assert 3 * 200 <= seen <= 3 * 212


@given(factor=st.floats(1e-20, 1e20), shift=st.floats(-1.0, 1.0), seed=st.integers(0, 99))
def test_the_scaled_loss_knows_no_factor(factor, shift, seed):
    """Values stay; gradients shrink as the factor grows, and keep their direction."""
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 5, generator=draw, dtype=torch.float64).requires_grad_()
    labels = torch.tensor([0, 3, 4])
    plain = scaled_cross_entropy(logits, labels)
    scaled = scaled_cross_entropy(factor * (logits + shift), labels)
    torch.testing.assert_close(plain, scaled)
    (one,) = torch.autograd.grad(plain.sum(), logits)
    (other,) = torch.autograd.grad(scaled.sum(), logits)
    torch.testing.assert_close(one, other)


def test_the_scaled_loss_is_an_option_of_apgd_with_and_without_targets():
    """And stays finite where all logits are alike."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    images, labels = torch.rand(2, 1, 2, 2), torch.zeros(2, dtype=torch.int64)
    apgd = attack("apgd", LINF, loss="scaled-ce", steps=3)
    for targets in (None, labels + 1):
        assert torch.isfinite(apgd(model, images, labels, targets=targets, seed=0)).all()
