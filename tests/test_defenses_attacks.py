"""Attacks: right on models where the answer is known, and leaving no trace on any."""

import copy
import gc
import pickle
import random
import weakref

import pytest
import torch
from test_defenses_scope import Net, assert_same, disturbed_net, snapshot
from torch import nn

from defenses import AttackError, ThreatModel, ThreatModelError, attack, attack_names

LINF = ThreatModel(norm="linf", eps=0.1)
L2 = ThreatModel(norm="l2", eps=0.5)
ALL = [(threat, name) for threat in (LINF, L2) for name in attack_names(threat.norm)]
CHEAP = {"steps": 3, "n_queries": 20, "nb_iter": 2, "nb_sample": 8, "max_batch_size": 4}


def cheap(name, threat):
    """An attack with as little work as its settings allow."""
    known = attack(name, threat).settings
    return attack(name, threat, **{key: CHEAP[key] for key in CHEAP if key in known})


def inner_batch(n=6):
    """Images with no pixel on a bound (which CW refuses), and labels."""
    draw = torch.Generator().manual_seed(3)
    images = torch.rand(n, 1, 8, 8, generator=draw) * 0.8 + 0.1
    return images, torch.arange(n) % 4


def linear(weight, bias=0.0):
    """Two logits, +-(w.x + b)/2: the exact worst case is known."""
    layer = nn.Linear(weight.numel(), 2)
    with torch.no_grad():
        layer.weight.copy_(torch.stack([weight, -weight]) / 2)
        layer.bias.copy_(torch.tensor([bias, -bias]) / 2)
    return nn.Sequential(nn.Flatten(), layer)


class Failing(nn.Module):
    """A model whose forward fails at the given call."""

    def __init__(self, net, at, error):
        super().__init__()
        self.net, self.left, self.error = net, at, error

    def forward(self, images):
        self.left -= 1
        if self.left == 0:
            self.net.train()
            raise self.error("planted")
        return self.net(images)


@pytest.mark.parametrize(("threat", "name"), ALL)
def test_every_attack_keeps_its_promise_and_leaves_no_trace(threat, name, capsys):
    """In the ball, the model and the random states bit-identical, repeatable, and silent."""
    net, (images, labels) = disturbed_net(), inner_batch()
    originals, attacker = images.clone(), cheap(name, threat)
    before = snapshot(net)
    found = attacker(net, images, labels, seed=11)
    assert_same(before, snapshot(net))
    assert torch.equal(images, originals)
    assert not found.requires_grad
    assert attacker.radius == threat.eps or name == "n-fgsm"
    if name != "n-fgsm":
        assert threat.contains(images, found).all()
    assert torch.equal(found, attacker(net, images, labels, seed=11))
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize(("threat", "name"), ALL)
def test_a_failing_forward_leaves_no_trace(threat, name, error):
    """Whatever call fails, the model's own error comes through and all is restored."""
    net, (images, labels) = disturbed_net(), inner_batch()
    for at in {1, random.Random(f"{name}{threat.norm}").randint(1, 3)}:
        failing = Failing(net, at, error)
        before = snapshot(net)
        try:
            cheap(name, threat)(failing, images, labels, seed=1)
        except error:
            assert failing.left == 0
        else:
            assert failing.left > 0  # it was done before that call
        assert_same(before, snapshot(net))


@pytest.mark.parametrize(("threat", "name"), ALL)
@pytest.mark.parametrize("n", [0, 1])
def test_small_batches_work(threat, name, n):
    """Poisson sampling draws empty batches and batches of one."""
    images, labels = inner_batch(n)
    found = cheap(name, threat)(Net().eval(), images, labels, seed=0)
    assert found.shape == images.shape


