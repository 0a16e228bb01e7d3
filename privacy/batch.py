"""Batches and outputs of any structure: tensors in tuples, dictionaries, dataclasses, row by row.

Whatever the structure, dimension 0 of every tensor in it is the example. Named tuples, dictionaries
and dataclasses stay what they are.
"""

import copy
import dataclasses
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

from torch import Tensor, nn

from privacy.errors import PlanError

__all__ = ["Forward", "call_model", "cut_rows", "described", "images_of", "mapped", "tensors"]

Forward = Callable[[nn.Module, Any], Any]
"""How a loop runs its model on a batch: `(model, batch) -> outputs`."""

_FORWARD = "give privacy.attach(..., forward=lambda model, batch: model({})), as your loop calls it"


def tensors(batch: Any, name: str = "") -> dict[str, Tensor]:
    """Every tensor of a batch or an output by its place, such as `[0]`, `['words']` or `.logits`.

    Raises:
        PlanError: There is something else in it than tensors and None.
    """
    if isinstance(batch, Tensor):
        return {name: batch}
    if batch is None:
        return {}
    found: dict[str, Tensor] = {}
    for place, value in _parts(batch, name):
        found |= tensors(value, place)
    return found


def mapped(function: Callable[[Tensor], Tensor], batch: Any) -> Any:
    """The same structure, with each tensor replaced by what `function` gives for it."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, MutableMapping):
        clone = copy.copy(batch)
        for key, value in batch.items():
            clone[key] = mapped(function, value)
        return clone
    if isinstance(batch, (tuple, list)):
        values = [mapped(function, value) for value in batch]
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
    if _is_dataclass(batch):
        fields = [field.name for field in dataclasses.fields(batch) if field.init]
        return dataclasses.replace(
            batch, **{name: mapped(function, getattr(batch, name)) for name in fields}
        )
    return batch


def cut_rows(batch: Any, rows: Any) -> Any:
    """The batch of some rows: a slice, or an int64 tensor of indices."""
    return mapped(lambda tensor: tensor[rows], batch)


def described(batch: Any) -> str:
    """Places, shapes and types of a batch's tensors, for a message."""
    return ", ".join(
        f"{place}{place and ' '}{list(tensor.shape)} {tensor.dtype}"
        for place, tensor in tensors(batch).items()
    )


def images_of(batch: Any) -> Tensor | None:
    """What a batch `(images, labels)` holds in the first place, if it is one tensor."""
    pair = isinstance(batch, (tuple, list)) and len(batch) == 2
    return batch[0] if pair and isinstance(batch[0], Tensor) else None


def call_model(model: nn.Module, batch: Any) -> Any:
    """How a model is run on a batch unless a `Forward` says otherwise.

    The last part of a tuple is the target. Of two parts the first is what the model is given: a
    tensor, a tuple of its arguments, or a dictionary of them by name; of more all but the last.

    Raises:
        PlanError: The batch is a dictionary or a dataclass: nobody knows which are inputs.
    """
    if isinstance(batch, Tensor):
        return model(batch)
    if not isinstance(batch, (tuple, list)):
        first = next(iter(tensors(batch)), "['image']")
        raise PlanError(
            f"dataset: its examples are of type {type(batch).__name__}, in which nobody knows the "
            f"model's inputs; {_FORWARD.format('batch' + first)}"
        )
    inputs = batch[0] if len(batch) == 2 else batch[: max(1, len(batch) - 1)]
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    return model(**inputs) if isinstance(inputs, Mapping) else model(inputs)


def _parts(batch: Any, name: str) -> list[tuple[str, Any]]:
    """What a container holds, with the place of each."""
    if isinstance(batch, Mapping):
        return [(f"{name}[{key!r}]", value) for key, value in batch.items()]
    if hasattr(batch, "_fields"):
        return [(f"{name}.{field}", getattr(batch, field)) for field in batch._fields]
    if isinstance(batch, (tuple, list)):
        return [(f"{name}[{index}]", value) for index, value in enumerate(batch)]
    if _is_dataclass(batch):
        fields = [field.name for field in dataclasses.fields(batch)]
        return [(f"{name}.{field}", getattr(batch, field)) for field in fields]
    raise PlanError(
        f"expected tensors in tuples, dictionaries or dataclasses, got {type(batch).__name__}"
        f"{f' at {name}' if name else ''}"
    )


def _is_dataclass(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)
