"""APGD in l1: sparse steps, larger balls before the one that counts, and an exact worst place."""

import pytest
import torch
from support.searched import L1, Counting, digits, linear, right

from defenses import ThreatModel, attack, attack_scope
from defenses.attacks.climb import _SparseClimb


@pytest.mark.parametrize("name", ["apgd", "apgdt"])
def test_an_image_that_withstands_comes_back_near_the_worst_place(name):
    """On a linear model the heaviest pixels go to the bound, one after the other."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(64, generator=draw)
    images = torch.rand(5, 1, 8, 8, generator=draw) * 0.2 + 0.4
    model = linear(weight, bias=8.0 - float(weight.sum()) / 2)
    labels = torch.zeros(5, dtype=torch.int64)
    found = attack(name, L1)(model, images, labels, seed=0)
    assert right(model, found, labels).all()
    order = weight.abs().argsort(descending=True)
    room = torch.where(weight > 0, images.flatten(1), 1 - images.flatten(1))[:, order]
    spent = torch.minimum(room, (L1.eps - room.cumsum(1) + room).clamp_min(0))
    worst = (spent * weight.abs()[order]).sum(1)
    reached = ((images - found).flatten(1) * weight).sum(1)
    assert (reached <= worst + 1e-4).all()
    assert (reached > 0.97 * worst).all()


@pytest.mark.parametrize("name", ["apgd", "apgdt"])
def test_only_in_the_last_ball_what_is_fooled_leaves(name):
    """Every start costs all of them the larger balls; the rest shrinks from call to call."""
    model, images, labels = digits()
    counting = Counting(model)
    once = {"restarts": 1} if name == "apgd" else {"target_classes": 1}
    found = attack(name, L1, steps=20, **once)(counting, images, labels, seed=0)
    assert L1.contains(images, found).all()
    standing = int(right(model, images, labels).sum())
    left = int(right(model, found, labels).sum())
    assert 0 < left < standing
    # The clean images; twice a look and 6 steps; a look and the 8 steps that are left.
    assert len(counting.seen) == 1 + 2 * 7 + 9
    wide, last = counting.seen[1:15], counting.seen[15:]
    assert counting.seen[0] == len(images)
    assert set(wide) == {standing}
    assert last == sorted(last, reverse=True)
    assert last[0] == standing
    assert standing > last[-1] >= left  # the last look may win some more


def test_few_steps_are_all_taken_where_they_count():
    """Below four there is nothing to spare for a larger ball, and one step runs."""
    counting = Counting(linear(torch.full((16,), 1e-3), bias=10.0))
    images, labels = torch.rand(2, 1, 4, 4), torch.zeros(2, dtype=torch.int64)
    attack("apgd", L1, steps=1, restarts=1)(counting, images, labels, seed=0)
    assert len(counting.seen) == 1 + 1 + 1 + 2  # clean, a look at each start, and one step


def climb(changed, best, step):
    """A search of one image of ten pixels whose best image has changed so many."""
    clean = torch.zeros(1, 1, 1, 10)
    labels = torch.zeros(1, dtype=torch.int64)
    found = _SparseClimb(clean, labels, labels, clean + 0.5)
    found.changed, found.step = torch.tensor([float(changed)]), torch.tensor([step])
    found.best = torch.zeros_like(clean)
    found.best[..., :best] = 0.1
    return found


@pytest.mark.parametrize(
    ("changed", "best", "step", "expected", "back"),
    [
        (10, 9, 0.3, 1.0, True),  # sparser by more than a twentieth
        (10, 10, 0.6, 0.4, False),
        (8, 9, 0.6, 0.4, False),
        (10, 10, 0.12, 0.1, False),  # never shorter than a tenth
    ],
)
def test_a_search_whose_image_gets_sparser_starts_anew(changed, best, step, expected, back):
    """Section 3.3 of the paper."""
    found = climb(changed, best, step)
    point = found.point.clone()
    found.check()
    assert found.step.item() == pytest.approx(expected)
    assert torch.equal(found.point, found.best if back else point)
    assert found.changed.item() == best


def test_a_step_moves_the_steepest_pixels_by_the_same_amount():
    """Two thirds as many as the best image has changed, rounded up; the length is the step's."""
    found = climb(changed=4, best=4, step=0.5)
    found.point = found.clean.clone()
    found.gradient = torch.arange(1.0, 11.0).view(1, 1, 1, 10)
    found.move(ThreatModel(norm="l1", eps=0.6), 1)
    expected = torch.zeros(10)
    expected[-3:] = 0.1  # ceil(4 / 1.5) pixels share 0.5 * 0.6
    torch.testing.assert_close(found.point.flatten(), expected)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "loss"), [("apgd", "ce"), ("apgdt", "dlr-targeted")])
def test_it_fools_what_the_reference_fools(name, loss):
    """With the same steps, starts and targets: of 60 images it misses at most two."""
    reference = pytest.importorskip(
        "pyautoattack.autopgd_base", reason="pyautoattack is not installed"
    )
    model, images, labels = digits()
    common = {"norm": "L1", "eps": L1.eps, "seed": 0, "use_largereps": True, "device": "cpu"}
    with attack_scope(model, seed=0):
        theirs = (
            reference.APGDAttack(model, n_restarts=5, loss=loss, **common)
            if name == "apgd"
            else reference.APGDAttack_targeted(model, n_target_classes=5, **common)
        ).perturb(images, labels)
    expected = right(model, theirs, labels)
    ours = right(model, attack(name, L1)(model, images, labels, seed=0), labels)
    assert expected.sum() < right(model, images, labels).sum() - 5
    assert (ours & ~expected).sum() <= 2
