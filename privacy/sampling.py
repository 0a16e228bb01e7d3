"""Poisson sampling: every example enters every step by its own secret coin.

A sample's size varies, and may be zero; it is a step all the same. It is cut into physical batches,
filled up with masked rows, so that few shapes occur and an empty sample still has a batch. Shuffled
batches have another privacy (Annamalai et al. 2024, arXiv 2411.10614), and are not here.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import default_collate

from privacy.batch import mapped, tensors
from privacy.errors import PlanError, PrivacyError
from privacy.noise import SecureGenerator
from privacy.validate import whole

__all__ = [
    "Collate",
    "MapStyle",
    "PhysicalBatch",
    "PhysicalBatches",
    "cut",
    "read",
    "reads_whole",
    "sample_indices",
    "stacked",
]


_SHOWN = 8


class MapStyle(Protocol):
    """A data set that knows its length, of (image, label) or other examples of tensors."""

    def __len__(self) -> int:
        """Number of examples."""

    def __getitem__(self, index: int, /) -> Any:
        """The example at `index`."""


Collate = Callable[[list[Any]], Any]
"""Stacks examples into a batch, in each of whose tensors dimension 0 is the example."""


@dataclass(frozen=True, kw_only=True)
class PhysicalBatches:
    """How a sample is cut: this changes speed and memory, never the privacy.

    Attributes:
        size: Most rows in one physical batch, at least 1.
        multiple: The last one is filled up to a multiple of this many rows; `size` gives wholly
            fixed shapes.

    Raises:
        PlanError: A value is out of its range.

    Example:
        >>> PhysicalBatches(size=512).multiple
        8
    """

    size: int = 512
    multiple: int = 8

    def __post_init__(self) -> None:
        try:
            size = whole("size", self.size)
            whole("multiple", self.multiple, most=size)
        except PlanError as error:
            raise PlanError(
                "physical batches: expected size >= 1 and multiple in [1, size], got "
                f"size={self.size}, multiple={self.multiple}"
            ) from error


@dataclass(frozen=True)
class PhysicalBatch:
    """Part of one Poisson sample: the examples in it, int64 [k], k >= 0, in the first k `rows`.

    The other rows are filling. The `last` batch completes the sample. Where a unit is a person,
    each has as many adjacent rows, whose `weights`, float64 [persons, rows of each], add up to 1;
    by default each row is a unit.
    """

    indices: Tensor
    rows: int
    last: bool
    weights: Tensor | None = None

    def mask(self) -> Tensor:
        """Which units are there, bool [units]; the others are filling."""
        each = 1 if self.weights is None else self.weights.shape[1]
        return torch.arange(self.rows // each) < len(self.indices) // each

    def shares(self) -> Tensor | None:
        """What each row counts in its unit's mean, [units, rows of each]; None where it is all."""
        if self.weights is None:
            return None
        filling = self.rows // self.weights.shape[1] - len(self.weights)
        return torch.cat([self.weights, self.weights.new_zeros(filling, self.weights.shape[1])])


def sample_indices(generator: SecureGenerator, *, samples: int, sampling_rate: float) -> Tensor:
    """Draws one Poisson sample: indices in ascending order, int64 [k].

    Guarantee: each example is in it independently, with `sampling_rate` to within 2^-53.
    """
    return generator.bernoulli(samples, sampling_rate).nonzero().squeeze(1)


