"""How cost grows: exponents against an oracle, and costs whose exponent is known."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import linregress

from secure_cnn.bench import Protection
from secure_cnn.bench.scaling import AXES, Size, fit_exponent, measure_scaling, network
from secure_cnn.engine import CrossEntropy
from secure_cnn.errors import RunError


class Costing:
    """An objective that takes as long as a function of the images says, on a clock of its own."""

    per_example = True

    def __init__(self, clock, cost):
        self.clock, self.cost = clock, cost

    def __call__(self, model, images, labels):
        self.clock[0] += self.cost(images)
        return CrossEntropy()(model, images, labels)

    def __deepcopy__(self, memo):
        return self


def exponents(axis, cost, *, rounds=1):
    """The fitted exponent and its error of a plain training that costs so much."""
    clock = [0.0]
    plain = {"plain": Protection(objective=Costing(clock, cost), private=False)}
    rows = measure_scaling(axis, lambda _: plain, rounds=rounds, clock=lambda: clock[0])
    return {row.metric: row for row in rows if row.case == axis}, rows


@settings(deadline=None, max_examples=100)
@given(
    exponent=st.floats(-2, 4),
    factor=st.floats(1e-6, 1e6),
    sizes=st.lists(st.integers(1, 4096), min_size=3, max_size=8, unique=True),
)
def test_a_power_law_is_found_exactly(exponent, factor, sizes):
    """Whatever the sizes; nothing is left over, so the standard error is nothing."""
    found = fit_exponent(sizes, [factor * size**exponent for size in sizes])
    assert found.value == pytest.approx(exponent, abs=1e-6)
    assert found.standard_error == pytest.approx(0, abs=1e-6)
    assert found.points == len(sizes)


@settings(deadline=None, max_examples=50)
@given(
    points=st.lists(
        st.tuples(st.integers(1, 100), st.floats(0.01, 100)),
        min_size=3,
        max_size=12,
        unique_by=lambda point: point[0],
    )
)
def test_slope_and_standard_error_are_those_of_scipy(points):
    """Oracle: linear regression of the logarithms."""
    sizes, costs = zip(*points, strict=True)
    logs = [torch.tensor(values, dtype=torch.float64).log().numpy() for values in (sizes, costs)]
    oracle, found = linregress(*logs), fit_exponent(sizes, costs)
    assert found.value == pytest.approx(oracle.slope, rel=1e-6, abs=1e-9)
    assert found.standard_error == pytest.approx(oracle.stderr, rel=1e-5, abs=1e-7)
    low, high = found.interval
    assert low <= found.value <= high


def test_the_interval_covers_the_true_exponent_as_often_as_it_says():
    """About 95 of 100 times for noisy costs at four sizes; one standard error does not."""
    draw, covered, narrow = torch.Generator().manual_seed(0), 0, 0
    sizes = [8, 16, 32, 64]
    for _ in range(300):
        noise = torch.randn(4, generator=draw).mul(0.1).exp().tolist()
        found = fit_exponent(sizes, [size * each for size, each in zip(sizes, noise, strict=True)])
        covered += found.interval[0] <= 1 <= found.interval[1]
        narrow += abs(found.value - 1) <= found.standard_error
    assert 270 <= covered <= 298
    assert narrow < 230  # control


@pytest.mark.parametrize(
    ("sizes", "costs", "message"),
    [
        ([1, 2], [1.0, 2.0], "at least 3 sizes"),
        ([1, 2, 4], [1.0, 2.0], "as many costs"),
        ([2, 2, 2], [1.0, 2.0, 3.0], "two of them different"),
        ([1, 2, 4], [1.0, 0.0, 2.0], "above 0"),
        ([1, 2, 4], [1.0, float("nan"), 2.0], "finite"),
    ],
)
def test_what_is_no_line_is_refused(sizes, costs, message):
    """Too few points for an error, or no logarithm."""
    with pytest.raises(RunError, match=message):
        fit_exponent(sizes, costs)


def test_a_known_cost_has_its_exponent():
    """What grows as the batch to 1.5, as the area, or not at all; steps are always 1."""
    assert exponents("batch", lambda images: len(images) ** 1.5)[0]["exponent"].median == (
        pytest.approx(1.5)
    )
    assert exponents("side", lambda images: float(images[0].numel()))[0]["exponent"].median == (
        pytest.approx(2.0)
    )
    flat, rows = exponents("steps", lambda images: 1.0, rounds=2)
    assert flat["exponent"].median == pytest.approx(1.0)
    assert flat["exponent_error"].median == pytest.approx(0.0, abs=1e-9)
    times = {row.case: row.median for row in rows if row.metric == "time"}
    assert times == {"steps 1": 1.0, "steps 2": 2.0, "steps 4": 4.0, "steps 8": 8.0}
    assert {row.n for row in rows if row.metric == "time"} == {2}


@pytest.mark.parametrize("axis", sorted(AXES))
def test_only_one_thing_grows(axis):
    """Each size of an axis differs from the default in nothing else, and there are enough."""
    usual, sizes = Size(), AXES[axis]
    for size in sizes:
        same = {*AXES} - {axis}
        assert all(getattr(size, name) == getattr(usual, name) for name in same)
    values = [getattr(size, axis) for size in sizes]
    assert values == sorted(set(values))
    assert len(values) >= 4


def test_the_network_grows_as_its_size_says():
    """Weights with the square of the width, with the depth; the global random state stays."""
    before = torch.get_rng_state()

    def weights(**size):
        layers = network(Size(**size))
        return sum(w.numel() for name, w in layers.named_parameters() if w.dim() == 4)

    assert torch.equal(before, torch.get_rng_state())
    assert weights(width=32, depth=9) - weights(width=32, depth=8) == 9 * 32 * 32
    assert weights(depth=5) - weights(depth=4) == weights(depth=4) - weights(depth=3)


@pytest.mark.parametrize(
    ("size", "message"),
    [({"batch": 0}, "batch"), ({"width": 6}, "multiple of 4"), ({"side": 7}, "side")],
)
def test_a_size_out_of_range_is_refused(size, message):
    """Before a network is built."""
    with pytest.raises(RunError, match=message):
        Size(**size)


def test_one_slow_round_does_not_bend_the_line():
    """The medians are fitted: a hundred times the cost, once in three rounds, is not seen."""
    calls = []

    def cost(images):
        calls.append(len(images))
        # Two calls are for warmth; the third is the first that counts.
        return len(images) * (100.0 if calls.count(64) == 3 and len(images) == 64 else 1.0)

    found, _ = exponents("batch", cost, rounds=3)
    assert found["exponent"].median == pytest.approx(1.0)
    assert calls.count(64) == 5


def test_the_variants_may_depend_on_the_size():
    """The attack's steps are whoever's makes the variants: twice the steps, twice the time."""
    clock = [0.0]

    def variants_at(size):
        steady = Costing(clock, lambda images: 1.0)
        growing = Costing(clock, lambda images: float(size.attack_steps))
        return {
            name: Protection(objective=objective, private=False)
            for name, objective in (("plain", steady), ("attacked", growing))
        }

    rows = measure_scaling("attack_steps", variants_at, rounds=1, clock=lambda: clock[0])
    found = {row.variant: row.median for row in rows if row.metric == "exponent"}
    assert found == {"plain": pytest.approx(0.0), "attacked": pytest.approx(1.0)}
    ratios = {row.case: row.median for row in rows if row.variant == "attacked" and row.unit == "x"}
    assert ratios["attack_steps 8"] == pytest.approx(8.0)


def test_what_cannot_be_scaled_is_refused():
    """An unknown axis, no plain training, and variants that come and go."""
    plain = Protection(objective=CrossEntropy(), private=False)
    with pytest.raises(RunError, match="axis: expected one of batch, width"):
        measure_scaling("colour", lambda _: {"plain": plain}, rounds=1)
    with pytest.raises(RunError, match="expected plain and the same others"):
        measure_scaling("batch", lambda _: {"other": plain}, rounds=1)
    with pytest.raises(RunError, match="expected plain and the same others"):
        measure_scaling("batch", lambda size: {"plain": plain, str(size): plain}, rounds=1)
