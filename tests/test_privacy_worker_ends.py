"""A worker that ends while a step is computed: torch's error comes anywhere, and is told as ours.

Torch raises it from a handler of SIGCHLD. Here it is raised at lines that a step executes, and as
the system would, by the handler of a process that was killed.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from linecache import getline
from typing import Any

import pytest
import torch
from support.reading_workers import living_workers, remember
from torch import nn

import privacy.summation
import privacy.training
from privacy import DPPlan, PhysicalBatches, PlanError, PrivateTraining, StepError, attach
from privacy.clipping.tape import Tape
from privacy.validate import positive, real

EXAMPLES = 4
SOME = 7
SAID = "DataLoader worker (pid 7) is killed by signal: Killed. "
OURS = os.path.dirname(privacy.training.__file__)
TORCH_MODES = "grad_mode.py"

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


class Read:
    """Every example has the same gradient."""

    def __len__(self) -> int:
        return EXAMPLES

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.tensor([3e3, 4e3]), index


def attached(**settings: Any) -> PrivateTraining:
    """Every example is in every sample, and moves the weights by a clipping norm of 1."""
    plan = DPPlan(samples=EXAMPLES, batch_size=EXAMPLES, epochs=999, noise_multiplier=1e-9)
    model = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    cut = PhysicalBatches(size=EXAMPLES, multiple=EXAMPLES)
    return attach(plan, model, optimizer, Read(), physical_batches=cut, **settings)


def ended_at(line: int, action: Callable[[], Any]) -> Exception | None:
    """Runs `action` with torch's error at the given line of ours, or of torch's grad modes."""
    left = line

    def trace(frame: Any, event: str, _: object) -> Any:
        nonlocal left
        name = frame.f_code.co_filename
        if not (name.startswith(OURS) or name.endswith(TORCH_MODES)):
            return None
        # No signal comes at a `try:`: it is no operation.
        if event == "line" and getline(name, frame.f_lineno).strip() != "try:":
            left -= 1
            if left < 0:
                sys.settrace(None)
                raise RuntimeError(SAID)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    except Exception as error:
        return error
    finally:
        sys.settrace(before)
    return None


def ended(*_: object) -> None:
    """What torch's handler does."""
    raise RuntimeError(SAID)


def step(private: PrivateTraining, batch: Any) -> bool:
    return private.step(private.model(batch[0]).squeeze(1))


def test_wherever_it_comes_in_a_step_it_is_told_and_nothing_is_bought_unpaid() -> None:
    """At one line in seven: no foreign error, no misleading one, grad mode on, each move is paid.

    The noise of 1e-9 passes the allowance of 1e-4 with a chance of nothing that a float can hold.
    """
    private = attached()
    (weight,) = private.model.parameters()
    hits = 0
    for line in range(0, 5000, SOME):
        before, spent = weight.detach().clone(), private.steps
        losses = private.model(next(private.batches)[0]).squeeze(1)
        error = ended_at(line, partial(private.step, losses))
        assert torch.is_grad_enabled(), line
        moved = float((before - weight.detach()).norm())
        assert moved <= private.steps - spent + 1e-4, line
        if error is None:
            break
        assert type(error) is StepError, (line, error)
        assert str(error).startswith("workers: one that reads the data set ended"), line
        assert SAID in str(error)
        hits += 1
    assert 20 < hits < 999


def test_it_leaves_a_grad_mode_that_was_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mode is put back as it was, not switched on."""
    private = attached()
    losses = private.model(next(private.batches)[0]).squeeze(1)

    def broken(*_: object) -> None:
        torch.set_grad_enabled(True)
        raise RuntimeError(SAID)

    monkeypatch.setattr(privacy.summation.FloatSum, "add", broken)
    with torch.no_grad():
        with pytest.raises(StepError, match=r"^workers: one"):
            private.step(losses)
        assert not torch.is_grad_enabled()


def test_what_is_no_workers_error_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another RuntimeError is not said to be of a worker."""
    private = attached()
    losses = private.model(next(private.batches)[0]).squeeze(1)

    def broken(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(privacy.summation.FloatSum, "add", broken)
    with pytest.raises(RuntimeError, match=r"^out of memory") as told:
        private.step(losses)
    assert type(told.value) is RuntimeError


def test_what_was_taken_for_another_failure_is_a_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule of the slow path says of any error that the layer cannot be recorded."""
    private = attached()
    losses = private.model(next(private.batches)[0]).squeeze(1)

    def broken(*_: object) -> None:
        try:
            raise RuntimeError(SAID)
        except RuntimeError as error:
            raise PlanError("layer: cannot be recorded") from error

    monkeypatch.setattr(privacy.summation.FloatSum, "add", broken)
    with pytest.raises(StepError, match=r"^workers: one that reads the data set ended"):
        private.step(losses)


def test_a_use_of_a_parameter_that_was_half_written_down_is_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It ended in an IndexError: the half was read while the error went up."""
    private = attached()
    losses = private.model(next(private.batches)[0]).squeeze(1)

    def broken(tape: Tape, parameter: nn.Parameter, _: object) -> None:
        tape._parts.setdefault(parameter, [])
        ended()

    with monkeypatch.context() as patch:
        patch.setattr(Tape, "add", broken)
        with pytest.raises(StepError, match=r"^workers: one that reads the data set ended"):
            private.step(losses)
    assert step(private, next(private.batches))


def test_it_is_told_while_a_batch_goes_to_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The iteration is broken off, as by any error while it reads."""
    private = attached()
    batches = private.batches
    with monkeypatch.context() as patch:
        patch.setattr(privacy.training, "images_of", ended)
        with pytest.raises(StepError, match=r"^workers: one that reads the data set ended"):
            next(batches)
    with pytest.raises(StepError, match=r"^an error broke this iteration"):
        next(batches)
    assert step(private, next(private.batches))


def test_a_worker_that_is_killed_in_a_step_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the system itself: torch's handler runs while the step waits for its signal."""
    remember()
    private = attached(workers=1)
    batch = next(private.batches)
    losses = private.model(batch[0]).squeeze(1)
    (worker,) = living_workers()
    started = worker.pid

    def kill_and_wait(*_: object) -> None:
        os.kill(started, signal.SIGKILL)
        for _ in range(600):  # Torch's handler ends this.
            time.sleep(1)

    with monkeypatch.context() as patch:
        patch.setattr(privacy.summation.FloatSum, "add", kill_and_wait)
        with pytest.raises(StepError, match=rf"^workers: one .*pid {started}\) is killed"):
            private.step(losses)
    assert private.steps == 0
    assert step(private, next(private.batches))
    assert private.steps == 1
    private.detach()


@pytest.mark.parametrize("check", [real, positive])
def test_an_error_from_elsewhere_does_not_make_a_number_a_wrong_one(
    check: Callable[[str, Any], float],
) -> None:
    """It comes out as it is; a tensor that is no number is refused all the same."""

    class Interrupted(float):
        def __float__(self) -> float:
            raise RuntimeError(SAID)

    with pytest.raises(RuntimeError, match="DataLoader worker"):
        check("noise_multiplier", Interrupted(1.0))
    for none in (torch.ones(2), torch.ones(1, device="meta"), torch.tensor(1j)):
        with pytest.raises(PlanError, match="noise_multiplier: expected a finite number"):
            check("noise_multiplier", none)
