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

from secure_cnn.data.labels import Labels
from secure_cnn.data.source import Chunk, Pixels
from secure_cnn.errors import DataError
from secure_cnn.files import reading

__all__ = ["SHAPE", "TEST_FILES", "TRAIN_FILES", "read_images", "read_labels"]

SHAPE = (3, 32, 32)
TRAIN_FILES = tuple(f"cifar-10-batches-bin/data_batch_{number}.bin" for number in range(1, 6))
TEST_FILES = ("cifar-10-batches-bin/test_batch.bin",)

_RECORD = 1 + 3 * 32 * 32
_MOST_BYTES = 10_000 * _RECORD  # the size of every official file


def read_labels(path: Path) -> dict[str, Labels]:
    """The labels in each of the six files."""
    return {name: records[:, 0].astype(np.int64) for name, records in _records(path)}


def read_images(path: Path, starts: dict[str, int]) -> Iterator[Chunk]:
    """The images of each file in `starts`, placed at the row that it gives, in archive order."""
    for name, records in _records(path):
        yield starts[name], records[:, 1:].reshape(-1, *SHAPE)


def _records(path: Path) -> Iterator[tuple[str, Pixels]]:
    """Each of the six files once, as records uint8 `[n, 3073]`, in one pass over the archive."""
    missing = {*TRAIN_FILES, *TEST_FILES}
    try:
        with reading(path) as raw, tarfile.open(fileobj=raw, mode="r|gz") as archive:
            for member in archive:
                if member.name in missing and member.isfile():
                    missing.remove(member.name)
                    yield member.name, _read(archive, member, path)
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise DataError(
            f"{path}: expected a whole .tar.gz archive, got {error}; "
            "it is damaged or truncated: remove it and put a fresh copy there"
        ) from error
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
