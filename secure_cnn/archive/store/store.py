"""A folder of sealed checkpoints in sequence, written beside the training loop.

The loop stands still while its tensors are copied; the copy is sealed in a thread. What is on disk
and when it counts is the business of `sequence`. Order is that of generations, never of clocks.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Self, final

from secure_cnn.archive.errors import InvalidKey, StorageError, Tampered, WrongKey
from secure_cnn.archive.format.claims import JSON, copy_claims
from secure_cnn.archive.format.core import timestamp
from secure_cnn.archive.format.slots import AnyIdentity, AnyRecipient
from secure_cnn.archive.format.state import State
from secure_cnn.archive.info import inspect, verify
from secure_cnn.archive.keys import check_identity, check_recipients, trusted_with
from secure_cnn.archive.keys.signatures import Signer, Verifier
from secure_cnn.archive.loading import load, load_into
from secure_cnn.archive.sealing import save
from secure_cnn.archive.store.background import Background, HostBuffer
from secure_cnn.archive.store.log import Checkpoint, Log, Retention, Which, as_metric, choose
from secure_cnn.archive.store.sequence import FolderLock, SequenceFolder, lock_folder

__all__ = ["CheckpointStore"]

_now = partial(datetime.now, UTC)


@final
class CheckpointStore:
    """A sequence of sealed checkpoints in a folder; what was changed or put back is noticed.

    With a signer it writes, one writer at a time; without one it only reads, and any number may. A
    store is for one thread of one process: after a `fork`, the child opens its own. Close a writer,
    or use `with`: a save still under way when the program ends may be lost, which stderr then says.

    Every call notices a log that was cut or edited, a mark that is missing, and a `latest` older
    than any file, line of the log or mark around it, or than this object saw before; `load` and
    `verify` also a checkpoint that is missing, changed, or another than was saved. Without a mark
    outside of the folder nobody can notice a folder put back as a whole, all four together, nor
    what is withheld from a reader who never saw it. Everyone can read generations, steps, metrics,
    times and sizes.

    Args:
        folder: Where the files are; made for a writer if it is missing.
        recipients: Who can open new checkpoints, as for `save`; at least one to save any. A writer
            needs no identity: who trains need not be able to read what is there.
        signer: Who vouches for new checkpoints; None opens the store to read only.
        identity: Opens checkpoints for `load`.
        trusted: Whose signatures count; the signer's own if None.
        keep_last: So many of the newest stay. With none of this and the next two, all stay.
        keep_best: So many with the largest metric stay.
        every: Each whose generation is a multiple of this stays.
        high_water: A file outside of the folder that remembers the highest generation seen, beside
            the one inside; each process that opens the store should have its own.
        accept_missing_mark: Whether the mark inside may be missing, as where an older version
            wrote; whoever says so knows otherwise that the newest generation is the newest.
        clock: The time in UTC, for people who read the log.

    Raises:
        RolledBack: There is something older than was there before.
        Tampered: What is there does not fit together.
        StorageError: Another process writes, or the operating system refuses.

    Example:
        >>> import secure_cnn.archive as archive
        >>> me, signer = archive.generate_identity(), archive.generate_signer()
        >>> with CheckpointStore("run", recipients=[me.recipient], signer=signer) as store:
        ...     generation = store.save({"weight": 0.5}, step=100)
        >>> CheckpointStore("run", identity=me, trusted=[signer.verifier]).load(generation)
        {'weight': 0.5}
    """

    def __init__(  # noqa: PLR0913  (each is one decision of who keeps checkpoints)
        self,
        folder: str | os.PathLike[str],
        *,
        recipients: Sequence[AnyRecipient] = (),
        signer: Signer | None = None,
        identity: AnyIdentity | None = None,
        trusted: Sequence[Verifier] | None = None,
        keep_last: int | None = None,
        keep_best: int | None = None,
        every: int | None = None,
        high_water: str | os.PathLike[str] | None = None,
        accept_missing_mark: bool = False,
        clock: Callable[[], datetime] = _now,
    ) -> None:
        self._retention = Retention(keep_last=keep_last, keep_best=keep_best, every=every)
        self._trusted = trusted_with(signer, trusted)
        self._recipients, self._signer, self._clock = check_recipients(recipients), signer, clock
        self._identity = None if identity is None else check_identity(identity)
        self._buffer, self._saving = HostBuffer(), Background()
        self._files = SequenceFolder(
            Path(folder),
            self._trusted,
            high_water=None if high_water is None else Path(high_water),
            exclusive=signer is not None,
            unmarked=accept_missing_mark,
        )
        self._lock: FolderLock | None = None
        if signer is not None:
            self._lock = lock_folder(Path(folder), now=clock())
        self._log: Log | None = None
        try:
            log = self._log = self._files.read()
            if self._lock is not None:
                self._files.clear(log)
        except BaseException:
            self._release()
            raise

    def save(
        self,
        state: State,
        *,
        step: int,
        metric: float | None = None,
        claims: Mapping[str, JSON] | None = None,
    ) -> int:
        """Copies the tensors of a state and saves the copy in the background.

        Returns the generation of the new checkpoint after the copy, which is made in memory that is
        used again from save to save. If the save before is still under way, waits for it first. The
        state may be changed as soon as this returns. The new checkpoint counts once `wait`, `close`
        or another call returned without an error; until then the one before counts.

        Args:
            step: The training step, from 0.
            metric: How good the state is, larger is better; everyone can read it.

        Raises:
            StateError: State, step, metric or claims hold something that cannot be saved.
            ArchiveError: The save before failed, then this one is not made; or the store has no
                recipients, or is not open for writing in this process.
        """
        self._finish_save()
        self._writing()
        if not self._recipients:
            raise InvalidKey("expected at least one recipient, got none; add who can read")
        # After a failure it is not known whether the commit was in time.
        self._log = self._log or self._files.read()
        checkpoint = Checkpoint(
            generation=len(self._log.history) + 1,
            step=step,
            metric=as_metric(metric),
            created=timestamp(self._clock()),
            core_hash="0" * 64,
        )
        claims, copy = copy_claims(claims, "claims"), self._buffer.copy(state)
        self._saving.start(partial(self._add, copy, checkpoint, claims))
        return checkpoint.generation

    def wait(self) -> None:
        """Waits for a save under way; raises if it failed, and the checkpoint before it counts."""
        self._saving.wait()

    def load(self, which: Which = "latest") -> State:
        """The state of a checkpoint: of ``"latest"``, ``"best"`` or a generation.

        Everything about it and the sequence is checked first.

        Raises:
            StorageError: There is no such checkpoint.
            WrongKey: The store was opened without an identity, or with one of no recipient.
            ArchiveError: As for `archive.load`, and as for opening the store.
        """
        return self._read(which, load)

    def load_into(self, state: State, which: Which = "latest") -> State:
        """As `load`, straight into the tensors of a state; see `archive.load_into`."""
        return self._read(which, partial(load_into, state))

    def find(self, which: Which) -> Checkpoint:
        """What the log says of a checkpoint; raises `StorageError` if it is not kept."""
        if (found := choose(self.list(), which)) is None:
            raise self._files.missing(which)
        return found

    def list(self) -> tuple[Checkpoint, ...]:
        """The kept checkpoints, oldest first, from the signed log; `verify` looks at the files."""
        self._finish_save()
        return self._files.read().kept

    def verify(self, *, deep: bool = False) -> tuple[Checkpoint, ...]:
        """The kept checkpoints, after each was found to be there, and to be the one that was saved.

        Needs no identity. With `deep` all of each file is read and its signature checked, else its
        head alone.
        """
        self._finish_save()
        log = self._files.read()
        for checkpoint in log.kept:
            self._files.check(checkpoint, log)
            if deep:
                verify(self._files.path(checkpoint), trusted=self._trusted)
        return log.kept

    def prune(self) -> tuple[Checkpoint, ...]:
        """Removes what the store's rules do not keep, as each save does; gives what is kept."""
        self._finish_save()
        signer = self._writing()
        log = self._files.read()
        line, shorter = self._pruned(log)
        if line:
            self._files.commit(line, shorter, signer)
        self._files.clear(shorter)
        self._log = shorter
        return shorter.kept

    def close(self) -> None:
        """Waits for a save under way and lets others write; may be called again."""
        try:
            self._saving.wait()
        finally:
            self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _add(self, copy: State, checkpoint: Checkpoint, claims: Mapping[str, JSON]) -> None:
        """Seals a copy and makes it count; runs beside the training loop."""
        signer = self._writing()
        self._log, log = None, self._files.read()
        self._files.clear(log)
        path = self._files.folder / checkpoint.pending
        save(
            path,
            copy,
            recipients=self._recipients,
            signer=signer,
            claims=claims,
            lineage=log.lineage(checkpoint),
            overwrite=True,
        )
        line, longer = log.saved(replace(checkpoint, core_hash=inspect(path).core_hash))
        pruned, longer = self._pruned(longer)
        self._writing()
        self._files.commit(line + pruned, longer, signer)
        self._log = longer
        self._files.clear(longer)

    def _pruned(self, log: Log) -> tuple[bytes, Log]:
        """The line that prunes what no rule keeps, and the log with it; empty if all is kept."""
        superfluous = self._retention.superfluous(log.kept)
        return log.pruned(superfluous) if superfluous else (b"", log)

    def _read(self, which: Which, read: Callable[..., State]) -> State:
        """What `load`, or another that takes the same, reads of a checkpoint."""
        if self._identity is None:
            raise WrongKey("the store was opened without an identity; give one to load from it")
        read = partial(read, identity=self._identity, trusted=self._trusted)
        checkpoint = self.find(which)
        place = self._files.path(checkpoint)
        try:
            return self._open(checkpoint, read)
        except (StorageError, Tampered):
            # A writer may have pruned it meanwhile, then there is another; or have renamed it.
            again, after = self.find(which), self._files.path(checkpoint)
            if (again, after) == (checkpoint, place):
                raise
            return self._open(again, read)

    def _open(self, checkpoint: Checkpoint, read: Callable[..., State]) -> State:
        """The state of one checkpoint, after its file was found to be the one that was saved."""
        self._files.check(checkpoint, self._files.read())
        return read(self._files.path(checkpoint), core_hash=checkpoint.core_hash)

    def _finish_save(self) -> None:
        """Waits for a save under way, and raises what went wrong with it."""
        if self._lock is not None:
            self._lock.check()
        self._saving.wait()

    def _writing(self) -> Signer:
        """The signer, if this process may write."""
        if self._lock is None or self._signer is None:
            raise StorageError(
                f"{self._files.folder}: is open for reading; give a signer and recipients to write"
            )
        self._lock.check()
        return self._signer

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()
