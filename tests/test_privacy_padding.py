"""A `collate_fn` that pads to the longest: the model is proved not to see it, or it is refused."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, default_collate

from privacy import DPPlan, PlanError, attach
from privacy.opacus import PrivacyEngine
from privacy.padding import check_padding

WIDTH, NORM = 3, 0.1

# A process that is forked while torch computes in threads of its own.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


def sequences(lengths: list[int]) -> list[Any]:
    """(steps [length, 3], label) of these lengths, in float64."""
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(length, WIDTH, generator=generator).double(), number % 2)
        for number, length in enumerate(lengths)
    ]


UNEQUAL = [2 + number % 5 for number in range(15)] + [40]
ALL_BUT_ONE = [5] * 3 + [40] + [5] * 60
"""The fourth of 64 is none of the 32 that are looked at."""


def padded(examples: list[Any]) -> Any:
    """As torch's tutorials do."""
    rows = pad_sequence([steps for steps, _ in examples], batch_first=True)
    return rows, torch.tensor([label for _, label in examples])


def masked(examples: list[Any]) -> Any:
    """((rows, mask), labels)."""
    rows, labels = padded(examples)
    lengths = torch.tensor([len(steps) for steps, _ in examples])
    return (rows, torch.arange(rows.shape[1]) < lengths[:, None]), labels


def to_eight(examples: list[Any]) -> Any:
    """To one length, of all batches."""
    rows = torch.stack([nn.functional.pad(s[:8], (0, 0, 0, 8 - len(s[:8]))) for s, _ in examples])
    return rows, torch.tensor([label for _, label in examples])


def truncated(examples: list[Any]) -> Any:
    """To the shortest."""
    shortest = min(len(steps) for steps, _ in examples)
    rows = torch.stack([steps[:shortest] for steps, _ in examples])
    return rows, torch.tensor([label for _, label in examples])


class ConvMean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv1d(WIDTH, 4, 3, padding=1), nn.Linear(4, 2)

    def forward(self, rows: Tensor) -> Any:
        return self.head(self.conv(rows.transpose(1, 2)).relu().mean(2))


class MaskedConv(ConvMean):
    def forward(self, rows: Tensor, mask: Tensor | None = None) -> Any:
        mask = torch.ones_like(rows[..., 0]) if mask is None else mask.to(rows)
        features = self.conv(rows.transpose(1, 2)).relu() * mask[:, None]
        return self.head(features.sum(2) / mask.sum(1, keepdim=True).clamp(min=1))


class LastStep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cells, self.head = nn.GRU(WIDTH, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, rows: Tensor) -> Any:
        return self.head(self.cells(rows)[0][:, -1])


class OwnLastStep(LastStep):
    def forward(self, rows: Tensor, mask: Tensor | None = None) -> Any:
        lengths = rows.new_full((len(rows),), rows.shape[1]) if mask is None else mask.sum(1)
        last = lengths.long().clamp(min=1) - 1
        return self.head(self.cells(rows)[0][torch.arange(len(rows)), last])


class MaskedAttention(nn.Module):
    """With dropout, of torch's own layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, 4)
        self.body = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.3, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, rows: Tensor, mask: Tensor) -> Any:
        # A row of filling alone would attend to nothing.
        mask = mask | ~mask.any(1, keepdim=True)
        features = self.body(self.first(rows), src_key_padding_mask=~mask) * mask[..., None]
        return self.head(features.sum(1) / mask.sum(1, keepdim=True))


class SumOfPoints(nn.Module):
    """Sees nothing of zeros as long as its bias is zero, as it is in the beginning."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(WIDTH, 4), nn.Linear(4, 2)
        nn.init.zeros_(self.first.bias)

    def forward(self, rows: Tensor) -> Any:
        return self.head(self.first(rows).relu().sum(1))


class SeenInTheGradient(MaskedConv):
    """The filling is a term of value zero, which has a gradient."""

    def forward(self, rows: Tensor, mask: Tensor | None = None) -> Any:
        seen = self.head(self.conv(rows.transpose(1, 2)).relu().mean(2))
        return super().forward(rows, mask) + seen - seen.detach()


class EachStep(nn.Module):
    """Outputs a step, [n, steps, 2]."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, 2)

    def forward(self, rows: Tensor, mask: Tensor | None = None) -> Any:
        return self.first(rows)


class Words(nn.Module):
    """The word 0 is filling, whose row is zero until the first noise."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(9, 4, padding_idx=0), nn.Linear(4, 2)

    def forward(self, words: Tensor) -> Any:
        return self.head(self.words(words).sum(1))


def attached(model: nn.Module, data: Any, collate: Any = None, **settings: Any) -> Any:
    """Every example in every step, and as good as no noise."""
    count = len(data.dataset if isinstance(data, DataLoader) else data)
    plan = DPPlan(samples=count, batch_size=count, epochs=1, noise_multiplier=1e-9, delta=1e-3,
                  max_grad_norm=NORM)  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    return attach(plan, model, optimizer, data, collate_fn=collate, **settings)


