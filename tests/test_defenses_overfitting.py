"""The guard: a collapse is seen on held-out images, undone, and does not come back."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import privacy
from defenses import (
    AdversarialTraining,
    AttackError,
    HeldOut,
    OverfittingGuard,
    OverfittingVerdict,
    ThreatModel,
    TrainingImages,
    attack,
)
from secure_cnn.engine import MeanUpdate, Schedule, WeightAverage, train

THREAT = ThreatModel(norm="linf", eps=0.1)


def held_out(n=40):
    labels = torch.arange(n) % 2
    images = (0.5 + 0.2 * (2.0 * labels - 1)).view(-1, 1, 1, 1).expand(n, 1, 1, 1)
    return HeldOut(images=images.contiguous(), labels=labels)


class Collapsing(nn.Module):
    """A linear model, whose weights decide whether it hides its slope from one step."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.hiding = nn.Parameter(torch.zeros(1), requires_grad=False)

    def forward(self, images):
        signal = images.flatten(1).mean(1) - 0.5
        if self.hiding > 0:
            # At the image the slope points the other way; PGD's random start leaves that place.
            near, sign = (signal.abs() - 0.2).abs() < 0.02, signal.sign()
            signal = torch.where(near, 0.22 * sign - 0.1 * signal, signal - 0.13 * sign)
        return self.weight * torch.stack([-signal, signal], 1)


def test_a_robust_model_is_good_and_a_hiding_one_is_overfitted():
    """The figures are those of FGSM and PGD on the held-out images."""
    model, guard = Collapsing(), OverfittingGuard(THREAT)
    before = copy.deepcopy(model.state_dict())
    fine = guard.check(model, held_out())
    assert (fine.single_step, fine.iterative, fine.overfitted) == (1.0, 1.0, False)
    with torch.no_grad():
        model.hiding.fill_(1.0)
    bad = guard.check(model, held_out())
    assert bad.single_step == 1.0
    assert bad.iterative < 0.75
    assert bad.overfitted
    assert set(before) == set(model.state_dict())


def test_settling_goes_back_to_the_last_good_state_and_raises_the_noise():
    """Weights, optimizer and average; from a first bad state only the noise is raised."""
    model, guard = Collapsing(), OverfittingGuard(THREAT)
    objective, data = AdversarialTraining(THREAT), held_out()
    optimizer = torch.optim.SGD([model.weight], lr=0.1, momentum=0.9)
    average = WeightAverage(model, decay=0.5)
    parts = [optimizer, average]

    def step():
        optimizer.zero_grad()
        F.cross_entropy(model(data.images), data.labels).backward()
        optimizer.step()
        average.update(model)

    step()
    assert not guard.rescue(model, data, objective, parts).overfitted
    assert objective.noise == 2.0
    good = copy.deepcopy([model.state_dict(), optimizer.state_dict(), average.state_dict()])
    for times in (1, 2):
        step()
        with torch.no_grad():
            model.hiding.fill_(1.0)
        assert guard.rescue(model, data, objective, parts).overfitted
        assert objective.noise == 2.0 * 1.5**times
        torch.testing.assert_close(
            [model.state_dict(), optimizer.state_dict(), average.state_dict()], good
        )
    fresh = Collapsing()
    with torch.no_grad():
        fresh.hiding.fill_(1.0)
    assert OverfittingGuard(THREAT).rescue(fresh, data, objective).overfitted
    assert fresh.hiding.item() == 1.0


def test_it_works_at_the_epoch_ends_of_the_engine():
    """As a monitor; a collapse in the second epoch is undone in the middle of the training."""
    model, guard = Collapsing(), OverfittingGuard(THREAT)
    objective, data, verdicts = AdversarialTraining(THREAT), held_out(), []
    optimizer = torch.optim.SGD([model.weight], lr=0.1)

    class Guarded:
        def batch(self, losses, *, step): ...

        def epoch(self, epoch, *, step):
            if epoch == 2:
                with torch.no_grad():
                    model.hiding.fill_(1.0)
            verdicts.append(guard.rescue(model, data, objective, [optimizer]).overfitted)

    train(
        model,
        objective,
        [(data.images, data.labels)] * 9,
        MeanUpdate(optimizer),
        optimizer=optimizer,
        schedule=Schedule(peak=0.1, steps=9, epochs=3),
        monitor=Guarded(),
    )
    assert verdicts == [False, True, False]
    assert model.hiding.item() == 0.0
    assert objective.noise == 3.0


