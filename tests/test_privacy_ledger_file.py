"""A ledger in a file: written before the release, never forgotten, one training at a time."""

import copy
import fcntl
import json
import os
import pickle
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import privacy
from privacy import BudgetExceeded, DPPlan, Ledger, LedgerError, PlanError, StepError

PLAN = DPPlan(samples=8, batch_size=4, epochs=3, noise_multiplier=1.0, delta=1e-2)
STEP = PLAN.event(steps=1)
HUGE = pytest.param(10**400, id="huge")


def training(ledger: Ledger | None = None, plan: DPPlan = PLAN) -> privacy.PrivateTraining:
    """A small private training of six steps."""
    model = nn.Linear(4, 2)
    data = [(torch.rand(4), i % 2) for i in range(8)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return privacy.attach(plan, model, optimizer, data, ledger=ledger)


def take(private: privacy.PrivateTraining, steps: int) -> dict[str, Any]:
    """So many steps; the state after them."""
    goal = private.steps + steps
    for images, labels in private.batches:
        private.step(nn.functional.cross_entropy(private.model(images), labels, reduction="none"))
        if private.steps == goal:
            break
    return private.state_dict()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "spent.jsonl"


def spent(path: Path) -> int:
    """What a file says, as somebody else who opens it sees it."""
    ledger = Ledger.open(path)
    ledger.close()
    return ledger.steps


def test_a_step_is_written_before_it_is_released(path: Path, monkeypatch: Any) -> None:
    """When the optimizer sees the gradient, the file on the disk knows the step already."""
    private = training(Ledger.open(path))
    seen, synced, fsync = [], [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(path.read_bytes()), fsync(fd)))
    step = private.optimizer.step
    monkeypatch.setattr(
        private.optimizer, "step", lambda: (seen.append(path.read_bytes() == synced[-1]), step())
    )
    take(private, 2)
    assert seen == [True, True]
    assert [content.count(b"\n") for content in synced] == [2, 3]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_killed_training_has_spent_what_it_had_spent(path: Path) -> None:
    """Without a word from Python at its end."""
    program = (
        "import os, sys; sys.path.insert(0, sys.argv[1]); import test_privacy_ledger_file as t\n"
        "t.take(t.training(t.Ledger.open(sys.argv[2])), 4); os.kill(os.getpid(), 9)"
    )
    here = str(Path(__file__).parent)
    done = subprocess.run([sys.executable, "-c", program, here, str(path)], check=False)
    assert done.returncode == -9
    private = training(Ledger.open(path))
    assert private.steps == 4
    assert private.spent() == privacy.epsilon_of([PLAN.event(4)], 1e-2)
    take(private, 2)
    images, labels = torch.rand(1, 4), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(StopIteration):
        next(private.batches)
    private._pending = privacy.sampling.PhysicalBatch(torch.tensor([0]), rows=1, last=True)
    with pytest.raises(BudgetExceeded):
        private.step(nn.functional.cross_entropy(private.model(images), labels, reduction="none"))


def test_a_state_that_says_less_is_charged_for_the_larger(path: Path) -> None:
    """Rolled back from step 5 to step 2: one step is left, not four."""
    first = training(Ledger.open(path))
    early = take(first, 2)
    take(first, 3)
    first.detach()
    second = training(Ledger.open(path))
    second.load_state_dict(early)
    assert second.steps == 5
    take(second, 9)
    assert (second.steps, second.spent(), spent_of(second)) == (6, PLAN.epsilon(), 6)
    second.detach()
    assert spent(path) == 6


def spent_of(private: privacy.PrivateTraining) -> int:
    return sum(row["steps"] for row in private.state_dict()["ledger"])


def test_a_state_from_another_machine_is_taken_into_the_file(path: Path) -> None:
    """Its steps are on the disk once it is loaded, and counted once however often it is."""
    state = take(training(), 3)
    private = training(Ledger.open(path))
    private.load_state_dict(state)
    private.load_state_dict(state)
    private.detach()
    assert spent(path) == 3


def test_an_older_file_another_and_none_are_told_by_the_state(path: Path, tmp_path: Path) -> None:
    """A file is written before any state: one that knows less of it was put back."""
    private = training(Ledger.open(path))
    take(private, 1)
    older = path.read_bytes()
    state = take(private, 2)
    private.detach()
    path.write_bytes(older)
    for ledger in (Ledger.open(path), Ledger.open(tmp_path / "another.jsonl"), None):
        resumed = training(ledger)
        with pytest.raises(LedgerError, match="kept in a file"):
            resumed.load_state_dict(state)
        resumed.detach()