def made(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(2)
    return make().double()


def step(private: Any, count: int) -> list[Tensor]:
    """One step; the clipped sum that it took, of each parameter."""
    before = [parameter.detach().clone() for parameter in private.model.parameters()]
    for inputs, labels in private.batches:
        given = inputs if isinstance(inputs, tuple | list) else (inputs,)
        private.step(cross_entropy(private.model(*given), labels, reduction="none"))
    after = private.model.parameters()
    return [(old - new.detach()) * count for old, new in zip(before, after, strict=True)]


@pytest.mark.parametrize("make", [ConvMean, LastStep, SumOfPoints])
@pytest.mark.parametrize("collate", [padded, truncated])
def test_a_model_that_sees_how_long_its_neighbours_are_is_refused(make: Any, collate: Any) -> None:
    """One long example moved the clipped sum by 26 times the norm, for it moved every row.

    Refused by `attach`, and as a `DataLoader`'s; with one fixed length the same model trains.
    """
    data, model = sequences(UNEQUAL), made(make)
    with pytest.raises(PlanError, match=r"^collate_fn: it pads .*sees the filling.*one fixed leng"):
        attached(model, data, collate)
    loader = DataLoader(data, batch_size=16, collate_fn=collate)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match=r"^collate_fn: it pads .*sees the filling"):
        attached(model, loader)
    private = attached(model, data, to_eight)
    step(private, 16)
    assert private.steps == 1


def oracle(model: nn.Module, data: list[Any]) -> list[Tensor]:
    """The sum of clipped gradients, of one example after the other, without any filling."""
    total = [torch.zeros_like(parameter) for parameter in model.parameters()]
    for steps, label in data:
        loss = cross_entropy(model(steps[None]), torch.tensor([label]))
        found = torch.autograd.grad(loss, list(model.parameters()))
        norm = torch.cat([each.flatten() for each in found]).norm()
        for sums, each in zip(total, found, strict=True):
            sums += each * (NORM / norm).clamp(max=1)
    return total


@pytest.mark.parametrize("make", [MaskedConv, OwnLastStep])
def test_a_masked_model_trains_and_its_sum_is_that_of_each_example_alone(make: Any) -> None:
    """To within the 1e-5 by which examples are clipped below the norm."""
    data = sequences(UNEQUAL)
    expected = oracle(made(make), data)
    found = step(attached(made(make), data, masked), 16)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=1e-8)


@pytest.mark.parametrize("make", [MaskedConv, OwnLastStep])
def test_removing_the_longest_example_moves_the_sum_by_the_norm_at_most(make: Any) -> None:
    data = sequences(UNEQUAL)
    sums = [step(attached(made(make), each, masked), len(each)) for each in (data, data[:-1])]
    moved = torch.cat([(a - b).flatten() for a, b in zip(*sums, strict=True)]).norm()
    assert float(moved) <= NORM * (1 + 1e-6)


def test_dropout_of_torchs_layers_is_no_sight_of_the_filling() -> None:
    private = attached(made(MaskedAttention), sequences(UNEQUAL), masked)
    step(private, 16)
    assert private.steps == 1


def test_a_filling_that_only_the_gradient_sees_is_refused() -> None:
    with pytest.raises(PlanError, match="sees the filling: the gradient of an example alone"):
        attached(made(SeenInTheGradient), sequences(UNEQUAL), masked)


def test_a_row_for_filling_that_noise_does_not_leave_zero_is_refused() -> None:
    words = [(torch.arange(1, 2 + number % 5), number % 2) for number in range(16)]
    with pytest.raises(PlanError, match="sees the filling"):
        attached(made(Words), words, padded)


def test_outputs_of_every_step_are_refused_with_the_cure_which_is_tried_in_turn() -> None:
    """`forward` gives each row's loss over its real steps, or over all steps."""

    def losses(model: nn.Module, batch: Any, *, real: bool = True) -> Tensor:
        (rows, mask), labels = batch
        outputs = model(rows).log_softmax(2)[torch.arange(len(rows)), :, labels]
        weights = mask.to(outputs) if real else torch.ones_like(outputs)
        return -(outputs * weights).sum(1) / weights.sum(1).clamp(min=1)

    data = sequences(UNEQUAL)
    with pytest.raises(PlanError, match=r"outputs have another shape.*give forward=lambda model"):
        attached(made(EachStep), data, masked)
    with pytest.raises(PlanError, match="sees the filling"):
        attached(made(EachStep), data, masked, forward=lambda m, b: losses(m, b, real=False))
    private = attached(made(EachStep), data, masked, forward=losses)
    for batch in private.batches:
        private.step(losses(private.model, batch))
    assert private.steps == 1


def test_targets_that_are_padded_are_refused_with_the_cure() -> None:
    """What the loss does with them is not seen, unless `forward` shows it."""

    def with_targets(examples: list[Any]) -> Any:
        (rows, mask), _ = masked(examples)
        return (rows, mask), rows[:, :, 0] > 0

    with pytest.raises(PlanError, match=r"^collate_fn: it pads targets .*forward=lambda"):
        attached(made(MaskedConv), sequences(UNEQUAL), with_targets)


