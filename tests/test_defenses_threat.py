"""The threat model: what is inside the ball, and how to get there."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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
        ({"norm": "l7", "eps": 0.1}, "'linf' or 'l2'"),
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
    norm=st.sampled_from(["linf", "l2"]),
    eps=st.floats(1e-3, 0.9),
    bounds=st.sampled_from([(0.0, 1.0), (-1.0, 1.0), (-0.3, 2.7)]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
@quick
def test_what_is_projected_is_contained(norm, eps, bounds, dtype, seed):
    """Projection lands in the ball and the bounds, for every norm, range and dtype."""
    threat = ThreatModel(norm=norm, eps=eps, bounds=bounds)
    draw = torch.Generator().manual_seed(seed)
    unit = torch.rand(5, 3, 4, 4, generator=draw)
    clean = (bounds[0] + threat.width * unit).to(dtype).clamp(*bounds)
    candidate = (clean + 3 * torch.randn(clean.shape, generator=draw)).to(dtype)
    inside = threat.project(clean, candidate)
    assert inside.dtype == dtype
    threat.check_images(inside)
    assert threat.contains(clean, inside).all()


@given(norm=st.sampled_from(["linf", "l2"]), seed=st.integers(0, 1000))
@quick
def test_projection_leaves_what_is_inside(norm, seed):
    """A point already in the ball does not move (to rounding)."""
    threat = ThreatModel(norm=norm, eps=0.3)
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
