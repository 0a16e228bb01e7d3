"""The shortest changes (CW, EAD): as short as geometry allows, on any pixels, image by image."""

import pytest
import torch
import torchattacks
from hypothesis import given, settings
from hypothesis import strategies as st
from support.searched import linear
from torch import nn

from defenses import AttackError, ThreatModel, attack
from defenses.attacks.oracle import margin
from defenses.attacks.shortest import shortest_change

L2, L1 = ThreatModel(norm="l2", eps=4.0), ThreatModel(norm="l1", eps=16.0)
ALL = [("cw", L2), ("eadl1", L1), ("eaden", L1)]
BY_NAME = pytest.mark.parametrize(("name", "threat"), ALL, ids=[name for name, _ in ALL])


def quick(name, threat, **given):
    """With fewer steps than by default, for EAD, which has the most."""
    fewer = {"max_iterations": 40, "binary_search_steps": 6, "initial_const": 0.01}
    return attack(name, threat, **(fewer if name != "cw" else {}), **given)


def seeded(seed):
    """A generator of one's own."""
    return torch.Generator().manual_seed(seed)


def convolution(seed=0, classes=5):
    """A small network with structure but no training."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(128, classes),
    ).eval()  # fmt: skip


def black_and_white(n=12):
    """A model, images with every pixel on a bound, as most are on digits, and what it sees."""
    images = torch.randint(2, (n, 1, 8, 8), generator=seeded(4)).float()
    model = convolution()
    with torch.no_grad():
        return model, images, model(images).argmax(dim=1)


def fooled(model, images, labels):
    """Which are seen as another class."""
    with torch.no_grad():
        return model(images).argmax(dim=1) != labels


def test_cw_finds_the_distance_to_a_plane():
    """|w.x + b| / |w|, where no bound is in the way: known in closed form."""
    weight = torch.randn(64, generator=seeded(1))
    images = 0.5 + 0.1 * torch.rand(6, 1, 8, 8, generator=seeded(2))
    model = linear(weight, 3.0 - float(weight.sum()) * 0.55)
    with torch.no_grad():
        logits = model(images)
    labels = logits.argmax(dim=1)
    distance = (logits[:, 0] - logits[:, 1]).abs() / weight.norm()
    long = {"steps": 300, "binary_search_steps": 12, "lr": 0.01}
    found = attack("cw", L2, **long)(model, images, labels)
    assert fooled(model, found, labels).all()
    torch.testing.assert_close((found - images).flatten(1).norm(dim=1), distance, rtol=0.03, atol=0)


def test_ead_finds_the_one_pixel_that_counts():
    """In l1 the shortest way to a plane is along the largest weight: margin / max |w|."""
    weight = 0.2 * torch.randn(64, generator=seeded(1))
    weight[17] = 2.0
    images = torch.full((4, 1, 8, 8), 0.5)
    model, labels = linear(weight, -float(weight.sum()) / 2 + 0.5), torch.zeros(4).long()
    long = {"max_iterations": 300, "beta": 0.02, "binary_search_steps": 12}
    found = attack("eadl1", L1, **long)(model, images, labels)
    change = (found - images).flatten(1)
    assert fooled(model, found, labels).all()
    assert (change.abs().argmax(dim=1) == 17).all()
    assert (change.abs().sum(dim=1) < 0.25 * 1.15).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cw_moves_pixels_that_lie_on_a_bound(dtype):
    """Torchattacks' change of variables cannot, and reports robustness that is not there."""
    model, images, labels = black_and_white()
    model, images = model.to(dtype), images.to(dtype)
    theirs = torchattacks.CW(model, c=100, steps=200, lr=0.05)(images, labels)
    assert not fooled(model, theirs, labels).any()  # control: this is the fault
    found = attack("cw", L2)(model, images, labels)
    assert fooled(model, found, labels).all()
    reference = attack("fab", L2)(model, images, labels, seed=0)
    ratio = (found - images).flatten(1).norm(dim=1) / (reference - images).flatten(1).norm(dim=1)
    assert ratio.median() < 1.1


def test_ead_is_not_longer_than_torchattacks():
    """The same search, without the images it is measured from being overwritten."""
    model, images, labels = black_and_white()
    images = 0.2 + 0.6 * images
    with torch.no_grad():
        labels = model(images).argmax(dim=1)
    lengths = []
    for found in (
        attack("eadl1", L1)(model, images, labels),
        torchattacks.EADL1(model, abort_early=False)(images, labels),
    ):
        assert fooled(model, found, labels).all()
        lengths.append((found - images).abs().flatten(1).sum(dim=1))
    assert (lengths[0] / lengths[1]).median() < 1.05