@pytest.mark.parametrize(("threat", "name"), ALL)
def test_it_works_in_double_precision_and_other_bounds(threat, name):
    """Dtype and range of the pixels follow the model and the threat model."""
    net, (images, labels) = disturbed_net(), inner_batch()
    net = net.double()
    wide = ThreatModel(norm=threat.norm, eps=threat.eps, bounds=(-1.0, 1.0))
    images = 2 * images - 1
    found = cheap(name, wide)(net, images, labels, seed=0)
    assert found.dtype == torch.float64
    if name != "n-fgsm":
        assert wide.contains(images, found).all()
    assert (found < 0).any()


@pytest.mark.parametrize("name", ["fgsm", "bim", "pgd", "apgd", "mifgsm"])
def test_on_a_linear_model_linf_attacks_find_the_exact_worst_case(name):
    """The worst image is x - eps sign(w), clipped: there is nothing left to search."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(16, generator=draw)
    images = torch.rand(5, 1, 4, 4, generator=draw)
    model = linear(weight, bias=20.0)  # always class 0, so that APGD never stops early
    labels = torch.zeros(5, dtype=torch.int64)
    found = attack(name, LINF)(model, images, labels, seed=0)
    expected = (images - LINF.eps * weight.sign().view(1, 1, 4, 4)).clamp(0, 1)
    if name == "apgd":  # returns the clean image where it did not fool the model
        model = linear(weight, bias=float(-(expected.flatten(1) @ weight).max() - 1e-3))
        clean = model(images).argmax(1)
        found = attack(name, LINF)(model, images, clean, seed=0)
        assert ((model(found).argmax(1) != 0) | (clean != 0)).all()
    else:
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-1.0, 1.0), (0.0, 255.0)])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_step_has_the_length_it_says_in_the_units_of_the_pixels(norm, bounds):
    """One step without a random start, away from the bounds, whatever their width."""
    width = bounds[1] - bounds[0]
    threat = ThreatModel(norm=norm, eps=0.2 * width, bounds=bounds)
    images = torch.full((1, 1, 4, 4), bounds[0] + width / 2)
    one = attack("pgd", threat, steps=1, step_size=0.05 * width, random_start=False)
    weight = torch.randn(16, generator=torch.Generator().manual_seed(1)) / width
    change = one(linear(weight), images, torch.tensor([0])) - images
    length = change.abs().max() if norm == "linf" else change.norm()
    assert length.item() == pytest.approx(0.05 * width, rel=1e-4)


@pytest.mark.parametrize(("threat", "name"), ALL)
def test_colour_images_and_channels_last_models_work(threat, name):
    """Torchattacks calls `view` on gradients, which come back channels-last from such models."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 4)]
    model = nn.Sequential(*layers).to(memory_format=torch.channels_last)
    images = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(2)) * 0.8 + 0.1
    images = images.to(memory_format=torch.channels_last)
    found = cheap(name, threat)(model, images, torch.arange(5) % 4, seed=0)
    assert found.shape == images.shape


def test_on_a_linear_model_l2_pgd_goes_straight_against_the_weight():
    """Away from the bounds the worst image is x - eps w / |w|."""
    weight = torch.randn(16, generator=torch.Generator().manual_seed(1))
    images, threat = torch.full((3, 1, 4, 4), 0.5), ThreatModel(norm="l2", eps=0.3)
    model, labels = linear(weight), torch.zeros(3, dtype=torch.int64)
    expected = images - 0.3 * (weight / weight.norm()).view(1, 1, 4, 4)
    found = attack("pgd", threat, random_start=False)(model, images, labels)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    # From a random start it turns towards that point at a finite rate.
    found = attack("pgd", threat, steps=400, step_size=0.1)(model, images, labels, seed=0)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


