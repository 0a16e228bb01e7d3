"""Who can open a file, changed: other slots in place, a new file key, or nobody ever again.

`change_recipients` does not touch the payload: who was removed and kept the file key can still read
this file. `rotate` encrypts everything anew. `shred` is cryptographic erasure (NIST SP 800-88):
without a slot nobody gets the file key, and without that the payload is noise.
"""

import contextlib
import os
import pathlib
import stat
from collections.abc import Sequence, Set
from datetime import UTC, datetime

from secure_cnn.archive.certificates.destruction import Certificate
from secure_cnn.archive.certificates.verifying import envelope_of
from secure_cnn.archive.errors import InvalidKey, StorageError
from secure_cnn.archive.format.core import LATEST_FILE, Core, timestamp
from secure_cnn.archive.format.header import SECTOR, Header, derive_key, seal_copy
from secure_cnn.archive.format.payload import Progress
from secure_cnn.archive.format.slots import (
    AnyIdentity,
    AnyRecipient,
    Slot,
    check_beside,
    check_together,
    wrap_each,
)
from secure_cnn.archive.keys import (
    check_identity,
    check_recipients,
    check_signer,
    key_ids,
)
from secure_cnn.archive.keys.signatures import Signer, Verifier
from secure_cnn.archive.opening import read_header, unlock
from secure_cnn.archive.sealing import Draft
from secure_cnn.archive.storage import Path, lock_file, new_file, opened
from secure_cnn.files import check_target, sync_folder, write_at

__all__ = ["change_recipients", "rotate", "shred"]


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
        identity: Who can open the file now.
        add: Who gets a slot; in place of the one they have, if they have one.
        remove: Recipients, or their key ids, 32 hexadecimal digits each, as `inspect` lists them.

    Raises:
        WrongKey: The identity does not open the file.
        InvalidKey: Somebody is no recipient, a key id has no slot, nobody would be left, or kinds
            would be mixed.
        LimitExceeded: There is no room; `rotate` makes some.
        StorageError: Another process is changing the file, or the operating system refuses.

    Example:
        >>> import secure_cnn.archive as archive
        >>> me, you = archive.generate_identity(), archive.generate_identity()
        >>> archive.save("m", {"step": 7}, recipients=[me.recipient])
        >>> archive.change_recipients("m", identity=me, add=[you.recipient], remove=[me.recipient])
        >>> archive.load("m", identity=you)
        {'step': 7}
    """
    identity, added = check_identity(identity), check_recipients(add, name="add")
    removed = key_ids(remove, name="remove")
    with opened(path, flags=os.O_RDWR) as fd:
        lock_file(fd, path)
        header = read_header(fd)
        file_key, slots = header.unlock(identity)
        kept = _without(slots, removed)
        new = wrap_each(added, file_key, header.core_hash)
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
        identity: Who can open the file now.
        recipients: Who can open it then.
        signer: Who vouches for the new file. Needed for a file that is signed.
        trusted: Whose signature the old file must have for that; the signer's own if None.
        progress: Called now and then with the bytes encrypted anew, and those there are in all.

    Raises:
        InvalidKey: The file is signed and no signer was given; no recipients, or a mix.
        UntrustedSigner: The old file is not signed by whom it must be.
        StorageError: The file is a checkpoint in its store, another process is changing it, or the
            operating system refuses.

    Example:
        >>> import secure_cnn.archive as archive
        >>> me, you = archive.generate_identity(), archive.generate_identity()
        >>> archive.save("m", {"step": 7}, recipients=[me.recipient])
        >>> archive.rotate("m", identity=me, recipients=[you.recipient])
        >>> archive.load("m", identity=you)
        {'step': 7}
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


def shred(
    path: Path, *, certificate: Path | None = None, signer: Signer | None = None
) -> Certificate:
    """Overwrites everything that holds the file key, syncs, and removes the file.

    Needs no key: whoever may write a file may destroy it. It cannot be undone. What is no whole
    sealed file, and a symbolic link, is not touched.

    Args:
        certificate: Where a certificate goes, if one is wanted; it must not exist.
        signer: Who signs it.

    Example:
        >>> import secure_cnn.archive as archive
        >>> me, signer = archive.generate_identity(), archive.generate_signer()
        >>> archive.save("m", {}, recipients=[me.recipient])
        >>> done = archive.shred("m", certificate="c", signer=signer)
        >>> archive.read_certificate("c", trusted=[signer.verifier]) == done
        True
    """
    signer = check_signer(signer)
    if signer is not None and certificate is None:
        raise InvalidKey("expected a path for the certificate that the signer signs, got none")
    try:
        check_target(path)
    except OSError as error:
        raise StorageError(f"{path}: cannot shred: {error.strerror}; give a file itself") from None
    target = pathlib.Path(path)
    with opened(path, flags=os.O_RDWR) as fd:
        lock_file(fd, path)
        header = read_header(fd)
        status = os.fstat(fd)
        done = Certificate(
            destroyed=timestamp(datetime.now(UTC)),
            file=target.name,
            file_id=header.core.file_id,
            core_hash=header.core_hash.hex(),
            file_length=status.st_size,
            overwritten=header.payload_offset - header.mark_offset,
            other_names=status.st_nlink - 1,
        )
        with contextlib.ExitStack() as stack:
            if certificate is not None:
                text = envelope_of(done, signer).to_bytes()
                out = stack.enter_context(
                    new_file(certificate, length=len(text), overwrite=False, mode=0o666)
                )
                write_at(out, memoryview(text), 0)
            write_at(fd, memoryview(os.urandom(done.overwritten)), header.mark_offset)
            os.fsync(fd)
            target.unlink()
            sync_folder(target.parent)
    return done
