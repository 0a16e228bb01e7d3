"""Attacks: right on models where the answer is known, and refused where they cannot be right."""

import copy
import gc
import pickle
import weakref
from dataclasses import dataclass

import pytest
import torch
import torchattacks
from support.networks import Answering, Net
from support.searched import linear
from torch import nn
from torch.utils.data import TensorDataset

from defenses import (
    AdversarialTraining,
    Attack,
    AttackError,
    EvaluationError,
    GaussianAugmentation,
    Mart,
    ThreatModel,
    ThreatModelError,
    Trades,
    attack,
    attack_names,
    attacks,
    check,
    evaluate,
)
from defenses.attacks import PGD
from defenses.attacks.adaptive import custom_attack
from defenses.attacks.by_name import ATTACKS
from defenses.evaluation.trial import named_attacks

LINF = ThreatModel(norm="linf", eps=0.1)
L2 = ThreatModel(norm="l2", eps=0.5)
L1 = ThreatModel(norm="l1", eps=3.0)
L0 = ThreatModel(norm="l0", eps=6)
CHEAP = {"steps": 3, "queries": 20}


def cheap(name, threat):
    """An attack with as little work as its settings allow."""
    known = attack(name, threat).settings
    return attack(name, threat, **{key: CHEAP[key] for key in CHEAP if key in known})


def inner_batch(n=6):
    """Images with no pixel on a bound, and labels."""
    draw = torch.Generator().manual_seed(3)
    images = torch.rand(n, 1, 8, 8, generator=draw) * 0.8 + 0.1
    return images, torch.arange(n) % 4


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
    assert attacker.settings == {
        "step_size": 0.25 / 7,
        "steps": 7,
        "random_start": True,
        "early_stop": False,
    }
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
        ("cw", LINF, {}, r"no linf attack.*\(there is one for l2\)"),
        ("vanila", LINF, {}, "refused: it is no attack"),
        ("multiattack", L2, {}, "refused: it prints"),
        ("lgv", LINF, {}, "refused: it trains"),
        ("autoattack", LINF, {}, "refused: it is several"),
        ("upgd", LINF, {"loss": "margin"}, "'dlr'"),
        ("pgdrs", L2, {"noise_type": "guassian"}, "'gaussian' or 'uniform'"),
        ("pifgsm", LINF, {"momentum": 1.0}, "no setting 'momentum'"),
        ("jsma", L0, {"gamma": 0.1}, "no setting 'gamma'"),
        ("pixle", L0, {"pixel_mapping": "similarity"}, "no setting 'pixel_mapping'"),
        ("n-fgsm", L2, {}, r"no l2 attack.*there is one for linf"),
        ("fgsm", LINF, {"steps": 3}, "fgsm takes no setting 'steps'"),
        ("pgd", LINF, {"restarts": 3}, "takes no setting 'restarts'"),
        ("pgd", LINF, {"alpha": 0.1}, "takes no setting 'alpha'.*step_size"),
        ("pgd", LINF, {"eps": 0.1}, "takes no setting 'eps'"),
        ("apgd", LINF, {"seed": 0}, "takes no setting 'seed'"),
        ("apgd", LINF, {"verbose": True}, "takes no setting 'verbose'"),
        ("apgd", LINF, {"norm": "L2"}, "takes no setting 'norm'"),
        ("apgd", LINF, {"loss": "hinge"}, "'dlr'"),
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


@pytest.mark.parametrize(
    ("answer", "word"),
    [
        (lambda images: images.flatten(1) * float("nan"), "finite logits"),
        (lambda images: images, "logits of shape"),
        (lambda images: images.flatten(1)[:, :1], "at least 2 classes"),
        (lambda images: images.flatten(1)[:1], "logits of shape"),
        (lambda images: (images.flatten(1),), "tuple"),
        (lambda images: images.flatten(1).detach(), "no gradient reaches"),
        (lambda images: images.flatten(1).softmax(dim=1), "take the softmax out"),
    ],
)
@pytest.mark.parametrize("name", ["pgd", "n-fgsm", "bim"])
def test_a_model_that_cannot_be_attacked_is_refused(name, answer, word):
    """Its answer is checked where the attack first sees it."""
    with pytest.raises(AttackError, match=word):
        attack(name, LINF)(Answering(answer), IMAGES, LABELS)


