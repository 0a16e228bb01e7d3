"""The guard: a collapse is seen on held-out images, undone, and does not come back."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from defenses import (
    AdversarialTraining,
    AttackError,
    HeldOut,
    OverfittingGuard,
    ThreatModel,
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
    assert not guard.settle(model, data, objective, parts).overfitted
    assert objective.noise == 2.0
    good = copy.deepcopy([model.state_dict(), optimizer.state_dict(), average.state_dict()])
    for times in (1, 2):
        step()
        with torch.no_grad():
            model.hiding.fill_(1.0)
        assert guard.settle(model, data, objective, parts).overfitted
        assert objective.noise == 2.0 * 1.5**times
        torch.testing.assert_close(
            [model.state_dict(), optimizer.state_dict(), average.state_dict()], good
        )
    fresh = Collapsing()
    with torch.no_grad():
        fresh.hiding.fill_(1.0)
    assert OverfittingGuard(THREAT).settle(fresh, data, objective).overfitted
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
            verdicts.append(guard.settle(model, data, objective, [optimizer]).overfitted)

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


@pytest.mark.parametrize("method", ["fgsm", "ffgsm", "pgd"])
def test_methods_without_noise_are_refused(method):
    """Before anything is attacked."""
    objective = AdversarialTraining(THREAT, method)
    with pytest.raises(AttackError, match="n-fgsm"):
        OverfittingGuard(THREAT).settle(Collapsing(), held_out(), objective)
    with pytest.raises(AttackError, match="n-fgsm"):
        objective.noise = 3.0


def test_only_held_out_images_are_taken():
    """By type: whoever makes the value says that they are in no training set."""
    data = held_out()
    with pytest.raises(AttackError, match="HeldOut"):
        OverfittingGuard(THREAT).check(Collapsing(), (data.images, data.labels))
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
