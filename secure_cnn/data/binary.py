"""The binary files of MNIST, Fashion-MNIST and CIFAR-10, read without unpacking them to the disk.

An IDX file (LeCun, Cortes and Burges, 1998), gzipped, is a big-endian header (two zero bytes, a
type, the number of dimensions, then their sizes) and the bytes of the array. The archive of the
binary version of CIFAR-10 (Krizhevsky, 2009) holds six files of records of one label byte and
3x32x32 pixels; its "python version" is a pickle and is not read. All is read in chunks or capped,
so that a header which promises more than follows cannot exhaust memory.
"""

import gzip
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import BinaryIO

import numpy as np

from secure_cnn.data import source
from secure_cnn.data.source import Chunk, Labels, Pixels, Source
from secure_cnn.errors import DataError
from secure_cnn.files import reading

__all__ = ["CIFAR_TEST", "CIFAR_TRAIN", "MNIST_FILES", "cifar_source", "mnist_source"]

MNIST_FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)
CIFAR_TRAIN = tuple(f"cifar-10-batches-bin/data_batch_{number}.bin" for number in range(1, 6))
CIFAR_TEST = ("cifar-10-batches-bin/test_batch.bin",)

_UNSIGNED_BYTE = 0x08
_MOST_LABELS = 1 << 26
_MNIST_SHAPE = (1, 28, 28)
_CIFAR_SHAPE = (3, 32, 32)
_RECORD = 1 + 3 * 32 * 32
_MOST_BYTES = 10_000 * _RECORD  # the size of every official file


def mnist_source(name: str, paths: list[Path], classes: tuple[str, ...]) -> Source:
    """The four files of a data set of this form, in the order of `MNIST_FILES`."""
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
        shape=_MNIST_SHAPE,
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
def _packed(path: Path, expected: str) -> Iterator[BinaryIO]:
    cure = "it is damaged or truncated: remove it and put a fresh copy there"
    errors = (OSError, EOFError, zlib.error, tarfile.TarError)
    with source.unusable(path, *errors, expected=expected, cure=cure), reading(path) as raw:
        yield raw


@contextmanager
def _open(path: Path) -> Iterator[gzip.GzipFile]:
    with _packed(path, "a whole gzip file") as raw, gzip.open(raw, "rb") as file:
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


def cifar_source(name: str, path: Path, classes: tuple[str, ...]) -> Source:
    """The archive at `path`: one pass for the labels, which are few, and one for the pixels."""
    found = {file: records[:, 0].astype(np.int64) for file, records in _records(path)}
    starts, row = {}, 0
    for file in (*CIFAR_TRAIN, *CIFAR_TEST):
        starts[file] = row
        row += len(found[file])
    labels = np.concatenate([found[file] for file in starts])
    train_count = starts[CIFAR_TEST[0]]
    source.check_labels(labels[:train_count], classes, path)
    source.check_range(labels[train_count:], classes, path)
    return Source(
        name=name,
        key=source.key_of([path], name),
        classes=classes,
        labels=labels,
        train_count=train_count,
        shape=_CIFAR_SHAPE,
        chunks=lambda: _record_chunks(path, starts),
    )


def _record_chunks(path: Path, starts: dict[str, int]) -> Iterator[Chunk]:
    for file, records in _records(path):
        yield starts[file], records[:, 1:].reshape(-1, *_CIFAR_SHAPE)


def _records(path: Path) -> Iterator[tuple[str, Pixels]]:
    """Each of the six files once, as records uint8 `[n, 3073]`, in one pass over the archive."""
    missing = {*CIFAR_TRAIN, *CIFAR_TEST}
    with (
        _packed(path, "a whole .tar.gz archive") as raw,
        tarfile.open(fileobj=raw, mode="r|gz") as archive,
    ):
        for member in archive:
            if member.name in missing and member.isfile():
                missing.remove(member.name)
                yield member.name, _records_in(archive, member, path)
    if missing:
        raise DataError(
            f"{path}: expected the binary version of CIFAR-10, got an archive without "
            f"{', '.join(sorted(missing))}; put cifar-10-binary.tar.gz there"
        )


def _records_in(archive: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> Pixels:
    """One file of records; its stated size is capped before anything is allocated."""
    if member.size == 0 or member.size % _RECORD or member.size > _MOST_BYTES:
        raise DataError(
            f"{path}: expected {member.name} to hold 1..10000 records of {_RECORD} bytes, "
            f"got {member.size} bytes; remove the archive and put a fresh copy there"
        )
    file = archive.extractfile(member)
    data = file.read() if file else b""
    if len(data) != member.size:
        raise DataError(
            f"{path}: {member.name} is truncated: put a fresh copy of the archive there"
        )
    return np.frombuffer(data, np.uint8).reshape(-1, _RECORD)
