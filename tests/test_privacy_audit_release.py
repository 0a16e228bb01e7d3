"""What leaves a training beside the gradient is seen; what honest ones keep is let be."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from audit_plants import Leaks, Naive, audited, losses_of, network, ours
from torch import nn

from privacy import DPPlan
from privacy.audit.canaries import CanaryDataset
from privacy.audit.release import Release


class Kept(nn.Module):
    """Keeps an activation to be looked at, a view of its weight, and a mask with infinities."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()
        self.register_buffer("mask", torch.tensor([-torch.inf, torch.nan]))
        self.view = self.inner[4].weight.data

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen = images.detach() + 1
        found: torch.Tensor = self.inner(images)
        return found


def nesterov(plan: DPPlan, dataset: Any) -> Naive:
    training = Naive(plan, dataset)
    parameters = training.model.parameters()
    training.optimizer = torch.optim.SGD(
        parameters, lr=0.02, momentum=0.9, nesterov=True, foreach=True
    )
    return training


class Scheduled(Naive):
    """The learning rate and the momentum follow a schedule."""

    def __init__(self, plan: DPPlan, dataset: Any) -> None:
        super().__init__(plan, dataset)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.01)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, max_lr=0.02, total_steps=plan.steps + 1
        )

    def step(self, losses: torch.Tensor) -> bool:
        stepped = super().step(losses)
        if stepped:
            self.schedule.step()
            self.optimizer.zero_grad()
        return stepped


class Augmented(Naive):
    """Images are turned round in the batches."""

    @property
    def batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for images, labels in super().batches:
            yield 0.5 * images.flip(-1), labels


class Reordered(Naive):
    """A batch is in another order than it was read in."""

    @property
    def batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for images, labels in super().batches:
            yield images.flip(0), labels.flip(0)


HONEST: dict[str, Callable[[DPPlan, Any], Any]] = {
    "keeps activations": lambda plan, data: Naive(plan, data, Kept()),
    "ours keeps activations": lambda plan, data: ours(plan, data, model=Kept()),
    "works on the gradient in place": nesterov,
    "schedule": Scheduled,
    "augments": Augmented,
    "reorders": Reordered,
}


@pytest.mark.parametrize("kind", HONEST)
def test_what_honest_trainings_keep_is_not_held_against_them(kind: str) -> None:
    """Control of every check that has no chance in it."""
    report = audited(HONEST[kind])
    assert report.passed, report.verdict
    said = " ".join(report.unseen)
    assert ("the optimizer's betas, lr" in said) == (kind == "schedule")
    assert ("not as the data set gave them" in said) == (kind == "augments")
    assert "changed otherwise in two trainings" not in said


def test_settings_that_follow_the_data_are_told() -> None:
    """Nothing shows whether they follow released gradients or examples: the report says so."""

    class ByTheSum(Leaks):
        def step(self, losses: torch.Tensor) -> bool:
            norm = float((self.total + self.sum_of(losses)).norm())
            self.optimizer.param_groups[0]["lr"] = 0.05 / (1 + norm)
            return super().step(losses)

    report = audited(ByTheSum)
    assert report.passed
    assert any("the optimizer's lr changed otherwise in two trainings" in s for s in report.unseen)


def test_an_objective_that_draws_is_asked_and_passes() -> None:
    """Each trial has the same draws."""

    def objective(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return losses_of(model, images + 0.1 * torch.randn_like(images), labels)

    report = audited(Naive, objective)
    assert report.passed, report.verdict
    assert "objective" in {check.name for check in report.checks}


def test_an_objective_that_cannot_be_asked_is_told() -> None:
    """It holds what cannot be copied."""

    class Locked:
        def __init__(self) -> None:
            self.lock = threading.Lock()

        def __call__(
            self, model: nn.Module, images: torch.Tensor, labels: torch.Tensor
        ) -> torch.Tensor:
            with self.lock:
                return losses_of(model, images, labels)

    report = audited(Naive, Locked())
    assert report.passed, report.verdict
    assert "objective" not in {check.name for check in report.checks}
    assert any("the objective could not be asked" in sentence for sentence in report.unseen)


def linear(write: Callable[[nn.Module, torch.optim.Optimizer], Any]) -> float:
    """What stays unexplained where something is written after the third of three steps."""
    model = nn.Linear(3, 2)
    model.register_buffer("counts", torch.zeros(2, dtype=torch.int64))
    model.register_buffer("flags", torch.zeros(2, dtype=torch.bool))
    model.register_buffer("large", torch.tensor([1e9, 0.0]))
    model.register_buffer("waves", torch.zeros(2, dtype=torch.complex64))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    release = Release(model, optimizer, torch.zeros(1, 3))
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        release.before()
        optimizer.step()
        release.stepped()
    assert release.unexplained < 1e-6
    with torch.no_grad():
        write(model, optimizer)
    release.stepped()
    release.close()
    return release.unexplained


WRITTEN: dict[str, Callable[[Any, Any], Any]] = {
    "whole numbers": lambda model, _: model.counts.add_(1),
    "flags": lambda model, _: model.flags.fill_(True),
    "a small number beside a large one": lambda model, _: model.large.add_(
        torch.tensor([0.0, 0.1])
    ),
    "complex numbers": lambda model, _: model.waves.add_(1e-9j),
    "another buffer": lambda model, _: model.register_buffer("more", torch.zeros(1)),
    "a buffer less": lambda model, _: delattr(model, "flags"),
    "an attribute": lambda model, _: setattr(model, "more", torch.zeros(1)),
    "a gradient": lambda model, _: model.weight.grad.add_(0.1),
    "a number of the optimizer": lambda model, optimizer: optimizer.state[model.bias].update(n=3),
    "a tensor of the optimizer": lambda model, optimizer: optimizer.state["all"].update(
        n=torch.zeros(2)
    ),
}


@pytest.mark.parametrize("what", WRITTEN)
def test_whatever_is_written_after_a_step_shows(what: str) -> None:
    """Of every dtype, wherever it is kept."""
    assert linear(WRITTEN[what]) > 1e-3


def test_gradients_that_are_cleared_are_no_leak() -> None:
    """Control: zeros, nothing, and the released gradient itself."""
    for clear in (True, False):
        assert linear(lambda _, optimizer, c=clear: optimizer.zero_grad(set_to_none=c)) < 1e-6
    assert linear(lambda *_: None) < 1e-6


def test_images_are_known_by_their_rows() -> None:
    """One row at a time and by batches; equal images of two rows are either's."""
    data = CanaryDataset(
        [(torch.ones(2) * (k // 2), 0) for k in range(8)], torch.arange(8), canaries=2
    )
    one = torch.stack([data[k][0] for k in (0, 4)])
    several, _ = data.batch(torch.tensor([1, 6]))
    assert data.strangers(one, torch.tensor([0, 4])) == (0, 0)
    assert data.strangers(one, torch.tensor([1, 4])) == (0, 0)
    assert data.strangers(several, torch.tensor([0, 4])) == (1, 0)
    assert data.strangers(several + 0.5, torch.tensor([0, 4])) == (0, 2)
