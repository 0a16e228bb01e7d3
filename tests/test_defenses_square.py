"""Square: the paper's schedule, and a search that never asks for a gradient or asks twice."""

import copy
import itertools
import math

import pytest
import torch
from support.searched import LINF, Counting, digits, linear, right

from defenses import ThreatModel, attack, attack_scope
from defenses.attacks import square as room
from defenses.attacks.oracle import margin
from defenses.attacks.square import square_share

L2, L1 = ThreatModel(norm="l2", eps=0.5), ThreatModel(norm="l1", eps=2.0)


def test_the_schedule_is_the_papers():
    """Halved after 10, 50, 200, 500, 1000, 2000, 4000, 6000 and 8000 queries, not rescaled."""
    shares = [square_share(query, 0.8) for query in range(9000)]
    changes = [query for query in range(1, 9000) if shares[query] != shares[query - 1]]
    assert changes == [11, 51, 201, 501, 1001, 2001, 4001, 6001, 8001]
    assert all(b in (a, a / 2) for a, b in itertools.pairwise(shares))
    assert shares[0] == 0.8


@pytest.mark.parametrize("threat", [LINF, L2, L1])
def test_a_query_is_an_image_and_needs_no_gradient(threat):
    """As many as it says for an image that withstands, in linf fewer: some change nothing."""

    class Blind(Counting):
        def forward(self, images):
            assert not torch.is_grad_enabled()
            return super().forward(images)

    model = Blind(linear(torch.full((64,), 1e-3), bias=10.0))
    images, labels = torch.rand(3, 1, 8, 8), torch.zeros(3, dtype=torch.int64)
    attack("square", threat, queries=200)(model, images, labels, seed=0)
    asked = sum(model.seen) - 2 * 3  # the clean images, and the start of the search
    if threat.norm == "linf":
        assert 3 * 40 < asked < 3 * 200
    else:
        assert asked == 3 * 200


def one_by_one(model, image, label, start, table, threat):
    """The loop of the paper for one image, written out: every query is put to the model."""
    best, loss = start, math.inf
    for query, (down, across, sign) in enumerate([(0, 0, 0), *table.tolist()]):
        trial = best.clone()
        if query > 0:
            side = max(round(math.sqrt(square_share(query - 1, 0.8) * 64)), 1)
            top, left = (int(share * (8 - side + 1)) for share in (down, across))
            window = slice(top, top + side), slice(left, left + side)
            sign = 1 if sign < 0.5 else -1
            trial[0, 0][window] = (image[0, 0][window] + sign * threat.eps).clamp(0, 1)
        with torch.no_grad():
            now = margin(model(trial), label, targeted=False).item()
        if now < loss:
            best, loss = trial, now
        if now < 0:
            break
    return best