def test_n_fgsm_follows_its_paper():
    """Noise of k eps and a step of alpha, clipped to the bounds and not to the ball."""
    weight = torch.randn(16, generator=torch.Generator().manual_seed(2))
    images, labels = torch.full((200, 1, 4, 4), 0.5), torch.zeros(200, dtype=torch.int64)
    attacker = attack("n-fgsm", LINF)
    assert attacker.settings == {"noise": 2.0, "step_size": 0.1}
    assert attacker.radius == pytest.approx(0.3)
    change = attacker(linear(weight), images, labels, seed=0) - images
    noise = change + 0.1 * weight.sign().view(1, 1, 4, 4)
    assert noise.abs().max() <= 0.2 + 1e-6
    assert noise.abs().max() > 0.19
    assert abs(noise.std().item() - 0.2 / 3**0.5) < 0.005
    assert not LINF.contains(images, images + change).all()


@pytest.mark.parametrize(("name", "steps"), [("apgd", 100), ("pgd", 100), ("bim", 10)])
def test_an_attack_takes_the_steps_it_says(name, steps):
    """Counted in gradients of the images, on a model that it cannot fool."""
    model, gradients = linear(torch.full((16,), 1e-3), bias=10.0), []
    model[0].register_full_backward_hook(lambda *_: gradients.append(1))
    attacker = attack(name, LINF)
    assert attacker.settings["steps"] == steps
    attacker(model, torch.rand(2, 1, 4, 4), torch.zeros(2, dtype=torch.int64))
    # APGD takes one more, at its starting point.
    assert len(gradients) == steps + (name == "apgd")


def test_random_restarts_differ_and_follow_the_seed():
    """The seed reaches APGD, which torchattacks always starts from seed 0."""
    net, (images, labels) = Net().eval(), inner_batch()
    with torch.no_grad():
        labels = net(images).argmax(1)
    strong = ThreatModel(norm="linf", eps=0.5)
    run = attack("apgd", strong, steps=5)
    one, two, fresh = (run(net, images, labels, seed=seed) for seed in (1, 2, None))
    assert torch.equal(one, run(net, images, labels, seed=1))
    assert not torch.equal(one, two)
    assert not torch.equal(fresh, run(net, images, labels))


def test_settings_are_visible_and_the_value_is_frozen():
    """A record of the run can name every constant; the value hashes, copies and pickles."""
    attacker = attack("pgd", LINF, steps=7)
    assert attacker.settings == {"step_size": 0.25 / 7, "steps": 7, "random_start": True}
    assert "steps=7" in repr(attacker)
    assert "0.1" in repr(attacker)
    assert hash(attacker) == hash(copy.deepcopy(attacker))
    assert pickle.loads(pickle.dumps(attacker)) == attacker
    with pytest.raises(AttributeError):
        attacker.radius = 1.0


@pytest.mark.parametrize(
    ("name", "threat", "given", "word"),
    [
        ("pdg", LINF, {}, "there are: apgd"),
        ("cw", LINF, {}, "no linf attack"),
        ("n-fgsm", L2, {}, "no l2 attack"),
        ("fgsm", LINF, {"steps": 3}, "fgsm takes no setting 'steps'"),
        ("pgd", LINF, {"restarts": 3}, "takes no setting 'restarts'"),
        ("pgd", LINF, {"alpha": 0.1}, "takes no setting 'alpha'.*step_size"),
        ("pgd", LINF, {"eps": 0.1}, "takes no setting 'eps'"),
        ("apgd", LINF, {"seed": 0}, "takes no setting 'seed'"),
        ("apgd", LINF, {"verbose": True}, "takes no setting 'verbose'"),
        ("apgd", LINF, {"norm": "L2"}, "takes no setting 'norm'"),
        ("apgd", LINF, {"loss": "hinge"}, "'ce' or 'dlr'"),
        ("pgd", LINF, {"steps": 0}, "at least 1"),
        ("pgd", LINF, {"steps": 2.0}, "whole number"),
        ("pgd", LINF, {"steps": True}, "whole number"),
        ("pgd", LINF, {"step_size": -0.1}, "at least 0"),
        ("pgd", LINF, {"step_size": float("nan")}, "finite"),
        ("pgd", LINF, {"random_start": 1}, "True or False"),
        ("n-fgsm", LINF, {"noise": "2"}, "finite"),
        ("n-fgsm", LINF, {"clip": True}, "takes no setting 'clip'; its settings: noise"),
    ],
)
def test_what_an_attack_does_not_take_is_refused_by_name(name, threat, given, word):
    """Nothing is passed through unchecked."""
    with pytest.raises(AttackError, match=word):
        attack(name, threat, **given)


