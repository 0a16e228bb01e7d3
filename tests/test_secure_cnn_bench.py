"""Fair timing with a clock of our own, and that every variant's step does the same work."""

import copy
import json
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import defenses
from secure_cnn.bench import Protection, protections
from secure_cnn.bench.memory import measure_memory, peak_bytes
from secure_cnn.bench.rivals import RIVALS, rival_step
from secure_cnn.bench.step import (
    CopiedCrossEntropy,
    Workload,
    copies_against,
    copies_makers,
    measure_steps,
    stepper,
    steppers,
    synthetic,
)
from secure_cnn.bench.timing import cost_rows, document, estimate, interleave, ratios
from secure_cnn.cli.bench import _objective
from secure_cnn.data import DataSpec
from secure_cnn.engine import CrossEntropy
from secure_cnn.errors import RunError
from secure_cnn.models import build_model
from secure_cnn.record import Measurements

SPEC = DataSpec(shape=(1, 8, 8), classes=("a", "b"))


class Machine:
    """A clock that only work moves; each piece of work makes the machine slower."""

    def __init__(self, slowing=1.0):
        self.now, self.speed, self.slowing, self.log = 0.0, 1.0, slowing, []

    def clock(self):
        return self.now

    def work(self, name, seconds):
        def call():
            self.log.append(name)
            self.now += seconds * self.speed
            self.speed *= self.slowing

        return call


def test_each_call_is_timed_alone():
    """Its own seconds, as many as counted rounds; warm-up rounds are run and not counted."""
    machine = Machine()
    cases = {"a": machine.work("a", 1.0), "b": machine.work("b", 3.0)}
    seconds = interleave(cases, rounds=4, warmup=2, clock=machine.clock)
    assert seconds == {"a": [1.0] * 4, "b": [3.0] * 4}
    assert (machine.log.count("a"), machine.log.count("b")) == (6, 6)


def test_cases_take_turns_in_an_order_drawn_anew():
    """Each once a round; the order differs between rounds, and is the same for the same seed."""

    def log(seed):
        machine = Machine()
        cases = {name: machine.work(name, 1.0) for name in "abc"}
        interleave(cases, rounds=20, warmup=0, clock=machine.clock, seed=seed)
        return ["".join(machine.log[i : i + 3]) for i in range(0, 60, 3)]

    rounds = log(0)
    assert all(sorted(order) == list("abc") for order in rounds)
    assert len(set(rounds)) > 3
    assert rounds == log(0) != log(1)


def test_drift_meets_all_alike():
    """A machine that slows down threefold leaves the ratio right; timed in blocks it is off."""
    machine = Machine(slowing=3 ** (1 / 120))
    cases = {"plain": machine.work("plain", 1.0), "private": machine.work("private", 2.0)}
    seconds = interleave(cases, rounds=60, warmup=0, clock=machine.clock)
    found = estimate(ratios(seconds["private"], seconds["plain"]))
    assert found.median == pytest.approx(2.0, rel=0.01)
    machine, blocks = Machine(slowing=3 ** (1 / 120)), {}
    for name, cost in (("plain", 1.0), ("private", 2.0)):
        work = machine.work(name, cost)
        blocks |= interleave({name: work}, rounds=60, warmup=0, clock=machine.clock)
    biased = estimate(ratios(blocks["private"], blocks["plain"]))
    assert biased.median > 3  # control: timing one case after the other


@pytest.mark.parametrize("rounds", [0, -1])
def test_no_rounds_are_refused(rounds):
    """There would be nothing to report; nothing is run."""
    machine = Machine()
    with pytest.raises(RunError, match="rounds: expected at least 1"):
        interleave({"a": machine.work("a", 1.0)}, rounds=rounds, warmup=2, clock=machine.clock)
    assert machine.log == []


