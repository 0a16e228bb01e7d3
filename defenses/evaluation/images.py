"""The images of an evaluation: by index, checked, whatever kind of data set they come from."""

import operator
from typing import Any, Protocol, final

import torch
from torch import Tensor

from defenses.errors import EvaluationError
from defenses.threat import ThreatModel

__all__ = ["ImageSource", "ImageTensors", "MapDataset", "choose_images"]


class MapDataset(Protocol):
    """A data set that is read by index, as torch's map-style ones are.

    Example:
        >>> data: MapDataset = [(torch.zeros(1, 8, 8), 3)]
        >>> len(data)
        1
    """

    def __len__(self) -> int:
        """How many examples there are."""

    def __getitem__(self, index: int, /) -> Any:
        """The image [channels, height, width] and its label."""


class ImageTensors(Protocol):
    """A data set that holds everything as two tensors.

    Attributes:
        images: uint8 (read as [0, 1]) or floating point, [n, channels, height, width].
        labels: int64, [n].

    Example:
        >>> from types import SimpleNamespace
        >>> data: ImageTensors = SimpleNamespace(
        ...     images=torch.zeros(2, 1, 8, 8), labels=torch.tensor([0, 1])
        ... )
    """

    @property
    def images(self) -> Tensor:
        """All images."""

    @property
    def labels(self) -> Tensor:
        """Their true classes."""


def choose_images(count: int, samples: int | None, generator: torch.Generator) -> Tensor:
    """Which images to evaluate: all, or some drawn without replacement.

    Returns:
        Their indices in ascending order, int64.

    Raises:
        EvaluationError: There is no image, or not as many as asked for.

    Example:
        >>> choose_images(3, None, torch.Generator())
        tensor([0, 1, 2])
    """
    if count == 0:
        raise EvaluationError("data: expected at least one image, got none")
    if samples is None:
        return torch.arange(count)
    if not 1 <= samples <= count:
        raise EvaluationError(f"samples: expected 1 to {count} (the data set), got {samples}")
    return torch.randperm(count, generator=generator)[:samples].sort().values


@final
class ImageSource:
    """Images and labels of a data set by index.

    Example:
        >>> threat = ThreatModel(norm="linf", eps=0.1)
        >>> source = ImageSource([(torch.zeros(1, 8, 8), 3)], threat)
        >>> source.labels(torch.tensor([0]))
        tensor([3])
    """

    def __init__(self, data: MapDataset | ImageTensors, threat: ThreatModel) -> None:
        images, labels = getattr(data, "images", None), getattr(data, "labels", None)
        self._tensors: tuple[Tensor, Tensor] | None = None
        if isinstance(images, Tensor) and isinstance(labels, Tensor):
            self._tensors = (images, labels)
        self._data, self._threat = data, threat

    def __len__(self) -> int:
        if self._tensors is None:
            return len(self._data)  # type: ignore[arg-type]  # then it is a MapDataset
        images, labels = self._tensors
        if len(images) != len(labels):
            raise EvaluationError(f"data: got {len(images)} images but {len(labels)} labels")
        return len(images)

    def labels(self, indices: Tensor) -> Tensor:
        """The true classes, int64, [k].

        Raises:
            EvaluationError: They are not that.
        """
        if self._tensors is not None:
            labels = self._tensors[1][indices].cpu()
        else:
            labels = torch.tensor([self._example(index)[1] for index in indices.tolist()])
        if labels.ndim != 1 or labels.dtype != torch.int64 or int(labels.min()) < 0:
            raise EvaluationError(
                f"labels: expected int64 of shape [n] and none negative, got {labels.dtype} of "
                f"shape {list(labels.shape)}, the smallest {labels.min().item()}"
            )
        return labels

    def images(self, indices: Tensor) -> Tensor:
        """The images, floating point in the threat model's bounds, [k, c, h, w].

        Raises:
            EvaluationError: They are not of one such shape.
            ThreatModelError: They are not in the bounds.
        """
        if self._tensors is not None:
            images = self._tensors[0][indices]
        else:
            each = [self._example(index)[0] for index in indices.tolist()]
            if len({image.shape for image in each}) > 1:
                raise EvaluationError(f"data: images of several shapes, such as {each[0].shape}")
            images = torch.stack(each)
        if images.ndim != 4:
            raise EvaluationError(
                f"data: expected images [channels, height, width], got {list(images.shape[1:])}"
            )
        images = images.float() / 255 if images.dtype == torch.uint8 else images
        self._threat.check_images(images)
        return images

    def _example(self, index: int) -> tuple[Tensor, int]:
        """One example of a map-style data set."""
        example = self._data[index]  # type: ignore[index]  # then it is a MapDataset
        if not isinstance(example, tuple | list) or len(example) != 2:
            raise EvaluationError(
                f"data[{index}]: expected an image and its label, got {type(example).__name__}; "
                "make two tensors one data set with torch.utils.data.TensorDataset"
            )
        image, label = example
        if not isinstance(image, Tensor):
            raise EvaluationError(
                f"data[{index}]: expected a tensor, got {type(image).__name__}; convert it first"
            )
        try:
            return image, operator.index(label)  # where int() would cut off a fraction
        except TypeError as error:
            raise EvaluationError(
                f"data[{index}]: expected an integer label, got {label!r}"
            ) from error
