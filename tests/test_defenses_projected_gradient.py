"""The inner loop of PGD: torchattacks' results from the same start, in place and in any layout."""

import pytest
import torch
import torch.nn.functional as F
import torchattacks
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from defenses import AttackError, ThreatModel, attack, attack_scope
from defenses.attacks.projected_gradient import projected_gradient, random_start

EPS = 0.06
LINF, L2 = ThreatModel(norm="linf", eps=EPS), ThreatModel(norm="l2", eps=0.5)


def network(seed=0):
    """A small smooth network: no kinks, at which rounding would decide a sign."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1),
        nn.GroupNorm(2, 8),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(8 * 16, 4),
    )
    return net.eval()


def batch(n=8):
    draw = torch.Generator().manual_seed(4)
    return torch.rand(n, 2, 8, 8, generator=draw), torch.arange(n) % 4


def theirs(name, **options):
    """Torchattacks' images, from the global stream as it is after seed 7."""
    model, (images, labels) = network(), batch()
    torch.manual_seed(7)
    return getattr(torchattacks, name)(model, **options)(images, labels)


def climbed(model, images, labels, start, *, threat, steps, step_size):
    """What the inner loop finds from that start, by the cross-entropy."""
    loss = F.cross_entropy
    return projected_gradient(
        model, images, threat, loss, labels, start=start, steps=steps, step_size=step_size
    )


def close(ours, other):
    """Equal up to rounding, but for pixels where the gradient is next to zero."""
    different = (ours - other).abs() > 2e-6
    return different.float().mean() < 0.002


@pytest.mark.parametrize(
    ("name", "threat", "settings_", "rival", "options"),
    [
        ("pgd", LINF, {"steps": 7, "step_size": 0.02}, "PGD", {"steps": 7, "alpha": 0.02}),
        (
            "pgd",
            LINF,
            {"steps": 7, "step_size": 0.02, "random_start": False},
            "PGD",
            {"steps": 7, "alpha": 0.02, "random_start": False},
        ),
        ("pgd", L2, {"steps": 7, "step_size": 0.1}, "PGDL2", {"steps": 7, "alpha": 0.1}),
        ("fgsm", LINF, {}, "FGSM", {}),
        ("ffgsm", LINF, {"step_size": 0.07}, "FFGSM", {"alpha": 0.07}),
    ],
)
def test_torchattacks_finds_the_same_from_the_same_start(name, threat, settings_, rival, options):
    """FFGSM draws a normal it throws away, so that its start is not ours: taken from it below."""
    model, (images, labels) = network(), batch()
    if name == "ffgsm":
        torch.manual_seed(7)
        torch.randn_like(images)
        with attack_scope(model, seed=0):
            torch.manual_seed(7)
            torch.randn_like(images)
            start = random_start(images, threat, reach=threat.eps)
            ours = climbed(model, images, labels, start, threat=threat, steps=1, step_size=0.07)
    else:
        ours = attack(name, threat, **settings_)(model, images, labels, seed=7)
    other = theirs(rival, eps=threat.eps, **options)
    assert close(ours, other)
    assert not close(images, other)  # control: it moved


def test_towards_a_target_it_finds_what_torchattacks_finds():
    """And the target becomes likelier, the label does not."""
    model, (images, labels) = network(), batch()
    targets = (labels + 1) % 4
    ours = attack("pgd", LINF, steps=5, step_size=0.02)(
        model, images, labels, targets=targets, seed=7
    )
    rival = torchattacks.PGD(model, eps=EPS, steps=5, alpha=0.02)
    rival.set_mode_targeted_by_label(quiet=True)
    torch.manual_seed(7)
    assert close(ours, rival(images, targets))
    loss = [F.cross_entropy(model(each), targets).item() for each in (images, ours)]
    assert loss[1] < loss[0]


@pytest.mark.parametrize("threat", [LINF, L2], ids=["linf", "l2"])
@pytest.mark.parametrize("until_fooled", [False, True])
def test_layout_and_dtype_stay_and_nothing_given_changes(threat, until_fooled):
    """Channels-last images give channels-last images of the same values."""
    model, (images, labels) = network().double(), batch()
    images = images.double()
    last = images.contiguous(memory_format=torch.channels_last)
    kept, found = last.clone(), []
    for clean, net in (
        (images, model),
        (last, network().double().to(memory_format=torch.channels_last)),
    ):
        with attack_scope(net, seed=0):
            found.append(
                projected_gradient(
                    net,
                    clean,
                    threat,
                    F.cross_entropy,
                    labels,
                    start=clean,
                    steps=4,
                    step_size=threat.eps / 3,
                    until_fooled=until_fooled,
                )
            )
    assert torch.equal(last, kept)
    assert found[1].is_contiguous(memory_format=torch.channels_last)
    assert found[1].dtype == torch.float64
    torch.testing.assert_close(found[1], found[0].contiguous(), rtol=0, atol=1e-9)
    assert threat.contains(last, found[1]).all()


