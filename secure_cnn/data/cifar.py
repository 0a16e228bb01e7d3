"""The binary version of CIFAR-10 (Krizhevsky, 2009), read out of its archive without unpacking it.

Each of six files in the archive holds records of one label byte and 3x32x32 pixels. Nothing is
written to disk, so no path in the archive can lead anywhere. Not here: the "python version",
which is a pickle.
"""

import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from secure_cnn.data import source
from secure_cnn.data.source import Chunk, Pixels, Source
from secure_cnn.errors import DataError
from secure_cnn.files import reading

__all__ = ["TEST_FILES", "TRAIN_FILES", "cifar_source"]

TRAIN_FILES = tuple(f"cifar-10-batches-bin/data_batch_{number}.bin" for number in range(1, 6))
TEST_FILES = ("cifar-10-batches-bin/test_batch.bin",)

_SHAPE = (3, 32, 32)
_RECORD = 1 + 3 * 32 * 32
_MOST_BYTES = 10_000 * _RECORD  # the size of every official file


def cifar_source(name: str, path: Path, classes: tuple[str, ...]) -> Source:
    """The archive at `path`: one pass for the labels, which are few, and one for the pixels."""
    found = {file: records[:, 0].astype(np.int64) for file, records in _records(path)}
    starts, row = {}, 0
    for file in (*TRAIN_FILES, *TEST_FILES):
        starts[file] = row
        row += len(found[file])
    labels = np.concatenate([found[file] for file in starts])
    train_count = starts[TEST_FILES[0]]
    source.check_labels(labels[:train_count], classes, path)
    source.check_range(labels[train_count:], classes, path)
    return Source(
        name=name,
        key=source.key_of([path], name),
        classes=classes,
        labels=labels,
        train_count=train_count,
        shape=_SHAPE,
        chunks=lambda: _chunks(path, starts),
    )


def _chunks(path: Path, starts: dict[str, int]) -> Iterator[Chunk]:
    for file, records in _records(path):
        yield starts[file], records[:, 1:].reshape(-1, *_SHAPE)


def _records(path: Path) -> Iterator[tuple[str, Pixels]]:
    """Each of the six files once, as records uint8 `[n, 3073]`, in one pass over the archive."""
    missing = {*TRAIN_FILES, *TEST_FILES}
    with (
        source.unusable(
            path,
            *(OSError, EOFError, zlib.error, tarfile.TarError),
            expected="a whole .tar.gz archive",
            cure="it is damaged or truncated: remove it and put a fresh copy there",
        ),
        reading(path) as raw,
        tarfile.open(fileobj=raw, mode="r|gz") as archive,
    ):
        for member in archive:
            if member.name in missing and member.isfile():
                missing.remove(member.name)
                yield member.name, _read(archive, member, path)
    if missing:
        raise DataError(
            f"{path}: expected the binary version of CIFAR-10, got an archive without "
            f"{', '.join(sorted(missing))}; put cifar-10-binary.tar.gz there"
        )


def _read(archive: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> Pixels:
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
