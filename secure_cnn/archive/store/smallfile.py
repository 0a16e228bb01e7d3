"""Small files of a checkpoint store: read whole with a limit, replaced whole, or added to.

A symbolic link is never followed: what is written must be where the store is.
"""

import os
from pathlib import Path

from secure_cnn.archive.errors import LimitExceeded, StorageError
from secure_cnn.archive.format.payload import read_at
from secure_cnn.archive.output import new_file
from secure_cnn.files import open_regular, write_at

__all__ = ["append_at", "read_small", "replace_small"]


def read_small(path: Path, limit: int) -> bytes | None:
    """All bytes of a file; None if there is none.

    Raises:
        LimitExceeded: It is longer than `limit`.
        StorageError: It is no regular file, or the operating system refuses.
    """
    try:
        fd = open_regular(path, follow=False)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StorageError(
            f"{path}: cannot read: {error.strerror}; it must be a file, not a link"
        ) from error
    try:
        size = os.fstat(fd).st_size
        if size > limit:
            raise LimitExceeded(f"{path}: expected at most {limit} bytes, got {size}")
        return read_at(fd, size, 0)
    except OSError as error:
        raise StorageError(f"{path}: cannot read: {error.strerror}; try again") from error
    finally:
        os.close(fd)


def replace_small(path: Path, data: bytes) -> None:
    """Puts a file in place of the one before, whole or not at all.

    Raises:
        StorageError: It is a symbolic link, or the operating system refuses.
    """
    with new_file(path, length=len(data), overwrite=True, mode=0o666) as fd:
        write_at(fd, memoryview(data), 0)


def append_at(path: Path, data: bytes, offset: int) -> None:
    """Writes `data` at `offset` and cuts off what stood behind; on the disk when this returns.

    A crash leaves the first `offset` bytes as they were.

    Raises:
        StorageError: It is a symbolic link, or the operating system refuses.
    """
    try:
        fd = open_regular(path, os.O_WRONLY | os.O_CREAT, follow=False)
        try:
            write_at(fd, memoryview(data), offset)
            os.ftruncate(fd, offset + len(data))
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        raise StorageError(
            f"{path}: cannot write: {error.strerror}; what was there still counts"
        ) from error