def test_ratios_are_round_by_round():
    """Not of sums or medians; as many of one as of the other."""
    assert ratios([2.0, 9.0], [1.0, 3.0]) == [2.0, 3.0]
    with pytest.raises(ValueError, match="argument 2"):
        ratios([1.0], [1.0, 2.0])


@settings(deadline=None, derandomize=True, max_examples=50)
@given(values=st.lists(st.floats(0.001, 1000), min_size=1, max_size=40))
def test_an_estimate_is_a_median_within_its_interval(values):
    """The middle value, inside an interval inside the data; the same each time."""
    found = estimate(values)
    ordered = sorted(values)
    middle = (ordered[(len(values) - 1) // 2] + ordered[len(values) // 2]) / 2
    assert found.median == pytest.approx(middle)
    slack = 1e-9 * max(values)
    assert min(values) - slack <= found.low <= found.median + slack
    assert found.median - slack <= found.high <= max(values) + slack
    assert found.n == len(values)
    assert estimate(values) == found


def test_the_interval_covers_the_true_median_as_often_as_it_says():
    """About 95 of 100 times for log-normal times; half of its width does not."""
    draw = torch.Generator().manual_seed(0)
    covered = narrow = 0
    for _ in range(200):
        found = estimate(torch.randn(25, generator=draw).mul(0.2).exp().tolist())
        covered += found.low <= 1.0 <= found.high
        half = (found.high - found.low) / 4
        narrow += found.median - half <= 1.0 <= found.median + half
    assert 180 <= covered <= 200
    assert narrow < 170  # control


def test_every_combination_has_its_name():
    """Plain, private, each objective, and each with privacy, in the names of the results."""
    names = list(protections({"pgd": CrossEntropy(), "n-fgsm": CrossEntropy()}))
    assert names == ["plain", "private", "pgd", "private+pgd", "n-fgsm", "private+n-fgsm"]
    assert list(protections({"pgd": CrossEntropy()}, private=False)) == ["plain", "pgd"]
    for name, protection in protections({"pgd": CrossEntropy()}).items():
        assert protection.private == name.startswith("private")


class Recorded:
    """An objective that writes down what it is given."""

    per_example = True

    def __init__(self, layout):
        self.seen, self.layout = [], layout

    def __call__(self, model, images, labels):
        layout_kept = images.is_contiguous(memory_format=self.layout)
        told = tuple(sorted(labels.tolist()))
        self.seen.append((len(images), told, layout_kept, model.training))
        return CrossEntropy()(model, images, labels)


def workload(**changes):
    """A network on eight random images."""
    load = {"case": "compact", "model": build_model("compact", SPEC), "split": synthetic(SPEC, 8)}
    return Workload(**(load | changes))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_every_variant_does_the_same_work(layout):
    """Plain and private see all images in each step, in the same layout, in training mode."""
    load = workload(memory_format=layout)
    before = copy.deepcopy(load.model.state_dict())
    plain, private = Recorded(layout), Recorded(layout)
    variants = {
        "plain": Protection(objective=plain, private=False),
        "private": Protection(objective=private, private=True),
    }
    measure_steps(load.case, steppers(load, variants), rounds=3)
    assert plain.seen == private.seen
    assert len(plain.seen) == 5
    labels = sorted(load.split.labels.tolist())
    assert set(plain.seen) == {(8, tuple(labels), True, True)}
    # Only copies are trained, and each its own.
    assert all(torch.equal(v, before[k]) for k, v in load.model.state_dict().items())
    assert load.model.training


def test_plain_against_plain_is_one():
    """Control: the same step under another name costs exactly the same on an even clock."""
    clock = iter(range(10_000))
    plain = Protection(objective=CrossEntropy(), private=False)
    steps = steppers(workload(), {"plain": plain, "again": plain})
    rows = measure_steps("compact", steps, rounds=3, clock=lambda: next(clock))
    told = {(row.variant, row.metric): row for row in rows}
    assert (told["again", "time_ratio"].median, told["again", "time_ratio"].n) == (1.0, 3)
    assert told["again", "time_ratio"].low == told["again", "time_ratio"].high == 1.0
    assert told["again", "time"].median == told["plain", "time"].median == 1


def test_attacks_are_steps_too():
    """Adversarial objectives are timed with and without privacy."""
    threat = defenses.ThreatModel(norm="linf", eps=0.1)
    variants = protections({"n-fgsm": defenses.AdversarialTraining(threat)})
    rows = measure_steps("compact", steppers(workload(), variants), rounds=1)
    assert {row.variant for row in rows} == set(variants)
    assert all(row.case == "compact" and row.median > 0 for row in rows)


def test_rows_hold_the_time_and_the_ratio():
    """Ratios against plain round by round, with units and counts."""
    rows = cost_rows("net", {"plain": [1.0, 2.0, 4.0], "private": [3.0, 6.0, 12.0]})
    told = {(row.variant, row.metric): row for row in rows}
    assert told["private", "time_ratio"].median == told["private", "time_ratio"].low == 3.0
    assert (told["private", "time"].median, told["private", "time"].unit) == (6.0, "s")
    assert {row.unit for row in rows if row.metric == "time_ratio"} == {"x"}
    assert {row.n for row in rows} == {3}


def test_copies_are_held_against_as_many_plain_steps():
    """Round by round, and only what is named; one plain step is no part of it."""
    seconds = {"plain": [1.0] * 3, "k": [3.0, 8.0, 20.0], "steps": [2.0, 4.0, 8.0]}
    rows = cost_rows("net", seconds, copies={"k": "steps"})
    (found,) = (row for row in rows if row.metric == "copies_ratio")
    assert (found.case, found.variant, found.unit, found.n) == ("net", "k", "x", 3)
    assert found.median == 2.0  # of 1.5, 2 and 2.5
    assert not any(row.metric == "copies_ratio" for row in cost_rows("net", seconds))


class Seen(nn.Module):
    """A model that writes down each batch it is given."""

    def __init__(self, model):
        super().__init__()
        self.model, self.seen = model, []

    def __deepcopy__(self, memo):
        copied = Seen(copy.deepcopy(self.model, memo))
        copied.seen = self.seen
        return copied

    def forward(self, images):
        self.seen.append(images)
        return self.model(images)


def test_a_step_on_copies_and_as_many_plain_steps_see_the_same():
    """Each image K times: in one pass, in the layout of the others, or in K passes."""
    spec = DataSpec(shape=(3, 8, 8), classes=("a", "b"))
    model = Seen(build_model("compact", spec))
    load = workload(model=model, split=synthetic(spec, 8), memory_format=torch.channels_last)
    images, _ = load.split.batch(torch.arange(8))
    ((with_copies, plain),) = copies_against(3).items()
    makers = copies_makers(load, 3)
    assert list(makers) == [with_copies, plain] == ["private-3-copies", "plain-3-steps"]
    for name, rows in ((with_copies, [24]), (plain, [8, 8, 8])):
        model.seen.clear()
        step = makers[name]()
        model.seen.clear()  # attaching a model looks at it
        step()
        assert [len(batch) for batch in model.seen] == rows
        assert all(b.is_contiguous(memory_format=torch.channels_last) for b in model.seen)
        every = torch.cat(model.seen).flatten(1)
        assert (every[:, None] == images.flatten(1)).all(-1).sum(0).tolist() == [3] * 8


def test_copies_of_an_example_stay_in_its_row():
    """Row i is the loss of example i, K times; of unequal examples no two rows agree."""
    split = synthetic(SPEC, 5)
    images, labels = split.batch(torch.arange(5))
    model = build_model("compact", SPEC)
    losses = CopiedCrossEntropy(copies=3)(model, images, labels)
    once = CrossEntropy()(model, images, labels)
    torch.testing.assert_close(losses, once[:, None].expand(5, 3))
    assert len(set(once.tolist())) == 5


@pytest.mark.parametrize("copies", [1, 0, -4])
def test_one_copy_is_no_copy(copies):
    """It would time the private step once more under another name."""
    with pytest.raises(
        RunError, match=f"copies: expected at least 2 of each example, got {copies}"
    ):
        copies_makers(workload(), copies)


def test_a_document_is_the_published_json(tmp_path):
    """When, where and with what, and rows of the one shape; read back equal."""
    made = document(cost_rows("net", {"plain": [1.0], "private": [2.0]}))
    made.write(tmp_path / "rows.json")
    content = json.loads((tmp_path / "rows.json").read_text())
    assert set(content) >= {"schema", "created", "hardware", "versions", "rows"}
    assert set(content["rows"][0]) == {
        *("case", "variant", "metric", "median", "low", "high", "unit", "n"),
    }
    assert Measurements.read(tmp_path / "rows.json") == made


def test_the_images_are_the_same_each_time():
    """Random in content, never from run to run; a subset is the first of them."""
    first, second = synthetic(SPEC, 6), synthetic(SPEC, 6)
    assert torch.equal(first.images, second.images)
    assert all(not torch.equal(a, b) for a, b in pairwise(first.images))
    assert torch.equal(first.first(2).images, first.images[:2])
    assert len(first.first(100)) == 6


def test_peak_memory_counts_what_is_alive_at_once():
    """A step that frees one tensor before it makes the next peaks at one; a control at two."""
    size = 4 * 10_000

    def one_after_the_other() -> None:
        first = torch.zeros(10_000)
        del first
        torch.zeros(10_000)

    def together() -> None:
        first = torch.zeros(10_000)
        second = torch.zeros(10_000)
        assert len(first) == len(second)

    assert peak_bytes(lambda: one_after_the_other) == size
    assert peak_bytes(lambda: together) == 2 * size


def test_peak_memory_counts_what_a_variant_holds_and_what_it_leaves():
    """A buffer held from the start counts; a gradient left to the next step counts once."""
    size = 4 * 10_000

    def holding() -> Callable[[], None]:
        buffer = torch.zeros(10_000)
        return partial(torch.relu_, buffer)

    def leaving() -> Callable[[], None]:
        held: dict[str, torch.Tensor] = {}

        def step() -> None:
            held.clear()
            held["gradient"] = torch.zeros(10_000)

        return step

    assert peak_bytes(holding) == size
    assert peak_bytes(leaving) == size


def test_a_private_step_takes_little_more_memory_than_a_plain_one():
    """The tuner's cap holds: kept gradients take no more than what they let go."""
    load = workload(memory_format=torch.channels_last)
    makers = {name: partial(stepper, load, p) for name, p in protections({}).items()}
    rows = measure_memory(load, makers)
    found = {(r.variant, r.metric): r.median for r in rows}
    assert found["private", "memory_ratio"] < 1.2
    # Below there is no bound on the ratio: what oneDNN takes as scratch for a plain convolution's
    # gradient differs by processor, from nothing to twice all the rest. The clipped sum is seen.
    weights = sum(p.numel() * p.element_size() for p in load.model.parameters())
    assert found["private", "memory"] * 2**20 > weights


@pytest.mark.parametrize("rival", RIVALS)
def test_every_rival_takes_a_step_on_the_same_images(rival: str):
    """Each of Opacus' modes runs on our networks, whose activations are in place."""
    rival_step(workload(memory_format=torch.channels_last), rival)()


@pytest.mark.parametrize(("name", "precision"), [("pgd", "float32"), ("pgd-bfloat16", "bfloat16")])
def test_the_name_of_an_objective_says_its_precision(name, precision):
    """Of the attack's convolutions; the method is the same."""
    said = _objective(name, defenses.ThreatModel(norm="linf", eps=0.1)).settings
    assert (said["method"], said["precision"]) == ("pgd", precision)
