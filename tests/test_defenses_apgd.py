"""APGD and APGD-T: the paper's schedule and loss, exact answers, and images that leave when won."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.searched import L1, L2, LINF, Counting, digits, linear, right
from torch import nn

from defenses import AttackError, ThreatModel, attack, attack_scope
from defenses.attacks.apgd import dlr, targeted_dlr
from defenses.attacks.climb import _DenseClimb, _random_start
from defenses.attacks.oracle import Oracle, lead, likeliest_wrong, until_fooled


@pytest.mark.parametrize("loss", ["ce", "dlr"])
@pytest.mark.parametrize("threat", [LINF, L2])
def test_an_image_that_withstands_comes_back_at_the_worst_place(threat, loss):
    """On a linear model that place is known; four logits, so that the ratio can be formed."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(16, generator=draw)
    layer = nn.Linear(16, 4)
    with torch.no_grad():
        layer.weight.copy_(torch.stack([weight, -weight, 0 * weight, 0 * weight]))
        layer.bias.copy_(torch.tensor([4.0, -4.0, -4.0, -4.0]))
    images = torch.rand(5, 1, 4, 4, generator=draw) * 0.2 + 0.4
    threat = ThreatModel(norm=threat.norm, eps=0.1)
    attacker = attack("apgd", threat, loss=loss)
    model, labels = nn.Sequential(nn.Flatten(), layer), torch.zeros(5, dtype=torch.int64)
    found = attacker(model, images, labels, seed=0)
    assert right(model, found, labels).all()
    direction = weight.sign() if threat.norm == "linf" else weight / weight.norm()
    expected = images - 0.1 * direction.view(1, 1, 4, 4)
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)


def test_the_checkpoints_are_the_papers(monkeypatch):
    """At 22, 41, 57, 70, 80, 87, 93 and 99 % of the steps."""
    periods, check = [], _DenseClimb.check

    def spy(self, steps):
        periods.append(steps)
        check(self, steps)

    monkeypatch.setattr(_DenseClimb, "check", spy)
    model, labels = linear(torch.full((16,), 1e-3), bias=10.0), torch.zeros(2, dtype=torch.int64)
    attack("apgd", LINF)(model, torch.rand(2, 1, 4, 4), labels)
    assert torch.tensor(periods).cumsum(0).tolist() == [22, 41, 57, 70, 80, 87, 93, 99]


def climb(rises, *, best, marked, halved):
    """A search just before a checkpoint, in one number an image."""
    images = torch.zeros(1, 1, 1, 1)
    labels = torch.zeros(1, dtype=torch.int64)
    with attack_scope(nn.Flatten(), seed=0):
        found = _DenseClimb(images, labels, labels, _random_start(images, LINF))
    found.rises = torch.tensor([float(rises)])
    found.best_loss, found.marked_loss = torch.tensor([best]), torch.tensor([marked])
    found.halved, found.best = torch.tensor([halved]), torch.tensor([[[[0.7]]]])
    return found


@pytest.mark.parametrize(
    ("rises", "best", "halved", "expected"),
    [
        (8, 1.0, False, False),  # more than 3 of 4 steps rose
        (7, 1.0, False, True),
        (8, 0.0, False, True),  # no better than at the last checkpoint, with the same step
        (8, 0.0, True, False),  # the step is a new one: it has another period
    ],
)
def test_a_search_that_stalls_goes_back_and_halves_its_step(rises, best, halved, expected):
    """Both conditions of section 3 of the paper, in a period of ten steps."""
    found = climb(rises, best=best, marked=0.0, halved=halved)
    point = found.point.clone()
    found.check(10)
    assert found.step.item() == (1.0 if expected else 2.0)
    assert torch.equal(found.point, found.best if expected else point)
    assert found.rises.item() == 0
    assert found.marked_loss.item() == best


@pytest.mark.parametrize("name", ["apgd", "apgdt"])
@pytest.mark.parametrize("threat", [LINF, L2])
def test_what_is_fooled_is_not_asked_about_again(name, threat, monkeypatch):
    """The model sees fewer images from call to call, and those that left are really fooled."""
    monkeypatch.setattr(Oracle, "at_once", 1)  # no searches side by side
    model, images, labels = digits()
    counting = Counting(model)
    found = attack(name, threat, steps=20)(counting, images, labels, seed=0)
    standing = int(right(model, images, labels).sum())
    left = int(right(model, found, labels).sum())
    assert 0 < left < standing
    assert counting.seen[0] == len(images)
    assert counting.seen[1:] == sorted(counting.seen[1:], reverse=True)
    assert counting.seen[1] == standing
    assert counting.seen[-1] == left


