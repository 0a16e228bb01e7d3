"""Rows that are not examples: tokens in dimension 0, another order, copies beside each other."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from privacy import DPPlan, PhysicalBatches, Private, UnsupportedLayer, attach
from privacy.clipping import Tape
from privacy.rows import halves, some_of

ROWS = 8


class Around(nn.Module):
    """Calls its layer on rows in another arrangement, and arranges its output back."""

    def __init__(self, inner: nn.Module, arrange: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.inner, self.arrange = inner, arrange

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.arrange(self.inner(self.arrange(inputs)))


def swapped_axes(inputs: torch.Tensor) -> torch.Tensor:
    return inputs.transpose(0, 1)


def reversed_rows(inputs: torch.Tensor) -> torch.Tensor:
    return inputs.flip(0)


def neighbours(inputs: torch.Tensor) -> torch.Tensor:
    order = torch.arange(len(inputs))
    order[-2:] = order[-2:].flip(0)
    return inputs[order]


def attached(model: nn.Module, shape: tuple[int, ...], samples: int = ROWS) -> Private:
    """Every example in every sample, one physical batch, C = 1, no noise to speak of."""
    data = [(torch.rand(shape), i % 2) for i in range(samples)]
    plan = DPPlan(samples=samples, batch_size=samples, epochs=30, noise_multiplier=1e-9)
    cut = PhysicalBatches(size=samples, multiple=samples)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    return attach(plan, model, optimizer, data, physical_batches=cut)


@pytest.mark.parametrize("tokens", range(1, 9))
def test_a_layer_that_sees_tokens_in_dimension_0_is_refused(tokens: int) -> None:
    """However many, that of the batch and those of the rehearsal among them."""
    model = nn.Sequential(Around(nn.Linear(4, 1), swapped_axes), nn.Flatten())
    with pytest.raises(UnsupportedLayer, match=r"^0\.inner: "):
        attached(model, (tokens, 4), samples=max(tokens, 2))


@pytest.mark.parametrize("arrange", [reversed_rows, neighbours])
def test_a_layer_that_sees_examples_in_another_order_is_refused(
    arrange: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """Its norm would be added to another example's; the outputs do not tell."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), Around(nn.Linear(3, 2), arrange))
    with pytest.raises(UnsupportedLayer, match=r"the loss of an example reached rows of others"):
        attached(model, (4,))