def test_the_gradient_keeps_its_layout_through_flatten_and_no_hook_stays():
    """What a layer before `Flatten` gets back is channels-last, as its output was."""
    model, (images, labels) = network().to(memory_format=torch.channels_last), batch()
    seen = []
    model[5].register_full_backward_hook(lambda m, i, out: seen.append(out[0].stride()))
    images = images.contiguous(memory_format=torch.channels_last)
    attack("fgsm", LINF)(model, images, labels)
    assert seen[-1][1] == 1  # neighbouring channels are neighbours in memory
    assert not model[6]._forward_pre_hooks
    model(images).sum().backward()
    assert seen[-1][1] != 1  # control: torch's own way


def test_early_stop_leaves_the_fooled_alone_and_only_them():
    """Against a loop image by image that stops at the first wrong answer."""
    model, (images, labels) = network().double(), batch(12)
    images = images.double()
    with torch.no_grad():
        labels = model(images).argmax(1)
    threat = ThreatModel(norm="linf", eps=0.3)
    attacker = attack("pgd", threat, steps=8, step_size=0.02, random_start=False, early_stop=True)
    sizes = []
    model.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    found = attacker(model, images, labels)
    assert sizes[0] == 12
    assert sizes[-1] < 12
    for i in range(12):
        current = images[i : i + 1]
        for _ in range(8):
            current = current.detach().requires_grad_()
            logits = model(current)
            if logits.argmax(1) != labels[i]:
                break
            gradient = torch.autograd.grad(F.cross_entropy(logits, labels[i : i + 1]), current)[0]
            moved = current + 0.02 * gradient.sign()
            current = threat.project(images[i : i + 1], moved).detach()
        torch.testing.assert_close(found[i : i + 1], current.detach(), rtol=0, atol=1e-9)


def test_early_stop_with_targets_is_refused():
    """It would stop at any wrong class."""
    model, (images, labels) = network(), batch()
    with pytest.raises(AttackError, match="early_stop"):
        attack("pgd", LINF, early_stop=True)(model, images, labels, targets=labels)


@settings(deadline=None, derandomize=True, max_examples=30)
@given(
    eps=st.floats(0.01, 0.5),
    low=st.floats(-2, 0),
    steps=st.integers(0, 4),
    norm=st.sampled_from(["linf", "l2"]),
)
def test_it_never_leaves_the_ball_or_the_bounds(eps, low, steps, norm):
    """Whatever the bounds; with no step the start comes back, cut to the bounds."""
    threat = ThreatModel(norm=norm, eps=eps, bounds=(low, low + 1.5))
    model, (images, labels) = network(), batch(3)
    images = low + 1.5 * images
    with attack_scope(model, seed=1):
        start = random_start(images, threat, reach=eps)
        found = climbed(model, images, labels, start, threat=threat, steps=steps, step_size=eps)
    assert threat.contains(images, found).all()
    assert torch.equal(found, start) == (steps == 0)


@pytest.mark.parametrize(
    ("model", "labels", "word"),
    [
        (nn.Flatten(), torch.tensor([0, 200]), "labels: expected 0 to 127"),
        (
            nn.Sequential(nn.Flatten(), nn.Linear(128, 1)),
            torch.tensor([0, 0]),
            "at least 2 classes",
        ),
    ],
)
def test_unusable_logits_are_refused(model, labels, word):
    """Before the loss meets them."""
    images, _ = batch(2)
    with pytest.raises(AttackError, match=word):
        attack("pgd", LINF, steps=1)(model, images, labels)


def test_other_norms_are_refused():
    """There is no signed or straight step for them here."""
    images, labels = batch(2)
    threat = ThreatModel(norm="l1", eps=1.0)
    with pytest.raises(AttackError, match="linf or l2"):
        projected_gradient(
            network(), images, threat, F.cross_entropy, labels, start=images, steps=1, step_size=1.0
        )
