"""FAB: the step against linear programming, and a nearest image that is known."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from support.searched import LINF, Counting, digits, linear, right

from defenses import ThreatModel, attack
from defenses.attacks.boundary import step_onto_hyperplane
from defenses.attacks.oracle import Oracle

L2, L1 = ThreatModel(norm="l2", eps=0.5), ThreatModel(norm="l1", eps=2.0)


@st.composite
def hyperplanes(draw):
    """A point in [-1, 2], a normal and a height over the hyperplane; some of them zero."""
    size = draw(st.integers(1, 8))
    some = st.floats(-1, 2).map(lambda value: round(value, 3))
    point = draw(st.lists(some, min_size=size, max_size=size))
    normal = draw(st.lists(some, min_size=size, max_size=size))
    return np.array(point), np.array(normal), draw(st.floats(-4, 4))


def change_of(case, norm):
    """What the attack would do, in double precision."""
    point, normal, height = (torch.tensor(each, dtype=torch.float64).unsqueeze(0) for each in case)
    threat = ThreatModel(norm=norm, eps=1.0, bounds=(-1.0, 2.0))
    return step_onto_hyperplane(point, normal, height, threat).squeeze(0).numpy()


def reachable(case):
    """How much of the height any change within the bounds can take away."""
    point, normal, height = case
    downhill = -np.sign(height) * normal
    return np.abs(normal) @ np.where(downhill > 0, 2 - point, point + 1)


def reaches(case, change):
    """Whether the change can reach the hyperplane; it is as near as it gets, and in the bounds."""
    point, normal, height = case
    assert (point + change >= -1 - 1e-9).all()
    assert (point + change <= 2 + 1e-9).all()
    if reachable(case) <= abs(height) + 1e-6:
        assert abs(normal @ change) == pytest.approx(reachable(case), abs=1e-9)
        return False
    assert normal @ change == pytest.approx(-height, abs=1e-9)
    return True


def least_linf(point, normal, height):
    """The least t such that |d| <= t, w.d = -height and x + d lies in the bounds."""
    size = len(point)
    below = np.block([[np.eye(size), -np.ones((size, 1))], [-np.eye(size), -np.ones((size, 1))]])
    return linprog(
        c=np.append(np.zeros(size), 1),
        A_ub=below,
        b_ub=np.zeros(2 * size),
        A_eq=np.append(normal, 0)[None],
        b_eq=[-height],
        bounds=[*zip(-1 - point, 2 - point, strict=True), (0, None)],
    ).fun


def least_l1(point, normal, height):
    """The least sum of u + v, d = u - v, such that w.d = -height and x + d is in the bounds."""
    return linprog(
        c=np.ones(2 * len(point)),
        A_eq=np.append(normal, -normal)[None],
        b_eq=[-height],
        bounds=[(0, most) for most in (*(2 - point), *(point + 1))],
    ).fun


@pytest.mark.parametrize(
    ("norm", "order", "least"), [("linf", np.inf, least_linf), ("l1", 1, least_l1)]
)
@given(case=hyperplanes())
@settings(deadline=None)
def test_the_shortest_change_is_that_of_linear_programming(norm, order, least, case):
    """Where the bounds let it reach the hyperplane, no change is shorter."""
    change = change_of(case, norm)
    if reaches(case, change):
        assert np.linalg.norm(change, order) == pytest.approx(least(*case), abs=1e-6)


@given(hyperplanes())
@settings(deadline=None)
def test_the_shortest_l2_change_satisfies_its_conditions(case):
    """Every pixel off the bounds moves in proportion to the normal, and none on them less far."""
    point, normal, _ = case
    change = change_of(case, "l2")
    if not reaches(case, change):
        return
    moved = point + change
    free = (moved > -1 + 1e-9) & (moved < 2 - 1e-9) & (np.abs(normal) > 0)
    if free.any():
        multiplier = (change[free] / normal[free]).mean()
        np.testing.assert_allclose(change[free], multiplier * normal[free], atol=1e-9)
        # On a bound the change is cut short: it would go on.
        stuck = ~free
        assert (np.abs(change[stuck]) <= np.abs(multiplier * normal[stuck]) + 1e-9).all()


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_the_step_is_that_of_the_reference(norm):
    """On many images at once, in single precision."""
    projections = pytest.importorskip(
        "pyautoattack.fab_projections", reason="pyautoattack is not installed"
    )
    draw = torch.Generator().manual_seed(0)
    points = torch.rand(50, 784, generator=draw).mul(1.4).sub(0.2).clamp(0, 1)
    normals = torch.randn(50, 784, generator=draw)
    heights = torch.randn(50, generator=draw) * 20
    project = getattr(projections, f"projection_{norm}")
    expected = project(points, normals, (normals * points).sum(1) - heights)
    found = step_onto_hyperplane(points, normals, heights, ThreatModel(norm=norm, eps=1.0))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["fab", "fab-untargeted"])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_on_a_linear_model_it_succeeds_from_the_exact_distance_on(norm, name):
    """The distance to the only boundary is |w.x + b| over the dual length of w."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(16, generator=draw)
    images = torch.rand(20, 1, 4, 4, generator=draw) * 0.2 + 0.4  # no pixel meets a bound
    model, labels = linear(weight), None
    with torch.no_grad():
        labels = model(images).argmax(1)
    dual = weight.norm(p={"linf": 1, "l2": 2, "l1": math.inf}[norm])
    distances = (images.flatten(1) @ weight).abs() / dual
    eps = float(distances.median())
    found = attack(name, ThreatModel(norm=norm, eps=eps))(model, images, labels, seed=0)
    fooled = ~right(model, found, labels)
    assert fooled[distances < 0.99 * eps].all()
    assert not fooled[distances > eps].any()
    assert fooled.any()
    assert torch.equal(found[~fooled], images[~fooled])