def test_a_ledger_of_a_kind_of_its_own_is_refused() -> None:
    """It may record less than was spent."""

    class Free(Ledger):
        def record(self, event: privacy.GaussianSteps) -> None:
            pass

    with pytest.raises(PlanError, match=r"^ledger: expected privacy\.Ledger\(\), got Free"):
        training(Free())


@pytest.mark.parametrize("name", ["plan", "model", "optimizer"])
def test_what_was_attached_cannot_be_exchanged(name: str) -> None:
    """A plan of a higher sampling rate for one sample, or a model that is not watched."""
    private = training()
    take(private, 1)
    with pytest.raises(StepError, match=f"^{name}: a private training keeps the one it has"):
        setattr(private, name, copy.copy(getattr(private, name)))
    take(private, 1)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_private_training_cannot_be_copied(copied: Any) -> None:
    """Both would release the sample that one of them drew."""
    with pytest.raises(StepError, match="cannot be copied"):
        copied(training())


@pytest.mark.parametrize("state", [None, [], "x", {}])
def test_what_is_no_state_is_refused(state: Any) -> None:
    with pytest.raises(PlanError):
        training().load_state_dict(state)


def test_a_number_that_no_float_holds_is_refused() -> None:
    state = take(training(), 1)
    for name in ("noise_multiplier", "sampling_rate", "steps"):
        for huge in (10**400, 10**5000):
            wrong = [{**state["ledger"][0], name: huge}]
            with pytest.raises(PlanError, match=r"^ledger: "):
                training().load_state_dict({**state, "ledger": wrong})


@pytest.mark.parametrize("huge", [10**400, 10**5000], ids=["no float", "no text"])
def test_a_plan_of_numbers_that_nothing_holds_is_refused(huge: int) -> None:
    """Python makes no float of the one, and no text of the other."""
    state = training().state_dict()
    for name in (n for n in state["plan"] if n != "clipping"):
        with pytest.raises(PlanError, match=f"^{name}: expected"):
            training().load_state_dict({**state, "plan": {**state["plan"], name: huge}})
    for wrong in (huge, {"kind": huge}, {"kind": "automatic", "gamma": huge}):
        with pytest.raises(PlanError):
            training().load_state_dict({**state, "plan": {**state["plan"], "clipping": wrong}})
    for quantile in (huge, 7):
        with pytest.raises(PlanError, match=r"^quantile: expected"):
            privacy.AdaptiveClipping(quantile=quantile)


def test_steps_taken_here_are_not_lost_to_a_state_of_a_training_beside_it() -> None:
    """Two and three steps on the same data are five, in memory too; and six at most in all."""
    beside = take(training(), 3)
    private = training()
    take(private, 2)
    private.load_state_dict(beside)
    assert private.steps == 5
    assert private.spent() == privacy.epsilon_of([PLAN.event(5)], 1e-2)
    with pytest.raises(PlanError, match="6 steps, 5 were taken here, together 11"):
        private.load_state_dict(
            {**beside, "ledger": [{**beside["ledger"][0], "session": "c", "steps": 6}]}
        )
    assert private.steps == 5


def test_one_training_that_parts_in_two_is_counted_whole() -> None:
    """Both went on from step 2; together they took 2 + 1 + 2."""
    start = take(training(), 2)
    one, two = training(), training()
    one.load_state_dict(start)
    two.load_state_dict(start)
    take(one, 1)
    one.load_state_dict(take(two, 2))
    assert one.steps == 5


def test_a_state_from_before_is_no_second_training(path: Path) -> None:
    """Weights taken back to an earlier state of this very training cost nothing."""
    private = training(Ledger.open(path))
    state = take(private, 2)
    take(private, 1)
    private.load_state_dict(state)
    assert private.steps == 3


@pytest.mark.parametrize(
    "change",
    [
        {"noise_multiplier": 1e6},
        {"sampling_rate": 1e-9},
        {"noise_multiplier": 1.0000000000000002},
        {"noise_multiplier": True},
        {"sampling_rate": "0.5"},
        {"steps": 7},
        {"steps": 2.0},
        {"steps": True},
        {"steps": -1},
        {"session": 3},
    ],
)
@pytest.mark.parametrize("kept", [True, False])
def test_a_state_that_cannot_be_true_is_refused_whole(path: Path, change: Any, kept: bool) -> None:
    """Other noise, another rate, more steps than there are, no numbers: nothing is changed."""
    state = take(training(), 2)
    state["ledger"] = [{**state["ledger"][0], **change}]
    private = training(Ledger.open(path) if kept else None)
    taken = take(private, 1)
    with pytest.raises(PlanError, match=r"^ledger: "):
        private.load_state_dict(state)
    assert private.state_dict() == taken