def test_layers_that_keep_the_order_pass() -> None:
    """Control: the same network, the rows left alone."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), Around(nn.Linear(3, 2), lambda rows: rows))
    private = attached(model, (4,))
    images, labels = next(private.batches)
    assert private.step(F.cross_entropy(model(images), labels, reduction="none"))


def network() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))


Losses = Callable[[nn.Module, torch.Tensor, torch.Tensor, int], torch.Tensor]


def interleaved(model: nn.Module, x: torch.Tensor, y: torch.Tensor, k: int) -> torch.Tensor:
    logits = model(x.repeat_interleave(k, dim=0))
    return F.cross_entropy(logits, y.repeat_interleave(k), reduction="none").view(-1, k)


def called_often(model: nn.Module, x: torch.Tensor, y: torch.Tensor, k: int) -> torch.Tensor:
    return torch.stack([F.cross_entropy(model(x), y, reduction="none") for _ in range(k)], dim=1)


def repeated(model: nn.Module, x: torch.Tensor, y: torch.Tensor, k: int) -> torch.Tensor:
    logits = model(x.repeat(k, 1))
    return F.cross_entropy(logits, y.repeat(k), reduction="none").view(k, -1).t()


def interleaved_and_turned(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor, k: int
) -> torch.Tensor:
    return interleaved(model, x, y, k).t().reshape(-1, k)


def called_in_other_orders(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor, k: int
) -> torch.Tensor:
    logits = [model(x.roll(i, 0)).roll(-i, 0) for i in range(k)]
    return torch.stack([F.cross_entropy(z, y, reduction="none") for z in logits], dim=1)


@pytest.mark.parametrize("copies", [1, 2, 4, 5])
@pytest.mark.parametrize("losses_of", [interleaved, called_often])
def test_copies_that_are_adjacent_pass(losses_of: Losses, copies: int) -> None:
    """Control: one pass on adjacent rows, or one pass a copy."""
    private = attached(network(), (4,))
    images, labels = next(private.batches)
    assert private.step(losses_of(private.model, images, labels, copies))


@pytest.mark.parametrize("copies", [2, 3, 4, 8])
@pytest.mark.parametrize(
    "losses_of",
    [
        repeated,
        interleaved_and_turned,
        called_in_other_orders,
    ],
)
def test_copies_in_another_order_are_refused(losses_of: Losses, copies: int) -> None:
    """Before anything is added; the batch can be stepped in the right order then."""
    private = attached(network(), (4,))
    images, labels = next(private.batches)
    for _ in range(2):
        with pytest.raises(UnsupportedLayer, match="the loss of an example reached rows of others"):
            private.step(losses_of(private.model, images, labels, copies))
    assert not any(bool(total.any()) for total in private._clipped.sums)
    assert private.step(interleaved(private.model, images, labels, copies))


def test_copies_that_are_reordered_later_are_found_later() -> None:
    """The eighth and the sixty-fourth batch of a kind are asked again."""
    private = attached(network(), (4,))
    batches = private.batches
    images, labels = next(batches)
    private.step(interleaved(private.model, images, labels, 4))
    for _ in range(6):
        images, labels = next(batches)
        private.step(repeated(private.model, images, labels, 4))
    images, labels = next(batches)
    with pytest.raises(UnsupportedLayer, match="repeat_interleave, not repeat"):
        private.step(repeated(private.model, images, labels, 4))
    assert private.steps == 7


def test_a_loss_that_depends_on_other_examples_is_found_at_the_first_step() -> None:
    """It has no bounded contribution of an example."""
    private = attached(network(), (4,))
    images, labels = next(private.batches)
    losses = F.cross_entropy(private.model(images), labels, reduction="none")
    with pytest.raises(UnsupportedLayer, match="or a loss depends on other examples than its own"):
        private.step(losses - losses.mean())


def test_a_broken_example_is_not_taken_for_a_mixture() -> None:
    """Zero times its gradient is not finite either."""
    private = attached(network(), (4,))
    images, labels = next(private.batches)
    images[3] = float("nan")
    assert private.step(F.cross_entropy(private.model(images), labels, reduction="none"))
    assert private.non_finite == 1


@pytest.mark.parametrize("rows", range(2, 10))
def test_halves_tell_any_order_from_any_other(rows: int) -> None:
    """Every exchange of two rows moves one of them into a set or out of it."""
    sets = halves(rows)
    for one in range(rows):
        for other in range(one):
            assert any(chosen[one] != chosen[other] for chosen in sets)


def test_some_of_the_examples_tell_repeat_from_repeat_interleave() -> None:
    """At every size: some chosen example has a copy in the rows of one that is not."""
    for examples in range(2, 65):
        for copies in range(2, 17):
            chosen = some_of(examples, seed=1)
            assert chosen[0]
            assert not chosen[-1]
            rows = torch.arange(examples * copies)
            assert bool((chosen[rows % examples] & ~chosen[rows // copies]).any())


def test_earlier_gradients_and_the_tape_stay_as_they_were() -> None:
    """The question leaves nothing behind."""
    private = attached(network(), (4,))
    images, labels = next(private.batches)
    tape: Tape = private._clipped._tape
    with pytest.raises(UnsupportedLayer):
        private.step(repeated(private.model, images, labels, 2))
    assert not tape.recording
    assert not tape.tracing
    assert tape.take() == {}
    assert all(p.grad is None for p in private.model.parameters())
