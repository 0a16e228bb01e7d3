"""What a data set is once it is loaded: uint8 images, int64 labels, and what they mean.

Not here: where the pixels come from (`named`, `folder`, `npz`) and how an epoch is cut (`batches`).
"""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, final

import torch
from torch import Tensor
from torch.utils.data import Dataset

from secure_cnn.data.source import check_name
from secure_cnn.errors import DataError

__all__ = ["DataSpec", "ImageData", "Split"]

_HASH_CHUNK = 1 << 24  # bytes hashed at a time: a mapped data set never has to fit memory


@final
@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """The public facts about a data set: the shape of one image and the names of the classes.

    Args:
        shape: `(channels, height, width)`, each at least 1.
        classes: At least two distinct names that UTF-8 can hold; label `i` means `classes[i]`.

    Raises:
        DataError: The shape or the class names are not of this form.

    Example:
        >>> spec = DataSpec(shape=(1, 28, 28), classes=("cat", "dog"))
        >>> spec.channels, spec.height, spec.width
        (1, 28, 28)
    """

    shape: tuple[int, int, int]
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.shape) != 3 or min(self.shape) < 1:
            raise DataError(
                f"shape: expected (channels, height, width), each at least 1, got {self.shape}"
            )
        if len(self.classes) < 2:
            raise DataError(
                f"classes: expected at least two, got {list(self.classes)}; "
                "a classifier of one class has nothing to learn"
            )
        for name in self.classes:
            check_name(name, "classes: the name of one")
        if len(set(self.classes)) != len(self.classes):
            raise DataError(f"classes: expected distinct names, got {list(self.classes)}")

    @property
    def channels(self) -> int:
        """1 for grey images, 3 for colour."""
        return self.shape[0]

    @property
    def height(self) -> int:
        """Rows of one image."""
        return self.shape[1]

    @property
    def width(self) -> int:
        """Columns of one image."""
        return self.shape[2]


