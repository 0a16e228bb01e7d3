"""`private.check_objective`: what uses other examples is found, whatever it declares."""

import copy
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from privacy import DPPlan, PrivateTraining, StepError, attach
from privacy.objectives import keeps_apart

CLASSES = 3
SAMPLES = 12
Losses = Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]


def data_of(samples: int = SAMPLES) -> list[tuple[torch.Tensor, int]]:
    """In the order of the labels, as a folder is."""
    return [(torch.rand(1, 4, 4), CLASSES * i // samples) for i in range(samples)]


def attached(*, dropout: bool = False, samples: int = SAMPLES) -> PrivateTraining:
    layers = [nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, CLASSES)]
    model = nn.Sequential(*layers[:2], nn.Dropout(0.5), *layers[2:]) if dropout else None
    model = model or nn.Sequential(*layers)
    plan = DPPlan(samples=samples, batch_size=2, epochs=1, noise_multiplier=1.0)
    return attach(plan, model, torch.optim.SGD(model.parameters(), lr=0.1), data_of(samples))


def entropy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(images), labels, reduction="none")


def contrastive(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """With detached keys: no gradient leads to other rows."""
    queries, keys = F.normalize(model(images), dim=1), F.normalize(model(images), dim=1).detach()
    return F.cross_entropy(queries @ keys.T, torch.arange(len(images)), reduction="none")


def mixup(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    # As it is mostly written: from two global generators.
    share, order = np.random.mtrand.beta(1.0, 1.0), torch.randperm(len(images))
    outputs = model(share * images + (1 - share) * images[order])
    one = F.cross_entropy(outputs, labels, reduction="none")
    return share * one + (1 - share) * F.cross_entropy(outputs, labels[order], reduction="none")


def standardised(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return entropy(model, (images - images.mean()) / images.std(), labels)


def relative(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    losses = entropy(model, images, labels)
    return losses / losses.detach().mean()


def reversed_pairs(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return entropy(model, images + 0.5 * images.flip(0), labels)


def by_count(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Weights of the batch's own classes."""
    return entropy(model, images, labels) / labels.bincount(minlength=CLASSES)[labels]


def hidden(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The values are those of the examples, the gradients are not."""
    losses = entropy(model, images, labels)
    scale = losses.detach().mean()
    return losses.detach() + (losses - losses.detach()) * scale


class Remembering:
    """Divides by a mean of the batches before."""

    def __init__(self) -> None:
        self.mean = torch.ones(())

    def __call__(
        self, model: nn.Module, images: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        losses = entropy(model, images, labels)
        divided = losses / self.mean
        self.mean = 0.9 * self.mean + 0.1 * losses.detach().mean()
        return divided


class Drawing:
    """Draws from a generator of its own."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)


class Mixed(Drawing):
    """Mixes by what it draws."""

    def __call__(
        self, model: nn.Module, images: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        order = torch.randperm(len(images), generator=self.generator)
        return entropy(model, images + images[order], labels)


MIXING = {
    "contrastive": contrastive,
    "mixup": mixup,
    "standardised": standardised,
    "relative": relative,
    "pairs": reversed_pairs,
    "classes of the batch": by_count,
    "gradient only": hidden,
    "remembers": Remembering(),
    "own generator": Mixed(),
}


def declared(losses: Any) -> Any:
    losses.per_example = True
    return losses


@pytest.mark.parametrize("name", MIXING)
def test_an_objective_that_uses_other_examples_is_refused(name: str) -> None:
    """Though it says that it does not; the private step would take it."""
    private, objective = attached(), declared(MIXING[name])
    with pytest.raises(
        StepError, match=r"changing one example moved the \w+ of [^0-9]* has no bound"
    ):
        private.check_objective(objective)
    images, labels = next(private.batches)
    private.step(objective(private.model, images, labels))


class Noisy(Drawing):
    """Augments each example by itself, with what it draws."""

    def __call__(
        self, model: nn.Module, images: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        copies = images.repeat_interleave(2, dim=0)
        copies = copies + 0.1 * torch.randn(copies.shape, generator=self.generator)
        return entropy(model, copies, labels.repeat_interleave(2)).view(-1, 2)


def in_place(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return entropy(model, images.mul_(0.5), labels)


def constant(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(images))


@pytest.mark.parametrize("losses", [entropy, Noisy(), in_place, constant])
@pytest.mark.parametrize("dropout", [False, True])
def test_an_objective_that_keeps_examples_apart_passes(losses: Any, dropout: bool) -> None:
    """Control: and model, objective, random states and ledger are what they were."""
    private, objective = attached(dropout=dropout), declared(losses)
    before = copy.deepcopy(private.model.state_dict()), private.state_dict()
    state, numpy = torch.get_rng_state(), np.random.mtrand.get_state(legacy=False)
    own = losses.generator.get_state() if isinstance(losses, Noisy) else None
    assert private.check_objective(objective) is True
    assert torch.equal(state, torch.get_rng_state())
    assert str(numpy) == str(np.random.mtrand.get_state(legacy=False))
    assert own is None or torch.equal(own, losses.generator.get_state())
    assert private.state_dict() == before[1]
    assert all(torch.equal(before[0][n], v) for n, v in private.model.state_dict().items())
    assert all(p.grad is None for p in private.model.parameters())
    for images, labels in private.batches:
        if losses is not constant:
            private.step(losses(private.model, images, labels))
        else:
            break


ELSEWHERE = torch.Generator()


def drawn_elsewhere(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return entropy(model, images + torch.rand(images.shape, generator=ELSEWHERE), labels)


class Locked:
    """Cannot be copied."""

    def __init__(self) -> None:
        self.lock, self.calls = threading.Lock(), 0

    def __call__(
        self, model: nn.Module, images: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        self.calls += 1
        return entropy(model, images, labels)


def broken(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return entropy(model, images, labels) / 0


@pytest.mark.parametrize("losses", [drawn_elsewhere, Locked(), broken])
def test_what_cannot_be_asked_is_believed_and_said(losses: Any) -> None:
    """`False`: its declaration is all there is."""
    assert attached().check_objective(declared(losses)) is False
    assert not isinstance(losses, Locked) or not losses.calls


def test_two_examples_are_too_few() -> None:
    assert attached(samples=2).check_objective(declared(entropy)) is False
    assert attached(samples=3).check_objective(declared(entropy)) is True


class Keeping(nn.Module):
    """Keeps an activation with its graph, which torch does not copy."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.kept = images
        return images


def test_a_model_that_keeps_its_activations_can_be_asked() -> None:
    private = attached()
    private.detach()
    model = nn.Sequential(*private.model, Keeping())
    plan, optimizer = private.plan, torch.optim.SGD(model.parameters(), lr=0.1)
    assert attach(plan, model, optimizer, data_of()).check_objective(declared(entropy)) is True


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        (
            lambda model, images: model(images),
            r"runs on 4 examples of the data set, \[0\] \[4, 1, 4, 4\] .*: TypeError",
        ),
        (lambda *_: 1.0, r"expected one loss an example, shape \[4\], got float"),
        (lambda model, x, y: entropy(model, x, y).mean(), r"shape \[4\], got \[\]: do not average"),
    ],
)
def test_an_objective_that_does_not_run_is_refused(losses: Any, message: str) -> None:
    with pytest.raises(StepError, match=message):
        attached().check_objective(declared(losses))


def test_what_is_no_function_is_refused() -> None:
    class Declares:
        per_example = True

    with pytest.raises(StepError, match=r"^Declares: expected a function"):
        attached().check_objective(Declares())
    with pytest.raises(StepError, match=r"^NoneType: expected an objective"):
        attached().check_objective(None)


def test_examples_that_are_all_alike_are_changed_all_the_same() -> None:
    """Another example would be the same one."""
    with pytest.raises(StepError, match="changing one example moved"):
        keeps_apart(relative, nn.Linear(4, 2), (torch.ones(5, 4), torch.arange(5) % 2))


@pytest.mark.parametrize("dropout", [False, True])
def test_losses_that_know_the_number_of_rows_are_refused(dropout: bool) -> None:
    """A mean in disguise; under a dropout nothing is compared that was drawn twice."""

    def averaged(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return entropy(model, images, labels) / len(images)

    private = attached(dropout=dropout)
    if dropout:
        private.check_objective(declared(averaged))
        return
    with pytest.raises(StepError, match=r"^averaged: expected losses that do not know how many ro"):
        private.check_objective(declared(averaged))


def test_it_can_be_asked_with_other_examples_than_the_data_sets() -> None:
    """With public or random ones, so that it never sees a private image."""
    private, seen = attached(), []

    def objective(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        seen.append(images)
        return entropy(model, images, labels)

    images, labels = torch.full((6, 1, 4, 4), 2.0) * torch.rand(6, 1, 1, 1), torch.arange(6) % 3
    assert private.check_objective(declared(objective), examples=(images, labels)) is True
    assert seen
    assert all(bool((each.flatten(1).std(1) == 0).all()) for each in seen)
    for wrong in ((images, 1), (images, labels[:2]), (images, torch.tensor(1)), ()):
        with pytest.raises(StepError, match=r"^examples: expected"):
            private.check_objective(declared(objective), examples=wrong)
    for other in (images, (images,), {"images": images}):
        with pytest.raises(StepError, match=r"runs on 5 .*\[5, 1, 4, 4\] torch.float32: TypeError"):
            private.check_objective(declared(objective), examples=other)
