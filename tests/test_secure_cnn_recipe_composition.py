"""DP-SGD and adversarial training together: each example's gradient, and the noise, are untouched.

The oracle knows neither recorder nor loop: it crafts the same adversarial images, then takes one
example at a time through an untouched float64 copy of the network.
"""

import copy
import sys

import pytest
import torch
import torch.nn.functional as F
import torchattacks
from torch import nn

import defenses
import privacy
from privacy.clipping import rule_of
from privacy.clipping.layers import install
from privacy.clipping.tape import Tape
from privacy.differentiation import differentiate
from secure_cnn.data import DataSpec, Split
from secure_cnn.models import build_model

THREAT = defenses.ThreatModel(norm="linf", eps=0.1)
L2 = defenses.ThreatModel(norm="l2", eps=0.5)
OBJECTIVES = {
    "n-fgsm": lambda: defenses.AdversarialTraining(THREAT, "n-fgsm", seed=5),
    "ffgsm": lambda: defenses.AdversarialTraining(THREAT, "ffgsm", seed=5),
    "fgsm": lambda: defenses.AdversarialTraining(THREAT, "fgsm", seed=5, label_smoothing=0.1),
    "pgd": lambda: defenses.AdversarialTraining(THREAT, "pgd", steps=3, seed=5),
    "pgd-l2": lambda: defenses.AdversarialTraining(L2, "pgd", steps=3, seed=5),
}
SPEC = DataSpec(shape=(1, 8, 8), classes=("a", "b", "c"))


def split(count):
    """Random images of three classes."""
    draw = torch.Generator().manual_seed(1)
    images = torch.randint(256, (count, 1, 8, 8), generator=draw, dtype=torch.uint8)
    return Split(images=images, labels=torch.randint(3, (count,), generator=draw))


def network(name):
    """One of the named networks, its last layer large enough for gradients to matter."""
    model = build_model(name, SPEC)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator(2)))
    return model


def generator(seed):
    """A seeded generator."""
    return torch.Generator().manual_seed(seed)


def crafted(objective, model, images, labels):
    """The images that a fresh objective attacks to on its first call, made outside of it."""
    seed = int(torch.randint(2**63 - 1, (), generator=generator(5)))
    return objective.attack(model, images, labels, seed=seed)


def gradients_one_by_one(model, images, labels, smoothing):
    """Per-example gradients [n, ...] of every parameter, in float64, one example at a time."""
    exact = copy.deepcopy(model).double().train()
    rows = []
    for image, label in zip(images.double(), labels, strict=True):
        loss = F.cross_entropy(exact(image[None]), label[None], label_smoothing=smoothing)
        rows.append(torch.autograd.grad(loss, list(exact.parameters())))
    return [torch.stack(parts) for parts in zip(*rows, strict=True)]


@pytest.mark.parametrize("method", OBJECTIVES)
@pytest.mark.parametrize("name", ["compact", "resnet20"])
def test_per_example_gradients_equal_the_oracle(name, method):
    """Under every method, on a plain and a residual network: those of the adversarial images."""
    model, objective = network(name).train(), OBJECTIVES[method]()
    untouched = copy.deepcopy(model)
    images, labels = split(6).batch(torch.arange(6))
    tape = Tape()
    install(model, tape, rule_of)
    parameters = dict(model.named_parameters())
    losses = objective(model, images, labels)
    parts = differentiate(losses, parameters, tape, examples=6)
    adversarial = crafted(OBJECTIVES[method](), untouched, images, labels)
    assert not torch.equal(adversarial, images)
    smoothing = 0.1 if method == "fgsm" else 0.0
    expected = gradients_one_by_one(untouched, adversarial, labels, smoothing)
    clean = gradients_one_by_one(untouched, images, labels, smoothing)
    assert set(parts) == set(parameters.values())
    for parameter, exact, other in zip(parameters.values(), expected, clean, strict=True):
        found = parts[parameter].instantiate().double()
        scale = exact.abs().max()
        assert scale > 0
        assert (found - exact).abs().max() <= 2e-4 * scale
        assert (found - other).abs().max() > 2e-3 * scale  # control: not those of the clean images