@pytest.mark.parametrize(
    "norm", [True, "1.0", float("nan"), float("inf"), 0.0, -1.0, 2.0, None, HUGE]
)
def test_a_clipping_norm_that_the_plan_did_not_come_to_is_refused(norm: Any) -> None:
    """Of a fixed clipping there is one."""
    private = training()
    with pytest.raises(PlanError, match=r"^max_grad_norm: expected"):
        private.load_state_dict({**take(training(), 2), "max_grad_norm": norm})
    assert private.steps == 0


@pytest.mark.parametrize("norm", [True, "1.0", float("nan"), float("inf"), 1e-30, 1e30, None, HUGE])
def test_an_adaptive_clipping_norm_stays_in_its_range(norm: Any) -> None:
    """It may be anything that the clipping could have come to, and no more."""
    clipping = privacy.AdaptiveClipping(count_noise_multiplier=10.0)
    plan = DPPlan(samples=8, batch_size=4, epochs=3, noise_multiplier=1.0, clipping=clipping)
    state = take(training(plan=plan), 2)
    private = training(plan=plan)
    with pytest.raises(PlanError, match=r"^max_grad_norm: expected"):
        private.load_state_dict({**state, "max_grad_norm": norm})
    private.load_state_dict(state)
    assert private.max_grad_norm == state["max_grad_norm"] != 1.0


@pytest.mark.parametrize(
    "change",
    [{"samples": True}, {"batch_size": 4.0}, {"epochs": "3"}, {"float_safe": 0}, {"delta": "x"}],
)
def test_a_plan_of_other_types_is_refused(change: Any) -> None:
    """A plan from a file is checked like any other value from a file."""
    state = training().state_dict()
    with pytest.raises(PlanError, match=next(iter(change))):
        training().load_state_dict({**state, "plan": {**state["plan"], **change}})


@pytest.mark.parametrize(
    "change", [{"noise_multiplier": 1.5}, {"batch_size": 2}, {"max_grad_norm": 2.0}]
)
def test_a_ledger_of_another_plan_is_refused(path: Path, change: Any) -> None:
    """Its first line binds it, before a step is written too; the model is left alone."""
    training(Ledger.open(path)).detach()
    plan = DPPlan(**{**PLAN.to_dict(), **change})
    ledger, model = Ledger.open(path), nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(PlanError, match=r"^ledger: .* is bound to"):
        privacy.attach(plan, model, optimizer, [(torch.rand(4), 0)] * 8, ledger=ledger)
    assert "forward" not in vars(model)
    in_memory = Ledger([plan.event(steps=1)])
    if plan.event() != PLAN.event():
        with pytest.raises(PlanError, match=r"^ledger: expected steps of noise"):
            training(in_memory)


def test_a_plan_of_more_epochs_goes_on_with_its_ledger(path: Path) -> None:
    """What binds is the kind of a step, not how many there are."""
    first = training(Ledger.open(path))
    take(first, 6)
    first.detach()
    longer = DPPlan(**{**PLAN.to_dict(), "epochs": 4})
    second = training(Ledger.open(path), plan=longer)
    take(second, 9)
    assert second.steps == longer.steps == 8


def test_every_cut_of_the_last_line_counts_as_a_step(path: Path) -> None:
    """Nothing that may have been released is free, and the file can be written again."""
    private = training(Ledger.open(path))
    take(private, 2)
    private.detach()
    whole = path.read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    for end in range(last + 1, len(whole)):
        path.write_bytes(whole[:end])
        assert spent(path) == 2, whole[last:end]
        assert path.read_bytes() == whole
    path.write_bytes(whole[:last] + bytes(len(whole) - last))
    assert spent(path) == 2  # as a file system may leave it after a power cut
    path.write_bytes(whole[:last] + bytes(200))
    assert spent(path) == 2
    path.write_bytes(whole + b"{")
    assert spent(path) == 3
    first = whole.index(b"\n") + 1
    path.write_bytes(whole[:first] + b'{"sess')
    assert spent(path) == 1
    again = training(Ledger.open(path))
    take(again, 1)
    again.detach()
    assert spent(path) == 2


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"my diary",
        b"my diary\n",
        b'{"privacy_ledger": 2, "noise_multiplier": 1.0}\n',
        b'{"privacy_ledger": true}\n',
        b'{"privacy_ledger": 1}\n{"session": "a", "steps": 1}\n',
        b'{"privacy_ledger": 1, "noise_multiplier": 1.0, "sampling_rate": 0.5, "max_grad_norm": 1}',
        b"[" * 100_000 + b"\n",
    ],
)
def test_another_file_is_refused_and_left_alone(path: Path, content: bytes) -> None:
    """An emptied one too: what it knew was spent."""
    path.write_bytes(content)
    with pytest.raises(LedgerError, match=str(path)):
        Ledger.open(path)
    assert path.read_bytes() == content


