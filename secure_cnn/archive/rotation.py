"""A new file key for a file: everything is encrypted anew, and the file replaced whole.

What changing recipients cannot do: who kept the old file key reads nothing of the new file. The old
content stays readable to them wherever a copy of the old file is.
"""

import os
import stat
from collections.abc import Sequence

from secure_cnn.archive.errors import InvalidKey, StorageError
from secure_cnn.archive.format.core import LATEST_FILE, Core
from secure_cnn.archive.format.payload import Progress
from secure_cnn.archive.format.slots import SlotReader, SlotWriter
from secure_cnn.archive.keys.doors import check_recipients, check_signer
from secure_cnn.archive.keys.signatures import Signer, Verifier
from secure_cnn.archive.opening import Path, opened, unlock
from secure_cnn.archive.recipients import lock
from secure_cnn.archive.sealing import new_core, write_sealed

__all__ = ["rotate"]


def rotate(
    path: Path,
    *,
    identity: SlotReader,
    recipients: Sequence[SlotWriter],
    signer: Signer | None = None,
    trusted: Sequence[Verifier] | None = None,
    progress: Progress | None = None,
) -> None:
    """Replaces a sealed file by one with the same content, a new file key and these recipients.

    Name, lineage, claims and permissions stay; file id and core hash are new, so that a successor
    that names this file as its previous one no longer does; for this reason a checkpoint in its
    store is refused. Segments are decrypted and encrypted one by one: no plaintext is written, and
    little of it is in memory at a time.

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
        ArchiveError: As for `load` and `save`; the old file is as it was.

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
        lock(fd, path)
        header, payload = unlock(fd, identity=identity, trusted=trusted, expect={}, core_hash=None)
        old = header.core
        _check_alone(path, old)
        if old.signer is not None and signer is None:
            raise InvalidKey(
                f"{path}: is signed, expected a signer for the new file, got none; name one, or "
                "save the state unsigned"
            )
        core = new_core(
            name=old.name,
            lineage=old.lineage,
            claims=old.claims,
            recipients=recipients,
            signer=signer,
            plaintext_length=old.plaintext_length,
            segment_length=old.segment_length,
        )
        write_sealed(
            path,
            core,
            payload,
            recipients=recipients,
            signer=signer,
            overwrite=True,
            mode=stat.S_IMODE(os.fstat(fd).st_mode),
            progress=progress,
        )


def _check_alone(path: Path, core: Core) -> None:
    """Refuses a checkpoint in its store, whose signed log would no longer know it."""
    folder = os.path.dirname(os.path.realpath(path))
    if core.lineage is not None and os.path.exists(os.path.join(folder, LATEST_FILE)):
        raise StorageError(
            f"{path}: expected a file on its own, got a checkpoint of a store, whose log names its "
            "hash; load it and save it as the store's next checkpoint, then prune, or rotate a "
            "copy outside of the folder"
        )
