"""What every protection costs: parts that add up, controls that show, and any module at all."""

import gc
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import commands
from torch import nn

import defenses
from secure_cnn import archive
from secure_cnn.archive.store.sequence import lock_folder
from secure_cnn.bench import Protection, combinations, protections
from secure_cnn.bench.memory import cuda_peak_bytes, peak_rows, resident_peak_bytes
from secure_cnn.bench.overhead import (
    OverheadSettings,
    on_this_machine,
    overhead,
    overhead_workload,
)
from secure_cnn.bench.protection import BackgroundSaver, SealedSaver, bytes_in
from secure_cnn.bench.rivals import RivalSaver, archive_rivals, rival_step
from secure_cnn.bench.step import Workload, synthetic
from secure_cnn.bench.timed_training import TimedTraining, TrainedSettings, measure_trained
from secure_cnn.bench.timing import (
    PARTS,
    Stopwatch,
    clock_marks,
    event_marks,
    marks_for,
    take_turns,
)
from secure_cnn.data import DataSpec, ImageData
from secure_cnn.engine import CrossEntropy
from secure_cnn.errors import RunError
from secure_cnn.models import build_model
from secure_cnn.pages import SHOWN_PARTS, render_bench
from secure_cnn.record import CONTROL, Measurements, Row, noise_checks

SPEC = DataSpec(shape=(1, 8, 8), classes=("a", "b"))
QUICK = OverheadSettings(batch_size=4, steps=2, rounds=2, memory=False)
THREAT = defenses.ThreatModel(norm="linf", eps=0.1)
REAL = clock_marks(time.perf_counter)


class Machine:
    """A clock that only work moves; there is one of it, whoever copies what holds it."""

    def __init__(self):
        self.now, self.log = 0.0, []

    def __deepcopy__(self, memo):
        return self

    def clock(self):
        return self.now

    def work(self, name, seconds):
        self.log.append(name)
        self.now += seconds


class Working:
    """An objective that takes so long, besides its forward pass."""

    per_example = True

    def __init__(self, machine, name, seconds):
        self.machine, self.name, self.seconds = machine, name, seconds

    def __call__(self, model, images, labels):
        self.machine.work(self.name, self.seconds)
        return CrossEntropy()(model, images, labels)


class WorkingNet(nn.Module):
    """A network whose every forward pass takes a second."""

    def __init__(self, machine):
        super().__init__()
        self.machine, self.head = machine, nn.Linear(64, 2)

    def forward(self, images):
        self.machine.work("forward", 1.0)
        return self.head(images.flatten(1))


class WorkingSaver:
    """Saves in 3 seconds, and is on the disk after 4 more."""

    def __init__(self, machine, folder):
        self.machine, self.folder = machine, folder

    def save(self, state):
        self.machine.work("save", 3.0)
        (self.folder / "file").write_bytes(b"0123456789")

    def wait(self):
        self.machine.work("wait", 4.0)

    def close(self):
        self.machine.log.append("close")


def images(count=16):
    """Random images, the same to train and to test on."""
    split = synthetic(SPEC, count)
    return ImageData(name="noise", train=split, test=split, spec=SPEC)


def training(variant, tmp_path, *, model=None, marks=REAL, samples=8):
    """A training of a small network, all images in each step."""
    load = Workload(
        case="c", model=model or build_model("compact", SPEC), split=synthetic(SPEC, samples)
    )
    return TimedTraining(load, variant, tmp_path / "saved", marks, batch_size=samples)


def told(measured):
    """Rows by variant and metric."""
    return {(row.variant, row.metric): row for row in measured.rows}


# --- the stopwatch


@settings(deadline=None, max_examples=60)
@given(
    tree=st.recursive(
        st.floats(0, 10), lambda inner: st.lists(st.tuples(st.sampled_from(PARTS), inner))
    )
)
def test_parts_add_up_to_the_whole_however_they_nest(tree):
    """Each part has its own seconds alone: as a recursive sum by hand finds them."""
    machine, expected = Machine(), {}
    watch = Stopwatch(clock_marks(machine.clock))

    def run(node, part):
        if isinstance(node, float):
            machine.work(part, node)
            expected[part] = expected.get(part, 0.0) + node
        else:
            for name, inner in node:
                with watch.part(name):
                    run(inner, name)

    with watch.part("other"):
        run(tree, "other")
    found = watch.take()
    assert sum(found.values()) == pytest.approx(machine.now)
    for part in PARTS:
        assert found.get(part, 0.0) == pytest.approx(expected.get(part, 0.0), abs=1e-9)
    assert watch.take() == {}