@pytest.mark.parametrize("threat", [LINF, L2, L1])
def test_what_is_fooled_leaves_and_nothing_is_left_to_chance(threat, monkeypatch):
    """Successes lie in the ball; neither the seed matters nor which searches run side by side."""
    model, images, labels = digits()
    counting = Counting(model)
    attacker = attack("fab", threat, steps=20)
    together = attacker(model, images, labels, seed=1)
    monkeypatch.setattr(Oracle, "at_once", 1)
    found = attacker(counting, images, labels, seed=0)
    torch.testing.assert_close(together, found, rtol=0, atol=1e-4)
    assert threat.contains(images, found).all()
    standing, left = (int(right(model, each, labels).sum()) for each in (images, found))
    assert 0 < left < standing
    assert counting.seen[0] == len(images)
    assert counting.seen[1:] == sorted(counting.seen[1:], reverse=True)
    assert (counting.seen[1], counting.seen[-1]) == (standing, left)
    # In each of nine searches a gradient and an answer a step, less where all had been fooled.
    assert len(counting.seen) == 1 + 2 * 20 * 9


def test_it_finds_nearer_images_than_its_radius_asks_for():
    """The search is for the boundary: it is met at little more than the shortest distance."""
    model, images, labels = digits()
    wide = ThreatModel(norm="linf", eps=0.5)
    found = attack("fab", wide, target_classes=1)(model, images, labels)
    reached = (found - images).abs().flatten(1).amax(1)
    fooled = ~right(model, found, labels) & right(model, images, labels)
    assert fooled.float().mean() > 0.8
    assert reached[fooled].median() < 0.3
    assert math.isfinite(reached.max())


@pytest.mark.parametrize("threat", [LINF, L2, L1])
def test_without_a_target_it_goes_to_the_nearest_of_many_boundaries(threat):
    """Ten linear classes: fooled from the least distance on, though no class is given.

    The nearest class is for some images not the likeliest, which FAB-T with one target would take.
    """
    draw = torch.Generator().manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 10))
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(10, 16, generator=draw))
        model[1].weight[3] *= 4
        model[1].bias.zero_()
    images = torch.rand(60, 1, 4, 4, generator=draw) * 0.2 + 0.4
    model.requires_grad_(False)
    logits, weight = model(images), model[1].weight
    labels = logits.argmax(1)
    dual = {"linf": 1, "l2": 2, "l1": math.inf}[threat.norm]
    slopes = (weight[labels][:, None] - weight[None]).norm(p=dual, dim=2)
    heights = logits.gather(1, labels[:, None]) - logits
    heights[torch.arange(60), labels] = math.inf
    distances, nearest = (heights / slopes.clamp_min(1e-9)).min(1)
    assert (nearest != logits.topk(2).indices[:, 1]).any()
    ball = ThreatModel(norm=threat.norm, eps=float(distances.median()))
    found = attack("fab-untargeted", ball, steps=20, restarts=1)(model, images, labels)
    fooled = ~right(model, found, labels)
    assert fooled[distances < 0.99 * ball.eps].all()
    assert not fooled[distances > 1.001 * ball.eps].any()


def test_restarts_without_a_target_begin_elsewhere_and_find_no_less():
    """The first search is from the image and draws nothing; the others are for who withstood it."""
    model, images, labels = digits()
    once = attack("fab-untargeted", LINF, steps=5, restarts=1)
    first, again = (once(model, images, labels, seed=seed) for seed in (0, 1))
    torch.testing.assert_close(first, again)
    many = attack("fab-untargeted", LINF, steps=5, restarts=3)(model, images, labels, seed=0)
    left, fewer = right(model, first, labels), right(model, many, labels)
    assert not (fewer & ~left).any()
    assert LINF.contains(images, many).all()
