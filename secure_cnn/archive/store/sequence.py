"""The files of a sequence of checkpoints: read with every check, and moved on by one commit.

At any time there are the sealed files, the log, and `latest`, which names the newest file and the
end of the log. Whatever a crash leaves behind those two counts for nothing: replacing `latest` is
the one moment at which something happens. Only then a file gets its name, and a line of the log
that was not committed has its file still waiting: so file, log and mark each tell, alone, of a
`latest` that was put back. One writer at a time holds the folder's lock, which is the operating
system's (`flock`) and goes with its process, however that ends.
"""

import contextlib
import fcntl
import os
import re
import socket
import weakref
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import final

from secure_cnn.archive.errors import ArchiveError, RolledBack, StorageError, Tampered
from secure_cnn.archive.format.core import LATEST_FILE as _LATEST
from secure_cnn.archive.format.core import timestamp
from secure_cnn.archive.info import inspect
from secure_cnn.archive.keys.signatures import Signer, Verifier
from secure_cnn.archive.storage import append_at, read_small, write_file
from secure_cnn.archive.store.log import Checkpoint, HighWaterMark, Latest, Log
from secure_cnn.files import check_path, open_regular

__all__ = ["FolderLock", "SequenceFolder", "lock_folder"]

_LOG, _MARK = "log.jsonl", "high-water.json"
_MAX_LATEST, _MAX_LOG = 64 << 10, 1 << 30
_NAME = re.compile(r"checkpoint-(\d{8,})\.sealed")
_PENDING = re.compile(r"checkpoint-(\d{8,})\.sealed\.pending")
_TEMPORARY = re.compile(
    r"\.(checkpoint-\d{8,}\.sealed(\.pending)?|latest\.json|high-water\.json)\.[0-9a-f]+\.tmp"
)
_MAX_OWNER = 200


