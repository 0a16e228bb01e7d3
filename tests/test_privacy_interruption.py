"""A step that a Ctrl-C breaks off, at any line: no example counts twice, no release is free."""

import os
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import privacy.step
import privacy.summation
import privacy.training
import privacy.update
from privacy import (
    AdaptiveClipping,
    DPPlan,
    FlatClipping,
    PhysicalBatches,
    PrivacyError,
    PrivateTraining,
    StepError,
    attach,
)
from privacy.clipping.factors import Clipping
from privacy.update import ClippedSum

EXAMPLES = 4
ROOMS = privacy.training, privacy.step, privacy.update, privacy.summation
WATCHED = {module.__file__ for module in ROOMS}


def attached(clipping: Clipping, *, float_safe: bool) -> PrivateTraining:
    """Every example is in every sample, cut in two; each has gradient C, in one direction."""
    plan = DPPlan(
        samples=EXAMPLES,
        batch_size=EXAMPLES,
        epochs=9,
        noise_multiplier=1e-9,
        clipping=clipping,
        float_safe=float_safe,
    )
    model = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    data = [(torch.tensor([3e3, 4e3]), 0)] * EXAMPLES
    cut = PhysicalBatches(size=2, multiple=2)
    return attach(plan, model, optimizer, data, physical_batches=cut)


def interrupted_at(line: int, action: Callable[[], Any]) -> bool:
    """Runs `action` with a KeyboardInterrupt at the given executed line of the private step."""
    left = line

    def trace(frame: Any, event: str, _: object) -> Any:
        nonlocal left
        if frame.f_code.co_filename not in WATCHED:
            return None
        if event == "line":
            left -= 1
            if left < 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def step(private: PrivateTraining, images: torch.Tensor) -> None:
    """One step on new losses."""
    private.step(private.model(images).squeeze(1))


def moved(private: PrivateTraining, *, batch: int, line: int) -> tuple[float, bool]:
    """Interrupts a step, tries it again, goes on: how far the weights went, in examples."""
    (weight,) = private.model.parameters()
    before = weight.detach().clone()
    batches = private.batches
    for _ in range(batch):
        step(private, next(batches)[0])
    images, _ = next(batches)
    hit = interrupted_at(line, lambda: step(private, images))
    for again in (True, False):
        try:
            step(private, images if again else next(batches)[0])
        except (PrivacyError, StopIteration):
            batches = private.batches
    begun = private.steps
    for images, _ in private.batches:
        step(private, images)
        if private.steps > begun:
            break
    return float((before - weight.detach()).norm()) * EXAMPLES, hit


@pytest.mark.parametrize(
    ("batch", "clipping", "float_safe"),
    [
        (0, FlatClipping(), False),
        (0, FlatClipping(), True),
        (1, FlatClipping(), True),
        (1, AdaptiveClipping(learning_rate=1e-9), False),
    ],
)
def test_no_example_counts_twice_wherever_a_step_is_interrupted(
    batch: int, clipping: Clipping, float_safe: bool
) -> None:
    """At every line that a step executes, in the first batch of a sample and in its last.

    Each step of the ledger may have moved the weights by all examples once, C each. The noise of
    1e-9 C passes the allowance of 1e-4 C with a chance of nothing that a float can hold.
    """
    hits = 0
    for line in range(1000):
        private = attached(clipping, float_safe=float_safe)
        whole, hit = moved(private, batch=batch, line=line)
        assert whole <= EXAMPLES * private.steps + 1e-4, line
        if not hit:
            break
        hits += 1
    assert 20 < hits < 999


