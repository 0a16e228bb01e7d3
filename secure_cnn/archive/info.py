"""What a sealed file says in clear: as anyone may have written it, or as a signer vouches for."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch

from secure_cnn.archive.errors import Tampered
from secure_cnn.archive.format.claims import JSON
from secure_cnn.archive.format.core import Lineage
from secure_cnn.archive.format.header import VERSION, Header
from secure_cnn.archive.format.payload import Payload, Progress, hash_file
from secure_cnn.archive.format.slots import AnyIdentity, known_kinds
from secure_cnn.archive.format.state import build_state
from secure_cnn.archive.keys.signatures import Verifier
from secure_cnn.archive.loading import read_index, read_tensor
from secure_cnn.archive.opening import layout_of, read_header, signed_leaves, signer_of, unlock
from secure_cnn.archive.storage import Path, opened
from secure_cnn.printable import printable

__all__ = ["ArchiveInfo", "SlotInfo", "describe", "inspect", "verify"]


@final
@dataclass(frozen=True, kw_only=True)
class SlotInfo:
    """Who can open a file, as far as everybody can see.

    Attributes:
        kind: ``hybrid``, ``x25519``, ``argon2id``, ``kek``, ``service``, or a number.
        key_id: 32 hexadecimal digits; the `key_id` of a recipient, or a passphrase's salt.
        sealed_for: Whether the core names it: False for a passphrase, and for who was added later.

    Example:
        >>> print(SlotInfo(kind="hybrid", key_id="00" * 16, sealed_for=False))
        hybrid 00000000000000000000000000000000 (added later)
    """

    kind: str
    key_id: str
    sealed_for: bool

    def __str__(self) -> str:
        # The core names no passphrase, so that nothing tells when one was added.
        named = all(kind.named for kind in known_kinds() if kind.name.lower() == self.kind)
        later = " (added later)" if named and not self.sealed_for else ""
        return f"{self.kind} {self.key_id}{later}"


@final
@dataclass(frozen=True, kw_only=True)
class ArchiveInfo:
    """What a sealed file says in clear.

    Attributes:
        verified: True only from `verify`: the signature of a trusted signer holds over all else
            here but `slots`. From `inspect` it is False, and anyone may have written any of this.
        core_hash: What names the file: 64 hexadecimal digits; `load` can demand it.
        lineage: Where it stands in a sequence; None if in none.
        created: UTC time, ISO 8601.
        signer: The verifier of the signer; None if unsigned.
        slots: Who can open it, in file order; not covered by the signature.
        plaintext_length: Bytes of the safetensors file inside.

    Example:
        >>> import secure_cnn.archive as archive
        >>> archive.save("m", {}, recipients=[archive.generate_identity().recipient])
        >>> print(archive.inspect("m"))
        UNVERIFIED: ...
    """

    verified: bool
    version: int
    core_hash: str
    file_id: str
    name: str
    lineage: Lineage | None
    created: str
    claims: dict[str, JSON]
    signer: Verifier | None
    slots: tuple[SlotInfo, ...]
    plaintext_length: int
    segment_length: int
    file_length: int

    def __str__(self) -> str:
        # Texts come from the file: JSON escapes whatever a terminal would obey.
        state = f"VERIFIED, signed by {self.signer!r}"
        if not self.verified:
            state = "UNVERIFIED: anyone may have written this; verify() checks the signature"
        place = []
        if (at := self.lineage) is not None:
            place = [
                f"run      {json.dumps(at.run)}, step {at.step}, generation {at.generation}",
                f"previous {at.previous or 'none: the first'}",
            ]
        lines = [
            state,
            f"name     {json.dumps(self.name)}",
            f"created  {json.dumps(self.created)}",
            f"file id  {self.file_id}",
            f"core     {self.core_hash}",
            f"signer   {self.signer!r}" if self.signer else "signer   none",
            *place,
            *(f"slot     {slot}" for slot in self.slots),
            f"size     {self.file_length} bytes, {self.plaintext_length} inside",
            *(
                f"claim    {json.dumps(key)} = {json.dumps(value)}"
                for key, value in self.claims.items()
            ),
        ]
        return printable("\n".join(lines), layout=True)


def describe(header: Header, signer: Verifier | None, size: int, *, verified: bool) -> ArchiveInfo:
    """The public facts of a header, for a file of `size` bytes."""
    core = header.core
    return ArchiveInfo(
        verified=verified,
        version=VERSION,
        core_hash=header.core_hash.hex(),
        file_id=core.file_id,
        name=core.name,
        lineage=core.lineage,
        created=core.created,
        claims=core.claims,
        signer=signer,
        slots=tuple(
            SlotInfo(
                kind=slot.name,
                key_id=slot.key_id.hex(),
                sealed_for=slot.key_id.hex() in core.audience,
            )
            for slot in header.copies[0].slots
        ),
        plaintext_length=core.plaintext_length,
        segment_length=core.segment_length,
        file_length=size,
    )


def inspect(path: Path) -> ArchiveInfo:
    """What a sealed file says in clear; needs no key and checks no signature.

    Example:
        >>> import secure_cnn.archive as archive
        >>> me = archive.generate_identity()
        >>> archive.save("m", {}, recipients=[me.recipient], claims={"epsilon": 3.0})
        >>> archive.inspect("m").claims
        {'epsilon': 3.0}
    """
    with opened(path) as fd:
        header = read_header(fd)
        return describe(header, signer_of(fd, header), os.fstat(fd).st_size, verified=False)


def verify(
    path: Path,
    *,
    trusted: Sequence[Verifier],
    deep: AnyIdentity | None = None,
    progress: Progress | None = None,
) -> ArchiveInfo:
    """What a sealed file says, after a trusted signature held over core and payload.

    Needs no decryption key. The slots are not signed, so that they can be exchanged: who can open
    the file is not verified, what it holds is.

    Args:
        trusted: The file must be signed by one of these; an empty list refuses every file.
        deep: An identity, with which the file is also decrypted, its slots' MAC checked and its
            inside read to the end, without keeping any of it.
        progress: Called now and then with the bytes read so far, and those there are to read:
            with `deep` each twice.

    Raises:
        UntrustedSigner: The file is unsigned, or signed by someone else.
        Tampered: The signature does not hold, or the payload is not what was signed.

    Example:
        >>> import secure_cnn.archive as archive
        >>> me, signer = archive.generate_identity(), archive.generate_signer()
        >>> archive.save("m", {}, recipients=[me.recipient], signer=signer)
        >>> archive.verify("m", trusted=[signer.verifier], deep=me).verified
        True
    """
    with opened(path) as fd:
        header = read_header(fd)
        passes = 1 if deep is None else 2
        signed = signed_leaves(fd, header, trusted)
        if signed != hash_file(fd, layout_of(header), _part(progress, 0, passes)):
            raise Tampered("the payload is not the one that was signed; get the file again")
        if deep is not None:
            _, payload = unlock(
                fd, identity=deep, trusted=trusted, expect={}, core_hash=header.core_hash.hex()
            )
            payload.check(_part(progress, 1, passes))
            _check_inside(payload)
        return describe(header, signer_of(fd, header), os.fstat(fd).st_size, verified=True)


def _check_inside(payload: Payload) -> None:
    """Passes if the plaintext is a state; its segments were checked, and only bools are read."""
    index = read_index(payload)
    for span in index.spans.values():
        if span.dtype is torch.bool:
            read_tensor(payload, index, span)
    build_state(index, lambda name: torch.empty(0))


def _part(progress: Progress | None, before: int, passes: int) -> Progress | None:
    """The progress of one of several passes over a payload, as a part of all of them."""
    if progress is None:
        return None
    return lambda done, total: progress(before * total + done, passes * total)
