"""One writer at a time: a lock on a folder that a dead process cannot leave behind.

The lock is the operating system's (`flock`), which goes when its process does, however that ends;
the file that carries it stays and means nothing by itself. Its text only tells a person who has it.
"""

import contextlib
import fcntl
import os
import socket
import weakref
from datetime import datetime
from pathlib import Path
from typing import final

from secure_cnn.archive.errors import StorageError
from secure_cnn.archive.format.core import timestamp
from secure_cnn.files import open_regular

__all__ = ["FolderLock", "lock_folder"]

_MAX_OWNER = 200


@final
class FolderLock:
    """The right to write into a folder, for this process alone; a child of `fork` has it not.

    The file that carries the lock is made if it is missing, and never removed.
    """

    __slots__ = ("__weakref__", "_fd", "_path")

    def __init__(self, path: Path, *, owner: str) -> None:
        self._path = path
        self._fd: int | None = None
        try:
            self._fd = open_regular(path, os.O_RDWR | os.O_CREAT, follow=False)
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, owner.encode()[:_MAX_OWNER] + b"\n", 0)
        except BlockingIOError:
            holder = self._holder()
            self._close()
            raise StorageError(
                f"{path.parent}: is being written by {holder}; "
                "wait until it ends, or open the store without a signer to read it"
            ) from None
        except OSError as error:
            self._close()
            raise StorageError(
                f"{path}: cannot lock the folder: {error.strerror}; choose one you can write to, "
                "or open the store without a signer to read it"
            ) from error
        _held.add(self)

    def check(self) -> None:
        """Passes if the lock is ours: nobody removed its file, and this is no forked child."""
        if self._fd is None:
            raise StorageError(
                f"{self._path.parent}: is not open for writing in this process; "
                "after a fork or a close, open the store again"
            )
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(self._fd), os.lstat(self._path)):
                return
        raise StorageError(
            f"{self._path}: was removed or exchanged while we held it; close the store, make sure "
            "that nobody else writes, and open it again"
        )

    def release(self) -> None:
        """Gives the lock back; may be called again."""
        if self._fd is not None:
            # A forked child may still have a copy of the descriptor; closing ours is not enough.
            with contextlib.suppress(OSError):
                fcntl.flock(self._fd, fcntl.LOCK_UN)
            self._close()

    def _close(self) -> None:
        """Closes our descriptor; a copy of it in another process keeps the lock."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _holder(self) -> str:
        """What the holder of the lock wrote into its file."""
        assert self._fd is not None
        text = os.pread(self._fd, _MAX_OWNER, 0).decode(errors="replace")
        return "".join(filter(str.isprintable, text)) or "somebody"


def lock_folder(folder: Path, *, now: datetime) -> FolderLock:
    """The lock of a folder, which is made if it is missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"{folder}: cannot make the folder: {error.strerror}; choose another"
        ) from error
    owner = f"process {os.getpid()} on {socket.gethostname()} since {timestamp(now)}"
    return FolderLock(folder / "lock", owner=owner)


_held: "weakref.WeakSet[FolderLock]" = weakref.WeakSet()


def _let_go() -> None:
    """In a forked child: the parent's locks are not ours, nor may we keep them when it ends."""
    for lock in list(_held):
        lock._close()


os.register_at_fork(after_in_child=_let_go)
