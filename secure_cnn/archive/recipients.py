"""Who can open a file, changed: its slots written anew in place, or the whole under a new file key.

`change_recipients` does not touch the payload, so that who was removed and kept the file key can
still read this file. `rotate` encrypts everything anew; the old content stays readable to them
wherever a copy of the old file is.
"""

import os
import stat
from collections.abc import Sequence, Set

from secure_cnn.archive.errors import InvalidKey, StorageError
from secure_cnn.archive.format.core import LATEST_FILE, Core
from secure_cnn.archive.format.header import SECTOR, Header, derive_key, seal_copy
from secure_cnn.archive.format.payload import Progress
from secure_cnn.archive.format.slots import (
    AnyIdentity,
    AnyRecipient,
    Slot,
    check_beside,
    check_together,
)
from secure_cnn.archive.keys import check_identity, check_recipients, check_signer, key_ids
from secure_cnn.archive.keys.signatures import Signer, Verifier
from secure_cnn.archive.opening import read_header, unlock
from secure_cnn.archive.sealing import Draft
from secure_cnn.archive.storage import Path, lock_file, opened
from secure_cnn.files import write_at

__all__ = ["change_recipients", "rotate"]


def change_recipients(
    path: Path,
    *,
    identity: AnyIdentity,
    add: Sequence[AnyRecipient] = (),
    remove: Sequence[str | AnyRecipient] = (),
) -> None:
    """Gives the file key to some and takes the slots of others away, in one step.

    Costs the same for a file of any size. After a power cut at any moment the file opens, for the
    recipients before or after. Slots are not signed: a signature holds as before.

    Args:
        path: A sealed file.
        identity: Who can open it now.
        add: Who gets a slot; in place of the one they have, if they have one.
        remove: Recipients, or their key ids, 32 hexadecimal digits each, as `inspect` lists them.

    Raises:
        WrongKey: The identity does not open the file.
        InvalidKey: Somebody is no recipient, a key id has no slot, nobody would be left, or kinds
            would be mixed.
        LimitExceeded: There is no room; `rotate` makes some.
        StorageError: Another process is changing the file, or the operating system refuses.
        ArchiveError: As for `inspect`.

    Example:
        >>> import tempfile, torch, secure_cnn.archive as archive
        >>> me, you = archive.generate_identity(), archive.generate_identity()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     archive.save(f"{folder}/m", {"w": torch.ones(1)}, recipients=[me.recipient])
        ...     archive.change_recipients(f"{folder}/m", identity=me, add=[you.recipient])
        ...     mine = me.recipient.key_id.hex()
        ...     archive.change_recipients(f"{folder}/m", identity=you, remove=[mine])
        ...     archive.load(f"{folder}/m", identity=you)
        {'w': tensor([1.])}
    """
    identity, added = check_identity(identity), check_recipients(add, name="add")
    removed = key_ids(remove, name="remove")
    with opened(path, flags=os.O_RDWR) as fd:
        lock_file(fd, path)
        header = read_header(fd)
        file_key, slots = header.unlock(identity)
        kept = _without(slots, removed)
        new = [who.wrap(file_key, header.core_hash) for who in added]
        replaced = {(slot.kind, slot.key_id) for slot in new}
        after = [slot for slot in kept if (slot.kind, slot.key_id) not in replaced] + new
        check_beside(slot.kind for slot in after)
        check_together(after)
        _write(fd, header, after, file_key)


