"""The labels of a `.npz` file, as people write them down: numbers, names, one of k."""

import zipfile
from math import prod
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from secure_cnn.data import source
from secure_cnn.data.npz_array import Header, array_header, exactly, header_of
from secure_cnn.data.source import Labels
from secure_cnn.errors import DataError

__all__ = ["ids", "labelled"]

_MOST_BYTES = 1 << 30
_MOST_CLASSES = 1 << 16
_CLASSES = "classes"

_Raw = NDArray[np.generic]


def labelled(
    archive: zipfile.ZipFile, path: Path, counts: dict[str, int]
) -> tuple[tuple[str, ...], list[Labels]]:
    """The names of the classes, and the labels of each part as their indices.

    `counts` has the name of each array of labels, that of the training part first, and how many
    images it is about. Labels that are numbers may lie outside of the classes yet.
    """
    raw = [_read(archive, path, name, count) for name, count in counts.items()]
    kinds = {"names" if labels.dtype.kind == "U" else "numbers" for labels in raw}
    if len(kinds) > 1:
        raise DataError(
            f"{path}: expected {' and '.join(counts)} of one kind, got names in one and numbers in "
            "the other"
        )
    named = _CLASSES in {member[:-4] for member in archive.namelist()}
    if kinds == {"numbers"}:
        numbers = [labels.astype(np.int64) for labels in raw]
        return _classes(archive, path, numbers[0], named=named), numbers
    if named:
        raise DataError(
            f"{path}: expected labels that are numbers beside {_CLASSES}, got names; leave "
            f"{_CLASSES} out"
        )
    return _indexed(path, list(counts), raw)


def ids(archive: zipfile.ZipFile, path: Path, name: str, count: int) -> list[str]:
    """Whose each image is, as texts, by an array of numbers or names."""
    header = header_of(archive, path, name)
    if header.dtype.kind not in "iuUS" or header.shape != (count,):
        raise DataError(
            f"{path}: expected {name} as {count} whole numbers or names of persons, one for each "
            f"image, got {header.dtype} {list(header.shape)}"
        )
    found = [str(each) for each in _values(archive, path, name)]
    if "" in found:
        raise DataError(
            f"{path}: expected a person for every image in {name}, got none for image "
            f"{found.index('')}; who is not known is a person of their own: give them a name that "
            "nobody else has"
        )
    return found


def _indexed(path: Path, names: list[str], raw: list[_Raw]) -> tuple[tuple[str, ...], list[Labels]]:
    """Names in their order, and where each label is among them."""
    classes = tuple(str(each) for each in np.unique(raw[0]))
    if len(classes) > _MOST_CLASSES:
        raise DataError(
            f"{path}: expected at most {_MOST_CLASSES} classes, got {len(classes)} different names "
            f"in {names[0]}"
        )
    for each in classes:
        source.check_name(each, f"{path}: a class in {names[0]}")
    unnamed = sum(int((labels == "").sum()) for labels in raw)
    if unnamed:
        raise DataError(
            f"{path}: expected a name for every image, got {unnamed} empty ones; name them, or "
            "leave these images out"
        )
    place = {each: index for index, each in enumerate(classes)}
    unknown = sorted({str(each) for each in np.unique(raw[-1])} - set(classes))
    if unknown:
        raise DataError(
            f"{path}: expected the classes of {names[0]} in {names[-1]}, got "
            f"{source.some(unknown)} too; leave these images out, or add some to train on"
        )
    return classes, [np.array([place[str(each)] for each in labels], np.int64) for labels in raw]


def _classes(
    archive: zipfile.ZipFile, path: Path, labels: Labels, *, named: bool
) -> tuple[str, ...]:
    """The names that the file has for its numbers, or the numbers."""
    if not 0 <= labels.min() <= labels.max() < _MOST_CLASSES:
        raise DataError(
            f"{path}: expected labels in 0..{_MOST_CLASSES - 1}, "
            f"got {labels.min()}..{labels.max()}; number the classes from 0"
        )
    if not named:
        return tuple(str(label) for label in range(int(labels.max()) + 1))
    header = header_of(archive, path, _CLASSES)
    count = prod(header.shape)
    if header.dtype.kind not in "US" or len(header.shape) != 1 or not 2 <= count <= _MOST_CLASSES:
        raise DataError(
            f"{path}: expected {_CLASSES} as 2..{_MOST_CLASSES} texts, got {header.dtype} "
            f"{list(header.shape)}"
        )
    names = tuple(str(each) for each in _values(archive, path, _CLASSES))
    for each in names:
        source.check_name(each, f"{path}: the name of a class")
    if len(set(names)) != len(names):
        raise DataError(f"{path}: expected {_CLASSES} to differ, got {source.some(names)}")
    return names


def _read(archive: zipfile.ZipFile, path: Path, name: str, count: int) -> _Raw:
    """One label for each image, as texts or as whole numbers."""
    header = header_of(archive, path, name)
    kind, shape = header.dtype.kind, header.shape
    one_of_k = len(shape) == 2 and shape[1] > 1 and kind in "iubf"
    if shape[:1] != (count,) or not (
        one_of_k or (kind in "iubUS" and prod(shape[1:]) == 1 and len(shape) <= 2)
    ):
        raise DataError(
            f"{path}: expected {name} as {count} integers or names, one for each image, got "
            f"{header.dtype} {list(shape)}; save them as {name}.astype(int)"
        )
    values = _values(archive, path, name)
    if not one_of_k:
        return values.reshape(count)
    if not (((values == 0) | (values == 1)).all() and (values.sum(1) == 1).all()):
        raise DataError(
            f"{path}: expected one 1 and else 0 in each row of {name}, got others: several labels "
            "an image are not for a classifier of one; save its only label as a number"
        )
    found: _Raw = values.argmax(1)
    return found


def _values(archive: zipfile.ZipFile, path: Path, name: str) -> _Raw:
    """A whole small array; texts as Python has them."""
    with archive.open(f"{name}.npy") as file:
        header = array_header(file, path, name)
        size = _bytes_of(header, path, name)
        values: _Raw = np.frombuffer(exactly(file, size, path, name), header.dtype)
    if header.dtype.kind == "S":
        values = np.char.decode(cast(NDArray[np.bytes_], values), "utf-8")
    return values.reshape(header.shape)


def _bytes_of(header: Header, path: Path, name: str) -> int:
    size = prod(header.shape) * header.dtype.itemsize
    if not 0 < size <= _MOST_BYTES:
        raise DataError(f"{path}: expected 1 to {_MOST_BYTES} bytes of {name}, got {size}")
    return size
