"""Files as the archive reads and writes them: by `files`, each refusal as a `StorageError`."""

import contextlib
import fcntl
import os
import sys
import tempfile
from collections.abc import Iterator
from types import TracebackType
from typing import BinaryIO, Self, TypeAlias, final

from secure_cnn import files
from secure_cnn.archive.errors import LimitExceeded, StorageError
from secure_cnn.archive.format.payload import read_at

__all__ = [
    "Path",
    "Spool",
    "append_at",
    "lock_file",
    "new_file",
    "opened",
    "read_small",
    "write_file",
]

Path: TypeAlias = str | os.PathLike[str]


@final
class Spool(os.PathLike[str]):
    """A file without a name that stands for a stream, to be given where a path is meant.

    In memory where the system can, so that what is plain is on no disk; else in the folder of
    temporary files. A class because it owns the file. Messages call it `name`.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        if sys.platform == "linux":
            self.file: BinaryIO = os.fdopen(os.memfd_create(name, os.MFD_CLOEXEC), "w+b")
        else:
            self.file = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the spool

    def __str__(self) -> str:
        return self.name

    def __fspath__(self) -> str:
        """For whoever opens it once more, as torch does."""
        return f"/dev/fd/{self.file.fileno()}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.file.close()


@contextlib.contextmanager
def opened(path: Path, *, flags: int = os.O_RDONLY) -> Iterator[int]:
    """A regular file, open to read or, with ``os.O_RDWR``, to change."""
    if isinstance(path, Spool):
        yield path.file.fileno()
        return
    verb = "read" if flags == os.O_RDONLY else "change"
    try:
        fd = files.open_regular(path, flags)
        try:
            yield fd
        finally:
            os.close(fd)
    except OSError as error:
        raise StorageError(f"{path}: cannot {verb}: {error.strerror}") from error


def lock_file(fd: int, path: Path) -> None:
    """Keeps every other change of an open file out until the descriptor is closed."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise StorageError(f"{path}: another process is changing it; try again later") from None


@contextlib.contextmanager
def new_file(path: Path, *, length: int, overwrite: bool, mode: int) -> Iterator[int]:
    """A descriptor of what is a file at `path`, whole, when the block ends without an error."""
    try:
        if isinstance(path, Spool):
            yield path.file.fileno()
            return
        with files.new_file(path, overwrite=overwrite, mode=mode, length=length) as fd:
            yield fd
    except FileExistsError:
        raise StorageError(
            f"{path}: a file is already there; choose another path, or remove it first"
        ) from None
    except files.IrregularFileError as error:
        raise StorageError(
            f"{path}: {error.strerror}; give the path of a file, or what the link leads to"
        ) from None
    except OSError as error:
        raise StorageError(
            f"{path}: cannot write: {error.strerror}; nothing was changed"
        ) from error


def write_file(path: Path, data: bytes, *, overwrite: bool) -> None:
    """Writes a file that everyone may read, whole or not at all."""
    with new_file(path, length=len(data), overwrite=overwrite, mode=0o666) as fd:
        files.write_at(fd, memoryview(data), 0)


def read_small(path: Path, limit: int) -> bytes | None:
    """All bytes of a file of a checkpoint store; None if there is none.

    A symbolic link is never followed: what a store reads and writes must be where the store is.
    """
    try:
        fd = files.open_regular(path, follow=False)
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


def append_at(path: Path, data: bytes, offset: int) -> None:
    """Writes `data` at `offset` and cuts off what stood behind; on the disk when this returns.

    A crash leaves the first `offset` bytes as they were. As for `read_small`, no link is followed.
    """
    try:
        fd = files.open_regular(path, os.O_WRONLY | os.O_CREAT, follow=False)
        try:
            files.write_at(fd, memoryview(data), offset)
            os.ftruncate(fd, offset + len(data))
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        raise StorageError(
            f"{path}: cannot write: {error.strerror}; what was there still counts"
        ) from error
