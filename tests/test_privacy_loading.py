"""Physical batches that workers read ahead: the same ones, and no guarantee is lost."""

import os
import signal
import subprocess
import sys
import textwrap
from collections import namedtuple
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from support.reading_workers import living_workers, remember
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    WeightedRandomSampler,
    default_collate,
    get_worker_info,
)

from privacy import (
    DPPlan,
    Ledger,
    PhysicalBatches,
    PlanError,
    PrivateTraining,
    SecureGenerator,
    StepError,
    attach,
)
from privacy.audit import AuditSettings, audit
from privacy.loading import Loader, reading_of
from privacy.sampling import PhysicalBatch, cut, read

KEY = bytes(range(32))
SAMPLES = 24
PLAN = DPPlan(samples=SAMPLES, batch_size=8, epochs=4, noise_multiplier=1.0, delta=1e-2)

# A process that is forked while torch computes in threads of its own.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


class Numbered:
    """Every image is made of its index; what is special about a data set is added by subclasses."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Any:
        return torch.full((3,), float(index)), index


class Whole(Numbered):
    """Read by indices, in a worker too."""

    batch_by_indices = True

    def __getitem__(self, index: int) -> Any:
        raise AssertionError("read one at a time")

    def batch(self, indices: torch.Tensor) -> Any:
        return indices.float()[:, None].expand(-1, 3), indices


def attached(data: Any, plan: DPPlan = PLAN, **settings: Any) -> PrivateTraining:
    model = nn.Linear(3, 2)
    settings = {"physical_batches": PhysicalBatches(size=5, multiple=5), **settings}
    return attach(plan, model, torch.optim.SGD(model.parameters(), lr=0.1), data, **settings)


def step(private: PrivateTraining, batch: Any) -> bool:
    return private.step(private.model(batch[0]).sum(1))


@pytest.fixture(autouse=True)
def own_processes() -> None:
    """A worker that an earlier test left to the garbage collector is not this one's."""
    remember()


def drawn() -> list[PhysicalBatch]:
    """Physical batches of some samples, an empty one among them."""
    generator = torch.Generator().manual_seed(0)
    samples = [torch.rand(SAMPLES, generator=generator).lt(0.4).nonzero()[:, 0] for _ in range(6)]
    samples[2] = samples[2][:0]
    batches = PhysicalBatches(size=5, multiple=5)
    return [part for sample in samples for part in cut(sample, batches)]


@pytest.mark.parametrize("data", [Numbered(), Whole()])
@pytest.mark.parametrize(("count", "prefetch"), [(1, 1), (2, 4)])
def test_workers_read_what_would_be_read_without_them(data: Any, count: int, prefetch: int) -> None:
    """The same batches in the same order, empty samples too, and no process is left."""
    reading = reading_of(data, batch_size=8, workers=count, prefetch=prefetch)
    batches = drawn()
    for (told, found), batch in zip(
        Loader(reading, iter(batches), pin=False), batches, strict=True
    ):
        assert told is batch
        expected = read(data, batch)
        assert type(found) is type(expected) is tuple
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)
            assert one.dtype == other.dtype
    assert living_workers() == []


def test_a_training_with_workers_takes_the_plans_steps_and_spends_its_epsilon() -> None:
    """Rows are the examples that were drawn here, by the training's own generator."""
    private = attached(Numbered(), workers=2)
    private._generator = SecureGenerator(KEY)
    for images, labels in private.batches:
        rows = private._pending.indices  # type: ignore[union-attr]
        assert labels[: len(rows)].tolist() == rows.tolist()
        assert images[: len(rows), 0].tolist() == rows.tolist()
        assert not images[len(rows) :].any()
        step(private, (images, labels))
    assert private.steps == PLAN.steps
    assert private.spent() == PLAN.epsilon()
    assert living_workers() == []