def test_a_model_that_takes_one_length_only_is_refused_with_the_cure() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4 * WIDTH, 2)).double()
    data = sequences([4] * 3 + UNEQUAL)
    with pytest.raises(PlanError, match=r"cannot be tried on rows of several lengths.*pad every"):
        attached(model, data, padded)


def test_what_cannot_be_tried_on_a_copy_is_refused_with_the_cure() -> None:
    model, data = made(MaskedConv), sequences(UNEQUAL)
    with pytest.raises(PlanError, match=r"^forward: expected a function that runs the model that"):
        attached(model, data, masked, forward=lambda _, batch: model(*batch[0]))
    model.lock = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(PlanError, match=r"a copy, which cannot be made: TypeError"):
        attached(model, data, masked)


@pytest.mark.parametrize("workers", [0, 1])
def test_another_length_than_those_tried_is_refused_before_anything_is_released(
    workers: int,
) -> None:
    """Where all examples tried have one length, nothing is known of how the model sees filling."""
    private = attached(made(ConvMean), sequences(ALL_BUT_ONE), padded, workers=workers)
    before = [parameter.detach().clone() for parameter in private.model.parameters()]
    with pytest.raises(PlanError, match=r"expected rows of shape \[5, 3\] at \[0\], as the exam"):
        next(private.batches)
    assert private.steps == 0
    assert all(map(torch.equal, before, private.model.parameters()))


class Whole:
    """Read by indices, and padded there."""

    batch_by_indices = True

    def __init__(self, lengths: list[int]) -> None:
        self.examples = sequences(lengths)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Any:
        return self.examples[index]

    def batch(self, indices: Tensor) -> Any:
        return padded([self.examples[index] for index in indices.tolist()])


def test_a_data_set_that_is_read_whole_keeps_one_shape_too() -> None:
    with pytest.raises(PlanError, match=r"expected rows of shape \[5, 3\] at \[0\]"):
        next(attached(made(ConvMean), Whole(ALL_BUT_ONE)).batches)
    private = attached(made(ConvMean), Whole([5] * 8))
    step(private, 8)
    assert private.steps == 1


def test_random_states_and_the_model_stay_what_they_were() -> None:
    model = made(MaskedAttention)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(1)
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert check_padding(model, sequences(UNEQUAL), masked) is None
    assert torch.rand(1) == drawn
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    fixed = {"[0]": (8, WIDTH), "[1]": ()}
    assert check_padding(made(ConvMean), sequences(UNEQUAL), to_eight) == fixed


# --- the drop-in ---------------------------------------------------------------------------------


def dropped_in(model: nn.Module, data: Any, collate: Any) -> Any:
    return PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(data, batch_size=len(data), collate_fn=collate),
        noise_multiplier=1.0,
        max_grad_norm=NORM,
    )


def test_the_drop_in_refuses_a_model_that_sees_the_filling() -> None:
    """When it is made, and when the `collate_fn` is written later; then the training goes on."""
    data = sequences(UNEQUAL)
    with pytest.raises(PlanError, match="sees the filling"):
        dropped_in(made(ConvMean), data, padded)
    model, optimizer, loader = dropped_in(made(ConvMean), data, to_eight)
    with pytest.raises(PlanError, match="sees the filling"):
        loader.collate_fn = padded
    for rows, labels in loader:
        assert rows.shape[1] == 8
        optimizer.zero_grad()
        cross_entropy(model(rows), labels).backward()
        optimizer.step()
    assert optimizer.ledger.steps == 1
    own = made(ConvMean)
    loader = DataLoader(data, batch_size=16, collate_fn=padded)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(own.parameters(), lr=0.1)
    asked = {"module": own, "optimizer": optimizer, "data_loader": loader}
    assert not PrivacyEngine().is_compatible(**asked)


def test_the_drop_in_trains_a_masked_model() -> None:
    """Of the loader, and written later by another function."""
    model, optimizer, loader = dropped_in(made(MaskedConv), sequences(UNEQUAL), masked)
    for collate in (masked, lambda examples: masked(examples)):
        loader.collate_fn = collate
        for inputs, labels in loader:
            optimizer.zero_grad()
            cross_entropy(model(*inputs), labels).backward()
            optimizer.step()
    assert optimizer.ledger.steps == 2


def test_the_drop_in_refuses_another_length_than_those_tried() -> None:
    """Of the loader, and of a `collate_fn` written later."""
    _, optimizer, loader = dropped_in(made(ConvMean), sequences(ALL_BUT_ONE), padded)
    with pytest.raises(PlanError, match=r"expected rows of shape \[5, 3\] at \[0\]"):
        next(iter(loader))
    loader.collate_fn = to_eight
    assert next(iter(loader))[0].shape == (64, 8, WIDTH)
    loader.collate_fn = lambda examples: padded(examples)
    with pytest.raises(PlanError, match=r"expected rows of shape \[5, 3\] at \[0\]"):
        next(iter(loader))
    assert optimizer.ledger.steps == 0
    # The default stacks rows of one shape only.
    same = sequences([5] * 8)
    _, _, loader = dropped_in(made(ConvMean), same, to_eight)
    loader.collate_fn = default_collate
    assert next(iter(loader))[0].shape == (8, 5, WIDTH)
