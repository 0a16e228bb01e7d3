"""Whether an objective keeps examples apart: what it declares, and a proof on a few examples.

`private.step` follows the graph of the losses, where what an objective computes from other examples
as a constant (a mean of the batch, detached keys, another example's image) leaves no trace. Here
one example is changed and the others' losses are watched, on copies: nothing is released or spent.
"""

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from privacy.batch import cut_rows, described, mapped, tensors
from privacy.errors import PlanError, PrivacyError, StepError
from privacy.sampling import Collate, MapStyle, PhysicalBatch, read, stacked
from privacy.trial import random_states_kept, twin

__all__ = ["ExamplesMix", "check_declared", "few_examples", "keeps_apart"]

_EXAMPLES = 5
_SMALLEST = 2
# Larger than what another way of rounding does to a loss, far below what mixing does.
_TOLERANCE = 1e-3
_LEAST = 1e-6
# With a row less a mean over the batch is larger by a fifth or more; an attack finds about as much.
_SCALE = 1.1


class ExamplesMix(StepError):
    """Losses moved with other examples, or with their number."""


def check_declared(objective: object) -> None:
    """Refuses an objective that does not say that each loss depends on its own example only."""
    if getattr(objective, "per_example", None) is not True:
        reason = getattr(objective, "reason", "") or (
            "a loss that depends on other examples has no bounded per-example contribution; "
            "use one loss an example"
        )
        raise StepError(
            f"{_name(objective)}: expected an objective with per_example = True: {reason}"
        )
    if not callable(objective):
        raise StepError(
            f"{_name(objective)}: expected a function (model, images, labels) -> losses"
        )


def few_examples(dataset: MapStyle, collate: Collate = stacked) -> Any:
    """A few examples of a data set, far apart: many sets are in the order of their labels."""
    count = min(_EXAMPLES, len(dataset))
    indices = torch.linspace(0, len(dataset) - 1, count).long()
    return read(dataset, PhysicalBatch(indices, rows=count, last=True), collate)


def keeps_apart(objective: Any, model: nn.Module, examples: Any) -> bool:
    """Changes an example and looks whether the losses of others move, or their gradient.

    In batches of all examples but one or two, in the first and the last row, and in the batch that
    follows: something may be carried over. Each trial has a copy of the objective as it is, and
    begins at the present random states of torch, numpy and Python, which are put back. Where
    nothing is drawn, the losses may not depend on the number of rows either.

    Returns whether this could be tested. It cannot with fewer than three examples, where model or
    objective cannot be copied, where the same call gives other losses (they are drawn from a
    generator that is no part of the objective), or where losses are not finite.
    """
    device = next(model.parameters()).device
    count = _count(examples)
    batch = mapped(lambda tensor: tensor.nan_to_num().to(device), examples)
    sizes = [rows for rows in (count - 1, count - 2) if rows >= _SMALLEST]
    asked = [_tested(objective, model, batch, rows) for rows in sizes]
    seen = [each for each in asked if each is not None]
    if len(seen) > 1 and all(torch.equal(each.losses, each.following) for each in seen):
        _check_scale(_name(objective), seen[0].losses[: sizes[1]], seen[1].losses)
    return len(seen) == len(sizes) > 0


def _count(examples: Any) -> int:
    """How many examples there are; refuses whatever is no batch of tensors with as many rows."""
    try:
        found = tensors(examples)
    except PlanError as error:
        raise StepError(f"examples: {error}") from error
    counts = sorted({-1 if not tensor.dim() else len(tensor) for tensor in found.values()})
    if len(counts) != 1 or counts[0] < 0:
        shapes = ", ".join(f"{place} {list(t.shape)}".strip() for place, t in found.items())
        raise StepError(
            "examples: expected a batch, (images, labels) say, with as many rows in every tensor, "
            f"got {shapes or type(examples).__name__}"
        )
    return counts[0]


class _Seen(NamedTuple):
    """The result of one trial: losses of a batch and of the one that follows it, [n, K] each."""

    losses: Tensor
    following: Tensor
    gradient: Tensor