@final
class FolderLock:
    """The right to write into a folder, for this process alone; a child of `fork` has it not.

    The file that carries the lock is made if it is missing, never removed, and means nothing alone.
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


@final
class SequenceFolder:
    """A folder of checkpoints, as one process sees it.

    If it is `exclusive`, nobody else can write, and the folder must be as we left it. The mark in
    an `unmarked` one may be missing.
    """

    __slots__ = (
        *("_attempted", "_empty", "_exclusive", "_high_water", "_seen", "_trusted", "_unmarked"),
        "folder",
    )

    def __init__(
        self,
        folder: Path,
        trusted: Sequence[Verifier],
        *,
        high_water: Path | None,
        exclusive: bool,
        unmarked: bool = False,
    ) -> None:
        try:
            check_path(folder)
        except OSError as error:
            raise StorageError(
                f"{folder!r}: {error.strerror}; give the folder of a store"
            ) from None
        self.folder, self._trusted, self._unmarked = folder, tuple(trusted), unmarked
        self._high_water, self._exclusive = high_water, exclusive
        self._empty = Log.empty(os.urandom(16).hex())
        self._seen: Latest | None = None
        self._attempted: Latest | None = None

    def path(self, checkpoint: Checkpoint) -> Path:
        """Where the file of a checkpoint is: under its first name until its writer renamed it."""
        path, pending = self.folder / checkpoint.name, self.folder / checkpoint.pending
        return pending if not path.exists() and pending.exists() else path

    def missing(self, which: object) -> StorageError:
        """The error for a checkpoint that is not there, or whose folder is not."""
        there = "" if self.folder.is_dir() else ": there is no such folder"
        return StorageError(f"{self.folder}: no checkpoint for {which!r}{there}; list the store")

    def read(self) -> Log:
        """The log, after its signature, its chain and its age held."""
        while True:
            before = read_small(self.folder / _LATEST, _MAX_LATEST)
            try:
                return self._read()
            except RolledBack:
                # A reader must not take the work of a writer for a rollback: that moves it on.
                if read_small(self.folder / _LATEST, _MAX_LATEST) == before:
                    raise

    def _read(self) -> Log:
        """As `read`, which asks again if a writer came between."""
        # What a writer moves on last is read first.
        highest = max(map(_generation, self._files(_NAME)), default=0)
        marks = {path: HighWaterMark.read(path) for path in self._mark_paths}
        raw = read_small(self.folder / _LATEST, _MAX_LATEST)
        latest = None if raw is None else Latest.from_bytes(raw, self._trusted)
        for mark in marks.values():
            mark.check(latest, self._trusted)
        self._compare(latest)
        newest = 0 if latest is None else latest.generation
        if highest > newest:
            raise RolledBack(
                f"{self.folder}: {_LATEST} ends at generation {newest}, but a file of generation "
                f"{highest} is there; put back the newer {_LATEST} and {_LOG}, or, if a writer of "
                "an older version died there, remove that file"
            )
        if latest is None:
            self._check_tail(self._empty, read_small(self.folder / _LOG, _MAX_LOG) or b"")
            return self._empty
        self._check_marked(latest, marks)
        log = self._log_of(latest)
        self._seen = latest
        if self._high_water is not None:
            self._raise(self._high_water, latest)
        return log

    def check(self, checkpoint: Checkpoint, log: Log) -> None:
        """Passes if the file of a checkpoint is there and is the one that was saved."""
        path = self.path(checkpoint)
        if not path.exists():
            raise Tampered(
                f"{path}: is missing, but was saved and never pruned; get it from a copy"
            )
        info = inspect(path)
        if info.core_hash == checkpoint.core_hash:
            return
        if info.lineage is not None and info.lineage.run == log.run:
            raise RolledBack(
                f"{path}: expected generation {checkpoint.generation} as it was saved, got a file "
                f"of generation {info.lineage.generation}; get the right one from a copy"
            )
        raise Tampered(f"{path}: is not the file that was saved; get the right one from a copy")

    def commit(self, lines: bytes, log: Log, signer: Signer) -> None:
        """Makes new lines of the log count; after a crash all of them do, or none."""
        newest = log.history[-1]
        latest = Latest(
            run=log.run,
            signer=signer.verifier.to_text(),
            generation=newest.generation,
            core_hash=newest.core_hash,
            log_length=log.length,
            log_head=log.head,
        )
        inside = self.folder / _MARK
        if not inside.exists():  # before the first `latest`, which without one is refused
            HighWaterMark(run=log.run).write(inside)
        append_at(self.folder / _LOG, lines, log.length - len(lines))
        # If replacing fails halfway, either of the two may be there afterwards.
        self._attempted = latest
        write_file(self.folder / _LATEST, latest.to_bytes(signer), overwrite=True)
        self._seen = latest
        for path in self._mark_paths:
            self._raise(path, latest)

    def clear(self, log: Log) -> None:
        """Names the newest file; removes those pruned, and what a writer that died left."""
        name = _LOG
        try:
            if (newest := log.newest) and self.path(newest).name == newest.pending:
                name = newest.pending
                (self.folder / name).replace(self.folder / newest.name)
            # The line first: alone it would look like a rollback.
            path = self.folder / _LOG
            if path.exists() and path.stat().st_size > log.length:
                append_at(path, b"", log.length)
            pruned = [name for name in self._files(_NAME) if _generation(name) in log.gone]
            waiting = [
                name for name in self._files(_PENDING) if not (self.folder / name).is_symlink()
            ]
            for name in (*pruned, *waiting, *self._files(_TEMPORARY)):
                (self.folder / name).unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(
                f"{self.folder}: cannot clear {name}: {error.strerror}; see to it by hand"
            ) from error

    def _files(self, pattern: re.Pattern[str]) -> list[str]:
        try:
            return sorted(name for name in os.listdir(self.folder) if pattern.fullmatch(name))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise StorageError(
                f"{self.folder}: cannot read: {error.strerror}; give the folder of a store"
            ) from error

    def _compare(self, latest: Latest | None) -> None:
        """Passes if `latest` fits what this object saw or wrote before."""
        if self._seen is None:
            return
        if self._exclusive:
            if latest not in (self._seen, self._attempted):
                raise Tampered(
                    f"{self.folder}: {_LATEST} is not as this process left it; somebody else wrote "
                    "into the folder, or put it back: close the store and look"
                )
        else:
            seen = {self._seen.signer: (self._seen.generation, self._seen.core_hash)}
            HighWaterMark(run=self._seen.run, seen=seen).check(latest, self._trusted)

    def _log_of(self, latest: Latest) -> Log:
        raw = read_small(self.folder / _LOG, _MAX_LOG) or b""
        if len(raw) < latest.log_length:
            raise Tampered(
                f"{self.folder / _LOG}: expected at least {latest.log_length} bytes, got "
                f"{len(raw)}; get the folder again from where it is whole"
            )
        log = Log.replay(latest.run, raw[: latest.log_length])
        newest = log.newest
        told = None if newest is None else (newest.generation, newest.core_hash)
        if (log.head, told) != (latest.log_head, (latest.generation, latest.core_hash)):
            raise Tampered(
                f"{self.folder / _LOG}: is not the log that was signed; "
                "get the folder again from where it is whole"
            )
        self._check_tail(log, raw[latest.log_length :])
        return log

    def _check_tail(self, log: Log, tail: bytes) -> None:
        """Passes if a checkpoint that was logged and not committed is still waiting for it."""
        told = log.announced(tail)
        if told is None:
            return
        found = None
        with contextlib.suppress(ArchiveError):
            found = inspect(self.folder / told.pending).core_hash
        if found != told.core_hash:
            raise RolledBack(
                f"{self.folder}: {_LATEST} ends at generation {len(log.history)}, but {_LOG} tells "
                f"of generation {told.generation}; put back the newer {_LATEST}"
            )

    def _check_marked(self, latest: Latest, marks: Mapping[Path, HighWaterMark]) -> None:
        """Passes if a mark that saw this run is there, as its writer left one."""
        elsewhere = any(mark.run == latest.run for mark in marks.values())
        if self._unmarked or elsewhere or (self.folder / _MARK).exists():
            return
        raise RolledBack(
            f"{self.folder}: {_MARK} is missing, which every writer leaves, so that an older "
            f"{_LATEST} would not be noticed; put it back, or, if generation {latest.generation} "
            "is known to be the newest, open the store with accept_missing_mark=True "
            "(--accept-missing-mark)"
        )

    @property
    def _mark_paths(self) -> tuple[Path, ...]:
        return tuple(filter(None, (self.folder / _MARK, self._high_water)))

    def _raise(self, path: Path, latest: Latest) -> None:
        mark = HighWaterMark.read(path)
        raised = mark.raised_to(latest)
        if raised != mark:
            raised.write(path)


def _generation(name: str) -> int:
    found = _NAME.fullmatch(name)
    return int(found[1]) if found else 0
