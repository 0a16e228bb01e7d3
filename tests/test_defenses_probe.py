"""The probe passes what keeps to its own example and catches what does not."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support.networks import assert_same, snapshot
from support.objectives import PerExample, batch
from torch import nn

from defenses import (
    OBJECTIVES,
    AdversarialTraining,
    FreeAdversarialTraining,
    ObjectiveError,
    ThreatModel,
    adversarial_objective,
    check_per_example,
)

LINF = ThreatModel(norm="linf", eps=0.1)


class Declared:
    """An objective that claims to keep to its own example."""

    per_example = True

    def __init__(self, losses):
        self.losses = losses

    def __call__(self, model, images, labels):
        return self.losses(model, images, labels)


def cross_entropy(model, images, labels):
    return F.cross_entropy(model(images), labels, reduction="none")


def mixup(model, images, labels):
    return cross_entropy(model, 0.7 * images + 0.3 * images.roll(1, 0), labels)


def neighbours_target(model, images, labels):
    return cross_entropy(model, images, labels.roll(1))


def mean_over_batch(model, images, labels):
    return cross_entropy(model, images, labels) / len(images)


def normalised(model, images, labels):
    losses = cross_entropy(model, images, labels)
    return losses / losses.detach().mean()


def value_only(model, images, labels):
    """The values are each one's own; the gradients are not."""
    losses = cross_entropy(model, images, labels)
    shared = losses.mean()
    return losses + shared - shared.detach()


def universal_perturbation(model, images, labels):
    leaf = images.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(cross_entropy(model, leaf, labels).sum(), leaf)
    step = 0.1 * gradient.sum(0, keepdim=True).sign()
    return cross_entropy(model, images + step, labels)


def weight_perturbation(model, images, labels):
    """AWP or SAM: the weights climb the loss of the whole batch first."""
    weight = model.head.weight
    (gradient,) = torch.autograd.grad(cross_entropy(model, images, labels).sum(), weight)
    features = F.relu(model.norm(model.conv(images))).flatten(1)
    climbed = weight + 0.1 * gradient / gradient.norm()
    return F.cross_entropy(F.linear(features, climbed, model.head.bias), labels, reduction="none")


MIXING = [
    mixup,
    neighbours_target,
    mean_over_batch,
    normalised,
    value_only,
    universal_perturbation,
    weight_perturbation,
]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return PerExample().train()


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "free"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_objectives_that_keep_their_word_pass(name, norm, model):
    """The attacks' random starts do not look like a dependence."""
    if norm == "l2" and name in ("n-fgsm", "ffgsm", "fgsm"):
        pytest.skip("linf only")
    threat = ThreatModel(norm=norm, eps=0.1)
    check_per_example(adversarial_objective(name, threat), model, *batch(8))


def test_plain_cross_entropy_and_early_stop_pass(model):
    """The first has no state; the second's batches shrink by what others do."""
    check_per_example(Declared(cross_entropy), model, *batch(8))
    objective = AdversarialTraining(LINF, "pgd", early_stop=True)
    check_per_example(objective, model, *batch(8))


@pytest.mark.parametrize("losses", MIXING)
def test_mixing_examples_is_caught(losses, model):
    """Though it is declared to be per example."""
    with pytest.raises(ObjectiveError, match="Declared: expected losses"):
        check_per_example(Declared(losses), model, *batch(8))


def test_carrying_over_to_the_next_batch_is_caught(model):
    """Free adversarial training under a false flag."""

    class Flagged(Declared):
        def __init__(self):
            self.losses = FreeAdversarialTraining(LINF)
            self.state_dict = self.losses.state_dict
            self.load_state_dict = self.losses.load_state_dict

    with pytest.raises(ObjectiveError, match="of the next batch"):
        check_per_example(Flagged(), model, *batch(8))


def test_a_layer_that_mixes_is_caught_too():
    """BatchNorm in training mode."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64, 4)).train()
    with pytest.raises(ObjectiveError, match="a layer of the model"):
        check_per_example(Declared(cross_entropy), net, *batch(8))
    check_per_example(Declared(cross_entropy), net.eval(), *batch(8))


def test_a_declared_dependence_is_refused_with_its_reason(model):
    """Nothing runs."""
    with pytest.raises(ObjectiveError, match="carries a perturbation"):
        check_per_example(FreeAdversarialTraining(LINF), model, *batch(8))
    with pytest.raises(ObjectiveError, match="no per_example"):
        check_per_example(F.cross_entropy, model, *batch(8))


def test_one_loss_for_all_is_refused(model):
    """A mean has no examples left."""
    with pytest.raises(ObjectiveError, match=r"expected one an example, \[8\], got \[\]"):
        check_per_example(Declared(lambda *given: cross_entropy(*given).mean()), model, *batch(8))


def test_too_few_to_watch_are_refused(model):
    """Or all of one class: a changed label could not show."""
    images, labels = batch(8)
    for given in ((images[:3], labels[:3]), (images, torch.zeros(8, dtype=torch.int64))):
        with pytest.raises(ObjectiveError, match="at least 4 images of 2 classes"):
            check_per_example(Declared(cross_entropy), model, *given)


@pytest.mark.parametrize("name", ["n-fgsm", "trades"])
def test_everything_is_as_before(name, model):
    """Model, gradients, global random state and the objective's own state."""
    objective = adversarial_objective(name, LINF)
    before, state = snapshot(model), copy.deepcopy(objective.state_dict())
    check_per_example(objective, model, *batch(8))
    assert_same(before, snapshot(model))
    assert torch.equal(state["generator"], objective.state_dict()["generator"])