def test_time_between_two_turns_is_nobodys():
    """What happens while no part is under way is not counted."""
    machine = Machine()
    watch = Stopwatch(clock_marks(machine.clock))
    for _ in range(2):
        with watch.part("data"):
            machine.work("", 1.0)
        machine.work("", 100.0)
    assert watch.take() == {"data": 2.0}


def test_a_wrapped_method_is_a_part_and_only_of_that_object():
    """It gives what it gave, raises what it raised; another object of the class is untouched."""

    class Worker:
        def call(self, value, *, fail=False):
            machine.work("call", 2.0)
            if fail:
                raise KeyError(value)
            return value

    machine = Machine()
    watch, one, other = Stopwatch(clock_marks(machine.clock)), Worker(), Worker()
    watch.wrap(one, "call", "noise")
    assert (one.call(3), other.call(4)) == (3, 4)
    with pytest.raises(KeyError, match="5"):
        one.call(5, fail=True)
    assert watch.take() == {"noise": 4.0}
    with pytest.raises(AttributeError):
        watch.wrap(one, "missing", "noise")


class Event:
    """An event as CUDA's: it has a time only once the device has come to it."""

    reached, queued = 0, []

    def __init__(self):
        self.number = len(Event.queued)
        Event.queued.append(self)

    def synchronize(self):
        Event.reached = max(Event.reached, self.number + 1)

    def elapsed_time(self, end):
        assert end.number < Event.reached, "read before the device came to it"
        return 250.0 * (end.number - self.number)


def test_events_are_read_only_when_all_are_in_the_queue():
    """No part waits for the device; seconds, where events count milliseconds."""
    Event.reached, Event.queued = 0, []
    watch = Stopwatch(event_marks(Event))
    with watch.part("other"):
        with watch.part("forward"):
            pass
        assert Event.reached == 0
    assert watch.take() == {"other": 0.5, "forward": 0.25}


def test_the_clock_is_for_the_processor_and_events_for_cuda():
    """By the kind of device; nothing of CUDA is touched before the first mark."""
    assert marks_for(torch.device("cpu"), time.perf_counter).mark is time.perf_counter
    on_device = marks_for(torch.device("cuda"), time.perf_counter)
    assert on_device.mark is not time.perf_counter
    Event.reached, Event.queued = 0, []
    assert on_device.seconds(Event(), Event()) == 0.25


@pytest.mark.skipif(not torch.cuda.is_available(), reason="events are CUDA's: needs a GPU")
def test_a_training_on_a_gpu_is_timed_and_weighed(tmp_path):
    """The parts of a private step on the device, and its peak."""
    device = torch.device("cuda")
    found = overhead(
        build_model("compact", SPEC).to(device), images(), combinations({}), settings=QUICK
    )
    assert all(row.median > 0 for row in found.rows if row.metric == "time")
    assert cuda_peak_bytes(lambda: lambda: torch.zeros(1000, device=device), device) >= 4000


# --- which variants there are


def test_every_protection_is_there_alone_and_the_most_of_them_together():
    """In the names of the results; the last has all of them."""
    found = combinations({"pgd": CrossEntropy()})
    assert list(found) == [
        *("plain", "private", "pgd", "private+pgd", "average", "sealed", "sealed-background"),
        "private+pgd+average+sealed-background",
    ]
    last = found["private+pgd+average+sealed-background"]
    assert last.private
    assert last.average_decay is not None
    assert last.saver is BackgroundSaver
    assert list(combinations({}, private=False, average=False, sealed=False)) == ["plain"]


def test_an_objective_that_mixes_examples_is_not_made_private():
    """The most of them together is then without it."""
    free = defenses.FreeAdversarialTraining(THREAT)
    assert list(combinations({"free": free}, sealed=False, average=False)) == [
        *("plain", "private", "free"),
    ]


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_a_decay_out_of_range_is_refused(decay):
    """As `WeightAverage` would, but before anything is built."""
    with pytest.raises(RunError, match="average_decay: expected 0 up to 1"):
        Protection(objective=CrossEntropy(), private=False, average_decay=decay)


