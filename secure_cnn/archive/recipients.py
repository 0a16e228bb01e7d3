"""Who can open a file, changed in place: the slots are written anew, the payload is not touched.

The order of writes makes a power cut harmless: the head holds its slots twice, and a mark, which
only a holder of the file key can make, stands while the two may differ. Who was removed and kept
the file key can still read this file; `rotate` gives it a new one.
"""

import fcntl
import os
from collections.abc import Sequence, Set

from secure_cnn.archive.errors import InvalidKey, StorageError
from secure_cnn.archive.format.header import SECTOR, Header, derive_key, seal_copy
from secure_cnn.archive.format.slots import Slot, SlotReader, SlotWriter, check_mix
from secure_cnn.archive.keys.doors import check_identity, check_recipients, key_ids
from secure_cnn.archive.keys.passphrase import check_costs
from secure_cnn.archive.opening import Path, opened, read_header
from secure_cnn.files import write_at

__all__ = ["change_recipients", "lock"]


def change_recipients(
    path: Path,
    *,
    identity: SlotReader,
    add: Sequence[SlotWriter] = (),
    remove: Sequence[str | SlotWriter] = (),
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
        lock(fd, path)
        header = read_header(fd)
        file_key, slots = header.unlock(identity)
        kept = _without(slots, removed)
        new = [who.wrap(file_key, header.core_hash) for who in added]
        replaced = {(slot.kind, slot.key_id) for slot in new}
        after = [slot for slot in kept if (slot.kind, slot.key_id) not in replaced] + new
        check_mix(slot.kind for slot in after)
        check_costs(after)
        _write(fd, header, after, file_key)


def lock(fd: int, path: Path) -> None:
    """Keeps every other change of this file out until the descriptor is closed.

    Raises:
        StorageError: Another process is changing it.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise StorageError(f"{path}: another process is changing it; try again later") from None


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
    """Mark, copy A, copy B, no mark: each on the disk before the next, save for the last."""
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
