"""Adversarial training as a per-example objective that composes with a private update."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from support.networks import Net, assert_same, disturbed_net, snapshot
from support.objectives import PerExample, batch
from torch import nn

from defenses import AdversarialTraining, AttackError, ThreatModel, ThreatModelError, attack

LINF = ThreatModel(norm="linf", eps=0.1)
METHODS = ["n-fgsm", "ffgsm", "fgsm", "pgd"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_losses_are_cross_entropy_on_the_attacked_images(method, smoothing):
    """One loss per example, equal to attacking by hand with the same seed."""
    torch.manual_seed(0)
    model, (images, labels) = PerExample().eval(), batch()
    objective = AdversarialTraining(LINF, method, seed=9, label_smoothing=smoothing)
    losses = objective(model, images, labels)
    seed = int(torch.randint(2**63 - 1, (), generator=torch.Generator().manual_seed(9)))
    by_hand = objective.attack(model, images, labels, seed=seed)
    assert not torch.equal(by_hand, images)
    expected = F.cross_entropy(model(by_hand), labels, reduction="none", label_smoothing=smoothing)
    assert losses.shape == (6,)
    torch.testing.assert_close(losses, expected)
    assert objective.per_example


@pytest.mark.parametrize("method", METHODS)
def test_the_attack_inside_moves_nothing_of_the_model(method):
    """Only the one training forward shows: one update of the batch statistics, one dropout draw."""
    net, (images, labels) = disturbed_net(), batch()
    before, training = snapshot(net), []
    net.register_forward_pre_hook(lambda *_: training.append(net.training))
    losses = AdversarialTraining(LINF, method)(net, images, labels)
    assert training.pop() is True
    assert not any(training)
    # The training forward draws its dropout mask from the global stream, and nothing else does.
    after = torch.get_rng_state()
    torch.set_rng_state(before["torch"])
    F.dropout(torch.ones(6, 4 * 64), 0.3)
    assert torch.equal(torch.get_rng_state(), after)
    torch.set_rng_state(before["torch"])
    assert_same(before, snapshot(net))  # the BatchNorm was in evaluation mode
    losses.sum().backward()
    assert torch.equal(net.conv.weight.grad, before["grads"][0])  # frozen, so as before
    assert net.head.bias.grad is not None


def test_batch_statistics_move_once_and_by_the_adversarial_batch():
    """A BatchNorm in training mode sees the one training forward and no attack step."""
    net, (images, labels) = Net().train(), batch()
    start = int(net.norm.num_batches_tracked)
    AdversarialTraining(LINF, "pgd", steps=3)(net, images, labels)
    assert int(net.norm.num_batches_tracked) == start + 1


@pytest.mark.parametrize("method", METHODS)
def test_with_opacus_each_example_has_the_gradient_of_its_own_loss(method):
    """In training mode, per-sample gradients equal a plain loop over the adversarial images."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Opacus' own deprecations
        opacus = pytest.importorskip("opacus")
    torch.manual_seed(0)
    model, (images, labels) = PerExample().train(), batch()
    oracle = copy.deepcopy(model)
    private = opacus.GradSampleModule(model, loss_reduction="sum")
    objective = AdversarialTraining(LINF, method, seed=5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # full backward hooks on inputs without gradients
        objective(private, images, labels).sum().backward()
    seed = int(torch.randint(2**63 - 1, (), generator=torch.Generator().manual_seed(5)))
    adversarial = objective.attack(oracle, images, labels, seed=seed)
    for i in range(len(images)):
        loss = F.cross_entropy(oracle(adversarial[i : i + 1]), labels[i : i + 1])
        expected = torch.autograd.grad(loss, list(oracle.parameters()))
        for parameter, gradient in zip(model.parameters(), expected, strict=True):
            assert len(parameter.grad_sample) == len(images)
            torch.testing.assert_close(parameter.grad_sample[i], gradient, atol=1e-6, rtol=1e-4)


def test_an_attack_without_the_door_would_have_been_recorded():
    """A control: the same attack by hand in training mode adds per-sample gradients."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opacus = pytest.importorskip("opacus")
        model, (images, labels) = PerExample().train(), batch()
        private = opacus.GradSampleModule(model, loss_reduction="sum")
        images.requires_grad_()
        torch.autograd.grad(F.cross_entropy(private(images), labels), images)
    assert model.conv.weight.grad_sample is not None


def test_an_empty_batch_has_no_losses():
    """Poisson sampling draws them; the backward still works."""
    model, (images, labels) = PerExample(), batch(0)
    for method in METHODS:
        losses = AdversarialTraining(LINF, method)(model, images, labels)
        assert losses.shape == (0,)
        losses.sum().backward()


def test_a_resumed_objective_continues_where_it_was():
    """The state carries the generator: the same losses as without the interruption."""
    torch.manual_seed(0)
    model, (images, labels) = PerExample().eval(), batch()
    whole, part = (AdversarialTraining(LINF, seed=3) for _ in range(2))
    first = [whole(model, images, labels) for _ in range(3)]
    part(model, images, labels)
    resumed = AdversarialTraining(LINF, seed=99)
    resumed.load_state_dict(part.state_dict())
    for expected in first[1:]:
        assert torch.equal(resumed(model, images, labels), expected)
    assert not torch.equal(first[0], first[1])


def test_global_draws_neither_move_the_objective_nor_follow_it():
    """The same losses whatever the global stream does in between."""
    model, (images, labels) = PerExample().eval(), batch()
    one, two = AdversarialTraining(LINF, seed=1), AdversarialTraining(LINF, seed=1)
    expected = [one(model, images, labels) for _ in range(2)]
    state = torch.get_rng_state()
    found = [two(model, images, labels)]
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(10)
    found.append(two(model, images, labels))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_a_state_that_is_not_one_is_refused_and_changes_nothing():
    """Wrong keys, kinds and lengths."""
    objective = AdversarialTraining(LINF)
    before = objective.state_dict()["generator"]
    for state in ({}, {"generator": 3}, {"generator": torch.zeros(3, dtype=torch.uint8)}):
        with pytest.raises(AttackError, match="state_dict"):
            objective.load_state_dict(state)
    assert torch.equal(before, objective.state_dict()["generator"])


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"method": "apgd"}, "n-fgsm, ffgsm, fgsm, pgd"),
        ({"method": "fgsm", "steps": 2}, "takes no setting 'steps'"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"seed": -1}, "seed"),
        ({"threat": ThreatModel(norm="l2", eps=1.0)}, "no l2 attack"),
    ],
)
def test_wrong_settings_are_refused(given, word):
    """By name, before any training."""
    with pytest.raises(AttackError, match=word):
        AdversarialTraining(**({"threat": LINF} | given))


def test_normalised_images_are_refused():
    """In training too, the ball is one of plain pixels."""
    images, labels = batch()
    with pytest.raises(ThreatModelError, match="normalisation"):
        AdversarialTraining(LINF)(PerExample(), 4 * images - 2, labels)


def test_settings_name_everything_for_the_record():
    """PGD trains with ten steps of eps / 4 unless told otherwise."""
    settings = AdversarialTraining(LINF, "pgd", label_smoothing=0.1).settings
    assert settings == {
        "method": "pgd",
        "label_smoothing": 0.1,
        "precision": "float32",
        "steps": 10,
        "step_size": 0.025,
        "random_start": True,
        "early_stop": False,
    }


def test_training_on_it_makes_a_model_more_robust():
    """Many weak pixels, perfect together, and a strong one that is right in 9 of 10 images.

    The trade-off of Tsipras et al. (2019, arXiv 1805.12152): only the strong pixel is robust.
    """
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (400,), generator=draw)
    sign = (2.0 * labels - 1).view(-1, 1)
    images = 0.5 + 0.05 * sign + 0.1 * torch.randn(400, 64, generator=draw)
    right = torch.where(torch.rand(400, 1, generator=draw) < 0.9, 1.0, -1.0)
    images[:, :1] = 0.5 + 0.3 * sign * right
    images = images.clamp(0, 1).view(400, 1, 8, 8)
    threat, accuracy = ThreatModel(norm="linf", eps=0.08), {}
    for name in ("plain", "robust"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        objective = AdversarialTraining(threat, "fgsm")  # exact on a linear model
        for _ in range(150):
            optimizer.zero_grad()
            if name == "robust":
                losses = objective(model, images, labels)
            else:
                losses = F.cross_entropy(model(images), labels, reduction="none")
            losses.mean().backward()
            optimizer.step()
        found = attack("pgd", threat, steps=10)(model, images, labels, seed=0)
        accuracy[name] = (model(found).argmax(1) == labels).float().mean().item()
    assert accuracy["robust"] > accuracy["plain"] + 0.2
