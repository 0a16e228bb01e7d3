"""The threat model: what is inside the ball, and how to get there."""

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from defenses import DefenseError, ThreatModel, ThreatModelError

quick = settings(deadline=None, derandomize=True, max_examples=40)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"norm": "linf", "eps": 8.0}, "8/255"),
        ({"norm": "linf", "eps": 0.0}, "above 0"),
        ({"norm": "linf", "eps": -0.1}, "above 0"),
        ({"norm": "linf", "eps": float("nan")}, "finite"),
        ({"norm": "l2", "eps": float("inf")}, "finite"),
        ({"norm": "linf", "eps": True}, "finite"),
        ({"norm": "linf", "eps": "0.1"}, "finite"),
        ({"norm": "l7", "eps": 0.1}, "one of 'linf', 'l2', 'l1', 'l0'; got 'l7'"),
        ({"norm": "l0", "eps": 2.5}, "whole number of pixel positions"),
        ({"norm": "l0", "eps": 0}, "above 0"),
        ({"norm": "l2", "eps": 0.1, "bounds": (1.0, 0.0)}, "low < high"),
        ({"norm": "l2", "eps": 0.1, "bounds": (0.0, float("inf"))}, "finite"),
        ({"norm": "l2", "eps": 0.1, "bounds": [0.0, 1.0]}, "pair"),
    ],
)
def test_a_field_outside_its_range_is_refused(fields, word):
    """Every wrong field is named, in an error that is a DefenseError and a ValueError."""
    with pytest.raises(ThreatModelError, match=word) as raised:
        ThreatModel(**fields)
    assert isinstance(raised.value, DefenseError)
    assert isinstance(raised.value, ValueError)