def rotate(
    path: Path,
    *,
    identity: AnyIdentity,
    recipients: Sequence[AnyRecipient],
    signer: Signer | None = None,
    trusted: Sequence[Verifier] | None = None,
    progress: Progress | None = None,
) -> None:
    """Replaces a sealed file by one with the same content, a new file key and these recipients.

    Name, lineage, claims and permissions stay; file id and core hash are new, so that a successor
    that names this file as its previous one no longer does; for this reason a checkpoint in its
    store is refused. Segments are decrypted and encrypted one by one: no plaintext is written, and
    little of it is in memory at a time. On any failure the old file is as it was.

    Args:
        path: A sealed file.
        identity: Who can open it now.
        recipients: Who can open it then.
        signer: Who vouches for the new file. Needed for a file that is signed.
        trusted: Whose signature the old file must have for that; the signer's own if None.
        progress: Called now and then with the bytes encrypted anew, and those there are in all.

    Raises:
        InvalidKey: The file is signed and no signer was given; no recipients, or a mix.
        UntrustedSigner: The old file is not signed by whom it must be.
        StorageError: The file is a checkpoint in its store, another process is changing it, or the
            operating system refuses.
        ArchiveError: As for `load` and `save`.

    Example:
        >>> import tempfile, torch, secure_cnn.archive as archive
        >>> me, you = archive.generate_identity(), archive.generate_identity()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     archive.save(f"{folder}/m", {"w": torch.ones(1)}, recipients=[me.recipient])
        ...     archive.rotate(f"{folder}/m", identity=me, recipients=[you.recipient])
        ...     archive.load(f"{folder}/m", identity=you)
        {'w': tensor([1.])}
    """
    recipients, signer = check_recipients(recipients), check_signer(signer)
    if signer is not None and trusted is None:
        trusted = [signer.verifier]
    with opened(path) as fd:
        lock_file(fd, path)
        header, payload = unlock(fd, identity=identity, trusted=trusted, expect={}, core_hash=None)
        old = header.core
        _check_alone(path, old)
        if old.signer is not None and signer is None:
            raise InvalidKey(
                f"{path}: is signed, expected a signer for the new file, got none; name one, or "
                "save the state unsigned"
            )
        draft = Draft(
            recipients=recipients,
            signer=signer,
            claims=old.claims,
            name=old.name,
            lineage=old.lineage,
            segment_length=old.segment_length,
        )
        mode = stat.S_IMODE(os.fstat(fd).st_mode)
        draft.write(
            path, payload, old.plaintext_length, overwrite=True, mode=mode, progress=progress
        )


def _without(slots: Sequence[Slot], removed: Set[str]) -> list[Slot]:
    """The slots whose key ids are not among these, each of which must be there."""
    missing = removed - {slot.key_id.hex() for slot in slots}
    if missing:
        raise InvalidKey(
            f"expected key ids that the file has, got {', '.join(sorted(missing))}; "
            "list its recipients"
        )
    return [slot for slot in slots if slot.key_id.hex() not in removed]


def _write(fd: int, header: Header, slots: Sequence[Slot], file_key: bytes) -> None:
    """Mark, copy A, copy B, no mark: each on the disk before the next, save for the last.

    This order makes a power cut harmless: the head holds its slots twice, and the mark, which only
    a holder of the file key can make, stands while the two may differ.
    """
    copy = memoryview(seal_copy(header.prefix, slots, file_key, header.copy_length))
    mark = header.mark_offset
    for data, at in (
        (memoryview(derive_key(file_key, b"mark")), mark),
        (copy, mark + SECTOR),
        (copy, mark + SECTOR + header.copy_length),
    ):
        write_at(fd, data, at)
        os.fdatasync(fd)
    # Equal copies with a mark are as good as without one: this write may be lost.
    write_at(fd, memoryview(bytes(len(header.mark))), mark)


def _check_alone(path: Path, core: Core) -> None:
    """Refuses a checkpoint in its store, whose signed log would no longer know it."""
    folder = os.path.dirname(os.path.realpath(path))
    if core.lineage is not None and os.path.exists(os.path.join(folder, LATEST_FILE)):
        raise StorageError(
            f"{path}: expected a file on its own, got a checkpoint of a store, whose log names its "
            "hash; load it and save it as the store's next checkpoint, then prune, or rotate a "
            "copy outside of the folder"
        )