def _tested(objective: Any, model: nn.Module, examples: Any, rows: int) -> _Seen | None:
    """A batch of so many rows, whose losses may not move with others; None if two calls differ."""
    batch = cut_rows(examples, slice(rows))
    following = mapped(lambda tensor: tensor.flip(0), batch)
    found = _trial(objective, model, batch, following)
    # The batch follows itself: only where its two calls give the same losses is nothing drawn, so
    # that `keeps_apart` may compare the losses of two numbers of rows.
    again = _trial(objective, model, batch, following=batch)
    if found is None or again is None or _moved(found, again._replace(following=found.following)):
        return None
    for row in (0, rows - 1):
        changed = _trial(objective, model, _changed(examples, rows, row), following)
        if changed is None:
            return None
        if what := _moved(found, changed, apart_from=row):
            raise ExamplesMix(
                f"{_name(objective)}: changing one example moved {what}, so what an example "
                "contributes has no bound: no loss may use other examples' values, not even as a "
                "constant (a mean over the batch, detached keys, mixed images), nor what an "
                "earlier batch left"
            )
    return again


def _check_scale(name: str, more: Tensor, fewer: Tensor) -> None:
    """Refuses losses of the same examples that differ with the number of rows beside them."""
    ratio = float(fewer.sum() / more.sum())
    if bool(more.sum()) and not 1 / _SCALE <= ratio <= _SCALE:
        raise ExamplesMix(
            f"{name}: expected losses that do not know how many rows there are, but with one row "
            f"less the same examples' losses changed by a factor of {ratio:.3g}: how many examples "
            "a sample has is secret, and the private step divides by the plan's batch size itself"
        )


def _changed(examples: Any, rows: int, row: int) -> Any:
    """A batch with another example in one of its rows."""

    def changed(tensor: Tensor) -> Tensor:
        values, other = tensor[:rows].clone(), tensor[rows]
        different = tensor[tensor != values[row]] if tensor.dim() == 1 else tensor[:0]
        if len(different):
            other = different[0]
        elif torch.equal(other, values[row]) and tensor.is_floating_point():
            other = 1 - other * 0.5
        values[row] = other
        return values

    return mapped(changed, examples)


def _trial(objective: Any, model: nn.Module, batch: Any, following: Any) -> _Seen | None:
    """Calls copies twice, from the present random states; None if nothing can be compared."""
    try:
        other = twin(model)
        own = copy.deepcopy(objective, {id(model): other})
    except Exception:
        # It holds what cannot be copied, a lock or a file; asked itself, it would be changed.
        return None
    with random_states_kept(next(model.parameters()).device), torch.enable_grad():
        losses = _losses(own, other, batch)
        middle = losses[1:-1].sum()
        trainable = [p for p in other.parameters() if p.requires_grad]
        found: tuple[Tensor, ...] = ()
        if middle.requires_grad:
            found = torch.autograd.grad(
                middle, trainable, retain_graph=True, materialize_grads=True
            )
            # As in training: what the objective carries to the next batch may move only then.
            torch.autograd.backward(losses.sum())
        after = _losses(own, other, following)
    gradient = torch.cat([each.flatten() for each in found] or [losses.new_zeros(0)])
    seen = _Seen(losses.detach(), after.detach(), gradient)
    return seen if all(bool(each.isfinite().all()) for each in seen) else None


def _losses(objective: Any, model: nn.Module, batch: Any) -> Tensor:
    # What it is given it may change in place.
    rows, given = _count(batch), mapped(torch.clone, batch)
    try:
        losses = objective(model, *(given if isinstance(given, (tuple, list)) else (given,)))
    except PrivacyError:
        raise
    except Exception as error:
        raise StepError(
            f"{_name(objective)}: expected an objective (model, images, labels) -> losses that "
            f"runs on {rows} examples of the data set, {described(given)}: {type(error).__name__}: "
            f"{error}"
        ) from error
    if not isinstance(losses, Tensor) or losses.shape[:1] != (rows,):
        got = list(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise StepError(
            f"{_name(objective)}: expected one loss an example, shape [{rows}], got {got}: do not "
            'average them (reduction="none")'
        )
    return losses.reshape(rows, -1)


def _moved(before: _Seen, after: _Seen, *, apart_from: int = -1) -> str:
    """Names what moved beyond rounding; one row of the losses may be left out."""
    others = torch.arange(len(before.losses), device=before.losses.device) != apart_from
    # No number is in the message: it would be one of the private examples'.
    pairs = {
        "the losses of others": (before.losses[others], after.losses[others]),
        "the gradient of others": (before.gradient, after.gradient),
        "the losses of the next batch": (before.following, after.following),
    }
    for what, (one, two) in pairs.items():
        if one.numel() and not float((one - two).abs().max()) <= _TOLERANCE * max(
            float(one.abs().max()), _LEAST
        ):
            return what
    return ""


def _name(objective: object) -> str:
    return str(getattr(objective, "__name__", type(objective).__name__))