@pytest.mark.parametrize("line", [b"{}", b'{"session": "a", "steps": -3}', b'{"session": "a"}'])
def test_a_damaged_line_before_the_last_is_refused(path: Path, line: bytes) -> None:
    """Nobody knows what stood there."""
    private = training(Ledger.open(path))
    take(private, 2)
    private.detach()
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], line, lines[2], b""]))
    with pytest.raises(LedgerError, match="line 2 is damaged"):
        Ledger.open(path)


def test_only_regular_files(tmp_path: Path, path: Path) -> None:
    """No pipe is waited on, no link followed, no device or folder written to."""
    os.mkfifo(tmp_path / "pipe")
    training(Ledger.open(path)).detach()
    (tmp_path / "link").symlink_to(path)
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    for place in (tmp_path / "pipe", tmp_path / "link", tmp_path / "dangling", "/dev/null"):
        with pytest.raises(LedgerError, match="regular file"):
            Ledger.open(place)
    for place in (tmp_path, f"{tmp_path}/\0"):
        with pytest.raises(LedgerError, match="regular file"):
            Ledger.open(place)
    with pytest.raises(LedgerError, match="folder that exists"):
        training(Ledger.open(tmp_path / "nowhere" / "spent.jsonl"))


def test_one_training_at_a_time(path: Path) -> None:
    """Another process, or another training of this one, is refused until the first lets go."""
    private = training(Ledger.open(path))
    with pytest.raises(LedgerError, match="another training spends from this ledger"):
        Ledger.open(path)
    program = (
        "import fcntl, sys\n"
        "file = open(sys.argv[1])\n"
        "try: fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
        "except BlockingIOError: sys.exit(3)\n"
        "print('locked', flush=True); sys.stdin.read()"
    )
    words = [sys.executable, "-c", program, str(path)]
    assert subprocess.run(words, check=False).returncode == 3
    private.detach()
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(words, text=True, **pipes) as other:  # type: ignore[call-overload]
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(LedgerError, match="another training spends from this ledger"):
            Ledger.open(path)
        other.communicate()
    assert spent(path) == 0


def test_what_cannot_be_written_is_not_released(path: Path, monkeypatch: Any) -> None:
    """A full disk, a removed file, a closed one: no step, and the weights stay."""
    for hinder in (
        lambda private: monkeypatch.setattr(os, "pwrite", lambda *_: 3),
        lambda private: path.unlink(),
        lambda private: (path.rename(path.with_suffix(".old")), path.write_bytes(b"")),
        lambda private: private.ledger.close(),
    ):
        private = training(Ledger.open(path))
        take(private, 1)
        before = private.model.weight.clone()
        with monkeypatch.context():
            hinder(private)
            with pytest.raises(LedgerError, match=str(path)):
                take(private, 1)
            monkeypatch.undo()
        assert torch.equal(private.model.weight, before)
        assert private.steps == 1
        private.detach()
        path.unlink(missing_ok=True)


