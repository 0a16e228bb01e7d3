"""Padding: the length of a row may be that of the longest example beside it.

A model that sees the filling (a mean over all steps, the output at the last one) then gives other
gradients for every example of a batch into which one long example comes: all of them move, and
clipping bounds each of them, not what one does to all. So rows keep one shape, or the model is
proved not to care: run on an example alone and beside longer ones, its outputs and gradients agree.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from privacy.batch import Forward, call_model, mapped, tensors
from privacy.collation import collated, examples_of
from privacy.errors import PlanError, PrivacyError
from privacy.sampling import Collate, MapStyle, PhysicalBatch, read, reads_whole, stacked
from privacy.trial import Trial, random_states_kept, twin

__all__ = ["Shapes", "check_padding", "check_shapes", "shapes_of"]

Shapes = Mapping[str, tuple[int, ...]]
"""The shape of one row of each tensor of a batch, by its place."""

_LOOKED_AT = 32
_TOLERANCE = 1e-4
"""Of two norms, relative: above rounding, and far below what one more step of filling does."""
_LEAST = 1e-2
"""A gradient smaller than this part of the whole one is held against that: it may be rounding."""
_CPU = torch.device("cpu")
_DRAWING = (_DropoutNd, nn.MultiheadAttention, nn.RNNBase)
"""Torch's own layers whose only difference between the modes is that in training they drop."""

_CURE = (
    "pad every example to one fixed length, in the data set's __getitem__ or in collate_fn, or "
    "have the model leave the filling out: give it lengths or a mask beside the rows, and let it "
    "take the mean over real steps, or the output at each row's own last step"
)
_BOUND = (
    "one long example would move the gradient of every other in its batch, which clipping does not "
    "bound"
)
_LOSSES = (
    "; where losses are made step by step, give forward=lambda model, batch: ... that returns "
    "each row's loss over its real steps"
)


def shapes_of(batch: Any) -> Shapes:
    """The shape of one row of each tensor of a batch of any structure."""
    return {place: tuple(each.shape[1:]) for place, each in tensors(batch).items()}


def check_shapes(expected: Shapes | None, batch: Any) -> None:
    """Refuses a batch whose rows have another shape than expected; with None any may come.

    Raises:
        PlanError: The shape is another one. What it is, is not said: it is a private example's.

    Example:
        >>> check_shapes({"[0]": (3,), "[1]": ()}, (torch.rand(8, 3), torch.zeros(8)))
    """
    if expected is None or (found := shapes_of(batch)) == expected:
        return
    place = next((p for p in {**expected, **found} if expected.get(p) != found.get(p)), "")
    raise PlanError(
        f"collate_fn: expected rows of shape {list(expected.get(place, ()))}{place and ' at '}"
        f"{place}, as the examples tried first had, got others: where the length of a row is that "
        f"of the longest in its batch, {_BOUND}. The batch is dropped and costs nothing; {_CURE}; "
        "that a model does so is tried where the examples tried first differ in length"
    )