@given(
    norm=st.sampled_from(["linf", "l2", "l1", "l0"]),
    eps=st.floats(1e-3, 0.9),
    bounds=st.sampled_from([(0.0, 1.0), (-1.0, 1.0), (-0.3, 2.7)]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
@quick
def test_what_is_projected_is_contained(norm, eps, bounds, dtype, seed):
    """Projection lands in the ball and the bounds, for every norm, range and dtype."""
    eps = 1 + int(9 * eps) if norm == "l0" else 10 * eps if norm == "l1" else eps
    threat = ThreatModel(norm=norm, eps=eps, bounds=bounds)
    draw = torch.Generator().manual_seed(seed)
    unit = torch.rand(5, 3, 4, 4, generator=draw)
    clean = (bounds[0] + threat.width * unit).to(dtype).clamp(*bounds)
    candidate = (clean + 3 * torch.randn(clean.shape, generator=draw)).to(dtype)
    inside = threat.project(clean, candidate)
    assert inside.dtype == dtype
    threat.check_images(inside)
    assert threat.contains(clean, inside).all()


@given(norm=st.sampled_from(["linf", "l2", "l1", "l0"]), seed=st.integers(0, 1000))
@quick
def test_projection_leaves_what_is_inside(norm, seed):
    """A point already in the ball does not move (to rounding)."""
    threat = ThreatModel(norm=norm, eps=2 if norm == "l0" else 0.3)
    draw = torch.Generator().manual_seed(seed)
    clean = torch.rand(4, 1, 3, 3, generator=draw, dtype=torch.float64)
    inside = threat.project(clean, clean + torch.randn(clean.shape, generator=draw))
    torch.testing.assert_close(threat.project(clean, inside), inside, rtol=0, atol=1e-12)


def test_contains_tells_a_hair_outside_from_rounding():
    """Rounding is forgiven, one part in a thousand of eps is not."""
    threat = ThreatModel(norm="linf", eps=0.1)
    clean = torch.rand(100, 3, 8, 8) * 0.8 + 0.1
    assert threat.contains(clean, clean + 0.1).all()
    assert not threat.contains(clean, clean + 0.1001).any()
    l2 = ThreatModel(norm="l2", eps=0.5)
    step = 0.5 / (3 * 8 * 8) ** 0.5
    assert l2.contains(clean, clean + step).all()
    assert not l2.contains(clean, clean + step * 1.001).any()


@given(eps=st.floats(0.01, 30.0), seed=st.integers(0, 1000))
@quick
def test_the_l1_projection_is_the_nearest_point_of_the_ball(eps, seed):
    """Against the threshold found by halving, in wide bounds, where nothing is clipped."""
    threat = ThreatModel(norm="l1", eps=eps, bounds=(-100.0, 100.0))
    draw = torch.Generator().manual_seed(seed)
    clean = torch.rand(3, 2, 3, 3, generator=draw, dtype=torch.float64)
    change = torch.randn(clean.shape, generator=draw, dtype=torch.float64)
    found = threat.project(clean, clean + change) - clean
    for row, projected in zip(change.flatten(1), found.flatten(1), strict=True):
        low, high = 0.0, float(row.abs().max())
        for _ in range(100):
            middle = (low + high) / 2
            longer = float((row.abs() - middle).clamp_min(0).sum()) > eps
            low, high = (middle, high) if longer else (low, middle)
        expected = row.sign() * (row.abs() - high).clamp_min(0) if high > 1e-12 else row
        torch.testing.assert_close(projected, expected, rtol=0, atol=1e-9)


@given(
    eps=st.floats(0.01, 4.0),
    bounds=st.sampled_from([(0.0, 1.0), (-1.0, 2.0)]),
    pixels=st.integers(1, 9),
    saturated=st.booleans(),
    seed=st.integers(0, 1000),
)
@quick
def test_the_l1_projection_is_the_nearest_point_of_the_ball_within_the_bounds(
    eps, bounds, pixels, saturated, seed
):
    """Against quadratic programming, pixels on the bounds included."""
    threat = ThreatModel(norm="l1", eps=eps, bounds=bounds)
    draw = torch.Generator().manual_seed(seed)
    clean = torch.rand(pixels, generator=draw, dtype=torch.float64)
    clean = bounds[0] + threat.width * (clean.round() if saturated else clean)
    change = 2 * torch.randn(pixels, generator=draw, dtype=torch.float64)
    found = threat.project(clean[None], (clean + change)[None])[0] - clean
    # The change is u - v with both at least 0, so that its length is a sum.
    room = [(0, most) for most in (*(bounds[1] - clean), *(clean - bounds[0]))]
    wanted = change.numpy()
    best = minimize(
        lambda x: 0.5 * ((x[:pixels] - x[pixels:] - wanted) ** 2).sum(),
        np.zeros(2 * pixels),
        jac=lambda x: (
            np.concatenate(2 * [x[:pixels] - x[pixels:] - wanted]) * np.repeat([1, -1], pixels)
        ),
        bounds=room,
        constraints={
            "type": "ineq",
            "fun": lambda x: eps - x.sum(),
            "jac": lambda x: -np.ones_like(x),
        },
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 300},
    )
    assert found.abs().sum() <= eps + 1e-9
    assert 0.5 * (found - change).square().sum().item() == pytest.approx(best.fun, abs=1e-6)


def test_the_l1_projection_is_that_of_the_reference():
    """On many images at once; its single precision is coarser than ours."""
    apgd = pytest.importorskip("pyautoattack.autopgd_base", reason="pyautoattack is not installed")
    draw = torch.Generator().manual_seed(0)
    clean = torch.rand(50, 1, 28, 28, generator=draw).mul(1.4).sub(0.2).clamp(0, 1)
    change = torch.randn(clean.shape, generator=draw)
    for eps in (0.5, 12.0, 100.0):
        expected = clean + change + apgd.L1_projection(clean, change, eps)
        threat = ThreatModel(norm="l1", eps=eps)
        found = threat.project(clean, clean + change)
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)
        exact = threat.project(clean.double(), clean.double() + change.double())
        torch.testing.assert_close(found.double(), exact, atol=2e-6, rtol=0)


def test_the_l1_projection_of_a_large_image_is_on_the_surface():
    """Sums of many float32 sizes stay exact enough for `contains`."""
    threat = ThreatModel(norm="l1", eps=12.0)
    clean = torch.full((2, 3, 224, 224), 0.5)
    candidate = clean + 0.1 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    length = (threat.project(clean, candidate) - clean).double().abs().flatten(1).sum(dim=1)
    torch.testing.assert_close(length, torch.full((2,), 12.0).double(), rtol=0, atol=2e-3)


@given(eps=st.integers(1, 6), seed=st.integers(0, 1000))
@quick
def test_the_l0_projection_is_the_nearest_point_of_the_ball_and_the_bounds(eps, seed):
    """Against every choice of positions, the rest going back and the bounds kept."""
    threat = ThreatModel(norm="l0", eps=eps)
    draw = torch.Generator().manual_seed(seed)
    clean = torch.rand(1, 2, 2, 3, generator=draw, dtype=torch.float64)
    candidate = clean + torch.randn(clean.shape, generator=draw, dtype=torch.float64)
    best = min(
        (torch.where(mask, candidate.clamp(0, 1), clean) - candidate).square().sum().item()
        for chosen in itertools.combinations(range(6), eps)
        for mask in [torch.isin(torch.arange(6), torch.tensor(chosen)).view(1, 1, 2, 3)]
    )
    found = threat.project(clean, candidate)
    assert (found - candidate).square().sum().item() == pytest.approx(best, abs=1e-12)
    assert ((found != clean).any(dim=1).sum()) <= eps