def test_the_file_holds_nothing_of_the_data(path: Path) -> None:
    """Counts and terms of the plan only; how many steps is the plan's, and public."""
    private = training(Ledger.open(path))
    take(private, 2)
    first, *rest = [json.loads(line) for line in path.read_text().splitlines()]
    terms = {"noise_multiplier": 1.0, "sampling_rate": 0.5, "max_grad_norm": 1.0}
    assert first == {"privacy_ledger": 1, **terms}
    assert [sorted(row) for row in rest] == [["session", "steps"]] * 2


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("was_there", [False, True])
def test_an_attach_that_fails_lets_go_of_what_it_made(
    path: Path, monkeypatch: Any, was_there: bool, error: type[BaseException]
) -> None:
    """A file that the caller had opened stays the caller's, who may attach again with it."""
    if was_there:
        take(private := training(Ledger.open(path)), 2)
        private.detach()
    ledger, made = Ledger.open(path), privacy.PrivateTraining

    def fails(*arguments: Any) -> None:
        made(*arguments)
        raise error

    monkeypatch.setattr(sys.modules["privacy.attach"], "PrivateTraining", fails)
    with pytest.raises(error):
        training(ledger)
    monkeypatch.undo()
    if was_there:
        with pytest.raises(LedgerError, match="another training spends"):
            Ledger.open(path)
        assert training(ledger).steps == 2
    else:
        assert spent(path) == 0
        with pytest.raises(LedgerError, match=r"closed.*open it again, with privacy\.Ledger\.open"):
            training(ledger)
        training(Ledger.open(path))


@pytest.mark.parametrize("hinders", ["write", "flock", "fsync"])
def test_a_file_that_cannot_be_made_is_not_locked(
    path: Path, monkeypatch: Any, hinders: str
) -> None:
    """Refused by name, whichever of the system's calls fails."""

    def fails(*_: object) -> None:
        raise OSError("no")

    where = {"write": (os, "pwrite"), "flock": (fcntl, "flock"), "fsync": (os, "fsync")}
    ledger = Ledger.open(path)
    with monkeypatch.context() as patch:
        patch.setattr(*where[hinders], fails)
        with pytest.raises(LedgerError, match="spent"):
            training(ledger)
    assert not ledger.locked


def test_a_closed_ledger_is_refused_at_attach(path: Path) -> None:
    """Not at the first step only."""
    ledger = Ledger.open(path)
    training(ledger).detach()
    with pytest.raises(LedgerError, match="the ledger was closed"):
        training(ledger)


def test_a_folder_that_cannot_be_read_is_refused_by_name(path: Path, monkeypatch: Any) -> None:
    """Its name could not be brought to the disk."""
    opened = os.open

    def fails(place: Any, flags: int, *more: Any) -> int:
        if flags & os.O_DIRECTORY:
            raise PermissionError(13, "denied")
        return opened(place, flags, *more)

    monkeypatch.setattr(os, "open", fails)
    with pytest.raises(LedgerError, match="its folder cannot be brought to the disk"):
        training(Ledger.open(path))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_ledger_in_a_file_is_not_copied(path: Path, copied: Any) -> None:
    """A copy that is collected would close the descriptor, and the lock would be gone with it."""
    ledger = Ledger.open(path)
    private = training(ledger)
    take(private, 1)
    with pytest.raises(LedgerError, match="cannot be copied or pickled"):
        copied(ledger)
    with pytest.raises(LedgerError, match="cannot be copied or pickled"):
        copied(ledger._file)
    with pytest.raises(LedgerError, match="another training"):
        Ledger.open(path)
    take(private, 1)


def test_a_ledger_in_memory_can_be_copied() -> None:
    """Control: it owns nothing that cannot be there twice."""
    ledger = Ledger([STEP])
    for other in (copy.deepcopy(ledger), pickle.loads(pickle.dumps(ledger))):
        other.record(STEP)
        assert (ledger.steps, other.steps) == (1, 2)


def test_a_descriptor_that_somebody_closed_is_no_noise_at_the_end(path: Path) -> None:
    """What is raised where an object goes is printed by Python, and heard by nobody."""
    training(Ledger.open(path)).detach()
    ledger = Ledger.open(path)
    assert ledger._file is not None
    assert ledger._file._fd is not None
    os.close(ledger._file._fd)
    ledger._file.__del__()


def test_the_program_may_go_to_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file stays where it was when it was opened."""
    monkeypatch.chdir(tmp_path)
    private = training(Ledger.open("spent.jsonl"))
    take(private, 1)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    take(private, 1)
    private.detach()
    assert spent(tmp_path / "spent.jsonl") == 2


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_process_does_not_keep_the_file_locked(path: Path) -> None:
    """One that reads the data set may outlive a training that was killed; its file is free then."""
    ledger = Ledger.open(path)
    training(ledger)
    reading, writing = os.pipe()
    lives, alive = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(writing)
        os.write(alive, b"!")
        os.read(reading, 1)
        os._exit(0)
    try:
        os.read(lives, 1)  # what closes the file at a fork runs in the child
        ledger.close()
        assert spent(path) == 0
    finally:
        os.close(writing)
        os.close(lives)
        os.close(alive)
        os.close(reading)
        os.waitpid(child, 0)
