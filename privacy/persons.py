"""Persons: whose the examples of a data set are, and which of them a step takes of each.

A step that protects persons samples persons. Up to K examples of each go into it, and their
gradients are averaged before the mean is clipped (user-level sampling: Charles et al. 2024, arXiv
2407.07737), so that a person counts once however many examples are theirs. Persons with about as
many examples are put into physical batches of their own: each is a row of one width.
"""

import copy
import hashlib
import math
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset

from privacy.errors import PlanError
from privacy.noise import SecureGenerator
from privacy.sampling import PhysicalBatch, PhysicalBatches, cut
from privacy.validate import shown

__all__ = ["Persons", "groups_of", "persons_of"]


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Persons:
    """Whose each example of a data set is; made by `of`.

    Attributes:
        rows: Indices of all examples, one person's after the other's, int64 [examples].
        sizes: How many examples each person has, int64 [persons], at least 1.

    Example:
        >>> persons = Persons.of(["ann", "bob", "ann"], examples=3)
        >>> len(persons), persons.sizes.tolist(), persons.rows.tolist()
        (2, [2, 1], [0, 2, 1])
    """

    rows: Tensor
    sizes: Tensor

    @classmethod
    def of(cls, groups: object, *, examples: int) -> "Persons":
        """Persons by one id an example, in the order in which they occur first.

        Ids are of one type that can be hashed, such as text or whole numbers; equal ones are one
        person, and so are texts that differ in blanks around them or in how their accents are
        encoded. Refused are other numbers of ids than of examples, and ids that are missing.
        """
        ids = _listed(groups)
        if len(ids) != examples:
            raise PlanError(
                f"groups: expected {examples} ids, one for each example of the data set and in its "
                f"order, got {len(ids)}"
            )
        _check_ids(ids)
        ids = [unicodedata.normalize("NFC", i).strip() if isinstance(i, str) else i for i in ids]
        numbers: dict[Any, int] = {}
        owners = torch.tensor([numbers.setdefault(each, len(numbers)) for each in ids])
        return cls(rows=owners.argsort(stable=True), sizes=owners.bincount())

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def largest(self) -> int:
        """How many examples the person with the most of them has."""
        return int(self.sizes.max())

    def digest(self) -> str:
        """SHA-256 of whose each example is, whatever the ids are called; 64 hexadecimal digits."""
        digest = hashlib.sha256(len(self.sizes).to_bytes(8, "little"))
        for numbers in (self.sizes, self.rows):
            digest.update(numbers.numpy().astype("<i8").tobytes())
        return digest.hexdigest()

    def cut(
        self, sample: Tensor, batches: PhysicalBatches, generator: SecureGenerator, *, most: int
    ) -> list[PhysicalBatch]:
        """Cuts a sample of persons, int64 [k], into physical batches with all rows of each.

        Up to `most` examples of each are drawn without replacement. A person's rows are adjacent,
        in one batch; a person with fewer than others of the batch is filled up with rows of their
        own that weigh nothing.
        """
        rows, counts = self._drawn(sample, generator, most=most)
        if not len(counts):
            return cut(sample, batches)
        widths = torch.tensor([_width(count, most) for count in counts.tolist()])
        firsts = counts.cumsum(0) - counts
        found: list[PhysicalBatch] = []
        for width in sorted(set(widths.tolist())):
            chosen = widths == width
            # An example beyond a person's last one is their first one again, and so on.
            places = torch.arange(width) % counts[chosen, None]
            table = rows[firsts[chosen, None] + places]
            weights = (torch.arange(width) < counts[chosen, None]) / counts[chosen, None].double()
            found += _cut(table, weights, batches)
        found[-1] = PhysicalBatch(
            found[-1].indices, rows=found[-1].rows, last=True, weights=found[-1].weights
        )
        return found

    def _drawn(
        self, sample: Tensor, generator: SecureGenerator, *, most: int
    ) -> tuple[Tensor, Tensor]:
        """Rows of each sampled person one after the other, and how many of each; int64."""
        sizes = self.sizes[sample]
        owners = torch.arange(len(sample)).repeat_interleave(sizes)
        ranks = torch.arange(len(owners)) - (sizes.cumsum(0) - sizes)[owners]
        firsts = self.sizes.cumsum(0) - self.sizes
        rows = self.rows[firsts[sample][owners] + ranks]
        if bool((sizes > most).any()):
            # Sorted by a key of its own each, then by person: every order is as likely.
            order = generator.uniform(len(rows)).argsort()
            rows = rows[order[owners[order].argsort(stable=True)]][ranks < most]
        return rows, sizes.clamp(max=most)


def persons_of(dataset: object, groups: object, *, examples: int) -> Persons:
    """Whose the examples are by the ids that were given, else by those of the data set itself.

    Raises:
        PlanError: Neither has ids, or they are not one for each example; see `Persons.of`.
    """
    ids = groups_of(dataset) if groups is None else groups
    if ids is None:
        raise PlanError(
            "groups: expected one id an example, since the plan protects persons, got none; give "
            "groups=ids, or the data set an attribute `groups`"
        )
    return Persons.of(ids, examples=examples)