IMAGES, LABELS = torch.rand(3, 1, 8, 8), torch.tensor([0, 1, 2])


@pytest.mark.parametrize(
    ("images", "labels", "error", "word"),
    [
        (IMAGES * 3 - 1, LABELS, ThreatModelError, "normalisation inside"),
        (IMAGES[0], LABELS, AttackError, r"\[n, channels, height, width\]"),
        (IMAGES, LABELS[:2], AttackError, r"shape \[3\]"),
        (IMAGES, LABELS.float(), AttackError, "int64"),
        (IMAGES, LABELS.tolist(), AttackError, "list"),
        (IMAGES, LABELS - 1, AttackError, "0 or more"),
        (IMAGES, LABELS + 2, AttackError, "0 to 3 for a model of 4 classes, got 4"),
    ],
)
@pytest.mark.parametrize("name", ["pgd", "n-fgsm"])
def test_a_batch_that_cannot_be_attacked_is_refused(name, images, labels, error, word):
    """Before anything inside torch can complain in its own words."""
    with pytest.raises(error, match=word):
        attack(name, LINF)(Net().eval(), images, labels)


class Answering(nn.Module):
    """A model that answers with a function of the images."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, images):
        return self.answer(images)


@pytest.mark.parametrize(
    ("answer", "word"),
    [
        (lambda images: images.flatten(1) * float("nan"), "finite logits"),
        (lambda images: images, "logits of shape"),
        (lambda images: images.flatten(1)[:, :1], "at least 2 classes"),
        (lambda images: images.flatten(1)[:1], "logits of shape"),
        (lambda images: (images.flatten(1),), "tuple"),
        (lambda images: images.flatten(1).detach(), "no gradient reaches"),
    ],
)
@pytest.mark.parametrize("name", ["pgd", "n-fgsm"])
def test_a_model_that_cannot_be_attacked_is_refused(name, answer, word):
    """Its answer is checked where the attack first sees it."""
    with pytest.raises(AttackError, match=word):
        attack(name, LINF)(Answering(answer), IMAGES, LABELS)


@pytest.mark.parametrize(
    ("name", "classes", "given", "fits"),
    [
        ("apgdt", 3, {}, False),
        ("apgdt", 4, {}, True),
        ("apgd", 2, {"loss": "dlr"}, False),
        ("apgd", 3, {"loss": "dlr"}, True),
        ("apgd", 2, {}, True),
        ("fab", 2, {}, True),
    ],
)
def test_a_loss_that_needs_more_classes_is_refused_and_not_a_crash(name, classes, given, fits):
    """DLR compares the third logit, its targeted form the fourth."""
    attacker, images = attack(name, LINF, steps=2, **given), IMAGES[:, :, :4, :4]
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, classes))
    labels = torch.tensor([0, 1, 1])
    if fits:
        attacker(model, images, labels)
    else:
        with pytest.raises(AttackError, match=f"{classes} classes"):
            attacker(model, images, labels)


def test_apgdt_targets_every_wrong_class_up_to_nine(monkeypatch):
    """The number of classes comes from the model, the limit from the standard."""
    from defenses import _torchattacks  # only this test looks behind the door

    asked = []
    original = _torchattacks.torchattacks.APGDT.attack_single_run

    def spy(self, images, labels):
        asked.append(self.target_class)
        return original(self, images, labels)

    monkeypatch.setattr(_torchattacks.torchattacks.APGDT, "attack_single_run", spy)
    for classes, expected in ((4, [2, 3, 4]), (12, list(range(2, 11)))):
        asked.clear()
        layer = nn.Linear(64, classes)
        nn.init.zeros_(layer.weight)
        model = nn.Sequential(nn.Flatten(), layer)
        with torch.no_grad():
            layer.bias.zero_()
            layer.bias[0] = 1.0
        attack("apgdt", LINF, steps=1)(model, IMAGES, torch.zeros(3, dtype=torch.int64))
        assert asked == expected


def test_cw_refuses_pixels_it_cannot_move():
    """Its change of variables is infinite on a bound; on digits most pixels lie there."""
    images = IMAGES.clone()
    images[0, 0, 0, 0] = 0.0
    with pytest.raises(AttackError, match="lie on a bound"):
        attack("cw", L2)(Net().eval(), images, LABELS)


def test_cw_fools_where_every_logit_is_negative():
    """Torchattacks' margin is wrong there; the shift behind the door corrects it."""
    weight = torch.full((16,), 0.1)
    images, labels = torch.full((2, 1, 4, 4), 0.52), torch.zeros(2, dtype=torch.int64)
    inner = linear(weight, bias=-0.8)
    model = nn.Sequential(inner, Answering(lambda logits: logits - 50))
    assert (model(images).argmax(1) == 0).all()
    threat = ThreatModel(norm="l2", eps=0.3)
    found = attack("cw", threat, c=10, steps=100)(model, images, labels)
    assert (model(found).argmax(1) == 1).all()