def test_a_step_that_forgets_its_interruption_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: without the refusal some line lets an example count twice."""
    for owner in (PrivateTraining, ClippedSum):
        monkeypatch.setattr(owner, "_refuse_interrupted", lambda self: None)
    trials = []
    for line in range(100):
        private = attached(FlatClipping(), float_safe=False)
        whole, _ = moved(private, batch=0, line=line)
        trials.append(whole - EXAMPLES * private.steps)
    assert max(trials) > 0.5


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError, RuntimeError])
def test_whatever_breaks_off_an_addition_loses_the_sample(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next step says so, and the next iteration goes on with the plan."""
    private = attached(FlatClipping(), float_safe=False)
    batches = private.batches
    images, _ = next(batches)

    def broken(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(privacy.summation.FloatSum, "add", broken)
        with pytest.raises(error):
            step(private, images)
    with pytest.raises(StepError, match=r"^the last step was interrupted, so its sample is lost"):
        step(private, images)
    with pytest.raises(StepError, match=r"^the last step was interrupted"):
        next(batches)
    for images, _ in private.batches:
        step(private, images)
    assert private.steps == private.plan.steps


def test_a_sum_by_itself_refuses_what_was_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a loop that adds by hand; what was refused before the addition may be tried again."""
    private = attached(FlatClipping(), float_safe=False)
    clipped, mask = private._clipped, torch.ones(2, dtype=torch.bool)
    losses = private.model(torch.ones(2, 2)).squeeze(1)
    with pytest.raises(StepError, match="expected one loss an example"):
        clipped.add(losses[:1], mask)
    clipped.add(losses, mask)

    def broken(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(privacy.summation.FloatSum, "add", broken)
        with pytest.raises(KeyboardInterrupt):
            clipped.add(private.model(torch.ones(2, 2)).squeeze(1), mask)
    with pytest.raises(StepError, match=r"^the sample was interrupted while"):
        clipped.add(private.model(torch.ones(2, 2)).squeeze(1), mask)
    clipped.reset()
    clipped.add(private.model(torch.ones(2, 2)).squeeze(1), mask)


@pytest.mark.parametrize("second", ["step", "another iteration", "a state"])
def test_what_a_second_thread_does_in_the_middle_of_a_step_is_refused(
    second: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one's batch is added once, and its sample is released as if it had been alone."""
    private = attached(FlatClipping(), float_safe=False)
    (weight,) = private.model.parameters()
    before, state = weight.detach().clone(), private.state_dict()
    batches = private.batches
    step(private, next(batches)[0])
    images, _ = next(batches)
    losses = [private.model(images).squeeze(1) for _ in range(2)]
    inside, refused = threading.Event(), threading.Event()
    keep, caught = private._clipped.keep, []

    def slowly(*arguments: Any) -> int:
        inside.set()
        assert refused.wait(10)
        return keep(*arguments)

    def disturb() -> None:
        assert inside.wait(10)
        try:
            if second == "step":
                private.step(losses[1])
            elif second == "a state":
                private.load_state_dict(state)
            else:
                next(private.batches)
        except PrivacyError as error:
            caught.append(error)
        refused.set()

    monkeypatch.setattr(private._clipped, "keep", slowly)
    thread = threading.Thread(target=disturb)
    thread.start()
    assert private.step(losses[0])
    thread.join()
    assert [str(error)[:14] for error in caught] == ["another thread"]
    assert isinstance(caught[0], StepError)
    assert float((before - weight.detach()).norm()) == pytest.approx(1.0, abs=1e-3)
    monkeypatch.undo()
    step(private, next(batches)[0])
    assert private.steps == 1


def test_two_threads_on_one_iteration_get_an_error_of_ours() -> None:
    """While one of them reads its batch, not Python's for a generator that runs already."""
    inside, refused = threading.Event(), threading.Event()
    caught: list[Exception] = []

    class Slow:
        slow = False

        def __len__(self) -> int:
            return EXAMPLES

        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            if self.slow:
                inside.set()
                assert refused.wait(10)
            return torch.rand(2), index % 2

    data, model = Slow(), nn.Linear(2, 2)
    plan = DPPlan(samples=EXAMPLES, batch_size=EXAMPLES, epochs=2, noise_multiplier=1.0)
    private = attach(plan, model, torch.optim.SGD(model.parameters(), lr=1.0), data)
    batches = private.batches

    def disturb() -> None:
        assert inside.wait(10)
        try:
            next(batches)
        except Exception as error:
            caught.append(error)
        refused.set()

    thread = threading.Thread(target=disturb)
    thread.start()
    data.slow = True
    images, _ = next(batches)
    thread.join()
    data.slow = False
    assert [type(error) for error in caught] == [StepError]
    assert private.step(model(images).sum(1))
    next(batches)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_process_cannot_release_its_parents_sample() -> None:
    """With a ledger in memory each would count it once, and it would leave twice."""
    private = attached(FlatClipping(), float_safe=False)
    images, _ = next(private.batches)
    losses = private.model(images).squeeze(1)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            private.step(losses)
            os.write(writing, b"stepped")
        except StepError as error:
            os.write(writing, str(error).encode())
        os._exit(0)
    os.waitpid(child, 0)
    said = os.read(reading, 1000).decode()
    os.close(reading)
    os.close(writing)
    assert said.startswith("the process was forked since the model was attached")
    private.step(losses)