def test_what_was_read_ahead_is_neither_charged_nor_used_again() -> None:
    """Batches that wait for an iteration that was left are never given by the next one."""
    private = attached(Numbered(), workers=2, prefetch=4)
    private._generator = SecureGenerator(KEY)
    first = [next(private.batches)[1] for _ in range(1)]
    assert private.steps == 0
    twin = SecureGenerator(KEY)
    ahead = list(private._iteration.loader._given)  # type: ignore[union-attr]
    taken = twin._take(0), private._generator._take(0)
    assert taken[1] > taken[0], "samples were drawn ahead"
    private._generator = SecureGenerator(bytes(32))
    seen = []
    for batch in private.batches:
        seen.append(private._pending)
        step(private, batch)
    assert private.steps == PLAN.steps
    assert not any(batch is old for batch in seen for old in ahead)
    assert len(first) == 1


@pytest.mark.parametrize("how", ["detach", "a state", "another iteration", "the end"])
def test_workers_end_with_what_they_read_for(how: str) -> None:
    """None waits for batches that nobody will take; the old iteration says why it ended."""
    private = attached(Numbered(), workers=2)
    state, batches = private.state_dict(), private.batches
    step(private, next(batches))
    assert len(living_workers()) == 2
    if how == "detach":
        private.detach()
    elif how == "a state":
        private.load_state_dict(state)
    elif how == "another iteration":
        old = {worker.pid for worker in living_workers()}
        newer = private.batches
        step(private, next(newer))
        assert not old & {worker.pid for worker in living_workers()}
        with pytest.raises(StepError, match=r"^another iteration"):
            next(batches)
        step(private, next(newer))
        private.detach()
    else:
        for batch in batches:
            step(private, batch)
    assert living_workers() == []
    if how in ("detach", "a state"):
        with pytest.raises(StepError):
            next(batches)


class Damaged(Numbered):
    """Has an example that cannot be read."""

    broken = True

    def __getitem__(self, index: int) -> Any:
        if index == 7 and self.broken:
            raise OSError("img_7.png: truncated")
        return super().__getitem__(index)


@pytest.mark.parametrize("count", [0, 2])
def test_an_example_that_cannot_be_read_is_named(count: int) -> None:
    """In the same words, whoever read it; the iteration ends, and a new one goes on."""
    private = attached(Damaged(), workers=count)
    batches = private.batches
    with pytest.raises(PlanError) as told:
        assert all(step(private, batch) in (False, True) for batch in batches)
    assert str(told.value) == (
        "dataset: its example 7 could not be read: OSError: img_7.png: truncated"
    )
    assert "img_7.png" in str(told.value.__cause__)
    assert living_workers() == []
    with pytest.raises(StepError, match=r"^an error broke this iteration"):
        next(batches)
    before = private.steps
    private._reading.dataset.broken = False  # type: ignore[attr-defined]
    for batch in private.batches:
        step(private, batch)
    assert private.steps == PLAN.steps > before


class Dies(Numbered):
    """Its worker is killed in the middle of an example, as by a system without memory."""

    def __getitem__(self, index: int) -> Any:
        if get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


class Leaves(Numbered):
    """Leaves its process."""

    def __getitem__(self, index: int) -> Any:
        if get_worker_info() is not None:
            raise SystemExit
        return super().__getitem__(index)


class Hangs(Numbered):
    """Never answers."""

    def __getitem__(self, index: int) -> Any:
        if get_worker_info() is not None:
            signal.pause()
        return super().__getitem__(index)


@pytest.mark.parametrize("data", [Dies(), Leaves()])
def test_a_worker_that_ends_is_told_and_costs_nothing(data: Any) -> None:
    private = attached(data, workers=1)
    with pytest.raises(StepError, match=r"^workers: one that reads the data set ended"):
        next(private.batches)
    assert private.steps == 0
    assert living_workers() == []


