"""Collation: examples become a batch, and each of them reaches its own row only.

A `collate_fn` is people's own code. One that mixes examples (mixup, statistics of the batch) or
puts them in another order (sorted by length) gives rows that are not one example's: clipping them
would bound nobody. So it is called on a few examples, of which one is then replaced by another.
"""

import copy
import random
from collections.abc import Mapping
from itertools import permutations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from privacy.batch import tensors
from privacy.errors import PlanError
from privacy.sampling import Collate, MapStyle, PhysicalBatch, read, stacked
from privacy.trial import random_states_kept

__all__ = ["check_collate", "collated", "examples_of"]

_EXAMPLES = 6
_PASSES = 60
"""What mixes in one of ten calls is seen in one of these with a probability of 99.8 percent."""
_APART = 997
"""Numbers passed over between two passes: the next one begins elsewhere."""
_CPU = torch.device("cpu")


def check_collate(dataset: MapStyle, collate: Collate) -> None:
    """Refuses a `collate_fn` whose rows depend on other examples than theirs, at no cost.

    It is called on a few examples, far apart in the data set, from random states that are put back.
    Batches that another example makes longer are not compared: see `privacy.padding`. What shows in
    rare calls, or for rare examples only, can pass.

    Raises:
        PlanError: A row moved with another example; or the same examples and random states gave
            another batch, so that nobody can tell.

    Example:
        >>> data = [(torch.tensor([float(i)]), i) for i in range(8)]
        >>> check_collate(data, torch.utils.data.default_collate)
    """
    if collate is stacked:
        return
    with random_states_kept(_CPU):
        examples = examples_of(dataset, collate, _EXAMPLES)
        pairs = list(permutations(range(len(examples)), 2))
        for number in range(_PASSES if pairs else 0):
            row, other = pairs[number % len(pairs)]
            before = tensors(collated(examples, collate))
            if number == 0 and _moved(before, tensors(collated(examples, collate)), row=None):
                raise PlanError(
                    "collate_fn: the same examples gave another batch in a second call, so nobody "
                    "can tell whether it keeps them apart; draw what is random from the global "
                    "generators of torch, numpy or random, or in the data set's __getitem__"
                )
            replaced = [*examples[:row], examples[other], *examples[row + 1 :]]
            if place := _moved(before, tensors(collated(replaced, collate)), row=row):
                raise PlanError(
                    f"collate_fn: with one example replaced by another, other rows of {place} "
                    "changed: it mixes examples (mixup, statistics of the batch) or puts them in "
                    "another order, so that a row is not one example's and clipping it would bound "
                    "nobody; stack them in their order, each as it is alone"
                )
            _pass_over()


def examples_of(dataset: MapStyle, collate: Collate, most: int) -> list[Any]:
    """A few examples, far apart, as the data set gives them; none of one that stacks them itself.

    Raises:
        PlanError: They cannot be read, or not be stacked by `collate`.
    """
    found: list[Any] = []

    def seen(examples: list[Any]) -> Any:
        found.extend(examples)
        return collate(copy.deepcopy(examples))

    count = min(most, len(dataset))
    indices = torch.linspace(0, len(dataset) - 1, count).long()
    read(dataset, PhysicalBatch(indices, rows=count, last=True), seen)
    return found


def collated(examples: list[Any], collate: Collate) -> Any:
    """The batch of these examples; the random states stay, and so do the examples.

    Raises:
        PlanError: They cannot be stacked, or not with a row for each.
    """
    batch = PhysicalBatch(torch.arange(len(examples)), rows=len(examples), last=True)
    with random_states_kept(_CPU):
        # Each by itself: of one that is there twice a deep copy would be one, too.
        return read([copy.deepcopy(each) for each in examples], batch, collate)


def _moved(before: Mapping[str, Tensor], after: Mapping[str, Tensor], *, row: int | None) -> str:
    """Where another row than this one differs beyond rounding; empty where none does."""
    if [each.shape for each in before.values()] != [each.shape for each in after.values()]:
        return "" if row is not None else "the batch"
    for place, values in before.items():
        others = torch.arange(len(values)) != (-1 if row is None else row)
        one, two = (each.detach()[others].cpu() for each in (values, after[place]))
        if one.dtype.is_floating_point or one.dtype.is_complex:
            same = torch.allclose(one, two, rtol=1e-5, atol=1e-7, equal_nan=True)
        else:
            same = torch.equal(one, two)
        if not same:
            return place or "the batch"
    return ""


def _pass_over() -> None:
    torch.rand(_APART)
    np.random.mtrand.random_sample(_APART)
    for _ in range(_APART):
        random.random()  # noqa: S311 - it passes them over