@pytest.mark.parametrize("method", ["n-fgsm", "pgd"])
@pytest.mark.parametrize("count", [16, 13])
def test_a_whole_private_step_is_the_clipped_sum_of_the_oracle(method, count):
    """Through the public names, every example sampled, next to no noise; with filling rows too."""
    model, objective = network("compact"), OBJECTIVES[method]()
    before, norm = copy.deepcopy(model), 0.05
    data = split(count)
    plan = privacy.DPPlan(
        samples=count, batch_size=count, epochs=1, max_grad_norm=norm, noise_multiplier=1e-9
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    private = privacy.attach(plan, model, optimizer, data)
    (images, labels) = next(iter(private.batches))
    assert len(images) % 8 == 0
    adversarial = crafted(OBJECTIVES[method](), before, images, labels)[:count]
    assert private.step(objective(private.model, images, labels))
    rows = gradients_one_by_one(before, adversarial, labels[:count], 0.0)
    norms = sum(part.flatten(1).square().sum(1) for part in rows).sqrt()
    factors = (norm / norms).clamp(max=1)
    assert (factors < 1).any()
    for old, new, part in zip(before.parameters(), model.parameters(), rows, strict=True):
        step = (factors.view(-1, *[1] * (part.ndim - 1)) * part).sum(0) / count
        # The weights themselves are float32.
        torch.testing.assert_close(old.double() - step, new.double(), rtol=1e-5, atol=1e-7)


def test_an_attack_inside_the_loop_changes_nothing_of_the_step(monkeypatch):
    """With the same secret key: the same weights, whatever else attacked the model between.

    Up to the rounding of the kernels, which are chosen by their speed; noise that moved would
    show a thousandfold.
    """

    def trained(*attacks, key=bytes(32)):
        monkeypatch.setattr(
            sys.modules["privacy.attach"],  # the package has a function of the same name
            "SecureGenerator",
            lambda: privacy.SecureGenerator(key=key),
        )
        model = network("compact")
        data = split(16)
        plan = privacy.DPPlan(samples=16, batch_size=8, epochs=2, noise_multiplier=1.0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        private = privacy.attach(plan, model, optimizer, data)
        for images, labels in private.batches:
            for each in attacks:
                each(private.model, images, labels, seed=3)
            losses = F.cross_entropy(private.model(images), labels, reduction="none")
            for each in attacks:
                each(private.model, images, labels, seed=4)
            private.step(losses)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    alone = trained()
    assert (trained(key=b"another key" + bytes(21)) - alone).abs().median() > 1e-2  # control
    for name in ("pgd", "apgd", "square", "fab"):
        settings = {"queries": 5} if name == "square" else {"steps": 2}
        found = trained(defenses.attack(name, THREAT, **settings))
        torch.testing.assert_close(found, alone, rtol=0, atol=1e-5)


def test_no_attack_moves_the_noise_stream():
    """Two generators of one key, one with attacks that re-seed the world between its draws."""
    quiet, disturbed = (privacy.SecureGenerator(key=b"k" * 32) for _ in range(2))
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    images, labels = split(4).batch(torch.arange(4))
    noises = []
    for name in ("apgd", "fab", "pgd"):
        defenses.attack(name, THREAT, steps=2)(model, images, labels, seed=0)
        noises.append(disturbed.normal(1000))
        assert torch.equal(noises[-1], quiet.normal(1000))
    assert not torch.equal(noises[0], noises[1])


@pytest.mark.secret
def test_noise_after_the_same_attack_is_never_the_same():
    """The fault that this design answers: an attack that re-seeds torch repeats torch's noise.

    A hundred normals of 53 bits each are alike by chance with a probability below 2^-1000.
    """
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    images, labels = split(4).batch(torch.arange(4))
    secure = privacy.SecureGenerator()
    bare, ours = [], []
    for _ in range(2):
        torchattacks.APGD(model, eps=0.1, steps=2)(images, labels)
        bare.append(torch.randn(100))
        defenses.attack("apgd", THREAT, steps=2)(model, images, labels, seed=0)
        ours.append(secure.normal(100))
    assert torch.equal(*bare)  # control: this is the fault
    assert not torch.equal(*ours)