@pytest.mark.slow
def test_a_worker_that_hangs_is_waited_for_as_long_as_the_loader_says() -> None:
    patience = 0.2  # seconds; it hangs for ever
    loader = DataLoader(Hangs(), batch_size=8, num_workers=1, timeout=patience)  # type: ignore[arg-type]
    private = attached(loader)
    with pytest.raises(StepError, match=r"timed out after 0\.2 seconds"):
        next(private.batches)
    assert living_workers() == []


class Curious(Numbered):
    """Looks at what a worker has of its training's secrets."""

    def __init__(self) -> None:
        self.private: Any = None

    def __getitem__(self, index: int) -> Any:
        if get_worker_info() is None:
            return torch.zeros(4), index
        words = self.private._generator._stream(0, 4, torch.empty(8, dtype=torch.int64))
        return words.view(torch.float64), int(self.private.ledger._file.locked)


@pytest.mark.secret
def test_a_worker_has_neither_the_key_nor_the_ledger(tmp_path: Path) -> None:
    """Whatever it looks for: the words that it finds are of another key.

    Four words of two keys are alike by chance with a probability of 2^-256.
    """
    data = Curious()
    model = nn.Linear(4, 2)
    plan = DPPlan(samples=SAMPLES, batch_size=SAMPLES, epochs=2, noise_multiplier=1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with_file = Ledger.open(tmp_path / "spent.jsonl")
    private = attach(plan, model, optimizer, data, ledger=with_file, workers=1)
    data.private = private
    words, locked = next(private.batches)
    own = private._generator._stream(0, 4, torch.empty(8, dtype=torch.int64)).view(torch.float64)
    assert with_file._file is not None
    assert with_file._file.locked
    assert not locked.any()
    assert not any(torch.equal(row.view(torch.int64), own.view(torch.int64)) for row in words)
    private.detach()


Pair = namedtuple("Pair", ["image", "label"])


class Typed(NamedTuple):
    image: torch.Tensor
    label: int


class NamedPairs(Numbered):
    kind: Any = Pair

    def __getitem__(self, index: int) -> Any:
        return self.kind(torch.full((3,), float(index)), index)


class TypedPairs(NamedPairs):
    kind = Typed


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("data", [NamedPairs(), TypedPairs()])
def test_named_tuples_stay_named_tuples(data: Any, count: int) -> None:
    """In samples, in empty ones, and in every physical batch."""
    private = attached(data, workers=count)
    generator = private._generator
    generator.bernoulli = lambda n, p: torch.arange(n) < 7 * (private.steps % 2)  # type: ignore[method-assign]
    for batch in private.batches:
        assert type(batch) is data.kind
        assert batch.image.shape == (5, 3)
        private.step(private.model(batch.image).sum(1))


def doubled(examples: list[Any]) -> Any:
    """A way of stacking of one's own."""
    images, labels = default_collate(examples)
    return 2 * images, labels


@pytest.mark.parametrize("count", [0, 1])
def test_the_users_collate_fn_stacks(count: int) -> None:
    private = attached(Numbered(), workers=count, collate_fn=doubled)
    images, labels = next(private.batches)
    assert torch.equal(images[:, 0], 2 * labels)
    private.detach()


def test_a_collate_fn_that_fails_is_named() -> None:
    def rough(examples: list[Any]) -> Any:
        raise ValueError("ragged")

    with pytest.raises(PlanError, match=r"could not be stacked.*: .*ragged"):
        attached(Numbered(), collate_fn=rough)


class Ordered(Numbered):
    """Examples of images alone, in which the worker's own state shows."""

    def __getitem__(self, index: int) -> Any:
        info = get_worker_info()
        mine = info is None or (type(info.dataset) is Ordered and info.id == 0)
        return torch.full((3,), float(mine)), index


def begun(number: int) -> None:
    """What a worker is told to do first."""
    get_worker_info().dataset.begun = number  # type: ignore[union-attr]


class Begun(Numbered):
    begun = -1

    def __getitem__(self, index: int) -> Any:
        return torch.full((3,), float(self.begun)), index


def test_a_worker_sees_its_data_set_as_in_any_loader() -> None:
    """`get_worker_info().dataset` is the user's, and a loader's `worker_init_fn` is called."""
    private = attached(Ordered(), workers=1)
    assert next(private.batches)[0].any()
    private.detach()
    loader = DataLoader(Begun(), batch_size=8, num_workers=1, worker_init_fn=begun)  # type: ignore[arg-type]
    private = attached(loader)
    images, _ = next(private.batches)
    assert not images.any(), "worker 0 wrote 0 over -1"
    private.detach()


def loader_of(**settings: Any) -> DataLoader[Any]:
    return DataLoader(Numbered(), **{"batch_size": 8, **settings})  # type: ignore[arg-type]


class Own(DataLoader[Any]):
    def __iter__(self) -> Any:
        return iter(())


FOLLOWED: dict[str, Any] = {
    "plain": {},
    "shuffled": {"shuffle": True},
    "with workers": {"num_workers": 1, "prefetch_factor": 3, "persistent_workers": True},
    "with a generator": {"shuffle": True, "generator": torch.Generator().manual_seed(1)},
    "with a collate_fn": {"collate_fn": doubled},
}


@pytest.mark.parametrize("kind", FOLLOWED)
def test_a_loader_is_taken_for_its_data_set(kind: str) -> None:
    """With its way of reading; samples are Poisson's."""
    settings = FOLLOWED[kind]
    private = attached(loader_of(**settings))
    assert private._reading.workers == settings.get("num_workers", 0)
    images, labels = next(private.batches)
    assert torch.equal(images[:, 0], labels * (2 if "collate_fn" in settings else 1))
    private.detach()


REFUSED: dict[str, tuple[Any, str]] = {
    "weights": (
        lambda: loader_of(sampler=WeightedRandomSampler([1.0] * SAMPLES, SAMPLES)),
        "WeightedRandomSampler does not give every example the same chance",
    ),
    "replacement": (
        lambda: loader_of(sampler=RandomSampler(Numbered(), replacement=True)),  # type: ignore[arg-type]
        "RandomSampler does not",
    ),
    "fewer": (
        lambda: loader_of(sampler=RandomSampler(Numbered(), num_samples=5)),  # type: ignore[arg-type]
        "RandomSampler does not",
    ),
    "another's": (
        lambda: loader_of(sampler=RandomSampler(range(5), num_samples=SAMPLES)),
        "RandomSampler does not",
    ),
    "the first ones": (
        lambda: loader_of(sampler=SequentialSampler(range(5))),
        "SequentialSampler does not",
    ),
    "dropped": (lambda: loader_of(drop_last=True), "drop_last=True"),
    "other size": (lambda: loader_of(batch_size=4), "its batch_size is 4, the plan's 8"),
    "no batches": (lambda: loader_of(batch_size=None), "no batch_size"),
    "batch sampler": (
        lambda: DataLoader(
            Numbered(),  # type: ignore[arg-type]
            batch_sampler=BatchSampler(SequentialSampler(Numbered()), 8, drop_last=False),
        ),
        "a batch sampler of its own",
    ),
    "own": (lambda: Own(Numbered(), batch_size=8), "Own gives batches in a way of its own"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_loader_that_cannot_be_followed_is_refused_with_the_line_to_write(kind: str) -> None:
    make, why = REFUSED[kind]
    with pytest.raises(PlanError, match=why) as told:
        attached(make())
    assert "DataLoader(loader.dataset, batch_size=8" in str(told.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"workers": -1}, r"^workers: expected a whole number, 0 to 1024"),
        ({"workers": True}, r"^workers: expected a whole number"),
        ({"workers": 10**9}, r"^workers: expected a whole number"),
        ({"workers": 1, "prefetch": 0}, r"^prefetch: expected a whole number"),
        ({"prefetch": 2}, r"^prefetch: only workers read ahead"),
        ({"collate_fn": 3}, r"^collate_fn: expected a function"),
    ],
)
def test_settings_of_loading_are_looked_at(settings: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        attached(Numbered(), **settings)


@pytest.mark.parametrize("name", ["workers", "prefetch", "collate_fn"])
def test_a_loader_says_its_settings_itself(name: str) -> None:
    value = doubled if name == "collate_fn" else 1
    with pytest.raises(PlanError, match="a DataLoader says them itself"):
        attached(loader_of(), **{name: value})


def test_a_batch_that_cannot_be_sent_is_refused_instead_of_waited_for() -> None:
    """Torch would print that it was lost, and wait for it for ever."""
    reading = reading_of(Numbered(), batch_size=8, workers=1, collate_fn=here)
    with pytest.raises(PlanError, match="cannot be sent from a worker"):
        next(Loader(reading, iter(drawn()), pin=False))
    assert living_workers() == []


def here(examples: list[Any]) -> Any:
    """A batch of a class that no other process can find."""

    class Here(Pair):
        pass

    return Here(*default_collate(examples))


def test_a_data_set_that_cannot_be_spawned_is_refused() -> None:
    """Where processes are spawned it has to be sent to them."""

    class Here(Numbered):
        pass

    loader = DataLoader(Here(), batch_size=8, num_workers=1, multiprocessing_context="spawn")  # type: ignore[arg-type]
    private = attached(loader)
    with pytest.raises(PlanError, match=r"^workers: 1 processes.*could not be started"):
        next(private.batches)


def test_a_pinned_batch_keeps_its_structure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch pins what a worker sent by this method; its own would make lists of tuples."""
    from privacy.loading import _Loaded

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self + 1)
    pinned = _Loaded(Pair(torch.zeros(2), (torch.zeros(1),))).pin_memory()
    assert type(pinned.values) is Pair
    assert pinned.values.image.tolist() == [1, 1]
    assert type(pinned.values.label) is tuple


PROGRAM = """
    import os, signal, sys, time, torch, privacy
    from torch import nn
    class Data:
        def __len__(self): return 64
        def __getitem__(self, index): return torch.zeros(3), 0
    plan = privacy.DPPlan(samples=64, batch_size=8, epochs=50, noise_multiplier=1.0, delta=1e-2)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    private = privacy.attach(plan, model, optimizer, Data(), workers=2)
    for number, (images, labels) in enumerate(private.batches):
        private.step(model(images).sum(1))
        if number == 3:
            {ending}
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ending", "code"),
    [
        ("break", 0),
        ("os.killpg(0, signal.SIGINT); time.sleep(60)", -signal.SIGINT),
        ("raise ValueError('mine')", 1),
    ],
    ids=["left", "Ctrl-C", "an error"],
)
def test_a_program_ends_in_peace_with_workers_alive(ending: str, code: int) -> None:
    """Whether it leaves the loop, is interrupted, or fails: no noise, no process is left."""
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM).replace("{ending}", ending)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        start_new_session=True,
    )
    assert ended.returncode == code, ended.stderr
    errors = [line for line in ended.stderr.splitlines() if line and not line.startswith(" ")]
    last = {0: [], -signal.SIGINT: ["KeyboardInterrupt"], 1: ["ValueError: mine"]}[code]
    assert [line for line in errors if not line.startswith("Traceback")] == last


def test_an_audit_of_a_training_with_workers_says_what_to_change() -> None:
    """It learns the coins from what is read, and would see nothing."""

    def make_training(plan: DPPlan, dataset: Any) -> Any:
        def objective(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Any:
            return nn.functional.cross_entropy(model(images), labels, reduction="none")

        model = nn.Linear(3, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return attach(plan, model, optimizer, dataset, workers=1), objective

    data = [(torch.rand(3), index % 2) for index in range(80)]
    plan = DPPlan(samples=80, batch_size=8, epochs=1, noise_multiplier=1.0)
    with pytest.raises(PlanError, match=r"^make_training: .*workers=0"):
        audit(make_training, plan, data, settings=AuditSettings(canaries=4, steps=20))