def test_raised_noise_is_in_the_state_of_the_objective():
    """A resumed run goes on with it."""
    objective, again = AdversarialTraining(THREAT), AdversarialTraining(THREAT)
    objective.noise = 3.0
    again.load_state_dict(objective.state_dict())
    assert again.noise == 3.0
    assert again.attack == objective.attack
    assert again.attack.radius == pytest.approx(0.4)


def test_a_method_of_many_steps_is_refused():
    """Before anything is attacked."""
    objective = AdversarialTraining(THREAT, "pgd")
    assert not objective.single_step
    with pytest.raises(AttackError, match="n-fgsm"):
        OverfittingGuard(THREAT).rescue(Collapsing(), held_out(), objective)
    with pytest.raises(AttackError, match="n-fgsm"):
        objective.noise = 3.0


@pytest.mark.parametrize(
    ("method", "own", "length"), [("fgsm", 0.0, 0.1), ("ffgsm", 1.0, 0.125), ("n-fgsm", 2.0, 0.1)]
)
def test_every_single_step_becomes_n_fgsm_of_the_same_length(method, own, length):
    """By another noise than its own, which survives its state; by its own it is itself again."""
    objective = AdversarialTraining(THREAT, method)
    unraised = AdversarialTraining(THREAT, method)
    unraised.load_state_dict(objective.state_dict())
    assert objective.noise == own
    assert unraised.attack == objective.attack
    objective.noise = 3.0
    assert objective.attack == attack("n-fgsm", THREAT, noise=3.0, step_size=length)
    again = AdversarialTraining(THREAT, method)
    again.load_state_dict(objective.state_dict())
    assert again.attack == objective.attack
    again.load_state_dict(unraised.state_dict())
    assert again.attack == unraised.attack


def scripted(guard, *shares):
    """A guard that sees these shares under FGSM and PGD, one pair after the other."""
    pairs = iter(shares)

    def check(model, images, *, strength=1.0):
        single, iterative = next(pairs)
        return OverfittingVerdict(
            single_step=single, iterative=iterative, overfitted=single - iterative > 0.2
        )

    guard.check = check
    return guard


@pytest.mark.parametrize(
    ("shares", "returned", "noise"),
    [
        ([(0.9, 0.8)], False, 0.0),
        ([(0.8, 0.5)], False, 0.0),
        ([(0.8, 0.3)], False, 1.0),
        ([(0.9, 0.8), (0.8, 0.5), (0.9, 0.8)], True, 1.0),
        ([(0.9, 0.6), (0.8, 0.5), (0.9, 0.6)], False, 0.0),
        ([(0.3, 0.2), (0.8, 0.3), (0.3, 0.2)], False, 1.0),
        ([(0.3, 0.2), (0.8, 0.5), (0.3, 0.2), (0.9, 0.2), (0.8, 0.5)], True, 1.0),
    ],
    ids=[
        "good",
        "usual-at-a-large-eps",
        "bad-from-the-start",
        "fallen",
        "fallen-a-little",
        "risen-but-bad",
        "fallen-from-where-it-rose",
    ],
)
def test_it_goes_back_only_for_something(shares, returned, noise):
    """Else the weights stay, and noise is raised where PGD leaves less than half of FGSM's."""
    model, objective = nn.Linear(1, 1), AdversarialTraining(THREAT, "fgsm")
    guard, rescued, weights = scripted(OverfittingGuard(THREAT), *shares), [], [-1.0]
    for number in range({1: 1, 3: 2, 5: 3}[len(shares)]):
        weights.append(float(number))
        nn.init.constant_(model.weight, number)
        rescued.append(guard.rescue(model, held_out(), objective).returned)
        assert model.weight.item() == weights[-2 if rescued[-1] else -1]
    assert rescued == [False] * (len(rescued) - 1) + [returned]
    assert objective.noise == noise