def check_padding(
    model: nn.Module, dataset: MapStyle, collate: Collate, *, forward: Forward = call_model
) -> Shapes | None:
    """The shape that rows must keep, or None where the model was proved not to see the filling.

    Up to 32 examples, far apart in the data set, are collated each alone and all together. If all
    rows have one shape, that is it. Otherwise a copy of the model runs on a short, a middle and a
    long example, each alone and beside the others: its output and its gradient, of a fixed
    weighting of that output, must agree to 1e-4 of their norms. Dropout is off meanwhile, and what
    begins at zero (biases, the row of an embedding that stands for filling) is not, for noise does
    not leave it there. Nothing is released; model and random states stay as they are.

    Torch's own way of stacking takes examples of one shape only, and is not asked.

    Args:
        model: The model, attached or not; its parameters' device is that of the trial.
        dataset: What examples are read from.
        collate: What makes a batch of them.
        forward: How the loop runs the model on a batch.

    Raises:
        PlanError: The filling shows in the output or the gradient, or they cannot be compared.

    Example:
        >>> data = [(torch.rand(4), i % 2) for i in range(8)]
        >>> own = lambda examples: torch.utils.data.default_collate(examples)
        >>> check_padding(nn.Linear(4, 2), data, own)
        {'[0]': (4,), '[1]': ()}
    """
    if reads_whole(type(dataset)):
        return shapes_of(read(dataset, PhysicalBatch(torch.zeros(1).long(), rows=1, last=True)))
    if collate is stacked:
        return None
    with random_states_kept(_CPU):
        examples = examples_of(dataset, collate, _LOOKED_AT)
        alone = [collated([each], collate) for each in examples]
        together = shapes_of(collated(examples, collate))
        if all(shapes_of(each) == together for each in alone):
            return together
        by_size = sorted(range(len(alone)), key=lambda number: _size(alone[number]))
        chosen = sorted({0, len(by_size) // 2, len(by_size) - 1})
        few = [examples[by_size[place]] for place in chosen]
        _prove(_nudged(model), few, collate, forward)
    return None


def _prove(model: nn.Module, few: Sequence[Any], collate: Collate, forward: Forward) -> None:
    """Runs the model on each example alone and before the others; refuses what differs."""
    for number, example in enumerate(few):
        beside = [*few[:number], *few[number + 1 :]]
        alone, joint = (collated([example, *more], collate) for more in ([], beside))
        _check_targets(alone, joint, forward)
        seen = [_seen(model, batch, forward) for batch in (alone, joint)]
        (output, gradient), (padded, moved) = seen
        if [each.shape for each in output] != [each.shape for each in padded]:
            raise PlanError(
                "collate_fn: it pads rows to the longest in the batch, and the model's outputs "
                "have another shape with more filling, so that nobody can tell whether it shows "
                f"in the losses; {_CURE}{_LOSSES}"
            )
        if _apart(output, padded) or _apart(gradient, moved):
            what = "output" if _apart(output, padded) else "gradient"
            raise PlanError(
                "collate_fn: it pads rows to the longest in the batch, and the model sees the "
                f"filling: the {what} of an example alone is another one beside longer examples. "
                f"So {_BOUND}; {_CURE}"
            )


def _check_targets(alone: Any, joint: Any, forward: Forward) -> None:
    """Refuses targets whose length depends on the batch: what the loss does there is not seen."""
    if forward is not call_model or not isinstance(alone, (tuple, list)) or len(alone) < 2:
        return
    if shapes_of(alone[-1]) != shapes_of(joint[-1]):
        raise PlanError(
            "collate_fn: it pads targets to the longest in the batch, and what the loss does with "
            "the filling is not seen; pad them to one fixed length, in the data set's __getitem__ "
            f"or in collate_fn{_LOSSES}"
        )


def _seen(model: nn.Module, batch: Any, forward: Forward) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs of the first row, and the gradient of their fixed weighting."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    given = mapped(lambda tensor: tensor.to(trainable[0].device), batch)
    trial = Trial(model=model, examples=given, forward=forward)
    weights = torch.Generator().manual_seed(0)
    try:
        with torch.enable_grad():
            rows = [each[0] for each in trial.run(trial.examples) if each.is_floating_point()]
            loss = torch.stack([_weighed(row, weights) for row in rows]).sum()
            found = torch.autograd.grad(loss, trainable, allow_unused=True)
    except (PrivacyError, RuntimeError) as error:
        raise PlanError(
            "collate_fn: it pads rows to the longest in the batch, and the model cannot be tried "
            f"on rows of several lengths ({error}); {_CURE}"
        ) from error
    if all(each is None for each in found):
        raise PlanError(
            "forward: expected a function that runs the model that it is given, for a copy is "
            "tried on rows of several lengths; write forward=lambda model, batch: model(...)"
        )
    zeros = [torch.zeros_like(p) if g is None else g for p, g in zip(trainable, found, strict=True)]
    return [row.detach() for row in rows], zeros


def _weighed(row: Tensor, generator: torch.Generator) -> Tensor:
    """A sum with weights that no symmetry of the model has."""
    return (row * torch.randn(row.shape, generator=generator).to(row)).sum().float()


def _apart(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    """Whether two lists of tensors of the same shapes differ beyond rounding."""
    pairs = [(a.double(), b.double()) for a, b in zip(one, other, strict=True)]
    whole = float(sum((a.square().sum() for a, _ in pairs), torch.zeros(())).sqrt())
    for tensor, (a, b) in zip(one, pairs, strict=True):
        tolerance = max(_TOLERANCE, torch.finfo(tensor.dtype).eps)
        # Not `>`: what is not a number differs.
        if not float((a - b).norm()) <= tolerance * max(float(a.norm()), _LEAST * whole):
            return True
    return False


def _nudged(model: nn.Module) -> nn.Module:
    """A copy that draws nothing by torch's layers, and in which nothing is zero or all alike."""
    try:
        model = twin(model)
    except Exception as error:
        raise PlanError(
            "collate_fn: it pads rows to the longest in the batch, and whether the model sees the "
            f"filling is tried on a copy, which cannot be made: {type(error).__name__}: {error}; "
            "pad every example to one fixed length"
        ) from error
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            drawn = torch.rand(parameter.shape, generator=generator).to(parameter) * 0.1
            alike = bool((parameter == parameter.flatten()[:1]).all())
            parameter.add_(drawn * ((parameter == 0) | alike))
    for module in model.modules():
        if isinstance(module, _DRAWING):
            module.training = False
    return model


def _size(batch: Any) -> int:
    return sum(each.numel() for each in tensors(batch).values())
