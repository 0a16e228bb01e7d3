"""What holds for every attack there is, in every norm, with and without a target.

Only what all have in common; that each finds what it should is elsewhere.
"""

import copy

import pytest
import torch
from support.every_attack import CASES, EPS, EVERY, batch, cheap, shuffle
from support.networks import Net, Switched, assert_same, disturbed_net, snapshot
from torch import nn

from defenses import AttackError, ThreatModel, attack, attack_names
from privacy.clipping import rule_of
from privacy.clipping.layers import install
from privacy.clipping.tape import Tape
from privacy.differentiation import differentiate


class Hooked(Switched):
    """Hooks as Opacus has them: in evaluation mode they fail."""

    def forward(self, images):
        if self.hooks_enabled and not self.training:
            raise RuntimeError("the hooks are on in evaluation mode")
        return images


class Everything(nn.Module):
    """A model with all that an attack could disturb, and that can fail in the middle of a call."""

    def __init__(self):
        super().__init__()
        self.hooked, self.net = Hooked(enabled=True), disturbed_net()
        self.left, self.error = None, None

    def forward(self, images):
        hidden = self.net(self.hooked(images))
        if self.left is not None:
            self.left -= 1
            if self.left == 0:
                self.net.train()
                raise self.error("planted")
        return hidden


def disturbable():
    """The model, and a tape that its last layer writes on as in a private training."""
    torch.manual_seed(5)
    model, tape = Everything(), Tape()
    install(model.net.head, tape, rule_of)
    return model, tape


def per_example(model, tape, losses):
    """Squared norms of the last layer's per-example gradients, as the tape has them."""
    head = dict(model.net.head.named_parameters())
    found = differentiate(losses, head, tape, examples=len(losses))
    return [found[parameter].squared_norms() for parameter in head.values()]


@EVERY
def test_no_attack_leaves_a_trace(norm, name, targeted, capsys):
    """All is bit-identical afterwards; the result is in the ball, repeatable and silent."""
    (model, tape), (images, labels, targets) = disturbable(), batch()
    originals, attacker = images.clone(), cheap(norm, name)
    aim = {"targets": targets} if targeted else {}
    before = snapshot(model)
    found = attacker(model, images, labels, seed=11, **aim)
    again = attacker(model, images, labels, seed=11, **aim)
    assert_same(before, snapshot(model))
    assert model.hooked.hooks_enabled
    assert not tape.recording
    assert tape.take() == {}
    assert torch.equal(images, originals)
    assert not found.requires_grad
    assert torch.equal(found, again)
    if name == "n-fgsm":  # for training: it leaves the ball on purpose, not the bounds
        assert found.min() >= 0
        assert found.max() <= 1
    else:
        assert attacker.radius == attacker.threat.eps
        assert attacker.threat.contains(images, found).all()
    assert "".join(capsys.readouterr()) == ""


@EVERY
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_a_failing_forward_leaves_no_trace(norm, name, targeted, error):
    """Whatever call fails, the model's own error comes through and all is restored."""
    (model, tape), (images, labels, targets) = disturbable(), batch()
    before = snapshot(model)
    for at in (1, 3):
        model.left, model.error = at, error
        try:
            cheap(norm, name)(model, images, labels, seed=1, targets=targets if targeted else None)
        except error:
            assert model.left == 0
        else:
            assert model.left > 0  # it was done before that call
        assert_same(before, snapshot(model))
        assert model.hooked.hooks_enabled
        assert tape.take() == {}


def test_a_trace_would_be_noticed():
    """A control: the function that stands for somebody's own attack leaves one without the door."""
    (model, _), (images, labels, _) = disturbable(), batch()
    before = snapshot(model)
    shuffle(model, images, labels)
    with pytest.raises(AssertionError):
        assert_same(before, snapshot(model))


@pytest.mark.parametrize(("norm", "name", "targeted"), CASES[:-1])
def test_a_private_backward_pass_does_not_see_the_attack(norm, name, targeted):
    """Losses computed before an attack give the per-example gradients they would have given.

    Without the careless one: it writes on batch statistics that the graph needs as they were, and
    although they are put back, autograd notices and refuses.
    """
    (model, tape), (images, labels, targets) = disturbable(), batch()

    def losses():
        torch.manual_seed(6)  # the same dropout
        return nn.functional.cross_entropy(model(images), labels, reduction="none")

    expected = per_example(model, tape, losses())
    pending = losses()
    cheap(norm, name)(model, images, labels, targets=targets if targeted else None)
    for norms, others in zip(per_example(model, tape, pending), expected, strict=True):
        assert torch.equal(norms, others)


