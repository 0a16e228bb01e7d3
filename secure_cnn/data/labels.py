"""What labels must be, and the seeded stratified split for data that brings no test set."""

import numpy as np
from numpy.typing import NDArray

from secure_cnn.errors import DataError

__all__ = ["Labels", "check_labels", "check_name", "check_range", "stratified_split"]

Labels = NDArray[np.int64]


def check_name(name: str, what: str) -> None:
    """A name can be written into a file, as UTF-8; else a `DataError` that says `what` it names."""
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{what}: expected UTF-8, since it is written into the model's file, got {name!a}; "
            "rename it"
        ) from error


def check_range(labels: Labels, classes: tuple[str, ...], source: object) -> None:
    """Every label names a class; else a `DataError` naming `source`."""
    if not 0 <= labels.min() <= labels.max() < len(classes):
        raise DataError(
            f"{source}: expected labels in 0..{len(classes) - 1}, "
            f"got {labels.min()}..{labels.max()}; number the classes from 0 without gaps"
        )


def check_labels(labels: Labels, classes: tuple[str, ...], source: object) -> None:
    """There are two classes or more, and each has an image to learn from; else a `DataError`."""
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
