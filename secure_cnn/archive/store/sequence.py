"""The files of a sequence of checkpoints: read with every check, and moved on by one commit.

At any time there are the sealed files, the log, and `latest`, which names the newest file and the
end of the log. Whatever a crash leaves behind those two counts for nothing: replacing `latest` is
the one moment at which something happens. No thread, no tensor and no secret key is here.
"""

import contextlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import final

from secure_cnn.archive.errors import RolledBack, StorageError, Tampered
from secure_cnn.archive.format.core import LATEST_FILE as _LATEST
from secure_cnn.archive.keys.signatures import Signer, Verifier
from secure_cnn.archive.sealed import inspect
from secure_cnn.archive.store.latest import Latest
from secure_cnn.archive.store.log import Checkpoint, Log
from secure_cnn.archive.store.mark import HighWaterMark
from secure_cnn.archive.store.smallfile import append_at, read_small, replace_small

__all__ = ["SequenceFolder"]

_LOG, _MARK = "log.jsonl", "high-water.json"
_MAX_LATEST, _MAX_LOG = 64 << 10, 1 << 30
_NAME = re.compile(r"checkpoint-(\d{8,})\.sealed")
_TEMPORARY = re.compile(
    r"\.(checkpoint-\d{8,}\.sealed|latest\.json|high-water\.json)\.[0-9a-f]+\.tmp"
)


@final
class SequenceFolder:
    """A folder of checkpoints, as one process sees it.

    Args:
        folder: Where the files are.
        trusted: Whose signatures count.
        high_water: Where the high-water mark is; None keeps it in the folder, where only the writer
            raises it.
        exclusive: Whether nobody else can write, so that the folder must be as we left it.

    Example:
        >>> SequenceFolder(Path("no-such-folder"), [], high_water=None, exclusive=False).read().kept
        ()
    """

    __slots__ = ("_attempted", "_empty", "_exclusive", "_high_water", "_seen", "_trusted", "folder")

    def __init__(
        self,
        folder: Path,
        trusted: Sequence[Verifier],
        *,
        high_water: Path | None,
        exclusive: bool,
    ) -> None:
        self.folder, self._trusted = folder, tuple(trusted)
        self._high_water, self._exclusive = high_water, exclusive
        self._empty = Log.empty(os.urandom(16).hex())
        self._seen: Latest | None = None
        self._attempted: Latest | None = None

    def path(self, checkpoint: Checkpoint) -> Path:
        """Where the file of a checkpoint is.

        Example:
            >>> folder = SequenceFolder(Path("runs"), [], high_water=None, exclusive=False)
            >>> folder.path(Checkpoint(
            ...     generation=1, step=0, metric=None, created="", core_hash="00" * 32)).as_posix()
            'runs/checkpoint-00000001.sealed'
        """
        return self.folder / checkpoint.name

    def read(self) -> Log:
        """The log, after its signature, its chain and its age held.

        Raises:
            RolledBack: It ends earlier than the files, the mark, or this object saw before.
            Tampered: It was cut, edited, or is of another run.
            UntrustedSigner: Somebody else signed it.
            StorageError: The operating system refuses.

        Example:
            See `SequenceFolder`.
        """
        # What a writer moves on last is read first: a reader must not take its work for a rollback.
        highest = max(map(_generation, self._files(_NAME)), default=0)
        mark = HighWaterMark.read(self._mark_path)
        raw = read_small(self.folder / _LATEST, _MAX_LATEST)
        latest = None if raw is None else Latest.from_bytes(raw, self._trusted)
        mark.check(latest, self._trusted)
        self._compare(latest)
        newest = 0 if latest is None else latest.generation
        if highest > newest + 1:
            raise RolledBack(
                f"{self.folder}: {_LATEST} ends at generation {newest}, but a file of generation "
                f"{highest} is there; put back the newer {_LATEST} and {_LOG}"
            )
        if latest is None:
            return self._empty
        log = self._log_of(latest)
        self._seen = latest
        if self._high_water is not None:
            self._raise(mark, latest)
        return log

    def check(self, checkpoint: Checkpoint, log: Log) -> None:
        """Passes if the file of a checkpoint is there and is the one that was saved, by its head.

        Raises:
            Tampered: It is missing, or another.
            RolledBack: It is another one of the same run.
            ArchiveError: Its head cannot be read.

        Example:
            See `CheckpointStore.verify`.
        """
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

    def discard(self, checkpoint: Checkpoint) -> None:
        """Removes a file that was sealed but never committed, so that its space is free.

        Example:
            See `CheckpointStore`.
        """
        path = self.path(checkpoint)
        if path.is_file() and not path.is_symlink():
            with contextlib.suppress(OSError):
                path.unlink()

    def commit(self, lines: bytes, log: Log, signer: Signer) -> None:
        """Makes lines and the log that ends with them count; on a crash all of it or nothing does.

        Args:
            lines: What to add to the log.
            log: The log with them.
            signer: Who says so.

        Raises:
            StorageError: The operating system refuses.

        Example:
            See `CheckpointStore`.
        """
        newest = log.history[-1]
        latest = Latest(
            run=log.run,
            signer=signer.verifier.to_text(),
            generation=newest.generation,
            core_hash=newest.core_hash,
            log_length=log.length,
            log_head=log.head,
        )
        append_at(self.folder / _LOG, lines, log.length - len(lines))
        # If replacing fails halfway, either of the two may be there afterwards.
        self._attempted = latest
        replace_small(self.folder / _LATEST, latest.to_bytes(signer))
        self._seen = latest
        self._raise(HighWaterMark.read(self._mark_path), latest)

    def clear(self, log: Log) -> None:
        """Removes the files of pruned checkpoints, and what a writer that died left half-written.

        Raises:
            StorageError: The operating system refuses.

        Example:
            See `CheckpointStore.prune`.
        """
        pruned = [name for name in self._files(_NAME) if _generation(name) in log.gone]
        try:
            for name in (*pruned, *self._files(_TEMPORARY)):
                (self.folder / name).unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(
                f"{self.folder}: cannot remove {name}: {error.strerror}; remove it by hand"
            ) from error

    def _files(self, pattern: re.Pattern[str]) -> list[str]:
        """The names in the folder that fit a pattern; none if there is no folder."""
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
        """The log that a signed statement vouches for."""
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
        return log

    @property
    def _mark_path(self) -> Path:
        """Where the high-water mark is."""
        return self._high_water or self.folder / _MARK

    def _raise(self, mark: HighWaterMark, latest: Latest) -> None:
        """Remembers that `latest` was seen."""
        raised = mark.raised_to(latest)
        if raised != mark:
            raised.write(self._mark_path)


def _generation(name: str) -> int:
    """The generation in the name of a checkpoint's file."""
    found = _NAME.fullmatch(name)
    return int(found[1]) if found else 0
