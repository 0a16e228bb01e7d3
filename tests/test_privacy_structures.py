"""Batches and outputs of any structure: what people's data sets and networks give and take."""

import copy
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from support.gradients import close
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from privacy import DPPlan, PlanError, PrivateTraining, StepError, UnsupportedLayer, attach
from privacy.batch import mapped, tensors
from privacy.sampling import stacked

SAMPLES = 12
Losses = Callable[..., Tensor]


class Pair(NamedTuple):
    image: Tensor
    label: int


@dataclass
class Logits:
    """As the libraries of language models give their outputs."""

    logits: Tensor
    hidden_states: tuple[Tensor, ...]
    loss: Tensor | None = None


class ModelOutput(OrderedDict):  # type: ignore[type-arg]
    """A dictionary with attributes, as there too."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


class TwoInputs(nn.Module):
    def __init__(self, wrap: Callable[[Tensor], Any] = lambda logits: logits) -> None:
        super().__init__()
        self.image, self.table, self.wrap = nn.Linear(4, 3), nn.Linear(2, 3), wrap

    def forward(self, image: Tensor, table: Tensor) -> Any:
        return self.wrap(self.image(image).sin() + self.table(table))


class OneInput(nn.Module):
    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.inner, self.wrap = nn.Linear(4, 3), wrap

    def forward(self, image: Tensor) -> Any:
        return self.wrap(self.inner(image))


def drawn(index: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(index)).double()


def examples(make: Callable[[int], Any]) -> list[Any]:
    return [make(index) for index in range(SAMPLES)]


def attached(model: nn.Module, data: Any, **more: Any) -> PrivateTraining:
    plan = DPPlan(
        samples=SAMPLES, batch_size=SAMPLES, epochs=1, noise_multiplier=1e-9, max_grad_norm=0.5
    )
    return attach(plan, model, torch.optim.SGD(model.parameters(), lr=1.0), data, **more)


def entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="none")


def of_clipped(model: nn.Module, batch: Any, objective: Losses) -> list[Tensor]:
    """The oracle: one example after the other on a plain copy, each clipped, then the mean."""
    model = copy.deepcopy(model)
    total = [torch.zeros_like(parameter) for parameter in model.parameters()]
    for row in range(SAMPLES):
        one = mapped(lambda tensor, row=row: tensor[row : row + 1], batch)
        loss = objective(model, *(one if isinstance(one, (tuple, list)) else (one,))).sum()
        found = torch.autograd.grad(loss, list(model.parameters()))
        norm = torch.cat([gradient.flatten() for gradient in found]).norm()
        total = [
            so_far + gradient * min(1.0, 0.5 / float(norm)) / SAMPLES
            for so_far, gradient in zip(total, found, strict=True)
        ]
    return total


LOOPS: dict[str, tuple[nn.Module, list[Any], Losses, Any]] = {
    "three parts": (
        TwoInputs(),
        examples(lambda i: (drawn(i, 4), drawn(i, 2), i % 3)),
        lambda model, image, table, label: entropy(model(image, table), label),
        None,
    ),
    "a tuple of inputs": (
        TwoInputs(),
        examples(lambda i: ((drawn(i, 4), drawn(i, 2)), i % 3)),
        lambda model, inputs, label: entropy(model(*inputs), label),
        None,
    ),
    "a dictionary of inputs": (
        TwoInputs(),
        examples(lambda i: ({"table": drawn(i, 2), "image": drawn(i, 4)}, i % 3)),
        lambda model, inputs, label: entropy(model(**inputs), label),
        None,
    ),
    "a dictionary": (
        TwoInputs(),
        examples(lambda i: {"image": drawn(i, 4), "table": drawn(i, 2), "label": i % 3}),
        lambda model, batch: entropy(model(batch["image"], batch["table"]), batch["label"]),
        lambda model, batch: model(batch["image"], batch["table"]),
    ),
    "a named tuple": (
        OneInput(lambda logits: logits),
        examples(lambda i: Pair(drawn(i, 4), i % 3)),
        lambda model, image, label: entropy(model(image), label),
        None,
    ),
    "images alone": (
        OneInput(lambda logits: logits),
        examples(lambda i: drawn(i, 4)),
        lambda model, image: (model(image) - image[:, :3]).square().mean(1),
        None,
    ),
    "a tuple out": (
        OneInput(lambda logits: (logits, logits.argmax(1))),
        examples(lambda i: (drawn(i, 4), i % 3)),
        lambda model, image, label: entropy(model(image)[0], label),
        None,
    ),
    "a dataclass out": (
        OneInput(lambda logits: Logits(logits, (logits, logits * 2))),
        examples(lambda i: (drawn(i, 4), i % 3)),
        lambda model, image, label: entropy(model(image).logits, label),
        None,
    ),
    "a dictionary out": (
        TwoInputs(lambda logits: ModelOutput(logits=logits, cache=None)),
        examples(lambda i: (drawn(i, 4), drawn(i, 2), i % 3)),
        lambda model, image, table, label: entropy(model(image, table).logits, label),
        None,
    ),
    "several labels": (
        OneInput(lambda logits: logits),
        examples(lambda i: (drawn(i, 4), (drawn(i, 3) > 0).double())),
        lambda model, image, label: F.binary_cross_entropy_with_logits(
            model(image), label, reduction="none"
        ).mean(1),
        None,
    ),
    "regression": (
        OneInput(lambda logits: logits.sum(1)),
        examples(lambda i: (drawn(i, 4), drawn(i))),
        lambda model, image, label: F.mse_loss(model(image), label, reduction="none"),
        None,
    ),
    "sequences": (
        nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7)),
        examples(lambda i: (torch.arange(i, i + 5) % 7, torch.arange(i, i + 5) * 3 % 7)),
        lambda model, words, label: entropy(model(words).mT, label).mean(1),
        None,
    ),
}


@pytest.mark.parametrize("kind", LOOPS)
def test_a_loop_of_any_structure_moves_as_one_example_at_a_time(kind: str) -> None:
    """The structure comes through, the objective is proved, and the step is that of the oracle."""
    model, data, objective, forward = LOOPS[kind]
    model = copy.deepcopy(model).double()
    before = copy.deepcopy(model)
    private = attached(model, data, forward=forward)
    objective.per_example = True  # type: ignore[attr-defined]
    assert private.check_objective(objective)
    (batch,) = stepped(private, objective)
    assert type(batch) is type(stacked(data[:2]))
    wanted = of_clipped(before, batch, objective)
    for was, now, mean in zip(before.parameters(), model.parameters(), wanted, strict=True):
        # A norm is rounded up by one part in 10^5 before it is clipped.
        close((was - now).detach(), mean, 2e-5)


def stepped(private: PrivateTraining, objective: Losses) -> Any:
    for batch in private.batches:
        given = batch if isinstance(batch, (tuple, list)) else (batch,)
        private.step(objective(private.model, *given))
        # Rows that are filling come last.
        yield mapped(lambda tensor: tensor[:SAMPLES], batch)


def test_an_empty_sample_has_the_structure_of_another() -> None:
    """Named tuples and dictionaries too, every row of it filling."""
    data = [{"pair": Pair(torch.ones(4), 1), "more": (torch.ones(2), 3)} for _ in range(SAMPLES)]
    model = nn.Linear(4, 2)
    plan = DPPlan(samples=SAMPLES, batch_size=1, epochs=3, noise_multiplier=1.0)
    private = attach(
        plan,
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        data,
        forward=lambda model, batch: model(batch["pair"].image),
    )
    found = set()
    for batch in private.batches:
        found.add(tuple(tensors(batch)))
        assert isinstance(batch["pair"], Pair)
        assert len({len(tensor) for tensor in tensors(batch).values()}) == 1
        private.step(model(batch["pair"].image).sum(1))
    assert found == {("['pair'].image", "['pair'].label", "['more'][0]", "['more'][1]")}


def mixing(logits: Tensor) -> Tensor:
    return logits - logits.mean(0)


OUTPUTS: dict[str, tuple[nn.Module, str]] = {
    "mixed in a part": (
        OneInput(lambda logits: {"logits": logits, "centred": mixing(logits)}),
        "a layer mixes examples",
    ),
    "a mean over the batch": (
        OneInput(lambda logits: Logits(logits, (), loss=logits.mean())),
        r"expected outputs with 3 rows, one an example, in every tensor, got shape \[\] at "
        r"\.loss;.*forward=lambda model, batch",
    ),
    "text": (OneInput(lambda logits: (logits, "cat")), r"got str at \[1\];.*forward=lambda"),
    "nothing": (OneInput(lambda logits: None), "in every tensor, got NoneType"),
    "classes": (OneInput(lambda logits: logits.argmax(1)), "expected real numbers in the model's"),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_outputs_that_are_no_examples_rows_are_refused(kind: str) -> None:
    """With the place of the tensor, and what to do."""
    model, message = OUTPUTS[kind]
    with pytest.raises(UnsupportedLayer, match=message):
        attached(copy.deepcopy(model).double(), examples(lambda i: (drawn(i, 4), i % 3)))


def test_a_mean_among_the_outputs_can_be_left_out() -> None:
    """By the cure that the refusal names."""
    model = OneInput(lambda logits: Logits(logits, (), loss=logits.mean())).double()
    data = examples(lambda i: (drawn(i, 4), i % 3))
    private = attached(model, data, forward=lambda model, batch: model(batch[0]).logits)
    for image, label in private.batches:
        assert private.step(entropy(model(image).logits, label))


class Mixed(TwoInputs):
    def forward(self, image: Tensor, table: Tensor) -> Any:
        return super().forward(image, table - table.mean(0))


@pytest.mark.parametrize("kind", ["three parts", "a tuple of inputs", "a dictionary of inputs"])
def test_examples_that_mix_in_one_of_two_inputs_are_refused(kind: str) -> None:
    """The second input is changed as well as the first."""
    with pytest.raises(UnsupportedLayer, match="a layer mixes examples"):
        attached(Mixed().double(), LOOPS[kind][1])


def test_an_objective_that_mixes_in_one_part_of_a_dictionary_is_refused() -> None:
    """A constant of other examples, taken from the table."""
    model, data, _, forward = LOOPS["a dictionary"]
    private = attached(copy.deepcopy(model).double(), data, forward=forward)

    def relative(model: nn.Module, batch: Any) -> Tensor:
        losses = entropy(model(batch["image"], batch["table"]), batch["label"])
        return losses / batch["table"].abs().mean()

    relative.per_example = True  # type: ignore[attr-defined]
    with pytest.raises(StepError, match=r"^relative: changing one example moved"):
        private.check_objective(relative)


def test_a_forward_that_does_not_fit_the_examples_names_the_cure() -> None:
    """What torch says, the shapes, and the argument that says how the loop calls its model."""
    data = examples(lambda i: (drawn(i, 4), i % 3, i))
    message = (
        r"cannot run on .*\[0\] \[3, 4\] torch.float64, .*if your loop calls it otherwise, give"
    )
    with pytest.raises(UnsupportedLayer, match=message):
        attached(nn.Linear(4, 3).double(), data)
    with pytest.raises(PlanError, match=r"^forward: expected a function"):
        attached(nn.Linear(4, 3).double(), data, forward="model")
    attached(nn.Linear(4, 3).double(), data, forward=lambda model, batch: model(batch[0]))


def test_a_tensor_of_other_rows_is_refused() -> None:
    """A length that is the batch's, say."""

    class Counted:
        batch_by_indices = True

        def __len__(self) -> int:
            return SAMPLES

        def __getitem__(self, index: int) -> Any:
            return torch.ones(4), 0, SAMPLES

        def batch(self, indices: Tensor) -> Any:
            return torch.ones(len(indices), 4), indices * 0, torch.tensor([SAMPLES])

    with pytest.raises(PlanError, match=r"expected 3 rows in every tensor .*got \[1\] at \[2\]"):
        attached(nn.Linear(4, 2), Counted())


def test_dataclasses_and_subclasses_of_dictionaries_keep_their_type() -> None:
    """What a batch is made of, mapped tensor by tensor; None stays."""
    one = Logits(torch.ones(2), (torch.zeros(2),))
    two = mapped(lambda tensor: tensor + 1, one)
    assert two == replace(one, logits=two.logits, hidden_states=two.hidden_states)
    assert two.logits.tolist() == [2, 2]
    three = mapped(lambda tensor: tensor + 1, ModelOutput(a=torch.ones(1), b=None, c=[one]))
    assert type(three) is ModelOutput
    assert three.c[0].hidden_states[0].tolist() == [1, 1]
    assert tensors(three).keys() == {"['a']", "['c'][0].logits", "['c'][0].hidden_states[0]"}


def test_an_audit_asks_for_pairs() -> None:
    """Its canaries are images with labels."""
    from privacy.audit.canaries import _rows

    with pytest.raises(PlanError, match=r"an audit expects pairs \(image, label\)"):
        _rows(TensorDataset(torch.ones(4, 2)), torch.arange(2))
