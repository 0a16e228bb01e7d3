"""Batches of a split, or of anybody's map-style data set, which worker processes may read ahead.

A split lies in memory or is mapped, and is cut by index: no worker makes that faster. Not here:
which examples make a batch (`batches`).
"""

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    SequentialSampler,
    default_collate,
)

from secure_cnn.data.split import Split
from secure_cnn.errors import DataError

__all__ = ["Examples", "check_examples", "in_order", "read_batches"]

_MOST_WORKERS = 1024
_SHOWN = 4


class Examples(Protocol):
    """A data set that is read by index, as torch's map-style ones are."""

    def __len__(self) -> int:
        """How many examples there are."""

    def __getitem__(self, index: int, /) -> Any:
        """The image, float [channels, height, width], and its label."""


def check_examples(data: object, *, workers: int) -> None:
    """Refuses what is neither a split nor read by index, and workers where none can help.

    Raises:
        DataError: With what to give instead.
    """
    if type(workers) is not int or not 0 <= workers <= _MOST_WORKERS:
        raise DataError(f"workers: expected a whole number, 0 to {_MOST_WORKERS}, got {workers!r}")
    if isinstance(data, Split):
        if workers:
            raise DataError(
                f"workers: expected 0 for a Split, got {workers}: it is in memory already"
            )
        return
    by_index = hasattr(type(data), "__getitem__") and hasattr(type(data), "__len__")
    if not by_index or isinstance(data, (str, bytes, dict, Tensor, IterableDataset)):
        raise DataError(
            "data: expected a Split, or a data set with a length that is read by index, got "
            f"{type(data).__name__}; make two tensors one data set with "
            "torch.utils.data.TensorDataset, of a DataLoader give loader.dataset"
        )


def read_batches(
    data: Split | Examples, indices: Iterable[Tensor], *, workers: int = 0, seed: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images, float [b, ...], and labels [b] at each of `indices`, int64 [b], in their order.

    Guarantee: torch's global random state is neither read nor moved here; the workers' own follows
    from `seed`. `batch(indices)` is called where the class with the `__getitem__` says
    `batch_by_indices = True`: elsewhere it may mean anything.

    Raises:
        DataError: An example cannot be read, with its index; or it is no (image, label).
    """
    if isinstance(data, Split):
        yield from map(data.batch, indices)
        return
    if workers == 0 and _is_cut_by_indices(type(data)):
        yield from _pairs(_cut(data, indices))
        return
    loader: DataLoader[Any] = DataLoader(
        _Named(data),  # type: ignore[arg-type]  # torch's own class adds nothing to it
        batch_sampler=(each.tolist() for each in indices),
        num_workers=workers,
        collate_fn=_stacked,
        pin_memory=workers > 0 and torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(seed),
    )
    yield from _pairs(loader)


def in_order(
    data: Split | Examples | DataLoader[Any], *, batch_size: int, workers: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Every example once, in the order of the data set.

    A `DataLoader` that keeps this order gives its own batches.

    Raises:
        DataError: A loader shuffles, draws or drops examples; else as `read_batches`.
    """
    if isinstance(data, DataLoader):
        kept = isinstance(data.dataset, IterableDataset) or (
            type(data.sampler) is SequentialSampler
            and type(data.batch_sampler) in (BatchSampler, type(None))
            and not data.drop_last
        )
        if not kept or workers:
            raise DataError(
                "data: expected every example once and in its order, but the DataLoader shuffles, "
                "draws or drops some, or workers are asked for beside it; write "
                f"DataLoader(loader.dataset, batch_size={batch_size}, num_workers={workers})"
            )
        return _pairs(data)
    check_examples(data, workers=workers)
    if batch_size < 1:
        raise DataError(f"batch_size: expected at least 1, got {batch_size}")
    starts = range(0, len(data), batch_size)
    indices = (torch.arange(start, min(start + batch_size, len(data))) for start in starts)
    return read_batches(data, indices, workers=workers)


def _is_cut_by_indices(kind: type) -> bool:
    """Whether the class with this `__getitem__` says that `batch(indices)` gives the same."""
    owner = next((each for each in kind.__mro__ if "__getitem__" in vars(each)), object)
    return vars(owner).get("batch_by_indices") is True and hasattr(kind, "batch")


def _cut(data: Any, indices: Iterable[Tensor]) -> Iterator[Any]:
    for each in indices:
        try:
            batch = data.batch(each)
        except Exception as error:
            raise DataError(
                f"data: one of its examples {each[:_SHOWN].tolist()} could not be read: "
                f"{type(error).__name__}: {error}"
            ) from error
        yield batch


class _Named:
    """A data set whose errors name the example."""

    def __init__(self, data: Examples) -> None:
        self._data = data

    def __getitem__(self, index: int) -> Any:
        try:
            return self._data[index]
        except Exception as error:
            raise DataError(
                f"data: its example {index} could not be read: {type(error).__name__}: {error}"
            ) from error


def _stacked(examples: list[Any]) -> Any:
    try:
        return default_collate(examples)
    except Exception as error:
        raise DataError(
            "data: expected examples (image, label) of tensors and numbers, all of one shape; they "
            f"could not be stacked: {error}; a picture becomes a tensor by "
            "torchvision.transforms.ToTensor()"
        ) from error


def _pairs(batches: Iterable[Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of a loader, each proved to be images and labels."""
    iterator = iter(batches)
    while True:
        try:
            batch = next(iterator)
        except StopIteration:
            return
        except DataError:
            raise
        except Exception as error:
            raise DataError(
                f"data: its DataLoader failed: {type(error).__name__}: {error}; if a worker was "
                "killed, memory ran out (in a container that of /dev/shm, too): give fewer workers"
            ) from error
        pair = isinstance(batch, (tuple, list)) and len(batch) == 2
        if not pair or not all(isinstance(each, Tensor) and each.dim() for each in batch):
            raise DataError(
                "data: expected batches of images and labels, two tensors, got "
                f"{type(batch).__name__}; give a data set of (image, label)"
            )
        images, labels = batch
        if not images.is_floating_point() or len(images) != len(labels):
            raise DataError(
                f"data: expected floating point images and as many labels, got {images.dtype} "
                f"{list(images.shape)} and labels {list(labels.shape)}; bytes become numbers in "
                "[0, 1] by image.float() / 255"
            )
        yield images, labels
