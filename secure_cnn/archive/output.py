"""An output file that appears whole or not at all.

It is written under a temporary name in the same folder, fsynced and renamed; on any failure the
temporary file goes and what was there before stays.
"""

import contextlib
import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from secure_cnn.archive.errors import StorageError

__all__ = ["new_file"]


@contextlib.contextmanager
def new_file(
    path: str | os.PathLike[str], *, length: int, overwrite: bool, mode: int
) -> Iterator[int]:
    """A file descriptor to write to; on leaving the block the file is at `path`.

    Args:
        path: Where the file goes. Its folder must exist.
        length: Bytes to reserve before anything is written, so that a full disk shows at once.
        overwrite: Whether a file at `path` may be replaced.
        mode: Permissions of the new file, less the umask.

    Raises:
        StorageError: There is a file already, or the operating system refuses.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with new_file(f"{folder}/x", length=5, overwrite=False, mode=0o600) as fd:
        ...         written = os.write(fd, b"hello")
        ...     os.listdir(folder)
        ['x']
    """
    target = Path(path)
    _check_target(target, overwrite)
    temporary = target.with_name(f".{target.name[:64]}.{os.urandom(8).hex()}.tmp")
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        fd = os.open(temporary, flags, mode)
        try:
            try:
                _reserve(fd, length)
                yield fd
                os.fsync(fd)
            finally:
                os.close(fd)
            _publish(temporary, target, overwrite)
        finally:
            with contextlib.suppress(FileNotFoundError):
                temporary.unlink()
    except OSError as error:
        raise StorageError(
            f"{target}: cannot write: {error.strerror}; nothing was changed"
        ) from error


def _check_target(target: Path, overwrite: bool) -> None:
    """Refuses a target that must not be replaced, before any work is done."""
    if target.is_symlink():
        raise StorageError(f"{target}: is a symbolic link; give the path it leads to")
    if target.is_dir():
        raise StorageError(f"{target}: is a folder; give the path of a file")
    if not overwrite and target.exists():
        raise StorageError(
            f"{target}: a file is already there; choose another path, or remove it first"
        )


def _reserve(fd: int, length: int) -> None:
    """Reserves the space of a file where the file system can."""
    try:
        os.posix_fallocate(fd, 0, length)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.ENODEV):
            raise


def _publish(temporary: Path, target: Path, overwrite: bool) -> None:
    """Gives a finished file its name; without `overwrite` never over a file that came meanwhile."""
    if overwrite:
        _replace(temporary, target)
    else:
        try:
            target.hardlink_to(temporary)
        except FileExistsError:
            _check_target(target, overwrite)
        except OSError:
            _check_target(target, overwrite)
            temporary.replace(target)
    folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _replace(temporary: Path, target: Path) -> None:
    """Puts a file in the place of another, whose blocks are given back in the background.

    To give back those of a large file takes longer than to encrypt its successor, and nobody has to
    wait for it.
    """
    try:
        old = os.open(target, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        temporary.replace(target)
        return
    try:
        temporary.replace(target)
    finally:
        try:
            threading.Thread(target=os.close, args=(old,), name="old file", daemon=True).start()
        except RuntimeError:
            os.close(old)