def test_noise_has_an_end():
    """That of N-FGSM where nothing was lost; after that, where nothing is left to learn from."""
    objective, guard = AdversarialTraining(THREAT, "fgsm"), OverfittingGuard(THREAT)
    model, noises = nn.Linear(1, 1), []
    for _ in range(4):
        scripted(guard, (0.9, 0.1)).rescue(model, held_out(), objective)
        noises.append(objective.noise)
    assert noises == [1.0, 1.5, 2.0, 2.0]
    scripted(guard, (0.9, 0.9)).rescue(model, held_out(), objective)
    for _ in range(5):
        scripted(guard, (0.9, 0.1), (0.9, 0.9)).rescue(model, held_out(), objective)
        noises.append(objective.noise)
    assert noises[4:] == [3.0, 4.5, 6.75, 8.0, 8.0]


def test_the_ball_is_that_of_the_present_strength():
    """Within a tenth of eps the hiding model has nothing to hide."""
    model = Collapsing()
    with torch.no_grad():
        model.hiding.fill_(1.0)
    guard, data = OverfittingGuard(THREAT), held_out()
    assert guard.check(model, data).overfitted
    assert guard.check(model, data, strength=0.1).iterative == 1.0


def test_a_guard_goes_on_with_its_state():
    """What it could go back to, another one can; a state that is none is refused."""
    model, data, objective = Collapsing(), held_out(), AdversarialTraining(THREAT)
    guard, other = OverfittingGuard(THREAT), OverfittingGuard(THREAT)
    guard.rescue(model, data, objective)
    with torch.no_grad():
        model.hiding.fill_(1.0)
    other.load_state_dict(guard.state_dict())
    assert other.rescue(model, data, objective).returned
    assert model.hiding.item() == 0.0
    for state in ({}, {"good": 1}, {"good": [1]}):
        with pytest.raises(AttackError, match="guard"):
            other.load_state_dict(state)


def test_going_back_returns_no_epsilon():
    """Of a private training, watched on held-out images: weights go back, its ledger does not."""
    model, data = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), torch.rand(8, 1, 2, 2)
    plan = privacy.DPPlan(samples=8, batch_size=8, epochs=4, noise_multiplier=1.0, delta=1e-2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    private = privacy.attach(plan, model, optimizer, [(image, 0) for image in data])
    objective, guard = AdversarialTraining(THREAT), OverfittingGuard(THREAT)
    images = HeldOut(images=torch.rand(8, 1, 2, 2), labels=torch.arange(8) % 2)
    scripted(guard, (1.0, 1.0), (1.0, 0.0), (1.0, 1.0))
    spent, weights = [], []
    for batch, labels in private.batches:
        private.step(objective(model, batch, labels))
        if len(weights) < 2:
            assert guard.rescue(model, images, objective, [optimizer]).returned == bool(weights)
            weights.append(copy.deepcopy(model.state_dict()))
        spent.append(private.spent())
    torch.testing.assert_close(*weights, rtol=0, atol=0)
    assert len(spent) == 4
    assert spent == sorted(set(spent))
    stale = private.state_dict() | {"ledger": []}
    with pytest.raises(privacy.PlanError, match="epsilon never falls"):
        private.load_state_dict(stale)


def test_images_are_taken_by_what_they_are_said_to_be():
    """By type: whoever makes the value says that they are in no training set, or not private."""
    data = held_out()
    with pytest.raises(AttackError, match="HeldOut"):
        OverfittingGuard(THREAT).check(Collapsing(), (data.images, data.labels))
    trained_on = TrainingImages(images=data.images, labels=data.labels)
    assert OverfittingGuard(THREAT).check(Collapsing(), trained_on).iterative == 1.0
    with pytest.raises(AttackError, match="labels"):
        HeldOut(images=data.images, labels=data.labels[:3])
    with pytest.raises(AttackError, match="n >= 1"):
        HeldOut(images=data.images[:0], labels=data.labels[:0])


@pytest.mark.parametrize("given", [{"gap": 0.0}, {"gap": 1.0}, {"steps": 0}])
def test_wrong_settings_are_refused(given):
    """By name."""
    with pytest.raises(AttackError, match=next(iter(given))):
        OverfittingGuard(THREAT, **given)


def test_an_l2_threat_is_refused():
    """There is no single-step attack to compare with."""
    with pytest.raises(AttackError, match="no l2 attack"):
        OverfittingGuard(ThreatModel(norm="l2", eps=1.0))