@EVERY
@pytest.mark.parametrize("n", [0, 1])
def test_small_batches_work(norm, name, targeted, n):
    """Poisson sampling draws empty batches and batches of one."""
    images, labels, targets = batch(n)
    found = cheap(norm, name)(Net().eval(), images, labels, targets=targets if targeted else None)
    assert found.shape == images.shape


@EVERY
def test_dtype_and_range_follow_the_model_and_the_threat(norm, name, targeted):
    """In double precision and bounds of another width; eps is in the units of the pixels."""
    images, labels, targets = batch()
    net, images = disturbed_net().double(), 2 * images.double() - 1
    attacker = cheap(norm, name, bounds=(-1.0, 1.0), eps=None if norm == "l0" else 2 * EPS[norm])
    found = attacker(net, images, labels, targets=targets if targeted else None, seed=0)
    assert found.dtype == torch.float64
    assert (found < 0).any()
    assert name == "n-fgsm" or attacker.threat.contains(images, found).all()
    half = copy.deepcopy(net).bfloat16()
    assert attacker(half, images, labels, seed=0).dtype == torch.bfloat16


@EVERY
def test_colour_images_and_channels_last_models_work(norm, name, targeted):
    """Torchattacks calls `view` on gradients, which come back channels-last from such models."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 4)]
    model = nn.Sequential(*layers).to(memory_format=torch.channels_last)
    images, labels, targets = batch(channels=3)
    images = images.to(memory_format=torch.channels_last)
    found = cheap(norm, name)(model, images, labels, targets=targets if targeted else None, seed=0)
    assert found.shape == images.shape


@EVERY
def test_two_and_three_classes_work_or_are_refused_with_the_remedy(norm, name, targeted):
    """DLR compares more logits than some models have: the answer is a sentence, not an index."""
    images, labels, targets = batch()
    for classes in (2, 3):
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, classes))
        aim = {"targets": targets % classes} if targeted else {}
        try:
            found = cheap(norm, name)(model, images, labels % classes, **aim)
        except AttackError as error:
            refused = str(error)
            assert f"{classes} classes; use" in refused
        else:
            assert found.shape == images.shape


@EVERY
@pytest.mark.parametrize(("channels", "side"), [(1, 28), (3, 32)])
def test_the_usual_sizes_work(norm, name, targeted, channels, side):
    """Grey 28x28 and coloured 32x32, both through a strided network."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(channels, 2, 4, stride=4), nn.Flatten(), nn.LazyLinear(4)]
    model, (images, labels, targets) = nn.Sequential(*layers), batch(2, channels, side)
    model(images)
    aim = {"targets": targets} if targeted else {}
    found = cheap(norm, name, eps=2 if name == "jsma" else None)(model, images, labels, **aim)
    assert found.shape == images.shape


def held_out(model, images, targets):
    """By how much the best other logit is above the target's, on average."""
    with torch.no_grad():
        logits = model(images)
    own = logits.gather(1, targets[:, None])
    return (logits.scatter(1, targets[:, None], -torch.inf).amax(1, keepdim=True) - own).mean()


@pytest.mark.parametrize(
    ("norm", "name"), [(norm, name) for norm in EPS for name in attack_names(norm, targeted=True)]
)
def test_an_attack_with_a_target_approaches_it(norm, name):
    """On a linear model every search has to come closer to its class, and not to another."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4, bias=False))
    images, _, targets = batch(16)
    with torch.no_grad():
        labels = model(images).argmax(dim=1)
    targets = torch.where(targets == labels, (labels + 1) % 4, targets)
    others = torch.where((targets + 1) % 4 == labels, (targets + 2) % 4, (targets + 1) % 4)
    threat = ThreatModel(norm=norm, eps={"linf": 0.3, "l2": 2.0, "l1": 10.0, "l0": 16}[norm])
    slow = {"queries": 300, "nb_sample": 32, "steps": 20}
    known = attack(name, threat).settings
    attacker = attack(name, threat, **{key: slow[key] for key in slow if key in known})
    found = attacker(model, images, labels, targets=targets, seed=0)
    gained = held_out(model, images, targets) - held_out(model, found, targets)
    assert gained > 0.02
    assert gained > held_out(model, images, others) - held_out(model, found, others)
