"""The one place that decides what may be read and written: regular files, and nothing else.

A pipe would block for ever, a device may act on being opened, and neither is replaced by a rename
without somebody missing it. Errors are `OSError`, so that each room says them in its own words.
"""

import contextlib
import errno
import fcntl
import os
import re
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, TypeAlias

__all__ = [
    "AnyPath",
    "IrregularFileError",
    "check_path",
    "check_target",
    "locked_folder",
    "new_file",
    "open_regular",
    "reading",
    "sync_folder",
    "target_of",
    "write_at",
    "write_file",
]

AnyPath: TypeAlias = str | os.PathLike[str]

_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
    stat.S_IFLNK: "a symbolic link",
}
_STEM = 100
_RANDOM = 8
# `.part` was the ending of earlier versions.
_LEFT_BEHIND = re.compile(rf"\.(.+)\.[0-9a-f]{{{2 * _RANDOM}}}\.(?:tmp|part)")


class IrregularFileError(OSError):
    """A path leads to something that is no regular file; `strerror` says what it is."""


def open_regular(
    path: AnyPath, flags: int = os.O_RDONLY, *, mode: int = 0o666, follow: bool = True
) -> int:
    """A descriptor of a regular file; what is something else is not even opened.

    With `os.O_CREAT` among the flags the file may be missing; without `follow` a link is refused.
    """
    check_path(path)
    # Looked at first: to open some devices is to use them.
    with contextlib.suppress(FileNotFoundError):
        _check(path, os.stat(path, follow_symlinks=follow))
    nofollow = 0 if follow else os.O_NOFOLLOW
    fd = os.open(path, flags | nofollow | os.O_CLOEXEC | os.O_NONBLOCK, mode)
    try:
        _check(path, os.fstat(fd))
    except BaseException:
        os.close(fd)
        raise
    return fd


def reading(path: AnyPath) -> BinaryIO:
    """A regular file, open for reading."""
    return open(open_regular(path), "rb")


def check_target(path: AnyPath) -> None:
    """Passes if nothing is at a path, or a regular file, which may then be replaced."""
    check_path(path)
    with contextlib.suppress(FileNotFoundError):
        _check(path, os.stat(path, follow_symlinks=False))


@contextlib.contextmanager
def locked_folder(folder: AnyPath) -> Iterator[None]:
    """Keeps everybody else who asks for the same out of a folder in the block.

    The lock is the system's: it goes with its process, however that ends, and holds within one too.

    Raises:
        BlockingIOError: Somebody is in it.
        OSError: It is no folder, or its file system has no locks.
    """
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(fd)


@contextlib.contextmanager
def new_file(
    path: AnyPath, *, overwrite: bool, mode: int = 0o666, length: int = 0
) -> Iterator[int]:
    """A descriptor to write to; on leaving the block the file is at `path`, whole.

    Until then it has no name where the system can do that (Linux, most file systems), so that
    nothing is left whatever ends the process. Elsewhere it has a temporary name in the same folder,
    goes on any failure, and if the process was killed when the next file is written there.
    The folder must exist; `length` bytes are reserved where the file system can do that.

    Raises:
        FileExistsError: There is a file already, and `overwrite` is False.
        IrregularFileError: There is something that is no regular file.
    """
    check_target(path)
    target = Path(path)
    if not overwrite and target.exists():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    _remove_stale(target)
    temporary = target.with_name(f"{_stem(target)}{os.urandom(_RANDOM).hex()}.tmp")
    fd, named = _open_new(temporary, mode)
    try:
        _reserve(fd, length)
        yield fd
        os.fsync(fd)
        _publish(fd, temporary, target, named=named, overwrite=overwrite)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        os.close(fd)


def write_file(path: AnyPath, data: bytes, *, overwrite: bool, mode: int = 0o666) -> None:
    """Writes a file whole or not at all, as `new_file` does."""
    with new_file(path, overwrite=overwrite, mode=mode, length=len(data)) as fd:
        write_at(fd, memoryview(data), 0)


def write_at(fd: int, data: memoryview, offset: int) -> None:
    """Writes all of `data` to a file at `offset`; one call of the system may take less."""
    while len(data):
        done = os.pwrite(fd, data, offset)
        data, offset = data[done:], offset + done


def sync_folder(folder: AnyPath) -> None:
    """Puts the names in a folder on the disk: a file is found after a power cut only then."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def target_of(name: str) -> str | None:
    """The file for which a killed writer left the temporary one of that name, None if none did."""
    found = _LEFT_BEHIND.fullmatch(name)
    return found[1] if found else None


def check_path(path: AnyPath) -> None:
    r"""Refuses what no system takes as a path, such as one with a zero byte in it."""
    try:
        raw = os.fsencode(path)
    except (TypeError, UnicodeEncodeError):
        raise OSError(errno.EINVAL, "expected a path", repr(path)) from None
    if b"\0" in raw:
        raise OSError(errno.EINVAL, "expected a path without zero bytes", repr(path))


def _check(path: AnyPath, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
        raise IrregularFileError(
            errno.EINVAL, f"expected a regular file, got {kind}", os.fsdecode(path)
        )


def _stem(target: Path) -> str:
    """What the temporary names of a target begin with; short enough for every file system."""
    stem = target.name
    while len(os.fsencode(stem)) > _STEM:
        stem = stem[:-1]
    return f".{stem}."


def _open_new(temporary: Path, mode: int) -> tuple[int, bool]:
    """A new file, and whether it has a name already."""
    if hasattr(os, "O_TMPFILE") and os.path.isdir("/proc/self/fd"):
        try:
            flags = os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC
            return os.open(temporary.parent, flags, mode), False
        except OSError as error:
            # What file systems say that cannot; kernels that do not know the flag see a folder.
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
                raise
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    while True:
        fd = os.open(temporary, flags, mode)
        with contextlib.suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Between the two calls another writer may have taken it for one left behind.
        if os.path.exists(temporary) and os.path.samestat(os.stat(temporary), os.fstat(fd)):
            return fd, True
        os.close(fd)


def _remove_stale(target: Path) -> None:
    """Removes what writers of this target left when they were killed; a living one holds a lock."""
    pattern = re.compile(rf"{re.escape(_stem(target))}[0-9a-f]{{{2 * _RANDOM}}}\.tmp")
    with contextlib.suppress(OSError):
        for name in filter(pattern.fullmatch, os.listdir(target.parent)):
            with contextlib.suppress(OSError):
                stale = target.with_name(name)
                fd = open_regular(stale, follow=False)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    stale.unlink()
                finally:
                    os.close(fd)


def _reserve(fd: int, length: int) -> None:
    if length == 0:
        return
    try:
        os.posix_fallocate(fd, 0, length)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.ENODEV):
            raise


def _publish(fd: int, temporary: Path, target: Path, *, named: bool, overwrite: bool) -> None:
    """Gives a finished file its name; without `overwrite` never over a file that came meanwhile."""
    if not named:
        _link(fd, temporary if overwrite else target)
    if overwrite:
        check_target(target)
        _replace(temporary, target)
    elif named:
        try:
            target.hardlink_to(temporary)
        except FileExistsError:
            raise
        except OSError:  # a file system without links
            if os.path.lexists(target):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from None
            temporary.replace(target)
    sync_folder(target.parent)


def _link(fd: int, path: Path) -> None:
    # With a folder named, Python asks the system to follow the link that stands for the file.
    descriptors = os.open("/proc/self/fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.link(str(fd), path, src_dir_fd=descriptors)
    finally:
        os.close(descriptors)


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