def test_a_target_is_reached_and_nothing_else_counts():
    """Every image that the search says it won is taken for its target."""
    model, images, labels = digits()
    targets = (labels + 1) % 10
    wide = ThreatModel(norm="linf", eps=0.3)
    for loss in ("ce", "dlr"):
        found = attack("apgd", wide, loss=loss)(model, images, labels, targets=targets, seed=0)
        hit = right(model, found, targets)
        assert hit.float().mean() > 0.5
        assert wide.contains(images, found).all()


@pytest.mark.parametrize("classes", [2, 3, 4, 12])
@pytest.mark.parametrize("threat", [LINF, L2])
def test_any_number_of_classes_has_targeted_searches(classes, threat):
    """As many as there are wrong classes, at most nine; each image that can be fooled is."""
    draw = torch.Generator().manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, classes))
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(classes, 16, generator=draw))
        images = torch.rand(40, 1, 4, 4, generator=draw) * 0.6 + 0.2
        model[1].bias.copy_(-(images.flatten(1) @ model[1].weight.T).mean(0))
        logits = model(images)
    labels, threat = logits.argmax(1), ThreatModel(norm=threat.norm, eps=0.05)
    difference = model[1].weight[labels][:, None] - model[1].weight  # [n, classes, 16]
    dual = difference.norm(p=1 if threat.norm == "linf" else 2, dim=2)
    gap = logits.gather(1, labels[:, None]) - logits - threat.eps * dual
    fallible = (gap.scatter(1, labels[:, None], 1.0) < -1e-4).any(1)
    safe = (gap.scatter(1, labels[:, None], 1.0) > 1e-4).all(1)
    found = attack("apgdt", threat)(model, images, labels, seed=0)
    fooled = ~right(model, found, labels)
    assert fallible.any()
    assert fooled[fallible].all()
    assert not fooled[safe].any()
    # One look before all searches, and in each a look at the start and after every step.
    counting, count = Counting(model), int(safe.sum())
    if count > 0:
        attack("apgdt", threat)(counting, images[safe], labels[safe], seed=0)
        assert sum(counting.seen) == count * (1 + 101 * min(classes - 1, 9))


def test_a_ratio_that_cannot_be_formed_is_refused():
    """Three logits without a target."""
    model, labels = linear(torch.ones(16)), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(AttackError, match="compares 3 logits, but the model has 2"):
        attack("apgd", LINF, loss="dlr")(model, torch.rand(2, 1, 4, 4), labels)


logits = st.lists(st.floats(-5, 5, width=32), min_size=4, max_size=7, unique=True)


@given(logits, st.floats(0.5, 50), st.floats(-20, 20))
def test_the_ratio_is_the_papers_and_knows_no_scale(row, scale, shift):
    """Against the formula by a sort, and after any scale and shift of the logits."""
    z = torch.tensor([row], dtype=torch.float64)
    ordered = sorted(row, reverse=True)
    if ordered[0] - ordered[2] < 1e-3:
        return
    for label in range(len(row)):
        y = torch.tensor([label])
        best = ordered[1] if row[label] == ordered[0] else ordered[0]
        expected = -(row[label] - best) / (ordered[0] - ordered[2])
        assert dlr(z, y).item() == pytest.approx(expected, abs=1e-6)
        assert dlr(scale * z + shift, y).item() == pytest.approx(expected, abs=1e-6)
        t = torch.tensor([(label + 1) % len(row)])
        towards = (row[t] - row[label]) / (ordered[0] - (ordered[2] + ordered[3]) / 2)
        assert targeted_dlr(z, y, t).item() == pytest.approx(towards, abs=1e-6)
        assert targeted_dlr(scale * z + shift, y, t).item() == pytest.approx(towards, abs=1e-6)


def test_below_four_classes_the_ratio_is_a_difference():
    """As it says."""
    z, y, t = torch.tensor([[1.0, 4.0, 2.0]]), torch.tensor([1]), torch.tensor([2])
    assert targeted_dlr(z, y, t).item() == lead(z, y, t).item() == -2.0


def test_the_likeliest_wrong_classes_never_hold_the_label():
    """Not where logits tie either."""
    order = likeliest_wrong(torch.zeros(3, 4), torch.tensor([0, 1, 3]), 9)
    assert [sorted(row) for row in order.tolist()] == [[1, 2, 3], [0, 2, 3], [0, 1, 2]]


@pytest.mark.parametrize("name", ["apgd", "apgdt", "fab", "square"])
@pytest.mark.parametrize("threat", [LINF, L2, L1])
def test_other_units_of_the_pixels_change_nothing(name, threat):
    """Pixels in [-1, 3] and a model that undoes it: the same images, in other words."""

    class Rescaled(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, images):
            return self.model((images + 1) / 4)

    model, images, labels = digits()
    model, images = model.double(), images.double()
    wide = ThreatModel(norm=threat.norm, eps=4 * threat.eps, bounds=(-1.0, 3.0))
    setting = {"queries": 60} if name == "square" else {"steps": 12}
    one = attack(name, threat, **setting)(model, images, labels, seed=3)
    two = attack(name, wide, **setting)(Rescaled(model), 4 * images - 1, labels, seed=3)
    model.float()
    torch.testing.assert_close((two + 1) / 4, one, atol=1e-6, rtol=0)