def test_the_channels_of_a_position_count_together():
    """A coloured pixel is one position; a batch without channels has one position a value."""
    threat = ThreatModel(norm="l0", eps=1)
    clean = torch.zeros(1, 3, 2, 2)
    one_pixel, two_pixels = clean.clone(), clean.clone()
    one_pixel[0, :, 1, 0] = 1.0
    two_pixels[0, 0, 0, 0] = two_pixels[0, 1, 1, 1] = 1.0
    assert threat.contains(clean, one_pixel).item()
    assert not threat.contains(clean, two_pixels).item()
    assert threat.contains(clean.flatten(1), two_pixels.flatten(1)).tolist() == [False]
    assert threat.project(torch.zeros(1, 3), torch.tensor([[0.5, 0.9, 0.0]])).tolist() == [
        [0.0, pytest.approx(0.9), 0.0]
    ]


def test_rounding_is_no_change_and_a_grey_level_is():
    """Mapping to other bounds and back moves bits; that is not a changed pixel."""
    threat = ThreatModel(norm="l0", eps=1)
    clean = torch.rand(1, 1, 8, 8) * 0.9
    assert threat.contains(clean, clean + 2e-7).all()
    assert not threat.contains(clean, clean + 1 / 255).any()
    l1 = ThreatModel(norm="l1", eps=1.0)
    assert l1.contains(clean, clean + 1 / 64).all()
    assert not l1.contains(clean, clean + 1.001 / 64).any()


@pytest.mark.parametrize(
    ("norm", "largest", "too_large"), [("l2", 4.0, 4.1), ("l1", 16.0, 16.1), ("l0", 16, 17)]
)
def test_a_ball_that_holds_every_image_is_refused_with_the_images(norm, largest, too_large):
    """It is known only once the number of pixels is."""
    images = torch.rand(2, 1, 4, 4)
    ThreatModel(norm=norm, eps=largest).check_images(images)
    with pytest.raises(ThreatModelError, match=f"reaches every image.*at most {largest:g}"):
        ThreatModel(norm=norm, eps=too_large).check_images(images)


def test_contains_judges_each_example_on_its_own():
    """Bounds, NaN and distance are per example."""
    threat = ThreatModel(norm="linf", eps=0.2)
    clean = torch.full((4, 1, 1, 2), 0.9)
    other = clean.clone()
    other[1] += 0.15  # leaves the bounds
    other[2, 0, 0, 0] = float("nan")
    other[3] -= 0.3  # leaves the ball
    assert threat.contains(clean, other).tolist() == [True, False, False, False]
    assert threat.contains(clean[:0], other[:0]).tolist() == []


def test_images_out_of_bounds_name_the_range_and_the_remedy():
    """The commonest mistake, normalising outside, is explained."""
    threat = ThreatModel(norm="linf", eps=0.1)
    with pytest.raises(ThreatModelError, match=r"got \[-2, 2\].*normalisation inside the model"):
        threat.check_images(torch.tensor([-2.0, 2.0]).view(1, 1, 1, 2))
    with pytest.raises(ThreatModelError, match="uint8"):
        threat.check_images(torch.zeros(1, 1, 2, 2, dtype=torch.uint8))
    with pytest.raises(ThreatModelError, match="nan"):
        threat.check_images(torch.full((1, 1, 1, 1), float("nan")))
    threat.check_images(torch.zeros(0, 1, 2, 2))


def test_shapes_that_do_not_match_are_refused():
    """Broadcasting a batch against another would judge the wrong pairs."""
    threat = ThreatModel(norm="l2", eps=0.1)
    with pytest.raises(ThreatModelError, match="one shape"):
        threat.contains(torch.zeros(2, 3), torch.zeros(1, 3))
    with pytest.raises(ThreatModelError, match="floating-point"):
        threat.project(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3))


def test_a_threat_model_is_plain_json():
    """By the names of its fields, so that it can be made again from them."""
    values = json.loads(json.dumps(ThreatModel(norm="l2", eps=0.5).to_dict()))
    assert values == {"norm": "l2", "eps": 0.5, "bounds": [0.0, 1.0]}