def test_vanished_gradients_are_named_and_not_returned_as_nan():
    """DeepFool divides by the gradient's norm; a saturated model has none."""
    logits = torch.tensor([1e4, 0.0, 0.0, 0.0])
    model = Answering(lambda images: logits + 0 * images.flatten(1)[:, :4])
    with pytest.raises(AttackError, match="not finite for 3 of 3"):
        attack("deepfool", L2)(model, IMAGES, torch.zeros_like(LABELS))


def test_a_model_of_torchattacks_special_name_is_not_special():
    """Torchattacks normalises behind the back of a class called RobModel; not through this door."""

    class RobModel(Net):
        std = 0.2

    torch.manual_seed(0)
    plain, special = Net().eval(), RobModel().eval()
    special.load_state_dict(plain.state_dict())
    one, two = (attack("pgd", LINF, steps=2)(m, IMAGES, LABELS, seed=0) for m in (plain, special))
    assert torch.equal(one, two)


def test_a_model_without_parameters_is_attacked():
    """Nothing is printed about its device."""
    found = attack("pgd", LINF, steps=2)(nn.Flatten(), IMAGES, LABELS)
    assert LINF.contains(IMAGES, found).all()


@pytest.mark.parametrize("name", ["pgd", "apgd", "fab", "square", "n-fgsm"])
def test_an_attack_keeps_no_reference_to_the_model(name):
    """Attacks are values: the model goes when its owner lets go."""
    net, attacker = Net().eval(), cheap(name, LINF)
    attacker(net, IMAGES, LABELS)
    gone = weakref.ref(net)
    del net
    gc.collect()
    assert gone() is None


def test_an_attack_works_on_half_precision_models():
    """The ball is checked to the precision of the model's dtype."""
    net = Net().eval().bfloat16()
    for name in ("pgd", "n-fgsm", "apgd"):
        found = cheap(name, LINF)(net, IMAGES, LABELS)
        assert found.dtype == torch.bfloat16


def test_a_perturbation_outside_the_ball_is_never_returned(monkeypatch):
    """The promise is checked, not trusted."""
    from defenses import _torchattacks  # only this test looks behind the door

    monkeypatch.setattr(_torchattacks.torchattacks.FGSM, "forward", lambda _, x, y: 1 - x)
    with pytest.raises(AttackError, match="left the ball"):
        attack("fgsm", LINF)(Net().eval(), torch.zeros(2, 1, 8, 8), torch.tensor([0, 1]))
