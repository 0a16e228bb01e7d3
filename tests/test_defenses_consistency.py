"""Verdicts on whether an answer follows from its image alone, and those that cannot be reached."""

from types import SimpleNamespace

import pytest
import torch
from test_defenses_checks import (
    ALL,
    COMPANY,
    LINF,
    LOGITS,
    SAME,
    UNWATCHED,
    Honest,
    Wrapped,
    data_for,
)
from torch import nn

from defenses import CheckSettings, check, evaluate
from defenses.checks import checks
from defenses.errors import described
from defenses.evaluation.repeated import moved

FEW = CheckSettings(samples=60, steps=2, queries=5, draws=2, planted=2)


class Normalised(nn.Module):
    """Statistics of the batch at test time."""

    def forward(self, images):
        return (images - images.mean(0)) / (images.std(0, unbiased=False) + 1e-3)


def by_brightness(images):
    """Another image where the batch as a whole is bright."""
    return images if images.mean() > 0.5 else 1 - images


def centred(images):
    return images - images.mean(0, keepdim=True)


def by_number(images):
    """Another image where the batch is large, as in an evaluation."""
    return images if len(images) > 20 else 1 - images


def by_place(images):
    """Each moved by its neighbour's."""
    return (images + 0.3 * images.roll(1, 0)).clamp(0, 1)


def unless_alone(images):
    """Refuses what nobody but an attack asks."""
    if len(images) < 4:
        raise RuntimeError("too few")
    return images


@pytest.fixture
def few(monkeypatch):
    """Only the checks that are about this, which are quick."""
    quick = {name: checks._CHECKS[name] for name in (LOGITS, SAME, COMPANY, UNWATCHED)}
    monkeypatch.setattr(checks, "_CHECKS", quick)


def verdicts_on(model, **settings):
    """The verdicts by name, on images that an honest net labels."""
    found = check(model, data_for(Honest(), n=24), LINF, progress=False, settings=FEW, **settings)
    return {verdict.name: verdict for verdict in found}


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("batch_size", [256, 16, 1])
@pytest.mark.parametrize(
    "before", [Normalised(), by_brightness, centred, by_number, by_place, unless_alone]
)
def test_a_model_that_follows_its_batch_is_called_out(before, batch_size):
    """Whatever batch size it was evaluated in, and it says that the batch is the reason."""
    if before is unless_alone and batch_size < 4:
        pytest.skip("there is no usual answer to compare with")
    found = verdicts_on(Wrapped(before=before), batch_size=batch_size)
    assert found[COMPANY].outcome == "fail"
    assert "depend on the other images of the batch" in found[COMPANY].sentence
    assert found[SAME].outcome == "pass"


def when_gradients_are_enabled(images):
    return 1 - images if torch.is_grad_enabled() else images


def when_images_are_watched(images):
    return 1 - images if images.requires_grad else images


class ByItsOwnGradient(nn.Module):
    """Turns each image along its own gradient where there is one."""

    def forward(self, images):
        if images.requires_grad and torch.is_grad_enabled():
            (slope,) = torch.autograd.grad(images.square().sum(), images, create_graph=True)
            return (images - 0.3 * slope.sign()).clamp(0, 1)
        return images