# --- the parts of a step


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("plain", {"data", "forward", "backward", "optimizer", "other"}),
        ("average", {"data", "forward", "backward", "optimizer", "averaging", "other"}),
        (
            "private",
            {"data", "forward", "backward", "clipping", "noise", "optimizer", "other"},
        ),
        ("sealed", {"saving", "data", "forward", "backward", "optimizer", "other"}),
        ("private+pgd+average+sealed-background", set(PARTS)),
    ],
)
def test_each_variant_has_its_parts(name, expected, tmp_path):
    """Exactly those of its protections, each above zero; with all protections all parts."""
    objective = defenses.AdversarialTraining(THREAT, "pgd", steps=1)
    made = training(combinations({"pgd": objective})[name], tmp_path)
    found = made.stretch(2)
    made.close()
    assert set(found) == expected
    assert all(seconds > 0 for seconds in found.values())


@pytest.mark.parametrize("objective", defenses.OBJECTIVES)
def test_every_objective_can_be_timed(objective, tmp_path):
    """A training pass is a forward pass; crafting is an attack, also where they alternate."""
    machine = Machine()
    made = defenses.adversarial_objective(objective, THREAT)
    variant = Protection(objective=made, private=False)
    run = training(variant, tmp_path, model=WorkingNet(machine), marks=clock_marks(machine.clock))
    run.stretch(1)
    machine.log.clear()
    found = run.stretch(1)
    passes = {"trades": 2, "mart": 2}.get(objective, 1)
    assert found["forward"] == passes
    # A pass of the training is never one of the attack: the others are all in evaluation mode.
    assert found["attack"] == machine.log.count("forward") - passes
    assert (found["attack"] > 0) == (objective != "free")


def test_a_slow_part_is_slow_in_its_own_name(tmp_path):
    """Controls: a second more in one seam is a second more in that part, and nowhere else."""
    machine = Machine()

    def found_with(owner_of, method, variant):
        made = training(variant, tmp_path, marks=clock_marks(machine.clock))
        owner = owner_of(made)
        call = getattr(owner, method)

        def slowed(*values, **named):
            machine.work(method, 1.0)
            return call(*values, **named)

        setattr(owner, method, slowed)
        # The stopwatch is put on top of the slowed method, as it is on top of a slow one.
        made._wrap_seams()
        return {part: s for part, s in made.stretch(1).items() if s}

    private = Protection(objective=CrossEntropy(), private=True)
    plain = Protection(objective=CrossEntropy(), private=False)
    clipped = "_add_clipped"
    assert found_with(lambda it: it._optimizer, "step", plain) == {"optimizer": 1.0}
    assert found_with(lambda it: it.private._clipped, clipped, private) == {"clipping": 1.0}
    assert found_with(lambda it: it.private._clipped, "noised_mean", private) == {"noise": 1.0}


def test_a_save_is_shared_out_to_its_steps(tmp_path):
    """One for each stretch, begun before its steps and waited for after them."""
    machine = Machine()
    objective = Working(machine, "step", 1.0)
    saver = partial(WorkingSaver, machine)
    made = training(
        Protection(objective=objective, private=False, saver=saver),
        tmp_path,
        marks=clock_marks(machine.clock),
    )
    assert made.stretch(3)["saving"] == 7.0
    assert machine.log == ["save", "step", "step", "step", "wait"]
    machine.log.clear()
    assert made.advance(save=False) == 1.0
    assert made.advance(save=True) == 4.0
    assert machine.log == ["step", "save", "step"]


def test_what_is_saved_is_what_a_resumed_training_needs(tmp_path):
    """Model, optimizer, average and privacy; a dropped training leaves its folder unlocked."""
    states = []

    class Listening(WorkingSaver):
        def save(self, state):
            states.append(state)

    variant = combinations({})["private+average+sealed-background"]
    listening = Protection(
        objective=variant.objective,
        private=True,
        average_decay=0.9,
        saver=partial(Listening, Machine()),
    )
    training(listening, tmp_path).stretch(1)
    assert set(states[0]) == {"model", "optimizer", "private", "average"}
    made, folder = training(variant, tmp_path / "sealed"), tmp_path / "sealed" / "saved"
    made.stretch(1)
    weights = sum(p.numel() * p.element_size() for p in made.model.parameters())
    # Weights and average; the first save comes before the optimizer has a momentum.
    assert bytes_in(folder) > 2 * weights
    with pytest.raises(archive.StorageError, match="is being written"):
        lock_folder(folder, now=datetime.now(UTC))
    del made
    gc.collect()
    lock_folder(folder, now=datetime.now(UTC)).release()