@pytest.mark.parametrize("eps", [0.1, 0.2])
def test_what_is_asked_ahead_or_not_at_all_changes_nothing(eps, monkeypatch):
    """The same images as by asking for each about every proposal, one after the other."""
    model, images, labels = digits()
    model, images = copy.deepcopy(model).double(), images.double()
    threat = ThreatModel(norm="linf", eps=eps)
    standing = right(model, images, labels)
    images, labels = images[standing], labels[standing]
    table = torch.rand(len(images), 150, 3, generator=torch.Generator().manual_seed(1))

    def drawn(self, rows, query, numbers):
        return table[rows.expand_as(query), query.clamp_max(149)].double()

    monkeypatch.setattr(room._Squares, "_drawn", drawn)
    counting = Counting(model)
    found = attack("square", threat, queries=150)(counting, images, labels, seed=0)
    assert max(counting.seen) > len(images)  # some were asked ahead
    with attack_scope(model, seed=0):
        stripes = torch.rand_like(images[:, :, :1, :])
    start = (images + eps * ((stripes < 0.5).double() * 2 - 1)).clamp(0, 1)
    for row in range(len(images)):
        one = slice(row, row + 1)
        expected = one_by_one(model, images[one], labels[one], start[one], table[row], threat)
        torch.testing.assert_close(found[one], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("threat", [LINF, L2, L1])
def test_the_margin_falls_with_the_queries_and_what_is_won_is_won(threat):
    """The same seed and more queries: never a larger margin, never fewer images fooled."""
    model, images, labels = digits()
    margins = []
    for queries in (1, 30, 300):
        found = attack("square", threat, queries=queries)(model, images, labels, seed=0)
        assert threat.contains(images, found).all()
        with torch.no_grad():
            margins.append(margin(model(found), labels, targeted=False))
    standing = right(model, images, labels)
    assert margins[2][standing].mean() < margins[1][standing].mean() < margins[0][standing].mean()
    assert (margins[2] < 0).sum() > (right(model, images, labels) == 0).sum()


@pytest.mark.parametrize("threat", [LINF, L2, L1])
def test_on_a_linear_model_it_comes_near_the_worst_place(threat):
    """A constant slope: in linf every pixel goes to -eps, else the change has its full length."""
    model = linear(torch.full((64,), 0.1), bias=30.0)
    images, labels = torch.full((2, 1, 8, 8), 0.5), torch.zeros(2, dtype=torch.int64)
    change = attack("square", threat, queries=600)(model, images, labels, seed=0) - images
    most = {"linf": 64 * LINF.eps, "l2": 8 * L2.eps, "l1": L1.eps}[threat.norm]
    # Bumps of both signs come in pairs: else a constant slope is not what they climb best.
    share = 0.8 if threat.norm == "linf" else 0.5
    assert (-change.flatten(1).sum(1) > share * most).all()
    if threat.norm == "l2":
        torch.testing.assert_close(change.flatten(1).norm(dim=1), torch.full((2,), 0.5))
    if threat.norm == "l1":
        torch.testing.assert_close(change.flatten(1).abs().sum(1), torch.full((2,), 2.0))


def test_a_target_is_reached_and_nothing_else_counts():
    """What it says it won is taken for its target."""
    model, images, labels = digits()
    targets = (labels + 1) % 10
    wide = ThreatModel(norm="linf", eps=0.4)
    attacker = attack("square", wide, queries=300)
    found = attacker(model, images, labels, targets=targets, seed=0)
    assert right(model, found, targets).float().mean() > 0.3


@pytest.mark.parametrize("shape", [(1, 1, 2), (1, 3, 3), (3, 7, 12), (2, 28, 28)])
@pytest.mark.parametrize("threat", [LINF, L2, L1])
def test_every_shape_of_image_is_searched(shape, threat):
    """Small ones, wide ones, and several channels."""
    model = torch.nn.Flatten()
    images = torch.rand(4, *shape, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(4, dtype=torch.int64)
    small = ThreatModel(norm=threat.norm, eps=0.01)
    found = attack("square", small, queries=30)(model, images, labels, seed=0)
    assert small.contains(images, found).all()


def test_windows_reach_every_border():
    """From the first to the last place, edges included, in linf as in l2 and l1."""
    places = set()
    with attack_scope(torch.nn.Flatten(), seed=0):
        for _ in range(300):
            _, _, rows, columns = room._window(torch.zeros(1, 1, 6, 5), 3)
            places.add((rows.start, columns.start))
            assert rows.stop - rows.start == columns.stop - columns.start == 3
    assert places == set(itertools.product(range(4), range(3)))
    share = torch.linspace(0, 1 - 2**-24, 1000)  # the largest that is drawn
    covered = room._covered(share, torch.tensor(3).expand(1000), 6)
    assert covered.unique(dim=0).tolist() == [[first + i for i in range(3)] for first in range(4)]


def test_a_smaller_window_covers_no_more_than_its_own():
    """Beside a larger one its last place is there more than once."""
    covered = room._covered(torch.tensor([0.0, 0.999]), torch.tensor([3, 1]), 4)
    assert covered.tolist() == [[0, 1, 2], [3, 3, 3]]


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("side", [1, 2, 3, 6, 9])
def test_a_bump_has_two_hills_of_opposite_sign_and_length_one(side, order):
    """In either direction, highest in the middle of a hill."""
    with attack_scope(torch.nn.Flatten(), seed=0):
        drawn = [room._bump(side, torch.zeros(1, 1, side, side), order) for _ in range(20)]
    seen = {tuple(each.flatten().tolist()) for each in drawn}
    assert len(seen) == (1 if side == 1 else 2)
    for bump in seen:
        values = torch.tensor(bump)
        assert values.norm(p=order).item() == pytest.approx(1, abs=1e-5)
        if side > 1:
            assert (values > 0).any()
            assert (values < 0).any()
            assert (values != 0).all()


@pytest.mark.parametrize("norm", ["L2", "L1"])
@pytest.mark.parametrize("side", [3, 5, 9])
def test_a_bump_is_that_of_the_reference(norm, side):
    """Up to which way it lies."""
    reference = pytest.importorskip("pyautoattack.square", reason="pyautoattack is not installed")
    with attack_scope(torch.nn.Flatten(), seed=0):
        expected = reference.SquareAttack(None, norm=norm, device="cpu").eta(side)
        drawn = [room._bump(side, torch.zeros(1, 1, side, side), int(norm[1])) for _ in range(20)]
    assert any(torch.allclose(each, expected, atol=1e-6) for each in drawn)