@pytest.mark.parametrize(
    ("name", "classes", "given", "fits"),
    [
        ("upgd", 2, {"loss": "dlr"}, False),
        ("upgd", 3, {"loss": "dlr"}, True),
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


def test_vanished_gradients_are_named_and_not_returned_as_nan():
    """Who divides by the gradient's length gets a sentence; DeepFool, which did, stays put."""
    logits = torch.tensor([1e4, 0.0, 0.0, 0.0])
    model = Answering(lambda images: logits + 0 * images.flatten(1)[:, :4])
    with pytest.raises(AttackError, match="not finite for 3 of 3"):
        custom_attack(lambda _, images, labels: images * torch.nan, LINF)(model, IMAGES, LABELS)
    assert torch.equal(attack("deepfool", L2)(model, IMAGES, torch.zeros_like(LABELS)), IMAGES)


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
    from defenses.attacks import _torchattacks  # only this test looks behind the door

    monkeypatch.setattr(_torchattacks.torchattacks.BIM, "forward", lambda _, x, y: 1 - x)
    with pytest.raises(AttackError, match="left the ball"):
        attack("bim", LINF)(Net().eval(), torch.zeros(2, 1, 8, 8), torch.tensor([0, 1]))


def jump(model, images, labels):
    """An attack of one's own, of the right length."""
    return (images + 0.1).clamp(0, 1)


def test_a_function_of_ones_own_is_an_attack_like_any_other():
    """A name, a ball, a repr; copied, pickled and compared; checked against its ball."""
    attacker = custom_attack(jump, LINF)
    assert repr(attacker) == "CustomAttack('jump', linf eps=0.1 in [0, 1])"
    assert attacker == pickle.loads(pickle.dumps(attacker)) == custom_attack(jump, LINF)
    assert attacker != custom_attack(jump, L2)
    assert custom_attack(jump, LINF, name="mine").name == "mine"
    assert LINF.contains(IMAGES, attacker(Net(), IMAGES, LABELS)).all()
    assert attacker(Net().double(), IMAGES, LABELS).dtype == torch.float64


def test_a_function_of_ones_own_sees_the_scope_and_follows_its_seed():
    """Evaluation mode, gradients of the images although the caller has none, seeded generators."""
    seen = []

    def noisy(model, images, labels):
        seen.append((model.training, torch.is_grad_enabled(), images.requires_grad))
        return images + 0.1 * (torch.rand(()) - images).clamp(-1, 1)

    attacker = custom_attack(noisy, LINF)
    with torch.no_grad():
        one, two, other = (attacker(Net(), IMAGES, LABELS, seed=seed) for seed in (1, 1, 2))
    assert seen == [(False, True, False)] * 3
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


@pytest.mark.parametrize(
    ("function", "word"),
    [
        (lambda model, images, labels: images + 0.2, "left the ball"),
        (lambda model, images, labels: images.add_(0.2), "left the ball"),
        (lambda model, images, labels: images * float("nan"), "not finite"),
        (lambda model, images, labels: images[:1], r"expected images \[3, 1, 8, 8\], got \[1"),
        (lambda model, images, labels: None, "NoneType"),
    ],
)
def test_what_a_function_of_ones_own_breaks_is_said(function, word):
    """Also where it overwrites the images that it was given, which are a copy."""
    images = IMAGES * 0.5
    before = images.clone()
    with pytest.raises(AttackError, match=word):
        custom_attack(function, LINF)(Net(), images, LABELS)
    assert torch.equal(images, before)


def two(images, labels):
    return images


@pytest.mark.parametrize(
    "give", [custom_attack, lambda each, threat: named_attacks([each], threat)]
)
def test_what_is_called_otherwise_is_refused(give):
    """An attack of torchattacks holds a model of its own; its name, or a function, is the way."""
    with pytest.raises(AttackError, match=r"torchattacks' PGD.*give the attack by its name"):
        give(torchattacks.PGD(Net()), LINF)
    with pytest.raises(AttackError, match=r"called \(model, images, labels\).*images, labels\)"):
        give(two, LINF)


def test_what_cannot_be_called_is_refused():
    """A name given for the function is the likeliest mistake."""
    with pytest.raises(AttackError, match="expected a callable, got str"):
        custom_attack("pgd", LINF)


@pytest.mark.parametrize(
    ("targets", "word"),
    [
        (LABELS[:2], r"targets: expected int64 of shape \[3\]"),
        (LABELS.float(), "targets: expected int64"),
        (LABELS.tolist(), "targets: expected an int64 tensor, got list"),
        (LABELS - 3, "targets: expected 0 or more, got -3"),
        (LABELS + 2, "0 to 3 for a model of 4 classes, got 4"),
    ],
)
@pytest.mark.parametrize("name", ["pgd", "bim"])
def test_targets_that_do_not_fit_are_refused(name, targets, word):
    """By the same rules as labels."""
    with pytest.raises(AttackError, match=word):
        attack(name, LINF)(Net().eval(), IMAGES, LABELS, targets=targets)


@pytest.mark.parametrize(
    ("name", "threat"),
    [("tpgd", LINF), ("fab", LINF), ("deepfool", L2), ("sparsefool", L0), ("gn", L1)],
)
def test_an_attack_that_cannot_seek_a_target_names_those_that_can(name, threat):
    """Instead of an untargeted result under the name of a targeted one."""
    attacker = attack(name, threat)
    able = attack_names(threat.norm, targeted=True)
    assert not attacker.targeted
    assert name not in able
    with pytest.raises(AttackError, match=f"{name} cannot seek a target.*{', '.join(able)}"):
        attacker(Net().eval(), IMAGES, LABELS, targets=LABELS)


def test_a_radius_that_reaches_every_image_is_refused():
    """Eps in the units of another pixel range, the commonest mistake, measures nothing."""
    for norm, eps in (("l2", 8.5), ("l1", 65.0), ("l0", 65)):
        with pytest.raises(ThreatModelError, match=f"{norm} reaches every image"):
            attack("gn", ThreatModel(norm=norm, eps=eps))(Net(), IMAGES, LABELS)
    for norm, eps in (("l2", 8.0), ("l1", 64.0), ("l0", 64)):
        attack("gn", ThreatModel(norm=norm, eps=eps))(Net(), IMAGES, LABELS)


@pytest.mark.parametrize(
    ("name", "threat", "shape", "word"),
    [
        ("difgsm", LINF, (1, 8, 10), "images as high as wide, got 8x10"),
        ("tifgsm", LINF, (1, 8, 10), "images as high as wide"),
        ("pixle", L0, (1, 8, 10), "images as high as wide"),
        ("difgsm", LINF, (1, 1, 1), "resize_rate to give a side"),
        ("pifgsm", LINF, (4, 8, 8), "at most 3 channels, got 4"),
        ("jsma", L0, (3, 40, 40), "at most 4096 values"),
        ("jsma", ThreatModel(norm="l0", eps=1), (1, 8, 8), "eps of at least 2"),
    ],
)
def test_images_that_an_attack_cannot_take_are_refused(name, threat, shape, word):
    """In a sentence that names what it needs."""
    model = nn.Sequential(nn.Flatten(), nn.LazyLinear(4))
    images = torch.rand(3, *shape)
    model(images)
    with pytest.raises(AttackError, match=f"{name} needs {word}"):
        attack(name, threat)(model, images, LABELS)


@pytest.mark.parametrize(
    "answer",
    [
        lambda flat: flat.softmax(dim=1) * 1.01,
        lambda flat: flat.softmax(dim=1) - 0.001,
        lambda flat: nn.functional.one_hot(flat.argmax(1), flat.shape[1]) + 0 * flat,
        lambda flat: torch.cat([flat.softmax(dim=1)[:2], flat[2:]]),
    ],
)
def test_what_only_looks_like_probabilities_is_attacked(answer):
    """Controls: rows that sum to something else, have negative entries, or are decisions."""
    attack("pgd", LINF, steps=1)(
        Answering(lambda images: answer(images.flatten(1))), IMAGES, LABELS
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_probabilities_are_known_in_every_precision(dtype):
    """Their sum is off by more in half precision."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Softmax(dim=1)).to(dtype)
    with pytest.raises(AttackError, match="got probabilities"):
        attack("fgsm", LINF)(model, IMAGES, LABELS)


def test_a_filter_for_three_channels_is_right_for_one():
    """TI-FGSM's step on a grey image: the sign of the gradient, blurred by the Gaussian."""
    net, (images, labels) = Net().eval(), inner_batch()
    plain = {"steps": 1, "step_size": 0.1, "diversity_prob": 0.0, "len_kernel": 5}
    found = attack("tifgsm", LINF, **plain)(net, images, labels, seed=0)
    images.requires_grad_()
    (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(net(images), labels), images)
    line = torch.exp(-(torch.linspace(-3, 3, 5) ** 2) / 2)
    kernel = (line[:, None] * line)[None, None] / line.sum() ** 2
    blurred = nn.functional.conv2d(gradient, kernel, padding=2)
    clear = blurred.abs() > 1e-3 * blurred.abs().max()
    expected = (images + 0.1 * blurred.sign()).clamp(0, 1)
    torch.testing.assert_close(found[clear], expected[clear].detach())
    assert clear.float().mean() > 0.9


def test_pi_fgsm_blurs_with_the_gaussian_that_was_meant():
    """Torchattacks swaps an axis, so that each channel gets one column of it, repeated."""
    from defenses.attacks import _torchattacks  # only this test looks behind the door

    given, meant = (
        kind.gaussian_kern(kind(Net()), 3, 3)
        for kind in (_torchattacks.torchattacks.PIFGSMPP, _torchattacks._PIFGSMPP)
    )
    line = torch.exp(-(torch.linspace(-3, 3, 3) ** 2) / 2)
    for channel in meant:
        torch.testing.assert_close(channel[0], line[:, None] * line / line.sum() ** 2)
    assert not torch.allclose(given, meant, atol=1e-3)  # control: this is the fault


@pytest.mark.parametrize("name", ["jsma", "onepixel", "pixle", "sparsefool", "gn"])
def test_a_pixel_that_does_not_change_keeps_its_bits(name):
    """In bounds that are mapped onto [0, 1] and back, at most eps positions differ at all."""
    threat = ThreatModel(norm="l0", eps=6, bounds=(-0.7, 2.3))
    images = -0.7 + 3 * inner_batch()[0]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Net().eval()
    labels = net(images).argmax(dim=1)  # what is wrong already need not change
    found = attack(name, threat)(net, images, labels, seed=0)
    assert ((found != images).any(dim=1).flatten(1).sum(dim=1) <= 6).all()
    assert (found != images).any()


@pytest.mark.parametrize("threat", [LINF, L2, L1, L0], ids=lambda threat: threat.norm)
def test_noise_fills_its_ball(threat):
    """As a baseline it must use what the ball allows, and every image gets its own."""
    images = torch.full((50, 1, 8, 8), 0.5)
    found = attack("gn", threat)(Net(), images, torch.zeros(50, dtype=torch.int64), seed=0)
    change = (found - images).flatten(1)
    if threat.norm == "linf":
        assert (change.abs() > 0.099).float().mean() > 0.25
    elif threat.norm == "l0":
        assert ((change != 0).sum(dim=1) == 6).all()
    else:
        length = change.norm(p={"l1": 1, "l2": 2}[threat.norm], dim=1)
        torch.testing.assert_close(length, torch.full((50,), threat.eps))
    assert len(change.unique(dim=0)) == 50


def test_an_untargeted_jacobian_attack_seeks_the_likeliest_wrong_class():
    """JSMA has no untargeted form; torchattacks seeks the next class of ten, whatever there are."""
    net, (images, labels) = Net().eval(), inner_batch()
    with torch.no_grad():
        logits = net(images)
    likeliest = logits.scatter(1, labels[:, None], -torch.inf).argmax(dim=1)
    run = attack("jsma", L0)
    assert torch.equal(run(net, images, labels), run(net, images, labels, targets=likeliest))
    others = (likeliest + 1) % 4
    assert not torch.equal(run(net, images, labels), run(net, images, labels, targets=others))


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("pgd", {"loss": "margn"}, r"pgd: loss: expected a function from logits.*got 'margn'"),
        ("pgd", {"momentum": 1.0}, "its settings: step_size, steps, random_start.*loss, surrogate"),
        ("apgd", {"momentum": 1.0}, "loss.*surrogate, draws"),
        ("apgdt", {"momentum": 1.0}, "target_classes, surrogate, draws$"),
        ("fgsm", {"momentum": 1.0}, "its settings: draws$"),
        ("bim", {"momentum": 1.0}, "steps.*draws$"),
        ("fgsm", {"loss": "ce"}, "takes no setting 'loss'; its settings: draws$"),
    ],
)
def test_a_setting_that_is_none_is_told_what_there_are(name, settings, words):
    """All of them: those that come as arguments of their own too."""
    with pytest.raises(AttackError, match=words):
        attack(name, LINF, **settings)


@pytest.mark.parametrize("name", attack_names("linf"))
def test_every_setting_that_is_listed_is_taken(name):
    """With the value that it has."""
    for key, value in attack(name, LINF).settings.items():
        assert attack(name, LINF, **{key: value}).settings[key] == value


@pytest.mark.parametrize(
    "objective",
    [
        AdversarialTraining(LINF),
        Trades(LINF),
        Mart(LINF),
        GaussianAugmentation(sigma=0.1),
        attack("fgsm", LINF),
    ],
    ids=lambda each: type(each).__name__,
)
def test_arguments_in_another_order_are_told_theirs(objective):
    """As one calls a loss, with the model behind."""
    images, labels = inner_batch()
    with pytest.raises(AttackError, match=r"got Tensor; the order is \(model, images, labels\)"):
        objective(images, labels, Net())


class InPlace(nn.Module):
    """Changes what it is given."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, images):
        images.data.mul_(0.5).add_(0.25)
        return self.net(images)


@pytest.mark.parametrize("name", ["fgsm", "pgd", "apgd", "square"])
def test_a_model_that_changes_its_images_is_at_fault_and_not_the_attack(name):
    """Wherever it is asked: in an evaluation, in a check."""
    images, labels = inner_batch()
    model = InPlace(Net())
    before = images.clone()
    data = list(zip(images, labels.tolist(), strict=True))
    with pytest.raises(EvaluationError, match="model: changes the images"):
        evaluate(model, data, LINF, attacks=[name], progress=False)
    verdict = check(model, data, LINF, progress=False)[0]
    assert verdict.outcome == "fail"
    assert "changes the images" in verdict.sentence
    assert torch.equal(images, before)


def test_an_attack_that_such_a_model_moves_out_of_the_ball_says_whose_fault_it_is():
    """Alone, where nobody asked the model before."""
    images, labels = inner_batch()
    model = InPlace(Net())
    moved = custom_attack(lambda model, images, labels: [model(images), images][1], LINF)
    with pytest.raises(AttackError, match="model: changes the images"):
        moved(model, 0 * images, labels)


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_a_class_and_its_name_make_the_same_attack(name):
    """Equal values of one repr, whichever way they were made; each class is exported."""
    kind = ATTACKS[name]
    assert getattr(attacks, kind.__name__) is kind
    assert sorted(attacks.__all__) == sorted(each.__name__ for each in ATTACKS.values())
    for norm in kind.norms:
        threat = ThreatModel(norm=norm, eps=0.5)
        made = kind(threat, draws=2)
        assert made == attack(name, threat, draws=2)
        assert repr(made).startswith(f"{kind.__name__}({norm} eps=0.5 in [0, 1]; ")
        brought = () if name == "apgd" else ("loss",)
        listed = [key for key in kind.setting_names() if key not in (*brought, "surrogate")]
        assert list(made.settings) == listed


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: attacks.PGD(L1), "pgd: expected a threat in linf or l2, got l1"),
        (lambda: attacks.PGD(0.1), "pgd: expected a threat, got 0.1"),
        (lambda: attacks.PGD(LINF, steps=0), "pgd: steps: expected a whole number, at least 1"),
        (lambda: attacks.PGD(LINF, steps="x"), "pgd: steps"),
        (lambda: attacks.PGD(LINF, loss="ce"), "pgd: loss: expected a function from logits"),
        (lambda: attacks.APGD(LINF, loss="hinge"), "'ce' or 'scaled-ce' or 'dlr', got 'hinge'"),
        (lambda: attacks.APGD(LINF, loss=None), "apgd: loss: expected a function, got NoneType"),
        (lambda: attacks.APGD(LINF, surrogate="net"), "expected a torch.nn.Module, got str"),
        (lambda: attacks.FGSM(LINF, draws=0), "fgsm: draws"),
        (lambda: attacks.NFGSM(LINF, noise=None), "n-fgsm: noise: expected a finite number"),
    ],
)
def test_a_class_checks_what_it_is_given(make, word):
    """As by name: nothing is passed through unchecked."""
    with pytest.raises(AttackError, match=word):
        make()


@dataclass(frozen=True, kw_only=True, repr=False)
class Shift(Attack):
    """An attack in a file of its own."""

    name = "shift"
    norms = ("linf",)
    lengths = ("step_size",)

    step_size: float | int
    steps: "int | None" = None
    still: bool = False

    def _search(self, model, images, labels, targets):
        return images if self.still else (images + self.step_size).clamp(*self.threat.bounds)


def test_a_subclass_is_an_attack_whose_settings_are_checked_by_their_types():
    """Also where the type is written as text; the door is everybody's."""
    made = Shift(LINF, step_size=0.1)
    assert repr(made) == "Shift(linf eps=0.1 in [0, 1]; step_size=0.1, still=False)"
    assert LINF.contains(IMAGES, made(Net(), IMAGES, LABELS)).all()
    with pytest.raises(AttackError, match="shift left the ball"):
        Shift(LINF, step_size=0.2)(Net(), IMAGES * 0.5, LABELS)
    with pytest.raises(AttackError, match="shift cannot seek a target"):
        made(Net(), IMAGES, LABELS, targets=LABELS)
    for wrong in ({"steps": 0}, {"still": 1}, {"step_size": -1.0}):
        with pytest.raises(AttackError, match=f"shift: {next(iter(wrong))}: expected"):
            Shift(LINF, **{"step_size": 0.1, **wrong})


@pytest.mark.parametrize("name", ["pgd", "ffgsm", "n-fgsm", "bim", "pgdrs", "apgd"])
def test_an_attack_in_a_smaller_ball_takes_shorter_steps(name):
    """Every length in the units of the pixels shrinks with the ball; at 1 it is the same value."""
    whole = attack(name, LINF)
    half = whole.scaled(0.5)
    assert whole.scaled(1) is whole
    assert half.threat.eps == 0.05
    assert half.radius == pytest.approx(0.5 * whole.radius)
    for key, value in whole.settings.items():
        shrinks = key in ("step_size", "noise_sd")
        assert half.settings[key] == (pytest.approx(0.5 * value) if shrinks else value)


def test_a_subclass_has_a_search_and_no_door_of_its_own():
    """What a figure rests on cannot be replaced: the call, and the check of the ball."""
    for name in ("__call__", "_check_promise"):
        with pytest.raises(AttackError, match=f"got {name} too"):
            type("Loose", (PGD,), {name: lambda *_: None})


def test_a_search_does_not_reach_the_callers_labels():
    """It gets copies of images and labels."""

    class Greedy(Attack):
        name, norms = "greedy", ("linf",)

        def _search(self, model, images, labels, targets):
            labels.zero_()
            return images.zero_().clamp_(0.5, 0.5)

    images, labels = torch.full((2, 1, 2, 2), 0.5), torch.tensor([1, 2])
    Greedy(LINF)(nn.Flatten(), images, labels)
    assert labels.tolist() == [1, 2]


class Lazy(PGD):
    """It returns the clean images, under the name and settings of PGD."""

    def _search(self, model, images, labels, targets):
        return images


def test_an_attack_of_another_class_does_not_bear_our_name():
    """Its state file or its report would be taken for one of ours; a function's too."""

    def pgd(model, images, labels):
        return images

    for found in (Lazy(LINF), pgd, custom_attack(pgd, LINF)):
        with pytest.raises(EvaluationError, match="name yours otherwise"):
            named_attacks([found], LINF)
    assert list(named_attacks([PGD(LINF), "apgd", "bim"], LINF)) == ["pgd", "apgd", "bim"]


def test_two_classes_of_one_name_do_not_share_a_state_file(tmp_path):
    """The file is of the class, not of its name alone."""

    class Still(Attack):
        name, norms = "own", ("linf",)

        def _search(self, model, images, labels, targets):
            return images

    class Darker(Still):
        def _search(self, model, images, labels, targets):
            return (images - 0.1).clamp(0, 1)

    data = (torch.full((2, 1, 2, 2), 0.5), torch.tensor([0, 1]))
    model, state = nn.Flatten(), tmp_path / "state.json"
    settings = {"verdicts": False, "progress": False, "state": state}
    evaluate(model, TensorDataset(*data), LINF, attacks=[Still(LINF)], **settings)
    with pytest.raises(EvaluationError, match="attacks"):
        evaluate(model, TensorDataset(*data), LINF, attacks=[Darker(LINF)], **settings)
