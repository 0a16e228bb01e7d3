"""Writing a sealed file: a core, its slots, its payload and its signature, whole or not at all."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from secure_cnn.archive.errors import StateError
from secure_cnn.archive.format.claims import JSON, canonical_json
from secure_cnn.archive.format.core import Core, Lineage
from secure_cnn.archive.format.header import copy_length_for, derive_key, seal_header, seal_prefix
from secure_cnn.archive.format.layout import Layout
from secure_cnn.archive.format.merkle import merkle_root
from secure_cnn.archive.format.payload import Plaintext, Progress, encrypt_file
from secure_cnn.archive.format.slots import NO_KEY_ID, SlotWriter
from secure_cnn.archive.format.stream import create_stream
from secure_cnn.archive.keys.passphrase import check_costs
from secure_cnn.archive.keys.signatures import Signer
from secure_cnn.archive.opening import Path, footer_length
from secure_cnn.archive.output import new_file
from secure_cnn.files import write_at

__all__ = ["new_core", "write_sealed"]


def new_core(
    *,
    name: str,
    lineage: Lineage | None,
    claims: Mapping[str, JSON],
    recipients: Sequence[SlotWriter],
    signer: Signer | None,
    plaintext_length: int,
    segment_length: int,
) -> Core:
    """The core of a new file, with a fresh id.

    Raises:
        StateError: Name or claims are not what they must be.
        LimitExceeded: A length is outside its range.
    """
    if not isinstance(name, str):
        raise StateError(f"name: expected text, got {type(name).__name__}")
    if lineage is not None and not isinstance(lineage, Lineage):
        raise StateError(f"lineage: expected a Lineage, got {type(lineage).__name__}")
    audience = {who.key_id.hex() for who in recipients if who.key_id != NO_KEY_ID}
    return Core(
        file_id=os.urandom(32).hex(),
        created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        name=name,
        lineage=lineage,
        audience=tuple(sorted(audience)),
        claims=json.loads(canonical_json(dict(claims), "claims")),
        plaintext_length=plaintext_length,
        segment_length=segment_length,
        signer=signer.verifier.signer_id if signer else None,
    )


def write_sealed(
    path: Path,
    core: Core,
    plaintext: Plaintext,
    *,
    recipients: Sequence[SlotWriter],
    signer: Signer | None,
    overwrite: bool,
    mode: int = 0o666,
    progress: Progress | None = None,
) -> None:
    """Encrypts a plaintext under a fresh file key and puts the file at `path`.

    Args:
        core: Made by `new_core` for these recipients and this signer.
        overwrite: Whether a file at `path` may be replaced.

    Raises:
        InvalidKey: No recipients, or a mix.
        LimitExceeded: Too many recipients or claims, or passphrases that cost too much to try.
        StorageError: There is a file already, or the operating system refuses.
    """
    copy_length = copy_length_for([who.kind for who in recipients])
    core_hash = hashlib.sha256(seal_prefix(core, copy_length)).digest()
    file_key = os.urandom(32)
    slots = [who.wrap(file_key, core_hash) for who in recipients]
    check_costs(slots)
    head = seal_header(core, slots, file_key, copy_length)
    floe = create_stream(derive_key(file_key, b"payload"), core_hash, core.segment_length)
    layout = Layout(
        offset=len(head),
        segment_length=core.segment_length,
        plaintext_length=core.plaintext_length,
    )
    length = layout.end + footer_length(core)
    with new_file(path, length=length, overwrite=overwrite, mode=mode) as fd:
        leaves = encrypt_file(
            fd, layout, floe, plaintext, hashed=signer is not None, progress=progress
        )
        if signer is not None:
            root = merkle_root(leaves)
            signed = signer.verifier.public + signer.sign(core_hash, root)
            write_at(fd, memoryview(b"".join(leaves) + root + signed), layout.end)
        write_at(fd, memoryview(head), 0)
