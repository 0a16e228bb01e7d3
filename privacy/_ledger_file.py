"""The file of a ledger: one line that binds it, then one line for each thing that was spent.

Each line is JSON and on the disk before `append` returns. A count is that of its session so far, so
that the largest one of a session holds, whichever was written last. Deliberately not here: what a
step costs, and which steps may be taken.
"""

import fcntl
import json
import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from weakref import WeakSet

from privacy.errors import LedgerError, PlanError

__all__ = ["LedgerFile"]

_MARK = "privacy_ledger"
_VERSION = 1
_MAX_BYTES = 256 * 2**20
"""A larger file is refused unread: a step takes about 45 bytes, so it holds six million."""
_living: "WeakSet[LedgerFile]" = WeakSet()


class LedgerFile:
    """A ledger's file, locked while it is open; a class because it holds the descriptor.

    `path` need not exist yet. `terms` is what the file's first line binds it to, None as long as
    there is no file; `sessions` counts steps by session, in the order in which they began.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        try:
            # Absolute: the program may go to another folder in the middle of a training.
            self.path = Path(path).absolute()
        except TypeError as error:
            raise LedgerError(
                f"path: expected the path of a ledger's file, got {type(path).__name__}"
            ) from error
        self.terms: dict[str, Any] | None = None
        self.sessions: dict[str, int] = {}
        _living.add(self)
        self._fd = self._opened(os.O_RDWR)
        self._process = os.getpid()
        if self._fd is None:
            return
        try:
            self._lock()
            self._read()
        except BaseException:
            self.close()
            raise

    def __del__(self) -> None:
        # If other code closed the descriptor, the file is released already.
        with suppress(OSError):
            self.close()

    def __reduce_ex__(self, protocol: object) -> Any:
        raise LedgerError(f"{self.path}: its descriptor and its lock cannot be copied or pickled")

    @property
    def locked(self) -> bool:
        """Whether it is open here, and so no other training has it."""
        return self._fd is not None

    def bind(self, terms: Mapping[str, Any]) -> None:
        """Makes the file if there is none yet; refuses one that is bound to other terms."""
        if self.terms is None:
            self._create(terms)
        elif self.terms != terms:
            raise PlanError(
                f"ledger: {self.path} is bound to {self.terms}, the plan has {terms}; give each "
                "plan a ledger of its own"
            )
        self._check_open()

    def _create(self, terms: Mapping[str, Any]) -> None:
        """Creates the file with its first line, readable by its owner only."""
        self._fd = self._opened(os.O_RDWR | os.O_CREAT | os.O_EXCL)
        self._process = os.getpid()
        try:
            self._lock()
            self._write({_MARK: _VERSION, **terms})
            self._sync_folder()
        except BaseException:
            self.close()
            raise
        self.terms = dict(terms)

    def _sync_folder(self) -> None:
        """Syncs the folder, so that the file's name survives a power cut, too."""
        try:
            folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            raise LedgerError(
                f"{self.path}: its folder cannot be brought to the disk: {error}; remove the file "
                "and give a path in a folder that can be read and written"
            ) from error

    def append(self, session: str, steps: int) -> None:
        """Writes how many steps a session has spent so far; on the disk when this returns."""
        self._check_place(self._check_open())
        self._write({"session": session, "steps": steps})
        self.sessions[session] = max(steps, self.sessions.get(session, 0))

    def close(self) -> None:
        """Releases the file for others."""
        fd, self._fd = getattr(self, "_fd", None), None
        if fd is not None:
            os.close(fd)

    def _opened(self, flags: int) -> int | None:
        """A descriptor of a regular file, or None where there is no file."""
        # Without O_NONBLOCK a pipe in the file's place would be waited on for ever.
        flags |= os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            fd = os.open(self.path, flags, 0o600)
        except FileNotFoundError as error:
            if not flags & os.O_CREAT:
                return None
            raise LedgerError(f"{self.path}: expected a folder that exists: {error}") from error
        except (OSError, ValueError) as error:
            raise LedgerError(
                f"{self.path}: expected a regular file that can be written, or none: {error}"
            ) from error
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise LedgerError(f"{self.path}: expected a regular file, or none")
        return fd

    def _lock(self) -> None:
        assert self._fd is not None
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise LedgerError(
                f"{self.path}: another training spends from this ledger: {error}; wait for it, or "
                "call ledger.close() on the other one"
            ) from error

    def _check_open(self) -> int:
        """The descriptor; refuses a closed one, and one of another process."""
        if self._fd is None or self._process != os.getpid():
            raise LedgerError(
                f"{self.path}: the ledger was closed, or opened by another process; open it again, "
                "with privacy.Ledger.open"
            )
        return self._fd

    def _check_place(self, fd: int) -> None:
        """Refuses a file that was removed or replaced: what is written to it would be lost."""
        try:
            here, there = os.fstat(fd), self.path.stat(follow_symlinks=False)
        except OSError as error:
            raise LedgerError(f"{self.path}: the ledger's file is gone: {error}") from error
        if (here.st_dev, here.st_ino) != (there.st_dev, there.st_ino):
            raise LedgerError(f"{self.path}: the ledger's file was replaced by another one")

    def _read(self) -> None:
        """Reads the whole file; a last line that was cut off counts as a step."""
        assert self._fd is not None
        if os.fstat(self._fd).st_size > _MAX_BYTES:
            raise LedgerError(f"{self.path}: expected at most {_MAX_BYTES} bytes of a ledger")
        with open(os.dup(self._fd), "rb") as file:
            content = file.read(_MAX_BYTES)
        lines = content.split(b"\n")
        first = _parsed(lines[0])
        if len(lines) < 2 or first.get(_MARK) != _VERSION or type(first[_MARK]) is not int:
            raise LedgerError(
                f"{self.path}: expected a ledger of version {_VERSION}, got another file or one "
                "whose first line was cut off; give another path, or remove it if nothing was spent"
            )
        self.terms = {name: value for name, value in first.items() if name != _MARK}
        torn, at = lines.pop(), len(lines[0]) + 1
        last = ""
        for number, line in enumerate(lines[1:], start=2):
            entry = _parsed(line)
            session, steps = entry.get("session"), entry.get("steps")
            if not isinstance(session, str) or type(steps) is not int or steps < 0:
                if number < len(lines) or torn:
                    raise LedgerError(
                        f"{self.path}: line {number} is damaged, so what was spent is not known; "
                        "restore the file from a copy"
                    )
                torn = line + b"\n"
                break
            at, last = at + len(line) + 1, session
            self.sessions[session] = max(steps, self.sessions.get(session, 0))
        if torn:
            self._mend(at, last)

    def _mend(self, at: int, session: str) -> None:
        """Puts a whole step in the place of a line that was cut off: it may have been released."""
        assert self._fd is not None
        steps = self.sessions.get(session, 0) + 1
        line = _line({"session": session, "steps": steps})
        try:
            os.pwrite(self._fd, line, at)
            os.ftruncate(self._fd, at + len(line))
            os.fsync(self._fd)
        except OSError as error:
            raise LedgerError(f"{self.path}: cannot be written: {error}") from error
        self.sessions[session] = steps

    def _write(self, entry: Mapping[str, Any]) -> None:
        assert self._fd is not None
        line = _line(entry)
        try:
            end = os.lseek(self._fd, 0, os.SEEK_END)
            written = os.pwrite(self._fd, line, end)
            if written == len(line):
                os.fsync(self._fd)
                return
            os.ftruncate(self._fd, end)
            reason = "the disk is full"
        except OSError as error:
            reason = str(error)
        # What stands at its end is not known now; who opens it again counts a piece as a step.
        self.close()
        raise LedgerError(
            f"{self.path}: cannot be written, so nothing is spent or released: {reason}"
        )


def _leave_to_parent() -> None:
    """In a forked process, such as one that reads a data set: the file is its parent's alone.

    A descriptor that were left open here would keep the file locked after the parent's death.
    """
    for file in list(_living):
        file.close()


os.register_at_fork(after_in_child=_leave_to_parent)


def _line(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry).encode() + b"\n"


def _parsed(line: bytes) -> dict[str, Any]:
    """The JSON object of a line; an empty one if it is not JSON."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return entry if isinstance(entry, dict) else {}