@final
@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Split(Dataset[tuple[Tensor, int]]):
    """Images and their labels: a map-style data set that also cuts whole batches by index.

    A class because both views share the same, perhaps memory-mapped, tensors: images uint8 `[n,
    channels, height, width]` and labels int64 `[n]`. `ids` say what each image is called where it
    comes from: its path from the folder on, or its row of the source, where the rows to test on
    come last; None where nobody said. Its `repr` shows no pixel.

    Raises:
        DataError: The tensors have another dtype or shape, or their lengths differ.

    Example:
        >>> split = Split(images=torch.full((2, 1, 8, 8), 255, dtype=torch.uint8),
        ...               labels=torch.tensor([0, 1]))
        >>> image, label = split[1]
        >>> float(image.max()), label, len(split)
        (1.0, 1, 2)
    """

    images: Tensor
    labels: Tensor
    ids: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            raise DataError(
                "images: expected uint8 [n, channels, height, width], "
                f"got {self.images.dtype} {list(self.images.shape)}"
            )
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise DataError(
                f"labels: expected int64 [{len(self.images)}], one for each image, "
                f"got {self.labels.dtype} {list(self.labels.shape)}"
            )

        if self.ids is not None and len(self.ids) != len(self.labels):
            raise DataError(
                f"ids: expected one for each of {len(self.labels)} images, got {len(self.ids)}"
            )

    def __repr__(self) -> str:
        channels, height, width = self.images.shape[1:]
        return f"Split({len(self)} images, {channels}x{height}x{width})"

    def __len__(self) -> int:
        return len(self.labels)

    # What reads many examples may call `batch` with their indices.
    batch_by_indices: ClassVar[bool] = True

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index].float().div_(255), int(self.labels[index])

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of the examples at `index`, int64 [b], as a model takes them.

        float32 images [b, channels, height, width] in [0, 1], and int64 labels [b].
        """
        return self.images[index].float().div_(255), self.labels[index]

    def first(self, count: int) -> "Split":
        """The first `count` examples, or all where it has fewer; no pixel is copied."""
        ids = None if self.ids is None else self.ids[:count]
        return Split(images=self.images[:count], labels=self.labels[:count], ids=ids)

    def some(self, rows: Tensor) -> "Split":
        """A copy of the examples at `rows`, int64 [b], with what they are called."""
        ids = None if self.ids is None else tuple(self.ids[row] for row in rows.tolist())
        return Split(images=self.images[rows], labels=self.labels[rows], ids=ids)


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class ImageData:
    """A data set to train on and one to test on, which agree on shape and classes.

    Its name is what people call it; that enters no decision and no fingerprint. `groups` and
    `test_groups` name the person of each image, where that is known: one name an image, or None.

    Raises:
        DataError: The name is no UTF-8; a split is empty, has images of another shape, labels
            outside the classes, or another number of names of persons.

    Example:
        >>> split = Split(images=torch.zeros(2, 1, 8, 8, dtype=torch.uint8),
        ...               labels=torch.tensor([0, 1]))
        >>> spec = DataSpec(shape=(1, 8, 8), classes=("cat", "dog"))
        >>> ImageData(name="pets", train=split, test=split, spec=spec).fingerprint[:8]
        'ba701123'
    """

    name: str
    train: Split
    test: Split
    spec: DataSpec
    groups: tuple[str, ...] | None = None
    test_groups: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        check_name(self.name, "data: its name")
        parts = (
            ("train", self.train, self.groups),
            ("test", self.test, self.test_groups),
        )
        for part, split, groups in parts:
            if groups is not None and len(groups) != len(split):
                raise DataError(
                    f"{self.name}: expected a person for each of {len(split)} {part} images, got "
                    f"{len(groups)}"
                )
            if len(split) == 0:
                raise DataError(f"{self.name}: expected at least one {part} image, got none")
            if tuple(split.images.shape[1:]) != self.spec.shape:
                raise DataError(
                    f"{self.name}: expected {part} images of shape {self.spec.shape}, "
                    f"got {tuple(split.images.shape[1:])}"
                )
            low, high = int(split.labels.min()), int(split.labels.max())
            if low < 0 or high >= len(self.spec.classes):
                raise DataError(
                    f"{self.name}: expected {part} labels in 0..{len(self.spec.classes) - 1}, "
                    f"got {low}..{high}"
                )

    @cached_property
    def shared_persons(self) -> int:
        """How many persons have images in both parts; 0 where they are not known."""
        return len(set(self.groups or ()) & set(self.test_groups or ()))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hex, over the spec and every image and label of both splits, in order.

        Two data sets have the same fingerprint exactly when a model sees the same examples in
        them. Computed when first asked for, in chunks.
        """
        header = {
            "shape": self.spec.shape,
            "classes": self.spec.classes,
            "train": len(self.train),
            "test": len(self.test),
        }
        digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode() + b"\0")
        for split in (self.train, self.test):
            rows = max(1, _HASH_CHUNK // split.images[0].numel())
            for start in range(0, len(split), rows):
                digest.update(split.images[start : start + rows].contiguous().numpy().data)
            digest.update(split.labels.numpy().astype("<i8").tobytes())
        return digest.hexdigest()

    @cached_property
    def pool_fingerprint(self) -> str:
        """SHA-256, in hex, over the shape and all images of both splits as one heap of images.

        Two data sets have the same one exactly when they hold the same images, each as often, in
        whatever order, with whatever labels, however divided into training and test.
        """
        train, test = self._image_digests
        return self._heap_digest(train + test)

    @cached_property
    def train_fingerprint(self) -> str:
        """The same over the training images alone."""
        return self._heap_digest(self._image_digests[0])

    @cached_property
    def _image_digests(self) -> tuple[list[bytes], list[bytes]]:
        """SHA-256 of each image, of the training and of the test: every image is read once."""
        train, test = (
            [hashlib.sha256(image.contiguous().numpy()).digest() for image in split.images]
            for split in (self.train, self.test)
        )
        return train, test

    def _heap_digest(self, images: list[bytes]) -> str:
        digest = hashlib.sha256(json.dumps(self.spec.shape).encode() + b"\0")
        digest.update(b"".join(sorted(images)))
        return digest.hexdigest()