@BY_NAME
def test_an_image_does_not_depend_on_the_rest_of_its_batch(name, threat):
    """Each has its own constant and its own stop."""
    model, images, labels = black_and_white()
    together = quick(name, threat)(model, images, labels)
    for row in range(0, 12, 5):
        one = slice(row, row + 1)
        alone = quick(name, threat)(model, images[one], labels[one])
        torch.testing.assert_close(alone, together[one], rtol=0, atol=1e-3)


@BY_NAME
def test_a_target_is_reached(name, threat):
    """The second and the third likeliest class, in a ball that is large enough."""
    model, images, labels = black_and_white()
    with torch.no_grad():
        likeliest = model(images).argsort(dim=1, descending=True)
    targets = likeliest[torch.arange(12), 1 + torch.arange(12) % 2]
    found = attack(name, threat)(model, images, labels, targets=targets)
    assert not fooled(model, found, targets).any()


@BY_NAME
def test_a_confidence_is_kept(name, threat):
    """With kappa the wrong class wins by as much."""
    model, images, labels = black_and_white()
    found = quick(name, threat, kappa=0.05)(model, images, labels)
    with torch.no_grad():
        assert (margin(model(found), labels, targeted=False) <= -0.05 + 1e-5).all()


@BY_NAME
def test_logits_may_all_be_negative(name, threat):
    """The best other logit is a maximum over the others, not over masked zeros."""
    model, images, labels = black_and_white()
    shifted = nn.Sequential(model, Shift(-50.0))
    found = quick(name, threat)(shifted, images, labels)
    assert fooled(shifted, found, labels).all()


class Shift(nn.Module):
    """Adds a constant."""

    def __init__(self, constant):
        super().__init__()
        self.constant = constant

    def forward(self, values):
        return values + self.constant


@BY_NAME
def test_it_is_the_same_attack_in_other_bounds(name, threat):
    """Its constants are for pixels in [0, 1], whatever the bounds are."""
    model, images, labels = black_and_white()
    found = quick(name, threat)(model, images, labels)
    wide = ThreatModel(norm=threat.norm, eps=255 * threat.eps, bounds=(0.0, 255.0))

    class Scaled(nn.Module):
        def forward(self, pixels):
            return model(pixels / 255)

    scaled = quick(name, wide)(Scaled(), images * 255, labels) / 255
    torch.testing.assert_close(scaled, found, rtol=0, atol=2e-3)


@BY_NAME
def test_what_is_longer_than_the_ball_is_shortened(name, threat):
    """And so fools no more; an image that cannot be fooled stays clean."""
    model, images, labels = black_and_white()
    small = ThreatModel(norm=threat.norm, eps=0.01)
    found = quick(name, small)(model, images, labels)
    assert small.contains(images, found).all()
    assert not torch.equal(found, images)

    class Stubborn(nn.Module):
        def forward(self, pixels):
            return torch.tensor([9.0, 0.0]) + 1e-9 * pixels.flatten(1)[:, :2]

    nothing = quick(name, threat)(Stubborn(), images, torch.zeros_like(labels))
    assert torch.equal(nothing, images)


@BY_NAME
def test_settings_are_refused_by_name(name, threat):
    """Under the name that was asked for."""
    with pytest.raises(AttackError, match=f"{name} takes no setting 'restarts'"):
        attack(name, threat, restarts=2)
    with pytest.raises(AttackError, match=f"{name}: kappa"):
        attack(name, threat, kappa=-1.0)


@given(needed=st.floats(1e-4, 1e4), first=st.floats(1e-3, 1e2))
@settings(deadline=None, derandomize=True, max_examples=60)
def test_the_constant_is_found_by_tens_and_halves(needed, first):
    """Where c fools from a value on, and costs in proportion, the best c is close to it."""

    def descend(c):
        return c.view(-1, 1), torch.where(c >= needed, c, torch.inf)

    clean = torch.full((1, 1), -1.0, dtype=torch.float64)
    best = shortest_change(descend, clean, constant=first, tries=40)
    assert float(best) == pytest.approx(needed, rel=1e-4)
    assert torch.equal(shortest_change(descend, clean, constant=needed / 20, tries=2), clean)