class WhenTrained(nn.Module):
    """Answers otherwise where its weight requires a gradient, as outside of an attack."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, images):
        return self.weight * (1 - images if self.weight.requires_grad else images)


def unless_watched(images):
    if images.requires_grad:
        raise RuntimeError("I am being attacked")
    return images


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize(
    "before",
    [
        when_gradients_are_enabled,
        when_images_are_watched,
        ByItsOwnGradient(),
        WhenTrained(),
        unless_watched,
    ],
)
def test_a_model_that_notices_who_asks_is_called_out(before):
    """By name; its weights are left as they were."""
    model = Wrapped(before=before)
    flags = [each.requires_grad for each in model.parameters()]
    told = verdicts_on(model)[UNWATCHED]
    assert told.outcome == "fail"
    assert "gradients" in told.sentence
    assert [each.requires_grad for each in model.parameters()] == flags


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rounding_in_other_batches_is_no_dependence(dtype):
    """The control: sums in another order are rounded otherwise, and pass."""
    found = verdicts_on(Honest().to(dtype), batch_size=7)
    assert {verdict.outcome for verdict in found.values()} == {"pass"}


def test_rounding_is_relative_to_the_answers():
    """A tenth of a thousandth passes and more does not, whatever the size of the logits."""
    for size in (1e-6, 1.0, 1e6):
        usual = size * torch.tensor([[10.0, -3.0], [0.5, 0.25]])
        assert moved(usual, usual * (1 + 5e-5)).tolist() == [False, False]
        assert moved(usual, usual * (1 + 5e-4)).tolist() == [True, True]


@pytest.mark.usefixtures("few")
def test_of_random_answers_nothing_can_be_said():
    """Chance is no dependence on neighbours: the verdict on chance fails, the others say why."""
    found = verdicts_on(Wrapped(before=lambda images: images + 0.05 * torch.randn_like(images)))
    assert found[SAME].outcome == "fail"
    assert found[COMPANY].outcome == found[UNWATCHED].outcome == "not checked"


class Routed(nn.Module):
    """Of two layers one runs: by brightness of the batch, or by chance."""

    def __init__(self, *, by_chance):
        super().__init__()
        self.a, self.b, self.by_chance = nn.Linear(64, 4), nn.Linear(64, 4), by_chance

    def forward(self, images):
        first = torch.rand(()) > 0.5 if self.by_chance else images.mean() > 0.5
        return (self.a if first else self.b)(images.flatten(1))


@pytest.mark.parametrize("by_chance", [False, True])
def test_layers_that_run_now_and_then_cost_no_report(by_chance):
    """Every verdict is there, and the figures too."""
    torch.manual_seed(0)
    model = Routed(by_chance=by_chance)
    data = data_for(Honest(), n=40)
    report = evaluate(model, data, LINF, attacks=["fgsm"], verdicts=FEW, progress=False)
    assert tuple(verdict.name for verdict in report.verdicts) == ALL
    found = {verdict.name: verdict.outcome for verdict in report.verdicts}
    assert found[SAME if by_chance else COMPANY] == "fail"


class Mute(Exception):
    """An error that cannot say what it is."""

    def __str__(self):
        raise ValueError("no words")


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize(
    "error",
    [
        IndexError("x"),
        MemoryError(),
        AssertionError(),
        RecursionError("deep"),
        KeyError("k"),
        Mute(),
    ],
)
def test_a_check_that_cannot_run_is_not_checked_whatever_it_raises(monkeypatch, error):
    """With the kind of error and its words; those before and after it are as they were."""

    def broken(_):
        raise error

    monkeypatch.setitem(checks._CHECKS, SAME, broken)
    found = verdicts_on(Honest())
    assert list(found) == [LOGITS, SAME, COMPANY, UNWATCHED]
    assert found[SAME].outcome == "not checked"
    assert described(error) in found[SAME].sentence
    assert type(error).__name__ in found[SAME].sentence
    assert {found[name].outcome for name in (LOGITS, COMPANY, UNWATCHED)} == {"pass"}


def test_a_check_that_is_interrupted_is(monkeypatch):
    """Ctrl-C is no finding."""

    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setitem(checks._CHECKS, SAME, interrupted)
    with pytest.raises(KeyboardInterrupt):
        verdicts_on(Honest())


def test_a_model_that_breaks_down_is_not_checked_and_says_why():
    """From its first answer on."""

    def broken(images):
        raise ZeroDivisionError("of all things")

    images = SimpleNamespace(images=torch.rand(12, 1, 8, 8), labels=torch.zeros(12).long())
    verdicts = check(Wrapped(before=broken), images, LINF, settings=FEW, progress=False)
    assert {verdict.outcome for verdict in verdicts} == {"not checked"}
    assert "ZeroDivisionError: of all things" in verdicts[0].sentence
