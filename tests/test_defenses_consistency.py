"""Verdicts on whether an answer follows from its image alone, and those that cannot be reached."""

from types import SimpleNamespace

import pytest
import torch
from support.suspects import (
    ALL,
    COMPANY,
    LINF,
    LOGITS,
    MEMORY,
    SAME,
    UNWATCHED,
    Honest,
    Wrapped,
    data_for,
)
from torch import nn

from defenses import CheckSettings, ThreatModel, check, evaluate
from defenses.checks import checks
from defenses.measuring.measurement import moved
from defenses.quantities import described

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
    quick = {name: checks._CHECKS[name] for name in (LOGITS, SAME, COMPANY, UNWATCHED, MEMORY)}
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


class Memory(nn.Module):
    """Keeps its first answers, and gives them for whatever comes near; in a place that is given."""

    def __init__(self, place, *, room=10**6, buffers=False):
        super().__init__()
        self.net, self.place, self.room = Honest(), place, room
        if buffers:
            self.register_buffer("images", torch.zeros(0, 64))
            self.register_buffer("answers", torch.zeros(0, 4))

    def forward(self, images):
        own, rows = self.net(images), images.detach().flatten(1)
        place = self.place(self)
        kept = getattr(place, "images", None)
        if kept is None:
            place.images, place.answers = rows[:0], own.detach()[:0]
        far = torch.ones(len(rows), dtype=torch.bool)
        given = own.detach().clone()
        if len(place.images):
            nearest = torch.cdist(rows, place.images, p=torch.inf).min(1)
            far = nearest.values > LINF.eps * 1.01
            given[~far] = place.answers[nearest.indices[~far]]
        if len(place.images) < self.room:
            place.images = torch.cat([place.images, rows[far]])
            place.answers = torch.cat([place.answers, own.detach()[far]])
        return own / 10 + 10 * given


class Uncopied(Memory):
    """Cannot be copied."""

    def __deepcopy__(self, memo):
        raise TypeError("no")


ELSEWHERE = SimpleNamespace()


def memories():
    """A memory in the model, full after what was evaluated, in buffers, outside, not copied."""
    vars(ELSEWHERE).clear()
    return {
        "attributes": Memory(lambda model: model),
        "full": Memory(lambda model: model, room=24),
        "buffers": Memory(lambda model: model, buffers=True),
        "outside": Memory(lambda model: ELSEWHERE),
        "not copied": Uncopied(lambda model: model),
    }


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("through", [check, evaluate])
@pytest.mark.parametrize("kind", ["attributes", "full", "buffers", "outside", "not copied"])
def test_a_model_that_remembers_is_called_out(kind, through):
    """Wherever it keeps what it was asked; by its own verdict alone, and it says that it does."""
    model, data = memories()[kind], data_for(Honest(), n=24)
    if through is check:
        verdicts = check(model, data, LINF, progress=False, settings=FEW)
    else:
        report = evaluate(model, data, LINF, attacks=["fgsm"], verdicts=FEW, progress=False)
        verdicts = report.verdicts
    found = {verdict.name: verdict for verdict in verdicts}
    assert found[MEMORY].outcome == "fail"
    assert "asked before" in found[MEMORY].sentence


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.05), ("l2", 0.5), ("l1", 3.0), ("l0", 3)])
@pytest.mark.parametrize("seed", range(4))
def test_a_model_that_only_counts_its_questions_remembers_nothing(seed, norm, eps):
    """The control: its attributes change and its answers do not."""

    class Counting(Honest):
        asked = 0

        def forward(self, images):
            self.asked += len(images)
            return super().forward(images)

    model, threat = Counting(seed), ThreatModel(norm=norm, eps=eps)
    data = data_for(model, n=60, seed=seed)
    verdicts = check(model, data, threat, progress=False, settings=FEW, seed=seed)
    assert {verdict.outcome for verdict in verdicts} == {"pass"}


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
    assert list(found) == [LOGITS, SAME, COMPANY, UNWATCHED, MEMORY]
    assert found[SAME].outcome == "not checked"
    assert described(error) in found[SAME].sentence
    assert type(error).__name__ in found[SAME].sentence
    assert {found[name].outcome for name in (LOGITS, COMPANY, UNWATCHED, MEMORY)} == {"pass"}


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