def cut(indices: Tensor, batches: PhysicalBatches) -> list[PhysicalBatch]:
    """Cuts a sample into physical batches of about equal size.

    An empty sample becomes one batch of filling: it is a step like any other.
    """
    count = max(1, -(-len(indices) // batches.size))
    found, multiple = [], batches.multiple
    for number, part in enumerate(torch.tensor_split(indices, count)):
        filled = max(1, -(-len(part) // multiple)) * multiple
        rows = min(filled, max(batches.size, len(part)))
        found.append(PhysicalBatch(part, rows=rows, last=number == count - 1))
    return found


def stacked(examples: list[Any]) -> Any:
    """Torch's `default_collate`; but of plain tuples it makes a tuple, as it does of named ones."""
    batch = default_collate(examples)
    return tuple(batch) if type(examples[0]) is tuple and type(batch) is list else batch


def read(dataset: MapStyle, batch: PhysicalBatch, collate: Collate = stacked) -> Any:
    """Reads a physical batch, with zeros in the rows that are filling.

    A data set whose class says `batch_by_indices = True` is read whole, by its method
    `batch(indices)`; any other one example at a time, its examples then stacked by `collate`. What
    they are stays: pairs, named tuples, dictionaries of tensors, whose dimension 0 is the example.
    """
    indices = batch.indices
    # An empty sample still needs to know what an example looks like.
    wanted = indices if len(indices) else torch.zeros(1, dtype=torch.int64)
    examples = _stacked(dataset, wanted, collate)
    filling = batch.rows - len(indices)

    def filled(values: Tensor) -> Tensor:
        values = values[: len(indices)]
        return torch.cat([values, values.new_zeros(filling, *values.shape[1:])])

    return mapped(filled, examples) if filling or not len(indices) else examples


def _stacked(dataset: MapStyle, indices: Tensor, collate: Collate) -> Any:
    by_indices = reads_whole(type(dataset))
    found = _read(dataset, indices) if by_indices else [_read(dataset, i) for i in indices.tolist()]
    try:
        examples = found if by_indices else collate(found)
    except Exception as error:
        raise PlanError(
            "dataset: expected examples (image, label), or tuples or dictionaries, of tensors or "
            "numbers, all of one shape; the examples read could not be stacked: "
            f"{error}{_of_pictures(found)}"
        ) from error
    try:
        values = tensors(examples)
    except PlanError as error:
        raise PlanError(f"dataset: its examples, {error}; leave it out of them") from error
    if any(each.is_nested or each.layout != torch.strided for each in values.values()):
        raise PlanError("dataset: expected dense images and labels, all of one shape; convert them")
    rows = {place: list(each.shape[:1]) for place, each in values.items()}
    wrong = next((place for place, count in rows.items() if count != [len(indices)]), None)
    if not rows or wrong is not None:
        got = "no tensor" if wrong is None else rows[wrong]
        raise PlanError(
            f"dataset: expected {len(indices)} rows in every tensor for {len(indices)} indices, "
            f"got {got}{f' at {wrong}' if wrong else ''}"
        )
    return examples


def _read(dataset: Any, wanted: Any) -> Any:
    """An example, or by a tensor of indices several; whatever fails there is told with its index.

    Nothing passes as it is: a StopIteration would end the loop as if the plan were done.
    """
    try:
        return dataset.batch(wanted) if isinstance(wanted, Tensor) else dataset[wanted]
    except PrivacyError:
        raise
    except Exception as error:
        told = f"could not be read: {type(error).__name__}: {error}"
        if isinstance(error, IndexError):
            index = int(wanted.max()) if isinstance(wanted, Tensor) else wanted
            raise PlanError(
                f"dataset: its example {index} {told}; it has {len(dataset)} now, and must have as "
                "many, at each index from 0 on, as when it was attached"
            ) from error
        if isinstance(wanted, Tensor):
            some = ", ".join(map(str, wanted[:_SHOWN].tolist()))
            more = ", ..." if len(wanted) > _SHOWN else ""
            raise PlanError(f"dataset: one of its examples {some}{more} {told}") from error
        raise PlanError(f"dataset: its example {wanted} {told}") from error


def _of_pictures(pairs: Any) -> str:
    """The cure where an example is PIL's picture; else nothing."""
    first = pairs[0] if isinstance(pairs, list) and pairs else ()
    values = first.values() if isinstance(first, Mapping) else first
    if not isinstance(values, Iterable) or isinstance(values, Tensor):
        return ""
    if not any(type(value).__module__.startswith("PIL.") for value in values):
        return ""
    return (
        "; a PIL image is no tensor: give the data set transform=torchvision.transforms.ToTensor(),"
        " or torch.from_numpy(numpy.array(image)) in its __getitem__, channels first"
    )


def reads_whole(kind: type) -> bool:
    """Whether `batch(indices)` of this class gives what its `__getitem__` would.

    Asked of the class: a wrapper that passes unknown names on would be read past, and so would a
    subclass with a `__getitem__` of its own.
    """
    owners = [
        next((index for index, owner in enumerate(kind.__mro__) if name in vars(owner)), None)
        for name in ("batch_by_indices", "batch", "__getitem__")
    ]
    marked, batch, item = owners
    if marked is None or batch is None or item is None or item < batch:
        return False
    return getattr(kind, "batch_by_indices", None) is True
