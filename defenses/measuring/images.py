"""The images of a measurement: by index, checked, whatever kind of data set they come from."""

import operator
from collections.abc import Mapping
from typing import Any, Protocol, final

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler

from defenses.errors import EvaluationError
from defenses.quantities import described, shown
from defenses.shape import SHAPES, is_batch
from defenses.threat import ThreatModel

__all__ = ["ImageSource", "ImageTensors", "MapDataset", "choose_images"]


class MapDataset(Protocol):
    """A data set that is read by index, as torch's map-style ones are."""

    def __len__(self) -> int:
        """How many examples there are."""

    def __getitem__(self, index: int, /) -> Any:
        """The image, [channels, height, width] or of another shape in `SHAPES`, and its label."""


class ImageTensors(Protocol):
    """A data set that holds everything as two tensors, or as two numpy arrays.

    One that is read by index, too, is read so, for what its `__getitem__` does to an image counts;
    unless its class says `batch_by_indices = True`.
    """

    @property
    def images(self) -> Tensor:
        """[n, channels, ...]: floating point, or uint8 with 0 and 255 for the bounds."""

    @property
    def labels(self) -> Tensor:
        """Their true classes, whole numbers, [n]."""


def choose_images(count: int, samples: int | None, generator: torch.Generator) -> Tensor:
    """The indices, ascending, of the images to measure on: all, or some without replacement."""
    if count == 0:
        raise EvaluationError("data: expected at least one image, got none")
    if samples is None:
        return torch.arange(count)
    if type(samples) is not int or not 1 <= samples <= count:
        raise EvaluationError(
            f"samples: expected 1 to {count} (the data set), got {shown(samples)}"
        )
    return torch.randperm(count, generator=generator)[:samples].sort().values


@final
class ImageSource:
    """Images and labels by index, of two tensors or arrays, or of anything that is read by index.

    A `DataLoader` that keeps the order of its data set is read once, whole.
    """

    def __init__(self, data: MapDataset | ImageTensors, threat: ThreatModel) -> None:
        self._data, self._threat = data, threat
        self._tensors: tuple[Tensor, Tensor] | None = None
        images, labels = (
            getattr(data, name, None) if _holds_all(data) else None for name in ("images", "labels")
        )
        if isinstance(data, DataLoader):
            self._tensors = _loaded(data)
        elif isinstance(images, Tensor | np.ndarray) and isinstance(labels, Tensor | np.ndarray):
            self._tensors = _tensor(images, "data.images"), _tensor(labels, "data.labels")
        else:
            _check_indexed(data)

    def __len__(self) -> int:
        if self._tensors is None:
            return len(self._data)  # type: ignore[arg-type]  # then it is a MapDataset
        counts = [len(each) if each.ndim else 0 for each in self._tensors]
        if counts[0] != counts[1]:
            raise EvaluationError(f"data: got {counts[0]} images but {counts[1]} labels")
        return counts[0]

    def labels(self, indices: Tensor) -> Tensor:
        """The true classes, int64, [k]."""
        if self._tensors is not None:
            labels = self._tensors[1][indices].cpu()
        else:
            labels = torch.tensor([self._example(index)[1] for index in indices.tolist()])
        whole = not (
            labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool
        )
        numbers = labels.to(torch.int64) if whole else torch.zeros(1, dtype=torch.int64)
        if labels.ndim != 1 or not whole or int(numbers.min()) < 0:
            raise EvaluationError(
                "labels: expected whole numbers (int64) of shape [n] and none negative, got "
                f"{labels.dtype} of shape {list(labels.shape)}, the smallest {int(numbers.min())}"
            )
        return numbers

    def images(self, indices: Tensor) -> Tensor:
        """The images, floating point in the threat model's bounds, [k, channels, ...]."""
        if self._tensors is not None:
            images = self._tensors[0][indices]
        else:
            each = [self._example(index)[0] for index in indices.tolist()]
            kinds = sorted({f"{image.dtype} {list(image.shape)}" for image in each})
            if len(kinds) > 1:
                raise EvaluationError(
                    f"data: expected images of one kind, got several shapes or dtypes: "
                    f"{', '.join(kinds[:4])}"
                )
            images = torch.stack(each)
        if not is_batch(images) or images.numel() == 0:
            raise EvaluationError(f"data: expected {SHAPES}; got {list(images.shape)}")
        if images.dtype == torch.uint8:
            low, width = self._threat.bounds[0], self._threat.width
            images = images.float() * width / 255 + low
        self._threat.check_images(images)
        return images

    def _example(self, index: int) -> tuple[Tensor, int]:
        try:
            example = self._data[index]  # type: ignore[index]  # then it is a MapDataset
        except Exception as error:
            raise EvaluationError(
                f"data[{index}]: could not be read ({described(error)}); expected an image and its "
                "label for each index from 0 to len(data) - 1"
            ) from error
        if not isinstance(example, tuple | list) or len(example) != 2:
            raise EvaluationError(
                f"data[{index}]: expected an image and its label, got {type(example).__name__}; "
                "make two tensors one data set with torch.utils.data.TensorDataset"
            )
        image, label = example
        if not isinstance(image, Tensor | np.ndarray):
            raise EvaluationError(
                f"data[{index}]: expected a tensor, got {type(image).__name__}; convert it first"
            )
        try:
            number = operator.index(label)  # where int() would cut off a fraction
        except TypeError as error:
            raise EvaluationError(
                f"data[{index}]: expected an integer label, got {shown(label)}"
            ) from error
        if not 0 <= number < 2**31:
            raise EvaluationError(
                f"data[{index}]: expected a label of a class and none negative, got {number}"
            )
        return _tensor(image, f"data[{index}]"), number


