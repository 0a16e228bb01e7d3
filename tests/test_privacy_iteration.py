"""An iteration of `private.batches` that breaks off: it never ends as if all were done."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from privacy import DPPlan, PhysicalBatches, PlanError, PrivateTraining, StepError, attach

SAMPLES = 8


class Failing:
    """A data set that fails on demand."""

    def __init__(self) -> None:
        self.error: BaseException | None = None

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if self.error is not None:
            raise self.error
        return torch.full((2,), float(index)), index % 2


def attached(data: Any) -> PrivateTraining:
    """Every example is in every sample, cut in two."""
    plan = DPPlan(samples=SAMPLES, batch_size=SAMPLES, epochs=3, noise_multiplier=1.0, delta=1e-2)
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    cut = PhysicalBatches(size=4, multiple=4)
    return attach(plan, model, optimizer, data, physical_batches=cut)


def step(private: PrivateTraining, batch: Any) -> bool:
    images, labels = batch
    return private.step(F.cross_entropy(private.model(images), labels, reduction="none"))


@pytest.mark.parametrize(
    "error", [OSError("img_7.png"), KeyboardInterrupt(), MemoryError(), StopIteration()]
)
def test_an_iteration_that_an_error_broke_off_says_so(error: BaseException) -> None:
    """In the first batch of a sample and in its second; a new iteration takes all steps."""
    data = Failing()
    private = attached(data)
    batches = private.batches
    for begun in (0, 1):
        for _ in range(begun):
            step(private, next(batches))
        data.error = error
        kind = PlanError if isinstance(error, Exception) else type(error)
        with pytest.raises(kind):
            next(batches)
        data.error = None
        for _ in range(2):
            with pytest.raises(StepError, match=r"^an error broke this iteration"):
                next(batches)
        batches = private.batches
    assert private.steps == 0
    assert [step(private, batch) for batch in batches] == [False, True] * 3
    assert next(batches, None) is None


def test_a_batch_that_was_forgotten_can_be_given_afterwards() -> None:
    """The refusal comes before anything is drawn; then the iteration goes on."""
    private = attached(Failing())
    batches = private.batches
    first = next(batches)
    for _ in range(2):
        with pytest.raises(StepError, match=r"was not given to private\.step"):
            next(batches)
    step(private, first)
    assert [step(private, batch) for batch in batches] == [True, *[False, True] * 2]


def test_a_loop_that_tries_again_after_an_error_is_not_ended_in_silence() -> None:
    """`for` around a broken iteration raises; it does not run zero times."""
    data = Failing()
    private = attached(data)
    batches = private.batches
    data.error = OSError("unplugged")
    with pytest.raises(Exception, match="unplugged"):
        next(batches)
    data.error = None
    with pytest.raises(StepError, match=r"^an error broke this iteration"):
        list(batches)