@pytest.mark.parametrize("name", ["safetensors", "torch.save"])
def test_a_rival_saves_the_same_tensors(name, tmp_path):
    """Those of the model and of the optimizer, in its own format."""
    here, skipped = archive_rivals([name])
    if skipped:
        pytest.skip(skipped[name])
    saver = partial(RivalSaver, here[name])
    made = training(Protection(objective=CrossEntropy(), private=False, saver=saver), tmp_path)
    made.stretch(1)
    made.stretch(1)
    weights = sum(p.numel() * p.element_size() for p in made.model.parameters())
    assert 2 * weights < bytes_in(tmp_path / "saved") < 2 * weights + 20_000


# --- the benchmark


def test_a_slowed_step_shows_and_plain_against_plain_does_not():
    """Controls: half as long again is 1.5; the same training once more is 1.00, and a quiet one."""
    machine = Machine()
    found = overhead(
        build_model("compact", SPEC),
        images(),
        {
            "plain": Protection(objective=Working(machine, "plain", 1.0), private=False),
            "slowed": Protection(objective=Working(machine, "slowed", 1.5), private=False),
        },
        settings=OverheadSettings(batch_size=4, steps=3, rounds=4, memory=False),
        clock=machine.clock,
    )
    rows = told(found)
    assert rows["slowed", "time_ratio"].median == rows["slowed", "time_ratio"].low == 1.5
    assert rows[CONTROL, "time_ratio"].median == rows[CONTROL, "time_ratio"].high == 1.0
    assert (rows["slowed", "time"].median, rows["slowed", "time"].n) == (1.5, 4)
    assert rows["slowed", "images_per_second"].median == pytest.approx(4 / 1.5)
    assert rows["slowed", "time_attack"].median == 1.5
    (check,) = noise_checks(found.rows)
    assert check.quiet
    assert check.within == ()
    # Two rounds of warmth and four that count, three steps each; plain twice.
    assert (machine.log.count("plain"), machine.log.count("slowed")) == (36, 18)


def test_turns_are_taken_in_an_order_drawn_anew():
    """Each once a round, warm-up rounds not counted; the same order for the same seed."""

    def log(seed):
        order = []
        stretches = {
            name: partial(lambda n: order.append(n) or {"other": 1.0}, name) for name in "abc"
        }
        found = take_turns(stretches, rounds=10, warmup=2, seed=seed)
        assert {len(own) for own in found.values()} == {10}
        return ["".join(order[i : i + 3]) for i in range(0, 36, 3)]

    assert all(sorted(turn) == list("abc") for turn in log(0))
    assert len(set(log(0))) > 2
    assert log(0) == log(0) != log(1)


