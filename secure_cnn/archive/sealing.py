"""Making a sealed file: a core, its slots, its payload and its signature, whole or not at all."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import final

from secure_cnn.archive.errors import StateError
from secure_cnn.archive.format.claims import JSON, canonical_json, copy_claims
from secure_cnn.archive.format.core import Core, Lineage, timestamp
from secure_cnn.archive.format.header import copy_length_for, derive_key, seal_header, seal_prefix
from secure_cnn.archive.format.payload import Plaintext, Progress, encrypt_file, merkle_root
from secure_cnn.archive.format.slots import (
    NO_KEY_ID,
    AnyRecipient,
    check_beside,
    check_together,
    wrap_each,
)
from secure_cnn.archive.format.state import State, encode_state, named_tensors
from secure_cnn.archive.format.stream import Layout, create_stream
from secure_cnn.archive.format.tensors import Pieces
from secure_cnn.archive.keys import check_recipients, check_signer
from secure_cnn.archive.keys.identity import HYBRID
from secure_cnn.archive.keys.signatures import Signer
from secure_cnn.archive.opening import footer_length
from secure_cnn.archive.storage import Path, new_file
from secure_cnn.files import write_at

__all__ = ["Draft", "check", "save"]

_SEGMENT_LENGTH = 1 << 20


def save(  # noqa: PLR0913  (each is one decision of who saves)
    path: Path,
    state: State,
    *,
    recipients: Sequence[AnyRecipient],
    signer: Signer | None = None,
    claims: Mapping[str, JSON] | None = None,
    private_claims: Mapping[str, JSON] | None = None,
    name: str = "",
    lineage: Lineage | None = None,
    overwrite: bool = False,
    segment_length: int = _SEGMENT_LENGTH,
    progress: Progress | None = None,
) -> None:
    """Encrypts a state to recipients, signs it, and puts it at `path` whole or not at all.

    Args:
        path: Where the file goes.
        state: A tree of dict, list, tuple, plain data and tensors; see `encode_state`. A flat dict
            of tensors keeps its names. One tensor, number, text or None is a tree too.
        recipients: Who can open the file: 1 to 256 of `Recipient`, `Passphrase`,
            `KeyEncryptionKey` and `ServiceKey`. Hybrid and X25519 recipients do not mix, since the
            file would be no stronger than the weaker.
        signer: Who vouches for it. Without one, `load(trusted=…)` will refuse the file.
        claims: A JSON object that everyone can read, bound into MAC, payload and signature.
        private_claims: A JSON object that recipients only can read, bound as the tensors are. It
            has no key in common with `claims`.
        name: A logical name that everyone can read.
        lineage: Where the file stands in a sequence; everyone can read it.
        segment_length: Bytes of an encrypted segment, 4 KiB to 64 MiB.
        progress: Called now and then with the bytes encrypted so far, and those there are in all.
            What it raises ends the save, and no file is left.

    Raises:
        StateError: State, claims or lineage hold something that the format cannot hold.
        InvalidKey: No recipients, a mix, what is no recipient or signer, or a recipient whose kind
            is not registered, or whose slot is not what it declares.
        KeyServiceError: A key service did not wrap the file key.
        LimitExceeded: Too many recipients or claims, or a segment length outside its range.
        StorageError: There is a file already, or the operating system refuses.

    Example:
        >>> import torch, secure_cnn.archive as archive
        >>> me = archive.generate_identity()
        >>> archive.save("m.sealed", {"weight": torch.ones(2)}, recipients=[me.recipient])
        >>> archive.load("m.sealed", identity=me)
        {'weight': tensor([1., 1.])}
    """
    recipients, signer = check_recipients(recipients), check_signer(signer)
    public, private = _apart(claims, private_claims)
    plaintext = Pieces(encode_state(state, private))
    draft = Draft(
        recipients=recipients,
        signer=signer,
        claims=public,
        name=name,
        lineage=lineage,
        segment_length=segment_length,
    )
    draft.write(path, plaintext, len(plaintext), overwrite=overwrite, progress=progress)


def check(
    state: State = None,
    *,
    claims: Mapping[str, JSON] | None = None,
    private_claims: Mapping[str, JSON] | None = None,
    name: str = "",
    recipients: Sequence[AnyRecipient] = (),
) -> None:
    """Passes if `save`, and `save_plain`, will take these: to be asked before hours of work.

    Cheap: the bytes of tensors are not looked at, and nothing is written. What remains for `save`
    to refuse is the disk, and a bool tensor with bytes that are none. All arguments are as for
    `save`; the tensors are of the types that they will have.

    Example:
        >>> check(claims={"epsilon": float("nan")})
        Traceback (most recent call last):
        secure_cnn.archive.errors.StateError: claims.epsilon: expected plain JSON ...
    """
    named_tensors(state)
    recipients = check_recipients(recipients)
    public, _ = _apart(claims, private_claims)
    core = Draft(recipients=recipients, claims=public, name=name).core(0)
    # Who opens it may not be known yet; then the head is as long as one hybrid recipient makes it.
    seal_prefix(core, copy_length_for([who.kind for who in recipients] or [HYBRID]))


@final
@dataclass(frozen=True, kw_only=True)
class Draft:
    """What a sealed file is to be, all but its content."""

    recipients: Sequence[AnyRecipient]
    signer: Signer | None = None
    claims: Mapping[str, JSON] = field(default_factory=dict)
    name: str = ""
    lineage: Lineage | None = None
    segment_length: int = _SEGMENT_LENGTH

    def core(self, plaintext_length: int) -> Core:
        """The core of a new file, with a fresh id."""
        if not isinstance(self.name, str):
            raise StateError(f"name: expected text, got {type(self.name).__name__}")
        if self.lineage is not None and not isinstance(self.lineage, Lineage):
            raise StateError(f"lineage: expected a Lineage, got {type(self.lineage).__name__}")
        audience = {who.key_id.hex() for who in self.recipients if who.key_id != NO_KEY_ID}
        return Core(
            file_id=os.urandom(32).hex(),
            created=timestamp(datetime.now(UTC)),
            name=self.name,
            lineage=self.lineage,
            audience=tuple(sorted(audience)),
            claims=json.loads(canonical_json(dict(self.claims), "claims")),
            plaintext_length=plaintext_length,
            segment_length=self.segment_length,
            signer=self.signer.verifier.signer_id if self.signer else None,
        )

    def write(
        self,
        path: Path,
        plaintext: Plaintext,
        plaintext_length: int,
        *,
        overwrite: bool,
        mode: int = 0o666,
        progress: Progress | None = None,
    ) -> str:
        """Encrypts a plaintext under a fresh file key into a file; gives its core hash in hex."""
        core = self.core(plaintext_length)
        copy_length = copy_length_for([who.kind for who in self.recipients])
        core_hash = hashlib.sha256(seal_prefix(core, copy_length)).digest()
        file_key = os.urandom(32)
        slots = wrap_each(self.recipients, file_key, core_hash)
        check_beside(slot.kind for slot in slots)  # what is written, whatever was declared before
        check_together(slots)
        head = seal_header(core, slots, file_key, copy_length)
        floe = create_stream(derive_key(file_key, b"payload"), core_hash, core.segment_length)
        layout = Layout(
            offset=len(head), segment_length=core.segment_length, plaintext_length=plaintext_length
        )
        length, signer = layout.end + footer_length(core), self.signer
        with new_file(path, length=length, overwrite=overwrite, mode=mode) as fd:
            leaves = encrypt_file(
                fd, layout, floe, plaintext, hashed=signer is not None, progress=progress
            )
            if signer is not None:
                root = merkle_root(leaves)
                signed = signer.verifier.public + signer.sign(core_hash, root)
                write_at(fd, memoryview(b"".join(leaves) + root + signed), layout.end)
            # The head last: a file that was cut off while it was written is no sealed file.
            write_at(fd, memoryview(head), 0)
        return core_hash.hex()


def _apart(
    claims: Mapping[str, JSON] | None, private_claims: Mapping[str, JSON] | None
) -> tuple[dict[str, JSON], dict[str, JSON]]:
    """Public and private claims, which have no key in common."""
    public = copy_claims(claims, "claims")
    private = copy_claims(private_claims, "private_claims")
    if twice := public.keys() & private.keys():
        raise StateError(f"claims: expected {sorted(twice)} to be public or private, got both")
    return public, private