class Viewing(nn.Module):
    """Reads its features by `view`, which channels-last tensors refuse."""

    def __init__(self, model):
        super().__init__()
        self.features, self.head = model[:3], model[4]

    def forward(self, images):
        features = self.features(images)
        return self.head(features.view(len(features), -1))


@pytest.mark.parametrize("name", ["apgd", "apgdt", "fab", "square"])
def test_a_model_that_calls_view_is_asked_in_its_own_layout(name):
    """Others are asked channels-last on a CPU; the images found are the same to rounding."""
    model, images, labels = digits()
    setting = {"queries": 20} if name == "square" else {"steps": 3}
    attacker, counting = attack(name, LINF, **setting), Counting(model)
    found = attacker(counting, images, labels, seed=0)
    assert counting.strides == {(64, 1, 8, 1)}
    same = attacker(Viewing(model), images, labels, seed=0)
    torch.testing.assert_close(same, found, atol=1e-4, rtol=0)


def test_an_error_of_the_models_own_passes_through():
    """Only the complaint about a view is taken for a layout."""

    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.calls = 0

        def forward(self, images):
            self.calls += 1
            raise RuntimeError("mine")

    model = Broken()
    with pytest.raises(RuntimeError, match="mine"):
        attack("apgd", LINF)(model, torch.rand(2, 1, 4, 4), torch.zeros(2, dtype=torch.int64))
    assert model.calls == 1


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("contiguous", [True, False])
def test_the_oracle_shows_the_pixels_where_they_are(channels, contiguous):
    """Whatever the strides that come in: a relabelled layout must not move a pixel."""
    images = torch.rand(3, channels, 4, 5)
    given = images if contiguous else images.to(memory_format=torch.channels_last)[:, :, :, :]
    given = given if contiguous else torch.cat([given, given])[::2][:3].clone()
    oracle = Oracle(nn.Flatten(), given, torch.tensor([0, 1, 2]))
    assert torch.equal(oracle.logits(given), given.flatten(1))
    _, _, gradient = oracle.gradient(given, lambda z: (z * given.flatten(1)).sum(1))
    assert torch.equal(gradient, given)


@pytest.mark.parametrize(
    ("at_once", "expected"),
    [
        (4, [[(0, 2), (2, 2), (3, 2)], [(0, 0), (3, 0), (0, 3), (3, 3)]]),
        (3, [[(0, 2), (2, 2), (3, 2)], [(0, 0), (3, 0)], [(3, 3), (3, 9)]]),
    ],
)
def test_searches_go_on_with_what_still_stands(at_once, expected):
    """In order, no longer than anything stands, and side by side where there is room for them."""
    asked = []

    def search(rows, aims):
        asked.append(list(zip(rows.tolist(), aims.tolist(), strict=True)))
        return aims[:, None].float(), rows == aims

    standing = torch.tensor([True, False, True, True])
    aims = torch.tensor([2, 0, 3, 9]).expand(4, 4)
    found = until_fooled(torch.full((4, 1), -1.0), standing, aims, search, at_once=at_once)
    assert asked == expected
    assert found.flatten().tolist() == [0, -1, 2, 3]


def test_the_first_search_that_wins_gives_the_image():
    """Side by side too; where none wins it is the last one's."""
    aims = torch.arange(6).expand(2, 6)

    def search(rows, aims):
        return aims[:, None].float(), (rows == 0) & (aims >= 2)

    standing = torch.tensor([True, True])
    found = until_fooled(torch.zeros(2, 1), standing, aims, search, at_once=100)
    assert found.flatten().tolist() == [2, 5]


def test_a_model_without_slope_gives_finite_images():
    """Quantised pixels have no gradient: the search fails and says nothing that is not there."""

    class Quantised(nn.Module):
        def forward(self, images):
            return 0 * images.flatten(1)[:, :4] + torch.tensor([3.0, 2.0, 1.0, 0.0])

    images, labels = torch.rand(3, 1, 4, 4), torch.zeros(3, dtype=torch.int64)
    for name in ("apgd", "apgdt", "fab"):
        for threat in (LINF, L2):
            found = attack(name, threat, steps=5)(Quantised(), images, labels, seed=0)
            assert torch.isfinite(found).all()


@pytest.mark.parametrize("name", ["apgd", "square"])
def test_a_target_that_the_model_does_not_know_is_refused(name):
    """Before anything inside torch can complain of an index."""
    model, images, labels = digits()
    with pytest.raises(AttackError, match="expected 0 to 9 for a model of 10 classes, got 10"):
        attack(name, LINF)(model, images, labels, targets=torch.full_like(labels, 10))
