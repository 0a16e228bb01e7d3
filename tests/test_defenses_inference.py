"""Every attack and objective where the caller disabled gradients, on tensors made there."""

import pytest
import torch
from support.every_attack import EVERY, batch, cheap
from support.networks import Net

from defenses import (
    OBJECTIVES,
    AttackError,
    ThreatModel,
    adversarial_objective,
    attack,
    evaluate,
)

LINF = ThreatModel(norm="linf", eps=0.1)


@EVERY
def test_an_attack_finds_the_same_where_gradients_are_disabled(norm, name, targeted):
    """Under `inference_mode`, on images, labels and targets made in it, and under `no_grad`."""
    torch.manual_seed(0)
    net, search = Net().eval(), cheap(norm, name)

    def found():
        images, labels, targets = batch()
        return search(net, images, labels, targets=targets if targeted else None, seed=3)

    expected = found()
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            torch.testing.assert_close(found(), expected)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_an_objective_gives_the_same_losses_where_gradients_are_disabled(name, mode):
    """Without a graph: a validation loss may be taken there."""
    torch.manual_seed(0)
    net, images, labels = Net().eval(), *batch()[:2]
    steps = 2 if name in ("pgd", "trades", "mart", "free") else None
    expected = adversarial_objective(name, LINF, steps=steps)(net, images, labels)
    with mode():
        made = batch()[:2]
        losses = adversarial_objective(name, LINF, steps=steps)(net, *made)
        assert not losses.requires_grad
    torch.testing.assert_close(losses.clone(), expected.detach())


def test_a_model_made_under_inference_mode_is_refused():
    """Nothing can be differentiated through it, wherever it is called."""
    with torch.inference_mode():
        net = Net().eval()
    images, labels, _ = batch()
    with pytest.raises(AttackError, match="inference_mode"):
        attack("pgd", LINF, steps=1)(net, images, labels)


def test_an_evaluation_may_run_under_inference_mode():
    """With the same report."""
    net = Net().eval()
    pairs = [(image, int(label)) for image, label in zip(*batch()[:2], strict=True)]
    expected = evaluate(net, pairs, LINF, attacks=["fgsm"], progress=False)
    with torch.inference_mode():
        made = [(image.clone(), label) for image, label in pairs]
        assert evaluate(net, made, LINF, attacks=["fgsm"], progress=False) == expected
