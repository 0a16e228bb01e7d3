"""Examples of a group of people, as callers have them: a map-style data set, or batches.

Read by rows, in an order that a generator gives, so that a seed fixes it and no step depends on how
the examples came in.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from privacy.errors import UnlearningError
from privacy.validate import shown

__all__ = ["Examples"]

_AT_ONCE = 512
_WANTED = (
    "a map-style data set of pairs of image and label, or a list of batches (images [n, ...], "
    "labels [n])"
)


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Examples:
    """Images and whole-number labels, at least one of each.

    A data set is read row by row when it is needed, a list of batches is put into one tensor each.

    Attributes:
        name: By which errors tell them.

    Example:
        >>> some = Examples.of("forget", [(torch.zeros(3, 2), torch.arange(3))])
        >>> len(some), [len(labels) for _, labels in some.batches(2)]
        (3, [2, 1])
    """

    name: str
    _source: Any
    _count: int
    _whole: tuple[Tensor, Tensor] | None

    @classmethod
    def of(cls, name: str, value: Any) -> "Examples":
        """What a caller passed in.

        Raises:
            UnlearningError: It is no data set and no list of batches, or has no example.
        """
        if isinstance(value, cls):
            return value
        indexed = hasattr(value, "__getitem__") and hasattr(value, "__len__")
        if isinstance(value, (str, bytes, Tensor, dict)) or not (
            indexed or isinstance(value, Iterable)
        ):
            raise UnlearningError(f"{name}: expected {_WANTED}, got {_kind(value)}")
        source = value if indexed else list(value)
        count = len(source)
        if not count:
            raise UnlearningError(f"{name}: expected at least one example, got none")
        _, label = _pair(name, _row_of(name, source, 0), 0)
        if not (isinstance(label, Tensor) and label.ndim == 1):
            _example(name, source[0], 0)
            return cls(name=name, _source=source, _count=count, _whole=None)
        batches = [_batch(name, _row_of(name, source, place), place) for place in range(count)]
        images, labels = zip(*batches, strict=True)
        try:
            together = torch.cat(images), torch.cat(labels)
        except RuntimeError as error:
            raise UnlearningError(
                f"{name}: expected batches of images of one shape, got others: {error}"
            ) from None
        if not len(together[1]):
            raise UnlearningError(f"{name}: expected at least one example, got none")
        return cls(name=name, _source=None, _count=len(together[1]), _whole=together)

    def __len__(self) -> int:
        """How many there are."""
        return self._count

    def take(self, rows: Iterable[int]) -> tuple[Tensor, Tensor]:
        """Images `[n, ...]` and labels int64 `[n]` of these rows.

        Raises:
            UnlearningError: The data set does not give a pair of numbers for one of them.
        """
        chosen = [int(row) for row in rows]
        if self._whole is not None:
            images, labels = self._whole
            return images[chosen], labels[chosen]
        pairs = [_example(self.name, _row_of(self.name, self._source, row), row) for row in chosen]
        images_of, labels_of = zip(*pairs, strict=True)
        try:
            return torch.stack(images_of), torch.stack(labels_of)
        except RuntimeError as error:
            raise UnlearningError(
                f"{self.name}: expected images of one shape and kind, got others: {error}"
            ) from None

    def labels(self) -> Tensor:
        """Those of all examples, int64 `[n]`."""
        return torch.cat([labels for _, labels in self.batches(_AT_ONCE)])

    def batches(
        self, size: int, generator: torch.Generator | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Every example once, `size` at a time, in an order of the generator's or as they came."""
        if generator is None:
            order = list(range(len(self)))
        else:
            order = torch.randperm(len(self), generator=generator).tolist()
        for start in range(0, len(order), size):
            yield self.take(order[start : start + size])


def _row_of(name: str, source: Any, row: int) -> Any:
    try:
        return source[row]
    except Exception as error:
        raise UnlearningError(
            f"{name}: expected {_WANTED}, got {type(error).__name__} for its row {row}: {error}"
        ) from error


def _pair(name: str, value: Any, row: int) -> tuple[Any, Any]:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise UnlearningError(f"{name}: expected {_WANTED}, got {_kind(value)} in row {row}")
    return value[0], value[1]


def _example(name: str, value: Any, row: int) -> tuple[Tensor, Tensor]:
    image, label = _pair(name, value, row)
    try:
        found, own = torch.as_tensor(image), torch.as_tensor(label)
    except (TypeError, ValueError, RuntimeError):
        raise UnlearningError(
            f"{name}: expected an image and a label that are numbers, got {_kind(image)} and "
            f"{_kind(label)} in row {row}; let the data set make tensors of them"
        ) from None
    return found, _labels(name, own.reshape(()) if own.numel() == 1 else own, row, axes=0)


def _batch(name: str, value: Any, place: int) -> tuple[Tensor, Tensor]:
    images, labels = _pair(name, value, place)
    fits = isinstance(images, Tensor) and isinstance(labels, Tensor) and images.ndim >= 1
    if not fits or labels.ndim != 1 or len(images) != len(labels):
        raise UnlearningError(
            f"{name}: expected batches of images [n, ...] and labels [n], got {_kind(images)} and "
            f"{_kind(labels)} in batch {place}"
        )
    return images, _labels(name, labels, place, axes=1)


def _labels(name: str, value: Tensor, row: int, *, axes: int) -> Tensor:
    whole = not value.is_floating_point() and not value.is_complex() and value.dtype != torch.bool
    if not whole or value.ndim != axes:
        raise UnlearningError(
            f"{name}: expected labels that are whole numbers, got {_kind(value)} in row {row}"
        )
    return value.to(torch.int64)


def _kind(value: object) -> str:
    """Of a tensor its kind and shape, without its values."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)}"
    return shown(value)
