"""A data set of which only the pixels are still to be decoded, and what must hold for its labels.

Every reader of a format hands on a `Source`; `store` decodes it.
"""

import hashlib
import json
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from secure_cnn.errors import DataError
from secure_cnn.files import IrregularFileError
from secure_cnn.printable import printable

__all__ = [
    "CHUNK_BYTES",
    "Chunk",
    "Labels",
    "Pixels",
    "Source",
    "check_labels",
    "check_name",
    "check_range",
    "key_of",
    "some",
    "stratified_split",
    "unusable",
]

Labels = NDArray[np.int64]
Pixels = NDArray[np.uint8]
Chunk = tuple[int, Pixels]  # the row of the first image, and images [k, channels, height, width]

CHUNK_BYTES = 1 << 24  # what a reader holds at a time
_SHOWN = 5
_BREAKING = {"Cc", "Zl", "Zp"}  # control characters, and what some programs take for line ends


@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """A data set before its pixels are decoded; the training rows come first.

    `chunks` starts the decoding and yields every row exactly once, in any order of chunks.
    `key` changes whenever the pixels or their order could. `remarks`, asked once the pixels are
    decoded, are sentences about the images for the person who brought them. `groups` says whose
    each image is, in the order of the rows, where that is known; `ids` what each is called where it
    comes from, see `Split`.
    """

    name: str
    key: str
    classes: tuple[str, ...]
    labels: Labels
    train_count: int
    shape: tuple[int, int, int]
    chunks: Callable[[], Iterator[Chunk]]
    remarks: Callable[[], Iterable[str]] = tuple
    groups: Sequence[str] | None = None
    ids: Sequence[str] | None = None

    @property
    def size(self) -> int:
        """Bytes of all pixels."""
        return len(self.labels) * prod(self.shape)


def key_of(files: Iterable[Path], *settings: object) -> str:
    """A digest over the names, sizes and times of `files` and over `settings`.

    The time of the last change of a file's status is among them: nobody can set it back, as copies
    that keep the modification time do.
    """
    digest = hashlib.sha256(json.dumps(settings).encode())
    for file in files:
        status = file.stat()
        line = [str(file.absolute()), status.st_size, status.st_mtime_ns, status.st_ctime_ns]
        digest.update(json.dumps(line).encode())
    return digest.hexdigest()[:32]


def some(names: Sequence[str]) -> str:
    """The first few of many names in a sentence, and how many more there are.

    Example:
        >>> some(["a", "b"]), some("abcdefgh")
        ('a, b', 'a, b, c, d, e and 3 more')
    """
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


@contextmanager
def unusable(path: Path, *errors: type[Exception], expected: str, cure: str) -> Iterator[None]:
    """Turns these errors of the block into one `DataError` that names the path and the cure."""
    try:
        yield
    except DataError:
        raise
    except errors as error:
        if isinstance(error, IrregularFileError):  # says itself what was expected
            raise DataError(f"{path}: {error.strerror}; replace or remove it") from error
        raise DataError(f"{path}: expected {expected}, got {error}; {cure}") from error


def check_name(name: str, what: str) -> None:
    """Refuses a name that UTF-8 cannot hold, or not in one line; `what` says what it names."""
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{what}: expected UTF-8, since it is written into the model's file, got {name!a}; "
            "rename it"
        ) from error
    if any(unicodedata.category(mark) in _BREAKING for mark in name):
        raise DataError(
            f"{printable(what)}: expected no control characters such as line ends, which break "
            f"tables, got {name!a}; rename it"
        )


def check_range(labels: Labels, classes: tuple[str, ...], source: object) -> None:
    """Refuses labels of `source` that name no class."""
    if not 0 <= labels.min() <= labels.max() < len(classes):
        raise DataError(
            f"{source}: expected labels in 0..{len(classes) - 1}, "
            f"got {labels.min()}..{labels.max()}; number the classes from 0 without gaps"
        )


def check_labels(labels: Labels, classes: tuple[str, ...], source: object) -> None:
    """Refuses training labels of fewer than two classes, or without one of the classes."""
    check_range(labels, classes, source)
    if len(classes) < 2:
        raise DataError(f"{source}: expected at least two classes, got one; a classifier needs two")
    counts = np.bincount(labels, minlength=len(classes))
    empty = [name for name, count in zip(classes, counts, strict=True) if count == 0]
    if empty:
        raise DataError(
            f"{source}: expected images of every class, got none of {empty}; "
            "add some, or remove the class and number the others without gaps"
        )


def stratified_split(
    labels: Labels, classes: tuple[str, ...], source: object, *, test_fraction: float, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Sorted indices of the training and the test examples, the same share of each class in both.

    Each class has at least one example on either side, which scikit-learn's splitter does not
    promise for small classes. Deterministic in `seed`.
    """
    if not 0 < test_fraction < 1:
        raise DataError(f"test_fraction: expected a share between 0 and 1, got {test_fraction}")
    if seed < 0:
        raise DataError(f"seed: expected an integer of at least 0, got {seed}")
    random = np.random.Generator(np.random.PCG64(seed))
    train, test = [], []
    for label, name in enumerate(classes):
        members = random.permutation(np.flatnonzero(labels == label))
        if len(members) < 2:
            raise DataError(
                f"{source}: expected at least 2 images of class {name!r}, one to train and one to "
                f"test on, got {len(members)}; add images, or bring a test set of your own"
            )
        held_out = min(max(1, round(test_fraction * len(members))), len(members) - 1)
        test.append(members[:held_out])
        train.append(members[held_out:])
    return np.sort(np.concatenate(train)), np.sort(np.concatenate(test))