def _holds_all(data: object) -> bool:
    """Whether `images` and `labels` are the examples, and not what `__getitem__` makes them of.

    They are where there is no `__getitem__`, or where its class says `batch_by_indices = True`: so
    that data sets say that their examples may be read whole.
    """
    owners = type(data).__mro__
    item = next((kind for kind in owners if "__getitem__" in vars(kind)), None)
    return item is None or vars(item).get("batch_by_indices") is True


def _tensor(values: Tensor | np.ndarray[Any, Any], what: str) -> Tensor:
    """Values that can be read, dense and without a graph."""
    if isinstance(values, np.ndarray):
        try:  # torch reads no other byte order or direction, and warns of what cannot be written
            native = np.require(values, values.dtype.newbyteorder("="), ["C", "W"])
            values = torch.from_numpy(native)
        except (TypeError, ValueError) as error:
            raise EvaluationError(f"{what}: expected numbers, got {values.dtype}") from error
    nested = values.is_nested
    if nested or values.layout != torch.strided or values.is_quantized or values.is_meta:
        kind = "nested" if nested else "on the meta device" if values.is_meta else "not dense"
        raise EvaluationError(
            f"{what}: expected a dense tensor with values, got one that is {kind}; convert it first"
        )
    return values.detach()


def _check_indexed(data: object) -> None:
    """Refuses what has no length, or cannot be read by index."""
    by_index = hasattr(data, "__getitem__") and not isinstance(data, str | bytes | Mapping)
    try:
        len(data)  # type: ignore[arg-type]
    except Exception:  # a length may be computed, and fail in any way
        by_index = False
    if not by_index or isinstance(data, IterableDataset | type | Tensor | np.ndarray):
        raise EvaluationError(
            f"data: expected tensors `images` and `labels`, or a data set with a length that is "
            f"read by index, got {type(data).__name__}; make two tensors one data set with "
            "torch.utils.data.TensorDataset, and what can only be iterated a list"
        )


def _loaded(loader: DataLoader[Any]) -> tuple[Tensor, Tensor]:
    """All that a loader gives, if an index means the same image every time."""
    kept = isinstance(loader.dataset, IterableDataset) or (
        type(loader.sampler) is SequentialSampler
        and type(loader.batch_sampler) in (BatchSampler, type(None))
        and not loader.drop_last
    )
    if not kept:
        raise EvaluationError(
            "data: the DataLoader shuffles, draws or drops images, so that an index means no "
            "image; give its data set, loader.dataset, or a DataLoader without shuffle"
        )
    try:
        batches = list(loader)
    except Exception as error:
        raise EvaluationError(f"data: the DataLoader failed: {described(error)}") from error
    images, labels = [], []
    for number, batch in enumerate(batches):
        pair = isinstance(batch, tuple | list) and len(batch) == 2
        if not pair or not all(isinstance(each, Tensor | np.ndarray) for each in batch):
            raise EvaluationError(
                f"data: expected batches (images, labels) of two tensors from the DataLoader, got "
                f"{type(batch).__name__}; give its data set, loader.dataset"
            )
        images.append(_tensor(batch[0], f"batch {number}"))
        labels.append(_tensor(batch[1], f"labels of batch {number}"))
    if not images:
        raise EvaluationError("data: expected at least one image, got none from the DataLoader")
    try:
        return torch.cat(images), torch.cat(labels)
    except (RuntimeError, TypeError) as error:
        raise EvaluationError(f"data: batches of several shapes: {described(error)}") from error