def groups_of(dataset: object) -> object:
    """Whose a data set says its examples are: its attribute `groups`, None where it has none.

    A `torch.utils.data.Subset` has the ids of its examples in what it is a subset of, a
    `ConcatDataset` those of its parts one after the other: equal ids in two parts are one person.

    Raises:
        PlanError: What it is made of has other than one id an example, or, of several parts, not
            all have ids; or a subset's indices are none of what it is taken of.
    """
    own = getattr(dataset, "groups", None)
    if own is not None:
        return own
    if isinstance(dataset, Subset):
        return _of_subset(dataset)
    return _of_parts(dataset) if isinstance(dataset, ConcatDataset) else None


def _of_subset(subset: Subset[Any]) -> list[Any] | None:
    ids = _one_each(subset.dataset, "of which this is a subset")
    if ids is None:
        return None
    try:
        return [ids[int(index)] for index in subset.indices]
    except (TypeError, ValueError, IndexError) as error:
        raise PlanError(
            f"groups: expected a subset whose indices are whole numbers below {len(ids)}: {error}"
        ) from error


def _of_parts(whole: ConcatDataset[Any]) -> list[Any] | None:
    parts = [
        _one_each(part, f"that is part {place} of this one")
        for place, part in enumerate(whole.datasets)
    ]
    known = [ids for ids in parts if ids is not None]
    if known and len(known) < len(parts):
        without = ", ".join(str(place) for place, ids in enumerate(parts) if ids is None)
        raise PlanError(
            f"groups: expected ids in every part of the data set or in none, got none in part "
            f"{without} of {len(parts)}, counted from 0; give these an attribute `groups`, or all "
            "ids as groups=ids; whose example is not known is a person of their own, by an id that "
            "nobody else has"
        )
    return [each for ids in known for each in ids] if known else None


def _one_each(dataset: Any, what: str) -> list[Any] | None:
    """The ids of a data set that another is made of, if it has any: one for each example."""
    found = groups_of(dataset)
    if found is None:
        return None
    ids, examples = _listed(found), len(dataset)
    if len(ids) != examples:
        raise PlanError(
            f"groups: expected {examples} ids, one for each example of the data set {what}, got "
            f"{len(ids)}"
        )
    return ids


def _listed(groups: object) -> list[Any]:
    """Ids as a list; a text or a mapping is none."""
    if isinstance(groups, (str, bytes, Mapping)) or not isinstance(groups, Iterable):
        raise PlanError(
            "groups: expected a list of ids, one for each example of the data set, got "
            f"{type(groups).__name__}"
        )
    if isinstance(groups, (Tensor, np.ndarray)):
        if groups.ndim != 1:
            raise PlanError(
                f"groups: expected ids in one dimension, got shape {list(groups.shape)}"
            )
        return list(groups.tolist())
    return list(groups)


def _check_ids(ids: list[Any]) -> None:
    """Refuses ids that are missing, cannot be compared, or are of several types."""
    for row, each in enumerate(ids):
        try:
            missing = each is None or not bool(each == each)  # noqa: PLR0124 - NaN is not itself
            alike = missing or _names(each)
        except (TypeError, ValueError, RuntimeError) as error:
            raise PlanError(
                f"groups: expected ids that can be hashed, such as text or whole numbers, got "
                f"{shown(each)} of example {row}: {error}"
            ) from error
        if missing:
            raise PlanError(
                f"groups: expected an id for each example, got {each} for example {row}; who is "
                "not known is a person of their own: give them an id that nobody else has"
            )
        if not alike:
            raise PlanError(
                f"groups: expected ids that are equal where they name one person, such as text or "
                f"whole numbers, got {shown(each)} of example {row}, which equals nothing but "
                "itself: all examples would be of different persons; convert them, tensors by "
                "item()"
            )
    kinds = Counter(type(each).__name__ for each in ids)
    if len(kinds) > 1:
        raise PlanError(
            f"groups: expected ids of one type, got {', '.join(sorted(kinds))}: 1 and '1' would be "
            "two persons; convert them"
        )


def _names(each: Any) -> bool:
    """Whether an id names somebody, and is not merely itself, as a tensor or a bare object is."""
    if type(each) in (str, int, bytes):
        return True
    twin = copy.deepcopy(each)
    return bool(twin == each) and hash(twin) == hash(each)


def _width(count: int, most: int) -> int:
    """The row's width for a person with so many examples: few widths, at most half in vain."""
    return min(1 << math.ceil(math.log2(count)), most)


def _cut(table: Tensor, weights: Tensor, batches: PhysicalBatches) -> list[PhysicalBatch]:
    """Physical batches of whole rows of a table of indices, int64 [k, width]."""
    width = table.shape[1]
    most = max(1, batches.size // width)
    multiple = min(most, -(-batches.multiple // width))
    found = []
    for some in torch.tensor_split(torch.arange(len(table)), -(-len(table) // most)):
        persons = -(-len(some) // multiple) * multiple
        rows = min(persons, max(most, len(some))) * width
        weighed = weights[some] if width > 1 else None
        found.append(PhysicalBatch(table[some].flatten(), rows=rows, last=False, weights=weighed))
    return found