class UsersOwn(nn.Module):
    """A module that we know nothing of, with a layer that mixes examples."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(True))
        self.head = nn.Linear(4, 2)

    def forward(self, images):
        return self.head(self.body(images).mean((2, 3)))


def test_a_module_of_the_users_own_is_measured_and_left_alone():
    """BatchNorm is replaced in private copies only; weights, statistics and mode stay."""
    model = UsersOwn().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    objective = defenses.AdversarialTraining(THREAT)
    variants = combinations({"n-fgsm": objective})
    found = overhead(model, images(), variants, settings=QUICK)
    rows = told(found)
    assert {variant for variant, _ in rows} == {*variants, CONTROL}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert isinstance(model.body[1], nn.BatchNorm2d)
    assert not model.training
    assert {row.case for row in found.rows} == {"UsersOwn, noise, batch 4, save every 2"}
    saving = {variant for variant, metric in rows if metric == "disk"}
    assert saving == {name for name in variants if "sealed" in name}
    for name in variants:
        parts = sum(row.median for (v, m), row in rows.items() if v == name and m[:5] == "time_")
        assert parts - rows[name, "time_ratio"].median == pytest.approx(
            rows[name, "time"].median, rel=1e-6
        )


def test_a_network_of_torchvision_is_measured():
    """With DP-SGD after its BatchNorm is replaced."""
    torchvision = pytest.importorskip("torchvision", reason="torchvision is no dependency")
    model = torchvision.models.mobilenet_v3_small(num_classes=2)
    spec = DataSpec(shape=(3, 32, 32), classes=("a", "b"))
    split = synthetic(spec, 4)
    data = ImageData(name="noise", train=split, test=split, spec=spec)
    # Its dropout is fine under privacy: it draws for each example.
    found = overhead(
        model,
        data,
        protections({}),
        settings=OverheadSettings(batch_size=4, steps=1, rounds=1, memory=False),
    )
    assert told(found)["private", "time_ratio"].median > 0


def test_rivals_take_turns_with_ours():
    """Their steps are timed as a whole and weighed too."""
    model, data = build_model("compact", SPEC), images()
    measure = OverheadSettings(batch_size=4, steps=1, rounds=1, memory=True)
    load = overhead_workload(model, data, measure)
    found = overhead(
        model,
        data,
        protections({}, private=False),
        settings=measure,
        rivals={"torchattacks-fgsm": partial(rival_step, load, "torchattacks-fgsm")},
    )
    rows = told(found)
    assert (
        rows["torchattacks-fgsm", "time"].median == rows["torchattacks-fgsm", "time_other"].median
    )
    assert rows["torchattacks-fgsm", "memory_ratio"].median > 0
    assert rows["plain", "memory_ratio"].median == 1


def test_where_it_was_measured_is_recorded():
    """Threads, cores and affinity; nothing that names a machine or its user."""
    hardware = on_this_machine([], nn.Linear(1, 1)).hardware
    assert hardware["threads"] == torch.get_num_threads()
    assert hardware["affinity"] is None or len(hardware["affinity"]) == hardware["cores"]


def test_what_cannot_be_measured_is_refused():
    """No plain training, a batch larger than the data, or nothing to count."""
    model, plain = build_model("compact", SPEC), protections({}, private=False)
    with pytest.raises(RunError, match="expected plain among them, got private"):
        overhead(model, images(), {"private": plain["plain"]}, settings=QUICK)
    with pytest.raises(RunError, match="batch_size: expected at most 16"):
        overhead(model, images(), plain, settings=OverheadSettings(batch_size=17))
    for name in ("batch_size", "steps", "rounds"):
        with pytest.raises(RunError, match=f"{name}: expected at least 1, got 0"):
            OverheadSettings(**{name: 0})


def test_peaks_are_exact_and_relative_to_plain():
    """Twice the tensors are twice the ratio, weights apart."""
    load = Workload(case="c", model=nn.Linear(1, 1, bias=False), split=synthetic(SPEC, 4))
    makers = {
        "plain": lambda: lambda: torch.zeros(10_001),
        "double": lambda: lambda: torch.zeros(20_001),
    }
    rows = {(row.variant, row.metric): row.median for row in peak_rows(load, makers)}
    assert rows["plain", "memory"] == 40_000 / 2**20
    assert rows["double", "memory_ratio"] == 2


def test_the_resident_peak_sees_what_was_freed_again():
    """64 MiB that lived for a moment are in the peak; a control without them is lower.

    Also where the heap holds as much that is free and resident, from work before.
    """
    largest = torch.ones(31 * 2**18)  # once freed, blocks up to its size come from the heap
    del largest
    before = [torch.ones(2**20) for _ in range(64)]
    pin = torch.ones(2**10)
    del before
    small, large = (
        resident_peak_bytes(lambda n=n: lambda: torch.ones(n).sum()) for n in (1000, 2**24)
    )
    if small is None or large is None:
        pytest.skip("this system does not tell its resident size")
    assert large - small > 32 * 2**20
    assert pin.sum() == 2**10


# --- the noise of the machine


def ratio(variant, low, median, high):
    """A ratio against plain."""
    return Row(
        case="c",
        variant=variant,
        metric="time_ratio",
        low=low,
        median=median,
        high=high,
        unit="x",
        n=9,
    )


@settings(deadline=None, max_examples=100)
@given(
    control=st.tuples(*[st.floats(0.5, 2)] * 3).map(sorted),
    other=st.tuples(*[st.floats(0.5, 2)] * 3).map(sorted),
)
def test_the_noise_check_is_an_interval_around_one(control, other):
    """Quiet if 1 lies in it; a variant is within the noise if a point is in both intervals."""
    (check,) = noise_checks([ratio(CONTROL, *control), ratio("it", *other)])
    assert check.quiet == (control[0] <= 1 <= control[2])
    low, high = min(control[0], 1), max(control[2], 1)
    assert (check.within == ("it",)) == (max(low, other[0]) <= min(high, other[2]))
    assert ("too noisy" in check.verdict) != check.quiet
    assert ("it" in check.within) == ("Within the noise: it" in check.verdict)


def test_without_a_control_nothing_is_said():
    """A benchmark that did not time plain twice has no check."""
    assert noise_checks([ratio("plain", 1, 1, 1)]) == ()


# --- what the cost buys


def race(seconds):
    """A plain training of a second a step, one of so many, and one more like plain."""
    machine = Machine()
    variants = {
        name: Protection(objective=Working(machine, name, each), private=False)
        for name, each in (("plain", 1.0), ("slow", seconds), ("last", 1.0))
    }
    rows = measure_trained(
        build_model("compact", SPEC),
        images(),
        variants,
        TrainedSettings(epochs=2, batch_size=4),
        case="c",
        clock=machine.clock,
    )
    return machine, {(row.variant, row.metric): row.median for row in rows}


@pytest.mark.parametrize(("seconds", "steps"), [(2.0, 8), (1.0, 8), (0.5, 16)])
def test_a_training_goes_on_until_both_ends_are_reached(seconds, steps):
    """Plain takes 8 steps in 8 seconds; the other as many, and as long."""
    machine, rows = race(seconds)
    assert machine.log.count("plain") == 8
    assert machine.log.count("slow") == steps
    assert machine.log.count("last") == 8
    assert (rows["plain", "training_time"], rows["slow", "training_time"]) == (8.0, 8 * seconds)
    for name in ("accuracy", "macro_recall"):
        assert rows["plain", f"{name}_same_examples"] == rows["plain", f"{name}_same_time"]
        assert 0 <= rows["slow", f"{name}_same_time"] <= 1


def test_a_private_training_is_judged_with_its_epsilon_and_its_robustness():
    """Epsilon grows with the steps; robust accuracy is at most accuracy; averages are used."""
    variants = combinations({}, sealed=False)
    rows = measure_trained(
        build_model("compact", SPEC),
        images(),
        {name: variants[name] for name in ("plain", "private", "average")},
        TrainedSettings(epochs=2, batch_size=4, threat=THREAT, robust_samples=8),
        case="c",
    )
    found = {(row.variant, row.metric): row for row in rows}
    assert found["private", "epsilon_same_examples"].median > 0
    assert ("plain", "epsilon_same_time") not in found
    for name in ("plain", "private", "average"):
        share = found[name, "robust_accuracy_same_time"]
        assert share.n == 8
        assert share.low <= share.median <= share.high
    with pytest.raises(RunError, match="epochs: expected at least 1"):
        TrainedSettings(epochs=0)


# --- the page and the command


def measured():
    """A small benchmark of everything the page shows, with an unfriendly name."""
    machine = Machine()
    variants = {
        "plain": Protection(objective=Working(machine, "plain", 1.0), private=False),
        "<b>&": Protection(objective=Working(machine, "slow", 1.5), private=False),
    }
    found = overhead(
        build_model("compact", SPEC), images(), variants, settings=QUICK, clock=machine.clock
    )
    trained = measure_trained(
        build_model("compact", SPEC),
        images(),
        variants,
        TrainedSettings(epochs=1, batch_size=8),
        case=found.rows[0].case,
        clock=machine.clock,
    )
    return Measurements(
        created=found.created,
        hardware=found.hardware,
        versions=found.versions,
        rows=(*found.rows, *trained),
    )


def test_the_page_shows_every_variant_and_loads_nothing():
    """Figures with their numbers beside them; names are text; no script, no address."""
    page = render_bench(measured())
    assert page.count("<svg") == 2
    assert "&lt;b&gt;&amp;" in page
    assert "<b>&" not in page
    assert "<script" not in page
    # The only addresses are the names of SVG's own language.
    assert {a for a in re.findall(r"https?://[^\s\"'<]+", page) if "www.w3.org" not in a} == set()
    assert "1 lies in it" in page
    for heading in ("÷ plain", "images/s", "macro recall", "Conditions", "affinity"):
        assert heading in page
    assert render_bench(measured()).count("1.50") == page.count("1.50") > 0


def test_every_part_has_its_colour():
    """The page draws all parts that are measured, in their order, and no two alike."""
    assert tuple(SHOWN_PARTS) == PARTS
    assert len(set(SHOWN_PARTS.values())) == len(PARTS)


def test_a_page_without_control_says_so():
    """The reader must not take silence for quiet."""
    empty = Measurements(created="2026-01-01", hardware={}, versions={})
    assert "how much of this is noise is not known" in render_bench(empty)


def test_the_command_writes_table_json_and_page(tmp_path):
    """All in one run on real images; a rival that is missing is named with the reason."""
    done = commands.overhead(
        *("--batch", "8", "--rounds", "1", "--save-every", "1", "--no-memory"),
        *("--rival", "safetensors", "--rival", "opacus-hooks", "--scaling", "steps"),
        *("--train", "--epochs", "1", "--robust-samples", "4"),
        *("--no-private", "--no-sealed", "--objective", "fgsm"),
        *("--json", str(tmp_path / "it.json"), "--html", str(tmp_path / "it.html")),
    )
    content = json.loads(Path(tmp_path, "it.json").read_text())
    assert content["schema"] == 1
    variants = {row["variant"] for row in content["rows"]}
    assert variants >= {"plain", CONTROL, "fgsm", "saved-safetensors", "opacus-hooks", "average"}
    assert any(row["metric"] == "exponent" for row in content["rows"])
    page = Path(tmp_path, "it.html").read_text(encoding="utf-8")
    assert "compact, digits, batch 8" in page
    assert "plain against plain gave" in done.output
    assert "standard error" in done.stdout


def plain_and(*options):
    """The command on plain training and what the options add to it."""
    return commands.overhead(
        *("--batch", "4", "--rounds", "1", "--save-every", "1", "--no-memory"),
        *("--no-private", "--no-average", "--no-sealed", *options),
    )


def test_the_version_of_who_saves_is_recorded(monkeypatch, tmp_path):
    """Of a rival that is none of our own libraries, as of those."""
    alike = archive_rivals(["safetensors"])[0]["safetensors"]
    here = {"age": replace(alike, versions={"age": "v1.2.3"})}
    monkeypatch.setattr("secure_cnn.cli.bench_overhead.archive_rivals", lambda names: (here, {}))
    plain_and("--rival", "age", "--json", str(tmp_path / "m.json"))
    assert Measurements.read(tmp_path / "m.json").versions["age"] == "v1.2.3"


def test_a_rival_that_cannot_run_is_skipped_with_the_reason(monkeypatch):
    """Whatever it raises; all others are measured."""

    def broken(load, name):
        raise ImportError("no module named opacus")

    monkeypatch.setattr("secure_cnn.cli.bench_overhead.rival_step", broken)
    done = plain_and("--rival", "opacus-hooks")
    assert "skipped opacus-hooks: ImportError: no module named opacus" in done.stderr
    assert "opacus" not in done.stdout
    assert "n-fgsm" in done.stdout


@pytest.mark.parametrize("asked", [None, "0"])
def test_the_profiler_keeps_quiet_unless_asked(asked):
    """Its lines at each start and stop are no message of ours; control: the variable brings them.

    In a process of its own, since the profiler reads the variable once.
    """
    environment = {name: text for name, text in os.environ.items() if name != "KINETO_LOG_LEVEL"}
    command = "bench overhead --batch 4 --rounds 1 --save-every 1 --no-private --no-average"
    done = subprocess.run(
        [
            *(sys.executable, "-c", "from secure_cnn.cli import main; main()"),
            *(*command.split(), "--no-sealed"),
        ],
        env=environment | ({"KINETO_LOG_LEVEL": asked} if asked else {}),
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    assert "MiB" in done.stdout
    assert bool(re.search(r"^(USDT|STAGE|ERROR|INFO):", done.stderr, re.M)) == bool(asked)


def test_savers_write_what_they_say(tmp_path):
    """Sealed in the loop is on the disk at once; beside the loop after it was waited for."""
    state = {"weight": torch.ones(100)}
    for number, make in enumerate((SealedSaver, BackgroundSaver)):
        folder = tmp_path / str(number)
        folder.mkdir()
        saver = make(folder)
        for _ in range(3):
            saver.save(state)
        saver.wait()
        assert bytes_in(folder) > 400
        saver.close()
