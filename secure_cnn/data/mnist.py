"""MNIST and Fashion-MNIST, in gzipped IDX files (LeCun, Cortes and Burges, 1998).

A file is a big-endian header (two zero bytes, a type, the number of dimensions, then their sizes)
and the bytes of the array. It is read in chunks, so that a header which promises more bytes than
follow cannot exhaust memory.
"""

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path

import numpy as np

from secure_cnn.data import source
from secure_cnn.data.source import Chunk, Labels, Source
from secure_cnn.errors import DataError
from secure_cnn.files import reading

__all__ = ["FILES", "mnist_source"]

FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)

_UNSIGNED_BYTE = 0x08
_MOST_LABELS = 1 << 26
_SHAPE = (1, 28, 28)


def mnist_source(name: str, paths: list[Path], classes: tuple[str, ...]) -> Source:
    """The four files of a data set of this form, in the order of `FILES`."""
    train_images, train_labels, test_images, test_labels = paths
    train = _labels(train_images, train_labels, classes)
    test = _labels(test_images, test_labels, classes)
    source.check_labels(train, classes, train_labels)
    return Source(
        name=name,
        key=source.key_of(paths, name),
        classes=classes,
        labels=np.concatenate([train, test]),
        train_count=len(train),
        shape=_SHAPE,
        chunks=lambda: _chunks([train_images, test_images]),
    )


def _labels(images: Path, path: Path, classes: tuple[str, ...]) -> Labels:
    with _open(images) as file:
        count, *size = _header(file, images, 3)
    if size != [28, 28]:
        raise DataError(f"{images}: expected images of 28x28, its header says {size}")
    with _open(path) as file:
        (stated,) = _header(file, path, 1)
        if stated > _MOST_LABELS:
            raise DataError(
                f"{path}: expected at most {_MOST_LABELS} labels, its header says {stated}"
            )
        labels = np.frombuffer(_exactly(file, path, stated), np.uint8).astype(np.int64)
        _expect_end(file, path)
    if len(labels) != count:
        raise DataError(
            f"{path}: expected {count} labels, one for each image in {images}, got {len(labels)}"
        )
    source.check_range(labels, classes, path)
    return labels


def _chunks(paths: list[Path]) -> Iterator[Chunk]:
    row = 0
    for path in paths:
        with _open(path) as file:
            count, height, width = _header(file, path, 3)
            most = max(1, source.CHUNK_BYTES // (height * width))
            while count:
                taken = min(most, count)
                data = _exactly(file, path, taken * height * width)
                yield row, np.frombuffer(data, np.uint8).reshape(taken, 1, height, width)
                row, count = row + taken, count - taken
            _expect_end(file, path)


@contextmanager
def _open(path: Path) -> Iterator[gzip.GzipFile]:
    with (
        source.unusable(
            path,
            *(OSError, EOFError, zlib.error),
            expected="a whole gzip file",
            cure="it is damaged or truncated: remove it and put a fresh copy there",
        ),
        reading(path) as raw,
        gzip.open(raw, "rb") as file,
    ):
        yield file


def _header(file: gzip.GzipFile, path: Path, dimensions: int) -> tuple[int, ...]:
    """Checks the magic number and reads the sizes."""
    magic = _exactly(file, path, 4)
    if magic != bytes([0, 0, _UNSIGNED_BYTE, dimensions]):
        raise DataError(
            f"{path}: expected the IDX magic number 0x0000{_UNSIGNED_BYTE:02x}{dimensions:02x} "
            f"(bytes in {dimensions} dimensions), got 0x{magic.hex()}; is it another file?"
        )
    sizes = tuple(int(size) for size in np.frombuffer(_exactly(file, path, 4 * dimensions), ">u4"))
    if prod(sizes) == 0:
        raise DataError(f"{path}: expected a filled array, its header says {sizes}")
    return sizes


def _exactly(file: gzip.GzipFile, path: Path, size: int) -> bytes:
    data = file.read(size)
    if len(data) != size:
        raise DataError(
            f"{path}: expected {size} more bytes, got {len(data)}; "
            "it is truncated: remove it and put a fresh copy there"
        )
    return data


def _expect_end(file: gzip.GzipFile, path: Path) -> None:
    if file.read(1):
        raise DataError(
            f"{path}: expected its end after the array that its header states, got more"
        )
